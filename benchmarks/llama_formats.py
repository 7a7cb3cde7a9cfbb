"""What rotations do to llama.cpp's own weight formats: perplexity on a CPU, by llama.cpp itself.

    python benchmarks/llama_formats.py --refined R1.safetensors --out figures/llama_formats.json

Needs llama-cpp-python (`pip install -e .[llama]`, which builds llama.cpp). Embedding and head are Q8_0 in
every file, so that only the layers' linears differ; keys and values are kept in fp16, llama.cpp's default.
The demo model's weights lie on llama.cpp's Q4_1 grid as they come, where an unrotated Q4_1 loses nothing.
`permuted` takes them off it: the same unrotated weights, their channels in another order, so that blocks
of 32 are cut elsewhere. It is what rotations are to be compared with.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dfrot_lab import checkpoints, corpora, evaluation, files, models
from dfrot_lab.evaluation import Perplexity
from dfrot_lab.exports import gguf, sources
from dfrot_lab.rotations import Rotations

FORMATS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "Q4_K_M")


def perplexity(path: Path, tokens: Tensor, threads: int = 2) -> Perplexity:
    """llama.cpp's perplexity of a GGUF on `tokens` [windows, seqlen], no BOS added, as in `evaluation`."""
    from llama_cpp import Llama

    size = tokens.shape[1]
    lm = Llama(
        str(path), n_ctx=size, n_batch=size, logits_all=True, n_threads=threads,
        n_threads_batch=threads, verbose=False,
    )  # fmt: skip
    nll = []
    for window in tokens:
        lm.reset()
        lm.eval(window.tolist())
        scores = torch.from_numpy(lm.scores[: size - 1]).double()
        picked = scores.log_softmax(-1).gather(1, window[1:, None])
        nll.append(-picked.mean().item())
    lm.close()
    return Perplexity(nll)


def quantize(source: Path, target: Path, kind: str, threads: int = 2) -> Path:
    """llama.cpp's own quantization of a GGUF's linears to `kind`, embedding and head to Q8_0."""
    import llama_cpp

    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    how.nthread = threads
    how.output_tensor_type = how.token_embedding_type = llama_cpp.GGML_TYPE_Q8_0
    with files.atomic(target) as partial:
        given = str(source).encode(), str(partial).encode(), ctypes.byref(how)
        if code := llama_cpp.llama_model_quantize(*given):
            raise click.ClickException(f"llama.cpp could not quantize {source} to {kind}: {code}")
    return target


def silence() -> None:
    """No log of llama.cpp's but its errors."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def quiet(level, text, data):
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            click.echo(text.decode(errors="replace"), err=True, nl=False)

    silence.kept = quiet  # llama.cpp calls it later
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))


def permuted(source: sources.Source, folder: Path, seed: int = 0) -> Path:
    """`source` with gains folded and every axis in a random order: channels, heads' values, MLP neurons."""
    config = source.config
    generator = torch.Generator().manual_seed(seed)
    d, size, inner = (
        config["hidden_size"], checkpoints.head_dim(source.folder), config["intermediate_size"],
    )  # fmt: skip
    order = {n: torch.randperm(n, generator=generator) for n in (d, size, inner)}
    r1, r2 = (torch.eye(n, dtype=torch.float64)[order[n]] for n in (d, size))
    checkpoints.merge(source.folder, folder, Rotations(R1=r1, R2=r2))
    for shard in checkpoints.shards(folder):
        found = load_file(folder / shard)
        for name, w in found.items():
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                found[name] = w[order[inner]].contiguous()
            elif name.endswith("down_proj.weight"):
                found[name] = w[:, order[inner]].contiguous()
        save_file(found, folder / shard, {"format": "pt"})
    return folder


def written(name: str, source: sources.Source, work: Path, refined: str | None) -> Path:
    """The F32 GGUF of one row, made if it is not there."""
    path = work / f"{name}.gguf"
    if path.exists():
        return path
    if name == "permuted":
        folder = work / "permuted"
        if not folder.exists():
            permuted(source, folder)
        other = sources.Source(folder, source.model, source.revision, source.gguf)
        gguf.write(other, path, sources.Recipe())
    else:
        given = {"unrotated": "NR", "refined": refined}.get(name, name)
        gguf.write(source, path, sources.recipe(given, source))
    return path


@click.command()
@click.option("--model", default="demo", help="See `models.load`.")
@click.option("--corpus", default="demo")
@click.option("--windows", default=2)
@click.option("--seqlen", default=512)
@click.option("--refined", help="R1 as .safetensors, from `dfrot-lab optimize`.")
@click.option("--formats", default=",".join(FORMATS), help="Of llama.cpp.")
@click.option("--threads", default=2)
@click.option("--work", type=click.Path(path_type=Path), default=Path("results/llama_formats"))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The table, as JSON.")
def main(model, corpus, windows, seqlen, refined, formats, threads, work, out) -> None:
    """Measure every row × format; files in WORK and rows in OUT that are there already are kept."""
    torch.set_num_threads(threads)
    silence()
    work.mkdir(parents=True, exist_ok=True)
    tokens = corpora.load(
        corpus, "evaluation", models.load_tokenizer(model), windows=windows, seqlen=seqlen
    )
    about = {"model": model, "corpus": corpus, "windows": windows, "seqlen": seqlen}
    about |= {"tokens": corpora.fingerprint(tokens)}
    if refined:
        about["refined"] = files.sha256(refined)
    table = files.read_json(out) if out.exists() else {"about": about, "ppl": {}, "bytes": {}}
    if table["about"] != about:
        raise click.ClickException(f"{out} was measured on something else: choose another file")
    if "transformers" not in table:
        lm = models.load(model)
        table["transformers"] = evaluation.perplexity(lm, tokens).value
        del lm
        files.write_json(out, table)
    names = ["unrotated", "permuted", "RO", "RH", *(["refined"] if refined else [])]
    with sources.opened(model, near=work) as source:
        for name in names:
            row = table["ppl"].setdefault(name, {})
            for kind in ("F32", *formats.split(",")):
                if kind in row:
                    continue
                start = time.monotonic()
                path = full = written(name, source, work, refined)
                if kind != "F32":
                    path = quantize(full, work / f"{name}-{kind}.gguf", kind, threads)
                row[kind] = perplexity(path, tokens, threads).value
                table["bytes"][kind] = path.stat().st_size
                if path != full:
                    path.unlink()
                files.write_json(out, table)
                click.echo(f"{name} {kind}: {row[kind]:.3f} ({time.monotonic() - start:.0f} s)")
    click.echo(markdown(table))


def markdown(table: dict) -> str:
    """The table as it stands in docs/export.md."""
    kinds = list(table["bytes"])
    kinds.sort(key=lambda k: -table["bytes"][k])
    lines = ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name, row in table["ppl"].items():
        cells = [f"{row[k]:.2f}" if k in row else "–" for k in kinds]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

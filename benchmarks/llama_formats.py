"""What rotations do to llama.cpp's own weight formats: perplexity on a CPU, by llama.cpp itself.

    python -m benchmarks.llama_formats --refined R1.safetensors --out figures/llama_formats.json

Needs llama-cpp-python (`pip install -e .[llama]`, which builds llama.cpp). Every linear of the layers is in
the format of its column, embedding and head are Q8_0, or F32 beside F32; keys and values are kept in fp16,
llama.cpp's default. The demo model's weights lie on llama.cpp's Q4_1 grid as they come. `permuted` takes
them off it: unrotated weights with gains folded and channels in another order, so that blocks of 32 are cut
elsewhere. It is what rotations are compared with, window by window.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks import llama_table, pages
from benchmarks.llama_table import BASELINE, MARK
from dfrot_lab import checkpoints, corpora, evaluation, files, models, rotations
from dfrot_lab.evaluation import Perplexity
from dfrot_lab.exports import gguf, sources
from dfrot_lab.rotations import Rotations

FORMATS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")  # blocks of 32 along a row
ONCE = ("F32", "Q8_0")  # at one seed: next to nothing is rounded
NEAR = 0.005  # llama.cpp's F32 perplexity against transformers'
PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class Variant:
    """A row of the table at one seed; R1: SHA-256 of the file of a refined rotation."""

    row: str
    seed: int | None = None
    R1: str | None = None

    def __str__(self) -> str:
        return self.row if self.seed is None else f"{self.row}, seed {self.seed}"


def variants(seeds: int, refined: Sequence[str] = ()) -> dict[Variant, str]:
    """Variant → the rotation that `sources.recipe` is to merge, in the order of the table."""
    found = {Variant("unrotated"): "NR"}
    for row in (BASELINE, "RO", "RH"):
        found |= {Variant(row, seed): "NR" if row == BASELINE else row for seed in range(seeds)}
    for path in refined:
        seed = rotations.load(path)[1].get("seed")
        found[Variant("refined", seed, files.sha256(path))] = path
    return found


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
        scores = torch.from_numpy(lm.scores[: size - 1])
        losses = F.cross_entropy(scores, window[1:], reduction="none")
        nll.append(losses.double().mean().item())
    lm.close()
    return Perplexity(nll)


def check_rows(kind: str, config: dict[str, Any], head_dim: int) -> None:
    """Refuse a format whose blocks do not divide every row: llama.cpp would take another in its place."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    names = GGMLQuantizationType.__members__
    name = kind if kind in names else kind.rsplit("_", 1)[0]  # Q4_K_M, a mixture, is Q4_K alone
    if name not in names:
        raise click.ClickException(f"format {kind!r} is none of llama.cpp's: use {FORMATS}")
    block = GGML_QUANT_SIZES[names[name]][0]
    heads = config["num_attention_heads"] * head_dim
    for row in (config["hidden_size"], heads, config["intermediate_size"]):
        if row % block:
            raise click.ClickException(
                f"{kind} has blocks of {block} and this model rows of {row}: llama.cpp would take another "
                f"format there without failing; use formats with blocks of 32, as {', '.join(FORMATS)}"
            )


def quantize(source: Path, target: Path, kind: str, threads: int = 2) -> Path:
    """llama.cpp's own quantization of a GGUF's linears, all to `kind`; embedding and head to Q8_0."""
    import llama_cpp

    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    how.pure = (
        True  # no finer format for tensors that llama.cpp thinks matter: a column is one format
    )
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


def written(variant: Variant, rotation: str, source: sources.Source, folder: Path) -> bool:
    """Write `folder`/F32.gguf, ids for a vocabulary; returns whether embedding and head are two tables."""
    if variant.row == BASELINE:
        other = permuted(source, folder / "permuted", variant.seed)
        source, recipe = sources.Source(other, source.model, source.revision), sources.Recipe()
    else:
        recipe = sources.recipe(rotation, source, seed=variant.seed or 0)
    gguf.write(source, folder / "F32.gguf", recipe, vocabulary=False)
    # final gain and R1 are merged into the head and, without the gain, into the embedding
    return bool(recipe.parts) or not source.config["tie_word_embeddings"]


def conditions(model: str, corpus: str, tokens: Tensor) -> dict[str, Any]:
    """What every number of one table shares: text, llama.cpp and the instructions it was built for."""
    import llama_cpp

    return {
        "model": model, "corpus": corpus, "windows": len(tokens), "seqlen": tokens.shape[1],
        "tokens": corpora.fingerprint(tokens), "llama-cpp-python": version("llama-cpp-python"),
        "built for": " ".join(llama_cpp.llama_print_system_info().decode().split()),
    }  # fmt: skip


def resumed(out: Path, about: dict[str, Any], wanted: Sequence[Variant]) -> dict[str, Any]:
    """The table in `out`, or a new one; ClickException where its numbers do not go with this run's."""
    if not out.exists():
        return {"about": about, "transformers": [], "cells": []}
    table = files.read_json(out)
    for name, now in about.items():
        if (then := table["about"].get(name)) != now:
            raise click.ClickException(
                f"{out} was measured with {name} = {then}, this is {now}: choose another file"
            )
    known = {c["R1"] for c in table["cells"]} - {None}
    given = {v.R1 for v in wanted} - {None}
    if given and (other := known - given):
        raise click.ClickException(
            f"{out} holds refined rotations that are not among those given (SHA-256 "
            f"{', '.join(sorted(other))}): give them too, or choose another file"
        )
    return table


def missing(table: dict[str, Any], wanted: Sequence[Variant], formats: Sequence[str]):
    """(variant, its formats) that `table` lacks; those that do not round are wanted of one seed a row."""
    done = {(Variant(c["row"], c["seed"], c["R1"]), c["format"]) for c in table["cells"]}
    first = {v.row: v for v in reversed(wanted)}
    for v in wanted:
        kinds = [k for k in ("F32", *formats) if k not in ONCE or first[v.row] == v]
        if left := [k for k in kinds if (v, k) not in done]:
            yield v, left


def measure(folder: Path, kind: str, tokens: Tensor, threads: int) -> dict[str, Any]:
    """One cell, from `folder`/F32.gguf: its format, mean nll of every window, size of the file."""
    path = full = folder / "F32.gguf"
    if kind != "F32":
        path = quantize(full, folder / f"{kind}.gguf", kind, threads)
    nll = perplexity(path, tokens, threads).nll
    cell = {"format": kind, "nll": nll, "bytes": path.stat().st_size}
    if path != full:
        path.unlink()
    return cell


@click.command(context_settings={"show_default": True})
@click.option("--model", default="demo", help="See `models.load`.")
@click.option("--corpus", default="demo", help="Its evaluation split.")
@click.option("--windows", default=6, type=click.IntRange(min=2), help="Pairs of a difference.")
@click.option("--seqlen", default=512)
@click.option("--seeds", default=2, help="Of the permutation, RO and RH.")
@click.option("--refined", multiple=True, help="R1 of `dfrot-lab optimize`; once for each seed.")
@click.option("--formats", default=",".join(FORMATS), help="Of llama.cpp, besides F32.")
@click.option("--threads", default=2)
@click.option("--work", type=PATH, default=Path("results/llama_formats"), help="For passing GBs.")
@click.option("--page", type=PATH, help=f"Put the table there too, between two lines {MARK}")
@click.option("--out", type=PATH, required=True, help="The numbers, as JSON.")
def main(
    model, corpus, windows, seqlen, seeds, refined, formats, threads, work, page, out
) -> None:  # fmt: skip
    """Measure every row × format that OUT lacks, and print the table."""
    torch.set_num_threads(threads)
    silence()
    work.mkdir(parents=True, exist_ok=True)
    tokens = corpora.load(
        corpus, "evaluation", models.load_tokenizer(model), windows=windows, seqlen=seqlen
    )
    rows, formats = variants(seeds, refined), formats.split(",")
    table = resumed(out, conditions(model, corpus, tokens), list(rows))
    if not table["transformers"]:
        table["transformers"] = evaluation.perplexity(models.load(model), tokens).nll
        files.write_json(out, table)
    wanted = Perplexity(table["transformers"]).value
    with sources.opened(model, near=work) as source:
        for kind in formats:
            check_rows(kind, source.config, checkpoints.head_dim(source.folder))
        for variant, kinds in missing(table, list(rows), formats):
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=work) as folder:
                untied = written(variant, rows[variant], source, Path(folder))
                for kind in kinds:
                    start = time.monotonic()
                    cell = measure(Path(folder), kind, tokens, threads) | {"untied": untied}
                    found = Perplexity(cell["nll"]).value
                    click.echo(f"{variant}, {kind}: {found:.3f} ({time.monotonic() - start:.0f} s)")
                    if kind == "F32" and not abs(found / wanted - 1) < NEAR:
                        raise click.ClickException(
                            f"llama.cpp finds {found:.3f} where transformers finds {wanted:.3f}: "
                            f"{variant.row} is exported wrongly, please report this"
                        )
                    table["cells"].append(asdict(variant) | cell)
                    files.write_json(out, table)
    pages.publish(llama_table.markdown(table), page, MARK)


if __name__ == "__main__":
    main()

"""The refinement of R1: the published procedure against ours, time a step and to equal held-back loss.

The published one is our own writing of what DFRot's released code does in a step: each product, copy, SVD
and QR, in fp32 and on whole matrices. Both start from the same Hadamard and see the same rows, made here
with massive tokens planted. First the gate: from one rotation, both take the same step.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import click
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import records
from dfrot_lab import dfrot, polar, rotations
from dfrot_lab.activations import Activations
from dfrot_lab.massive import is_massive
from dfrot_lab.quantizers import QuantSpec, fake_quantize
from dfrot_lab.weighting import Weighting

ALPHA = 100.0  # γ: on the rows, and so squared on the error
SPEC = QuantSpec(symmetric=True)  # the quantizer that the released code has in its loop


def planted(rows: int, d: int, seed: int, device: str = "cpu") -> Tensor:
    """[rows, d] of norm √d: anisotropic normal rows of some channels' own scale, 0.3 % massive ones."""
    g = torch.Generator(device).manual_seed(seed)
    shared = torch.Generator().manual_seed(d)  # what is the model's own: the same for every seed
    scale = torch.exp(0.7 * torch.randn(d, generator=shared)).to(device)
    mix = torch.randn(16, d, generator=shared).to(device)
    x = torch.randn(rows, d, generator=g, device=device).mul_(scale)
    x += torch.randn(rows, 16, generator=g, device=device) @ mix
    where = torch.randperm(d, generator=shared)[:4].to(device)
    few = torch.randperm(rows, generator=g, device=device)[: max(1, round(0.003 * rows))]
    spikes = torch.tensor([40.0, -25.0, 15.0, 8.0], device=device)
    x[few[:, None], where] += spikes * math.sqrt(d)
    return x.mul_(math.sqrt(d) / x.norm(dim=-1, keepdim=True))


def precisions(device: str, low: bool) -> dict[str, dict]:
    """Name → options of `dfrot.optimize` for the two products of a step."""
    kinds: dict[str, dict] = {"fp32": {}}
    if device != "cpu":
        kinds["tf32"] = {"tf32": True}
    if low:
        kinds["fp32, error bf16"] = {"error_dtype": torch.bfloat16}
        kinds["bf16"] = {"dtype": torch.bfloat16}
    return kinds


def published_step(normal: Tensor, massive: Tensor, r: Tensor) -> Tensor:
    """One iteration as released: nine products with all rows, an SVD and a QR, all in fp32.

    Counted by rows: the losses of normal and of massive rows with R as it is (1), the weighted rows put
    together and rotated (2), quantized, Procrustes (3); with the new R the loss on the same codes (4), on
    new ones (5), of normal and of massive rows (6), then the same for the test whether to accept (7, 8),
    and the rotated rows for the log (9).
    """

    def losses(rotation: Tensor) -> None:
        for part in (normal, massive):
            y = part @ rotation
            (y - fake_quantize(y, SPEC)).square().sum(-1).mean()

    losses(r)
    a = torch.cat([normal, massive * ALPHA])
    y = a @ r
    b = fake_quantize(y, SPEC)
    u, _, vt = torch.linalg.svd(a.mT @ b)
    new = torch.linalg.qr(u @ vt).Q
    (a @ new - b).square().sum(-1).mean()
    y = a @ new
    (y - fake_quantize(y, SPEC)).square().sum(-1).mean()
    losses(new)
    losses(new)
    y = a @ new
    (y - fake_quantize(y, SPEC)).square().sum(-1).mean()
    a @ new
    return new


def plain_step(a: Tensor, r: Tensor) -> Tensor:
    """The same step with what it needs: two products on whole matrices and an SVD, fp32."""
    b = fake_quantize(a @ r, SPEC)
    u, _, vt = torch.linalg.svd(a.mT @ b)
    return u @ vt


def clock(call: Callable, args: tuple, device: str, steps: int) -> float:
    """Median seconds of `steps` calls, each waited for; one before the clock, unless one is to do."""
    if steps > 1:
        call(*args)
    times = []
    for _ in range(steps):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call(*args)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ours(x: Activations, start: Tensor, how: dict, device: str, steps: int) -> list[float]:
    """Seconds of each of `steps` steps of `dfrot.optimize`, set-up (the Gram matrix) left out."""
    times, factor = [], dfrot.polar.polar

    def marked(m: Tensor) -> Tensor:
        q = factor(m)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return q

    dfrot.polar.polar = marked
    try:
        dfrot.optimize(x, start, SPEC, Weighting(ALPHA), iterations=steps + 1, device=device, **how)
    finally:
        dfrot.polar.polar = factor
    return [b - a for a, b in itertools.pairwise(times)]


def forced(method: str) -> AbstractContextManager:
    """Context in which the fast step takes its polar factor from one method alone, and as it comes."""
    return mock.patch.object(polar, "polar", getattr(polar, method))


def gate(d: int, device: str) -> dict[str, float]:
    """Largest difference of the rotations after one step from RH, ours against the plain SVD's in fp64.

    entries: with the polar factor that this device gets; mixed, products, newton: with that of each.
    """
    x = Activations.of(planted(20 * d, d, 1).double())
    start = rotations.random_hadamard(d, 0)

    def step(solver: str) -> Tensor:
        return dfrot.optimize(
            x, start, SPEC, Weighting(ALPHA), iterations=1, solver=solver, dtype=torch.float64,
            device=device, progress=f"gate, {solver}",
        )[0]  # fmt: skip

    exact, found = step("svd"), {"entries": step("fast")}
    for method in ("mixed", "products", "newton"):
        with forced(method):
            found[method] = step("fast")
    return {name: (r - exact).abs().max().item() for name, r in found.items()}


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(normal, massive) rows, by the rule of this package."""
    heavy = torch.cat([is_massive(part, SPEC) for part in x.split(2048)])
    return x[~heavy], x[heavy]


def measure(d: int, rows: int, steps: int, device: str, low: bool) -> dict:
    """One row of the table."""
    x, start = planted(rows, d, 0, device), rotations.random_hadamard(d, 0)
    r = start.float().to(device)
    normal, massive = split(x)
    row: dict = {"d": d, "rows": rows, "massive": len(massive)}
    row["published s"] = clock(published_step, (normal, massive, r), device, steps)
    normal = torch.cat([normal, massive * ALPHA])  # in the place of the old, which is freed
    row["two products s"] = clock(plain_step, (normal, r), device, steps)
    del normal, massive
    wrapped = Activations.of(x)
    for name, how in precisions(device, low).items():
        row[f"{name} s"] = statistics.median(ours(wrapped, start, how, device, steps))
        row[f"{name} ratio"] = row["published s"] / row[f"{name} s"]
    return row


def whole(d: int, rows: int, iterations: int, device: str, low: bool) -> dict:
    """Seconds of all `iterations` of ours, rows in the host's memory at first, and the held-back loss.

    On a GPU on its tensor cores alone: fp32 products take most of the time there.
    """
    x = Activations.of(planted(rows, d, 0, device).cpu())
    held = Activations.of(planted(16384, d, 7, device))
    start, weighting = rotations.random_hadamard(d, 0), Weighting(ALPHA)
    row = {"d": d, "rows": rows, "iterations": iterations}
    row["start loss"] = dfrot.loss(held, start, SPEC, weighting)
    for name, how in precisions(device, low).items():
        if name == "fp32" and device != "cpu":
            continue
        began = time.perf_counter()
        r, log = dfrot.optimize(
            x, start, SPEC, weighting, iterations=iterations, device=device, progress=name, **how
        )
        row[f"{name} s"] = time.perf_counter() - began
        row[f"{name} end"] = log.rotated[-1]
        row[f"{name} loss"] = dfrot.loss(held, r, SPEC, weighting)
        row[f"{name} off"] = rotations.orthogonality_error(r)
    return row


def to_equal_loss(d: int, rows: int, iterations: int, device: str, low: bool) -> dict:
    """Seconds until the held-back loss is what `iterations` published steps reach, and both ends.

    same steps: as many of ours without over-relaxation, for the final loss; in fp32, on a GPU in others too.
    """
    x, held = planted(rows, d, 0, device), Activations.of(planted(16384, d, 7, device))
    start, weighting = rotations.random_hadamard(d, 0), Weighting(ALPHA)
    normal, massive = split(x)
    r, began = start.float().to(device), time.perf_counter()
    for _ in tqdm(range(iterations), desc="published"):
        r = published_step(normal, massive, r)
    if device == "cuda":
        torch.cuda.synchronize()
    row = {
        "d": d,
        "rows": rows,
        "iterations": iterations,
        "published s": time.perf_counter() - began,
    }
    row["published loss"] = dfrot.loss(held, r.double().cpu(), SPEC, weighting)
    row["published off"] = rotations.orthogonality_error(r.double().cpu())
    wanted, x = row["published loss"], Activations.of(x)
    for kind, how in precisions(device, low and device != "cpu").items():
        name, began = "same steps" + f" {kind}" * (kind != "fp32"), time.perf_counter()
        r, _ = dfrot.optimize(
            x, start, SPEC, weighting, iterations=iterations, device=device, progress=name, **how
        )
        row[f"{name} s"] = time.perf_counter() - began
        row[f"{name} loss"] = dfrot.loss(held, r, SPEC, weighting)
        row[f"{name} off"] = rotations.orthogonality_error(r)
        row[f"{name} loss over published"] = row[f"{name} loss"] / wanted
    dtype = torch.bfloat16 if low else torch.float32
    ways = {
        "relaxed": {"relax": 1.6, "dtype": dtype},
        "fast": {"relax": 1.6, "dtype": dtype, "rows": 0.125, "sampling": "importance"},
    }
    for name, options in ways.items():
        for count in (5, 8, 12, 17, 23, 30, 40):
            began = time.perf_counter()
            r, _ = dfrot.optimize(
                x, start, SPEC, weighting, iterations=count, device=device, progress=name, **options
            )
            seconds = time.perf_counter() - began
            found = dfrot.loss(held, r, SPEC, weighting)
            if found <= wanted * 1.001:
                break
        row |= {
            f"{name} s": seconds, f"{name} steps": count, f"{name} loss": found,
            f"{name} off": rotations.orthogonality_error(r),
            f"{name} ratio": row["published s"] / seconds if found <= wanted * 1.001 else math.nan,
        }  # fmt: skip
    return row


def shown(rows: list[dict]) -> None:
    """A table on the terminal."""
    for row in rows:
        print(
            "  ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
        )


@click.command()
@click.option("--sizes", default="576:61440,1024:131072,2048:131072", help="d:rows, by commas.")
@click.option("--equal", default="576:61440:30", help="d:rows:iterations of the run to equal loss.")
@click.option("--full", default="", help="d:rows:iterations of a run from the first row to R.")
@click.option("--steps", default=3, help="Timed steps.")
@click.option("--device", default="cpu")
@click.option("--threads", default=2)
@click.option("--bf16/--no-bf16", default=None, help="Default: where the processor multiplies it.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers (.json).")
def main(
    sizes: str,
    equal: str,
    full: str,
    steps: int,
    device: str,
    threads: int,
    bf16: bool | None,
    out: Path | None,
) -> None:
    """Gate, then the time of a step at each size, then the time to equal held-back loss."""
    torch.set_num_threads(threads)
    if bf16 is None:
        bf16 = (
            device == "cuda"
            or torch.cpu._is_avx512_bf16_supported()
            or torch.cpu._is_amx_tile_supported()
        )
    checked = gate(256, device)
    assert max(checked.values()) < 1e-8, f"the fast step is not the plain one: {checked}"
    said = ", ".join(f"{name} {value:.1e}" for name, value in checked.items())
    print(f"gate: largest difference of R after a step: {said}")
    found = {"gate": checked, "steps": [], "whole": [], "equal": []}
    found["provenance"] = records.provenance(torch.device(device), "torch")
    if device == "cpu":
        found["provenance"]["capability"] = torch.backends.cpu.get_cpu_capability()

    def keep(kind: str, row: dict) -> None:
        found[kind].append(row)
        shown([row])
        if out:
            records.write_text(out, json.dumps(found, indent=2) + "\n")

    for size in filter(None, sizes.split(",")):
        keep("steps", measure(*map(int, size.split(":")), steps, device, bf16))
    for size in filter(None, full.split(",")):
        keep("whole", whole(*map(int, size.split(":")), device, bf16))
    for size in filter(None, equal.split(",")):
        keep("equal", to_equal_loss(*map(int, size.split(":")), device, bf16))


if __name__ == "__main__":
    main()

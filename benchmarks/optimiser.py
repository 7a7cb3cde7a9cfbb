"""The refinement of R1: the published procedure against ours, time a step and to equal held-back loss.

The published one is our own writing of what DFRot's released code does in a step: each product, copy, SVD
and QR, in fp32 and on whole matrices. Both start from the same Hadamard and see the same rows, made here
with massive tokens planted. First the gate: from one rotation, both take the same step.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest import mock

import click
import torch
from torch import Tensor

from benchmarks import records, to_loss
from benchmarks.published import ALPHA, SPEC, plain_step, planted, published_step, split
from dfrot_lab import dfrot, polar, products, rotations
from dfrot_lab.activations import Activations
from dfrot_lab.weighting import Weighting

LONG = 60.0  # seconds of a step for which none is made before the clock: pages are not what it waits for


def clock(
    step: Callable[[Tensor], Tensor], r: Tensor, device: str, steps: int
) -> tuple[float, Tensor, int]:
    """(median seconds of `steps` steps from R = `r` on, each waited for, R after all, how many these were).

    A first one, if short, only warms up.
    """
    times: list[float] = []
    while len(times) < steps or (len(times) == steps > 1 and times[0] < LONG):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        r = step(r)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[-steps:]), r, len(times)


def ours(
    x: Activations, start: Tensor, how: dict, device: str, steps: int
) -> tuple[list[float], Tensor]:
    """Seconds of each of `steps` steps of `dfrot.optimize`, set-up (the Gram matrix) left out, and R."""
    times, factor, sums = [], dfrot.polar.polar, products.Streamed.__call__

    def begun(*args) -> products.Sums:
        if not times:
            times.append(time.perf_counter())
        return sums(*args)

    def ended(m: Tensor) -> Tensor:
        q = factor(m)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return q

    with (
        mock.patch.object(products.Streamed, "__call__", begun),
        mock.patch.object(dfrot.polar, "polar", ended),
    ):
        r, _ = dfrot.optimize(
            x, start, SPEC, Weighting(ALPHA), iterations=steps, device=device, **how
        )
    return [b - a for a, b in itertools.pairwise(times)], r


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


def gate_losses(d: int, device: str, low: bool) -> dict[str, float]:
    """How far the loss after five steps from RH is from that of the plain SVD's in fp64, by precision."""
    x, start = planted(20 * d, d, 1), rotations.random_hadamard(d, 0)

    def last(x: Activations, **how) -> float:
        log = dfrot.optimize(
            x, start, SPEC, Weighting(ALPHA), iterations=5, device=device, progress="gate", **how
        )[1]
        return log.rotated[-1]

    exact = last(Activations.of(x.double()), solver="svd", dtype=torch.float64)
    kinds = to_loss.precisions(device, low)
    return {name: abs(last(Activations.of(x), **how) / exact - 1) for name, how in kinds.items()}


def measure(d: int, rows: int, steps: int, updated: int, device: str, low: bool) -> dict:
    """One row of the table; updated: steps whose mean is told where XR is updated.

    "NAME loss over published": on held-back rows, after as many steps as were made of the published ones.
    """
    x, start = planted(rows, d, 0, device), rotations.random_hadamard(d, 0)
    r = start.float().to(device)
    normal, massive = split(x)
    row: dict = {"d": d, "rows": rows, "massive": len(massive)}
    row["published s"], ended, row["steps"] = clock(
        partial(published_step, normal, massive), r, device, steps
    )
    print(f"d = {d}, published: {row['published s']:.3g} s a step", flush=True)
    normal = torch.cat([normal, massive * ALPHA])  # in the place of the old, which is freed
    row["two products s"] = clock(partial(plain_step, normal), r, device, steps)[0]
    del normal, massive
    held = Activations.of(planted(to_loss.HELD, d, 7, device))
    ended = ended.double().cpu()
    row["published loss"] = dfrot.loss(held, ended, SPEC, Weighting(ALPHA))
    row["published off"] = rotations.orthogonality_error(ended)
    wrapped = Activations.of(x)
    for name, how in to_loss.precisions(device, low).items():
        # updated: full products come in between, so the mean over a run, from the first on
        count = updated if "update" in how else row["steps"]
        times, r = ours(wrapped, start, how, device, count)
        told = statistics.fmean(times) if "update" in how else statistics.median(times[-steps:])
        print(f"d = {d}, {name}: {told:.3g} s a step", flush=True)
        row |= {f"{name} s": told, f"{name} ratio": row["published s"] / told}
        row[f"{name} off"] = rotations.orthogonality_error(r)
        if count == row["steps"]:
            loss = dfrot.loss(held, r, SPEC, Weighting(ALPHA))
            row[f"{name} loss over published"] = loss / row["published loss"]
    return row


def told(values: dict[str, float]) -> str:
    """Names and values on a line."""
    return ", ".join(f"{name} {value:.1e}" for name, value in values.items())


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
@click.option(
    "--ends", default="", help="d:rows:iterations:seeds: where each precision ends, by start."
)
@click.option("--steps", default=3, help="Timed steps.")
@click.option("--updated", default=30, help="Steps from the first on, where XR is updated.")
@click.option("--device", default="cpu")
@click.option("--threads", default=2)
@click.option("--bf16/--no-bf16", default=None, help="Default: where the processor multiplies it.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers (.json).")
def main(
    sizes: str,
    equal: str,
    full: str,
    ends: str,
    steps: int,
    updated: int,
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
    print(f"gate: largest difference of R after a step: {told(checked)}")
    ended = gate_losses(256, device, bf16)
    assert max(ended.values()) < 0.02, f"a precision does not follow the plain steps: {ended}"
    print(f"gate: relative difference of the loss after five steps: {told(ended)}")
    found = {
        "gate": checked,
        "gate, losses": ended,
        "steps": [],
        "whole": [],
        "equal": [],
        "ends": [],
    }
    found["provenance"] = records.provenance(torch.device(device), "torch")
    if device == "cpu":
        found["provenance"]["capability"] = torch.backends.cpu.get_cpu_capability()

    def keep(kind: str, row: dict) -> None:
        found[kind].append(row)
        shown([row])
        if out:
            records.write_text(out, json.dumps(found, indent=2) + "\n")

    for size in filter(None, sizes.split(",")):
        keep("steps", measure(*map(int, size.split(":")), steps, updated, device, bf16))
    for size in filter(None, full.split(",")):
        keep("whole", to_loss.whole(*map(int, size.split(":")), device, bf16))
    for size in filter(None, equal.split(",")):
        keep("equal", to_loss.to_equal_loss(*map(int, size.split(":")), device, bf16))
    for size in filter(None, ends.split(",")):
        keep("ends", to_loss.ends(*map(int, size.split(":")), device, bf16))


if __name__ == "__main__":
    main()

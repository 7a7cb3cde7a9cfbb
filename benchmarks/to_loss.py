"""The refinement of R1 to its end: the time to equal held-back loss, the whole of it, and where it ends."""

from __future__ import annotations

import math
import statistics
import time

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.published import ALPHA, SPEC, planted, published_step, split
from dfrot_lab import dfrot, rotations
from dfrot_lab.activations import Activations
from dfrot_lab.weighting import Weighting

HELD = 16384  # rows to tell a loss by


def precisions(device: str, low: bool) -> dict[str, dict]:
    """Name → options of `dfrot.optimize` for the two products of a step."""
    kinds: dict[str, dict] = {"fp32": {}}
    if device != "cpu":
        kinds["tf32"] = {"tf32": True}
    if low:
        kinds["fp32, error bf16"] = {"error_dtype": torch.bfloat16}
        if device == "cpu":  # a GPU's TF32 products are as exact, and need no XR kept
            kinds["fp32, updated"] = {"error_dtype": torch.bfloat16, "update": True}
        kinds["bf16"] = {"dtype": torch.bfloat16}
    return kinds


def whole(d: int, rows: int, iterations: int, device: str, low: bool) -> dict:
    """Seconds of all `iterations` of ours, rows in the host's memory at first, and the held-back loss.

    On a GPU on its tensor cores alone: fp32 products take most of the time there.
    """
    x = Activations.of(planted(rows, d, 0, device).cpu())
    held = Activations.of(planted(HELD, d, 7, device))
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


def published(parts: tuple[Tensor, ...], r: Tensor, iterations: int) -> Tensor:
    """R [d, d], fp64 on the CPU, after published steps on (normal, massive) rows in the precision of `r`."""
    for _ in tqdm(range(iterations), desc=f"published, {r.dtype}"):
        r = published_step(*parts, r)
    return r.double().cpu()


def to_equal_loss(d: int, rows: int, iterations: int, device: str, low: bool) -> dict:
    """Seconds until the held-back loss is what `iterations` published steps reach, and both ends.

    same steps: as many of ours without over-relaxation, for the final loss; in fp32, on a GPU in others too.
    """
    x, held = planted(rows, d, 0, device), Activations.of(planted(HELD, d, 7, device))
    start, weighting = rotations.random_hadamard(d, 0), Weighting(ALPHA)
    parts, began = split(x), time.perf_counter()
    r = published(parts, start.float().to(device), iterations)
    row = {
        "d": d,
        "rows": rows,
        "iterations": iterations,
        "published s": time.perf_counter() - began,
    }
    row["published loss"] = dfrot.loss(held, r, SPEC, weighting)
    row["published off"] = rotations.orthogonality_error(r)
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


def ends(d: int, rows: int, iterations: int, seeds: int, device: str, low: bool) -> dict:
    """Held-back loss after `iterations` steps over that of as many published ones, start by start.

    "NAME over published", "NAME sd": mean and sd over seeds of the start, for each precision, over-relaxed
    steps, and the published procedure with fp64 products: what another rounding alone makes of it.
    """
    x, held = planted(rows, d, 0, device), Activations.of(planted(HELD, d, 7, device))
    weighting, parts = Weighting(ALPHA), split(x)
    row: dict = {"d": d, "rows": rows, "iterations": iterations, "seeds": seeds}
    ways = {"published, fp64": None} | precisions(device, low)
    ways["relaxed"] = {"relax": 1.6, "dtype": torch.bfloat16 if low else torch.float32}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(seeds):
        start = rotations.random_hadamard(d, seed)
        r = published(parts, start.float().to(device), iterations)
        wanted = dfrot.loss(held, r, SPEC, weighting)
        for name, how in ways.items():
            if how is None:
                double = tuple(part.double() for part in parts)
                r = published(double, start.to(device), iterations)
            else:
                r, _ = dfrot.optimize(
                    Activations.of(x), start, SPEC, weighting, iterations=iterations,
                    device=device, progress=f"{name}, seed {seed}", **how,
                )  # fmt: skip
            found[name].append(dfrot.loss(held, r, SPEC, weighting) / wanted)
    for name, ratios in found.items():
        row[f"{name} over published"] = statistics.fmean(ratios)
        row[f"{name} sd"] = statistics.stdev(ratios) if seeds > 1 else 0.0
    return row

"""Tables of perplexities: rows over seeds, their means, and paired differences over windows."""

from __future__ import annotations

import statistics
from typing import Any

from tqdm import tqdm

from dfrot_lab.evaluation import paired_difference, spread
from dfrot_lab.lab import Lab

__all__ = ["gamma_sweep", "paired", "perplexities", "table"]


def perplexities(
    lab: Lab,
    rows: list[list[str]],
    seeds: list[int],
    windows: int,
    bits: str,
    gamma: float = 100.0,
) -> list[dict[str, Any]]:
    """`Lab.perplexity` for every [rotation, keep] of `rows` and every seed (FP and NR have none).

    gamma: of refined rotations.
    """
    order = list(dict.fromkeys(name for name, _ in rows))
    grid = [
        (name, keep, seed)
        for name in order
        for seed in (seeds if name not in ("FP", "NR") else seeds[:1])
        for n, keep in rows
        if n == name  # what differs only in the tokens kept comes together and shares a model
    ]
    bar = tqdm(grid, desc="perplexity", unit="row")
    out = []
    for name, keep, seed in bar:
        bar.set_postfix_str(f"{name} keep={keep} seed={seed}", refresh=False)
        how = {"bits": bits, "keep": keep, "windows": windows, "gamma": gamma}
        out.append(lab.perplexity(name, seed, **how))
    return out


def gamma_sweep(
    lab: Lab, gammas: list[float], seed: int, windows: int, bits: str, method: str = "rtn"
) -> list[dict[str, Any]]:
    """Figures 5 and 6: perplexity of DFRot from both starts by γ, and of the starts themselves."""
    out = []
    grid = [(start, g) for start in ("RH", "RO") for g in (None, *gammas)]
    for start, g in tqdm(grid, desc="gamma sweep", unit="row"):
        name, options = (start, {}) if g is None else (f"DFRot({start})", {"gamma": g})
        found = lab.perplexity(name, seed, bits=bits, windows=windows, method=method, **options)
        gamma = "none" if g is None else str(float(g))
        out.append({"start": start, "gamma": gamma, "ppl": found["ppl"]})
    return out


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean ± sd over seeds of the perplexity of each (rotation, keep, bits, gamma, method)."""
    groups: dict[tuple, list[float]] = {}
    for r in rows:
        key = (r["rotation"], r["keep"], r["bits"], r["gamma"], r.get("method"))
        groups.setdefault(key, []).append(float(r["ppl"]))
    names = ("rotation", "keep", "bits", "gamma", "method")
    return [dict(zip(names, key, strict=True)) | spread(v) for key, v in groups.items()]


def paired(rows: list[dict[str, Any]], a: tuple[str, str], b: tuple[str, str]) -> dict[str, Any]:
    """95 % interval of nll(a) − nll(b) over windows, each averaged over the seeds that both have.

    a, b: (rotation, keep). Windows are the pairs; `seed_sd` is the spread of the mean over seeds.
    """
    nll = {(r["rotation"], r["keep"], r["seed"]): r["nll"] for r in rows}
    seeds = sorted(s for n, k, s in nll if (n, k) == a and (*b, s) in nll)
    differences = [[x - y for x, y in zip(nll[(*a, s)], nll[(*b, s)], strict=True)] for s in seeds]
    by_window = [statistics.fmean(column) for column in zip(*differences, strict=True)]
    interval = paired_difference(by_window, [0.0] * len(by_window))
    by_seed = [statistics.fmean(d) for d in differences]
    about = {"a": " ".join(a), "b": " ".join(b), "seeds": len(seeds)}
    return about | interval | {"seed_sd": spread(by_seed)["sd"]}

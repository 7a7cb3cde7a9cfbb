"""R1 refined in each way that `dfrot.optimize` has, on a model's activations: is the fast one as good?

    python -m benchmarks.refinement --out figures/refinement.json --page docs/optimiser.md

From RH, γ = 100, the evaluation's quantizer, on the profile's calibration windows. Three tables:

- perplexity by how R1 was made, on evaluation windows that ranked nothing (1 and 2 did, in notebook 9);
- `stop`: the steps it saves, and the loss that they would have taken off yet;
- rows drawn by importance against rows drawn uniformly, at equal steps and all else equal.

Held-back losses are over the norm outputs of the same evaluation windows. Rows are kept in FILE as they
come: a run that was cut off, or one with more seeds, measures the rest.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import pages
from benchmarks.rows import check_windows, measured
from dfrot_lab import activations, dfrot, owners, rotations
from dfrot_lab.activations import Activations
from dfrot_lab.cli import options
from dfrot_lab.evaluation import Perplexity
from dfrot_lab.lab import Lab
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.studies.perplexities import paired
from dfrot_lab.weighting import Weighting

MARK = "<!-- benchmarks/refinement.py -->"
SPEC, WEIGHTING, OMEGA = QuantSpec(), Weighting(100.0), 1.6
STOPS = (0.0, 1e-2, 3e-3, 1e-3)  # 0: all steps


@dataclass(frozen=True)
class Plan:
    """first, last: evaluation windows, counted from 1. steps, relaxed: of the plain and of the relaxed step.
    limit: steps where nothing stops them. share: of the rows, where not all are used.
    """

    first: int = 3
    last: int = 6
    bits: str = "16-4-16"
    steps: int = 30
    relaxed: int = 12
    limit: int = 300
    share: float = 0.125

    @property
    def ways(self) -> dict[str, dict[str, Any]]:
        """Name → options of `dfrot.optimize`; the relaxed ones are those that benchmarks.optimiser times."""
        few = {"relax": OMEGA, "dtype": torch.bfloat16, "iterations": self.relaxed}
        return {
            "svd": {"solver": "svd", "iterations": self.steps},
            "fast": {"iterations": self.steps},
            "relaxed": few,
            "uniform": few | {"rows": self.share},
            "importance": few | {"rows": self.share, "sampling": "importance"},
        }

    def jobs(self, seeds: list[int], draws: int) -> list[dict[str, Any]]:
        """What identifies each row of the file, in the order of measuring."""
        out: list[dict[str, Any]] = [
            {"part": "perplexity", "way": way, "seed": s}
            for way in ("RH", *self.ways)
            for s in seeds
        ]
        out += [
            {"part": "sampling", "way": way, "seed": s, "draw": k}
            for s in seeds
            for k in range(draws)
            for way in ("uniform", "importance")
        ]
        return out + [
            {"part": "stop", "relax": omega, "stop": stop, "seed": s}
            for omega in (1.0, OMEGA)
            for s in seeds
            for stop in STOPS
        ]


@dataclass(frozen=True)
class Bench:
    """Measures one job after the other on the artefacts of a lab."""

    lab: Lab
    plan: Plan

    @cached_property
    def held(self) -> Activations:
        """All norm outputs of evaluation windows `first` to `last`, [sites, tokens, d]."""
        tokens = self.lab.evaluation_tokens(self.plan.last)[self.plan.first - 1 :]
        n, mine = tokens.shape[1], self.lab.activations
        out = torch.empty(len(mine.sites), tokens.numel(), mine.d)
        for k, window in enumerate(tqdm(tokens, desc="held-back rows", unit="window")):
            for i, _, y in activations.capture(self.lab.lm, window[None]):
                out[i, k * n : (k + 1) * n] = y[0]
        return Activations(out, mine.sites, {})

    def measure(self, job: dict[str, Any]) -> dict[str, Any]:
        """The row of a job: the job itself and what came out."""
        return job | getattr(self, job["part"])(**{k: v for k, v in job.items() if k != "part"})

    def refine(
        self, x: Activations, seed: int, said: str, **how: Any
    ) -> tuple[Tensor, dfrot.Log, float]:
        """(R1, its log, seconds with the Gram matrix and all) from RH of that seed."""
        start, began = self.lab.rotation("RH", seed), time.perf_counter()
        r, log = dfrot.optimize(
            x, start, SPEC, WEIGHTING, device=self.lab.device, progress=said, **how
        )
        return r, log, time.perf_counter() - began

    def loss(self, r: Tensor) -> float:
        """Of all held-back rows."""
        return dfrot.loss(self.held, r, SPEC, WEIGHTING)

    def perplexity(self, way: str, seed: int) -> dict[str, Any]:
        """R1 made in that way: rows used, steps, seconds, held-back loss, nll of each window."""
        name, found = "RH", {"rows": 0, "steps": 0, "seconds": 0.0}
        if way == "RH":
            r = self.lab.rotation("RH", seed)
        else:
            r, log, seconds = self.refine(self.lab.activations, seed, way, **self.plan.ways[way])
            found = {"rows": log.rows, "steps": len(log.rotated), "seconds": seconds}
            home = Path(self.lab.folder) / "artefacts" / "refinement"
            about = {"way": way, "seed": seed, "plan": asdict(self.plan)} | self.lab.about
            about |= owners.of(self.lab.model).about  # the lab takes no file that does not say it
            name = str(rotations.save(home / f"{way}-seed{seed}.safetensors", r, about))
        found["held"] = self.loss(r)
        measured = self.lab.perplexity(
            name, seed, bits=self.plan.bits, first=self.plan.first - 1, windows=self.plan.last
        )
        return found | {"nll": measured["nll"]}

    def sampling(self, way: str, seed: int, draw: int) -> dict[str, Any]:
        """A share of the rows, drawn anew with each `draw`: as many steps as `fast` takes with all.

        `optimize` always draws with the same numbers, so it is the tokens that are shuffled.
        """
        x, generator = self.lab.activations, torch.Generator().manual_seed(draw)
        order = torch.randperm(x.X.shape[1], generator=generator)
        how = self.plan.ways["fast"] | {"rows": self.plan.share, "sampling": way}
        shuffled = Activations(x.X[:, order], x.sites, x.metadata)
        r, log, _ = self.refine(shuffled, seed, f"{way}, draw {draw}", **how)
        return {"rows": log.rows, "held": self.loss(r)}

    def stop(self, relax: float, stop: float, seed: int) -> dict[str, Any]:
        """Steps until `stop` ends them, on the profile's share of the rows; loss on these and held back."""
        r, log, _ = self.refine(
            self.lab.activations, seed, f"stop = {stop:g}", relax=relax, stop=stop,
            iterations=self.plan.limit, rows=self.lab.rows,
        )  # fmt: skip
        return {"steps": len(log.rotated), "loss": log.rotated[-1], "held": self.loss(r)}


# --- tables ----------------------------------------------------------------------------------------


def by_perplexity(rows: list[dict[str, Any]], plan: Plan) -> str:
    """How each R1 was made, what it took, what it gives; intervals over windows against `svd`."""
    part = [
        r | {"rotation": r["way"], "keep": "none", "ppl": Perplexity(r["nll"]).value}
        for r in rows
        if r["part"] == "perplexity"
    ]
    share = f"{plan.share:.3g} of the rows"
    names = {
        "RH": "RH itself", "svd": "svd, fp32", "fast": "fast, fp32",
        "relaxed": f"fast, ω = {OMEGA}, bf16", "uniform": f"the same, {share}, uniform",
        "importance": f"the same, {share}, by importance",
    }  # fmt: skip
    out = []
    for way, name in names.items():
        these = [r for r in part if r["way"] == way]
        d = paired(part, (way, "none"), ("svd", "none"))
        gap = pages.interval(d, 4) if way != "svd" else pages.NONE
        took = [f"{statistics.fmean(r[k] for r in these):,.0f}" for k in ("rows", "steps")]
        seconds = f"{statistics.median(r['seconds'] for r in these):.1f}"
        loss = pages.mean_sd([1e3 * r["held"] for r in these], 3)
        out.append((name, *took, seconds, loss, pages.mean_sd([r["ppl"] for r in these], 2), gap))
    header = ("R1", "rows", "steps", "s", "held-back loss × 10³", f"perplexity, {plan.bits}")
    return pages.table((*header, "Δnll to svd"), out)


def by_sampling(rows: list[dict[str, Any]], plan: Plan) -> str:
    """Held-back loss over that of all rows, of the same start: `fast` above, whose steps are these."""
    every = [r for r in rows if r.get("way") == "fast"]
    whole, out = {r["seed"]: r["held"] for r in every}, []
    groups = {"all": every} | {
        way: [r for r in rows if r["part"] == "sampling" and r["way"] == way]
        for way in ("uniform", "importance")
    }
    for way, these in groups.items():
        used = f"{statistics.fmean(r['rows'] for r in these):,.0f}"
        ratios = pages.mean_sd([r["held"] / whole[r["seed"]] for r in these], 4)
        out.append((way, used, pages.mean_sd([1e3 * r["held"] for r in these], 3), ratios))
    return pages.table(("rows", "how many", "held-back loss × 10³", "over that of all rows"), out)


def by_stop(rows: list[dict[str, Any]], plan: Plan) -> str:
    """Steps saved and loss given up by each `stop`, means over seeds."""
    part = {(r["relax"], r["stop"], r["seed"]): r for r in rows if r["part"] == "stop"}
    seeds, out = sorted({seed for *_, seed in part}), []
    for omega, stop in itertools.product((1.0, OMEGA), STOPS[1:]):
        pairs = [(part[omega, stop, s], part[omega, 0.0, s]) for s in seeds]
        steps = [r["steps"] for r, _ in pairs]
        ends = f"{statistics.fmean(steps):.0f} ({min(steps)}–{max(steps)})"
        saved = f"{plan.limit - statistics.fmean(steps):.0f}"
        given = [
            pages.mean_sd([100 * (r[kind] / full[kind] - 1) for r, full in pairs], 2) + " %"
            for kind in ("loss", "held")
        ]
        out.append((f"{omega:g}", f"{stop:g}", ends, saved, *given))
    header = ("ω", "`stop`", "ends after", f"saved of {plan.limit} steps", "loss given up")
    return pages.table((*header, "held back"), out)


def markdown(rows: list[dict[str, Any]], plan: Plan) -> str:
    """The three tables."""
    return "\n\n".join(table(rows, plan) for table in (by_perplexity, by_sampling, by_stop))


# --- the command --------------------------------------------------------------------------------


@click.command(context_settings={"show_default": True})
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The numbers (.json).")
@click.option(
    "--page", type=click.Path(path_type=Path), help=f"Put them there, between two lines {MARK}"
)
@click.option("--profile", default="demo")
@click.option("--folder", type=click.Path(path_type=Path), help="[default: results/PROFILE]")
@click.option("--seeds", default="0,1,2", help="Of RH, by commas.")
@click.option("--draws", type=click.IntRange(1), default=3, help="Of the rows, for each seed.")
@click.option("--first", default=3, help="Evaluation window, counted from 1.")
@click.option("--last", default=6, help="Evaluation window.")
@click.option("--steps", default=30, help="Of svd and fast.")
@click.option("--relaxed", default=12, help="Steps of the relaxed ways.")
@click.option("--limit", default=300, help="Steps that a stop can save from.")
def main(
    out: Path,
    page: Path | None,
    profile: str,
    folder: Path | None,
    seeds: str,
    draws: int,
    **given: int,
) -> None:
    """Measure what FILE lacks, then print the three tables as markdown."""
    check_windows(given["first"], given["last"])
    lab, plan = options.lab(profile, folder), Plan(**given)
    wanted = plan.jobs([int(s) for s in seeds.split(",")], draws)
    rows = measured(out, lab, asdict(plan), wanted, Bench(lab, plan).measure, "refinement")
    pages.publish(markdown(rows, plan), page, MARK)


if __name__ == "__main__":
    main()

"""`recommended` beside what notebook 9 leaves out, where nothing was chosen: evaluation windows 3 to 6.

    python -m benchmarks.further --out figures/further.json --page docs/optimiser.md

Three tables, over seeds: Whip from RO, one of the three best of the screening at 16-4-16, beside RH and the
presets, with GPTQ as well and on another corpus, which calibrated none of it; R1 refined again on the
activations of the model it quantizes, and as long again on the old ones; a prefix in the KV cache, with the
floating-point model as control.
Rows are kept in FILE as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import pages
from benchmarks.rows import check_windows, measured
from dfrot_lab import dfrot, evaluation, owners, prefix, rotations
from dfrot_lab.cli import options
from dfrot_lab.evaluation import Perplexity
from dfrot_lab.lab import Lab
from dfrot_lab.presets import PRESETS, Preset
from dfrot_lab.quantized_model import ModelSpec
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.rotations import Rotations
from dfrot_lab.studies import questions
from dfrot_lab.studies.perplexities import paired
from dfrot_lab.weighting import Weighting

MARK = "<!-- benchmarks/further.py -->"
THIRD = "Whip from RO, γ = 100"
METHODS = ("RH", "dfrot", THIRD, "recommended")
WEIGHTS = {"16-4-16": "rtn", "4-4-16": "gptq-shared"}  # of the first table
PREFIXED = ("FP", "RH", "dfrot", "recommended")
PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class Bench:
    """Measures one job after the other on the artefacts of a lab."""

    lab: Lab
    first: int
    last: int
    second: str

    @cached_property
    def tokens(self) -> torch.Tensor:
        """Evaluation windows `first` to `last`, counted from 1."""
        return self.lab.evaluation_tokens(self.last)[self.first - 1 :]

    @cached_property
    def elsewhere(self) -> torch.Tensor:
        """The first two windows of the other corpus."""
        return self.lab.with_corpus(self.second).evaluation_tokens(2)

    @cached_property
    def ahead(self) -> list[int]:
        """The prefix that PrefixQuant's rule picks on the calibration text."""
        first, x = self.lab.tokenizer.bos_token_id, self.lab.activations
        return prefix.choose(x, self.lab.calibration_tokens, first, QuantSpec())

    def jobs(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """What identifies each row of the file, models that are alike one after the other."""
        out = [
            {"part": part, "rotation": "recommended", "seed": s}
            for part in ("again", "longer")
            for s in seeds
        ]
        out += [
            {"part": "prefixed", "rotation": m, "seed": s}
            for m in PREFIXED
            for s in seeds
            if m != "FP" or s == seeds[0]
        ]
        return out + [
            {"part": "methods", "rotation": m, "seed": s, "bits": bits}
            for bits in WEIGHTS
            for m in METHODS
            for s in seeds
        ]

    def measure(self, job: dict[str, Any]) -> dict[str, Any]:
        """The row of a job: the job itself and what came out."""
        return job | getattr(self, job["part"])(**{k: v for k, v in job.items() if k != "part"})

    def file(self, rotation: str, seed: int) -> str:
        """Name or file of a rotation."""
        if rotation == THIRD:
            return str(Preset(objective="whip").rotation_file(self.lab, seed, start="RO"))
        preset = PRESETS.get(rotation)
        return str(preset.rotation_file(self.lab, seed)) if preset else rotation

    def nll(self, model: torch.nn.Module, tokens: torch.Tensor) -> list[float]:
        """Nats a token of each window."""
        return [evaluation.window_nll(model, window) for window in tokens]

    def methods(self, rotation: str, seed: int, bits: str) -> dict[str, Any]:
        """One rotation at `bits`, on both corpora."""
        how = {"bits": bits, "method": WEIGHTS[bits]}
        model = self.lab.quantized(self.file(rotation, seed), seed, **how)
        return {"nll": self.nll(model, self.tokens), "second": self.nll(model, self.elsewhere)}

    def again(self, rotation: str, seed: int) -> dict[str, Any]:
        """A preset's R1, and R1 refined once more on the activations of the model that it quantizes."""
        preset, name = PRESETS[rotation], self.file(rotation, seed)
        own = preset.lab(self.lab)
        model = self.lab.quantized(name, seed)
        before = self.nll(model, self.tokens)
        r, log = questions.refined_again(
            own, model, rotations.load(name)[0], preset.iterations, preset.objective
        )
        return {
            "nll": before,
            "new": self._of(r, f"again-seed{seed}", seed),
            "loss": log.rotated[-1],
        }

    def longer(self, rotation: str, seed: int) -> dict[str, Any]:
        """Its control: as many steps more, by the same solver, on the activations of the first time."""
        preset, name = PRESETS[rotation], self.file(rotation, seed)
        own = preset.lab(self.lab)
        r, log = dfrot.optimize(
            own.activations, rotations.load(name)[0], QuantSpec(), Weighting(preset.gamma),
            iterations=preset.iterations, rows=own.rows, objective=preset.objective,
            device=own.device, progress="longer",
        )  # fmt: skip
        before = self.nll(self.lab.quantized(name, seed), self.tokens)
        return {
            "nll": before,
            "new": self._of(r, f"longer-seed{seed}", seed),
            "loss": log.rotated[-1],
        }

    def _of(self, r: torch.Tensor, stem: str, seed: int) -> list[float]:
        """Nats a token at 16-4-16 of an R1 made here."""
        file = Path(self.lab.folder) / "artefacts" / "further" / f"{stem}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        rotations.save(file, r, {"seed": seed} | owners.of(self.lab.model).about)
        return self.nll(self.lab.quantized(str(file), seed), self.tokens)

    def prefixed(self, rotation: str, seed: int) -> dict[str, Any]:
        """Without and with the prefix, 16-4-16; FP: nothing is quantized, and no rotation matters."""
        bits = "16-16-16" if rotation == "FP" else "16-4-16"
        name = self.file("RH" if rotation == "FP" else rotation, seed)
        model = self.lab.quantized(name, seed, bits=bits)
        turned = Rotations.standard(self.lab.lm, self.lab.rotation(name, seed))
        plain = self.nll(model, self.tokens)
        found = prefix.perplexity(model, turned, ModelSpec.of(bits), self.ahead, self.tokens)
        return {"nll": plain, "new": found.nll}


# --- tables ----------------------------------------------------------------------------------------


def _ppl(rows: Sequence[dict[str, Any]], key: str = "nll") -> str:
    return pages.mean_sd([Perplexity(r[key]).value for r in rows], 2)


def _gap(rows: Sequence[dict[str, Any]], ours: str, theirs: str, key: str = "nll") -> str:
    """Δnll of two rotations, paired by window after the mean over seeds."""
    named = [{**r, "keep": "none", "nll": r[key]} for r in rows]
    return pages.interval(paired(named, (ours, "none"), (theirs, "none")), 3)


def _two(rows: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """Perplexity as it was, as it became, and the difference."""
    both = [{**r, "rotation": "new", "nll": r["new"]} for r in rows]
    both += [{**r, "rotation": "old"} for r in rows]
    return _ppl(rows), _ppl(rows, "new"), _gap(both, "new", "old")


def markdown(rows: Sequence[dict[str, Any]], second: str) -> str:
    """The three tables."""
    parts: dict[str, list] = {}
    for row in rows:
        parts.setdefault(row["part"], []).append(row)
    cells: list[tuple[list, str]] = [
        ([r for r in parts["methods"] if r["bits"] == bits], key)
        for key in ("nll", "second")
        for bits in WEIGHTS
    ]
    lines = [
        [m, *(_ppl([r for r in those if r["rotation"] == m], key) for those, key in cells)]
        for m in METHODS
    ]
    for m in METHODS:
        if m != "dfrot":
            gaps = [_gap(those, m, "dfrot", key) for those, key in cells]
            lines.append([f"{m} − dfrot, nats a token", *gaps])
    head = ["", "16-4-16", "4-4-16, GPTQ", f"{second}, 16-4-16", f"{second}, 4-4-16, GPTQ"]
    again = [
        ["100 steps on its own model's activations", *_two(parts["again"])],
        ["100 steps more on the old ones", *_two(parts["longer"])],
    ]
    ahead = [[m, *_two([r for r in parts["prefixed"] if r["rotation"] == m])] for m in PREFIXED]
    tables = (
        (head, lines),
        (["recommended, 16-4-16", "as it is", "after", "Δnll"], again),
        (["16-4-16", "plain", "with the prefix", "Δnll"], ahead),
    )
    return "\n\n".join(pages.table(*each) for each in tables)


@click.command(context_settings={"show_default": True})
@click.option("--profile", default="demo")
@click.option("--folder", type=PATH, help="[default: results/PROFILE]")
@click.option("--seeds", default="0,1,2", help="Of the starts, by commas.")
@click.option("--first", default=3, help="Evaluation window, counted from 1.")
@click.option("--last", default=6, help="Evaluation window.")
@click.option("--second", default="lee", help="Another corpus to test on.")
@click.option("--page", type=PATH, help=f"Put the tables there too, between two lines {MARK}")
@click.option("--out", type=PATH, required=True, help="The numbers, as JSON.")
def main(profile, folder, seeds, first, last, second, page, out) -> None:
    """Measure what FILE lacks, print the tables."""
    check_windows(first, last)
    lab = options.quantizing(profile, folder)
    bench, settings = Bench(lab, first, last, second), {"windows": [first, last], "second": second}
    wanted = bench.jobs([int(s) for s in seeds.split(",")])
    rows = measured(out, lab, settings, wanted, bench.measure, "further")
    pages.publish(markdown(rows, second), page, MARK)


if __name__ == "__main__":
    main()

"""Does `recommended` beat the published DFRot where nothing was chosen? Evaluation windows 3 to 6.

    python -m benchmarks.recommended --out figures/recommended.json --page docs/optimiser.md
    python -m benchmarks.recommended --pairs seeds --methods "RH,dfrot,kurtosis γ = 10,recommended" \
        --out figures/recommended_seeds.json --page docs/optimiser.md

Notebook 9 ranks objectives by evaluation windows 1 and 2 and confirms on 3 to 6, as here. Here are RTN over
seeds, intervals over windows and over seeds, and `as released`: the settings of the authors' code,
which are all rows, a hundred steps, the symmetric quantizer in the loop, a QR after each SVD (but which
tokens are massive is told by this package's rule, not by their thresholds). The first command asks whether
it holds on other text, the second from other seeds. Everything is kept in the lab's folder: a run that was
cut off measures the rest.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks import pages
from benchmarks.pages import NONE
from benchmarks.rows import check_windows
from dfrot_lab import files, kept_files
from dfrot_lab.cli import options
from dfrot_lab.evaluation import Perplexity, paired_difference
from dfrot_lab.lab import Lab
from dfrot_lab.presets import PRESETS, Preset
from dfrot_lab.studies.perplexities import paired

MARK = "<!-- benchmarks/recommended.py -->"
SEEDS_MARK = "<!-- benchmarks/recommended.py --pairs seeds -->"
KURTOSIS = "kurtosis γ = 10"  # first of notebook 9's screening by RTN, at the cost of `dfrot`
METHODS = ("RH", "dfrot", "as released", KURTOSIS, "recommended")
BASE = "dfrot"
SETTINGS = (("16-4-16", "rtn"), ("4-4-16", "rtn"), ("4-4-16", "gptq-shared"))
PATH = click.Path(path_type=Path)


def released(lab: Lab, seed: int) -> Path:
    """R1 with the settings of the authors' code, made now unless it is there."""
    return replace(lab, rows=1.0).rotation_file(
        "DFRot(RH)", seed, gamma=100.0, symmetric=True, qr=True, iterations=100
    )


def measure(lab: Lab, method: str, seed: int, bits: str, weights: str, first: int, last: int):
    """One row: nll of each window from `first` to `last`."""
    if method == "RH":
        name = "RH"
    elif method in PRESETS:
        name = str(PRESETS[method].rotation_file(lab, seed))
    elif method == KURTOSIS:
        name = str(Preset(objective="kurtosis", gamma=10.0).rotation_file(lab, seed))
    else:
        name = str(released(lab, seed))
    found = lab.perplexity(name, seed, bits=bits, first=first - 1, windows=last, method=weights)
    row = {"rotation": method, "keep": "none", "seed": seed, "bits": bits, "weights": weights}
    return row | {"nll": found["nll"]}


def markdown(rows: Sequence[dict[str, Any]], pairs: str = "windows") -> str:
    """Perplexity, mean ± sd over seeds, and under it nll − nll of `BASE` with its interval over `pairs`.

    pairs: "windows", each averaged over seeds, or "seeds", each averaged over windows, and for how many of
    them nll is lower than with `BASE`.
    """
    found = {s: [r for r in rows if (r["bits"], r["weights"]) == s] for s in SETTINGS}
    found = {s: those for s, those in found.items() if those}
    methods = [m for m in METHODS if _nll(rows, m)]
    lines = [
        [
            m,
            *(
                pages.mean_sd([Perplexity(n).value for n in _nll(those, m)], 2)
                for those in found.values()
            ),
        ]
        for m in methods
    ]
    difference = _over_windows if pairs == "windows" else _over_seeds
    for method in (m for m in methods if m != BASE):
        lines.append([f"{method} − {BASE}, nats a token"])
        for those in found.values():
            lines[-1].append(difference(those, method) if _nll(those, method) else NONE)
    return pages.table(["", *(_named(*s) for s in found)], lines)


def _over_windows(rows: Sequence[dict[str, Any]], method: str) -> str:
    return pages.interval(paired(rows, (method, "none"), (BASE, "none")), 3)


def _over_seeds(rows: Sequence[dict[str, Any]], method: str) -> str:
    means = [[statistics.fmean(nll) for nll in _nll(rows, name)] for name in (method, BASE)]
    lower = sum(a < b for a, b in zip(*means, strict=True))
    return f"{pages.interval(paired_difference(*means), 3)}, {lower} of {len(means[0])}"


def _named(bits: str, weights: str) -> str:
    return bits if bits.startswith("16") else f"{bits}, {'RTN' if weights == 'rtn' else 'GPTQ'}"


def _nll(rows: Sequence[dict[str, Any]], method: str) -> list[list[float]]:
    """Of each window, seed by seed."""
    those = (r for r in rows if r["rotation"] == method)
    return [r["nll"] for r in sorted(those, key=lambda r: r["seed"])]


@click.command(context_settings={"show_default": True})
@click.option("--profile", default="demo")
@click.option("--folder", type=PATH, help="[default: results/PROFILE]")
@click.option("--seeds", default="0,1,2", help="Of RH, by commas.")
@click.option("--first", default=3, help="Evaluation window, counted from 1.")
@click.option("--last", default=6, help="Evaluation window.")
@click.option("--methods", default=",".join(METHODS), help="By commas.")
@click.option("--gptq/--no-gptq", default=True, help="Also at 4-4-16 by GPTQ.")
@click.option("--pairs", type=click.Choice(["windows", "seeds"]), default="windows")
@click.option(
    "--page", type=PATH, help=f"Put the table there, between two lines {MARK} (for seeds, another)"
)
@click.option("--out", type=PATH, required=True, help="The numbers, as JSON.")
def main(profile, folder, seeds, first, last, methods, gptq, pairs, page, out) -> None:
    """Measure what the lab's folder lacks, print the table."""
    check_windows(first, last)
    methods = methods.split(",")
    if strange := [m for m in methods if m not in METHODS]:
        raise click.BadParameter(f"{', '.join(strange)}: use some of {', '.join(METHODS)}")
    if BASE not in methods:
        raise click.BadParameter(
            f"{', '.join(methods)}: add {BASE}, which differences are taken to"
        )
    if pairs == "seeds" and "," not in seeds:
        raise click.BadParameter(f"seeds {seeds}: give two or more to have an interval over them")
    lab, rows = options.quantizing(profile, folder), []
    asked = SETTINGS if gptq else [how for how in SETTINGS if how[1] == "rtn"]
    grid = [(m, int(s), *how) for how in asked for m in methods for s in seeds.split(",")]
    with kept_files.recording(lab.folder):
        for job in tqdm(grid, desc="recommended", unit="row"):
            rows.append(measure(lab, *job, first, last))
    about = lab.about | {"windows": [first, last]}
    files.write_json(out, {"about": about, "rows": rows})
    mark = MARK if pairs == "windows" else SEEDS_MARK
    pages.publish(markdown(rows, pairs), page, mark)


if __name__ == "__main__":
    main()

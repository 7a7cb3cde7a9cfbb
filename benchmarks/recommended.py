"""Does `recommended` beat the published DFRot where nothing was chosen? Evaluation windows 3 to 6.

    python -m benchmarks.recommended --out figures/recommended.json --page docs/optimiser.md

Notebook 9 ranks objectives by evaluation windows 1 and 2 and confirms on 3 and 4. Here are four windows
that no choice has seen, RTN over seeds, intervals, and `as released`: the settings of the authors' code,
which are all rows, a hundred steps, the symmetric quantizer in the loop, a QR after each SVD. Everything is
kept in the lab's folder: a run that was cut off measures the rest.
"""

from __future__ import annotations

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
from dfrot_lab.evaluation import Perplexity
from dfrot_lab.lab import Lab
from dfrot_lab.presets import PRESETS
from dfrot_lab.studies.perplexities import paired

MARK = "<!-- benchmarks/recommended.py -->"
METHODS = ("RH", "dfrot", "as released", "recommended")
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
    else:
        name = str(released(lab, seed))
    found = lab.perplexity(name, seed, bits=bits, windows=last, method=weights)
    row = {"rotation": method, "keep": "none", "seed": seed, "bits": bits, "weights": weights}
    return row | {"nll": found["nll"][first - 1 :]}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Perplexity, mean ± sd over seeds, and under it nll − nll of `BASE` with its interval over windows."""
    found = {s: [r for r in rows if (r["bits"], r["weights"]) == s] for s in SETTINGS}
    found = {s: those for s, those in found.items() if those}
    lines = [
        [
            m,
            *(
                pages.mean_sd([Perplexity(n).value for n in _nll(those, m)], 2)
                for those in found.values()
            ),
        ]
        for m in METHODS
    ]
    for method in (m for m in METHODS if m != BASE):
        lines.append([f"{method} − {BASE}, nats a token"])
        for those in found.values():
            d = paired(those, (method, "none"), (BASE, "none")) if _nll(those, method) else None
            lines[-1].append(pages.interval(d, 3) if d else NONE)
    return pages.table(["", *(_named(*s) for s in found)], lines)


def _named(bits: str, weights: str) -> str:
    return bits if bits.startswith("16") else f"{bits}, {'RTN' if weights == 'rtn' else 'GPTQ'}"


def _nll(rows: Sequence[dict[str, Any]], method: str) -> list[list[float]]:
    return [r["nll"] for r in rows if r["rotation"] == method]


@click.command(context_settings={"show_default": True})
@click.option("--profile", default="demo")
@click.option("--folder", type=PATH, help="[default: results/PROFILE]")
@click.option("--seeds", default="0,1,2", help="Of RH, by commas.")
@click.option("--first", default=3, help="Evaluation window, counted from 1.")
@click.option("--last", default=6, help="Evaluation window.")
@click.option("--gptq/--no-gptq", default=True, help="Also at 4-4-16 by GPTQ.")
@click.option("--page", type=PATH, help=f"Put the table there too, between two lines {MARK}")
@click.option("--out", type=PATH, required=True, help="The numbers, as JSON.")
def main(profile, folder, seeds, first, last, gptq, page, out) -> None:
    """Measure what the lab's folder lacks, print the table."""
    check_windows(first, last)
    lab, rows = options.quantizing(profile, folder), []
    asked = SETTINGS if gptq else [how for how in SETTINGS if how[1] == "rtn"]
    grid = [
        (m, int(s), *how)
        for how in asked
        for m in METHODS
        for s in seeds.split(",")
        if m != "as released" or how[1] == "rtn"  # a minute a row
    ]
    with kept_files.recording(lab.folder):
        for job in tqdm(grid, desc="recommended", unit="row"):
            rows.append(measure(lab, *job, first, last))
    about = lab.about | {"windows": [first, last]}
    files.write_json(out, {"about": about, "rows": rows})
    pages.publish(markdown(rows), page, MARK)


if __name__ == "__main__":
    main()

"""Does `recommended` beat the published DFRot where nothing was chosen? Evaluation windows 3 to 6.

    python -m benchmarks.recommended --out figures/recommended.json --page docs/optimiser.md

Notebook 9 ranked objectives by evaluation windows 1 and 2, and confirms on the same two. These were seen
by no choice. `as released` has the settings of the authors' code: all rows, a hundred steps, the symmetric
quantizer in the loop, a QR after each SVD. Everything is kept in the lab's folder: a run that was cut off
measures the rest.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks import llama_table
from dfrot_lab import evaluation, files, kept_files
from dfrot_lab.cli import options
from dfrot_lab.evaluation import Perplexity
from dfrot_lab.lab import Lab
from dfrot_lab.presets import PRESETS

MARK = "<!-- benchmarks/recommended.py -->"
METHODS = ("RH", "dfrot", "as released", "recommended")
BASE, NONE = "dfrot", "–"
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
    row = {"method": method, "seed": seed, "bits": bits, "weights": weights}
    return row | {"nll": found["nll"][first - 1 :]}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Perplexity, mean ± sd over seeds, and under it nll − nll of `BASE` with its interval over windows."""
    settings = [s for s in SETTINGS if _of(rows, BASE, *s)]
    head = ["", *(_named(*s) for s in settings)]
    lines = [head, ["---"] * len(head)]
    for method in METHODS:
        cells = [_of(rows, method, *s) for s in settings]
        lines.append([method])
        for nll in cells:
            if not nll:
                lines[-1].append(NONE)
                continue
            s = evaluation.spread([Perplexity(one).value for one in nll])
            lines[-1].append(f"{s['mean']:.2f} ± {s['sd']:.2f}")
    for method in METHODS:
        if method == BASE:
            continue
        lines.append([f"{method} − {BASE}, nats a token"])
        for s in settings:
            pair = [_of(rows, m, *s) for m in (method, BASE)]
            if not all(pair):
                lines[-1].append(NONE)
                continue
            one, two = map(_by_window, pair)
            d = evaluation.paired_difference(one, two)
            text = f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
            lines[-1].append(text.replace("-", "−"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _named(bits: str, weights: str) -> str:
    if bits.startswith("16"):
        return bits
    return f"{bits}, {'RTN' if weights == 'rtn' else 'GPTQ'}"


def _of(rows: Sequence[dict[str, Any]], method: str, bits: str, weights: str) -> list[list[float]]:
    asked = {"method": method, "bits": bits, "weights": weights}
    return [r["nll"] for r in rows if r | asked == r]


def _by_window(nll: Sequence[Sequence[float]]) -> list[float]:
    """Means over seeds: seeds on the same windows are no independent pairs."""
    return [statistics.fmean(window) for window in zip(*nll, strict=True)]


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
    if not 1 <= first < last:
        raise click.UsageError("--first, --last: an interval needs two windows, counted from 1")
    lab, rows = options.lab(profile, folder), []
    shared = options.quantizing(profile, folder)  # the Hessians of notebooks 5, 9 and 10
    asked = SETTINGS if gptq else [how for how in SETTINGS if how[1] == "rtn"]
    grid = [
        (m, int(s), *how)
        for how in asked
        for m in METHODS
        for s in seeds.split(",")
        if m != "as released" or how[1] == "rtn"  # a minute a row
    ]
    with kept_files.recording(lab.folder):
        for m, s, bits, how in tqdm(grid, desc="recommended", unit="row"):
            rows.append(measure(lab if how == "rtn" else shared, m, s, bits, how, first, last))
    about = lab.about | {"windows": [first, last]}
    files.write_json(out, {"about": about, "rows": rows})
    text = markdown(rows)
    click.echo(text)
    if page:
        llama_table.put(page, text, MARK)


if __name__ == "__main__":
    main()

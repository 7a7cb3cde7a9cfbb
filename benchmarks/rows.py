"""Rows: a benchmark's JSON, written row by row, so that a run that was cut off measures the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from benchmarks import records
from dfrot_lab import kept_files, lab, results
from dfrot_lab.lab import Lab

__all__ = ["check_windows", "measured"]

Row = dict[str, Any]
CODE = (*lab.CODE, "dfrot_lab.presets", "dfrot_lab.prefix", "dfrot_lab.studies.questions")


def check_windows(first: int, last: int) -> None:
    """UsageError unless evaluation windows `first` to `last` are two or more."""
    if not 1 <= first < last:
        raise click.UsageError("--first, --last: an interval needs two windows, counted from 1")


def measured(
    out: Path,
    lab: Lab,
    settings: dict[str, Any],
    jobs: Sequence[Row],
    measure: Callable[[Row], Row],
    said: str,
) -> list[Row]:
    """The row of each job, in their order; `measure` gives those that the file at `out` lacks.

    A row holds all that its job holds. ClickException where the file is of other settings, code or machine.
    """
    settings = settings | lab.about | {"code": results.code_digest(*CODE)}
    asked = ("calibration", "calibration_seed", "rows", "iterations", "solver")
    asked += ("clip_steps", "weight_windows")
    settings |= {"lab": {name: getattr(lab, name) for name in asked}}
    try:
        kept = _opened(out, records.provenance(torch.device(lab.device), "torch"), settings)
    except records.ResumeError as error:
        raise click.ClickException(str(error)) from error
    out.parent.mkdir(parents=True, exist_ok=True)

    def found(job: Row) -> Row | None:
        return next((row for row in kept["rows"] if row | job == row), None)

    todo = [job for job in jobs if not found(job)]
    done = len(jobs) - len(todo)
    bar = tqdm(todo, desc=said, unit="row", initial=done, total=len(jobs))
    with kept_files.recording(lab.folder):
        for job in bar:
            bar.set_postfix_str(" ".join(map(str, job.values())))
            kept["rows"].append(measure(job))
            records.write_text(out, json.dumps(kept, indent=1) + "\n")
    click.echo()  # behind the progress bar
    return [found(job) for job in jobs]


def _opened(out: Path, origin: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The document at `out`, or a new one; ResumeError where it was measured under other conditions."""
    if not out.exists():
        return {"provenance": origin, "settings": settings, "rows": []}
    found = json.loads(out.read_text(encoding="utf-8"))
    records.same(found["provenance"], origin, records.SAME)
    records.same(found["settings"], settings, settings)
    return found

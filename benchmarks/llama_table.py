"""The tables of docs/export.md, llama.cpp's part, from the cells that `llama_formats` measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import pages
from benchmarks.pages import NONE
from dfrot_lab import evaluation
from dfrot_lab.evaluation import Perplexity

__all__ = ["BASELINE", "MARK", "ROWS", "differences", "markdown", "perplexities"]

ROWS = ("unrotated", "permuted", "RO", "RH", "refined")
BASELINE = "permuted"
MARK = "<!-- benchmarks/llama_formats.py -->"


def markdown(table: dict[str, Any]) -> str:
    """Perplexities and sizes, then differences from `BASELINE`, as they stand in docs/export.md."""
    return "\n\n".join((perplexities(table), differences(table)))


def perplexities(table: dict[str, Any]) -> str:
    """Mean over seeds of the perplexity, ± sd where there are two or more; sizes of the files, in MB."""
    cells, kinds = table["cells"], _kinds(table)
    plain = f"{Perplexity(table['transformers']).value:.3f}"
    lines = [["unrotated, by transformers", *(plain if k == "F32" else NONE for k in kinds)]]
    for row in _rows(cells):
        lines.append([_label(cells, row)])
        for kind in kinds:
            found = [Perplexity(c["nll"]).value for c in _of(cells, row, kind)]
            lines[-1].append(pages.mean_sd(found, 3))
    for untied in (False, True):
        those = [c for c in cells if c["untied"] == untied]
        if those:
            tables = "two tables" if untied else "one table"
            lines.append([f"MB, {tables} for embedding and head: {', '.join(_rows(those))}"])
            for kind in kinds:
                sizes = {round(c["bytes"] / 1e6) for c in those if c["format"] == kind}
                lines[-1].append("–".join(map(str, sorted(sizes))) or NONE)
    return pages.table(["Perplexity", *kinds], lines)


def differences(table: dict[str, Any]) -> str:
    """nll − nll of `BASELINE` in nats a token with its 95 % interval over windows, both means over seeds."""
    cells = table["cells"]
    kinds = [k for k in _kinds(table) if k != "F32"]
    lines = []
    for row in _rows(cells):
        if row == BASELINE:
            continue
        lines.append([_label(cells, row)])
        for kind in kinds:
            pair = [_of(cells, r, kind) for r in (row, BASELINE)]
            text = NONE
            if all(pair):
                means = [_by_window([c["nll"] for c in those]) for those in pair]
                text = pages.interval(evaluation.paired_difference(*means), 3)
            lines[-1].append(text)
    return pages.table([f"nll − nll of {BASELINE}", *kinds], lines)


def _kinds(table: dict[str, Any]) -> list[str]:
    """Formats, the largest first."""
    size = {c["format"]: c["bytes"] for c in sorted(table["cells"], key=lambda c: c["bytes"])}
    return sorted(size, key=lambda k: (-size[k], k))


def _rows(cells: Sequence[dict]) -> list[str]:
    return [row for row in ROWS if any(c["row"] == row for c in cells)]


def _of(cells: Sequence[dict], row: str, kind: str) -> list[dict]:
    return [c for c in cells if c["row"] == row and c["format"] == kind]


def _label(cells: Sequence[dict], row: str) -> str:
    seeds = len({(c["seed"], c["R1"]) for c in cells if c["row"] == row})
    return row if seeds == 1 else f"{row}, {seeds} seeds"


def _by_window(nll: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(window) for window in zip(*nll, strict=True)]

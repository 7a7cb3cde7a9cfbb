"""The tables of docs/export.md, llama.cpp's part, from the cells that `llama_formats` measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dfrot_lab import evaluation, files
from dfrot_lab.evaluation import Perplexity

__all__ = ["BASELINE", "MARK", "ROWS", "differences", "markdown", "perplexities", "put"]

ROWS = ("unrotated", "permuted", "RO", "RH", "refined")
BASELINE = "permuted"
MARK = "<!-- benchmarks/llama_formats.py -->"
NONE = "–"


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
            lines[-1].append(_mean(found) if found else NONE)
    for untied in (False, True):
        those = [c for c in cells if c["untied"] == untied]
        if those:
            tables = "two tables" if untied else "one table"
            lines.append([f"MB, {tables} for embedding and head: {', '.join(_rows(those))}"])
            for kind in kinds:
                sizes = {round(c["bytes"] / 1e6) for c in those if c["format"] == kind}
                lines[-1].append("–".join(map(str, sorted(sizes))) or NONE)
    return _table(["Perplexity", *kinds], lines)


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
                d = evaluation.paired_difference(*means)
                text = f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]".replace("-", "−")
            lines[-1].append(text)
    return _table([f"nll − nll of {BASELINE}", *kinds], lines)


def put(page: Path, text: str, mark: str = MARK) -> None:
    """Replace what stands between the two lines `mark` of `page`; ClickException where they are not two."""
    parts = page.read_text(encoding="utf-8").split(mark)
    if len(parts) != 3:
        raise click.ClickException(
            f"{page} holds {len(parts) - 1} lines {mark} where two are needed: put one before and one after "
            "the place of the table"
        )
    with files.atomic(page) as partial:
        partial.write_text(mark.join((parts[0], f"\n{text}\n", parts[2])), encoding="utf-8")


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


def _mean(values: Sequence[float]) -> str:
    s = evaluation.spread(values)
    return f"{s['mean']:.3f}" + (f" ± {s['sd']:.3f}" if s["n"] > 1 else "")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

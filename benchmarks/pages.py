"""Page: a benchmark's numbers as markdown, and their place in a page of docs/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from dfrot_lab import evaluation, files

__all__ = ["NONE", "interval", "mean_sd", "publish", "put", "table"]

NONE = "–"  # what was not measured


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as markdown has it."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def mean_sd(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation, which one value has not; `NONE` of no values."""
    if not values:
        return NONE
    s = evaluation.spread(values)
    return f"{s['mean']:.{digits}f}" + (f" ± {s['sd']:.{digits}f}" if s["n"] > 1 else "")


def interval(d: Mapping[str, float], digits: int) -> str:
    """A paired difference with its interval, signs written out."""
    mean, low, high = (f"{d[k]:+.{digits}f}" for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]".replace("-", "−")


def put(page: Path, text: str, mark: str) -> None:
    """Replace what stands between the two lines `mark` of `page`; ClickException where they are not two."""
    parts = page.read_text(encoding="utf-8").split(mark)
    if len(parts) != 3:
        raise click.ClickException(
            f"{page} holds {len(parts) - 1} lines {mark} where two are needed: put one before and one after "
            "the place of the table"
        )
    with files.atomic(page) as partial:
        partial.write_text(mark.join((parts[0], f"\n{text}\n", parts[2])), encoding="utf-8")


def publish(text: str, page: Path | None, mark: str) -> None:
    """Print `text`, and `put` it where a page is asked for."""
    click.echo(text)
    if page:
        put(page, text, mark)

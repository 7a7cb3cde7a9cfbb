"""Grids: the summary of an experiment as tables, one axis across the page and the others down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfrot_lab import files
from dfrot_lab.gallery.entries import GalleryError, Scrubber, inside
from dfrot_lab.tables import Table

__all__ = ["Cell", "Grid", "GridTable", "any_in", "read"]

_KEYS = {"profile", "notebooks", "axes", "rows", "missing"}


@dataclass(frozen=True)
class Cell:
    """A number with its spread, or what a claim's notebook saw; holds: of a claim, else None."""

    text: str
    holds: bool | None = None


@dataclass(frozen=True)
class GridTable:
    """What one notebook measured or claimed over the grid: "claims", "perplexity" or "measurements".

    names: what a row is called by; values: of the axis `across`; rows: (names, cells), None where there
    is no such point or no result.
    """

    notebook: str
    what: str
    across: str
    names: tuple[str, ...]
    values: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Cell | None, ...]], ...]


@dataclass(frozen=True)
class Grid:
    """An experiment: its summary, the folder that has it, for each notebook a table of what it measured
    and one of its claims, and a row of provenance a run.
    """

    name: str
    origin: str
    summary: dict[str, Any]
    csv: str
    tables: tuple[GridTable, ...]
    provenance: Table

    @property
    def href(self) -> str:
        """Its page; a notebook's name cannot begin like this."""
        return f"experiment-{self.name}.html"

    @property
    def runs(self) -> tuple[int, int]:
        """(notebooks at points that have results, all)."""
        every = len(self.summary["notebooks"])
        for axis in self.summary["axes"]:
            every *= len(axis["values"])
        return every - len(self.summary["missing"]), every


def any_in(folders: Sequence[Path]) -> bool:
    """Whether one of `folders` has an experiment."""
    return any(True for folder in folders for _ in folder.glob("*/summary.json"))


def read(folders: Sequence[Path], root: Path, scrub: Scrubber) -> list[Grid]:
    """The experiments in `folders`, by name; the first folder that has one counts.

    Raises GalleryError for a summary that is damaged or of an older version.
    """
    found: dict[str, Grid] = {}
    for folder in folders:
        for path in sorted(folder.glob("*/summary.json")):
            if path.parent.name not in found:
                found[path.parent.name] = _read(path, root, scrub)
    return [found[name] for name in sorted(found)]


def _read(path: Path, root: Path, scrub: Scrubber) -> Grid:
    name = path.parent.name
    try:
        summary = scrub.value(files.read_json(path))
        if lost := sorted(_KEYS - set(summary)):
            raise ValueError(f"no {', '.join(lost)}")
        text = scrub(path.with_suffix(".csv").read_text(encoding="utf-8"))
        every = [
            _table(summary, n, claims) for n in summary["notebooks"] for claims in (False, True)
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GalleryError(
            f"{path} is damaged or of an older version ({type(error).__name__}: {error}): run "
            f"`dfrot-lab batch --experiment {name}` again"
        ) from error
    shown = tuple(t for t in every if t.rows)
    origin = inside(path.parent.parent, root)
    return Grid(name, origin, summary, text, shown, _provenance(path.parent))


def _provenance(folder: Path) -> Table:
    rows = []
    for path in sorted(folder.glob("*/*/provenance.json")):
        try:
            about = files.read_json(path)
            commit = (about["commit"] or "not known")[:10] + " and changes" * about["dirty"]
            run = (
                path.parents[1].name,
                path.parent.name,
                commit,
                about["processor"] or "not known",
            )
            rows.append((*run, about["finished"], f"{about['seconds']:.0f}"))
        except (KeyError, TypeError, ValueError) as error:
            raise GalleryError(
                f"{path} is damaged ({type(error).__name__}: {error}): delete it and run its point again"
            ) from error
    header = ("point", "notebook", "commit", "processor", "finished", "seconds")
    return Table("What each result was found with", header, tuple(rows), frozenset({5}))


def _table(summary: dict[str, Any], notebook: str, claims: bool) -> GridTable:
    axes = {a["name"]: a["values"] for a in summary["axes"]}
    # seeds repeat a measurement: down the page, unless there is nothing else
    across = max(axes, key=lambda k: (k != "seeds", len(axes[k])), default="")
    down = [k for k in axes if k != across and len(axes[k]) > 1]
    own = [
        r for r in summary["rows"] if r["notebook"] == notebook and (r["kind"] == "claim") == claims
    ]
    kinds = {r["kind"] for r in own}
    what = "claims" if claims else "measurements" if len(kinds) > 1 else "".join(kinds)
    found: dict[tuple[str, ...], dict[str, Cell]] = {}
    for row in own:
        name = row["quantity"] if claims else _quantity(row, axes).removeprefix(f"{what} of ")
        found.setdefault((name, *(row[k] for k in down)), {})[row.get(across, "")] = _cell(row)
    # rows of one quantity together, in the order in which quantities and then points come
    order = {q: i for i, q in enumerate(dict.fromkeys(names[0] for names in found))}
    values = axes.get(across, [""])
    rows = [
        (names, tuple(found[names].get(v) for v in values))
        for names in sorted(found, key=lambda names: order[names[0]])
    ]
    head = ("claim" if claims else "of", *down)
    return GridTable(notebook, what, across, head, tuple(values), tuple(rows))


def _quantity(row: dict[str, Any], axes: dict[str, list[str]]) -> str:
    """What was measured, without the values of the axes, which the table says."""
    said = {f"{k} {row[k]}" for k in axes}
    return ", ".join(word for word in row["quantity"].split(", ") if word not in said)


def _cell(row: dict[str, Any]) -> Cell:
    if row["kind"] == "claim":
        return Cell(str(row["value"]), bool(row["agrees"]))
    form = ",.2f" if row["kind"] == "perplexity" else ".3f"
    spread = f" ± {_number(row['sd'], form)}" if row["n"] > 1 else ""
    return Cell(_number(row["value"], form) + spread)


def _number(value: float | str, form: str) -> str:
    value = float(value)
    text = format(value, ".2e" if 1e6 <= abs(value) < math.inf else form)
    return text.replace("-", "−").replace("inf", "∞").replace("nan", "undefined")

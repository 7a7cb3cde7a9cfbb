"""Pairs: the result of a notebook and that of a reference, and the verdicts on all that is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dfrot_lab import pictures, tolerances
from dfrot_lab.tables import of_the_paper
from dfrot_lab.tolerances import Difference
from dfrot_lab.verdicts import Line

__all__ = ["Pair", "compared", "figure", "redrawn", "rest", "worst"]


@dataclass(frozen=True)
class Pair:
    """A notebook's result and the reference's, and how the one may be compared with the other."""

    name: str
    home: Path
    reference: Path
    ours: dict[str, Any]
    theirs: dict[str, Any]
    exact: bool
    same_drawing: bool


def compared(result: dict[str, Any]) -> dict[str, Any]:
    """What is held against each other: all but the parameters, which have their own rule."""
    return {k: v for k, v in result.items() if k != "parameters"}


def worst(wrong: list[Difference]) -> str:
    """The first of the differences, which are sorted, and how many more there are."""
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{wrong[0]}{more}"


def figure(name: str, pair: Pair, wrong: list[Difference], altered: dict[str, str]) -> Line:
    """Its data, then its files."""
    ours, theirs = pictures.files_of(pair.home), pictures.files_of(pair.reference)
    parts = [f"{name}{suffix}" for suffix in (".pdf", ".png", ".md")]
    if lost := [p for p in parts if p not in ours]:
        return Line("figure", name, "missing", f"({', '.join(lost)} not in {pair.home})")
    if lost := [p for p in parts if p not in theirs]:
        return Line("figure", name, "missing", f"({', '.join(lost)} not in {pair.reference})")
    keys = pictures.keys(name, pair.theirs) if wrong else set()
    mine = [d for d in wrong if _top(d) in keys or not _top(d)]
    if mine:
        return Line("figure", name, "differs", worst(mine), mine)
    touched = [f"{p} {altered[k]}" for p in parts if (k := f"{pair.name}/{p}") in altered]
    if touched:
        return Line("figure", name, "differs", f"(of the reference, {', '.join(touched)})")
    if pair.same_drawing:
        unlike = [p for p in parts if ours[p].read_bytes() != theirs[p].read_bytes()]
        if unlike:
            return Line("figure", name, "differs", f"in the bytes of {', '.join(unlike)} alone")
    return Line("figure", name, "reproduced")


def _top(difference: Difference) -> str:
    return difference.path.split(".")[0].split("[")[0]


def rest(pair: Pair, wrong: list[Difference]) -> list[Line]:
    """Lines for all numbers together, the claims, and the files of tables."""
    claims = [d for d in wrong if _top(d) == "claims"]
    count = len(pair.theirs.get("claims") or [])
    said = [c for c in pair.theirs.get("claims") or [] if of_the_paper(c)]
    lines = []
    if wrong:
        lines.append(Line("numbers", "result.json", "differs", worst(wrong), wrong))
    elif pair.exact and _bytes(pair.home) != _bytes(pair.reference):
        lines.append(Line("numbers", "result.json", "differs", "in bytes, in no value"))
    else:
        held = f"({tolerances.numbers(compared(pair.theirs)):,} numbers)"
        lines.append(Line("numbers", "result.json", "reproduced", held))
    if claims:
        lines.append(Line("claims", "claims", "differs", worst(claims), claims))
    elif count:
        agree = sum(bool(c["agrees"]) for c in said)
        held = f"({agree} of the paper's {len(said)} agree"
        if len(said) < count:
            ours = sum(bool(c["agrees"]) for c in pair.theirs["claims"]) - agree
            held += f"; {ours} of {count - len(said)} that it does not make hold"
        lines.append(Line("claims", "claims", "reproduced", f"{held})"))
    ours, theirs = pictures.files_of(pair.home), pictures.files_of(pair.reference)
    for name in sorted(n for n in theirs if n.startswith("tables_")):
        if name not in ours:
            lines.append(Line("table", name, "missing", f"(not in {pair.home})"))
        elif not pair.exact:
            lines.append(Line("table", name, "not compared", "(its numbers are, in result.json)"))
        elif ours[name].read_bytes() != theirs[name].read_bytes():
            lines.append(Line("table", name, "differs", "in its bytes"))
        else:
            lines.append(Line("table", name, "reproduced"))
    return lines


def _bytes(home: Path) -> bytes:
    return (home / "result.json").read_bytes()


def redrawn(pair: Pair, made: dict[str, Any], figures: list[str]) -> list[Line]:
    """Whether the files in the results are what their own result gives, where they can be drawn alike."""
    versions = made.get("versions") or {}
    for package in ("matplotlib", "numpy"):
        if (here := metadata.version(package)) != versions.get(package):
            detail = f"(drawn with {package} {versions.get(package)}, which is {here} here)"
            return [Line("pictures", "pictures", "not compared", detail)]
    try:
        unlike = pictures.stale(pair.home, figures)
    except Exception as error:  # what was altered may fail anywhere
        detail = f"(cannot be drawn from {pair.home / 'result.json'}: {error})"
        return [Line("pictures", "pictures", "differs", detail)]
    if unlike:
        detail = f"({', '.join(unlike)} not what {pair.home / 'result.json'} gives)"
        return [Line("pictures", "pictures", "differs", detail)]
    return [Line("pictures", "pictures", "reproduced", "(drawn again from this result, as found)")]

"""Verify: the results of a profile held against a committed reference, figure by figure.

A reference is a folder that `dfrot-lab publish` has written, NOTEBOOK/{result.json, provenance.json,
FIGURE.png, …} with SHA256SUMS beside them, or another results folder. Where processor, threads, device
and versions are those of the reference, every byte has to be equal; elsewhere `tolerances` says how far a
number may be.
What was timed (speed.json and the figures drawn from it, wall time, memory) is never compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dfrot_lab import files, manifest, pairs, pictures, results, tolerances
from dfrot_lab.verdicts import Line, NotebookReport, Report

__all__ = ["VerifyError", "verify"]

# what makes a notebook; the rest is asked for by number
MADE_BY = {"01": "figures", "02": "figures", "03": "figures", "04": "figures"}
MADE_BY |= {"05": "tables", "06": "tables", "07": "kernels", "08": "theory", "09": "objectives"}
MADE_BY |= {"10": "zeroshot"}
_MACHINE = ("processor", "system", "threads", "cuda", "python")
_PLACE = ("device", "threads")  # parameters that say where, not what
_DRAWING = ("matplotlib",)
_OURS = ("dfrot-lab",)


class VerifyError(ValueError):
    """Nothing to compare, or nothing to compare it with; one line: what, where, what to do."""


def verify(
    profile: str,
    folder: str | Path,
    reference: str | Path,
    *,
    asked: Iterable[str] = (),
    every: bool = False,
    tolerant: bool = False,
) -> Report:
    """Hold the results in `folder` against `reference`.

    asked: notebooks by their full names; none for the first four and those that have results. every:
    all that the reference holds. tolerant: within tolerances on the same machine too.
    Raises VerifyError where a folder holds no results.
    """
    folder, reference = Path(folder), Path(reference)
    known, made = _notebooks(reference), _notebooks(folder)
    if not known:
        raise VerifyError(f"{reference} holds no NOTEBOOK/result.json: name a reference that does")
    if not made:
        raise VerifyError(f"{folder} holds no NOTEBOOK/result.json: run `make figures` first")
    asked = set(asked)
    if stray := asked - known:
        raise VerifyError(
            f"{reference} holds no {', '.join(sorted(stray))}: it has {', '.join(sorted(known))}"
        )
    first = {n for n in known if _target(n) == "make figures"}
    wanted = asked or (known if every else known & (made | first))
    altered = None if _unlisted(reference) else manifest.check(reference)
    inputs = {n: _inputs(_provenance(folder / n)) for n in sorted(made & wanted)}
    hashes = _hashes(folder, reference, altered, inputs)
    altered = altered or {}
    notebooks = []
    for name in sorted(wanted):
        if name in made:
            told = _notebook(name, folder, reference, altered, tolerant)
        else:
            detail = f"no result in {folder / name}: run `{_target(name)}`"
            names = pictures.expected(name, reference)
            told = NotebookReport(name, "missing", _each(name, names, "missing", detail))
        told.lines.extend(
            Line("figure", n, "not compared", "(it shows what was timed)")
            for n in pictures.timed(name, reference)
        )
        notebooks.append(told)
    for name in [] if asked else sorted((known | made) - wanted):
        if name in known:
            about = f"not run (`{_target(name)}` runs it)"
            names = pictures.expected(name, reference) + pictures.timed(name, reference)
            notebooks.append(NotebookReport(name, about, _each(name, names, "not run")))
        else:
            line = Line("notebook", name, "not compared", "(the reference does not hold it)")
            notebooks.append(NotebookReport(name, line.status, [line]))
    return Report(profile, str(reference), hashes, notebooks, tuple(sorted(asked)))


def _each(notebook: str, figures: list[str], status: str, detail: str = "") -> list[Line]:
    """The same of every figure of a notebook; of the notebook where it has none."""
    lines = [Line("figure", name, status, detail) for name in figures]
    return lines or [Line("notebook", notebook, status, detail)]


def _notebooks(folder: Path) -> set[str]:
    return {p.parent.name for p in folder.glob("*/result.json")}


def _target(notebook: str) -> str:
    number = notebook.split("_", maxsplit=1)[0]
    made_by = MADE_BY.get(number)
    return f"make {made_by}" if made_by else f"dfrot-lab batch --only {number}"


# --- hashes and provenance ------------------------------------------------------------------------


def _unlisted(reference: Path) -> bool:
    """Whether the reference is a results folder, which no manifest protects."""
    results_like = (reference / "artefacts").is_dir() or any(reference.glob("*/figures"))
    return results_like and not (reference / manifest.NAME).is_file()


def _hashes(
    folder: Path, reference: Path, altered: dict[str, str] | None, inputs: dict[str, dict[str, Any]]
) -> list[Line]:
    """A line each for the reference's files, the packaged assets, the kept files and their inputs.

    inputs: notebook → the hashes its provenance has recorded.
    """
    if altered is None:
        lines = [_kept("reference", reference)]
    else:
        lines = [_wrong("reference", altered, f"every file as in {manifest.NAME}")]
    recorded = {k: v for found in inputs.values() for k, v in found.get("assets", {}).items()}
    if recorded:
        good = f"{', '.join(sorted(recorded))}: SHA-256 of the cached files as pinned"
        lines.append(_wrong("assets", manifest.check_assets(recorded), good))
    lines.append(_kept("kept files", folder))
    if (folder / "artefacts").is_dir():
        tokens = {
            n: v["calibration_tokens"] for n, v in inputs.items() if "calibration_tokens" in v
        }
        good = "assets and calibration tokens as recorded in the results"
        lines.append(_wrong("artefacts", manifest.check_inputs(folder, tokens), good))
    return lines


def _kept(name: str, folder: Path) -> Line:
    wrong, good = manifest.check_kept(folder)
    if wrong or good:
        return _wrong(name, wrong, good)
    return Line("hash", name, "not compared", f"(nothing in {folder} was recorded by its hash)")


def _wrong(name: str, wrong: dict[str, str], good: str) -> Line:
    if not wrong:
        return Line("hash", name, "reproduced", f"({good})")
    gone = all(v == "missing" for v in wrong.values())
    said = "; ".join(f"{k} {v}" for k, v in list(wrong.items())[:5])
    more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return Line("hash", name, "missing" if gone else "differs", f"({said}{more})")


def _provenance(home: Path) -> dict[str, Any]:
    try:
        found = files.read_json(home / "provenance.json")
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _inputs(provenance: dict[str, Any]) -> dict[str, Any]:
    return provenance.get("inputs") or {}


# --- one notebook ---------------------------------------------------------------------------------


def _notebook(
    name: str, folder: Path, reference: Path, altered: dict[str, str], tolerant: bool
) -> NotebookReport:
    home, other = folder / name, reference / name
    figures = pictures.expected(name, other.parent)
    try:
        ours, theirs = _result(home), _result(other)
    except results.ResultError as error:
        lines = [Line("figure", f, "differs", "(no result to draw it from)") for f in figures]
        return NotebookReport(
            name, "damaged", [Line("result", name, "differs", str(error)), *lines]
        )
    made, published = _provenance(home), _provenance(other)
    elsewhere = _elsewhere(made, published)
    if unlike := _parameters(ours, theirs):
        lines = [Line("figure", f, "not comparable") for f in figures]
        lines.append(Line("parameters", "parameters", "not comparable", f"({unlike})"))
        return NotebookReport(name, "other parameters", lines)
    drawn_with = {k for k in elsewhere if k.split()[0] in _DRAWING}
    exact = not (elsewhere - drawn_with) and not tolerant
    pair = pairs.Pair(name, home, other, ours, theirs, exact, exact and not drawn_with)
    about = "same machine and versions, held byte for byte" if exact else "held within tolerances"
    if elsewhere:
        about += f" ({'; '.join(sorted(elsewhere))})"
    if published.get("commit"):
        about += f"; reference from commit {published['commit'][:7]}"
    wrong = tolerances.differences(pairs.compared(theirs), pairs.compared(ours), exact=exact)
    inputs = tolerances.differences(_inputs(published), _inputs(made), exact=True)
    said = made.get("parameters") != ours.get("parameters")
    lines = [pairs.figure(f, pair, wrong, altered) for f in figures] + pairs.rest(pair, wrong)
    if inputs:
        lines.append(Line("inputs", "inputs", "differs", pairs.worst(inputs), inputs))
    if said:
        detail = f"(parameters in {home / 'provenance.json'} are not those of the result)"
        lines.append(Line("inputs", "provenance", "differs", detail))
    if figures and not pair.same_drawing:
        lines += pairs.redrawn(pair, made, figures)
    return NotebookReport(name, about, lines)


def _result(home: Path) -> dict[str, Any]:
    found = results.load(home)
    if not isinstance(found, dict):
        raise results.ResultError(f"{home / 'result.json'} is damaged: it holds no result")
    return found


def _elsewhere(made: dict, published: dict) -> set[str]:
    """What of machine and versions is not the same, in words."""
    found = set()
    one, two = (
        {k: p.get(k) for k in _MACHINE}
        | {k: v for k, v in (p.get("versions") or {}).items() if k not in _OURS}
        | {"device": (p.get("parameters") or {}).get("device")}
        for p in (made, published)
    )
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            found.add(f"{key} {one.get(key)} against {two.get(key)}")
    return found


def _parameters(ours: dict, theirs: dict) -> str:
    """The parameters that differ, in words; where a notebook ran is not one of them."""
    a, b = (
        {k: v for k, v in (r.get("parameters") or {}).items() if k not in _PLACE}
        for r in (ours, theirs)
    )
    return "; ".join(
        f"{key} {a.get(key)} against {b.get(key)}"
        for key in sorted(a.keys() | b.keys())
        if key not in a or key not in b or a[key] != b[key]
    )

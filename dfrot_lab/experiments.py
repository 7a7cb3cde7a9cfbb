"""Experiments: grids of notebooks × parameters over a profile, from experiments.yml.

Every combination of the grid's lists is a point, with results in a folder of its own. Points that agree
in what artefacts depend on share them: one collects, all use it. A point and a share are profiles
(`base:` and what differs), so that every command takes them as it takes any other.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dfrot_lab import files, notebooks, profiles

__all__ = ["Experiment", "ExperimentError", "check", "find", "prepare", "summarize"]

# parameters that the names of shared files do not tell apart
SHARED = (
    "model",
    "corpus",
    "seqlen",
    "calibration",
    "calibration_seed",
    "iterations",
    "rows",
    "solver",
)
SHARED += ("weight_windows", "dtype", "device", "threads")
_FOLDERS = ("artefacts", "measurements", "samples", "corpora", "calibration", ".locks")


class ExperimentError(ValueError):
    """An experiment that is unknown or malformed; one line: what, which value, what to do."""


@dataclass(frozen=True)
class Share:
    """Artefacts that several points use; `seeds` and `gammas` of all of them."""

    folder: Path
    profile: Path
    values: dict[str, Any]
    seeds: list[int]
    gammas: list[float]


@dataclass(frozen=True)
class Point:
    """One combination: its values, and where its results and its artefacts are."""

    name: str
    values: dict[str, Any]
    folder: Path
    share: Share

    @property
    def profile(self) -> Path:
        """The profile that holds the point's values."""
        return self.folder / "profile.yml"


@dataclass(frozen=True)
class Experiment:
    """Notebooks (full names) at points; paths are relative to the project's root."""

    name: str
    base: str
    notebooks: list[str]
    points: list[Point]
    folder: Path
    root: Path

    @property
    def shares(self) -> list[Share]:
        """What is collected, each once."""
        return list({p.share.folder: p.share for p in self.points}.values())


def read(root: Path) -> dict[str, dict[str, Any]]:
    """The content of experiments.yml: name → {profile, notebooks, grid}."""
    file = root / "experiments.yml"
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except FileNotFoundError:
        raise ExperimentError(f"{file} does not exist: list the experiments there") from None
    except yaml.YAMLError as error:
        raise ExperimentError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise ExperimentError(f"{file} must map names to {{profile, notebooks, grid}}")
    return content


def default_profile(name: str, root: Path) -> str | None:
    """The profile that experiments.yml gives the experiment; None if it gives none."""
    return _entry(name, root).get("profile")


def _entry(name: str, root: Path) -> dict[str, Any]:
    content = read(root)
    if name not in content:
        raise ExperimentError(f"experiment {name!r} is unknown: use one of {', '.join(content)}")
    stray = set(content[name]) - {"profile", "notebooks", "grid"}
    if stray:
        raise ExperimentError(
            f"experiment {name!r} has unknown keys {sorted(stray)}: use profile, notebooks and grid"
        )
    return content[name]


def find(name: str, profile: str, root: Path, home: Path | None = None) -> Experiment:
    """The experiment `name` of experiments.yml over `profile`, its parameters not yet checked.

    home: where results go, relative to `root`; None: results/PROFILE.
    """
    entry = _entry(name, root)
    asked, grid = entry.get("notebooks"), entry.get("grid")
    if not isinstance(asked, list) or not asked:
        raise ExperimentError(f"experiment {name!r}: notebooks = {asked!r} is no list of notebooks")
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise ExperimentError(
            f"experiment {name!r}: grid = {grid!r} must map parameters to lists of values"
        )
    # YAML reads 03 as a number
    stems = [notebooks.find(f"{n:02d}" if isinstance(n, int) else str(n), root).stem for n in asked]
    taken = {p.stem for p in (root / "notebooks").glob("*.ipynb")} | {*_FOLDERS, "gallery", "logs"}
    if not re.fullmatch(r"\w[\w.-]*", name) or name in taken:
        raise ExperimentError(
            f"experiment {name!r}: a name of letters, digits, - and _, no notebook's"
        )
    home = home or Path("results") / Path(profile).stem
    common = profiles.load(profile)["common"]
    combinations = [dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values())]
    differing = [
        {k: v for k, v in values.items() if k in SHARED and v != common.get(k)}
        for values in combinations
    ]
    points = []
    for values, own in zip(combinations, differing, strict=True):
        alike = [c for c, d in zip(combinations, differing, strict=True) if d == own]
        seeds = [s for c in alike for s in _listed(c.get("seeds", common.get("seeds", [])))]
        gammas = [c.get("gamma", common.get("gamma")) for c in alike]
        shared = home / name / "shared" / (_slug(own) or "base")
        share = Share(
            shared if own else home, shared / "profile.yml", own,
            _distinct(seeds), _distinct(gammas),
        )  # fmt: skip
        points.append(Point(_slug(values), values, home / name / _slug(values), share))
    names = [p.name for p in points]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ExperimentError(f"experiment {name!r} has the point {twice} twice: remove one")
    return Experiment(name, profile, stems, points, home / name, root)


def _listed(value: Any) -> list[Any]:
    """What is no list is refused by `check`, with its point."""
    return value if isinstance(value, list) else [value]


def _distinct(values: list[Any]) -> list[Any]:
    """Each once, in order; they need not be hashable."""
    return [v for i, v in enumerate(values) if v not in values[:i]]


def _slug(values: dict[str, Any]) -> str:
    """A folder's name: 'seeds-0-1_bits-16-4-16'."""
    words = [f"{k}-{v}" for k, v in values.items()]
    return "_".join(re.sub(r"[^\w.]+", "-", w).strip("-") for w in words)


def check(experiment: Experiment) -> None:
    """ExperimentError, naming the point, for a name, type or value that no notebook would take."""
    known = {
        n: set(notebooks.parameters(experiment.root / "notebooks" / f"{n}.ipynb"))
        for n in experiment.notebooks
    }
    every = set().union(*known.values())
    for point in experiment.points:
        where = f"experiment {experiment.name!r}, point {point.name}"
        if stray := sorted(set(point.values) - every):
            raise ExperimentError(
                f"{where}: {', '.join(stray)} is a parameter of none of its notebooks: "
                f"use {', '.join(sorted(every - {'folder'}))}"
            )
        for notebook, parameters in known.items():
            given = {k: v for k, v in point.values.items() if k in parameters}
            file = experiment.root / "notebooks" / f"{notebook}.ipynb"
            try:
                notebooks.resolve(file, experiment.base, given)
            except ValueError as error:
                raise ExperimentError(f"{where}: {error}") from error
    if any("model" in p.values for p in experiment.points):
        from dfrot_lab import models

        for point in {p.values["model"]: p for p in experiment.points}.values():
            try:
                models.load_config(point.values["model"])
            except (ValueError, RuntimeError) as error:
                raise ExperimentError(
                    f"experiment {experiment.name!r}, point {point.name}: {error}"
                ) from error


def prepare(experiment: Experiment) -> None:
    """Write the profiles of shares and points, and link each point's folders to its share's."""
    base = experiment.base
    base = str(Path(base).resolve()) if Path(base).is_file() else base
    content, root = profiles.load(experiment.base), experiment.root
    for share in experiment.shares:
        common = share.values | {"seeds": share.seeds}
        rotations = content["rotations"] | {"gammas": share.gammas}
        _write(root / share.profile, {"base": base, "common": common, "rotations": rotations})
        for name in _FOLDERS:
            (root / share.folder / name).mkdir(parents=True, exist_ok=True)
    for point in experiment.points:
        own = {
            n: {
                k: v
                for k, v in point.values.items()
                if k in notebooks.parameters(root / "notebooks" / f"{n}.ipynb")
            }
            for n in experiment.notebooks
        }
        common = {k: v for k, v in point.values.items() if k in content["common"]}
        _write(root / point.profile, {"base": base, "common": common, "notebooks": own})
        for name in _FOLDERS:
            link = root / point.folder / name
            target = os.path.relpath(root / point.share.folder / name, link.parent)
            if not link.is_symlink() or os.readlink(link) != target:
                link.unlink(missing_ok=True)
                link.symlink_to(target)


def _write(path: Path, content: dict[str, Any]) -> None:
    """As YAML, unless it is there already: what depends on it is then as new as it was."""
    text = yaml.safe_dump(content, sort_keys=True)
    if not path.is_file() or path.read_text() != text:
        with files.atomic(path) as partial:
            partial.write_text(text)


def summarize(experiment: Experiment) -> str:
    """Write summary.json and summary.csv over the points that have results; one line that says so.

    A row: notebook, the point's values, and a claim (ours, agrees) or what the notebook's table has: a
    perplexity, or a task's accuracy and log-probability (mean, sd, n over seeds). The JSON file also has
    the grid: `axes`, each with its name and its values as text, in the order of experiments.yml.
    """
    rows: list[dict[str, Any]] = []
    missing = []
    for point, notebook in itertools.product(experiment.points, experiment.notebooks):
        path = experiment.root / point.folder / notebook / "result.json"
        if not path.is_file():
            missing.append(f"{point.name}/{notebook}")
            continue
        result = files.read_json(path)
        about = {"notebook": notebook} | {k: str(v) for k, v in point.values.items()}
        for claim in result["claims"]:
            told = {"quantity": claim["claim"], "value": claim["ours"], "agrees": claim["agrees"]}
            rows.append(about | {"kind": "claim"} | told)
        rows += [about | told for row in result.get("table", []) for told in _told(row)]
    folder, points = experiment.root / experiment.folder, experiment.points
    lists = {k: _distinct([str(p.values[k]) for p in points]) for k in points[0].values}
    axes = [{"name": k, "values": v} for k, v in lists.items()]
    grid = {"profile": Path(experiment.base).stem, "notebooks": experiment.notebooks, "axes": axes}
    files.write_json(folder / "summary.json", grid | {"rows": rows, "missing": missing})
    columns = ["notebook", *experiment.points[0].values, "kind", "quantity", "value"]
    columns += ["sd", "n", "agrees"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with files.atomic(folder / "summary.csv") as partial:
        partial.write_text(text.getvalue())
    done = len(experiment.points) * len(experiment.notebooks) - len(missing)
    line = f"{done} of {done + len(missing)} notebooks have results: {folder / 'summary.csv'}"
    return line + (f"; missing: {', '.join(missing)}" if missing else "")


def _told(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The measured values of a row of a notebook's table."""
    names = [f"{k} {row[k]}" for k in ("bits", "keep", "gamma", "method", "task") if row.get(k)]
    what = f"of {', '.join([row['rotation'], *names])}"
    if "task" not in row:  # of notebooks 03 to 05
        value = {"value": row["mean"], "sd": row["sd"], "n": row["n"]}
        yield {"kind": "perplexity", "quantity": f"perplexity {what}"} | value
        return
    for key, kind in (("correct", "accuracy"), ("logp", "log-probability")):
        if key in row:  # nats of unlike tasks have no mean
            value = {"value": row[key]["mean"], "sd": row[key]["sd"], "n": row["seeds"]}
            yield {"kind": kind, "quantity": f"{kind} {what}"} | value

"""Pictures: the files a figure has on disk, the numbers it is drawn from, and whether they agree."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dfrot_lab import plots
from dfrot_lab.plots.int4_speed import TIMED

__all__ = ["expected", "files_of", "keys", "stale", "timed"]


def expected(notebook: str, reference: Path) -> list[str]:
    """The figures of a notebook, those of the package and those of the reference, timed ones left out."""
    ours = [n for n, spec in plots.FIGURES.items() if spec.notebook == notebook]
    return [n for n in dict.fromkeys([*ours, *_drawn(reference / notebook)]) if n not in TIMED]


def timed(notebook: str, reference: Path) -> list[str]:
    """The figures of the reference that show what was timed, which nothing has to reproduce."""
    return [n for n in _drawn(reference / notebook) if n in TIMED]


def _drawn(home: Path) -> list[str]:
    return sorted({p.stem for p in files_of(home).values() if p.suffix in (".png", ".pdf")})


def files_of(home: Path) -> dict[str, Path]:
    """Name → figure, caption and table files, in a published folder or in a notebook's results."""
    found = [*home.glob("*"), *home.glob("figures/*")]
    suffixes = (".png", ".pdf", ".md")
    return {
        p.name: p
        for p in found
        if p.is_file() and (p.suffix in suffixes or p.name.startswith("tables_"))
        if not p.name.startswith(".")
    }


def keys(name: str, result: dict[str, Any]) -> set[str]:
    """The top-level keys of a result that a figure and its caption read; all, where it cannot be drawn."""
    watched = _Watched(result)
    try:
        plots.draw(name, watched)
        plots.caption(name, watched)
    except Exception:  # what was altered may fail anywhere
        return set(result)
    return watched.read


class _Watched(Mapping):
    """A result that notes which of its keys are read."""

    def __init__(self, result: dict[str, Any]) -> None:
        self._result, self.read = result, set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self._result[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._result)

    def __len__(self) -> int:
        return len(self._result)


def stale(home: Path, names: list[str]) -> list[str]:
    """The files of the figures `names` in `home` that are not what home/result.json gives when drawn now.

    The same versions of matplotlib and numpy are assumed. Raises what drawing raises.
    """
    with TemporaryDirectory() as temporary:
        drawn = Path(temporary) / home.name
        drawn.mkdir()
        for name in ("result.json", "speed.json"):
            if (home / name).is_file():
                shutil.copyfile(home / name, drawn / name)
        plots.draw_notebook(home.name, drawn)
        found = files_of(home)
        return sorted(
            name
            for name, p in files_of(drawn).items()
            if p.stem in names and name in found and p.read_bytes() != found[name].read_bytes()
        )

"""Entries: what is known of each notebook (result, provenance, figures, the executed notebook)."""

from __future__ import annotations

import re
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfrot_lab import files, results

__all__ = ["Entry", "Figure", "GalleryError", "Scrubber", "inside", "read", "same_setting"]

_ANSI = re.compile(r"(\x1b\[[\d;]*m)")
_PNG = b"\x89PNG\r\n\x1a\n"
# results that differ in these are of another setting, not to be shown as one run
_SETTING = ("model", "corpus", "seqlen", "dtype")


class GalleryError(ValueError):
    """An input that cannot be shown, or a place that must not be overwritten; one line: what to do."""


@dataclass(frozen=True)
class Figure:
    """NAME.png with its caption (Markdown), NAME.pdf where there is one; width and height in pixels."""

    name: str
    png: Path
    caption: str
    size: tuple[int, int]
    pdf: Path | None


@dataclass(frozen=True)
class Entry:
    """One notebook: its source, and what a results folder holds of it.

    notebook: nbformat's node, None where there is neither a source nor an executed one; executed:
    whether its outputs are a run's; failed: the notebook of a run that did not come through.
    """

    name: str
    notebook: Any
    executed: bool = False
    failed: Any = None
    origin: str = ""
    result: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    figures: tuple[Figure, ...] = field(default=())


def read(folders: Sequence[Path], root: Path, enough: bool = False) -> list[Entry]:
    """An entry for each notebook of root/notebooks and of `folders`, in the order of their names.

    The first of `folders` that has a result of a notebook counts, but later ones only fill in where
    they were made in the same setting (`same_setting`). enough: there is something to show besides. Raises
    GalleryError where no folder has a result, ResultError where one is damaged.
    """
    sources = {p.stem: p for p in sorted((root / "notebooks").glob("[0-9]*.ipynb"))}
    found: dict[str, tuple[Path, dict]] = {}
    failed: dict[str, Path] = {}
    for k, folder in enumerate(folders):
        for path in sorted(folder.glob("*/notebook.failed.ipynb")):
            failed.setdefault(path.parent.name, path)
        for path in sorted(folder.glob("*/result.json")):
            result = _result(path.parent)
            others = [r for f, r in found.values() if f.parent != folder]
            if path.parent.name not in found and (
                not k or all(same_setting(result, r) for r in others)
            ):
                found[path.parent.name] = (path.parent, result)
    if not found and not failed and not enough:
        places = " and ".join(str(f) for f in folders)
        raise GalleryError(f"{places} holds no NOTEBOOK/result.json: run `make figures` first")
    return [
        _entry(name, sources.get(name), *found.get(name, (None, None)), failed.get(name), root)
        for name in sorted({*sources, *found, *failed})
    ]


def same_setting(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results are of the same model, text, window length and precision."""
    a, b = one.get("parameters", {}), other.get("parameters", {})
    return all(a.get(name) == b.get(name) for name in _SETTING)


def _result(folder: Path) -> dict[str, Any]:
    result = results.load(folder)
    wanted = {"claim", "paper", "ours", "rule", "agrees"}
    claims = result.get("claims") if isinstance(result, dict) else None
    if not isinstance(claims, list) or not all(
        isinstance(c, dict) and wanted <= set(c) for c in claims
    ):
        raise results.ResultError(
            f"{folder / 'result.json'} is damaged (no list of claims with {', '.join(sorted(wanted))}): "
            "delete it and run its notebook again"
        )
    return result


def _entry(
    name: str,
    source: Path | None,
    folder: Path | None,
    result: dict | None,
    failed: Path | None,
    root: Path,
) -> Entry:
    executed = folder / "notebook.ipynb" if folder else None
    if executed is not None and not executed.is_file():
        executed = None
    path = executed or source
    notebook = _notebook(path) if path else None
    return Entry(
        name=name,
        notebook=notebook,
        executed=executed is not None,
        failed=_notebook(failed) if failed else None,
        origin=inside(folder.parent, root) if folder else "",
        result=result,
        provenance=_provenance(folder) if folder else None,
        figures=tuple(_figures(folder, notebook)) if folder else (),
    )


def inside(folder: Path, root: Path) -> str:
    """The folder as seen from the project; its own name where it lies elsewhere."""
    folder, root = folder.resolve(), root.resolve()
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else folder.name


def _provenance(folder: Path) -> dict[str, Any] | None:
    path = folder / "provenance.json"
    if not path.is_file():
        return None
    try:
        found = files.read_json(path)
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise GalleryError(
            f"{path} is damaged ({error}): delete it and run its notebook again"
        ) from error
    return found


def _notebook(path: Path) -> Any:
    import nbformat

    try:
        return nbformat.read(path, 4)
    except Exception as error:  # nbformat's NotJSONError, ValidationError, KeyError …
        reason = str(error).splitlines()[0][:80]
        raise GalleryError(
            f"{path} is no readable notebook ({reason}): wait for the run that writes it, or delete it"
        ) from error


def _figures(folder: Path, notebook: Any) -> Iterator[Figure]:
    """The figures of a folder in the order in which its notebook draws them."""
    home = folder / "figures" if (folder / "figures").is_dir() else folder
    cells = notebook.cells if notebook else []
    drawn = re.findall(r'plots\.draw\(\s*"(\w+)"', "\n".join(c.source for c in cells))
    order = {name: k for k, name in reversed(list(enumerate(drawn)))}
    pngs = [p for p in home.glob("*.png") if not p.name.startswith(".")]
    for png in sorted(pngs, key=lambda p: (order.get(p.stem, len(drawn)), p.stem)):
        caption, pdf = png.with_suffix(".md"), png.with_suffix(".pdf")
        if not caption.is_file():
            raise GalleryError(f"{png} has no caption {caption.name}: run `make redraw`")
        yield Figure(
            name=png.stem,
            png=png,
            caption=caption.read_text(encoding="utf-8").strip(),
            size=_size(png),
            pdf=pdf if pdf.is_file() else None,
        )


def _size(png: Path) -> tuple[int, int]:
    with png.open("rb") as f:
        head = f.read(24)
    if len(head) < 24 or not head.startswith(_PNG):
        raise GalleryError(f"{png} is no PNG image: run `make redraw`")
    return struct.unpack(">II", head[16:])


class Scrubber:
    """Takes the machine out of a text: folders of the project, the environment and the user."""

    # an absolute path of three names or more: only its last name says something elsewhere
    _POSIX = re.compile(r"(?<![\w./:<&])/(?:[\w.+@~-]+/){2,}([\w.+@~-]+)")
    _WINDOWS = re.compile(r"\b[A-Za-z]:\\+(?:[^\\\s\"']+\\+)+([^\\\s\"']+)")

    def __init__(self, places: Iterable[str | Path] = ()) -> None:
        known = {str(p).rstrip("/") for p in places}
        known |= {str(Path.home()), sys.prefix, sys.base_prefix, tempfile.gettempdir()}
        # longest first, so that what lies inside another is found whole
        self._known = sorted(filter(lambda p: len(p) > 1, known), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """`text` with known folders as … and other absolute paths as their last name."""
        # colours of a traceback stand right before its paths
        return "".join(
            part if part.startswith("\x1b") else self._plain(part) for part in _ANSI.split(text)
        )

    def _plain(self, text: str) -> str:
        for place in self._known:
            text = re.sub(rf"{re.escape(place)}(?![\w.+-])", "…", text)
        return self._WINDOWS.sub(r"…\1", self._POSIX.sub(r"…/\1", text))

    def value(self, value: Any) -> Any:
        """The same for every text inside lists and dicts."""
        if isinstance(value, dict):
            return {k: self.value(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.value(v) for v in value]
        return self(value) if isinstance(value, str) else value

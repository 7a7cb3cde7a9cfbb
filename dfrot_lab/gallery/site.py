"""The site: front page, a page a notebook and an experiment, the paper against ours; whole or not written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from dfrot_lab import tables
from dfrot_lab.gallery import grids, rendering
from dfrot_lab.gallery.entries import Entry, GalleryError, Scrubber, read
from dfrot_lab.gallery.findings import Verdict, findings, same_order, verdicts
from dfrot_lab.gallery.grids import Grid
from dfrot_lab.results import ResultError

__all__ = ["build"]

_GENERATOR = "dfrot-lab gallery"
_HERO = ("03_massive_tokens_fp16", "massive_tokens_fp16")
# a notebook's tables beside its claims, where its result has them
_TABLES = {
    "03_massive_tokens_fp16": [tables.perplexity_table],
    "04_dfrot": [tables.perplexity_table],
    "05_tables": [tables.paper_table, tables.intervals_table],
    "09_objectives": [tables.methods_table],
}


def build(folders: Sequence[str | Path], out: str | Path, root: str | Path) -> dict[str, list[str]]:
    """Write the site of what `folders` hold into `out`, which it replaces; returns origin → what it has.

    folders: results/PROFILE, figures, in this order of preference (`entries.read`); experiments are those
    that have a summary there; root: the checkout.
    The same inputs give the same bytes. Raises GalleryError, ResultError or FormulaError, and then leaves
    `out` as it was.
    """
    out, root, folders = Path(out), Path(root), [Path(f) for f in folders]
    entries = read(folders, root, enough=grids.any_in(folders))
    scrub = _scrubber(entries, folders, root)
    found = grids.read(folders, root, scrub)
    if out.exists() and not _replaceable(out):
        raise GalleryError(f"{out} is there and is no gallery: choose another --out, or remove it")
    with _aside(out) as folder:
        _write(folder, [_scrubbed(entry, scrub) for entry in entries], found, scrub)
    shown: dict[str, list[str]] = {}
    for entry in entries:
        shown.setdefault(entry.origin, []).append(entry.name)
    for grid in found:
        shown.setdefault(grid.origin, []).append(f"experiment {grid.name}")
    return shown


def _replaceable(out: Path) -> bool:
    if not out.is_dir():
        return False
    page = out / "index.html"
    return not any(out.iterdir()) or (
        page.is_file() and f'content="{_GENERATOR}"' in page.read_text(encoding="utf-8")
    )


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when all is written, and goes otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".partial-{out.name}-", dir=out.parent))
    try:
        new, old = aside / "new", aside / "old"
        new.mkdir()  # unlike mkdtemp's own, open to who may read the parent
        yield new
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(new, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _scrubber(entries: Sequence[Entry], folders: Sequence[str | Path], root: Path) -> Scrubber:
    places = {root.resolve(), Path.cwd(), *(Path(f).resolve() for f in folders)}
    for node in (n for e in entries for n in (e.notebook, e.failed) if n):
        run_from = node.metadata.get("papermill", {}).get("input_path")
        if run_from and Path(run_from).is_absolute():
            places.add(Path(run_from).parents[1])  # the checkout it was run in
    for entry in entries:  # a model or a text of the machine's own
        values = (entry.result or {}).get("parameters", {}).values()
        places |= {Path(v).parent for v in values if isinstance(v, str) and Path(v).is_absolute()}
    return Scrubber(places)


def _scrubbed(entry: Entry, scrub: Scrubber) -> Entry:
    return replace(
        entry,
        result=scrub.value(entry.result),
        provenance=scrub.value(entry.provenance),
        figures=tuple(replace(f, caption=scrub(f.caption)) for f in entry.figures),
    )


def _write(folder: Path, entries: Sequence[Entry], found: Sequence[Grid], scrub: Scrubber) -> None:
    pages = [_page(entry, folder, scrub) for entry in entries]
    for page, before, after in zip(pages, [None, *pages], [*pages[1:], None], strict=False):
        page |= {"before": before, "after": after}
    static = resources.files(__package__) / "static"
    for file in sorted(static.iterdir(), key=lambda f: f.name):
        (folder / file.name).write_bytes(file.read_bytes())
    render, common = _templates(), {"generator": _GENERATOR, "pages": pages}
    for page in pages:
        _save(folder / f"{page['name']}.html", render("page.html.j2", page=page, **common))
    for grid in found:
        _save(folder / grid.href, render("grid.html.j2", grid=grid, **common))
        home = folder / grid.href.removesuffix(".html")
        home.mkdir()
        _save(home / "summary.json", json.dumps(grid.summary, indent=1, sort_keys=True) + "\n")
        _save(home / "summary.csv", grid.csv)
    told = findings({p["name"]: p["entry"].result for p in pages if p["entry"].result})
    by_name = {p["name"]: p for p in pages}
    hero = next(
        (f for f in by_name.get(_HERO[0], {}).get("figures", []) if f["name"] == _HERO[1]), None
    )
    every = [v for p in pages for v in p["verdicts"]]
    _save(
        folder / "index.html",
        render(
            "index.html.j2",
            findings=told,
            by_name=by_name,
            hero=hero,
            hero_of=_HERO[0],
            said=[v for v in every if v.said],
            ours=[v for v in every if not v.said],
            settings=_settings(pages),
            grids=found,
            **common,
        ),
    )
    _save(folder / "tables.html", render("tables.html.j2", every=every, **common))


def _save(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _page(entry: Entry, folder: Path, scrub: Scrubber) -> dict[str, Any]:
    """All that a template asks of one notebook; its files are written on the way."""
    home = folder / entry.name
    home.mkdir()
    for figure in entry.figures:
        for file in filter(None, (figure.png, figure.pdf)):
            shutil.copyfile(file, home / file.name)
    for name, value in (("result", entry.result), ("provenance", entry.provenance)):
        if value is not None:
            _save(home / f"{name}.json", json.dumps(value, indent=1, sort_keys=True) + "\n")
    captions = {f.name: f.caption for f in entry.figures}
    bodies = {}
    for kind, node in (("notebook", entry.notebook), ("failed", entry.failed)):
        if node:
            prefix = entry.name if kind == "notebook" else f"{entry.name}/failed"
            bodies[kind], images = rendering.notebook(node, prefix, captions, scrub)
            for path, data in sorted(images.items()):
                (folder / path).parent.mkdir(exist_ok=True)
                (folder / path).write_bytes(data)
    if not any(home.iterdir()):
        home.rmdir()
    node = entry.notebook or entry.failed
    found = verdicts(entry.result) if entry.result else []
    return {
        "name": entry.name,
        "href": f"{entry.name}.html",
        "title": scrub(rendering.title(node, entry.name)),
        "claim": scrub(rendering.claim(node)),
        "entry": entry,
        "verdicts": found,
        "summary": _summary(found),
        "figures": [_figure(entry, f) for f in entry.figures],
        "tables": _paper_tables(entry),
        "body": bodies.get("notebook"),
        "failed": bodies.get("failed"),
        "error": scrub(_error(entry.failed)) if entry.failed else "",
        "provenance": entry.provenance,
    }


def _figure(entry: Entry, figure: Any) -> dict[str, Any]:
    caption = rendering.inline(figure.caption)
    head, bold, _ = caption.partition("</strong>")
    return {
        "name": figure.name,
        "src": f"{entry.name}/{figure.name}.png",
        "pdf": f"{entry.name}/{figure.name}.pdf" if figure.pdf else None,
        "caption": caption,
        "alt": rendering.plain(figure.caption),
        "short": rendering.plain(head) if bold else rendering.plain(figure.caption),
        "width": figure.size[0],
        "height": figure.size[1],
        "wide": figure.size[0] > 1000,  # drawn over the page's width, not a column's
    }


def _summary(found: Sequence[Verdict]) -> dict[str, int]:
    said = [v for v in found if v.said]
    ours = [v for v in found if not v.said]
    return {
        "said": len(said),
        "agree": sum(v.holds for v in said),
        "ours": len(ours),
        "hold": sum(v.holds for v in ours),
    }


def _paper_tables(entry: Entry) -> list[dict[str, Any]]:
    found = []
    for make in _TABLES.get(entry.name, []) if entry.result else []:
        try:
            table = make(entry.result)
        except (KeyError, StopIteration, TypeError) as error:
            raise ResultError(
                f"the result of {entry.name} lacks what its table takes ({type(error).__name__}: "
                f"{error}): run its notebook again"
            ) from error
        orders = {}
        if make is tables.paper_table:
            columns = [k for k, name in enumerate(table.header) if "paper" in name]
            orders = {k: same_order(table, k) for k in columns}
        found.append({"table": table, "orders": orders})
    return found


def _error(failed: Any) -> str:
    """'NameError: …', the first line of the error that stopped it; empty while it may be running."""
    for cell in failed.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return f"{output.ename}: {(output.evalue.splitlines() or [''])[0]}"
    return ""


def _settings(pages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Model, text, window length and folder of each kind of run shown, with the notebooks that have it."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for page in (p for p in pages if p["entry"].result):
        known = page["entry"].result.get("parameters", {})
        key = (known.get("model"), known.get("corpus"), known.get("seqlen"), page["entry"].origin)
        groups.setdefault(key, []).append(page)
    names = ("model", "corpus", "seqlen", "origin")
    return [dict(zip(names, key, strict=True)) | {"pages": p} for key, p in groups.items()]


def _templates():
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dfrot_lab.gallery"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["coded"] = rendering.coded
    environment.filters["words"] = _words
    return lambda name, **values: environment.get_template(name).render(**values)


def _words(value: Any) -> str:
    """A value of a provenance in words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return str(value)

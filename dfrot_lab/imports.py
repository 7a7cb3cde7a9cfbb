"""Imports: the project's own files that some code uses, read from its source, so that nothing is run.

A batch runs a job again when a file that it uses has changed. Followed is every `import` statement, those
inside functions too; a module that is loaded by its name alone (`import_module`) has to be named.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

__all__ = ["closure", "of_notebook"]

PACKAGES = {"dfrot_lab": "dfrot_lab", "dfrot_kernels": "kernels/dfrot_kernels"}


class ImportsError(ValueError):
    """A module that the project does not have; one line: which, what to do."""


@cache
def modules(root: Path) -> dict[str, Path]:
    """Every module and package of the checkout in `root` by its name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = [package, *file.relative_to(root / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def closure(root: Path, names: Iterable[str], without: Iterable[str] = ()) -> list[str]:
    """Files, relative to `root`, of the modules `names` and of all that these import in turn.

    without: modules, and packages with what is in them, that are left out with what only they import.
    Raises ImportsError for a name the project does not have.
    """
    known, todo = modules(root), list(names)
    for name in todo:
        if name not in known:
            raise ImportsError(
                f"module {name!r} is not in {root}: correct the name in the Snakefile"
            )
    without, found = tuple(without), set()
    while todo:
        name = todo.pop()
        if name not in found and not any(f"{name}.".startswith(f"{w}.") for w in without):
            found.add(name)
            todo += _imported_by(root, name)
    return sorted(known[name].relative_to(root).as_posix() for name in found)


def of_notebook(root: Path, notebook: Path) -> set[str]:
    """Names of the project's modules that the code cells of `notebook` import."""
    cells = json.loads(notebook.read_text())["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return set().union(*(_imported(root, ast.parse(text), "") for text in code))


@cache
def _imported_by(root: Path, name: str) -> frozenset[str]:
    file = modules(root)[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    return frozenset(_imported(root, ast.parse(file.read_text()), package))


def _imported(root: Path, tree: ast.AST, package: str) -> set[str]:
    """`from a import b` is the module a.b where there is one, else a."""
    known, found = modules(root), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found |= {
                f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names
            }
    return found & known.keys() - PACKAGES.keys()

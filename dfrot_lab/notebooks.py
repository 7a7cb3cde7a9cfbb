"""Notebooks: find one, check the parameters it is given, run it through papermill."""

from __future__ import annotations

import ast
import errno
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from dfrot_lab import model_folders, profiles, values
from dfrot_lab.files import atomic, read_json

__all__ = ["NotebookError", "find", "parameters", "run", "typed"]

# errors that say what, which value and what to do; their class adds nothing
_OURS = {
    "ActivationsError",
    "AssetError",
    "CorpusError",
    "GPTQError",
    "HessiansError",
    "KVError",
    "LabError",
}
_OURS |= {"ModelError", "PlotError", "ResultError", "RotationError", "TaskError"}
# a full disk or quota, as Python prints it
_FULL = tuple(f"[Errno {n}]" for n in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)))
FREE_SPACE = ": free space there, then give the same command again: what is finished is kept"
_START = 300  # seconds that a kernel may take to start, on a machine with a lot to do
_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}


class NotebookError(ValueError):
    """An unknown notebook or parameter, or a failed run; one line: what, which value, what to do."""


def find(name: str, root: Path) -> Path:
    """The notebook file for '03', '03_massive_tokens_fp16' or a path; NotebookError lists them."""
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name)
    folder = root / "notebooks"
    stem = Path(name).stem.zfill(2)
    found = [
        p for p in sorted(folder.glob("*.ipynb")) if p.stem == stem or p.stem.split("_")[0] == stem
    ]
    if not found:
        known = ", ".join(p.stem for p in sorted(folder.glob("[0-9]*.ipynb")))
        if not known:
            raise NotebookError(
                f"no notebooks in {folder}: run this from a checkout of the project"
            )
        raise NotebookError(f"notebook {name!r} is unknown: use one of {known}")
    return found[0]


def parameters(notebook: Path) -> dict[str, tuple[str, Any]]:
    """Name → (type, default) of the cell tagged 'parameters', read without running anything."""
    cells = [
        cell
        for cell in read_json(notebook)["cells"]
        if "parameters" in cell.get("metadata", {}).get("tags", [])
    ]
    if len(cells) != 1:
        raise NotebookError(
            f"{notebook} has {len(cells)} cells tagged 'parameters': it needs exactly one"
        )
    found = {}
    for node in ast.parse("".join(cells[0]["source"])).body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            raise NotebookError(f"{notebook}: each parameter must read `name: type = value`")
        kind = ast.unparse(node.annotation)
        # float("inf") is the one default that is no literal
        text = ast.unparse(node.value).replace("float('inf')", "1e999")
        found[node.target.id] = (kind, ast.literal_eval(text))
    return found


def typed(name: str, value: Any, kind: str) -> Any:
    """`value` (text from a command line, or YAML) as the parameter's type; NotebookError if it is not."""
    kind, _, inner = kind.partition("[")
    wanted = _TYPES.get(kind)
    if isinstance(value, str) and wanted is not str:
        try:
            value = float(value) if wanted is float else yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            raise NotebookError(f"parameter {name} = {value!r} is not of type {kind}") from None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if wanted is not None and (
        not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)
    ):
        like = ": write '[0, 1]'" if wanted is list else ""
        raise NotebookError(f"parameter {name} = {value!r} is not of type {kind}{like}")
    if wanted is list and inner:
        return [typed(f"{name}[{i}]", v, inner.rstrip("]")) for i, v in enumerate(value)]
    return value


def resolve(notebook: Path, profile: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The profile's values, overridden by `given`, each one that the notebook can have.

    Names, types and values are checked; NotebookError, ProfileError or ParameterError tells the first
    that is wrong.
    """
    known = parameters(notebook)
    for name in given:
        if name not in known:
            raise NotebookError(
                f"{notebook.stem} has no parameter {name!r}: use one of {', '.join(sorted(known))}"
            )
    own = {}
    if profile:
        every = _known(notebook.parent) | {notebook.stem: known}
        own = profiles.check(profile, {n: set(p) for n, p in every.items()})[notebook.stem]
    for name in ("model", "corpus", "corpora", "second"):  # the kernel starts elsewhere
        if name in given:
            given = given | {name: _absolute(given[name])}
    found = _checked(own | given, known, own if profile in profiles.names() else {})
    model_folders.check(found.get("model"))
    all_of_them = {name: default for name, (_, default) in known.items()} | found
    values.check_sites(*(all_of_them.get(name) for name in ("model", "site", "sites")))
    cayley = "cayley_length"
    values.check_length(cayley, *(all_of_them.get(name) for name in (cayley, "seqlen")))
    return found


def _absolute(value: Any) -> Any:
    """Where the file or folder of that name is, if there is one; a list likewise. Known names stay."""
    from dfrot_lab import corpora

    if isinstance(value, list):
        return [_absolute(v) for v in value]
    if not isinstance(value, str) or value in ("", "demo", *corpora.CORPORA):
        return value
    return str(Path(value).resolve()) if Path(value).exists() else value


def check_profile(profile: str, folder: Path) -> None:
    """ProfileError where `profile` names what no notebook in `folder` has, or a value that none can have.

    Sites are left to `resolve`: which there are depends on the model, and on what is run at all.
    """
    every = _known(folder)
    if not every:  # an installed package, without the notebooks
        profiles.load(profile)
        return
    for name, own in profiles.check(profile, {n: set(p) for n, p in every.items()}).items():
        try:
            _checked(own, every[name], own if profile in profiles.names() else {})
        except (NotebookError, values.ParameterError) as error:
            raise profiles.ProfileError(f"profile {profile!r}, {name}: {error}") from error


def _known(folder: Path) -> dict[str, dict[str, tuple[str, Any]]]:
    """Notebook → its parameters, of all in `folder`."""
    return {p.stem: parameters(p) for p in sorted(folder.glob("[0-9]*.ipynb"))}


def _checked(
    given: dict[str, Any], known: dict[str, tuple[str, Any]], sound: dict[str, Any]
) -> dict[str, Any]:
    """`given` as the parameters' types; NotebookError or ParameterError for what is none of their values.

    What a notebook has by default and what is in `sound`, a packaged profile, the tests have held against
    the parsers: it is not looked at again, which would take importing torch.
    """
    found = {name: typed(name, value, known[name][0]) for name, value in given.items()}
    for name, value in found.items():
        if name == "seeds" and not value:
            raise NotebookError("parameter seeds = [] is empty: give at least one, such as '[0]'")
        tried = [*_listed(known[name][1]), *_listed(sound.get(name))]
        values.check(**{name: [one for one in _listed(value) if one not in tried]})
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class _Lines:
    """A text stream that turns tqdm's carriage returns into lines with the notebook's name in front."""

    def __init__(self, label: str) -> None:
        self.label, self.rest = label, ""

    def write(self, text: str) -> None:
        text = text.replace("\r", "\n").replace("\x1b[A", "")  # tqdm moves up between nested bars
        *lines, self.rest = (self.rest + text).split("\n")
        for line in filter(str.strip, lines):
            print(f"[{self.label}] {line}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def run(notebook: Path, given: dict[str, Any], output: Path, root: Path) -> Path:
    """Execute `notebook` with the parameters `given`, kernel in `root`; returns the executed notebook's path.

    It grows cell by cell as NAME.failed.ipynb beside `output` and takes its place when it is through,
    without its progress bars; when a cell fails it stays, with its traceback, an earlier `output` is left
    alone, and NotebookError names the error and the file.
    """
    # jsonschema, of nbformat, would compile a grammar of web addresses: a second of each notebook's start
    unneeded = sys.modules.setdefault("rfc3987_syntax", None) is None
    import nbformat
    import papermill
    from jupyter_client.manager import KernelManager
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if unneeded:
        del sys.modules["rfc3987_syntax"]
    # ipykernel ≥ 7.3 warns about unencrypted TCP unless told to choose; older clients lack the trait
    if KernelManager.class_traits().get("transport_encryption") is not None:
        KernelManager.transport_encryption = "auto"
    os.environ.setdefault("TQDM_MININTERVAL", "10")
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.parent.name == notebook.stem:  # a folder of its own: what killed runs half wrote goes
        for left in output.parent.glob(".partial-*"):
            left.unlink(missing_ok=True)
    stream = _Lines(notebook.stem.split("_")[0])
    growing = output.with_name(f"{output.stem}.failed.ipynb")
    try:
        papermill.execute_notebook(
            str(notebook), str(growing), parameters=given, cwd=str(root), kernel_name="python3",
            progress_bar=False, stdout_file=stream, stderr_file=stream, start_timeout=_START,
            shutdown_kernel="immediate",  # all is written: Python's own end takes seconds after torch
        )  # fmt: skip
    except PapermillExecutionError as error:
        ours = error.ename in _OURS
        what = (error.evalue if ours else f"{error.ename}: {error.evalue}").splitlines()[0]
        what += FREE_SPACE if error.evalue.startswith(_FULL) else ""
        raise NotebookError(f"{notebook.stem} failed: {what} (traceback in {growing})") from error
    except DeadKernelError as error:
        raise NotebookError(
            f"{notebook.stem} failed: its kernel was killed, as happens where memory runs out (as far as it "
            f"came: {growing})"
        ) from error
    except OSError as error:  # papermill's own writing, which is not atomic
        if error.filename is None:
            growing.unlink(missing_ok=True)
            said = f"{os.strerror(error.errno)} while writing" if error.errno else str(error)
            raise OSError(error.errno, said, str(growing)) from error
        raise
    done = nbformat.read(growing, 4)
    for cell in done.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    with atomic(output) as partial:
        nbformat.write(done, partial)
    growing.unlink()
    return output

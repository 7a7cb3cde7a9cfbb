"""Files that are whole or not there: every artefact is written beside its place, then moved."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic", "project_root", "read_json", "readable", "sha256", "sweep", "write_json"]

_UMASK = threading.Lock()


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it becomes `path`, else it goes.

    Raises OSError (full disk, no permission) with the name of the file that was to be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(
            prefix=f".partial-{path.name}-", suffix=path.suffix, dir=path.parent
        )
    except OSError as error:
        raise _while_writing(path, error) from error
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        readable(partial)
        os.replace(partial, path)
    except OSError as error:
        if error.errno and (error.filename is None or Path(error.filename) == partial):
            raise _while_writing(path, error) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def readable(path: Path) -> None:
    """Give a file, or a folder and all in it, the permissions that new ones have.

    What mkstemp, mkdtemp and safetensors make is their owner's alone, which would lock out other users of a
    shared folder.
    """
    with _UMASK:  # it is of the process, and can only be read by setting it
        umask = os.umask(0)
        os.umask(umask)
    for each in (path, *path.rglob("*")) if path.is_dir() else (path,):
        each.chmod((0o777 if each.is_dir() else 0o666) & ~umask)


def _while_writing(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"{os.strerror(error.errno)} while writing", str(path))


def sweep(path: str | Path) -> None:
    """Remove what killed runs left of `path`; call it only while holding the lock of `path`."""
    for left in Path(path).parent.glob(f".partial-{Path(path).name}-*"):
        left.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as sorted, indented JSON, atomically; NaN and infinities are written as strings."""
    with atomic(path) as partial:
        text = json.dumps(_plain(value), indent=1, sort_keys=True, allow_nan=False)
        partial.write_text(text + "\n")
    return Path(path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def read_json(path: str | Path) -> Any:
    """The value written by `write_json`."""
    return json.loads(Path(path).read_text())


def sha256(path: str | Path) -> str:
    """Hex digest of a file, read in pieces."""
    with Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def project_root() -> Path:
    """The checkout, which holds the Snakefile, seen from here or from inside it; else the current one."""
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "Snakefile").is_file()), here)

"""Staging: a folder beside the place of a model, where it is made and checked before it is moved there."""

from __future__ import annotations

import glob
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["beside"]

_LOCK = ".lock"
_FRESH = 60.0  # seconds within which a new folder takes its lock


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A new folder for what becomes `target`, on the same disk; it goes afterwards, whatever happened.

    So do the folders that killed runs with the same target have left. One in use is told by its lock,
    which the system releases with the process.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".partial-{target.name}-"
    # mkdtemp adds eight characters: a longer rest belongs to another target
    for left in target.parent.glob(f"{glob.escape(prefix)}{'?' * 8}"):
        if left.is_dir():
            _sweep(left)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        with FileLock(work / _LOCK):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(left: Path) -> None:
    """Remove `left` unless it is in use, here or by another process."""
    lock = left / _LOCK
    try:
        if not lock.exists():
            if time.time() - left.stat().st_mtime > _FRESH:
                shutil.rmtree(left, ignore_errors=True)
            return
        with FileLock(lock, timeout=0):
            shutil.rmtree(left, ignore_errors=True)
    except (Timeout, OSError):  # in use, another user's, or removed by its owner just now
        return

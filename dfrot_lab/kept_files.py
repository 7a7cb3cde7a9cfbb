"""Kept files: their hashes, so that an altered or truncated artefact, measurement or result is noticed.

Artefacts, measurements and results are keyed by what they were made of, not by their bytes. Jobs record
the hashes of what they write, every few seconds; a batch compares before it starts, under its lock and
when no job runs: the bytes of the first 2 GB, smallest files first, which takes a second or two; of
larger ones size and time, and the bytes where these differ or where it is asked to.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dfrot_lab import files

try:
    import fcntl
except ImportError:  # Windows: jobs are recorded, and a batch, which needs it, does not start
    fcntl = None

__all__ = ["MANIFEST", "check", "no_jobs", "recording", "replacing", "root", "verify"]

MANIFEST = ".manifest.json"
BATCH_LOCK = ".batch.lock"
_JOBS_LOCK = ".jobs.lock"
_DERIVED = ("figures", "gallery")  # drawn or copied from what is kept, any time
_PERIOD = 5.0  # seconds between two looks at what a job has written
_HASHED = 2 * 10**9  # bytes that every batch compares


def root(folder: str | Path) -> Path:
    """The outermost folder around `folder`, or itself, that a batch has run in; else `folder`.

    Points of an experiment lie in their profile's folder, and share its manifest.
    """
    folder = Path(folder).absolute()
    inside = [p for p in (folder, *folder.parents) if (p / BATCH_LOCK).exists()]
    return inside[-1] if inside else folder


def verify(folder: Path, thorough: bool = False) -> list[str]:
    """Remove what is not as recorded, with the lists that name it; a line for each removed file.

    thorough: compare the bytes of every file, beyond the smallest that make up `_HASHED` bytes too. Files
    that nobody recorded (written just before a kill; each appears whole or not at all) are taken in if
    they are whole.
    """
    said, left = [], _HASHED
    _sweep(folder)
    with FileLock(folder / ".manifest.lock"):
        files.sweep(folder / MANIFEST)
        known, lost = _read(folder)
        if lost:
            said.append(f"{folder / MANIFEST} is damaged: every file is hashed anew")
        now: dict[str, dict[str, Any]] = {}
        # the smallest first: every result and measurement is among those that are hashed
        for name, path in sorted(_kept(folder), key=lambda kept: kept[1].lstat().st_size):
            if not path.exists():  # went with a file it names
                continue
            before, stat = known.get(name), path.stat()
            left -= stat.st_size
            if before and left < 0 and not thorough and _same(before, stat):
                now[name] = before
                continue
            entry = _entry(path, stat)
            if before and entry["sha256"] != before["sha256"]:
                what = f"its sha256 was {before['sha256'][:12]}…, and is {entry['sha256'][:12]}…"
            elif not before and (what := _damage(path)):
                pass
            else:
                now[name] = entry
                continue
            said.append(f"{path} is truncated or altered ({what}): removed, to be made again")
            for bad in (path, *_lists(path)):
                bad.unlink(missing_ok=True)
                now.pop(bad.relative_to(folder).as_posix(), None)
        now = {name: entry for name, entry in now.items() if (folder / name).exists()}
        if now != known:
            files.write_json(folder / MANIFEST, now)
    return said


def check(folder: Path) -> dict[str, str]:
    """Name → "recorded", "altered", "missing", "new" or "truncated", of every kept file by its bytes.

    Nothing is changed or removed. new, truncated: nobody recorded it, and by its own header it is
    whole or not. A manifest that cannot be read is "damaged", and then every file is one of these two.
    """
    known, lost = _read(folder)
    found = {MANIFEST: "damaged"} if lost else {}
    found |= dict.fromkeys(known, "missing")
    for name, path in _kept(folder):
        if not path.exists():
            continue
        if name not in known:
            found[name] = "truncated" if _damage(path) else "new"
        else:
            alike = files.sha256(path) == known[name]["sha256"]
            found[name] = "recorded" if alike else "altered"
    return dict(sorted(found.items()))


@contextmanager
def recording(folder: str | Path) -> Iterator[None]:
    """For a job that writes into `folder`: record what it has written, meanwhile and at its end.

    Only files newer than the job are taken: one that was altered before stays what it is, altered.
    Shares a lock with other jobs that `no_jobs` waits for, and that goes with the process.
    """
    top = root(folder)
    top.mkdir(parents=True, exist_ok=True)
    done = threading.Event()
    with (top / _JOBS_LOCK).open("a") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(top / _JOBS_LOCK)  # the file system's clock, which may not be this machine's
        since = int(os.fstat(lock.fileno()).st_mtime) * 10**9

        def watch() -> None:
            while not done.wait(_PERIOD):
                with suppress(OSError):  # told at the end
                    _record(top, since)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            with suppress(OSError):  # what has gone wrong is the one to tell
                _record(top, since)
            raise
        else:
            _record(top, since)
        finally:
            done.set()
            thread.join()


@contextmanager
def replacing(path: Path) -> Iterator[None]:
    """Record anew what of `path`, a file or a folder, was as recorded and is another file at the end.

    So a notebook run by hand, which is no job that records, may add to a measurement; a batch takes what
    changed without that for altered.
    """
    # of links what they lead to: points of a grid share a folder, whose manifest it is in
    top = next((p for p in reversed(path.resolve().parents) if (p / MANIFEST).exists()), None)
    before = {}
    if top:
        known, _ = _read(top)
        each = path.glob("*") if path.is_dir() else [path]
        names = {p.resolve().relative_to(top).as_posix(): p for p in each if p.is_file()}
        before = {n: p for n, p in names.items() if _same(known.get(n, {}), p.stat())}
    try:
        yield
    finally:
        changed = [n for n, p in before.items() if p.is_file() and not _same(known[n], p.stat())]
        if changed:
            with FileLock(top / ".manifest.lock"):
                known, _ = _read(top)
                new = {n: _entry(before[n], before[n].stat()) for n in changed}
                files.write_json(top / MANIFEST, known | new)


@contextmanager
def no_jobs(folder: Path, say: Callable[[str], Any]) -> Iterator[None]:
    """Wait until no job records into `folder`, and keep others from it; a killed batch may have left some."""
    with (folder / _JOBS_LOCK).open("a") as lock:
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not waiting:
                    say(f"jobs of an earlier batch or of `dfrot-lab run` use {folder}: waiting")
                waiting = True
                time.sleep(0.2)
        yield


def _sweep(folder: Path) -> None:
    """Remove what killed jobs have half written, unless a notebook run by hand holds a lock beside it."""
    for locks in folder.rglob(".locks"):
        with ExitStack() as held:  # until the last file is gone
            try:
                for lock in locks.glob("*.lock"):
                    held.enter_context(FileLock(lock, timeout=0))
            except (Timeout, OSError):  # in use, or another user's
                continue
            for name in ("artefacts", "measurements"):
                for left in (locks.parent / name).rglob(".partial-*"):
                    if left.is_file():
                        with suppress(OSError):
                            left.unlink()


def _record(folder: Path, since: int) -> None:
    """Take the hashes of files written at or after `since` (ns) that are not as recorded."""
    with FileLock(folder / ".manifest.lock"):
        known, _ = _read(folder)
        found = {}
        for name, path in _kept(folder):
            with suppress(FileNotFoundError):  # replaced or removed by another job
                stat = path.stat()
                if stat.st_mtime_ns >= since and not _same(known.get(name, {}), stat):
                    found[name] = _entry(path, stat)
        if found:
            files.write_json(folder / MANIFEST, known | found)


def _read(folder: Path) -> tuple[dict[str, dict[str, Any]], bool]:
    """(name → entry, whether a manifest was there and could not be read)."""
    try:
        return files.read_json(folder / MANIFEST), False
    except FileNotFoundError:
        return {}, False
    except ValueError:
        return {}, True


def _kept(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name relative to `folder`, path) of every artefact, measurement and result, links not followed."""
    for where, inside, names in os.walk(folder):
        inside[:] = sorted(n for n in inside if not n.startswith(".") and n not in _DERIVED)
        parts = Path(where).relative_to(folder).parts
        every = "artefacts" in parts or "measurements" in parts
        for name in sorted(names):
            wanted = every and name.endswith((".safetensors", ".json"))
            if (wanted or name == "result.json") and not name.startswith("."):
                path = Path(where, name)
                yield path.relative_to(folder).as_posix(), path


def _entry(path: Path, stat: os.stat_result) -> dict[str, Any]:
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": files.sha256(path)}


def _same(entry: dict[str, Any], stat: os.stat_result) -> bool:
    return (entry.get("bytes"), entry.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)


def _damage(path: Path) -> str | None:
    """Why a file that nobody recorded is not whole, by its own header; None if it is."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
            return None
        with path.open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(min(size, path.stat().st_size)))
        ends = [t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"]
        wanted = 8 + size + max(ends, default=0)
        if path.stat().st_size == wanted:
            return None
        return f"it has {path.stat().st_size} of {wanted} bytes"
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        return f"it cannot be read: {error}"


def _lists(path: Path) -> list[Path]:
    """The JSON files whose presence says that `path` is there: they go with it."""
    if path.parent.name == "hessians":
        return [path.parent / "hessians.json"]
    if path.parent.name == "rotations":
        return sorted(path.parent.parent.glob("rotations*.json"))
    return []

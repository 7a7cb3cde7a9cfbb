"""Rows of measurements on disk, where they came from, ratios and targets; no host names and no paths."""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "COLUMNS",
    "Log",
    "ResumeError",
    "group_of",
    "key",
    "plain",
    "provenance",
    "ratios",
    "same",
    "write_text",
]

DIMS = ("shape", "n", "k", "m", "batch", "heads", "kv_heads", "head_dim")
RESULTS = ("ms20", "ms50", "ms80", "gbs", "tflops", "bound", "share")
COLUMNS = (
    *("op", "who", "ours", *DIMS, "gate", "error", "reason", "out_bytes"),
    *("method", "copies", "calls"),
    *RESULTS,
)
SAME = ("sources", "device", "torch", "triton", "backend")  # what a resumed run must share
INTEGERS = (*DIMS[1:], "out_bytes", "copies", "calls")
NUMBERS = ("error", "ms20", "ms50", "ms80", "gbs", "tflops", "share")


class ResumeError(ValueError):
    """The rows in the folder were measured under other conditions; one line."""


def plain(text: object, most: int = 160) -> str:
    """First line of an error's text, without anything that looks like a path."""
    line = (str(text).strip().splitlines() or [""])[0]
    line = re.sub(r"""\s*[('"]*(?:[A-Za-z]:)?(?:~|\.{1,2})?[\\/][\w.\\/+@~-]+[)'"]*""", " …", line)
    return line[:most]


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sources() -> str:
    """Digest of the kernels and of the benchmarks: says which code it was where there is no git."""
    here = Path(__file__).parent
    files = [*here.glob("*.py"), *(here.parent / "kernels" / "dfrot_kernels").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def provenance(device: torch.device, backend: str) -> dict[str, Any]:
    """What the numbers depend on: commit (None without git), code, versions, device, threads, date."""
    changes = _run("git", "status", "--porcelain", "--untracked-files=no")
    found = {
        "commit": _run("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "sources": _sources(),
        "backend": backend,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "device": platform.machine(),
        "capability": None,
        "driver": None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "interpreted": backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "device": torch.cuda.get_device_name(device),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "driver": driver and driver.splitlines()[0],
        }
    return found


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def same(before: dict[str, Any], now: dict[str, Any], names: Iterable[str]) -> None:
    """ResumeError naming the first of `names` whose value is another one than before."""
    for name in names:
        if before.get(name) != now[name]:
            raise ResumeError(
                f"resume: {name} was {before.get(name)} and is {now[name]} now; "
                "measurements are not mixed, use another --out"
            )


def group_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What is compared with each other: the op and its sizes."""
    return tuple(str(row.get(c) if row.get(c) is not None else "") for c in ("op", *DIMS))


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What a resumed run does not measure again."""
    return (*group_of(row), row["who"])


class Log:
    """`NAME.csv`, to which every row is appended as it comes, and `NAME.json`, written by `close`.

    resume: take over the rows that are there, without a torn last line and without those of ours that
    were wrong or failed; ResumeError where the folder was measured on another device or with another
    torch, triton, backend or code.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        origin: dict[str, Any],
        session: dict,
        *,
        resume: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.table, self.document = folder / f"{name}.csv", folder / f"{name}.json"
        self.rows: list[dict[str, Any]] = []
        self.origin, self.sessions = origin, []
        if resume and self.document.exists():
            before = json.loads(self.document.read_text(encoding="utf-8"))
            same(before["provenance"], origin, SAME)
            self.origin, self.sessions = before["provenance"], before["sessions"]
            self.rows = [r for r in _read(self.table) if r["gate"] == "ok" or not r["ours"]]
        self.sessions.append(session)
        self._start()
        self.close({})

    def _start(self) -> None:
        new = self.table.with_name(self.table.name + ".new")
        with new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(new, self.table)

    @property
    def done(self) -> set[tuple[str, ...]]:
        """Keys of the rows there are."""
        return {key(row) for row in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        """Append one row to the table."""
        self.rows.append(row)
        with self.table.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)

    def close(self, more: dict[str, Any]) -> None:
        """Write the document: provenance, sessions, rows, ratios and `more`."""
        document = {
            "format": 1,
            "provenance": self.origin,
            "sessions": self.sessions,
            **more,
            "ratios": ratios(self.rows),
            "rows": self.rows,
        }
        write_text(
            self.document,
            json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        )


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows of the table; a line cut short by an interruption is dropped."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [_typed(row) for row in csv.DictReader(whole.splitlines()) if None not in row.values()]


def _typed(row: dict[str, str]) -> dict[str, Any]:
    typed: dict[str, Any] = {}
    for name, text in row.items():
        if name in INTEGERS:
            typed[name] = int(text) if text else None
        elif name in NUMBERS:
            typed[name] = float(text) if text else None
        elif name == "ours":
            typed[name] = text == "True"
        else:
            typed[name] = text
    return typed


def ratios(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time of each peer over the time of each of ours, on the same op and sizes: above 1 ours is faster."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["gate"] == "ok" and row["ms50"]:
            groups.setdefault(group_of(row), []).append(row)
    return [
        {"op": mine["op"]}
        | {name: mine[name] for name in DIMS if mine.get(name) is not None}
        | {"ours": mine["who"], "against": other["who"], "ratio": other["ms50"] / mine["ms50"]}
        for group in groups.values()
        for mine in group
        if mine["ours"]
        for other in group
        if not other["ours"]
    ]

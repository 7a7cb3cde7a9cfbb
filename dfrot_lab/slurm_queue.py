"""SLURM's queue: what a killed batch has left in it.

Jobs that run hold a lock that the next batch waits for; those that are pending, or have only just
started, hold none, and the next batch would submit their twins. The jobs of all batches in one folder
have the same beginning of their names, so that they are found again.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["SlurmError", "prefix", "settle"]

_PERIOD = 5.0  # seconds between two looks at the queue


class SlurmError(RuntimeError):
    """A command of SLURM that is missing or fails; one line: which, what it says, what to do."""


def prefix(folder: Path) -> str:
    """What the names of the jobs of a batch in `folder` begin with."""
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:10]
    return f"dfrot-{re.sub(r'[^A-Za-z0-9]+', '-', folder.name)[:30]}-{digest}"


def settle(beginning: str, say: Callable[[str], Any]) -> None:
    """Cancel the pending jobs whose name has this beginning, and return when none of them is left.

    Call it only under the batch lock of their folder. Raises SlurmError where the queue cannot be read.
    """
    said: set[str] = set()
    while left := _jobs(beginning):
        pending = [number for number, state in left.items() if state == "PENDING"]
        if pending:
            say(f"cancelling jobs that an earlier batch left in the queue: {', '.join(pending)}")
            _call("scancel", "--state=PENDING", *pending)  # not one that has started meanwhile
        if left.keys() - said - set(pending):
            say(
                f"jobs of an earlier batch still run: {', '.join(left)}: waiting (`scancel` ends them)"
            )
            said |= left.keys()
        time.sleep(_PERIOD)


def _jobs(beginning: str) -> dict[str, str]:
    """Number → state of this user's jobs whose name has this beginning; those that are over are left out."""
    lines = _call("squeue", "--me", "--noheader", "--format=%i|%T|%j").splitlines()
    rows = [line.split("|", 2) for line in lines]
    return {number: state for number, state, name in rows if name.startswith(beginning)}


def _call(*command: str) -> str:
    """What a command of SLURM prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not on the PATH: start the batch where SLURM's commands are"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise SlurmError(f"{command[0]} failed: {said}: start the batch again when SLURM answers")
    return done.stdout

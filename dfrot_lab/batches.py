"""Batches: one Snakemake run a folder at a time, that leaves nothing to unlock and no orphan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from dfrot_lab import profiles

__all__ = ["BatchError", "run"]


class BatchError(RuntimeError):
    """A batch that cannot start; one line: what, where, what to do."""


def run(profile: str, root: Path, cores: str, memory: int) -> int:
    """Run the Snakefile in `root` for `profile`; returns Snakemake's exit status.

    The lock is the operating system's and goes with its holder, so Snakemake's own, which a killed
    run leaves behind, is not used. An interrupt is passed to the whole process group: killing only
    Snakemake would leave notebooks running. Raises BatchError if another batch holds the folder.
    """
    profiles.load(profile)
    if not (root / "Snakefile").is_file():
        raise BatchError(f"no Snakefile in {root}: run this from a checkout of the project")
    folder = root / "results" / Path(profile).stem
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", "Snakefile", "--cores", cores,
        "--resources", f"mem_mb={memory}", "--config", f"profile={profile}",
        "--nolock", "--rerun-incomplete", "--retries", "1", "--keep-going", "--quiet", "rules", "host",
    ]  # fmt: skip
    # jobs call `dfrot-lab`: the one beside this interpreter, whatever is first on the PATH
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    try:
        with FileLock(folder / ".batch.lock", timeout=0):
            child = subprocess.Popen(command, cwd=root, env=environment, start_new_session=True)
            previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                return child.wait()
            except KeyboardInterrupt:
                os.killpg(child.pid, signal.SIGTERM)
                child.wait()
                return 130
            finally:
                signal.signal(signal.SIGTERM, previous)
    except Timeout:
        raise BatchError(f"another batch is running in {folder}: wait for it, or stop it") from None

"""Batches: one Snakemake run a folder at a time, that leaves nothing to unlock and no orphan."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from filecmp import cmp
from importlib.util import find_spec
from pathlib import Path

from dfrot_lab import notebooks as sources

__all__ = ["BatchError", "run"]


_STOPPING = (signal.SIGTERM, signal.SIGHUP)
_CODE = (".py", ".yml", ".json", ".mplstyle")


class BatchError(RuntimeError):
    """A batch that cannot start; one line: what, where, what to do."""


def run(profile: str, root: Path, cores: str, memory: int, notebooks: Sequence[str] = ()) -> int:
    """Run the Snakefile in `root` for `profile`; returns Snakemake's exit status.

    notebooks: by their full names; none for the first four.

    The lock is the operating system's and goes with its last holder, so Snakemake's own, which a
    killed run leaves behind, is not used; Snakemake inherits it, so that it holds while one killed
    alone leaves the other running. An interrupt, a hang-up or a termination is passed to the whole
    process group. Raises BatchError if another batch holds the folder,
    or if what is installed is not the code of the checkout.
    """
    if not (root / "Snakefile").is_file():
        raise BatchError(f"no Snakefile in {root}: run this from a checkout of the project")
    _check_code(root)
    sources.check_profile(profile, root / "notebooks")
    folder = root / "results" / Path(profile).stem
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", "Snakefile", "--cores", cores,
        "--resources", f"mem_mb={memory}",
        "--config", f"profile={profile}", f"notebooks={' '.join(notebooks)}",
        "--nolock", "--rerun-incomplete", "--retries", "1", "--keep-going", "--quiet", "rules", "host",
    ]  # fmt: skip
    # jobs call `dfrot-lab`: the one beside this interpreter, whatever is first on the PATH
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # glibc gives large blocks back at once and faults them in again, page by page: 5 % of the time
        "MALLOC_MMAP_THRESHOLD_": str(2**32),
        "MALLOC_TRIM_THRESHOLD_": str(2**33),
    }
    with (folder / ".batch.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            group = lock.read().strip() or "PID"
            raise BatchError(
                f"another batch is running in {folder}: wait for it, or stop it with `kill -- -{group}`"
            ) from None
        child = subprocess.Popen(
            command, cwd=root, env=environment, start_new_session=True, pass_fds=[lock.fileno()]
        )
        lock.truncate(0)
        lock.write(str(child.pid))  # its own group, which outlives this process if that is killed
        lock.flush()
        previous = {s: signal.signal(s, signal.default_int_handler) for s in _STOPPING}
        try:
            return child.wait()
        except KeyboardInterrupt:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
            return 130
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)


def _check_code(root: Path) -> None:
    """BatchError where the installed packages are not the checkout's in `root`, byte by byte.

    Jobs run what is installed, notebooks find the checkout's first, and the Snakefile watches the checkout:
    a wheel that is older would give results of two codes.
    """
    for package, folder in (("dfrot_lab", "dfrot_lab"), ("dfrot_kernels", "kernels/dfrot_kernels")):
        installed = Path(find_spec(package).origin).parent
        if installed == (root / folder).resolve():
            continue
        for file in sorted((root / folder).rglob("*")):
            there = installed / file.relative_to(root / folder)
            if file.suffix not in _CODE or (there.is_file() and cmp(file, there, shallow=False)):
                continue
            raise BatchError(
                f"{file.relative_to(root)} is not what is installed in {installed}: install this checkout "
                "again, with `pip install .` or `pip install -e .`"
            )

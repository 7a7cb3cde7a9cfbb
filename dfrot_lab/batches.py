"""Batches: one Snakemake run a folder at a time, that leaves nothing to unlock and no orphan."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from filecmp import cmp
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import yaml

from dfrot_lab import experiments, kept_files, slurm_queue
from dfrot_lab import notebooks as sources

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["BatchError", "run"]

_STOPPING = (signal.SIGTERM, signal.SIGHUP)
_CODE = (".py", ".yml", ".json", ".mplstyle")
FIGURES = 4  # the notebooks that are run where none is named, as in the Snakefile
_LISTENED = 2.0  # seconds between two looks at whether the output is read
_GRACE = 5.0  # seconds in which the processes of a killed batch are gone


class BatchError(RuntimeError):
    """A batch that cannot start; one line: what, where, what to do."""


def run(
    profile: str,
    root: Path,
    cores: str,
    memory: int,
    notebooks: Sequence[str] = (),
    *,
    folder: Path | None = None,
    gpus: int = 1,
    experiment: str | None = None,
    executor: str = "local",
    check: bool = False,
) -> int:
    """Run the Snakefile in `root` for `profile`; returns Snakemake's exit status.

    notebooks: by their full names; none for the first four, or for all of the experiment's. folder: where
    results go, relative to `root`; None: results/PROFILE. cores, memory (MiB) and gpus limit what all local
    jobs together use. experiment: a name in experiments.yml, whose points are run instead. executor: a
    folder in cluster/, or the path of one, with a Snakemake profile (config.yaml). check: hash kept files
    beyond 2 GB too, see `kept_files.verify`.

    The lock is the operating system's and goes with its last holder, so Snakemake's own, which a
    killed run leaves behind, is not used. Snakemake inherits it and dies with this process; jobs that
    outlive both are waited for by the next batch, and taken out of SLURM's queue if they have not begun.
    Raises BatchError if another batch holds the folder, or if what is installed is not the code of the
    checkout; and before anything starts what `notebooks.resolve` raises, for every notebook and every point.
    """
    if not fcntl:
        raise BatchError("a batch needs the locks of a Unix system: use `dfrot-lab run`, or WSL")
    if not (root / "Snakefile").is_file():
        raise BatchError(f"no Snakefile in {root}: run this from a checkout of the project")
    _check_code(root)
    sources.check_profile(profile, root / "notebooks")
    where = _executor(executor, root)
    kind = _kind(where)
    local = kind == "local"
    home = Path(folder or Path("results") / Path(profile).stem)
    home = home.relative_to(root) if home.is_relative_to(root) else home
    grid = experiments.find(experiment, profile, root, home) if experiment else None
    if grid:
        experiments.check(grid)
    else:
        every = sorted(p.stem for p in (root / "notebooks").glob("[0-9]*.ipynb"))
        for name in notebooks or every[:FIGURES]:
            sources.resolve(root / "notebooks" / f"{name}.ipynb", profile, {})
    # Snakemake runs in `root`
    own = Path(profile).suffix in (".yml", ".yaml") and Path(profile).is_file()
    named = os.path.relpath(Path(profile).resolve(), root) if own else profile
    folder = root / home
    folder.mkdir(parents=True, exist_ok=True)
    limits = ["--cores", cores, "--resources", f"mem_mb={memory}", f"gpu={gpus}", "hessians=1"]
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", "Snakefile", "--workflow-profile", str(where),
        *(limits if local else ["--resources", "hessians=1"]),
        "--scheduler", "greedy",  # the other one starts a solver for each choice among a handful of jobs
        "--nolock", "--rerun-incomplete", "--retries", "1", "--keep-going", "--quiet", "host",
        # jobs here say themselves what went wrong; of others only Snakemake knows, and where their logs are
        *(["rules"] if local else []),
        *(["--slurm-jobname-prefix", slurm_queue.prefix(folder)] if kind == "slurm" else []),
        "--config", f"profile={named}", f"notebooks={' '.join(notebooks)}",
        f"experiment={experiment or ''}",
        # Snakemake reads a value that looks like a number as one: `2024` is none with a folder in front
        f"folder={home if home.is_absolute() else f'./{home}'}",
    ]  # fmt: skip
    # jobs call `dfrot-lab`: the one beside this interpreter, whatever is first on the PATH
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # glibc gives large blocks back at once and faults them in again, page by page: 5 % of the time
        "MALLOC_MMAP_THRESHOLD_": str(2**32),
        "MALLOC_TRIM_THRESHOLD_": str(2**33),
    }
    with _locked(folder) as lock:
        if kind == "slurm":
            slurm_queue.settle(slurm_queue.prefix(folder), _say)
        with kept_files.no_jobs(folder, _say):
            damaged = kept_files.verify(folder, check)
        for line in damaged:
            _say(line)
        if grid:
            experiments.prepare(grid)
        status = _supervised([*command, f"damaged={len(damaged)}"], root, environment, lock)
        if grid:
            _say(experiments.summarize(grid))
    return status


def _say(line: str) -> None:
    with suppress(BrokenPipeError):  # the status still says how it ended
        print(line, file=sys.stderr, flush=True)


def _executor(name: str, root: Path) -> Path:
    """The folder with the Snakemake profile of an executor."""
    own = root / "cluster"
    found = own / name if (own / name).is_dir() else Path(name).absolute()
    if not (found / "config.yaml").is_file():
        if name == "kubernetes":
            raise BatchError(
                "executor 'kubernetes' would take jobs apart that share a folder: run the whole batch in one "
                "pod, with cluster/kubernetes/job.yaml (docs/cluster.md)"
            )
        known = ", ".join(sorted(p.parent.name for p in own.glob("*/config.yaml")))
        raise BatchError(
            f"executor {name!r} is unknown: use {known}, or a folder with a Snakemake config.yaml"
        )
    return found


def _kind(executor: Path) -> str:
    """Snakemake's executor, such as "local" and "slurm"; BatchError where its jobs could not be started."""
    settings = yaml.safe_load((executor / "config.yaml").read_text()) or {}
    kind = settings.get("executor", "local")
    if kind == "local":
        return kind
    if find_spec(f"snakemake_executor_plugin_{kind.replace('-', '_')}") is None:
        raise BatchError(
            f"executor {kind!r} is not installed: pip install snakemake-executor-plugin-{kind}"
        )
    if " " in sys.executable:  # Snakemake does not quote it
        raise BatchError(
            f"no job can be submitted with {sys.executable}, which has a space in its path: make the "
            "environment in a folder without one"
        )
    return kind


@contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    """The batch lock of `folder`, in which the process that holds it is named."""
    with (folder / kept_files.BATCH_LOCK).open("a+") as lock:
        given_up = time.monotonic() + _GRACE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() < given_up:
                    time.sleep(0.1)
                    continue
                lock.seek(0)
                process = lock.read().strip() or "PID"
                raise BatchError(
                    f"another batch is running in {folder}: wait for it, or stop it with "
                    f"`kill {process}`"
                ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock


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


def _supervised(command: list[str], root: Path, environment: dict[str, str], lock: IO[str]) -> int:
    """Exit status of `command`; 130 after an interrupt, a hang-up or a termination, passed to all below.

    It stays in this process group, so that a signal to the group reaches everything. Where whoever reads
    the output is gone, all is stopped too: Snakemake, which cannot say that a job is over, would wait for
    ever and hold the lock.
    """
    child = subprocess.Popen(
        command, cwd=root, env=environment, pass_fds=[lock.fileno()],
        preexec_fn=_die_with_parent,  # noqa: PLW1509  (no threads here)
    )  # fmt: skip
    previous = {s: signal.signal(s, signal.default_int_handler) for s in _STOPPING}
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=_LISTENED)
            if _unheard():
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        _stop(child.pid)
        child.wait()
        return 130
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def _unheard() -> bool:
    """Whether standard output or standard error is a pipe that nobody reads any more (a terminal may go)."""
    poll = select.poll()
    for stream in (1, 2):
        with suppress(OSError):  # closed
            if stat.S_ISFIFO(os.fstat(stream).st_mode):
                poll.register(stream, 0)  # errors are told unasked
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _die_with_parent() -> None:
    """Linux: this process is killed when its parent is. Elsewhere it holds the lock until it is through."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _stop(pid: int) -> None:
    """SIGTERM to a process and all below it, kernels in sessions of their own too, and later SIGKILL.

    Snakemake waits for jobs after a SIGTERM, and at times for ever; nothing here minds being killed.
    """
    import psutil

    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        every = [*top.children(recursive=True), top]
        for process in every:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(every, timeout=_GRACE)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

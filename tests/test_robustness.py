"""A batch under kill -9, a full disk, a failing notebook, a damaged file, and a second batch beside it.

Whatever happens, the same command again finishes with the bytes of an unbroken run, and redoes nothing
that was through. With $DFROT_KILLS, the name of a file, the counts of the kills are also written there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dfrot_lab import files, kept_files, notebooks, verify

ROOT = Path(__file__).parents[1]
NAMES = ["03_massive_tokens_fp16", "05_tables"]  # between them every rule runs
DEMO = ["01_rotation_invariance", "02_ro_vs_rh_error", "03_massive_tokens_fp16", "04_dfrot"]
KILLS = 20
SETTLED = 5.0  # seconds after which what a job has written is through
GONE = 10.0  # seconds in which the processes of a killed batch are gone, kernels too

pytestmark = pytest.mark.slow


class Checkout:
    """A copy of the project, with results of its own."""

    def __init__(self, folder: Path, profile: str = "smoke", names: list[str] = NAMES) -> None:
        self.root, self.profile, self.names = folder, profile, names
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("dfrot_lab", "kernels", "notebooks", "cluster"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        for name in ("Snakefile", "experiments.yml"):
            shutil.copy(ROOT / name, folder)

    @property
    def home(self) -> Path:
        return self.root / "results" / self.profile

    def start(self, *arguments: str) -> subprocess.Popen:
        """A batch in a process group of its own."""
        paths = os.pathsep.join([str(self.root), str(self.root / "kernels")])
        only = [word for name in self.names for word in ("--only", name)]
        command = [sys.executable, "-m", "dfrot_lab.cli", "batch", "--profile", self.profile]
        return subprocess.Popen(
            [*command, *only, *arguments],
            cwd=self.root, env=os.environ | {"PYTHONPATH": paths}, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str) -> tuple[int, str]:
        """(exit status, output) of a batch that is let through."""
        child = self.start(*arguments)
        output = child.communicate()[0]
        return child.returncode, output

    def killed_after(self, seconds: float) -> dict[str, tuple] | None:
        """What was through when the batch's process group was killed; None if the batch was faster.

        Kernels are in sessions of their own: they have to see for themselves that they are orphans.
        """
        child = self.start()
        try:
            output = child.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            every = psutil.Process(child.pid).children(recursive=True)
            through = self.through(time.time() - SETTLED)
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            assert not alive(every, GONE)
            return through
        assert child.returncode == 0, output[-3000:]
        return None

    def results(self) -> dict[str, bytes]:
        found = {n: self.home / n / "result.json" for n in self.names}
        return {n: p.read_bytes() for n, p in found.items() if p.exists()}

    def through(self, since: float | None = None) -> dict[str, tuple]:
        """File → (time, values in it) of results, artefacts and measurements written before `since`.

        Layers of Hessians count once their list is there, which is what says that they are all.
        """
        found = {}
        for name, path in kept_files._kept(self.home):
            stat, parts = path.stat(), path.relative_to(self.home).parts
            last = path.with_name("hessians.json") if path.parent.name == "hessians" else path
            if last.exists() and (since is None or last.stat().st_mtime < since):
                values = len(files.read_json(path)["nll"]) if "measurements" in parts else 0
                found[name] = (stat.st_mtime_ns, values)
        return found

    def redone(self, through: dict[str, tuple]) -> list[str]:
        """What of `through` was written again; a measurement to which windows were added was not."""
        now = self.through()
        return [
            name
            for name, (when, values) in through.items()
            if name not in now or (now[name][0] != when and now[name][1] <= values)
        ]

    def litter(self) -> list[Path]:
        """What was half written and is still there."""
        return list(self.root.rglob(".partial-*"))

    def clear(self) -> None:
        for name in ("results", ".snakemake"):
            shutil.rmtree(self.root / name, ignore_errors=True)


def alive(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that are still there after so many seconds; one that nobody has waited for is not."""
    until = time.monotonic() + seconds
    while left := [p for p in processes if running(p)]:
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    return left


def running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(checkout, the results of an unbroken run, its seconds)."""
    checkout = Checkout(tmp_path_factory.mktemp("robust") / "a checkout")
    start = time.monotonic()
    status, output = checkout.run()
    assert status == 0, output[-3000:]
    assert set(checkout.results()) == set(NAMES)
    return checkout, checkout.results(), time.monotonic() - start


@pytest.fixture
def checkout(unbroken):
    """The checkout, without results."""
    unbroken[0].clear()
    return unbroken[0]


@pytest.fixture
def finished(unbroken):
    """The checkout with all its results, whatever a test before has done to it."""
    status, output = unbroken[0].run()
    assert status == 0, output[-3000:]
    return unbroken[0]


def test_killed_at_twenty_random_moments_it_finishes_to_the_same_bytes(unbroken, capsys):
    checkout, expected, seconds = unbroken
    moments, killed, through, redone = random.Random(0), [], 0, []
    started = time.monotonic()
    while len(killed) < KILLS:
        checkout.clear()
        moment = moments.uniform(0.05, 0.9) * seconds
        old = checkout.killed_after(moment)
        if old is None:  # through before its moment came
            continue
        killed.append(round(moment, 1))
        status, output = checkout.run()
        assert status == 0, output[-3000:]
        assert checkout.results() == expected
        assert not checkout.litter()
        through += len(old)
        redone += checkout.redone(old)
    told = {
        "kills": len(killed), "finishes": len(killed), "through": through, "redone": len(redone),
        "moments": killed, "unbroken_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - started), "notebooks": NAMES, "cores": os.cpu_count(),
    }  # fmt: skip
    if "DFROT_KILLS" in os.environ:
        files.write_json(os.environ["DFROT_KILLS"], told)
    with capsys.disabled():
        print("\n" + ", ".join(f"{k} {v}" for k, v in told.items()))
    assert through and not redone


@pytest.mark.demo
def test_the_demo_killed_once_finishes_to_the_committed_bytes(tmp_path, capsys):
    """Committed results where machine and versions are theirs, else those of an unbroken run."""
    checkout = Checkout(tmp_path / "killed", "demo", DEMO)
    moment = random.Random(time.time_ns()).uniform(30, 600)
    started = time.monotonic()
    old = checkout.killed_after(moment)
    assert old is not None, f"the demo took less than {moment:.0f} s"
    status, output = checkout.run()
    assert status == 0, output[-3000:]
    assert not checkout.redone(old) and not checkout.litter()
    seconds, against = time.monotonic() - started, "committed"
    expected = {n: (ROOT / "figures" / n / "result.json").read_bytes() for n in DEMO}
    homes = [(checkout.home / n, ROOT / "figures" / n) for n in DEMO]
    if any(verify._elsewhere(*map(verify._provenance, pair)) for pair in homes):
        whole, against = Checkout(tmp_path / "unbroken", "demo", DEMO), "unbroken"
        status, output = whole.run()
        assert status == 0, output[-3000:]
        expected = whole.results()
    with capsys.disabled():
        print(
            f"\nthe demo killed after {moment:.0f} s with {len(old)} files through, finished after "
            f"{seconds:.0f} s in all, held against the {against} results"
        )
    assert checkout.results() == expected


def test_the_first_process_killed_alone_takes_the_batch_with_it(checkout, unbroken):
    child = checkout.start()
    time.sleep(0.3 * unbroken[2])
    below = psutil.Process(child.pid).children()
    assert any("snakemake" in process.cmdline() for process in below)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not alive(below, GONE)
    status, output = checkout.run()
    assert status == 0, output[-3000:]
    assert checkout.results() == unbroken[1]


def test_a_termination_leaves_no_process(checkout, unbroken):
    child = checkout.start()
    time.sleep(0.5 * unbroken[2])
    every = psutil.Process(child.pid).children(recursive=True)
    assert every
    child.terminate()
    child.communicate(timeout=60)
    assert child.returncode == 130
    assert not alive(every, GONE)


def test_a_batch_whose_output_nobody_reads_any_more_stops(checkout, unbroken):
    """As in `make batch | head`; Snakemake would wait for ever for jobs that cannot be told of."""
    child = checkout.start()
    time.sleep(0.5 * unbroken[2])
    every = psutil.Process(child.pid).children(recursive=True)
    child.stdout.close()
    assert child.wait(timeout=60) == 130
    assert every and not alive(every, GONE)
    status, output = checkout.run()
    assert status == 0, output[-3000:]
    assert checkout.results() == unbroken[1]


@pytest.fixture
def small_disk(tmp_path):
    """(a checkout on a disk that is full but for `room` KiB, a function that makes it larger)."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int, *options: str) -> None:
        options = ",".join([f"size={size}", *options])
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)

    mount(10**9)
    try:
        checkout = Checkout(disk / "a checkout")
        yield checkout, lambda room: mount(shutil.disk_usage(disk).used + 1024 * room, "remount")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="a small disk is mounted: needs root"
)
@pytest.mark.parametrize("room", [200, 700])
def test_on_a_full_disk_it_says_so_and_goes_on_when_there_is_space(small_disk, unbroken, room):
    """Results, logs and what Snakemake notes are all on that disk."""
    checkout, leave = small_disk
    leave(room)
    status, output = checkout.run()
    assert status != 0
    assert "No space left on device" in output
    assert notebooks.FREE_SPACE.strip(": ") in output
    for _, path in kept_files._kept(checkout.home):
        assert kept_files._damage(path) is None, path
    assert checkout.results().items() <= unbroken[1].items()
    time.sleep(SETTLED)
    old = checkout.through()
    leave(200_000)
    status, output = checkout.run()
    assert status == 0, output[-3000:]
    assert checkout.results() == unbroken[1]
    assert not checkout.redone(old) and not checkout.litter()


def test_a_failing_notebook_stops_no_other_and_keeps_its_traceback(checkout, unbroken):
    file = checkout.root / "notebooks" / f"{NAMES[0]}.ipynb"
    good = file.read_text()
    broken = json.loads(good)
    code = [c for c in broken["cells"] if c["cell_type"] == "code"]
    code[-1]["source"] = "raise RuntimeError('planted here')"
    file.write_text(json.dumps(broken))
    try:
        status, output = checkout.run()
        assert status != 0 and "planted here" in output
        others = {n: b for n, b in unbroken[1].items() if n != file.stem}
        assert checkout.results() == others
        kept = checkout.home / file.stem / "notebook.failed.ipynb"
        assert "planted here" in kept.read_text() and "Traceback" in kept.read_text()
        assert str(kept.relative_to(checkout.root)) in output
    finally:
        file.write_text(good)
    before = checkout.through()
    status, output = checkout.run()
    assert status == 0, output[-3000:]
    assert checkout.results() == unbroken[1]
    assert not checkout.redone(before)


def test_of_two_batches_at_once_one_is_refused(checkout, unbroken):
    both = [checkout.start(), checkout.start()]
    output = [child.communicate()[0] for child in both]
    assert sorted(child.returncode for child in both) == [0, 1], output
    refused = [child.returncode for child in both].index(1)
    assert f"kill {both[1 - refused].pid}`" in output[refused]
    assert "another batch is running" in output[refused]
    assert checkout.results() == unbroken[1]


def flip(path: Path) -> None:
    """One bit of the byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("activations", flip),
        ("activations", truncate),
        ("rotations/DFRot-RH-gamma100-sum-asym-seed0", flip),
        ("hessians/layer-000", flip),
        ("hessians/layer-001", truncate),
    ],
)
def test_a_damaged_artefact_is_named_and_made_again(finished, unbroken, name, damage):
    path = finished.home / "artefacts" / f"{name}.safetensors"
    good = path.read_bytes()
    damage(path)
    status, output = finished.run()
    assert status == 0, output[-3000:]
    assert f"{path} is truncated or altered" in output
    assert path.read_bytes() == good
    assert finished.results() == unbroken[1]

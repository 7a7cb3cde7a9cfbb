"""A batch under kill -9, a full disk, a failing notebook, a damaged file, and a second batch beside it.

Whatever happens, the same command again finishes with the bytes of an unbroken run.
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

import pytest

from dfrot_lab import kept_files, notebooks

ROOT = Path(__file__).parents[1]
NAMES = ["02_ro_vs_rh_error", "03_massive_tokens_fp16", "04_dfrot"]
KILLS = 20
SETTLED = 5.0  # seconds after which a notebook that has a result is through

pytestmark = pytest.mark.slow


class Checkout:
    """A copy of the project, with results of its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        folder.mkdir(parents=True)
        for name in ("dfrot_lab", "kernels", "notebooks", "cluster"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        for name in ("Snakefile", "experiments.yml"):
            shutil.copy(ROOT / name, folder)

    @property
    def home(self) -> Path:
        return self.root / "results" / "smoke"

    def start(self, *arguments: str) -> subprocess.Popen:
        """A batch of NAMES in a process group of its own."""
        paths = os.pathsep.join([str(self.root), str(self.root / "kernels")])
        only = [word for name in NAMES for word in ("--only", name)]
        return subprocess.Popen(
            [sys.executable, "-m", "dfrot_lab.cli", "batch", "--profile", "smoke", *only, *arguments],
            cwd=self.root, env=os.environ | {"PYTHONPATH": paths}, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str) -> tuple[int, str]:
        """(exit status, output) of a batch that is let through."""
        child = self.start(*arguments)
        output = child.communicate()[0]
        return child.returncode, output

    def results(self) -> dict[str, bytes]:
        found = {n: self.home / n / "result.json" for n in NAMES}
        return {n: p.read_bytes() for n, p in found.items() if p.exists()}

    def times(self) -> dict[str, int]:
        found = {n: self.home / n / "result.json" for n in NAMES}
        return {n: p.stat().st_mtime_ns for n, p in found.items() if p.exists()}

    def clear(self) -> None:
        for name in ("results", ".snakemake"):
            shutil.rmtree(self.root / name, ignore_errors=True)


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


def test_killed_at_twenty_random_moments_it_finishes_to_the_same_bytes(unbroken, capsys):
    checkout, expected, seconds = unbroken
    moments, killed, finished, redone = random.Random(0), [], 0, 0
    started = time.monotonic()
    while len(killed) < KILLS:
        checkout.clear()
        through: dict[str, int] = {}
        while True:  # killed and taken up again, until a run is through before its moment comes
            moment = moments.uniform(0.05, 0.9) * seconds if len(killed) < KILLS else None
            child = checkout.start()
            try:
                output = child.communicate(timeout=moment)[0]
            except subprocess.TimeoutExpired:
                old = {n: t for n, t in checkout.times().items() if time.time() - t / 1e9 > SETTLED}
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
                killed.append(round(moment, 1))
                redone += sum(old.get(n) != t for n, t in through.items())
                through = old
                continue
            assert child.returncode == 0, output[-3000:]
            assert checkout.results() == expected
            redone += sum(checkout.times()[n] != t for n, t in through.items())
            finished += 1
            break
    with capsys.disabled():
        took = time.monotonic() - started
        print(
            f"\n{len(killed)} kills at {killed} s of {seconds:.0f} s, {finished} batches finished, "
            f"{redone} notebooks redone that were through, {took:.0f} s in all"
        )
    assert redone == 0
    partial = [p for p in checkout.home.rglob(".partial-*") if "figures" not in p.parts]
    assert not partial


def test_the_first_process_killed_alone_takes_the_batch_with_it(checkout, unbroken):
    child = checkout.start()
    time.sleep(0.3 * unbroken[2])
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    status, output = checkout.run()
    assert status == 0, output[-3000:]
    assert checkout.results() == unbroken[1]


def test_a_termination_leaves_no_process(checkout, unbroken):
    import psutil

    child = checkout.start()
    time.sleep(0.5 * unbroken[2])
    every = psutil.Process(child.pid).children(recursive=True)
    assert every
    child.terminate()
    child.communicate(timeout=60)
    assert child.returncode == 130
    assert not psutil.wait_procs(every, timeout=10)[1]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="a small disk is mounted: needs root"
)
def test_on_a_full_disk_it_says_so_and_goes_on_when_there_is_space(checkout, unbroken):
    results = checkout.root / "results"
    results.mkdir()

    def mount(size: str, *options: str) -> None:
        options = ",".join([f"size={size}", *options])
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", results], check=True)

    mount("400k")
    try:
        status, output = checkout.run()
        assert status != 0
        assert "No space left on device" in output and "results/smoke" in output
        assert notebooks.FREE_SPACE.strip(": ") in output
        for path in checkout.home.rglob("*"):
            if path.suffix in (".json", ".safetensors") and path.name[0] != ".":
                assert kept_files._damage(path) is None, path
            assert not path.name.startswith(".partial-"), path
        assert checkout.results().items() <= unbroken[1].items()
        mount("200m", "remount")
        status, output = checkout.run()
        assert status == 0, output[-3000:]
        assert checkout.results() == unbroken[1]
    finally:
        subprocess.run(["umount", results], check=True)


def test_a_failing_notebook_stops_no_other_and_keeps_its_traceback(checkout, unbroken):
    file = checkout.root / "notebooks" / "02_ro_vs_rh_error.ipynb"
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
    before = checkout.times()
    status, output = checkout.run()
    assert status == 0, output[-3000:]
    assert checkout.results() == unbroken[1]
    assert before.items() <= checkout.times().items()


def test_of_two_batches_at_once_the_second_is_refused(checkout, unbroken):
    first = checkout.start()
    while not (checkout.home / ".batch.lock").exists():
        time.sleep(0.05)
    time.sleep(1)
    status, output = checkout.run()
    assert status == 1 and "another batch is running" in output
    assert f"kill {first.pid}`" in output
    output = first.communicate()[0]
    assert first.returncode == 0, output[-3000:]
    assert checkout.results() == unbroken[1]


@pytest.mark.parametrize("name", ["activations", "rotations/DFRot-RH-gamma100-sum-asym-seed0"])
def test_an_altered_artefact_is_named_and_made_again(checkout, unbroken, name):
    assert checkout.run()[0] == 0
    path = checkout.home / "artefacts" / f"{name}.safetensors"
    good = path.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    path.write_bytes(bad)
    status, output = checkout.run()
    assert status == 0, output[-3000:]
    assert f"{path} is truncated or altered" in output
    assert path.read_bytes() == good
    assert checkout.results() == unbroken[1]

"""The batch: whole, idle when nothing changed, one at a time, and none the worse for a kill -9."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from dfrot_lab import batches

ROOT = Path(__file__).parents[1]
NAMES = [p.stem for p in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]

ONLY = [word for name in NAMES for word in ("--only", name)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a checkout holds, in a path with a space, so that results/ is ours."""
    copy = tmp_path_factory.mktemp("batch") / "a checkout"
    copy.mkdir()
    for name in ("dfrot_lab", "kernels", "notebooks", "cluster"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    shutil.copy(ROOT / "Snakefile", copy)
    return copy


def command(checkout, **environment):
    paths = os.pathsep.join([str(checkout), str(checkout / "kernels")])
    return {
        "args": [sys.executable, "-m", "dfrot_lab.cli", "batch", "--profile", "smoke", *ONLY],
        "cwd": checkout,
        "env": os.environ | {"PYTHONPATH": paths} | environment,
        "text": True,
    }


def results(checkout):
    home = checkout / "results" / "smoke"
    return {name: (home / name / "result.json").read_bytes() for name in NAMES}


@pytest.mark.slow
def test_killed_at_any_moment_it_finishes_to_the_same_bytes(checkout):
    whole = subprocess.run(**command(checkout), capture_output=True, check=False)
    assert whole.returncode == 0, whole.stderr[-3000:]
    expected = results(checkout)
    for seconds in (4, 12, 25):
        shutil.rmtree(checkout / "results")
        child = subprocess.Popen(
            **command(checkout), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(seconds)
        kill_tree(child.pid)
        again = subprocess.run(**command(checkout), capture_output=True, check=False)
        assert again.returncode == 0, again.stderr[-3000:]
        assert results(checkout) == expected


def kill_tree(pid):
    import psutil

    for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def test_a_batch_runs_and_the_next_one_has_nothing_to_do(checkout):
    first = subprocess.run(**command(checkout), capture_output=True, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    times = {n: (checkout / "results/smoke" / n / "result.json").stat().st_mtime_ns for n in NAMES}
    second = subprocess.run(**command(checkout), capture_output=True, check=False)
    assert second.returncode == 0
    assert "Nothing to be done" in second.stderr + second.stdout
    assert times == {
        n: (checkout / "results/smoke" / n / "result.json").stat().st_mtime_ns for n in NAMES
    }


@pytest.mark.parametrize("where", ["2024", "outside"])
def test_a_batch_writes_into_the_folder_it_is_given(checkout, where, tmp_path, monkeypatch):
    """Relative to the checkout, or anywhere; only what it starts and locks is looked at."""
    asked = []
    monkeypatch.setattr(batches, "_check_code", lambda root: None)
    monkeypatch.setattr(batches, "_supervised", lambda command, *_: asked.append(command) or 0)
    folder = checkout / where if where == "2024" else tmp_path / where
    given = Path(where) if where == "2024" else folder
    assert batches.run("smoke", checkout, "1", 1000, NAMES[:1], folder=given) == 0
    told = "folder=./2024" if where == "2024" else f"folder={folder}"
    assert told in asked[0] and (folder / ".batch.lock").is_file()
    assert batches.run("smoke", checkout, "1", 1000, NAMES[:1]) == 0
    assert "folder=./results/smoke" in asked[1]


def test_two_batches_at_once_are_refused(tmp_path):
    (tmp_path / "Snakefile").touch()
    shutil.copytree(ROOT / "cluster", tmp_path / "cluster")
    folder = tmp_path / "results" / "smoke"
    folder.mkdir(parents=True)
    with FileLock(folder / ".batch.lock"), pytest.raises(batches.BatchError, match="another batch"):
        batches.run("smoke", tmp_path, "1", 1000)


def test_an_unknown_executor_is_refused(tmp_path):
    (tmp_path / "Snakefile").touch()
    shutil.copytree(ROOT / "cluster", tmp_path / "cluster")
    with pytest.raises(batches.BatchError, match="'slrum' is unknown: use local, slurm"):
        batches.run("smoke", tmp_path, "1", 1000, executor="slrum")


def test_kubernetes_is_told_where_its_job_is(tmp_path):
    (tmp_path / "Snakefile").touch()
    with pytest.raises(batches.BatchError, match=r"cluster/kubernetes/job\.yaml"):
        batches.run("smoke", tmp_path, "1", 1000, executor="kubernetes")


def test_an_executor_that_is_not_installed_is_named(tmp_path):
    (tmp_path / "Snakefile").touch()
    (tmp_path / "config.yaml").write_text("executor: some-where")
    with pytest.raises(
        batches.BatchError, match="pip install snakemake-executor-plugin-some-where"
    ):
        batches.run("smoke", tmp_path, "1", 1000, executor=str(tmp_path))


def test_a_copy_of_the_local_profile_is_local_whatever_its_name(tmp_path):
    shutil.copytree(ROOT / "cluster" / "local", tmp_path / "here")
    assert batches._kind(tmp_path / "here") == "local"


def test_outside_a_checkout_it_says_so(tmp_path):
    with pytest.raises(batches.BatchError, match="no Snakefile"):
        batches.run("smoke", tmp_path, "1", 1000)

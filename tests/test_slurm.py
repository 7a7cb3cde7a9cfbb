"""The SLURM executor against a stand-in for SLURM that runs jobs here and refuses unknown options."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_stub
import yaml

from dfrot_lab import batches, files, slurm_queue

ROOT = Path(__file__).parents[1]
NAME = "02_ro_vs_rh_error"


class Cluster:
    """A checkout, and a SLURM beside it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.state, self.commands = (
            folder / "a checkout",
            folder / "jobs",
            folder / "bin",
        )
        self.state.mkdir()
        # Snakemake cannot submit from a path with a space: the same environment by a path without
        (folder / "env").symlink_to(sys.prefix)
        self.python = str(folder / "env" / "bin" / Path(sys.executable).name)
        slurm_stub.install(self.commands)
        for name in ("dfrot_lab", "kernels", "notebooks", "cluster"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, self.root / name, ignore=ignore)
        shutil.copy(ROOT / "Snakefile", self.root)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        """`dfrot-lab batch` on this cluster."""
        paths = os.pathsep.join([str(self.root), str(self.root / "kernels")])
        command = [self.python, "-m", "dfrot_lab.cli", "batch", "--only", "02", *arguments]
        found = os.pathsep.join([str(self.commands), os.environ["PATH"]])
        own = {"PYTHONPATH": paths, "PATH": found, "SLURM_STUB": str(self.state)}
        return subprocess.Popen(
            command, cwd=self.root, env=os.environ | own | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def jobs(self) -> dict[str, list[dict]]:
        """Jobs by the rule that the comment names."""
        found: dict[str, list[dict]] = {}
        for path in sorted(self.state.glob("[0-9]*.json"), key=lambda p: int(p.stem)):
            job = json.loads(path.read_text())
            rule = job["options"]["comment"].removeprefix("rule_").split("_wildcards_")[0]
            found.setdefault(rule, []).append(job)
        return found


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def asked(job: dict) -> dict:
    names = ("mem", "time", "cpus_per_task", "gpus", "partition")
    return {k: job["options"][k] for k in names}


def wait_for(cluster: Cluster, state: str) -> None:
    """Until a job is in this state."""
    until = time.monotonic() + 60
    while not any(j["state"] == state for r in cluster.jobs().values() for j in r):
        assert time.monotonic() < until
        time.sleep(0.2)


def test_memory_minutes_cores_and_gpus_reach_sbatch(cluster):
    own = {"base": "smoke", "common": {"device": "cuda:0", "threads": 3}}
    own |= {"resources": {"mem_mb": 12345, "runtime": 77}}
    (cluster.root / "own.yml").write_text(yaml.safe_dump(own))
    child = cluster.start(
        "--profile", "own.yml", "--executor", quick(cluster), SLURM_STUB_REFUSE="1"
    )
    output = child.communicate(timeout=120)[0]
    assert child.returncode != 0 and "Invalid qos" in output
    jobs = cluster.jobs()
    assert set(jobs) == {"activations"}  # the assets are fetched here
    wanted = {"mem": 12345, "time": 77, "cpus_per_task": 3, "gpus": 1, "partition": "main"}
    assert [asked(j) for j in jobs["activations"]] == [wanted] * 2  # tried once more


def quick(cluster: Cluster) -> str:
    """A copy of the SLURM profile that looks at its jobs at once."""
    settings = (cluster.root / "cluster" / "slurm" / "config.yaml").read_text()
    (cluster.root / "quick").mkdir()
    text = re.sub(r"(seconds-before-status-checks:) 20", r"\1 1", settings)
    (cluster.root / "quick" / "config.yaml").write_text(text)
    return "quick"


def test_an_environment_that_snakemake_cannot_quote_is_refused(cluster, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/a place/bin/python")
    with pytest.raises(batches.BatchError, match="/a place/bin/python, which has a space"):
        batches.run("smoke", cluster.root, "1", 1000, executor="slurm")


def test_jobs_that_a_killed_batch_left_pending_are_cancelled(cluster):
    profile = quick(cluster)
    child = cluster.start("--profile", "smoke", "--executor", profile, SLURM_STUB_HOLD="1")
    wait_for(cluster, "PENDING")
    child.kill()
    child.communicate(timeout=60)
    (left,) = cluster.jobs()["activations"]
    again = cluster.start("--profile", "smoke", "--executor", profile, SLURM_STUB_REFUSE="1")
    output = again.communicate(timeout=120)[0]
    assert f"cancelling jobs that an earlier batch left in the queue: {left['id']}\n" in output
    states = [job["state"] for job in cluster.jobs()["activations"]]
    assert states == ["CANCELLED", "FAILED", "FAILED"]


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Commands of SLURM that print what the test says: squeue the next of a list, scancel nothing."""
    asked, answers = [], []
    monkeypatch.setattr(slurm_queue, "_PERIOD", 0)

    def call(*command: str) -> str:
        asked.append(command)
        return answers.pop(0) if command[0] == "squeue" else ""

    monkeypatch.setattr(slurm_queue, "_call", call)
    return answers, asked


def test_only_pending_jobs_of_this_folder_are_cancelled_and_running_ones_waited_for(queue):
    answers, asked = queue
    own, said = slurm_queue.prefix(Path("results/smoke")), []
    other = slurm_queue.prefix(Path("elsewhere/results/smoke"))
    assert own != other and re.fullmatch(r"[A-Za-z0-9_-]{1,50}", own)
    answers += [
        f"7|PENDING|{own}_a\n8|RUNNING|{own}_a\n9|PENDING|{other}_b\n10|RUNNING|bash|x\n",
        f"8|RUNNING|{own}_a\n9|PENDING|{other}_b\n",
        f"9|PENDING|{other}_b\n",
    ]
    slurm_queue.settle(own, said.append)
    assert not answers
    assert [c for c in asked if c[0] == "scancel"] == [("scancel", "--state=PENDING", "7")]
    assert len(said) == 2 and "7" in said[0] and "8" in said[1] and "waiting" in said[1]


def test_a_queue_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm_queue.SlurmError, match="squeue is not on the PATH"):
        slurm_queue.settle("dfrot-smoke", print)
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\necho 'error: Unable to contact controller' >&2; exit 1\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    with pytest.raises(slurm_queue.SlurmError, match="squeue failed: error: Unable to contact"):
        slurm_queue.settle("dfrot-smoke", print)


def test_a_notebook_runs_as_jobs(cluster):
    child = cluster.start("--profile", "smoke", "--executor", quick(cluster))
    output = child.communicate(timeout=280)[0]
    assert child.returncode == 0, output[-3000:]
    jobs = cluster.jobs()
    assert set(jobs) == {"activations", "notebook"}
    for rule, memory, minutes in (("activations", 2500, 15), ("notebook", 3000, 10)):
        (job,) = jobs[rule]
        assert (job["state"], job["exit"]) == ("COMPLETED", 0)
        wanted = {"mem": memory, "time": minutes, "cpus_per_task": 1, "gpus": None}
        assert asked(job) == wanted | {"partition": "main"}
    home = cluster.root / "results" / "smoke"
    assert files.read_json(home / NAME / "result.json")["claims"]
    recorded = files.read_json(home / ".manifest.json")
    assert f"{NAME}/result.json" in recorded  # by the job
    again = cluster.start("--profile", "smoke", "--executor", "quick")
    assert "Nothing to be done" in again.communicate(timeout=60)[0] and again.returncode == 0
    assert cluster.jobs() == jobs


@pytest.mark.slow
def test_an_interrupted_batch_leaves_jobs_that_the_next_one_waits_for(cluster):
    child = cluster.start("--profile", "smoke", "--executor", "slurm")
    wait_for(cluster, "RUNNING")
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 130
    again = cluster.start("--profile", "smoke", "--executor", "slurm")
    output = again.communicate(timeout=220)[0]
    assert again.returncode == 0, output[-3000:]
    assert (cluster.root / "results" / "smoke" / NAME / "result.json").exists()

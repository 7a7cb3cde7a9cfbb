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

from dfrot_lab import batches, files

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


def test_memory_minutes_cores_and_gpus_reach_sbatch(cluster):
    own = {"base": "smoke", "common": {"device": "cuda:0", "threads": 3}}
    own |= {"resources": {"mem_mb": 12345, "runtime": 77}}
    (cluster.root / "own.yml").write_text(yaml.safe_dump(own))
    settings = (cluster.root / "cluster" / "slurm" / "config.yaml").read_text()
    (cluster.root / "quick").mkdir()
    quick = re.sub(r"(seconds-before-status-checks:) 20", r"\1 1", settings)
    (cluster.root / "quick" / "config.yaml").write_text(quick)
    child = cluster.start("--profile", "own.yml", "--executor", "quick", SLURM_STUB_REFUSE="1")
    output = child.communicate(timeout=120)[0]
    assert child.returncode != 0 and "Invalid qos" in output
    jobs = cluster.jobs()
    assert set(jobs) == {"activations"}  # the assets are fetched here
    wanted = {"mem": 12345, "time": 77, "cpus_per_task": 3, "gpus": 1, "partition": "main"}
    assert [asked(j) for j in jobs["activations"]] == [wanted] * 2  # tried once more


def test_an_environment_that_snakemake_cannot_quote_is_refused(cluster, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/a place/bin/python")
    with pytest.raises(batches.BatchError, match="/a place/bin/python, which has a space"):
        batches.run("smoke", cluster.root, "1", 1000, executor="slurm")


@pytest.mark.slow
def test_a_notebook_runs_as_jobs(cluster):
    child = cluster.start("--profile", "smoke", "--executor", "slurm")
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
    again = cluster.start("--profile", "smoke", "--executor", "slurm")
    assert "Nothing to be done" in again.communicate(timeout=60)[0] and again.returncode == 0
    assert cluster.jobs() == jobs


@pytest.mark.slow
def test_an_interrupted_batch_leaves_jobs_that_the_next_one_waits_for(cluster):
    child = cluster.start("--profile", "smoke", "--executor", "slurm")
    until = time.monotonic() + 60
    while not any(j["state"] == "RUNNING" for r in cluster.jobs().values() for j in r):
        assert time.monotonic() < until
        time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 130
    again = cluster.start("--profile", "smoke", "--executor", "slurm")
    output = again.communicate(timeout=220)[0]
    assert again.returncode == 0, output[-3000:]
    assert (cluster.root / "results" / "smoke" / NAME / "result.json").exists()

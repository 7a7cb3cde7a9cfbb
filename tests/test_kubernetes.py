"""The Kubernetes Job: a command that exists, resources that cover it, and no key that the API lacks."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from dfrot_lab import cli, profiles

ROOT = Path(__file__).parents[1]
FILE = ROOT / "cluster" / "kubernetes" / "job.yaml"


@pytest.fixture
def job():
    return yaml.safe_load(FILE.read_text())


def test_its_command_is_one_and_fits_its_resources(job):
    (container,) = job["spec"]["template"]["spec"]["containers"]
    program, command, *arguments = container["command"]
    assert (program, command) == ("dfrot-lab", "batch")
    asked = cli.batch.make_context("batch", arguments).params
    assert asked["profile"] in profiles.names() and asked["executor"] == "local"
    resources = container["resources"]
    assert resources["requests"]["cpu"] == asked["cores"]
    assert resources["limits"]["memory"].endswith("Gi")
    assert asked["memory"] <= 1024 * int(resources["limits"]["memory"][:-2])


def test_everything_it_writes_to_is_on_the_volume(job):
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] in [v["name"] for v in job["spec"]["template"]["spec"]["volumes"]]
    written = [container["workingDir"], *(v["value"] for v in container["env"])]
    assert all(Path(p).is_relative_to(mount["mountPath"]) for p in written)
    assert {v["name"] for v in container["env"]} == {"DFROT_CACHE", "HF_HOME"}


def test_the_image_has_what_is_installed_where_the_job_mounts_the_checkout(job):
    """Editable, so that what runs is the code on the volume."""
    text = FILE.with_name("Dockerfile").read_text().replace("\\\n", "")
    steps = [line.split() for line in text.splitlines() if line and line[0] != "#"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert ["WORKDIR", container["volumeMounts"][0]["mountPath"]] in steps
    copied = [name for step in steps if step[0] == "COPY" for name in step[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {
        project["project"]["readme"],
        *project["project"]["license-files"],
        "requirements.lock",
    }
    needed |= {Path(p).parts[0] for p in project["tool"]["setuptools"]["package-dir"].values()}
    assert needed | {"pyproject.toml"} == set(copied)
    assert any(step[0] == "RUN" and step[-2:] == ["-e", "."] for step in steps)
    version = next(step[1] for step in steps if step[0] == "FROM").partition(":")[2].split("-")[0]
    assert f"Programming Language :: Python :: {version}" in project["project"]["classifiers"]


def test_the_api_knows_every_key(job):
    client = pytest.importorskip("kubernetes.client")
    api = client.ApiClient()
    read = api.deserialize(SimpleNamespace(data=json.dumps(job)), "V1Job")
    assert api.sanitize_for_serialization(read) == job

"""The Kubernetes Job: a command that exists, resources that cover it, and no key that the API lacks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from dfrot_lab import cli, profiles

FILE = Path(__file__).parents[1] / "cluster" / "kubernetes" / "job.yaml"


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


def test_the_api_knows_every_key(job):
    client = pytest.importorskip("kubernetes.client")
    api = client.ApiClient()
    read = api.deserialize(SimpleNamespace(data=json.dumps(job)), "V1Job")
    assert api.sanitize_for_serialization(read) == job

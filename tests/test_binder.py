"""The Binder files: well-formed, and every command in them is one that exists."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from dfrot_lab import notebooks, profiles
from dfrot_lab.cli import app

ROOT = Path(__file__).resolve().parents[1]
BINDER = ROOT / "binder"


@pytest.mark.parametrize("name", ["postBuild", "start"])
def test_a_script_can_be_run_and_parsed(name):
    assert os.access(BINDER / name, os.X_OK)
    assert (BINDER / name).read_text().startswith("#!/usr/bin/env bash\n")
    subprocess.run([shutil.which("bash"), "-n", str(BINDER / name)], check=True)


def test_start_hands_over_to_the_server():
    done = subprocess.run(
        [BINDER / "start", "sh", "-c", 'echo "$1 $HF_HUB_OFFLINE $TRITON_INTERPRET"', "-", "a b"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "a b 1 1\n"


def test_post_build_asks_for_commands_and_notebooks_that_exist():
    lines = re.findall(r"^dfrot-lab (.+)$", (BINDER / "postBuild").read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        command, *arguments = line.split()
        usage = CliRunner().invoke(app, [command, "--help"])
        assert usage.exit_code == 0
        assert all(a in usage.output for a in arguments if a.startswith("--"))
        for flag, value in itertools.pairwise(arguments):
            if flag == "--only":
                assert notebooks.find(value, ROOT)
            if flag == "--profile":
                assert value in profiles.names()


def test_the_smoke_profile_needs_no_download_but_for_notebook_09():
    smoke = profiles.load("smoke")
    assert smoke["common"]["model"].startswith("tiny:") and smoke["common"]["corpus"] == "pydoc"
    assets = {"demo", "lee"}
    asking = {
        name
        for name, values in smoke["notebooks"].items()
        if any(isinstance(v, str) and v in assets for v in values.values())
    }
    assert asking == {"09_objectives"}
    assert "09" not in (BINDER / "postBuild").read_text()


def test_it_says_that_it_is_untested():
    assert "**Untested**" in (BINDER / "README.md").read_text()
    assert "untested" in (ROOT / "README.md").read_text().lower()
    assert yaml.safe_load((BINDER / "environment.yml").read_text())["channels"] == ["conda-forge"]

"""What README, pages and tables kept by hand say is what the code and the committed results have."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dfrot_lab import downloads, lab, objectives, profiles, text_tasks, zero_shot
from dfrot_lab.cli import app, options, rotations
from dfrot_lab.plots import zero_shot as accuracy

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
PAGES += [ROOT / name / "README.md" for name in ("benchmarks", "binder")]
ROWS = re.findall(r"^\|.*?\(notebooks/(\w+)\.ipynb\).*$", (ROOT / "README.md").read_text(), re.M)


@pytest.mark.parametrize("notebook", ROWS)
def test_readme_tells_how_many_claims_hold(notebook):
    (row,) = re.findall(
        rf"^\|.*\(notebooks/{notebook}\.ipynb\).*$", (ROOT / "README.md").read_text(), re.M
    )
    told = re.search(r"(\d+) of (\d+) claims", row)
    claims = json.loads((ROOT / "figures" / notebook / "result.json").read_text())["claims"]
    assert told, f"no count of claims in the row of {notebook}"
    assert (int(told[1]), int(told[2])) == (sum(c["agrees"] for c in claims), len(claims))


def test_readme_has_a_row_for_every_notebook():
    assert sorted(ROWS) == sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_pages_name_code_and_files_that_exist(page):
    text = page.read_text()
    for name in re.findall(r"`((?:dfrot_lab|dfrot_kernels)(?:\.\w+)+)`", text):
        module, _, last = name.rpartition(".")
        try:
            assert importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), last), f"{page.name}: {name}"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_lists_that_the_command_line_keeps_without_torch_are_those_of_the_code():
    assert set(options.OBJECTIVES) == set(objectives.NAMES)
    spec = objectives.QuantSpec()
    quantized = {n for n in objectives.NAMES if hasattr(objectives.named(n, spec), "spec")}
    assert set(rotations.QUANTIZED) == quantized
    assert tuple(downloads._OFFLINE) == tuple(zero_shot.OFFLINE)
    assert accuracy.CHOICES["continuation"] == text_tasks.CHOICES
    for command in ("eval", "quantize", "generate"):
        (method,) = (p for p in app.commands[command].params if p.name == "method")
        assert tuple(method.type.choices) == lab.METHODS


def test_no_file_names_a_machine_or_a_registry():
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    named = ["/work" + "/", "/root" + "/", "/tmp" + "/", "pypi" + ".org", "python" + "hosted"]
    found = subprocess.run(
        ["git", "grep", "-lIF", *(x for n in named for x in ("-e", n))],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    if found.returncode > 1:
        pytest.skip(f"no checkout of git here: {found.stderr.strip()}")
    assert found.stdout == ""


def test_notebook_9_is_published_as_the_demo_profile_runs_it():
    published = json.loads((ROOT / "figures" / "09_objectives" / "result.json").read_text())
    asked = profiles.load("demo")["notebooks"]["09_objectives"]
    assert {k: published["parameters"][k] for k in asked} == asked

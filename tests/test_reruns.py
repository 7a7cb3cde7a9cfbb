"""What runs again: rules that read a changed value or use a changed module or notebook, and no others."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from dry_runs import dry_run, snakemake

from dfrot_lab import experiments, imports, lab
from dfrot_lab.artefacts import MODEL_CODE, ROTATION_CODE

ROOT = Path(__file__).parents[1]
NAMES = [p.stem for p in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
ERRORS, KEPT, REFINED, TABLES = NAMES[1:5]
# stands in for the command line: writes what a job would, at once
STUB = """
import pathlib, sys
command, *words = sys.argv[1:]
given = {a: b for a, b in zip(words, words[1:]) if a.startswith("--")}
artefacts = pathlib.Path(given.get("--folder", ""), "artefacts")
if command == "collect":
    name = "hessians/hessians.json" if "--hessians" in given else "activations.safetensors"
    made = artefacts / name
elif command == "run":
    made = pathlib.Path(given["--folder"], words[0], "result.json")
    (made.parent / "figures").mkdir(parents=True, exist_ok=True)
    pathlib.Path(given["--out"]).touch()
else:
    made = pathlib.Path(given["--out"])
made.parent.mkdir(parents=True, exist_ok=True)
made.write_text("{}")
"""


def command_line(folder, text):
    """The folder, for the PATH, of a `dfrot-lab` that runs the Python code `text`."""
    commands = folder / "bin"
    commands.mkdir()
    (folder / "stub.py").write_text(text)
    stub = f"#!/bin/sh\nexec '{sys.executable}' -S '{folder / 'stub.py'}' \"$@\"\n"
    (commands / "dfrot-lab").write_text(stub)
    (commands / "dfrot-lab").chmod(0o755)
    return str(commands)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A checkout whose batches, of a profile with two below it and of a grid over it, are through."""
    folder = tmp_path_factory.mktemp("reruns") / "a checkout"
    for name in ("dfrot_lab", "kernels", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    own = {"base": "base.yml", "notebooks": {TABLES: {"samples": 3}}}
    own["common"] = {"calibration_seed": 0, "solver": "svd"}  # that no packaged profile sets
    (folder / "own.yml").write_text(yaml.safe_dump(own))
    base = {"base": "smoke", "notebooks": {KEPT: {"windows": 1}}}
    (folder / "base.yml").write_text(yaml.safe_dump(base))
    grid = {"trial": {"notebooks": ["03"], "grid": {"seeds": [[0], [1]]}}}
    (folder / "experiments.yml").write_text(yaml.safe_dump(grid))
    commands = command_line(folder.parent, STUB)
    here = Path.cwd()
    os.chdir(folder)  # where profiles and notebooks are looked for
    try:
        experiments.prepare(experiments.find("trial", "own.yml", folder))
    finally:
        os.chdir(here)
    for asked, experiment in ((" ".join(NAMES), ""), ("", "trial")):
        snakemake(
            folder, "--cores", "2", "--scheduler", "greedy", code=folder, path=commands,
            profile="own.yml", notebooks=asked, experiment=experiment,
        )  # fmt: skip
    return folder


@pytest.fixture
def checkout(finished, tmp_path):
    """A copy of it, times and all."""
    return shutil.copytree(finished, tmp_path / finished.name)


def again(folder, **config):
    """Names of the jobs that would run now."""
    config = {"profile": "own.yml", "notebooks": " ".join(NAMES)} | config
    jobs = dry_run(folder, code=folder, **config)
    return sorted(job.name for job in jobs if job.rule != "all")


def edit(folder, name, value):
    """Set a value, by its keys, in the YAML file `name`."""
    path = folder / name
    content = yaml.safe_load(path.read_text())
    place = content
    for key in value[:-2]:
        place = place.setdefault(key, {})
    place[value[-2]] = value[-1]
    path.write_text(yaml.safe_dump(content))


SMOKE = "dfrot_lab/profiles/smoke.yml"


def test_a_changed_value_runs_the_notebook_that_reads_it(checkout):
    """Wherever it is set: in the profile, in the one below it, or in the packaged one below that."""
    edit(checkout, "own.yml", ("notebooks", TABLES, "samples", 4))
    edit(checkout, "base.yml", ("notebooks", KEPT, "windows", 2))
    edit(checkout, SMOKE, ("notebooks", REFINED, "windows", 3))
    edit(checkout, "own.yml", ("resources", "runtime", 99))  # of no result
    assert again(checkout) == [KEPT, REFINED, TABLES]


def test_a_changed_value_of_all_runs_all_but_the_fetching(checkout):
    edit(checkout, SMOKE, ("common", "seqlen", 64))
    assert again(checkout) == [*NAMES, "activations", "hessians", "rotations"]


def test_a_changed_value_below_the_points_of_a_grid_runs_them(checkout):
    edit(checkout, SMOKE, ("notebooks", KEPT, "side_windows", 2))
    assert again(checkout, notebooks="", experiment="trial") == [KEPT, KEPT]


@pytest.mark.slow
def test_what_is_through_has_nothing_to_do(checkout):
    assert again(checkout) == again(checkout, notebooks="", experiment="trial") == []


@pytest.mark.slow
def test_an_artefact_that_was_damaged_is_made_again_one_that_was_deleted_when_it_is_needed(
    checkout,
):
    (checkout / "results/own/artefacts/hessians/hessians.json").unlink()
    assert again(checkout) == []
    uses = [TABLES, "09_objectives", "10_zero_shot"]
    assert again(checkout, damaged="1") == [*uses, "hessians"]


def edited(folder, *names):
    """Append a line that means nothing to each file."""
    for name in names:
        with (folder / name).open("a") as f:
            f.write("\n" if name.endswith("ipynb") else "# edited\n")


def test_a_changed_file_runs_the_notebook_that_uses_it(checkout):
    edited(checkout, "dfrot_lab/studies/token_errors.py", "dfrot_lab/theory.py")
    edited(checkout, f"notebooks/{KEPT}.ipynb", "kernels/dfrot_kernels/matmul.py")
    edited(checkout, "dfrot_lab/lessons/spikes.py", "dfrot_lab/cli.py")  # for readers alone
    assert again(checkout) == [ERRORS, KEPT, "07_int4_kernels", "08_why_it_works"]


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("gptq", ["hessians"]),
        pytest.param(
            "activations", ["activations", "hessians", "rotations"], marks=pytest.mark.slow
        ),
        pytest.param("dfrot", ["rotations"], marks=pytest.mark.slow),
        pytest.param("artefacts", ["activations", "hessians", "rotations"], marks=pytest.mark.slow),
    ],
)
def test_a_changed_module_makes_the_artefacts_again_that_it_makes(checkout, name, rules):
    edited(checkout, f"dfrot_lab/{name}.py")
    assert again(checkout) == [*NAMES, *rules]


def test_every_file_that_a_kept_value_is_keyed_by_is_watched(checkout):
    shutil.rmtree(checkout / "results")
    jobs = dry_run(checkout, code=checkout, profile="own.yml", notebooks=" ".join(NAMES))
    watched = {job.name: set(job.inputs) for job in jobs}
    keyed = {
        "activations": MODEL_CODE,
        "hessians": (*MODEL_CODE, "dfrot_lab.gptq", "dfrot_lab.hessians"),
        "rotations": ROTATION_CODE,
    } | dict.fromkeys(NAMES, lab.CODE)
    known = imports.modules(ROOT)
    for job, code in keyed.items():
        assert {known[name].relative_to(ROOT).as_posix() for name in code} <= watched[job], job
    kernels = {f"kernels/dfrot_kernels/{n}.py" for n in ("backends", "triton_ops", "tokens")}
    assert kernels <= watched["07_int4_kernels"]


def test_every_parameter_that_an_artefact_is_keyed_by_is_a_param(finished):
    records = [json.loads(p.read_text()) for p in (finished / ".snakemake/metadata").iterdir()]
    params = {record["rule"]: " ".join(record["params"]) for record in records}
    about = {"model", "corpus", "seqlen", "dtype", "device", "threads"}
    keyed = {
        "activations": about | {"calibration", "calibration_seed"},
        "hessians": about | {"calibration_seed"},
        "rotations": {"iterations", "rows", "solver", "seeds", "gamma", "starts"},
        "notebook": about,
    }
    for rule, wanted in keyed.items():
        assert [n for n in wanted if f'"{n}"' not in params[rule]] == [], (rule, params[rule])


def test_what_a_failing_job_said_is_shown_and_kept(checkout, tmp_path):
    log = checkout / "results/own/logs/hessians.log"
    assert log.is_file()  # of the job that was through
    edited(checkout, "dfrot_lab/gptq.py")
    text = "import sys; print('half of it', file=sys.stderr); print('the rest'); sys.exit(1)"
    output = snakemake(
        checkout, "--cores", "1", code=checkout, path=command_line(tmp_path, text), fails=True,
        profile="own.yml", notebooks=TABLES,
    )  # fmt: skip
    assert log.read_text() == "half of it\nthe rest\n" and "half of it\nthe rest\n" in output
    assert not (checkout / "results/own/artefacts/hessians/hessians.json").exists()


# --- imports ----------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """Two packages of one line each file."""
    for name, text in {
        "dfrot_lab/__init__.py": "",
        "dfrot_lab/a.py": "def f():\n    from dfrot_lab import b",
        "dfrot_lab/b.py": "import numpy\nfrom dfrot_kernels.c import thing",
        "dfrot_lab/d/__init__.py": "from . import e",
        "dfrot_lab/d/e.py": "from ..a import f",
        "kernels/dfrot_kernels/__init__.py": "",
        "kernels/dfrot_kernels/c.py": "import dfrot_lab.d.e",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_imports_are_followed_also_inside_functions_and_in_circles(project):
    every = ["dfrot_lab/a.py", "dfrot_lab/b.py", "dfrot_lab/d/e.py", "kernels/dfrot_kernels/c.py"]
    assert imports.closure(project, ["dfrot_lab.a"]) == every
    assert imports.closure(project, ["dfrot_lab.d"]) == sorted([*every, "dfrot_lab/d/__init__.py"])
    assert imports.closure(project, ["dfrot_lab.a"], ["dfrot_lab.b"]) == ["dfrot_lab/a.py"]
    less = [f for f in every if "/d/" not in f]
    assert imports.closure(project, ["dfrot_lab.d", "dfrot_lab.a"], ["dfrot_lab.d"]) == less


def test_a_module_that_is_not_there_is_named(project):
    with pytest.raises(ValueError, match=r"'dfrot_lab\.z' is not in"):
        imports.closure(project, ["dfrot_lab.z"])

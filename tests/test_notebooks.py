"""Every notebook runs end to end on the smoke profile; bad parameters are refused before it does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from dfrot_lab import notebooks, profiles

ROOT = Path(__file__).parents[1]
NAMES = [p.stem for p in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]


def lab(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "dfrot_lab.cli", *map(str, arguments)],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One results folder for all, as in a batch: later notebooks reuse what earlier ones made."""
    return tmp_path_factory.mktemp("a folder with spaces")


@pytest.mark.parametrize("name", NAMES)
def test_runs_end_to_end(name, folder):
    done = lab("run", name, "--profile", "smoke", "--folder", folder)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / name / "result.json").read_text())
    assert result["claims"] and all(isinstance(c["agrees"], bool) for c in result["claims"])
    provenance = json.loads((folder / name / "provenance.json").read_text())
    assert provenance["parameters"] == result["parameters"]
    assert "folder" not in result["parameters"]
    executed = nbformat.read(folder / name / "notebook.ipynb", 4)
    streams = [o.name for c in executed.cells for o in c.get("outputs", []) if "name" in o]
    assert "stderr" not in streams and not list((folder / name).glob("*.failed.ipynb"))
    figures = sorted(p.suffix for p in (folder / name / "figures").iterdir())
    assert figures.count(".pdf") == figures.count(".png") == figures.count(".md") >= 1


def test_the_same_run_gives_the_same_bytes(folder, tmp_path):
    name = "03_massive_tokens_fp16"
    done = lab("run", name, "--profile", "smoke", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (f / name / "result.json" for f in (folder, tmp_path))
    assert first.read_bytes() == second.read_bytes()


def test_runs_from_the_notebooks_folder(tmp_path):
    """As in JupyterLab: the kernel starts beside the notebook, not in the project's root."""
    values = {"model": "tiny:llama", "corpus": "pydoc", "seqlen": 64, "calibration": 1}
    values |= {"dtype": "float32", "device": "cpu", "threads": 1, "folder": str(tmp_path)}
    values |= {"site": "layers.1.mlp", "tokens": 32, "seed": 0}
    notebook = nbformat.read(ROOT / "notebooks" / "01_rotation_invariance.ipynb", 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(notebook, kernel_name="python3", resources=resources).execute()
    assert (tmp_path / "01_rotation_invariance" / "result.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "windos", "3"), "no parameter 'windos'"),
        (("-p", "windows", "three"), "windows = 'three' is not of type int"),
        (("-p", "windows", "true"), "windows = True is not of type int"),
        (("-p", "seeds", "7"), "seeds = 7 is not of type list"),
        (("--profile", "huge"), "profile 'huge' is unknown"),
        (("-p", "corpus", "/nowhere.txt"), "unknown corpus '/nowhere.txt'"),
        (("-p", "seeds", "[0, x]"), "parameter seeds[1] = 'x' is not of type int"),
        (("-p", "bits", "17-4-16"), "parameter bits = '17-4-16': each is 2 to 16"),
    ],
)
def test_bad_parameters_are_one_line_and_nothing_runs(arguments, message, tmp_path):
    done = lab("run", "03", "--profile", "smoke", "--folder", tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_notebook_lists_the_known_ones():
    done = lab("run", "99", "--profile", "smoke")
    assert done.returncode != 0
    assert all(name in done.stderr for name in NAMES)


def test_a_failing_notebook_is_kept_and_named(tmp_path):
    done = lab("run", "02", "--profile", "smoke", "--folder", tmp_path, "-p", "seqlen", 7654321)
    assert done.returncode != 0
    assert "7654321 needed" in done.stderr
    executed = tmp_path / "02_ro_vs_rh_error" / "notebook.failed.ipynb"
    assert str(executed) in done.stderr
    assert "7654321 needed" in executed.read_text()
    assert sorted(p.name for p in executed.parent.iterdir()) == [executed.name]
    assert "CorpusError" not in done.stderr


def test_too_short_a_corpus_is_refused(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Ten words are not enough for a window.\n\nNor are these.\n")
    done = lab("run", "01", "--profile", "smoke", "--folder", tmp_path / "r", "-p", "corpus", text)
    assert done.returncode != 0
    assert "short.txt" in done.stderr


@pytest.mark.parametrize("profile", profiles.names())
@pytest.mark.parametrize("name", NAMES)
def test_every_profile_fits_every_notebook(profile, name):
    values = notebooks.resolve(notebooks.find(name, ROOT), profile, {})
    known = notebooks.parameters(notebooks.find(name, ROOT))
    assert set(values) <= set(known)


@pytest.mark.parametrize("key", ["03", "'03'", "03_massive_tokens_fp16"])
def test_a_profile_may_name_a_notebook_by_its_number(key, tmp_path):
    profile = tmp_path / "mine.yml"
    profile.write_text(f"base: smoke\nnotebooks: {{{key}: {{windows: 7}}, 08: {{tokens: 5}}}}\n")
    notebooks.check_profile(str(profile), ROOT / "notebooks")
    values = notebooks.resolve(notebooks.find("03", ROOT), str(profile), {})
    assert values["windows"] == 7
    assert values["side_windows"] == profiles.load("smoke")["notebooks"][NAMES[2]]["side_windows"]
    assert notebooks.resolve(notebooks.find("08", ROOT), str(profile), {})["tokens"] == 5


def test_notebook_defaults_are_the_demo_profile():
    for name in NAMES:
        known = notebooks.parameters(notebooks.find(name, ROOT))
        values = notebooks.resolve(notebooks.find(name, ROOT), "demo", {})
        assert {n: known[n][1] for n in values} == values


def test_a_number_needs_no_zero_and_a_folder_without_notebooks_is_told(tmp_path):
    assert notebooks.find("3", ROOT) == notebooks.find("03", ROOT)
    with pytest.raises(notebooks.NotebookError, match="run this from a checkout of the project"):
        notebooks.find("03", tmp_path)


def test_no_seeds_are_refused():
    file = notebooks.find("03", ROOT)
    with pytest.raises(notebooks.NotebookError, match=r"seeds = \[\] is empty"):
        notebooks.resolve(file, "smoke", {"seeds": []})

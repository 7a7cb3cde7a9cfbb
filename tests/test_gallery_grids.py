"""Experiments in the gallery: a page each, laid out by its axes; a batch ends with its gallery."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from test_gallery import CLAIMS, check

from dfrot_lab import experiments, files, gallery
from dfrot_lab.cli import app
from dfrot_lab.gallery import entries, grids

ROOT = Path(__file__).parents[1]


@pytest.fixture
def trial(tmp_path):
    """(root, experiment): a grid of bits × seeds over notebook 03, whose last point has no result."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "notebooks").symlink_to(ROOT / "notebooks")
    lists = {"bits": ["16-4-16", "16-8-16", "16-16-16"], "seeds": [[0], [1]]}
    content = {"trial": {"notebooks": ["03"], "grid": lists}}
    (root / "experiments.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    found = experiments.find("trial", "smoke", root)
    for i, point in enumerate(found.points[:-1]):
        row = {
            "rotation": "RH",
            "bits": point.values["bits"],
            "keep": "none",
            "gamma": None,
            "method": None,
        }
        rows = [
            row | {"mean": 30 + i, "sd": 0.5, "n": 1 + i},
            row | {"rotation": "RO", "mean": "inf", "sd": 0, "n": 1},
        ]
        claim = CLAIMS[0] | {"agrees": i != 1}
        home = root / point.folder / found.notebooks[0]
        files.write_json(home / "result.json", {"claims": [claim], "table": rows})
        about = {
            "commit": "0123456789abcdef",
            "dirty": i == 0,
            "processor": "Abacus",
            "finished": "2026",
            "seconds": 3.5,
        }
        files.write_json(home / "provenance.json", about)
    experiments.summarize(found)
    return root, found


def test_an_experiment_becomes_a_page(tmp_path, trial):
    root, found = trial
    shown = gallery.build([root / "results" / "smoke"], tmp_path / "site", root)
    assert shown["results/smoke"] == ["experiment trial"]
    pages = check(tmp_path / "site")
    assert "experiment-trial.html" in [a.get("href") for a in pages["index.html"].all("a")]
    text = (tmp_path / "site" / "experiment-trial.html").read_text()
    assert "<strong>5 of 6</strong> runs have results" in text
    assert "3 × <code>bits</code>, 2 × <code>seeds</code>" in text
    assert f"{found.points[-1].name}/{found.notebooks[0]}" in text  # what is missing
    assert "Abacus" in text and "0123456789 and changes" in text
    made = tmp_path / "site" / "experiment-trial"
    own = root / found.folder
    assert (made / "summary.csv").read_text() == (own / "summary.csv").read_text()
    assert files.read_json(made / "summary.json") == files.read_json(own / "summary.json")


def test_a_grid_is_laid_out_by_its_axes(trial):
    root, _ = trial
    (grid,) = grids.read([root / "results" / "smoke"], root, entries.Scrubber())
    measured, claims = grid.tables
    assert (measured.across, measured.names) == ("bits", ("of", "seeds"))
    assert (measured.what, claims.what) == ("perplexity", "claims")
    assert measured.values == claims.values == ("16-4-16", "16-8-16", "16-16-16")
    rows = {names: [c and c.text for c in cells] for names, cells in measured.rows}
    assert rows == {  # the bits are in the header; an sd only of several seeds; ∞ as it is
        ("RH, keep none", "[0]"): ["30.00", "32.00 ± 0.50", "34.00 ± 0.50"],
        ("RH, keep none", "[1]"): ["31.00 ± 0.50", "33.00 ± 0.50", None],
        ("RO, keep none", "[0]"): ["∞", "∞", "∞"],
        ("RO, keep none", "[1]"): ["∞", "∞", None],
    }
    assert [[c and c.holds for c in cells] for _, cells in claims.rows] == [
        [True, True, True], [False, True, None],
    ]  # fmt: skip
    assert claims.rows[0][1][0].text == CLAIMS[0]["ours"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"rows": [], "missing": []}'])
def test_a_summary_that_cannot_be_read_names_the_command(trial, tmp_path, text):
    root, found = trial
    (root / found.folder / "summary.json").write_text(text)
    with pytest.raises(gallery.GalleryError, match="batch --experiment trial` again"):
        gallery.build([root / "results" / "smoke"], tmp_path / "site", root)
    assert not (tmp_path / "site").exists()


def test_the_command_takes_the_profile_of_the_experiment(trial, monkeypatch):
    root, _ = trial
    (root / "Snakefile").touch()
    content = yaml.safe_load((root / "experiments.yml").read_text())
    content["trial"]["profile"] = "smoke"
    (root / "experiments.yml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(root)
    done = CliRunner().invoke(app, ["gallery", "--experiment", "trial"])
    assert done.exit_code == 0, done.output
    assert "from results/smoke: experiment trial" in done.output
    assert (root / "results/smoke/gallery/experiment-trial.html").is_file()


@pytest.fixture
def make(tmp_path):
    """Runs make with a stand-in for dfrot-lab; returns (exit status, stderr, the calls)."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    stand_in = bin / "dfrot-lab"
    stand_in.write_text('#!/bin/sh\necho "$@" >> calls\n[ "$1" != "$FAILS" ]\n')
    stand_in.chmod(0o755)
    (tmp_path / ".venv" / ".ready").touch()

    def run(*asked, fails=""):
        (tmp_path / "calls").unlink(missing_ok=True)
        given = {k: v for k, v in os.environ.items() if k not in ("PROFILE", "MAKEFLAGS")}
        done = subprocess.run(
            ["make", *asked], cwd=tmp_path, env=given | {"FAILS": fails}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stderr, (tmp_path / "calls").read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("asked", "batch", "site"),
    [
        (["figures"], "batch --profile demo --cores all", "gallery --profile demo"),
        (["figures", "PROFILE=smoke"], "batch --profile smoke --cores all", "gallery --profile smoke"),
        (["batch", "PROFILE=full"], "batch --cores all --profile full --all", "gallery --profile full"),
        (["batch", "EXPERIMENT=bits"], "batch --cores all --experiment bits", "gallery --experiment bits"),
    ],
)  # fmt: skip
def test_a_batch_ends_with_its_gallery(make, asked, batch, site):
    assert make(*asked) == (0, "", [batch, site])
    status, said, calls = make(*asked, fails="batch")
    assert status and calls == [batch] and "gallery" not in said
    status, said, calls = make(*asked, fails="gallery")
    assert status and calls == [batch, site]
    assert "The batch succeeded and its results are whole; only the gallery was not built" in said

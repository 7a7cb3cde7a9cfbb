"""`recommended` beside the published method: a run at toy sizes, and the table of docs/optimiser.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import recommended
from dfrot_lab import evaluation, files, lab, rotations

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(output, the numbers, the lab's folder) of a run on the smoke profile."""
    work = tmp_path_factory.mktemp("recommended")
    ask = ["--profile", "smoke", "--folder", str(work / "lab"), "--seeds", "0,1", "--first", "2"]
    ask += ["--last", "3", "--out", str(work / "r.json")]
    done = CliRunner().invoke(recommended.main, ask)
    assert done.exit_code == 0, done.output
    return done.output, files.read_json(work / "r.json"), work / "lab", ask


def test_every_method_is_measured_at_every_setting(measured):
    output, found, *_ = measured
    rows = found["rows"]
    cells = {(r["rotation"], r["bits"], r["weights"], r["seed"]) for r in rows}
    assert len(rows) == len(cells) == (4 + 4 + 3) * 2
    assert all(len(r["nll"]) == 2 for r in rows) and found["about"]["windows"] == [2, 3]
    assert recommended.markdown(rows) in output


def test_differences_are_paired_by_window_after_the_mean_over_seeds():
    rows = [
        {"rotation": m, "keep": "none", "seed": seed, "bits": bits, "weights": weights}
        | {"nll": [3.0 + i + seed, 4.0 + 2 * i + seed]}
        for i, m in enumerate(recommended.METHODS)
        for seed in (0, 1)
        for bits, weights in recommended.SETTINGS
    ]
    line = recommended.markdown(rows).splitlines()[-1]
    d = evaluation.paired_difference([6.5, 10.5], [4.5, 6.5])
    assert line.startswith(f"| recommended − dfrot, nats a token | +{d['mean']:.3f} [")


def test_the_released_settings_are_what_is_said(measured):
    folder = measured[2]
    [file] = (folder / "artefacts" / "rotations").glob("*-sym-seed0-qr-100steps.safetensors")
    r, about = rotations.load(file)
    assert (about["rows"], about["iterations"], about["symmetric"]) == (1.0, 100, True)
    assert about["qr"] is True and about["gamma"] == "100.0"
    rotations.check(r, len(r), "R1")


def test_nothing_is_measured_twice(measured, monkeypatch):
    *_, ask = measured
    monkeypatch.setattr(lab.Lab, "_built", lambda *_: pytest.fail("built again"))
    done = CliRunner().invoke(recommended.main, ask)
    assert done.exit_code == 0, done.output


def test_the_committed_numbers_are_those_of_the_page():
    rows = files.read_json(ROOT / "figures" / "recommended.json")["rows"]
    mark = recommended.MARK
    text = f"{mark}\n{recommended.markdown(rows)}\n{mark}"
    assert text in (ROOT / "docs" / "optimiser.md").read_text()

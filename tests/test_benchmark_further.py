"""What notebook 9 leaves out, at toy sizes: every row is measured, and once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import further
from dfrot_lab import dfrot
from dfrot_lab.cli import options
from dfrot_lab.studies import questions

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(output, document, what was asked) of a run on the smoke profile."""
    work = tmp_path_factory.mktemp("further")
    ask = ["--profile", "smoke", "--folder", str(work / "lab"), "--seeds", "0,1", "--first", "2"]
    ask += ["--last", "3", "--second", "demo", "--out", str(work / "f.json")]
    done = CliRunner().invoke(further.main, ask)
    assert done.exit_code == 0, done.output
    return done.output, json.loads((work / "f.json").read_text()), ask, work


def test_every_row_is_measured(measured):
    output, found, *_ = measured
    rows = found["rows"]
    assert len(rows) == 2 * 2 + (1 + 3 * 2) + 4 * 2 * 2
    assert all(len(r["nll"]) == 2 for r in rows)
    assert all(len(r["second"]) == 2 for r in rows if r["part"] == "methods")
    assert further.markdown(rows, "demo") in output
    fp = next(r for r in rows if r["rotation"] == "FP")
    quantized = [r["nll"] for r in rows if r["part"] == "prefixed" and r["rotation"] != "FP"]
    assert fp["nll"] not in quantized and fp["new"] != fp["nll"]


def test_rows_that_are_there_are_not_measured_again(measured, monkeypatch):
    _, found, ask, _ = measured
    monkeypatch.setattr(further.Bench, "measure", lambda *_: pytest.fail("measured again"))
    done = CliRunner().invoke(further.main, ask)
    assert done.exit_code == 0 and further.markdown(found["rows"], "demo") in done.output


def test_refined_again_sees_every_window_of_the_quantized_model(measured, monkeypatch):
    work = measured[-1]
    lab = options.lab("smoke", work / "lab").with_calibration(2)
    r, seen = lab.rotation("RH", 0), []
    real = dfrot.optimize
    monkeypatch.setattr(dfrot, "optimize", lambda x, *a, **k: seen.append(x) or real(x, *a, **k))
    questions.refined_again(lab, lab.lm, r, 2, "kurtosis")
    (x,) = seen
    # the model that is not quantized puts out what was collected from it, in another basis
    assert torch.allclose(x.X, lab.activations.X @ r.mT.float(), atol=1e-4)


def test_the_committed_numbers_are_those_of_the_page():
    document = json.loads((ROOT / "figures" / "further.json").read_text())
    text = further.markdown(document["rows"], document["settings"]["second"])
    page = (ROOT / "docs" / "optimiser.md").read_text()
    assert f"{further.MARK}\n{text}\n{further.MARK}" in page

"""The refinement benchmark on a tiny model: each number is what it says, and no row is measured twice."""

import json
import math
import re
import statistics
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import refinement
from benchmarks.refinement import Bench, Plan
from dfrot_lab import dfrot, rotations
from dfrot_lab.activations import Activations, capture
from dfrot_lab.lab import Lab

SHORT = ["--profile", "smoke", "--first", "2", "--last", "3", "--steps", "4", "--relaxed", "3"]
SHORT += ["--limit", "15", "--draws", "2"]


def run(folder, *more: str):
    asked = [*SHORT, "--folder", str(folder / "lab"), "--out", str(folder / "new" / "r.json")]
    return CliRunner().invoke(refinement.main, [*asked, *more])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(folder, output, document) of a run with two seeds."""
    folder = tmp_path_factory.mktemp("refinement")
    done = run(folder, "--seeds", "0,1")
    assert done.exit_code == 0, done.output
    return folder, done.output, json.loads((folder / "new" / "r.json").read_text())


def of(document: dict, **wanted) -> list[dict]:
    return [r for r in document["rows"] if wanted.items() <= r.items()]


def test_every_job_has_its_row(toy):
    _, _, document = toy
    plan = Plan(first=2, last=3, steps=4, relaxed=3, limit=15)
    jobs = plan.jobs([0, 1], 2)
    assert len(document["rows"]) == len(jobs) == 6 * 2 + 2 * 2 * 2 + 2 * 2 * 4
    for job, row in zip(jobs, document["rows"], strict=True):
        assert job.items() <= row.items()
    assert document["settings"]["model"] == "tiny:llama"
    asked = {"calibration": 1, "calibration_seed": 0, "rows": 1.0}
    assert asked.items() <= document["settings"]["lab"].items()
    assert document["provenance"]["threads"] == 1 and "date" in document["provenance"]


def test_rows_are_what_a_lab_measures_and_what_optimize_gives(toy):
    folder, _, document = toy
    lab = Lab(
        model="tiny:llama", corpus="pydoc", seqlen=96, iterations=4, clip_steps=4, threads=1,
        folder=folder / "lab",
    )  # fmt: skip
    (row,) = of(document, part="perplexity", way="RH", seed=1)
    assert row["nll"] == lab.perplexity("RH", 1, windows=3)["nll"][1:]
    (row,) = of(document, part="perplexity", way="svd", seed=1)
    assert (row["rows"], row["steps"]) == (lab.activations.X[..., 0].numel(), 4)
    r, _ = dfrot.optimize(
        lab.activations, lab.rotation("RH", 1), refinement.SPEC, refinement.WEIGHTING,
        iterations=4, solver="svd",
    )  # fmt: skip
    path = lab.folder / "artefacts" / "refinement" / "svd-seed1.safetensors"
    assert torch.equal(rotations.load(path)[0], r)
    assert row["nll"] == lab.perplexity(str(path), 1, windows=3)["nll"][1:]
    tokens = lab.evaluation_tokens(3)[1:]
    held = [[y for _, _, y in capture(lab.lm, w[None])] for w in tokens]
    x = Activations.of(torch.cat([torch.cat(window, 1) for window in held], 1))
    found = dfrot.loss(x, r, refinement.SPEC, refinement.WEIGHTING)
    assert row["held"] == pytest.approx(found, rel=1e-5)


def test_ways_differ_in_what_they_say(toy):
    _, _, document = toy
    rows = {r["way"]: r for r in of(document, part="perplexity", seed=0)}
    assert rows["fast"]["held"] == pytest.approx(rows["svd"]["held"], rel=1e-3)
    assert all(rows[w]["held"] < rows["RH"]["held"] for w in Plan().ways)
    assert [rows[w]["steps"] for w in Plan().ways] == [4, 4, 3, 3, 3]
    whole = rows["fast"]["rows"]
    assert rows["relaxed"]["rows"] == whole
    for way in ("uniform", "importance"):
        assert 0.05 * whole < rows[way]["rows"] < 0.3 * whole
        held = [r["held"] for r in of(document, part="sampling", way=way, seed=0)]
        assert len(set(held)) == 2  # another draw, another result


def test_a_stop_is_a_prefix_of_the_whole_run(toy):
    _, _, document = toy
    for row in of(document, part="stop"):
        (whole,) = of(document, part="stop", relax=row["relax"], seed=row["seed"], stop=0.0)
        assert 11 <= row["steps"] <= whole["steps"] == 15
        if row["steps"] == 15:
            assert row["loss"] == whole["loss"] and row["held"] == whole["held"]


def test_tables_are_markdown_and_carry_the_means(toy):
    _, output, document = toy
    tables = [t.splitlines() for t in re.findall(r"(?:^\|.*\|\n)+", output, re.M)]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
        assert re.fullmatch(r"(\| --- )+\|", table[1])
    assert [len(t) - 2 for t in tables] == [6, 3, 6]
    ppl = [math.exp(statistics.fmean(r["nll"])) for r in of(document, part="perplexity", way="svd")]
    assert f"| {statistics.fmean(ppl):.2f} ± {statistics.stdev(ppl):.2f} | – |" in tables[0][3]
    assert tables[1][2].endswith("| 1.0000 ± 0.0000 |")
    ratios = [
        r["held"] / of(document, part="perplexity", way="fast", seed=r["seed"])[0]["held"]
        for r in of(document, part="sampling", way="importance")
    ]
    assert f"{statistics.fmean(ratios):.4f} ± {statistics.stdev(ratios):.4f}" in tables[1][4]


def test_what_is_lost_by_a_stop_is_counted_against_all_steps():
    rows = [
        {"part": "stop", "relax": omega, "stop": stop, "seed": s, "steps": steps + s, "loss": loss,
         "held": 2 * loss}
        for omega in (1.0, refinement.OMEGA)
        for stop, steps, loss in ((0.0, 300, 1.0), (1e-2, 40, 1.05), (3e-3, 80, 1.02), (1e-3, 120, 1.01))
        for s in (0, 2)
    ]  # fmt: skip
    table = refinement.by_stop(rows, Plan()).splitlines()
    assert table[2] == "| 1 | 0.01 | 41 (40–42) | 259 | 5.00 ± 0.00 % | 5.00 ± 0.00 % |"


def test_nothing_is_measured_twice_and_more_seeds_are_added(toy, monkeypatch):
    folder, _, document = toy
    monkeypatch.setattr(Bench, "measure", lambda *a: pytest.fail("measured again"))
    again = run(folder, "--seeds", "0,1")
    assert again.exit_code == 0, again.output
    assert json.loads((folder / "new" / "r.json").read_text()) == document
    one = run(folder, "--seeds", "1")  # of the rows there are, those that are asked for
    assert one.exit_code == 0 and "| 1 | 0.01 |" in one.output


def test_rows_are_kept_as_they_come(tmp_path, monkeypatch):
    real, measured = Bench.measure, []

    def three(self, job):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(job)
        return real(self, job)

    monkeypatch.setattr(Bench, "measure", three)
    assert run(tmp_path, "--seeds", "0").exit_code != 0
    kept = json.loads((tmp_path / "new" / "r.json").read_text())["rows"]
    assert [{k: r[k] for k in job} for r, job in zip(kept, measured, strict=True)] == measured
    monkeypatch.setattr(Bench, "measure", lambda self, job: measured.append(job) or job)
    run(tmp_path, "--seeds", "0")  # the tables cannot be made of these rows
    assert len(measured) == 6 + 4 + 8 and measured[3]["way"] != measured[2]["way"]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--steps", "5"], "resume: steps was 4 and is 5 now; measurements are not mixed"),
        (["--first", "1"], "resume: first was 2 and is 1 now"),
    ],
)
def test_rows_of_other_settings_are_not_mixed(toy, more, said):
    done = run(toy[0], *more)
    assert done.exit_code == 1 and said in done.output


def test_one_window_has_no_interval(tmp_path):
    done = run(tmp_path, "--first", "3")
    assert done.exit_code == 2 and "an interval needs two windows" in done.output


def test_the_committed_numbers_are_those_of_the_page():
    root = Path(__file__).parents[1]
    document, mark = json.loads((root / "figures" / "refinement.json").read_text()), refinement.MARK
    known = {f.name for f in fields(Plan)}
    plan = Plan(**{k: v for k, v in document["settings"].items() if k in known})
    text = f"{mark}\n{refinement.markdown(document['rows'], plan)}\n{mark}"
    assert text in (root / "docs" / "optimiser.md").read_text()

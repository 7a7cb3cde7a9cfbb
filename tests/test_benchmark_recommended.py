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
    assert len(rows) == len(cells) == 5 * 3 * 2
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
    d = evaluation.paired_difference([7.5, 12.5], [4.5, 6.5])
    assert line.startswith(f"| recommended − dfrot, nats a token | +{d['mean']:.3f} [")


def test_differences_are_paired_by_seed_after_the_mean_over_windows():
    nll = {"dfrot": [[5.0, 3.0], [2.0, 2.0], [9.0, 7.0]], "recommended": [[2, 2], [1, 4], [5, 5]]}
    rows = [
        {"rotation": m, "seed": seed, "bits": "4-4-16", "weights": "rtn", "nll": nll[m][seed]}
        for m in nll
        for seed in (2, 0, 1)
    ]
    head, _, *lines = recommended.markdown(rows, "seeds").splitlines()
    d = evaluation.paired_difference([2.0, 2.5, 5.0], [4.0, 2.0, 8.0])
    wanted = f"−{-d['mean']:.3f} [−{-d['low']:.3f}, +{d['high']:.3f}], 2 of 3"
    assert lines[-1] == f"| recommended − dfrot, nats a token | {wanted} |"
    assert head == "|  | 4-4-16, RTN |" and len(lines) == 3  # no row for what was not measured


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (
            ["--methods", "RH,dfort"],
            "dfort: use some of RH, dfrot, as released, kurtosis γ = 10, recommended",
        ),
        (["--methods", "RH,recommended"], "add dfrot"),
        (["--pairs", "seeds", "--seeds", "3"], "seeds 3: give two or more"),
    ],
)
def test_a_table_without_what_it_compares_is_refused_at_once(ask, said, tmp_path):
    done = CliRunner().invoke(recommended.main, [*ask, "--out", str(tmp_path / "r.json")])
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split())


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


@pytest.mark.parametrize(
    ("name", "pairs", "mark"),
    [
        ("recommended.json", "windows", recommended.MARK),
        ("recommended_seeds.json", "seeds", recommended.SEEDS_MARK),
    ],
)
def test_the_committed_numbers_are_those_of_the_page(name, pairs, mark):
    rows = files.read_json(ROOT / "figures" / name)["rows"]
    text = f"{mark}\n{recommended.markdown(rows, pairs)}\n{mark}"
    assert text in (ROOT / "docs" / "optimiser.md").read_text()

"""Study 09 on a tiny model: what ranks, what is compared, what is kept."""

from dataclasses import replace

import pytest

from dfrot_lab import presets
from dfrot_lab.lab import Lab, LabError
from dfrot_lab.presets import PRESETS, Preset
from dfrot_lab.studies import alternatives, unseen
from dfrot_lab.studies import objectives as study


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(
        model="tiny:llama", corpus="pydoc", seqlen=32, calibration=2, iterations=3, clip_steps=2,
        weight_windows=8, threads=1, folder=tmp_path,
    )  # fmt: skip


def row(objective: str, gamma: str, start: str, ppl: float, rtn: float = 9.0) -> dict:
    found = {"16-4-16": ppl, "4-4-16": rtn}
    return {"objective": objective, "gamma": gamma, "start": start, "ppl": found}


SCREENED = [
    row("none", "none", "RH", 1.0, 1.0),
    row("centroids", "1.0", "RH", 5.0),
    row("centroids", "100.0", "RH", 3.0, 5.0),
    row("whip", "1.0", "RH", 4.0),
    row("whip", "1.0", "RO", 2.0, 6.0),
    row("corners", "1.0", "RH", 6.0),
    row("corners", "1.0", "RO", 7.0, 4.0),
]


def test_the_best_of_each_objective_rank_from_both_starts():
    found = study.top(SCREENED, ["16-4-16"], 2)
    assert [(r["objective"], r["gamma"], r["start"]) for r in found] == [
        ("whip", "1.0", "RO"),
        ("centroids", "100.0", "RH"),
    ]


def test_each_setting_puts_its_best_forward_once():
    found = study.top(SCREENED, ["16-4-16", "4-4-16"], 2)
    assert [study.labelled(r) for r in found] == [
        "Whip (DartQuant), γ = 1, from RO",
        "int4 centroids (DFRot), γ = 100",
        "cube corners (ConQuR), γ = 1, from RO",
    ]


def test_infinite_perplexities_rank_last():
    rows = [row("whip", "1.0", "RH", float("inf")), row("corners", "1.0", "RO", 5.0)]
    assert [r["objective"] for r in study.top(rows, ["16-4-16"])] == ["corners", "whip"]


def test_windows_behind_those_that_rank(lab):
    there = len(lab.evaluation_tokens(0))
    assert unseen.behind(lab, 2, 4) == slice(2, 6)
    assert unseen.behind(lab, 2, 0) == slice(2, there)
    for windows, count in ((0, 4), (0, 0), (there - 1, 0), (2, 1), (2, there - 1)):
        with pytest.raises(ValueError, match=f"windows = {windows}, confirm_windows = {count}: "):
            unseen.behind(lab, windows, count)


def test_confirmed_on_windows_behind_those_that_rank(lab, monkeypatch):
    quick = Preset(objective="kurtosis", windows=8, iterations=2)
    monkeypatch.setitem(PRESETS, "recommended", quick)
    chosen = [row("whip", "1.0", "RO", 2.0), row("centroids", "100.0", "RH", 3.0)]
    rows = study.confirm(lab, chosen, [0, 1], slice(1, 3), "4-4-16", None)
    names = ["RH", "dfrot", "recommended", study.AS_MUCH, "Whip (DartQuant), γ = 1, from RO"]
    assert [(r["method"], r["seed"]) for r in rows] == [(n, s) for n in names for s in (0, 1)]
    whole = lab.perplexity("RH", 1, windows=3, bits="4-4-16", method=study.GPTQ)["nll"]
    assert rows[1]["nll"] == whole[1:] and len(whole) == 3
    path = Preset(objective="whip", gamma=1.0).rotation_file(lab, 0, "RO")
    assert (
        rows[-2]["nll"]
        == lab.perplexity(str(path), 0, windows=3, bits="4-4-16", method=study.GPTQ)["nll"][1:]
    )


def test_screening_measures_every_pair_and_the_starts(lab):
    rows = study.screen(lab, ["centroids", "corners"], [1.0, 10.0], 0, 1, ["16-4-16"])
    assert len(rows) == 2 + 2 * 2 * 2
    assert {(r["objective"], r["start"]) for r in rows} == {
        (o, s) for o in ("none", "centroids", "corners") for s in ("RH", "RO")
    }
    assert all(r["ppl"]["16-4-16"] > 1 for r in rows)
    files = sorted(p.name for p in (lab.folder / "artefacts" / "rotations").glob("*.safetensors"))
    assert len(files) == 8 and len([f for f in files if "corners" in f]) == 4


def test_more_windows_use_as_many_normal_rows(lab):
    preset = Preset(windows=8, iterations=5)
    more = preset.lab(lab)
    assert (more.calibration, more.rows) == (8, 0.25)
    assert more.activations.X.shape[1] == 4 * lab.activations.X.shape[1]
    assert more.lm is lab.lm
    assert Preset(windows=2).lab(lab) is lab
    cost = 5 * (4 * 4 * 64 * 64**2 + 26 * 64**3) / 1e12
    assert preset.cost(lab) == pytest.approx(cost)


def test_presets_have_their_names():
    assert PRESETS["dfrot"] == Preset() and PRESETS["dfrot"].gamma == 100.0
    assert set(presets.PRESETS) == {"dfrot", "recommended"}


def test_the_task_loss_reference_is_made_once(lab, monkeypatch):
    rows = alternatives.by_task_loss(lab, ["RH"], 0, 2, 16, slice(1, 2))
    monkeypatch.setattr(alternatives.cayley, "refine", None)
    assert alternatives.by_task_loss(lab, ["RH"], 0, 2, 16, slice(1, 2)) == rows
    assert rows[0]["tokens"] == 32 and len(rows[0]["losses"]) == 2 and rows[0]["cost"] > 0


def test_the_task_loss_reference_is_made_anew_for_another_text_or_code(lab, monkeypatch):
    made, refine = [], alternatives.cayley.refine
    monkeypatch.setattr(
        alternatives.cayley, "refine", lambda *a, **k: (made.append(k["whose"]), refine(*a, **k))[1]
    )
    for other in (lab, replace(lab, calibration_seed=1)):
        alternatives.by_task_loss(other, ["RH"], 0, 2, 16, slice(1, 2))
    monkeypatch.setattr("dfrot_lab.results.code_digest", lambda *names: "other code")
    again = replace(lab, calibration_seed=1)
    alternatives.by_task_loss(again, ["RH"], 0, 2, 16, slice(1, 2))
    assert len(set(made)) == 3
    with pytest.raises(LabError, match=f"cayley_length = 1000: use 1 to seqlen, {lab.seqlen}"):
        alternatives.by_task_loss(lab, ["RH"], 0, 2, 1000, slice(1, 2))


def test_prefix_rows(lab, monkeypatch):
    quick = Preset(objective="kurtosis", windows=8, iterations=2)
    monkeypatch.setitem(PRESETS, "recommended", quick)
    found = alternatives.by_prefix(lab, 0, slice(1, 2))
    monkeypatch.setattr(alternatives.prefix, "perplexity", lambda *_: pytest.fail("measured again"))
    assert alternatives.by_prefix(lab, 0, slice(1, 2)) == found
    assert found["prefix"]
    assert [r["rotation"] for r in found["rows"]] == ["RH", "dfrot", "recommended"]
    assert found["rows"][0]["plain"] != found["rows"][0]["prefixed"]


def test_values_refined_for_each_head(lab, monkeypatch):
    quick = Preset(objective="kurtosis", gamma=100.0, windows=8, iterations=2)
    monkeypatch.setitem(PRESETS, "recommended", quick)
    rows = alternatives.by_values(lab, ["centroids", "kurtosis"], [0, 1], slice(1, 2))
    assert [(r["values"], r["seed"]) for r in rows] == [
        (v, s) for s in (0, 1) for v in ("Hadamard", "centroids", "kurtosis")
    ]
    assert rows[1]["after"] < rows[1]["before"]
    assert len({r["ppl"] for r in rows}) == 6
    monkeypatch.setattr(alternatives.evaluation, "perplexity", None)  # all of it is kept
    assert alternatives.by_values(lab, ["centroids", "kurtosis"], [0, 1], slice(1, 2)) == rows
    table = alternatives.values_table({"values": rows})
    assert len(table.rows) == 3 and "→" in table.rows[1][2]

"""Study 10 on a tiny model, and its arithmetic on numbers made for it."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from dfrot_lab import accuracy_tables, evaluation
from dfrot_lab.lab import Lab
from dfrot_lab.studies import zero_shot as study
from dfrot_lab.text_tasks import TaskError


def model(name: str, seed: int, bits: str, ppl: float, correct: list[int], logp: list[float]):
    """A row of `study.measure` with two tasks, the second all right."""
    about = {"metric": "acc", "items": len(logp), "tokens": 9, "hash": "0", "version": "1.0"}
    about["lm_eval"] = "0.4.13"
    tasks = [
        about | {"task": t, "correct": c, "logp": p}
        | {"accuracy": statistics.fmean(c), "target_logp": statistics.fmean(p)}
        for t, c, p in (("one", correct, logp), ("two", [1] * len(logp), [v / 2 for v in logp]))
    ]  # fmt: skip
    return {
        "rotation": name, "seed": seed, "bits": bits, "gamma": None, "method": "rtn", "ppl": ppl,
        "windows": 2, "tasks": tasks,
    }  # fmt: skip


def made() -> list[dict]:
    return [
        model("FP", 0, "16-16-16", 20.0, [1, 1, 1, 0], [-1.0, -2.0, -1.5, -4.0]),
        model("NR", 0, "4-4-16", 9e3, [0, 0, 0, 0], [-9.0, -9.5, -9.2, -9.9]),
        model("RO", 0, "4-4-16", 40.0, [1, 0, 0, 0], [-3.0, -4.0, -3.5, -6.0]),
        model("RO", 1, "4-4-16", 42.0, [0, 0, 1, 0], [-3.5, -4.0, -3.0, -6.5]),
        model("RH", 0, "4-4-16", 30.0, [1, 1, 0, 0], [-2.0, -3.0, -2.5, -5.0]),
        model("RH", 1, "4-4-16", 31.0, [1, 0, 0, 0], [-2.0, -3.2, -2.5, -5.5]),
        model("DFRot(RH)", 0, "4-4-16", 28.0, [1, 1, 1, 0], [-1.5, -2.5, -2.0, -4.5]),
        model("DFRot(RH)", 1, "4-4-16", 29.0, [1, 1, 0, 0], [-1.5, -2.6, -2.1, -4.5]),
    ]


def test_differences_are_paired_by_item_over_the_mean_of_seeds():
    rows = {(r["a"], r["b"], r["task"]): r for r in study.differences(made())}
    found = rows["DFRot(RH)", "RH", "one"]
    a, b = [1, 1, 0.5, 0], [1, 0.5, 0, 0]
    assert found["correct"] == evaluation.paired_difference(a, b)
    assert rows["DFRot(RH)", "RH", "two"]["correct"]["mean"] == 0
    both = rows["DFRot(RH)", "RH", "mean of tasks"]["correct"]
    assert both["mean"] == pytest.approx(found["correct"]["mean"] / 2)
    half = found["correct"]["high"] - found["correct"]["mean"]
    assert both["high"] - both["mean"] == pytest.approx(half / 2)  # the other's is 0


def test_perplexity_and_accuracy_rank_alike_or_not():
    first, second = study.ranks(study.averages(made()))
    assert (first["value"], second["value"]) == ("accuracy", "logp")
    assert [r["methods"] for r in (first, second)] == pytest.approx([1.0, 1.0])
    assert first["n"] == 8 and len(first["names"]) == 5
    other = [r | {"ppl": 1 / r["ppl"]} for r in study.averages(made())]
    assert study.ranks(other)[0]["methods"] == pytest.approx(-1.0)


def test_claims_follow_the_numbers():
    result = study.summary(made())
    assert [c.agrees for c in study.claims(result)][:2] == [True, True]
    worse = made()
    worse[0]["tasks"][0] |= {"correct": [0, 0, 0, 0], "accuracy": 0.0}
    claims = study.claims(study.summary(worse))
    assert not claims[0].agrees and claims[1].agrees and not claims[-1].agrees
    assert "FP16 69.82, DFRot 66.83, RH 66.03" in claims[0].paper
    assert claims[-1].paper.endswith("of 8 settings (README)")
    noisy = study.summary(made())
    for r in noisy["differences"]:
        r["correct"]["low"] = -0.1
    assert not next(c for c in study.claims(noisy) if "noise, by accuracy" in c.claim).agrees


def test_a_model_that_overflows_is_not_a_number_and_no_claim():
    rows = made()
    rows[2]["tasks"][0]["logp"][1] = math.nan
    result = json.loads(json.dumps(study.summary(rows)))
    claims = study.claims(result)
    assert claims[0].agrees and not claims[1].agrees


def test_tables_show_ours_beside_the_papers():
    result = study.summary(made())
    rows = accuracy_tables.accuracy_table(result).rows
    assert [r[1] for r in rows] == ["FP", "NR, RTN", "RO", "RH", "DFRot(RH)"]
    assert rows[0][-2:] == ("69.82", "73.32") and rows[3][-2] == "66.03 (-3.79)"
    assert rows[1][-1] == "–" and rows[2][5] == "-25.0"
    text = str(accuracy_tables.differences_table(result))
    assert "DFRot(RH) − RH" in text and "25.0" in text


def test_measured_on_a_tiny_model_once(tmp_path, monkeypatch):
    lab = Lab(
        model="tiny:llama", corpus="pydoc", seqlen=64, calibration=2, iterations=3, clip_steps=2,
        weight_windows=4, threads=1, folder=tmp_path,
    )  # fmt: skip
    ask = ([0, 1], 1, "4-4-16", "4-4-4", "gptq-shared", ["last_word"], 1, 4, 16)
    rows = study.measure(lab, *ask)
    assert len(rows) == 1 + 2 + 3 * 3
    assert {r["method"] for r in rows if r["rotation"] == "NR"} == {"rtn"}
    assert {r["method"] for r in rows if r["rotation"] == "RH"} == {"gptq-shared"}
    monkeypatch.setattr(study.zero_shot, "evaluate", None)
    assert study.measure(lab, *ask) == rows
    result = study.summary(rows)
    assert "correct" not in json.dumps(result["models"]) and len(result["table"]) == 2 * 5 * 2
    assert study.claims(result)
    with pytest.raises(TaskError, match="'nothing' is unknown"):
        study.measure(lab, *ask[:5], ["nothing"], 1, 4, 16)

"""Study 10 on a tiny model, its arithmetic on numbers made for it, and what is published of it."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest

from dfrot_lab import accuracy_tables, evaluation, files, paper, plots
from dfrot_lab.lab import Lab
from dfrot_lab.studies import zero_shot as study
from dfrot_lab.studies.zero_shot_claims import claims
from dfrot_lab.text_tasks import TaskError

PUBLISHED = Path(__file__).parents[1] / "figures" / "10_zero_shot" / "result.json"


def scored(task: str, correct: list[int], logp: list[float]) -> dict:
    """What `zero_shot.measure` gives, without what the study does not read."""
    about = {"task": task, "metric": "acc", "items": len(logp), "tokens": 9, "hash": "0" * 64}
    about |= {"version": "1.0", "lm_eval": "0.4.13", "correct": correct, "logp": logp}
    return about | {"accuracy": statistics.fmean(correct), "target_logp": statistics.fmean(logp)}


def model(name: str, seed: int, bits: str, ppl: float, correct: list[int], logp: list[float]):
    """A row of `study.measure` with two tasks, the second all right and of longer targets."""
    tasks = [scored("one", correct, logp), scored("two", [1] * len(logp), [10 * v for v in logp])]
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


def cells(rows: list[dict], *keys: str) -> dict:
    return {tuple(r[k] for k in (*keys, "task")): r for r in rows}


def test_differences_are_paired_by_item_over_the_mean_of_seeds():
    rows = cells(study.differences(made()), "a", "b")
    found = rows["DFRot(RH)", "RH", "one"]["correct"]
    expected = evaluation.paired_difference([1, 1, 0.5, 0], [1, 0.5, 0, 0])
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    assert rows["DFRot(RH)", "RH", "two"]["correct"]["mean"] == 0
    both = rows["DFRot(RH)", "RH", "mean of tasks"]
    assert both["correct"]["mean"] == pytest.approx(found["mean"] / 2)
    half = found["high"] - found["mean"]
    assert both["correct"]["high"] - both["correct"]["mean"] == pytest.approx(half / 2)  # other: 0
    assert "logp" not in both


def test_seeds_have_a_spread_of_their_own():
    """Of the difference too: what a seed's rotation does to both methods cancels."""
    rows = cells(study.differences(made()), "a", "b")
    row = rows["RH", "RO", "one"]
    assert row["seeds"] == 2 and row["correct"]["by_seed"] == [0.25, 0.0]
    assert row["correct"]["sd"] == pytest.approx(statistics.stdev([0.25, 0.0]))
    one = rows["DFRot(RH)", "RH", "one"]["correct"]
    assert one["by_seed"] == [0.25, 0.25] and one["sd"] == 0
    # floating point has one seed, and a difference from each of the other's
    fp = rows["FP", "DFRot(RH)", "one"]
    assert fp["seeds"] == 2 and fp["correct"]["by_seed"] == [0.0, 0.25]
    table = cells(study.table(made()), "rotation")
    assert table["RO", "mean of tasks"]["correct"]["by_seed"] == [0.625, 0.625]
    assert table["RH", "one"]["seeds"] == 2 and table["FP", "one"]["seeds"] == 1
    logp = table["RH", "one"]["logp"]
    assert logp["by_seed"] == pytest.approx([-3.125, -3.3])
    assert logp["sd"] == pytest.approx(statistics.stdev([-3.125, -3.3]))


def test_perplexity_and_accuracy_rank_alike_or_not():
    rows = study.ranks(study.averages(made()))
    assert [(r["value"], r["task"]) for r in rows[::2]] == [
        ("accuracy", "mean of tasks"), ("logp", "one"), ("logp", "two"),
    ]  # fmt: skip
    assert [r["methods"] for r in rows] == pytest.approx([1.0] * 6)
    every, rotated = rows[:2]
    assert (every["over"], every["n"], len(every["names"])) == ("all", 8, 5)
    assert (rotated["over"], rotated["n"]) == ("rotated", 6)
    assert rotated["names"] == ["RO", "RH", "DFRot(RH)"]
    other = [r | {"ppl": 1 / r["ppl"]} for r in study.averages(made())]
    assert study.ranks(other)[0]["methods"] == pytest.approx(-1.0)


def test_best_and_worst_make_no_agreement_among_the_rotated():
    """Turned round between the three, τ over all five stays 0.4 for the sake of FP and NR."""
    rows = study.averages(made())
    for r in rows:
        if r["rotation"] not in ("FP", "NR"):
            r["ppl"] = 80 - r["ppl"]
    every, rotated = study.ranks(rows)[:2]
    assert every["methods"] == pytest.approx(0.4)
    assert rotated["methods"] == pytest.approx(-1.0)
    result = study.summary(made())
    result["ranks"] = study.ranks(rows)
    claim = claims(result)[-1]
    assert not claim.agrees and "τ = -1.00 over 3 methods" in claim.ours
    assert "with FP and NR τ = 0.40 over 5 methods" in claim.ours


def test_claims_follow_the_numbers():
    result = study.summary(made())
    found = claims(result)
    assert [c.agrees for c in found][:3] == [True, True, True]
    assert [c.claim.split(" by ")[1] for c in found[:3]] == [
        "accuracy, mean of tasks",
        "log-probability of the target, one",
        "log-probability of the target, two",
    ]
    gain = next(c for c in found if "noise" in c.claim)
    assert "above 0 in 2 of 2 seeds, sd over seeds 0.0" in gain.ours
    worse = made()
    worse[0]["tasks"][0] |= {"correct": [0, 0, 0, 0], "accuracy": 0.0}
    other = claims(study.summary(worse))
    assert not other[0].agrees and other[1].agrees and other[-1].agrees
    for name, rows in paper.numbers()["zero_shot_readme"].items():
        if name != "tasks":  # every model
            told = [rows[k][-1] for k in ("FP16", "DFRot 4-4-16", "QuaRot 4-4-16")]
            assert "{}: FP16 {}, DFRot {}, RH {}".format(name, *told) in other[0].paper
    assert other[-1].paper.endswith("of 8 settings (README)")
    noisy = study.summary(made())
    for r in noisy["differences"]:
        r["correct"]["low"] = -0.1
    assert not next(c for c in claims(noisy) if "noise, by accuracy" in c.claim).agrees


def test_a_long_target_does_not_outweigh_a_short_one():
    """The second task has ten times the nats: turned round there, the first task's claim stands."""
    rows = made()
    for r in rows[2:4]:
        r["tasks"][1] = scored("two", [1] * 4, [-1.0, -1.0, -1.0, -1.1])
    found = {c.claim: c.agrees for c in claims(study.summary(rows))}
    assert found["4-4-16: FP > DFRot > RH > RO by log-probability of the target, one"]
    assert not found["4-4-16: FP > DFRot > RH > RO by log-probability of the target, two"]
    assert not any("log-probability of the target, mean" in c for c in found)


def with_mmlu() -> list[dict]:
    """MMLU all wrong but for floating point: it would pull a mean down."""
    rows = made()
    for r in rows:
        for task, name in zip(r["tasks"], ("piqa", "lambada_openai"), strict=True):
            task["task"] = name
        right = [1] * 4 if r["rotation"] == "FP" else [0] * 4
        r["tasks"].append(scored("mmlu", right, [-1.0, -1.1, -1.2, -1.3]))
    return rows


def test_mmlu_stays_out_of_the_mean_and_stands_beside_the_papers():
    rows = with_mmlu()
    result, plain = study.summary(rows), study.summary(made())
    assert result["averaged"] == ["piqa", "lambada_openai"]
    mean = [
        [r["correct"] for r in s["table"] if r["task"] == "mean of tasks"] for s in (result, plain)
    ]
    assert mean[0] == mean[1]
    assert [m["accuracy"] for m in result["models"]] == [m["accuracy"] for m in plain["models"]]
    table = accuracy_tables.published_table(result)
    by = {r[:3]: dict(zip(table.header, r, strict=True)) for r in table.rows}
    ours = by["ours", "4-4-16", "RH"]
    assert (ours["MMLU"], ours["PIQA"], ours["Avg"]) == ("0.00", "37.50", "68.75")
    assert ours["ARC-e"] == "–" and ours["Avg − FP"] == "-18.75"
    assert by["LLaMA2-7B", "4-4-16", "DFRot(RH)"]["MMLU"] == "35.54"
    assert by["LLaMA2-7B", "4-4-4", "DFRot(RH)"]["MMLU"] == "–"
    assert "mean without mmlu" in accuracy_tables.accuracy_table(result).header
    claim = next(c for c in claims(result) if c.claim.endswith("by accuracy, mmlu"))
    assert "LLaMA2-7B: FP16 41.85, DFRot 35.54, RH 34.83" in claim.paper and not claim.agrees
    assert "Qwen2-7B: FP16 69.47" in claim.paper
    assert "without mmlu, as in the paper" in plots.caption("zero_shot_accuracy", result)
    alone = [r | {"tasks": r["tasks"][2:]} for r in rows]
    with pytest.raises(TaskError, match="mmlu stays out of the mean of tasks; add another"):
        study.summary(alone)


def test_no_published_row_is_left_out():
    table = accuracy_tables.published_table(study.summary(made()))
    shown = {r[:3]: r[3:] for r in table.rows}
    numbers = paper.numbers()
    names = {"FP16": "FP", "QuaRot": "RH", "DFRot": "DFRot(RH)"}
    six = {k: v for k, v in numbers["zero_shot_readme"].items() if k != "tasks"}
    for name, rows in six.items():
        for row, values in rows.items():
            method, _, bits = row.partition(" ")
            assert {f"{v:.2f}" for v in values} <= set(shown[name, bits, names[method]])
    for name, values in numbers["mmlu_4-4-16"].items():
        if name != "columns":
            for method, value in zip(numbers["mmlu_4-4-16"]["columns"], values, strict=True):
                bits = "" if method == "FP16" else "4-4-16"
                assert shown[name, bits, names[method]][-1] == f"{value:.2f}"
    # 5 rows of 4 models, Qwen2's 3 (MMLU alone), and ours
    assert len(table.rows) == len(shown) == 20 + 3 + 5
    assert shown["LLaMA2-7B", "4-4-16", "RH"][-2] == "-3.79"


def test_other_items_are_refused():
    rows = made()
    rows[5]["tasks"][1]["hash"] = "1" * 64
    with pytest.raises(
        TaskError,
        match=r"task 'two': RH, seed 1, 4-4-16 was given 4 items.* hash 1{12}, FP 4 items",
    ):
        study.summary(rows)
    rows = made()
    rows[2]["tasks"][0] = scored("one", [1, 0, 0], [-3.0, -4.0, -3.5])
    with pytest.raises(TaskError, match=r"'one': RO, seed 0, 4-4-16 was given 3 items"):
        study.summary(rows)
    rows = made()
    rows[7]["tasks"].pop()
    with pytest.raises(TaskError, match=r"DFRot\(RH\), seed 1, 4-4-16 has tasks \['one'\]"):
        study.summary(rows)


def test_a_model_that_overflows_is_not_a_number_and_no_claim():
    rows = made()
    rows[2]["tasks"][0]["logp"][1] = math.nan
    result = json.loads(json.dumps(study.summary(rows)))
    found = claims(result)
    assert found[0].agrees and not found[1].agrees and found[2].agrees
    table = accuracy_tables.log_probability_table(result)
    assert next(r for r in table.rows if r[1] == "RO")[3] == "no number"


def test_tables_show_intervals_and_seeds():
    result = study.summary(made())
    rows = accuracy_tables.accuracy_table(result).rows
    assert [r[1] for r in rows] == ["FP", "NR, RTN", "RO", "RH", "DFRot(RH)"]
    assert [r[2] for r in rows] == ["1", "1", "2", "2", "2"]
    assert rows[2][-1] == "-25.0" and rows[3][3].endswith("± 17.7") and "±" not in rows[0][3]
    assert len(accuracy_tables.log_probability_table(result).header) == 5
    text = str(accuracy_tables.differences_table(result))
    assert "DFRot(RH) − RH" in text and "25.0" in text and "± 17.7" in text
    # τ-b: 11 of 15 pairs, the others tied in accuracy; 23 of 28
    rows = accuracy_tables.ranks_table(result).rows
    assert rows[0][1:] == (
        "accuracy, mean of tasks",
        "1.00 (3)",
        "0.86 (6)",
        "1.00 (5)",
        "0.91 (8)",
    )
    assert len(rows) == 3


def test_every_figure_draws_from_the_summary():
    one = [r | {"tasks": r["tasks"][:1]} for r in made()]
    for rows in (made(), with_mmlu(), one):
        result = json.loads(json.dumps(study.summary(rows)))
        for name, spec in plots.FIGURES.items():
            if spec.notebook == "10_zero_shot":
                plots.draw(name, result).draw_without_rendering()
                assert "4-4-16" in plots.caption(name, result)
    told = plots.caption("zero_shot_accuracy", study.summary(made()))
    assert "4-4-16: 2 seeds" in told


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
    assert {r["bits"]: r["seeds"] for r in result["differences"]} == {"4-4-16": 2, "4-4-4": 1}
    assert claims(result)
    for tasks, message in ((["nothing"], "'nothing' is unknown"), (["mmlu"], "out of the mean")):
        with pytest.raises(TaskError, match=message):
            study.measure(lab, *ask[:5], tasks, 1, 4, 16)


def test_the_published_order_is_as_measured():
    result = files.read_json(PUBLISHED)
    assert [t["task"] for t in result["tasks"]] == ["last_word", "continuation"]
    for task in result["tasks"]:
        assert task["items"] >= 500 and len(task["hash"]) == 64 and task["version"]
    assert result["lm_eval"] and result["averaged"] == ["last_word", "continuation"]
    table, less = cells(result["table"], "bits", "rotation"), result["differences"]
    asked = result["parameters"]
    seeds = {asked["final_bits"]: len(asked["seeds"]), asked["side_bits"]: asked["side_seeds"]}
    for (bits, name, task), row in table.items():
        assert row["seeds"] == (1 if name in ("FP", "NR") else seeds[bits])
        for value in ("correct", "logp"):
            if value in row and name != "NR":  # which may overflow
                assert row[value]["low"] < row[value]["mean"] < row[value]["high"], (name, task)
                assert len(row[value]["by_seed"]) == row["seeds"]
                assert row[value]["mean"] == pytest.approx(
                    statistics.fmean(row[value]["by_seed"]), abs=1e-9
                )
    for row in less:  # two ways to the same difference
        for value in ("correct", "logp"):
            if value in row:
                one, two = (table[row["bits"], row[k], row["task"]][value]["mean"] for k in "ab")
                assert row[value]["mean"] == pytest.approx(one - two, abs=1e-9)
    # quantization costs nats beyond the items' noise, whatever the rotation
    lost = [r["logp"] for r in less if r["a"] == "FP" and "logp" in r]
    assert len(lost) == 4 and all(r["low"] > 0 for r in lost)
    assert [asdict(c) for c in claims(result)] == result["claims"]

"""lm-eval on a model in place: its log-probabilities are the model's, item by item, kept once."""

from __future__ import annotations

import json
import math
import statistics
from importlib.metadata import version

import pytest
import torch
from conftest import logits

from dfrot_lab import files, models, text_tasks, zero_shot
from dfrot_lab.lab import Lab, LabError
from dfrot_lab.quantized_model import ModelSpec, build
from dfrot_lab.rotations import Rotations, random_hadamard
from dfrot_lab.zero_shot import TaskError


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(
        model="tiny:llama", corpus="pydoc", seqlen=64, calibration=2, iterations=3, clip_steps=2,
        weight_windows=4, threads=1, folder=tmp_path,
    )  # fmt: skip


def by_hand(model, tokenizer, context: str, target: str) -> float:
    """log p(target | context) in nats, one item at a time, no padding."""
    whole = tokenizer(context + target, add_special_tokens=False)["input_ids"]
    first = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    p = logits(model, torch.tensor([whole]))[0].log_softmax(-1)
    return sum(p[i - 1, whole[i]].item() for i in range(first, len(whole)))


@pytest.mark.parametrize("bits", ["16-16-16", "4-4-4"])
def test_log_probabilities_are_the_models(lab, bits):
    model = lab.lm
    if bits != "16-16-16":
        model = build(lab.lm, Rotations(R1=random_hadamard(64, 0), R4=True), ModelSpec.of(bits))
    found = zero_shot.evaluate(model, lab.tokenizer, "last_word", corpus="pydoc", items=6, batch=1)
    items = text_tasks.chosen("last_word", "pydoc", 6)
    expected = [by_hand(model, lab.tokenizer, i["context"], " " + i["target"]) for i in items]
    assert found["logp"] == pytest.approx(expected, rel=2e-3 if bits == "4-4-4" else 1e-5)


def test_a_choice_is_right_if_its_log_probability_a_character_is_the_largest(lab):
    found = zero_shot.evaluate(lab.lm, lab.tokenizer, "continuation", corpus="pydoc", items=8)
    assert found["metric"] == "acc_norm" and set(found["correct"]) <= {0, 1}
    for item, right, logp in zip(
        text_tasks.chosen("continuation", "pydoc", 8), found["correct"], found["logp"], strict=True
    ):
        lls = [by_hand(lab.lm, lab.tokenizer, item["context"], " " + c) for c in item["choices"]]
        assert logp == pytest.approx(lls[item["gold"]], rel=1e-5)
        per = [ll / len(c) for ll, c in zip(lls, item["choices"], strict=True)]
        assert right == (per.index(max(per)) == item["gold"])


def test_the_model_and_its_tokenizer_stay_as_they_are(lab):
    tokens = torch.arange(40)[None]
    before, pad = logits(lab.lm, tokens), lab.tokenizer.pad_token
    first = zero_shot.evaluate(lab.lm, lab.tokenizer, "last_word", corpus="pydoc", items=4)
    assert torch.equal(logits(lab.lm, tokens), before) and lab.tokenizer.pad_token == pad
    assert zero_shot.evaluate(lab.lm, lab.tokenizer, "last_word", corpus="pydoc", items=4) == first
    # nothing of the machine, and what it takes to repeat it
    assert set(first) == {
        "task", "metric", "correct", "logp", "tokens", "hash", "version", "lm_eval",
    }  # fmt: skip
    assert first["lm_eval"] == version("lm-eval") and len(first["hash"]) == 64
    other = zero_shot.evaluate(lab.lm, lab.tokenizer, "last_word", corpus="pydoc", items=5)
    assert other["hash"] != first["hash"] and other["version"] == first["version"] == "1.0"
    sizes = [
        len(lab.tokenizer(f"{i['context']} {i['target']}", add_special_tokens=False)["input_ids"])
        for i in text_tasks.chosen("last_word", "pydoc", 4)
    ]
    assert first["tokens"] == sum(sizes)


def test_what_is_measured_is_kept(lab, monkeypatch):
    ask = {"task": "last_word", "bits": "4-4-16", "items": 4}
    row = zero_shot.measure(lab, "RH", 1, **ask)
    assert (row["rotation"], row["seed"], row["bits"], row["method"]) == ("RH", 1, "4-4-16", "rtn")
    assert row["accuracy"] == statistics.fmean(row["correct"]) and row["items"] == 4
    assert row["target_logp"] == statistics.fmean(row["logp"])
    other = zero_shot.measure(lab, "RH", 2, **ask)
    assert other["logp"] != row["logp"] and other["hash"] == row["hash"]
    monkeypatch.setattr(zero_shot, "evaluate", None)
    assert zero_shot.measure(lab, "RH", 1, **ask) == row
    for change in ({"items": 5}, {"bits": "4-4-4"}, {"batch": 2}, {"method": "gptq-shared"}):
        with pytest.raises(TypeError, match="not callable"):  # measured anew
            zero_shot.measure(lab, "RH", 1, **ask | change)


def test_floating_point_is_measured_once_for_all_bits(lab, monkeypatch):
    row = zero_shot.measure(lab, "FP", task="last_word", bits="4-4-16", items=4)
    monkeypatch.setattr(zero_shot, "evaluate", None)
    again = zero_shot.measure(lab, "FP", task="last_word", bits="4-4-4", method="gptq", items=4)
    assert again == row and row["bits"] == "16-16-16" and row["method"] is None


def test_a_file_of_a_rotation_is_measured_as_the_rotation(lab):
    file = str(lab.rotation_file("DFRot(RH)", 1))
    ask = {"task": "last_word", "bits": "16-4-16", "items": 4}
    named = zero_shot.measure(lab, "DFRot(RH)", 1, **ask)
    assert zero_shot.measure(lab, file, 1, **ask)["logp"] == named["logp"]
    assert named["gamma"] == "100.0"


def test_overflow_is_kept_as_not_a_number(lab, monkeypatch):
    found = zero_shot.evaluate(lab.lm, lab.tokenizer, "last_word", corpus="pydoc", items=2)
    monkeypatch.setattr(
        zero_shot,
        "evaluate",
        lambda *_, **__: found | {"logp": [math.nan, -1.0], "correct": [0, 1]},
    )
    for _ in range(2):
        row = zero_shot.measure(lab, "RO", task="last_word", items=2)
        assert math.isnan(row["target_logp"]) and row["accuracy"] == 0.5


def test_bad_input_is_told_in_a_line(lab, monkeypatch, tmp_path):
    def ask(task="last_word", tokenizer=lab.tokenizer, **more):
        return zero_shot.evaluate(lab.lm, tokenizer, task, corpus="pydoc", **more)

    with pytest.raises(TaskError, match="task 'lambda' is unknown: use one of last_word, contin"):
        ask("lambda")
    with pytest.raises(TaskError, match="no task given"):
        zero_shot.check([])
    with pytest.raises(TaskError, match=r"'pydoc' gives \d+ items .* 5000 needed"):
        ask(items=5000)
    with pytest.raises(TaskError, match="no tokenizer"):
        ask(tokenizer=None)
    with pytest.raises(LabError, match="method = 'awq'"):
        zero_shot.measure(lab, "RH", task="last_word", method="awq")
    with pytest.raises(LabError, match="rotation 'R5' is unknown"):
        zero_shot.measure(lab, "R5", task="last_word")
    models.tiny("llama").save_pretrained(tmp_path / "bare")
    bare = Lab(model=str(tmp_path / "bare"), corpus="pydoc", threads=1, folder=tmp_path / "r")
    with pytest.raises(TaskError, match="no tokenizer"):
        zero_shot.measure(bare, "FP", task="last_word", items=2)
    assert not list(tmp_path.rglob("zero-shot-*.json"))
    monkeypatch.setattr(zero_shot, "version", missing)
    with pytest.raises(TaskError, match="lm-eval is not installed"):
        zero_shot.check(["last_word"])


def missing(_):
    raise zero_shot.PackageNotFoundError


def test_a_task_of_the_hub_is_out_of_reach_offline(lab):
    with pytest.raises(TaskError, match=r"'piqa': offline mode is set .* last_word and contin"):
        zero_shot.evaluate(lab.lm, lab.tokenizer, "piqa")


def test_the_metric_of_each_task_of_the_hub_is_the_papers():
    """acc_norm where lm-eval's task has it, else acc; none is renamed."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    for task, metric in zero_shot.STOCK.items():
        assert task in index
        if task == "mmlu":  # a group: its members are in a template
            continue
        lists = [m["metric"] for m in index[task].cfg["metric_list"]]
        assert metric == ("acc_norm" if "acc_norm" in lists else "acc")


class Two:
    """What lm-eval's WinoGrande looks like: two contexts, one continuation."""

    OUTPUT_TYPE, multiple_input = "multiple_choice", 2

    def doc_to_text(self, doc):
        return doc["answer"]


def test_the_target_of_a_task_with_several_contexts():
    assert zero_shot._gold(Two(), {"answer": 1}) == 1


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_model_knows_more_in_floating_point(tmp_path):
    lab = Lab(clip_steps=10, folder=tmp_path)
    for task in zero_shot.OFFLINE:
        fp, rh = (
            zero_shot.measure(lab, name, task=task, bits="4-4-16", items=100)
            for name in ("FP", "RH")
        )
        # two accuracies of 100 items have standard errors of 0.05 each: the log-probability tells them apart
        assert fp["target_logp"] > rh["target_logp"]
        assert fp["accuracy"] > (0.1 if task == "last_word" else 0.45)
        kept = json.loads(next(tmp_path.glob("measurements/zero-shot-*.json")).read_text())
        assert len(kept["logp"]) == 100
    assert files.read_json(next(tmp_path.glob("measurements/zero-shot-*.json")))["hash"]

"""`quantize`, `eval` and `generate`: a folder that loads to the same model, numbers, columns."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from click.testing import CliRunner
from conftest import logits

from dfrot_lab import (
    evaluation,
    kept_files,
    models,
    profiles,
    quantized_folder,
    quantized_model,
    scores,
    side_by_side,
)
from dfrot_lab.cli import app
from dfrot_lab.lab import Lab
from dfrot_lab.models import ModelError
from dfrot_lab.quantized_folder import FolderError
from dfrot_lab.quantized_model import ModelSpec


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def smoke(tmp_path):
    return ("--profile", "smoke", "--folder", tmp_path / "lab")


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(
        model="tiny:llama", corpus="pydoc", seqlen=96, iterations=4, clip_steps=4,
        weight_windows=4, threads=1, folder=tmp_path / "lab",
    )  # fmt: skip


@pytest.mark.parametrize("bits", ["4-4-16", "4-4-4"])
def test_a_saved_model_computes_the_same(lab, tmp_path, bits):
    built, tokens = lab.quantized("RH", 1, bits=bits), torch.arange(48)[None]
    path = quantized_folder.save(built, lab.tokenizer, tmp_path / "q", {"bits": bits})
    loaded, tokenizer, about = quantized_folder.load(path)
    assert (
        about == {"bits": bits} and tokenizer("ab")["input_ids"] == lab.tokenizer("ab")["input_ids"]
    )
    assert torch.equal(logits(loaded, tokens), logits(built, tokens))
    assert not hasattr(built.config, quantized_folder.KEY)
    with pytest.raises(
        ModelError, match="written by `dfrot-lab quantize`"
    ):  # not as if it were a plain one
        models.load(str(path))


def test_folders_that_cannot_be_written_or_read(lab, tmp_path):
    built = lab.quantized("RH", bits="4-4-16", keep="massive")
    with pytest.raises(FolderError, match="kept tokens"):
        quantized_folder.save(built, lab.tokenizer, tmp_path / "q", {"bits": "4-4-16"})
    with pytest.raises(FolderError, match="exists"):
        quantized_folder.save(built, lab.tokenizer, tmp_path, {})
    with pytest.raises(FolderError, match=r"no config\.json"):
        quantized_folder.load(tmp_path / "nowhere")
    models.tiny("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(FolderError, match="holds no quantized model"):
        quantized_folder.load(tmp_path / "plain")
    assert not list(tmp_path.glob(".partial-*")) and not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"clip": 0.9}, "activations are quantized as"),
        ({"per": "group", "group_size": 16}, "activations are quantized as"),
        ({"heads": True}, "Hadamards across heads cannot be saved"),
    ],
)
def test_a_folder_that_bits_do_not_tell_is_refused(lab, tmp_path, how, said):
    """It would compute something else when it is loaded."""
    rotation = replace(lab.rotations("RH"), heads=how.pop("heads", False))
    built = quantized_model.build(lab.lm, rotation, ModelSpec.of("16-4-4", **how))
    with pytest.raises(FolderError, match=said):
        quantized_folder.save(built, lab.tokenizer, tmp_path / "q", {"bits": "16-4-4"})
    plain = quantized_model.build(lab.lm, lab.rotations("RH"), ModelSpec.of("16-4-4"))
    for bits, message in (("16-4-16", "the KV cache is quantized as"), (None, "has no 'bits'")):
        with pytest.raises(FolderError, match=message):
            about = {} if bits is None else {"bits": bits}
            quantized_folder.save(plain, lab.tokenizer, tmp_path / "q", about)
    assert not (tmp_path / "q").exists()


def test_quantize_and_eval_agree(smoke, tmp_path):
    method = ("--method", "rtn", "--bits", "4-4-4", "--seed", 1)
    done = invoke("quantize", *smoke, *method, "--rotation", "RH", "--out", tmp_path / "q")
    assert done.exit_code == 0, done.output
    again = invoke("quantize", *smoke, *method, "--out", tmp_path / "q")
    assert again.exit_code == 1 and "exists: choose another folder" in again.output
    ask = ("eval", *smoke, "--windows", 1, "--zero-shot", "--items", 4)
    by_name = invoke(*ask, *method, "--rotation", "RH", "--out", tmp_path / "name.json")
    assert by_name.exit_code == 0, by_name.output
    assert "RTN" in by_name.output and "last_word [%]" in by_name.output
    by_folder = invoke(*ask, "--quantized", tmp_path / "q", "--out", tmp_path / "folder.json")
    assert by_folder.exit_code == 0, by_folder.output
    rows = [json.loads((tmp_path / f"{n}.json").read_text())["rows"][0] for n in ("name", "folder")]
    assert rows[0]["ppl"] == rows[1]["ppl"] and rows[0]["tasks"] == rows[1]["tasks"]
    about = json.loads((tmp_path / "folder.json").read_text())["about"]
    assert (about["model"], about["quantized"]) == ("tiny:llama", str(tmp_path / "q"))
    both = invoke(*ask, "--quantized", tmp_path / "q", "--seed", 1, "--rotation", "RH")
    assert both.exit_code == 2 and "--quantized settles --rotation, --seed" in both.output
    # what was measured is recorded: the next batch does not take it for altered
    assert set(kept_files.check(smoke[-1]).values()) == {"recorded"}
    assert [t["task"] for t in rows[0]["tasks"]] == ["last_word", "continuation"]


def test_eval_tells_paired_differences(smoke, tmp_path):
    ask = ("eval", *smoke, "--method", "rtn", "--windows", 2, "--zero-shot", "--items", 4)
    names = ("--rotation", "FP", "--rotation", "RH", "--rotation", "RO")
    done = invoke(*ask, *names, "--out", tmp_path / "e.json")
    assert done.exit_code == 0, done.output
    assert "FP − RH" in done.output and "RO − RH" in done.output
    found = json.loads((tmp_path / "e.json").read_text())
    fp, rh, ro = found["rows"]
    for row, d in zip((fp, ro), found["differences"], strict=True):
        assert (d["a"], d["b"]) == (row["rotation"], "RH")
        wanted = evaluation.paired_difference(row["nll"], rh["nll"])
        assert d["nll"] == pytest.approx(wanted)
        for i, task in enumerate(d["tasks"]):
            accuracy = row["tasks"][i]["accuracy"] - rh["tasks"][i]["accuracy"]
            assert task["correct"]["mean"] == pytest.approx(accuracy) and task["correct"]["n"] == 4
    one = scores.differences([fp | {"nll": fp["nll"][:1]}, ro | {"nll": ro["nll"][:1]}])
    assert [(d["a"], d["b"], d["nll"]) for d in one] == [("RO", "FP", None)]
    assert "one pair" in str(scores.differences_table(one))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("eval", "--task", "piqa", "--rotation", "FP"), "task 'piqa': offline mode is set"),
        (("eval", "--task", "lambda"), "task 'lambda' is unknown: use one of last_word"),
        (("eval", "--zero-shot", "--items", "9999", "--rotation", "FP"), "9999 needed"),
        (("eval", "--windows", "-1"), "windows = -1 is negative"),
        (("quantize", "--out", "q", "--rotation", "R5"), "rotation 'R5' is unknown"),
        (("quantize", "--out", "q", "--bits", "4-4"), "bits = '4-4': use W-A-KV"),
        (("generate", " "), "the prompt is empty"),
        (("generate", "Hi", "--chat"), "has no chat template"),
        (("generate", "Hi", "--tokens", "9999"), "the model takes 4096"),
    ],
)
def test_errors_are_one_line(arguments, said, smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(arguments[0], *smoke, *arguments[1:])
    errors = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert done.exit_code == 1 and len(errors) == 1 and said in errors[0], done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quantize", "--out", "q", "--bits", "17-4-16"), "bits = '17-4-16': each is 2 to 16"),
        (("quantize", "--out", "q", "--rotation", "R5"), "rotation 'R5' is unknown"),
        (("quantize", "--out", "q", "--gamma", "-1"), "gamma = -1.0 is negative"),
        (("quantize", "--out", "q", "--corpus", "nowhere"), "unknown corpus 'nowhere'"),
        (("eval", "--bits", "4-4-1"), "bits = '4-4-1': each is 2 to 16"),
        (("eval", "--rotation", "FP", "--rotation", "RX"), "rotation 'RX' is unknown"),
        (("eval", "--rotation", "no.safetensors"), "no.safetensors does not exist"),
        (("generate", "Hi", "--bits", "4-4"), "bits = '4-4': use W-A-KV"),
    ],
)
def test_wrong_values_are_told_before_anything_is_loaded(arguments, said, smoke, monkeypatch):
    for name in ("load", "load_tokenizer"):
        monkeypatch.setattr(models, name, lambda *_, **__: pytest.fail("loaded"))
    done = invoke(arguments[0], *smoke, *arguments[1:])
    assert done.exit_code == 1 and said in done.output, done.output


def test_generate_is_greedy_and_says_how_far_it_follows_floating_point(lab):
    rows = side_by_side.texts(lab, "The newline", tokens=6, method="rtn")
    assert [r["name"] for r in rows] == ["FP", "RH W4A4", "DFRot W4A4"]
    assert rows == side_by_side.texts(lab, "The newline", tokens=6, method="rtn")
    assert rows[0]["same"] == rows[0]["tokens"] and all(0 <= r["same"] <= 6 for r in rows)
    ids = lab.tokenizer("The newline", add_special_tokens=False, return_tensors="pt")["input_ids"]
    written = []
    for _ in range(6):
        written.append(int(logits(lab.lm, torch.cat([ids, torch.tensor([written])], 1))[0, -1].argmax())
                       if written else int(logits(lab.lm, ids)[0, -1].argmax()))  # fmt: skip
    ids = lab.tokenizer("The newline", add_special_tokens=False)["input_ids"]
    found = side_by_side.continuation(lab.lm, torch.tensor([ids]), 6)
    assert found == written[: len(found)]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (" a word\nand é 中 ", "a word\nand é 中"),
        ("\x05x\x1b[2J\u200b", r"\x05x\x1b[2J\u200b"),
        (" \x05\n", r"\x05"),
        (" \n", "blank; token ids 8 13"),
        ("", "blank; token ids 8 13"),
    ],
)
def test_every_text_can_be_seen(text, seen):
    assert side_by_side.visible(text, [8, 13]) == seen


def test_generate_of_a_random_model_is_seen_and_says_so(smoke, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    done = invoke("generate", "Hi", *smoke, "--method", "rtn", "--tokens", 12)
    assert done.exit_code == 0, done.output
    assert "model 'tiny:llama' has random weights" in done.stderr
    assert all(c.isprintable() or c == "\n" for c in done.stdout)
    first = done.stdout.splitlines()[2]
    assert all(first[at : at + 30].strip() for at in (0, 34, 68))  # a text in every column


def test_generate_prints_the_three_models_side_by_side(smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    options = ("--method", "rtn", "--bits", "4-4-4", "--seed", 1, "--tokens", 6)
    done = invoke("generate", "The newline", *smoke, *options)
    assert done.exit_code == 0, done.output
    common = profiles.load("smoke")["common"]
    known = {f.name: common[f.name] for f in fields(Lab) if f.name in common}
    rows = side_by_side.texts(
        Lab(**known, folder=tmp_path / "lab"), "The newline", tokens=6, bits="4-4-4", method="rtn",
        seed=1,
    )  # fmt: skip
    assert [r["name"] for r in rows] == ["FP", "RH W4A4KV4", "DFRot W4A4KV4"]
    assert done.stdout == side_by_side.columns(rows, 90) + "\n"
    assert done.stdout.splitlines()[0].split() == ["FP", "RH", "W4A4KV4", "DFRot", "W4A4KV4"]
    assert list((tmp_path / "lab").rglob("DFRot-RH-*.safetensors"))  # refined, and kept


def test_columns_fit_the_terminal():
    rows = [
        {"name": n, "text": "word " * 30, "same": k, "tokens": 30}
        for k, n in enumerate(("FP", "RH W4A4", "DFRot W4A4"))
    ]
    lines = side_by_side.columns(rows, 80).splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].split() == ["FP", "RH", "W4A4", "DFRot", "W4A4"]
    assert "the first 1 tokens as FP" in " ".join(lines)
    narrow = side_by_side.columns(rows, 30).splitlines()
    assert max(map(len, narrow)) <= 30 and narrow.count("FP") == 1

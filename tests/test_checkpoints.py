"""Shards merged one tensor at a time, against the model merged in memory."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import haar, logits, random_tokens, relative

from dfrot_lab import checkpoints, models, owners, rotations
from dfrot_lab.models import ModelError
from dfrot_lab.rotations import RotationError, Rotations

BOTH = Rotations(R1=haar(64, 1), R2=haar(16, 2))


@pytest.fixture
def saved(tmp_path):
    def save(kind="llama", shard="1GB", dtype=torch.float32, **options):
        model = models.tiny(kind, **options).to(dtype)
        model.save_pretrained(tmp_path / "source", max_shard_size=shard)
        return model, tmp_path / "source"

    return save


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_a_merged_checkpoint_computes_the_same(saved, tmp_path, kind, tied, shard):
    biases = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    model, source = saved(kind, shard, tied=tied, **biases)
    found = checkpoints.merge(source, tmp_path / "out", BOTH)
    plain = transformers.AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32)
    assert relative(logits(plain, random_tokens()), logits(model, random_tokens())) < 1e-4
    # and to the model that was merged in memory, weight by weight
    memory = rotations.merge(models.fold_gains(model), BOTH).state_dict()
    ours = plain.state_dict()
    assert set(ours) == set(memory)
    for name, w in memory.items():
        torch.testing.assert_close(ours[name], w, rtol=1e-4, atol=1e-5 * w.abs().max().item())
    assert plain.config.dfrot_merged == ["gains", "R1", "R2"]
    assert len(list(found.glob("*.safetensors"))) == len(list(source.glob("*.safetensors")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_shapes_stay(saved, tmp_path, dtype):
    _, source = saved(dtype=dtype, tied=False)
    found = checkpoints.merge(source, tmp_path / "out", BOTH)
    assert checkpoints.shapes(found) == checkpoints.shapes(source)


def test_blocks_cut_as_they_may(saved, tmp_path, monkeypatch):
    _, source = saved()
    whole = checkpoints.merge(source, tmp_path / "whole", BOTH)
    monkeypatch.setattr(checkpoints, "ROWS", 7)
    cut = checkpoints.merge(source, tmp_path / "cut", BOTH)
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (whole, cut))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_only_the_gains_are_folded_without_a_rotation(saved, tmp_path):
    model, source = saved("qwen2")
    found = checkpoints.merge(source, tmp_path / "out", Rotations())
    plain = transformers.AutoModelForCausalLM.from_pretrained(found)
    for name, w in models.fold_gains(model).state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], w, rtol=1e-6, atol=1e-7)


def test_refusals_leave_nothing(saved, tmp_path):
    _, source = saved()
    merged = checkpoints.merge(source, tmp_path / "merged", Rotations(R1=haar(64, 1)))
    cases = [
        (merged, Rotations(R1=haar(64, 1)), RotationError, r"\['R1'\] already merged into"),
        (source, Rotations(R4=True), RotationError, "R4 acts in the running model"),
        (source, Rotations(heads=True), RotationError, "heads acts in the running model"),
        (source, Rotations(R1=haar(32)), RotationError, r"R1 is \[32, 32\]"),
        (source, Rotations(R2=haar(64)), RotationError, r"R2 is \[64, 64\]"),
        (tmp_path, BOTH, ModelError, "no checkpoint folder"),
    ]
    for folder, rotation, kind, said in cases:
        with pytest.raises(kind, match=said):
            checkpoints.merge(folder, tmp_path / "out", rotation)
    with pytest.raises(ModelError, match="exists: choose another folder"):
        checkpoints.merge(source, merged, BOTH)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    with pytest.raises(ModelError, match="'gemma2' cannot be rotated"):
        checkpoints.merge(source, tmp_path / "out", BOTH)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".partial-*"))


def test_a_full_disk_is_told_before_and_leaves_nothing(saved, tmp_path, monkeypatch):
    _, source = saved()
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="are needed"):
        checkpoints.merge(source, tmp_path / "out", BOTH)
    assert not list(tmp_path.glob("*out*"))


def test_a_shard_that_is_missing_is_named(saved, tmp_path):
    _, source = saved(shard="60KB")
    gone = sorted(source.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=gone.name):
        checkpoints.merge(source, tmp_path / "out", BOTH)


def test_interrupted_it_leaves_nothing(saved, tmp_path, monkeypatch):
    _, source = saved()

    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "_finish", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.merge(source, tmp_path / "out", BOTH)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_base_model_without_its_head_is_refused(tmp_path):
    """Under other names nothing would be turned, and the result still be called rotated."""
    models.tiny("llama", tied=True).model.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"has no tensor model\.embed_tokens\.weight: take a"):
        checkpoints.merge(tmp_path / "base", tmp_path / "out", BOTH)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("kept", [4, 100, 20_000])
def test_a_shard_cut_short_is_named(saved, tmp_path, kept):
    _, source = saved()
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    for read in (
        lambda: checkpoints.merge(source, tmp_path / "out", BOTH),
        lambda: owners.fingerprint(source),
    ):
        with pytest.raises(ModelError, match=r"model\.safetensors cannot be read .*fetch it again"):
            read()
    if kept < 1000:
        with pytest.raises(ModelError, match="is damaged"):
            checkpoints.shapes(source)
    assert not (tmp_path / "out").exists()


def test_what_was_merged_before_stays_on_record(saved, tmp_path):
    _, source = saved()
    first = checkpoints.merge(source, tmp_path / "first", Rotations(R1=BOTH.R1))
    second = checkpoints.merge(first, tmp_path / "second", Rotations(R2=BOTH.R2))
    config = json.loads((second / "config.json").read_text())
    assert config["dfrot_merged"] == ["gains", "R1", "R2"]
    with pytest.raises(RotationError, match=r"R1.* already merged"):
        checkpoints.merge(second, tmp_path / "third", Rotations(R1=BOTH.R1))


def test_a_model_of_another_kind_has_no_head(tmp_path):
    """A head that is missing is not taken for one that is tied."""
    config = models.tiny("llama", tied=False).config
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "scores")
    with pytest.raises(ModelError, match=r"has no tensor lm_head\.weight"):
        checkpoints.merge(tmp_path / "scores", tmp_path / "out", BOTH)


def test_what_is_no_safetensors_file_is_named(saved):
    _, source = saved()
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="is damaged"):
        checkpoints.shapes(source)

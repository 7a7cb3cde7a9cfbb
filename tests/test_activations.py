"""What is written is what the norms put out, and nothing half written stays behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import logits, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from dfrot_lab import activations, models
from dfrot_lab.activations import Activations, ActivationsError
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.weighting import Weighting, subsample


@pytest.fixture
def collected(llama, tmp_path):
    tokens = random_tokens(1, (3, 10))
    path = tmp_path / "new" / "X.safetensors"
    return (
        llama,
        tokens,
        path,
        activations.collect(llama, tokens, path, {"corpus": "bytes", "γ": 1}),
    )


@pytest.mark.parametrize("kind", list(models.ARCHITECTURES))
def test_capture_is_the_output_of_every_norm(kind):
    model, tokens = models.fold_gains(models.tiny(kind)), random_tokens()
    found = activations.capture(model, tokens)
    assert [(i, name) for i, name, _ in found] == list(enumerate(models.norm_sites(model)))
    for _, _, x in found:
        assert x.shape == (2, 12, 64)
        assert torch.allclose(x.square().mean(-1), torch.ones(2, 12), rtol=1e-3)
    first = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
    assert torch.equal(found[0][2], first)
    assert not any(m._forward_hooks for m in model.modules())


def test_collected_equals_captured_and_metadata_returns(collected):
    model, tokens, path, found = collected
    assert found.sites == tuple(models.norm_sites(model)) and found.d == 64
    assert found.X.shape == (4, 30, 64) and found.X.dtype == torch.float32
    for w, window in enumerate(tokens):
        for i, name, x in activations.capture(model, window[None]):
            assert torch.equal(found.X[i, 10 * w : 10 * (w + 1)], x[0])
            assert torch.equal(found.site(name), found.X[i])
    assert found.metadata["windows"] == [3, 10] and found.metadata["γ"] == 1
    again = activations.load(path)
    assert torch.equal(again.X, found.X)
    assert (again.sites, again.metadata) == (found.sites, found.metadata)
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_plain_safetensors_and_repeatable(collected):
    model, tokens, path, found = collected
    with safe_open(path, framework="np") as f:
        assert list(f.keys()) == ["X"]
        assert np.array_equal(f.get_tensor("X"), found.X.numpy())
        assert json.loads(f.metadata()["dfrot"])["corpus"] == "bytes"
    first = path.read_bytes()
    activations.collect(model, tokens, path, {"corpus": "bytes", "γ": 1})
    assert path.read_bytes() == first


def test_half_precision_models_are_written_in_fp32(llama, tmp_path):
    found = activations.collect(llama.bfloat16(), random_tokens(1, (1, 5)), tmp_path / "X")
    assert found.X.dtype == torch.float32 and torch.equal(found.X, found.X.bfloat16().float())


@given(st.integers(1, 3), st.integers(1, 50), st.integers(1, 60))
def test_chunks_cover_every_row_once_again_and_again(sites, tokens, rows):
    x = torch.arange(sites * tokens * 2.0).reshape(sites, tokens, 2)
    found = Activations.of(x)
    for _ in range(2):
        chunks = list(found.chunks(rows))
        assert torch.equal(torch.cat(chunks), x.flatten(0, 1))
        assert max(len(c) for c in chunks) == min(rows, tokens)
    assert len(found.sites) == sites
    assert torch.equal(Activations.of(x[0]).X, x[:1])


def test_unknown_site_lists_the_known_ones():
    with pytest.raises(
        ActivationsError, match=r"'layers\.9' is unknown: use one of site\.0, site\.1"
    ):
        Activations.of(torch.zeros(2, 3, 4)).site("layers.9")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_names_the_layer_and_leaves_no_file(llama, tmp_path, bad):
    tokens, path = random_tokens(1, (2, 10)), tmp_path / "X.safetensors"
    path.write_text("older")
    llama.model.layers[1].self_attn.v_proj.weight.data[3, 3] = bad
    with pytest.raises(
        ActivationsError, match=r"layers\.1\.mlp hold NaN or Inf: load the model in"
    ):
        activations.collect(llama, tokens, path)
    assert [f.read_text() for f in tmp_path.iterdir()] == ["older"]
    assert not any(m._forward_hooks for m in llama.modules())


def test_interruption_leaves_no_file(llama, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    llama.model.layers[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        activations.collect(llama, random_tokens(1, (2, 10)), tmp_path / "X.safetensors")
    assert not list(tmp_path.iterdir())


def test_collecting_leaves_the_model_as_it_was(collected):
    model, tokens, *_ = collected
    fresh = models.fold_gains(models.tiny("llama"))
    assert torch.equal(logits(model, tokens), logits(fresh, tokens))


def test_gains_must_be_folded(tmp_path):
    with pytest.raises(ActivationsError, match=r"not folded: call models\.fold_gains"):
        activations.collect(models.tiny("llama"), random_tokens(), tmp_path / "X")
    assert not list(tmp_path.iterdir())


def test_memory_holds_one_norm_output(llama, tmp_path, monkeypatch):
    """Each output is written before the next site runs: none is collected on the side."""
    alive = []
    watch = activations._watch

    def counting(model, tokens, receive):
        def one(site, name, x):
            receive(site, name, x)
            alive.append(name)

        watch(model, tokens, one)

    monkeypatch.setattr(activations, "_watch", counting)
    monkeypatch.setattr(activations, "capture", None)
    activations.collect(llama, random_tokens(1, (2, 10)), tmp_path / "X")
    assert alive == list(models.norm_sites(llama)) * 2


@pytest.mark.parametrize("keep", [0, 4, 30, 500, -1])
def test_a_cut_file_is_refused(collected, keep):
    *_, path, _ = collected
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ActivationsError, match=r"X\.safetensors cannot be read .*: delete the file"
    ):
        activations.load(path)


@pytest.mark.parametrize("content", [b"no safetensors at all" * 9, b"\x02" + bytes(7) + b"[]" * 9])
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "X.safetensors"
    path.write_bytes(content)
    with pytest.raises(ActivationsError, match=r"X\.safetensors cannot be read"):
        activations.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ActivationsError, match=r"X do not exist: make them with"):
        activations.load(tmp_path / "X")


def test_a_full_disk_leaves_no_file(llama, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activations, "_mapped", full)
    with pytest.raises(OSError, match=r"No space left on device while writing.*X\.safetensors"):
        activations.collect(llama, random_tokens(), tmp_path / "X.safetensors")
    assert not list(tmp_path.iterdir())


def test_writing_to_loaded_rows_spares_the_file(collected):
    *_, path, found = collected
    before = path.read_bytes()
    found.X.zero_()
    assert path.read_bytes() == before


def test_rows_that_do_not_fit_a_gpu_stay_and_go_in_the_same_chunks(monkeypatch):
    """What else its memory holds must not change the sums, which are by chunk."""
    x = Activations.of(torch.zeros(40_000, 2))
    assert x.on("cpu") is x and len(list(x.chunks())) == 20
    for name, value in (("mem_get_info", (0, 0)), ("memory_reserved", 0), ("memory_allocated", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    sent = x.on("cuda")
    assert sent.X is x.X and [len(c) for c in sent.chunks()] == [16_384, 16_384, 7232]
    weights = [torch.ones(len(c), dtype=torch.float64) for c in sent.chunks()]
    few, scaled = subsample(sent, QuantSpec(), Weighting(), weights, 0.9)
    assert few.piece == sent.piece
    assert [len(w) for w in scaled] == [len(c) for c in few.chunks()]

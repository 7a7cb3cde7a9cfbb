"""Loading, refusing and gain folding, on tiny random models of every family."""

from __future__ import annotations

import time

import pytest
import torch
import transformers
from conftest import exact, logits, random_tokens, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from dfrot_lab import models
from dfrot_lab.models import ModelError

KINDS = list(models.ARCHITECTURES)
# GQA 4 over 2, tied; then one K/V head, untied, heads · head_dim ≠ d, biases wherever one can be
SHAPES = {
    "plain": {},
    "wide": {"tied": False, "kv_heads": 1, "head_dim": 24, "hidden": 36, "intermediate": 44},
}
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_folding_keeps_the_function(kind, shape):
    options = SHAPES[shape] | (BIASES.get(kind, {}) if shape == "wide" else {})
    tokens = random_tokens()
    for convert, tolerance in ((lambda m: m, 1e-4), (exact, 1e-9)):
        model = convert(models.tiny(kind, **options))
        before = logits(model, tokens)
        assert not models.is_folded(model)
        assert models.fold_gains(model) is model
        assert models.is_folded(model)
        assert relative(logits(model, tokens), before) < tolerance
        for norm in (*models.norm_sites(model).values(), model.model.norm):
            assert (norm.weight == 1).all()
    if kind == "qwen3":  # the per-head norms are not in the stream and keep their gains
        assert (model.model.layers[0].self_attn.q_norm.weight != 1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_folding_twice_is_folding_once(kind):
    model = models.fold_gains(models.tiny(kind))
    once = {k: v.clone() for k, v in model.state_dict().items()}
    models.fold_gains(model)
    assert all(torch.equal(v, once[k]) for k, v in model.state_dict().items())


def test_untying_frees_the_head_and_spares_the_embedding():
    model = models.tiny("llama", tied=True)
    table = model.model.embed_tokens.weight
    assert models.head(model).weight is table
    before = table.detach().clone()
    gain = model.model.norm.weight.detach().double()
    models.fold_gains(model)
    assert model.model.embed_tokens.weight is table and torch.equal(table, before)
    assert torch.equal(models.head(model).weight, (before.double() * gain).float())
    assert model.config.tie_word_embeddings is False


def test_sites_and_layers_come_in_order_of_execution():
    model = models.tiny("qwen2", layers=3)
    names = [f"layers.{i}.{role}" for i in range(3) for role in ("attention", "mlp")]
    assert list(models.norm_sites(model)) == names
    norms = list(models.norm_sites(model).values())
    assert norms[2] is model.model.layers[1].input_layernorm
    assert norms[3] is model.model.layers[1].post_attention_layernorm
    layer = models.layers(model)[1]
    assert layer.index == 1 and layer.mlp_output is model.model.layers[1].mlp.down_proj
    assert [w.out_features for w in layer.attention_inputs.values()] == [64, 32, 32]


@pytest.mark.parametrize("kind", KINDS)
def test_preserved_norms_compute_the_same_and_in_fp64(kind):
    tokens = random_tokens()
    model = models.tiny(kind).double()
    stock = logits(model, tokens)
    kept = logits(models.preserve_norm_dtype(model), tokens)
    assert 1e-12 < relative(kept, stock) < 1e-4
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = model.model.norm
    wanted = norm.weight * torch.nn.functional.rms_norm(x, (64,), eps=norm.eps)
    assert relative(norm(x), wanted) < 1e-14


@settings(max_examples=8)
@given(st.sampled_from(KINDS), st.integers(0, 99), st.sampled_from([48, 64]))
def test_tiny_is_a_function_of_its_arguments(kind, seed, hidden):
    a, b = (models.tiny(kind, seed=seed, hidden=hidden, layers=1) for _ in range(2))
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    other = models.tiny(kind, seed=seed + 1, hidden=hidden, layers=1)
    assert not any(map(torch.equal, a.parameters(), other.parameters()))
    assert a.config.hidden_size == hidden and a.config.vocab_size == 384


# --- loading ---------------------------------------------------------------------------------------


def test_load_folds_freezes_and_converts():
    model = models.load("tiny:qwen3", dtype="float64")
    assert models.is_folded(model) and not model.training
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in model.parameters())
    raw = models.load("tiny:qwen3", fold=False)
    assert not models.is_folded(raw) and models.head(raw).weight is raw.model.embed_tokens.weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_loads_again(kind, tmp_path):
    model, tokens = models.tiny(kind), random_tokens()
    model.save_pretrained(tmp_path / "raw")
    raw = models.load(str(tmp_path / "raw"), fold=False)
    assert torch.equal(logits(raw, tokens), logits(model, tokens))
    folded = models.load(str(tmp_path / "raw"))
    folded.save_pretrained(tmp_path / "folded")
    again = models.load(str(tmp_path / "folded"))  # not folded a second time, not tied again
    assert models.is_folded(again)
    assert torch.equal(logits(again, tokens), logits(folded, tokens))


def test_tokenizer_of_tiny_is_bytes():
    tokens = models.load_tokenizer("tiny:llama")("a\nb", add_special_tokens=False).input_ids
    assert tokens == [3 + ord(c) for c in "a\nb"]


REFUSED = {
    "gemma2": "post-norms",
    "gemma": r"1 \+ gain",
    "gpt2": "subtracts the mean",
    "opt": "subtracts the mean",
    "phi3": "fused",
    "mamba": "not in our table",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unsupported_families_are_refused_by_name_and_reason(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)  # no weights: refused before they are read
    with pytest.raises(ModelError, match=rf"'{kind}' cannot be rotated: .*{REFUSED[kind]}") as e:
        models.load(str(tmp_path))
    assert "Supported: llama, mistral, qwen2, qwen3" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_loaded_gemma2_is_refused_by_every_entry():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = AutoConfig.for_model("gemma2", **sizes, **heads)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for entry in (models.fold_gains, models.norm_sites, models.layers, models.head):
        with pytest.raises(ModelError, match="'gemma2' cannot be rotated: its post-norms"):
            entry(model)


@pytest.mark.parametrize("loader", [models.load, models.load_tokenizer])
@pytest.mark.parametrize(
    "model_id, said",
    [
        ("nobody/nothing-401", "hub cannot be reached .* `demo` works offline"),
        ("/no/such/folder", "neither 'demo'"),
        ("nonsense", "neither 'demo'"),
        ("./a/b", "neither 'demo'"),
        ("missing.gguf", "does not exist: check the path"),
    ],
)
def test_unknown_models_are_one_line_and_fast(loader, model_id, said):
    start = time.monotonic()
    with pytest.raises(ModelError, match=said) as e:
        loader(model_id)
    assert model_id in str(e.value) and "\n" not in str(e.value)
    assert time.monotonic() - start < 5


def test_unknown_tiny_model():
    with pytest.raises(ModelError, match="'gpt2' is unknown: use one of llama, mistral"):
        models.load("tiny:gpt2")


def test_a_damaged_folder_is_not_blamed_on_the_network(tmp_path):
    models.tiny("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()

    def fails(said: str) -> None:
        with pytest.raises(ModelError, match=f"could not be loaded: .*{said}") as e:
            models.load(str(tmp_path))
        assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
        assert "hub cannot be reached" not in str(e.value)
        assert "check that its files are whole" in str(e.value)

    weights.write_bytes(data[: len(data) // 2])
    fails("incomplete|not fully covered")
    weights.unlink()
    fails("model.safetensors")
    (tmp_path / "config.json").write_text("{")
    fails("config.json")


GATED = (
    "You are trying to access a gated repo.\nMake sure to have access to it\n401 Client Error. {}"
)


@pytest.mark.parametrize(
    "text, said",
    [
        (GATED, "gated: accept its licence on the hub and log in"),
        ("403 Client Error: Forbidden, sent {}", "gated"),
        ("We couldn't connect to the hub, sent {}", "the hub cannot be reached"),
        ("Illegal header value b'Bearer {}'", "Illegal header"),
        ("{} is not a valid model identifier, aggregated 4012", "not a valid model"),
    ],
)
@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_hub_errors_tell_the_reason_and_never_a_token(monkeypatch, text, said, kind):
    token = "hf_" + "Secret0" * 5
    monkeypatch.setenv("HF_TOKEN", token)

    def refuse(*args, **kwargs):
        raise kind(text.format(token))

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    for loader in (models.load, models.load_tokenizer):
        with pytest.raises(ModelError, match=said) as e:
            loader("owner/name")
        assert "'owner/name'" in str(e.value) and "\n" not in str(e.value)
        assert "Secret0" not in str(e.value)

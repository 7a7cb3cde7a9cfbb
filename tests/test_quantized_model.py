"""The quantized model against the same forward with every linear's input quantized by hand."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from conftest import NEWLINE, exact, haar, logits, random_tokens, relative
from dfrot_kernels import hadamard
from torch import nn

from dfrot_lab import (
    activations,
    evaluation,
    linears,
    massive,
    models,
    quantized_model,
    rotations,
)
from dfrot_lab.models import ModelError
from dfrot_lab.quantized_model import ModelSpec, build
from dfrot_lab.quantizers import QuantSpec, fake_quantize, round_to_nearest
from dfrot_lab.rotations import RotationError, Rotations

KINDS = list(models.ARCHITECTURES)
WEIGHTS = QuantSpec(symmetric=True, granularity="channel")
SPECS = {
    "A4": ModelSpec(),
    "A4 symmetric": ModelSpec(activations=QuantSpec(symmetric=True)),
    "A8 clipped": ModelSpec(activations=QuantSpec(bits=8, clip=0.9)),
    "A4 groups": ModelSpec(
        activations=QuantSpec(granularity="group", group_size=16), keep="massive"
    ),
    "W4": ModelSpec(weights=WEIGHTS, activations=None, clip_steps=5),
    "W4 groups": ModelSpec(
        weights=QuantSpec(granularity="group", group_size=16), activations=None, clip_steps=5
    ),
    "W4A4": ModelSpec(weights=WEIGHTS, clip_steps=0),
    "A4 massive": ModelSpec(keep="massive"),
    "A4 first": ModelSpec(keep="first"),
}
ROTATIONS = {
    "NR": Rotations(),
    "R1": Rotations(R1=haar(64, 1)),
    "all": Rotations(R1=haar(64, 1), R2=haar(16, 2), R4=True),
    "all and heads": Rotations(R1=haar(64, 1), R2=haar(16, 2), R4=True, heads=True),
}


def by_hand(model: nn.Module, rotation: Rotations, spec: ModelSpec) -> nn.Module:
    """Hooks on plain linears: R4 as a dense matrix, inputs quantized one linear at a time."""
    model = rotations.merge(copy.deepcopy(model), rotation)
    dense = torch.from_numpy(hadamard.matrix(model.config.intermediate_size)).double()
    dense /= dense[0].norm()
    across = torch.from_numpy(hadamard.matrix(model.config.num_attention_heads)).double()
    across = torch.kron(across / across[0].norm(), torch.eye(16, dtype=torch.float64))

    def quantized(x: torch.Tensor, kept: bool) -> torch.Tensor:
        q = x if spec.activations is None else fake_quantize(x, spec.activations)
        if kept and spec.keep == "first":
            q[:, 0] = x[:, 0]
        elif kept and spec.keep == "massive":
            plain = x if rotation.R1 is None else x @ torch.linalg.inv(rotation.R1).to(x.dtype)
            mask = massive.is_massive(plain, spec.activations)
            q[mask] = x[mask]
        return q

    def hook(name: str, _: nn.Module, inputs: tuple) -> torch.Tensor:
        (x,) = inputs
        if rotation.R4 and name.endswith("down_proj"):
            x = x @ dense.to(x.dtype)
        if rotation.heads and name.endswith("o_proj"):
            x = x @ across.to(x.dtype)
        return quantized(x, not name.endswith(("o_proj", "down_proj")))

    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            if spec.weights is not None:
                module.weight.data = round_to_nearest(
                    module.weight.data, spec.weights, steps=spec.clip_steps
                )
            module.register_forward_pre_hook(partial(hook, name))
    return model


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("spec", SPECS)
def test_equals_the_forward_by_hand(spec, rotation):
    """In fp64, where no code is so close to a tie that the order of summation decides it."""
    model = exact(models.fold_gains(models.tiny("qwen2", intermediate=80)))
    tokens = random_tokens(4, (3, 11))
    rotation, spec = ROTATIONS[rotation], SPECS[spec]
    found = logits(build(model, rotation, spec), tokens)
    assert relative(found, logits(by_hand(model, rotation, spec), tokens)) < 1e-9
    assert relative(found, logits(model, tokens)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_equals_the_forward_by_hand(kind):
    options = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    model = exact(models.fold_gains(models.tiny(kind, **options)))
    tokens, spec = random_tokens(5), ModelSpec(weights=WEIGHTS, keep="massive", clip_steps=3)
    found = logits(build(model, ROTATIONS["all"], spec), tokens)
    assert relative(found, logits(by_hand(model, ROTATIONS["all"], spec), tokens)) < 1e-9


def test_the_original_is_left_alone(llama):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    tokens = random_tokens()
    wanted = logits(llama, tokens)
    built = build(llama, ROTATIONS["all"], SPECS["W4A4"])
    logits(built, tokens)
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())
    assert llama.config.dfrot_merged == ["gains"]
    assert built.config.dfrot_merged == ["gains", "R1", "R2", "R4"]
    assert torch.equal(logits(llama, tokens), wanted)


def test_the_head_and_the_embedding_stay_in_floating_point(llama):
    built = build(llama, None, SPECS["W4A4"])
    assert type(models.head(built)) is nn.Linear
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(built.state_dict()[name], llama.state_dict()[name])
    kinds = {type(m) for m in built.model.layers.modules() if hasattr(m, "out_features")}
    assert kinds == {quantized_model.QuantLinear}
    w = built.model.layers[0].self_attn.q_proj.weight
    assert max(len(row.unique()) for row in w) <= 16


# --- shared inputs ---------------------------------------------------------------------------------


def count_quantizations(monkeypatch) -> list[tuple[int, ...]]:
    calls = []

    def counting(x, spec):
        calls.append(tuple(x.shape))
        return fake_quantize(x, spec)

    monkeypatch.setattr(linears, "fake_quantize", counting)
    return calls


def test_a_shared_input_is_quantized_once(llama, monkeypatch):
    calls = count_quantizations(monkeypatch)
    built = build(llama, None, ModelSpec())
    for _ in range(2):
        logits(built, random_tokens())
        assert calls == [(2, 12, 64), (2, 12, 64), (2, 12, 64), (2, 12, 96)] * 2  # qkv, o, gu, down
        calls.clear()


def test_nothing_stale_and_nothing_left_behind(llama):
    """Other inputs between two equal ones, and a pass that breaks off between q and v."""
    built = build(llama, None, ModelSpec())
    a, b = random_tokens(1), random_tokens(2)
    first, other = logits(built, a), logits(built, b)
    assert relative(first, other) > 0.01
    assert torch.equal(logits(built, a), first)
    held = [m._last for m in built.modules() if isinstance(m, quantized_model.InputQuantizer)]
    assert len(held) == 8 and held == [None] * 8

    def stop(*_):
        raise KeyboardInterrupt

    key = built.model.layers[0].self_attn.k_proj
    with key.register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
        logits(built, b)
    assert torch.equal(logits(built, a), first)


def test_readers_of_one_quantizer_follow_their_input():
    quantizer = quantized_model.InputQuantizer(readers=3)
    quantizer.spec = QuantSpec()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 4, 8, generator=generator) for _ in range(2))
    for x in (a, b, b, a, a, a, a, b):
        assert torch.equal(quantizer(x), fake_quantize(x, QuantSpec()))


def test_unquantized_inputs_pass_as_they_are():
    x = torch.ones(1, 2, 3)
    assert quantized_model.InputQuantizer(readers=3)(x) is x


# --- kept tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_massive_tokens_are_kept_and_counted(llama, rotation):
    tokens = random_tokens(6, (5, 12))
    tokens[2, 3] = NEWLINE
    built = build(llama, ROTATIONS[rotation], ModelSpec(keep="massive"))
    logits(built, tokens)
    kept = quantized_model.kept_tokens(built)
    assert list(kept) == list(models.norm_sites(llama))
    _, site, x = activations.capture(llama, tokens)[0]  # nothing quantized yet at the first site
    assert torch.equal(kept[site], massive.is_massive(x, QuantSpec()).sum(0))
    for count in kept.values():
        assert count.shape == (12,) and count[6] == 5 and count[3] >= 1
        assert count.sum() <= 8  # at most two ordinary tokens
    logits(built, tokens)
    for site, count in quantized_model.kept_tokens(built).items():
        assert count[6] == 10, site


def test_kept_tokens_bypass_only_the_inputs_that_read_the_norms(llama):
    built = build(llama, ROTATIONS["all"], ModelSpec(keep="massive"))
    layer = built.model.layers[0]
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    x[0, 4] = 0
    x[0, 4, 5] = 8.0
    y = x @ ROTATIONS["all"].R1.float()
    for linear in (layer.self_attn.q_proj, layer.mlp.up_proj):
        q = linear.quantizer(y)
        assert torch.equal(q[0, 4], y[0, 4])
        changed = (q != y).any(-1)[0]
        assert changed.sum() >= 6  # not the others
    assert layer.self_attn.o_proj.quantizer.keep is None
    assert layer.mlp.down_proj.quantizer.keep is None


def test_first_keeps_position_zero_of_each_sequence(llama):
    built = build(llama, ROTATIONS["R1"], ModelSpec(keep="first"))
    logits(built, random_tokens(0, (3, 7)))
    kept = quantized_model.kept_tokens(built)
    assert len(kept) == 4
    for count in kept.values():
        assert count.tolist() == [3, 0, 0, 0, 0, 0, 0]


def test_drained_counts_name_positions_and_sites_once(llama):
    built = build(llama, ROTATIONS["R1"], ModelSpec(keep="first"))
    assert quantized_model.drain_kept(built) == []
    logits(built, random_tokens(0, (2, 5)))
    assert quantized_model.drain_kept(built) == [(0, list(models.norm_sites(llama)))]
    assert quantized_model.drain_kept(built) == [] == list(quantized_model.kept_tokens(built))


@pytest.mark.parametrize("spec", [ModelSpec(), ModelSpec(activations=None, keep="massive")])
def test_nothing_is_counted_where_nothing_is_kept(llama, spec):
    built = build(llama, None, spec)
    logits(built, random_tokens())
    assert quantized_model.kept_tokens(built) == {}


def test_keeping_massive_tokens_brings_the_model_closer(llama):
    tokens = random_tokens(7, (4, 30))
    wanted = evaluation.perplexity(llama, tokens).value
    gaps = [
        abs(evaluation.perplexity(build(llama, ROTATIONS["R1"], spec), tokens).value - wanted)
        for spec in (ModelSpec(activations=QuantSpec(bits=8)), ModelSpec())
    ]
    assert gaps[0] < gaps[1]


# --- still a transformers model --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_generates(kind):
    model = models.fold_gains(models.tiny(kind))
    built = build(model, ROTATIONS["all"], ModelSpec(keep="massive"))
    assert isinstance(built, transformers.PreTrainedModel) and type(built) is type(model)
    out = built.generate(
        random_tokens(0, (2, 5)), max_new_tokens=6, do_sample=False, eos_token_id=-1
    )
    assert out.shape == (2, 11)
    exactly = build(model, ROTATIONS["all"], ModelSpec(activations=None))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    wanted = model.generate(random_tokens(0, (2, 5)), **options)
    assert torch.equal(exactly.generate(random_tokens(0, (2, 5)), **options), wanted)


def test_sequences_of_a_batch_are_independent(llama):
    built = build(llama, ROTATIONS["all"], SPECS["A4 massive"])
    tokens = random_tokens(8, (3, 9))
    alone = torch.cat([logits(built, t[None]) for t in tokens])
    together = logits(built, tokens)
    agree = (together - alone).abs().amax((1, 2)) / alone.abs().max() < 1e-3
    assert agree.all()


def test_copies_are_independent(llama):
    built = build(llama, ROTATIONS["R1"], ModelSpec(keep="first"))
    tokens = random_tokens()
    wanted = logits(built, tokens)
    twin = copy.deepcopy(built)
    assert torch.equal(logits(twin, tokens), wanted)
    for p in twin.parameters():
        p.data.zero_()
    assert torch.equal(logits(built, tokens), wanted)
    logits(twin, tokens)
    ours, theirs = (quantized_model.kept_tokens(m)["layers.0.mlp"] for m in (built, twin))
    assert ours[0] == 4 and theirs[0] == 6  # the twin started from what had been counted


def test_saved_weights_load_as_a_plain_model_unless_r4_is_in_them(llama, tmp_path):
    tokens = random_tokens()
    for name in ("R1", "all"):
        build(llama, ROTATIONS[name], ModelSpec(activations=None)).save_pretrained(tmp_path / name)
    again = models.load(str(tmp_path / "R1"))
    assert relative(logits(again, tokens), logits(llama, tokens)) < 1e-4
    with pytest.raises(RotationError, match=r"\['R1'\] already merged"):
        build(again, ROTATIONS["R1"], ModelSpec())
    with pytest.raises(ModelError, match=r"saved with R4 merged, .* load the original"):
        models.load(str(tmp_path / "all"))


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_a_built_model_is_not_built_again(llama, rotation):
    built = build(llama, ROTATIONS[rotation], ModelSpec())
    with pytest.raises(ValueError, match="quantized already: build from the one that was loaded"):
        build(built, ROTATIONS["R1"], ModelSpec())
    merged = rotations.merge(copy.deepcopy(llama), ROTATIONS["all"])
    with pytest.raises(RotationError, match=r"\['R1'\] already merged"):
        build(merged, ROTATIONS["R1"], ModelSpec())


def test_gains_must_be_folded():
    with pytest.raises(RotationError, match="not folded"):
        build(models.tiny("llama"), None, ModelSpec())


@pytest.mark.parametrize(
    "options, said",
    [
        ({"keep": "some"}, "keep = 'some': use one of none, massive, first"),
        ({"weights": QuantSpec()}, "weights are per 'channel' or 'group', not 'token'"),
    ],
)
def test_bad_specs(options, said):
    with pytest.raises(ValueError, match=said):
        ModelSpec(**options)


def test_a_weight_group_must_divide(llama):
    weights = QuantSpec(granularity="group", group_size=48)
    with pytest.raises(ValueError, match="group_size = 48 does not divide the last dimension 64"):
        build(llama, None, ModelSpec(weights=weights))


@pytest.mark.parametrize(
    "bits, weights, acts", [("4-4-16", 4, 4), ("16-4-16", None, 4), ("3-16-16", 3, None)]
)
def test_the_fields_notation(bits, weights, acts):
    spec = ModelSpec.of(bits, keep="first")
    assert spec.keep == "first"
    wanted = weights and QuantSpec(bits=weights, symmetric=True, granularity="channel")
    assert spec.weights == wanted
    assert spec.activations == (acts and QuantSpec(bits=acts))


@pytest.mark.parametrize("bits", ["4", "4-4", "a-b-c", "1-4-16", ""])
def test_bad_notation_names_the_value(bits):
    with pytest.raises(ValueError, match=f"bits = '?{bits[:1]}"):
        ModelSpec.of(bits)


# --- static steps, changed settings ----------------------------------------------------------------


def test_static_steps_are_the_extremes_of_the_calibration_inputs(llama):
    tokens, spec = random_tokens(), ModelSpec.of("16-8-16", per="tensor")
    rotation = ROTATIONS["all"]
    built = build(llama, rotation, spec, calibration=tokens)
    plain = build(llama, rotation, ModelSpec(activations=None))
    inputs = {}
    for name, module in plain.named_modules():
        if isinstance(module, quantized_model.QuantLinear):
            turn = module.online or (lambda x: x)
            module.register_forward_pre_hook(
                lambda m, x, name=name, turn=turn: inputs.__setitem__(name, turn(x[0]))
            )
    logits(plain, tokens)
    assert len(inputs) == 14
    for name, x in inputs.items():
        scale, zero = built.get_submodule(name).quantizer.static
        low, high = min(x.min().item(), 0), max(x.max().item(), 0)
        assert scale.item() == pytest.approx((high - low) / 255, rel=1e-5)
        assert zero.item() == round(-low / scale.item())
    far = relative(logits(built, tokens), logits(plain, tokens))
    assert 0 < far < 0.5
    with pytest.raises(ValueError, match="static steps need calibration tokens"):
        build(llama, rotation, spec)


def test_static_steps_do_not_follow_the_input(llama):
    built = build(llama, None, ModelSpec.of("16-8-16", per="tensor"), calibration=random_tokens())
    quantizer = built.model.layers[0].self_attn.q_proj.quantizer
    scale, zero = quantizer.static
    x = torch.full((1, 1, 64), 1e6)
    assert (quantizer(x) == (255 - zero) * scale).all()  # clamped to the largest code


@pytest.mark.parametrize("first", SPECS)
@pytest.mark.parametrize("rotation", ["NR", "all"])
def test_requantizing_is_building_anew(llama, first, rotation):
    tokens, r = random_tokens(), ROTATIONS[rotation]
    weights, steps = SPECS[first].weights, SPECS[first].clip_steps
    built = build(llama, r, SPECS[first])
    for setting in (
        ModelSpec.of("16-4-4", keep="massive"),
        ModelSpec.of("16-8-16", per="group", group_size=16, clip=0.9),
        ModelSpec.of("16-8-4", per="tensor"),
        ModelSpec.of("16-16-16"),
    ):
        then = replace(setting, weights=weights, clip_steps=steps)
        quantized_model.requantize(built, r, then, calibration=tokens)
        anew = build(llama, r, then, calibration=tokens)
        assert torch.equal(logits(built, tokens), logits(anew, tokens))


def test_only_a_built_model_is_requantized(llama):
    with pytest.raises(ValueError, match=r"not quantized: make it with quantized_model\.build"):
        quantized_model.requantize(llama, None, ModelSpec())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["R1", "R1 and R2"])
def test_a_merged_checkpoint_needs_this_package_no_more(kind, name, tmp_path):
    model, tokens = models.fold_gains(models.tiny(kind)), random_tokens()
    rotation = Rotations(R1=haar(64, 1), R2=haar(16, 2) if "R2" in name else None)
    rotations.merge(copy.deepcopy(model), rotation).save_pretrained(tmp_path / "model")
    torch.save(tokens, tmp_path / "tokens.pt")
    script = (
        "import sys, torch, transformers\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained('model', dtype=torch.float32)\n"
        "torch.save(m(torch.load('tokens.pt')).logits.detach(), 'logits.pt')\n"
        "assert not any(n.startswith('dfrot') for n in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True)
    assert relative(torch.load(tmp_path / "logits.pt"), logits(model, tokens)) < 1e-4


def test_heads_without_a_hadamard_are_refused():
    model = models.fold_gains(models.tiny("llama", hidden=96, heads=6, kv_heads=2, head_dim=16))
    with pytest.raises(RotationError, match="no Hadamard matrix across 6 heads"):
        build(model, Rotations(heads=True), ModelSpec())

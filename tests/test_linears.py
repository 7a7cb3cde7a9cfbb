"""Packed linears against the fake-quantized ones they take the place of."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from conftest import haar, logits, random_tokens, relative
from dfrot_kernels import reference
from dfrot_kernels.checks import KernelError
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dfrot_lab import linears, models, quantized_model, rotations
from dfrot_lab.linears import InputQuantizer, Int4Linear, QuantLinear
from dfrot_lab.quantized_model import ModelSpec, build, pack
from dfrot_lab.quantizers import QuantSpec, round_to_nearest
from dfrot_lab.rotations import Rotations

WEIGHTS = QuantSpec(symmetric=True, granularity="channel")
ALL = Rotations(R1=haar(64, 1), R2=haar(16, 2), R4=True)


def packed_pair(kind: str = "llama", bits: str = "4-4-16", rotation=ALL, **how):
    model = models.fold_gains(models.tiny(kind))
    built = build(model, rotation, ModelSpec.of(bits, clip_steps=5))
    return built, pack(copy.deepcopy(built), **how)


@given(
    seed=st.integers(0, 99), out=st.integers(1, 9), half=st.integers(1, 20), steps=st.integers(0, 9)
)
def test_grid_finds_the_codes_of_a_fake_quantized_weight(seed, out, half, steps):
    w = torch.randn(out, 2 * half, generator=torch.Generator().manual_seed(seed))
    w[0] = 0
    q = round_to_nearest(w, WEIGHTS, steps=steps)
    codes, scale = linears.grid(q)
    assert codes.dtype == torch.int8 and codes.min() >= -8 and codes.max() <= 7
    assert torch.allclose(codes * scale[:, None], q, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grid_sees_through_the_rounding_of_half_precision(dtype):
    codes = torch.randint(-8, 8, (64, 96), generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    codes[:, :2] = torch.tensor([-8, 7])
    scale = torch.rand(64) + 0.1
    found, steps = linears.grid((codes * scale[:, None]).to(dtype))
    assert (found == codes).all()
    assert relative(steps, scale) < torch.finfo(dtype).eps


@pytest.mark.parametrize("largest", [6e-5, 2e-5, 1e-5, 3e-6])
def test_grid_of_rows_that_half_precision_holds_as_subnormals(largest):
    codes = torch.randint(-7, 8, (50, 64), generator=torch.Generator().manual_seed(0))
    codes[:, 0] = 7
    w = (codes * (largest / 7)).half()
    found, scale = linears.grid(w)
    last = 2.0**-24  # the distance of subnormal numbers
    assert ((found * scale[:, None]).double() - w.double()).abs().max() <= 1.1 * last


def test_grid_refuses_what_is_not_on_one():
    w = torch.randn(4, 32)
    w[:2] = round_to_nearest(w[:2], WEIGHTS)
    with pytest.raises(ValueError, match=r"row 2 .* 4-bit grid.*4-4-16"):
        linears.grid(w)
    with pytest.raises(ValueError, match="grid"):  # +8 is no code
        linears.grid(torch.tensor([[8.0, 1.0, 3.0, 5.0, 7.0, 2.0]]))


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
def test_packed_model_computes_what_the_fake_quantized_one_does(kind):
    built, packed = packed_pair(kind)
    assert any(isinstance(m, Int4Linear) for m in packed.modules())
    assert not any(isinstance(m, (QuantLinear, InputQuantizer)) for m in packed.modules())
    tokens = random_tokens(3)
    assert relative(logits(packed, tokens), logits(built, tokens)) < 1e-4


def test_codes_of_every_layer_agree_given_equal_input():
    built, packed = packed_pair()
    inputs = {}

    def remember(name):
        return lambda module, args: inputs.__setitem__(name, args[0])

    quantized = {n: m for n, m in built.named_modules() if isinstance(m, QuantLinear)}
    for name, module in quantized.items():
        module.register_forward_pre_hook(remember(name))
    logits(built, random_tokens(5))
    for name, old in quantized.items():
        x, new = inputs[name], packed.get_submodule(name)
        wanted = x if old.online is None else old.online(x)
        wanted = reference.quantize(wanted, old.quantizer.spec)
        found = new.quantizer(x)
        codes, zero = found.codes.int() + 8, found.zero + 8
        assert (zero - wanted.zero[..., 0]).abs().max() == 0, name
        assert (codes - wanted.codes).abs().max() <= 1, name
        assert (codes != wanted.codes).float().mean() < 1e-3, name  # at ties alone
        assert relative(new(x), old(x)) < 1e-3, name


def test_packed_bytes_and_nothing_else_of_the_weights_stays():
    built, packed = packed_pair()
    wanted = {n: m.weight.shape for n, m in built.named_modules() if isinstance(m, QuantLinear)}
    for name, (out, inner) in wanted.items():
        module = packed.get_submodule(name)
        held = sum(t.numel() * t.element_size() for t in module.buffers(recurse=False))
        assert held == out * inner // 2 + 8 * out, name
    assert not [n for n, p in packed.named_parameters() if ".layers." in n and p.dim() == 2]
    wide = {s for s in wanted.values() if s[0] != s[1]}  # square ones may be other tests' rotations
    logits(packed, random_tokens(1))
    del built, module
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    alive = [t for t in alive if t.is_floating_point()]
    assert not [t.shape for t in alive if t.shape in wide]


def test_q_k_and_v_share_one_quantization(monkeypatch):
    _, packed = packed_pair()
    calls = []
    plain = reference.quantize_int4

    def counted(x, **how):
        calls.append(x.shape)
        return plain(x, **how)

    monkeypatch.setattr(reference, "quantize_int4", counted)
    monkeypatch.setattr(reference, "hadamard_quantize", counted)
    for module in packed.modules():
        if isinstance(module, (Int4Linear, linears.Int4Quantizer)):
            module.backend = "torch"
    logits(packed, random_tokens(1))
    assert len(calls) == 4 * len(models.layers(packed))  # q/k/v, o, gate/up, down
    held = [m._last for m in packed.modules() if isinstance(m, linears.Int4Quantizer)]
    assert held == [None] * len(held)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_both_backends_give_the_same_logits(backend):
    built, packed = packed_pair(backend=backend)
    tokens = random_tokens(2, (1, 7))
    assert relative(logits(packed, tokens), logits(built, tokens)) < 1e-4


def test_w4a16_keeps_activations_in_floating_point():
    built, packed = packed_pair(bits="4-16-16", backend="torch")
    assert relative(logits(packed, random_tokens(1)), logits(built, random_tokens(1))) < 1e-5


def test_cross_head_hadamard_and_packed_kv_models():
    turned = Rotations(R1=ALL.R1, R2=ALL.R2, R4=True, heads=True)
    built, packed = packed_pair(bits="4-4-4", rotation=turned, backend="torch")
    assert relative(logits(packed, random_tokens(1)), logits(built, random_tokens(1))) < 1e-3


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"bits": "4-8-16"}, "8 bits per 'token'"),
        ({"bits": "4-4-16", "keep": "massive"}, "kept tokens"),
        ({"bits": "16-4-16"}, r"layers\.0\.self_attn\.q_proj: row 0"),
        ({"bits": "4-4-16", "per": "group", "group_size": 16}, "per 'group'"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused_and_nothing_is_changed(llama, how, message):
    built = build(llama, None, ModelSpec.of(how.pop("bits"), clip_steps=0, **how))
    with pytest.raises(ValueError, match=message):
        pack(built)
    assert not any(isinstance(m, Int4Linear) for m in built.modules())


def test_packing_twice_building_or_changing_a_packed_model_is_refused(llama):
    with pytest.raises(ValueError, match=r"not quantized.*build"):
        pack(llama)
    packed = pack(build(llama, None, ModelSpec.of("4-4-16", clip_steps=0)), backend="torch")
    with pytest.raises(ValueError, match="packed already"):
        pack(packed)
    with pytest.raises(ValueError, match="packed already"):
        quantized_model.requantize(packed, None, ModelSpec.of("4-4-16"))
    with pytest.raises(ValueError, match="quantized already"):
        build(packed, None, ModelSpec())
    with pytest.raises(KernelError, match="'cuda-c': use one of torch, triton"):
        pack(build(llama, None, ModelSpec.of("4-4-16", clip_steps=0)), backend="cuda-c")


def test_a_packed_model_generates(llama):
    model = build(llama, Rotations(R1=rotations.random_hadamard(64)), ModelSpec.of("4-4-16"))
    tokens = random_tokens(4, (1, 6))
    wanted = model.generate(tokens, max_new_tokens=5, do_sample=False)
    packed = pack(model, backend="torch")
    assert (packed.generate(tokens, max_new_tokens=5, do_sample=False) == wanted).all()
    assert isinstance(packed, nn.Module)

"""GPTQ against a naive reference and against RTN; the layer walk against a whole forward pass."""

import copy

import pytest
import torch
from conftest import own_for_each_head
from dfrot_kernels import hadamard
from hypothesis import given
from hypothesis import strategies as st

from dfrot_lab import gptq, hessians, models, quantized_model, rotations
from dfrot_lab.gptq import GPTQ, GPTQError
from dfrot_lab.quantizers import QuantSpec, fake_quantize, round_to_nearest, search_step
from dfrot_lab.rotations import Rotations

W4 = QuantSpec(symmetric=True, granularity="channel")


def problem(rows, inputs, tokens=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.float64) / inputs**0.5
    x = torch.randn(tokens or 8 * inputs, inputs, generator=g, dtype=torch.float64) @ (mix + 0.3)
    return torch.randn(rows, inputs, generator=g, dtype=torch.float64), x


def error(x, w, q):
    return ((x @ (w - q).mT).square().sum() / (x @ w.mT).square().sum()).item()


def naive(w, hessian, spec, damp):
    """Optimal brain quantization column by column, inverting what is left of H anew each time."""
    h = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=w.dtype)
    scale, zero = search_step(w, spec, steps=80)
    w, q = w.clone(), torch.empty_like(w)
    for i in range(w.shape[1]):
        inverse = torch.linalg.inv(h[i:, i:])
        q[:, i : i + 1] = fake_quantize(w[:, i : i + 1], spec, scale=scale, zero=zero)
        w[:, i:] -= (w[:, i] - q[:, i])[:, None] * inverse[0] / inverse[0, 0]
    return q


@given(
    rows=st.integers(1, 9),
    inputs=st.integers(2, 40),
    block=st.integers(1, 48),
    seed=st.integers(0, 99),
)
def test_equals_the_naive_form_for_any_block(rows, inputs, block, seed):
    w, x = problem(rows, inputs, seed=seed)
    got = gptq.quantize_weight(w, x.mT @ x, W4, GPTQ(block=block))
    torch.testing.assert_close(got, naive(w, x.mT @ x, W4, 0.01), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", [GPTQ(), GPTQ(act_order=True), GPTQ(block=7)])
@pytest.mark.parametrize("group", [None, 16])
def test_beats_rounding_to_nearest(how, group):
    spec = QuantSpec(symmetric=True, granularity="group" if group else "channel", group_size=group)
    w, x = problem(24, 64)
    q = gptq.quantize_weight(w, x.mT @ x, spec, how)
    assert error(x, w, q) < 0.8 * error(x, w, round_to_nearest(w, spec))


def test_groups_do_not_depend_on_the_block():
    spec = QuantSpec(symmetric=True, granularity="group", group_size=24)
    w, x = problem(5, 96)
    small, large = (gptq.quantize_weight(w, x.mT @ x, spec, GPTQ(block=b)) for b in (10, 96))
    torch.testing.assert_close(small, large, rtol=1e-9, atol=1e-9)


def test_white_inputs_give_rounding_to_nearest():
    w, _ = problem(6, 20)
    q = gptq.quantize_weight(w, torch.eye(20, dtype=torch.float64), W4)
    torch.testing.assert_close(q, round_to_nearest(w, W4))


def test_unused_inputs_are_set_to_zero():
    w, x = problem(3, 12)
    x[:, 5] = 0
    q = gptq.quantize_weight(w, x.mT @ x, W4)
    assert (q[:, 5] == 0).all() and torch.isfinite(q).all()


def test_a_singular_hessian_is_damped_more_and_said(recwarn):
    w, _ = problem(3, 8)
    v = torch.ones(8, 1, dtype=torch.float64)
    tiny = GPTQ(damp=1e-17)
    q = gptq.quantize_weight(w, v @ v.mT, W4, tiny)
    assert torch.isfinite(q).all()
    assert "damping raised" in str(recwarn[0].message)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_hessian_is_refused(bad):
    w, x = problem(3, 8)
    h = x.mT @ x
    h[2, 3] = bad
    with pytest.raises(GPTQError, match="NaN or Inf"):
        gptq.quantize_weight(w, h, W4)
    with pytest.raises(GPTQError, match=r"\[5, 5\]"):
        gptq.quantize_weight(w, torch.eye(5), W4)


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
def test_the_layer_walk_follows_the_model(kind):
    """With 16-bit weights nothing is lost, so the hidden states must be the model's own."""
    model = models.fold_gains(models.tiny(kind))
    tokens = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    rotation = Rotations.standard(model, rotations.random_hadamard(64, 0))
    q = rotations.merge(models.fold_gains(models.tiny(kind)), rotation)
    before = {n: p.clone() for n, p in q.named_parameters()}
    errors = gptq.quantize_layers(
        q, tokens, QuantSpec(bits=16, symmetric=True, granularity="channel"),
        GPTQ(clip_steps=1), online=(None, hadamard.transform),
    )  # fmt: skip
    assert len(errors) == 14 and max(errors.values()) < 1e-7
    for name, p in q.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=1e-3)


def test_held_inputs_are_those_computed_twice(monkeypatch):
    tokens = torch.randint(3, 300, (3, 80), generator=torch.Generator().manual_seed(1))
    weights = []
    for room in (gptq.KEPT, 0):
        monkeypatch.setattr(gptq, "KEPT", room)
        model = models.fold_gains(models.tiny("llama"))
        gptq.quantize_layers(model, tokens, W4, GPTQ(clip_steps=1))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("rotated", [True, False])
def test_whole_model_error_is_below_rtn(rotated):
    model = models.fold_gains(models.tiny("llama", planted=30))
    tokens = torch.randint(3, 300, (8, 64), generator=torch.Generator().manual_seed(1))
    rotation = Rotations.standard(model, rotations.random_hadamard(64, 0) if rotated else None)
    with torch.inference_mode():
        reference = model(tokens).logits
        loss = {}
        for method in ("rtn", "gptq"):
            spec = quantized_model.ModelSpec.of("4-16-16", method=method)
            q = quantized_model.build(model, rotation, spec, calibration=tokens)
            loss[method] = (q(tokens).logits - reference).square().mean().item()
    assert loss["gptq"] < 0.8 * loss["rtn"]


def test_too_few_tokens_are_refused():
    model = models.fold_gains(models.tiny("llama"))
    with pytest.raises(GPTQError, match="32 calibration tokens"):
        gptq.quantize_layers(model, torch.ones(1, 32, dtype=torch.long), W4)
    spec = quantized_model.ModelSpec.of("4-16-16", method="gptq")
    with pytest.raises(GPTQError, match="calibration"):
        quantized_model.build(model, None, spec)


@pytest.mark.parametrize(("field", "value"), [("damp", 0), ("damp", 1), ("block", 0)])
def test_bad_settings(field, value):
    with pytest.raises(ValueError, match=f"{field} = "):
        GPTQ(**{field: value})


# --- Hessians of the floating-point model -----------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", models.ARCHITECTURES)
def test_a_conjugated_hessian_is_that_of_the_rotated_model(kind, own, tmp_path):
    model = models.fold_gains(models.tiny(kind))
    tokens = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    rotation = Rotations(
        R1=rotations.random_orthogonal(64, 0),
        R2=own_for_each_head(model, 1) if own else rotations.random_orthogonal(16, 1),
        R4=True,
        heads=True,
    )
    shared = hessians.collect(model, tokens, tmp_path, {"key": "k"})
    assert hessians.load(tmp_path, 16).metadata == {"key": "k"}
    q, of = rotations.merge(copy.deepcopy(model), rotation), shared.of(rotation)
    seen = []

    def compare(layer, linears, inputs):
        wanted = gptq.hessian_of(inputs)
        found = of(layer.index, next(iter(linears)))
        assert ((found - wanted).norm() / wanted.norm()).item() < 1e-4
        seen.append(found)

    gptq.walk(q, tokens, compare, online=rotations.online(q, rotation))
    assert len(seen) == 8


def test_shared_hessians_quantize_nearly_as_well(tmp_path):
    model = models.fold_gains(models.tiny("llama", planted=30))
    tokens = torch.randint(3, 300, (8, 64), generator=torch.Generator().manual_seed(1))
    rotation = Rotations.standard(model, rotations.random_hadamard(64, 0))
    shared = hessians.collect(model, tokens, tmp_path, {})
    spec = quantized_model.ModelSpec.of("4-16-16", method="gptq")
    rtn = quantized_model.ModelSpec.of("4-16-16")
    reference = model(tokens).logits
    loss = {
        name: (m(tokens).logits - reference).square().mean().item()
        for name, m in {
            "shared": quantized_model.build(model, rotation, spec, hessians=shared),
            "exact": quantized_model.build(model, rotation, spec, calibration=tokens),
            "rtn": quantized_model.build(model, rotation, rtn),
        }.items()
    }
    assert loss["shared"] < 0.8 * loss["rtn"] and loss["shared"] < 1.5 * loss["exact"]


def test_hessians_cut_short_are_not_taken_for_whole(tmp_path, monkeypatch):
    model = models.fold_gains(models.tiny("llama"))
    tokens = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    written = []

    def fail(self, *given, **keywords):
        written.append(self)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return original(self, *given, **keywords)

    original = type(tmp_path).write_bytes
    monkeypatch.setattr(type(tmp_path), "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        hessians.collect(model, tokens, tmp_path / "h", {})
    assert sorted(p.name for p in (tmp_path / "h").iterdir()) == ["layer-000.safetensors"]


def test_hessians_that_another_run_replaced_are_refused(tmp_path):
    model = models.fold_gains(models.tiny("llama"))
    tokens = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    mine = hessians.collect(model, tokens, tmp_path, {"key": "mine"}).of(rotations.Rotations())
    assert mine(1, "mlp.down_proj").shape == (96, 96)
    hessians.collect(model, tokens.flip(1), tmp_path, {"key": "another"})
    with pytest.raises(hessians.HessiansError, match="holds other Hessians by now, of layer 1"):
        mine(1, "mlp.down_proj")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_shared_hessians_serve_a_model_on_a_gpu(tmp_path):
    """They are read and turned on the CPU."""
    tokens = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    found = {}
    for device in ("cpu", "cuda"):
        model = models.fold_gains(models.tiny("llama")).to(device)
        shared = hessians.collect(model, tokens.to(device), tmp_path / device, {})
        rotation = rotations.Rotations.standard(model, rotations.random_hadamard(64, 0))
        spec = quantized_model.ModelSpec.of("4-16-16", method="gptq")
        built = quantized_model.build(model, rotation, spec, hessians=shared)
        found[device] = built.model.layers[0].mlp.down_proj.weight.cpu()
    assert (found["cpu"] - found["cuda"]).abs().max() < 0.2 * found["cpu"].abs().max()

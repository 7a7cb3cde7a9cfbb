"""The quantizer's definition, against a loop over numbers and against its own algebra."""

from __future__ import annotations

import pytest
import torch
from conftest import slow_quantize
from dfrot_kernels.reference import QuantSpec, cut, dequantize, fake_quantize, quantize, step
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def specs(draw, clips: tuple[float, ...] = (1.0, 0.9, 0.5)) -> QuantSpec:
    granularity = draw(st.sampled_from(["token", "channel", "group", "tensor"]))
    return QuantSpec(
        bits=draw(st.integers(2, 8)),
        symmetric=draw(st.booleans()),
        granularity=granularity,
        group_size=draw(st.sampled_from([1, 3, 7, 16])) if granularity == "group" else None,
        clip=draw(st.sampled_from(clips)),
    )


def rows(seed: int, spec: QuantSpec, dtype: torch.dtype = torch.float64) -> Tensor:
    """[2, rows, D], D ragged; rows of all scales, one of one sign, one of zeros, one constant."""
    generator = torch.Generator().manual_seed(seed)
    count, d = (int(torch.randint(4, 9, (), generator=generator)) for _ in range(2))
    d = 5 * d - 3 if spec.group_size is None else d // 3 * spec.group_size
    x = torch.randn(2, count, d, generator=generator, dtype=torch.float64)
    x *= 10.0 ** torch.randint(-3, 4, (2, count, 1), generator=generator)
    x[0, 0], x[0, 1], x[1, 2] = x[0, 0].abs(), 0, -0.3
    return x.to(dtype)


SEEDS = st.integers(0, 2**16)


@given(specs(), SEEDS)
def test_equals_the_loop(spec, seed):
    x = rows(seed, spec)
    before = x.clone()
    codes, values = slow_quantize(x, spec)
    q = quantize(x, spec)
    assert torch.equal(q.codes.reshape(x.shape), codes)
    assert torch.equal(dequantize(q), values)
    assert torch.equal(fake_quantize(x, spec), values)
    assert torch.equal(x, before)


@given(specs(), SEEDS)
def test_codes_are_integers_in_range(spec, seed):
    codes = quantize(rows(seed, spec, torch.float32), spec).codes
    low, high = spec.code_range
    assert (high - low + 1, low) == (2**spec.bits, -(2 ** (spec.bits - 1)) * spec.symmetric)
    assert torch.equal(codes, codes.round())
    assert low <= codes.min() and codes.max() <= high


@given(specs(clips=(1.0,)), SEEDS)
def test_idempotent(spec, seed):
    once = fake_quantize(rows(seed, spec), spec)
    assert torch.allclose(fake_quantize(once, spec), once, rtol=1e-12, atol=0)


@given(specs(), SEEDS)
def test_error_is_half_a_step_where_nothing_is_clipped(spec, seed):
    x = rows(seed, spec)
    q, cuts = quantize(x, spec), cut(x, spec)
    error = (dequantize(q).reshape(cuts.shape) - cuts).abs() / q.scale
    unclipped = torch.round(cuts / q.scale) + q.zero == q.codes
    assert error[unclipped].max() <= 0.5 + 1e-12
    if spec.clip == 1:  # rounding the zero point then costs at most another half
        assert error.max() <= 1 + 1e-12
        assert not spec.symmetric or unclipped.all()


@given(specs(), SEEDS, st.integers(-20, 20), st.sampled_from([torch.float32, torch.float64]))
def test_powers_of_two_pass_through(spec, seed, power, dtype):
    x = rows(seed, spec, dtype)
    assert torch.equal(fake_quantize(x * 2.0**power, spec), fake_quantize(x, spec) * 2.0**power)


@given(specs(), SEEDS)
def test_rows_are_independent_and_nan_stays_in_its_row(spec, seed):
    x = rows(seed, spec)
    if spec.granularity == "tensor":
        return
    poisoned = x.clone()
    poisoned[1, 1, 0] = torch.nan
    expected, found = fake_quantize(x, spec), fake_quantize(poisoned, spec)
    assert found[1, 1, 0].isnan()
    found[1, 1] = expected[1, 1]
    assert torch.equal(found, expected)


@given(SEEDS, st.booleans(), st.sampled_from([1, 4, 9]))
def test_a_group_is_a_token_of_its_own(seed, symmetric, size):
    group = QuantSpec(symmetric=symmetric, granularity="group", group_size=size)
    x = rows(seed, group)
    alone = fake_quantize(x.reshape(-1, size), QuantSpec(symmetric=symmetric))
    assert torch.equal(fake_quantize(x, group), alone.reshape(x.shape))


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zero_and_scales_positive(symmetric):
    spec = QuantSpec(symmetric=symmetric)
    scale, zero = step(torch.zeros(3, 7), spec)
    assert (scale > 0).all() and scale.shape == zero.shape == (3, 1)
    assert torch.equal(fake_quantize(torch.zeros(3, 7), spec), torch.zeros(3, 7))


def test_clip_reaches_both_ends_of_the_range():
    x = torch.tensor([[-1.0, -0.2, 0.3, 1.0]])
    for symmetric in (True, False):
        spec = QuantSpec(symmetric=symmetric, clip=0.5)
        codes = quantize(x, spec).codes
        assert (codes.min(), codes.max()) == spec.code_range


def test_ties_go_to_the_even_code():
    """As in every implementation we compare with; codes and zero points alike."""
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.0]])
    assert quantize(x, QuantSpec(symmetric=True)).codes.tolist() == [[0, 2, 2, 0, -2, 7]]
    q = quantize(torch.tensor([[-6.5, 8.5, 0.5]]), QuantSpec())
    assert q.scale.item() == 1 and q.zero.item() == 6
    assert q.codes.tolist() == [[0, 14, 6]]


def test_static_scale_is_taken():
    x = torch.tensor([[0.4, -2.6, 100.0]])
    spec = QuantSpec(symmetric=True)
    assert fake_quantize(x, spec, scale=torch.tensor([[1.0]])).tolist() == [[0, -3, 7]]
    spec, zero = QuantSpec(), torch.tensor([[5.0]])
    assert fake_quantize(x, spec, scale=torch.tensor([[2.0]]), zero=zero).tolist() == [[0, -2, 20]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_low_precision_is_within_a_step_of_the_exact_answer(dtype, symmetric):
    x = torch.randn(50, 129, generator=torch.Generator().manual_seed(0)).to(dtype)
    spec = QuantSpec(symmetric=symmetric)
    found, wanted = fake_quantize(x, spec), slow_quantize(x, spec)[1]
    scale = step(x.double(), spec)[0]
    assert found.dtype == dtype
    off = (found.double() - wanted).abs() / scale
    assert off.max() <= 1 + 20 * torch.finfo(dtype).eps
    assert (off > 0.5).double().mean() < 20 * torch.finfo(dtype).eps  # only ties go the other way


@pytest.mark.parametrize("bits, bound", [(4, 0.2), (8, 6e-4), (16, 1e-8)])
def test_error_falls_with_the_square_of_the_levels(bits, bound):
    x = torch.randn(20, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error = (fake_quantize(x, QuantSpec(bits=bits)) - x).square().sum() / x.square().sum()
    assert bound / 100 < error < bound


@pytest.mark.parametrize(
    "field, value, others",
    [
        ("bits", 1, {}),
        ("bits", 17, {}),
        ("granularity", "row", {}),
        ("group_size", None, {"granularity": "group"}),
        ("group_size", 8, {}),
        ("group_size", 0, {"granularity": "group"}),
        ("clip", 0.0, {}),
        ("clip", 1.5, {}),
        ("clip", float("nan"), {}),
    ],
)
def test_bad_specs_name_field_and_value(field, value, others):
    with pytest.raises(ValueError, match=rf"{field} = '?{value}'?.*: (use|give)"):
        QuantSpec(**{field: value}, **others)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="group_size = 7 does not divide the last dimension 20"):
        quantize(torch.ones(2, 20), QuantSpec(granularity="group", group_size=7))


def test_a_range_beyond_half_precision_is_quantized():
    x = torch.tensor([[4e4, -4e4, 1.0, 2.0]]).half()
    got = fake_quantize(x, QuantSpec())
    wanted = fake_quantize(x.float(), QuantSpec())
    assert torch.isfinite(got).all() and (got.float() - wanted).abs().max() < 64

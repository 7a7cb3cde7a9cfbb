"""Closed forms for quantized spikes, weight rounding against a brute search, static scales."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import slow_quantize
from hypothesis import given
from hypothesis import strategies as st

from dfrot_lab import massive, rotations
from dfrot_lab.quantizers import (
    QuantSpec,
    calibrate,
    fake_quantize,
    round_to_nearest,
    squared_error,
)

SYMMETRIC, ASYMMETRIC = QuantSpec(symmetric=True), QuantSpec()


def rotated_spikes(sizes: list[float], d: int, seed: int) -> torch.Tensor:
    """A token of ‖x‖² = d whose spikes sit at channels 1, 2, 4, …, after a random Hadamard."""
    x = torch.zeros(d, dtype=torch.float64)
    x[[2**j for j in range(len(sizes))]] = torch.tensor(sizes, dtype=torch.float64)
    return x * (d**0.5 / x.norm()) @ rotations.random_hadamard(d, seed)


@pytest.mark.parametrize("d", [64, 256, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_spike_under_a_hadamard(d, dtype):
    x = rotated_spikes([-3.0], d, seed=d).to(dtype)
    assert (x > 0).any() and (x < 0).any()
    assert massive.relative_error(x, SYMMETRIC) < 1e-12
    assert massive.relative_error(x, ASYMMETRIC).item() == pytest.approx(1 / 225, rel=1e-5)


@pytest.mark.parametrize(
    "sizes, printed",
    [([1, 1], 0), ([1, 0.9], 0.00276), ([1, 1, 1], 0.0051), ([1, 1, 1, 1], 0.0102)],
)
def test_few_spikes_under_a_hadamard(sizes, printed):
    error = massive.relative_error(rotated_spikes(sizes, 512, seed=1), SYMMETRIC).item()
    assert error == pytest.approx(printed, rel=0.01, abs=1e-12)


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=5), st.integers(0, 99))
def test_any_spikes_under_a_hadamard(sizes, seed):
    step = sum(sizes) / 7
    values = [sum(s) for s in itertools.product(*((a, -a) for a in sizes))]
    wanted = sum((v - step * round(v / step)) ** 2 for v in values) / len(values)
    wanted /= sum(a * a for a in sizes)
    found = massive.relative_error(rotated_spikes(sizes, 64, seed), SYMMETRIC).item()
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-12)


@given(st.integers(0, 2**16), st.booleans())
def test_squared_error_is_a_sum_over_each_row(seed, symmetric):
    spec = QuantSpec(symmetric=symmetric)
    x = torch.randn(3, 5, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    wanted = (x - slow_quantize(x, spec)[1]).square().sum(-1)
    assert torch.allclose(squared_error(x, spec), wanted, rtol=1e-12)


def weights(seed: int, out: int = 6, width: int = 24) -> torch.Tensor:
    """Heavy-tailed rows, for which clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator, dtype=torch.float64) ** 3


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(symmetric=True, granularity="channel"),
        QuantSpec(symmetric=False, granularity="channel"),
        QuantSpec(symmetric=True, granularity="group", group_size=8),
        QuantSpec(symmetric=False, granularity="group", group_size=4, bits=3),
    ],
)
def test_clip_search_finds_the_best_of_eighty(spec):
    w = weights(0)
    width = spec.group_size or w.shape[1]
    wanted = []
    for row in w.reshape(-1, 1, width):  # each Δ alone, through the quantizer's own `clip`
        tries = [
            fake_quantize(row, QuantSpec(spec.bits, spec.symmetric, clip=1 - i / 100))
            for i in range(80)
        ]
        wanted.append(min(tries, key=lambda q, row=row: (q - row).abs().pow(2.4).sum().item()))
    found = round_to_nearest(w, spec)
    assert torch.allclose(found, torch.cat(wanted).reshape(w.shape), rtol=1e-12, atol=1e-14)
    plain = round_to_nearest(w, spec, steps=0)
    assert torch.equal(plain, fake_quantize(w, spec))
    assert (found - w).abs().pow(2.4).sum() < (plain - w).abs().pow(2.4).sum()


def test_clip_search_takes_each_row_alone():
    w = weights(1, out=150)
    spec = QuantSpec(granularity="channel", symmetric=True)
    found = round_to_nearest(w, spec, steps=20)
    assert torch.equal(found[[3, 140]], round_to_nearest(w[[3, 140]], spec, steps=20))
    assert torch.equal(round_to_nearest(w, spec, steps=1), fake_quantize(w, spec))
    half = round_to_nearest(w, spec, steps=20, low=0.5) / w
    assert half.abs()[w.abs() == w.abs().amax(-1, keepdim=True)].min() >= 0.5


def test_a_weight_group_that_does_not_divide_is_refused():
    spec = QuantSpec(granularity="group", group_size=7)
    for steps in (0, 80):
        with pytest.raises(ValueError, match=r"group_size = 7 does not divide .* 24"):
            round_to_nearest(weights(0), spec, steps=steps)


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_scale_is_that_of_all_rows_at_once(symmetric):
    spec = QuantSpec(symmetric=symmetric, granularity="tensor", clip=0.9)
    chunks = [weights(s, 2 + s) for s in range(3)]
    scale, zero = calibrate(iter(chunks), spec)
    whole = torch.cat(chunks)
    found = torch.cat([fake_quantize(x, spec, scale=scale, zero=zero) for x in chunks])
    assert scale.numel() == zero.numel() == 1
    assert torch.equal(found, fake_quantize(whole, spec))


def test_calibrate_refuses():
    with pytest.raises(ValueError, match="granularity = 'token': static scales are per 'tensor'"):
        calibrate([torch.ones(2, 2)], QuantSpec())
    with pytest.raises(ValueError, match="no calibration rows"):
        calibrate([], QuantSpec(granularity="tensor"))

"""Closed forms against simulation that shares nothing with them: real rows, real rotations, Q itself.

A simulated error is a mean over draws of places, signs and noise, and closed forms are within 5 % of it.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from dfrot_kernels import hadamard
from hypothesis import given
from hypothesis import strategies as st

from dfrot_lab import massive, rotations, theory
from dfrot_lab.quantizers import QuantSpec, fake_quantize

SYMMETRIC, ASYMMETRIC = QuantSpec(symmetric=True), QuantSpec()
BOTH = pytest.mark.parametrize("spec", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
AMPLITUDES = torch.tensor([1.0, 0.9, 0.75, 0.6, 0.55], dtype=torch.float64)


def error(y: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """‖y − Q(y)‖²/‖y‖² of each row, written out."""
    return (y - fake_quantize(y, spec)).square().sum(-1) / y.square().sum(-1)


def signs(shape, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1


def independent(places: list[int]) -> bool:
    """Whether binary numbers are independent over GF(2): no subset of them cancels."""
    subsets = (c for n in range(1, len(places) + 1) for c in itertools.combinations(places, n))
    return all(np.bitwise_xor.reduce(c) for c in subsets)


def planted(d: int, k: int, rows: int, seed: int, only=lambda places: True) -> torch.Tensor:
    """[rows, d]: the first k amplitudes at random places that satisfy `only`, with random signs."""
    rng = np.random.default_rng(seed)
    x = torch.zeros(rows, d, dtype=torch.float64)
    for i in range(rows):
        places = rng.choice(d, k, replace=False)
        while not only(places.tolist()):
            places = rng.choice(d, k, replace=False)
        x[i, places] = AMPLITUDES[:k] * torch.from_numpy(rng.choice([-1.0, 1.0], k))
    return x


# --- RO -------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("d", [576, 1024, 4096, 8192])
@pytest.mark.parametrize("k", [1, 3])
def test_a_random_rotation_takes_the_floor_of_any_row(spec, d, k):
    """Few spikes need only as many rows of a Haar rotation: the Q of a tall Gaussian matrix."""
    rows = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        tall = torch.randn(d, 4 * k, generator=generator, dtype=torch.float64)
        frame = torch.linalg.qr(tall).Q.mT  # [4k, d], orthonormal
        rows += [AMPLITUDES[:k] @ frame[i * k : (i + 1) * k] for i in range(4)]
    measured = error(torch.stack(rows), spec).mean().item()
    assert measured == pytest.approx(massive.gaussian_floor(d, spec), rel=0.05)


# --- RH, spikes alone -----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("d", [576, 1024, 1536, 2560])
def test_spikes_at_sampled_places(spec, d, k):
    """576 = 16·36 and 1536 = 128·12 have cores of Paley's, 2560 = 128·20 too; 1024 is Sylvester's."""
    measured = error(hadamard.transform(planted(d, k, 200, seed=k)), spec).mean().item()
    wanted = theory.spikes_error(AMPLITUDES[:k], spec).item()
    assert measured == pytest.approx(wanted, rel=0.05, abs=1e-12)


@BOTH
@pytest.mark.parametrize(
    "d, last, k",
    [(d, last, k) for d, last in ((1024, 1024), (1536, 128), (576, 16)) for k in range(1, 6)
     if 2**k <= last],
)  # fmt: skip
def test_it_is_exact_where_the_places_are_independent(spec, d, last, k):
    x = planted(d, k, 25, seed=k, only=lambda p: independent([i % last for i in p]))
    measured = error(hadamard.transform(x), spec)
    wanted = theory.spikes_error(AMPLITUDES[:k], spec).expand(25)
    torch.testing.assert_close(measured, wanted, rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("d", [12, 20, 36, 576])
def test_up_to_three_are_exact_in_any_hadamard_matrix(d, k):
    x = planted(d, k, 100, seed=d)
    measured = error(hadamard.transform(x), SYMMETRIC)
    wanted = theory.spikes_error(AMPLITUDES[:k], SYMMETRIC).expand(100)
    torch.testing.assert_close(measured, wanted, rtol=1e-9, atol=1e-20)


def test_dependent_places_may_differ():
    """The condition is needed: places 1, 2, 4 and 7 = 1 ^ 2 ^ 4 show half of the sign patterns."""
    x = torch.zeros(1, 64, dtype=torch.float64)
    x[0, [1, 2, 4, 7]] = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    measured = error(hadamard.transform(x), SYMMETRIC).item()
    wanted = theory.spikes_error(torch.ones(4, dtype=torch.float64), SYMMETRIC).item()
    assert wanted == pytest.approx(0.0102, abs=5e-5) and measured < 1e-20


@pytest.mark.parametrize(
    "a, symmetric",
    [((1,), 0), ((1, 1), 0), ((1, 0.9), 0.00276), ((1, 1, 1), 0.0051), ((1, 1, 1, 1), 0.0102)],
)
def test_derived_values(a, symmetric):
    a = torch.tensor(a, dtype=torch.float64)
    assert theory.spikes_error(a, SYMMETRIC).item() == pytest.approx(symmetric, abs=5e-5)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_one_spike_costs_half_a_step_of_an_integer_zero_point(bits):
    one = torch.ones(1, dtype=torch.float64)
    found = theory.spikes_error(one, QuantSpec(bits=bits)).item()
    assert found == pytest.approx(1 / (2**bits - 1) ** 2)
    assert theory.spikes_error(one, QuantSpec(bits=bits, symmetric=True)).item() < 1e-20


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.floats(0.01, 100))
def test_the_formula_of_the_docstring(a, scale):
    """2^(−k) Σ_s (v_s − Δ round(v_s/Δ))²/Σa² with Δ = Σ|a|/7."""
    step, total = sum(a) / 7, 0.0
    for pattern in itertools.product([-1, 1], repeat=len(a)):
        v = sum(p * x for p, x in zip(pattern, a, strict=True))
        total += (v - step * round(v / step)) ** 2
    wanted = total / 2 ** len(a) / sum(x * x for x in a)
    # a sum half way between two codes may round either way: the same error, but for the last digits
    found = theory.spikes_error(scale * torch.tensor(a, dtype=torch.float64), SYMMETRIC).item()
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_sign_sums_are_every_pattern_once():
    found = theory.sign_sums(torch.tensor([[4.0, 2.0, 1.0], [0.0, 0.0, 1.0]]))
    assert sorted(found[0].tolist()) == [-7, -5, -3, -1, 1, 3, 5, 7]
    assert sorted(found[1].tolist()) == [-1] * 4 + [1] * 4


# --- RH, spikes in noise --------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("rest", [0.003, 0.03, 0.3])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("d", [576, 1024])
def test_spikes_in_noise(spec, d, k, rest):
    x = planted(d, k, 200, seed=k)
    noise = torch.randn(200, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    noise[x != 0] = 0
    x *= math.sqrt(1 - rest) / x.norm(dim=-1, keepdim=True)
    x += noise * (math.sqrt(rest) / noise.norm(dim=-1, keepdim=True))
    measured = error(hadamard.transform(x * signs((d,), 3)), spec).mean().item()
    a = AMPLITUDES[:k] * (math.sqrt(1 - rest) / AMPLITUDES[:k].norm())
    wanted = theory.noisy_spikes_error(a, d, spec).item()
    assert measured == pytest.approx(wanted, rel=0.05)


@BOTH
@pytest.mark.parametrize("d", [64, 576, 8192])
def test_without_spikes_it_is_the_floor(spec, d):
    found = theory.noisy_spikes_error(torch.zeros(3, 2), d, spec)
    assert found.tolist() == pytest.approx([massive.gaussian_floor(d, spec)] * 3, rel=1e-3)


@BOTH
@pytest.mark.parametrize("k", [1, 2, 3])
def test_without_noise_it_is_spikes_alone(spec, k):
    """σ cannot be 0 in the integral: what is left is small against the floor."""
    a = AMPLITUDES[:k] / AMPLITUDES[:k].norm()
    found = theory.noisy_spikes_error(a, 1024, spec).item()
    wanted = theory.spikes_error(a, spec).item()
    assert found == pytest.approx(wanted, abs=0.05 * massive.gaussian_floor(1024, spec))


def test_rows_are_predicted_one_by_one():
    a = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2
    together = theory.noisy_spikes_error(a, 256, ASYMMETRIC)
    alone = torch.stack([theory.noisy_spikes_error(row, 256, ASYMMETRIC) for row in a])
    torch.testing.assert_close(together, alone)


# --- the condition --------------------------------------------------------------------------------


def test_breadth_counts_equal_entries():
    x = torch.zeros(3, 64)
    x[0, 5], x[1, :4], x[2, ::8] = 2.0, -3.0, 1.0
    assert theory.breadth(x).tolist() == pytest.approx([1, 4, 8])
    gaussian = torch.randn(50, 4096, generator=torch.Generator().manual_seed(0))
    assert theory.breadth(gaussian).mean().item() == pytest.approx(2 * 4096 / math.pi, rel=0.01)


@pytest.mark.parametrize("d", [576, 4096])
def test_its_limit_is_the_mean_squared_peak_of_a_random_direction(d):
    y = torch.randn(400, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    peak = y.abs().amax(-1).square().mean().item()
    reach = ((y.amax(-1) - y.amin(-1)) / 2).square().mean().item()
    assert theory.breadth_limit(d, SYMMETRIC) == pytest.approx(peak, rel=0.03)
    assert theory.breadth_limit(d, ASYMMETRIC) == pytest.approx(reach, rel=0.03)
    assert theory.breadth_limit(4096, SYMMETRIC) == pytest.approx(14.55, abs=0.01)


@BOTH
@pytest.mark.parametrize("k", [2, 6, 40])
def test_below_the_limit_the_step_of_rh_is_the_smaller_one(spec, k):
    """k equal spikes: breadth k. At d = 512 E[M²] is 10.7; 40 spikes are dense."""
    d, x = 512, torch.zeros(40, 512, dtype=torch.float64)
    rng = np.random.default_rng(k)
    for row in x:
        row[rng.choice(d, k, replace=False)] = 1.0
    turned = hadamard.transform(x * signs((40, d), k))
    spread = x @ rotations.random_orthogonal(d, 1)

    def span(y):
        low, high = (
            (y.amin(-1), y.amax(-1)) if not spec.symmetric else (0 * y[:, 0], y.abs().amax(-1))
        )
        return (high - low).square().mean().item()

    assert (theory.breadth(x)[0].item() < theory.breadth_limit(d, spec)) == (k < 10)
    if k < 10:
        assert span(turned) < span(spread)
    else:
        assert span(turned) == pytest.approx(span(spread), rel=0.15)


def test_leading_entries_are_shares_of_the_norm():
    found = theory.leading(torch.tensor([[3.0, -4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), 2)
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.6], [0.5, 0.5]], dtype=torch.float64))

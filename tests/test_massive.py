"""The Gaussian floor against simulation, and the tokens that the rule built on it finds."""

from __future__ import annotations

import pytest
import torch
from conftest import NEWLINE, haar, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from dfrot_lab import activations, massive, models, rotations
from dfrot_lab.quantizers import QuantSpec

SYMMETRIC, ASYMMETRIC = QuantSpec(symmetric=True), QuantSpec()
BOTH = pytest.mark.parametrize("spec", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])


def normal(rows: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@BOTH
@pytest.mark.parametrize("d", [576, 1024, 4096, 8192])
def test_floor_is_what_gaussian_rows_lose(spec, d):
    measured = massive.relative_error(normal(200, d).float(), spec).mean().item()
    assert measured == pytest.approx(massive.gaussian_floor(d, spec), rel=0.05)


@pytest.mark.parametrize(
    "d, symmetric, asymmetric",
    [(1024, 0.0203, 0.0157), (4096, 0.02475, 0.01956), (8192, 0.0270, 0.0215)],
)
def test_floor_has_the_derived_values(d, symmetric, asymmetric):
    assert massive.gaussian_floor(d, SYMMETRIC) == pytest.approx(symmetric, rel=4e-3)
    assert massive.gaussian_floor(d, ASYMMETRIC) == pytest.approx(asymmetric, rel=4e-3)


@BOTH
def test_floor_of_groups_is_that_of_one_group(spec):
    grouped = QuantSpec(symmetric=spec.symmetric, granularity="group", group_size=64)
    measured = massive.relative_error(normal(300, 512), grouped).mean().item()
    assert massive.gaussian_floor(512, grouped) == massive.gaussian_floor(64, spec)
    assert measured == pytest.approx(massive.gaussian_floor(512, grouped), rel=0.05)


@pytest.mark.parametrize("d, absolute", [(1, True), (10, True), (10, False), (300, False)])
def test_moments_of_the_largest(d, absolute):
    def density(t: float) -> float:
        if absolute:
            return d * (2 * norm.cdf(t) - 1) ** (d - 1) * 2 * norm.pdf(t)
        return d * norm.cdf(t) ** (d - 1) * norm.pdf(t)

    below = 0 if absolute else -9
    wanted = [quad(lambda t, k=k: t**k * density(t), below, 9)[0] for k in (1, 2)]
    # what lies below zero is left out: all ten are there once in 1024
    tolerance = 1e-3 if d == 10 and not absolute else 1e-6
    assert massive.max_moments(d, absolute) == pytest.approx(wanted, rel=tolerance)


def test_implied_thresholds_at_the_published_size():
    assert massive.implied_threshold(4096, SYMMETRIC) == pytest.approx(10.07, abs=0.01)
    assert massive.implied_threshold(4096, ASYMMETRIC) == pytest.approx(8.95, abs=0.01)


def test_published_rule_hides_the_hidden_size():
    noise = normal(100, 4096)
    noise *= 64 / noise.norm(dim=-1, keepdim=True)
    spike = torch.zeros(1, 4096, dtype=torch.float64)
    spike[0, 7] = 64
    for spec in (SYMMETRIC, ASYMMETRIC):
        assert massive.published_rule(spike, spec).all()
    assert massive.published_rule(noise, SYMMETRIC).double().mean() < 0.1
    small = normal(100, 576)
    small *= 24 / small.norm(dim=-1, keepdim=True)
    assert massive.published_rule(small, SYMMETRIC).all()  # noise, yet below 8.5
    error = massive.squared_error(noise, ASYMMETRIC).sqrt()
    assert torch.equal(massive.published_rule(noise, ASYMMETRIC), error < 9.5)


@BOTH
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([7.0, 1e-3, 1e4]))
def test_the_rule_has_no_scale(spec, seed, scale):
    x = normal(40, 128, seed) ** 3  # heavy-tailed: both verdicts occur
    x[:5, 3] = 1000
    mask = massive.is_massive(x, spec)
    assert mask[:5].all() and not mask.all()
    assert torch.equal(massive.is_massive(x * scale, spec), mask)


@BOTH
def test_a_spike_is_massive_until_it_is_rotated(spec):
    x = torch.zeros(20, 256)
    x[torch.arange(20), torch.arange(20) * 7] = 16.0
    x += 0.05 * normal(20, 256).float()
    assert massive.is_massive(x, spec).all()
    assert massive.is_massive(x @ haar(256).float(), spec).float().mean() < 0.9


@BOTH
def test_rows_of_zeros_lose_nothing(spec):
    assert massive.relative_error(torch.zeros(2, 8), spec).tolist() == [0, 0]


@BOTH
def test_composed_hadamard_behaves_like_a_random_rotation_on_one_hot_rows(spec):
    """Each row of R is a rotated one-hot token: structure, not orthogonality, is what RH has."""
    d = 1024
    floor = massive.gaussian_floor(d, spec)
    composed = massive.relative_error(rotations.composed_hadamard(d, 1), spec).mean().item()
    assert composed == pytest.approx(floor, rel=0.1)
    single = massive.relative_error(rotations.random_hadamard(d, 1), spec).mean().item()
    assert single < floor / 3


@BOTH
@pytest.mark.parametrize("kind", list(models.ARCHITECTURES))
def test_the_planted_token_is_found_and_no_other(spec, kind):
    model = models.fold_gains(models.tiny(kind, hidden=128))
    tokens = random_tokens(3, (4, 60))
    newline = tokens == NEWLINE
    for _, _, x in activations.capture(model, tokens):
        mask = massive.is_massive(x, spec)
        assert mask[newline].all()
        assert mask[~newline].double().mean() < 0.05
        assert torch.equal(massive.is_massive(x * 7, spec), mask)

"""Each objective against its own definition: the direction is its gradient's, the step lowers it."""

import itertools
import math

import pytest
import torch
from conftest import haar
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dfrot import SPECS, WEIGHTINGS, rows

from dfrot_lab import objectives, polar
from dfrot_lab.dfrot import Weighting, loss, optimize
from dfrot_lab.objectives import Centroids, Corners, Kurtosis, LeastSquares, SoftPeak, Whip
from dfrot_lab.quantizers import QuantSpec, fake_quantize

FP64 = torch.float64
SMOOTH = [Whip(), Kurtosis(), SoftPeak(), SoftPeak(1.0)]


def some(seed: int, d: int = 24, count: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, d, generator=generator, dtype=FP64) ** 3


@given(st.integers(0, 999), SPECS)
def test_centroids_are_the_quantizer(seed, spec):
    y = some(seed)
    assert torch.equal(Centroids(spec).direction(y), fake_quantize(y, spec))


@given(st.integers(0, 999))
def test_corners_keep_the_norm_and_are_the_nearest(seed):
    y = some(seed)
    g = Corners().direction(y)
    assert torch.allclose(g.norm(dim=-1), y.norm(dim=-1))
    signs = torch.sign(torch.randn(200, 1, 24, generator=torch.Generator().manual_seed(seed)))
    other = signs * y.norm(dim=-1, keepdim=True) / math.sqrt(24)
    assert ((y - g).norm(dim=-1) <= (y - other).norm(dim=-1) + 1e-12).all()


@pytest.mark.parametrize("objective", SMOOTH, ids=lambda o: f"{type(o).__name__}")
def test_slope_is_the_derivative(objective):
    """G − cu against automatic differentiation of f, up to the objective's own factor."""
    u = objectives._normalized(some(1))[0].requires_grad_()
    (wanted,) = torch.autograd.grad(objective.value(u).sum(), u)
    found = objective.slope(u.detach())
    factor = (found * wanted).sum() / wanted.square().sum()
    assert factor > 0 and torch.allclose(found, factor * wanted, atol=1e-12)


@pytest.mark.parametrize("objective", [*SMOOTH, Corners()], ids=lambda o: f"{type(o).__name__}")
@settings(max_examples=15)
@given(seed=st.integers(0, 999), gamma=st.sampled_from([0.3, 1.0, 100.0]))
def test_steps_lower_the_objective(objective, seed, gamma):
    _, log = optimize(
        rows(seed), haar(12, seed), QuantSpec(), Weighting(gamma), objective=objective,
        iterations=8, dtype=FP64,
    )  # fmt: skip
    for before, after in itertools.pairwise(log.quantized):
        assert after <= before + 1e-12 * abs(before)


@settings(max_examples=60)
@given(st.integers(0, 999), SPECS, WEIGHTINGS, st.sampled_from(["svd", "fast"]))
def test_least_squares_scales_never_raise_the_loss(seed, spec, weighting, solver):
    _, log = optimize(
        rows(seed), haar(12, seed), spec, weighting, objective="least_squares", iterations=12,
        dtype=FP64, solver=solver,
    )  # fmt: skip
    halves = [v for pair in zip(log.quantized, log.rotated, strict=True) for v in pair]
    for before, after in itertools.pairwise(halves):
        assert after <= before + 1e-13


def test_scales_from_extremes_do_raise_it():
    """Why the option is there: with Δ from max|x| the quantized half step may go up."""
    rises = 0
    for seed in range(20):
        _, log = optimize(
            rows(seed), haar(12, seed), QuantSpec(bits=3), Weighting(1.0), iterations=12, dtype=FP64
        )
        rises += sum(q > r for r, q in zip(log.rotated, log.quantized[1:], strict=False))
    assert rises > 0


@given(st.integers(0, 999), SPECS)
def test_fitted_scales_are_the_best_for_their_codes(seed, spec):
    y, objective = some(seed), LeastSquares(spec)
    g = objective.direction(y)
    scale, _ = objective.grids[0]
    codes = (g / scale).round()
    for factor in (0.999, 1.001):
        assert ((y - codes * scale * factor).norm(dim=-1) >= (y - g).norm(dim=-1) - 1e-12).all()
    assert ((y - g).norm(dim=-1) <= (y - fake_quantize(y, spec)).norm(dim=-1) + 1e-12).all()


def test_groups_have_grids_of_their_own():
    y, spec = some(3), QuantSpec(granularity="group", group_size=8)
    objective = LeastSquares(spec)
    assert objective.direction(y).shape == y.shape
    assert objective.grids[0][0].shape == (30, 3, 1)


def test_least_squares_ends_no_worse_under_the_evaluation_quantizer():
    x, start = rows(2, tokens=400, d=24), haar(24, 2)
    found = {
        name: optimize(x, start, QuantSpec(), Weighting(1.0), objective=name, iterations=40)[0]
        for name in ("centroids", "least_squares")
    }
    losses = {name: loss(x, r, QuantSpec(), Weighting(1.0)) for name, r in found.items()}
    assert losses["least_squares"] < 1.05 * losses["centroids"]
    assert losses["least_squares"] < loss(x, start, QuantSpec(), Weighting(1.0))


def test_zero_rows_and_names():
    y = torch.zeros(3, 8)
    for name in objectives.NAMES:
        objective = objectives.named(name, QuantSpec())
        g = objective.direction(y)
        assert torch.isfinite(g).all() and not g.any()
        assert torch.isfinite(objective.loss(y, torch.zeros(3).double())).all()
    with pytest.raises(ValueError, match="objective = 'centroid' is unknown: use one of centroids"):
        objectives.named("centroid", QuantSpec())


def test_an_objective_of_ones_own():
    class Mine:
        def direction(self, y, chunk=0):
            return y.abs()

        def loss(self, y, squared):
            return squared

    x = rows(1)
    r, log = optimize(
        x, haar(12), QuantSpec(), Weighting(1.0), objective=Mine(), iterations=1, dtype=FP64
    )
    y = x.X.flatten(0, 1)
    assert (r - polar.svd(y.mT @ (y @ haar(12)).abs())).abs().max() < 1e-8
    assert log.rotated[0] <= log.quantized[0]

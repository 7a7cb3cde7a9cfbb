"""The polar factor, three ways, at any conditioning; and that a wrong result is seen."""

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import haar, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from dfrot_lab import polar, rotations

FP64 = torch.float64
METHODS = [polar.svd, polar.newton, polar.products, polar.mixed]


def graded(d: int, decades: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(M, its polar factor, its singular values from 1 to 10^−decades, times a power of ten)."""
    u, v = haar(max(d, 2), seed), haar(max(d, 2), seed + 1)
    s = torch.logspace(0, -decades, len(u), dtype=FP64) * 10 ** (seed % 7 - 3)
    return (u * s) @ v.mT, u @ v.mT, s


@pytest.mark.parametrize("method", [*METHODS, polar.polar], ids=lambda f: f.__name__)
@given(st.integers(1, 40), st.floats(0, 14), st.integers(0, 99))
def test_it_is_the_nearest_rotation_at_any_conditioning(method, d, decades, seed):
    m, wanted, s = graded(d, decades, seed)
    q = method(m)
    assert rotations.orthogonality_error(q) < 1e-12
    assert (q * m).sum().item() == pytest.approx(s.sum().item(), rel=1e-10)  # the maximum: Σσ
    if decades < 6:
        assert (q - wanted).abs().max() < 1e-8
        assert (q - torch.from_numpy(scipy.linalg.polar(m.numpy())[0])).abs().max() < 1e-8
    if method in (polar.svd, polar.newton, polar.mixed):
        h = q.mT @ m  # symmetric and positive, as a polar factor's partner
        assert (h - h.mT).abs().max() < 1e-12 * s.max()
        assert relative(q, wanted) < 1e-14 * 10**decades + 1e-12


def as_on_a_gpu(monkeypatch) -> None:
    """On this CPU, Newton with products and then Newton alone before the SVD, each checked."""
    order = polar._before_svd
    monkeypatch.setattr(polar, "_before_svd", lambda device: order("cuda"))


@pytest.mark.parametrize("method", ["polar", "mixed", "products", "newton"])
@pytest.mark.parametrize("decades", [0, 5.9, 10, 14])
def test_each_fast_path_is_the_svd(monkeypatch, decades, method):
    """At a size where its own rounding would show."""
    as_on_a_gpu(monkeypatch)
    m, wanted, _ = graded(300, decades, 4)
    q = getattr(polar, method)(m)
    assert rotations.orthogonality_error(q) < 1e-12
    assert (q * m).sum().item() == pytest.approx((polar.svd(m) * m).sum().item(), rel=1e-10)
    if decades < 6:
        assert (q - polar.svd(m)).abs().max() < 1e-8
        assert (q - wanted).abs().max() < 1e-8


def test_a_gpu_takes_the_mixed_way_first_and_a_cpu_the_svd():
    assert polar._before_svd("cuda") == (polar.mixed, polar.newton)
    assert polar._before_svd("cpu") == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decades", [0, 5.9, 10, 14])
def test_a_gpu_finds_what_the_cpu_does(decades):
    m, _, _ = graded(300, decades, 4)
    found, wanted = polar.polar(m.cuda()).cpu(), polar.svd(m)
    assert rotations.orthogonality_error(found) < 1e-12
    assert (found * m).sum().item() == pytest.approx((wanted * m).sum().item(), rel=1e-10)
    if decades < 6:
        assert (found - wanted).abs().max() < 1e-8


def test_a_least_singular_value_that_is_too_large_is_seen_and_lowered(monkeypatch):
    m, _, _ = graded(30, 9, 1)
    schedules, real = [], polar._schedule
    monkeypatch.setattr(polar, "_schedule", lambda least: schedules.append(least) or real(least))
    q = polar.products(m, least=1e-2)
    assert len(schedules) > 1 and rotations.orthogonality_error(q) < 1e-12
    x = m / m.norm()
    for a, b, c in real(1e-2):
        gram = x.mT @ x
        x = x @ (a * torch.eye(30, dtype=FP64) + b * gram + c * gram @ gram)
    assert polar.residual(x) > 0.01  # what would have been returned unchecked


@pytest.mark.parametrize("decades", [0, 5, 9, 14])
def test_inverses_bring_singular_values_to_the_schedule(monkeypatch, decades):
    """What the products are given lies in [ℓ, 1], for which their schedule is made."""
    m, _, s = graded(60, decades, 8)
    given_to, real = [], polar._brought_to_one
    monkeypatch.setattr(
        polar, "_brought_to_one", lambda x, least: given_to.append((x, least)) or real(x, least)
    )
    q = polar.mixed(m)
    assert rotations.orthogonality_error(q) < 1e-12
    ((x, least),) = given_to
    s = torch.linalg.svdvals(x)
    assert s.max() <= 1 and s.min() >= least >= polar.PRODUCTS / 2


@given(st.integers(64, 120), st.integers(0, 7), st.floats(3, 8), st.integers(0, 99))
def test_peaks_are_brought_down_and_the_polar_factor_stays(d, peaks, decades, seed):
    """A few singular values of massive tokens, above a spread of three decades."""
    u, v = haar(d, seed), haar(d, seed + 1)
    s = torch.logspace(0, -3, d, dtype=FP64)
    s[:peaks] *= 10**decades
    m, wanted = (u * s) @ v.mT, u @ v.mT
    x = polar._without_peaks(m)
    found = torch.linalg.svdvals(x)
    if not peaks:
        assert x is m
    else:
        assert found[0] / found[-1] <= 1.01 * max(s[0] / polar.PEAK, s[peaks]) / s[-1]
    q = polar.mixed(m)
    assert rotations.orthogonality_error(q) < 1e-12
    assert (q * m).sum().item() == pytest.approx(s.sum().item(), rel=1e-10)
    if decades < 6:
        assert (q - wanted).abs().max() < 1e-5 * 10 ** (decades - 6)
    assert polar._is_polar(q, m)


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_a_gpu_knows_no_scale(monkeypatch, size):
    """Norms of these would under- or overflow."""
    as_on_a_gpu(monkeypatch)
    m, wanted, _ = graded(80, 3, 7)
    assert (polar.polar(m / m.abs().max() * size) - wanted).abs().max() < 1e-12


def test_the_negative_of_a_polar_factor_is_none():
    m, wanted, _ = graded(20, 2, 1)
    assert polar._is_polar(wanted, m) and not polar._is_polar(-wanted, m)


@pytest.mark.parametrize("broken", [["mixed"], ["mixed", "newton"], ["newton", "mixed"]])
def test_a_method_that_fails_gives_way_to_the_next(monkeypatch, broken):
    m, wanted, _ = graded(20, 3, 2)
    as_on_a_gpu(monkeypatch)
    for i, name in enumerate(broken):
        wrong = None if i else wanted @ haar(20, 9)  # orthogonal, and not the polar factor
        monkeypatch.setattr(polar, name, lambda m, wrong=wrong: wrong)
    assert (polar.polar(m) - wanted).abs().max() < 1e-12


@settings(max_examples=30)
@given(st.floats(1e-14, 0.9))
def test_every_singular_value_ends_at_one(least):
    s = np.geomspace(least, 1, 400)
    for a, b, c in polar._schedule(least):
        s = a * s + b * s**3 + c * s**5
        assert (s > 0).all() and (s < 1 + 1e-12).all()
    assert np.abs(s - 1).max() < 1e-14


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_singular_matrix_gets_a_rotation_that_is_optimal(monkeypatch, rank, gpu):
    if gpu:
        as_on_a_gpu(monkeypatch)
    u, v = haar(9, 1), haar(9, 2)
    m = u[:, :rank] @ v[:, :rank].mT
    q = polar.polar(m)
    assert rotations.orthogonality_error(q) < 1e-12
    assert (q * m).sum().item() == pytest.approx(rank, abs=1e-12)


def test_it_takes_fp32():
    m = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(polar.polar(m), polar.polar(m.double()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_is_refused(bad):
    m = torch.eye(4)
    m[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or Inf has no polar factor"):
        polar.polar(m)

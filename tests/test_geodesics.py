"""The path between two rotations: its ends, its speed, and the matrix logarithm it is meant to follow."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import haar
from hypothesis import given
from hypothesis import strategies as st

from dfrot_lab import geodesics, rotations


def special(d: int, seed: int) -> torch.Tensor:
    """A Haar rotation of determinant 1."""
    r = haar(d, seed).clone()
    r[:, 0] *= torch.linalg.det(r).sign()
    return r


@given(seed=st.integers(0, 100), d=st.sampled_from([2, 3, 5, 16, 33]))
def test_it_runs_from_start_to_end_through_rotations(seed, d):
    start, end = special(d, seed), special(d, seed + 1)
    path, continuous = geodesics.between(start, end)
    assert continuous
    torch.testing.assert_close(path(0), start)
    torch.testing.assert_close(path(1), end)
    for t in (-0.3, 0.25, 0.5, 1.4):
        assert rotations.orthogonality_error(path(t)) < 1e-12


def test_it_is_the_matrix_logarithm_s():
    start, end = special(12, 3), special(12, 4)
    log = scipy.linalg.logm((start.mT @ end).numpy())
    wanted = start.numpy() @ scipy.linalg.expm(0.3 * log)
    np.testing.assert_allclose(geodesics.between(start, end)[0](0.3).numpy(), wanted, atol=1e-10)


def test_its_speed_is_constant():
    start, end = special(20, 5), special(20, 6)
    path, _ = geodesics.between(start, end)
    steps = [(path(t + 0.1) - path(t)).norm().item() for t in (0.0, 0.3, 0.7, 1.1)]
    assert steps == pytest.approx([steps[0]] * 4)


def test_half_turns_and_none():
    turned = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])).double()
    path, continuous = geodesics.between(rotations.identity(4), turned)
    assert continuous
    torch.testing.assert_close(path(1), turned)
    half = path(0.5)
    assert half[0, 0].abs() < 1e-12 and half[0, 2].abs() == pytest.approx(1)
    still, _ = geodesics.between(turned, turned)
    torch.testing.assert_close(still(0.7), turned)


def test_a_reflection_has_no_path_and_flips_half_way():
    end = torch.diag(torch.tensor([1.0, -1.0, 1.0])).double() @ special(3, 1)
    path, continuous = geodesics.between(rotations.identity(3), end)
    assert not continuous
    dets = [torch.linalg.det(path(t)).item() for t in (0.0, 0.5, 0.51, 1.0)]
    assert dets == pytest.approx([1, 1, -1, -1])
    torch.testing.assert_close(path(1), end)


def test_it_agrees_with_polar_factors_half_way():
    noise = torch.randn(10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = special(10, 8)
    end = start @ torch.matrix_exp(0.2 * (noise - noise.mT))
    u, _, vt = torch.linalg.svd(start + end)
    torch.testing.assert_close(geodesics.between(start, end)[0](0.5), u @ vt)

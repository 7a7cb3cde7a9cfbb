"""Geodesic: the shortest path between two rotations, R(t) = R₀·exp(t·log(R₀ᵀR₁)).

In the real Schur form R₀ᵀR₁ = Z T Zᵀ the orthogonal T is block-diagonal: plane rotations by angles θ in
(−π, π) and numbers ±1. So log takes the angles and exp(t·log) turns each plane by t·θ; two numbers −1 are a
plane turned by π. With one −1 left over, det(R₀ᵀR₁) = −1 and no path through rotations exists: that axis
then flips at t = ½, as the polar factor of (1 − t)R₀ + tR₁ would.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

__all__ = ["between"]


def between(start: Tensor, end: Tensor) -> tuple[Callable[[float], Tensor], bool]:
    """(t → R(t) [d, d] fp64, whether the path is continuous): R(0) = `start`, R(1) = `end`.

    Both are [d, d] and orthogonal; t may be any number: beyond 1 the path goes on. One Schur
    decomposition, then two products of [d, d] for each t.
    """
    start, end = start.double().cpu(), end.double().cpu()
    t_form, z = scipy.linalg.schur((start.mT @ end).numpy(), output="real")
    low = np.flatnonzero(np.diagonal(t_form, -1))  # the first index of each plane
    angles = np.arctan2(t_form[low + 1, low], t_form[low, low])
    single = np.setdiff1d(np.arange(len(t_form)), [low, low + 1])
    flipped = single[np.diagonal(t_form)[single] < 0]
    even = len(flipped) // 2 * 2
    first = np.concatenate([low, flipped[:even:2]])
    second = np.concatenate([low + 1, flipped[1:even:2]])
    theta = np.concatenate([angles, np.full(even // 2, np.pi)])
    basis = torch.from_numpy(z)
    left = start @ basis

    def path(t: float) -> Tensor:
        turn = np.eye(len(t_form))
        turn[first, first] = turn[second, second] = np.cos(t * theta)
        turn[second, first] = np.sin(t * theta)
        turn[first, second] = -turn[second, first]
        if t > 0.5:
            turn[flipped[even:], flipped[even:]] = -1
        return left @ torch.from_numpy(turn) @ basis.mT

    return path, even == len(flipped)

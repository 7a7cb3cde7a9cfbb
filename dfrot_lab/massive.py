"""Massive tokens: which rows carry massive activations, by a rule that knows no model and no scale.

A random rotation spreads any row into Gaussian noise, so its relative 4-bit error has one value, the
Gaussian floor ε(D). A row whose unrotated error is below that floor can only lose by being spread at
random: that is our definition of a massive token. Half of all rows that are Gaussian to begin with are
below their own mean error, and a rotation does nothing to those: so a massive row must be spikier than a
Gaussian one too, by its kurtosis. The published rule is an L2 threshold, 8.5 or 9.5, for D = 4096.
"""

from __future__ import annotations

from functools import lru_cache
from math import sqrt

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from dfrot_lab.quantizers import QuantSpec, squared_error

__all__ = [
    "gaussian_floor",
    "is_massive",
    "kurtosis",
    "max_moments",
    "published_rule",
    "relative_error",
]

# DFRot's code, whatever the hidden size
PUBLISHED_THRESHOLDS = {"symmetric": 8.5, "asymmetric": 9.5}


@lru_cache
def max_moments(d: int, absolute: bool) -> tuple[float, float]:
    """E[M] and E[M²] of M = max of d standard normals, or of their absolute values.

    By E[M^k] = ∫₀^∞ k t^(k−1) (1 − F(t)^d) dt, with the part below zero (d odd and tiny) left out.
    """
    t = np.linspace(0, 12, 200_001)
    with np.errstate(divide="ignore"):  # log F(0) = −∞ for |N|, as it should be
        log_f = np.log1p(-2 * norm.sf(t)) if absolute else norm.logcdf(t)
    tail = -np.expm1(d * log_f)
    return float(np.trapezoid(tail, t)), float(np.trapezoid(2 * t * tail, t))


@lru_cache
def gaussian_floor(d: int, spec: QuantSpec) -> float:
    """ε(D): expected ‖x − Q(x)‖²/‖x‖² of a Gaussian row of d entries quantized per token.

    Δ²/12 an entry: E[M²]/(12·(2^(b−1)−1)²) symmetric, E[range²]/(12·(2^b−1)²) asymmetric, where the
    largest and smallest entry are independent to our accuracy: E[range²] = 2 E[M²] + 2 E[M]².
    """
    low, high = spec.code_range
    d = spec.group_size or d  # what shares one Δ
    if spec.symmetric:
        return max_moments(d, True)[1] * spec.clip**2 / (12 * high**2)
    first, second = max_moments(d, False)
    return (2 * second + 2 * first**2) * spec.clip**2 / (12 * (high - low) ** 2)


def relative_error(x: Tensor, spec: QuantSpec) -> Tensor:
    """‖x − Q(x)‖²/‖x‖² of each row of `x` [..., d]; 0 for a row of zeros."""
    energy = torch.linalg.vector_norm(x, dim=-1).square()
    return squared_error(x, spec) / energy.clamp_min(torch.finfo(x.dtype).tiny)


def kurtosis(x: Tensor) -> Tensor:
    """D·Σx⁴/(Σx²)² of each row of `x` [..., D]: 3 for a Gaussian row, D for a single spike."""
    fourth = torch.linalg.vector_norm(x.square(), dim=-1).square()
    total = torch.linalg.vector_norm(x, dim=-1).square().square()
    return x.shape[-1] * fourth / total.clamp_min(torch.finfo(x.dtype).tiny)


def is_massive(x: Tensor, spec: QuantSpec) -> Tensor:
    """Mask [...] of the massive rows of `x` [..., d], UNROTATED.

    Relative error below ε(d), and kurtosis above that of a Gaussian row by five of its standard
    deviations, 3 + 5·√(24/d).
    """
    spiky = kurtosis(x) > 3 + 5 * sqrt(24 / x.shape[-1])
    return spiky & (relative_error(x, spec) < gaussian_floor(x.shape[-1], spec))


def published_rule(x: Tensor, spec: QuantSpec) -> Tensor:
    """Mask [...] of the rows with ‖x − Q(x)‖₂ < 8.5 (symmetric) or 9.5 (asymmetric), as released.

    The thresholds hide D = 4096: at D = 576 nearly every row falls below them.
    """
    threshold = PUBLISHED_THRESHOLDS["symmetric" if spec.symmetric else "asymmetric"]
    return squared_error(x, spec).sqrt() < threshold


def implied_threshold(d: int, spec: QuantSpec) -> float:
    """The L2 threshold that our rule amounts to for a row of norm √d, beside 8.5 and 9.5."""
    return sqrt(gaussian_floor(d, spec) * d)

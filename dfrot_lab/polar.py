"""Polar: the orthogonal polar factor UVᵀ of a square matrix M = U S Vᵀ, the rotation nearest to it.

    polar(M) = argmax over RᵀR = I of tr(RᵀM)

An SVD gives it and does more than is asked. On a GPU `mixed` takes one inverse (a step of Newton's, which
says how small the least singular value ℓ is), a Cholesky factor or two (QDWH), and products: X ← X·p(XᵀX),
with the p of degree 2 that brings [ℓ, 1] nearest to 1, step by step (Polar Express, arXiv 2505.16932).
Its result is checked; `newton`, scaled Newton iterations alone (Higham, 1986), takes over, then `svd`.
`products` needs products alone and guesses ℓ: too large an ℓ leaves a matrix that is not orthogonal.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["mixed", "newton", "polar", "products", "residual", "svd"]

ORTHOGONAL = 1e-13  # max|QᵀQ − I| that is accepted, for d up to a few thousand
SYMMETRIC = 1e-12  # max|QᵀM − MᵀQ| / ‖M‖: the polar factor's partner QᵀM is symmetric
LEAST = 1e-15  # σ_min/σ_max below which fp64 knows no polar factor
CHOLESKY = 3e4  # condition up to which a Cholesky factor loses no digits that count
PRODUCTS = 0.2  # least singular value from which products alone are faster
PEAK = 300.0  # how far above the eighth a singular value towers


def polar(m: Tensor) -> Tensor:
    """The orthogonal polar factor [d, d], fp64, of M [d, d] on any device; RᵀR = I to 1e-12.

    `mixed` on a GPU, with Newton and SVD to fall back on; SVD on a CPU, where it is the fastest of the three
    up to d = 4096 at least (docs/optimiser.md). Raises ValueError for NaN or Inf in M.
    """
    m = m.double()
    if not torch.isfinite(m).all():
        raise ValueError("a matrix with NaN or Inf has no polar factor: check the activations")
    methods = _before_svd(m.device.type)
    if methods:  # no norm is to under- or overflow
        m = m / m.abs().max().clamp_min(torch.finfo(m.dtype).tiny)
    for method in methods:
        q = method(m)
        if q is not None and _is_polar(q, m):
            return q
    return svd(m)


def _before_svd(device: str) -> tuple:
    return () if device == "cpu" else (mixed, newton)


def svd(m: Tensor) -> Tensor:
    """UVᵀ by SVD in fp64, the reference; right for singular M too, where it is one of many."""
    u, _, vt = torch.linalg.svd(m.double())
    return u @ vt


def residual(q: Tensor) -> float:
    """max|QᵀQ − I|."""
    gram = q.mT @ q
    gram.diagonal().sub_(1)
    return gram.abs().max().item()


def _is_polar(q: Tensor, m: Tensor) -> bool:
    """Whether Q is orthogonal and QᵀM symmetric, with a trace that is not negative.

    Every iteration here keeps the sign of singular values, so symmetry is what is left to check.
    """
    size = torch.linalg.matrix_norm(m).item()
    h = q.mT @ m
    return (
        residual(q) < ORTHOGONAL * max(1, len(m) / 1000)
        and (h - h.mT).abs().max().item() <= SYMMETRIC * size
        and h.trace().item() >= 0
    )


def _minimax(low: float, high: float) -> tuple[float, float, float, float]:
    """(a, b, c, e): p(x) = ax + bx³ + cx⁵ nearest to 1 on [low, high], off by ±e at four points (Remez)."""
    points = np.array([low, low + (high - low) / 3, low + 2 * (high - low) / 3, high])
    signs = np.array(
        [1.0, -1.0, 1.0, -1.0]
    )  # p = 1 − e at low: singular values there are the slowest
    for _ in range(50):
        system = np.stack([points, points**3, points**5, signs], 1)
        a, b, c, e = np.linalg.solve(system, np.ones(4))
        disc = 9 * b * b - 20 * a * c  # p′ = a + 3bx² + 5cx⁴ vanishes at the two inner points
        if disc < 0 or c == 0:
            break
        roots = np.sqrt(
            np.sort(np.abs([(-3 * b - math.sqrt(disc)), (-3 * b + math.sqrt(disc))] / (10 * c)))
        )
        moved = np.array([low, *roots, high])
        if np.abs(moved - points).max() < 1e-12 * high:
            break
        points = moved
    return float(a), float(b), float(c), float(abs(e))


@lru_cache
def _schedule(least: float) -> tuple[tuple[float, float, float], ...]:
    """Polynomials that bring singular values in [least, 1] to 1 within rounding."""
    low, found = least, []
    while 1 - low > 1e-16 and len(found) < 60:
        if 1 - low < 0.1:  # the Taylor polynomials of 1/√x end it: 0.1, 0.0025, 4e-8, 2e-15
            found += [(15 / 8, -10 / 8, 3 / 8)] * 2 + [(3 / 2, -1 / 2, 0.0)]
            break
        a, b, c, e = _minimax(low, 1.0)
        high = (1 + e) * 1.001  # a little more, so that rounding leaves no singular value above 1
        found.append((a / high, b / high, c / high))
        low = (1 - e) / high
    return tuple(found)


def products(m: Tensor, least: float = 1e-6) -> Tensor | None:
    """The polar factor by products alone, three of [d, d] a step; None where it does not get there.

    least: a lower bound of σ_min over the upper bound of σ_max taken here, √(‖M‖₁‖M‖∞); tried again,
    10⁵ times smaller, while the result is not orthogonal, down to what fp64 can tell from zero.
    """
    bound = math.sqrt(
        torch.linalg.matrix_norm(m, 1).item() * torch.linalg.matrix_norm(m, torch.inf).item()
    )
    if not bound:
        return None
    while least >= LEAST / 10:
        x = _brought_to_one(m / bound, least)
        if residual(x) < ORTHOGONAL * max(1, len(m) / 1000):
            return x
        least *= 1e-5
    return None


def _brought_to_one(x: Tensor, least: float) -> Tensor:
    """X·p(XᵀX) for each polynomial of the schedule; singular values of X lie in [least, 1]."""
    for a, b, c in _schedule(least):
        gram = x.mT @ x
        poly = torch.addmm(gram, gram, gram, beta=b, alpha=c) if c else gram.mul_(b)
        poly.diagonal().add_(a)
        x = x @ poly
    return x


def mixed(m: Tensor) -> Tensor | None:
    """The polar factor by one inverse, a Cholesky factor or two, then products; None for a singular M.

    Newton's step X ← (ζX + X⁻ᵀ/ζ)/2 takes singular values [1, κ], scaled by ζ = 1/√κ, to [1, (√κ + 1/√κ)/2]:
    ℓ is known from there on, and no schedule is tried in vain. The few values that tower above the others,
    as massive tokens make them, are brought down first.
    """
    x, top, zeta = _without_peaks(m), math.inf, 0.0
    while top > CHOLESKY:
        inverse, info = torch.linalg.inv_ex(x)
        if info.item() or not torch.isfinite(inverse).all():
            return None
        if not zeta:
            most, least = _above(x), 1 / _above(inverse)
            top, zeta = most / least, 1 / math.sqrt(most * least)
        else:
            zeta = 1 / math.sqrt(top)
        x = torch.add(x * (zeta / 2), inverse.mT, alpha=0.5 / zeta)
        top = (math.sqrt(top) + 1 / math.sqrt(top)) / 2
    x /= top * 1.001  # rounding leaves no singular value above 1
    least = 0.99 / top
    while least < PRODUCTS:
        x, least = _halley(x, least)
    return _brought_to_one(x / 1.001, 2 ** (math.floor(4 * math.log2(0.99 * least)) / 4))


def _halley(x: Tensor, least: float) -> tuple[Tensor, float]:
    """(X(aI + bXᵀX)(I + cXᵀX)⁻¹ with what of a, b, c brings [least, 1] nearest to 1, the new least value).

    Dynamically weighted Halley (QDWH; Nakatsukasa and Higham, 2013), whose inverse is that of a Cholesky
    factor: stable as long as c ≈ least^(−4/3) is far below 1/ε.
    """
    gamma = (4 * (1 - least**2) / least**4) ** (1 / 3)
    root = math.sqrt(1 + gamma)
    a = root + math.sqrt(8 - 4 * gamma + 8 * (2 - least**2) / (least**2 * root)) / 2
    b = (a - 1) ** 2 / 4
    c = a + b - 1
    gram = (x.mT @ x).mul_(c)
    gram.diagonal().add_(1)
    solved = torch.cholesky_solve(x.mT, torch.linalg.cholesky_ex(gram)[0]).mT
    new = torch.add(x * (b / c), solved, alpha=a - b / c)
    return new, least * (a + b * least**2) / (1 + c * least**2)


def _without_peaks(m: Tensor, count: int = 8, rounds: int = 3) -> Tensor:
    """M with its largest singular values brought down to the eighth, by 1/PEAK at most; Q stays.

    Their vectors come from block power iterations, which have converged to rounding for what is PEAK times
    the eighth; what is less is left alone, and so is a small M, whose eighth says little of the others.
    """
    if len(m) < 8 * count:
        return m
    start = torch.randn(len(m), count, generator=torch.Generator().manual_seed(0)).to(m)
    v = torch.linalg.qr(start).Q
    for _ in range(rounds):
        u = torch.linalg.qr(m @ v).Q
        v = torch.linalg.qr(m.mT @ u).Q
    left, s, right = torch.linalg.svd(u.mT @ (m @ v))
    peaks = int((s > PEAK * s[-1]).sum())
    if not peaks:
        return m
    lower = s - torch.maximum(s[-1], s / PEAK)
    return m - (u @ left[:, :peaks] * lower[:peaks]) @ (v @ right[:peaks].mT).mT


def _above(m: Tensor) -> float:
    """An upper bound of the largest singular value: the lesser of ‖M‖_F and √(‖M‖₁‖M‖∞)."""
    one, infinity = (torch.linalg.matrix_norm(m, p).item() for p in (1, torch.inf))
    return min(torch.linalg.matrix_norm(m).item(), math.sqrt(one * infinity))


def newton(m: Tensor, steps: int = 30) -> Tensor | None:
    """X ← (γX + X⁻ᵀ/γ)/2 with γ⁴ = ‖X⁻¹‖₁‖X⁻¹‖∞/(‖X‖₁‖X‖∞); None for a singular M."""
    x, last = m, math.inf
    for _ in range(steps):
        inverse, info = torch.linalg.inv_ex(x)
        if info.item() or not torch.isfinite(inverse).all():
            return None
        norms = [torch.linalg.matrix_norm(t, p) for t in (inverse, x) for p in (1, torch.inf)]
        ratio = (norms[0] * norms[1] / (norms[2] * norms[3])).item()
        scale = ratio**0.25 if last > 1e-2 else 1.0
        new = (x * scale + inverse.mT / scale) / 2
        moved = ((new - x).abs().max() / new.abs().max()).item()
        x = new
        if moved < 1e-14 or (moved >= last and moved < 1e-10):
            break
        last = moved
    # one step of Newton–Schulz takes what rounding left
    return 1.5 * x - 0.5 * x @ (x.mT @ x)

"""Theory: what b bits take from a rotated row, in closed form, and why a Hadamard takes less of some.

Everything is relative, so let ‖x‖ = 1: ε = ‖xR − Q(xR)‖², with one step Δ for the row.

RO spreads any row into Gaussian noise: ε is the Gaussian floor ε(D) = E[Δ²]/12 of `massive.gaussian_floor`.

RH turns k spikes a₁…a_k into the 2^k sums v_s = Σ ±a_j (each over √D), and nothing else: the largest is
Σ|a| however large D is, and few values lie well on a grid.

    ε = 2^(−k) Σ_s (v_s − Q(v_s))² / Σ a²          one spike: 0 symmetric, 1/(2^b − 1)² asymmetric

It holds when all sign patterns occur equally often. In Sylvester's matrix they do where the k positions,
written in binary, are independent over GF(2). In a size 2^m·c with another core (576 = 16·36) they do where
the last m bits are independent; for up to three spikes and the symmetric quantizer in any Hadamard
matrix, since any three of its rows agree and differ equally often; else nearly so, see tests/test_theory.py.

RH and a real token: k spikes, and a rest that comes out as Gaussian noise (`noisy_spikes_error`).
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from dfrot_lab import massive
from dfrot_lab.quantizers import QuantSpec

__all__ = [
    "breadth",
    "breadth_limit",
    "leading",
    "noisy_spikes_error",
    "sign_sums",
    "spikes_error",
]

_GRID = 301  # points of the integrals over the largest entry: 1e-4 of ε against ten times as many
_WAVES = 6  # of the ripple below; the seventh is under 1e-3 of Δ²/12 where the first is a half


def sign_sums(a: Tensor) -> Tensor:
    """v [..., 2^k]: the sums ±a₁ ± … ± a_k of amplitudes `a` [..., k], every sign pattern once."""
    v = a.new_zeros(*a.shape[:-1], 1)
    for one in a.unbind(-1):
        v = torch.cat([v + one[..., None], v - one[..., None]], -1)
    return v


def spikes_error(a: Tensor, spec: QuantSpec) -> Tensor:
    """ε [...] of rows that are nothing but spikes `a` [..., k], under RH; exact, see above.

    A row quantizer sees D/2^k copies of the 2^k sums and cannot tell them from the sums themselves.
    """
    return massive.relative_error(sign_sums(a), spec)


def noisy_spikes_error(a: Tensor, d: int, spec: QuantSpec) -> Tensor:
    """ε [...] under RH of unit rows of `d` entries: spikes `a` [..., k] and a rest of energy 1 − Σa².

    The rest becomes noise of variance σ² = 1 − Σa² (over D) on every sum v_s, so that an entry has the
    distribution F = 2^(−k) Σ_s Φ((t − v_s)/σ). The largest of D gives E[Δ²] as for the floor, and noise
    on a grid of step Δ (Sripad and Snyder, IEEE Trans. ASSP 25, 1977)

        ε = Δ²/12 · 2^(−k) Σ_s [1 + 12/π² Σ_n (−1)^n/n² cos(2πn v_s/Δ) exp(−2(πnσ/Δ)²)].

    σ → 0 is `spikes_error`, Σa² → 0 the Gaussian floor. Codes that do not reach ±t alike are not modelled:
    for clip < 1 or 3 bits and fewer trust it less. fp64.
    """
    v = sign_sums(a.double())[..., None]  # [..., 2^k, 1]
    noise = (1 - a.double().square().sum(-1)).clamp_min(1e-8).sqrt()[..., None]  # [..., 1]
    first, second = _largest(v, noise, d, spec.symmetric)
    low, high = spec.code_range
    if spec.symmetric:
        step = second.sqrt() * spec.clip / high
    else:
        step = (2 * second + 2 * first.square()).sqrt() * spec.clip / (high - low)
    ripple = torch.ones_like(v[..., 0])
    for n in range(1, _WAVES + 1):
        fade = torch.exp(-2 * (pi * n * noise / step[..., None]) ** 2)
        wave = torch.cos(2 * pi * n * v[..., 0] / step[..., None])
        ripple += (-1) ** n * 12 / (pi * n) ** 2 * wave * fade
    return step.square() / 12 * ripple.mean(-1)


def _largest(v: Tensor, noise: Tensor, d: int, absolute: bool) -> tuple[Tensor, Tensor]:
    """E[M] and E[M²] [...] of the largest of `d` entries around sums v [..., 2^k, 1], or of their |·|.

    As `massive.max_moments`, which is the case without spikes.
    """
    top = v.amax((-1, -2))[..., None] + 7 * noise
    t = top * torch.linspace(0, 1, _GRID, dtype=torch.float64)  # [..., grid]
    z = t[..., None, :]
    f = torch.special.ndtr((z - v) / noise[..., None])
    if absolute:
        f = f - torch.special.ndtr((-z - v) / noise[..., None])
    tail = 1 - f.mean(-2).clamp_min(0) ** d
    return torch.trapezoid(tail, t, dim=-1), torch.trapezoid(2 * t * tail, t, dim=-1)


def leading(x: Tensor, k: int) -> Tensor:
    """The `k` largest |x| of each row over ‖x‖, [..., k] in fp64: the spikes of `x` [..., d]."""
    x = x.double().abs()
    return x.topk(k, -1).values / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def breadth(x: Tensor) -> Tensor:
    """(‖x‖₁/‖x‖₂)² of each row of `x` [..., d]: k for k equal entries, 2d/π for a Gaussian row.

    Under RH no entry is larger than √(breadth/D)·‖x‖, and with few spikes one is as large.
    """
    total = torch.linalg.vector_norm(x, ord=1, dim=-1)
    return (total / torch.linalg.vector_norm(x, dim=-1)).square()


def breadth_limit(d: int, spec: QuantSpec) -> float:
    """RH's step is below RO's for every row whose breadth is below this.

    E[M²] for the symmetric quantizer, E[range²]/4 for the asymmetric one: both from the floor.
    """
    low, high = spec.code_range
    reach = high if spec.symmetric else (high - low) / 2
    return 12 * (reach / spec.clip) ** 2 * massive.gaussian_floor(d, spec)

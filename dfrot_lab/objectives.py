"""Objectives: what R1 may be refined for, behind one interface.

    direction(Y) → G, for Y = XR row by row; then R ← polar(XᵀW²G)

Each step maximizes Σ w²⟨xR, G⟩ over rotations. Where G is the nearest point of a set (DFRot's int4
centroids, the corners of a cube) that is alternating projection. Where G = cY − ∇f(Y) with c so large that
c|y|²/2 − f is convex, it is a minorize-maximize step: f never rises, since ‖xR‖ does not change. Whip has
such a c; kurtosis and soft peak take theirs from the row as it is, enough where its peak does not grow: no
proof. Their papers minimize them by other means (QR-Orth, Cayley); here only the objective differs, so that
they stand on equal terms.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from dfrot_kernels import backends
from torch import Tensor

from dfrot_lab.quantizers import QuantSpec, cut, fake_quantize, quantize, step

__all__ = [
    "NAMES",
    "Centroids",
    "Corners",
    "Kurtosis",
    "LeastSquares",
    "Objective",
    "SoftPeak",
    "Whip",
    "error",
    "named",
]


class Objective(Protocol):
    """What `dfrot.optimize` alternates with."""

    def direction(self, y: Tensor, chunk: int = 0) -> Tensor:
        """G [rows, d] for the rotated rows `y` [rows, d]; chunk: which rows they are, for what is kept."""

    def loss(self, y: Tensor, squared: Tensor) -> Tensor:
        """What is to become small, of each row [rows], in units of ‖y‖²; squared: ‖y − G‖² in fp64."""


class _Nearest:
    """G is the point of a set nearest to y, and the loss its squared distance."""

    def loss(self, y: Tensor, squared: Tensor) -> Tensor:
        """‖y − G‖²."""
        return squared


class Centroids(_Nearest):
    """DFRot: G = Q(Y), the evaluation's quantizer; loss ‖y − Q(y)‖² (DFRot, Section 3.4)."""

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec

    def direction(self, y: Tensor, chunk: int = 0) -> Tensor:
        """Q(Y), scales from the extremes of each row."""
        return fake_quantize(y, self.spec)


class LeastSquares(Centroids):
    """Centroids Δ(q − z) whose Δ is fitted: Δ = ⟨y, q − z⟩/‖q − z‖². The loss never rises.

    Of two candidates a row takes the nearer: codes on the grid (Δ, z) that it had, or on the grid of its
    extremes, either with Δ fitted to the codes afterwards. New codes on the old grid are no farther than
    the old codes, the fit is no farther than that, and neither is the Procrustes step.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.grids: dict[int, tuple[Tensor, Tensor]] = {}

    def direction(self, y: Tensor, chunk: int = 0) -> Tensor:
        """The nearer candidate; keeps the grid of `chunk` for the next call."""
        rows = cut(y, self.spec)
        grids = [step(rows, self.spec)] + ([self.grids[chunk]] if chunk in self.grids else [])
        best, error = None, None
        for scale, zero in grids:
            centred = quantize(y, self.spec, scale=scale, zero=zero).codes - zero
            fitted = _fit(rows, centred, scale)
            g = centred * fitted
            e = (rows - g).square().sum(-1, keepdim=True)
            if best is None:
                best, error, kept = g, e, (fitted, zero)
                continue
            nearer = e <= error
            best = torch.where(nearer, g, best)
            kept = tuple(
                torch.where(nearer, a, b) for a, b in zip((fitted, zero), kept, strict=True)
            )
        self.grids[chunk] = kept
        return best.reshape(y.shape)


def _fit(y: Tensor, centred: Tensor, scale: Tensor) -> Tensor:
    """Δ that minimizes ‖y − Δ·centred‖², each row's; `scale` where all codes are zero."""
    over = centred.square().sum(-1, keepdim=True)
    fitted = (y * centred).sum(-1, keepdim=True) / over
    return torch.where((over > 0) & (fitted > 0), fitted, scale)


class Corners(_Nearest):
    """ConQuR (arXiv 2605.10793): G = sign(Y)‖y‖/√d, the nearest corner of a cube; makes ‖y‖₁ large."""

    def direction(self, y: Tensor, chunk: int = 0) -> Tensor:
        """Corners with the rows' own norms."""
        return torch.sign(y) * (y.norm(dim=-1, keepdim=True) / math.sqrt(y.shape[-1]))


class _Smooth:
    """f of a row in units of its root mean square, u = y√d/‖y‖; G = (cu − f′(u))·‖y‖/√d."""

    def direction(self, y: Tensor, chunk: int = 0) -> Tensor:
        """cu − f′(u), in the units of y."""
        u, rms = _normalized(y)
        return (self.curvature(u) * u - self.slope(u)) * rms

    def loss(self, y: Tensor, squared: Tensor) -> Tensor:
        """f(u)‖y‖²."""
        u, rms = _normalized(y)
        return self.value(u).double() * rms.squeeze(-1).double().square() * y.shape[-1]


def _normalized(y: Tensor) -> tuple[Tensor, Tensor]:
    """(u of root mean square 1, the root mean squares [rows, 1]); a row of zeros stays."""
    rms = y.norm(dim=-1, keepdim=True) / math.sqrt(y.shape[-1])
    return y / rms.clamp_min(torch.finfo(y.dtype).tiny), rms


class Whip(_Smooth):
    """DartQuant (arXiv 2511.04063): f = Σ exp(−|u|), which pushes entries away from zero; c = 1."""

    def value(self, u: Tensor) -> Tensor:
        """f/d, for the log."""
        return torch.exp(-u.abs()).mean(-1)

    def slope(self, u: Tensor) -> Tensor:
        """−sign(u) exp(−|u|)."""
        return -torch.sign(u) * torch.exp(-u.abs())

    def curvature(self, u: Tensor) -> float:
        """|f″| ≤ 1 away from zero, and the kink at zero is convex in −f."""
        return 1.0


class Kurtosis(_Smooth):
    """KurTail (arXiv 2503.01483): f = Σ u⁴/4; c = 3 max u², of each row as it is.

    So the descent is not proven.
    """

    def value(self, u: Tensor) -> Tensor:
        """f/d, for the log."""
        return u.square().square().mean(-1) / 4

    def slope(self, u: Tensor) -> Tensor:
        """u³."""
        return u**3

    def curvature(self, u: Tensor) -> Tensor:
        """3 max u² [rows, 1]."""
        return 3 * u.square().amax(-1, keepdim=True)


class SoftPeak(_Smooth):
    """A smooth maximum, f = log Σ cosh(βu)/β: our reading of InfoQuant (arXiv 2605.26175).

    cosh and not exp(|·|), whose kink at zero would hold entries there. c = β·(largest share of Σ cosh) of
    each row as it is (so the descent is not proven).
    """

    def __init__(self, beta: float = 4.0) -> None:
        self.beta = beta

    def _log_cosh(self, u: Tensor) -> Tensor:
        a = self.beta * u.abs()
        return a + torch.log1p(torch.exp(-2 * a)) - math.log(2)

    def value(self, u: Tensor) -> Tensor:
        """log Σ cosh(βu)/β."""
        return torch.logsumexp(self._log_cosh(u), -1) / self.beta

    def slope(self, u: Tensor) -> Tensor:
        """sinh(βu)/Σ cosh(βu)."""
        return torch.tanh(self.beta * u) * torch.softmax(self._log_cosh(u), -1)

    def curvature(self, u: Tensor) -> Tensor:
        """β max cosh(βu)/Σ cosh(βu) [rows, 1]."""
        return self.beta * torch.softmax(self._log_cosh(u), -1).amax(-1, keepdim=True)


def error(objective: Objective, y: Tensor, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """(E = Y − G, ‖E‖² of each row in fp64); int4 centroids of an fp32 Y on a GPU by one kernel."""
    if type(objective) is Centroids and y.is_cuda and y.dtype == torch.float32:
        spec = objective.spec
        if spec == QuantSpec(symmetric=spec.symmetric, clip=spec.clip):
            kernels = backends.get(backends.default(y.device))
            e, squared = kernels.quantize_error(y, symmetric=spec.symmetric, clip=spec.clip)
            return e, squared.double()
    e = y - objective.direction(y, chunk)
    return e, torch.linalg.vector_norm(e, dim=-1).double().square()


NAMES = ("centroids", "least_squares", "corners", "whip", "kurtosis", "soft_peak")


def named(name: str, spec: QuantSpec) -> Objective:
    """The objective of that name; ValueError lists the known ones."""
    made = {
        "centroids": lambda: Centroids(spec),
        "least_squares": lambda: LeastSquares(spec),
        "corners": Corners,
        "whip": Whip,
        "kurtosis": Kurtosis,
        "soft_peak": SoftPeak,
    }
    if name not in made:
        raise ValueError(f"objective = {name!r} is unknown: use one of {', '.join(NAMES)}")
    return made[name]()

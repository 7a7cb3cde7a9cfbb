"""Weighting: how much each calibration row counts in the loss, and which rows are used at all."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dfrot_lab import massive
from dfrot_lab.activations import Activations, ActivationsError
from dfrot_lab.quantizers import QuantSpec, squared_error

__all__ = ["Weighting", "importance", "row_weights", "subsample"]

MOST = 1e6  # γ² of a row among others: 12 of the 16 digits
_RULES = {"floor": massive.is_massive, "published": massive.published_rule}


@dataclass(frozen=True)
class Weighting:
    """How massive rows count. gamma: 0 ≤ γ ≤ 10⁶, or inf for massive rows alone.

    form "sum": Σ normal + γ² Σ massive, as released. form "group_mean": mean over normal rows + γ² ·
    mean over massive rows, as the paper writes it. rule: "floor" (`massive.is_massive`) or "published".
    """

    gamma: float = 100.0
    form: str = "sum"
    rule: str = "floor"

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"gamma = {self.gamma}: use a number ≥ 0, or inf")
        if MOST < self.gamma < math.inf:
            raise ValueError(
                f"gamma = {self.gamma}: fp64 loses the other rows beside γ² = {self.gamma}², use {MOST:g} "
                "at most, or inf for massive rows alone"
            )
        if self.form not in ("sum", "group_mean"):
            raise ValueError(f"form = {self.form!r}: use 'sum' or 'group_mean'")
        if self.rule not in _RULES:
            raise ValueError(f"rule = {self.rule!r}: use 'floor' or 'published'")


def row_weights(x: Activations, spec: QuantSpec, weighting: Weighting) -> tuple[list[Tensor], int]:
    """(w² of every row, one tensor [rows] a chunk; how many rows are massive), for UNROTATED rows.

    Raises ActivationsError for NaN or Inf, or when γ asks for massive rows and there are none.
    """
    rule = _RULES[weighting.rule]
    masks = []
    for chunk in x.chunks():
        if not torch.isfinite(chunk).all():
            raise ActivationsError(
                "calibration activations hold NaN or Inf: collect them again in float32"
            )
        masks.append(rule(chunk, spec))
    count = sum(int(m.sum()) for m in masks)
    rows = sum(len(m) for m in masks)
    if math.isinf(weighting.gamma):
        if count == 0:
            raise ActivationsError(
                "gamma = inf, but no calibration row is massive: use a finite gamma"
            )
        normal, heavy = 0.0, 1.0
    else:
        normal, heavy = 1.0, weighting.gamma**2
    if weighting.form == "group_mean":
        normal, heavy = normal / max(rows - count, 1), heavy / max(count, 1)
    heavy, normal = torch.tensor([heavy, normal], dtype=torch.float64, device=x.X.device)
    return [torch.where(m, heavy, normal) for m in masks], count


def importance(x: Activations, r: Tensor, spec: QuantSpec, weights: list[Tensor]) -> list[Tensor]:
    """w²‖xR − Q(xR)‖² of every row, one tensor [rows] a chunk: what each adds to the loss."""
    rotation = r.float().to(x.X.device)
    return [
        w * squared_error(chunk.float() @ rotation, spec).double()
        for chunk, w in zip(x.chunks(), weights, strict=True)
    ]


def subsample(
    x: Activations,
    spec: QuantSpec,
    weighting: Weighting,
    weights: list[Tensor],
    share: float,
    seed: int = 0,
    scores: list[Tensor] | None = None,
) -> tuple[Activations, list[Tensor]]:
    """A random part of the rows, whose w² grow so that the loss keeps its expectation.

    Without `scores`: all massive rows and a `share` of the normal ones, w²/share. With scores, such as
    `importance`: about `share` of all rows, each with probability p ∝ √score, at most 1, and w²/p.
    Share 1 returns `x` as it is; less gathers the rows in memory. ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"rows = {share}: use a share in (0, 1]")
    if share == 1:
        return x, weights
    generator, picked, scaled = torch.Generator().manual_seed(seed), [], []
    rule, factor = _RULES[weighting.rule], _factor(scores, share) if scores else None
    for i, (chunk, w) in enumerate(zip(x.chunks(), weights, strict=True)):
        if scores:
            p = (scores[i].sqrt() * factor).clamp(max=1)
        else:
            p = torch.where(rule(chunk, spec), 1.0, share).double()
        kept = torch.rand(len(chunk), generator=generator).to(p.device) < p
        picked.append(chunk[kept])
        scaled.append((w / p)[kept])
    few = replace(Activations.of(torch.cat(picked)), piece=x.piece)
    return few, list(torch.cat(scaled).split(few.piece))


def _factor(scores: list[Tensor], share: float) -> float:
    """c with Σ min(1, c√score) = share · rows, by bisection."""
    root = torch.cat(scores).sqrt()
    low, high = 0.0, len(root) / root[root > 0].min().item()
    for _ in range(200):
        middle = (low + high) / 2
        few = (root * middle).clamp(max=1).sum() < share * len(root)
        low, high = (middle, high) if few else (low, middle)
    return high

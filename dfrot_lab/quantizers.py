"""Quantizer: pure functions on a frozen spec; the arithmetic itself is `dfrot_kernels.reference`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from dfrot_kernels.reference import (
    Quantized,
    QuantSpec,
    cut,
    dequantize,
    fake_quantize,
    quantize,
    step,
)
from torch import Tensor

__all__ = [
    "QuantSpec",
    "Quantized",
    "calibrate",
    "dequantize",
    "fake_quantize",
    "quantize",
    "round_to_nearest",
    "search_step",
    "squared_error",
    "step",
]


def squared_error(x: Tensor, spec: QuantSpec) -> Tensor:
    """‖x − Q(x)‖² of each row of `x` [..., D]: a tensor [...]."""
    return torch.linalg.vector_norm(fake_quantize(x, spec).sub_(x), dim=-1).square()


def calibrate(rows: Iterable[Tensor], spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Static per-tensor scale and zero point from the extremes of all of `rows` ([n, D] each).

    Raises ValueError when `rows` is empty or the granularity is not 'tensor'.
    """
    if spec.granularity != "tensor":
        raise ValueError(f"granularity = {spec.granularity!r}: static scales are per 'tensor'")
    extremes = [torch.stack([x.amin(), x.amax()]) for x in rows]
    if not extremes:
        raise ValueError("no calibration rows: give at least one")
    return step(torch.stack(extremes).flatten()[None], spec)


def round_to_nearest(
    w: Tensor, spec: QuantSpec, *, steps: int = 80, norm: float = 2.4, low: float = 0.2
) -> Tensor:
    """RTN: Q(W) of a weight W [out, in], per channel or group, in W's dtype, clipped by `search_step`."""
    rows = w if w.dtype == torch.float64 else w.float()
    scale, zero = search_step(cut(rows, spec), spec, steps=steps, norm=norm, low=low)
    return fake_quantize(rows, spec, scale=scale, zero=zero).to(w.dtype)


def search_step(
    rows: Tensor, spec: QuantSpec, *, steps: int = 80, norm: float = 2.4, low: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each of `rows` [..., D] (groups already cut): two tensors [..., 1].

    The clip c of a row minimizes Σ|w − Q(w; c)|^norm over `steps` values from 1 down to `low`, that one
    left out; 80 steps of 0.01 are GPTQ's and QuaRot's grid, `steps=0` takes c = 1 without a search.
    In fp16 the powers underflow: give fp32 or fp64.
    """
    alone = replace(spec, granularity="channel", group_size=None)
    if steps == 0:
        return step(rows, alone)
    flat = rows.reshape(-1, rows.shape[-1])
    found = [_searched(part, alone, steps, norm, low) for part in flat.split(128)]
    scale, zero = (
        torch.cat(parts).reshape(*rows.shape[:-1], 1) for parts in zip(*found, strict=True)
    )
    return scale, zero


def _searched(
    w: Tensor, spec: QuantSpec, steps: int, norm: float, low: float
) -> tuple[Tensor, Tensor]:
    """`search_step` for a few rows: so many that all candidates pass through the cache."""
    full, zero = step(w, spec)
    best, error = full, torch.full_like(full, torch.inf)
    for i in range(steps):
        scale = full * (1 - i * (1 - low) / steps)
        q = fake_quantize(w, spec, scale=scale, zero=zero)
        # |·|^norm as exp(norm·log|·|), which is twice as fast as torch's pow; log 0 = −∞ gives 0
        e = q.sub_(w).abs_().log_().mul_(norm).exp_().sum(-1, keepdim=True)
        best = torch.where(e < error, scale, best)
        error = torch.minimum(e, error)
    return best, zero

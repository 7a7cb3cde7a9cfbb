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
    "squared_error",
    "step",
]


def squared_error(x: Tensor, spec: QuantSpec) -> Tensor:
    """‖x − Q(x)‖² of each row of `x` [..., D]: a tensor [...]."""
    return (fake_quantize(x, spec) - x).square().sum(-1)


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
    """RTN: Q(W) of a weight W [out, in], per channel or group, in W's dtype.

    The clip c of each channel or group minimizes Σ|w − Q(w; c)|^norm over `steps` values from 1
    down to `low`, that one left out; 80 steps of 0.01 are GPTQ's and QuaRot's grid, `steps=0` takes
    c = 1 without a search.
    """
    if steps == 0:
        return fake_quantize(w, spec)
    if spec.granularity == "group":  # each group is then a row, with a clip of its own
        rows = replace(spec, granularity="channel", group_size=None)
        return round_to_nearest(cut(w, spec), rows, steps=steps, norm=norm, low=low).flatten(-2)
    # in fp16 |err|^2.4 underflows: search in fp32 at least
    high = w if w.dtype == torch.float64 else w.float()
    found = [_searched(rows, spec, steps, norm, low) for rows in high.split(64)]
    return torch.cat(found).to(w.dtype)


def _searched(w: Tensor, spec: QuantSpec, steps: int, norm: float, low: float) -> Tensor:
    """`round_to_nearest` for a few rows: so many that all candidates pass through the cache."""
    scale, zero = step(w, spec)
    best, error = None, None
    for i in range(steps):
        q = fake_quantize(w, spec, scale=scale * (1 - i * (1 - low) / steps), zero=zero)
        # |·|^norm as exp(norm·log|·|), which is twice as fast as torch's pow; log 0 = −∞ gives 0
        e = (q - w).abs_().log_().mul_(norm).exp_().sum(-1, keepdim=True)
        if best is None:
            best, error = q, e
        else:
            best = torch.where(e < error, q, best)
            error = torch.minimum(e, error)
    return best

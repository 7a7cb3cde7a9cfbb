"""Plain torch definitions of the quantizer; every kernel and every experiment means these.

Notation: a row x of D numbers, b bits, real step Δ ("scale"), integer zero point z, codes q.
Rounding is to nearest, ties to even (torch.round), as in every implementation we compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["QuantSpec", "Quantized", "cut", "dequantize", "fake_quantize", "quantize", "step"]

Granularity = Literal["token", "channel", "group", "tensor"]


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized; frozen, so that it can key a result.

    bits: 2…16. symmetric: codes −2^(b−1)…2^(b−1)−1 with Δ = c·max|x| / (2^(b−1)−1) and no zero
    point; else codes 0…2^b−1 with Δ = c·(max(x,0) − min(x,0)) / (2^b−1) and an integer zero point.
    granularity: what shares one Δ: a "token" (a row of activations), a "channel" (a row of a weight
    [out, in]), a "group" of `group_size` neighbours in a row, or the whole "tensor". clip: c, (0, 1].
    Raises ValueError, naming the field, for anything else.
    """

    bits: int = 4
    symmetric: bool = False
    granularity: Granularity = "token"
    group_size: int | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(
                f"bits = {self.bits}: use 2 to 16 (16 and above means do not quantize)"
            )
        if self.granularity not in ("token", "channel", "group", "tensor"):
            raise ValueError(
                f"granularity = {self.granularity!r}: use 'token', 'channel', 'group' or 'tensor'"
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size = {self.group_size} with granularity = {self.granularity!r}: "
                "give a group size exactly when the granularity is 'group'"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size = {self.group_size}: use a positive number of channels")
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip = {self.clip}: use a ratio in (0, 1]")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        half = 2 ** (self.bits - 1)
        return (-half, half - 1) if self.symmetric else (0, 2 * half - 1)


@dataclass(frozen=True)
class Quantized:
    """Codes (integers held in the input's floating dtype), scale and zero point, broadcastable.

    Shapes: codes like the input (rows cut in groups [..., D/g, g] for 'group'), scale and zero
    with a last axis of 1 ('tensor': a single number).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    shape: torch.Size


def cut(x: Tensor, spec: QuantSpec) -> Tensor:
    """`x` [..., D] with its rows cut in groups, [..., D/g, g], where the granularity asks for it.

    Raises ValueError when D is not a multiple of the group size.
    """
    if spec.granularity != "group":
        return x
    if x.shape[-1] % spec.group_size:
        raise ValueError(
            f"group_size = {spec.group_size} does not divide the last dimension {x.shape[-1]}"
        )
    return x.unflatten(-1, (-1, spec.group_size))


def step(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale Δ and zero point z of each row of `x` (already cut in groups): two tensors [..., 1].

    Symmetric: Δ = c·max|x|/(2^(b−1)−1), z = 0. Asymmetric: x⁻ = c·min(x, 0), x⁺ = c·max(x, 0),
    Δ = (x⁺ − x⁻)/(2^b − 1), z = round(−x⁻/Δ). A row of zeros gets Δ = 1, so that it stays zero.
    """
    low, high = spec.code_range
    over = tuple(range(x.dim())) if spec.granularity == "tensor" else (-1,)
    if spec.symmetric:
        scale = x.abs().amax(over, keepdim=True) * spec.clip / high
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, torch.zeros_like(scale)
    lo = x.amin(over, keepdim=True).clamp(max=0) * spec.clip
    hi = x.amax(over, keepdim=True).clamp(min=0) * spec.clip
    scale = (hi - lo) / (high - low)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.round(-lo / scale)


def quantize(
    x: Tensor, spec: QuantSpec, *, scale: Tensor | None = None, zero: Tensor | None = None
) -> Quantized:
    """Codes q = clamp(round(x/Δ) + z) of `x` [..., D], Δ and z from `step` or given (static).

    Raises ValueError when D is not a multiple of the group size. NaN stays NaN in its own row.
    """
    rows = cut(x, spec)
    if scale is None:
        scale, zero = step(rows, spec)
    elif zero is None:
        zero = torch.zeros_like(scale)
    low, high = spec.code_range
    codes = rows.div(scale).round_().add_(zero).clamp_(low, high)
    return Quantized(codes, scale, zero, x.shape)


def dequantize(q: Quantized) -> Tensor:
    """x̂ = Δ·(q − z), in the shape that was quantized."""
    return (q.codes - q.zero).mul_(q.scale).reshape(q.shape)


def fake_quantize(
    x: Tensor, spec: QuantSpec, *, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """Q(x) = dequantize(quantize(x)): what a quantized layer sees, in floating point."""
    return dequantize(quantize(x, spec, scale=scale, zero=zero))

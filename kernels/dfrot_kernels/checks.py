"""Checks of kernel inputs, shared by the reference and the Triton host functions: one line an error."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MAX_K", "KernelError", "codes", "even", "floating", "vector"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The kernels multiply nibbles left in the high half of a byte (16 q)·(16 w): |Σ| ≤ 128²·K < 2³¹.
# Also |Σ (q − z) w| ≤ 15·8·K < 2²⁴ there, so the sum is exact in fp32 too.
MAX_K = 131_070


class KernelError(ValueError):
    """Input that a kernel cannot take; one line: what, which value, what to do."""


def floating(name: str, x: Tensor, *, dims: int | None = None, last: int | None = None) -> None:
    """Raise KernelError unless x is floating point, contiguous, of `dims` axes, the last of size `last`."""
    if not isinstance(x, Tensor):
        raise KernelError(f"{name} is {type(x).__name__}: give a torch.Tensor")
    if x.dtype not in FLOATS:
        raise KernelError(f"{name} is {x.dtype}: use float16, bfloat16 or float32")
    _shape(name, x, dims, last)


def codes(name: str, x: Tensor, *, dims: int | None = None, last: int | None = None) -> None:
    """Raise KernelError unless x is int8, contiguous, of `dims` axes, the last of size `last`."""
    if x.dtype != torch.int8:
        raise KernelError(
            f"{name} is {x.dtype}: 4-bit codes are held in int8, packed two a byte or not"
        )
    _shape(name, x, dims, last)


def vector(name: str, x: Tensor | None, size: int) -> None:
    """Raise KernelError unless x is None or a contiguous vector [size]."""
    if x is not None:
        _shape(name, x, 1, size)


def _shape(name: str, x: Tensor, dims: int | None, last: int | None) -> None:
    shape = list(x.shape)
    if dims is not None and x.dim() != dims:
        raise KernelError(f"{name} is {shape}: {dims} axes are needed")
    if not x.dim() or (last is not None and x.shape[-1] != last):
        raise KernelError(f"{name} is {shape}: its last axis must be {last or 'there'}")
    if not x.is_contiguous():
        raise KernelError(f"{name} {shape} is not contiguous: give {name}.contiguous()")


def even(name: str, k: int) -> None:
    """Raise KernelError unless rows of k codes can be packed and summed in 32 bits."""
    if k % 2 or k < 2:
        raise KernelError(
            f"{name} has rows of {k}: two codes share a byte, so an even number is needed"
        )
    if k > MAX_K:
        raise KernelError(
            f"{name} has rows of {k}: sums of more than {MAX_K} products can leave int32"
        )

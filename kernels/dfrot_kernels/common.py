"""What several kernels share: rounding, steps and nibbles, as Triton functions; the check of where they run.

Names in kernels: i_ index, p_ pointer, b_ block in registers, m_ mask; shapes stand as comments.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from dfrot_kernels.checks import KernelError

__all__ = [
    "INTERPRETED",
    "Variant",
    "nan_unless_finite",
    "on_device",
    "pack_halves",
    "quotient",
    "round_even",
    "row_codes",
    "row_step",
    "stored_zero",
]

# bf16 is wrong in the interpreter's dot and reductions, and it has no inline assembly
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)  # as kernels may read it


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel, for checks without a GPU (`dfrot_kernels.offline`).

    signature: argument → Triton type ("*fp16", "i32", "fp32", …) in the order of the kernel's arguments,
    "constexpr" for those in `constants`. wgmma: the int8 matrix instruction is wanted in its PTX for 9.0.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    wgmma: bool = False
    aligned: tuple[str, ...] = field(default=())  # pointers and sizes divisible by 16
    fp_fusion: bool = True  # False as launched where a fused multiply-add would turn a code


def on_device(*tensors: torch.Tensor | None) -> None:
    """Raise KernelError unless all tensors are on one CUDA device (on the CPU under the interpreter)."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) != 1:
        raise KernelError(f"tensors on {', '.join(map(str, devices))}: put them on one device")
    kind = next(iter(devices)).type
    if kind != "cuda" and not INTERPRETED:
        raise KernelError(
            f"tensors on {kind}: Triton needs a CUDA device here; use backend='torch', or set "
            "TRITON_INTERPRET=1 before Python starts"
        )


@triton.jit
def round_even(x):
    """Nearest integer, ties to even, of |x| < 2²²: adding 1.5·2²³ leaves no fraction bits."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def row_step(low, high, bad, clip, SYMMETRIC: tl.constexpr):
    """Step Δ and zero point z of rows with extremes `low` ≤ 0 ≤ `high`, as `reference.step`.

    bad: 0, or NaN for a row with NaN or Inf, whose step it makes NaN. z is 0…15, 0 when symmetric.
    """
    if SYMMETRIC:
        b_scale = tl.div_rn(tl.maximum(-low, high) * clip, 7.0)
    else:
        b_scale = tl.div_rn(high * clip - low * clip, 15.0)
    b_scale = tl.where(b_scale > 0, b_scale, 1.0)
    if SYMMETRIC:
        b_zero = tl.zeros_like(b_scale)
    else:
        b_zero = round_even(tl.div_rn(-low * clip, b_scale))
    return b_scale + bad, b_zero


@triton.jit
def pack_halves(b_low, b_high):
    """One byte of two codes −8…7 (int32): `b_low` in the low nibble, `b_high` in the high one."""
    return ((b_low & 15) | (b_high << 4)).to(tl.int8)


@triton.jit
def nan_unless_finite(b_x):
    """0 where `b_x` is finite and NaN elsewhere: its sum marks a row, which a maximum may not."""
    return b_x * 0.0


@triton.jit
def quotient(b_x, b_scale):
    """b_x/b_scale rounded to nearest, of 2⁻¹⁰⁰ < |b_x/b_scale| < 2²⁴: a division a row, none a number.

    With r = 1/Δ rounded to nearest, q = xr is off by two last places at most and x − qΔ is exact in one fused
    multiply-add, so that q + (x − qΔ)r is the rounded quotient (Markstein, 1990). It is several times
    shorter than `div_rn`, which would take longer than reading the row. The interpreter has no fused add.
    """
    if _INTERPRETED:
        b_q = tl.div_rn(b_x, b_scale)
    else:
        b_up = tl.where(b_scale < 1e-30, 18446744073709551616.0, 1.0)  # 2⁶⁴: 1/Δ is to be finite
        b_scale *= b_up
        b_inverse = tl.div_rn(1.0, b_scale)
        b_x *= b_up
        b_q = b_x * b_inverse
        b_q = tl.fma(tl.fma(-b_q, b_scale, b_x), b_inverse, b_q)
    return b_q


@triton.jit
def row_codes(b_x, b_scale, b_zero, SYMMETRIC: tl.constexpr):
    """Codes −8…7 (int32) of `b_x` with what `row_step` gave, broadcast to it; 0 where the step is NaN."""
    b_least = tl.zeros_like(b_zero) - 8.0 if SYMMETRIC else -b_zero
    b_code = tl.minimum(tl.maximum(quotient(b_x, b_scale), b_least), b_least + 15.0)
    # rounded to nearest, ties to even, in the low bits of 1.5·2²³ + code: no conversion to integer
    b_code = (b_code + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    if not SYMMETRIC:
        b_code += b_zero.to(tl.int32) - 8
    return tl.where(b_scale == b_scale, b_code, 0)


@triton.jit
def stored_zero(b_scale, b_zero, SYMMETRIC: tl.constexpr):
    """The zero point as it is stored: moved with the codes, z − 8, and 0 where the step is NaN."""
    if not SYMMETRIC:
        b_zero -= 8.0
    return tl.where(b_scale == b_scale, b_zero, 0.0).to(tl.int32)

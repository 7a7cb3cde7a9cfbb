"""KV cache in 4 bits: keys and values quantized on write, one step and zero point a token and head.

    x̂ = Δ (q − z),    q in 0…15, stored as q − 8 two a byte,    x [..., D] → [..., D/2], Δ and z fp16 [...]

The codes are decided by the step as it is stored, rounded to fp16, and are exactly the reference's. A row
with NaN or Inf gets Δ NaN. x: fp16, bf16, fp32 or fp64. KernelError for other dtypes, shapes, devices, odd D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfrot_kernels import checks
from dfrot_kernels.common import Variant, on_device, pack_halves, round_even, row_step
from dfrot_kernels.reference import KV

__all__ = ["check_kv", "dequantize_kv", "quantize_kv", "variants"]

LANES = 2048  # numbers a program holds
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@triton.jit
def _quantize_kernel(
    p_x, p_packed, p_scale, p_zero, rows, HALF: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr
):
    i_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i_h = tl.arange(0, BH)
    m_r = i_r < rows
    mask = m_r[:, None] & (i_h < HALF)[None, :]
    p_row = p_x + i_r[:, None] * (2 * HALF) + i_h[None, :]
    b_a = tl.load(p_row, mask, other=0.0).to(tl.float32)  # [BR, BH], codes of the low nibbles
    b_b = tl.load(p_row + HALF, mask, other=0.0).to(tl.float32)
    b_bad = tl.sum(b_a * 0.0 + b_b * 0.0, 1)  # [BR] 0, or NaN with a NaN or Inf in the row
    b_low = tl.minimum(tl.minimum(tl.min(b_a, 1), tl.min(b_b, 1)), 0.0)
    b_high = tl.maximum(tl.maximum(tl.max(b_a, 1), tl.max(b_b, 1)), 0.0)
    b_scale, _ = row_step(b_low, b_high, 0.0, 1.0, False)
    b_scale = b_scale.to(tl.float16).to(tl.float32)  # the step that is stored decides the codes
    b_scale = tl.where(b_scale > 0, b_scale, 1.0)
    b_zero = tl.clamp(round_even(tl.div_rn(-b_low, b_scale)), 0.0, 15.0)
    m_fine = b_bad == 0.0
    b_a = tl.clamp(round_even(tl.div_rn(b_a, b_scale[:, None])) + b_zero[:, None], 0.0, 15.0)
    b_b = tl.clamp(round_even(tl.div_rn(b_b, b_scale[:, None])) + b_zero[:, None], 0.0, 15.0)
    b_a = tl.where(m_fine[:, None], b_a - 8.0, 0.0).to(tl.int32)
    b_b = tl.where(m_fine[:, None], b_b - 8.0, 0.0).to(tl.int32)
    tl.store(p_packed + i_r[:, None] * HALF + i_h[None, :], pack_halves(b_a, b_b), mask)
    tl.store(p_scale + i_r, (b_scale + b_bad).to(tl.float16), m_r)
    tl.store(p_zero + i_r, tl.where(m_fine, b_zero, 0.0).to(tl.float16), m_r)


@triton.jit
def _dequantize_kernel(
    p_packed, p_scale, p_zero, p_y, rows, HALF: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr
):
    i_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i_h = tl.arange(0, BH)
    m_r = i_r < rows
    mask = m_r[:, None] & (i_h < HALF)[None, :]
    b_n = tl.load(p_packed + i_r[:, None] * HALF + i_h[None, :], mask, other=0).to(tl.int32)
    b_scale = tl.load(p_scale + i_r, m_r, other=0.0).to(tl.float32)[:, None]
    b_zero = tl.load(p_zero + i_r, m_r, other=0.0).to(tl.float32)[:, None] - 8.0
    b_a = (((b_n << 28) >> 28).to(tl.float32) - b_zero) * b_scale  # [BR, BH]
    b_b = ((b_n >> 4).to(tl.float32) - b_zero) * b_scale
    p_row = p_y + i_r[:, None] * (2 * HALF) + i_h[None, :]
    tl.store(p_row, b_a.to(p_y.dtype.element_ty), mask)
    tl.store(p_row + HALF, b_b.to(p_y.dtype.element_ty), mask)


class _Rows(NamedTuple):
    grid: tuple[int]
    constants: dict[str, int]
    num_warps: int


def _row_launch(rows: int, dim: int) -> _Rows:
    """Whole rows a program, about LANES numbers; halves padded to a power of two."""
    half = dim // 2
    width = triton.next_power_of_2(half)
    block = max(1, LANES // (2 * width))
    warps = min(16, max(4, 2 * block * width // 1024))
    return _Rows((triton.cdiv(rows, block),), {"HALF": half, "BR": block, "BH": width}, warps)


def quantize_kv(x: Tensor) -> KV:
    """Keys or values x [..., D] in 4 bits, as `reference.quantize_kv`: the codes are exactly its."""
    checks.floating("x", x)
    checks.even("x", x.shape[-1])
    on_device(x)
    lead, dim = x.shape[:-1], x.shape[-1]
    packed = torch.empty(*lead, dim // 2, dtype=torch.int8, device=x.device)
    scale = torch.empty(lead, dtype=torch.float16, device=x.device)
    zero = torch.empty(lead, dtype=torch.float16, device=x.device)
    rows = scale.numel()
    if rows:
        launch = _row_launch(rows, dim)
        with torch.cuda.device_of(x):
            _quantize_kernel[launch.grid](
                x, packed, scale, zero, rows, **launch.constants, num_warps=launch.num_warps
            )
    return KV(packed, scale, zero)


def dequantize_kv(kv: KV, dtype: torch.dtype = torch.float16) -> Tensor:
    """x̂ = Δ·(q − z) [..., D] of `quantize_kv`, in `dtype`."""
    check_kv("kv", kv)
    on_device(*kv)
    if dtype not in FLOATS:
        raise checks.KernelError(f"dtype = {dtype}: use float16, bfloat16 or float32")
    dim = 2 * kv.packed.shape[-1]
    y = torch.empty(*kv.packed.shape[:-1], dim, dtype=dtype, device=kv.packed.device)
    rows = kv.scale.numel()
    if rows:
        launch = _row_launch(rows, dim)
        with torch.cuda.device_of(y):
            _dequantize_kernel[launch.grid](
                *kv, y, rows, **launch.constants, num_warps=launch.num_warps
            )
    return y


def check_kv(name: str, kv: KV, shape: tuple[int, ...] | None = None) -> None:
    """Raise KernelError unless `kv` holds packed codes (of `shape`) and a step and zero for each row."""
    checks.codes(f"{name}.packed", kv.packed)
    if shape is not None and tuple(kv.packed.shape) != shape:
        found = list(kv.packed.shape)
        raise checks.KernelError(f"{name}.packed is {found}: {list(shape)} is needed")
    if not kv.packed.shape[-1]:
        raise checks.KernelError(f"{name}.packed has rows of 0: give at least one byte a row")
    rows = list(kv.packed.shape[:-1])
    for part in ("scale", "zero"):
        x = getattr(kv, part)
        if x.dtype != torch.float16:
            raise checks.KernelError(f"{name}.{part} is {x.dtype}: float16 is needed")
        if list(x.shape) != rows or not x.is_contiguous():
            raise checks.KernelError(
                f"{name}.{part} is {list(x.shape)}: {rows}, contiguous, is needed"
            )


def variants() -> list[Variant]:
    """The default configurations, at head_dim 128."""
    rows = _row_launch(2048 * 8, 128)
    kv = {"p_packed": "*i8", "p_scale": "*fp16", "p_zero": "*fp16"}
    kernels = (
        ("quantize_kv", _quantize_kernel, {"p_x": "*fp16"} | kv),
        ("dequantize_kv", _dequantize_kernel, kv | {"p_y": "*fp16"}),
    )
    return [
        Variant(
            name, kernel, pointers | {"rows": "i32"} | dict.fromkeys(rows.constants, "constexpr"),
            rows.constants, rows.num_warps, aligned=tuple(pointers),
        )
        for name, kernel, pointers in kernels
    ]  # fmt: skip

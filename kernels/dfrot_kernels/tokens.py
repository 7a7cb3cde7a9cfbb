"""Per-token 4-bit quantization, alone or behind a residual sum and RMSNorm, in one read of the row.

    q = clamp(round(x/Δ) + z),    Δ, z from the row's extremes,        x [..., K] → codes, Δ and z
    s = x + residual,    n = s/√(mean s² + ε)·gain,    codes of n,     x, residual [..., K], gain [K]

A program holds a few rows, each as its two halves k < K/2 and k ≥ K/2: code k and code k + K/2 share a byte,
so packing needs no exchange between threads. Rows of more than 32768 numbers do not fit; a loop reads them
once for the extremes and once for the codes (and once for mean s² before).

x, residual: fp16, bf16 or fp32, s in the same dtype, rounded as torch rounds it; gain: any of them. All
arithmetic is in fp32, and divisions that decide codes are rounded to nearest: the codes of `quantize_int4`
are the reference's, bit for bit. Behind the norm, mean s² is summed in another order than torch's, which can
turn a code whose n/Δ is a rounding tie within float error.

codes: int8 [..., K/2] packed, or [..., K]; scale: fp32 [...]; zero: int32 [...]. A row with NaN or Inf: scale
NaN, codes and zero 0. KernelError for fp64, integers, non-contiguous tensors, other shapes, odd K, K > MAX_K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfrot_kernels import checks
from dfrot_kernels.common import (
    Variant,
    nan_unless_finite,
    on_device,
    pack_halves,
    row_codes,
    row_step,
    stored_zero,
)
from dfrot_kernels.reference import QuantSpec, Tokens

__all__ = ["add_norm_quantize", "check_input", "empty_tokens", "quantize_int4", "variants"]

LONGEST = 32_768  # numbers a program holds: 64 registers a thread at 16 warps
CHUNK = 4096  # of each half, for longer rows


@triton.jit
def _sum(p_x, p_residual, at, m_x):
    """s = x + residual in fp32, rounded to x's dtype, and 0 where masked."""
    b_s = tl.load(p_x + at, m_x, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_s += tl.load(p_residual + at, m_x, other=0.0).to(tl.float32)
        if p_x.dtype.element_ty == tl.bfloat16:
            # to nearest even on the bits: a plain cast truncates under the interpreter
            b_bits = b_s.to(tl.int32, bitcast=True)
            b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536
            b_s = tl.where(b_s == b_s, b_bits.to(tl.float32, bitcast=True), b_s)
        else:
            b_s = b_s.to(p_x.dtype.element_ty).to(tl.float32)
    return b_s


@triton.jit
def _inverse_rms(b_squares, half, eps):
    """1/√(Σs²/K + ε) of each row, K = 2·half."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(b_squares, 2.0 * half) + eps))


@triton.jit
def _times_gain(b_n, p_gain, i_k, m_k):
    if p_gain is not None:
        b_n *= tl.load(p_gain + i_k, m_k, other=0.0).to(tl.float32)[None, :]
    return b_n


@triton.jit
def _store_codes(p_codes, i_t, i_k, half, m_x, b_low, b_high, PACKED: tl.constexpr):
    """Codes (int32) of both halves of rows i_t."""
    if PACKED:
        tl.store(p_codes + i_t * half + i_k, pack_halves(b_low, b_high), m_x)
    else:
        p_codes += i_t * (2 * half) + i_k
        tl.store(p_codes, b_low.to(tl.int8), m_x)
        tl.store(p_codes + half, b_high.to(tl.int8), m_x)


@triton.jit
def _rows_kernel(
    p_x, p_residual, p_gain, p_s, p_codes, p_scale, p_zero, rows, half, clip, eps,
    NORM: tl.constexpr, SYMMETRIC: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    i_k = tl.arange(0, BLOCK)
    m_t, m_k = i_t < rows, i_k < half
    m_x = m_t[:, None] & m_k[None, :]
    i_row = i_t.to(tl.int64)[:, None]
    at = i_row * (2 * half) + i_k[None, :]
    b_low = _sum(p_x, p_residual, at, m_x)  # [ROWS, BLOCK]
    b_high = _sum(p_x, p_residual, at + half, m_x)
    if p_residual is not None:
        tl.store(p_s + at, b_low.to(p_s.dtype.element_ty), m_x)
        tl.store(p_s + at + half, b_high.to(p_s.dtype.element_ty), m_x)
    if NORM:
        b_inverse = _inverse_rms(tl.sum(b_low * b_low + b_high * b_high, 1), half, eps)[:, None]
        b_low = _times_gain(b_low * b_inverse, p_gain, i_k, m_k)
        b_high = _times_gain(b_high * b_inverse, p_gain, i_k + half, m_k)
    b_least = tl.minimum(tl.min(tl.minimum(b_low, b_high), 1), 0.0)  # [ROWS]
    b_most = tl.maximum(tl.max(tl.maximum(b_low, b_high), 1), 0.0)
    b_bad = tl.sum(nan_unless_finite(b_low) + nan_unless_finite(b_high), 1)
    b_scale, b_zero = row_step(b_least, b_most, b_bad, clip, SYMMETRIC)
    b_low = row_codes(b_low, b_scale[:, None], b_zero[:, None], SYMMETRIC)
    b_high = row_codes(b_high, b_scale[:, None], b_zero[:, None], SYMMETRIC)
    _store_codes(p_codes, i_row, i_k[None, :], half, m_x, b_low, b_high, PACKED)
    tl.store(p_scale + i_t, b_scale, m_t)
    tl.store(p_zero + i_t, stored_zero(b_scale, b_zero, SYMMETRIC), m_t)


@triton.jit
def _normed(p_x, p_residual, p_gain, at_row, i_k, m_k, b_inverse, NORM: tl.constexpr):
    """n of a chunk of one long row [1, BLOCK]; x itself without the norm."""
    b_n = _sum(p_x, p_residual, at_row + i_k[None, :], m_k[None, :])
    if NORM:
        b_n = _times_gain(b_n * b_inverse, p_gain, i_k, m_k)
    return b_n


@triton.jit
def _long_kernel(
    p_x, p_residual, p_gain, p_s, p_codes, p_scale, p_zero, half, clip, eps,
    NORM: tl.constexpr, SYMMETRIC: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    at_row = i_t * (2 * half)
    b_inverse = tl.full([1, 1], 1.0, tl.float32)
    if NORM:
        b_squares = tl.zeros([1, BLOCK], tl.float32)
        for i_begin in range(0, 2 * half, BLOCK):
            i_k = i_begin + tl.arange(0, BLOCK)[None, :]
            m_k = i_k < 2 * half
            b_s = _sum(p_x, p_residual, at_row + i_k, m_k)
            if p_residual is not None:
                tl.store(p_s + at_row + i_k, b_s.to(p_s.dtype.element_ty), m_k)
            b_squares += b_s * b_s
        b_inverse = _inverse_rms(tl.sum(b_squares, 1), half, eps)[:, None]
    b_least, b_most = tl.zeros([1, BLOCK], tl.float32), tl.zeros([1, BLOCK], tl.float32)
    b_bad = tl.zeros([1, BLOCK], tl.float32)
    for i_begin in range(0, 2 * half, BLOCK):
        i_k = i_begin + tl.arange(0, BLOCK)
        m_k = i_k < 2 * half
        b_n = _normed(p_x, p_residual, p_gain, at_row, i_k, m_k, b_inverse, NORM)
        b_least, b_most = tl.minimum(b_least, b_n), tl.maximum(b_most, b_n)
        b_bad += nan_unless_finite(b_n)
    b_least, b_most, b_bad = tl.min(b_least, 1), tl.max(b_most, 1), tl.sum(b_bad, 1)
    b_scale, b_zero = row_step(b_least, b_most, b_bad, clip, SYMMETRIC)  # [1]
    for i_begin in range(0, half, BLOCK):
        i_k = i_begin + tl.arange(0, BLOCK)
        m_k = i_k < half
        b_low = _normed(p_x, p_residual, p_gain, at_row, i_k, m_k, b_inverse, NORM)
        b_high = _normed(p_x, p_residual, p_gain, at_row, i_k + half, m_k, b_inverse, NORM)
        b_low = row_codes(b_low, b_scale[:, None], b_zero[:, None], SYMMETRIC)
        b_high = row_codes(b_high, b_scale[:, None], b_zero[:, None], SYMMETRIC)
        m_x = m_k[None, :]
        _store_codes(p_codes, i_t, i_k[None, :], half, m_x, b_low, b_high, PACKED)
    tl.store(p_scale + i_t + tl.arange(0, 1), b_scale)
    tl.store(p_zero + i_t + tl.arange(0, 1), stored_zero(b_scale, b_zero, SYMMETRIC))


class Launch(NamedTuple):
    """How rows of K are cut: rows a program, numbers of each half a block, warps."""

    rows: int
    block: int
    warps: int


def launch(k: int, norm: bool = False) -> Launch:
    """The launch for rows of K: 32 numbers a thread, 4 to 16 warps; short rows together."""
    if k > LONGEST:
        return Launch(1, CHUNK, 8)
    block = triton.next_power_of_2(k // 2)
    rows = max(1, 1024 // block)
    # behind a norm 64 of the longest rows: with 32, and half the registers, ptxas spills for 9.0
    share = 1024 if norm and block >= 8192 else 512
    return Launch(rows, block, min(16, max(4, rows * block // share)))


def check_input(x: Tensor, clip: float) -> None:
    """Raise KernelError unless the kernels take rows like x's, ValueError for a clip outside (0, 1]."""
    checks.floating("x", x)
    if x.dtype == torch.float64:
        raise checks.KernelError(
            "x is torch.float64: the kernels compute in float32; use backend='torch'"
        )
    checks.even("x", x.shape[-1])
    QuantSpec(clip=clip)


def empty_tokens(x: Tensor, packed: bool) -> Tokens:
    """`Tokens` of x's shape, not yet written."""
    *rows, k = x.shape
    codes = torch.empty(*rows, k // 2 if packed else k, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    return Tokens(codes, scale, torch.empty(rows, dtype=torch.int32, device=x.device))


def quantize_int4(
    x: Tensor, *, symmetric: bool = False, packed: bool = True, clip: float = 1.0
) -> Tokens:
    """Per-token 4-bit codes of x [..., K], see `reference.quantize_int4`: the same, bit for bit."""
    check_input(x, clip)
    on_device(x)
    return _run(x, None, None, None, None, symmetric, packed, clip)


def add_norm_quantize(
    x: Tensor,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    *,
    eps: float = 1e-6,
    symmetric: bool = False,
    packed: bool = True,
    clip: float = 1.0,
) -> tuple[Tokens, Tensor]:
    """s = x + residual and the 4-bit codes of its RMSNorm, see `reference.add_norm_quantize`.

    Returns (codes of n, s); s is x itself where there is no residual. KernelError also for a residual of
    another dtype or shape than x and a gain that is not a float vector [K].
    """
    check_input(x, clip)
    if residual is not None:
        checks.floating("residual", residual)
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise checks.KernelError(
                f"residual is {residual.dtype} {list(residual.shape)}, "
                f"x {x.dtype} {list(x.shape)}: they must be alike"
            )
    if gain is not None:
        checks.floating("gain", gain)
        checks.vector("gain", gain, x.shape[-1])
    on_device(x, residual, gain)
    s = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _run(x, residual, gain, s, eps, symmetric, packed, clip), s


def _run(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    s: Tensor | None,
    eps: float | None,
    symmetric: bool,
    packed: bool,
    clip: float,
) -> Tokens:
    """Allocate and launch; eps None means without the norm."""
    tokens = empty_tokens(x, packed)
    k = x.shape[-1]
    rows = x.numel() // k
    if not rows:
        return tokens
    cut = launch(k, eps is not None)
    # no fused multiply-add, which would round c·x⁺ − c·x⁻ once less than the reference
    options = {"num_warps": cut.warps, "enable_fp_fusion": False}
    flags = (eps is not None, symmetric, packed)
    pointers = (x, residual, gain, s, *tokens)
    numbers = (k // 2, clip, 0.0 if eps is None else eps)
    with torch.cuda.device_of(x):
        if k > LONGEST:
            _long_kernel[(rows,)](*pointers, *numbers, *flags, cut.block, **options)
        else:
            grid = (triton.cdiv(rows, cut.rows),)
            sizes = (cut.rows, cut.block)
            _rows_kernel[grid](*pointers, rows, *numbers, *flags, *sizes, **options)
    return tokens


def variants() -> list[Variant]:
    """What LLaMA-2-7B, 3-8B and 3-70B launch, and one longer row."""
    sizes = (128, 4096, 8192, 11008, 14336, 28672, 53248)
    return [_variant(k, norm) for k in sizes for norm in (False, True)]


def _variant(k: int, norm: bool) -> Variant:
    cut, long = launch(k, norm), k > LONGEST
    optional = ("p_residual", "p_gain", "p_s")
    types = {"p_x": "*fp16", **dict.fromkeys(optional, "*fp16" if norm else "constexpr")}
    types |= {"p_codes": "*i8", "p_scale": "*fp32", "p_zero": "*i32"}
    aligned = (*(name for name, kind in types.items() if kind != "constexpr"), "half")
    if not long:
        types["rows"] = "i32"
    types |= {"half": "i32", "clip": "fp32", "eps": "fp32"}
    constants = {"NORM": norm, "SYMMETRIC": False, "PACKED": True}
    constants |= {"BLOCK": cut.block} if long else {"ROWS": cut.rows, "BLOCK": cut.block}
    return Variant(
        name=f"{'add_norm_quantize' if norm else 'quantize_int4'} K={k}",
        kernel=_long_kernel if long else _rows_kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constants=constants if norm else {**dict.fromkeys(optional), **constants},
        num_warps=cut.warps,
        aligned=aligned,
        fp_fusion=False,
    )

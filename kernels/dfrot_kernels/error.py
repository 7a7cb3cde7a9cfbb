"""Error of quantizing rotated rows: squared, without the rotated matrix in memory, or as a matrix.

    e_t = ‖x_t R − Q(x_t R)‖²,       x [T, d], R [d, d] → e [T] fp32,       Q: 4 bits per token.
    E = Y − Q(Y) and ‖E_t‖²,         Y [T, d] fp32 → E [T, d], [T] fp32,    in one read of Y.

A program holds a block of rows. It multiplies them with one tile of R's columns after another, keeping the
extremes of each row only; then, with the step known, it multiplies again and sums the squared errors. Both
passes add in the same order, so they see the same numbers: twice the arithmetic instead of T·d·4 bytes.

x, R: fp16, bf16 or fp32. Both of one 16-bit type: their products are exact, summed in fp32. Otherwise in fp32
as three TF32 products (tf32x3): one TF32 product would be 2⁻¹¹ off, several hundredths of a step for the
largest values, which moves codes; plain fp32 would leave the tensor cores. A row with NaN or Inf gets NaN.
`quantize_error` is for a Y that is there already, as in the refinement of R1, which needs E itself: E is the
reference's, bit for bit.
KernelError for wrong shapes, dtypes or devices and for non-contiguous tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfrot_kernels import checks
from dfrot_kernels.common import (
    INTERPRETED,
    Variant,
    nan_unless_finite,
    on_device,
    round_even,
    row_step,
)

__all__ = ["quantize_error", "rotate_quantize_error", "variants"]

LONGEST = 16_384  # numbers of a row that `quantize_error` holds: 32 registers a thread at 16 warps


@triton.jit
def _tile(
    p_x, p_r, m_t, i_n, d,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns i_n of x R, summed in fp32 in ascending steps of BK; 0 outside."""
    i_k = tl.arange(0, BK)
    m_n = i_n < d
    p_r += i_k.to(tl.int64)[:, None] * d + i_n[None, :]
    b_y = tl.zeros([BM, BN], tl.float32)
    for i_begin in range(0, d, BK):
        m_k = i_begin + i_k < d
        b_x = tl.load(p_x + (i_begin + i_k)[None, :], m_t[:, None] & m_k[None, :], other=0.0)
        b_r = tl.load(p_r, m_k[:, None] & m_n[None, :], other=0.0)
        b_y = tl.dot(b_x.to(TYPE), b_r.to(TYPE), b_y, input_precision=PRECISION)
        p_r += BK * d
    return b_y  # [BM, BN]


@triton.jit
def _error_kernel(
    p_x, p_r, p_error, rows, d, clip,
    SYMMETRIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_t = i_t < rows
    p_x += i_t[:, None] * d
    b_low, b_high = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    b_bad = tl.zeros([BM], tl.float32)
    for i_begin in range(0, d, BN):
        i_n = i_begin + tl.arange(0, BN)
        b_y = _tile(p_x, p_r, m_t, i_n, d, BM, BN, BK, TYPE, PRECISION)
        b_low = tl.minimum(b_low, tl.min(b_y, 1))
        b_high = tl.maximum(b_high, tl.max(b_y, 1))
        b_bad += tl.sum(b_y * 0.0, 1)  # NaN with NaN or Inf, which a GPU's min and clamp may drop
    b_scale, b_zero = row_step(b_low, b_high, b_bad, clip, SYMMETRIC)
    b_scale, b_zero = b_scale[:, None], b_zero[:, None]
    least: tl.constexpr = -8.0 if SYMMETRIC else 0.0
    b_error = tl.zeros([BM], tl.float32)
    for i_begin in range(0, d, BN):
        i_n = i_begin + tl.arange(0, BN)
        b_y = _tile(p_x, p_r, m_t, i_n, d, BM, BN, BK, TYPE, PRECISION)
        b_q = tl.clamp(round_even(tl.div_rn(b_y, b_scale)) + b_zero, least, least + 15.0)
        b_e = (b_q - b_zero) * b_scale - b_y  # a column outside is 0 and has code z: no error
        b_error += tl.sum(b_e * b_e, 1)
    tl.store(p_error + i_t, b_error, m_t)


@triton.jit
def _difference_kernel(
    p_y, p_e, p_squared, rows, d, clip,
    SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_n = tl.arange(0, BLOCK)
    m_t = i_t < rows
    m_y = m_t[:, None] & (i_n < d)[None, :]
    at = i_t[:, None] * d + i_n[None, :]
    b_y = tl.load(p_y + at, m_y, other=0.0)  # [ROWS, BLOCK]
    b_low = tl.minimum(tl.min(b_y, 1), 0.0)
    b_high = tl.maximum(tl.max(b_y, 1), 0.0)
    b_scale, b_zero = row_step(b_low, b_high, tl.sum(nan_unless_finite(b_y), 1), clip, SYMMETRIC)
    b_scale, b_zero = b_scale[:, None], b_zero[:, None]
    least: tl.constexpr = -8.0 if SYMMETRIC else 0.0
    b_q = tl.clamp(round_even(tl.div_rn(b_y, b_scale)) + b_zero, least, least + 15.0)
    b_e = b_y - (b_q - b_zero) * b_scale
    tl.store(p_e + at, b_e, m_y)
    b_e = tl.where(m_y, b_e, 0.0)  # also NaN outside, in a row of NaN
    tl.store(p_squared + i_t, tl.sum(b_e * b_e, 1), m_t)


def _launch(rows: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """(tile, warps): fewer rows a program where a large GPU would else stand idle."""
    block = 64 if rows >= 4096 else 32 if rows >= 2048 else 16
    warps = 8 if block == 64 else 4
    if dtype not in (
        torch.float16,
        torch.bfloat16,
    ):  # three products of split operands: more registers
        return {"BM": block, "BN": 64, "BK": 32}, warps
    return {"BM": block, "BN": 64 if block == 16 else 128, "BK": 128 if block == 16 else 64}, warps


def _types(dtype: torch.dtype) -> dict[str, object]:
    if INTERPRETED or dtype not in (torch.float16, torch.bfloat16):
        return {"TYPE": tl.float32, "PRECISION": "tf32x3"}
    return {"TYPE": tl.float16 if dtype == torch.float16 else tl.bfloat16, "PRECISION": "ieee"}


def rotate_quantize_error(
    x: Tensor, r: Tensor, *, symmetric: bool = False, clip: float = 1.0
) -> Tensor:
    """‖xR − Q(xR)‖² of each row of x [T, d], R [d, d], 4 bits per token: [T] fp32."""
    checks.floating("x", x, dims=2)
    checks.floating("r", r, dims=2, last=x.shape[-1])
    rows, d = x.shape
    if r.shape[0] != d:
        raise checks.KernelError(f"r is {list(r.shape)}: [{d}, {d}] is needed")
    if not 0 < clip <= 1:
        raise checks.KernelError(f"clip = {clip}: use a ratio in (0, 1]")
    on_device(x, r)
    error = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        common = x.dtype if x.dtype == r.dtype else torch.float32
        tile, warps = _launch(rows, common)
        with torch.cuda.device_of(x):
            _error_kernel[(triton.cdiv(rows, tile["BM"]),)](
                x, r, error, rows, d, clip,
                SYMMETRIC=symmetric, **tile, **_types(common), num_warps=warps, num_stages=3,
            )  # fmt: skip
    return error


def _cut(d: int) -> tuple[dict[str, int], int]:
    """(block, warps) of `quantize_error`: 16 numbers a thread in 4 to 16 warps; short rows together."""
    block = triton.next_power_of_2(d)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block}, min(16, max(4, rows * block // 512))


def quantize_error(
    y: Tensor, *, symmetric: bool = False, clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(E = Y − Q(Y) [T, d], ‖E_t‖² [T]) of y [T, d] fp32, 4 bits per token; d ≤ 16384."""
    checks.floating("y", y, dims=2)
    if y.dtype != torch.float32 or y.shape[1] > LONGEST:
        raise checks.KernelError(
            f"y is {y.dtype} {list(y.shape)}: use float32 rows of at most {LONGEST} numbers, or "
            "backend='torch'"
        )
    if not 0 < clip <= 1:
        raise checks.KernelError(f"clip = {clip}: use a ratio in (0, 1]")
    on_device(y)
    rows, d = y.shape
    e, squared = torch.empty_like(y), torch.empty(rows, dtype=torch.float32, device=y.device)
    if rows:
        block, warps = _cut(d)
        with torch.cuda.device_of(y):
            # no fused multiply-add: E is the reference's
            _difference_kernel[(triton.cdiv(rows, block["ROWS"]),)](
                y, e, squared, rows, d, clip,
                SYMMETRIC=symmetric, **block, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return e, squared


def variants() -> list[Variant]:
    """The default configurations, at LLaMA-2-7B's width of 4096, and the error of rows of other widths."""
    found = []
    for d in (576, 4096, 8192, LONGEST):
        block, warps = _cut(d)
        constants = {"SYMMETRIC": False, **block}
        signature = dict.fromkeys(("p_y", "p_e", "p_squared"), "*fp32")
        signature |= {"rows": "i32", "d": "i32", "clip": "fp32"}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = ("p_y", "p_e", "p_squared", "d")
        name, how = f"quantize_error_d{d}", {"aligned": aligned, "fp_fusion": False}
        found.append(Variant(name, _difference_kernel, signature, constants, warps, **how))
    for kind, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        for rows in (256, 2048, 8192):
            tile, warps = _launch(rows, dtype)
            constants = {"SYMMETRIC": False, **tile, **_types(dtype)}
            signature = {"p_x": f"*{kind}", "p_r": f"*{kind}", "p_error": "*fp32"}
            signature |= {"rows": "i32", "d": "i32", "clip": "fp32"}
            signature |= dict.fromkeys(constants, "constexpr")
            name = f"rotate_quantize_error_{kind}_m{tile['BM']}"
            aligned = ("p_x", "p_r", "p_error", "d")
            found.append(Variant(name, _error_kernel, signature, constants, warps, aligned=aligned))
    return found

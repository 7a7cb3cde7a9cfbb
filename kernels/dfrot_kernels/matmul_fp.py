"""W4A16: the product of floating-point tokens and a 4-bit weight, the kernel W4A4 is compared with.

    y_tn = Δ_n Σ_k x_tk w_nk + b_n

Codes are converted to x's type, where integers this small are exact, and the sum is in fp32. As in
`matmul`, byte j of a packed row holds codes j and j + K/2, the weight is the left operand, and for few
tokens K is cut in parts, whose fp32 sums [split, M, N] a second kernel adds, in the same order every run.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfrot_kernels import checks
from dfrot_kernels.common import INTERPRETED, Variant, on_device
from dfrot_kernels.matmul import (
    ASSEMBLY,
    FEW,
    FINISH,
    SHAPES,
    Plan,
    check_weight,
    load,
    side_by_side,
    steps_of,
    tile_of,
    variant,
)
from dfrot_kernels.matmul import plan as integer_plan
from dfrot_kernels.reference import Weight

__all__ = ["matmul_fp", "plan", "variants"]

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# Four bytes → 4 low and 4 high codes as 16-bit floats, several times faster than conversions. A code w with
# its sign bit flipped is w + 8. As last bits of 1024 in fp16, of 128 in bf16, where an ulp is 1, that makes
# 1032 + w, 136 + w; the last step takes the 1032 or 136 away.
CODES = """{
.reg .b32 low, high, one, less;
lop3.b32 low, $4, 0x0f0f0f0f, 0x08080808, 0x6a;
shr.b32 high, $4, 4;
lop3.b32 high, high, 0x0f0f0f0f, 0x08080808, 0x6a;
prmt.b32 $0, low, UPPER, 0x4140;
prmt.b32 $1, low, UPPER, 0x4342;
prmt.b32 $2, high, UPPER, 0x4140;
prmt.b32 $3, high, UPPER, 0x4342;
mov.b32 one, ONE;
mov.b32 less, LESS;
fma.rn.TYPE $0, $0, one, less;
fma.rn.TYPE $1, $1, one, less;
fma.rn.TYPE $2, $2, one, less;
fma.rn.TYPE $3, $3, one, less;
}"""


def written(**words: str) -> tl.constexpr:
    """CODES with its words in capitals replaced."""
    return tl.constexpr(reduce(lambda text, word: text.replace(*word), words.items(), CODES))


FP16_CODES = written(UPPER="0x64646464", ONE="0x3c003c00", LESS="0xe408e408", TYPE="f16x2")
BF16_CODES = written(UPPER="0x43434343", ONE="0x3f803f80", LESS="0xc308c308", TYPE="bf16x2")


def plan(m: int, n: int, k: int, size: int = 2) -> Plan:
    """The launch of x [m, k], of `size` bytes a number, times w [n, k]: as `matmul.plan`, tiles smaller."""
    p = integer_plan(m, n, k)
    return p._replace(channels=min(p.channels, 128), step=128 // size, stages=4 if m <= FEW else 3)


@triton.jit
def unpack(b_bytes, TYPE: tl.constexpr):
    """The codes of packed rows in TYPE, low nibbles first: [R, B] → [R, 2B]."""
    if ASSEMBLY and tl.float16 == TYPE:
        b_low, b_high = tl.inline_asm_elementwise(
            FP16_CODES,
            "=r,=r,=r,=r,r",
            [b_bytes],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    elif ASSEMBLY and tl.bfloat16 == TYPE:
        b_low, b_high = tl.inline_asm_elementwise(
            BF16_CODES,
            "=r,=r,=r,=r,r",
            [b_bytes],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        b_low, b_high = ((b_bytes << 4) >> 4).to(TYPE), (b_bytes >> 4).to(TYPE)
    return side_by_side(b_low, b_high)


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    p_x, p_w, p_step, p_bias, p_y,  # p_y: [M, N], or fp32 sums [SPLIT, M, N]
    M, N, K2,
    TYPE: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of y, or of one part's sums; K2 = K/2. TYPE: what is multiplied. EVEN: BK divides K2."""
    i_m, i_n = tile_of(M, N, BM, BN)
    first, end = steps_of(K2, BK, SPLIT)
    # 64 bits up to the tile, 32 inside it: BM·K < 2³¹
    p_x += i_m.to(tl.int64) * BM * K2 * 2
    p_w += i_n.to(tl.int64) * BN * K2
    i_row, i_col = tl.arange(0, BM), tl.arange(0, BN)
    # past the end of M or N the last row is read again, and its product not stored
    p_x += tl.minimum(i_row, M - 1 - i_m * BM)[None, :] * K2 * 2  # [1, BM]
    p_w += tl.minimum(i_col, N - 1 - i_n * BN)[:, None] * K2  # [BN, 1]
    i_k, i_both = tl.arange(0, BK), tl.arange(0, 2 * BK)
    i_half = i_both // BK * K2
    b_sum = tl.zeros([BN, BM], tl.float32)
    for i_step in range(first, end):
        start = i_step * BK
        b_w = load(p_w, start + i_k[None, :], K2, EVEN, "evict_first" if SPLIT > 1 else "")
        b_w = unpack(b_w, TYPE)  # [BN, 2BK]
        b_x = load(p_x + i_half[:, None], start + (i_both % BK)[:, None], K2, EVEN, "")
        # fp32 is multiplied in terms of tf32, whose products with these integers are exact
        b_sum = tl.dot(b_w, b_x.to(TYPE), b_sum, input_precision="tf32x3")  # b_x: [2BK, BM]
    i_m, i_n = i_m * BM + i_row[None, :], i_n * BN + i_col[:, None]  # [1, BM], [BN, 1]
    m_y = (i_m < M) & (i_n < N)
    i_y = i_m.to(tl.int64) * N + i_n
    if SPLIT > 1:
        i_y += tl.program_id(1).to(tl.int64) * M * N
        tl.store(p_y + i_y, b_sum, mask=m_y)
    else:
        b_y = scaled(b_sum, p_step, p_bias, i_n, i_n < N)
        tl.store(p_y + i_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def scaled(b_sum, p_step, p_bias, i_n, m_n):
    """Δ_n Σ + b_n in fp32."""
    b_y = b_sum * tl.load(p_step + i_n, mask=m_n, other=0).to(tl.float32)
    if p_bias is not None:
        b_y += tl.load(p_bias + i_n, mask=m_n, other=0).to(tl.float32)
    return b_y


@triton.jit(do_not_specialize=["M"])
def finish_kernel(p_part, p_step, p_bias, p_y, M, N, SPLIT: tl.constexpr, B: tl.constexpr):
    """B channels of one token of y from the parts' sums [SPLIT, M, N]."""
    i_n = tl.program_id(1) * B + tl.arange(0, B)
    m_n = i_n < N
    i_y = tl.program_id(0).to(tl.int64) * N + i_n
    b_sum = tl.zeros([B], tl.float32)
    for i_part in tl.static_range(SPLIT):
        b_sum += tl.load(p_part + i_y + M.to(tl.int64) * N * i_part, mask=m_n, other=0)
    b_y = scaled(b_sum, p_step, p_bias, i_n, m_n)
    tl.store(p_y + i_y, b_y.to(p_y.dtype.element_ty), mask=m_n)


def matmul_fp(x: Tensor, w: Weight, bias: Tensor | None = None) -> Tensor:
    """W4A16 product [..., N] of x [..., K], fp16, bf16 or fp32, and w [N, K], in x's dtype.

    Raises KernelError for another dtype, non-contiguous x, sizes that do not fit together, K > checks.MAX_K,
    and tensors on more than one device.
    """
    half = check_weight(w, bias)
    checks.floating("x", x, last=2 * half)
    if x.dtype not in TYPES:
        raise checks.KernelError(f"x is {x.dtype}: use float16, bfloat16 or float32")
    on_device(x, *w, bias)
    n = len(w.packed)
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    m = x.shape[:-1].numel()
    if not m or not n:
        return y
    p = plan(m, n, 2 * half, x.element_size())
    out = y
    if p.split > 1:
        out = torch.empty(p.split, m, n, dtype=torch.float32, device=y.device)
    tiles = triton.cdiv(m, p.tokens) * triton.cdiv(n, p.channels)
    with torch.cuda.device_of(x):
        product_kernel[tiles, p.split](
            x, w.packed, w.scale, bias, out, m, n, half, **constants(p, half, TYPES[x.dtype]),
            num_warps=p.warps, num_stages=p.stages,
        )  # fmt: skip
        if p.split > 1:
            finish_kernel[m, triton.cdiv(n, FINISH)](
                out, w.scale, bias, y, m, n, SPLIT=p.split, B=FINISH
            )
    return y


def constants(p: Plan, half: int, dtype: tl.dtype) -> dict[str, Any]:
    """Compile-time arguments of `product_kernel`; the interpreter's dot is right in fp32 only."""
    return {
        "TYPE": tl.float32 if INTERPRETED else dtype,
        "EVEN": half % p.step == 0,
        "SPLIT": p.split,
        "BM": p.tokens,
        "BN": p.channels,
        "BK": p.step,
    }


def variants() -> list[Variant]:
    """Every tile `plan` takes; fp16."""
    pointers = {"p_step": "*fp32", "p_bias": "*fp16"}
    found = []
    for m, n, k in SHAPES:
        p = plan(m, n, k)
        out = "*fp16" if p.split == 1 else "*fp32"
        every = {"p_x": "*fp16", "p_w": "*i8", **pointers, "p_y": out}
        fixed = constants(p, k // 2, tl.float16)
        name = f"matmul_fp {m}x{n}x{k}"
        found.append(variant(name, product_kernel, every, ("M", "N", "K2"), fixed, p))
    every = {"p_part": "*fp32", **pointers, "p_y": "*fp16"}
    fixed = {"SPLIT": 8, "B": FINISH}
    return [*found, variant("matmul_fp finish", finish_kernel, every, ("M", "N"), fixed)]

"""Online Hadamard and per-token 4-bit quantization in one kernel: x is read once, xH never written.

    y = x H(K) / √order,    codes, Δ and z of y as `quantize_int4` has them,    x [..., K] → Tokens

H(K) = I_blocks ⊗ C ⊗ S (see `hadamard`) is cut into at most three ±1 factors: the first holds the core C
and as much of Sylvester's S as suits, one or two more hold the rest of S. A program keeps whole rows in
registers, multiplies one axis with its factor on the tensor cores and turns the next axis to the front:

    [first, rows · middle · last]  →  [first · rows · middle, last]  →  [first · rows · last, middle]

Rows of more than 16384 padded numbers leave no registers for the operands. They go in four slabs of the first
factor's columns, twice: once for the extremes, once for the codes, with x from the cache all but the first
time. A large core is slow for another reason: each program reads its matrix, 344² for K = 11008, from L2.

Precision is fp32's throughout. fp16 and bf16 enter the first product as they are: products with ±1 are exact
there and sums are fp32. Later products, and an fp32 x, are cut into three bf16 parts of 8 bits, together
exactly the 24 bits of a float, of the same range, each multiplied exactly by ±1. That is 3/4 of the tensor
core time of two TF32 parts, which hold 22 bits, and needs no scaling, as fp16 parts would. Butterflies would
need no multiplication at all, but an exchange between threads for each of log₂ K levels where this has two.

The first factor is padded with zeros to a power of two of at least 16, in two halves: the columns of k < K/2
fill its first half and the others its second, so that the two codes of a byte meet in one reduction over
two numbers, and the columns of zeros, y = 0, leave the extremes as they are. Where H(K) is block diagonal
the number of blocks is odd, halves of the row are not halves of an axis, and `pack` follows by itself.

x: fp16, bf16 or fp32. Codes equal the reference's except where y/Δ is a rounding tie within float error:
the sums are taken in another order. A row with NaN or Inf: scale NaN, codes and zero 0. KernelError for what
`quantize_int4` refuses, and for sizes that need more than 32768 padded numbers: use backend="torch".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dfrot_kernels import hadamard
from dfrot_kernels.checks import KernelError
from dfrot_kernels.common import (
    INTERPRETED,
    Variant,
    nan_unless_finite,
    on_device,
    row_codes,
    row_step,
    stored_zero,
)
from dfrot_kernels.reference import Tokens, pack
from dfrot_kernels.tokens import check_input, empty_tokens

__all__ = ["Plan", "hadamard_quantize", "plan", "variants"]

LARGEST = 32_768  # padded numbers of a row
ROW = 16_384  # padded numbers a program holds in registers, beside as many operands of a product
SLABS = 4  # for longer rows: with 2, registers spill
SMALLEST = 4096  # rows are taken together up to this many
NARROWEST = 16  # the tensor cores' least size


@triton.jit
def _top_bits(b_x):
    """The sign, exponent and first 8 bits of the significand: exact in bf16, and so is what is left twice."""
    return (b_x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _times(b_x, p_factor, SIZE: tl.constexpr):
    """b_x [M, SIZE] fp32 times a ±1 matrix [SIZE, SIZE], as exact as fp32."""
    i_n = tl.arange(0, SIZE)
    b_h = tl.load(p_factor + i_n[:, None] * SIZE + i_n[None, :])
    b_top = _top_bits(b_x)
    b_y = tl.dot(b_top.to(b_h.dtype), b_h)
    b_rest = b_x - b_top
    b_top = _top_bits(b_rest)
    b_y = tl.dot(b_top.to(b_h.dtype), b_h, b_y)
    return tl.dot((b_rest - b_top).to(b_h.dtype), b_h, b_y)


@triton.jit
def _add_dot(b_h, b_x, b_y, TURNED: tl.constexpr):
    """b_y + b_h b_x [SLAB, COLUMNS]; its transpose where TURNED."""
    if TURNED:
        b_y = tl.dot(tl.trans(b_x), tl.trans(b_h), b_y)
    else:
        b_y = tl.dot(b_h, b_x, b_y)
    return b_y


@triton.jit
def _slab(
    p_x, p_first, p_middle, p_last, at_x, m_n, norm,
    FIRST: tl.constexpr, MIDDLE: tl.constexpr, LAST: tl.constexpr, PADDED: tl.constexpr,
    SLAB: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """y [SLAB, ROWS, COLUMNS / ROWS]: all factors, for the columns of the first that `p_first` holds."""
    J: tl.constexpr = MIDDLE * LAST
    # the longer axis first: it is shared out among the warps, and a short one would leave some idle
    TURNED: tl.constexpr = COLUMNS >= SLAB
    if TURNED:
        b_y = tl.zeros([COLUMNS, SLAB], tl.float32)
    else:
        b_y = tl.zeros([SLAB, COLUMNS], tl.float32)
    i_f = tl.arange(0, SLAB)
    for i_chunk in range(0, FIRST, CHUNK):
        i_k = i_chunk + tl.arange(0, CHUNK)
        m_x = (i_k < FIRST)[:, None] & m_n[None, :]
        b_x = tl.load(p_x + (at_x + i_k[:, None] * J), m_x, other=0.0)  # [CHUNK, COLUMNS]
        b_h = tl.load(p_first + i_f[:, None] * PADDED + i_k[None, :])  # [SLAB, CHUNK]
        if SPLIT:
            b_top = _top_bits(b_x)
            b_y = _add_dot(b_h, b_top.to(b_h.dtype), b_y, TURNED)
            b_rest = b_x - b_top
            b_top = _top_bits(b_rest)
            b_y = _add_dot(b_h, b_top.to(b_h.dtype), b_y, TURNED)
            b_y = _add_dot(b_h, (b_rest - b_top).to(b_h.dtype), b_y, TURNED)
        else:
            b_y = _add_dot(b_h, b_x.to(b_h.dtype), b_y, TURNED)
    if TURNED:
        b_y = tl.trans(b_y)
    if LAST > 1:
        b_y = _times(tl.reshape(b_y, [SLAB * COLUMNS // LAST, LAST]), p_last, LAST)
    if MIDDLE > 1:
        b_y = tl.permute(tl.reshape(b_y, [SLAB * COLUMNS // J, MIDDLE, LAST]), (0, 2, 1))
        b_y = _times(tl.reshape(b_y, [SLAB * COLUMNS // MIDDLE, MIDDLE]), p_middle, MIDDLE)
        b_y = tl.permute(tl.reshape(b_y, [SLAB * COLUMNS // J, LAST, MIDDLE]), (0, 2, 1))
    return tl.reshape(b_y, [SLAB, ROWS, COLUMNS // ROWS]) * norm


@triton.jit
def _hadamard_kernel(
    p_x, p_first, p_middle, p_last, p_codes, p_scale, p_zero, rows, clip, norm,
    FIRST: tl.constexpr, MIDDLE: tl.constexpr, LAST: tl.constexpr, BLOCKS: tl.constexpr,
    PADDED: tl.constexpr, PADDED_BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    SLABS: tl.constexpr, SPLIT: tl.constexpr, SYMMETRIC: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # one block of H is FIRST · J long; columns are (row, block, j), the last fastest
    J: tl.constexpr = MIDDLE * LAST
    K: tl.constexpr = BLOCKS * FIRST * J
    COLUMNS: tl.constexpr = ROWS * PADDED_BLOCKS * J
    SLAB: tl.constexpr = PADDED // SLABS
    HALF: tl.constexpr = SLAB // 2
    i_n = tl.arange(0, COLUMNS)
    i_block = i_n // J % PADDED_BLOCKS
    i_row = i_n // (J * PADDED_BLOCKS)
    i_begin = tl.program_id(0).to(tl.int64) * ROWS
    m_n = (i_begin + i_row < rows) & (i_block < BLOCKS)
    at_block = i_block * (FIRST * J) + i_n % J  # 32 bits, as each element has its own
    at_x = (i_row * K + at_block)[None, :]
    p_x += i_begin * K

    b_low, b_high = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    b_bad = tl.zeros([ROWS], tl.float32)
    b_y = tl.zeros([SLAB, ROWS, COLUMNS // ROWS], tl.float32)
    for i_slab in tl.range(SLABS, num_stages=1):
        b_y = _slab(
            p_x, p_first + i_slab * SLAB * PADDED, p_middle, p_last, at_x, m_n, norm,
            FIRST, MIDDLE, LAST, PADDED, SLAB, ROWS, COLUMNS, CHUNK, SPLIT,
        )  # fmt: skip
        b_low = tl.minimum(b_low, tl.min(tl.min(b_y, 2), 0))
        b_high = tl.maximum(b_high, tl.max(tl.max(b_y, 2), 0))
        b_bad += tl.sum(tl.sum(nan_unless_finite(b_y), 2), 0)
    b_scale, b_zero = row_step(b_low, b_high, b_bad, clip, SYMMETRIC)

    # a slab holds columns c of the first factor in its first half, and FIRST/2 + c in its second
    for i_slab in tl.range(SLABS, num_stages=1):
        if SLABS > 1:  # the same numbers again, x from the cache
            b_y = _slab(
                p_x, p_first + i_slab * SLAB * PADDED, p_middle, p_last, at_x, m_n, norm,
                FIRST, MIDDLE, LAST, PADDED, SLAB, ROWS, COLUMNS, CHUNK, SPLIT,
            )  # fmt: skip
        b_code = row_codes(b_y, b_scale[None, :, None], b_zero[None, :, None], SYMMETRIC)
        b_code = tl.reshape(b_code, [SLAB, COLUMNS])
        if PACKED:
            b_nibble = (b_code & 15) << tl.where(tl.arange(0, SLAB) < HALF, 0, 4)[:, None]
            b_code = tl.sum(tl.reshape(b_nibble, [2, HALF, COLUMNS]), 0)
            i_c = i_slab * HALF + tl.arange(0, HALF)
            m_c = i_c < FIRST // 2
            at_code = (i_row * (K // 2) + at_block)[None, :] + i_c[:, None] * J
            p_row = p_codes + i_begin * (K // 2)
        else:
            i_c = i_slab * HALF + tl.arange(0, SLAB) % HALF
            m_c = i_c < FIRST // 2
            i_c += tl.arange(0, SLAB) // HALF * (FIRST // 2)
            at_code = at_x + i_c[:, None] * J
            p_row = p_codes + i_begin * K
        tl.store(p_row + at_code, b_code.to(tl.int8), m_c[:, None] & m_n[None, :])
    i_t = i_begin + tl.arange(0, ROWS)
    tl.store(p_scale + i_t, b_scale, i_t < rows)
    tl.store(p_zero + i_t, stored_zero(b_scale, b_zero, SYMMETRIC), i_t < rows)


@dataclass(frozen=True)
class Plan:
    """How rows of K are cut: K = blocks · first · middle · last, first = core · extra.

    All but blocks and core are powers of two; extra, middle and last multiply to Sylvester's part. rows: how
    many a program takes together; slabs: parts of the first factor's columns worked on one after another.
    """

    blocks: int
    core: int
    extra: int
    middle: int
    last: int
    rows: int = 1
    slabs: int = 1

    @property
    def first(self) -> int:
        """Size of the first factor."""
        return self.core * self.extra

    @property
    def padded(self) -> int:
        """Size of the first factor with its zeros."""
        return max(NARROWEST, triton.next_power_of_2(self.first))

    @property
    def chunk(self) -> int:
        """How much of the first factor is multiplied in a step."""
        return min(self.padded, 64)

    @property
    def order(self) -> int:
        """Size of one Hadamard block."""
        return self.first * self.middle * self.last

    @property
    def padded_blocks(self) -> int:
        """Blocks, as a power of two."""
        return triton.next_power_of_2(self.blocks)

    @property
    def size(self) -> int:
        """Padded numbers a program holds."""
        return self.rows * self.padded_blocks * self.padded * self.middle * self.last

    @property
    def warps(self) -> int:
        """4 to 16, of 32 numbers a thread."""
        return min(16, max(4, self.size // 1024))


@lru_cache(maxsize=256)
def plan(k: int) -> Plan:
    """The plan for rows of K with the least estimated work; KernelError where none fits a program."""
    f = hadamard.factor(k)
    plans = []
    for bits in (0, 4, 5, 6, 8, 9, 10, 11, 12):  # left to the later factors: 16 to 64 each
        extra = 1 << max(0, f.power - bits)
        if bits <= f.power and f.core * extra > 1:
            middle = 1 << (bits // 2 if bits > 6 else 0)
            plans.append(_together(Plan(f.blocks, f.core, extra, middle, (1 << bits) // middle)))
    best = min((p for p in plans if p.padded >= NARROWEST * p.slabs), key=_work, default=plans[0])
    if best.size > LARGEST:
        raise KernelError(
            f"x has rows of {k}: the Hadamard kernel would hold {best.size} padded numbers, of "
            f"{LARGEST} at most; use backend='torch'"
        )
    return best


def _together(p: Plan) -> Plan:
    """`p` with so many rows that a program has enough to do and a legal product."""
    columns = p.padded_blocks * p.middle * p.last
    rows = max(1, NARROWEST // columns, SMALLEST // p.size)
    return replace(p, rows=rows, slabs=SLABS if rows * p.size > ROW else 1)


def _work(p: Plan) -> int:
    """Tensor core steps a row, in 16-bit products: one by the first factor, three by each other one.

    48 more for each other factor, about what it costs to turn its axis to the front.
    """
    others = [f for f in (p.middle, p.last) if f > 1]
    return p.slabs * p.size // p.rows * (p.padded + 3 * sum(others) + 48 * len(others))


@lru_cache(maxsize=64)
def _factors(p: Plan, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The ±1 matrices: the first [padded, padded], transposed and padded as said above; middle, last."""
    first = np.kron(hadamard.core(p.core), hadamard.core(p.extra))
    padded = np.zeros((2, p.padded // 2, p.padded), np.int8)  # (half, column, k)
    padded[:, : p.first // 2, : p.first] = first.T.reshape(2, p.first // 2, p.first)
    padded = padded.reshape(2, p.slabs, -1, p.padded).swapaxes(0, 1).reshape(p.padded, p.padded)
    later = torch.float32 if INTERPRETED else torch.bfloat16
    kinds = ((padded, dtype), (hadamard.core(p.middle), later), (hadamard.core(p.last), later))
    with torch.inference_mode(False):
        return tuple(torch.tensor(m, dtype=kind, device=device) for m, kind in kinds)


def hadamard_quantize(
    x: Tensor, *, symmetric: bool = False, packed: bool = True, clip: float = 1.0
) -> Tokens:
    """The 4-bit codes of x H(K), x [..., K], see `reference.hadamard_quantize` and the module."""
    check_input(x, clip)
    k = x.shape[-1]
    p = plan(k)
    on_device(x)
    fused = packed and p.blocks == 1
    tokens = empty_tokens(x, fused)
    rows = x.numel() // k
    if rows:
        native = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
        if INTERPRETED and native == torch.bfloat16:
            native = torch.float32  # its dot is wrong in bf16
        constants = _constants(p, x.dtype == torch.float32, symmetric, fused)
        with torch.cuda.device_of(x):
            _hadamard_kernel[(triton.cdiv(rows, p.rows),)](
                x, *_factors(p, native, x.device), *tokens, rows, clip, 1 / math.sqrt(p.order),
                **constants, num_warps=p.warps, enable_fp_fusion=False,
            )  # fmt: skip
    return tokens._replace(codes=pack(tokens.codes)) if packed and not fused else tokens


def _constants(p: Plan, split: bool, symmetric: bool, packed: bool) -> dict[str, int | bool]:
    return {
        "FIRST": p.first,
        "MIDDLE": p.middle,
        "LAST": p.last,
        "BLOCKS": p.blocks,
        "PADDED": p.padded,
        "PADDED_BLOCKS": p.padded_blocks,
        "ROWS": p.rows,
        "CHUNK": NARROWEST if split else p.chunk,  # fp32 parts fill shared memory sooner
        "SLABS": p.slabs,
        "SPLIT": split,
        "SYMMETRIC": symmetric,
        "PACKED": packed,
    }


def variants() -> list[Variant]:
    """Head, hidden and intermediate sizes of LLaMA-2-7B, 3-8B and 3-70B, and one block-diagonal size."""
    return [_variant(k) for k in (128, 4096, 8192, 11008, 13696, 14336, 28672)]


def _variant(k: int) -> Variant:
    p = plan(k)
    constants = _constants(p, split=False, symmetric=False, packed=p.blocks == 1)
    types = {"p_x": "*fp16", "p_first": "*fp16", "p_middle": "*bf16", "p_last": "*bf16"}
    types |= {"p_codes": "*i8", "p_scale": "*fp32", "p_zero": "*i32"}
    aligned = tuple(types)
    types |= {"rows": "i32", "clip": "fp32", "norm": "fp32"}
    return Variant(
        name=f"hadamard_quantize K={k}",
        kernel=_hadamard_kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        num_warps=p.warps,
        aligned=aligned,
        fp_fusion=False,
    )

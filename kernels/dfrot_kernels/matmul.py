"""W4A4: the product of 4-bit tokens and a 4-bit weight, an exact integer from int8 tensor cores.

    y_tn = Δ_t Δ_n (Σ_k q_tk w_nk − z_t Σ_k w_nk) + b_n

Hopper's tensor cores do not multiply 4-bit integers, so 4 bits are what memory holds and int8 what is
multiplied. Byte j of a packed row holds codes j and j + K/2: a step over bytes is two steps over K, and
nothing is interleaved. Nibbles stay in the high half of their byte, as 16 w, and the 16 is shifted out of
the sum. The weight is the left operand (the tile is yᵀ = W xᵀ), so its nibbles are unpacked in registers,
and tokens [M, K] are the right operand as they lie in memory. Any even K works; a K that 32 divides is
fast, because then rows of bytes begin where 16 of them can be read at once.

Few tokens (M ≤ 64) are bound by reading the weight: K is cut in parts, so that there are enough programs,
each writes its int32 sums to a workspace [split, M, N], and a second kernel adds them: the order does not
matter to integers, so the result is the same in every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfrot_kernels import checks
from dfrot_kernels.common import INTERPRETED, Variant, on_device
from dfrot_kernels.reference import Tokens, Weight

__all__ = ["Plan", "matmul", "plan", "variants"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PROCESSORS = 132  # of an H100 or H200; an A100 has 108
FEW = 64  # tokens up to which one tile of tokens is all there is, and K is cut
TILES = ((128, 256, 8), (128, 128, 8), (128, 64, 4), (64, 64, 4))  # tokens, channels, warps
FINISH = 512  # channels that a program of the second kernel finishes
ASSEMBLY = tl.constexpr(not INTERPRETED)
# 16 × the low and 16 × the high nibbles of four bytes
NIBBLES16 = tl.constexpr("""{
.reg .b32 low;
shl.b32 low, $2, 4;
and.b32 $1, $2, 0xf0f0f0f0;
and.b32 $0, low, 0xf0f0f0f0;
}""")


class Plan(NamedTuple):
    """How a product is launched: tiles of `tokens` × `channels`, `step` bytes of the weight at a time.

    split: in how many parts K is cut. warps, stages: of a program, and of its pipeline of loads.
    """

    tokens: int
    channels: int
    step: int
    split: int
    warps: int
    stages: int


def plan(m: int, n: int, k: int) -> Plan:
    """The launch of x [m, k] times w [n, k]: the largest tile that still gives most processors one."""
    if m <= FEW:
        rows = max(16, triton.next_power_of_2(m))
        step = 128 if rows <= 32 else 64
        tiles, steps = triton.cdiv(n, 64), triton.cdiv(k // 2, step)
        split = 1
        while split < 16 and tiles * split < 2 * PROCESSORS and steps >= 8 * split:
            split *= 2
        return Plan(rows, 64, step, split, 4, 4)
    enough = (t for t in TILES if triton.cdiv(m, t[0]) * triton.cdiv(n, t[1]) >= 0.75 * PROCESSORS)
    tokens, channels, warps = next(enough, TILES[-1])
    return Plan(tokens, channels, 64, 1, warps, 4)


@triton.jit
def unpack16(b_bytes):
    """16 × the codes of packed rows, low nibbles first: int8 [R, B] → [R, 2B]."""
    if ASSEMBLY:  # four bytes an instruction; otherwise each is shifted by itself
        b_low, b_high = tl.inline_asm_elementwise(
            NIBBLES16, "=r,=r,r", [b_bytes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        b_low, b_high = b_bytes << 4, b_bytes & -16
    return side_by_side(b_low, b_high)


@triton.jit
def side_by_side(b_left, b_right):
    """[R, B] and [R, B] → [R, 2B]; in a dot's operand only registers are renamed."""
    b_both = tl.permute(tl.join(b_left, b_right), (0, 2, 1))
    return tl.reshape(b_both, [b_left.shape[0], 2 * b_left.shape[1]])


@triton.jit
def tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Indices of this program's tile: eight rows of tiles at a time, so that what they read stays in L2."""
    i_tile, tiles = tl.program_id(0), tl.cdiv(N, BN)
    return tl.swizzle2d(i_tile // tiles, i_tile % tiles, tl.cdiv(M, BM), tiles, 8)


@triton.jit
def steps_of(K2, BK: tl.constexpr, SPLIT: tl.constexpr):
    """First step over K of this program's part, and the first after it."""
    steps = tl.cdiv(K2, BK)
    share = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, steps)


@triton.jit
def load(p, i_k, K2, EVEN: tl.constexpr, EVICT: tl.constexpr):
    """What is at p + i_k; 0 where i_k ≥ K2, which is not so anywhere if EVEN."""
    if EVEN:
        return tl.load(p + i_k, eviction_policy=EVICT)
    else:
        return tl.load(p + i_k, mask=i_k < K2, other=0, eviction_policy=EVICT)


@triton.jit
def dequantized(b_sum, p_scale, p_zero, p_step, p_sums, p_bias, i_m, i_n, m_m, m_n):
    """Δ_t Δ_n (Σ − z_t Σ_k w_nk) + b_n in fp32; i_m and i_n: indices that broadcast to b_sum's shape."""
    b_scale = tl.load(p_scale + i_m, mask=m_m, other=0).to(tl.float32)
    b_zero = tl.load(p_zero + i_m, mask=m_m, other=0)
    b_step = tl.load(p_step + i_n, mask=m_n, other=0).to(tl.float32)
    b_sums = tl.load(p_sums + i_n, mask=m_n, other=0)
    b_y = (b_sum - b_zero * b_sums).to(tl.float32) * b_scale * b_step
    if p_bias is not None:
        b_y += tl.load(p_bias + i_n, mask=m_n, other=0).to(tl.float32)
    return b_y


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    p_x, p_w, p_scale, p_zero, p_step, p_sums, p_bias, p_y,  # p_y: [M, N], or sums [SPLIT, M, N]
    M, N, K2,
    PACKED: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of y, or of one part's sums; K2 = K/2, bytes of a row of the weight. EVEN: BK divides it."""
    i_m, i_n = tile_of(M, N, BM, BN)
    first, end = steps_of(K2, BK, SPLIT)
    row = K2 if PACKED else 2 * K2
    # 64 bits up to the tile, 32 inside it: BM·K < 2³¹
    p_x += i_m.to(tl.int64) * BM * row
    p_w += i_n.to(tl.int64) * BN * K2
    i_row, i_col = tl.arange(0, BM), tl.arange(0, BN)
    # past the end of M or N the last row is read again, and its product not stored
    p_x += tl.minimum(i_row, M - 1 - i_m * BM)[None, :] * row  # [1, BM]
    p_w += tl.minimum(i_col, N - 1 - i_n * BN)[:, None] * K2  # [BN, 1]
    i_k, i_both = tl.arange(0, BK), tl.arange(0, 2 * BK)
    i_half = i_both // BK * K2
    b_sum = tl.zeros([BN, BM], tl.int32)
    for i_step in range(first, end):
        start = i_step * BK
        b_w = load(p_w, start + i_k[None, :], K2, EVEN, "evict_first" if SPLIT > 1 else "")
        b_w = unpack16(b_w)  # [BN, 2BK]
        if PACKED:
            b_x = tl.trans(unpack16(tl.trans(load(p_x, start + i_k[:, None], K2, EVEN, ""))))
        else:
            b_x = load(p_x + i_half[:, None], start + (i_both % BK)[:, None], K2, EVEN, "")
        b_sum = tl.dot(b_w, b_x, b_sum, out_dtype=tl.int32)  # b_x: [2BK, BM]
    i_m, i_n = i_m * BM + i_row[None, :], i_n * BN + i_col[:, None]  # [1, BM], [BN, 1]
    m_m, m_n = i_m < M, i_n < N
    i_y = i_m.to(tl.int64) * N + i_n
    if SPLIT > 1:
        i_y += tl.program_id(1).to(tl.int64) * M * N
        tl.store(p_y + i_y, b_sum, mask=m_m & m_n)
    else:
        b_sum = b_sum >> (8 if PACKED else 4)
        b_y = dequantized(b_sum, p_scale, p_zero, p_step, p_sums, p_bias, i_m, i_n, m_m, m_n)
        tl.store(p_y + i_y, b_y.to(p_y.dtype.element_ty), mask=m_m & m_n)


@triton.jit(do_not_specialize=["M"])
def finish_kernel(
    p_part, p_scale, p_zero, p_step, p_sums, p_bias, p_y, M, N,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """B channels of one token of y from the parts' sums [SPLIT, M, N]."""
    i_m = tl.program_id(0)
    i_n = tl.program_id(1) * B + tl.arange(0, B)
    m_n = i_n < N
    i_y = i_m.to(tl.int64) * N + i_n
    b_sum = tl.zeros([B], tl.int32)
    for i_part in tl.static_range(SPLIT):
        b_sum += tl.load(p_part + i_y + M.to(tl.int64) * N * i_part, mask=m_n, other=0)
    b_sum = b_sum >> (8 if PACKED else 4)
    b_y = dequantized(b_sum, p_scale, p_zero, p_step, p_sums, p_bias, i_m, i_n, i_m < M, m_n)
    tl.store(p_y + i_y, b_y.to(p_y.dtype.element_ty), mask=m_n)


def matmul(
    x: Tokens, w: Weight, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float16
) -> Tensor:
    """W4A4 product [..., N] in `dtype` of x (packed [..., K/2] or int8 [..., K]) and w [N, K].

    The sum over K is exact, the rest fp32. Raises KernelError for another `dtype` than fp16, bf16 and fp32,
    codes that are not int8 or not contiguous, sizes that do not fit together, K > checks.MAX_K, and
    tensors on more than one device.
    """
    half = check_weight(w, bias)
    packed = x.codes.shape[-1:] == (half,)
    checks.codes("x.codes", x.codes, last=half if packed else 2 * half)
    if dtype not in DTYPES:
        raise checks.KernelError(f"dtype = {dtype}: use float16, bfloat16 or float32")
    shape = x.codes.shape[:-1]
    for name, part in (("x.scale", x.scale), ("x.zero", x.zero)):
        if part.shape != shape:
            raise checks.KernelError(f"{name} is {list(part.shape)}: {list(shape)} is needed")
    check_integers("x.zero", x.zero)
    on_device(*x, *w, bias)
    m, n = shape.numel(), len(w.packed)
    y = torch.empty(*shape, n, dtype=dtype, device=x.codes.device)
    if not m or not n:
        return y
    p = plan(m, n, 2 * half)
    scales = (x.scale.contiguous(), x.zero.contiguous(), w.scale, w.sums, bias)
    out = y
    if p.split > 1:
        out = torch.empty(p.split, m, n, dtype=torch.int32, device=y.device)
    tiles = triton.cdiv(m, p.tokens) * triton.cdiv(n, p.channels)
    with torch.cuda.device_of(y):
        product_kernel[tiles, p.split](
            x.codes, w.packed, *scales, out, m, n, half, **constants(p, half, packed),
            num_warps=p.warps, num_stages=p.stages,
        )  # fmt: skip
        if p.split > 1:
            finish_kernel[m, triton.cdiv(n, FINISH)](
                out, *scales, y, m, n, PACKED=packed, SPLIT=p.split, B=FINISH
            )
    return y


def check_weight(w: Weight, bias: Tensor | None) -> int:
    """K/2 of a weight whose parts fit together, and bias with it; KernelError otherwise."""
    checks.codes("w.packed", w.packed, dims=2)
    n, half = w.packed.shape
    checks.even("w", 2 * half)
    checks.vector("w.scale", w.scale, n)
    checks.vector("w.sums", w.sums, n)
    check_integers("w.sums", w.sums)
    checks.vector("bias", bias, n)
    return half


def check_integers(name: str, x: Tensor) -> None:
    """Raise KernelError unless x is int32, as the kernels read it."""
    if x.dtype != torch.int32:
        raise checks.KernelError(f"{name} is {x.dtype}: int32 is needed")


def constants(p: Plan, half: int, packed: bool) -> dict[str, Any]:
    """Compile-time arguments of `product_kernel`."""
    even = half % p.step == 0
    tile = {"BM": p.tokens, "BN": p.channels, "BK": p.step}
    return {"PACKED": packed, "EVEN": even, "SPLIT": p.split, **tile}


# (tokens, channels, K) of LLaMA-2-7B and LLaMA-3-8B: every tile `plan` takes
SHAPES = (
    (2048, 14336, 4096),
    (512, 4096, 4096),
    (256, 4096, 4096),
    (100, 4096, 4096),
    (64, 4096, 4096),
    (16, 14336, 4096),
    (1, 4096, 14336),
)


def variant(
    name: str, kernel: Any, pointers: dict[str, str], sizes: tuple[str, ...], fixed: dict[str, Any],
    p: Plan | None = None, **options: Any,
) -> Variant:  # fmt: skip
    """A compilation with `pointers` and all `sizes` but M divisible by 16; warps and stages as planned."""
    signature = pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(fixed, "constexpr")
    aligned = tuple(a for a in (*pointers, *sizes) if a != "M")
    if p is not None:
        options |= {"num_warps": p.warps, "num_stages": p.stages}
    return Variant(name, kernel, signature, fixed, aligned=aligned, **options)


def variants() -> list[Variant]:
    """Every tile `plan` takes; fp16 out."""
    names, types = ("p_scale", "p_zero", "p_step", "p_sums"), ("*fp32", "*i32", "*fp32", "*i32")
    pointers = {**dict(zip(names, types, strict=True)), "p_bias": "*fp16"}
    found = []
    for packed in (False, True):
        for m, n, k in SHAPES:
            p = plan(m, n, k)
            out = "*fp16" if p.split == 1 else "*i32"
            every = {"p_x": "*i8", "p_w": "*i8", **pointers, "p_y": out}
            name = f"matmul {'packed' if packed else 'codes'} {m}x{n}x{k}"
            fixed = constants(p, k // 2, packed)
            found.append(
                variant(name, product_kernel, every, ("M", "N", "K2"), fixed, p, wgmma=True)
            )
    every = {"p_part": "*i32", **pointers, "p_y": "*fp16"}
    fixed = {"PACKED": False, "SPLIT": 8, "B": FINISH}
    return [*found, variant("matmul finish", finish_kernel, every, ("M", "N"), fixed)]

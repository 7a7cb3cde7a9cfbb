"""Decode attention over a 4-bit cache of keys and values (`kv`), dequantized in registers.

With codes q in 0…15, step Δ and zero point z of each token and head, k̂ = Δ_k (q_k − z_k) is never written:

    score_t = scaling · Δ_k (Σ_j q_j n_tj − (z_k − 8) Σ_j q_j),      n = q_k − 8 as stored, −8…7,
    out     = Σ_t p_t Δ_v n_t − Σ_t p_t Δ_v (z_v − 8),               p = softmax(score).

The T entries are cut in splits, each a program of its own that leaves (maximum, sum, unnormalized output)
in memory; a second kernel joins them. Reading stops at lengths[b], so what lies behind it, NaN too, has no
influence.

Types: q in fp16, bf16 or fp32, out like q; packed int8, scale and zero fp16; softmax and sums in fp32.
Products are exact for fp16 and bf16, but p Δ_v is rounded to fp16 for the tensor cores: 2⁻¹¹ a term at most,
either way, of Σ p|v̂|. With q in fp32 nothing is rounded to 16 bits.
KernelError for wrong shapes, dtypes or devices, non-contiguous tensors, odd D, and in attention D not a
multiple of 4.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfrot_kernels import checks
from dfrot_kernels.common import INTERPRETED, Variant, on_device
from dfrot_kernels.kv import check_kv
from dfrot_kernels.reference import KV

__all__ = ["decode_attention", "splits", "variants"]

BLOCK_T = 128  # cache entries a step, or half of it; splits are multiples of it
BLOCK_D = 32  # columns a program of the second kernel joins
MAX_SPLITS = 128
PROGRAMS = (
    512  # about four a multiprocessor of a large GPU; fixed, so that sums do not depend on it
)
_INTERPRETED = tl.constexpr(INTERPRETED)
_FOUR_FP16 = tl.constexpr((tl.float16,) * 4)
_FOUR_BF16 = tl.constexpr((tl.bfloat16,) * 4)


# Two 16-bit words of four nibbles each → four pairs of floats. A nibble with its sign bit turned is
# c = n + 8; or-ed into the last bits of 1024 (fp16) or 128 (bf16), whose last bit is worth 1, it is
# 1024 + c or 128 + c, and a product with 1 less 1032 or 136 gives n: twelve instructions for eight codes.
_ASM = """{{
.reg .b32 t, u, one, off;
xor.b32 t, $4, 0x88888888;
mov.b32 one, {one};
mov.b32 off, {off};
lop3.b32 u, t, 0x000f000f, {base}, 0xea;
fma.rn.{kind} $0, u, one, off;
shr.u32 t, t, 4;
lop3.b32 u, t, 0x000f000f, {base}, 0xea;
fma.rn.{kind} $1, u, one, off;
shr.u32 t, t, 4;
lop3.b32 u, t, 0x000f000f, {base}, 0xea;
fma.rn.{kind} $2, u, one, off;
shr.u32 t, t, 4;
lop3.b32 u, t, 0x000f000f, {base}, 0xea;
fma.rn.{kind} $3, u, one, off;
}}"""
ASM_FP16 = tl.constexpr(
    _ASM.format(kind="f16x2", base="0x64006400", one="0x3c003c00", off="0xe408e408")
)
ASM_BF16 = tl.constexpr(
    _ASM.format(kind="bf16x2", base="0x43004300", one="0x3f803f80", off="0xc308c308")
)


@triton.jit
def _codes(b_words, TYPE: tl.constexpr):
    """The codes −8…7 in the four nibbles of int16 words, lowest first; exact in each floating type.

    fp16 and bf16 only on a GPU, in assembly; fp32 in any case, and all types under the interpreter.
    """
    if tl.float16 == TYPE and not _INTERPRETED:
        b_a, b_b, b_c, b_d = tl.inline_asm_elementwise(
            ASM_FP16, "=r,=r,=r,=r,r", [b_words], _FOUR_FP16, is_pure=True, pack=2
        )
    elif tl.bfloat16 == TYPE and not _INTERPRETED:
        b_a, b_b, b_c, b_d = tl.inline_asm_elementwise(
            ASM_BF16, "=r,=r,=r,=r,r", [b_words], _FOUR_BF16, is_pure=True, pack=2
        )
    else:
        b_n = b_words.to(tl.int32)
        b_a, b_b = ((b_n << 28) >> 28).to(TYPE), ((b_n << 24) >> 28).to(TYPE)
        b_c, b_d = ((b_n << 20) >> 28).to(TYPE), ((b_n << 16) >> 28).to(TYPE)
    return b_a, b_b, b_c, b_d


@triton.jit
def _split_kernel(
    p_q, p_k, p_kscale, p_kzero, p_v, p_vscale, p_vzero, p_lengths, p_acc, p_top, p_sum,
    heads, capacity, chunk, scaling,
    GROUP: tl.constexpr, WORDS: tl.constexpr, BG: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr,
    Q_TYPE: tl.constexpr, P_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # the cache is read in words of 16 bits: word j holds codes 2j, 2j + D/2, 2j + 1, 2j + 1 + D/2,
    # so that pairs along the summed axis lie in one register, of keys along D and of values along T
    i_pair, i_split = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1),
    )  # sequence × head of the cache
    i_g, i_w, i_bt = tl.arange(0, BG), tl.arange(0, BW), tl.arange(0, BT)
    m_g, m_w = i_g < GROUP, i_w < WORDS
    m_q = m_g[:, None] & m_w[None, :]
    p_q += i_pair * GROUP * 4 * WORDS + i_g[:, None] * (4 * WORDS) + 2 * i_w[None, :]
    b_qa = tl.load(p_q, m_q, other=0.0).to(tl.float32)  # [BG, BW]
    b_qb = tl.load(p_q + 2 * WORDS, m_q, other=0.0).to(tl.float32)
    b_qc = tl.load(p_q + 1, m_q, other=0.0).to(tl.float32)
    b_qd = tl.load(p_q + 2 * WORDS + 1, m_q, other=0.0).to(tl.float32)
    b_qsum = tl.sum(b_qa, 1) + tl.sum(b_qb, 1) + tl.sum(b_qc, 1) + tl.sum(b_qd, 1)  # [BG]
    b_qa, b_qb, b_qc, b_qd = b_qa.to(Q_TYPE), b_qb.to(Q_TYPE), b_qc.to(Q_TYPE), b_qd.to(Q_TYPE)

    i_first = i_split * chunk
    length = tl.minimum(tl.load(p_lengths + i_pair // heads).to(tl.int32), capacity)
    i_last = tl.minimum(length, i_first + chunk)
    p_k += i_pair * capacity * WORDS
    p_v += i_pair * capacity * WORDS
    p_kscale += i_pair * capacity
    p_kzero += i_pair * capacity
    p_vscale += i_pair * capacity
    p_vzero += i_pair * capacity
    b_top = tl.full([BG], float("-inf"), tl.float32)
    b_sum = tl.zeros([BG], tl.float32)
    b_ya, b_yb = tl.zeros([BG, BW], tl.float32), tl.zeros([BG, BW], tl.float32)
    b_yc, b_yd = tl.zeros([BG, BW], tl.float32), tl.zeros([BG, BW], tl.float32)
    for i_begin in tl.range(i_first, i_last, BT):
        i_t = i_begin + i_bt
        m_t = i_t < i_last
        p_kt = p_k + i_t[None, :] * WORDS + i_w[:, None]
        p_vt = p_v + i_t[:, None] * WORDS + i_w[None, :]
        b_k = tl.load(p_kt, m_t[None, :] & m_w[:, None], other=0)  # [BW, BT]
        b_v = tl.load(p_vt, m_t[:, None] & m_w[None, :], other=0)  # [BT, BW]
        b_kscale = tl.load(p_kscale + i_t, m_t, other=0.0).to(tl.float32) * scaling  # [BT]
        b_kzero = tl.load(p_kzero + i_t, m_t, other=0.0).to(tl.float32) - 8.0
        b_vscale = tl.load(p_vscale + i_t, m_t, other=0.0).to(tl.float32)
        b_vzero = tl.load(p_vzero + i_t, m_t, other=0.0).to(tl.float32) - 8.0

        b_na, b_nb, b_nc, b_nd = _codes(b_k, Q_TYPE)  # [BW, BT]
        b_s = tl.dot(b_qa, b_na, input_precision=PRECISION)
        b_s = tl.dot(b_qb, b_nb, b_s, input_precision=PRECISION)
        b_s = tl.dot(b_qc, b_nc, b_s, input_precision=PRECISION)
        b_s = tl.dot(b_qd, b_nd, b_s, input_precision=PRECISION)
        b_s = (b_s - b_qsum[:, None] * b_kzero[None, :]) * b_kscale[None, :]  # [BG, BT]
        b_s = tl.where(m_t[None, :], b_s, float("-inf"))

        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_decay = tl.exp2(b_top - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_top = b_new

        # p Δ_v over its largest is in 0…1, where fp16 keeps 11 bits whatever the size of the values;
        # the zero points are multiplied by the same rounded weights, so nothing is left by cancellation
        b_w = b_p * b_vscale[None, :]
        b_size = tl.maximum(tl.max(b_w, 1), 1e-30)
        b_w = (b_w / b_size[:, None]).to(P_TYPE)
        b_shift = tl.sum(b_w.to(tl.float32) * b_vzero[None, :], 1) * b_size
        b_decay, b_size, b_shift = b_decay[:, None], b_size[:, None], b_shift[:, None]
        b_na, b_nb, b_nc, b_nd = _codes(b_v, P_TYPE)  # [BT, BW]
        b_ya = b_ya * b_decay - b_shift + tl.dot(b_w, b_na, input_precision=PRECISION) * b_size
        b_yb = b_yb * b_decay - b_shift + tl.dot(b_w, b_nb, input_precision=PRECISION) * b_size
        b_yc = b_yc * b_decay - b_shift + tl.dot(b_w, b_nc, input_precision=PRECISION) * b_size
        b_yd = b_yd * b_decay - b_shift + tl.dot(b_w, b_nd, input_precision=PRECISION) * b_size

    i_row = (
        i_pair * tl.num_programs(1) + i_split
    ) * GROUP + i_g  # a split without entries: -inf, 0, 0
    tl.store(p_top + i_row, b_top, m_g)
    tl.store(p_sum + i_row, b_sum, m_g)
    p_acc += i_row[:, None] * (4 * WORDS) + 2 * i_w[None, :]
    tl.store(p_acc, b_ya, m_q)
    tl.store(p_acc + 2 * WORDS, b_yb, m_q)
    tl.store(p_acc + 1, b_yc, m_q)
    tl.store(p_acc + 2 * WORDS + 1, b_yd, m_q)


@triton.jit
def _join_kernel(
    p_acc, p_top, p_sum, p_y, count,
    GROUP: tl.constexpr, DIM: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)  # a query head
    i_s, i_d = tl.arange(0, BS), tl.program_id(1) * BD + tl.arange(0, BD)
    m_s, m_d = i_s < count, i_d < DIM
    i_part = (i_row // GROUP * count + i_s) * GROUP + i_row % GROUP  # [BS]
    b_top = tl.load(p_top + i_part, m_s, other=float("-inf"))
    b_sum = tl.load(p_sum + i_part, m_s, other=0.0)
    b_acc = tl.load(
        p_acc + i_part[:, None] * DIM + i_d[None, :], m_s[:, None] & m_d[None, :], other=0.0
    )
    b_w = tl.exp2(b_top - tl.max(b_top, 0))
    b_y = tl.sum(b_acc * b_w[:, None], 0) / tl.sum(b_sum * b_w, 0)
    tl.store(p_y + i_row * DIM + i_d, b_y.to(p_y.dtype.element_ty), m_d)


def splits(pairs: int, capacity: int) -> tuple[int, int]:
    """(number of splits, entries in each) for `pairs` = sequences × heads and `capacity` entries.

    Enough programs for a large GPU, at least two steps each; of these two numbers alone, so that the
    same input gives the same sums on each device and for all lengths.
    """
    steps = triton.cdiv(capacity, BLOCK_T)
    wanted = max(1, min(MAX_SPLITS, triton.cdiv(PROGRAMS, pairs), steps // 2))
    each = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, each), each * BLOCK_T


def _types(dtype: torch.dtype) -> dict[str, object]:
    """What the dots compute in: codes are exact in every type, so q's own; fp32 keeps its digits."""
    if INTERPRETED or dtype not in (torch.float16, torch.bfloat16):
        return {"Q_TYPE": tl.float32, "P_TYPE": tl.float32, "PRECISION": "tf32x3"}
    own = tl.float16 if dtype == torch.float16 else tl.bfloat16
    return {"Q_TYPE": own, "P_TYPE": tl.float16, "PRECISION": "ieee"}


def _words(kv: KV) -> tuple[Tensor, Tensor, Tensor]:
    """`kv` with its bytes seen two at a time, as int16 [..., D/4]."""
    return kv.packed.view(torch.int16), kv.scale, kv.zero


def _split_launch(group: int, dim: int, dtype: torch.dtype) -> tuple[dict[str, object], int]:
    """(constants, warps) of a split; a step is halved where its registers would not do otherwise."""
    words = dim // 4  # tl.dot needs tiles of 16 at least
    padded = [max(16, triton.next_power_of_2(n)) for n in (group, words)]
    narrow, wide = padded[1] == 16, dtype not in (torch.float16, torch.bfloat16)
    step = BLOCK_T // 2 if narrow or wide else BLOCK_T
    sizes = {"GROUP": group, "WORDS": words, "BG": padded[0], "BW": padded[1], "BT": step}
    return sizes | _types(dtype), 2 if narrow else 4


def decode_attention(
    q: Tensor, k: KV, v: KV, lengths: Tensor, *, scaling: float | None = None
) -> Tensor:
    """Attention of one new token a sequence over a 4-bit cache: softmax(scaling·q k̂ᵀ) v̂, [B, Hq, D].

    q: [B, Hq, D]; k, v: `KV` of [B, Hkv, T, D], Hq a multiple of Hkv; lengths: int32 [B], how many of the
    T entries a sequence has (1 to T; 0 gives NaN); what lies behind them, NaN too, is not read.
    scaling: 1/√D if None.
    """
    checks.floating("q", q, dims=3)
    batch, query_heads, dim = q.shape
    checks.even("q", dim)
    if dim % 4:
        raise checks.KernelError(f"q has heads of {dim}: use a multiple of 4, or backend='torch'")
    checks.codes("k.packed", k.packed, dims=4, last=dim // 2)
    heads, capacity = k.packed.shape[1:3]
    if not heads or query_heads % heads:
        raise checks.KernelError(
            f"q has {query_heads} heads: use a multiple of the cache's {heads}"
        )
    for name, cache in (("k", k), ("v", v)):
        check_kv(name, cache, (batch, heads, capacity, dim // 2))
    checks.vector("lengths", lengths, batch)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise checks.KernelError(f"lengths is {lengths.dtype}: int32 is needed")
    on_device(q, *k, *v, lengths)
    y = torch.empty_like(q)
    if not y.numel():
        return y
    if not capacity:
        raise checks.KernelError("the cache has no entries: each sequence needs one at least")
    group, pairs = query_heads // heads, batch * heads
    count, chunk = splits(pairs, capacity)
    acc = torch.empty(pairs, count, group, dim, dtype=torch.float32, device=q.device)
    top, total = (acc.new_empty(acc.shape[:3]) for _ in range(2))
    scaling = dim**-0.5 if scaling is None else scaling
    constants, warps = _split_launch(group, dim, q.dtype)
    with torch.cuda.device_of(q):
        _split_kernel[(pairs, count)](
            q, *_words(k), *_words(v), lengths, acc, top, total,
            heads, capacity, chunk, scaling * math.log2(math.e),
            **constants, num_warps=warps, num_stages=3,
        )  # fmt: skip
        _join_kernel[(pairs * group, triton.cdiv(dim, BLOCK_D))](
            acc, top, total, y, count,
            GROUP=group, DIM=dim, BS=triton.next_power_of_2(count), BD=BLOCK_D, num_warps=4,
        )  # fmt: skip
    return y


def variants() -> list[Variant]:
    """The default configurations, at LLaMA-2-7B's and LLaMA-3-8B's 32 and 8 heads of 128."""
    found = []
    partial = {"p_acc": "*fp32", "p_top": "*fp32", "p_sum": "*fp32"}
    keys = {"p_k": "*i16", "p_kscale": "*fp16", "p_kzero": "*fp16"}
    values = {name.replace("k", "v", 1): kind for name, kind in keys.items()}
    sizes = {"heads": "i32", "capacity": "i32", "chunk": "i32", "scaling": "fp32"}
    for group, dim, kind in ((1, 128, "fp16"), (4, 128, "fp16"), (4, 64, "fp16"), (4, 128, "fp32")):
        dtype = torch.float16 if kind == "fp16" else torch.float32
        constants, warps = _split_launch(group, dim, dtype)
        signature = {"p_q": f"*{kind}"} | keys | values | {"p_lengths": "*i32"} | partial | sizes
        signature |= dict.fromkeys(constants, "constexpr")
        name = f"decode_split_{kind}_g{group}_d{dim}"
        found.append(_variant(name, _split_kernel, signature, constants, warps))
    constants = {"GROUP": 4, "DIM": 128, "BS": MAX_SPLITS, "BD": BLOCK_D}
    signature = partial | {"p_y": "*fp16", "count": "i32"} | dict.fromkeys(constants, "constexpr")
    found.append(_variant("decode_join", _join_kernel, signature, constants))
    return found


def _variant(
    name: str, kernel: object, signature: dict[str, str], constants: dict, num_warps: int = 4
) -> Variant:
    whole = ("capacity", "chunk")  # multiples of 16
    aligned = tuple(n for n, kind in signature.items() if kind.startswith("*") or n in whole)
    return Variant(name, kernel, signature, constants, num_warps, aligned=aligned)

"""Plain torch definitions of what is computed; every kernel and every experiment means these.

Notation: a row x of D numbers, b bits, real step Δ ("scale"), integer zero point z, codes q.
Rounding is to nearest, ties to even (torch.round), as in every implementation we compare with.

The first half is the quantizer for any bits, in floating point. The second half, from `pack` on, is 4 bits
as an engine stores them: codes −8…7, two a byte, and the zero point moved with them (z − 8), so that both
quantizers share one arithmetic. Its functions have Triton twins of the same name and signature
(`dfrot_kernels.backends`), and are what runs where there is no Triton. They raise `checks.KernelError`
for a dtype, number of dimensions or size that they do not take, naming the argument and its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dfrot_kernels import checks, hadamard

__all__ = [
    "KV",
    "QuantSpec",
    "Quantized",
    "Tokens",
    "Weight",
    "add_norm_quantize",
    "cut",
    "decode_attention",
    "dequantize",
    "dequantize_kv",
    "fake_quantize",
    "hadamard_quantize",
    "matmul",
    "matmul_fp",
    "pack",
    "pack_weight",
    "quantize",
    "quantize_error",
    "quantize_int4",
    "quantize_kv",
    "rotate_quantize_error",
    "step",
    "unpack",
]

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
        scale = _over(x.abs().amax(over, keepdim=True) * spec.clip, high)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, torch.zeros_like(scale)
    lo = x.amin(over, keepdim=True).clamp(max=0) * spec.clip
    hi = x.amax(over, keepdim=True).clamp(min=0) * spec.clip
    scale = _over(_wide(hi) - _wide(lo), high - low).to(x.dtype)  # in fp16 the range may overflow
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.round(-lo / scale)


def _over(x: Tensor, number: int) -> Tensor:
    """x/number, rounded to nearest; a GPU would multiply by the reciprocal of what is not a tensor there."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide / torch.full_like(wide, number)).to(x.dtype)


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


# --- 4 bits as an engine stores them --------------------------------------------------------------


class Tokens(NamedTuple):
    """Activations quantized per token: x̂ = Δ·(q − z).

    codes: int8, q in −8…7 [..., K], or packed two a byte [..., K/2]; scale: Δ fp32 [...] (fp64 where the
    reference was given fp64); zero: z int32 [...], −8…7 too, and 0 throughout for the symmetric quantizer.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


class Weight(NamedTuple):
    """A weight [N, K], symmetric per channel: Ŵ = Δ·w.

    packed: int8 [N, K/2]; scale: Δ fp32 [N]; sums: Σ_k w_nk int32 [N], for the zero point of the tokens.
    """

    packed: Tensor
    scale: Tensor
    sums: Tensor


class KV(NamedTuple):
    """Keys or values quantized per token and head, asymmetric: x̂ = Δ·(q − z), q in 0…15.

    packed: int8 [..., D/2]; scale and zero: fp16 [...]. At D = 128 that is 68 bytes where fp16 has 256.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte: int8 [..., K] in −8…7 → int8 [..., K/2].

    Byte j holds code j in its low nibble and code j + K/2 in its high one, so that a product over K is two
    products over contiguous halves and nothing is interleaved. Raises KernelError for odd K.
    """
    checks.even("codes", codes.shape[-1])
    low, high = codes.chunk(2, -1)
    return (low & 0x0F) | (high << 4)


def unpack(packed: Tensor) -> Tensor:
    """The codes −8…7 of `pack`: int8 [..., K/2] → int8 [..., K]."""
    return torch.cat([(packed << 4) >> 4, packed >> 4], -1)


def _wide(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: fp32, or fp64 if it has that already."""
    return x if x.dtype == torch.float64 else x.float()


def quantize_int4(
    x: Tensor, *, symmetric: bool = False, packed: bool = True, clip: float = 1.0
) -> Tokens:
    """Per-token 4-bit codes of x [..., K], computed in fp32 by `quantize` (here, not in the kernels, in
    fp64 for an x in fp64: two ways to compute a model can then be told apart from their rounding).

    A row that holds NaN or Inf gets scale NaN, so that whatever is computed from it is NaN. Raises
    KernelError for an integer or non-contiguous x, odd K or K > MAX_K.
    """
    checks.floating("x", x)
    checks.even("x", x.shape[-1])
    spec = QuantSpec(bits=4, symmetric=symmetric, clip=clip)
    rows = _wide(x)
    scale, zero = step(rows, spec)
    found = quantize(rows, spec, scale=scale, zero=zero).codes
    fine = rows.isfinite().all(-1, keepdim=True)
    shift = 0 if symmetric else 8
    codes, zero = (torch.where(fine, part - shift, 0) for part in (found, zero))
    scale = torch.where(fine, scale, torch.nan)
    codes = codes.to(torch.int8)
    return Tokens(pack(codes) if packed else codes, scale[..., 0], zero[..., 0].to(torch.int32))


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
    """s = x + residual, n = s/√(mean s² + ε)·gain, and the 4-bit codes of n: (codes of n, s).

    x, residual: [..., K] of one dtype, which s has too; gain: [K], None once it is folded. The sum of
    squares and n are in fp32, and n is quantized as it is, without rounding to x's dtype first.
    """
    checks.floating("x", x)
    s = x if residual is None else x + residual
    n = s.float()
    n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    if gain is not None:
        checks.vector("gain", gain, x.shape[-1])
        n = n * gain.float()
    return quantize_int4(n, symmetric=symmetric, packed=packed, clip=clip), s


def hadamard_quantize(
    x: Tensor, *, symmetric: bool = False, packed: bool = True, clip: float = 1.0
) -> Tokens:
    """The 4-bit codes of x H(K), see `hadamard.transform`; x [..., K], the product in fp32."""
    checks.floating("x", x)
    turned = hadamard.transform(_wide(x))
    return quantize_int4(turned, symmetric=symmetric, packed=packed, clip=clip)


def pack_weight(codes: Tensor, scale: Tensor) -> Weight:
    """A `Weight` from its codes int8 [N, K] in −8…7 and its steps [N]."""
    checks.codes("codes", codes, dims=2)
    checks.vector("scale", scale, len(codes))
    sums = codes.sum(-1, dtype=torch.int32)
    return Weight(pack(codes), scale.float(), sums)


def matmul(
    x: Tokens, w: Weight, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float16
) -> Tensor:
    """W4A4: y_tn = Δ_t Δ_n (Σ_k q_tk w_nk − z_t Σ_k w_nk) + b_n, [..., N] in `dtype`.

    x may be packed or not. The sum of products is an exact integer (see `checks.MAX_K`); the rest is fp32.
    """
    k = 2 * w.packed.shape[-1]
    codes = unpack(x.codes) if x.codes.shape[-1] == k // 2 else x.codes
    checks.codes("x.codes", codes, last=k)
    checks.vector("bias", bias, len(w.scale))
    total = F.linear(codes.float(), unpack(w.packed).float())  # integers below 2²⁴: exact in fp32
    total -= x.zero[..., None] * w.sums
    y = total * x.scale[..., None] * w.scale
    return (y if bias is None else y + bias.to(y.dtype)).to(dtype)


def matmul_fp(x: Tensor, w: Weight, bias: Tensor | None = None) -> Tensor:
    """W4A16: y_tn = Δ_n Σ_k x_tk w_nk + b_n, [..., N] in x's dtype, summed in fp32."""
    checks.floating("x", x, last=2 * w.packed.shape[-1])
    checks.vector("bias", bias, len(w.scale))
    rows = _wide(x)
    y = F.linear(rows, unpack(w.packed).to(rows.dtype)) * w.scale
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def quantize_kv(x: Tensor) -> KV:
    """Keys or values x [..., D] in 4 bits, asymmetric, one group of D numbers a token and head.

    The codes are taken with the step as it is stored, rounded to fp16. A row with NaN or Inf gets scale
    NaN. Raises KernelError for odd D.
    """
    checks.floating("x", x)
    checks.even("x", x.shape[-1])
    spec, rows = QuantSpec(), x.float()
    scale = step(rows, spec)[0].half().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # below fp16's smallest number
    zero = torch.round(-rows.amin(-1, keepdim=True).clamp(max=0) / scale).clamp(0, 15)
    fine = rows.isfinite().all(-1, keepdim=True)
    found = quantize(rows, spec, scale=scale, zero=zero).codes - 8
    codes, zero = (torch.where(fine, part, 0) for part in (found, zero))
    scale = torch.where(fine, scale, torch.nan)
    return KV(pack(codes.to(torch.int8)), scale[..., 0].half(), zero[..., 0].half())


def dequantize_kv(kv: KV, dtype: torch.dtype = torch.float16) -> Tensor:
    """x̂ = Δ·(q − z) [..., D] of `quantize_kv`, in `dtype`."""
    codes = unpack(kv.packed).float() + 8
    return ((codes - kv.zero[..., None].float()) * kv.scale[..., None].float()).to(dtype)


def decode_attention(
    q: Tensor, k: KV, v: KV, lengths: Tensor, *, scaling: float | None = None
) -> Tensor:
    """Attention of one new token a sequence over a 4-bit cache: softmax(scaling·q k̂ᵀ) v̂, [B, Hq, D].

    q: [B, Hq, D]; k, v: `KV` of [B, Hkv, T, D], Hq a multiple of Hkv; lengths: int32 [B], how many of the T
    entries a sequence has (1 to T); what lies behind them, NaN too, is not read. scaling: 1/√D if None.
    """
    checks.floating("q", q, dims=3)
    heads, capacity = k.packed.shape[1], k.packed.shape[2]
    if q.shape[1] % heads:
        raise checks.KernelError(f"q has {q.shape[1]} heads: use a multiple of the cache's {heads}")
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    unread = torch.arange(capacity, device=q.device) >= lengths[:, None]
    keys, values = (dequantize_kv(x, torch.float32) for x in (k, v))
    keys, values = (x.masked_fill(unread[:, None, :, None], 0) for x in (keys, values))
    grouped = q.float().unflatten(1, (heads, -1))  # [B, Hkv, Hq/Hkv, D]
    scores = grouped @ keys.mT * scaling
    scores = scores.masked_fill(unread[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ values).flatten(1, 2).to(q.dtype)


def rotate_quantize_error(
    x: Tensor, r: Tensor, *, symmetric: bool = False, clip: float = 1.0
) -> Tensor:
    """‖xR − Q(xR)‖² of each row of x [T, d], R [d, d], 4 bits per token: [T], products in fp32."""
    checks.floating("x", x, dims=2)
    checks.floating("r", r, dims=2, last=x.shape[-1])
    spec = QuantSpec(bits=4, symmetric=symmetric, clip=clip)
    y = x.float() @ r.float()
    return (fake_quantize(y, spec) - y).square().sum(-1)


def quantize_error(
    y: Tensor, *, symmetric: bool = False, clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(E = Y − Q(Y) [T, d], ‖E_t‖² [T]) of y [T, d], 4 bits per token, in y's dtype."""
    checks.floating("y", y, dims=2)
    e = y - fake_quantize(y, QuantSpec(bits=4, symmetric=symmetric, clip=clip))
    return e, e.square().sum(-1)

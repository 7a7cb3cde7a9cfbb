"""The 4-bit half of the reference, against loops over numbers and products in fp64 and int64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import relative, slow_quantize
from dfrot_kernels import hadamard, reference
from dfrot_kernels.checks import MAX_K, KernelError
from dfrot_kernels.reference import KV, QuantSpec, Tokens, fake_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

SEEDS = st.integers(0, 2**16)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
few = settings(max_examples=15)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(seed: int, count: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[count, k]: rows of several sizes, one of zeros, one of one sign, one with a huge outlier."""
    g = generator(seed)
    x = torch.randn(count, k, generator=g) * 10.0 ** torch.randint(-2, 3, (count, 1), generator=g)
    x[0], x[1], x[2, k // 2] = 0, x[1].abs() + 1, 3e4
    return x.to(dtype)


def codes(seed: int, *shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, generator=generator(seed), dtype=torch.int8)


def tokens(seed: int, *lead: int, k: int, symmetric: bool = False) -> Tokens:
    """Any codes, steps and zero points, whether a quantizer would give them or not."""
    g = generator(seed)
    zero = torch.zeros(lead) if symmetric else torch.randint(-8, 8, lead, generator=g)
    return Tokens(codes(seed, *lead, k), torch.rand(lead, generator=g) + 0.01, zero.to(torch.int32))


# --- nibbles --------------------------------------------------------------------------------------


def test_every_byte_holds_two_signed_nibbles():
    bytes_ = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)[:, None]
    pairs = reference.unpack(bytes_)
    for byte, (low, high) in zip(range(-128, 128), pairs.tolist(), strict=True):
        assert (low, high) == (((byte % 256 % 16) ^ 8) - 8, ((byte % 256 // 16) ^ 8) - 8)
    assert sorted(map(tuple, pairs.tolist())) == list(itertools.product(range(-8, 8), repeat=2))
    assert pairs.dtype == torch.int8
    assert torch.equal(reference.pack(pairs), bytes_)


@few
@given(SEEDS, st.lists(st.integers(0, 4), max_size=3), st.integers(1, 40))
def test_pack_is_undone_and_lies_in_halves(seed, lead, half):
    q = codes(seed, *lead, 2 * half)
    packed = reference.pack(q)
    assert packed.dtype == torch.int8 and packed.shape == (*lead, half)
    assert torch.equal(reference.unpack(packed), q)
    for byte, row in zip(
        packed.reshape(-1, half).tolist(), q.reshape(-1, 2 * half).tolist(), strict=True
    ):
        for j in range(half):
            assert byte[j] % 256 == row[j] % 16 + 16 * (row[j + half] % 16)


# --- tokens ---------------------------------------------------------------------------------------


@few
@given(SEEDS, st.booleans(), st.booleans(), st.sampled_from([1.0, 0.8]), st.sampled_from(DTYPES))
def test_int4_tokens_mean_the_fake_quantized_row(seed, symmetric, packed, clip, dtype):
    x = rows(seed, 6, 38, dtype).reshape(2, 3, 38)
    found = reference.quantize_int4(x, symmetric=symmetric, packed=packed, clip=clip)
    assert [t.dtype for t in found] == [torch.int8, torch.float32, torch.int32]
    assert [t.shape for t in found] == [(2, 3, 19 if packed else 38), (2, 3), (2, 3)]
    q = reference.unpack(found.codes) if packed else found.codes
    assert q.min() >= -8 and q.max() <= 7
    assert found.zero.min() >= -8 and found.zero.max() <= 7
    assert not symmetric or not found.zero.any()
    spec = QuantSpec(bits=4, symmetric=symmetric, clip=clip)
    mean = (q.float() - found.zero[..., None]) * found.scale[..., None]
    assert torch.equal(mean, fake_quantize(x.float(), spec))


def agree(found: Tokens, y: Tensor, symmetric: bool, clip: float = 1.0) -> None:
    """`found`, not packed, means Q(y) of y in fp64; it is a step off only where y/Δ is at a tie."""
    mean = slow_quantize(y, QuantSpec(bits=4, symmetric=symmetric, clip=clip))[1]
    range_ = y.amax(-1).clamp(min=0) - y.amin(-1).clamp(max=0)
    step = y.abs().amax(-1) / 7 if symmetric else range_ / 15
    assert torch.allclose(found.scale.double(), step * clip, rtol=1e-5, atol=0)
    kept = (found.codes.double() - found.zero[..., None]) * found.scale[..., None]
    off = ((kept - mean) / step[:, None]).abs()
    distance = ((y / (step * clip)[:, None]) % 1 - 0.5).abs()
    assert off.max() < 1.01 and (distance[off > 0.01] < 1e-3).all()


@few
@given(SEEDS, st.booleans(), st.booleans(), st.booleans(), st.sampled_from(DTYPES))
def test_add_norm_quantize_is_rms_norm(seed, symmetric, added, gained, dtype):
    g = generator(seed)
    x = torch.randn(5, 46, generator=g).to(dtype)
    residual = torch.randn(5, 46, generator=g).to(dtype) if added else None
    gain = torch.rand(46, generator=g) + 0.5 if gained else None
    found, s = reference.add_norm_quantize(
        x, residual, gain, eps=1e-5, symmetric=symmetric, packed=False
    )
    assert s.dtype == dtype and torch.equal(s, x + residual if added else x)
    weight = None if gain is None else gain.double()
    agree(found, F.rms_norm(s.double(), (46,), weight, 1e-5), symmetric)
    packed, _ = reference.add_norm_quantize(x, residual, gain, eps=1e-5, symmetric=symmetric)
    assert torch.equal(reference.unpack(packed.codes), found.codes)


@pytest.mark.parametrize("k", [2, 8, 24, 56, 112, 172])
@pytest.mark.parametrize("symmetric", [True, False])
def test_hadamard_quantize_is_the_dense_product(k, symmetric):
    x = torch.randn(7, k, generator=generator(k))
    x[3] *= 1e3
    h = torch.from_numpy(hadamard.matrix(k)).double() / math.sqrt(hadamard.factor(k).order)
    found = reference.hadamard_quantize(x, symmetric=symmetric, packed=False, clip=0.9)
    agree(found, x.double() @ h, symmetric, 0.9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_bad_row_is_nan_and_alone(bad, symmetric):
    x = rows(0, 5, 16)
    x[3, 7] = bad
    good = torch.tensor([0, 1, 2, 4])
    found = reference.quantize_int4(x, symmetric=symmetric)
    wanted = reference.quantize_int4(x[good], symmetric=symmetric)
    assert all(torch.equal(a[good], b) for a, b in zip(found, wanted, strict=True))
    assert found.scale[3].isnan() and not found.zero[3] and not found.codes[3].any()
    y = reference.matmul(found, reference.pack_weight(codes(1, 4, 16), torch.ones(4)))
    assert y[3].isnan().all() and not y[good].isnan().any()
    kv = reference.quantize_kv(x)
    assert kv.scale[3].isnan() and not kv.zero[3] and not kv.packed[3].any()
    assert torch.equal(reference.dequantize_kv(kv).isnan().any(-1), torch.arange(5) == 3)
    error = reference.rotate_quantize_error(x, torch.eye(16), symmetric=symmetric)
    assert torch.equal(error.isnan(), torch.arange(5) == 3)


# --- products -------------------------------------------------------------------------------------


@few
@given(SEEDS, st.integers(1, 70), st.integers(1, 9), st.booleans(), st.booleans(), st.booleans())
def test_matmul_is_the_integer_product(seed, half, n, symmetric, packed, biased):
    x = tokens(seed, 2, 3, k=2 * half, symmetric=symmetric)
    q, step = codes(seed + 1, n, 2 * half), torch.rand(n, generator=generator(seed)) + 0.01
    bias = torch.randn(n, generator=generator(seed)) if biased else None
    w = reference.pack_weight(q, step)
    assert torch.equal(w.sums.long(), q.long().sum(-1)) and w.sums.dtype == torch.int32
    given_ = Tokens(reference.pack(x.codes), x.scale, x.zero) if packed else x
    total = (x.codes.long() - x.zero.long()[..., None]) @ q.long().T
    ones = Tokens(given_.codes, torch.ones(2, 3), x.zero)
    plain = reference.matmul(ones, reference.pack_weight(q, torch.ones(n)), dtype=torch.float32)
    assert torch.equal(plain.long(), total)
    y = reference.matmul(given_, w, bias, dtype=torch.float32)
    x64 = (x.codes.double() - x.zero[..., None]) * x.scale.double()[..., None]
    wanted = x64 @ (q.double() * step.double()[:, None]).T
    wanted = wanted if bias is None else wanted + bias.double()
    assert y.shape == (2, 3, n)
    assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(reference.matmul(given_, w, bias, dtype=dtype), y.to(dtype))


def test_the_longest_and_largest_sum_is_exact():
    x = Tokens(torch.full((1, MAX_K), -8, dtype=torch.int8), torch.ones(1), torch.tensor([7]).int())
    w = reference.pack_weight(torch.full((1, MAX_K), -8, dtype=torch.int8), torch.ones(1))
    assert reference.matmul(x, w, dtype=torch.float32).item() == 15 * 8 * MAX_K


@few
@given(SEEDS, st.integers(1, 70), st.sampled_from(DTYPES), st.booleans())
def test_matmul_fp_is_the_product_with_the_dequantized_weight(seed, half, dtype, biased):
    g = generator(seed)
    x = torch.randn(2, 3, 2 * half, generator=g).to(dtype)
    q, step = codes(seed, 5, 2 * half), torch.rand(5, generator=g) / 8
    bias = torch.randn(5, generator=g) if biased else None
    y = reference.matmul_fp(x, reference.pack_weight(q, step), bias)
    wanted = x.double() @ (q.double() * step.double()[:, None]).T
    wanted = wanted if bias is None else wanted + bias.double()
    assert y.dtype == dtype and y.shape == (2, 3, 5)
    assert relative(y, wanted) < max(1e-5, torch.finfo(dtype).eps)


# --- the cache ------------------------------------------------------------------------------------


def slow_kv(row: np.ndarray) -> tuple[list[int], float, float]:
    """(codes 0…15, step, zero point) of one row of fp32, one number at a time."""
    low, high = min(np.float32(0), row.min()), max(np.float32(0), row.max())
    step = np.float32(np.float16((high - low) / np.float32(15)))
    step = step if step > 0 else np.float32(1)
    zero = min(max(round(float(-low / step)), 0), 15)
    return [min(max(round(float(v / step)) + zero, 0), 15) for v in row], float(step), float(zero)


@few
@given(SEEDS, st.integers(1, 33), st.sampled_from(DTYPES))
def test_kv_codes_equal_the_loop(seed, half, dtype):
    x = rows(seed, 6, 2 * half, dtype)
    x[5] *= 1e-9  # a step that fp16 cannot hold
    kv = reference.quantize_kv(x.reshape(2, 3, -1))
    assert [t.dtype for t in kv] == [torch.int8, torch.float16, torch.float16]
    assert [t.shape for t in kv] == [(2, 3, half), (2, 3), (2, 3)]
    found = (reference.unpack(kv.packed).long() + 8).reshape(6, -1).tolist()
    steps, zeros = kv.scale.flatten().tolist(), kv.zero.flatten().tolist()
    for row, *mine in zip(x.float().numpy(), found, steps, zeros, strict=True):
        assert tuple(mine) == slow_kv(row)


@few
@given(SEEDS, st.integers(1, 64), st.sampled_from(DTYPES))
def test_kv_error_is_half_a_step_and_half_for_the_zero_point(seed, half, dtype):
    x = rows(seed, 6, 2 * half, dtype)
    kv = reference.quantize_kv(x)
    back = reference.dequantize_kv(kv, torch.float32)
    off = (back - x.float()).abs() / kv.scale.float()[:, None]
    assert off.max() <= 1.02  # 0.5, 0.5 for z, and 15 steps of relative error 2⁻¹¹
    assert not back[0].any()
    signed = x[3:4].float() - x[3:4].float().mean()
    assert reference.dequantize_kv(reference.quantize_kv(signed)).shape == signed.shape
    for dtype_ in DTYPES:
        assert torch.equal(reference.dequantize_kv(kv, dtype_), back.to(dtype_))


def test_a_cache_entry_of_128_takes_68_bytes():
    kv = reference.quantize_kv(torch.randn(3, 5, 128, generator=generator(0)).half())
    assert sum(t.nbytes for t in kv) == 3 * 5 * 68


def poison(kv: KV, lengths: Tensor) -> KV:
    """`kv` [B, H, T, …] with NaN steps and zero points and other codes behind `lengths`."""
    behind = (torch.arange(kv.scale.shape[2]) >= lengths[:, None])[:, None]
    scale, zero = (t.masked_fill(behind, torch.nan) for t in (kv.scale, kv.zero))
    return KV(torch.where(behind[..., None], 0x5B, kv.packed).to(torch.int8), scale, zero)


@few
@given(
    SEEDS,
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(1, 40),
    st.booleans(),
)
def test_decode_attention_is_attention_on_the_dequantized_cache(
    seed, batch, heads, group, capacity, half, scaled
):
    g = generator(seed)
    q = torch.randn(batch, heads * group, 2 * half, generator=g)
    x = torch.randn(2, batch, heads, capacity, 2 * half, generator=g)
    lengths = torch.randint(1, capacity + 1, (batch,), generator=g, dtype=torch.int32)
    k, v = (poison(reference.quantize_kv(t), lengths) for t in x)
    scaling = 0.3 if scaled else None
    found = reference.decode_attention(q, k, v, lengths, scaling=scaling)
    assert found.shape == q.shape and found.dtype == q.dtype
    for b, n in enumerate(lengths.tolist()):
        keys, vals = (
            ((reference.unpack(t.packed).double() + 8) - t.zero.double()[..., None])
            * t.scale.double()[..., None]
            for t in (KV(*(part[b, :, :n] for part in kv)) for kv in (k, v))
        )
        wanted = F.scaled_dot_product_attention(
            q[b, :, None].double(),
            keys.repeat_interleave(group, 0),
            vals.repeat_interleave(group, 0),
            scale=scaling,
        )[:, 0]
        assert torch.allclose(found[b].double(), wanted, rtol=1e-4, atol=1e-5)


# --- the error of a rotation ----------------------------------------------------------------------


@few
@given(SEEDS, st.integers(1, 40), st.booleans(), st.sampled_from([1.0, 0.8]))
def test_rotation_error_is_the_loop_s(seed, d, symmetric, clip):
    g = generator(seed)
    x, r = torch.randn(4, d, generator=g), torch.randn(d, d, generator=g)
    x[1] = 0
    y = x.double() @ r.double()
    mean = slow_quantize(y, QuantSpec(bits=4, symmetric=symmetric, clip=clip))[1]
    error = reference.rotate_quantize_error(x, r, symmetric=symmetric, clip=clip)
    wanted = (mean - y).square().sum(-1)
    # e² is continuous where a code flips; what remains is fp32's 1e-7 of 15 steps, against their 1/12
    assert error.dtype == torch.float32 and not error[1]
    assert torch.allclose(error.double(), wanted, rtol=1e-3, atol=1e-10 * y.square().max().item())


# --- bad input ------------------------------------------------------------------------------------


X = torch.zeros(4, 8)
W = reference.pack_weight(torch.zeros(6, 8, dtype=torch.int8), torch.ones(6))
T = Tokens(torch.zeros(4, 8, dtype=torch.int8), torch.ones(4), torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: reference.pack(torch.zeros(2, 5, dtype=torch.int8)), "codes has rows of 5.*even"),
        (lambda: reference.quantize_int4(X.int()), "x is torch.int32: use float16"),
        (lambda: reference.quantize_int4(X.T), r"x \[8, 4\] is not contiguous"),
        (lambda: reference.quantize_int4(X[:, :7].contiguous()), "x has rows of 7.*even"),
        (lambda: reference.quantize_int4(torch.zeros(1, MAX_K + 2)), "rows of 131072.*int32"),
        (lambda: reference.quantize_int4([1.0]), "x is list: give a torch.Tensor"),
        (lambda: reference.add_norm_quantize(X, None, torch.ones(7)), r"gain is \[7\].*must be 8"),
        (lambda: reference.hadamard_quantize(X.T), "not contiguous"),
        (lambda: reference.pack_weight(X, torch.ones(4)), "codes is torch.float32.*int8"),
        (lambda: reference.pack_weight(T.codes, torch.ones(3)), r"scale is \[3\].*must be 4"),
        (lambda: reference.matmul(T, W, torch.ones(7)), r"bias is \[7\].*must be 6"),
        (
            lambda: reference.matmul(T._replace(codes=T.codes[:, :6]), W),
            r"x.codes is \[4, 6\].*must be 8",
        ),
        (lambda: reference.matmul_fp(X[:, :6].contiguous(), W), r"x is \[4, 6\].*must be 8"),
        (lambda: reference.quantize_kv(torch.zeros(2, 3)), "x has rows of 3.*even"),
        (lambda: reference.quantize_kv(torch.zeros(2, 4, dtype=torch.int8)), "x is torch.int8"),
        (lambda: reference.rotate_quantize_error(X, torch.eye(7)), r"r is \[7, 7\].*must be 8"),
        (lambda: reference.rotate_quantize_error(X[0], torch.eye(8)), r"x is \[8\]: 2 axes"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call()


def test_heads_that_do_not_divide_are_refused():
    kv = reference.quantize_kv(torch.zeros(1, 2, 4, 8))
    with pytest.raises(KernelError, match="q has 3 heads: use a multiple of the cache's 2"):
        reference.decode_attention(torch.zeros(1, 3, 8), kv, kv, torch.ones(1, dtype=torch.int32))


# --- fp64 -----------------------------------------------------------------------------------------


@few
@given(SEEDS, st.booleans(), st.integers(1, 30))
def test_fp64_stays_fp64(seed, symmetric, half):
    k, g = 2 * half, generator(seed)
    x, bias = rows(seed, 5, k).double() + 1e-9, torch.randn(7, generator=g, dtype=torch.float64)
    w = reference.pack_weight(codes(seed, 7, k), torch.rand(7, generator=g) + 0.1)
    full = reference.unpack(w.packed).double() * w.scale.double()[:, None]
    spec = QuantSpec(symmetric=symmetric)
    for made, turned in (
        (reference.quantize_int4(x, symmetric=symmetric), x),
        (reference.hadamard_quantize(x, symmetric=symmetric), hadamard.transform(x)),
    ):
        assert made.scale.dtype == torch.float64
        found = reference.matmul(made, w, bias, dtype=torch.float64)
        wanted = fake_quantize(turned, spec) @ full.T + bias
        assert relative(found, wanted) < 1e-13
    assert relative(reference.matmul_fp(x, w, bias), x @ full.T + bias) < 1e-13

"""Per-token quantization kernels under Triton's interpreter: bit for bit the reference's.

Behind the norm the sum of squares is taken in another order than torch's. There, and behind a Hadamard
product, a code may differ by one where y/Δ is a rounding tie within float error: `assert_alike` says so.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dfrot_kernels import reference, tokens
from dfrot_kernels.checks import KernelError
from dfrot_kernels.reference import Tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = [
    pytest.mark.poisoned,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NaN in numpy, on purpose
]
SEEDS = st.integers(0, 2**16)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TIE = 5e-5  # steps: y/Δ is up to 15, and a sum of thousands of floats is off by some 1e-6 of the largest


def rows(seed: int, k: int, dtype: torch.dtype) -> Tensor:
    """[9, K]: all scales; zeros, one huge outlier, one sign, a constant, a NaN, an Inf."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(9, k, generator=g) * 10.0 ** torch.randint(-3, 3, (9, 1), generator=g)
    x[1], x[3], x[4] = 0, x[3].abs() + 1, -0.3
    x[2, k // 3] = 3e4
    x[5, k - 1], x[6, 0] = torch.nan, -torch.inf
    return x.to(dtype)


def assert_same(found: Tokens, wanted: Tokens) -> None:
    for name, a, b in zip(Tokens._fields, found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert torch.equal(a.nan_to_num(nan=-1), b.nan_to_num(nan=-1)), name


def assert_alike(found: Tokens, wanted: Tokens, y: Tensor, clip: float = 1.0) -> None:
    """Scales to 1e-5, codes and zero points equal but by ±1 at ties of y/Δ; y [T, K] in fp64, exact."""
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    packed = 2 * found.codes.shape[-1] == y.shape[-1]
    codes, expected = (reference.unpack(t.codes) if packed else t.codes for t in (found, wanted))
    torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-5, atol=0, equal_nan=True)
    moved = (found.zero != wanted.zero)[..., None]
    low = -clip * y.amin(-1, keepdim=True).clamp(max=0) / wanted.scale[..., None].double()
    assert ((low.frac() - 0.5).abs() < TIE)[moved].all()
    a, b = codes.int() - found.zero[..., None], expected.int() - wanted.zero[..., None]
    steps = y / wanted.scale[..., None].double()
    tie = ((steps.abs().frac() - 0.5).abs() < TIE) | (moved & ((codes == -8) | (codes == 7)))
    assert (a - b).abs().max() <= 1
    assert tie[a != b].all()


@settings(max_examples=10)
@given(
    SEEDS,
    st.sampled_from([2, 6, 30, 128, 130, 1000, 4096]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 0.9, 0.5]),
)
def test_quantize_is_the_reference(seed, k, dtype, symmetric, packed, clip):
    x = rows(seed, k, dtype)
    options = {"symmetric": symmetric, "packed": packed, "clip": clip}
    found = tokens.quantize_int4(x, **options)
    assert_same(found, reference.quantize_int4(x, **options))
    assert found.scale[5:7].isnan().all() and not found.codes[5:7].any()
    shaped = tokens.quantize_int4(x.view(3, 3, k), **options).codes
    assert shaped.shape[:2] == (3, 3) and torch.equal(shaped.view_as(found.codes), found.codes)


@settings(max_examples=10)
@given(
    SEEDS,
    st.sampled_from([2, 6, 128, 130, 1000]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_add_norm_quantize_is_the_reference(seed, k, dtype, residual, gain, symmetric, packed):
    x = rows(seed, k, dtype)
    g = torch.Generator().manual_seed(seed)
    r = torch.randn(9, k, generator=g).to(dtype) if residual else None
    w = torch.randn(k, generator=g).to(dtype) if gain else None
    options = {"symmetric": symmetric, "packed": packed, "eps": 1e-5}
    found, s = tokens.add_norm_quantize(x, r, w, **options)
    wanted, expected = reference.add_norm_quantize(x, r, w, **options)
    assert s.dtype == dtype and (residual or s is x)
    assert torch.equal(s.nan_to_num(77), expected.nan_to_num(77))
    n = expected.double()
    n *= (n.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 if w is None else w.double())
    fine = expected.isfinite().all(-1)
    assert_same(*(Tokens(*(part[~fine] for part in t)) for t in (found, wanted)))
    assert_alike(*(Tokens(*(part[fine] for part in t)) for t in (found, wanted)), n[fine])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("k", [66, 128, 200, 33000])
def test_long_rows_are_read_in_chunks(norm, k, monkeypatch):
    if k < 33000:  # the loop's ragged ends, at sizes that the interpreter likes
        monkeypatch.setattr(tokens, "LONGEST", 64)
        monkeypatch.setattr(tokens, "CHUNK", 64)
    for dtype in DTYPES[:2] if k < 33000 else DTYPES[2:]:
        x = rows(k, k, dtype)[2:6]
        if not norm:
            assert_same(tokens.quantize_int4(x, clip=0.9), reference.quantize_int4(x, clip=0.9))
            continue
        r, w = x.flip(0, 1).nan_to_num(1), x[1].abs()
        packed = dtype == torch.float16
        found, s = tokens.add_norm_quantize(x, r, w, packed=packed)
        wanted, expected = reference.add_norm_quantize(x, r, w, packed=packed)
        assert torch.equal(s.nan_to_num(77), expected.nan_to_num(77))
        n = expected.double()
        n *= (n.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w.double()
        keep = expected.isfinite().all(-1)
        assert_alike(*(Tokens(*(p[keep] for p in t)) for t in (found, wanted)), n[keep])
        assert found.scale[~keep].isnan().all() and not found.codes[~keep].any()


def test_codes_by_hand():
    """Ties to the even code, −8 and 7 both used, and the byte of codes k and k + K/2."""
    x = torch.tensor([[-6.5, 8.5, 0.5, 1.5], [-7.5, 7.5, 0.0, 2.0]])
    found = tokens.quantize_int4(x, packed=False)
    assert found.scale.tolist() == [1, 1] and found.zero.tolist() == [6 - 8, 8 - 8]
    assert found.codes.tolist() == [[-8, 6, -2, 0], [-8, 7, 0, 2]]
    bytes_ = tokens.quantize_int4(x).codes
    assert torch.equal(bytes_, reference.pack(found.codes))
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.0]])
    found = tokens.quantize_int4(x, symmetric=True, packed=False)
    assert found.codes.tolist() == [[0, 2, 2, 0, -2, 7]]
    x = torch.tensor([[-14.0, 14.0]])  # clipped: Δ = 1, and −14 goes to −8
    found = tokens.quantize_int4(x, symmetric=True, packed=False, clip=0.5)
    assert found.codes.tolist() == [[-8, 7]] and not found.zero.any()


def test_no_rows_and_one_row():
    for shape in ([0, 8], [2, 0, 8], [8]):
        x = torch.ones(shape)
        assert_same(tokens.quantize_int4(x), reference.quantize_int4(x))
        found, s = tokens.add_norm_quantize(x, x)
        assert s.shape == x.shape and found.scale.shape == x.shape[:-1]


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.ones(2, 8, dtype=torch.int8), "x is torch.int8: use float16"),
        (torch.ones(2, 8, dtype=torch.float64), "x is torch.float64.*backend='torch'"),
        (torch.ones(8, 2).T, r"x \[2, 8\] is not contiguous: give x.contiguous"),
        (torch.ones(2, 7), "x has rows of 7: .* an even number"),
        (torch.ones(1, 131_072), "x has rows of 131072: .* int32"),
        (torch.tensor(1.0), "last axis must be there"),
        ([1.0, 2.0], "x is list: give a torch.Tensor"),
    ],
)
def test_bad_rows_are_refused(x, message):
    for function in (tokens.quantize_int4, tokens.add_norm_quantize):
        with pytest.raises(KernelError, match=message):
            function(x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"residual": torch.ones(2, 8).half()}, r"residual is torch.float16 \[2, 8\].* alike"),
        ({"residual": torch.ones(1, 8)}, r"residual is torch.float32 \[1, 8\].* alike"),
        ({"residual": torch.ones(8, 2).T}, "residual .* is not contiguous"),
        ({"gain": torch.ones(7)}, r"gain is \[7\]: its last axis must be 8"),
        ({"gain": torch.ones(8, dtype=torch.int32)}, "gain is torch.int32"),
        ({"gain": torch.ones(8, device="meta")}, "put them on one device"),
    ],
)
def test_bad_residuals_and_gains_are_refused(options, message):
    with pytest.raises(KernelError, match=message):
        tokens.add_norm_quantize(torch.ones(2, 8), **options)


def test_bad_clip_is_refused():
    with pytest.raises(ValueError, match=r"clip = 1.5: use a ratio in \(0, 1\]"):
        tokens.quantize_int4(torch.ones(2, 8), clip=1.5)


@pytest.mark.parametrize("k", [2, 64, 128, 576, 4096, 11008, 32768, 32770, 131_070])
def test_launches_fit(k):
    rows_, block, warps = tokens.launch(k)
    assert block & (block - 1) == 0 and warps in (4, 8, 16)
    assert 2 * rows_ * block <= 64 * 32 * warps  # numbers a thread keeps
    assert k > tokens.LONGEST or k <= 2 * block < 2 * k


def test_variants_name_the_kernels_arguments():
    found = tokens.variants()
    assert len({v.name for v in found}) == len(found)
    for v in found:
        assert list(v.signature) == v.kernel.arg_names
        assert set(v.constants) == {n for n, kind in v.signature.items() if kind == "constexpr"}
        assert set(v.aligned) < set(v.signature)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """ab + c of fp32 numbers, rounded once: exact product, sum rounded to odd in fp64, then to fp32."""
    p, c = a.astype(np.float64) * b, c.astype(np.float64)
    s = p + c
    back = s - p
    rest = (p - (s - back)) + (c - back)
    toward = np.where((rest > 0) == (s > 0), 1, -1)
    odd = (s.view(np.int64) & 1) == 1
    return (
        (s.view(np.int64) + np.where((rest != 0) & ~odd, toward, 0)).view(np.float64).astype("f4")
    )


@pytest.mark.parametrize("size", [1.0, 1e-30, 9.9e-31, 1e-38, 1e37])
def test_a_quotient_without_division_is_the_rounded_one(size):
    """What `common.quotient` does on a GPU, which the interpreter cannot: numbers at and beside ties."""
    rng = np.random.default_rng(0)
    scale = (size * rng.uniform(1, 2, 100_000)).astype("f4")
    x = (scale.astype(np.float64) * (rng.integers(0, 16, scale.size) + 0.5)).astype("f4")
    x = (x.view(np.int32) + rng.integers(-3, 4, x.size).astype(np.int32)).view(np.float32)
    wanted = x / scale
    up = np.where(scale < np.float32(1e-30), np.float32(2.0**64), np.float32(1))
    scale, x = scale * up, x * up
    inverse = np.float32(1) / scale
    q = x * inverse
    assert np.array_equal(fused(fused(-q, scale, x), inverse, q), wanted)

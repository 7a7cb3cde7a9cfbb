"""The 4-bit cache's kernels under Triton's interpreter, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dfrot_kernels import attention, common, reference
from dfrot_kernels.checks import KernelError
from dfrot_kernels.kv import dequantize_kv, quantize_kv
from dfrot_kernels.kv import variants as kv_variants
from dfrot_kernels.reference import KV
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

pytestmark = [
    pytest.mark.poisoned,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NaN in numpy, on purpose
]
SEEDS = st.integers(0, 2**16)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def same(found: KV, wanted: KV) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def rows(seed: int, count: int, d: int, dtype: torch.dtype) -> Tensor:
    """[count ≥ 8, d] of several sizes; zeros, one sign, an outlier, tiny, constant, NaN and Inf rows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, d, generator=g) * 10.0 ** torch.randint(-2, 3, (count, 1), generator=g)
    x[0], x[1], x[2, d // 2] = 0, x[1].abs() + 1, 3e4
    x[3], x[4] = x[3] * 1e-9, -0.3
    x[5, d - 1], x[6, 0] = torch.nan, -torch.inf
    return x.to(dtype)


# --- rows -----------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(SEEDS, st.integers(8, 45), st.sampled_from([2, 6, 64, 80, 96, 128]), st.sampled_from(DTYPES))
def test_quantize_kv_is_exact(seed, count, d, dtype):
    x = rows(seed, count, d, dtype)
    found = quantize_kv(x)
    same(found, reference.quantize_kv(x))
    for as_type in DTYPES:
        back = dequantize_kv(found, as_type)
        wanted = reference.dequantize_kv(found, as_type)
        # the interpreter cuts bits off where it makes bf16; a GPU rounds
        ulp = torch.finfo(as_type).eps if as_type == torch.bfloat16 else 0
        assert_close(back, wanted, rtol=ulp, atol=0, equal_nan=True)


def test_ties_go_to_the_even_code_and_ends_are_kept():
    x = torch.tensor([[-6.5, 8.5, 0.5, 1.5], [-7.5, 7.5, 2.5, -2.5], [0.0, 15.0, 0.5, 14.5]])
    found = quantize_kv(x)
    same(found, reference.quantize_kv(x))
    assert found.scale.tolist() == [1, 1, 1] and found.zero.tolist() == [6, 8, 0]
    assert (reference.unpack(found.packed) + 8).tolist() == [
        [0, 14, 6, 8],
        [0, 15, 10, 6],
        [0, 15, 0, 14],
    ]


def test_every_byte_is_dequantized():
    packed = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(8, 32)
    kv = KV(packed, torch.linspace(0.01, 3, 8).half(), torch.arange(0, 16, 2).half())
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(dequantize_kv(kv, dtype), reference.dequantize_kv(kv, dtype))


def test_steps_beyond_fp16_stay_the_reference_s():
    x = torch.tensor([[-3e6, 1.0], [2e6, -2e6], [1e-30, 0.0]])
    same(quantize_kv(x), reference.quantize_kv(x))


def test_leading_axes_and_no_rows():
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0)).half()
    kv = quantize_kv(x)
    same(kv, reference.quantize_kv(x))
    assert dequantize_kv(kv).shape == x.shape
    assert quantize_kv(x[0, 0, 0]).scale.shape == ()
    none = quantize_kv(x[:0])
    assert none.packed.shape == (0, 3, 5, 32) and none.scale.shape == (0, 3, 5)
    assert dequantize_kv(none).shape == (0, 3, 5, 64)


# --- attention ------------------------------------------------------------------------------------


def problem(
    seed: int, batch: int, heads: int, group: int, capacity: int, d: int, dtype=torch.float32
) -> tuple[Tensor, KV, KV, Tensor]:
    """q, k, v, lengths; NaN steps and zero points and any codes behind the lengths."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads * group, d, generator=g).to(dtype)
    k, v = torch.randn(2, batch, heads, capacity, d, generator=g)
    k[..., 1] += 6  # as keys have: one channel much larger
    lengths = torch.randint(1, capacity + 1, (batch,), generator=g, dtype=torch.int32)
    behind = (torch.arange(capacity) >= lengths[:, None])[:, None].expand(-1, heads, -1)
    k, v = reference.quantize_kv(k), reference.quantize_kv(v)
    for kv in (k, v):
        kv.scale[behind], kv.zero[behind] = torch.nan, torch.inf
        kv.packed[behind] = 0x5B
    return q, k, v, lengths


@settings(max_examples=15)
@given(
    SEEDS,
    st.integers(1, 3),
    st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3), (1, 17)]),
    st.sampled_from([1, 127, 128, 129, 300]),
    st.sampled_from([4, 64, 80, 96, 128]),
    st.sampled_from([None, 0.3]),
)
def test_decode_attention(seed, batch, shape, capacity, d, scaling):
    q, k, v, lengths = problem(seed, batch, *shape, capacity, d)
    found = attention.decode_attention(q, k, v, lengths, scaling=scaling)
    wanted = reference.decode_attention(q, k, v, lengths, scaling=scaling)
    assert not found.isnan().any()
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capacity", [600, 1100])
def test_splits_behind_a_length_change_nothing(capacity):
    """Short sequences leave whole splits empty; the longest fills all of them."""
    q, k, v, _ = problem(3, 4, 1, 2, capacity, 64)
    for part in (k, v):
        part.scale.fill_(0.4)
        part.zero.fill_(7)
    lengths = torch.tensor([1, 257, capacity - 1, capacity], dtype=torch.int32)
    assert attention.splits(4, capacity)[0] > 1
    assert_close(
        attention.decode_attention(q, k, v, lengths),
        reference.decode_attention(q, k, v, lengths),
        rtol=1e-4,
        atol=1e-5,
    )
    beyond = lengths.long() + (lengths == capacity)  # the capacity: all of it
    long = attention.decode_attention(q, k, v, beyond)
    assert torch.equal(long, attention.decode_attention(q, k, v, lengths))


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_has_the_type_of_q(dtype):
    q, k, v, lengths = problem(5, 2, 2, 2, 90, 64, dtype)
    found = attention.decode_attention(q, k, v, lengths)
    assert found.dtype == dtype
    wanted = reference.decode_attention(q.float(), k, v, lengths)
    eps = torch.finfo(dtype).eps
    assert_close(found.float(), wanted, rtol=max(eps, 1e-4), atol=1e-5)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_rounding_to_fp16_for_the_tensor_cores_costs_a_thousandth(monkeypatch, size):
    """The types a GPU uses for fp16; small and large values alike, and steps of very different size."""
    monkeypatch.setattr(attention, "INTERPRETED", False)
    types = attention._types(torch.float16)
    q, k, v, lengths = problem(7, 2, 1, 4, 650, 128, torch.float16)
    monkeypatch.undo()
    v.scale.mul_(size)
    v.scale[:, :, ::3] *= 0.02
    monkeypatch.setattr(attention, "_types", lambda dtype: types)
    q = q.float()  # so that the result is not rounded to fp16
    found = attention.decode_attention(q, k, v, lengths)
    wanted = reference.decode_attention(q, k, v, lengths)
    assert ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max() < 1e-3


def test_sharp_attention_and_large_scores():
    """All weight on one entry, in the last split, with scores in the thousands."""
    q, k, v, lengths = problem(9, 2, 1, 2, 600, 64)
    lengths.fill_(600)
    for part in (k, v):
        part.scale.fill_(0.5)
        part.zero.fill_(8)
    k.packed.zero_()
    k.packed[:, :, 591] = 0x77
    q = q.abs() * 50
    assert_close(
        attention.decode_attention(q, k, v, lengths),
        reference.dequantize_kv(v, torch.float32)[:, :, 591].expand_as(q),
        rtol=1e-5,
        atol=1e-5,
    )


def test_nan_in_an_entry_reaches_its_own_head_only():
    q, k, v, lengths = problem(11, 2, 2, 2, 600, 64)
    lengths.fill_(600)
    for part in (k, v):
        part.scale.fill_(0.4)
        part.zero.fill_(7)
    clean = attention.decode_attention(q, k, v, lengths)
    k.scale[0, 1, 599] = torch.nan
    v.scale[1, 0, 3] = torch.nan
    found = attention.decode_attention(q, k, v, lengths)
    bad = torch.tensor([[False, False, True, True], [True, True, False, False]])
    assert found[bad].isnan().all() and torch.equal(found[~bad], clean[~bad])
    assert torch.equal(found.isnan(), reference.decode_attention(q, k, v, lengths).isnan())


def test_no_sequences():
    q, k, v, lengths = problem(0, 1, 2, 2, 5, 64)
    k, v = (KV(*(t[:0] for t in kv)) for kv in (k, v))
    assert attention.decode_attention(q[:0], k, v, lengths[:0]).shape == (0, 4, 64)


@given(st.integers(1, 5000), st.integers(1, 200_000))
def test_splits_cover_the_cache(pairs, capacity):
    count, each = attention.splits(pairs, capacity)
    assert 1 <= count <= attention.MAX_SPLITS and each % attention.BLOCK_T == 0
    assert (count - 1) * each < capacity <= count * each
    if capacity >= 32_768 and pairs <= 8:
        assert count >= 32  # enough programs for a GPU


# --- the assembly, which runs on a GPU only -------------------------------------------------------


def emulate(assembly: str, words: np.ndarray) -> list[np.ndarray]:
    """$0…$3 as fp32 [words, 2] of the instructions on 32-bit words $4."""
    kept = {"$4": words}

    def value(name: str) -> np.ndarray:
        return np.uint32(int(name, 16)) if name.startswith("0x") else kept[name]

    def halves(x: np.ndarray, kind: str) -> np.ndarray:
        parts = np.stack([x & 0xFFFF, x >> 16], -1).astype(np.uint32)
        if kind == "f16x2":
            return parts.astype(np.uint16).view(np.float16).astype(np.float32)
        return (parts << 16).view(np.float32)

    for line in assembly.strip().strip("{}").split(";"):
        name, _, rest = line.strip().partition(" ")
        to, *given_ = [part.strip() for part in rest.split(",")]
        if name == "xor.b32":
            kept[to] = value(given_[0]) ^ value(given_[1])
        elif name == "mov.b32":
            kept[to] = np.broadcast_to(value(given_[0]), words.shape)
        elif name == "shr.u32":
            kept[to] = value(given_[0]) >> np.uint32(given_[1])
        elif name == "lop3.b32":
            assert given_[3] == "0xea"  # (a & b) | c
            kept[to] = (value(given_[0]) & value(given_[1])) | value(given_[2])
        elif name.startswith("fma.rn."):
            a, b, c = (halves(value(x), name.removeprefix("fma.rn.")) for x in given_)
            kept[to] = a * b + c
        else:
            assert name in ("", ".reg"), name
    return [kept[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("assembly", [attention.ASM_FP16, attention.ASM_BF16])
def test_the_assembly_unpacks_every_word(assembly):
    low = np.arange(2**16, dtype=np.uint32)
    words = low | (np.random.default_rng(0).permutation(low) << 16)
    found = emulate(assembly.value, words)
    pairs = torch.from_numpy(words.view(np.int8).reshape(-1, 2, 2))  # word, half, byte
    wanted = reference.unpack(pairs.reshape(-1, 1)).reshape(-1, 2, 4).float().numpy()
    for i in range(4):
        assert np.array_equal(found[i], wanted[..., i])


# --- bad input ------------------------------------------------------------------------------------

Q = torch.zeros(2, 4, 64)
CACHE = reference.quantize_kv(torch.zeros(2, 2, 5, 64))
LENGTHS = torch.ones(2, dtype=torch.int32)
NO_ENTRIES = KV(*(t[:, :, :0].contiguous() for t in CACHE))
TURNED = KV(CACHE.packed.mT.contiguous().mT, CACHE.scale, CACHE.zero)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: quantize_kv(torch.zeros(2, 3)), "x has rows of 3.*even"),
        (lambda: quantize_kv(torch.zeros(4, 8).T), "not contiguous"),
        (lambda: quantize_kv(torch.zeros(2, 4, dtype=torch.int32)), "x is torch.int32"),
        (lambda: quantize_kv(torch.zeros(1, 131_072)), "rows of 131072.*int32"),
        (lambda: dequantize_kv(CACHE, torch.int8), "dtype = torch.int8: use float16"),
        (lambda: dequantize_kv(TURNED), "kv.packed.*not contiguous"),
        (
            lambda: dequantize_kv(CACHE._replace(scale=CACHE.scale.float())),
            "kv.scale is torch.float32: float16",
        ),
        (
            lambda: dequantize_kv(CACHE._replace(zero=CACHE.zero[0])),
            r"kv.zero is \[2, 5\]: \[2, 2, 5\]",
        ),
        (lambda: attention.decode_attention(Q[0], CACHE, CACHE, LENGTHS), "q is .*3 axes"),
        (lambda: attention.decode_attention(Q.mT, CACHE, CACHE, LENGTHS), "q .*not contiguous"),
        (
            lambda: attention.decode_attention(Q[:, :3].contiguous(), CACHE, CACHE, LENGTHS),
            "q has 3 heads: use a multiple of the cache's 2",
        ),
        (
            lambda: attention.decode_attention(Q[..., :60].contiguous(), CACHE, CACHE, LENGTHS),
            r"k.packed is \[2, 2, 5, 32\].*must be 30",
        ),
        (
            lambda: attention.decode_attention(Q[..., :62].contiguous(), CACHE, CACHE, LENGTHS),
            "q has heads of 62: use a multiple of 4, or backend='torch'",
        ),
        (
            lambda: attention.decode_attention(Q[:1], CACHE, CACHE, LENGTHS[:1]),
            r"k.packed is \[2, 2, 5, 32\]: \[1, 2, 5, 32\]",
        ),
        (
            lambda: attention.decode_attention(
                Q, CACHE, reference.quantize_kv(torch.zeros(2, 2, 6, 64)), LENGTHS
            ),
            r"v.packed is \[2, 2, 6, 32\]: \[2, 2, 5, 32\]",
        ),
        (lambda: attention.decode_attention(Q, CACHE, TURNED, LENGTHS), "v.packed.*not contiguous"),
        (lambda: attention.decode_attention(Q, CACHE, CACHE, LENGTHS[:1]), r"lengths is \[1\]"),
        (
            lambda: attention.decode_attention(Q, CACHE, CACHE, LENGTHS.float()),
            "lengths is torch.float",
        ),
        (
            lambda: attention.decode_attention(Q, NO_ENTRIES, NO_ENTRIES, LENGTHS),
            "the cache has no entries",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call()


def test_without_the_interpreter_a_cuda_device_is_needed(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    for call in (
        lambda: quantize_kv(Q),
        lambda: dequantize_kv(CACHE),
        lambda: attention.decode_attention(Q, CACHE, CACHE, LENGTHS),
    ):
        with pytest.raises(
            KernelError, match=r"tensors on cpu: Triton needs a CUDA device.*'torch'"
        ):
            call()


def test_variants_name_each_argument():
    for variant in [*kv_variants(), *attention.variants()]:
        wanted = {n for n, kind in variant.signature.items() if kind == "constexpr"}
        assert wanted == set(variant.constants) and set(variant.aligned) <= set(variant.signature)

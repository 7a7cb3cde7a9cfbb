"""The Hadamard-and-quantize kernel under Triton's interpreter, against the reference.

Where all sums are exact, integers or single channels, everything is equal. Elsewhere the order of summation
differs, and a code may differ by one at a rounding tie (`assert_alike` of the tokens' tests).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from dfrot_kernels import hadamard, reference
from dfrot_kernels import hadamard_tokens as kernel
from dfrot_kernels.checks import KernelError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_kernels_tokens import DTYPES, SEEDS, assert_alike, assert_same, rows
from torch import Tensor

pytestmark = [
    pytest.mark.poisoned,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NaN in numpy, on purpose
]
# n = 2 and blocks of H: 6 = 3·2 and 428 = 107·4; one, two and three factors
SMALL = [2, 6, 12, 64, 128, 428, 576, 1536, 2048]


def exact(x: Tensor) -> Tensor:
    return hadamard.transform(x.double())


@settings(max_examples=10)
@given(
    SEEDS,
    st.sampled_from(SMALL),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 0.8]),
)
@example(0, 1536, torch.float16, False, True, 1.0)  # 48 columns padded to 64
def test_codes_are_the_references_but_at_ties(seed, k, dtype, symmetric, packed, clip):
    x = rows(seed, k, dtype)
    options = {"symmetric": symmetric, "packed": packed, "clip": clip}
    found = kernel.hadamard_quantize(x, **options)
    wanted = reference.hadamard_quantize(x, **options)
    fine = x.isfinite().all(-1)
    assert found.scale[~fine].isnan().all()
    assert not found.codes[~fine].any() and not found.zero[~fine].any()
    parts = [reference.Tokens(*(part[fine] for part in t)) for t in (found, wanted)]
    assert_alike(*parts, exact(x[fine]), clip)


@pytest.mark.parametrize("k", [4096, 8192, 11008, 13696, 14336, 28672])
def test_sizes_of_models(k):
    """Hidden and intermediate sizes; 13696 = 107·128 is block diagonal, 28672 goes in slabs."""
    x = torch.randn(1, k, generator=torch.Generator().manual_seed(k)).half()
    x[0, 5] = 300
    found, wanted = kernel.hadamard_quantize(x), reference.hadamard_quantize(x)
    assert_alike(found, wanted, exact(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [64, 412, 576])
def test_a_single_channel_is_a_row_of_h(k, dtype):
    """e_i H = ±1/√order: codes ±7 and 0, and a step of exactly 1/√order/7."""
    picked = torch.arange(0, k, 1 if k == 64 else k // 6)
    x = torch.eye(k, dtype=dtype)[picked]
    found = kernel.hadamard_quantize(x, symmetric=True, packed=False)
    assert torch.equal(found.codes, 7 * torch.from_numpy(hadamard.matrix(k))[picked])
    size = torch.tensor(1 / math.sqrt(hadamard.factor(k).order), dtype=torch.float32)
    assert torch.equal(found.scale, (size / 7).expand(len(picked)))


@settings(max_examples=8)
@given(SEEDS, st.sampled_from(SMALL), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_integers_are_exact(seed, k, dtype, symmetric, packed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-9, 10, (5, k), generator=g)
    y = hadamard.transform(x, normalize=False).float() * (1 / math.sqrt(hadamard.factor(k).order))
    options = {"symmetric": symmetric, "packed": packed}
    found = kernel.hadamard_quantize(x.to(dtype), **options)
    assert_same(found, reference.quantize_int4(y, **options))


@pytest.mark.parametrize("k", [64, 1536, 4096])
def test_all_24_bits_of_a_float_count(k):
    """Integers to 2²³ in few channels: sums are exact in fp32, and in nothing less."""
    g = torch.Generator().manual_seed(0)
    x = torch.zeros(2, k)
    for row in x:  # two channels a row: |sums| < 2²⁴
        values = torch.randint(2**22, 2**23, (2,), generator=g)
        row[torch.randperm(k, generator=g)[:2]] = values.float()
    y = hadamard.transform(x.long(), normalize=False).float()
    y *= 1 / math.sqrt(hadamard.factor(k).order)
    assert_same(kernel.hadamard_quantize(x), reference.quantize_int4(y))


@pytest.mark.parametrize("packed", [True, False])
def test_slabs_give_the_same(packed, monkeypatch):
    x = rows(3, 1536, torch.float16)[2:6]
    whole = kernel.hadamard_quantize(x, packed=packed)
    slabs = replace(kernel.plan(1536), slabs=kernel.SLABS)
    monkeypatch.setattr(kernel, "plan", lambda k: slabs)
    assert_same(kernel.hadamard_quantize(x, packed=packed), whole)


def test_no_rows_and_one_row():
    for shape in ([0, 64], [2, 0, 64], [64], [2, 3, 6]):
        x = torch.ones(shape)
        assert_same(kernel.hadamard_quantize(x), reference.hadamard_quantize(x))


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.ones(2, 8, dtype=torch.int8), "x is torch.int8: use float16"),
        (torch.ones(2, 8, dtype=torch.float64), "x is torch.float64.*backend='torch'"),
        (torch.ones(8, 2).T, r"x \[2, 8\] is not contiguous"),
        (torch.ones(2, 7), "x has rows of 7: .* an even number"),
        (torch.ones(1, 53248), "x has rows of 53248: .* 65536 padded .*; use backend='torch'"),
        (torch.ones(1, 131_072), "x has rows of 131072: .* int32"),
    ],
)
def test_bad_rows_are_refused(x, message):
    with pytest.raises(KernelError, match=message):
        kernel.hadamard_quantize(x)


def test_plans_are_legal():
    """Plans multiply to their size and have products of at least 16; small sizes are never refused."""
    refused = []
    for k in [*range(2, 700, 2), *range(704, 32768, 448)]:
        try:
            p = kernel.plan(k)
        except KernelError:
            refused.append(k)
            continue
        f = hadamard.factor(k)
        assert (p.blocks, p.core, p.extra * p.middle * p.last) == (f.blocks, f.core, 1 << f.power)
        assert p.size <= kernel.LARGEST and p.first % 2 == 0
        assert all(n == 1 or 16 <= n <= 64 for n in (p.middle, p.last)) and p.middle <= p.last
        assert p.padded // p.slabs >= 16 and p.rows * p.padded_blocks * p.middle * p.last >= 16
        assert p.padded % p.chunk == 0 and p.padded >= p.first
    assert min(refused) > 2048


def test_variants_name_the_kernels_arguments():
    for v in kernel.variants():
        assert list(v.signature) == v.kernel.arg_names
        assert set(v.constants) == {n for n, kind in v.signature.items() if kind == "constexpr"}
        assert set(v.aligned) < set(v.signature)

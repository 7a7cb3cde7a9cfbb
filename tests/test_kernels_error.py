"""The kernel of a rotation's quantization error under Triton's interpreter, against the reference.

A code that flips at a tie leaves e² as it was, so no row needs an exception; what differs is the order in
which a row of x R is summed: fp32's 1e-7 of at most 15 steps a number, against a mean e² of 1/12 step²,
random in sign. Hence rtol 1e-4 a row. Where products and sums are
exact the comparison is at fp32's own precision.
"""

from __future__ import annotations

import pytest
import torch
from conftest import haar
from dfrot_kernels import common, error, reference
from dfrot_kernels.checks import KernelError
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


def rows(seed: int, count: int, d: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, d, generator=g) * 10.0 ** torch.randint(-2, 3, (count, 1), generator=g)
    x[0], x[1] = 0, x[1].abs() + 1
    x[2, d // 2] = 1e3  # a massive activation: xR is one row of R, large
    return x


@settings(max_examples=15)
@given(
    SEEDS,
    st.integers(3, 40),
    st.sampled_from([2, 7, 64, 100, 130, 200]),
    st.booleans(),
    st.sampled_from([1.0, 0.8]),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
)
def test_error_equals_the_reference(seed, count, d, symmetric, clip, kind, kind_r):
    x, r = rows(seed, count, d).to(kind), haar(d, seed % 5).to(kind_r)
    found = error.rotate_quantize_error(x, r, symmetric=symmetric, clip=clip)
    wanted = reference.rotate_quantize_error(x, r, symmetric=symmetric, clip=clip)
    assert found.dtype == torch.float32 and found.shape == (count,)
    size = (x.float() @ r.float()).square().amax(-1)
    assert not found[0]
    assert ((found - wanted).abs() <= 1e-4 * wanted + 1e-9 * size).all()


@settings(max_examples=25)
@given(
    SEEDS,
    st.integers(3, 40),
    st.sampled_from([1, 2, 7, 64, 100, 576, 2500]),
    st.booleans(),
    st.sampled_from([1.0, 0.8]),
)
def test_the_error_as_a_matrix_is_the_reference_bit_for_bit(seed, count, d, symmetric, clip):
    y = rows(seed, count, max(d, 2))[:, :d].contiguous()
    e, squared = error.quantize_error(y, symmetric=symmetric, clip=clip)
    wanted, wanted_squared = reference.quantize_error(y, symmetric=symmetric, clip=clip)
    assert e.shape == y.shape and squared.shape == (count,)
    assert torch.equal(e, wanted)
    assert_close(squared, wanted_squared, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_bad_row_has_no_error_matrix_and_spoils_no_other(bad, symmetric):
    y = rows(1, 20, 70)
    wanted, squared = error.quantize_error(y, symmetric=symmetric)
    y[4, 69] = bad
    e, found = error.quantize_error(y, symmetric=symmetric)
    others = torch.arange(20) != 4
    assert e[4].isnan().all() and found[4].isnan()
    assert torch.equal(e[others], wanted[others]) and torch.equal(found[others], squared[others])


def test_no_rows_have_no_error_matrix():
    e, squared = error.quantize_error(torch.zeros(0, 8))
    assert e.shape == (0, 8) and squared.shape == (0,)


@settings(max_examples=10)
@given(SEEDS, st.sampled_from([6, 65, 190]), st.booleans())
def test_without_rounding_in_the_product_only_the_last_sum_differs(seed, d, symmetric):
    x = rows(seed, 18, d)
    r = torch.eye(d)[torch.randperm(d, generator=torch.Generator().manual_seed(seed))]
    found = error.rotate_quantize_error(x, r, symmetric=symmetric)
    wanted = reference.rotate_quantize_error(x, r, symmetric=symmetric)
    assert_close(found, wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_numbers_on_the_grid_have_no_error(symmetric):
    q = torch.randint(-7, 8, (20, 96), generator=torch.Generator().manual_seed(0)).float()
    q[:, 0], q[:, 1] = 7, -8 + symmetric
    found = error.rotate_quantize_error(q * 0.25, torch.eye(96), symmetric=symmetric)
    assert torch.equal(found, torch.zeros(20))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_bad_row_is_nan_and_alone(bad, symmetric):
    x = rows(1, 20, 70)
    clean = error.rotate_quantize_error(x, torch.eye(70), symmetric=symmetric)
    x[17, 69] = bad
    found = error.rotate_quantize_error(x, torch.eye(70), symmetric=symmetric)
    assert torch.equal(found.isnan(), torch.arange(20) == 17)
    assert torch.equal(found[:17], clean[:17]) and torch.equal(found[18:], clean[18:])


def test_no_rows_and_launches_for_all_sizes():
    assert error.rotate_quantize_error(torch.zeros(0, 8), torch.eye(8)).shape == (0,)
    for dtype in DTYPES:
        blocks = [error._launch(n, dtype)[0]["BM"] for n in (1, 2000, 3000, 9000)]
        assert blocks == sorted(blocks) and blocks[0] >= 16  # tl.dot's least


@pytest.mark.parametrize("block", [32, 64])
def test_other_blocks_of_rows(monkeypatch, block):
    tile = {"BM": block, "BN": 32, "BK": 16}
    monkeypatch.setattr(error, "_launch", lambda rows, dtype: (tile, 4))
    x, r = rows(3, 70, 50), haar(50).float()
    wanted = reference.rotate_quantize_error(x, r)
    assert_close(error.rotate_quantize_error(x, r), wanted, rtol=1e-4, atol=0)


X, R = torch.zeros(4, 8), torch.eye(8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: error.rotate_quantize_error(X[0], R), r"x is \[8\]: 2 axes"),
        (
            lambda: error.rotate_quantize_error(X, R[:, :7].contiguous()),
            r"r is \[8, 7\].*must be 8",
        ),
        (lambda: error.rotate_quantize_error(X, R[:7]), r"r is \[7, 8\]: \[8, 8\] is needed"),
        (lambda: error.rotate_quantize_error(X.int(), R), "x is torch.int32: use float16"),
        (lambda: error.rotate_quantize_error(X, R.to(torch.int8)), "r is torch.int8: use float16"),
        (lambda: error.rotate_quantize_error(torch.zeros(8, 4).T, R), "x .*not contiguous"),
        (lambda: error.rotate_quantize_error(X, R, clip=0.0), "clip = 0.0: use a ratio"),
        (lambda: error.quantize_error(X[0]), r"y is \[8\]: 2 axes"),
        (lambda: error.quantize_error(X.half()), "y is torch.float16 .*use float32 rows"),
        (lambda: error.quantize_error(torch.zeros(1, 40_000)), "40000.*at most 16384"),
        (lambda: error.quantize_error(torch.zeros(8, 4).T), "y .*not contiguous"),
        (lambda: error.quantize_error(X, clip=0.0), "clip = 0.0: use a ratio"),
        (lambda: error.rotate_quantize_error(X, R, clip=1.5), "clip = 1.5: use a ratio"),
        (lambda: error.rotate_quantize_error(X.to("meta"), R), "put them on one device"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call()


def test_without_the_interpreter_a_cuda_device_is_needed(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    with pytest.raises(KernelError, match=r"tensors on cpu: Triton needs a CUDA device.*'torch'"):
        error.rotate_quantize_error(X, R)


def test_variants_name_each_argument():
    for variant in error.variants():
        wanted = {n for n, kind in variant.signature.items() if kind == "constexpr"}
        assert wanted == set(variant.constants) and set(variant.aligned) <= set(variant.signature)

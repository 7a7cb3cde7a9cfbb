"""Hadamard matrices: every claim is integer arithmetic, so almost every comparison is exact."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from dfrot_kernels import hadamard
from dfrot_kernels.hadamard import Factorization, core, factor, is_full, matrix, transform
from hypothesis import given, settings
from hypothesis import strategies as st

# n -> (core, power): hidden, intermediate and head sizes of current models, each a full Hadamard.
FULL = {
    64: (1, 6),
    80: (20, 2),
    112: (28, 2),
    128: (1, 7),
    576: (36, 4),
    1536: (12, 7),
    2048: (1, 11),
    2560: (20, 7),
    2880: (180, 4),
    3584: (28, 7),
    4096: (1, 12),
    4544: (284, 4),
    4864: (76, 6),
    5120: (20, 8),
    5632: (44, 7),
    8192: (1, 13),
    8960: (140, 6),
    9728: (76, 7),
    10944: (684, 4),
    11008: (344, 5),
    13824: (108, 7),
    14336: (28, 9),
    17408: (68, 8),
    18304: (572, 5),
    18944: (148, 7),
    25600: (100, 8),
    28672: (28, 10),
    29568: (924, 5),
    53248: (52, 10),
}
# n -> (blocks, core, power) where no construction reaches n; 428 = 4 · 107 is the known gap.
BLOCKED = {
    3: (3, 1, 0),
    6: (3, 1, 1),
    107: (107, 1, 0),
    13696: (107, 1, 7),
    27392: (107, 1, 8),
}
SMALL = [n for n in (*FULL, 3, 6, 36, 92, 107, 116, 156, 428, 668) if n <= 2560]

# Largest error of x H / √n relative to the largest output, with room for the order of summation:
# fp32 rounds about log2(n) ≈ 13 times (fp64 likewise); the halves round once, on the way out.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.float16: 2**-11 * 1.01,
    torch.bfloat16: 2**-8 * 1.01,
}


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normals(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_hadamard(h: np.ndarray) -> None:
    n = len(h)
    assert h.shape == (n, n)
    assert h.dtype == np.int8
    assert set(np.unique(h)) <= {-1, 1}
    wide = h.astype(np.float64)  # integers below 2^53 multiply exactly, and BLAS is fast
    np.testing.assert_array_equal(wide @ wide.T, n * np.eye(n))


# --- cores ---


@pytest.mark.parametrize("n", sorted({c for c, _ in FULL.values()}))
def test_cores_of_model_sizes_are_hadamard(n: int) -> None:
    assert_hadamard(core(n))


@pytest.mark.parametrize(
    ("n", "construction"),
    [
        (1, "sylvester"),
        (2, "sylvester"),
        (256, "sylvester"),
        (12, "paley1"),  # GF(11)
        (28, "paley1"),  # GF(3^3)
        (344, "paley1"),  # GF(7^3)
        (244, "paley1"),  # GF(3^5)
        (36, "paley2"),  # GF(17)
        (52, "paley2"),  # GF(5^2)
        (100, "paley2"),  # GF(7^2)
        (340, "paley2"),  # GF(13^2)
        (92, "williamson"),
        (116, "williamson"),
        (156, "williamson"),
        (40, "kronecker"),  # 2 · 20
        (144, "kronecker"),  # 2 · 72
        (400, "kronecker"),  # 2 · 200
    ],
)
def test_each_construction(n: int, construction: str) -> None:
    assert hadamard._recipe(n)[0] == construction
    assert_hadamard(core(n))


def test_every_order_below_172_and_known_gaps() -> None:
    gaps = [n for n in range(4, 429, 4) if not is_full(n)]
    assert gaps[:3] == [172, 188, 236]
    assert gaps[-1] == 428
    for n in range(4, 429, 4):
        if n not in gaps:
            assert_hadamard(core(n))


def test_core_is_cached_and_read_only() -> None:
    assert core(12) is core(12)
    with pytest.raises(ValueError, match="read-only"):
        core(12)[0, 0] = 0


def test_quadratic_character_counts_and_multiplies() -> None:
    for p, k in ((11, 1), (3, 3), (5, 2), (7, 3)):
        chi = hadamard._quadratic_character(p, k)
        assert chi[0] == 0
        assert (chi == 1).sum() == (chi == -1).sum() == (p**k - 1) // 2
    prime = hadamard._quadratic_character(103, 1)  # over GF(p), Euler's criterion is independent
    assert [pow(a, 51, 103) for a in range(103)] == [c % 103 for c in prime.tolist()]


# --- factorization ---


@pytest.mark.parametrize(("n", "expected"), FULL.items())
def test_model_sizes_are_full(n: int, expected: tuple[int, int]) -> None:
    assert factor(n) == Factorization(1, *expected)
    assert is_full(n)


@pytest.mark.parametrize(("n", "expected"), BLOCKED.items())
def test_block_diagonal_fallback(n: int, expected: tuple[int, int, int]) -> None:
    assert factor(n) == Factorization(*expected)
    assert not is_full(n)


@given(st.integers(1, 60_000))
def test_factor_is_exact_and_minimal(n: int) -> None:
    f = factor(n)
    assert n == f.blocks * f.core * 2**f.power == f.blocks * f.order
    assert f.core == 1 or f.core % 4 == 0
    if f.core % 2 == 0:  # no smaller core with a larger power of two
        assert not is_full(f.core // 2) or f.core == 2
    if n % 2:
        assert f == Factorization(n, 1, 0)
    assert is_full(f.order)
    assert is_full(n) == (f.blocks == 1)


def test_factorization_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        factor(12).core = 1


# --- matrix ---


@pytest.mark.parametrize("power", [0, 1, 5, 8])
def test_sylvester_matches_its_definition(power: int) -> None:
    n = 1 << power
    signs = [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    np.testing.assert_array_equal(matrix(n), signs)


def test_sylvester_matches_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    np.testing.assert_array_equal(matrix(512), linalg.hadamard(512))


@pytest.mark.parametrize("n", [6, 428, 642])
def test_blocked_matrix_is_block_diagonal(n: int) -> None:
    f, h = factor(n), matrix(n)
    assert f.blocks > 1
    inside = np.kron(np.eye(f.blocks), np.ones((f.order, f.order)))
    np.testing.assert_array_equal(np.abs(h), inside)
    np.testing.assert_array_equal(h.astype(int) @ h.T, f.order * np.eye(n))


def test_odd_size_is_the_identity() -> None:
    np.testing.assert_array_equal(matrix(107), np.eye(107))
    x = normals(2, 107)
    y = transform(x)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


# --- transform ---


@pytest.mark.parametrize("n", [*FULL, *BLOCKED])
def test_transform_inverts_exactly_at_full_size(n: int) -> None:
    x, order = integers(2, n), factor(n).order
    there = transform(x, normalize=False)
    assert torch.equal(transform(there, transpose=True, normalize=False), order * x)
    back = transform(x, transpose=True, normalize=False)
    assert torch.equal(transform(back, normalize=False), order * x)


@pytest.mark.parametrize("n", SMALL)
def test_transform_is_the_dense_product(n: int) -> None:
    x, h = integers(3, n), torch.from_numpy(matrix(n)).to(torch.int64)
    assert torch.equal(transform(x, normalize=False), x @ h)
    assert torch.equal(transform(x, transpose=True, normalize=False), x @ h.T)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.booleans(), st.integers(0, 3))
def test_transform_is_the_dense_product_for_any_size(n: int, transpose: bool, rows: int) -> None:
    x, h = integers(rows, n, seed=n), torch.from_numpy(matrix(n)).to(torch.int64)
    assert torch.equal(transform(x, transpose, normalize=False), x @ (h.T if transpose else h))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n", [1536, 4096, 11008, 13696])
def test_normalized_transform_is_orthogonal(n: int, dtype: torch.dtype) -> None:
    x = normals(5, n).to(dtype)
    y = transform(x)
    assert y.dtype == dtype
    exact = transform(x.double())
    assert (y.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()
    torch.testing.assert_close(exact.norm(dim=-1), x.double().norm(dim=-1))
    torch.testing.assert_close(transform(exact, transpose=True), x.double())


@pytest.mark.parametrize("n", [1536, 4096])
def test_one_hot_spreads_evenly(n: int) -> None:
    x = torch.zeros(n)
    x[n // 3] = 100.0
    magnitudes = transform(x).abs().unique()
    assert magnitudes.numel() == 1  # the reason a spike has no symmetric quantization error
    assert magnitudes.item() == pytest.approx(100 / math.sqrt(n), rel=1e-6)


def test_half_precision_accumulates_wide() -> None:
    x = torch.full((1, 4096), 40.0, dtype=torch.float16)  # the plain sum 163840 overflows fp16
    y = transform(x)
    assert y[0, 0].item() == 40.0 * 64
    assert not y[0, 1:].any()


@pytest.mark.parametrize("shape", [(36,), (0, 36), (2, 0, 36), (1, 1, 36), (2, 3, 5, 36)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    x = integers(*shape)
    y = transform(x, normalize=False)
    assert y.shape == x.shape
    assert torch.equal(y, x @ torch.from_numpy(matrix(36)).to(torch.int64))
    assert transform(x.float()).shape == x.shape


def test_strided_input_is_left_alone() -> None:
    base = integers(80, 7)
    before = base.clone()
    y = transform(base.T, normalize=False)
    assert torch.equal(y, transform(before.T.contiguous(), normalize=False))
    assert torch.equal(base, before)


@pytest.mark.parametrize("n", [1536, 4096, 214])
def test_nan_stays_in_its_row(n: int) -> None:
    x = normals(63, n, dtype=torch.float32)
    clean = transform(x)
    x[17, n // 2] = math.nan
    y = transform(x)
    rows = torch.arange(63) != 17
    torch.testing.assert_close(y[rows], clean[rows])
    order = factor(n).order
    start = n // 2 // order * order
    assert y[17, start : start + order].isnan().all()
    assert y[17].isnan().sum() == order  # other blocks of the same row are untouched


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integers_keep_their_dtype(dtype: torch.dtype) -> None:
    x = integers(4, 12, dtype=dtype)
    y = transform(x, normalize=False)
    assert y.dtype == dtype
    assert torch.equal(y.long(), transform(x.long(), normalize=False))


def test_gradient_is_the_transpose() -> None:
    hadamard._kronecker_factors.cache_clear()
    with torch.inference_mode():
        transform(normals(1, 24))  # must not leave inference tensors in the cache
    x = normals(3, 24).requires_grad_()
    g = normals(3, 24)
    transform(x).backward(g)
    torch.testing.assert_close(x.grad, transform(g, transpose=True))


# --- errors ---


@pytest.mark.parametrize("n", [3, 6, 428, 668])
def test_core_names_the_order_and_the_fallback(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n={n}\b.*factor\({n}\)"):
        core(n)


@pytest.mark.parametrize("function", [core, factor, is_full, matrix])
def test_sizes_must_be_positive_integers(function) -> None:
    for n in (0, -4):
        with pytest.raises(ValueError, match=f"got {n}"):
            function(n)
    for n in (12.0, "12", None):
        with pytest.raises(TypeError, match="must be an integer"):
            function(n)
    assert function(np.int64(12)) is not None


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        ([1.0, 2.0], TypeError, "got list"),
        (torch.ones(4, dtype=torch.bool), TypeError, r"torch\.bool"),
        (torch.ones(4, dtype=torch.complex64), TypeError, r"torch\.complex64"),
        (torch.ones(4, dtype=torch.int64), TypeError, "normalize=False"),
        (torch.tensor(1.0), ValueError, r"shape \(\)"),
        (torch.ones(3, 0), ValueError, r"shape \(3, 0\)"),
    ],
)
def test_transform_rejects(x, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        transform(x)


def test_integer_overflow_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"128\] do not fit torch\.int8"):
        transform(torch.ones(128, dtype=torch.int8), normalize=False)


def test_integers_off_the_cpu_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"x\.cpu\(\)"):
        transform(torch.ones(4, dtype=torch.int64, device="meta"), normalize=False)

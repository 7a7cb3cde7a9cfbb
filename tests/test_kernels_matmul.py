"""The W4A4 and W4A16 products under the interpreter: exact integers, every tile, the reference's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
import torch
from dfrot_kernels import checks, matmul, matmul_fp, reference
from dfrot_kernels.matmul import Plan
from dfrot_kernels.reference import Tokens, Weight
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = pytest.mark.poisoned
SEEDS = st.integers(0, 2**16)
EVEN = st.integers(1, 260).map(lambda half: 2 * half)
CASES = settings(max_examples=10)
PLANS = [*dict.fromkeys(matmul.plan(*s) for s in matmul.SHAPES), Plan(16, 64, 128, 16, 4, 4)]
FP_PLANS = [*dict.fromkeys(matmul_fp.plan(*s) for s in matmul.SHAPES), Plan(16, 64, 64, 16, 4, 4)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(m: int, k: int, seed: int) -> Tensor:
    return torch.randint(-8, 8, (m, k), generator=generator(seed), dtype=torch.int8)


def weight(n: int, k: int, seed: int) -> Weight:
    scale = torch.rand(n, generator=generator(seed)) + 0.01
    return reference.pack_weight(codes(n, k, seed), scale)


def tokens(m: int, k: int, seed: int, **options) -> Tokens:
    """Quantized rows of all scales: one of zeros, one with a huge outlier, one with NaN, one with Inf."""
    x = torch.randn(m, k, generator=generator(seed))
    x *= 10.0 ** torch.randint(-3, 4, (m, 1), generator=generator(seed))
    for row, value in enumerate([0.0, 1e6, torch.nan, torch.inf]):
        if row < m - 1:
            x[row, :: k if row else 1] = value
    return reference.quantize_int4(x, **options)


@contextmanager
def launched(module: ModuleType, p: Plan | None) -> Iterator[None]:
    """`module` launches as in p; as it would where p is None."""
    with pytest.MonkeyPatch.context() as patch:
        if p is not None:
            patch.setattr(module, "plan", lambda *_, **__: p)
        yield


def same(a: Tensor, b: Tensor) -> None:
    """Equal to the last bit, NaN where NaN is."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --- W4A4 -----------------------------------------------------------------------------------------


@CASES
@given(
    st.integers(1, 150), st.integers(1, 140), EVEN, SEEDS, st.sampled_from([None, *PLANS]),
    st.booleans(),
)  # fmt: skip
@example(1, 1, 2, 0, None, True)
@example(16, 65, 258, 1, None, False)  # K/2 odd and one byte more than a step
@example(17, 63, 254, 2, None, True)
@example(33, 70, 2050, 3, None, False)  # in parts, the last step ragged
@example(65, 64, 128, 4, None, True)
@example(130, 260, 130, 5, PLANS[0], False)
def test_integers_are_exact(m, n, k, seed, p, packed):
    q, w = codes(m, k, seed), codes(n, k, seed + 1)
    q[m // 2], w[n // 2] = -8, -8
    wanted = q.long() @ w.long().T
    scale, zero = torch.ones(m), torch.zeros(m, dtype=torch.int32)
    x = Tokens(reference.pack(q) if packed else q, scale, zero)
    with launched(matmul, p):
        found = matmul.matmul(x, reference.pack_weight(w, torch.ones(n)), dtype=torch.float32)
    assert torch.equal(found.long(), wanted)


@CASES
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 90)), st.integers(1, 150), EVEN, SEEDS,
    st.sampled_from([None, *PLANS]), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from([torch.float16, torch.float32]),
)  # fmt: skip
@example((1, 5), 70, 2050, 0, None, False, True, True, torch.float16)
@example((2, 70), 70, 130, 0, None, False, False, True, torch.float16)
def test_equals_the_reference(shape, n, k, seed, p, symmetric, packed, biased, dtype):
    x = tokens(shape[0] * shape[1], k, seed, symmetric=symmetric, packed=packed)
    x = Tokens(*(part.unflatten(0, shape) for part in x))
    bias = torch.randn(n, generator=generator(seed)).to(dtype) if biased else None
    w = weight(n, k, seed)
    with launched(matmul, p):
        found = matmul.matmul(x, w, bias, dtype=dtype)
    assert found.dtype == dtype and found.shape == (*shape, n)
    same(found, reference.matmul(x, w, bias, dtype=dtype))


def test_rows_with_nan_or_inf_are_nan_and_leave_the_others():
    found = matmul.matmul(tokens(20, 64, 0), weight(10, 64, 0))
    assert found.isnan().all(-1).tolist() == [False, False, True, True] + [False] * 16
    assert (found[0] == 0).all()


def test_bf16_is_the_fp32_result_rounded():
    x, w = tokens(40, 96, 0), weight(50, 96, 0)
    found, wanted = (matmul.matmul(x, w, dtype=t) for t in (torch.bfloat16, torch.float32))
    assert found.dtype == torch.bfloat16
    # the interpreter cuts digits off where a GPU rounds
    torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("packed", [False, True])
def test_the_longest_row_of_the_largest_products_fits_int32(packed):
    q = torch.full((1, checks.MAX_K), -8, dtype=torch.int8)
    x = Tokens(reference.pack(q) if packed else q, torch.ones(1), torch.zeros(1, dtype=torch.int32))
    found = matmul.matmul(x, reference.pack_weight(q, torch.ones(1)), dtype=torch.float32)
    assert found.item() == 64 * checks.MAX_K


def test_no_tokens_or_no_channels():
    for m, n in ((0, 12), (5, 0)):
        assert matmul.matmul(tokens(m, 32, 0), weight(n, 32, 0)).shape == (m, n)
        assert matmul_fp.matmul_fp(torch.ones(m, 32), weight(n, 32, 0)).shape == (m, n)
    x = reference.quantize_int4(torch.ones(2, 0, 32))
    assert matmul.matmul(x, weight(12, 32, 0)).shape == (2, 0, 12)


def broken(**parts) -> tuple[Tokens, Weight]:
    """Tokens [4, 32] and a weight [6, 32] with some parts exchanged, as x_codes=…, w_packed=…"""
    x, w = tokens(4, 32, 0, packed=False), weight(6, 32, 0)
    mine = {name[2:]: part for name, part in parts.items() if name[0] == "x"}
    return x._replace(**mine), w._replace(**{k[2:]: v for k, v in parts.items() if k[0] == "w"})


BYTES = torch.zeros(6, 64, dtype=torch.int8)


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"x_codes": torch.zeros(4, 32, dtype=torch.uint8)}, "x.codes is torch.uint8"),
        ({"x_codes": torch.zeros(4, 32)}, "x.codes is torch.float32"),
        ({"x_codes": BYTES[:4, :30].contiguous()}, "x.codes is .4, 30.*last axis must be 32"),
        ({"x_codes": BYTES[:4, ::2]}, "x.codes .4, 32. is not contiguous"),
        ({"x_scale": torch.ones(5)}, "x.scale is .5.: .4. is needed"),
        ({"x_zero": torch.zeros(1, dtype=torch.int32)}, "x.zero is .1.: .4. is needed"),
        ({"x_zero": torch.zeros(4)}, "x.zero is torch.float32: int32"),
        ({"x_scale": torch.ones(4, device="meta")}, "put them on one device"),
        ({"w_packed": BYTES[:, :16].short()}, "w.packed is torch.int16"),
        ({"w_packed": BYTES[None, :, :16]}, "w.packed is .1, 6, 16.: 2 axes"),
        ({"w_packed": BYTES[:, 1:17]}, "w.packed .6, 16. is not contiguous"),
        ({"w_packed": BYTES[:, :0]}, "w has rows of 0"),
        ({"w_scale": torch.ones(5)}, "w.scale is .5.: its last axis must be 6"),
        ({"w_sums": torch.ones(6, 1)}, "w.sums is .6, 1.: 1 axes"),
        ({"w_sums": torch.ones(6)}, "w.sums is torch.float32: int32"),
        ({"w_sums": torch.ones(6, dtype=torch.int32, device="meta")}, "put them on one device"),
    ],
)
def test_bad_parts_are_named(parts, message):
    x, w = broken(**parts)
    with pytest.raises(checks.KernelError, match=message):
        matmul.matmul(x, w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_bad_output_types_are_named(dtype):
    with pytest.raises(checks.KernelError, match=f"dtype = {dtype}: use float16"):
        matmul.matmul(*broken(), dtype=dtype)


@pytest.mark.parametrize("size, device", [(5, "cpu"), (7, "cpu"), (6, "meta")])
def test_a_bias_that_does_not_fit(size, device):
    message = "bias is" if size != 6 else "put them on one device"
    x, w = broken()
    bias = torch.zeros(size, device=device)
    with pytest.raises(checks.KernelError, match=message):
        matmul.matmul(x, w, bias)
    with pytest.raises(checks.KernelError, match=message):
        matmul_fp.matmul_fp(torch.ones(4, 32), w, bias)


def test_rows_too_long_for_int32():
    half = checks.MAX_K // 2 + 1
    w = Weight(torch.zeros(1, half, dtype=torch.int8), torch.ones(1), torch.zeros(1).int())
    x = Tokens(torch.zeros(1, half, dtype=torch.int8), torch.ones(1), torch.zeros(1).int())
    with pytest.raises(checks.KernelError, match=f"rows of {2 * half}.*can leave int32"):
        matmul.matmul(x, w)
    with pytest.raises(checks.KernelError, match=f"rows of {2 * half}.*can leave int32"):
        matmul_fp.matmul_fp(torch.ones(1, 2 * half), w)


# --- W4A16 ----------------------------------------------------------------------------------------


@CASES
@given(
    st.integers(1, 150), st.integers(1, 140), EVEN, SEEDS, st.sampled_from([None, *FP_PLANS]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.booleans(),
)  # fmt: skip
@example(3, 70, 2050, 0, None, torch.float16, True)
@example(16, 65, 130, 1, None, torch.bfloat16, True)
@example(70, 65, 66, 2, None, torch.float32, False)
def test_floating_point_is_within_the_bound_of_its_sum(m, n, k, seed, p, dtype, biased):
    """|error| ≤ K ε Σ|x w| for a sum in fp32, in any order, and an ulp of the output's type."""
    x = torch.randn(m, k, generator=generator(seed)).to(dtype)
    x[m // 2] = 0
    w = weight(n, k, seed)
    bias = torch.randn(n, generator=generator(seed)).to(dtype) if biased else None
    with launched(matmul_fp, p):
        found = matmul_fp.matmul_fp(x, w, bias)
    full = reference.unpack(w.packed).double() * w.scale.double()[:, None]
    wanted = x.double() @ full.T + (0 if bias is None else bias.double())
    bound = (k + 4) * 2.0**-24 * (x.double().abs() @ full.abs().T + 5)
    bound += torch.finfo(dtype).eps * wanted.abs()
    assert found.dtype == dtype and found.shape == (m, n)
    assert ((found.double() - wanted).abs() <= bound).all()


@CASES
@given(st.integers(1, 150), st.integers(1, 140), EVEN, SEEDS, st.sampled_from([None, *FP_PLANS]))
@example(5, 70, 2050, 0, None)
@example(130, 130, 130, 1, FP_PLANS[0])
def test_floating_point_integers_are_exact(m, n, k, seed, p):
    q, w = codes(m, k, seed), codes(n, k, seed + 1)
    q[0], w[0] = -8, -8
    with launched(matmul_fp, p):
        found = matmul_fp.matmul_fp(q.float(), reference.pack_weight(w, torch.ones(n)))
    assert torch.equal(found.long(), q.long() @ w.long().T)


def test_floating_point_rows_keep_their_nan_and_inf():
    x = torch.randn(3, 4, 34, generator=generator(0))
    x[0, 1, 5], x[2, 3, 33], x[1, 0, 0] = torch.nan, torch.inf, 1e6
    w = weight(9, 34, 0)
    found = matmul_fp.matmul_fp(x, w)
    torch.testing.assert_close(found, reference.matmul_fp(x, w), equal_nan=True)
    assert not found[2, 3].isfinite().any() and found.isnan().sum() < 2 * 9


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.ones(4, 32, dtype=torch.int8), "x is torch.int8: use float16"),
        (torch.ones(4, 32, dtype=torch.float64), "x is torch.float64: use float16"),
        (torch.ones(4, 31), "x is .4, 31.: its last axis must be 32"),
        (torch.ones(4, 16), "x is .4, 16.: its last axis must be 32"),
        (torch.ones(4, 64)[:, ::2], "x .4, 32. is not contiguous"),
        (torch.ones(4, 32, device="meta"), "put them on one device"),
    ],
)
def test_bad_floating_point_tokens_are_named(x, message):
    with pytest.raises(checks.KernelError, match=message):
        matmul_fp.matmul_fp(x, weight(6, 32, 0))


# --- what the interpreter cannot run --------------------------------------------------------------


def assembled(code: str, word: int, outputs: int) -> list[np.ndarray]:
    """The output registers, as uint32, of inline PTX given one input register."""
    ones, registers = 0xFFFFFFFF, {f"${outputs}": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def halves(words: list[int], kind: str) -> Tensor:
        """Two 16-bit floats a word, in fp64, where a product and a sum of them are exact."""
        pairs = torch.tensor(np.array(words, np.uint32).view(np.int16)).reshape(-1, 2)
        return pairs.view(torch.float16 if kind == "f16x2" else torch.bfloat16).double()

    for line in code.strip("{}").replace("\n", "").split(";"):
        if not line or line.startswith(".reg"):
            continue
        operation, rest = line.split(maxsplit=1)
        to, *names = rest.replace(" ", "").split(",")
        a, b, c, d = [*map(value, names), 0, 0, 0][:4]
        match operation.split("."):
            case ["mov", "b32"]:
                made = a
            case ["shl", "b32"]:
                made = a << b & ones
            case ["shr", "b32"]:
                made = a >> b
            case ["and", "b32"]:
                made = a & b
            case ["lop3", "b32"]:
                bits = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32)]
                made = sum((d >> bit & 1) << i for i, bit in enumerate(bits))
            case ["prmt", "b32"]:
                chosen = [(b << 32 | a) >> 8 * (c >> 4 * i & 7) & 255 for i in range(4)]
                made = int.from_bytes(bytes(chosen), "little")
            case ["fma", "rn", kind]:
                x, y, z = halves([a, b, c], kind)
                bits = (x * y + z).to(torch.float16 if kind == "f16x2" else torch.bfloat16)
                made = int(bits.view(torch.int16).numpy().view(np.uint32)[0])
        registers[to] = made
    return [np.array(registers[f"${i}"], np.uint32) for i in range(outputs)]


def test_assembly_gives_the_codes_of_every_byte():
    """Run by the little machine above: a GPU runs these lines where the interpreter shifts bytes."""
    for byte in range(256):
        data = np.array([byte, byte ^ 0x5A, 255 - byte, 37], np.uint8)
        word = int(data.view(np.uint32)[0])
        low, high = reference.unpack(torch.from_numpy(data.view(np.int8))).int().chunk(2)
        made = assembled(matmul.NIBBLES16.value, word, 2)
        assert [x.reshape(1).view(np.int8).tolist() for x in made] == [
            (16 * low).tolist(),
            (16 * high).tolist(),
        ]
        for code, dtype in (
            (matmul_fp.FP16_CODES, torch.float16),
            (matmul_fp.BF16_CODES, torch.bfloat16),
        ):
            words = np.array(assembled(code.value, word, 4), np.uint32).view(np.int16)
            found = torch.from_numpy(words).view(dtype)
            assert found.tolist() == [*low.tolist(), *high.tolist()]


# --- plans ----------------------------------------------------------------------------------------


@given(st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, checks.MAX_K // 2))
def test_plans_are_legal(m, n, half):
    p = matmul.plan(m, n, 2 * half)
    assert p.step >= 32 and p.channels >= 64 and p.tokens >= 16  # what int8 dot and wgmma need
    assert p.split == 1 or (m <= p.tokens and p.split <= -(-half // p.step))
    for size in (2, 4):
        assert matmul_fp.plan(m, n, 2 * half, size).step * size >= 64


@pytest.mark.parametrize("n, k", [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)])
def test_plans_give_processors_work(n, k):
    """At the sizes measured, nearly a program a processor, and one tile of tokens where they are few."""
    for m in (1, 4, 16, 64, 256, 2048, 8192):
        p = matmul.plan(m, n, k)
        programs = -(-m // p.tokens) * -(-n // p.channels) * p.split
        assert programs >= 99
        assert (p.split > 1) <= (m <= p.tokens)
    assert matmul.plan(8192, n, k)[:2] == (128, 256)

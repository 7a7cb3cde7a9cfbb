"""Exercises of notebook 07: a reader's function goes through the checks that our own kernels pass.

`check` takes what the notebook's cell defines (for a kernel the plain function: `triton.jit` and the launch
are here), `examine` a function with the signature of its twin in `dfrot_kernels.reference`. The outputs that
a kernel is handed are full of garbage, so that what it leaves out shows. A wrong answer, or an error in it,
is a red report with the first case that shows it, never an exception.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

import torch
from dfrot_kernels import reference
from dfrot_kernels.reference import Tokens, Weight
from torch import Tensor

from dfrot_lab.answers import Case, Comparison, Report, grade

__all__ = ["EXERCISES", "Exercise", "Report", "check", "examine"]

GARBAGE = 77  # what an output's integers hold before the kernel runs; floats hold NaN


@dataclass(frozen=True)
class Exercise:
    """cases: what is tried; host: makes of the reader's function one with the reference's signature.

    twin: the function of a backend's module (`dfrot_kernels.backends`) that has to pass as well.
    """

    cases: Callable[[], Iterator[Case]]
    twin: Callable[[ModuleType], Callable]
    host: Callable[[Any], Callable] | None = None  # None: plain torch

    @property
    def kernel(self) -> bool:
        """Whether the reader writes a Triton kernel."""
        return self.host is not None


def check(name: str, candidate: Any) -> Report:
    """Try the reader's `candidate` for exercise `name`; ValueError for a name that is none."""
    exercise = _named(name)
    if not exercise.kernel:
        return examine(name, candidate)
    if find_spec("triton") is None:
        return Report(name, "needs triton", "it is not installed here (Linux has it)")
    if _device() == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return Report(name, "needs triton", "without a GPU, set TRITON_INTERPRET=1 first")

    def launched(*arguments: Any) -> Any:  # compiled in here, where an error becomes a report
        return exercise.host(_jitted(candidate))(*arguments)

    return examine(name, launched)


def examine(name: str, function: Callable) -> Report:
    """Try `function`, of the signature of the exercise's twin, on every case."""
    device, cases = _device(), _named(name).cases()
    return grade(name, function, cases, Comparison(exact_type=True, unwritten=GARBAGE), device)


# --- cases: small ones first, so that the first counter-example can be read ----------------------


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-8, 8, shape, generator=_random(seed), dtype=torch.int8)


def _pack_cases() -> Iterator[Case]:
    every = torch.arange(-8, 8, dtype=torch.int8)
    found = {
        "two codes, one byte": torch.tensor([[5, 3]], dtype=torch.int8),
        "negative codes": torch.tensor([[-1, 2], [2, -1]], dtype=torch.int8),
        "halves, not neighbours": torch.tensor([[1, 2, 3, 4]], dtype=torch.int8),
        "every code beside every other": torch.cartesian_prod(every, every),
        "a batch of ragged rows": _codes(2, 3, 70),
    }
    for about, codes in found.items():
        yield Case(about, (codes,), reference.pack(codes))


def _rows() -> dict[str, Tensor]:
    """Rows to quantize, [T, K] with K even."""
    normal = torch.randn(3, 32, generator=_random(0))
    outlier = torch.randn(2, 96, generator=_random(1))
    outlier[1, 5] = 1e4
    return {
        "easy numbers": torch.tensor([[7.0, -7.0, 3.0, 0.0]]),
        "ties go to the even code": torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -3.5, 6.5, -7.0]]),
        "normal numbers": normal,
        "K = 10, which is no power of two": torch.randn(2, 10, generator=_random(2)),
        "a row of zeros": torch.tensor([[0.0] * 6, [1, -2, 3, -4, 5, -6]]),
        "all of one sign": torch.stack([normal[0].abs(), -normal[0].abs() - 1]),
        "one huge outlier": outlier,
        "fp16": normal.half(),
    }


def _codes_cases() -> Iterator[Case]:
    for about, x in _rows().items():
        yield Case(about, (x,), reference.quantize_int4(x, symmetric=True, packed=False))


def _quantize_pack_cases() -> Iterator[Case]:
    for about, x in _rows().items():
        yield Case(about, (x,), reference.quantize_int4(x))


def _product_cases() -> Iterator[Case]:
    sizes = {
        "one token, zero point 0": (1, 2, 4, True),
        "one token, its zero point": (1, 2, 4, False),
        "16 tokens, K = 128": (16, 32, 128, False),
        "ragged: 5 tokens, 19 channels, K = 74": (5, 19, 74, False),
        "17 tokens, K = 2": (17, 3, 2, False),
    }
    for about, (tokens, channels, k, symmetric) in sizes.items():
        codes = _codes(channels, k, seed=k)
        codes[0, 0] = -8
        w = reference.pack_weight(codes, torch.rand(channels, generator=_random(k)) + 0.1)
        x = torch.randn(tokens, k, generator=_random(tokens)) + 0.3
        x = reference.quantize_int4(x, symmetric=symmetric)
        yield Case(about, (x, w), reference.matmul(x, w, dtype=torch.float32))


# --- hosts: allocate garbage, launch --------------------------------------------------------------


def _full(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    value = torch.nan if dtype.is_floating_point else GARBAGE
    return torch.full(shape, value, dtype=dtype, device=like.device)


def _codes_host(kernel: Any) -> Callable:
    """kernel[(T,)](x, codes, scale, K, BLOCK), BLOCK the next power of two."""

    def quantize(x: Tensor) -> Tokens:
        rows, k = x.shape
        codes, scale = _full((rows, k), torch.int8, x), _full((rows,), torch.float32, x)
        kernel[(rows,)](x, codes, scale, k, BLOCK=_power_of_two(k))
        return Tokens(codes, scale, torch.zeros(rows, dtype=torch.int32, device=x.device))

    return quantize


def _quantize_pack_host(kernel: Any) -> Callable:
    """kernel[(T,)](x, packed, scale, zero, HALF, BLOCK), HALF = K/2."""

    def quantize(x: Tensor) -> Tokens:
        rows, k = x.shape
        packed, scale = _full((rows, k // 2), torch.int8, x), _full((rows,), torch.float32, x)
        zero = _full((rows,), torch.int32, x)
        kernel[(rows,)](x, packed, scale, zero, k // 2, BLOCK=_power_of_two(k // 2))
        return Tokens(packed, scale, zero)

    return quantize


def _product_host(kernel: Any) -> Callable:
    """kernel[(M/BM, N/BN)](x, its scale and zero, w, its scale and sums, y, M, N, HALF, BM, BN, BK)."""

    def product(x: Tokens, w: Weight) -> Tensor:
        (m, half), n = x.codes.shape, len(w.scale)
        y = _full((m, n), torch.float32, x.scale)
        grid = (-(-m // 16), -(-n // 16))
        kernel[grid](*x, *w, y, m, n, half, BM=16, BN=16, BK=32)
        return y

    return product


EXERCISES = {
    "pack": Exercise(_pack_cases, lambda ops: ops.pack),
    "codes": Exercise(
        _codes_cases,
        lambda ops: partial(ops.quantize_int4, symmetric=True, packed=False),
        _codes_host,
    ),
    "quantize_pack": Exercise(
        _quantize_pack_cases, lambda ops: ops.quantize_int4, _quantize_pack_host
    ),
    "product": Exercise(
        _product_cases, lambda ops: partial(ops.matmul, dtype=torch.float32), _product_host
    ),
}


# --- where it runs --------------------------------------------------------------------------------


def _named(name: str) -> Exercise:
    if name not in EXERCISES:
        raise ValueError(f"exercise {name!r} is unknown: use one of {', '.join(EXERCISES)}")
    return EXERCISES[name]


def _device() -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "cuda" if torch.cuda.is_available() and not interpreted else "cpu"


def _jitted(candidate: Any) -> Any:
    import triton

    return triton.jit(candidate) if isinstance(candidate, FunctionType) else candidate


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()

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
from html import escape
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from dfrot_kernels import reference
from dfrot_kernels.reference import Tokens, Weight
from torch import Tensor

__all__ = ["EXERCISES", "Exercise", "Report", "check", "examine"]

GARBAGE = 77  # what an output's integers hold before the kernel runs; floats hold NaN
SHOWN = 16  # numbers of an argument
GREEN, RED, GREY = "#009E73", "#D55E00", "#7F7F7F"


@dataclass(frozen=True)
class Report:
    """What came of a check; state: "passed", "failed" or "needs triton". True when it passed."""

    name: str
    state: str
    text: str
    example: str = ""

    def __bool__(self) -> bool:
        return self.state == "passed"

    @property
    def headline(self) -> str:
        """One line, its sign and words saying what the colour does."""
        sign = {"passed": "✓", "failed": "✗"}.get(self.state, "–")
        return f"{sign} {self.name} {self.state}: {self.text}"

    def __str__(self) -> str:
        return "\n".join(filter(None, [self.headline, self.example]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        colour = {"passed": GREEN, "failed": RED}.get(self.state, GREY)
        box = f"border-left: 4px solid {colour}; padding: 0.2em 0.8em"
        more = f"<pre>{escape(self.example)}</pre>" if self.example else ""
        return (
            f'<div style="{box}"><b style="color: {colour}">{escape(self.headline)}</b>{more}</div>'
        )


class Case(NamedTuple):
    """What it is about, the arguments, and what the reference says."""

    about: str
    arguments: tuple
    expected: Any


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
    cases = list(_named(name).cases())
    for i, case in enumerate(cases, 1):
        try:
            found = function(*_moved(case.arguments))
            wrong = _difference(found, case.expected)
        except Exception as error:  # a reader's function may raise anything
            wrong = f"raises {type(error).__name__}: {_cause(error)}"
        if wrong:
            text = f"case {i} of {len(cases)}, {case.about}"
            return Report(name, "failed", text, f"{wrong}\n\n{_shown(case.arguments)}")
    return Report(name, "passed", f"{len(cases)} of {len(cases)} cases")


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


# --- the comparison, and what is said of it -------------------------------------------------------


def _named(name: str) -> Exercise:
    if name not in EXERCISES:
        raise ValueError(f"exercise {name!r} is unknown: use one of {', '.join(EXERCISES)}")
    return EXERCISES[name]


def _device() -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "cuda" if torch.cuda.is_available() and not interpreted else "cpu"


def _moved(arguments: tuple) -> tuple:
    """The arguments on the device, cloned: a function that writes to them spoils its own copy."""
    device = _device()
    return tuple(
        type(a)(*(t.to(device, copy=True) for t in a))
        if isinstance(a, tuple)
        else a.to(device, copy=True)
        for a in arguments
    )


def _jitted(candidate: Any) -> Any:
    import triton

    return triton.jit(candidate) if isinstance(candidate, FunctionType) else candidate


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _difference(found: Any, expected: Any) -> str:
    """Empty if `found` is `expected`, else the first place where it is not."""
    if isinstance(expected, tuple):
        if not isinstance(found, tuple) or len(found) != len(expected):
            return f"returns {type(found).__name__}: {type(expected).__name__} is wanted"
        pairs = zip(expected._fields, found, expected, strict=True)
        return next(filter(None, (_part(n, f, e) for n, f, e in pairs)), "")
    return _part("result", found, expected)


def _part(name: str, found: Any, expected: Tensor) -> str:
    if not isinstance(found, Tensor):
        return f"{name} is {type(found).__name__}: a tensor is wanted"
    if found.dtype != expected.dtype or found.shape != expected.shape:
        wanted = f"{expected.dtype} {list(expected.shape)}"
        return f"{name} is {found.dtype} {list(found.shape)}: {wanted} is wanted"
    found = found.cpu()
    if (
        expected.is_floating_point()
    ):  # the last place may differ where a GPU fuses a product and a sum
        wrong = ~torch.isclose(found, expected, rtol=1e-6, atol=0, equal_nan=True)
    else:
        wrong = found != expected
    if not wrong.any():
        return ""
    at = wrong.nonzero()[0].tolist()
    value, right = found[tuple(at)].item(), expected[tuple(at)].item()
    garbage = found.isnan() if expected.is_floating_point() else found == GARBAGE
    was = "was never written" if garbage[wrong].all() else f"is {value:.7g}"
    share = f"{int(wrong.sum()):,} of {wrong.numel():,} wrong"
    return f"{name}{at} {was}, {right:.7g} is wanted; {share}"


def _shown(arguments: tuple) -> str:
    """The arguments, shortened."""
    lines = []
    for a in arguments:
        kind = type(a).__name__.lower()
        parts = (
            {f"{kind}.{n}": t for n, t in a._asdict().items()} if isinstance(a, tuple) else {"x": a}
        )
        for name, t in parts.items():
            values = ", ".join(f"{v:.4g}" for v in t.flatten()[:SHOWN].tolist())
            more = ", …" if t.numel() > SHOWN else ""
            lines.append(f"{name} {list(t.shape)} = {values}{more}")
    return "\n".join(lines)


def _cause(error: BaseException) -> str:
    """First line of what went wrong in the reader's own code: Triton wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or ["no message"])[0][:200]

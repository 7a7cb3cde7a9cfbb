"""Answers: what a reader's function returns, beside what is right; a report names the first difference.

For the exercises of the notebooks (`exercises`, `lessons`). A wrong answer, or an error in it, is a red
report with the first case that shows it, never an exception: a notebook left unsolved runs through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Case", "Comparison", "Report", "grade"]

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
        # the words keep the page's colour: no other can be read on a light and on a dark ground
        return f'<div style="{box}"><b>{escape(self.headline)}</b>{more}</div>'


class Case(NamedTuple):
    """What it is about, the arguments, and what is right: a tensor, a number, or a tuple of them."""

    about: str
    arguments: tuple
    expected: Any


@dataclass(frozen=True)
class Comparison:
    """How an answer is compared. Integers and booleans have to be equal.

    rtol, atol: what a floating-point number may be off, as a share of itself and beyond. exact_type: the
    dtype has to be the same, and a number is no tensor. unwritten: the integer that memory held before
    (floats held NaN), for what never wrote to it; None where there was no such memory.
    """

    rtol: float = 1e-6
    atol: float = 0.0
    exact_type: bool = False
    unwritten: int | None = None


def grade(
    name: str,
    function: Callable,
    cases: Iterable[Case],
    how: Comparison = Comparison(),
    device: str = "cpu",
    names: Sequence[str] = (),
) -> Report:
    """Call `function` with copies of each case's arguments, on `device`; the first wrong case is shown.

    names: of the arguments, for what is shown.
    """
    cases = list(cases)
    for i, case in enumerate(cases, 1):
        try:
            found = function(*(_copied(a, device) for a in case.arguments))
            wrong = _difference(found, case.expected, how)
        except Exception as error:  # a reader's function may raise anything
            wrong = f"raises {type(error).__name__}: {_cause(error)}"
        if wrong:
            text = f"case {i} of {len(cases)}, {case.about}"
            return Report(name, "failed", text, f"{wrong}\n\n{_shown(case.arguments, names)}")
    return Report(name, "passed", f"{len(cases)} of {len(cases)} cases")


def _copied(argument: Any, device: str) -> Any:
    """A copy on the device: a function that writes to its argument spoils its own copy."""
    if isinstance(argument, Tensor):
        return argument.to(device, copy=True)
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return type(argument)(*(_copied(a, device) for a in argument))
    if isinstance(argument, list | tuple):
        return type(argument)(_copied(a, device) for a in argument)
    return argument


def _difference(found: Any, expected: Any, how: Comparison) -> str:
    """Empty if `found` is `expected`, else the first place where it is not."""
    if isinstance(expected, tuple):
        if not isinstance(found, tuple) or len(found) != len(expected):
            wanted = type(expected).__name__ + ("" if how.exact_type else f" of {len(expected)}")
            return f"returns {type(found).__name__}: {wanted} is wanted"
        names = getattr(expected, "_fields", [f"result {i}" for i in range(len(expected))])
        pairs = zip(names, found, expected, strict=True)
        return next(filter(None, (_part(n, f, e, how) for n, f, e in pairs)), "")
    return _part("result", found, expected, how)


def _part(name: str, found: Any, expected: Any, how: Comparison) -> str:
    kind = "tensor" if isinstance(expected, Tensor) else "number"
    plain = (Tensor,) if how.exact_type else (Tensor, int, float)
    if not isinstance(found, plain):
        return f"{name} is {type(found).__name__}: a {kind} is wanted"
    found, expected = torch.as_tensor(found).detach(), torch.as_tensor(expected)
    same = found.dtype == expected.dtype
    if not how.exact_type:
        same = (found.dtype == torch.bool) == (expected.dtype == torch.bool)
    if not same or found.shape != expected.shape:
        wanted = f"{expected.dtype} {list(expected.shape)}"
        return f"{name} is {found.dtype} {list(found.shape)}: {wanted} is wanted"
    found = found.cpu()
    # the last place may differ where a GPU fuses a product and a sum, or sums run in another order
    if expected.is_floating_point():
        pair = (found, expected) if how.exact_type else (found.double(), expected.double())
        wrong = ~torch.isclose(*pair, rtol=how.rtol, atol=how.atol, equal_nan=True)
    else:
        wrong = found != expected
    if not wrong.any():
        return ""
    at = wrong.nonzero()[0].tolist()
    value, right = found[tuple(at)].item(), expected[tuple(at)].item()
    share = f"; {int(wrong.sum()):,} of {wrong.numel():,} wrong" if expected.dim() else ""
    was = "was never written" if _untouched(found[wrong], how) else f"is {value:.7g}"
    return f"{name}{at or ''} {was}, {right:.7g} is wanted{share}"


def _untouched(found: Tensor, how: Comparison) -> bool:
    if how.unwritten is None:
        return False
    left = found.isnan() if found.is_floating_point() else found == how.unwritten
    return bool(left.all())


def _shown(arguments: tuple, names: Sequence[str] = ()) -> str:
    """The arguments, shortened."""
    lines = []
    for i, a in enumerate(arguments):
        if isinstance(a, tuple) and hasattr(a, "_asdict"):
            parts = {f"{type(a).__name__.lower()}.{n}": t for n, t in a._asdict().items()}
        else:
            name = names[i] if i < len(names) else "x"
            many = isinstance(a, list) and any(isinstance(t, Tensor) for t in a)
            parts = {f"{name}[{j}]": t for j, t in enumerate(a)} if many else {name: a}
        lines += [_line(name, part) for name, part in parts.items()]
    return "\n".join(lines)


def _line(name: str, a: Any) -> str:
    if not isinstance(a, Tensor):
        return f"{name} = {a}"
    values = ", ".join(f"{v:.4g}" for v in a.flatten()[:SHOWN].tolist())
    return f"{name} {list(a.shape)} = {values}{', …' if a.numel() > SHOWN else ''}"


def _cause(error: BaseException) -> str:
    """First line of what went wrong in the reader's own code: Triton wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or ["no message"])[0][:200]

"""Lesson: one exercise, its cases and how an answer is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dfrot_lab.answers import Case, Comparison

__all__ = ["Lesson", "rows", "tried"]


EXACT = Comparison(atol=1e-9)  # cases are fp64, entries about 1: sums may run in another order


@dataclass(frozen=True)
class Lesson:
    """cases: what is tried, small ones first, so that the first counter-example can be read."""

    cases: Callable[[], Iterator[Case]]
    how: Comparison = EXACT


def tried(own: Callable, inputs: Callable[[], dict[str, tuple]], how: Comparison = EXACT) -> Lesson:
    """A lesson whose right answers are those of `own`, of the reader's signature.

    inputs: what a case is about → its arguments.
    """

    def cases() -> Iterator[Case]:
        for about, arguments in inputs().items():
            yield Case(about, arguments, own(*arguments))

    return Lesson(cases, how)


def rows(count: int, d: int, seed: int = 0, spike: float = 0.0) -> Tensor:
    """Standard normal rows [count, d] in fp64; the first holds a `spike` in its second entry, if any."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, d, generator=generator, dtype=torch.float64)
    if spike:
        x[0, 1 % d] = spike
    return x

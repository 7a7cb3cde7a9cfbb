"""Whether an output is right, before it is timed: errors against the reference, on rows spread over it.

A gate compares up to 512 rows, the first and the last among them, in memory that held garbage before. Codes
may be off by one step, and only a few of them: at rounding ties, where a sum ran in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from dfrot_kernels import reference
from dfrot_kernels.reference import KV, Tokens
from torch import Tensor

__all__ = [
    "EXACT",
    "ROUNDED",
    "TIES",
    "Group",
    "Job",
    "code_error",
    "distance",
    "near",
    "pick",
    "probe",
    "relative",
    "run_clean",
]

PROBED = 512
EXACT = 5e-3  # of `distance`: fp16's last place on numbers of five rms
TIES = 1e-3  # of `code_error`, where the sums may run in another order
ROUNDED = 2e-2  # of `code_error`, where the numbers were rounded to fp16 on the way


@dataclass(frozen=True)
class Job:
    """fn(*args) is timed after check(output), its error, was at most `limit`.

    flops: operations it must do, of the kind `unit` ("bf16" or "int8": the ceiling it is held to).
    """

    fn: Callable
    args: tuple
    check: Callable[[Any], float]
    limit: float
    flops: int = 0
    unit: str = "bf16"


@dataclass(frozen=True)
class Group:
    """One op at one size. make: the problem; contestants: name → (whether ours, problem → Job)."""

    op: str
    dims: dict[str, Any]
    make: Callable[[], Any]
    contestants: dict[str, tuple[bool, Callable[[Any], Job]]] = field(default_factory=dict)


def probe(rows: int, device: torch.device) -> Tensor:
    """Numbers of the rows that are compared."""
    spread = torch.linspace(0, rows - 1, min(rows, PROBED), dtype=torch.float64, device=device)
    return spread.round().long()


def pick(x: Tokens | KV, rows: Tensor) -> Tokens | KV:
    """`rows` of every part of quantized numbers."""
    return type(x)(*(part[rows] for part in x))


def _comparable(y: Tensor, wanted: Tensor) -> bool:
    return y.shape == wanted.shape and bool(y.isfinite().all())


def distance(y: Tensor, wanted: Tensor) -> float:
    """max|y − ŷ| / rms ŷ; infinite where shapes differ or y is not finite."""
    if not _comparable(y, wanted):
        return math.inf
    return ((y.float() - wanted.float()).abs().max() / wanted.float().square().mean().sqrt()).item()


def relative(y: Tensor, wanted: Tensor) -> float:
    """‖y − ŷ‖ / ‖ŷ‖; infinite where shapes differ or y is not finite."""
    if not _comparable(y, wanted):
        return math.inf
    return ((y.float() - wanted.float()).norm() / wanted.float().norm()).item()


def near(
    wanted: Tensor,
    rows: Tensor,
    error: Callable[[Tensor, Tensor], float] = distance,
    read: Callable[[Any], Tensor] | None = None,
) -> Callable[[Any], float]:
    """Check of `rows` of an output (after `read`) against `wanted`."""
    return lambda y: error((read(y) if read else y)[rows], wanted)


def code_error(
    found: Tokens | KV, wanted: Tokens | KV, *, packed: bool = True, steps: float = 1e-5
) -> float:
    """Share of numbers Δ(q − z) that are another multiple of Δ; infinite if one is off by more than Δ.

    Infinite too where shapes or dtypes differ, or a Δ by more than a part `steps`.
    """
    pairs = list(zip(found, wanted, strict=True))
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return math.inf
    (a, scale), (b, expected) = (_multiples(x, packed) for x in (found, wanted))
    if not torch.allclose(scale, expected, rtol=steps, atol=0):
        return math.inf
    off = (a * (scale / expected)[..., None] - b).abs()
    return math.inf if not off.max() < 1.1 else (off > 0.5).float().mean().item()


def _multiples(x: Tokens | KV, packed: bool) -> tuple[Tensor, Tensor]:
    """q − z and Δ, fp32."""
    if isinstance(x, KV):
        codes = reference.unpack(x.packed) + 8
    else:
        codes = reference.unpack(x.codes) if packed else x.codes
    return codes.float() - x.zero.float()[..., None], x.scale.float()


def run_clean(fn: Callable, args: tuple) -> Any:
    """fn(*args) in memory that holds garbage: its first output is overwritten and freed for the second."""
    inputs = {t.untyped_storage().data_ptr() for t in _tensors(args)}
    for t in _tensors(fn(*args)):
        if t.untyped_storage().data_ptr() not in inputs:  # an input handed through stays
            t.fill_(torch.nan if t.is_floating_point() else 77)
    return fn(*args)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple):
        for part in x:
            yield from _tensors(part)

"""Tolerances: two results compared number by number, exactly or within the spread over seeds.

On the machine that made the reference a result has the same bytes. On another, sums are taken in another
order, and 4-bit rounding makes of 1e-7 a different code here and there: by that alone a perplexity moves
by about 1 %. A number is then held to

    |found − reference| ≤ FACTOR · max(s, r)

s: standard deviation over seeds of the same quantity in the reference, relative to its mean and pooled over
the rotations at the same bits, kept tokens and method, or the sd written beside a mean; 0 where the
reference has one seed of it. r: what rounding moves: 1 % for what a quantized model gives (perplexity, KL,
kept tokens), 0.01 nats for its log-likelihoods, 1/3 % for all else, of the number or, in an array, of
the array's root mean square if that is larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

__all__ = ["FACTOR", "Difference", "differences", "numbers"]

FACTOR = 3.0
QUANTIZED = 0.01  # relative, of what a quantized model gives
NATS = 0.01  # the same, as a difference of log-likelihoods
OTHERWISE = 0.01 / 3  # relative
MAGNITUDE = 10.0  # rounding errors are compared by their order of magnitude

_ROUNDING_ERRORS = {"relative_error", "orthogonality_error"}
_LOGS = {"nll", "paired"}
_OF_QUANTIZED = {
    "ppl", "ppl_w16", "ppl_second", "kl", "kl_w16", "table", "kept", "exempted", "closed",
    "first_token", "prefix", "task_loss",
}  # fmt: skip
_COUNTS = {"kept", "exempted"}  # integers that follow from a quantized model; all others are exact
_CLAIM = {"claim", "paper", "ours", "rule", "agrees"}
_POOL = ("bits", "keep", "method")


@dataclass(frozen=True)
class Difference:
    """One number or name that is not as in the reference; tolerance None: had to be equal."""

    path: str
    reference: Any
    found: Any
    tolerance: float | None = None

    @property
    def excess(self) -> float:
        """|found − reference| over the tolerance; inf where equality was asked for."""
        if self.tolerance:
            return abs(self.found - self.reference) / self.tolerance
        return math.inf

    def __str__(self) -> str:
        """`by 4.7 % in rows[2].ppl: 33.1 against 31.6 (tolerance 3 %)`; found first."""
        said = (
            f"in {self.path or 'the result'}: {_short(self.found)} against {_short(self.reference)}"
        )
        if not (_number(self.reference) and _number(self.found)):
            return said
        by = _amount(self.found - self.reference, self.reference)
        told = f" (tolerance {_amount(self.tolerance, self.reference)})" if self.tolerance else ""
        return f"by {by} {said}{told}"


def differences(reference: Any, found: Any, *, exact: bool) -> list[Difference]:
    """Every leaf of the JSON value `found` that is not as in `reference`, the worst first.

    exact: every leaf equal and of the same type. Otherwise as the module says; strings, truth values,
    integers and lengths are equal all the same, except what counts kept tokens, and a claim's `ours`, which
    words numbers that are compared where they stand.
    """
    if exact:
        return list(_exact(reference, found, ""))
    reference, found = _counted(reference), _counted(found)
    pools = _pools(reference)
    wrong = _within(reference, found, "", _Place((), {}, None, 0.0), pools)
    return sorted(wrong, key=lambda d: -d.excess)


def numbers(value: Any) -> int:
    """How many numbers a JSON value holds."""
    if isinstance(value, dict | list):
        return sum(map(numbers, value.values() if isinstance(value, dict) else value))
    return int(_number(value))


# --- exactly --------------------------------------------------------------------------------------


def _exact(a: Any, b: Any, path: str) -> Iterator[Difference]:
    if not _alike(a, b):
        yield Difference(path, _outline(a), _outline(b))
    elif isinstance(a, dict | list):
        for key, x, y in _children(a, b):
            yield from _exact(x, y, _join(path, key))
    elif a != b or repr(a) != repr(b):  # 0.0 and -0.0 are equal
        yield Difference(path, a, b)


def _alike(a: Any, b: Any) -> bool:
    """The same type and, of dicts and lists, the same keys or length."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys()
    return not isinstance(a, list) or len(a) == len(b)


# --- within the spread ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a leaf stands: keys above it, its row, the sd beside it, root mean square of its array."""

    keys: tuple[str, ...]
    row: dict[str, Any]
    sd: float | None
    scale: float


def _within(a: Any, b: Any, path: str, at: _Place, pools: dict) -> Iterator[Difference]:
    if _number(a) and _number(b):
        yield from _numbers(a, b, path, at, pools)
        return
    if at.keys[-1:] == ("by_token",):
        a, b = _filled(a, b), _filled(b, a)
    if not _alike(a, b):
        yield Difference(path, _outline(a), _outline(b))
    elif isinstance(a, dict):
        sd = next((float(a[k]) for k in ("sd", "seed_sd") if _number(a.get(k))), at.sd)
        if _number(a.get("low")) and _number(a.get("high")):
            # of few windows: its ends move by as much as it is wide when a code turns
            sd = max(sd or 0.0, (float(a["high"]) - float(a["low"])) / 2)
        words = {"ours"} if a.keys() == _CLAIM else set()
        for key in a.keys() - words:
            below = _Place((*at.keys, key), at.row, sd, 0.0)
            yield from _within(a[key], b[key], _join(path, key), below, pools)
    elif isinstance(a, list):
        values = [float(v) for v in a if _number(v)]
        scale = math.sqrt(math.fsum(v * v for v in values) / len(values)) if values else 0.0
        # an x near the middle between two codes takes the other: one step is then the tolerance
        sd = 1.01 * _step(values) / FACTOR if at.keys[-1:] == ("q",) else at.sd
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            row = x if isinstance(x, dict) else at.row
            yield from _within(x, y, f"{path}[{i}]", _Place(at.keys, row, sd, scale), pools)
    elif a != b:
        yield Difference(path, a, b)


def _numbers(a: float, b: float, path: str, at: _Place, pools: dict) -> Iterator[Difference]:
    if _field(at) in _ROUNDING_ERRORS:
        low, high = sorted((abs(a), abs(b)))
        if high > max(MAGNITUDE * low, 1e-15):
            yield Difference(path, a, b, MAGNITUDE * abs(a))
        return
    counts = isinstance(a, int) and isinstance(b, int) and not _COUNTS & set(at.keys)
    tolerance = 0.0 if counts else _tolerance(float(a), at, pools)
    if not abs(b - a) <= tolerance:
        yield Difference(path, a, b, tolerance or None)


def _tolerance(value: float, at: _Place, pools: dict) -> float:
    size, keys = max(abs(value), at.scale), set(at.keys)
    if at.row.get("rotation") == "FP":  # nothing drawn from a seed, nothing rounded to 4 bits
        return FACTOR * OTHERWISE * size
    relative = QUANTIZED if keys & _OF_QUANTIZED else OTHERWISE
    rounding = NATS if keys & _LOGS else relative * size
    return FACTOR * max(rounding, size * _spread(at, pools), at.sd or 0.0)


def _spread(at: _Place, pools: dict) -> float:
    """The pooled relative standard deviation over seeds of what stands there; 0 where none is known."""
    if _COUNTS & set(at.keys):
        return max((v for key, v in pools.items() if key[0] == "pairs"), default=0.0)
    field = "ppl" if "table" in at.keys else _field(at)
    return pools.get((field, *_pool(at.row)), 0.0)


def _pools(result: Any) -> dict[tuple, float]:
    """(field, bits, keep, method) → relative standard deviation over seeds, pooled over their groups."""
    groups: dict[tuple, dict[tuple, list[float]]] = {}
    for rows in _seeded(result):
        for row in rows:
            identity = tuple(
                (k, v) for k, v in sorted(row.items())
                if k != "seed" and (v is None or isinstance(v, str | bool))
            )  # fmt: skip
            for field, place, value in _leaves(row):
                pool = groups.setdefault((field, *_pool(row)), {})
                pool.setdefault((identity, place), []).append(value)
    found = {}
    for key, pool in groups.items():
        squares, freedom = 0.0, 0
        for values in pool.values():
            mean = math.fsum(values) / len(values)
            if len(values) > 1 and mean:
                squares += math.fsum((v - mean) ** 2 for v in values) / mean**2
                freedom += len(values) - 1
        if freedom:
            found[key] = math.sqrt(squares / freedom)
    return found


def _seeded(value: Any) -> Iterator[list[dict[str, Any]]]:
    """Every list of rows that carry a seed."""
    if isinstance(value, dict):
        for v in value.values():
            yield from _seeded(v)
    elif isinstance(value, list):
        if value and all(isinstance(v, dict) and "seed" in v for v in value):
            yield value
        else:
            for v in value:
                yield from _seeded(v)


def _leaves(value: Any, field: str = "", place: str = "") -> Iterator[tuple[str, str, float]]:
    """(innermost name, place in the row, number) of every number in a row."""
    if isinstance(value, dict):
        for k, v in value.items():
            if k != "seed":
                yield from _leaves(v, k, f"{place}.{k}")
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from _leaves(v, field, f"{place}[{i}]")
    elif _number(value):
        yield field, place, float(value)


def _pool(row: dict[str, Any]) -> tuple:
    return tuple(row.get(k) for k in _POOL)


def _field(at: _Place) -> str:
    return at.keys[-1] if at.keys else ""


def _counted(value: Any, key: str = "") -> Any:
    """`value` with kept tokens as their number, and [[text, n], …] as {text: n}.

    Which token is kept last depends on 4-bit rounding; how many are is what the figures show.
    """
    if isinstance(value, dict):
        return {k: _counted(v, k) for k, v in value.items()}
    if isinstance(value, list):
        if key == "kept":
            return {"tokens": len(value), "pairs": sum(len(token[-1]) for token in value)}
        if key == "by_token":
            return dict(value)
        return [_counted(v) for v in value]
    return value


def _filled(a: Any, b: Any) -> Any:
    """`a` with the keys that only `b` has, at the least value of `a`: the list was cut there."""
    return dict.fromkeys(b, min(a.values(), default=0)) | a


def _step(values: list[float]) -> float:
    levels = sorted(set(values))
    return max((b - a for a, b in pairwise(levels)), default=0.0)


# --- words ----------------------------------------------------------------------------------------


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _children(a: Any, b: Any) -> Iterator[tuple[Any, Any, Any]]:
    keys = a if isinstance(a, dict) else range(len(a))
    return ((k, a[k], b[k]) for k in keys)


def _join(path: str, key: Any) -> str:
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


def _outline(value: Any) -> Any:
    """A leaf itself; of a list its length and of a dict its keys, as words."""
    if isinstance(value, dict):
        return f"keys {sorted(value)}"
    return f"{len(value)} entries" if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = f"{value:.10g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 90 else f"{text[:89]}…"


def _amount(part: float, whole: float) -> str:
    """Relative to `whole`, or as it is where that is 0."""
    return f"{100 * abs(part / whole):.2g} %" if whole else f"{abs(part):.2g}"

"""Unseen: what study 09 measures on the evaluation windows behind those that ranked its objectives."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from dfrot_lab import evaluation
from dfrot_lab.lab import Lab

__all__ = ["behind", "kept", "kl", "measured"]


def behind(lab: Lab, windows: int, count: int) -> slice:
    """The `count` evaluation windows behind the first `windows`, which rank; 0: all the rest.

    Raises ValueError where none is left, or there are not so many: what has chosen cannot confirm.
    """
    there = len(lab.evaluation_tokens(0))
    last = windows + count if count else there
    if not 0 < windows <= last - 2 <= there - 2:  # a paired interval needs two
        raise ValueError(
            f"windows = {windows}, confirm_windows = {count}: the first `windows` rank the objectives, those "
            f"behind them confirm: use at least 1 and 2, {there} together (confirm_windows = 0: the rest)"
        )
    return slice(windows, last)


def measured(lab: Lab, name: str, seed: int, which: slice, **how: str) -> dict[str, Any]:
    """{ppl, nll} of the evaluation windows `which`."""
    found = lab.perplexity(name, seed, first=which.start, windows=which.stop, **how)
    return {k: found[k] for k in ("ppl", "nll")}


def kl(lab: Lab, file: str, seed: int, which: slice) -> float:
    """Mean KL to the floating-point model in nats a token, kept beside the perplexities."""

    def measure() -> dict[str, Any]:
        model = lab.quantized(file, seed)
        tokens = lab.evaluation_tokens(which.stop)[which]
        return {"kl": statistics.fmean(evaluation.window_kl(model, lab.lm, w) for w in tokens)}

    return float(kept(lab, "kl", {"rotation": [lab.told(file), seed]}, which, measure)["kl"])


def kept(
    lab: Lab,
    kind: str,
    options: dict[str, Any],
    which: slice,
    measure: Callable[[], dict],
    code: Sequence[str] = (),
) -> dict[str, Any]:
    """What `measure` gives on the evaluation windows `which`; otherwise as `Lab.kept`."""
    windows = {"windows": [which.start, which.stop]}
    return lab.kept(kind, options | windows, measure, code)

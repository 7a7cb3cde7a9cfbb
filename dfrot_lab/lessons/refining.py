"""Exercises of notebooks 04 and 09: Procrustes, weights, one DFRot iteration, and other objectives."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dfrot_lab import cayley, evaluation, massive, models, objectives, polar, rotations, weighting
from dfrot_lab.activations import Activations
from dfrot_lab.answers import Case, Comparison
from dfrot_lab.lessons.lesson import Lesson, rows, tried
from dfrot_lab.quantizers import QuantSpec

__all__ = ["LESSONS"]

SPEC = QuantSpec()  # 4 bits, asymmetric, per token


def _weights(tokens: int, seed: int) -> Tensor:
    """w² [tokens]: 1, and 10⁴ for every fifth."""
    w2 = torch.ones(tokens, dtype=torch.float64)
    w2[seed % 5 :: 5] = 1e4
    return w2


# --- 04 --------------------------------------------------------------------------------------------


def _procrustes(x: Tensor, b: Tensor, w2: Tensor) -> Tensor:
    return polar.polar((x * w2[:, None]).mT @ b)


def _procrustes_inputs() -> dict[str, tuple]:
    exact = rows(6, 3)
    found = {"B is X, turned": (exact, exact @ rotations.random_orthogonal(3, 1), torch.ones(6))}
    for seed, (tokens, d) in enumerate(((8, 2), (20, 5), (40, 12), (35, 33))):
        x, b = rows(tokens, d, seed), rows(tokens, d, seed + 100)
        found[f"{tokens} rows of {d}, every fifth weighted"] = (x, b, _weights(tokens, seed))
    return {about: tuple(t.double() for t in given) for about, given in found.items()}


def _weight_cases() -> Iterator[Case]:
    """massive [T] of bool, gamma → w² [T] by `weighting.row_weights`."""
    for seed, gamma in enumerate((1.0, 100.0, 3.5, 0.0, math.inf)):
        x = rows(9, 64, seed, spike=700.0).float()
        x[4, 9] = 500.0
        mask = massive.is_massive(x, SPEC)
        w2, _ = weighting.row_weights(Activations.of(x), SPEC, weighting.Weighting(gamma))
        yield Case(f"γ = {gamma:g}", (mask, gamma), torch.cat(w2))


def _iteration(x: Tensor, r: Tensor, w2: Tensor) -> Tensor:
    return _procrustes(x, objectives.Centroids(SPEC).direction(x @ r), w2)


def _iteration_inputs() -> dict[str, tuple]:
    found = {}
    for seed, (tokens, d) in enumerate(((6, 2), (30, 12), (50, 17), (40, 32))):
        x, r = rows(tokens, d, seed, spike=60.0), rotations.random_orthogonal(d, seed)
        found[f"{tokens} rows of {d}"] = (x, r, _weights(tokens, seed))
    return found


# --- 09 --------------------------------------------------------------------------------------------


def _direction_inputs() -> dict[str, tuple]:
    return {
        "a spike": (torch.tensor([[0.0, 0.0, 2.0, 0.0]], dtype=torch.float64),),
        "equal entries": (torch.tensor([[3.0, -3, 3, 3, -3]], dtype=torch.float64),),
        "3 rows of 17": (rows(3, 17, 1),),
        "5 rows of 64, one with a spike": (rows(5, 64, 2, spike=90.0),),
    }


def _kl_cases() -> Iterator[Case]:
    """logits [n, V] of the model in floating point and of another → `evaluation.window_kl`."""
    first, *others = (models.tiny("llama", seed=seed, layers=1) for seed in range(3))
    for model, n in zip(others, (2, 7), strict=True):
        window = torch.arange(3, 3 + n)
        with torch.inference_mode():
            p, q = (m(window[None], use_cache=False).logits[0].clone() for m in (first, model))
        yield Case(f"{n} tokens", (p, q), evaluation.window_kl(model, first, window))


def _cayley_cases() -> Iterator[Case]:
    """r, gradient [d, d], eta → R after `cayley.step`, whose step is a length: η‖A‖ = length·√d."""
    for d, length in ((2, 0.3), (5, 0.03), (12, 0.5)):
        r, gradient = rotations.random_orthogonal(d, d), rows(d, d, d)
        a = gradient @ r.mT
        eta = length * math.sqrt(d) / (a - a.mT).norm().item()
        yield Case(f"d = {d}", (r, gradient, eta), cayley.step(r, gradient, length))


_LOOSE = Comparison(atol=1e-7)  # factors of a matrix that may be ill-conditioned

LESSONS = {
    "04.procrustes": tried(_procrustes, _procrustes_inputs, _LOOSE),
    "04.weights": Lesson(_weight_cases),
    "04.iteration": tried(_iteration, _iteration_inputs, _LOOSE),
    "09.direction": tried(objectives.Kurtosis().direction, _direction_inputs),
    "09.kl": Lesson(_kl_cases, Comparison(rtol=1e-4)),  # the logits are fp32
    "09.cayley": Lesson(_cayley_cases, _LOOSE),
}

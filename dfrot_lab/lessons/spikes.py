"""Exercises of notebook 08: spikes under a Hadamard matrix, when it must win, and the way to R1."""

from __future__ import annotations

import torch
from torch import Tensor

from dfrot_lab import geodesics, massive, rotations, theory
from dfrot_lab.answers import Comparison
from dfrot_lab.lessons.lesson import rows, tried
from dfrot_lab.quantizers import QuantSpec

__all__ = ["LESSONS"]


def _spikes(a: Tensor, symmetric: bool) -> float:
    return theory.spikes_error(a, QuantSpec(symmetric=symmetric)).item()


def _spikes_inputs() -> dict[str, tuple]:
    amplitudes = {
        "one spike": [3.0],
        "two spikes": [1.0, 0.4],
        "three": [1.0, 0.9, 0.35],
        "five": [1.0, 0.8, 0.7, 0.33, 0.21],
    }
    return {
        f"{about}, {'symmetric' if symmetric else 'asymmetric'}": (
            torch.tensor(a, dtype=torch.float64),
            symmetric,
        )
        for symmetric in (True, False)
        for about, a in amplitudes.items()
    }


def _must_win(x: Tensor, floor: float) -> Tensor:
    return theory.breadth(x) < theory.breadth_limit(x.shape[-1], QuantSpec(symmetric=True))


def _must_win_inputs() -> dict[str, tuple]:
    """Rows [T, d], and the symmetric Gaussian floor for their size."""
    found = {}
    for d in (32, 100, 576):
        x = rows(40, d, d) * torch.logspace(-3, 0, 40, dtype=torch.float64)[:, None]
        x[:, :3] += torch.tensor([4.0, -3.0, 2.0], dtype=torch.float64)
        floor = massive.gaussian_floor(d, QuantSpec(symmetric=True))
        found[f"three spikes in more and more noise, d = {d}"] = (x, floor)
    return found


def _path(start: Tensor, end: Tensor, t: float) -> Tensor:
    return geodesics.between(start, end)[0](t)


def _path_inputs() -> dict[str, tuple]:
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    found = {"a third of a quarter turn": (torch.eye(2, dtype=torch.float64), quarter, 1 / 3)}
    for d, t in ((3, 0.5), (6, 1.25), (11, 0.7)):
        start, skew = rotations.random_orthogonal(d, d), rows(d, d, d)
        turn = torch.linalg.matrix_exp((skew - skew.mT) / (2 * d**0.5))  # no angle reaches π
        found[f"d = {d}, t = {t}"] = (start, start @ turn, t)
    return found


LESSONS = {
    "08.spikes": tried(_spikes, _spikes_inputs),
    "08.must_win": tried(_must_win, _must_win_inputs),
    "08.path": tried(_path, _path_inputs, Comparison(atol=1e-7)),
}

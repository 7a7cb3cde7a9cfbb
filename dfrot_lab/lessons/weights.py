"""Exercises of notebook 05: weights by RTN and by GPTQ, a difference with its interval."""

from __future__ import annotations

import torch
from torch import Tensor

from dfrot_lab import evaluation, gptq, quantizers
from dfrot_lab.lessons.lesson import rows, tried
from dfrot_lab.quantizers import QuantSpec

__all__ = ["LESSONS"]


def _rtn(w: Tensor, bits: int) -> Tensor:
    spec = QuantSpec(bits=bits, symmetric=True, granularity="channel")
    return quantizers.round_to_nearest(w, spec, steps=0)


def _rtn_inputs() -> dict[str, tuple]:
    zeros = torch.stack([torch.zeros(4), torch.arange(4.0) - 1]).double()
    return {
        "steps of 1": (torch.tensor([[7.0, -3.2, 0.4, 2.6]], dtype=torch.float64), 4),
        "one step a channel": (rows(2, 5) * torch.tensor([[1.0], [100.0]]).double(), 4),
        "a channel of zeros": (zeros, 4),
        "3 bits, 4 channels of 17": (rows(4, 17, 1), 3),
        "8 bits, an outlier": (rows(3, 33, 2, spike=40.0), 8),
    }


def _gptq(w: Tensor, hessian: Tensor) -> Tensor:
    spec = QuantSpec(symmetric=True, granularity="channel")
    return gptq.quantize_weight(w, hessian, spec, gptq.GPTQ(clip_steps=0))


def _gptq_inputs() -> dict[str, tuple]:
    def case(channels: int, k: int, seed: int) -> tuple:
        mixing = rows(k, k, seed) + 2 * torch.ones(k, k, dtype=torch.float64)  # alike inputs
        x = rows(4 * k, k, seed + 50) @ mixing
        return rows(channels, k, seed + 100), x.mT @ x

    alone = (rows(2, 4, 9), torch.eye(4, dtype=torch.float64))
    return {
        "H = I: the columns do not see each other": alone,
        "1 channel of 3": case(1, 3, 0),
        "4 channels of 8": case(4, 8, 1),
        "5 channels of 37": case(5, 37, 2),
    }


def _difference(a: list[float], b: list[float]) -> tuple[float, float, float]:
    found = evaluation.paired_difference(a, b)
    return found["mean"], found["low"], found["high"]


def _difference_inputs() -> dict[str, tuple]:
    nll, noise = rows(1, 12, 3)[0] + 3, rows(1, 12, 4)[0] / 50
    return {
        "two windows": ([3.1, 2.9], [3.0, 2.7]),
        "unequal windows, nearly equal differences": ([5.0, 2.0, 3.5], [4.9, 1.88, 3.41]),
        "12 windows": (nll.tolist(), (nll + noise).tolist()),
    }


LESSONS = {
    "05.rtn": tried(_rtn, _rtn_inputs),
    "05.gptq": tried(_gptq, _gptq_inputs),
    "05.difference": tried(_difference, _difference_inputs),
}

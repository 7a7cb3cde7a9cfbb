"""Exercises of notebook 10: the score of a continuation, and whether two measures rank models alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dfrot_lab.lessons.lesson import rows, tried
from dfrot_lab.studies.zero_shot import rank_correlation

__all__ = ["LESSONS"]


def _log_probability(logits: Tensor, target: Tensor) -> float:
    return -F.cross_entropy(logits, target, reduction="sum").item()


def _log_probability_inputs() -> dict[str, tuple]:
    return {
        "one token of two": (torch.tensor([[0.0, 0.0]], dtype=torch.float64), torch.tensor([1])),
        "two tokens of four": (rows(2, 4), torch.tensor([3, 0])),
        "logits a constant apart": (rows(2, 4) + 100, torch.tensor([3, 0])),
        "5 tokens of 37": (3 * rows(5, 37, 1), torch.tensor([0, 36, 7, 7, 20])),
    }


def _tau_inputs() -> dict[str, tuple]:
    return {
        "two models, alike": ([20.0, 30.0], [0.6, 0.5]),
        "two models, not alike": ([20.0, 30.0], [0.5, 0.6]),
        "one pair of three the other way": ([20.0, 30.0, 40.0], [0.6, 0.4, 0.5]),
        "seven models": (rows(1, 7, 2)[0].exp().tolist(), rows(1, 7, 3)[0].tolist()),
    }


LESSONS = {
    "10.score": tried(_log_probability, _log_probability_inputs),
    "10.tau": tried(rank_correlation, _tau_inputs),
}

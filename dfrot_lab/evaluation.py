"""Metrics: perplexity over windows, paired differences with confidence intervals."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F

from dfrot_lab import models

if TYPE_CHECKING:
    from transformers import Cache

__all__ = [
    "Perplexity",
    "paired_difference",
    "perplexity",
    "spread",
    "window_kl",
    "window_nll",
    "with_cache",
]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood a token; `nll` holds the mean of each window, in nats."""

    nll: list[float]

    @property
    def value(self) -> float:
        """exp(mean nll); inf where it overflows."""
        mean = statistics.fmean(self.nll)
        return math.inf if mean >= 700 else math.exp(mean)  # NaN stays NaN


@torch.inference_mode()
def window_nll(
    model: nn.Module,
    window: Tensor,
    rows: int = 1024,
    block: int = 4096,
    past: Cache | None = None,
) -> float:
    """Mean −log p(token_i | tokens_<i) in nats over i = 1…n−1 of one window [n].

    The head is applied to `rows` positions and `block` words of the vocabulary at a time: the logits of
    a window would take 0.4 GB here, gigabytes with larger vocabularies, and more time than their product.
    past: keys and values of a prefix, to which the window's are appended.
    """
    device = next(model.parameters()).device
    tokens = window[None].to(device)
    base = models.base(model)
    given = {"use_cache": False} if past is None else with_cache(base, past)
    hidden = base(tokens, **given).last_hidden_state[0, :-1]
    targets, total = tokens[0, 1:], 0.0
    for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
        total += _nll(h, y, models.head(model), block).double().sum().item()
    return total / len(targets)


def with_cache(base: nn.Module, past: Cache) -> dict[str, object]:
    """Arguments that append to `past`; the name changed in transformers 5.24."""
    known = inspect.signature(base.forward).parameters
    return {"use_cache": True, "cache" if "cache" in known else "past_key_values": past}


def _nll(h: Tensor, y: Tensor, lm_head: nn.Linear, block: int) -> Tensor:
    """log Σ_v exp(z_v) − z_y [n] for hidden states h [n, d] and targets y [n], in fp32."""
    most = torch.full((len(h),), -torch.inf, device=h.device)
    mass, picked = torch.zeros_like(most), torch.zeros_like(most)
    for first in range(0, lm_head.out_features, block):
        words = slice(first, first + block)
        bias = None if lm_head.bias is None else lm_head.bias[words]
        z = F.linear(h, lm_head.weight[words], bias).float()
        here = ((y >= first) & (y < first + z.shape[1])).nonzero()[:, 0]
        picked[here] = z[here, y[here] - first]
        new = torch.maximum(most, z.amax(-1))
        mass = mass * (most - new).exp() + z.sub_(new[:, None]).exp_().sum(-1)
        most = new
    return most + mass.log() - picked


@torch.inference_mode()
def window_kl(model: nn.Module, reference: nn.Module, window: Tensor, rows: int = 512) -> float:
    """Mean KL(p ‖ q) in nats a token, p of the `reference`, q of the `model`, over one window [n]."""
    device = next(model.parameters()).device
    tokens, hidden = window[None].to(device), []
    for m in (reference, model):
        base = models.base(m)
        hidden.append(base(tokens, use_cache=False).last_hidden_state[0])
    heads, total = [models.head(m) for m in (reference, model)], 0.0
    for pair in zip(*(h.split(rows) for h in hidden), strict=True):
        p, q = (head(x).float().log_softmax(-1) for head, x in zip(heads, pair, strict=True))
        total += F.kl_div(q, p, reduction="sum", log_target=True).double().item()
    return total / tokens.shape[1]


def perplexity(model: nn.Module, tokens: Tensor) -> Perplexity:
    """Perplexity on `tokens` [windows, seqlen], each window on its own, as in the paper."""
    return Perplexity([window_nll(model, window) for window in tokens])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation (0 for one value, NaN if one is not finite) and n."""
    finite = all(map(math.isfinite, values))
    sd = statistics.stdev(values) if finite and len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": sd if finite else math.nan, "n": len(values)}


def paired_difference(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> dict[str, float]:
    """Mean of a_i − b_i with its Student-t confidence interval; a pair shares a window.

    Average over seeds first: seeds on the same windows are no independent pairs. NaN where a model that
    overflows gives no number. Raises ValueError for unequal lengths or fewer than two pairs.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"{len(a)} and {len(b)} values: a paired interval needs two equal lists, ≥ 2 long"
        )
    d = [x - y for x, y in zip(a, b, strict=True)]
    if not all(map(math.isfinite, d)):
        return dict.fromkeys(("mean", "low", "high"), math.nan) | {"n": len(d)}
    mean = statistics.fmean(d)
    quantile = float(student.ppf((1 + confidence) / 2, len(d) - 1))
    half = quantile * statistics.stdev(d) / math.sqrt(len(d))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(d)}

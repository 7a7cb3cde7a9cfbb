"""Prefix: massive tokens kept in the KV cache ahead of the text (PrefixQuant, arXiv 2410.05265).

A model makes its massive activations at the first token and at a few delimiters, whatever they are. Put
those in front once, keep their keys and values in floating point, and the text behind has none left.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dfrot_lab import evaluation, massive, models, quantized_model
from dfrot_lab.activations import Activations
from dfrot_lab.quantized_model import ModelSpec
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.rotations import Rotations

__all__ = ["choose", "perplexity"]


def choose(
    x: Activations, tokens: Tensor, first: int | None, spec: QuantSpec, count: int = 3
) -> list[int]:
    """The prefix: `first` (the model's BOS, where it has one), then the `count` most often massive tokens.

    Without BOS (None) the first token of the text leads: any will do, being first makes it massive.
    x: activations [sites, windows·seqlen, d] of `tokens` [windows, seqlen]. A token counts where it is
    massive at half of the sites or more; the first of each window, massive for its place, does not.
    """
    flat = tokens.flatten()
    often = torch.stack([massive.is_massive(site, spec) for site in x.X]).float().mean(0) >= 0.5
    often[:: tokens.shape[-1]] = False
    ranked = Counter(flat[often].tolist()).most_common(count)
    lead = [first] if first is not None else flat[:1].tolist()
    return lead + [token for token, _ in ranked if token not in lead]


@torch.inference_mode()
def perplexity(
    model: nn.Module, rotation: Rotations, spec: ModelSpec, prefix: list[int], tokens: Tensor
) -> evaluation.Perplexity:
    """Perplexity on `tokens` [windows, seqlen] of a built `model` with `prefix` ahead of each window.

    The prefix runs without quantized activations, once; its own tokens are not predicted. `model` is
    left quantizing as `spec` says. Raises ValueError for an empty prefix.
    """
    if not prefix:
        raise ValueError(
            "the prefix is empty: give at least one token, or use evaluation.perplexity"
        )
    device = next(model.parameters()).device
    base = models.base(model)
    quantized_model.requantize(model, rotation, replace(spec, activations=None, kv=None))
    try:
        past = DynamicCache(config=base.config)
        base(torch.tensor([prefix], device=device), **evaluation.with_cache(base, past))
    finally:
        quantized_model.requantize(model, rotation, spec)
    return evaluation.Perplexity(
        [evaluation.window_nll(model, w, past=copy.deepcopy(past)) for w in tokens]
    )

"""A prefix in the cache: the same as text ahead of the window, but for quantization."""

import math

import pytest
import torch
from conftest import random_tokens
from torch.nn import functional as F

from dfrot_lab import models, prefix, quantized_model, rotations
from dfrot_lab.activations import Activations
from dfrot_lab.quantized_model import ModelSpec
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.rotations import Rotations


@pytest.fixture(params=models.ARCHITECTURES)
def parts(request):
    model = models.fold_gains(models.tiny(request.param))
    return model, Rotations.standard(model, rotations.random_hadamard(64))


def direct(model, ahead: list[int], window: torch.Tensor) -> float:
    """Mean −log p of the window's tokens after its first, from logits of everything in one pass."""
    tokens = torch.cat([torch.tensor(ahead), window])[None]
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits[0, len(ahead) : -1]
    return F.cross_entropy(logits.double(), window[1:]).item()


def test_without_quantization_it_is_text_ahead(parts):
    model, rotation = parts
    spec = ModelSpec(activations=None)
    built = quantized_model.build(model, rotation, spec)
    tokens = random_tokens(1, (3, 14))
    found = prefix.perplexity(built, rotation, spec, [5, 9, 11], tokens)
    assert found.nll == pytest.approx([direct(model, [5, 9, 11], w) for w in tokens], rel=1e-4)


@pytest.mark.parametrize("bits", ["16-4-16", "4-4-16"])
def test_windows_do_not_see_each_other_and_the_model_stays_quantized(parts, bits):
    model, rotation = parts
    spec = ModelSpec.of(bits, clip_steps=2)
    built = quantized_model.build(model, rotation, spec)
    tokens = random_tokens(2, (2, 14))
    both = prefix.perplexity(built, rotation, spec, [5], tokens).nll
    alone = [prefix.perplexity(built, rotation, spec, [5], w[None]).nll[0] for w in tokens]
    assert both == alone
    assert both != pytest.approx([direct(built, [5], w) for w in tokens], rel=1e-6)
    quantizers = quantized_model._quantizers(built)
    assert all(q.spec == spec.activations for q in quantizers)


def test_an_empty_prefix_is_refused(parts):
    with pytest.raises(ValueError, match="the prefix is empty"):
        prefix.perplexity(*parts, ModelSpec(), [], random_tokens())


def test_the_tokens_that_are_massive_are_chosen():
    x = torch.randn(4, 20, 64, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(20).reshape(2, 10)
    tokens[0, 3] = tokens[0, 6] = tokens[1, 4] = 99  # three times massive
    tokens[1, 7] = 98  # once
    for i in (0, 3, 6, 14, 17):  # the first of a window is massive for its place
        x[:, i] = 0.001 * x[:, i]
        x[:, i, 5] = 8.0
    x[0, 12], x[0, 12, 3] = 0.0, 8.0  # at one site of four: not massive enough
    found = prefix.choose(Activations.of(x), tokens, 1, QuantSpec(), count=2)
    assert found == [1, 99, 98]
    assert prefix.choose(Activations.of(x), tokens, None, QuantSpec(), count=1) == [0, 99]
    assert prefix.choose(Activations.of(x), tokens, 99, QuantSpec(), count=2) == [99, 98]
    assert math.isfinite(x.sum())

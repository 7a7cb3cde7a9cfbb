"""Perplexity against transformers' own loss, intervals against SciPy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import logits, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from dfrot_lab import evaluation, models, quantized_model
from dfrot_lab.evaluation import Perplexity, paired_difference, perplexity, window_nll


@pytest.mark.parametrize("kind", list(models.ARCHITECTURES))
def test_nll_is_the_loss_of_transformers(kind):
    model = models.tiny(kind)
    tokens = random_tokens(1, (3, 40))
    wanted = [model(w[None], labels=w[None]).loss.item() for w in tokens]
    found = perplexity(model, tokens)
    assert found.nll == pytest.approx(wanted, rel=1e-6)
    assert found.value == pytest.approx(math.exp(np.mean(wanted)), rel=1e-5)
    assert max(wanted) - min(wanted) > 1e-3


@pytest.mark.parametrize("block", [1, 7, 100, 383, 384, 4096])
def test_nll_does_not_depend_on_how_the_vocabulary_is_cut(llama, block):
    window = random_tokens(3, (50,))
    wanted = llama(window[None], labels=window[None], use_cache=False).loss.item()
    assert window_nll(llama, window, rows=13, block=block) == pytest.approx(wanted, rel=1e-6)


def test_nll_of_a_quantized_model_is_the_loss_of_transformers(llama):
    model = quantized_model.build(llama, None, quantized_model.ModelSpec())
    window = random_tokens(2, (40,))
    wanted = model(window[None], labels=window[None], use_cache=False).loss.item()
    assert window_nll(model, window) == pytest.approx(wanted, rel=1e-6)
    assert window_nll(llama, window) != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("rows", [1, 7, 39, 1000])
def test_cutting_the_head_changes_nothing(llama, rows):
    window = random_tokens(2, (40,))
    assert window_nll(llama, window, rows) == pytest.approx(window_nll(llama, window), rel=1e-6)


def test_uniform_logits_give_the_vocabulary(llama):
    models.head(llama).weight.data.zero_()
    assert perplexity(llama, random_tokens(0, (2, 30))).value == pytest.approx(384, rel=1e-6)


def test_extreme_losses():
    assert Perplexity([1e3, 1e3]).value == math.inf
    assert Perplexity([math.inf, 1.0]).value == math.inf
    assert math.isnan(Perplexity([math.nan, 1.0]).value)
    assert Perplexity([0.0]).value == 1


@given(
    st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=20),
    st.sampled_from([0.9, 0.95, 0.99]),
)
def test_interval_is_scipys(pairs, confidence):
    a, b = zip(*pairs, strict=True)
    found = paired_difference(a, b, confidence)
    assert found["n"] == len(pairs)
    assert found["mean"] == pytest.approx(np.mean(np.subtract(a, b)), abs=1e-12)
    if np.ptp(np.subtract(a, b)) > 1e-6:
        low, high = ttest_rel(a, b).confidence_interval(confidence)
        assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


def test_equal_differences_have_no_width():
    assert paired_difference([2.0, 3.0], [1.0, 2.0]) == {"mean": 1, "low": 1, "high": 1, "n": 2}


@pytest.mark.parametrize("a, b", [([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_unpaired_values_are_refused(a, b):
    with pytest.raises(ValueError, match=rf"{len(a)} and {len(b)} values: .* two equal lists"):
        paired_difference(a, b)


def test_spread():
    assert evaluation.spread([3.0]) == {"mean": 3, "sd": 0, "n": 1}
    values = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = evaluation.spread(values.tolist())
    assert found["mean"] == pytest.approx(values.mean().item())
    assert found["sd"] == pytest.approx(values.std().item()) and found["n"] == 9


def test_kl_is_that_of_the_two_softmaxes(llama):
    other, window = models.fold_gains(models.tiny("llama", seed=1)), random_tokens(0, (1, 37))[0]
    p, q = (logits(m, window[None])[0].double().softmax(-1) for m in (llama, other))
    wanted = (p * (p / q).log()).sum(-1).mean().item()
    assert evaluation.window_kl(other, llama, window, rows=10) == pytest.approx(wanted, rel=1e-4)
    assert evaluation.window_kl(llama, llama, window) == pytest.approx(0, abs=1e-6)

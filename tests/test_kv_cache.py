"""A quantized KV cache: what a cache would store, the same with and without one, padding respected."""

import pytest
import torch

from dfrot_lab import kv_cache, models, quantized_model, rotations
from dfrot_lab.kv_cache import KVError, KVSpec
from dfrot_lab.quantizers import QuantSpec, fake_quantize
from dfrot_lab.rotations import Rotations


def tokens(batch, length, seed=0):
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def built(kind="llama", bits="16-16-4", **options):
    model = models.fold_gains(models.tiny(kind, planted=30))
    rotation = Rotations.standard(model, rotations.random_hadamard(64, 0))
    return quantized_model.build(model, rotation, quantized_model.ModelSpec.of(bits, **options))


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
def test_sixteen_bits_and_r3_change_nothing(kind):
    model = models.fold_gains(models.tiny(kind)).double()
    x = tokens(2, 33)
    with torch.inference_mode():
        before = model(x).logits
        after = kv_cache.quantize_cache(model, KVSpec(bits=16)).forward(x).logits
    assert (after - before).abs().max() / before.abs().max() < 1e-3


def test_equals_attention_written_out():
    model = models.fold_gains(models.tiny("llama", heads=4, kv_heads=2))
    kv_cache.quantize_cache(model, KVSpec(bits=4, R3=False))
    attention, spec, seen = model.model.layers[0].self_attn, QuantSpec(bits=4), {}
    hook = attention.o_proj.register_forward_pre_hook(lambda m, i: seen.update(out=i[0]))
    q, k, v = (torch.randn(1, h, 9, 16) for h in (4, 2, 2))
    got, _ = kv_cache._attention(attention, q, k, v, None, scaling=0.25)
    hook.remove()
    k, v = (fake_quantize(t, spec).repeat_interleave(2, 1) for t in (k, v))
    scores = (q @ k.mT * 0.25).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(got, (scores.softmax(-1) @ v).transpose(1, 2))


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
@pytest.mark.parametrize("bits", ["16-16-4", "4-4-4"])
def test_cached_decoding_is_full_prefix_recomputation(kind, bits):
    model = built(kind, bits)
    x = tokens(2, 11)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(x, use_cache=True, **options)
    whole = model.generate(x, use_cache=False, **options)
    assert (cached == whole).all()


def test_left_padding_does_not_leak():
    model, x = built(), tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), x], 1)
    mask = (torch.arange(13) >= 4).long()[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(x, attention_mask=torch.ones_like(x), **options)
    batch = model.generate(padded, attention_mask=mask, **options)
    assert (batch[:, 13:] == alone[:, 9:]).all()


def test_r3_helps_a_key_with_an_outlier_channel():
    model = models.fold_gains(models.tiny("llama"))
    attention = model.model.layers[0].self_attn
    # values 0 and 1 are exact at any bits, so that only the keys count; weak scores, so that they all do
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, h, 200, 16, generator=generator) for h in (4, 2))
    v = (torch.arange(200) % 2).float()[:, None] * torch.eye(16)[0].expand(1, 2, 1, 16)
    k[..., 3] *= 20
    exact = {}
    for r3 in (False, True):
        for bits in (16, 3):
            kv_cache.quantize_cache(model, KVSpec(bits=bits, R3=r3))
            exact[r3, bits], _ = kv_cache._attention(attention, q, k, v, None, scaling=0.02)
    lost = {r: (exact[r, 3] - exact[r, 16]).square().mean() for r in (False, True)}
    assert lost[True] < lost[False]


def test_the_original_model_keeps_its_attention():
    model = models.fold_gains(models.tiny("llama"))
    quantized_model.build(model, None, quantized_model.ModelSpec.of("16-16-4"))
    assert model.config._attn_implementation != kv_cache.NAME


def test_bad_settings_are_refused():
    model = models.fold_gains(models.tiny("llama"))
    with pytest.raises(KVError, match="group size 128"):
        kv_cache.quantize_cache(model, KVSpec(group_size=128))
    with pytest.raises(ValueError, match="bits = '4-4-1': each is 2 to 16"):
        quantized_model.ModelSpec.of("4-4-1")

"""KV cache: keys and values as a 4-bit cache would give them back, through transformers' attention.

Keys are turned by R3, a Hadamard of the head's size, after RoPE, and so are the queries: scores stay
(qH)(kH)ᵀ = qkᵀ, but kH has no outlier channel. Every key and value is quantized on its own (asymmetric,
one group of head_dim numbers a token and head), so quantizing what a cache returns anew at each step gives
what was stored: decoding with and without a cache agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from dfrot_kernels import hadamard
from torch import Tensor, nn

from dfrot_lab import models
from dfrot_lab.quantizers import QuantSpec, fake_quantize

__all__ = ["KVError", "KVSpec", "quantize_cache"]

NAME = "dfrot_kv"


class KVError(ValueError):
    """A KV cache that cannot be quantized so; one line: what, which value, what to do."""


@dataclass(frozen=True)
class KVSpec:
    """bits of keys and of values; clip of both; R3: the Hadamard on queries and keys, on or off.

    group_size: None for head_dim, the only size so far: the paper's 128 is the head_dim of its models.
    """

    bits: int = 4
    clip: float = 1.0
    group_size: int | None = None
    R3: bool = True

    def __post_init__(self) -> None:
        self.quantizer  # noqa: B018  (raises here, not in the first forward)

    @property
    def quantizer(self) -> QuantSpec:
        """The spec of one key or value; ValueError for bits or clip out of range."""
        return QuantSpec(bits=self.bits, clip=self.clip)


def quantize_cache(model: nn.Module, spec: KVSpec | None) -> nn.Module:
    """Let every attention layer of `model` see quantized keys and values, in place; returns it.

    None: as they are, after an earlier call. Raises KVError for a group size other than head_dim.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if spec is None:
        if model.config._attn_implementation == NAME:
            model.set_attn_implementation("sdpa")
        return model
    for layer in models.layers(model):
        size = layer.module.self_attn.head_dim
        if spec.group_size not in (None, size):
            raise KVError(
                f"KV group size {spec.group_size}: only head_dim, {size} here, is supported"
            )
        layer.module.self_attn.kv_spec = spec
    AttentionInterface.register(NAME, _attention)
    # without a mask function of the same name transformers builds no mask, and padding is attended to
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return model


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, **keywords):
    """Scaled dot-product attention on Q(kH), Q(v); shapes [batch, heads, tokens, head_dim]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    spec: KVSpec = module.kv_spec
    if spec.R3:  # here and not in the cache: with use_cache=False keys must be turned as well
        query, key = hadamard.transform(query), hadamard.transform(key)
    key, value = (fake_quantize(x, spec.quantizer) for x in (key, value))
    return sdpa_attention_forward(module, query, key, value, mask, **keywords)

"""Tiny models: random weights over bytes with a planted massive token, for tests and the smoke profile."""

from __future__ import annotations

import torch
from torch import nn

from dfrot_lab.architectures import ARCHITECTURES, ModelError
from dfrot_lab.hub import quiet_transformers

__all__ = ["tiny"]


def tiny(
    kind: str = "llama",
    *,
    seed: int = 0,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    layers: int = 2,
    intermediate: int = 96,
    tied: bool = True,
    planted: float = 300.0,
    **overrides,
) -> nn.Module:
    """A random model of family `kind` over bytes, for tests and the smoke profile (vocabulary 384).

    Every gain and bias is random, so that folding is really tested. Four channels of the stream are
    loud, as in real models, which keeps ordinary tokens above the Gaussian floor. planted: size, in
    units of the others, of one channel in the newline's embedding: a massive token to be found.
    """
    transformers = quiet_transformers()

    if kind not in ARCHITECTURES:
        raise ModelError(f"tiny model {kind!r} is unknown: use one of {', '.join(ARCHITECTURES)}")
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=384,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        **({"pad_token_id": None, "sliding_window": None} | overrides),
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator, a = torch.Generator().manual_seed(seed), ARCHITECTURES[kind]
    loud = torch.ones(hidden)
    loud[1 :: hidden // 4] = 8
    table = model.get_submodule(a.embedding).weight
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if "norm" in name else noise / p.shape[-1] ** 0.5)
            if p is table:
                p.mul_(loud)
            elif name.endswith((f"{a.attention_output}.weight", f"{a.mlp_output}.weight")):
                p.mul_(0.1 * loud[:, None])  # quiet enough to leave the embedding audible
        newline = transformers.ByT5Tokenizer().convert_tokens_to_ids("\n")
        table[newline, hidden // 3] = planted / hidden**0.5
    return model.eval()

"""Architecture: where a decoder keeps its norms and linears, and the folding of its RMSNorm gains.

RMSNorm(x; g) = g ⊙ x/rms(x). With the gain g moved into the linears that follow (W ← W·diag(g)) the
norm commutes with any orthogonal R: rms(xR) = rms(x), hence norm(xR) = norm(x)R (QuaRot, Section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Layer",
    "ModelError",
    "architecture",
    "base",
    "fold_gains",
    "head",
    "is_folded",
    "layers",
    "norm_sites",
    "preserve_norm_dtype",
]


class ModelError(ValueError):
    """A model that cannot be loaded or rotated; one line: what, which value, what to do."""


@dataclass(frozen=True)
class Architecture:
    """Module names of one decoder family; all families here share the residual-stream layout."""

    model_type: str
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_inputs: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_output: str = "self_attn.o_proj"
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output: str = "mlp.down_proj"


# One table: Qwen2 adds biases to q, k, v and Qwen3 normalizes q and k per head, but both sit outside
# the residual stream, so the same names and the same algebra serve all four.
ARCHITECTURES = {t: Architecture(t) for t in ("llama", "mistral", "qwen2", "qwen3")}

_REFUSED = {
    "gemma": "its RMSNorm multiplies by (1 + gain)",
    "gemma2": "its post-norms act on what a sublayer adds, where a gain does not commute with R1",
    "gemma3": "its post-norms act on what a sublayer adds, where a gain does not commute with R1",
    "gemma3_text": "its post-norms act on what a sublayer adds, where a gain does not commute with R1",
    "olmo2": "its post-norms act on what a sublayer adds, where a gain does not commute with R1",
    "gpt2": "its LayerNorm subtracts the mean, which an orthogonal R does not preserve",
    "gpt_neox": "its LayerNorm subtracts the mean, which an orthogonal R does not preserve",
    "opt": "its LayerNorm subtracts the mean, which an orthogonal R does not preserve",
    "phi": "its LayerNorm subtracts the mean, which an orthogonal R does not preserve",
    "phi3": "its q, k, v and gate, up weights are fused and not in our table of module names",
}


@dataclass(frozen=True)
class Layer:
    """One decoder layer, by role: the two norms and the linears that read and write the stream."""

    index: int
    module: nn.Module
    attention_norm: nn.Module
    mlp_norm: nn.Module
    attention_inputs: dict[str, nn.Linear]
    attention_output: nn.Linear
    mlp_inputs: dict[str, nn.Linear]
    mlp_output: nn.Linear

    @property
    def groups(self) -> list[dict[str, nn.Linear]]:
        """The linears by name, those that share an input together, in order of execution."""
        return [
            self.attention_inputs,
            {"self_attn.o_proj": self.attention_output},
            self.mlp_inputs,
            {"mlp.down_proj": self.mlp_output},
        ]


def architecture(model: nn.Module) -> Architecture:
    """The table row of `model`; ModelError with name and reason where there is none."""
    kind = model.config.model_type
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    reason = _REFUSED.get(kind, "it is not in our table of module names")
    raise ModelError(
        f"architecture {kind!r} cannot be rotated: {reason}. Supported: {', '.join(ARCHITECTURES)}"
    )


def layers(model: nn.Module) -> list[Layer]:
    """The decoder layers of `model`, in order, with their parts by role."""
    a = architecture(model)
    return [
        Layer(
            index=i,
            module=m,
            attention_norm=m.get_submodule(a.attention_norm),
            mlp_norm=m.get_submodule(a.mlp_norm),
            attention_inputs={n: m.get_submodule(n) for n in a.attention_inputs},
            attention_output=m.get_submodule(a.attention_output),
            mlp_inputs={n: m.get_submodule(n) for n in a.mlp_inputs},
            mlp_output=m.get_submodule(a.mlp_output),
        )
        for i, m in enumerate(model.get_submodule(a.layers))
    ]


def norm_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The in-layer norms by site name, in order of execution: 'layers.0.attention', 'layers.0.mlp', …"""
    return {
        f"layers.{layer.index}.{role}": norm
        for layer in layers(model)
        for role, norm in (("attention", layer.attention_norm), ("mlp", layer.mlp_norm))
    }


def head(model: nn.Module) -> nn.Linear:
    """The language-model head."""
    return model.get_submodule(architecture(model).head)


def base(model: nn.Module) -> nn.Module:
    """The model below its head: embedding, layers and the final norm."""
    return model.get_submodule(architecture(model).layers.split(".")[0])


def is_folded(model: nn.Module) -> bool:
    """Whether the RMSNorm gains of `model` have been folded."""
    return "gains" in (getattr(model.config, "dfrot_merged", None) or [])


@torch.no_grad()
def fold_gains(model: nn.Module) -> nn.Module:
    """Fold every in-layer and the final RMSNorm gain into the linears that follow, in place.

    W[out, in] ← W·diag(g) in fp64, g ← 1. The embedding and the head are untied first: the head
    takes the final norm's gain, the embedding does not. Folding twice is a no-op. Returns `model`.
    """
    a = architecture(model)
    if is_folded(model):
        return model
    lm_head = head(model)
    if lm_head.weight is model.get_submodule(a.embedding).weight:
        w = lm_head.weight
        lm_head.weight = nn.Parameter(w.detach().clone(), requires_grad=w.requires_grad)
    model.config.tie_word_embeddings = False
    pairs = [(model.get_submodule(a.final_norm), [lm_head])]
    for layer in layers(model):
        pairs.append((layer.attention_norm, list(layer.attention_inputs.values())))
        pairs.append((layer.mlp_norm, list(layer.mlp_inputs.values())))
    for norm, linears in pairs:
        gain = norm.weight.double()
        for linear in linears:
            linear.weight.copy_((linear.weight.double() * gain).to(linear.weight.dtype))
        norm.weight.fill_(1.0)
    model.config.dfrot_merged = ["gains"]
    return model


class _DtypePreservingRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) in the dtype of x; the stock module computes in fp32 (8e-7 error)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def preserve_norm_dtype(model: nn.Module) -> nn.Module:
    """Swap every RMSNorm of `model`, in place, for one that keeps fp64; for exact comparisons."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            parent, _, child = name.rpartition(".")
            norm = _DtypePreservingRMSNorm(module.weight.detach(), module.variance_epsilon)
            setattr(model.get_submodule(parent), child, norm)
    return model

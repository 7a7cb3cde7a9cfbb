"""Quantized model: rotations merged, linears swapped in place for fake-quantized ones.

It stays the transformers PreTrainedModel it was, so that generate, save and evaluation harnesses work.
Inputs of q/k/v (and of gate/up) are quantized once and shared, as an int4 engine would.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from dfrot_kernels import hadamard
from torch import Tensor, nn
from torch.nn import functional as F

from dfrot_lab import gptq, kv_cache, massive, models, rotations
from dfrot_lab.gptq import GPTQ, GPTQError
from dfrot_lab.kv_cache import KVSpec
from dfrot_lab.quantizers import QuantSpec, fake_quantize, round_to_nearest
from dfrot_lab.rotations import Rotations

__all__ = [
    "KEEP",
    "InputQuantizer",
    "ModelSpec",
    "QuantLinear",
    "build",
    "drain_kept",
    "keep_tokens",
    "kept_tokens",
]

KEEP = ("none", "massive", "first")


@dataclass(frozen=True)
class ModelSpec:
    """What is quantized. None leaves it in floating point; the head always stays there.

    keep: tokens whose activations bypass quantization at q/k/v and gate/up (not at o and down, as in
    the paper's QuaRot.FP16()): "none", "massive" (per token and site, by `massive.is_massive` on the
    un-rotated token), or "first" (position 0 of what one forward pass is given, so no KV cache).
    clip_steps: see `search_step`. kv: the KV cache, see `kv_cache`. method: of the weights, "rtn" or
    "gptq", the latter as `gptq` says.
    """

    weights: QuantSpec | None = None
    activations: QuantSpec | None = field(default_factory=QuantSpec)
    keep: str = "none"
    clip_steps: int = 80
    kv: KVSpec | None = None
    method: str = "rtn"
    gptq: GPTQ = field(default_factory=GPTQ)

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise ValueError(f"keep = {self.keep!r}: use one of {', '.join(KEEP)}")
        if self.method not in ("rtn", "gptq"):
            raise ValueError(f"method = {self.method!r}: weights are quantized by 'rtn' or 'gptq'")
        if self.weights is not None and self.weights.granularity not in ("channel", "group"):
            raise ValueError(
                f"weights are per 'channel' or 'group', not {self.weights.granularity!r}"
            )

    @classmethod
    def of(cls, bits: str, **options) -> ModelSpec:
        """From the field's W-A-KV notation: '4-4-16' is 4-bit weights and activations, KV as it is.

        16 leaves a part in floating point. Weights: symmetric per channel; activations: asymmetric per
        token, keys and values in groups of head_dim with R3, as the paper evaluates. Raises ValueError
        for other forms.
        """
        try:
            w, a, kv = (int(part) for part in bits.split("-"))
        except ValueError:
            raise ValueError(
                f"bits = {bits!r}: use W-A-KV, such as '4-4-16' or '16-4-16'"
            ) from None
        return cls(
            weights=QuantSpec(bits=w, symmetric=True, granularity="channel") if w < 16 else None,
            activations=QuantSpec(bits=a) if a < 16 else None,
            kv=KVSpec(bits=kv) if kv < 16 else None,
            **options,
        )


class InputQuantizer(nn.Module):
    """Quantize one activation tensor [batch, seqlen, D], once for all the linears that read it.

    `kept` counts, by position in the sequence, the tokens that bypassed quantization.
    """

    def __init__(self, spec: QuantSpec | None, readers: int, keep: Callable | None = None) -> None:
        super().__init__()
        self.spec, self.readers, self.keep = spec, readers, keep
        self.kept: Tensor | None = None
        self._last: tuple[Tensor, Tensor, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Q(x); the readers after the first are given the same tensor."""
        if self.spec is None:
            return x
        if self._last is not None and self._last[0] is x:
            _, q, reads = self._last
        else:
            q, reads = self._quantize(x), 0
        # the pair is dropped with its last reader: nothing stays alive between layers
        self._last = (x, q, reads + 1) if reads + 1 < self.readers else None
        return q

    def _quantize(self, x: Tensor) -> Tensor:
        q = fake_quantize(x, self.spec)
        if self.keep is None:
            return q
        mask = self.keep(x)
        counts = mask.reshape(-1, mask.shape[-1]).sum(0).cpu()
        if self.kept is None or self.kept.shape != counts.shape:
            self.kept = torch.zeros_like(counts)
        self.kept += counts
        return torch.where(mask[..., None], x, q)


class QuantLinear(nn.Module):
    """y = Q(x H)·Wᵀ + b, H present only where R4 is online; W is what `weights` left of it."""

    def __init__(
        self, linear: nn.Linear, quantizer: InputQuantizer, *, online_hadamard: bool
    ) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantizer, self.online_hadamard = quantizer, online_hadamard

    def forward(self, x: Tensor) -> Tensor:
        """The linear's output, from its quantized input."""
        if self.online_hadamard:
            x = hadamard.transform(x)
        return F.linear(self.quantizer(x), self.weight, self.bias)


@torch.no_grad()
def build(
    model: nn.Module,
    rotation: Rotations | None,
    spec: ModelSpec,
    *,
    calibration: Tensor | None = None,
) -> nn.Module:
    """A quantized copy of the gain-folded `model` with `rotation` merged; `model` is left as it is.

    calibration: tokens [windows, seqlen] for GPTQ; GPTQError without them or with too few. Raises
    RotationError (see `rotations.merge`) and ValueError for a spec that does not fit.
    """
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError("the model is quantized already: build from the one that was loaded")
    rotation = rotation or Rotations()
    if spec.weights is not None and spec.method == "gptq" and calibration is None:
        raise GPTQError("GPTQ needs calibration tokens: give build(…, calibration=tokens)")
    q = rotations.merge(copy.deepcopy(model), rotation)
    if spec.weights is not None and spec.method == "gptq":
        how = replace(spec.gptq, clip_steps=spec.clip_steps)
        gptq.quantize_layers(q, calibration, spec.weights, how, online_hadamard=rotation.R4)
    for layer in models.layers(q):
        groups = [
            (layer.attention_inputs, False),
            ({"self_attn.o_proj": layer.attention_output}, False),
            (layer.mlp_inputs, False),
            ({"mlp.down_proj": layer.mlp_output}, rotation.R4),
        ]
        for linears, online in groups:
            quantizer = InputQuantizer(spec.activations, len(linears))
            for name, linear in linears.items():
                if spec.weights is not None and spec.method == "rtn":
                    w = round_to_nearest(linear.weight, spec.weights, steps=spec.clip_steps)
                    linear.weight.copy_(w)
                parent, _, child = name.rpartition(".")
                swapped = QuantLinear(linear, quantizer, online_hadamard=online)
                setattr(layer.module.get_submodule(parent), child, swapped)
    if spec.kv is not None:
        kv_cache.quantize_cache(q, spec.kv)
    return keep_tokens(q, rotation, spec)


def keep_tokens(model: nn.Module, rotation: Rotations, spec: ModelSpec) -> nn.Module:
    """Set which tokens bypass quantization in a built `model`, in place, as `spec.keep` says."""
    keep = _keeper(spec, rotation)
    for quantizer in _site_quantizers(model).values():
        quantizer.keep, quantizer.kept = keep, None
    return model


def _keeper(spec: ModelSpec, rotation: Rotations) -> Callable | None:
    """The mask of the tokens to keep, as a function of x [batch, seqlen, d], or None."""
    if spec.keep == "none" or spec.activations is None:
        return None
    if spec.keep == "first":
        return lambda x: (torch.arange(x.shape[1], device=x.device) == 0).expand(x.shape[:2])
    if rotation.R1 is None:
        return lambda x: massive.is_massive(x.float(), spec.activations)
    inverse: dict[torch.device, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.device not in inverse:  # moved once, not for every site of every window
            inverse[x.device] = rotation.R1.mT.float().to(x.device)
        return massive.is_massive(x.float() @ inverse[x.device], spec.activations)

    return keep


def kept_tokens(model: nn.Module) -> dict[str, Tensor]:
    """By site ('layers.0.attention', …): how often each position [seqlen] was kept, so far."""
    return {site: q.kept for site, q in _site_quantizers(model).items() if q.kept is not None}


def drain_kept(model: nn.Module) -> list[tuple[int, list[str]]]:
    """(position, sites where it was kept) since the last call, in order of position; then forgets."""
    where: dict[int, list[str]] = {}
    for site, quantizer in _site_quantizers(model).items():
        if quantizer.kept is not None:
            for position in quantizer.kept.nonzero().flatten().tolist():
                where.setdefault(position, []).append(site)
            quantizer.kept = None
    return sorted(where.items())


def _site_quantizers(model: nn.Module) -> dict[str, InputQuantizer]:
    found = {}
    for layer in models.layers(model):
        for role, linears in (("attention", layer.attention_inputs), ("mlp", layer.mlp_inputs)):
            found[f"layers.{layer.index}.{role}"] = next(iter(linears.values())).quantizer
    return found

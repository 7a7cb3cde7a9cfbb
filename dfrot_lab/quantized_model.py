"""Quantized model: rotations merged, linears swapped in place for fake-quantized ones.

It stays the transformers PreTrainedModel it was, so that generate, save and evaluation harnesses work.
Inputs of q/k/v (and of gate/up) are quantized once and shared, as an int4 engine would.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfrot_lab import gptq, kv_cache, massive, models, rotations
from dfrot_lab.gptq import GPTQ, GPTQError
from dfrot_lab.hessians import Hessians
from dfrot_lab.kv_cache import KVSpec
from dfrot_lab.quantizers import QuantSpec, calibrate, fake_quantize, round_to_nearest
from dfrot_lab.rotations import Rotations

__all__ = [
    "KEEP",
    "InputQuantizer",
    "ModelSpec",
    "QuantLinear",
    "build",
    "drain_kept",
    "kept_tokens",
    "requantize",
]

KEEP = ("none", "massive", "first")


@dataclass(frozen=True)
class ModelSpec:
    """What is quantized. None leaves it in floating point; the head always stays there.

    keep: tokens whose activations bypass quantization at q/k/v and gate/up (not at o and down, as in
    the paper's QuaRot.FP16()): "none", "massive" (per token and site, by `massive.is_massive` on the
    un-rotated token), or "first" (position 0 of what one forward pass is given, so no KV cache).
    clip_steps: see `search_step`. kv: the KV cache, see `kv_cache`. method: of the weights, "rtn" or
    "gptq", the latter as `gptq` says. Activations per "token" or "group" are quantized dynamically; per
    "tensor" statically, with one step for each quantizer from the extremes of calibration tokens.
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
        if self.activations is not None and self.activations.granularity == "channel":
            raise ValueError("activations are per 'token', 'group' or 'tensor', not 'channel'")

    @property
    def static(self) -> bool:
        """Whether activations are quantized with steps fixed on calibration tokens."""
        return self.activations is not None and self.activations.granularity == "tensor"

    @classmethod
    def of(
        cls,
        bits: str,
        *,
        per: str = "token",
        group_size: int | None = None,
        clip: float = 1.0,
        **options: Any,
    ) -> ModelSpec:
        """From the field's W-A-KV notation: '4-4-16' is 4-bit weights and activations, KV as it is.

        16 leaves a part in floating point. Weights: symmetric per channel; activations: asymmetric per
        token, keys and values in groups of head_dim with R3, as the paper evaluates. per, group_size,
        clip: of the activations, `per` one of "token", "group", "tensor". Raises ValueError for other
        forms and for bits outside 2 to 16.
        """
        try:
            w, a, kv = (int(part) for part in bits.split("-"))
        except ValueError:
            raise ValueError(
                f"bits = {bits!r}: use W-A-KV, such as '4-4-16' or '16-4-16'"
            ) from None
        if max(w, a, kv) > 16 or min(w, a, kv) < 2:
            raise ValueError(f"bits = {bits!r}: each is 2 to 16, and 16 leaves a part as it is")
        return cls(
            weights=QuantSpec(bits=w, symmetric=True, granularity="channel") if w < 16 else None,
            activations=QuantSpec(bits=a, granularity=per, group_size=group_size, clip=clip)
            if a < 16
            else None,
            kv=KVSpec(bits=kv) if kv < 16 else None,
            **options,
        )


class InputQuantizer(nn.Module):
    """Quantize one activation tensor [batch, seqlen, D], once for all the linears that read it.

    `kept` counts, by position in the sequence, the tokens that bypassed quantization. `static`: scale
    and zero point, where they do not depend on x. `seen`: while a list, x passes as it is and leaves its
    extremes there.
    """

    def __init__(self, readers: int) -> None:
        super().__init__()
        self.readers = readers
        self.spec: QuantSpec | None = None
        self.keep: Callable | None = None
        self.kept: Tensor | None = None
        self.static: tuple[Tensor, Tensor] | None = None
        self.seen: list[Tensor] | None = None
        self._last: tuple[Tensor, Tensor, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Q(x); the readers after the first are given the same tensor."""
        if self.seen is not None:
            self.seen.append(torch.stack([x.amin(), x.amax()]).float().cpu())
            return x
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
        if self.static is None:
            q = fake_quantize(x, self.spec)
        else:
            scale, zero = (part.to(x) for part in self.static)
            q = fake_quantize(x, self.spec, scale=scale, zero=zero)
        if self.keep is None:
            return q
        mask = self.keep(x)
        counts = mask.reshape(-1, mask.shape[-1]).sum(0).cpu()
        if self.kept is None or self.kept.shape != counts.shape:
            self.kept = torch.zeros_like(counts)
        self.kept += counts
        return torch.where(mask[..., None], x, q)


class QuantLinear(nn.Module):
    """y = Q(x H)·Wᵀ + b, H present only where a Hadamard is online; W is what `weights` left of it.

    online: what turns x first (R4 before down_proj, the cross-head Hadamard before o_proj), or None.
    """

    def __init__(
        self, linear: nn.Linear, quantizer: InputQuantizer, online: Callable | None = None
    ) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantizer, self.online = quantizer, online

    def forward(self, x: Tensor) -> Tensor:
        """The linear's output, from its quantized input."""
        if self.online is not None:
            x = self.online(x)
        return F.linear(self.quantizer(x), self.weight, self.bias)


@torch.no_grad()
def build(
    model: nn.Module,
    rotation: Rotations | None,
    spec: ModelSpec,
    *,
    calibration: Tensor | None = None,
    hessians: Hessians | None = None,
) -> nn.Module:
    """A quantized copy of the gain-folded `model` with `rotation` merged; `model` is left as it is.

    calibration: tokens [windows, seqlen] for GPTQ and static steps; GPTQError or ValueError without
    them or with too few. hessians: of the floating-point model, for GPTQ in place of tokens. Raises
    RotationError (see `rotations.merge`) and ValueError for a spec that does not fit.
    """
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError("the model is quantized already: build from the one that was loaded")
    rotation = rotation or Rotations()
    if spec.weights is not None and spec.method == "gptq" and calibration is hessians is None:
        raise GPTQError(
            "GPTQ needs calibration tokens or Hessians: give build(…, calibration=tokens)"
        )
    q = rotations.merge(copy.deepcopy(model), rotation)
    before_o, before_down = rotations.online(q, rotation)
    if spec.weights is not None and spec.method == "gptq":
        how = replace(spec.gptq, clip_steps=spec.clip_steps)
        if hessians is not None:
            gptq.quantize_with(q, hessians.of(rotation), spec.weights, how)
        else:
            gptq.quantize_layers(q, calibration, spec.weights, how, online=(before_o, before_down))
    for layer in models.layers(q):
        turns = (None, before_o, None, before_down)
        for linears, online in zip(layer.groups, turns, strict=True):
            quantizer = InputQuantizer(len(linears))
            for name, linear in linears.items():
                if spec.weights is not None and spec.method == "rtn":
                    w = round_to_nearest(linear.weight, spec.weights, steps=spec.clip_steps)
                    linear.weight.copy_(w)
                parent, _, child = name.rpartition(".")
                swapped = QuantLinear(linear, quantizer, online)
                setattr(layer.module.get_submodule(parent), child, swapped)
    return requantize(q, rotation, spec, calibration=calibration)


@torch.no_grad()
def requantize(
    model: nn.Module,
    rotation: Rotations | None,
    spec: ModelSpec,
    *,
    calibration: Tensor | None = None,
) -> nn.Module:
    """Set how a built `model` quantizes activations and KV cache, in place; its weights stay.

    rotation: what was merged. calibration: tokens [windows, seqlen] for static steps, which are the
    extremes of the unquantized inputs; ValueError without them. Returns `model`.
    """
    keep = _keeper(spec, rotation or Rotations())
    quantizers = _quantizers(model)
    for quantizer in quantizers:
        quantizer.spec, quantizer.static, quantizer.keep = spec.activations, None, None
    for quantizer in _site_quantizers(model).values():
        quantizer.keep, quantizer.kept = keep, None
    kv_cache.quantize_cache(model, spec.kv)
    if spec.static:
        if calibration is None:
            raise ValueError("static steps need calibration tokens: give calibration=tokens")
        _calibrate(model, quantizers, spec.activations, calibration)
    return model


def _calibrate(
    model: nn.Module, quantizers: list[InputQuantizer], spec: QuantSpec, tokens: Tensor
) -> None:
    device = next(model.parameters()).device
    base = model.get_submodule(models.architecture(model).layers.split(".")[0])
    for quantizer in quantizers:
        quantizer.seen = []
    try:
        for window in tokens:
            base(window[None].to(device), use_cache=False)
        for quantizer in quantizers:
            quantizer.static = calibrate(quantizer.seen, spec)
    finally:
        for quantizer in quantizers:
            quantizer.seen = None


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


def drain_kept(model: nn.Module) -> list[tuple[int, list[str]]]:
    """(position, sites where it was kept) since the last call, in order of position; then forgets."""
    where: dict[int, list[str]] = {}
    for site, quantizer in _site_quantizers(model).items():
        if quantizer.kept is not None:
            for position in quantizer.kept.nonzero().flatten().tolist():
                where.setdefault(position, []).append(site)
            quantizer.kept = None
    return sorted(where.items())


def kept_tokens(model: nn.Module) -> dict[str, Tensor]:
    """By site ('layers.0.attention', …): how often each position [seqlen] was kept, so far."""
    return {site: q.kept for site, q in _site_quantizers(model).items() if q.kept is not None}


def _quantizers(model: nn.Module) -> list[InputQuantizer]:
    """Every quantizer of `model` once, in order; ValueError for a model that was not built."""
    found = {id(m): m for m in model.modules() if isinstance(m, InputQuantizer)}
    if not found:
        raise ValueError("the model is not quantized: make it with quantized_model.build")
    return list(found.values())


def _site_quantizers(model: nn.Module) -> dict[str, InputQuantizer]:
    found = {}
    for layer in models.layers(model):
        for role, linears in (("attention", layer.attention_inputs), ("mlp", layer.mlp_inputs)):
            found[f"layers.{layer.index}.{role}"] = next(iter(linears.values())).quantizer
    return found

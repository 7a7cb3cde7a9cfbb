"""Quantized model: rotations merged, linears swapped in place for fake-quantized ones.

It stays the transformers PreTrainedModel it was, so that generate, save and evaluation harnesses work.
`pack` then swaps those for linears that hold 4-bit weights and compute with int4 kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from dfrot_kernels import backends, hadamard
from torch import Tensor, nn

from dfrot_lab import gptq, kv_cache, massive, models, rotations
from dfrot_lab.gptq import GPTQ, GPTQError
from dfrot_lab.hessians import Hessians
from dfrot_lab.kv_cache import KVSpec
from dfrot_lab.linears import InputQuantizer, Int4Linear, Int4Quantizer, QuantLinear
from dfrot_lab.quantizers import QuantSpec, calibrate, round_to_nearest
from dfrot_lab.rotations import Rotations

__all__ = [
    "KEEP",
    "InputQuantizer",
    "Int4Linear",
    "ModelSpec",
    "QuantLinear",
    "build",
    "drain_kept",
    "kept_tokens",
    "pack",
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
    if any(isinstance(module, (QuantLinear, Int4Linear)) for module in model.modules()):
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


@torch.no_grad()
def pack(model: nn.Module, *, backend: str | None = None) -> nn.Module:
    """Swap every fake-quantized linear of a built `model`, in place, for one with packed 4-bit weights.

    The model computes the same, from 4-bit codes instead of their floating-point values, and R4 is fused
    with the quantizer. backend: "triton" or "torch" (see `dfrot_kernels.backends`), by default the one for
    the model's device. Raises ValueError for what int4 kernels do not compute: weights that are not 4 bits
    per channel, activations other than 4 bits per token (or left as they are), kept tokens.
    """
    quantizers = _quantizers(model)  # also says so when the model was not built
    device = next(model.parameters()).device
    backend = backend or backends.default(device)
    backends.get(backend)
    for quantizer in quantizers:
        _check_packable(quantizer)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    shared: dict[int, Int4Quantizer | None] = {}
    packed: dict[str, Int4Linear] = {}  # all of them, before the first one is swapped
    for name, linear in linears.items():
        old, turned = linear.quantizer, linear.online is hadamard.transform
        if id(old) not in shared:
            made = old.spec and Int4Quantizer(old.readers, old.spec, backend, turned=turned)
            shared[id(old)] = made
        try:
            if turned and shared[id(old)] is not None and backend == "triton":
                from dfrot_kernels import hadamard_tokens

                hadamard_tokens.plan(linear.in_features)  # or the first forward pass would say so
            packed[name] = Int4Linear.of(linear, shared[id(old)], backend)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for name, linear in packed.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model


def _check_packable(quantizer: InputQuantizer) -> None:
    spec = quantizer.spec
    if spec is not None and (spec.bits != 4 or spec.granularity != "token"):
        raise ValueError(
            f"activations of {spec.bits} bits per {spec.granularity!r} cannot be packed: the kernels "
            "take 4 bits per token, or floating point; requantize with bits='4-4-16' first"
        )
    if quantizer.keep is not None:
        raise ValueError(
            "kept tokens need floating-point activations and weights: requantize with keep='none' first"
        )


def _calibrate(
    model: nn.Module, quantizers: list[InputQuantizer], spec: QuantSpec, tokens: Tensor
) -> None:
    device = next(model.parameters()).device
    base = models.base(model)
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
    if any(isinstance(m, Int4Linear) for m in model.modules()):
        raise ValueError("the model is packed already: change it before quantized_model.pack")
    if not found:
        raise ValueError("the model is not quantized: make it with quantized_model.build")
    return list(found.values())


def _site_quantizers(model: nn.Module) -> dict[str, InputQuantizer]:
    found = {}
    for layer in models.layers(model):
        for role, linears in (("attention", layer.attention_inputs), ("mlp", layer.mlp_inputs)):
            found[f"layers.{layer.index}.{role}"] = next(iter(linears.values())).quantizer
    return found

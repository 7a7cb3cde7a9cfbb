"""GPTQ: 4-bit weights that make up for each other's rounding, a layer at a time (Frantar et al., 2023).

For one linear y = xWᵀ with inputs X [T, in] the columns of W are rounded one by one; the error of each
is spread over the columns not yet rounded, by the inverse of the Hessian H = XᵀX of Σ‖x(W − Ŵ)ᵀ‖²:

    e_i = (w_i − Q(w_i)) / U_ii,   W_{:, j>i} ← W_{:, j>i} − e_i U_ij,   UᵀU = H⁻¹, U upper triangular.

Layers are quantized in order, each on what the quantized layers before it put out, and a layer's linears
in the order q/k/v, o, gate/up, down, as published. Activations stay in floating point meanwhile.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dfrot_lab import models
from dfrot_lab.quantizers import QuantSpec, fake_quantize, search_step

__all__ = [
    "GPTQ",
    "GPTQError",
    "hessian_of",
    "quantize_layers",
    "quantize_weight",
    "quantize_with",
    "walk",
]

KEPT = 1 << 29  # bytes of a layer's widest inputs that are held; more are computed twice


class GPTQError(ValueError):
    """Calibration that GPTQ cannot use; one line: what, which value, what to do."""


@dataclass(frozen=True)
class GPTQ:
    """How GPTQ runs. damp: share of the mean diagonal of H added to it; block: columns whose errors are
    spread at once; act_order: columns by falling diagonal of H; clip_steps: see `search_step`.
    """

    damp: float = 0.01
    block: int = 128
    act_order: bool = False
    clip_steps: int = 80

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise ValueError(f"damp = {self.damp}: use a share in (0, 1), the paper's is 0.01")
        if self.block < 1:
            raise ValueError(f"block = {self.block}: use a positive number of columns")


def quantize_weight(w: Tensor, hessian: Tensor, spec: QuantSpec, how: GPTQ = GPTQ()) -> Tensor:
    """Ŵ for W [out, in] and H = XᵀX [in, in], in W's dtype; scales from W itself by the clip search.

    With groups each group's scale is found when its first column is reached, on the weights as they
    then are. A column with H_ii = 0 was never used: it is set to zero. Raises GPTQError if H holds NaN
    or Inf, or cannot be made positive definite.
    """
    if hessian.shape != (w.shape[1], w.shape[1]):
        raise GPTQError(f"Hessian is {list(hessian.shape)} but the weight has {w.shape[1]} inputs")
    h, work = hessian.double().clone(), w.double().clone()
    if not torch.isfinite(h).all():
        raise GPTQError("the Hessian holds NaN or Inf: collect the calibration inputs in float32")
    unused = h.diagonal() == 0
    h[unused, unused] = 1
    work[:, unused] = 0
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if how.act_order else None
    if order is not None:
        work, h = work[:, order], h[order][:, order]
    u = _inverse_factor(h, how.damp)
    size = spec.group_size or w.shape[1]
    if order is not None and spec.group_size:  # groups are of original neighbours: fix scales first
        steps = [
            search_step(g, _channel(spec), steps=how.clip_steps) for g in w.double().split(size, 1)
        ]
    else:
        steps = [] if spec.group_size else [search_step(work, _channel(spec), steps=how.clip_steps)]
    out = torch.empty_like(work)
    for first in range(0, work.shape[1], how.block):
        last = min(first + how.block, work.shape[1])
        errors = torch.empty(work.shape[0], last - first, dtype=work.dtype, device=work.device)
        for i in range(first, last):
            group = (int(order[i]) if order is not None else i) // size
            if group == len(steps):
                now = _pending(work, errors, u, first, i, min(i + size, work.shape[1]))
                steps.append(search_step(now, _channel(spec), steps=how.clip_steps))
            scale, zero = steps[group]
            column = work[:, i : i + 1]
            q = fake_quantize(column, _channel(spec), scale=scale, zero=zero)
            out[:, i : i + 1] = q
            e = (column - q) / u[i, i]
            work[:, i:last] -= e * u[i, i:last]
            errors[:, i - first] = e[:, 0]
        work[:, last:] -= errors @ u[first:last, last:]
    if order is not None:
        out = out[:, torch.argsort(order)]
    return out.to(w.dtype)


def _channel(spec: QuantSpec) -> QuantSpec:
    """The spec for a column or a group given as rows of their own."""
    return QuantSpec(
        bits=spec.bits, symmetric=spec.symmetric, granularity="channel", clip=spec.clip
    )


def _pending(work: Tensor, errors: Tensor, u: Tensor, first: int, i: int, stop: int) -> Tensor:
    """Columns i…stop with this block's errors spread beyond its end too, which happens only later."""
    block_end = first + errors.shape[1]
    now = work[:, i:stop].clone()
    if stop > block_end:
        now[:, block_end - i :] -= errors[:, : i - first] @ u[first:i, block_end:stop]
    return now


def _inverse_factor(h: Tensor, damp: float) -> Tensor:
    """U upper triangular with UᵀU = (H + damp·mean(diag H)·I)⁻¹; ten times the damping on failure."""
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    mean = h.diagonal().mean()
    for attempt in range(6):
        used = damp * 10**attempt
        lower, info = torch.linalg.cholesky_ex(h + used * mean * eye)
        if info.item():
            continue
        u, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not info.item() and torch.isfinite(u).all():
            if attempt:
                warnings.warn(
                    f"singular Hessian: damping raised from {damp:g} to {used:g}", stacklevel=3
                )
            return u
    raise GPTQError(
        f"the Hessian stays singular with damping {used:g}: give more calibration tokens"
    )


def quantize_layers(
    model: nn.Module,
    tokens: Tensor,
    spec: QuantSpec,
    how: GPTQ = GPTQ(),
    *,
    online: tuple[Callable | None, Callable | None] = (None, None),
) -> dict[str, float]:
    """GPTQ every in-layer linear of a rotated `model` in place, on `tokens` [windows, seqlen].

    online: what turns the inputs of o_proj and of down_proj first, see `rotations.online`. Memory: the
    hidden states of all windows, twice, and one layer's. Returns the relative output error
    ‖X(W − Ŵ)ᵀ‖²/‖XWᵀ‖² of each linear. Raises GPTQError with fewer tokens than the largest input has
    channels.
    """
    errors: dict[str, float] = {}

    def fit(layer: models.Layer, linears: dict[str, nn.Linear], inputs: Iterator[Tensor]) -> None:
        errors.update(_fit(layer, linears, hessian_of(inputs), spec, how))

    walk(model, tokens, fit, online=online)
    return errors


@torch.no_grad()
def quantize_with(
    model: nn.Module,
    hessians: Callable[[int, str], Tensor],
    spec: QuantSpec,
    how: GPTQ = GPTQ(),
) -> dict[str, float]:
    """GPTQ every in-layer linear of a rotated `model` in place, from Hessians that are known.

    hessians: (layer index, name of the linear) → H of its rotated inputs, from the floating-point
    model, so that the error of earlier layers is not seen, and one pass serves every rotation
    (`hessians.Hessians`). Returns as `quantize_layers`.
    """
    errors: dict[str, float] = {}
    for layer in tqdm(models.layers(model), desc="GPTQ", unit="layer", mininterval=2):
        for linears in layer.groups:
            hessian = hessians(layer.index, next(iter(linears)))
            errors |= _fit(layer, linears, hessian, spec, how)
    return errors


def hessian_of(inputs: Iterator[Tensor]) -> Tensor:
    """H = Σ XᵀX [in, in] in fp64 over `inputs` [..., in]; the products of one tensor are in fp32."""
    hessian = torch.zeros(0)
    for x in inputs:
        rows = x.flatten(0, -2).float()
        product = (rows.mT @ rows).double()
        hessian = hessian + product if len(hessian) else product
    return hessian


def _fit(layer: models.Layer, linears: dict[str, nn.Linear], hessian: Tensor, spec, how) -> dict:
    # rows of W do not see each other: linears that share their input are quantized as one
    hessian = hessian.to(layer.mlp_output.weight.device)
    w = torch.cat([linear.weight for linear in linears.values()])
    sizes = [linear.out_features for linear in linears.values()]
    parts, errors = quantize_weight(w, hessian, spec, how).split(sizes), {}
    for (name, linear), q in zip(linears.items(), parts, strict=True):
        old, lost = linear.weight.double(), (linear.weight - q).double()
        lost, whole = (((m @ hessian) * m).sum().item() for m in (lost, old))
        errors[f"layers.{layer.index}.{name}"] = lost / whole if whole else 0.0
        linear.weight.copy_(q)
    return errors


@torch.no_grad()
def walk(
    model: nn.Module,
    tokens: Tensor,
    visit: Callable[[models.Layer, dict[str, nn.Linear], Iterator[Tensor]], None],
    *,
    online: tuple[Callable | None, Callable | None] = (None, None),
) -> None:
    """Run `model` on `tokens` [windows, seqlen] layer by layer, with a call before each group of linears.

    visit(layer, linears, inputs) may change the weights of `linears`, whose inputs [1, seqlen, in] come
    window by window; what follows runs on the changed ones. Raises GPTQError for too few tokens.
    """
    before_o, before_down = (turn or (lambda x: x) for turn in online)
    widest = max(layer.mlp_output.in_features for layer in models.layers(model))
    if tokens.numel() < widest:
        raise GPTQError(
            f"{tokens.numel()} calibration tokens for inputs of {widest} channels: use at least {widest}"
        )
    hidden, call = _layer_inputs(model, tokens)
    room = tokens.numel() * widest * hidden[0].element_size() <= KEPT
    for layer in tqdm(models.layers(model), desc="layers", unit="layer", mininterval=2):
        normed = [layer.attention_norm(h) for h in hidden]
        visit(layer, layer.attention_inputs, iter(normed))
        mixed = [
            before_o(_input_of(layer.attention_output, layer.module.self_attn, n, call))
            for n in normed
        ]
        del normed
        visit(layer, {"self_attn.o_proj": layer.attention_output}, iter(mixed))
        for i, x in enumerate(mixed):
            hidden[i] = hidden[i] + layer.attention_output(x)
        del mixed
        visit(layer, layer.mlp_inputs, (layer.mlp_norm(h) for h in hidden))
        held = list(_gated(layer, hidden, before_down)) if room else None
        given = held or _gated(layer, hidden, before_down)
        visit(layer, {"mlp.down_proj": layer.mlp_output}, iter(given))
        for i, x in enumerate(held or _gated(layer, hidden, before_down)):
            hidden[i] = hidden[i] + layer.mlp_output(x)


def _gated(layer: models.Layer, hidden: list[Tensor], before: Callable) -> Iterator[Tensor]:
    """What down_proj is given for each stream after attention."""
    for h in hidden:
        yield before(_input_of(layer.mlp_output, layer.module.mlp, layer.mlp_norm(h), {}))


class _Reached(Exception):
    """Raised by a hook to stop a forward pass where the wanted tensor is."""


def _input_of(linear: nn.Module, module: nn.Module, x: Tensor, call: dict) -> Tensor:
    """What `linear`, inside `module`, is given when `module` runs on x; `linear` itself does not run."""
    found = []

    def stop(_, inputs):
        found.append(inputs[0])
        raise _Reached

    hook = linear.register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_Reached):
            module(x, **call)
    finally:
        hook.remove()
    return found[0]


def _layer_inputs(model: nn.Module, tokens: Tensor) -> tuple[list[Tensor], dict]:
    """Hidden states [1, seqlen, d] of each window before the first layer, and the layer's keywords."""
    first, found, call = models.layers(model)[0].module, [], {}

    def stop(_, inputs, keywords):
        found.append(inputs[0] if inputs else keywords.pop("hidden_states"))
        call.update(keywords)
        raise _Reached

    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    base = models.base(model)
    try:
        for window in tokens:
            with contextlib.suppress(_Reached):
                base(window[None].to(next(model.parameters()).device), use_cache=False)
    finally:
        hook.remove()
    return found, call

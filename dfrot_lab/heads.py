"""Heads: R2 refined for each head of keys and values, as R1 is, on what o_proj is given.

The input of o_proj is y = [x_1 R2_g(1), …, x_H R2_g(H)], H heads in groups g that share values, quantized
as one row. Alternating as `dfrot` does: G ← direction(y), then for each group R2_g ← polar(Σ_h∈g X_hᵀ G_h).
It is merged into v_proj and o_proj and costs nothing at inference.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dfrot_lab import models, polar, rotations
from dfrot_lab.activations import ActivationsError
from dfrot_lab.objectives import Objective

__all__ = ["collect", "refine", "refine_layers"]


@torch.inference_mode()
def collect(model: nn.Module, tokens: Tensor) -> Tensor:
    """Inputs of every o_proj of the unrotated, gain-folded `model`: fp32 [layers, tokens, heads·head_dim].

    tokens: [windows, seqlen]. Raises ActivationsError, naming the layer, at the first NaN or Inf.
    """
    parts = models.layers(model)
    rows: list[list[Tensor]] = [[] for _ in parts]

    def keep(index: int):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not torch.isfinite(inputs[0]).all():
                raise ActivationsError(
                    f"activations before o_proj of layer {index} hold NaN or Inf: load the model in float32"
                )
            rows[index].append(inputs[0][0].float().cpu())

        return hook

    hooks = [p.attention_output.register_forward_pre_hook(keep(p.index)) for p in parts]
    base = models.base(model)
    try:
        for window in tokens:
            base(window[None].to(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.cat(r) for r in rows])


def refine(
    x: Tensor, start: Tensor, objective: Objective, *, iterations: int = 30
) -> tuple[Tensor, list[float]]:
    """(R2 [kv_heads, head_dim, head_dim] fp64, loss by step relative to ‖x‖²) from `start` of that shape.

    x: [tokens, heads·head_dim]. Raises RotationError for a start that is not orthogonal, ValueError for
    heads that the groups do not divide.
    """
    groups, size = start.shape[0], start.shape[-1]
    if x.shape[-1] % (groups * size):
        raise ValueError(
            f"rows of {x.shape[-1]} do not hold {groups} groups of heads of {size}: use the model's own R2"
        )
    for g, one in enumerate(start):
        rotations.check(one, size, f"R2 of head {g}")
    objective = deepcopy(objective)  # what it keeps of its rows belongs to one run
    r, losses = start.double().clone(), []
    whole = x.double().square().sum().item() or 1.0
    cut = x.unflatten(-1, (groups, -1, size))  # [tokens, groups, heads of a group, head_dim]
    for _ in range(iterations):
        y = rotations.turn_heads(x, r.to(x.dtype))
        g = objective.direction(y)
        squared = (y - g).double().square().sum(-1)
        losses.append(objective.loss(y, squared).sum().item() / whole)
        product = torch.einsum("tghi,tghj->gij", cut, g.unflatten(-1, cut.shape[1:])).double()
        r = torch.stack([polar.svd(m) for m in product])
    return r, losses


def refine_layers(
    x: Tensor, start: Tensor, objective: Objective, *, iterations: int = 30, progress: str = "R2"
) -> tuple[Tensor, list[list[float]]]:
    """R2 [layers, kv_heads, head_dim, head_dim] and the losses, from one `start` [kv_heads, …] for all."""
    bar = tqdm(x, desc=progress, unit="layer")
    made = [refine(rows, start, objective, iterations=iterations) for rows in bar]
    return torch.stack([r for r, _ in made]), [losses for _, losses in made]

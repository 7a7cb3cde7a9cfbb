"""Cayley: R1 by gradient descent on the task loss, the expensive reference (SpinQuant, arXiv 2405.16406).

    G = ∂L/∂R,  A = GRᵀ − RGᵀ,  R ← (I + ηA/2)⁻¹(I − ηA/2) R

stays orthogonal for any η. L is the language model's own loss with the inputs of q/k/v and gate/up
quantized in R's basis, gradients passing straight through the rounding. The inputs of o_proj and down_proj
and the weights, which R1 does not choose the grid of, or hardly, stay in floating point meanwhile.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dfrot_lab import models, rotations
from dfrot_lab.quantizers import QuantSpec, fake_quantize

__all__ = ["refine", "step"]


def step(r: Tensor, gradient: Tensor, length: float) -> Tensor:
    """R [d, d] moved by the Cayley transform along −A, scaled so that ‖ηA‖_F = `length`·√d.

    A = G Rᵀ − R Gᵀ of the `gradient` G [d, d] of the loss with respect to R. Raises ValueError for NaN or
    Inf in it.
    """
    a = gradient @ r.mT
    a = a - a.mT
    size = a.norm()
    if not torch.isfinite(size):
        raise ValueError(
            "the gradient of the task loss holds NaN or Inf: use fp32 and shorter steps"
        )
    a = a * (length * math.sqrt(len(r)) / 2 / size.clamp_min(1e-300))
    eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
    return torch.linalg.solve(eye + a, (eye - a) @ r)


def refine(
    model: nn.Module,
    tokens: Tensor,
    start: Tensor,
    spec: QuantSpec,
    *,
    steps: int,
    length: float = 0.03,
    checkpoint: str | Path | None = None,
    whose: str = "",
    every: int = 4,
    progress: str = "Cayley",
) -> tuple[Tensor, list[float]]:
    """(R1 [d, d] fp64, loss in nats a token of each step), one row of `tokens` [≥ 1, seqlen] a step.

    model: gain-folded, not rotated; left as it is. length: of the first step as a share of √d, falling
    linearly to nothing. checkpoint: R and losses, kept there every `every` steps and taken up again, to the
    same bytes, after an interruption, if `whose` (what the model is) is the same; the file goes when the
    run is through. Raises RotationError for a `start` that does not fit, ValueError for NaN.
    """
    r = rotations.check(start.double(), model.config.hidden_size, "start").clone()
    losses: list[float] = []
    key = hashlib.sha256(f"{spec} {steps} {length} {whose}".encode() + r.numpy().tobytes())
    key.update(tokens.cpu().numpy().tobytes())
    checkpoint = Path(checkpoint) if checkpoint else None
    if checkpoint and checkpoint.exists():
        kept, about = rotations.load(checkpoint)
        if about.get("key") == key.hexdigest():
            r, losses = kept, about["losses"]
    device = next(model.parameters()).device
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    first = len(losses)
    bar = tqdm(range(first, steps), desc=progress, initial=first, total=steps, mininterval=2)
    try:
        for t in bar:
            leaf = r.float().to(device).requires_grad_()
            window = tokens[t % len(tokens)][None].to(device)
            with _quantized(model, leaf, spec):
                logits = model(window, use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits.float(), window[0, 1:])
            (gradient,) = torch.autograd.grad(loss, leaf)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            # contiguous, as what is read back: products of another layout round otherwise
            r = step(r, gradient.double().cpu(), length * (1 - t / steps)).contiguous()
            if checkpoint and (t + 1) % every == 0 and t + 1 < steps:
                rotations.save(checkpoint, r, {"key": key.hexdigest(), "losses": losses})
    finally:
        for p in wanted:
            p.requires_grad_(True)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return rotations.check(r, len(r)), losses


@contextmanager
def _quantized(model: nn.Module, r: Tensor, spec: QuantSpec) -> Iterator[None]:
    """Every in-layer norm's output h becomes Q(hR)Rᵀ, with the gradient of hR Rᵀ plus that of rounding."""

    def turn(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        y = output.to(r.dtype) @ r
        return ((y + (fake_quantize(y, spec) - y).detach()) @ r.mT).to(output.dtype)

    hooks = [norm.register_forward_hook(turn) for norm in models.norm_sites(model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

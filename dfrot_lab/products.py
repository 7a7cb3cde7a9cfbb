"""Products: what a step of the refinement sums over all rows, XᵀW²E with E = XR − G and the losses.

`whole` is the plain writing, and the reference. `Streamed` gives the same sums from pieces that stay in the
cache, if asked for with shorter inputs: both products in bf16, the small one XᵀW²E alone, or XR as well by
its change since a rotation whose XR is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dfrot_lab import objectives
from dfrot_lab.activations import Activations
from dfrot_lab.objectives import Objective

__all__ = ["Streamed", "pairs", "whole"]

PIECE = (
    1 << 20
)  # numbers of a piece on a CPU: 4 MB in fp32, about what two cores have as second-level cache
LEAST = 4  # a piece has at least d/4 rows: each product reads and packs [d, d], or writes it
FLUSH = 1 << 14  # rows whose products are added in fp32 before they go to the fp64 sum
# bf16 inputs and output are off by 0.3 % of the change, root mean square: 0.07 % of XR where the change is a
# quarter of it; TF32 inputs would be off by 0.04 %
FAR = 0.25

Sums = tuple[Tensor, float, float]  # (XᵀW²E [d, d], Σ w²·objective, ‖WE‖²), in fp64


def pairs(
    x: Activations, weights: list[Tensor], dtype: torch.dtype, device: str | torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """(chunk [rows, d] as `dtype`, its w² [rows] in fp64), on `device`."""
    for chunk, w in zip(x.chunks(), weights, strict=True):
        yield chunk.to(device, dtype), w.to(device)


def whole(
    x: Activations, r: Tensor, weights: list[Tensor], objective: Objective, dtype: torch.dtype
) -> Sums:
    """The sums for R = `r` [d, d] fp64, chunk by chunk, products in `dtype`, added up in fp64.

    weights: w² of the rows [rows] fp64, one tensor for each chunk of `x`.
    """
    rotation, product, value, error = r.to(dtype), torch.zeros_like(r), 0.0, 0.0
    for i, (rows, w) in enumerate(pairs(x, weights, dtype, r.device)):
        y = rows @ rotation
        e = y - objective.direction(y, i)
        squared = e.double().square().sum(-1)
        value += (objective.loss(y, squared) * w).sum().item()
        error += (squared * w).sum().item()
        product += (rows.mT @ (e * w[:, None].to(dtype))).double()
    return product, value, error


class Streamed:
    """As `whole`, in pieces whose products are added up in fp32 before fp64. One instance for one X.

    dtype bfloat16: the two products take bf16 inputs; error_dtype bfloat16: the second alone. What is
    quantized and the sums are fp32. gram: XᵀW²X [d, d]; given, XR = XR₀ + X(R − R₀) with XR₀ kept in fp32
    [T, d] and the change by bf16 inputs, until it is a quarter of XR: ‖R − R₀‖²_F > d/16 or
    ‖WX(R − R₀)‖² > ‖WX‖²/16. Then R₀ ← R by an fp32 product. base: R₀, for a start in the middle.
    """

    def __init__(self, error_dtype: torch.dtype | None = None, gram: Tensor | None = None) -> None:
        self.error_dtype, self.update = error_dtype, gram is not None
        self.base: Tensor | None = None
        self._gram = gram.float() if self.update else None
        self._change: Tensor | None = None  # R − R₀ in bf16, None where R is R₀
        self._kept: dict[tuple[int, int], Tensor] = {}

    def __call__(
        self,
        x: Activations,
        r: Tensor,
        weights: list[Tensor],
        objective: Objective,
        dtype: torch.dtype,
    ) -> Sums:
        """The sums for R = `r` [d, d] fp64; weights: w² of the rows [rows] fp64 for each chunk of `x`."""
        inside = torch.float32 if dtype == torch.bfloat16 else dtype
        low = torch.bfloat16 in (dtype, self.error_dtype)
        self._move(r)
        rotation, product = r.to(dtype), torch.zeros_like(r)
        # read once: a GPU need not wait
        sums = torch.zeros(2, dtype=torch.float64, device=r.device)
        part, since = torch.zeros(r.shape, dtype=inside, device=r.device), 0
        size = 1 << 30 if r.device.type == "cuda" else max(x.d // LEAST, PIECE // x.d)
        for i, (chunk, w) in enumerate(pairs(x, weights, inside, r.device)):
            for j, (rows, share) in enumerate(zip(chunk.split(size), w.split(size), strict=True)):
                short = rows.bfloat16() if low or self.update else rows
                if self.update:
                    y = self._updated((i, j), rows, short)
                else:
                    y = ((short if dtype == torch.bfloat16 else rows) @ rotation).to(inside)
                e, squared = objectives.error(objective, y, i * 2048 + j)
                sums[0] += torch.dot(objective.loss(y, squared), share)
                sums[1] += torch.dot(squared, share)
                e.mul_(share.to(inside)[:, None])
                if low:
                    part += (short.mT @ e.bfloat16()).to(inside)
                else:
                    part.addmm_(rows.mT, e)
                since += len(rows)
                if since >= FLUSH:
                    product += part
                    part.zero_()
                    since = 0
        return product + part, sums[0].item(), sums[1].item()

    def _move(self, r: Tensor) -> None:
        """The change from R₀ to R, and R₀ ← R where that is too far."""
        if not self.update:
            return
        if self.base is None or self._far(r - self.base):
            self.base = r.contiguous()
            self._change = None
            self._kept.clear()
        else:
            self._change = (r - self.base).bfloat16()

    def _far(self, change: Tensor) -> bool:
        """Whether it is more than a quarter of XR, of rows in no special direction or of those that weigh."""
        weighted = (change.float() * (self._gram @ change.float())).sum().item()
        most = FAR**2
        return (
            change.square().sum().item() > most * len(change)
            or weighted > most * self._gram.trace().item()
        )

    def _updated(self, piece: tuple[int, int], rows: Tensor, short: Tensor) -> Tensor:
        """XR of a piece; XR₀ is made, and kept, where it is not there."""
        if piece not in self._kept:
            self._kept[piece] = rows @ self.base.to(rows)
        kept = self._kept[piece]
        return kept.clone() if self._change is None else kept + short @ self._change

"""The published procedure, our own writing of what DFRot's released code does in a step, and rows for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dfrot_lab.massive import is_massive
from dfrot_lab.quantizers import QuantSpec, fake_quantize

ALPHA = 100.0  # γ: on the rows, and so squared on the error
SPEC = QuantSpec(symmetric=True)  # the quantizer that the released code has in its loop


def planted(rows: int, d: int, seed: int, device: str = "cpu") -> Tensor:
    """[rows, d] of norm √d: anisotropic normal rows of some channels' own scale, 0.3 % massive ones."""
    g = torch.Generator(device).manual_seed(seed)
    shared = torch.Generator().manual_seed(d)  # what is the model's own: the same for every seed
    scale = torch.exp(0.7 * torch.randn(d, generator=shared)).to(device)
    mix = torch.randn(16, d, generator=shared).to(device)
    x = torch.randn(rows, d, generator=g, device=device).mul_(scale)
    x += torch.randn(rows, 16, generator=g, device=device) @ mix
    where = torch.randperm(d, generator=shared)[:4].to(device)
    few = torch.randperm(rows, generator=g, device=device)[: max(1, round(0.003 * rows))]
    spikes = torch.tensor([40.0, -25.0, 15.0, 8.0], device=device)
    x[few[:, None], where] += spikes * math.sqrt(d)
    return x.mul_(math.sqrt(d) / x.norm(dim=-1, keepdim=True))


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(normal, massive) rows, by the rule of this package."""
    heavy = torch.cat([is_massive(part, SPEC) for part in x.split(2048)])
    return x[~heavy], x[heavy]


def published_step(normal: Tensor, massive: Tensor, r: Tensor) -> Tensor:
    """One iteration as released: nine products with all rows, an SVD and a QR, all in fp32.

    Counted by rows: the losses of normal and of massive rows with R as it is (1), the weighted rows put
    together and rotated (2), quantized, Procrustes (3); with the new R the loss on the same codes (4), on
    new ones (5), of normal and of massive rows (6), then the same for the test whether to accept (7, 8),
    and the rotated rows for the log (9).
    """

    def losses(rotation: Tensor) -> None:
        for part in (normal, massive):
            y = part @ rotation
            (y - fake_quantize(y, SPEC)).square().sum(-1).mean()

    losses(r)
    a = torch.cat([normal, massive * ALPHA])
    y = a @ r
    b = fake_quantize(y, SPEC)
    u, _, vt = torch.linalg.svd(a.mT @ b)
    new = torch.linalg.qr(u @ vt).Q
    (a @ new - b).square().sum(-1).mean()
    y = a @ new
    (y - fake_quantize(y, SPEC)).square().sum(-1).mean()
    losses(new)
    losses(new)
    y = a @ new
    (y - fake_quantize(y, SPEC)).square().sum(-1).mean()
    a @ new
    return new


def plain_step(a: Tensor, r: Tensor) -> Tensor:
    """The same step with what it needs: two products on whole matrices and an SVD, fp32."""
    b = fake_quantize(a @ r, SPEC)
    u, _, vt = torch.linalg.svd(a.mT @ b)
    return u @ vt

"""Linears: what takes the place of a model's nn.Linear, fake-quantized or with packed 4-bit weights.

Inputs of q/k/v (and of gate/up) are quantized once and shared, as an int4 engine would.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from dfrot_kernels import backends
from dfrot_kernels.reference import Tokens, Weight, pack_weight
from torch import Tensor, nn
from torch.nn import functional as F

from dfrot_lab.quantizers import QuantSpec, fake_quantize

__all__ = ["InputQuantizer", "Int4Linear", "Int4Quantizer", "QuantLinear", "grid"]


class _Once(nn.Module):
    """Something made of a tensor [batch, seqlen, D], once for all the `readers` that are given it."""

    def __init__(self, readers: int) -> None:
        super().__init__()
        self.readers = readers
        self._last: tuple[Tensor, Any, int] | None = None

    def _shared(self, x: Tensor, make: Callable[[Tensor], Any]) -> Any:
        if self._last is not None and self._last[0] is x:
            _, made, reads = self._last
        else:
            made, reads = make(x), 0
        # the pair is dropped with its last reader: nothing stays alive between layers
        self._last = (x, made, reads + 1) if reads + 1 < self.readers else None
        return made


class InputQuantizer(_Once):
    """Quantize one activation tensor [batch, seqlen, D], once for all the linears that read it.

    `kept` counts, by position in the sequence, the tokens that bypassed quantization. `static`: scale
    and zero point, where they do not depend on x. `seen`: while a list, x passes as it is and leaves its
    extremes there.
    """

    def __init__(self, readers: int) -> None:
        super().__init__(readers)
        self.spec: QuantSpec | None = None
        self.keep: Callable | None = None
        self.kept: Tensor | None = None
        self.static: tuple[Tensor, Tensor] | None = None
        self.seen: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Q(x); the readers after the first are given the same tensor."""
        if self.seen is not None:
            self.seen.append(torch.stack([x.amin(), x.amax()]).float().cpu())
            return x
        return x if self.spec is None else self._shared(x, self._quantize)

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


class Int4Quantizer(_Once):
    """4-bit codes of one activation tensor [batch, seqlen, D], made once for all linears that read it.

    turned: the Hadamard of R4 comes first, fused with the quantizer.
    """

    def __init__(self, readers: int, spec: QuantSpec, backend: str, *, turned: bool) -> None:
        super().__init__(readers)
        self.spec, self.backend, self.turned = spec, backend, turned

    def forward(self, x: Tensor) -> Tokens:
        """`Tokens` of x; the readers after the first are given the same ones."""
        return self._shared(x, self._quantize)

    def _quantize(self, x: Tensor) -> Tokens:
        ops = backends.get(self.backend)
        make = ops.hadamard_quantize if self.turned else ops.quantize_int4
        # unpacked: the matrix product would only unpack them again, and they live for a moment
        how = {"symmetric": self.spec.symmetric, "clip": self.spec.clip, "packed": False}
        return make(x.contiguous(), **how)


class Int4Linear(nn.Module):
    """y = Q(x H)·Ŵᵀ + b from packed 4-bit weights; nothing of Ŵ is held in floating point.

    packed: int8 [out, in/2]; scale: fp32 [out]; sums: int32 [out], see `dfrot_kernels.reference.Weight`.
    quantizer: None leaves activations in floating point (W4A16). backend: see `dfrot_kernels.backends`.
    """

    def __init__(
        self,
        weight: Weight,
        bias: nn.Parameter | None,
        quantizer: Int4Quantizer | None,
        backend: str,
        online: Callable | None = None,
    ) -> None:
        super().__init__()
        for name, part in zip(("packed", "scale", "sums"), weight, strict=True):
            self.register_buffer(name, part)
        self.bias = bias
        self.out_features, self.in_features = len(weight.scale), 2 * weight.packed.shape[-1]
        self.quantizer, self.backend, self.online = quantizer, backend, online

    @classmethod
    def of(cls, linear: QuantLinear, quantizer: Int4Quantizer | None, backend: str) -> Int4Linear:
        """From a fake-quantized linear; ValueError unless its weight lies on a 4-bit grid."""
        fused = quantizer is not None and quantizer.turned
        online = None if fused else linear.online
        weight = pack_weight(*grid(linear.weight.detach()))
        return cls(weight, linear.bias, quantizer, backend, online)

    @property
    def ops(self) -> ModuleType:
        """The functions of the backend."""
        return backends.get(self.backend)

    def forward(self, x: Tensor) -> Tensor:
        """The linear's output [..., out] in the dtype of x [..., in]."""
        if self.online is not None:
            x = self.online(x)
        weight = Weight(self.packed, self.scale, self.sums)
        if self.quantizer is None:
            return self.ops.matmul_fp(x.contiguous(), weight, self.bias)
        return self.ops.matmul(self.quantizer(x), weight, self.bias, dtype=x.dtype)


def grid(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and steps fp32 [out] of a weight that was fake-quantized per channel, w = Δ·q.

    Δ is the largest max|w|/m, m = 1…8, of which all of a row are multiples −8…7, up to the rounding of
    w's dtype; refined by least squares. Raises ValueError naming the first row that has none.
    """
    rows, most = w.double(), w.double().abs().amax(-1, keepdim=True)
    info = torch.finfo(w.dtype)
    tolerance = 8 * info.eps  # codes up to 8; they and the largest are rounded
    # the last place of subnormal numbers does not shrink: half of it for w, and for the largest times 8/7
    last = 1.1 * info.smallest_normal * info.eps
    codes, found = torch.zeros_like(rows), most[:, 0] == 0
    for m in range(1, 9):
        size = (most / m).clamp(min=torch.finfo(torch.float64).tiny)
        scaled = rows / size
        near = scaled.round()
        off = ((scaled - near).abs() <= tolerance + last / size).all(-1)
        fits = off & (near <= 7).all(-1) & ~found
        codes = torch.where(fits[:, None], near, codes)
        found = found | fits
    if not found.all():
        row = int((~found).nonzero()[0])
        raise ValueError(
            f"row {row} of the weight is not on a symmetric 4-bit grid: build the model with 4-bit "
            "weights per channel, such as bits='4-4-16'"
        )
    size = codes.square().sum(-1)
    scale = torch.where(size > 0, (rows * codes).sum(-1) / size.clamp(min=1), 1)
    return codes.to(torch.int8), scale.float()

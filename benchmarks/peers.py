"""Other people's kernels for the same work, each timed only when its output is right.

A peer is asked for by import; one that is not there, or that needs a CUDA device, is named with the
reason. Those that quantize the activations or the weight themselves are held to what their own format
can do, in ‖y − ŷ‖/‖ŷ‖ against the exact product with the 4-bit weight: 16 bits 0.02, 8 bits 0.08,
4 bits 0.35. The limit catches a wrong layout or scale, which give an error near 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from dfrot_kernels.reference import Weight, pack_weight
from torch import Tensor
from torch.nn import functional as F

from benchmarks.records import plain

__all__ = ["PEERS", "Call", "Linear", "Peer", "available"]

SIXTEEN, EIGHT, FOUR = 0.02, 0.08, 0.35


@dataclass(frozen=True)
class Call:
    """fn(*args) is what is timed; read turns its output into numbers to compare."""

    fn: Callable
    args: tuple
    read: Callable[[Any], Tensor] = field(default=lambda out: out)


@dataclass
class Linear:
    """One product to compute: x [M, K] fp16 with the weight codes int8 [N, K] times scale fp32 [N]."""

    x: Tensor
    codes: Tensor
    scale: Tensor

    @cached_property
    def weight(self) -> Weight:
        """The weight as our kernels hold it."""
        return pack_weight(self.codes, self.scale)

    @property
    def dense(self) -> Tensor:
        """The weight's numbers, fp32 [N, K]."""
        return self.codes.float() * self.scale[:, None]

    @cached_property
    def x8(self) -> tuple[Tensor, Tensor]:
        """x in 8 bits per token: codes int8 [M, K] and steps fp32 [M]."""
        step = self.x.float().abs().amax(-1).clamp(min=1e-6) / 127
        return torch.round(self.x.float() / step[:, None]).to(torch.int8), step

    def grouped(self, size: int, dtype: torch.dtype) -> Tensor:
        """The same step for each group of `size` along a row, [N, K/size]: what grouped kernels read."""
        return self.scale.to(dtype)[:, None].expand(-1, self.codes.shape[1] // size).contiguous()


@dataclass(frozen=True)
class Peer:
    """name: as printed; kind: which op it stands beside; make: its Call for a problem.

    module: what must import (None: torch has it); cuda: whether it needs a CUDA device; limit: the
    largest relative error; unit: which product's ceiling it is held to.
    """

    name: str
    kind: str
    make: Callable[[Any], Call]
    limit: float
    unit: str = "bf16"
    module: str | None = None
    cuda: bool = True


def available(device: torch.device, peers: Iterable[Peer]) -> dict[str, str]:
    """Why each peer that cannot run here cannot: the error of its import, or the device it needs."""
    absent, modules = {}, {}
    for peer in peers:
        if peer.module and peer.module not in modules:
            try:
                import_module(peer.module)
                modules[peer.module] = ""
            except Exception as error:  # an import may fail in any way, without a driver for one
                modules[peer.module] = plain(f"{type(error).__name__}: {error}")
        reason = modules.get(peer.module, "")
        if not reason and peer.cuda and device.type != "cuda":
            reason = "needs CUDA"
        if reason:
            absent[peer.name] = reason
    return absent


def _cublas(p: Linear, dtype: torch.dtype) -> Call:
    return Call(F.linear, (p.x.to(dtype), p.dense.to(dtype)))


def _scaled_mm(x: Tensor, w: Tensor, sx: Tensor, sw: Tensor) -> Tensor:
    return torch._scaled_mm(
        x, w.t(), scale_a=sx, scale_b=sw, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _fp8(p: Linear) -> Call:
    most, w = torch.finfo(torch.float8_e4m3fn).max, p.dense
    sx, sw = (t.float().abs().amax(-1, keepdim=True) / most for t in (p.x, w))
    x8, w8 = ((t / s).to(torch.float8_e4m3fn) for t, s in ((p.x.float(), sx), (w, sw)))
    return Call(_scaled_mm, (x8, w8, sx, sw.t().contiguous()))


def _int_mm(p: Linear) -> Call:
    x8, sx = p.x8
    rows = len(x8)
    if rows <= 16 and x8.device.type == "cuda":
        raise ValueError("needs more than 16 rows")
    scale = sx[:, None] * p.scale
    return Call(
        lambda x, w: torch._int_mm(x, w.t()), (x8, p.codes), lambda out: out.float() * scale
    )


def _tinygemm(p: Linear, group: int = 128) -> Call:
    codes = (p.codes + 8).to(torch.uint8)  # 0…15; the product subtracts 8 again
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    scale = p.grouped(group, torch.bfloat16)
    meta = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    return Call(
        lambda x, w, s: torch.ops.aten._weight_int4pack_mm(x, w, group, s),
        (p.x.bfloat16(), packed, meta),
    )


def _layer(layer: Any, x: Tensor) -> Call:
    return Call(lambda module, x: module(x), (layer, x))


def _gemlite(p: Linear, kind: str, group: int | None = None) -> Call:
    helper, device = import_module("gemlite.helper"), str(p.x.device)
    maker = getattr(helper, kind)(device=device, dtype=torch.float16)
    if kind == "A8W8_int8_dynamic":
        layer = maker.from_weights(p.codes, scales=p.scale[:, None])
    elif kind == "A8W8_fp8_dynamic":
        layer = maker.from_weights(p.dense.half())
    else:
        scale = p.grouped(group or p.codes.shape[1], torch.float16)
        layer = maker.from_weights((p.codes + 8).to(torch.uint8), scale, torch.full_like(scale, 8))
    return _layer(layer, p.x)


def _humming(p: Linear, activation: str | None) -> Call:
    layer = import_module("humming.layer").HummingLayer(
        shape_n=p.codes.shape[0],
        shape_k=p.codes.shape[1],
        weight_config={"dtype": "int4"},
        input_config={"dtype": activation} if activation else None,
        torch_dtype=torch.float16,
    )
    layer = layer.to(p.x.device)
    layer.load_from_unquantized(p.dense.half())
    layer.transform()
    return _layer(layer, p.x)


TORCHAO = "torchao.prototype.quantized_training.int8_mm"


def _torchao(p: Linear) -> Call:
    product = import_module(TORCHAO).scaled_int8_mm
    x8, sx = p.x8
    return Call(lambda x, w, s, t: product(x, w.t(), s, t), (x8, p.codes, sx, p.scale))


def _liger(x: Tensor) -> Call:
    norm = import_module("liger_kernel.transformers.functional").liger_rms_norm
    gain = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    return Call(lambda x, g: norm(x, g, 1e-6, in_place=False), (x, gain))


def _torch_norm(x: Tensor) -> Call:
    return Call(lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6), (x,))


def _fast_hadamard(x: Tensor) -> Call:
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(
            "compared at powers of two alone: its 12, 20, 28 and 40 are other matrices"
        )
    return Call(import_module("fast_hadamard_transform").hadamard_transform, (x, 1 / math.sqrt(n)))


def _gemlite_peer(name: str, kind: str, limit: float, unit: str, group: int | None = None) -> Peer:
    return Peer(
        f"gemlite {name}", "linear", lambda p: _gemlite(p, kind, group), limit, unit, "gemlite"
    )


PEERS = (
    Peer("cuBLAS bf16", "linear", lambda p: _cublas(p, torch.bfloat16), SIXTEEN, cuda=False),
    Peer("cuBLAS fp16", "linear", lambda p: _cublas(p, torch.float16), SIXTEEN, cuda=False),
    Peer("torch._scaled_mm fp8", "linear", _fp8, EIGHT, "int8", cuda=False),
    Peer("torch._int_mm", "linear", _int_mm, EIGHT, "int8", cuda=False),
    Peer("tinygemm W4A16", "linear", _tinygemm, SIXTEEN),
    _gemlite_peer("A16W4", "A16W4_HQQ_INT", SIXTEEN, "bf16"),
    _gemlite_peer("A16W4 group 128", "A16W4_HQQ_INT", SIXTEEN, "bf16", 128),
    _gemlite_peer("A8W4 fp8", "A8W4_HQQ_INT_dynamic", EIGHT, "int8"),
    _gemlite_peer("A8W8 int8", "A8W8_int8_dynamic", EIGHT, "int8"),
    _gemlite_peer("A8W8 fp8", "A8W8_fp8_dynamic", EIGHT, "int8"),
    Peer("humming W4A16", "linear", lambda p: _humming(p, None), FOUR, module="humming.layer"),
    Peer("humming W4A8", "linear", lambda p: _humming(p, "int8"), FOUR, "int8", "humming.layer"),
    Peer("humming W4A4", "linear", lambda p: _humming(p, "int4"), FOUR, "int8", "humming.layer"),
    Peer("torchao int8_mm", "linear", _torchao, EIGHT, "int8", TORCHAO),
    Peer("torch rms_norm", "norm", _torch_norm, SIXTEEN, cuda=False),
    Peer("liger RMSNorm", "norm", _liger, SIXTEEN, module="liger_kernel.transformers.functional"),
    Peer("fast-hadamard", "hadamard", _fast_hadamard, SIXTEEN, module="fast_hadamard_transform"),
)

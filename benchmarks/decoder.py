"""The decoder that `end_to_end` times: LLaMA-2's layers in plain torch, linears in 16 or in 4 bits.

Its weights are random: every kind has the same codes, the 16-bit kinds the numbers these stand for. q, k
and v are one product, and so are gate and up. In 4 bits the norms, the attention's output and the
MLP's product (turned by a Hadamard matrix) are quantized per token in front of the linears, and
"W4A4KV4" keeps keys, rotated as such models do, and values in 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from dfrot_kernels import hadamard, reference
from dfrot_kernels.reference import KV, Tokens, Weight
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import nbytes

__all__ = ["KINDS", "LLAMA_2_7B", "TOY", "Decoder", "Shape"]

KINDS = ("fp16", "bf16", "W4A4", "W4A4KV4")
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """layers, hidden size, heads over kv_heads, inner size of the MLP, words."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    words: int


LLAMA_2_7B = Shape(32, 4096, 32, 32, 11008, 32000)
TOY = Shape(2, 64, 4, 2, 112, 97)


class Decoder:
    """Pre-norm decoder with rotary positions and a gated MLP; kind: of `KINDS`; ops: the backend."""

    def __init__(self, shape: Shape, kind: str, ops: ModuleType, device: torch.device, room: int):
        self.shape, self.ops, self.device = shape, ops, device
        self.packed, self.kv4 = kind.startswith("W4A4"), kind.endswith("KV4")
        self.dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        self.d = shape.hidden // shape.heads
        self.widths = [shape.heads * self.d, shape.kv_heads * self.d, shape.kv_heads * self.d]
        self.generator = torch.Generator(device).manual_seed(0)
        self.layers = [
            {
                "qkv": self._linear(sum(self.widths), shape.hidden),
                "o": self._linear(shape.hidden, shape.hidden),
                "gate_up": self._linear(2 * shape.inner, shape.hidden),
                "down": self._linear(shape.hidden, shape.inner),
            }
            for _ in range(shape.layers)
        ]
        self.embedding, self.head = (self._random(shape.words, shape.hidden) for _ in range(2))
        self.head /= shape.hidden**0.5
        angles = torch.arange(room, device=device)[:, None] * 10000.0 ** (
            -torch.arange(0, self.d, 2, device=device) / self.d
        )
        self.cos, self.sin = (f(angles).repeat(1, 2).to(self.dtype) for f in (torch.cos, torch.sin))
        turn = torch.from_numpy(hadamard.matrix(self.d)).to(device, torch.float32)
        self.turn = (turn / hadamard.factor(self.d).order ** 0.5).to(self.dtype)
        self.caches = [self._cache(room) for _ in range(shape.layers)]

    def _random(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return x.to(self.dtype)

    def _linear(self, n: int, k: int) -> Tensor | Weight:
        codes = torch.randint(-8, 8, (n, k), generator=self.generator, device=self.device)
        codes = codes.to(torch.int8)
        scale = torch.full((n,), 1 / (4.6 * k**0.5), device=self.device)  # products of rms 1
        if self.packed:
            return reference.pack_weight(codes, scale)
        return (codes.to(self.dtype) * scale[:, None].to(self.dtype)).contiguous()

    def _cache(self, room: int) -> list[Tensor] | list[KV]:
        x = torch.zeros(1, self.shape.kv_heads, room, self.d, dtype=self.dtype, device=self.device)
        return [reference.quantize_kv(x) if self.kv4 else x.clone() for _ in "kv"]

    def linear_bytes(self) -> int:
        """Bytes of the layers' weights, scales included."""
        return sum(nbytes(w) for layer in self.layers for w in layer.values())

    def weight_bytes(self) -> int:
        """Bytes of all weights: those of the layers, embedding and head."""
        return self.linear_bytes() + nbytes((self.embedding, self.head))

    def cache_bytes(self) -> int:
        """Bytes of the cache at its full length."""
        return sum(nbytes(cache) for cache in self.caches)

    def _norm(self, h: Tensor, add: Tensor | None) -> tuple[Tensor | Tokens, Tensor]:
        if self.packed:
            return self.ops.add_norm_quantize(h, add, eps=EPS, packed=False)
        h = h if add is None else h + add
        return F.rms_norm(h, h.shape[-1:], eps=EPS), h

    def _product(self, x: Tensor | Tokens, w: Tensor | Weight) -> Tensor:
        return self.ops.matmul(x, w, dtype=self.dtype) if self.packed else F.linear(x, w)

    def _rotary(self, x: Tensor, start: int) -> Tensor:
        span = slice(start, start + x.shape[-2])
        low, high = x.chunk(2, -1)
        return x * self.cos[span] + torch.cat([-high, low], -1) * self.sin[span]

    def _attention(self, x: Tensor | Tokens, layer: dict, cache: list, start: int) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.d)).transpose(1, 2)  # [1, H, T, D]
            for part in self._product(x, layer["qkv"]).split(self.widths, -1)
        )
        q, k = (self._rotary(t, start) for t in (q, k))
        if self.kv4:  # the online rotation that keys are quantized behind
            q, k = (t @ self.turn for t in (q, k))
        end, gqa = start + q.shape[2], self.shape.heads != self.shape.kv_heads
        for held, new in zip(cache, (k, v), strict=True):
            if self.kv4:
                for part, value in zip(held, self.ops.quantize_kv(new.contiguous()), strict=True):
                    part[:, :, start:end] = value
            else:
                held[:, :, start:end] = new
        if start == 0:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        elif self.kv4:
            lengths = torch.full((1,), end, dtype=torch.int32, device=q.device)
            y = self.ops.decode_attention(q[:, :, 0].contiguous(), *cache, lengths)[:, :, None]
        else:
            held = (t[:, :, :end] for t in cache)
            y = F.scaled_dot_product_attention(q, *held, enable_gqa=gqa)
        y = y.transpose(1, 2).flatten(2).contiguous()
        y = self.ops.quantize_int4(y, packed=False) if self.packed else y
        return self._product(y, layer["o"])

    def _mlp(self, x: Tensor | Tokens, layer: dict) -> Tensor:
        gate, up = self._product(x, layer["gate_up"]).chunk(2, -1)
        a = F.silu(gate) * up
        a = self.ops.hadamard_quantize(a, packed=False) if self.packed else a
        return self._product(a, layer["down"])

    def hidden(self, ids: Tensor, start: int = 0, layers: int | None = None) -> Tensor:
        """Hidden states [1, T, hidden] of ids [1, T] at positions from `start`, through `layers`."""
        h, add = self.embedding[ids], None
        for layer, cache in list(zip(self.layers, self.caches, strict=True))[:layers]:
            x, h = self._norm(h, add)
            x, h = self._norm(h, self._attention(x, layer, cache, start))
            add = self._mlp(x, layer)
        return h + add

    def logits(self, ids: Tensor, start: int = 0) -> Tensor:
        """Logits [1, words] of the last of ids."""
        h = self.hidden(ids, start)[:, -1]
        return F.linear(F.rms_norm(h, h.shape[-1:], eps=EPS), self.head)

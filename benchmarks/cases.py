"""What is measured: the linears of three models and the ops around them, ours beside others'.

A `Group` is one op at one size; its contestants (ours, the same in separate steps, peers) get the same random
problem. The bytes counted for a job are those of its arguments and its output, each once: the least that
any kernel can move.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from dfrot_kernels import hadamard, reference
from dfrot_kernels.reference import KV, QuantSpec, Tokens, Weight
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gates import (
    EXACT,
    ROUNDED,
    TIES,
    Group,
    Job,
    code_error,
    distance,
    near,
    pick,
    probe,
    relative,
)
from benchmarks.peers import Linear, Peer

__all__ = ["Builder"]

W4A16_ROWS = 256  # a comparison for decoding; beyond this it is not the tool
SAME = 0.01  # ‖y − ŷ‖/‖ŷ‖ of fp16 numbers whose products are summed in fp32


@dataclass(frozen=True)
class Builder:
    """Groups of the backend `ops` on `device`, beside `peers`."""

    ops: ModuleType
    device: torch.device
    peers: list[Peer]

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal fp16 numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).half()

    def activations(self, m: int, k: int, seed: int = 0) -> Tensor:
        """Normal fp16 numbers, one token of a hundred 20 times larger."""
        x = self.random(m, k, seed=seed)
        x[::100] *= 20
        return x

    def beside(self, kind: str, job: Callable[[Peer, Any], Job]) -> dict:
        """The peers of `kind` as contestants."""
        chosen = [peer for peer in self.peers if peer.kind == kind]
        return {p.name: (False, lambda problem, p=p: job(p, problem)) for p in chosen}

    def linear(self, name: str, n: int, k: int, m: int) -> Group:
        """y = x Ŵᵀ: W4A4 of given codes, with the quantize before it, W4A16, and peers."""
        ops, flops, rows = self.ops, 2 * m * n * k, probe(m, self.device)

        def make() -> Linear:
            generator = torch.Generator(self.device).manual_seed(1)
            codes = torch.randint(-8, 8, (n, k), generator=generator, device=self.device)
            scale = torch.rand(n, generator=generator, device=self.device) + 0.5
            return Linear(self.activations(m, k), codes.to(torch.int8), scale / (5 * k**0.5))

        def of_codes(p: Linear) -> Job:
            tokens, w = reference.quantize_int4(p.x, packed=False), p.weight
            check = near(reference.matmul(pick(tokens, rows), w), rows)
            return Job(ops.matmul, (tokens, w), check, EXACT, flops, "int8")

        def chain(x: Tensor, w: Weight) -> Tensor:
            return ops.matmul(ops.quantize_int4(x, packed=False), w)

        def with_quantize(p: Linear) -> Job:
            # the product is compared on the kernel's own codes, and these with the reference's
            mine = pick(ops.quantize_int4(p.x, packed=False), rows)
            off = code_error(mine, reference.quantize_int4(p.x[rows], packed=False), packed=False)
            product = near(reference.matmul(mine, p.weight), rows)
            return Job(
                *(chain, (p.x, p.weight), lambda y: product(y) if off <= TIES else math.inf),
                *(EXACT, flops, "int8"),
            )

        def weight_only(p: Linear) -> Job:
            check = near(reference.matmul_fp(p.x[rows], p.weight), rows)
            return Job(ops.matmul_fp, (p.x, p.weight), check, EXACT, flops)

        def other(peer: Peer, p: Linear) -> Job:
            call, wanted = peer.make(p), F.linear(p.x[rows].float(), p.dense)
            check = near(wanted, rows, relative, call.read)
            return Job(call.fn, call.args, check, peer.limit, flops, peer.unit)

        mine = {"dfrot W4A4": (True, of_codes), "dfrot quantize + W4A4": (True, with_quantize)}
        if m <= W4A16_ROWS:
            mine["dfrot W4A16"] = (True, weight_only)
        dims = {"shape": name, "n": n, "k": k, "m": m}
        return Group("linear", dims, make, mine | self.beside("linear", other))

    def tokens(self, name: str, k: int, m: int) -> Group:
        """Per-token codes of x [M, K]."""
        rows = probe(m, self.device)

        def job(x: Tensor) -> Job:
            wanted = reference.quantize_int4(x[rows])
            return Job(
                self.ops.quantize_int4, (x,), lambda out: code_error(pick(out, rows), wanted), TIES
            )

        dims = {"shape": name, "k": k, "m": m}
        return Group("quantize_int4", dims, lambda: self.activations(m, k), {"dfrot": (True, job)})

    def norm(self, name: str, k: int, m: int) -> Group:
        """Codes of the norm of x + residual, against add, norm and quantize apart, and norms alone."""
        ops, rows = self.ops, probe(m, self.device)

        def make() -> tuple[Tensor, Tensor]:
            return self.activations(m, k), self.activations(m, k, seed=1)

        def apart(x: Tensor, residual: Tensor) -> tuple[Tokens, Tensor]:
            total = x + residual
            return ops.quantize_int4(F.rms_norm(total, total.shape[-1:], eps=1e-6)), total

        def of(fn: Callable, limit: float, steps: float) -> Callable:
            def job(pair: tuple[Tensor, Tensor]) -> Job:
                codes, total = reference.add_norm_quantize(*(t[rows] for t in pair))

                def check(out: tuple[Tokens, Tensor]) -> float:
                    if distance(out[1][rows], total) > EXACT:
                        return math.inf
                    return code_error(pick(out[0], rows), codes, steps=steps)

                return Job(fn, pair, check, limit)

            return job

        def other(peer: Peer, pair: tuple[Tensor, Tensor]) -> Job:
            call, x = peer.make(pair[0]), pair[0][rows].float()
            wanted = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            check = near(wanted, rows, relative, call.read)
            return Job(call.fn, call.args, check, peer.limit)

        contestants = {
            "dfrot": (True, of(ops.add_norm_quantize, TIES, 1e-5)),
            "separate": (False, of(apart, ROUNDED, 2e-3)),
        }
        dims = {"shape": name, "k": k, "m": m}
        return Group("add_norm_quantize", dims, make, contestants | self.beside("norm", other))

    def hadamard(self, name: str, k: int, m: int) -> Group:
        """Codes of x H in one kernel, against transform then quantize."""
        ops, rows = self.ops, probe(m, self.device)

        def of(fn: Callable, limit: float, steps: float) -> Callable:
            def job(x: Tensor, *rest: Any) -> Job:
                wanted = reference.hadamard_quantize(x[rows])
                check = lambda y: code_error(pick(y, rows), wanted, steps=steps)  # noqa: E731
                return Job(fn, (x, *rest), check, limit)

            return job

        def apart(x: Tensor) -> Tokens:
            return ops.quantize_int4(hadamard.transform(x))

        def transform(peer: Peer, x: Tensor) -> Job:
            call, wanted = peer.make(x), hadamard.transform(x[rows].float())
            return Job(call.fn, call.args, near(wanted, rows, relative, call.read), peer.limit)

        def chained(peer: Peer) -> Callable:
            def job(x: Tensor) -> Job:
                call = peer.make(x)

                def both(*args: Any) -> Tokens:
                    return ops.quantize_int4(call.fn(*args))

                return of(both, ROUNDED, 2e-3)(*call.args)

            return job

        contestants = {
            "dfrot": (True, of(ops.hadamard_quantize, TIES, 1e-5)),
            "separate": (False, of(apart, ROUNDED, 2e-3)),
        }
        contestants |= self.beside("hadamard", transform)
        for peer in self.peers:
            if peer.kind == "hadamard":
                contestants[f"{peer.name} + quantize"] = (False, chained(peer))
        dims = {"shape": name, "k": k, "m": m}
        return Group("hadamard_quantize", dims, lambda: self.activations(m, k), contestants)

    def cache(self, name: str, heads: int, d: int, m: int) -> Group:
        """Keys or values of M tokens to 4 bits, x [M·heads, D]."""
        rows = probe(m * heads, self.device)

        def job(x: Tensor) -> Job:
            wanted = reference.quantize_kv(x[rows])
            return Job(
                self.ops.quantize_kv, (x,), lambda out: code_error(pick(out, rows), wanted), TIES
            )

        dims = {"shape": name, "m": m, "kv_heads": heads, "head_dim": d}
        return Group(
            "quantize_kv", dims, lambda: self.activations(m * heads, d), {"dfrot": (True, job)}
        )

    def attention(self, name: str, heads: int, kv_heads: int, d: int, context: int) -> Group:
        """One token's attention over a KV4 cache, against SDPA over the same numbers in fp16."""
        ops, flops = self.ops, 4 * heads * context * d
        whole = torch.zeros(1, dtype=torch.long, device=self.device)  # the one row there is

        def make() -> tuple[Tensor, KV, KV, Tensor]:
            shape = (1, kv_heads, context, d)
            k, v = (reference.quantize_kv(self.random(*shape, seed=seed)) for seed in (1, 2))
            lengths = torch.tensor([context], dtype=torch.int32, device=self.device)
            return self.random(1, heads, d), k, v, lengths

        def ours(p: tuple) -> Job:
            check = near(reference.decode_attention(*p), whole, relative)
            return Job(ops.decode_attention, p, check, SAME, flops)

        def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

        def sdpa(grouped: bool) -> Callable:
            def job(p: tuple) -> Job:
                wanted = reference.decode_attention(*p)
                keys, values = (reference.dequantize_kv(x) for x in p[1:3])
                # heads that share keys as rows of one query: SDPA then reads the cache once
                q = p[0].unflatten(1, (kv_heads, -1)) if grouped else p[0][:, :, None]
                check = near(wanted, whole, relative, lambda y: y.reshape(wanted.shape))
                return Job(apart, (q.contiguous(), keys, values), check, SAME, flops)

            return job

        contestants = {"dfrot KV4": (True, ours), "SDPA fp16": (False, sdpa(False))}
        if heads != kv_heads:
            contestants["SDPA fp16 grouped"] = (False, sdpa(True))
        dims = {"shape": name, "m": context, "batch": 1}
        dims |= {"heads": heads, "kv_heads": kv_heads, "head_dim": d}
        return Group("decode_attention", dims, make, contestants)

    def error(self, name: str, k: int, m: int) -> Group:
        """Per-token error of x R in 4 bits, against the product written out and then quantized."""
        rows, spec = probe(m, self.device), QuantSpec(bits=4)

        def make() -> tuple[Tensor, Tensor]:
            return self.activations(m, k), self.random(k, k, seed=1) / k**0.5

        def two_steps(x: Tensor, r: Tensor) -> Tensor:
            y = (x @ r).float()
            return (reference.fake_quantize(y, spec) - y).square().sum(-1)

        def of(fn: Callable) -> Callable:
            def job(p: tuple[Tensor, Tensor]) -> Job:
                wanted = reference.rotate_quantize_error(p[0][rows], p[1])

                def check(e: Tensor) -> float:  # rows differ in size: each is relative to its own
                    return relative(e[rows] / wanted, torch.ones_like(wanted))

                return Job(fn, p, check, SAME, 2 * m * k * k)

            return job

        mine, theirs = (of(fn) for fn in (self.ops.rotate_quantize_error, two_steps))
        dims = {"shape": name, "k": k, "m": m}
        contestants = {"dfrot": (True, mine), "two steps": (False, theirs)}
        return Group("rotate_quantize_error", dims, make, contestants)

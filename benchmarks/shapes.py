"""Sizes that are measured: every linear of three models, their heads, numbers of tokens, contexts."""

from __future__ import annotations

from types import ModuleType

import torch

from benchmarks.cases import Builder
from benchmarks.gates import Group
from benchmarks.peers import PEERS

__all__ = ["OPS", "ROWS", "SHAPES", "TARGET", "TOY", "groups"]

OPS = (
    "linear",
    "hadamard_quantize",
    "decode_attention",
    "quantize_int4",
    "add_norm_quantize",
    "quantize_kv",
    "rotate_quantize_error",
)
ROWS = (1, 4, 16, 256, 2048, 8192)  # M, tokens at once
TARGET = "llama-3-8b.down"
FIRST = (TARGET, "llama-3-8b", "llama-2-7b")  # measured first: what the targets speak of
# every linear [N, K] by name; those of one size are measured once, under the first name
SHAPES = {
    "llama-3-8b.down": (4096, 14336),
    "llama-3-8b.gate": (14336, 4096),
    "llama-3-8b.up": (14336, 4096),
    "llama-3-8b.q": (4096, 4096),
    "llama-3-8b.k": (1024, 4096),
    "llama-3-8b.v": (1024, 4096),
    "llama-3-8b.o": (4096, 4096),
    "llama-2-7b.q": (4096, 4096),
    "llama-2-7b.k": (4096, 4096),
    "llama-2-7b.v": (4096, 4096),
    "llama-2-7b.o": (4096, 4096),
    "llama-2-7b.gate": (11008, 4096),
    "llama-2-7b.up": (11008, 4096),
    "llama-2-7b.down": (4096, 11008),
    "llama-3-70b.q": (8192, 8192),
    "llama-3-70b.k": (1024, 8192),
    "llama-3-70b.v": (1024, 8192),
    "llama-3-70b.o": (8192, 8192),
    "llama-3-70b.gate": (28672, 8192),
    "llama-3-70b.up": (28672, 8192),
    "llama-3-70b.down": (8192, 28672),
}
HEADS = {"llama-3-8b": (32, 8, 128), "llama-2-7b": (32, 32, 128), "llama-3-70b": (64, 8, 128)}
CONTEXTS = (32768, 8192, 2048)
TOY = {"toy.down": (24, 56), "toy.gate": (56, 24)}
TOY_ROWS = (1, 5, 17)
TOY_HEADS = {"toy": (4, 2, 16)}
TOY_CONTEXTS = (40,)
ERROR_ROWS = 256  # the optimiser takes many tokens at once


def groups(
    ops: ModuleType,
    device: torch.device,
    absent: dict[str, str],
    *,
    only: tuple[str, ...] = OPS,
    shapes: tuple[str, ...] = (),
    rows: tuple[int, ...] = (),
    toy: bool = False,
    quick: bool = False,
) -> list[Group]:
    """What there is to measure with the backend `ops`, the targets' sizes first. shapes: parts of names."""
    table = TOY if toy else SHAPES
    if quick and not shapes and not toy:
        shapes = (TARGET,)
    names = [name for name in table if not shapes or any(part in name for part in shapes)]
    rows = rows or (TOY_ROWS if toy else (1, 16, 2048) if quick else ROWS)
    rows = tuple(sorted(rows, reverse=True))
    contexts = TOY_CONTEXTS if toy else CONTEXTS[:1] if quick else CONTEXTS
    sizes: dict[tuple[int, int], str] = {}
    inputs: dict[int, str] = {}
    for name in names:
        sizes.setdefault(table[name], name)
        inputs.setdefault(table[name][1], name)
    heads = TOY_HEADS if toy else HEADS
    heads = {n: h for n, h in heads.items() if any(each.startswith(n) for each in names)}
    hidden = {k: name for k, name in inputs.items() if not name.endswith("down")}

    b = Builder(ops, device, [peer for peer in PEERS if peer.name not in absent])
    every: dict[str, list[Group]] = {
        "linear": [b.linear(name, *size, m) for size, name in sizes.items() for m in rows],
        "hadamard_quantize": [b.hadamard(n, k, m) for k, n in inputs.items() for m in rows],
        "decode_attention": [b.attention(n, *h, t) for n, h in heads.items() for t in contexts],
        "quantize_int4": [b.tokens(n, k, m) for k, n in inputs.items() for m in rows],
        "add_norm_quantize": [b.norm(n, k, m) for k, n in hidden.items() for m in rows],
        "quantize_kv": [b.cache(n, *h[1:], m) for n, h in heads.items() for m in rows],
        "rotate_quantize_error": [
            b.error(n, k, m) for k, n in hidden.items() for m in rows if toy or m >= ERROR_ROWS
        ],
    }
    chosen = [group for op in OPS if op in only for group in every[op]]
    return sorted(chosen, key=lambda group: group.dims["shape"] not in FIRST)

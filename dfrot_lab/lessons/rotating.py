"""Exercises of notebooks 01 and 06: gains folded, rotations merged, Hadamard matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from dfrot_kernels import hadamard
from torch import Tensor

from dfrot_lab import models, rotations
from dfrot_lab.answers import Case
from dfrot_lab.lessons.lesson import Lesson, rows

__all__ = ["LESSONS"]

# hidden size, size between gate and down: of tiny models
SIZES = {"8 channels": (8, 12), "12 channels, no power of two": (12, 20), "24 channels": (24, 10)}


def _tiny(hidden: int, intermediate: int, seed: int):
    """A tiny LLaMA with one layer, in fp64, gains not folded."""
    model = models.tiny(
        "llama", hidden=hidden, heads=2, kv_heads=1, layers=1, intermediate=intermediate, seed=seed
    )
    return model.double()


def _fold_cases() -> Iterator[Case]:
    """weight [out, d], gain [d] → the weight that `models.fold_gains` leaves."""
    for seed, (about, sizes) in enumerate(SIZES.items()):
        model = _tiny(*sizes, seed)
        layer = models.layers(model)[0]
        linear = layer.mlp_inputs["mlp.up_proj"]
        arguments = tuple(p.detach().clone() for p in (linear.weight, layer.mlp_norm.weight))
        models.fold_gains(model)
        yield Case(about, arguments, linear.weight.detach())


def _merge_cases() -> Iterator[Case]:
    """reader [out, d], writer [d, in], r [d, d] → both as `rotations.merge` leaves them."""
    for seed, (about, sizes) in enumerate(SIZES.items()):
        model = models.fold_gains(_tiny(*sizes, seed))
        layer = models.layers(model)[0]
        both = (layer.mlp_inputs["mlp.gate_proj"].weight, layer.mlp_output.weight)
        r = rotations.random_orthogonal(sizes[0], seed)
        arguments = (*(w.detach().clone() for w in both), r)
        rotations.merge(model, rotations.Rotations(R1=r))
        yield Case(about, arguments, tuple(w.detach() for w in both))


def signs_of(d: int, seed: int) -> Tensor:
    """The random signs [d] in D·H = `rotations.random_hadamard`(d, seed)."""
    h = hadamard.transform(torch.eye(d, dtype=torch.float64))
    return (rotations.random_hadamard(d, seed) * h).sum(-1).round()


def _hadamard_cases() -> Iterator[Case]:
    """signs [d], core [c, c], d = c·2^m → D·(C ⊗ S)/√d."""
    for seed, d in enumerate((2, 8, 12, 48, 20, 64)):
        core = torch.from_numpy(hadamard.core(hadamard.factor(d).core).copy()).double()
        about = f"d = {len(core)} · {d // len(core)}"
        yield Case(about, (signs_of(d, seed), core), rotations.random_hadamard(d, seed))


def _composed_cases() -> Iterator[Case]:
    """x [T, d], two times signs [d] → x D₁ H D₂ H."""
    for seed, (tokens, d) in enumerate(((1, 2), (2, 4), (5, 12), (3, 60))):
        x = rows(tokens, d, seed, spike=100.0)
        signs = (signs_of(d, seed * 1000 + i) for i in range(2))
        about = f"{tokens} rows of {d}, one with a spike"
        yield Case(about, (x, *signs), x @ rotations.composed_hadamard(d, seed))


LESSONS = {
    "01.fold": Lesson(_fold_cases),
    "01.hadamard": Lesson(_hadamard_cases),
    "01.merge": Lesson(_merge_cases),
    "06.composed": Lesson(_composed_cases),
}

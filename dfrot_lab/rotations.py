"""Rotation: random orthogonal and Hadamard matrices, and their merging into a model's weights.

Activations are row vectors, x → xR with RRᵀ = I. A linear y = xWᵀ + b (W is [out, in]) that reads the
rotated stream becomes W ← WR; one that writes it becomes W ← RᵀW, b ← bR (QuaRot; DFRot, Section 3.1).

R1 [d, d] turns the residual stream and R2 [head_dim, head_dim] the values of every head, or of each by a
matrix of its own: both vanish into weights. R4 is a Hadamard before down_proj, applied online; only its
inverse is merged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from dfrot_kernels import hadamard
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from dfrot_lab import files, models

__all__ = [
    "START",
    "RotationError",
    "Rotations",
    "across_heads",
    "check",
    "composed_hadamard",
    "identity",
    "load",
    "merge",
    "online",
    "orthogonality_error",
    "random_hadamard",
    "random_orthogonal",
    "refuse_rotated",
    "save",
    "turn_heads",
]

TOLERANCE = 1e-10  # fp64 products of a few thousand terms stay below 1e-12; fp32 files do not

SEEDS = 1 << 32  # torch's generator on a CPU takes the seed modulo this


class RotationError(ValueError):
    """A matrix that is no rotation for this model; one line: what, which value, what to do."""


def identity(d: int, seed: int = 0) -> Tensor:
    """NR: no rotation, I [d, d] in fp64 (`seed` is there for a common signature)."""
    return torch.eye(d, dtype=torch.float64)


def random_orthogonal(d: int, seed: int = 0) -> Tensor:
    """RO: Haar-distributed Q·diag(sign(diag T)) from the QR factors of a Gaussian, [d, d] fp64.

    RotationError for a seed that is negative or 2³² and more; so do the next two.
    """
    generator = _generator(seed)
    q, t = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q * t.diagonal().sign()


def _generator(seed: int) -> torch.Generator:
    if not 0 <= seed < SEEDS:
        raise RotationError(f"seed = {seed}: use a whole number from 0 to {SEEDS - 1}")
    return torch.Generator().manual_seed(seed)


def _signs(d: int, seed: int) -> Tensor:
    return torch.randint(0, 2, (d,), generator=_generator(seed), dtype=torch.int64).double() * 2 - 1


def random_hadamard(d: int, seed: int = 0) -> Tensor:
    """RH: D·H, D = diag(±1) at random, H the normalized Hadamard of order d, [d, d] fp64.

    Where no Hadamard of order d is constructed H is block-diagonal (`dfrot_kernels.hadamard.factor`).
    """
    return _signs(d, seed)[:, None] * hadamard.transform(torch.eye(d, dtype=torch.float64))


def composed_hadamard(d: int, seed: int = 0, times: int = 2) -> Tensor:
    """RH²: D₁·H·D₂·H, orthogonal and as cheap as RH, but without its structure; the falsification."""
    r = identity(d)
    _generator(seed)  # refuses what RH refuses
    for i in range(times):
        r = r @ random_hadamard(d, (seed * 1000 + i) % SEEDS)
    return r


START = {
    "NR": identity,
    "RO": random_orthogonal,
    "RH": random_hadamard,
    "RH2": composed_hadamard,
}


def orthogonality_error(r: Tensor) -> float:
    """max|RᵀR − I|, computed in fp64."""
    r = r.double()
    return (r.mT @ r - torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)).abs().max().item()


def check(r: Tensor, d: int, name: str = "R1") -> Tensor:
    """`r` itself if it is [d, d] and orthogonal to 1e-10; RotationError with the value otherwise."""
    if tuple(r.shape) != (d, d):
        raise RotationError(
            f"{name} is {list(r.shape)} but the model needs [{d}, {d}]: "
            "use a rotation made for this model"
        )
    error = orthogonality_error(r)
    if not error <= TOLERANCE:
        raise RotationError(
            f"{name} is not orthogonal: max|RᵀR − I| = {error:.3g} > {TOLERANCE:g}; "
            "project it with dfrot_lab.polar.polar or make it again in fp64"
        )
    return r


def refuse_rotated(merged: list[str], model: str) -> None:
    """RotationError if R1 or R2 is among what was `merged` into `model` (dfrot_merged of its config)."""
    if {"R1", "R2"} & set(merged):
        raise RotationError(
            f"{model} is rotated already ({', '.join(merged)} merged): take the original, or pass it on "
            "as it is with `dfrot-lab export` and --rotation NR"
        )


def save(path: str | Path, r: Tensor, metadata: dict) -> Path:
    """Write R [d, d] as fp64 safetensors with JSON metadata, atomically. Returns the path."""
    check(r, r.shape[-1], "R")
    about = {"dfrot": json.dumps(metadata, sort_keys=True)}
    with files.atomic(path) as partial:
        partial.write_bytes(serialize({"R": r.double().contiguous().cpu()}, metadata=about))
    return Path(path)


def load(path: str | Path, d: int | None = None) -> tuple[Tensor, dict]:
    """(R, metadata) from `save`; RotationError if missing, unreadable, of another size, skewed."""
    if not Path(path).is_file():
        raise RotationError(
            f"rotation file {path} does not exist: make it with `dfrot-lab optimize`"
        )
    try:
        with safe_open(path, framework="pt") as f:
            r, metadata = f.get_tensor("R"), json.loads((f.metadata() or {}).get("dfrot", "{}"))
    except Exception as error:  # safetensors raises its own type, and bad files take many forms
        raise RotationError(
            f"rotation file {path} cannot be read: {error}; delete it and make it again"
        ) from error
    return check(r, d or r.shape[-1], f"R in {path}"), metadata


@dataclass(frozen=True)
class Rotations:
    """What to merge: R1 [d, d]; R2, one [head_dim, head_dim] for all values or [layers, kv_heads, head_dim,
    head_dim]; Hadamards on or off.

    R4: before down_proj. heads: across the heads before o_proj, as upstream QuaRot has it and DFRot
    does not. Both are online, their inverses merged. (R3 belongs to the KV cache: `kv_cache.KVSpec`.)
    """

    R1: Tensor | None = None
    R2: Tensor | None = None
    R4: bool = False
    heads: bool = False

    @classmethod
    def standard(cls, model: nn.Module, R1: Tensor | None) -> Rotations:
        """`R1` with Hadamard R2 and R4, as QuaRot and DFRot run; None: no rotation at all (NR)."""
        if R1 is None:
            return cls()
        head_dim = models.layers(model)[0].module.self_attn.head_dim
        return cls(R1=R1, R2=random_hadamard(head_dim), R4=True)

    def values(self, layer: int) -> Tensor | None:
        """R2 of a layer, [head_dim, head_dim] or [kv_heads, head_dim, head_dim]."""
        return self.R2[layer] if self.R2 is not None and self.R2.dim() == 4 else self.R2


@torch.no_grad()
def merge(model: nn.Module, rotations: Rotations) -> nn.Module:
    """Merge `rotations` into the weights of a gain-folded `model`, in place; returns it.

    Products are in the weights' dtype, fp32 at least: against fp64 that moves the logits of an fp32
    model by less than storing its weights does, in a third of the time. Parts may be merged one call
    after another, each once.

    With R4 the model computes the original function only once the online Hadamard stands before
    every down_proj (`quantized_model.build` puts it there). Raises RotationError for gains not folded,
    a rotation already merged, or a matrix of another size or not orthogonal.
    """
    if not models.is_folded(model):
        raise RotationError("RMSNorm gains are not folded: call models.fold_gains(model) first")
    done = list(model.config.dfrot_merged)
    asked = {"R1": rotations.R1 is not None, "R2": rotations.R2 is not None}
    asked |= {"R4": rotations.R4, "heads": rotations.heads}
    if twice := [name for name in done if asked.get(name)]:
        raise RotationError(f"{twice} already merged into this model: load it afresh")
    parts = models.layers(model)
    # all is checked before anything is changed
    if rotations.R1 is not None:
        check(rotations.R1, model.config.hidden_size, "R1")
    if rotations.R2 is not None:
        _check_values(rotations.R2, model, parts)
    if rotations.heads:
        _check_heads(model.config.num_attention_heads)
    if rotations.R1 is not None:
        _merge_r1(model, rotations.R1)
        done.append("R1")
    if rotations.R2 is not None:
        _merge_r2(model, rotations)
        done.append("R2")
    if rotations.R4:
        for layer in parts:
            w = layer.mlp_output.weight
            w.copy_(hadamard.transform(_precise(w)))
        done.append("R4")
    if rotations.heads:
        across = across_heads(parts[0].module.self_attn.head_dim)
        for layer in parts:
            layer.attention_output.weight.copy_(across(_precise(layer.attention_output.weight)))
        done.append("heads")
    model.config.dfrot_merged = done
    return model


def online(model: nn.Module, rotations: Rotations) -> tuple[Callable | None, Callable | None]:
    """What must turn the inputs of o_proj and of down_proj in the running `model`; None for nothing."""
    size = models.layers(model)[0].module.self_attn.head_dim
    return (
        across_heads(size) if rotations.heads else None,
        hadamard.transform if rotations.R4 else None,
    )


def across_heads(head_dim: int) -> Callable[[Tensor], Tensor]:
    """x [..., heads·head_dim] → x (H_heads ⊗ I), a Hadamard across heads, channel by channel."""

    def turn(x: Tensor) -> Tensor:
        channels = x.unflatten(-1, (-1, head_dim)).transpose(-1, -2)  # [..., head_dim, heads]
        return hadamard.transform(channels.contiguous()).transpose(-1, -2).flatten(-2)

    return turn


def _check_heads(heads: int) -> None:
    if not hadamard.is_full(heads):
        raise RotationError(
            f"no Hadamard matrix across {heads} heads (orders are 1, 2 and multiples of 4): leave "
            "heads=False, as DFRot does"
        )


def _merge_r1(model: nn.Module, r: Tensor) -> None:
    a = models.architecture(model)
    readers, writers = [models.head(model)], []
    for layer in models.layers(model):
        readers += [*layer.attention_inputs.values(), *layer.mlp_inputs.values()]
        writers += [layer.attention_output, layer.mlp_output]
    for module in [model.get_submodule(a.embedding), *readers]:
        _turn_rows(module.weight, r)
    for module in writers:
        w = _precise(module.weight)
        rt = r.mT.to(w)
        module.weight.copy_(rt @ w)
        if module.bias is not None:
            module.bias.copy_(rt @ module.bias.to(w))


def _turn_rows(w: Tensor, r: Tensor, rows: int = 8192) -> None:
    """W ← W·R, a block of rows at a time: a wider copy of a whole embedding may take gigabytes."""
    for block in w.split(rows):
        wide = _precise(block)
        block.copy_(wide @ r.to(wide))


def _precise(w: Tensor) -> Tensor:
    """`w` in the dtype of products: its own, but fp32 at least."""
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _check_values(r: Tensor, model: nn.Module, parts: list[models.Layer]) -> None:
    size = parts[0].module.self_attn.head_dim
    if r.dim() != 4:
        check(r, size, "R2")
        return
    shape = (len(parts), model.config.num_key_value_heads, size, size)
    if tuple(r.shape) != shape:
        raise RotationError(
            f"R2 is {list(r.shape)} but the model needs {[size, size]} or {list(shape)}: "
            "use a rotation made for this model"
        )
    for layer, heads in enumerate(r):
        for head, one in enumerate(heads):
            check(one, size, f"R2 of layer {layer}, head {head}")


def turn_heads(x: Tensor, r: Tensor) -> Tensor:
    """x [..., heads·head_dim] → x_h R2, by one `r` [head_dim, head_dim] or [kv_heads, head_dim, head_dim].

    Query heads come in groups that share a head of keys and values, in order.
    """
    cut = x.unflatten(-1, (-1, r.shape[-1]))
    if r.dim() == 2:
        return (cut @ r).flatten(-2)
    each = r.repeat_interleave(cut.shape[-2] // len(r), 0)
    return torch.einsum("...hi,hij->...hj", cut, each).flatten(-2)


def _merge_r2(model: nn.Module, rotations: Rotations) -> None:
    for layer in models.layers(model):
        value, output = layer.attention_inputs["self_attn.v_proj"], layer.attention_output
        size = layer.module.self_attn.head_dim
        heads = _precise(value.weight).unflatten(0, (-1, size))  # [kv_heads, head_dim, d]
        r = rotations.values(layer.index).to(heads)
        value.weight.copy_((r.mT @ heads).flatten(0, 1))
        if value.bias is not None:
            value.bias.copy_(turn_heads(value.bias.to(r), r))
        output.weight.copy_(turn_heads(output.weight.to(r), r))

"""Rotation file: a safetensors file from anywhere, taken for R1 only if it says that it is one, and whose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dfrot_lab import checkpoints, owners, rotations
from dfrot_lab.owners import Owner
from dfrot_lab.rotations import Rotations

__all__ = ["RotationFile", "RotationFileError", "for_merging", "load"]


class RotationFileError(ValueError):
    """A file of tensors none of which is R; one line: which file, what it holds, what is expected."""


@dataclass(frozen=True)
class RotationFile:
    """R1 [d, d] and R2 [head_dim, head_dim] in fp64, R2 None if the file has none; its metadata."""

    R1: Tensor
    R2: Tensor | None
    about: dict[str, Any]


def load(path: str | Path, owner: Owner, d: int, head_dim: int) -> RotationFile:
    """What `path` holds, to be merged into the model `owner` of width `d`.

    RotationFileError if it is whole but holds no tensor `R`; RotationError as `rotations.load`, for an R2
    of another size than `head_dim`, and for a file made for another model (`owners.check`).
    """
    if (held := _held(path)) and "R" not in held:
        few = ", ".join(f"{name} {shape}" for name, shape in list(held.items())[:4])
        more = f" and {len(held) - 4} more" if len(held) > 4 else ""
        raise RotationFileError(
            f"rotation file {path} holds {few}{more}, but no tensor 'R': expected is one orthogonal "
            "[d, d] matrix in fp64 under that name, as `dfrot-lab optimize --out` and rotations.save "
            "write it"
        )
    r1, about = rotations.load(path, d)
    owners.check(path, about, owner)
    r2 = None
    if "R2" in held:
        with safe_open(path, framework="pt") as f:
            r2 = rotations.check(f.get_tensor("R2"), head_dim, f"R2 in {path}")
    return RotationFile(r1, r2, about)


def for_merging(path: str | Path, model: str, folder: Path, *, r2: bool = True) -> Rotations:
    """R1 of `path` for the checkpoint of `model` in `folder`; r2: also the file's R2, or else a Hadamard.

    Raises what `load` and `checkpoints.sizes` raise.
    """
    d, size = checkpoints.sizes(folder)
    found = load(path, Owner(model, None, owners.fingerprint(folder)), d, size)
    second = rotations.random_hadamard(size) if found.R2 is None else found.R2
    return Rotations(R1=found.R1, R2=second if r2 else None)


def _held(path: str | Path) -> dict[str, list[int]]:
    """Tensor → shape; nothing of a file that is missing or damaged, which `rotations.load` tells."""
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_slice(name).get_shape() for name in sorted(f.keys())}
    except (OSError, SafetensorError):
        return {}

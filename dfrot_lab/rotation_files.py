"""Rotation file: a safetensors file from anywhere, taken for R1 only if it says that it is one."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dfrot_lab import rotations

__all__ = ["RotationFileError", "load"]


class RotationFileError(ValueError):
    """A file of tensors none of which is R; one line: which file, what it holds, what is expected."""


def load(path: str | Path) -> Tensor:
    """R1 [d, d] in fp64 of `path`.

    RotationFileError if it is whole but holds no tensor `R`; RotationError as `rotations.load`.
    """
    if (held := _held(path)) and "R" not in held:
        few = ", ".join(f"{name} {shape}" for name, shape in list(held.items())[:4])
        more = f" and {len(held) - 4} more" if len(held) > 4 else ""
        raise RotationFileError(
            f"rotation file {path} holds {few}{more}, but no tensor 'R': expected is one orthogonal "
            "[d, d] matrix in fp64 under that name, as `dfrot-lab optimize --out` and rotations.save "
            "write it"
        )
    return rotations.load(path)[0]


def _held(path: str | Path) -> dict[str, list[int]]:
    """Tensor → shape; nothing of a file that is missing or damaged, which `rotations.load` tells."""
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_slice(name).get_shape() for name in sorted(f.keys())}
    except (OSError, SafetensorError):
        return {}

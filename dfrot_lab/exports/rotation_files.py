"""Rotation files: R1 (and R2) alone, with what they were made for; and rotations made elsewhere, imported."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from dfrot_lab import files, polar, rotations
from dfrot_lab.exports.sources import ExportError
from dfrot_lab.rotations import RotationError

__all__ = ["Imported", "read_npy", "write"]

FAR = 1e-2  # a singular value farther than this from 1: bfloat16 files stay below, no rotation lies above


def write(target: str | Path, r1: Tensor, r2: Tensor | None, about: dict[str, Any]) -> Path:
    """Write R1 [d, d] as tensor `R` and R2 [head_dim, head_dim] as `R2`, fp64, metadata under `dfrot`.

    about: model, revision, fingerprint, calibration hash, γ, loss … Read again before it takes its
    place. `rotations.load` and every `--rotation` take the file. Raises RotationError for a skewed one.
    """
    if Path(target).exists():
        raise ExportError(f"{target} exists: choose another file, or delete it")
    tensors = {"R": rotations.check(r1, r1.shape[-1], "R1")}
    if r2 is not None:
        tensors["R2"] = rotations.check(r2, r2.shape[-1], "R2")
    tensors = {k: t.double().contiguous().cpu() for k, t in tensors.items()}
    text = json.dumps(about, sort_keys=True)
    with files.atomic(target) as partial:
        partial.write_bytes(serialize(tensors, metadata={"dfrot": text}))
        with safe_open(partial, framework="pt") as f:
            same = all(torch.equal(f.get_tensor(k), t) for k, t in tensors.items())
        if not same or rotations.load(partial)[1] != json.loads(text):
            raise ExportError(f"{target} does not read as it was written: check the disk")
    return Path(target)


@dataclass(frozen=True)
class Imported:
    """How far a rotation from elsewhere was from orthogonal, and how far it was moved.

    before, after: max|RᵀR − I|; moved: ‖R − A‖_F; largest: max|R − A|; sha256: of the file read.
    """

    before: float
    after: float
    moved: float
    largest: float
    sha256: str

    @property
    def about(self) -> dict[str, Any]:
        """As metadata."""
        return asdict(self)


def read_npy(path: str | Path, d: int, *, transpose: bool = False) -> tuple[Tensor, Imported]:
    """R1 [d, d] fp64 from a .npy file of any float dtype: its orthogonal polar factor, x → xR.

    The released code saves fp32, whose RᵀR misses I by 1e-6: too far for `rotations.check`. The polar
    factor is the nearest orthogonal matrix. transpose: for files that mean x → xRᵀ. Raises RotationError
    for a file that is no [d, d] array, or lies so far from orthogonal that it was no rotation.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RotationError(f"{path} cannot be read as .npy: {error}") from error
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
        raise RotationError(f"{path} is no array of real numbers: give one [{d}, {d}] matrix")
    if array.shape != (d, d):
        raise RotationError(
            f"{path} is {list(array.shape)} but the model needs [{d}, {d}]: use a rotation made for it"
        )
    a = torch.from_numpy(array.astype(np.float64))
    a = a.mT if transpose else a
    if not torch.isfinite(a).all():
        raise RotationError(f"{path} holds NaN or Inf: no rotation")
    far = (torch.linalg.svdvals(a) - 1).abs().max().item()
    if far > FAR:
        raise RotationError(
            f"{path} is no rotation: a singular value is {far:.3g} from 1, where {FAR:g} is rounding; "
            "check that this is R1 itself and not a weight it was merged into"
        )
    r = polar.svd(a)
    before, after = rotations.orthogonality_error(a), rotations.orthogonality_error(r)
    gap = (r - a).abs()
    moved, largest = torch.linalg.norm(gap).item(), gap.max().item()
    return r, Imported(before, after, moved, largest, files.sha256(path))

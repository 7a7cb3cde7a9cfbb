"""Warm start: R1 refined from the R1 in a file, where `Artefacts.rotation_file` starts from RH or RO.

A rotation that is good for another γ or another text is near one that is good for this: it takes fewer
steps from there than from a Hadamard (docs/optimiser.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfrot_lab import files
from dfrot_lab.refinements import Refinement

if TYPE_CHECKING:
    from dfrot_lab.lab import Lab
    from dfrot_lab.presets import Preset

__all__ = ["by_preset", "rotation_file"]


def rotation_file(lab: Lab, start: str | Path, **how: Any) -> Path:
    """The safetensors file of R1 refined from that in file `start`; from artefacts/rotations or made now.

    how: fields of `Refinement`. An R2 in `start` is not taken along. RotationError for a file that is
    missing, damaged, or of another model.
    """
    begin, given, digest = lab.rotation(str(start)), Refinement(**how), files.sha256(start)
    stem = given.stem(f"from-{digest[:12]}")
    return lab.refined(lambda: begin, given, stem, {"start": digest}, ("dfrot_lab.warm_starts",))


def by_preset(lab: Lab, start: str | Path, preset: Preset) -> Path:
    """`rotation_file` by a preset: its objective, γ, steps, and its own calibration windows."""
    return rotation_file(
        preset.lab(lab), start, gamma=preset.gamma, objective=preset.objective, relax=preset.relax,
        iterations=preset.iterations,
    )  # fmt: skip

"""Warm start: R1 refined from the R1 in a file, where `Artefacts.rotation_file` starts from RH or RO.

A rotation that is good for another γ or another text is near one that is good for this: it takes fewer
steps from there than from a Hadamard (docs/optimiser.md).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dfrot_lab import dfrot, files, owners, rotations
from dfrot_lab.artefacts import ROTATION_CODE
from dfrot_lab.quantizers import QuantSpec

if TYPE_CHECKING:
    from dfrot_lab.lab import Lab
    from dfrot_lab.presets import Preset

__all__ = ["by_preset", "rotation_file"]


def rotation_file(
    lab: Lab,
    start: str | Path,
    *,
    gamma: float = 100.0,
    form: str = "sum",
    symmetric: bool = False,
    objective: str = "centroids",
    relax: float = 1.0,
    stop: float = 0.0,
    iterations: int | None = None,
) -> Path:
    """The safetensors file of R1 refined from that in file `start`; from artefacts/rotations or made now.

    gamma … iterations: as for `Artefacts.rotation_file`. An R2 in `start` is not taken along. RotationError
    for a file that is missing, damaged, or of another model.
    """
    begin, x = lab.rotation(str(start)), lab.activations
    weighting, spec = dfrot.Weighting(gamma=gamma, form=form), QuantSpec(symmetric=symmetric)
    digest, steps = files.sha256(start), iterations or lab.iterations
    options = {
        "start": digest, "gamma": str(float(gamma)), "form": form, "symmetric": symmetric,
        "objective": objective, "relax": str(relax), "iterations": steps, "rows": lab.rows,
        "solver": lab.solver,
    }  # fmt: skip
    options |= {"stop": str(stop)} if stop else {}
    code = (*ROTATION_CODE, "dfrot_lab.warm_starts")
    key = lab._key(options | {"activations": x.metadata["key"]}, code)
    stem = f"DFRot-from-{digest[:12]}-{key[:12]}"
    path = Path(lab.folder) / "artefacts" / "rotations" / f"{stem}.safetensors"
    with lab._locked(path):
        if path.exists() and rotations.load(path)[1].get("key") == key:
            return path
        r, log = dfrot.optimize(
            x, begin, spec, weighting, iterations=steps, rows=lab.rows, objective=objective,
            solver=lab.solver, relax=relax, stop=stop, device=lab.device, progress=stem,
            checkpoint=path.with_suffix(".checkpoint"),
        )  # fmt: skip
        about = {"key": key, "log": asdict(log)} | options | lab.about
        return rotations.save(path, r, about | owners.of(lab.model).about)


def by_preset(lab: Lab, start: str | Path, preset: Preset) -> Path:
    """`rotation_file` by a preset: its objective, γ, steps, and its own calibration windows."""
    return rotation_file(
        preset.lab(lab), start, gamma=preset.gamma, objective=preset.objective, relax=preset.relax,
        iterations=preset.iterations,
    )  # fmt: skip

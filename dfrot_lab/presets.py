"""Presets: named ways to refine R1, all of which cost nothing at inference.

`dfrot` is the published method (Section 3.4: int4 centroids, γ = 100, plain steps, one calibration window)
with the steps and rows of the profile. `recommended` has kurtosis, the first of notebook 09's ranking at
16-4-16; its eight windows and hundred steps, whatever the profile has, are set by hand, since this objective
is slower to settle.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfrot_lab.lab import Lab

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """How R1 is refined. objective, relax: see `dfrot.optimize`; gamma: of `dfrot.Weighting`; windows:
    calibration windows, None for the lab's own; iterations: likewise.
    """

    objective: str = "centroids"
    gamma: float = 100.0
    relax: float = 1.0
    windows: int | None = None
    iterations: int | None = None

    def lab(self, lab: Lab) -> Lab:
        """`lab` itself, or the same with this preset's calibration windows, in a folder of its own."""
        return (
            lab if self.windows in (None, lab.calibration) else lab.with_calibration(self.windows)
        )

    def rotation_file(self, lab: Lab, seed: int, start: str = "RH") -> Path:
        """The refined R1, made now unless it is there."""
        return self.lab(lab).rotation_file(
            f"DFRot({start})", seed, gamma=self.gamma, objective=self.objective, relax=self.relax,
            iterations=self.iterations,
        )  # fmt: skip

    def cost(self, lab: Lab) -> float:
        """TFLOP of the refinement: two products with the rows used and a polar factor a step.

        26 d³ for the latter: an SVD of a square matrix with both sets of vectors (Golub and Van Loan, 8.6).
        Collecting the activations is not counted.
        """
        own = self.lab(lab)
        x = own.activations
        rows = x.X.shape[0] * x.X.shape[1] * own.rows
        return (self.iterations or own.iterations) * (4 * rows * x.d**2 + 26 * x.d**3) / 1e12


PRESETS = {
    "dfrot": Preset(),
    "recommended": Preset(objective="kurtosis", gamma=100.0, windows=8, iterations=100),
}

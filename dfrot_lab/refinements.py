"""Refinement: how R1 is refined, and what tells its file from those of other ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dfrot_lab import rotations
from dfrot_lab.weighting import Weighting

__all__ = ["LabError", "Refinement", "parse_rotation"]


class LabError(ValueError):
    """A parameter that makes no sense; one line: what, which value, what to do."""


def parse_rotation(name: str) -> tuple[str, str | None]:
    """('DFRot', start) of 'DFRot(RH)' or 'DFRot(RO)', else (name, None); LabError if unknown."""
    if name in rotations.START:
        return name, None
    if name in ("DFRot(RH)", "DFRot(RO)"):
        return "DFRot", name[6:-1]
    known = [*rotations.START, "DFRot(RH)", "DFRot(RO)"]
    raise LabError(f"rotation {name!r} is unknown: use one of {', '.join(known)}")


def _told(value: float) -> str:
    """Short where that is exact: files of two values must not share a name."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


@dataclass(frozen=True)
class Refinement:
    """How R1 is refined.

    form, gamma: see `dfrot.Weighting`; symmetric: the quantizer in the loop, as released; sites: how many
    of the norm sites are used, evenly spaced (None: all); qr, objective, relax, stop: see `dfrot.optimize`;
    iterations: other than the lab's. Raises LabError for iterations below 1, ValueError as `Weighting`.
    """

    gamma: float = 100.0
    form: str = "sum"
    symmetric: bool = False
    sites: int | None = None
    qr: bool = False
    objective: str = "centroids"
    relax: float = 1.0
    stop: float = 0.0
    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.iterations is not None and self.iterations < 1:
            raise LabError(f"iterations = {self.iterations}: use a positive number")
        _ = self.weighting  # what is wrong with γ is told before anything is collected

    @property
    def weighting(self) -> Weighting:
        """Of the rows."""
        return Weighting(gamma=self.gamma, form=self.form)

    @property
    def options(self) -> dict[str, Any]:
        """For the key of the file and its metadata; what is as usual, and came later, is left out."""
        out = {"gamma": str(float(self.gamma)), "form": self.form, "symmetric": self.symmetric}
        out |= ({"sites": self.sites} if self.sites else {}) | ({"qr": True} if self.qr else {})
        out |= {"objective": self.objective} if self.objective != "centroids" else {}
        out |= {"relax": str(self.relax)} if self.relax != 1 else {}
        return out | ({"stop": str(self.stop)} if self.stop else {})

    def stem(self, start: str, end: str = "") -> str:
        """DFRot-`start`-gamma…`end`…: file name, without suffix, but for steps and solver."""
        stem = f"DFRot-{start}-gamma{_told(self.gamma)}-{self.form}"
        stem += ("-sym" if self.symmetric else "-asym") + end
        stem += (f"-sites{self.sites}" if self.sites else "") + ("-qr" if self.qr else "")
        stem += f"-{self.objective}" if self.objective != "centroids" else ""
        stem += f"-relax{_told(self.relax)}" if self.relax != 1 else ""
        return stem + (f"-stop{_told(self.stop)}" if self.stop else "")

"""Verdicts: what became of each figure, table and hash that was held against a reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dfrot_lab.tolerances import Difference

__all__ = ["Line", "NotebookReport", "Report"]

FAILING = ("differs", "missing", "not comparable")


@dataclass(frozen=True)
class Line:
    """One verdict. status: reproduced, differs, missing, not comparable, not run, or not compared."""

    kind: str
    name: str
    status: str
    detail: str = ""
    differences: list[Difference] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether the verdict as a whole is then "not reproduced"."""
        return self.status in FAILING

    def __str__(self) -> str:
        """`massive_tokens_fp16       reproduced`."""
        said = f"{self.status} {self.detail}".strip()
        return f"  {self.name:<28}{said}"


@dataclass(frozen=True)
class NotebookReport:
    """What became of one notebook. about: how it was compared."""

    notebook: str
    about: str
    lines: list[Line]


@dataclass(frozen=True)
class Report:
    """Hashes first, then a notebook at a time."""

    profile: str
    reference: str
    hashes: list[Line]
    notebooks: list[NotebookReport]

    @property
    def lines(self) -> list[Line]:
        """Every verdict."""
        return [*self.hashes, *(line for n in self.notebooks for line in n.lines)]

    @property
    def reproduced(self) -> bool:
        """Whether nothing that was asked for differs or is missing."""
        return not any(line.failed for line in self.lines)

    def text(self) -> list[str]:
        """For people: a line a figure, then the notebook's numbers, claims and tables, then the verdict."""
        out = ["hashes", *map(str, self.hashes)]
        for n in self.notebooks:
            out += ["", f"{n.notebook}: {n.about}", *map(str, n.lines)]
        return [*out, "", self.verdict]

    @property
    def verdict(self) -> str:
        """The last line."""
        figures = [line for line in self.lines if line.kind == "figure"]
        good = sum(line.status == "reproduced" for line in figures)
        failed = [line for line in self.lines if line.failed]
        idle = sum(line.status == "not run" for line in self.lines)
        said = f"{good} of {len(figures)} figures reproduced"
        said += f", {idle} notebook{'s' * (idle > 1)} not run" if idle else ""
        if failed:
            names = list(dict.fromkeys(line.name for line in failed))
            told = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
            return f"NOT REPRODUCED: {said}; {_lines(len(failed))}: {told}"
        return f"REPRODUCED: {said}"

    def as_json(self) -> dict[str, Any]:
        """For machines: all of it, with every difference."""
        return asdict(self) | {"reproduced": self.reproduced, "verdict": self.verdict}


def _lines(n: int) -> str:
    return "1 line fails" if n == 1 else f"{n} lines fail"

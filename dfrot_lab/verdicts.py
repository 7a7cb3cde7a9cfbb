"""Verdicts: what became of each figure, table and hash that was held against a reference."""

from __future__ import annotations

from collections import Counter
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
    """Hashes first, then a notebook at a time. asked: the notebooks named, where not all are told of."""

    profile: str
    reference: str
    hashes: list[Line]
    notebooks: list[NotebookReport]
    asked: tuple[str, ...] = ()

    @property
    def lines(self) -> list[Line]:
        """Every verdict."""
        return [*self.hashes, *(line for n in self.notebooks for line in n.lines)]

    @property
    def reproduced(self) -> bool:
        """Whether nothing that was asked for differs or is missing."""
        return not any(line.failed for line in self.lines)

    @property
    def not_run(self) -> list[str]:
        """The notebooks of the reference that have no result and were not asked for."""
        return [n.notebook for n in self.notebooks if any(x.status == "not run" for x in n.lines)]

    def text(self) -> list[str]:
        """For people: a line a figure, then the notebook's numbers, claims and tables, then the verdict."""
        out = ["hashes", *map(str, self.hashes)]
        for n in self.notebooks:
            out += ["", f"{n.notebook}: {n.about}", *map(str, n.lines)]
        return [*out, "", self.verdict]

    @property
    def figures(self) -> dict[str, int]:
        """How many figures the reference has of what is told of, and how many have each status."""
        found = Counter(line.status for line in self.lines if line.kind == "figure")
        return {"committed": found.total()} | dict(sorted(found.items()))

    @property
    def verdict(self) -> str:
        """The last line: how much of all that was committed is reproduced, and what nobody ran."""
        figures, idle = self.figures, self.not_run
        of = f" of {', '.join(map(_number, self.asked))}" if self.asked else ""
        said = [
            f"{figures.get('reproduced', 0)} of {figures['committed']} committed figures{of} reproduced"
        ]
        if idle:
            said.append(f"notebook{'s' * (len(idle) > 1)} {', '.join(map(_number, idle))} not run")
        if timed := figures.get("not compared"):
            said.append(f"{timed} timed, never compared")
        if unhashed := [line.name for line in self.hashes if line.status == "not compared"]:
            said.append(f"no hashes of {' and '.join(unhashed)}")
        if failed := [line for line in self.lines if line.failed]:
            names = list(dict.fromkeys(line.name for line in failed))
            told = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
            return f"NOT REPRODUCED: {'; '.join(said)}; {_lines(len(failed))}: {told}"
        return f"REPRODUCED{' AS FAR AS RUN' if idle else ''}: {'; '.join(said)}"

    def as_json(self) -> dict[str, Any]:
        """For machines: all of it, with every difference."""
        told = {"reproduced": self.reproduced, "figures": self.figures, "not_run": self.not_run}
        return asdict(self) | told | {"verdict": self.verdict}


def _number(notebook: str) -> str:
    return notebook.split("_", maxsplit=1)[0]


def _lines(n: int) -> str:
    return "1 line fails" if n == 1 else f"{n} lines fail"

"""Tables for the end of a notebook: HTML in Jupyter, aligned text elsewhere."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any

from dfrot_lab.results import ResultError

__all__ = ["Table", "claims_table", "perplexity_table"]


@dataclass(frozen=True)
class Table:
    """Title, header and rows of text; the first column names the row, `numeric` columns align right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    width: int = 34  # of a column of text, in characters

    def _repr_html_(self) -> str:
        head = "".join(
            f'<th scope="col" style="{self._align(i)}">{escape(h)}</th>'
            for i, h in enumerate(self.header)
        )
        body = "".join(f"<tr>{self._cells(row)}</tr>\n" for row in self.rows)
        if not self.rows:
            body = f'<tr><td colspan="{len(self.header)}">nothing to show</td></tr>\n'
        return (
            f"<table>\n<caption>{escape(self.title)}</caption>\n"
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
        )

    def _cells(self, row: tuple[str, ...]) -> str:
        first, *rest = (escape(v) for v in row)
        cells = (f'<td style="{self._align(i)}">{v}</td>' for i, v in enumerate(rest, 1))
        return f'<th scope="row" style="{self._align(0)}">{first}</th>' + "".join(cells)

    def _align(self, column: int) -> str:
        return f"text-align: {'right' if column in self.numeric else 'left'}"

    def __str__(self) -> str:
        lines = [
            [textwrap.wrap(v, self.width) or [""] for v in row] for row in (self.header, *self.rows)
        ]
        widths = [
            max(len(part) for row in lines for part in row[i]) for i in range(len(self.header))
        ]
        out = [self.title]
        for k, row in enumerate(lines):
            for parts in zip_longest(*row, fillvalue=""):
                cells = (
                    part.rjust(w) if i in self.numeric else part.ljust(w)
                    for i, (part, w) in enumerate(zip(parts, widths, strict=True))
                )  # fmt: skip
                out.append("  ".join(cells).rstrip())
            if not k:
                out.append("  ".join("-" * w for w in widths))
        return "\n".join(out if self.rows else [*out, "nothing to show"])


def claims_table(result: dict[str, Any]) -> Table:
    """What the paper says, what we see, by which rule they agree, and whether they do."""
    rows = tuple(
        (c["claim"], c["paper"], c["ours"], c["rule"], "yes" if c["agrees"] else "no")
        for c in _part(result, "claims")
    )  # fmt: skip
    # what the paper does not say can hold or not, but cannot agree with it
    said = [row for row in rows if not row[1].startswith("not ")]
    agreed = sum(row[-1] == "yes" for row in said)
    title = f"Against the paper: {agreed} of {len(said)} claims agree"
    if len(said) < len(rows):
        held = sum(row[-1] == "yes" for row in rows) - agreed
        title += f"; {held} of {len(rows) - len(said)} that it does not make hold"
    return Table(title, ("claim", "paper says", "we see", "rule", "agrees"), rows)


def perplexity_table(result: dict[str, Any]) -> Table:
    """Mean ± sd over seeds of the perplexity for each rotation, tokens kept, bits (and γ, if any)."""
    kept = {"none": "none", "massive": "massive tokens", "first": "first token"}
    found = _part(result, "table")
    gamma = any(r["gamma"] is not None for r in found)
    header = (
        "rotation",
        "kept in floating point",
        "bits",
        *(["γ"] if gamma else []),
        "perplexity",
        "sd",
        "n",
    )
    rows = tuple(
        (
            r["rotation"].replace("RH2", "RH²"),
            kept.get(r["keep"], r["keep"]),
            "" if r["rotation"] == "FP" else r["bits"],
            *([_number(r["gamma"], "g") if r["gamma"] is not None else ""] if gamma else []),
            _number(r["mean"], ",.2f"),
            _number(r["sd"], ",.2f") if r["n"] > 1 else "",
            str(r["n"]),
        )
        for r in found
    )
    numeric = frozenset(range(len(header) - (4 if gamma else 3), len(header)))
    return Table("Perplexity by rotation, mean and sd over n seeds", header, rows, numeric)


def _part(result: dict[str, Any], key: str) -> list[dict[str, Any]]:
    if key not in result:
        raise ResultError(f"the result holds no {key!r}: run its notebook again")
    return result[key]


def _number(value: float | str, form: str) -> str:
    """The number in `form`; ∞ and 'not a number' in words a screen reader says."""
    value = float(value)
    if math.isnan(value):
        return "undefined"
    return {float("inf"): "∞", float("-inf"): "−∞"}.get(value) or format(value, form)

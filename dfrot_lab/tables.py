"""Tables for the end of a notebook: HTML in Jupyter, aligned text elsewhere."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dfrot_lab import files, paper
from dfrot_lab.results import ResultError

__all__ = [
    "Table",
    "claims_table",
    "interval",
    "intervals_table",
    "methods_table",
    "of_the_paper",
    "paper_table",
    "perplexity_table",
]


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

    def csv(self) -> str:
        """Comma-separated, header first."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.header, *self.rows])
        return out.getvalue()

    def latex(self) -> str:
        """A tabular with booktabs' rules and the title as a comment."""
        columns = "".join("r" if i in self.numeric else "l" for i in range(len(self.header)))
        lines = [" & ".join(map(_latex, row)) + r" \\" for row in (self.header, *self.rows)]
        body = "\n".join([lines[0], r"\midrule", *lines[1:]])
        return (
            f"% {self.title}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n"
            "\\bottomrule\n\\end{tabular}\n"
        )

    def save(self, folder: str | Path, name: str) -> list[Path]:
        """NAME.csv, NAME.tex and NAME.html in `folder`, each written whole or not at all."""
        texts = {".csv": self.csv(), ".tex": self.latex(), ".html": self._repr_html_() + "\n"}
        paths = [Path(folder) / f"{name}{suffix}" for suffix in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            with files.atomic(path) as partial:
                partial.write_text(text, encoding="utf-8")
        return paths

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


def interval(d: dict[str, Any], scale: float, digits: int) -> str:
    """'53.0 [48.6, 57.4]': mean and 95 % interval, times `scale`; 'no number' where a model overflows."""
    mean, low, high = (scale * float(d[k]) for k in ("mean", "low", "high"))
    if not math.isfinite(mean):
        return "no number"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def of_the_paper(claim: dict[str, Any]) -> bool:
    """Whether the paper makes this claim: what it does not say can hold or not, but cannot agree with it."""
    return not claim["paper"].startswith(("not ", "left open"))


def claims_table(result: dict[str, Any]) -> Table:
    """What the paper says, what we see, by which rule they agree, and whether they do."""
    rows = tuple(
        (c["claim"], c["paper"], c["ours"], c["rule"], "yes" if c["agrees"] else "no")
        for c in _part(result, "claims")
    )  # fmt: skip
    said = [c for c in result["claims"] if of_the_paper(c)]
    agreed = sum(bool(c["agrees"]) for c in said)
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


def methods_table(result: dict[str, Any]) -> Table:
    """Notebook 09: a row a method, cost and what it buys, mean ± sd over seeds."""
    columns = {"ppl": f"{result['confirm'][0]['bits']}, GPTQ", "ppl_w16": "16-4-16"}
    columns |= {"kl_w16": "KL at 16-4-16", "ppl_second": "16-4-16, second corpus"}
    rows = []
    for r in result["pareto"]:
        cells = [r["method"], _number(r["cost"], ".2f")]
        for key in columns:
            form = ".4f" if key == "kl_w16" else ".2f"
            s = r.get(key)
            cells.append(_number(s["mean"], form) if s else "")
            if s and s["n"] > 1:
                cells[-1] += f" ± {_number(s['sd'], form)}"
        rows.append(tuple(cells))
    header = ("method", "cost [TFLOP]", *columns.values())
    return Table("Objectives compared", header, tuple(rows), frozenset(range(1, len(header))))


def paper_table(result: dict[str, Any]) -> Table:
    """Tables 1 and 2 of the paper: our perplexity beside LLaMA2-7B's and LLaMA3-8B's, each × its FP.

    A model of its own size has its own perplexity: what compares is the ratio to floating point.
    """
    models = ("LLaMA2-7B", "LLaMA3-8B")
    found = _part(result, "table")
    fp = next(float(r["mean"]) for r in found if r["rotation"] == "FP")
    ours = [r for r in found if r["rotation"] != "FP"]
    header = ("bits", "weights", "rotation", "perplexity", "sd", "n", "× FP")
    rows = tuple(
        (
            r["bits"],
            "RTN" if r["method"] == "rtn" else "GPTQ",
            r["rotation"] + (", massive kept" if r["keep"] == "massive" else ""),
            _number(r["mean"], ",.2f"),
            _number(r["sd"], ",.2f") if r["n"] > 1 else "",
            str(r["n"]),
            _number(float(r["mean"]) / fp, ",.2f"),
            *(_published(m, r) for m in models),
        )
        for r in sorted(ours, key=lambda r: (r["bits"], r["method"]))
    )
    title = f"Tables 1 and 2: ours (floating point {fp:.2f}) beside the paper's"
    return Table(
        title, (*header, *(f"{m}: paper, × FP" for m in models)), rows, frozenset(range(3, 9))
    )


def _published(model: str, row: dict[str, Any]) -> str:
    """'6.13 (1.12)': what the paper has for such a row, and over its FP16; a dash where it has none."""
    name, kept, bits = row["rotation"], row["keep"] == "massive", row["bits"]
    numbers = paper.numbers()
    value = None
    if row["method"] == "rtn":
        columns = numbers["table2_readme_rtn"]["columns"]
        method = {"RH": "QuaRot-RTN", "DFRot(RH)": "DFRot-RTN"}.get(name)
        if method and bits in columns and not kept:
            value = paper.readme_rtn(model, method, bits)
    elif name in ("NR", "RO", "RH"):
        if bits in numbers["table1_ro_vs_rh_gptq"]["columns"]:
            line = "GPTQ" if name == "NR" else name + (".FP16" if kept else "")
            value = paper.table1(model, line, bits)
    elif name == "DFRot(RH)":
        table = numbers["table2_main_ppl_gptq"]
        if bits in table:
            value = table[bits]["DFRot"][table["models"].index(model)]
    if value is None:
        return "–"
    value = float(value)
    if not math.isfinite(value):
        return "no number" if math.isnan(value) else "∞"
    return f"{value:.2f} ({value / numbers['fp16_ppl'][model]:.2f})"


def intervals_table(result: dict[str, Any]) -> Table:
    """Paired differences a − b in nats a token: mean, 95 % interval over windows, sd over seeds."""
    found = _part(result, "paired")
    rows = tuple(
        (
            r["bits"],
            "RTN" if r["method"] == "rtn" else "GPTQ",
            f"{r['a'].removesuffix(' none')} − {r['b'].removesuffix(' none')}".replace(
                " massive", ", massive kept"
            ),
            _number(r["mean"], ".4f"),
            f"[{_number(r['low'], '.4f')}, {_number(r['high'], '.4f')}]",
            _number(r["seed_sd"], ".4f"),
        )
        for r in found
    )
    header = ("bits", "weights", "difference", "nats a token", "95 % over windows", "sd over seeds")
    return Table("Paired differences", header, rows, frozenset((3, 4, 5)))


def _latex(text: str) -> str:
    for sign, to in (
        ("\\", r"\textbackslash{}"),
        ("%", r"\%"),
        ("&", r"\&"),
        ("_", r"\_"),
        ("#", r"\#"),
    ):
        text = text.replace(sign, to)
    for sign, to in (
        ("−", "$-$"),
        ("×", r"$\times$"),
        ("∞", r"$\infty$"),
        ("γ", r"$\gamma$"),
        ("–", "--"),
        ("²", "$^2$"),
    ):
        text = text.replace(sign, to)
    return text


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

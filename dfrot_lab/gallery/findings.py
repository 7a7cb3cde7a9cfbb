"""Findings: the numbers of the front page, each read from a result when the site is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dfrot_lab.tables import Table, of_the_paper

__all__ = ["Finding", "Verdict", "findings", "same_order", "verdicts"]

_NBSP = "\u00a0"  # a number stays with its unit


@dataclass(frozen=True)
class Finding:
    """A number with its unit, what it is, the numbers behind it, and the notebook it comes from."""

    value: str
    label: str
    detail: str
    notebook: str


@dataclass(frozen=True)
class Verdict:
    """A claim's standing. said: the paper makes it; else it can hold or not, but not agree."""

    claim: dict[str, Any]
    said: bool

    @property
    def holds(self) -> bool:
        """Whether what we see satisfies the claim's rule."""
        return bool(self.claim["agrees"])

    @property
    def word(self) -> str:
        """The verdict in words."""
        yes, no = ("agrees", "does not agree") if self.said else ("holds", "does not hold")
        return yes if self.holds else no


def verdicts(result: Mapping[str, Any]) -> list[Verdict]:
    """The claims of a result, sorted into the paper's and ours as `tables.claims_table` does."""
    return [Verdict(c, of_the_paper(c)) for c in result["claims"]]


def findings(results: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What the notebooks of `results` found; a run that was not asked for it gives no number, and why."""
    found = []
    for name in (n for n in _FINDINGS if n in results):
        try:
            value, label, detail = _FINDINGS[name](results[name])
        except (KeyError, StopIteration, TypeError, ValueError, ZeroDivisionError) as error:
            value, label = "–", "no number for this finding"
            detail = f"The result lacks what it takes ({type(error).__name__}: {error})."
        found.append(Finding(value, label, detail, notebook=name))
    return found


def _gap(result: Mapping[str, Any]) -> tuple[str, str, str]:
    ppl = _perplexities(result)
    share = next(e["share"] for e in result["exempted"] if e["rotation"] == "RO")
    return (
        _percent(result["closed"]["of_means"]),
        "of the gap between random and Hadamard rotations is gone once massive tokens are kept in "
        "floating point",
        f"They are {_number(100 * share, '.2f')}{_NBSP}% of all (token, site) pairs. Perplexity with every "
        f"token at {_bits(result)}: RO {_number(ppl['RO', 'none'])}, RH {_number(ppl['RH', 'none'])}; "
        f"massive tokens kept: RO {_number(ppl['RO', 'massive'])}, "
        f"RH {_number(ppl['RH', 'massive'])}; floating point {_number(ppl['FP', 'none'])}.",
    )


def _massive(result: Mapping[str, Any]) -> tuple[str, str, str]:
    mean = {(s["rotation"], s["group"]): s["mean"] for s in result["statistics"]}
    ratio = {g: float(mean["RO", g]) / float(mean["RH", g]) for g in ("massive", "normal")}
    return (
        f"{_number(ratio['massive'])}{_NBSP}×",
        "a random rotation's error over a Hadamard's, on massive tokens",
        f"On normal tokens: {_number(ratio['normal'], '.2f')}{_NBSP}×. Mean over layers and seeds, relative "
        "to each token's squared norm.",
    )


def _refined(result: Mapping[str, Any]) -> tuple[str, str, str]:
    ppl = _perplexities(result)
    pairs = [(ppl[s, "none"], ppl[f"DFRot({s})", "none"]) for s in ("RO", "RH")]
    change = [_signed(float(after) / float(before) - 1) for before, after in pairs]
    lines = [f"{_number(before)} → {_number(after)}" for before, after in pairs]
    return (
        f"{change[0]}",
        "perplexity by refining a random rotation, at no cost at inference",
        f"RO {lines[0]}; from a Hadamard {change[1]}: RH {lines[1]} ({_bits(result)}).",
    )


def _with_weights(result: Mapping[str, Any]) -> tuple[str, str, str]:
    bits = "4-4-16"
    ppl = {
        r["rotation"]: r["mean"]
        for r in result["table"]
        if r["bits"] == bits and r["keep"] == "none" and r["method"] == result["gptq"]
    }
    names = {"RO": "RO", "RH": "RH", "DFRot(RH)": "refined"}
    fp = next(r["mean"] for r in result["table"] if r["rotation"] == "FP")
    return (
        _number(ppl["DFRot(RH)"]),
        f"perplexity of the refined rotation with 4-bit weights as well ({bits}, GPTQ)",
        "; ".join(f"{names[n]} {_number(ppl[n])}" for n in names)
        + f"; floating point {_number(fp)}.",
    )


def _theory(result: Mapping[str, Any]) -> tuple[str, str, str]:
    rows = [m for m in result["tokens"]["means"] if m["group"] == "massive"]
    pairs = [(float(r["predicted"]), float(r["RH"]["mean"])) for r in rows]
    worst = max(abs(p / m - 1) for p, m in pairs)
    return (
        _percent(worst, ".1f"),
        "is how far a closed form is from a Hadamard's measured error on massive tokens",
        "; ".join(
            f"{r['quantizer']}: {_number(p, '.5f')} predicted, {_number(m, '.5f')} measured"
            for r, (p, m) in zip(rows, pairs, strict=True)
        )
        + ".",
    )


def _objective(result: Mapping[str, Any]) -> tuple[str, str, str]:
    rows = {r["method"]: r for r in result["pareto"]}
    old, new = rows["dfrot"]["ppl_w16"], rows["recommended"]["ppl_w16"]
    return (
        _signed(float(new["mean"]) / float(old["mean"]) - 1),
        "perplexity at 16-4-16 by another objective than the published one, at the same cost at "
        "inference",
        f"{_spread(old)} → {_spread(new)}; with 4-bit weights "
        f"{_spread(rows['dfrot']['ppl'])} → {_spread(rows['recommended']['ppl'])}.",
    )


_FINDINGS: dict[str, Callable[[Mapping[str, Any]], tuple[str, str, str]]] = {
    "03_massive_tokens_fp16": _gap,
    "02_ro_vs_rh_error": _massive,
    "04_dfrot": _refined,
    "05_tables": _with_weights,
    "08_why_it_works": _theory,
    "09_objectives": _objective,
}


def _perplexities(result: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    bits = _bits(result)
    return {
        (r["rotation"], r["keep"]): r["mean"]
        for r in result["table"]
        if r["rotation"] == "FP" or r["bits"] == bits
    }


def _bits(result: Mapping[str, Any]) -> str:
    return result["parameters"]["bits"]


def _number(value: float | str, form: str = ",.1f") -> str:
    value = float(value)
    if math.isfinite(value):
        return format(value, form)
    return "undefined" if math.isnan(value) else "∞" if value > 0 else "−∞"


def _percent(share: float | str, form: str = ".0f") -> str:
    return f"{_number(100 * float(share), form)}{_NBSP}%".replace("-", "−")


def _signed(change: float) -> str:
    return f"{_number(100 * change, '+.0f')}{_NBSP}%".replace("-", "−")


def _spread(mean: Mapping[str, Any]) -> str:
    return f"{_number(mean['mean'])} ± {_number(mean['sd'])}"


def same_order(table: Table, theirs: int) -> list[str | None]:
    """How each row of `tables.paper_table` stands among its group's rows, ours against column `theirs`.

    A group has the same bits and the same method for weights (the first two columns). 'same': no row of
    it that the paper has too is better in one and worse in the other; 'spread': one is, but ours differ by
    no more than the larger sd over seeds; 'other': one is, by more. What failed (∞, no number) is
    worst. None: not in the paper, or alone there.
    """
    ours, sd = table.header.index("perplexity"), table.header.index("sd")
    rows = [
        (row[:2], _leading(row[ours]), _leading(row[sd]) or 0.0, _leading(row[theirs]))
        for row in table.rows
    ]
    found: list[str | None] = []
    for k, (group, a, s, b) in enumerate(rows):
        others = [
            r for j, r in enumerate(rows) if j != k and r[0] == group and None not in (r[1], r[3])
        ]
        if a is None or b is None or not others:
            found.append(None)
            continue
        turned = [r for r in others if (a < r[1] and b > r[3]) or (a > r[1] and b < r[3])]
        beyond = any(abs(a - r[1]) > max(s, r[2]) for r in turned)
        found.append("other" if beyond else "spread" if turned else "same")
    return found


def _leading(cell: str) -> float | None:
    text = cell.replace(",", "")
    if text in ("∞", "no number", "undefined"):
        return math.inf
    return None if text in ("", "–") else float(text.split()[0])

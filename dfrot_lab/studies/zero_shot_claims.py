"""Claims of notebook 10: the order of the methods, DFRot's gain, and whether perplexity ranks them so."""

from __future__ import annotations

import itertools
import math
from typing import Any

from dfrot_lab import paper
from dfrot_lab.results import Claim
from dfrot_lab.studies.zero_shot import BOTH

__all__ = ["claims"]

ORDER = ("FP", "DFRot(RH)", "RH", "RO")  # best first


def claims(result: dict[str, Any]) -> list[Claim]:
    """The closing table of notebook 10.

    Accuracies by their mean over tasks (MMLU by itself, as in the paper); log-probabilities task by task.
    """
    out = []
    settings = list(dict.fromkeys(r["bits"] for r in result["table"]))
    for bits in settings:
        for value, task in _kinds(result):
            out.append(_order(result["table"], bits, value, task))
    for value, task in _kinds(result):
        out.append(_gain(result["differences"], settings[0], value, task))
    return [*out, _alike(result["ranks"], settings[0])]


def _kinds(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(value, task): accuracy of the mean of tasks and of those left out of it, log-probability of each."""
    names = [t["task"] for t in result["tasks"]]
    apart = [n for n in names if n not in result["averaged"]]
    return [("correct", t) for t in (BOTH, *apart)] + [("logp", t) for t in names]


def _called(value: str, task: str) -> str:
    return f"{'accuracy' if value == 'correct' else 'log-probability of the target'}, {task}"


def _order(table: list[dict[str, Any]], bits: str, value: str, task: str) -> Claim:
    found = {
        r["rotation"]: r for r in table if r["bits"] == bits and r["task"] == task and value in r
    }
    rows = [found[n][value] for n in ORDER]
    form = _percent if value == "correct" else _nats
    return Claim(
        f"{bits}: FP > DFRot > RH > RO by {_called(value, task)}",
        _published(bits, task) if value == "correct" else "not reported",
        ", ".join(f"{n} {form(r)}" for n, r in zip(ORDER, rows, strict=True)),
        f"means over seeds ({found['RH']['seeds']}) in this order",
        all(a["mean"] > b["mean"] for a, b in itertools.pairwise(rows)),
    )


def _gain(differences: list[dict[str, Any]], bits: str, value: str, task: str) -> Claim:
    """Over the items' noise; over seeds it is only told, since they are few."""
    row = next(
        r
        for r in differences
        if (r["bits"], r["a"], r["b"], r["task"]) == (bits, "DFRot(RH)", "RH", task)
    )
    gain, seeds = row[value], row["seeds"]
    told = _points(gain) if value == "correct" else _nats(gain)
    above = sum(v > 0 for v in gain["by_seed"])
    told += f"; above 0 in {above} of {seeds} seeds"
    if seeds > 1:
        scale, digits = (100, 1) if value == "correct" else (1, 3)
        told += f", sd over seeds {scale * gain['sd']:.{digits}f}"
    return Claim(
        f"{bits}: DFRot's gain over RH is more than the items' noise, by {_called(value, task)}",
        "not tested: no intervals" if value == "correct" else "not reported",
        told,
        "the 95 % interval of the paired difference lies above 0",
        gain["low"] > 0,
    )


def _alike(ranks: list[dict[str, Any]], bits: str) -> Claim:
    """Of the rotated methods: FP is best and NR worst by either measure, whatever they are worth."""
    rotated, every = (
        next(r for r in ranks if (r["bits"], r["value"], r["over"]) == (bits, "accuracy", over))
        for over in ("rotated", "all")
    )
    told = [
        f"τ = {r['methods']:.2f} over {len(r['names'])} methods, {r['models']:.2f} over {r['n']} models"
        for r in (rotated, every)
    ]
    return Claim(
        f"{bits}: perplexity and accuracy rank RO, RH and DFRot alike",
        _published_ranks(),
        f"{told[0]}; with FP and NR {told[1]}",
        "τ over the three methods is 1",
        math.isclose(rotated["methods"], 1.0),
    )


def _percent(r: dict[str, Any]) -> str:
    return f"{100 * r['mean']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"


def _points(r: dict[str, Any]) -> str:
    """A difference of two percentages."""
    return f"{100 * r['mean']:.1f} points [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"


def _nats(r: dict[str, Any]) -> str:
    return f"{r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"


def _published(bits: str, task: str) -> str:
    """FP16, DFRot and QuaRot of every model: the mean of six tasks, or MMLU."""
    numbers = paper.numbers()
    if task == BOTH:
        source = "README, mean of six tasks"
        found = {
            model: [rows[k][-1] for k in ("FP16", f"DFRot {bits}", f"QuaRot {bits}")]
            for model, rows in numbers["zero_shot_readme"].items()
            if f"DFRot {bits}" in rows
        }
    else:
        source, table = "Table 4", numbers.get(f"{task}_{bits}", {"columns": []})
        found = {
            model: [row[table["columns"].index(k)] for k in ("FP16", "DFRot", "QuaRot")]
            for model, row in table.items()
            if model != "columns"
        }
    if not found:
        return f"not reported at {bits}"
    told = [f"{model}: FP16 {a}, DFRot {b}, RH {c}" for model, (a, b, c) in found.items()]
    return "; ".join(told) + f" ({source}; no RO)"


def _published_ranks() -> str:
    """In how many of the README's settings DFRot is below QuaRot in perplexity and above it in accuracy."""
    numbers, alike, count = paper.numbers(), 0, 0
    perplexity = numbers["table2_readme_gptq"]
    for model, rows in numbers["zero_shot_readme"].items():
        if model == "tasks":
            continue
        for i, bits in enumerate(perplexity["columns"]):
            ours, theirs = (perplexity[model][f"{n}-GPTQ"][i] for n in ("DFRot", "QuaRot"))
            gain = rows[f"DFRot {bits}"][-1] - rows[f"QuaRot {bits}"][-1]
            count += 1
            alike += (theirs - ours) * gain > 0
    return f"DFRot against QuaRot: alike in {alike} of {count} settings (README)"

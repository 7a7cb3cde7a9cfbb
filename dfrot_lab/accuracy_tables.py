"""Accuracy tables: what notebook 10 measured, the paper's zero-shot numbers beside it."""

from __future__ import annotations

from typing import Any

from dfrot_lab import paper
from dfrot_lab.results import ResultError
from dfrot_lab.tables import Table

__all__ = ["accuracy_table", "differences_table"]

MODELS = ("LLaMA2-7B", "LLaMA3-8B")
PUBLISHED = {"RH": "QuaRot", "DFRot(RH)": "DFRot"}
BOTH = "mean of tasks"


def accuracy_table(result: dict[str, Any]) -> Table:
    """Ours by task, and the mean's distance from floating point; the paper's average and its distance.

    A model of its own size has its own accuracy, on tasks of its own: what compares is the distance.
    """
    if "table" not in result:
        raise ResultError("the result holds no 'table': run its notebook again")
    tasks = [t["task"] for t in result["tasks"]]
    cells = {(r["bits"], r["rotation"], r["task"]): r for r in result["table"]}
    rows = []
    for bits, name in dict.fromkeys((b, n) for b, n, _ in cells):
        mean = cells[bits, name, BOTH]
        lost = float(mean["correct"]["mean"]) - float(cells[bits, "FP", BOTH]["correct"]["mean"])
        rows.append(
            (
                "" if name == "FP" else bits,
                "NR, RTN" if name == "NR" else name,
                *(_percent(cells[bits, name, t]["correct"]) for t in tasks),
                _percent(mean["correct"]),
                "" if name == "FP" else f"{100 * lost:+.1f}",
                f"{float(mean['logp']['mean']):.2f}",
                str(mean["seeds"]),
                *(_published(m, name, bits) for m in MODELS),
            )
        )
    header = ("bits", "rotation", *(t.replace("_", " ") for t in tasks), "mean", "− FP")
    header += ("log p", "n", *(f"{m}: paper, − FP16" for m in MODELS))
    # floating point once
    rows = [r for i, r in enumerate(rows) if r[0] or i == 0]
    title = f"Zero-shot accuracy in % [95 % over items], lm-eval {result['lm_eval']}"
    return Table(title, header, tuple(rows), frozenset(range(2, len(header))))


def _percent(r: dict[str, Any]) -> str:
    mean, low, high = (100 * float(r[k]) for k in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _published(model: str, name: str, bits: str) -> str:
    """'66.83 (−2.99)': the README's average over six tasks, and its distance from FP16; or a dash."""
    rows = paper.numbers()["zero_shot_readme"][model]
    fp = rows["FP16"][-1]
    if name == "FP":
        return f"{fp:.2f}"
    value = rows.get(f"{PUBLISHED.get(name)} {bits}")
    return f"{value[-1]:.2f} ({value[-1] - fp:+.2f})" if value else "–"


def differences_table(result: dict[str, Any]) -> Table:
    """Paired differences a − b by task: points of accuracy and nats, with 95 % intervals over items."""
    if "differences" not in result:
        raise ResultError("the result holds no 'differences': run its notebook again")
    rows = tuple(
        (
            r["bits"],
            f"{r['a']} − {r['b']}",
            r["task"].replace("_", " "),
            _percent(r["correct"]),
            "{mean:.3f} [{low:.3f}, {high:.3f}]".format(
                **{k: float(v) for k, v in r["logp"].items()}
            ),
        )
        for r in result["differences"]
    )
    header = ("bits", "difference", "task", "points", "nats a target")
    return Table("Paired differences over items", header, rows, frozenset((3, 4)))

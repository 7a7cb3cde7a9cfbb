"""Accuracy tables of notebook 10: what was measured, and the paper's zero-shot numbers beside it."""

from __future__ import annotations

import math
from typing import Any

from dfrot_lab import paper
from dfrot_lab.results import ResultError
from dfrot_lab.tables import Table, interval

__all__ = [
    "accuracy_table",
    "differences_table",
    "log_probability_table",
    "published_table",
    "ranks_table",
]

BOTH = "mean of tasks"
ROTATION = {"FP16": "FP", "QuaRot": "RH", "DFRot": "DFRot(RH)"}  # by the paper's name
# by lm-eval's name, the paper's
COLUMN = {"piqa": "PIQA", "winogrande": "WinoGrande", "hellaswag": "HellaSwag"}
COLUMN |= {"arc_easy": "ARC-e", "arc_challenge": "ARC-c", "lambada_openai": "LAMBADA"}
COLUMN |= {"mmlu": "MMLU"}


def accuracy_table(result: dict[str, Any]) -> Table:
    """Ours by task in percent, their mean, and its distance from floating point in points."""
    cells = _cells(result)
    rows = []
    for bits, name in _models(cells):
        row, fp = (cells[bits, n, BOTH] for n in (name, "FP"))
        lost = 100 * (float(row["correct"]["mean"]) - float(fp["correct"]["mean"]))
        tasks = [_percent(cells[bits, name, t]["correct"]) for t in (*_tasks(result), BOTH)]
        rows.append((*_model(bits, name, row), *tasks, "" if name == "FP" else f"{lost:+.1f}"))
    header = ("bits", "rotation", "seeds", *map(_plain, _tasks(result)), _mean(result), "− FP")
    title = "Zero-shot accuracy in %: mean [95 % over items] ± sd over seeds; lm-eval "
    return _numeric(title + result["lm_eval"], header, rows, 2)


def log_probability_table(result: dict[str, Any]) -> Table:
    """Ours by task in nats a target; no mean, since a sentence has tens of them and a word a few."""
    cells = _cells(result)
    rows = [
        (
            *_model(bits, name, cells[bits, name, BOTH]),
            *(_nats(cells[bits, name, t]["logp"]) for t in _tasks(result)),
        )
        for bits, name in _models(cells)
    ]
    header = ("bits", "rotation", "seeds", *map(_plain, _tasks(result)))
    title = "Log-probability of the target in nats: mean [95 % over items] ± sd over seeds"
    return _numeric(title, header, rows, 2)


def differences_table(result: dict[str, Any]) -> Table:
    """Paired differences a − b by task: points of accuracy and nats a target."""
    rows = [
        (
            r["bits"],
            f"{r['a']} − {r['b']}",
            _plain(r["task"]),
            str(r["seeds"]),
            _percent(r["correct"]),
            _nats(r["logp"]) if "logp" in r else "",
        )
        for r in _part(result, "differences")
    ]
    header = ("bits", "difference", "task", "seeds", "points", "nats a target")
    title = "Paired differences: mean [95 % over items] ± sd over seeds"
    return _numeric(title, header, rows, 3)


def ranks_table(result: dict[str, Any]) -> Table:
    """Kendall's τ (of how many) of perplexity and each measure, without and with FP and NR."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for r in _part(result, "ranks"):
        measure = "accuracy" if r["value"] == "accuracy" else "log-probability"
        found.setdefault((r["bits"], f"{measure}, {_plain(r['task'])}"), {})[r["over"]] = r
    rows = [
        (
            *about,
            *(_tau(by[over], of) for over in ("rotated", "all") for of in ("methods", "models")),
        )
        for about, by in found.items()
    ]
    header = ("bits", "perplexity and", "rotated methods", "rotated models")
    title = "Kendall's τ (n); a model is a method and a seed"
    return _numeric(title, (*header, "with FP, NR: methods", "models"), rows, 2)


def published_table(result: dict[str, Any]) -> Table:
    """Accuracies in percent: ours, and all rows of README and Table 4; Avg leaves MMLU out.

    A model of its own size has its own accuracy, on tasks of its own: what compares is the distance to
    floating point.
    """
    found = [*_ours(result), *_published()]
    own = [_plain(t) for t in _tasks(result) if t not in COLUMN]
    columns = [*own, *(c for c in COLUMN.values() if c != "MMLU"), "Avg"]
    fp = {model: v["Avg"] for model, _, name, v in found if name == "FP" and "Avg" in v}
    rows = []
    for model, bits, name, v in found:
        lost = f"{v['Avg'] - fp[model]:+.2f}" if "Avg" in v and name != "FP" else ""
        cells = [f"{v[c]:.2f}" if c in v else "–" for c in (*columns, "MMLU")]
        rows.append((model, bits, name, *cells[:-1], lost, cells[-1]))
    header = ("model", "bits", "rotation", *columns, "Avg − FP", "MMLU")
    title = "Accuracy in %: ours, and all rows of the paper's README and Table 4 (MMLU); "
    return _numeric(title + "Avg: of the row's tasks without MMLU", header, rows, 3)


def _ours(result: dict[str, Any]) -> list[tuple[str, str, str, dict[str, float]]]:
    cells, out = _cells(result), []
    for bits, name in _models(cells):
        row = cells[bits, name, BOTH]
        values = {"Avg": row["correct"]["mean"]}
        for task in _tasks(result):
            values[COLUMN.get(task, _plain(task))] = cells[bits, name, task]["correct"]["mean"]
        about = _model(bits, name, row)[:2]
        out.append(("ours", *about, {k: 100 * float(v) for k, v in values.items()}))
    return out


def _published() -> list[tuple[str, str, str, dict[str, float]]]:
    """(model, bits, rotation, accuracy by column), none left out; the paper has MMLU at 4-4-16 only."""
    six, mmlu = (paper.numbers()[k] for k in ("zero_shot_readme", "mmlu_4-4-16"))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for model in (m for m in six if m != "tasks"):
        for name, values in six[model].items():
            found[model, name] = dict(zip(six["tasks"], values, strict=True))
    for model in (m for m in mmlu if m != "columns"):
        for name, value in zip(mmlu["columns"], mmlu[model], strict=True):
            row = name if name == "FP16" else f"{name} 4-4-16"
            found.setdefault((model, row), {})["MMLU"] = value
    out = []
    for (model, row), values in found.items():
        name, _, bits = row.partition(" ")
        out.append((model, bits, ROTATION[name], values))
    order = list(dict.fromkeys(model for model, *_ in out))
    return sorted(out, key=lambda r: (order.index(r[0]), r[1]))  # what compares, side by side


def _part(result: dict[str, Any], key: str) -> list[dict[str, Any]]:
    if key not in result:
        raise ResultError(f"the result holds no {key!r}: run its notebook again")
    return result[key]


def _cells(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(r["bits"], r["rotation"], r["task"]): r for r in _part(result, "table")}


def _models(cells: dict[tuple[str, str, str], Any]) -> list[tuple[str, str]]:
    """(bits, rotation), floating point once."""
    every = list(dict.fromkeys((b, n) for b, n, _ in cells))
    return [(b, n) for i, (b, n) in enumerate(every) if n != "FP" or i == 0]


def _model(bits: str, name: str, row: dict[str, Any]) -> tuple[str, str, str]:
    shown = "NR, RTN" if name == "NR" else name
    return ("" if name == "FP" else bits, shown, str(row["seeds"]))


def _tasks(result: dict[str, Any]) -> list[str]:
    return [t["task"] for t in result["tasks"]]


def _plain(task: str) -> str:
    return task.replace("_", " ")


def _mean(result: dict[str, Any]) -> str:
    apart = [t for t in _tasks(result) if t not in result["averaged"]]
    return "mean" + (f" without {', '.join(apart)}" if apart else "")


def _percent(r: dict[str, Any]) -> str:
    return _interval(r, 100, 1)


def _nats(r: dict[str, Any]) -> str:
    return _interval(r, 1, 3)


def _interval(r: dict[str, Any], scale: float, digits: int) -> str:
    """'53.0 [48.6, 57.4] ± 0.6'; no sd of one seed."""
    sd = math.isfinite(float(r["mean"])) and len(r["by_seed"]) > 1
    return interval(r, scale, digits) + (f" ± {scale * float(r['sd']):.{digits}f}" if sd else "")


def _tau(r: dict[str, Any], of: str) -> str:
    count = len(r["names"]) if of == "methods" else r["n"]
    return f"{float(r[of]):.2f} ({count})"


def _numeric(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], first: int) -> Table:
    return Table(title, header, tuple(rows), frozenset(range(first, len(header))))

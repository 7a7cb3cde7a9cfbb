"""Scores: perplexity, and zero-shot accuracy if asked for, of some models, as one table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dfrot_lab import evaluation, quantized_folder, zero_shot
from dfrot_lab.lab import Lab
from dfrot_lab.tables import Table, interval

__all__ = ["differences", "differences_table", "measured", "of_folder", "scores_table"]

_KEPT = (
    "task",
    "metric",
    "accuracy",
    "target_logp",
    "items",
    "tokens",
    "hash",
    "version",
    "lm_eval",
)
_EACH = ("correct", "logp")  # by item


def measured(
    lab: Lab,
    names: list[str],
    seed: int,
    *,
    bits: str,
    method: str,
    gamma: float,
    windows: int,
    tasks: list[str],
    items: int,
) -> list[dict[str, Any]]:
    """A row a rotation: perplexity and, by task, accuracy and the target's log-probability; all kept.

    Raises what `Lab.perplexity` and `zero_shot.measure` raise.
    """
    if tasks:
        zero_shot.check(tasks)
    out = []
    for name in names:
        how = {"bits": "16-16-16" if name == "FP" else bits, "method": method, "gamma": gamma}
        row = lab.perplexity(name, seed, windows=windows, **how)
        row = {k: v for k, v in row.items() if k not in ("kept", "keep")}
        found = [zero_shot.measure(lab, name, seed, task=t, items=items, **how) for t in tasks]
        out.append(row | {"tasks": [{k: r[k] for k in (*_KEPT, *_EACH)} for r in found]})
    return out


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row of `measured` less RH's, or less the first where RH is not among them, paired.

    {a, b, nll, tasks}: nats a token over windows, and by task accuracy and the target's log-probability over
    items, each with its 95 % interval; None of fewer than two pairs. Models that share their items may differ
    by less than the standard error of one and still be told apart.
    """
    names = [r["rotation"] for r in rows]
    base = rows[names.index("RH") if "RH" in names else 0]
    out = []
    for r in rows:
        if r is base:
            continue
        both = zip(r["tasks"], base["tasks"], strict=True)
        tasks = [{"task": a["task"]} | {v: _paired(a[v], b[v]) for v in _EACH} for a, b in both]
        nll = _paired(r["nll"], base["nll"])
        out.append({"a": r["rotation"], "b": base["rotation"], "nll": nll, "tasks": tasks})
    return out


def _paired(a: list[float], b: list[float]) -> dict[str, float] | None:
    return evaluation.paired_difference(a, b) if len(a) > 1 else None


def of_folder(
    lab: Lab, folder: str | Path, *, windows: int, tasks: list[str], items: int
) -> dict[str, Any]:
    """The same row for a folder of `dfrot-lab quantize`, with its own tokenizer; measured anew."""
    if tasks:
        zero_shot.check(tasks)
    model, tokenizer, about = quantized_folder.load(folder, device=lab.device)
    lab.__dict__["tokenizer"] = tokenizer
    found = evaluation.perplexity(model, lab.evaluation_tokens(windows))
    row = {k: about.get(k) for k in ("model", "rotation", "seed", "bits", "gamma", "method")}
    row |= {"ppl": found.value, "nll": found.nll, "windows": len(found.nll), "tasks": []}
    for task in tasks:
        found = zero_shot.evaluate(model, tokenizer, task, corpus=lab.corpus, items=items)
        found = zero_shot.with_means(found)
        row["tasks"].append({k: found[k] for k in (*_KEPT, *_EACH)})
    return row


def scores_table(rows: list[dict[str, Any]]) -> Table:
    """Perplexity and accuracy ± standard error in percent, one row a model."""
    tasks = rows[0]["tasks"]
    header = ("rotation", "bits", "weights", "seed", "perplexity")
    header += tuple(f"{t['task']} [%]" for t in tasks) + tuple(f"{t['task']}, log p" for t in tasks)
    body = []
    for r in rows:
        weights = {None: "", "rtn": "RTN"}.get(r["method"], "GPTQ")
        cells = [r["rotation"], r["bits"], weights, str(r["seed"]), f"{r['ppl']:,.2f}"]
        for t in r["tasks"]:
            p = t["accuracy"]
            error = math.sqrt(p * (1 - p) / (t["items"] - 1))
            cells.append(f"{100 * p:.1f} ± {100 * error:.1f}")
        cells += [f"{t['target_logp']:.3f}" for t in r["tasks"]]
        body.append(tuple(cells))
    windows = rows[0]["windows"]
    title = f"{windows} evaluation window{'s' if windows > 1 else ''}"
    if tasks:
        items = ", ".join(f"{t['items']} items of {t['task']}" for t in tasks)
        title += f"; lm-eval {tasks[0]['lm_eval']}, {items}"
    return Table(title, header, tuple(body), frozenset(range(3, len(header))))


def differences_table(found: list[dict[str, Any]]) -> Table:
    """What `differences` gives, one row a difference; accuracy in points of a percent."""
    tasks = [t["task"] for t in found[0]["tasks"]]
    header = ("difference", "nll [nats a token]")
    header += tuple(f"{t} [points]" for t in tasks) + tuple(f"{t}, log p" for t in tasks)
    body = []
    for d in found:
        cells = [f"{d['a']} − {d['b']}", _interval(d["nll"], 1, 3)]
        cells += [_interval(t["correct"], 100, 1) for t in d["tasks"]]
        body.append((*cells, *(_interval(t["logp"], 1, 2) for t in d["tasks"])))
    title = "paired differences, 95 % intervals over windows and items"
    return Table(title, header, tuple(body), frozenset(range(1, len(header))))


def _interval(d: dict[str, float] | None, scale: float, digits: int) -> str:
    return interval(d, scale, digits) if d else "one pair"

"""Scores: perplexity, and zero-shot accuracy if asked for, of some models, as one table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dfrot_lab import evaluation, quantized_folder, zero_shot
from dfrot_lab.lab import Lab
from dfrot_lab.tables import Table

__all__ = ["measured", "of_folder", "scores_table"]

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
        row = {k: v for k, v in row.items() if k not in ("nll", "kept", "keep")}
        found = [zero_shot.measure(lab, name, seed, task=t, items=items, **how) for t in tasks]
        out.append(row | {"tasks": [{k: r[k] for k in _KEPT} for r in found]})
    return out


def of_folder(
    lab: Lab, folder: str | Path, *, windows: int, tasks: list[str], items: int
) -> dict[str, Any]:
    """The same row for a folder of `dfrot-lab quantize`, with its own tokenizer; measured anew."""
    if tasks:
        zero_shot.check(tasks)
    model, tokenizer, about = quantized_folder.load(folder, device=lab.device)
    lab.__dict__["tokenizer"] = tokenizer
    ppl = evaluation.perplexity(model, lab.evaluation_tokens(windows)).value
    row = {k: about.get(k) for k in ("rotation", "seed", "bits", "gamma", "method")}
    row |= {"ppl": ppl, "windows": len(lab.evaluation_tokens(windows)), "tasks": []}
    for task in tasks:
        found = zero_shot.evaluate(model, tokenizer, task, corpus=lab.corpus, items=items)
        found = zero_shot.with_means(found)
        row["tasks"].append({k: found[k] for k in _KEPT})
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
    title = f"{rows[0]['windows']} evaluation windows"
    if tasks:
        title += f"; lm-eval {tasks[0]['lm_eval']}, {tasks[0]['items']} items a task"
    return Table(title, header, tuple(body), frozenset(range(3, len(header))))

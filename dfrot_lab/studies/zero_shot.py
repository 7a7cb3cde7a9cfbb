"""Study 10: zero-shot accuracy of every method through lm-eval, and whether perplexity ranks them so."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from typing import Any

from scipy.stats import kendalltau
from tqdm import tqdm

from dfrot_lab import zero_shot
from dfrot_lab.evaluation import paired_difference, spread
from dfrot_lab.lab import Lab
from dfrot_lab.text_tasks import TaskError

__all__ = ["averages", "differences", "measure", "rank_correlation", "ranks", "summary", "table"]

METHODS = ("NR", "RO", "RH", "DFRot(RH)")
PAIRS = (("RH", "RO"), ("DFRot(RH)", "RH"), ("FP", "DFRot(RH)"))
VALUES = ("correct", "logp")
BOTH = "mean of tasks"  # of accuracy: a target's log-probability grows with its length
APART = ("mmlu",)  # the paper's average is over six tasks without it


def measure(
    lab: Lab,
    seeds: list[int],
    side_seeds: int,
    bits: str,
    side_bits: str,
    method: str,
    tasks: list[str],
    windows: int,
    items: int,
    batch: int,
) -> list[dict[str, Any]]:
    """FP once, then every method at `bits` over `seeds` and at `side_bits` over the first `side_seeds`.

    A row a model and setting: perplexity on `windows`, and under "tasks" what `zero_shot.measure` gives.
    Weights by `method`; without rotation (NR) by RTN, one seed. Rows of a model share its weights.
    TaskError for tasks that cannot be run or have no mean.
    """
    zero_shot.check(tasks)
    _averaged(tasks)
    grid = [("FP", seeds[0], "16-16-16", "rtn")]
    for name in METHODS:
        for seed in seeds if name != "NR" else seeds[:1]:
            how = "rtn" if name == "NR" else method
            grid.append((name, seed, bits, how))
            if seed in seeds[:side_seeds]:
                grid.append((name, seed, side_bits, how))
    out, bar = [], tqdm(grid, desc="zero-shot", unit="row")
    for name, seed, b, how in bar:
        bar.set_postfix_str(f"{name} {b} seed={seed}", refresh=False)
        row = lab.perplexity(name, seed, bits=b, windows=windows, method=how)
        row = {k: row[k] for k in ("rotation", "seed", "bits", "gamma", "method", "ppl", "windows")}
        row["tasks"] = [
            zero_shot.measure(lab, name, seed, task=t, bits=b, method=how, items=items, batch=batch)
            for t in tasks
        ]
        out.append(row)
    return out


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the figures and the claims need; the values of single items stay in the measurements.

    TaskError where models were given different items.
    """
    _check_items(rows)
    scored = rows[0]["tasks"]
    about = [
        {k: t[k] for k in ("task", "metric", "items", "tokens", "hash", "version")} for t in scored
    ]
    averaged, models = _averaged([t["task"] for t in scored]), averages(rows)
    return {
        "tasks": about,
        "averaged": averaged,
        "lm_eval": scored[0]["lm_eval"],
        "windows": rows[0]["windows"],
        "models": models,
        "table": table(rows),
        "differences": differences(rows),
        "ranks": ranks(models),
    }


def _averaged(tasks: list[str]) -> list[str]:
    """The tasks whose accuracy is averaged."""
    kept = [t for t in tasks if t not in APART]
    if not kept:
        raise TaskError(f"tasks = {tasks}: mmlu stays out of the mean of tasks; add another task")
    return kept


def _check_items(rows: list[dict[str, Any]]) -> None:
    """Differences item by item need the same items for every model: lm-eval's hash says whether."""
    for row in rows:
        who = f"{row['rotation']}, seed {row['seed']}, {row['bits']}"
        names, first = ([t["task"] for t in r["tasks"]] for r in (row, rows[0]))
        if names != first:
            raise TaskError(f"{who} has tasks {names}, {rows[0]['rotation']} has {first}: run both")
        for mine, other in zip(row["tasks"], rows[0]["tasks"], strict=True):
            if _items(mine) != _items(other):
                raise TaskError(
                    f"task {mine['task']!r}: {who} was given {_items(mine, 12)}, "
                    f"{rows[0]['rotation']} {_items(other, 12)}: "
                    "delete measurements/zero-shot-*.json and run again"
                )


def _items(scored: dict[str, Any], digits: int = 64) -> str:
    return f"{scored['items']} items, version {scored['version']}, hash {scored['hash'][:digits]}"


def averages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a model: perplexity, mean accuracy over the averaged tasks, log-probability by task.

    Log-probabilities have no mean: in nats a target, a sentence would outweigh a word.
    """
    return [
        {k: r[k] for k in ("rotation", "seed", "bits", "method", "ppl")}
        | {
            "accuracy": statistics.fmean(
                t["accuracy"] for t in r["tasks"] if t["task"] not in APART
            ),
            "logp": {t["task"]: t["target_logp"] for t in r["tasks"]},
        }
        for r in rows
    ]


def _settings(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["bits"] for r in rows if r["rotation"] != "FP"))


def _by_item(
    rows: list[dict[str, Any]], name: str, bits: str, task: int, value: str
) -> dict[int, list[float]]:
    """Seed → values by item; FP belongs to every setting."""
    return {
        r["seed"]: r["tasks"][task][value]
        for r in rows
        if r["rotation"] == name and (name == "FP" or r["bits"] == bits)
    }


def _means(columns: Iterable[Iterable[float]]) -> list[float]:
    """Place by place, the mean of several lists: seeds on the same items are no independent values."""
    return [statistics.fmean(c) for c in zip(*columns, strict=True)]


def _cell(values: list[list[float]]) -> dict[str, Any]:
    """Values [seeds][items]: the mean with its interval over items, the means by seed and their sd."""
    by_seed = [statistics.fmean(v) for v in values]
    mean = _means(values)
    interval = paired_difference(mean, [0.0] * len(mean))
    return interval | {"by_seed": by_seed, "sd": spread(by_seed)["sd"]}


def _together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of tasks: half widths add as squares, as if tasks were independent."""
    mean = statistics.fmean(p["mean"] for p in parts)
    half = math.sqrt(sum((p["high"] - p["mean"]) ** 2 for p in parts)) / len(parts)
    by_seed = _means(p["by_seed"] for p in parts)
    found = {"mean": mean, "low": mean - half, "high": mean + half}
    return found | {"by_seed": by_seed, "sd": spread(by_seed)["sd"]}


def _with_mean(
    tasks: list[str], cells: list[dict[str, Any]], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row a task and, of accuracy, one for the mean of tasks."""
    about |= {"seeds": len(cells[0]["correct"]["by_seed"])}
    averaged = [c["correct"] for t, c in zip(tasks, cells, strict=True) if t not in APART]
    rows = [about | {"task": t} | c for t, c in zip(tasks, cells, strict=True)]
    return [*rows, about | {"task": BOTH, "correct": _together(averaged)}]


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By bits, rotation and task: accuracy and log-probability of the target; the mean of accuracies.

    Each a mean over seeds with its 95 % interval over items, its values by seed and their sd.
    """
    out, tasks = [], [t["task"] for t in rows[0]["tasks"]]
    for bits in _settings(rows):
        for name in ("FP", *METHODS):
            cells = [
                {v: _cell([*_by_item(rows, name, bits, i, v).values()]) for v in VALUES}
                for i in range(len(tasks))
            ]
            out += _with_mean(tasks, cells, {"bits": bits, "rotation": name})
    return out


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Paired differences a − b with 95 % intervals over items, each item averaged over seeds.

    By seed too, over the seeds that both have: DFRot(RH) starts from the RH of its seed. FP has one.
    """
    out, tasks = [], [t["task"] for t in rows[0]["tasks"]]
    for bits in _settings(rows):
        for a, b in PAIRS:
            cells = [
                {v: _cell(_less(rows, a, b, bits, i, v)) for v in VALUES} for i in range(len(tasks))
            ]
            out += _with_mean(tasks, cells, {"bits": bits, "a": a, "b": b})
    return out


def _less(
    rows: list[dict[str, Any]], a: str, b: str, bits: str, task: int, value: str
) -> list[list[float]]:
    """a − b [seeds][items]."""
    one, two = (_by_item(rows, n, bits, task, value) for n in (a, b))
    if a == "FP":
        one = dict.fromkeys(two, *one.values())
    return [[x - y for x, y in zip(one[s], two[s], strict=True)] for s in sorted(one.keys() & two)]


def ranks(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kendall's τ between lower perplexity and the higher value, by bits.

    value: "accuracy", the mean of tasks, or "logp" of one task. over: "all" models, or the "rotated" ones:
    FP is best and NR worst whatever is compared. methods: τ of means over seeds; models: of every seed
    on its own, n of them. τ = 1: they rank alike; NaN where all are equal.
    """
    out = []
    kinds = [("accuracy", BOTH), *(("logp", task) for task in models[0]["logp"])]
    for bits, (value, task), over in itertools.product(
        _settings(models), kinds, ("all", "rotated")
    ):
        these = [r for r in models if r["rotation"] == "FP" or r["bits"] == bits]
        if over == "rotated":
            these = [r for r in these if r["rotation"] not in ("FP", "NR")]
        names = list(dict.fromkeys(r["rotation"] for r in these))
        ppl = [float(r["ppl"]) for r in these]
        seen = [float(r["logp"][task] if value == "logp" else r["accuracy"]) for r in these]
        means = [
            [statistics.fmean(x for x, r in zip(v, these, strict=True) if r["rotation"] == n)
             for n in names]
            for v in (ppl, seen)
        ]  # fmt: skip
        row = {"bits": bits, "value": value, "task": task, "over": over, "names": names}
        row |= {"methods": rank_correlation(*means)}
        out.append(row | {"models": rank_correlation(ppl, seen), "n": len(these)})
    return out


def rank_correlation(perplexity: list[float], value: list[float]) -> float:
    """Kendall's τ of −perplexity and `value` over models: 1 if they rank them alike, −1 if the other way."""
    return float(kendalltau([-p for p in perplexity], value).statistic)

"""Study 10: zero-shot accuracy of every method through lm-eval, and whether perplexity ranks them so."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from typing import Any

from scipy.stats import kendalltau
from tqdm import tqdm

from dfrot_lab import paper, zero_shot
from dfrot_lab.evaluation import paired_difference, spread
from dfrot_lab.lab import Lab
from dfrot_lab.results import Claim

__all__ = [
    "averages",
    "claims",
    "differences",
    "measure",
    "rank_correlation",
    "ranks",
    "summary",
    "table",
]

METHODS = ("NR", "RO", "RH", "DFRot(RH)")
ORDER = ("FP", "DFRot(RH)", "RH", "RO")  # best first
PAIRS = (("RH", "RO"), ("DFRot(RH)", "RH"), ("FP", "DFRot(RH)"))
VALUES = ("correct", "logp")
BOTH = "mean of tasks"


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
    """
    zero_shot.check(tasks)
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
    """What the figures and the claims need; the values of single items stay in the measurements."""
    scored = rows[0]["tasks"]
    about = [
        {k: t[k] for k in ("task", "metric", "items", "tokens", "hash", "version")} for t in scored
    ]
    return {
        "tasks": about,
        "lm_eval": scored[0]["lm_eval"],
        "windows": rows[0]["windows"],
        "models": averages(rows),
        "table": table(rows),
        "differences": differences(rows),
        "ranks": ranks(averages(rows)),
    }


def averages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a model: perplexity, and the means over tasks of accuracy and of the target's log-probability."""
    return [
        {k: r[k] for k in ("rotation", "seed", "bits", "method", "ppl")}
        | {
            "accuracy": statistics.fmean(t["accuracy"] for t in r["tasks"]),
            "logp": statistics.fmean(t["target_logp"] for t in r["tasks"]),
        }
        for r in rows
    ]


def _settings(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["bits"] for r in rows if r["rotation"] != "FP"))


def _by_item(rows: list[dict[str, Any]], name: str, bits: str, task: int, value: str):
    """Seed → values by item; FP belongs to every setting."""
    return {
        r["seed"]: r["tasks"][task][value]
        for r in rows
        if r["rotation"] == name and (name == "FP" or r["bits"] == bits)
    }


def _means(columns: Iterable[Iterable[float]]) -> list[float]:
    """Item by item, the mean over seeds: seeds on the same items are no independent values."""
    return [statistics.fmean(c) for c in zip(*columns, strict=True)]


def _interval(a: list[float], b: list[float]) -> dict[str, float]:
    """Of the mean of a − b; NaN where a model that overflows gives no number."""
    if all(map(math.isfinite, [*a, *b])):
        return paired_difference(a, b)
    return dict.fromkeys(("mean", "low", "high"), math.nan) | {"n": len(a)}


def _together(parts: list[dict[str, float]]) -> dict[str, float]:
    """The mean of independent intervals of tasks: half widths add as squares."""
    mean = statistics.fmean(p["mean"] for p in parts)
    half = math.sqrt(sum((p["high"] - p["mean"]) ** 2 for p in parts)) / len(parts)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By bits, rotation and task (and over tasks): accuracy and log-probability of the target.

    Each a mean over seeds with its 95 % interval over items and its sd over seeds.
    """
    out = []
    for bits in _settings(rows):
        for name in ("FP", *METHODS):
            every: dict[str, list[dict[str, float]]] = {v: [] for v in VALUES}
            seeds: dict[str, list[list[float]]] = {v: [] for v in VALUES}
            tasks = [t["task"] for t in rows[0]["tasks"]]
            for i, task in enumerate(tasks):
                row = {"bits": bits, "rotation": name, "task": task}
                for value in VALUES:
                    found = _by_item(rows, name, bits, i, value)
                    items = _means(found.values())
                    interval = _interval(items, [0.0] * len(items))
                    seeds[value].append([statistics.fmean(v) for v in found.values()])
                    every[value].append(interval)
                    row[value] = interval | {"sd": spread(seeds[value][-1])["sd"]}
                out.append(row | {"seeds": len(seeds["logp"][-1])})
            row = {"bits": bits, "rotation": name, "task": BOTH, "seeds": out[-1]["seeds"]}
            for value in VALUES:
                sd = spread(_means(seeds[value]))["sd"]
                row[value] = _together(every[value]) | {"sd": sd}
            out.append(row)
    return out


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Paired differences a − b with 95 % intervals over items, each item averaged over the seeds of both."""
    out = []
    for bits in _settings(rows):
        for a, b in PAIRS:
            every: dict[str, list[dict[str, float]]] = {v: [] for v in VALUES}
            for i, scored in enumerate(rows[0]["tasks"]):
                row = {"bits": bits, "a": a, "b": b, "task": scored["task"]}
                for value in VALUES:
                    one, two = (_means(_by_item(rows, n, bits, i, value).values()) for n in (a, b))
                    row[value] = _interval(one, two)
                    every[value].append(row[value])
                out.append(row)
            row = {"bits": bits, "a": a, "b": b, "task": BOTH}
            out.append(row | {v: _together(every[v]) for v in VALUES})
    return out


def ranks(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kendall's τ between lower perplexity and higher accuracy (and log-probability), by bits.

    methods: of means over seeds, FP among them; models: every seed on its own, FP among them. τ = 1: they
    rank alike; NaN where all are equal.
    """
    out = []
    for bits in _settings(models):
        these = [r for r in models if r["rotation"] == "FP" or r["bits"] == bits]
        names = list(dict.fromkeys(r["rotation"] for r in these))
        for value in ("accuracy", "logp"):
            means = [
                [statistics.fmean(float(r[k]) for r in these if r["rotation"] == n) for n in names]
                for k in ("ppl", value)
            ]
            row = {
                "bits": bits,
                "value": value,
                "methods": rank_correlation(*means),
                "names": names,
            }
            single = [[float(r[k]) for r in these] for k in ("ppl", value)]
            out.append(row | {"models": rank_correlation(*single), "n": len(these)})
    return out


def rank_correlation(perplexity: list[float], value: list[float]) -> float:
    """Kendall's τ of −perplexity and `value` over models: 1 if they rank them alike, −1 if the other way."""
    return float(kendalltau([-p for p in perplexity], value).statistic)


def claims(result: dict[str, Any]) -> list[Claim]:
    """The closing table of notebook 10."""
    out = []
    mean = {(r["bits"], r["rotation"]): r for r in result["table"] if r["task"] == BOTH}
    for bits in dict.fromkeys(b for b, _ in mean):
        for value, called in (("correct", "accuracy"), ("logp", "log-probability of the target")):
            rows = [mean[bits, n][value] for n in ORDER]
            form = _percent if value == "correct" else _nats
            published = _published(bits) if value == "correct" else "not reported"
            out.append(
                Claim(
                    f"{bits}: FP > DFRot > RH > RO by {called}, mean of tasks",
                    published,
                    ", ".join(f"{n} {form(r)}" for n, r in zip(ORDER, rows, strict=True)),
                    "means over seeds in this order",
                    all(a["mean"] > b["mean"] for a, b in itertools.pairwise(rows)),
                )
            )
    bits = next(iter(mean))[0]
    gain = next(
        r
        for r in result["differences"]
        if (r["bits"], r["a"], r["b"], r["task"]) == (bits, "DFRot(RH)", "RH", BOTH)
    )
    for value, form in (("correct", _points), ("logp", _nats)):
        out.append(
            Claim(
                f"{bits}: DFRot's gain over RH is more than the items' noise, by "
                + ("accuracy" if value == "correct" else "log-probability"),
                "not tested: no intervals" if value == "correct" else "not reported",
                form(gain[value]),
                "the 95 % interval of the paired difference lies above 0",
                gain[value]["low"] > 0,
            )
        )
    found = [r for r in result["ranks"] if r["bits"] == bits]
    out.append(
        Claim(
            f"{bits}: perplexity and accuracy rank the methods alike",
            _published_ranks(),
            "; ".join(
                f"{'accuracy' if r['value'] == 'accuracy' else 'log-probability'}: "
                f"τ = {r['methods']:.2f} over {len(r['names'])} methods, {r['models']:.2f} over "
                f"{r['n']} models"
                for r in found
            ),
            "τ over methods is 1 for accuracy",
            math.isclose(found[0]["methods"], 1.0),
        )
    )
    return out


def _percent(r: dict[str, float]) -> str:
    return f"{100 * r['mean']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"


def _points(r: dict[str, float]) -> str:
    """A difference of two percentages."""
    return f"{100 * r['mean']:.1f} points [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"


def _nats(r: dict[str, float]) -> str:
    return f"{r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"


def _published(bits: str) -> str:
    """FP16, DFRot and QuaRot on average over six tasks; the paper has no zero-shot row of RO."""
    numbers, told = paper.numbers()["zero_shot_readme"], []
    for model in ("LLaMA2-7B", "LLaMA3-8B"):
        rows = numbers[model]
        if f"DFRot {bits}" not in rows:
            return f"not reported at {bits}"
        values = [rows[k][-1] for k in ("FP16", f"DFRot {bits}", f"QuaRot {bits}")]
        told.append(f"{model}: FP16 {values[0]}, DFRot {values[1]}, RH {values[2]}")
    return "; ".join(told) + " (README; no RO)"


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

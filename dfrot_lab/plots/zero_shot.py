"""Figures of notebook 10: accuracy by method, paired differences, and perplexity against accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dfrot_lab.plots import style
from dfrot_lab.plots.style import COLOUR, MARKER, PAGE, array, figure, number

__all__ = ["paired_accuracy", "perplexity_and_accuracy", "zero_shot_accuracy"]

NOTEBOOK = "10_zero_shot"
ORDER = ("FP", "NR", "RO", "RH", "DFRot(RH)")
MARK = MARKER | {"FP": "P"}
BOTH = "mean of tasks"
SHADES = ("0.1", "0.55", "0.75")
CHOICES = {"continuation": 3, "piqa": 2, "winogrande": 2, "hellaswag": 4, "mmlu": 4}
CHOICES |= {"arc_easy": 4, "arc_challenge": 4}  # answers of an item
VALUES = {"correct": "accuracy [%]", "logp": "log-probability\nof the target [nats]"}


def _settings(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(r["bits"] for r in result["table"]))


def _tasks(result: dict[str, Any]) -> list[str]:
    """The tasks, and their mean where there are several."""
    names = [t["task"] for t in result["tasks"]]
    return [*names, BOTH] if len(names) > 1 else names


def _scaled(r: dict[str, Any], value: str) -> np.ndarray:
    """[mean, low, high], accuracies in percent."""
    return array([r[value][k] for k in ("mean", "low", "high")]) * (
        100 if value == "correct" else 1
    )


def _seeds(result: dict[str, Any]) -> str:
    """'4-4-16: 3 seeds, 4-4-4: 1 seed', of the rotated methods."""
    most = {
        b: max(r["seeds"] for r in result["table"] if r["bits"] == b) for b in _settings(result)
    }
    return ", ".join(f"{bits}: {style.count(n, 'seed')}" for bits, n in most.items())


def _apart(result: dict[str, Any]) -> str:
    apart = [t["task"] for t in result["tasks"] if t["task"] not in result["averaged"]]
    return f" (without {', '.join(apart)}, as in the paper)" if apart else ""


def _sd(r: dict[str, Any]) -> str:
    """' ± 0.6', the sd of accuracy over seeds; nothing for one seed."""
    sd = 100 * float(array(r["correct"]["sd"]))
    return f" ± {number(sd, 1)}" if r["seeds"] > 1 and np.isfinite(sd) else ""


def _by_seed(r: dict[str, Any], value: str) -> np.ndarray:
    """The mean of each seed, accuracies in percent; none where there is one seed."""
    found = array(r[value]["by_seed"]) * (100 if value == "correct" else 1)
    return found if len(found) > 1 else found[:0]


def _accuracy_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for bits in _settings(result):
        rows = [r for r in result["table"] if r["bits"] == bits and r["task"] == BOTH]
        parts = [
            f"{style.label(r['rotation'])} {number(_scaled(r, 'correct')[0], 1)}{_sd(r)}"
            for r in rows
        ]
        told.append(f"{bits}: " + ", ".join(parts))
    return {
        "means": "; ".join(told),
        "tasks": "; ".join(
            f"{t['task']} ({t['metric']}, {t['items']} items)" for t in result["tasks"]
        ),
        "harness": result["lm_eval"],
        "seeds": _seeds(result),
        "apart": _apart(result),
    }


@figure(NOTEBOOK, _accuracy_numbers)
def zero_shot_accuracy(result: dict[str, Any]) -> Figure:
    """A panel a task, accuracies above the target's log-probabilities; methods by colour."""
    fig = _panels(result, 1.7, _methods)
    handles = [
        Line2D([], [], ls="", marker=MARK[n], color=COLOUR[n], label=style.label(n)) for n in ORDER
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(ORDER))
    return fig


def _panels(result: dict[str, Any], height: float, draw: Callable[..., None]) -> Figure:
    """draw(axes, result, task, value, whether it is the first of its line) for every task and value."""
    tasks = _tasks(result)
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)  # of accuracies, and as many of log-probabilities
    fig = style.new(PAGE, height * 2 * lines + 0.5)
    axes = fig.subplots(2 * lines, columns, squeeze=False)
    for value, block in zip(VALUES, (axes[:lines], axes[lines:]), strict=True):
        for k, ax in enumerate(block.ravel()):
            if k < len(tasks) and (tasks[k], value) != (BOTH, "logp"):
                draw(ax, result, tasks[k], value, k % columns == 0)
                ax.set_title(tasks[k].replace("_", " "))
                continue
            ax.axis("off")
            if k < len(tasks):
                style.note(ax, "no mean: targets\nof unlike lengths")
    return fig


def _methods(ax: Axes, result: dict[str, Any], task: str, value: str, first: bool) -> None:
    settings, shown, apart = _settings(result), [], []
    chance = 100 / CHOICES[task] if task in CHOICES and value == "correct" else None
    if chance:
        ax.axhline(chance, lw=0.8, ls=":", color=COLOUR["ink"], zorder=1)
        shown.append(chance)
    for i, bits in enumerate(settings):
        rows = {
            r["rotation"]: r for r in result["table"] if r["bits"] == bits and r["task"] == task
        }
        if value == "logp" and len(rows) > 1 and "NR" in rows:  # beside it the others would be flat
            told = number(_scaled(rows.pop("NR"), value)[0], 1).replace("-", "−")
            apart.append(f"NR, {bits}: {told}")
        for k, name in enumerate(n for n in ORDER if n in rows):
            mean, low, high = _scaled(rows[name], value)
            x = i + 0.15 * (k - (len(ORDER) - 1) / 2)
            look = {"color": COLOUR[name], "marker": MARK[name], "ms": 4, "capsize": 1.5}
            if np.isfinite(mean):
                ax.errorbar(x, mean, [[mean - low], [high - mean]], ls="", lw=0.8, **look)
                seeds = _by_seed(rows[name], value)
                ax.plot([x + 0.06] * len(seeds), seeds, ".", color=COLOUR[name], ms=2)
                shown += [low, high, *seeds]
    ax.set_ylim(*style.limits(shown, margin=0.08))
    if apart:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.12 * len(apart) * (high - low))
        style.note(ax, "\n".join(apart), 0.97, 0.97, ha="right", va="top", fontsize=6)
    ax.set_xticks(range(len(settings)), settings)
    ax.set_xlim(-0.5, len(settings) - 0.5)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")
    if first:
        ax.set_ylabel(VALUES[value])


def _pair(r: dict[str, Any]) -> str:
    return f"{style.label(r['a'])} − {style.label(r['b'])}"


def _differences_numbers(result: dict[str, Any]) -> dict[str, Any]:
    task = _tasks(result)[-1]
    told = []
    for r in result["differences"]:
        if r["task"] == task:
            mean, low, high = (number(v, 1) for v in _scaled(r, "correct"))
            sd = _sd(r)
            told.append(f"{_pair(r)} at {r['bits']} {mean} [{low}, {high}]{sd}")
    about = {"task": task.replace("_", " "), "apart": _apart(result) if task == BOTH else ""}
    return about | {"rows": "; ".join(told), "seeds": _seeds(result)}


@figure(NOTEBOOK, _differences_numbers)
def paired_accuracy(result: dict[str, Any]) -> Figure:
    """A panel a task, differences in accuracy above those in log-probability; 95 % intervals over items."""
    fig, settings = _panels(result, 1.35, _pairs), _settings(result)
    handles = [
        Line2D([], [], ls="", marker="os^"[k % 3], color=SHADES[k % 3], label=bits)
        for k, bits in enumerate(settings)
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig


def _pairs(ax: Axes, result: dict[str, Any], task: str, value: str, first: bool) -> None:
    settings = _settings(result)
    pairs = list(dict.fromkeys(_pair(r) for r in result["differences"]))
    for r in (r for r in result["differences"] if r["task"] == task):
        k = settings.index(r["bits"])
        mean, low, high = _scaled(r, value)
        if np.isfinite(mean):
            y = pairs.index(_pair(r)) + 0.36 * (k - (len(settings) - 1) / 2)
            look = {"color": SHADES[k % 3], "marker": "os^"[k % 3], "ms": 3.5, "capsize": 1.5}
            ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], ls="", lw=0.8, **look)
            seeds = _by_seed(r, value)
            ax.plot(seeds, [y + 0.17] * len(seeds), ".", color=SHADES[k % 3], ms=2)
    ax.axvline(0, color="0.4", lw=0.8, zorder=1)
    ax.set_xlabel("points" if value == "correct" else "nats a target")
    ax.grid(axis="x")
    ax.set_yticks(range(len(pairs)), pairs if first else [])
    ax.set_ylim(len(pairs) - 0.5, -0.5)


def _ranks_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for bits in _settings(result):
        rotated, every = (
            _rank(result, bits, "accuracy", BOTH, over) for over in ("rotated", "all")
        )
        parts = [
            f"{number(r['methods'])} over {len(r['names'])} methods, {number(r['models'])} over "
            f"{style.count(r['n'], 'model')}"
            for r in (every, rotated)
        ]
        told.append(f"{bits}: {parts[0]}; without FP and NR {parts[1]}")
    plain = [
        f"{r['bits']}: perplexity {number(r['ppl'])}, accuracy {number(100 * float(r['accuracy']), 1)} %"
        for r in result["models"]
        if r["rotation"] == "NR"
    ]
    about = {"plain": "; ".join(plain), "windows": style.count(result["windows"], "window")}
    return about | {"ranks": ". ".join(told)}


def _rank(result: dict[str, Any], bits: str, value: str, task: str, over: str) -> dict[str, Any]:
    asked = (bits, value, task, over)
    return next(
        r for r in result["ranks"] if (r["bits"], r["value"], r["task"], r["over"]) == asked
    )


@figure(NOTEBOOK, _ranks_numbers)
def perplexity_and_accuracy(result: dict[str, Any]) -> Figure:
    """A model's perplexity against its mean accuracy and each task's log-probability; bits by filling."""
    settings = _settings(result)
    panels = [("accuracy", BOTH), *(("logp", t["task"]) for t in result["tasks"])]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    fig = style.new(PAGE, 2.3 * lines + 0.4)
    axes = fig.subplots(lines, columns, squeeze=False).ravel()
    for ax, (value, task) in zip(axes, panels, strict=False):
        _against_perplexity(ax, result, value, task, settings)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    names = [n for n in ORDER if n != "NR"]
    handles = [
        Line2D([], [], ls="", marker=MARK[n], color=COLOUR[n], label=style.label(n)) for n in names
    ]
    handles += [
        Line2D([], [], ls="", marker="o", color="0.4", mfc="0.4" if k == 0 else "white", label=b)
        for k, b in enumerate(settings[:2])
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig


def _against_perplexity(
    ax: Axes, result: dict[str, Any], value: str, task: str, settings: list[str]
) -> None:
    """Without NR, beside which the others would be one point; the caption tells it."""
    seen = []
    for r in (r for r in result["models"] if r["rotation"] != "NR"):
        y = 100 * array(r["accuracy"]) if value == "accuracy" else array(r["logp"][task])
        x, y = float(array(r["ppl"])), float(y)
        filled = r["rotation"] == "FP" or r["bits"] == settings[0]
        ink = COLOUR[r["rotation"]]
        if np.isfinite([x, y]).all():
            ax.plot(x, y, MARK[r["rotation"]], color=ink, mfc=ink if filled else "white", ms=4.5)
            seen.append((x, y))
    ax.set_xscale("log")
    if seen:
        ax.set_xlim(*style.limits([x for x, _ in seen], log=True, margin=0.08))
        low, high = style.limits([y for _, y in seen], margin=0.08)
        ax.set_ylim(low, high + 0.3 * (high - low))  # room for what is told there
    style.log_ticks(ax.xaxis, *ax.get_xlim())
    ax.set(xlabel="perplexity", title=task.replace("_", " "))
    ax.set_ylabel("accuracy [%]" if value == "accuracy" else "log-probability [nats]")
    told = []
    for bits in settings:
        rotated, every = (
            number(_rank(result, bits, value, task, over)["methods"]) for over in ("rotated", "all")
        )
        told.append(f"{bits}: τ = {rotated} ({every})")
    box = {"fc": "white", "ec": "none", "pad": 0.8}
    style.note(ax, "\n".join(told), 0.97, 0.97, ha="right", va="top", fontsize=6, bbox=box)
    ax.grid(axis="y")

"""Figures of notebook 10: accuracy by method, paired differences, and perplexity against accuracy."""

from __future__ import annotations

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


def _accuracy_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for bits in _settings(result):
        rows = [r for r in result["table"] if r["bits"] == bits and r["task"] == BOTH]
        parts = [
            f"{style.label(r['rotation'])} {number(_scaled(r, 'correct')[0], 1)} %" for r in rows
        ]
        told.append(f"{bits}: " + ", ".join(parts))
    return {
        "means": "; ".join(told),
        "tasks": "; ".join(
            f"{t['task']} ({t['metric']}, {t['items']} items)" for t in result["tasks"]
        ),
        "harness": result["lm_eval"],
        "seeds": style.count(max(r["seeds"] for r in result["table"]), "seed"),
    }


@figure(NOTEBOOK, _accuracy_numbers)
def zero_shot_accuracy(result: dict[str, Any]) -> Figure:
    """A column a task, accuracy above the target's log-probability; methods by colour, bits side by side."""
    tasks, settings = _tasks(result), _settings(result)
    many = len(tasks) > 4
    fig = style.new(PAGE, 4.6 if many else 4.0)
    axes = fig.subplots(2, len(tasks), squeeze=False, sharex=True, sharey="row" if many else False)
    for column, task in enumerate(tasks):
        for ax, value in zip(axes[:, column], VALUES, strict=True):
            _methods(ax, result, task, value, settings)
        axes[0, column].set_title(task.replace("_", " "), fontsize=6 if many else None)
    for ax, text in zip(axes[:, 0], VALUES.values(), strict=True):
        ax.set_ylabel(text)
    handles = [
        Line2D([], [], ls="", marker=MARK[n], color=COLOUR[n], label=style.label(n)) for n in ORDER
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(ORDER))
    return fig


def _methods(ax: Axes, result: dict[str, Any], task: str, value: str, settings: list[str]) -> None:
    shown = []
    for i, bits in enumerate(settings):
        rows = {
            r["rotation"]: r for r in result["table"] if r["bits"] == bits and r["task"] == task
        }
        for k, name in enumerate(n for n in ORDER if n in rows):
            mean, low, high = _scaled(rows[name], value)
            x = i + 0.15 * (k - (len(ORDER) - 1) / 2)
            look = {"color": COLOUR[name], "marker": MARK[name], "ms": 4, "capsize": 1.5}
            if np.isfinite(mean):
                ax.errorbar(x, mean, [[mean - low], [high - mean]], ls="", lw=0.8, **look)
                shown += [low, high]
    ax.set_ylim(*style.limits(shown, margin=0.08))
    ax.set_xticks(range(len(settings)), settings)
    ax.set_xlim(-0.5, len(settings) - 0.5)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")


def _pair(r: dict[str, Any]) -> str:
    return f"{style.label(r['a'])} − {style.label(r['b'])}"


def _differences_numbers(result: dict[str, Any]) -> dict[str, Any]:
    task = _tasks(result)[-1]
    told = []
    for r in result["differences"]:
        if r["task"] == task:
            mean, low, high = _scaled(r, "correct")
            told.append(
                f"{_pair(r)} at {r['bits']} {number(mean, 1)} [{number(low, 1)}, {number(high, 1)}]"
            )
    return {"task": task.replace("_", " "), "rows": "; ".join(told)}


@figure(NOTEBOOK, _differences_numbers)
def paired_accuracy(result: dict[str, Any]) -> Figure:
    """Paired differences with 95 % intervals over items: accuracy left, log-probability right."""
    tasks, settings = _tasks(result), _settings(result)
    pairs = list(dict.fromkeys(_pair(r) for r in result["differences"]))
    rows = [(pair, task) for pair in pairs for task in tasks]
    fig = style.new(PAGE, 0.17 * len(rows) + 1.1)
    axes = fig.subplots(1, 2, sharey=True)
    shades = ("0.1", "0.55", "0.75")
    for ax, (value, text) in zip(axes, VALUES.items(), strict=True):
        for r in result["differences"]:
            k = settings.index(r["bits"])
            mean, low, high = _scaled(r, value)
            if np.isfinite(mean):
                y = rows.index((_pair(r), r["task"])) + 0.25 * (k - (len(settings) - 1) / 2)
                look = {"color": shades[k % 3], "marker": "os^"[k % 3], "ms": 3.5, "capsize": 1.5}
                ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], ls="", lw=0.8, **look)
        ax.axvline(0, color="0.4", lw=0.8, zorder=1)
        ax.set_xlabel(f"difference in {text.replace(chr(10), ' ').replace('[%]', '[points]')}")
        ax.grid(axis="x")
    names = [f"{pair}, {task.replace('_', ' ')}" for pair, task in rows]
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    handles = [
        Line2D([], [], ls="", marker="os^"[k % 3], color=shades[k % 3], label=bits)
        for k, bits in enumerate(settings)
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig


def _ranks_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = [
        f"{r['bits']}, {'accuracy' if r['value'] == 'accuracy' else 'log-probability'}: "
        f"{number(r['methods'])} over {len(r['names'])} methods, {number(r['models'])} over "
        f"{r['n']} models"
        for r in result["ranks"]
    ]
    return {"ranks": "; ".join(told), "windows": style.count(result["windows"], "window")}


@figure(NOTEBOOK, _ranks_numbers)
def perplexity_and_accuracy(result: dict[str, Any]) -> Figure:
    """Each model's perplexity against its mean accuracy and log-probability; bits by filling."""
    settings = _settings(result)
    fig = style.new(PAGE, 2.7)
    axes = fig.subplots(1, 2, sharex=True)
    for ax, (key, text) in zip(
        axes, zip(("accuracy", "logp"), VALUES.values(), strict=True), strict=True
    ):
        seen = []
        for r in result["models"]:
            x, y = float(array(r["ppl"])), float(array(r[key])) * (100 if key == "accuracy" else 1)
            filled = r["rotation"] == "FP" or r["bits"] == settings[0]
            ink = COLOUR[r["rotation"]]
            look = {"color": ink, "mfc": ink if filled else "white", "ms": 5}
            if np.isfinite([x, y]).all():
                ax.plot(x, y, MARK[r["rotation"]], **look)
                seen.append((x, y))
        ax.set_xscale("log")
        if seen:
            ax.set_xlim(*style.limits([x for x, _ in seen], log=True, margin=0.08))
            ax.set_ylim(*style.limits([y for _, y in seen], margin=0.08))
        style.log_ticks(ax.xaxis, *ax.get_xlim())
        ax.set(xlabel="perplexity", ylabel=text)
        told = [
            f"{r['bits']}: τ = {number(r['methods'])}" for r in result["ranks"] if r["value"] == key
        ]
        style.note(ax, "\n".join(told), 0.97, 0.97, ha="right", va="top")
        ax.grid(axis="y")
    names = [n for n in ORDER if any(r["rotation"] == n for r in result["models"])]
    handles = [
        Line2D([], [], ls="", marker=MARK[n], color=COLOUR[n], label=style.label(n)) for n in names
    ]
    handles += [
        Line2D([], [], ls="", marker="o", color="0.4", mfc="0.4" if k == 0 else "white", label=b)
        for k, b in enumerate(settings[:2])
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig

"""Figures of notebook 08: the loss on the way from RH to R1, and what the weight γ buys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dfrot_lab.plots import style
from dfrot_lab.plots.style import COLOUR, MARKER, PAGE, array, figure, number

__all__ = ["gain_by_weight", "loss_landscape"]

NOTEBOOK = "08_why_it_works"
TEXTS = {"calibration": "-", "held out": "--"}
STARTS = ("RO", "RH")


def _gammas(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["gamma"] for r in rows))


def _sign(gamma: str) -> str:
    """'start', 'γ = 100', 'γ = ∞'."""
    if gamma == "none":
        return "start"
    value = float(gamma)
    return "γ = ∞" if math.isinf(value) else f"γ = {value:g}"


def _line(
    rows: list[dict[str, Any]], gamma: str, text: str, key: str
) -> tuple[np.ndarray, np.ndarray]:
    """(t, value of `key`) along one path; empty where the group has no rows."""
    mine = [r for r in rows if r["gamma"] == gamma and r["text"] == text and key in r]
    return array([r["t"] for r in mine]), array([r[key] for r in mine])


def _landscape_numbers(result: dict[str, Any]) -> dict[str, Any]:
    rows, told = result["path"]["rows"], []
    for gamma in _gammas(rows):
        parts = []
        for text in TEXTS:
            changes = []
            for group in ("massive", "normal"):
                t, y = _line(rows, gamma, text, group)
                if len(t):
                    change = float(y[t == 1][0] / y[t == 0][0] - 1)
                    changes.append(f"{group} {change:+.0%}".replace("-", "−").replace("%", " %"))
            parts.append(f"{text} {', '.join(changes)}")
        told.append(f"{_sign(gamma)}: " + "; ".join(parts))
    jumps = [_sign(g) for g, whole in result["path"]["continuous"].items() if not whole]
    cosine = result["alike"].get("massive")
    return {
        "told": ". ".join(told),
        "jumps": f" No path through rotations to {', '.join(jumps)}: one axis flips at ½."
        if jumps
        else "",
        "alike": "none" if cosine is None else number(cosine),
    }


@figure(NOTEBOOK, _landscape_numbers)
def loss_landscape(result: dict[str, Any]) -> Figure:
    """Weighted loss and the error of each group along the geodesic from RH (0) to R1 (1)."""
    rows = result["path"]["rows"]
    gammas = _gammas(rows)
    inks = dict(zip(gammas, [COLOUR["ink"], COLOUR["DFRot"]] * len(gammas), strict=False))
    if len(gammas) == 1:
        inks = {gammas[0]: COLOUR["DFRot"]}
    fig = style.new(PAGE, 2.5)
    titles = {
        "loss": "loss, over the start's",
        "massive": "massive tokens",
        "normal": "normal tokens",
    }
    for ax, (key, title) in zip(fig.subplots(1, 3), titles.items(), strict=True):
        everything = []
        for gamma in gammas:
            for text, ls in TEXTS.items():
                t, y = _line(rows, gamma, text, key)
                if not len(t):
                    continue
                y = y / y[t == 0] if key == "loss" else y
                everything += list(y)
                ax.plot(t, y, color=inks[gamma], ls=ls, marker="o", ms=2.2, mew=0)
                ax.plot(0, y[t == 0], MARKER["RH"], color=COLOUR["RH"], ms=4.5, zorder=4)
        ax.axvline(1, color="#BBBBBB", lw=0.6, zorder=0)
        ax.set_title(title)
        ax.set_xticks([0, 0.5, 1], ["RH", "½", "$R_1$"])
        ax.set_ylim(*style.limits([*everything, 0 if key != "normal" else np.nan]))
        ax.grid(axis="y")
        if key == "massive" and not everything:
            style.note(ax, "no massive token")
        if key == "massive":
            ax.set_ylabel(r"mean $\varepsilon$")
    handles = [Line2D([], [], color=inks[g], label=f"$R_1$ of {_sign(g)}") for g in gammas]
    handles += [Line2D([], [], color="#888888", ls=ls, label=text) for text, ls in TEXTS.items()]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig


def _ours(result: dict[str, Any], start: str) -> list[dict[str, Any]]:
    """The rows of one start: itself, then by γ."""
    rows = [r for r in result["sweep"]["rows"] if r["start"] == start]
    return sorted(rows, key=lambda r: -1.0 if r["gamma"] == "none" else float(r["gamma"]))


def _gain_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for start in STARTS:
        rows = _ours(result, start)
        ppl = " → ".join(number(r["ppl"]) for r in rows)
        held = " → ".join(f"{float(array(r['held out'].get('massive'))):.4f}" for r in rows)
        told.append(f"from {start} {ppl}, massive tokens held out {held.replace('nan', 'none')}")
    return {
        "steps": ", ".join(_sign(r["gamma"]) for r in _ours(result, "RH")),
        "told": "; ".join(told),
        "windows": style.count(result["sweep"]["windows"], "window")
        if result["sweep"]["windows"]
        else "all windows",
        "bits": result["sweep"]["bits"],
    }


@figure(NOTEBOOK, _gain_numbers)
def gain_by_weight(result: dict[str, Any]) -> Figure:
    """Errors of both groups and perplexity over the start's: the start, γ = 1, and larger γ."""
    fig = style.new(PAGE, 2.5)
    massive, normal, ppl = fig.subplots(1, 3)
    for ax, group in ((massive, "massive"), (normal, "normal")):
        shown = [_group(ax, result, start, text, group) for start in STARTS for text in TEXTS]
        ax.set_title(f"{group} tokens")
        ax.set_ylim(0, 1.06 * max(map(max, shown)) or 1)
        if not any(map(max, shown)):
            style.note(ax, f"no {group} token")
    massive.set_ylabel(r"mean $\varepsilon$")
    everything = [1.0]
    for start in STARTS:
        rows = _ours(result, start)
        first = float(array(rows[0]["ppl"]))
        y = array([r["ppl"] for r in rows]) / (first if math.isfinite(first) else math.nan)
        everything += list(y)
        look = {"color": COLOUR[start], "marker": MARKER[start], "mfc": "white", "ms": 4.5}
        ppl.plot(np.arange(len(y)) - 0.05, y, ls=TEXTS["held out"], **look, zorder=4)
    marks = {"LLaMA2-7B": "2", "LLaMA3-8B": "3"}
    names = [r["gamma"] for r in _ours(result, "RH")]
    for row in result["sweep"]["published"]:
        known = [(i, row[g] / row["none"]) for i, g in enumerate(names) if g in row]
        x, y = np.array(known).T
        everything += list(y)
        look = {"color": COLOUR[row["start"]], "ls": ":", "lw": 0.9, "ms": 4.5, "mew": 0.2}
        sign = f"${marks[row['model']]}$"
        ppl.plot(x + 0.07 * (x > 0), y, marker=sign, markevery=slice(1, None), **look)
    ppl.axhline(1, color=COLOUR["ink"], lw=0.6, ls="--", zorder=0)
    ppl.set_title("perplexity over the start's")
    ppl.set_ylim(*style.limits(everything))
    for ax in (massive, normal, ppl):
        ax.set_xticks(range(len(names)), [_sign(n) for n in names])
        ax.set_xlim(-0.3, len(names) - 0.7)
        ax.grid(axis="y")
    handles = [
        Line2D([], [], color=COLOUR[s], marker=MARKER[s], ms=4.5, label=f"from {s}") for s in STARTS
    ]
    handles += [Line2D([], [], color="#888888", ls=ls, label=text) for text, ls in TEXTS.items()]
    published = {"color": "#888888", "ls": ":"}
    handles.append(Line2D([], [], **published, label="paper: LLaMA-2 7B (2), -3 8B (3)"))
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig


def _group(ax: Axes, result: dict[str, Any], start: str, text: str, group: str) -> list[float]:
    """One line of a panel; returns its values, zeros where there are none."""
    y = array([r[text].get(group) for r in _ours(result, start)])
    face = COLOUR[start] if text == "calibration" else "white"
    look = {"color": COLOUR[start], "marker": MARKER[start], "mfc": face, "ms": 4}
    ax.plot(y, ls=TEXTS[text], **look)
    return np.nan_to_num(y).tolist()

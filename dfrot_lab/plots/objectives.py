"""Figures of notebook 09: the screening of objectives, and cost against quality."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.stats import kendalltau

from dfrot_lab.plots import style
from dfrot_lab.plots.style import COLOUR, MARKER, PAGE, array, figure, number

__all__ = ["cost_and_quality", "objective_screening", "prefix_in_cache"]

NOTEBOOK = "09_objectives"
SHORT = {
    "centroids": "centroids\n(DFRot)",
    "least_squares": "centroids,\nfitted scales",
    "corners": "corners\n(ConQuR)",
    "whip": "Whip\n(DartQuant)",
    "kurtosis": "kurtosis\n(KurTail)",
    "soft_peak": "soft peak\n(InfoQuant)",
}
STARTS = ("RO", "RH")


def _screening_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = "; ".join(f"at {bits} {_best(result, bits)}" for bits in result["screen_bits"])
    windows = style.count(result["windows"], "window")
    return {"best": told, "windows": windows, "alike": _alike(result)}


def _alike(result: dict[str, Any]) -> str:
    """Kendall's τ between the rankings by the first setting and by each other one, starts left out."""
    first, *others = result["screen_bits"]
    rows = [r["ppl"] for r in result["screen"] if r["objective"] != "none"]
    ranked = {b: [float(ppl[b]) for ppl in rows] for b in result["screen_bits"]}
    told = [f"at {b} {kendalltau(ranked[first], ranked[b]).statistic:.2f}" for b in others]
    ranking = f"Kendall's τ of the ranking of all {len(rows)} at {first} with that"
    return f" {ranking} {', '.join(told)}." if told else ""


def _best(result: dict[str, Any], bits: str) -> str:
    """From each start, its own perplexity and the lowest of its objectives."""
    told = []
    for start in STARTS:
        rows = [r for r in result["screen"] if r["start"] == start]
        plain = next(float(r["ppl"][bits]) for r in rows if r["objective"] == "none")
        best = min(
            (r for r in rows if r["objective"] != "none"), key=lambda r: float(r["ppl"][bits])
        )
        name = SHORT[best["objective"]].replace("\n", " ")
        told.append(
            f"from {start} {number(plain)} → {number(float(best['ppl'][bits]))} by {name}, "
            f"γ = {float(best['gamma']):g}"
        )
    return ", ".join(told)


@figure(NOTEBOOK, _screening_numbers)
def objective_screening(result: dict[str, Any]) -> Figure:
    """Perplexity of each objective, a column; γ by size, start by colour; a panel for each bits."""
    names = [n for n in SHORT if any(r["objective"] == n for r in result["screen"])]
    gammas = sorted({float(r["gamma"]) for r in result["screen"] if r["gamma"] != "none"})
    fig = style.new(PAGE, 2.3 * len(result["screen_bits"]) + 0.4)
    axes = fig.subplots(len(result["screen_bits"]), 1, sharex=True, squeeze=False)[:, 0]
    for ax, bits in zip(axes, result["screen_bits"], strict=True):
        everything = []
        for k, start in enumerate(STARTS):
            rows = [r for r in result["screen"] if r["start"] == start]
            plain = next(float(r["ppl"][bits]) for r in rows if r["objective"] == "none")
            ax.axhline(plain, color=COLOUR[start], lw=0.9, ls=(0, (4, 2)), zorder=1)
            ax.annotate(start, (1, plain), (3, 0), xycoords=ax.get_yaxis_transform(), va="center",
                        textcoords="offset points", fontsize=7, color=COLOUR[start])  # fmt: skip
            everything.append(plain)
            for i, name in enumerate(names):
                for j, gamma in enumerate(gammas):
                    value = [
                        float(array(r["ppl"][bits]))
                        for r in rows
                        if r["objective"] == name and float(r["gamma"]) == gamma
                    ]
                    x = i + 0.2 * (k - 0.5) * 2 + 0.1 * (j - (len(gammas) - 1) / 2)
                    ax.plot(x, value[0], MARKER[start], color=COLOUR[start], ms=3 + 1.5 * j)
                    everything.append(value[0])
        log = max(everything) > 4 * min(everything)
        if log:
            ax.set_yscale("log")
        ax.set_ylim(*style.limits(everything, log=log, margin=0.1))
        ax.set_ylabel("perplexity")
        ax.set_title(bits if bits.startswith("16-") else f"{bits}, weights by RTN")
        ax.grid(axis="y")
    axes[-1].set_xticks(range(len(names)), [SHORT[n] for n in names])
    axes[-1].tick_params(axis="x", length=0)
    handles = [
        Line2D([], [], ls="", marker=MARKER[s], color=COLOUR[s], label=f"from {s}") for s in STARTS
    ]
    handles += [
        Line2D([], [], ls="", marker="o", color="0.4", ms=3 + 1.5 * j, label=f"γ = {g:g}")
        for j, g in enumerate(gammas)
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig


def _pareto_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for r in result["pareto"]:
        gptq = f" and {number(r['ppl']['mean'])}" if "ppl" in r else ""
        told.append(f"{r['method']} {number(r['ppl_w16']['mean'])}{gptq} ({r['cost']:.3g} TFLOP)")
    about = {"windows": _confirming(result), "bits": result["confirm"][0]["bits"]}
    return about | {"rows": "; ".join(told)}


def _confirming(result: dict[str, Any]) -> str:
    first = int(result["windows"]) + 1
    last = first + int(result["confirm_windows"]) - 1
    return f"evaluation windows {first} {'and' if last == first + 1 else 'to'} {last}"


def _beaten(row: dict[str, Any], rows: list[dict[str, Any]], key: str) -> bool:
    """Whether another method costs no more and has a lower mean."""
    return any(r["cost"] <= row["cost"] and r[key]["mean"] < row[key]["mean"] for r in rows)


@figure(NOTEBOOK, _pareto_numbers)
def cost_and_quality(result: dict[str, Any]) -> Figure:
    """A row a method, by cost: what it gives, mean and sd over seeds, and what it costs."""
    # saved, what overflowed is a string
    rows = [
        {
            k: {n: float(array(x)) for n, x in v.items()} if isinstance(v, dict) else v
            for k, v in r.items()
        }
        for r in result["pareto"]
    ]
    rows.sort(key=lambda r: (r["cost"], -np.nan_to_num(r["ppl_w16"]["mean"], nan=np.inf)))
    bits = result["confirm"][0]["bits"]
    fig = style.new(PAGE, 0.95 + 0.19 * len(rows))
    *axes, cost = fig.subplots(1, 4, sharey=True, width_ratios=(1, 1, 1, 0.7))
    kinds = {"ppl_w16": "perplexity,\n16-4-16", "kl_w16": "KL, 16-4-16\n[nats a token]"}
    kinds["ppl"] = f"perplexity,\n{bits}, GPTQ"
    for ax, (key, text) in zip(axes, kinds.items(), strict=True):
        for y, r in enumerate(rows):
            if key in r and np.isfinite(r[key]["mean"]):
                _whisker(ax, y, r, key, _beaten(r, [o for o in rows if key in o], key))
        ax.set_xlabel(text)
        ax.xaxis.set_major_locator(MaxNLocator(3))
    for y, r in enumerate(rows):
        cost.barh(y, r["cost"], 0.55, color="#B8C0C6", lw=0)
        cost.annotate(f"{r['cost']:.2g}", (r["cost"], y), (3, 0), textcoords="offset points", va="center",
                      fontsize=7, bbox={"fc": "white", "ec": "none", "pad": 0.5})  # fmt: skip
    cost.set(xlabel="cost\n[TFLOP]", xlim=(0, 1.4 * max(r["cost"] for r in rows)))
    cost.xaxis.set_major_locator(MaxNLocator(3))
    for ax in (*axes, cost):
        ax.grid(axis="y")
        ax.tick_params(axis="y", length=0)
    names = [re.sub(r" \([^)]*\)", "", r["method"]) for r in rows]
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    look = {"ls": "", "marker": "s", "color": "#888888", "ms": 4.5}
    handles = [
        Line2D([], [], **look, label="no method as cheap is better"),
        Line2D([], [], **look, mfc="white", label="one is"),
    ]
    fig.legend(handles=handles, loc="outside upper right", ncols=2)
    return fig


def _whisker(ax: Axes, y: float, row: dict[str, Any], key: str, beaten: bool) -> None:
    """Mean and sd of a method; hollow where it is beaten."""
    inks = {"RH": COLOUR["RH"], "dfrot": COLOUR["DFRot"], "recommended": COLOUR["ink"]}
    signs = {"RH": "o", "dfrot": "D", "recommended": "*"}
    name, ink = row["method"], inks.get(row["method"], "#888888")
    look = {"color": ink, "marker": signs.get(name, "s"), "mfc": "white" if beaten else ink}
    look["ms"] = 8 if name == "recommended" else 4.5
    ax.errorbar(
        row[key]["mean"],
        y,
        xerr=np.nan_to_num(row[key]["sd"]) or None,
        ls="",
        capsize=2,
        lw=1,
        **look,
    )


def _prefix_numbers(result: dict[str, Any]) -> dict[str, Any]:
    found = result["prefix"]
    told = [
        f"{r['rotation']} {number(float(r['plain']))} → {number(float(r['prefixed']))}"
        for r in found["rows"]
    ]
    held = ", ".join(repr(t) for t in found["prefix"])
    return {"prefix": held, "rows": "; ".join(told), "windows": _confirming(result)}


@figure(NOTEBOOK, _prefix_numbers)
def prefix_in_cache(result: dict[str, Any]) -> Figure:
    """W16A4 perplexity with massive tokens in the text, and with a prefix that holds them in the cache."""
    rows = result["prefix"]["rows"]
    fig = style.new(style.COLUMN, 2.5)
    ax = fig.add_subplot()
    for i, r in enumerate(rows):
        plain, prefixed = float(array(r["plain"])), float(array(r["prefixed"]))
        ink = COLOUR.get(r["rotation"], COLOUR["DFRot"])
        ax.annotate(
            "", (i, prefixed), (i, plain), arrowprops={"arrowstyle": "->", "color": ink, "lw": 1}
        )
        ax.plot(i, plain, "o", color=ink, mfc="white", ms=5)
        ax.plot(i, prefixed, "o", color=ink, ms=5)
    values = [float(array(r[k])) for r in rows for k in ("plain", "prefixed")]
    ax.set_ylim(*style.limits(values, log=False, margin=0.1))
    ax.set_xticks(range(len(rows)), [style.label(r["rotation"]) for r in rows])
    ax.set_xlim(-0.5, len(rows) - 0.5)
    ax.set_ylabel("perplexity")
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")
    handles = [
        Line2D([], [], ls="", marker="o", color="0.4", mfc="white", label="text alone"),
        Line2D([], [], ls="", marker="o", color="0.4", label="behind a prefix"),
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=2)
    return fig

"""Perplexity against γ, for notebooks 04 (activations alone) and 05 (weights quantized as well)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dfrot_lab.plots import style
from dfrot_lab.plots.style import COLOUR, COLUMN, LINE, MARKER, array, figure, number

__all__ = ["gamma_sweep", "gamma_sweep_w4a4"]

STARTS = ("RO", "RH")
FEW = 3  # weights, up to which no curve is drawn


def _sweep(result: dict[str, Any], start: str) -> tuple[list[tuple[float, float]], float]:
    """[(γ, perplexity)] in order of γ and the perplexity of the start itself."""
    rows = [r for r in result["gamma"] if r["start"] == start]
    plain = [float(array(r["ppl"])) for r in rows if r["gamma"] == "none"]
    swept = sorted(
        (float(r["gamma"]), float(array(r["ppl"]))) for r in rows if r["gamma"] != "none"
    )
    return swept, plain[0] if plain else math.nan


def _gamma_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for start in STARTS:
        swept, plain = _sweep(result, start)
        finite = [(p, g) for g, p in swept if math.isfinite(p)]
        if finite:
            best, gamma = min(finite)
            sign = "∞" if math.isinf(gamma) else f"{gamma:g}"
            told.append(f"from {start} {number(plain)} → {number(best)} at γ = {sign}")
    return {
        "best": "; ".join(told) or "no finite perplexity",
        "weights": style.count(len(_weights(result)), "weight"),
    }


def _weights(result: dict[str, Any]) -> list[float]:
    return sorted({g for start in STARTS for g, _ in _sweep(result, start)[0]})


@figure("04_dfrot", _gamma_numbers)
def gamma_sweep(result: dict[str, Any]) -> Figure:
    """Perplexity against γ from both starts, ∞ at the end of a broken axis; few γ: no curve."""
    if len(weights := _weights(result)) <= FEW:
        return _few(result, weights)
    fig = style.new(COLUMN, 2.5)
    ax = fig.add_subplot()
    sweeps = {start: _sweep(result, start) for start in STARTS}
    gammas = sorted({g for swept, _ in sweeps.values() for g, _ in swept if math.isfinite(g)})
    positive = [g for g in gammas if g > 0] or [1.0]
    step = (math.log10(positive[-1] / positive[0]) / max(len(positive) - 1, 1)) or 1.0
    zero, end = math.log10(positive[0]) - step, math.log10(positive[-1]) + 1.3 * step

    def place(g: float) -> float:
        return end if math.isinf(g) else zero if g <= 0 else math.log10(g)

    everything = []
    for start, (swept, plain) in sweeps.items():
        name, ink = f"DFRot({start})", COLOUR["DFRot"]
        finite = [(place(g), p) for g, p in swept if math.isfinite(g)]
        last = [(place(g), p) for g, p in swept if math.isinf(g)]
        everything += [plain, *(p for _, p in swept)]
        look = {"color": ink, "marker": MARKER[name], "ms": 4}
        ax.plot(*np.array(finite or [(np.nan, np.nan)]).T, ls=LINE[name], **look, label=name)
        ax.plot(*np.array(last or [(np.nan, np.nan)]).T, ls="", **look)
        if finite and last:
            ends = np.array([finite[-1], last[-1]]).T
            ax.plot(*ends, color=ink, ls=":", lw=0.8)
        if math.isfinite(plain):
            ax.axhline(plain, color=COLOUR[start], lw=0.9, ls=(0, (4, 2)), zorder=1)
            ax.annotate(f"{start} itself", (1, plain), (-1, 2), xycoords=ax.get_yaxis_transform(),
                        textcoords="offset points", ha="right", fontsize=7, color=COLOUR[start],
                        bbox={"fc": "white", "ec": "none", "pad": 0.3, "alpha": 0.8})  # fmt: skip
    log = style.wide(everything)
    if log:
        ax.set_yscale("log")
    ax.set_ylim(*style.limits(everything, log=log, margin=0.08))
    if log:
        style.log_ticks(ax.yaxis, *ax.get_ylim())
    _gamma_axis(
        ax, gammas, place, end, any(math.isinf(g) for s, _ in sweeps.values() for g, _ in s)
    )
    ax.set_ylabel("perplexity")
    hidden = [
        f"{s}, γ = {g:g}"
        for s, (swept, _) in sweeps.items()
        for g, p in swept
        if not math.isfinite(p)
    ]
    if hidden:
        style.note(
            ax,
            "infinite: " + "; ".join(hidden).replace("inf", "∞"),
            0.98,
            0.97,
            ha="right",
            va="top",
        )
    fig.legend(loc="outside upper center", ncols=2)
    return fig


def _few(result: dict[str, Any], weights: list[float]) -> Figure:
    """A column for the start and for each γ, the perplexity beside its marker: points, not a trend."""
    fig = style.new(COLUMN, 2.3)
    ax = fig.add_subplot()
    everything, hidden = [], []
    for start in STARTS:
        swept, plain = _sweep(result, start)
        for g, p in [(None, plain), *swept]:
            if not math.isfinite(p):
                hidden += [] if g is None else [f"{start}, γ = {g:g}"]
                continue
            name = start if g is None else f"DFRot({start})"
            x = 0 if g is None else 1 + weights.index(g)
            ax.plot(x, p, MARKER[name], color=COLOUR[name], ms=5, zorder=3)
            ax.annotate(number(p, 1), (x, p), (5, 0), textcoords="offset points", va="center",
                        fontsize=7, color=COLOUR[name])  # fmt: skip
            everything.append(p)
    log = style.wide(everything)
    if log:
        ax.set_yscale("log")
    ax.set_ylim(*style.limits(everything, log=log, margin=0.1))
    if log:
        style.log_ticks(ax.yaxis, *ax.get_ylim())
    names = ["the start", *("γ = " + ("∞" if math.isinf(g) else f"{g:g}") for g in weights)]
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.4, len(names) - 0.4)
    ax.tick_params(axis="x", length=0)
    ax.axvline(0.5, color="#DDDDDD", lw=0.5)
    ax.grid(axis="y")
    ax.set_ylabel("perplexity")
    if hidden:
        told = "infinite: " + "; ".join(hidden).replace("inf", "∞")
        style.note(ax, told, 0.98, 0.97, ha="right", va="top")
    handles = [
        Line2D([], [], ls="", marker=MARKER[n], color=COLOUR[n], ms=5, label=n)
        for n in ("RO", "DFRot(RO)", "RH", "DFRot(RH)")
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=2)
    return fig


def _gamma_axis(ax: Axes, gammas: list[float], place: Any, end: float, infinite: bool) -> None:
    """Ticks at the γ measured; before ∞ two strokes break the axis."""
    ticks = (
        gammas if len(gammas) <= 7 else [g for g in gammas if g <= 0 or math.log10(g) % 1 < 1e-9]
    )
    names = [f"{g:g}" for g in ticks]
    places = [place(g) for g in ticks]
    if infinite:
        places.append(end)
        names.append("∞")
    ax.set_xticks(places, names)
    low = min([place(g) for g in gammas] or [0.0])
    pad = 0.06 * (end - low or 1)
    right = end if infinite else max([place(g) for g in gammas] or [1.0])
    ax.set_xlim(low - pad, right + pad)
    ax.set_xlabel("γ")
    if infinite and gammas:
        gap = (end + place(gammas[-1])) / 2
        look = {"clip_on": False, "transform": ax.get_xaxis_transform(), "zorder": 10}
        ax.plot([gap], [0], marker="s", ms=5, mfc="white", mec="none", ls="", **look)
        for dx in (-0.012, 0.012):
            x = gap + dx * (right - low)
            slant = 0.01 * (right - low)
            ax.plot([x - slant, x + slant], [-0.02, 0.02], color=COLOUR["ink"], lw=0.7, **look)


@figure("05_tables", _gamma_numbers)
def gamma_sweep_w4a4(result: dict[str, Any]) -> Figure:
    """As `gamma_sweep`, with quantized weights."""
    return gamma_sweep(result)

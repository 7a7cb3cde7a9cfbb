"""Figures of notebook 08: closed forms as lines, simulation and a model's tokens as points on them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from dfrot_lab import paper
from dfrot_lab.plots import style
from dfrot_lab.plots.kept_tokens import dots
from dfrot_lab.plots.style import COLOUR, COLUMN, MARKER, PAGE, array, figure, number
from dfrot_lab.plots.token_errors import DOT, NONE

__all__ = [
    "composed_hadamard",
    "gaussian_floor",
    "hadamard_wins",
    "massive_rule",
    "spikes_in_noise",
    "spikes_under_hadamard",
]

NOTEBOOK = "08_why_it_works"
KINDS = {"symmetric": "--", "asymmetric": "-"}
STAR = {"color": COLOUR["massive"], "mec": "black", "mew": 0.4, "ms": 6.5, "ls": "", "marker": "*"}


def _quantizers() -> list[Line2D]:
    """Legend entries of the two quantizers."""
    return [Line2D([], [], color=COLOUR["ink"], ls=ls, label=k) for k, ls in KINDS.items()]


def _sizes(ax: Axes, d: set[int]) -> None:
    """Sizes as ticks of a log axis, and nothing between them."""
    ax.set_xticks(sorted(d), [f"{v:g}" for v in sorted(d)])
    ax.xaxis.set_minor_locator(NullLocator())


def _tokens_mean(result: dict[str, Any], group: str, name: str) -> float:
    """Mean over tokens and seeds with the asymmetric quantizer; NaN without such tokens."""
    rows = [r for r in result["tokens"]["means"] if r["quantizer"] == "asymmetric"]
    rows = [r for r in rows if r["group"] == group]
    if not rows:
        return math.nan
    value = rows[0][name]
    return float(array(value["mean"] if isinstance(value, dict) else value))


def _floor_numbers(result: dict[str, Any]) -> dict[str, Any]:
    ratio = array([r["RO"] / r["floor"] for r in result["floor"]])
    twice = array([r["RH2"] / r["floor"] for r in result["floor"]])
    sizes = [r["d"] for r in result["floor"]]
    found = result["tokens"]
    told = [f"{g} {_tokens_mean(result, g, 'RO'):.4f}" for g in ("normal", "massive")]
    return {
        "low": f"{min(sizes):,}",
        "high": f"{max(sizes):,}",
        "RO": f"{number(ratio.min(), 3)} to {number(ratio.max(), 3)}",
        "RH2": f"{number(twice.min(), 3)} to {number(twice.max(), 3)}",
        "figure4": f"{paper.token_errors()['RO'] / 4096:.4f}",
        "d": f"{found['d']:,}",
        "tokens": ", ".join(t.replace("nan", "none") for t in told),
    }


@figure(NOTEBOOK, _floor_numbers)
def gaussian_floor(result: dict[str, Any]) -> Figure:
    """ε by size: the Gaussian floor, a simulated spike under RO, RH² and RH, and the model's tokens."""
    fig = style.new(COLUMN, 2.8)
    ax = fig.add_subplot()
    for kind, ls in KINDS.items():
        rows = sorted((r for r in result["floor"] if r["quantizer"] == kind), key=lambda r: r["d"])
        d = array([r["d"] for r in rows])
        ax.plot(d, array([r["floor"] for r in rows]), color=COLOUR["RO"], ls=ls, zorder=2)
        ax.plot(d, array([r["RH"] for r in rows]), color=COLOUR["RH"], ls=ls, lw=0.9, zorder=2)
        for name, aside in (("RO", 1.0), ("RH2", 1.07), ("RH", 1.0)):
            face = "white" if name == "RH2" else COLOUR[name]
            look = {"color": COLOUR[name], "mfc": face, "ms": 3.6, "mew": 0.8, "zorder": 3}
            ax.plot(d * aside, array([r[name] for r in rows]), MARKER[name], **look)
    size = float(array(result["tokens"]["d"]))
    normal, massive = (_tokens_mean(result, g, "RO") for g in ("normal", "massive"))
    ax.plot(size, normal, "o", ms=6, mfc="none", mec="black", mew=0.9, zorder=4)
    ax.plot(size, massive, zorder=5, **STAR)
    ax.plot(4096, paper.token_errors()["RO"] / 4096, "P", ms=5.5, color="black", zorder=5)
    ax.set_xscale("log")
    _sizes(ax, {r["d"] for r in result["floor"]})
    ax.set(xlabel="$d$", ylabel=r"$\varepsilon = \Vert y - Q(y)\Vert^2 / \Vert y\Vert^2$")
    ax.set_ylim(-0.001, None)
    handles = [
        Line2D([], [], ls="", marker=MARKER[n], ms=3.6, color=COLOUR[n],
               mfc="white" if n == "RH2" else COLOUR[n], label=f"one spike, {style.label(n)}")
        for n in ("RO", "RH2", "RH")
    ]  # fmt: skip
    handles.append(
        Line2D([], [], ls="", marker="o", mfc="none", mec="black", ms=5, label="normal tokens, RO")
    )
    handles.append(Line2D([], [], **STAR, label="massive tokens, RO"))
    handles.append(Line2D([], [], ls="", marker="P", ms=5, color="black", label="Figure 4, RO"))
    fig.legend(handles=[*handles, *_quantizers()], loc="outside upper center", ncols=2)
    return fig


def _spikes_numbers(result: dict[str, Any]) -> dict[str, Any]:
    both = [r for r in result["spikes"] if "simulated" in r and float(array(r["exact"])) > 0]
    ratio = array([r["simulated"] for r in both]) / array([r["exact"] for r in both])
    limits = result["tokens"]["limits"]
    return {
        "d": f"{result['tokens']['d']:,}",
        "ratio": f"{number(ratio.min(), 3)} to {number(ratio.max(), 3)}",
        "limits": ", ".join(f"{number(v, 1)} {k}" for k, v in limits.items()),
    }


@figure(NOTEBOOK, _spikes_numbers)
def spikes_under_hadamard(result: dict[str, Any]) -> Figure:
    """ε of k spikes under RH, exact and simulated, against the floor that RO has for any of them."""
    fig = style.new(COLUMN, 2.5)
    ax = fig.add_subplot()
    size, limits = result["tokens"]["d"], result["tokens"]["limits"]
    for kind, ls in KINDS.items():
        rows = [r for r in result["spikes"] if r["quantizer"] == kind]
        k = array([r["k"] for r in rows])
        ax.plot(k, array([r["exact"] for r in rows]), color=COLOUR["RH"], ls=ls, zorder=3)
        some = [r for r in rows if "simulated" in r]
        look = {"color": COLOUR["RH"], "mfc": "white", "mew": 0.9, "ms": 4.5, "zorder": 4}
        ax.plot(array([r["k"] for r in some]), array([r["simulated"] for r in some]), "o", **look)
        reach = {"symmetric": 7, "asymmetric": 7.5}[kind]
        floor = float(array(limits[kind])) / (12 * reach**2)
        ax.axhline(floor, color=COLOUR["RO"], ls=ls, lw=0.9, zorder=1)
    ax.set(xlabel="number of spikes $k$", ylabel=r"$\varepsilon$", ylim=(-0.0005, None))
    ax.xaxis.get_major_locator().set_params(integer=True)
    handles = [
        Line2D([], [], color=COLOUR["RH"], label="RH, closed form"),
        Line2D([], [], ls="", marker="o", mfc="white", mec=COLOUR["RH"], label="RH, simulated"),
        Line2D([], [], color=COLOUR["RO"], lw=0.9, label=f"RO, $d$ = {size:,}"),
    ]
    fig.legend(handles=[*handles, *_quantizers()], loc="outside upper center", ncols=2)
    return fig


def _noise_numbers(result: dict[str, Any]) -> dict[str, Any]:
    found = result["tokens"]
    told = []
    for group in ("normal", "massive"):
        mean = {n: _tokens_mean(result, group, n) for n in ("predicted", "RH", "RO")}
        if math.isfinite(mean["RH"]):
            told.append(
                f"{group} {mean['predicted']:.4f} and {mean['RH']:.4f} (RO: {mean['RO']:.4f})"
            )
    n = len(found["massive"])
    return {
        "normal": style.count(len(found["RH"]) - n, "normal token"),
        "massive": style.count(n, "massive token"),
        "told": "; ".join(told),
        "d": f"{found['d']:,}",
    }


def _points(ax: Axes, x: np.ndarray, y: np.ndarray, massive: list[int]) -> None:
    """Normal tokens as dots, massive ones as stars in front."""
    normal = np.setdiff1d(np.arange(len(x)), massive)
    ax.plot(x[normal], y[normal], "o", ms=1.8, mew=0, color=DOT, alpha=0.45, zorder=2)
    if massive:
        ax.plot(x[massive], y[massive], zorder=4, **STAR | {"ms": 5})
    else:
        style.note(ax, NONE, 0.5, 1.02, va="bottom")


@figure(NOTEBOOK, _noise_numbers)
def spikes_in_noise(result: dict[str, Any]) -> Figure:
    """RH's error against the energy beside three spikes, with curves; and predicted against measured."""
    found = result["tokens"]
    rest, measured, predicted = (array(found[n]) for n in ("rest", "RH", "predicted"))
    fig = style.new(PAGE, 3.1)
    left, right = fig.subplots(1, 2)
    for row, ls in zip(result["by_share"], ("-", "--", ":"), strict=True):
        look = {"color": COLOUR["RH"], "ls": ls, "zorder": 3}
        left.plot(array(row["rest"]), array(row["error"]), label=f"RH, $k$ = {row['k']}", **look)
    floor = float(array(result["by_share"][0]["error"])[-1])
    left.axhline(floor, color=COLOUR["RO"], label="RO", zorder=1)
    both = style.limits([*rest, 1e-3], log=True, margin=0.03)
    line = np.geomspace(both[0], 1, 50)
    left.plot(
        line, line, color=COLOUR["NR"], ls=":", label="NR: all but the spikes is lost", zorder=1
    )
    _points(left, rest, measured, found["massive"])
    left.set(xscale="log", yscale="log", xlim=(both[0], 1.05))
    left.set_ylim(*style.limits([*measured, *predicted, floor * 2], log=True, margin=0.2))
    left.set(
        xlabel=r"share of $\Vert x\Vert^2$ beside the three largest",
        ylabel=r"$\varepsilon$ measured under RH",
    )
    style.log_ticks(left.yaxis, *left.get_ylim())
    handles, names = left.get_legend_handles_labels()
    dot = Line2D([], [], ls="", marker="o", ms=3, mew=0, color=DOT)
    handles += [dot, Line2D([], [], **STAR | {"ms": 6})]
    fig.legend(handles, [*names, "normal token", "massive token"], loc="outside upper center",
               ncols=4)  # fmt: skip
    same = style.limits([*measured, *predicted], log=True)
    right.plot(same, same, ls="--", lw=0.8, color=COLOUR["ink"], zorder=3)
    _points(right, predicted, measured, found["massive"])
    right.set(xscale="log", yscale="log", xlim=same, ylim=same, aspect="equal")
    style.log_ticks(right.xaxis, *same)
    style.log_ticks(right.yaxis, *same)
    right.set(
        xlabel=r"$\varepsilon$: three spikes in noise, closed form",
        ylabel=r"$\varepsilon$ measured under RH",
    )
    return fig


def _wins_numbers(result: dict[str, Any]) -> dict[str, Any]:
    found = result["tokens"]
    limit = float(array(found["limits"]["asymmetric"]))  # as the errors are
    breadth, chosen = array(found["breadth"]), np.zeros(len(found["breadth"]), bool)
    chosen[found["massive"]] = True
    ratio = array(found["RH"]) / array(found["RO"])
    told = []
    for name, group in (("massive", chosen), ("normal", ~chosen)):
        if group.any():
            told.append(
                f"{np.mean(breadth[group] < limit):.0%} of {name} tokens below it, mean ratio "
                f"{number(ratio[group].mean())}".replace("%", " %")
            )
    return {"limit": number(limit, 1), "told": "; ".join(told), "d": f"{found['d']:,}"}


@figure(NOTEBOOK, _wins_numbers)
def hadamard_wins(result: dict[str, Any]) -> Figure:
    """RH's error over RO's against (‖x‖₁/‖x‖₂)², the limit of the condition, and the bound it gives."""
    found = result["tokens"]
    breadth, ratio = array(found["breadth"]), array(found["RH"]) / array(found["RO"])
    limit = float(array(found["limits"]["asymmetric"]))  # as the errors are
    fig = style.new(COLUMN, 2.4)
    ax = fig.add_subplot()
    span = style.limits([*breadth, limit], log=True)
    line = np.geomspace(max(span[0], 1), span[1], 200)
    ax.plot(line, line / limit, color=COLOUR["RH"], lw=1, zorder=3)
    ax.axvline(limit, color=COLOUR["ink"], ls="--", lw=0.8, zorder=1)
    _points(ax, breadth, ratio, found["massive"])
    ax.set(xscale="log", xlim=span, ylim=(0, max(1.15, float(np.nanmax(ratio)) * 1.04)))
    style.log_ticks(ax.xaxis, *span)
    ax.set(xlabel=r"$(\Vert x\Vert_1 / \Vert x\Vert_2)^2$", ylabel="$E$(RH) / $E$(RO)")
    handles = [
        Line2D([], [], ls="", marker="o", ms=3, mew=0, color=DOT, label="normal token"),
        Line2D([], [], **STAR, label="massive token"),
        Line2D([], [], color=COLOUR["RH"], label="squared steps, at most"),
        Line2D([], [], color=COLOUR["ink"], ls="--", lw=0.8, label=r"$E[\mathrm{range}^2]/4$"),
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=2)
    return fig


def _rule_numbers(result: dict[str, Any]) -> dict[str, Any]:
    found = result["rule"]
    there = {r["quantizer"]: r["threshold"] for r in found["thresholds"] if r["d"] == 4096}
    ours, theirs = found["found"]["ours"], found["found"]["published"]
    return {
        "there": ", ".join(f"{number(v)} {k}" for k, v in there.items()),
        "d": f"{found['d']:,}",
        "ours": ", ".join(f"{style.percent(100 * float(array(v)))} {k}" for k, v in ours.items()),
        "theirs": ", ".join(
            f"{style.percent(100 * float(array(v)))} {k}" for k, v in theirs.items()
        ),
    }


@figure(NOTEBOOK, _rule_numbers)
def massive_rule(result: dict[str, Any]) -> Figure:
    """√(ε(d)·d), the L2 threshold that the scale-free rule amounts to, beside the published ones."""
    found = result["rule"]
    fig = style.new(COLUMN, 2.4)
    ax = fig.add_subplot()
    for kind, ls in KINDS.items():
        rows = [r for r in found["thresholds"] if r["quantizer"] == kind]
        d, y = array([r["d"] for r in rows]), array([r["threshold"] for r in rows])
        ax.plot(d, y, color=COLOUR["massive"], ls=ls, zorder=2)
        value = float(array(found["published"][kind]))
        ax.axhline(value, color=COLOUR["ink"], ls=ls, lw=0.8, zorder=1)
        ax.plot(4096, value, "P", ms=5, color="black", zorder=3)
        here = d == found["d"]
        ax.plot(d[here], y[here], zorder=4, **STAR)
    ax.axvline(found["d"], color="#BBBBBB", lw=0.6, zorder=0)
    ax.set(xscale="log", yscale="log", xlabel="$d$", ylabel=r"threshold on $\Vert x - Q(x)\Vert$")
    style.log_ticks(ax.yaxis, *ax.get_ylim())
    _sizes(ax, {r["d"] for r in result["floor"]})
    handles = [
        Line2D([], [], color=COLOUR["massive"], label=r"ours: $\sqrt{\varepsilon(d)\,d}$"),
        Line2D([], [], color=COLOUR["ink"], marker="P", lw=0.8, label="published, any $d$"),
        Line2D([], [], **STAR, label="this model"),
    ]
    fig.legend(handles=[*handles, *_quantizers()], loc="outside upper center", ncols=2)
    return fig


def _composed_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for group in ("massive", "normal"):
        rows = [r for r in result["composed"] if r["group"] == group]
        if rows:
            each = ", ".join(
                f"{style.label(r['rotation'])} {float(array(r['mean'])):.4f}" for r in rows
            )
            told.append(f"{group} tokens: {each}")
    seeds = max((len(r["values"]) for r in result["composed"]), default=0)
    return {"told": "; ".join(told), "seeds": style.count(seeds, "seed")}


@figure(NOTEBOOK, _composed_numbers)
def composed_hadamard(result: dict[str, Any]) -> Figure:
    """Mean error of massive and of normal tokens under RO, RH² and RH, one dot a seed."""
    fig = style.new(COLUMN, 2.2)
    ax = fig.add_subplot()
    names = ("RO", "RH2", "RH")
    for i, group in enumerate(("massive", "normal")):
        rows = {r["rotation"]: r for r in result["composed"] if r["group"] == group}
        for j, name in enumerate(names):
            if name in rows:
                dots(ax, i + 0.27 * (j - 1), rows[name]["values"], name, size=5)
        if not rows:
            style.note(ax, f"no {group}\ntoken", i, 0.5, transform=ax.get_xaxis_transform())
    floor = float(array(result["by_share"][0]["error"])[-1])
    ax.axhline(floor, color=COLOUR["ink"], ls=(0, (1, 2)), lw=0.8, zorder=1)
    ax.set(xlim=(-0.55, 1.55), ylim=(0, None), ylabel=r"mean $\varepsilon$")
    ax.set_xticks([0, 1], ["massive tokens", "normal tokens"])
    ax.tick_params(axis="x", length=0)
    handles = [
        Line2D([], [], ls="", marker=MARKER[n], color=COLOUR[n], ms=5,
               mfc="white" if n == "RH2" else COLOUR[n], label=style.label(n))
        for n in names
    ]  # fmt: skip
    dotted = {"color": COLOUR["ink"], "ls": (0, (1, 2)), "lw": 0.8}
    handles.append(Line2D([], [], **dotted, label="Gaussian floor"))
    fig.legend(handles=handles, loc="outside upper center", ncols=4)
    return fig

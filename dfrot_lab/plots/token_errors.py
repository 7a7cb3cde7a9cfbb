"""Figures of notebook 02: the 4-bit error of every token under NR, RO and RH."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from dfrot_lab.plots import style
from dfrot_lab.plots.invariance import bare_3d
from dfrot_lab.plots.style import COLOUR, COLUMN, LINE, MARKER, PAGE, array, figure, number

__all__ = [
    "error_bars_3d",
    "error_by_layer",
    "error_quantiles",
    "error_scatter",
    "ratio_by_kurtosis",
    "scatter_panel",
]

NOTEBOOK = "02_ro_vs_rh_error"
ROTATIONS = ("NR", "RO", "RH")
DOT = "#6F7D88"  # normal tokens, where no one rotation owns the point
NONE = "no massive token here"


def scatter_panel(
    ax: Axes, x: np.ndarray, y: np.ndarray, massive: list[int], both: tuple[float, float]
) -> None:
    """Squared error against squared error, y = x dashed, massive tokens marked and in front."""
    normal = np.setdiff1d(np.arange(len(x)), massive)
    ax.plot(both, both, ls="--", lw=0.8, color=COLOUR["ink"], zorder=3)
    ax.plot(x[normal], y[normal], "o", ms=1.8, mew=0, color=DOT, alpha=0.45, zorder=2)
    if massive:
        look = {"color": COLOUR["massive"], "mec": "black", "mew": 0.4, "ms": 6.5}
        ax.plot(x[massive], y[massive], MARKER["massive"], **look, zorder=4)
    else:
        style.note(ax, NONE, 0.5, 1.02, va="bottom")
    ax.set(xscale="log", yscale="log", xlim=both, ylim=both, aspect="equal")
    style.log_ticks(ax.xaxis, *both)
    style.log_ticks(ax.yaxis, *both)


def scatter_legend(fig: Figure, floor: bool = True) -> None:
    """The signs of a scatter, in one line above it."""
    dot = Line2D([], [], ls="", marker="o", ms=3, mew=0, color=DOT)
    star = Line2D([], [], ls="", marker="*", ms=6.5, mec="black", mew=0.4, color=COLOUR["massive"])
    same = Line2D([], [], ls="--", lw=0.8, color=COLOUR["ink"])
    handles, names = [dot, star, same], ["normal token", "massive token", "$y = x$"]
    if floor:
        handles.append(Line2D([], [], lw=0.6, color=COLOUR["ink"]))
        names.append("Gaussian floor")
    fig.legend(handles, names, loc="outside upper center", ncols=len(handles))


def _scatter_numbers(result: dict[str, Any]) -> dict[str, Any]:
    found = result["scatter"]
    massive = found["massive"]
    errors = {n: array(found[n]) for n in ROTATIONS}
    if massive:
        median = {n: number(np.median(errors[n][massive])) for n in ROTATIONS}
        told = ", ".join(f"{n} {v}" for n, v in median.items())
        told = f"{style.count(len(massive), 'massive token')} (median error {told})"
    else:
        told = "no massive token"
    below = float(np.mean(errors["RH"] < errors["RO"]))
    return {
        "site": found["site"],
        "tokens": f"{len(errors['NR']):,}",
        "massive": told,
        "floor": number(result["floor"]),
        "below": f"{below:.0%}".replace("%", " %"),
    }


@figure(NOTEBOOK, _scatter_numbers)
def error_scatter(result: dict[str, Any]) -> Figure:
    """‖x − Q(x)‖² of each token: NR against RO, NR against RH, RO against RH."""
    found, floor = result["scatter"], float(array(result["floor"]))
    errors = {n: array(found[n]) for n in ROTATIONS}
    everything = style.limits([floor, *np.concatenate(list(errors.values()))], log=True)
    rotated = style.limits([floor, *errors["RO"], *errors["RH"]], log=True)
    fig = style.new(PAGE, 2.4)
    for ax, (a, b) in zip(
        fig.subplots(1, 3), (("NR", "RO"), ("NR", "RH"), ("RO", "RH")), strict=True
    ):
        scatter_panel(
            ax, errors[a], errors[b], found["massive"], everything if a == "NR" else rotated
        )
        ax.axhline(floor, lw=0.6, color=COLOUR["ink"], zorder=3)
        if a != "NR":
            ax.axvline(floor, lw=0.6, color=COLOUR["ink"], zorder=3)
        ax.set_xlabel(f"$E$({a})", color=COLOUR[a])
        ax.set_ylabel(f"$E$({b})", color=COLOUR[b])
    scatter_legend(fig)
    return fig


MOST_BARS = 44  # more do not read at the width of a page


def _shown(found: dict[str, Any]) -> list[int]:
    """Indices of the tokens drawn as bars: every massive one, normal ones at equal distances."""
    n, massive = len(found["NR"]), sorted(found["massive"])
    normal = np.setdiff1d(np.arange(n), massive)
    room = min(max(MOST_BARS - len(massive), MOST_BARS // 2), len(normal))
    chosen = normal[np.linspace(0, len(normal) - 1, room).round().astype(int)] if room else []
    return sorted([*massive, *(int(i) for i in chosen)])


def _bars_numbers(result: dict[str, Any]) -> dict[str, Any]:
    shown, massive = _shown(result["scatter"]), len(result["scatter"]["massive"])
    return _scatter_numbers(result) | {
        "shown": style.count(len(shown) - massive, "normal token"),
        "stars": style.count(massive, "massive token"),
    }


@figure(NOTEBOOK, _bars_numbers)
def error_bars_3d(result: dict[str, Any]) -> Figure:
    """E(NR), E(RO) and E(RH) as a bar for each token, massive tokens in colour."""
    found = result["scatter"]
    shown = _shown(found)
    massive = set(found["massive"])
    errors = {n: array(found[n])[shown] for n in ROTATIONS}
    low, high = style.limits([*np.concatenate(list(errors.values()))], log=True)
    base = np.log10(low) - 0.1
    fig = style.new(PAGE, 3.3)
    fig.set_layout_engine("none")
    ax = fig.add_axes((-0.02, -0.54, 1.0, 2.045), projection="3d")  # square: it clips what it draws
    fill = {n: tuple(0.45 + 0.55 * np.array(to_rgb(COLOUR[n]))) for n in ROTATIONS}
    for depth, name in enumerate(reversed(ROTATIONS)):
        height = np.log10(np.maximum(errors[name], 10**base)) - base
        colours = [COLOUR["massive"] if i in massive else fill[name] for i in shown]
        x = np.arange(len(shown))
        ax.bar3d(
            x, np.full(len(x), depth - 0.2), base, 0.66, 0.4, height,
            color=colours, edgecolor="#444444", linewidth=0.15, shade=True,
        )  # fmt: skip
    bare_3d(ax)
    ax.tick_params(pad=1)
    ax.tick_params(axis="z", pad=4)
    every = max(1, len(shown) // 9)
    ax.set_xticks(
        np.arange(0, len(shown), every) + 0.33,
        [f"{shown[i]:,}" for i in range(0, len(shown), every)],
    )
    ax.set_yticks(range(3), [f"$E$({n})" for n in reversed(ROTATIONS)])
    ticks = [
        t for t in (0.01, 0.1, 0.3, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= t <= high
    ]
    ax.set_zticks(np.log10(ticks), [f"{t:g}" for t in ticks])
    ax.set(xlim=(0, len(shown)), ylim=(-0.4, 2.4), zlim=(base, np.log10(high)))
    thinned = " (normal ones thinned out)" if len(shown) < len(found["NR"]) else ""
    ax.set_xlabel(f"position of the token{thinned}", labelpad=14)
    ax.zaxis.set_rotate_label(False)
    ax.set_zlabel(r"$\Vert x - Q(x)\Vert^2$", labelpad=8, rotation=90)
    ax.set_box_aspect((3.8, 2.3, 1.05), zoom=0.645)
    ax.view_init(elev=44, azim=-80)  # so high that no row hides the lowest bars behind it
    handles = [Patch(fc=fill[n], ec="#444444", lw=0.3, label=n) for n in ROTATIONS]
    handles.append(Patch(fc=COLOUR["massive"], ec="#444444", lw=0.3, label="massive token"))
    fig.legend(handles=handles if massive else handles[:-1], loc="upper center", ncols=4)
    if not massive:
        fig.text(0.98, 0.9, NONE, ha="right", fontsize=7, color="#666666")
    return fig


def _layer_numbers(result: dict[str, Any]) -> dict[str, Any]:
    rows = result["by_layer"]
    seeds, sites = len({r["seed"] for r in rows}), len({r["site"] for r in rows})
    with_massive = len({r["site"] for r in rows if r["massive"]})
    return {
        "seeds": style.count(seeds, "seed"),
        "sites": style.count(sites, "site"),
        "with_massive": f"{with_massive or 'none'} of {sites}",
        "floor": f"{float(array(result['floor_relative'])):.4f}",
    } | _summary(result)


def _summary(result: dict[str, Any]) -> dict[str, str]:
    """'NR 0.1401, RO 0.0141 ± 0.0003, …' for each group of tokens."""
    told = {}
    for group in ("normal", "massive"):
        rows = [r for r in result["statistics"] if r["group"] == group]
        parts = []
        for r in rows:
            sd = f" ± {float(array(r['sd'])):.4f}" if r["n"] > 1 and float(array(r["sd"])) else ""
            parts.append(f"{r['rotation']} {float(array(r['mean'])):.4f}{sd}")
        told[group] = ", ".join(parts) or "there is none"
    return told


@figure(NOTEBOOK, _layer_numbers)
def error_by_layer(result: dict[str, Any]) -> Figure:
    """Mean relative error of normal and of massive tokens at every site; band: range over seeds."""
    rows = result["by_layer"]
    floor = float(array(result["floor_relative"]))
    fig = style.new(PAGE, 3.9)
    axes = fig.subplots(2, 2, sharex=True, sharey="row")
    for i, group in enumerate(("normal", "massive")):
        everything = [floor]
        for ax, kind in zip(axes[i], ("attention", "mlp"), strict=True):
            drawn = False
            for name in ROTATIONS:
                by_layer: dict[int, list[float]] = {}
                for r in rows:
                    layer, its = style.site_order(r["site"])
                    value = float(array(r[f"{group}_mean"]))
                    if its == kind and r["rotation"] == name:
                        by_layer.setdefault(layer, []).append(value)
                x = sorted(by_layer)
                y = np.array([by_layer[k] for k in x]) if x else np.empty((0, 1))
                y[~np.isfinite(y)] = np.nan
                everything += list(y.ravel())
                drawn = drawn or bool(np.isfinite(y).any())
                look = {"color": COLOUR[name], "ls": LINE[name], "marker": MARKER[name]}
                ax.plot(x, y.mean(1), **look, ms=2.8, label=name)
                ax.fill_between(x, y.min(1), y.max(1), color=COLOUR[name], alpha=0.2, lw=0)
            ax.axhline(floor, lw=0.7, color=COLOUR["ink"], ls=(0, (1, 2)), zorder=0)
            ax.set_yscale("log")
            ax.grid(axis="y")
            ax.xaxis.get_major_locator().set_params(integer=True)
            if not drawn:
                style.note(ax, NONE)
        axes[i, 0].set_ylim(*style.limits(everything, log=True))
        style.log_ticks(axes[i, 0].yaxis, *axes[i, 0].get_ylim())
        axes[i, 0].set_ylabel(f"relative error,\n{group} tokens")
        axes[1, i].set_xlabel("layer")
    for ax, kind in zip(axes[0], ("attention input", "MLP input"), strict=True):
        ax.set_title(kind)
    handles, names = axes[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], lw=0.7, color=COLOUR["ink"], ls=(0, (1, 2))))
    fig.legend(handles, [*names, "Gaussian floor"], loc="outside upper right", ncols=4)
    return fig


@figure(NOTEBOOK, _layer_numbers)
def error_quantiles(result: dict[str, Any]) -> Figure:
    """5, 25, 50, 75 and 95 % quantiles and the mean of the relative error, by group and rotation."""
    rows = {(r["group"], r["rotation"]): r for r in result["statistics"]}
    floor = float(array(result["floor_relative"]))
    fig = style.new(COLUMN, 2.4)
    ax = fig.add_subplot()
    everything = [floor]
    for i, group in enumerate(("normal", "massive")):
        for j, name in enumerate(ROTATIONS):
            row = rows.get((group, name))
            if row is None:
                continue
            x, (least, low, middle, high, most) = i + 0.27 * (j - 1), array(row["quantiles"])
            everything += [least, most, float(array(row["mean"]))]
            ink = COLOUR[name]
            ax.plot([x, x], [least, most], color=ink, lw=0.9, zorder=2)
            box = Rectangle(
                (x - 0.09, low), 0.18, high - low, fc=(*to_rgb(ink), 0.35), ec=ink, zorder=3
            )
            ax.add_patch(box).set_facecolor(tuple(0.65 + 0.35 * np.array(to_rgb(ink))))
            ax.plot([x - 0.09, x + 0.09], [middle, middle], color=ink, lw=1.6, zorder=4)
            mean = float(array(row["mean"]))
            ax.plot(x, mean, MARKER[name], mfc="white", mec=ink, ms=3.6, mew=0.8, zorder=5)
            ax.annotate(name, (x, most), (0, 2), textcoords="offset points", ha="center", va="bottom",
                        fontsize=7, color=ink, zorder=6,
                        bbox={"fc": "white", "ec": "none", "pad": 0.4})  # fmt: skip
        if not any(g == group for g, _ in rows):
            style.note(ax, f"no {group}\ntoken", i, 0.5, transform=ax.get_xaxis_transform())
    ax.axhline(floor, lw=0.8, color=COLOUR["ink"], ls=(0, (1, 2)), zorder=1)
    ax.text(1.5, floor, "Gaussian\nfloor", fontsize=7, va="center", ha="left", color=COLOUR["ink"])
    ax.set_yscale("log")
    ax.set(xlim=(-0.5, 1.5), ylim=style.limits(everything, log=True, margin=0.1))
    style.log_ticks(ax.yaxis, *ax.get_ylim())
    ax.set_xticks([0, 1], ["normal tokens", "massive tokens"])
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel(r"$\Vert x - Q(x)\Vert^2 / \Vert x\Vert^2$")
    return fig


def _kurtosis_numbers(result: dict[str, Any]) -> dict[str, Any]:
    rows = sorted(result["by_kurtosis"], key=lambda r: float(array(r["kurtosis"])))
    first, last = rows[0], rows[-1]
    return {
        "bins": len(rows),
        "n": f"{sum(r['n'] for r in rows):,}",
        "low": number(first["kurtosis"], 0),
        "high": number(last["kurtosis"], 0),
        "low_ratio": number(first["ratio"]),
        "high_ratio": number(last["ratio"]),
    }


@figure(NOTEBOOK, _kurtosis_numbers)
def ratio_by_kurtosis(result: dict[str, Any]) -> Figure:
    """RH's error over RO's, by the kurtosis of the unrotated token."""
    rows = sorted(result["by_kurtosis"], key=lambda r: float(array(r["kurtosis"])))
    x, y = array([r["kurtosis"] for r in rows]), array([r["ratio"] for r in rows])
    share = array([r["massive"] for r in rows])
    fig = style.new(COLUMN, 2.3)
    ax = fig.add_subplot()
    ax.axhline(1, lw=0.8, ls="--", color=COLOUR["ink"], zorder=1)
    ax.plot(x, y, color=COLOUR["RH"], marker="o", ms=3.8, mew=0.4, mec="white", zorder=3)
    some = share > 0
    ax.plot(x[some], y[some], "*", color=COLOUR["massive"], ms=8, mec="black", mew=0.4, zorder=4)
    for a, b, s in zip(x[some], y[some], share[some], strict=True):
        ax.annotate(f"{style.percent(100 * s)}", (a, b), (0, -6), textcoords="offset points", fontsize=7,
                    ha="center", va="top", color=COLOUR["ink"])  # fmt: skip
    ax.set_xscale("log")
    ax.set(xlim=style.limits(x, log=True, margin=0.08), ylim=style.limits([*y, 1.0], margin=0.2))
    style.log_ticks(ax.xaxis, *ax.get_xlim())
    ax.set(xlabel="kurtosis of the unrotated token", ylabel="$E$(RH) / $E$(RO)")
    ax.grid(axis="y")
    ax.text(
        ax.get_xlim()[1], 1, "RH = RO ", fontsize=7, ha="right", va="bottom", color=COLOUR["ink"]
    )
    star = Line2D([], [], ls="", marker="*", ms=7, mec="black", mew=0.4, color=COLOUR["massive"])
    text = (
        "share of massive tokens in the bin" if some.any() else NONE.replace("here", "in any bin")
    )
    fig.legend([star] if some.any() else [Line2D([], [], ls="")], [text], loc="outside upper right")
    return fig

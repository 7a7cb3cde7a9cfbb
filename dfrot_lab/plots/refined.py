"""Figures of notebook 04: R1 refined by DFRot."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dfrot_lab.plots import style
from dfrot_lab.plots.style import COLOUR, COLUMN, LINE, MARKER, PAGE, array, figure, number, power
from dfrot_lab.plots.token_errors import scatter_legend, scatter_panel

__all__ = [
    "dfrot_perplexity",
    "dfrot_scatter",
    "loss_curves",
    "massive_token",
    "rotation_distance",
]

NOTEBOOK = "04_dfrot"
STARTS = ("RO", "RH")
TOKEN = ("NR", "RO", "RH", "DFRot")


def _halves(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(iteration, loss) with both half steps: quantized at t, rotated at t + ½."""
    pairs = np.stack([array(row["quantized"]), array(row["rotated"])], axis=1)
    return np.arange(pairs.size) / 2, pairs.ravel()


def _loss_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for start in STARTS:
        rows = [r for r in result["losses"] if r["start"] == start]
        if rows:
            change = np.mean([_halves(r)[1][-1] / _halves(r)[1][0] - 1 for r in rows])
            told.append(f"{change:+.0%} from {start}".replace("%", " %").replace("-", "−"))
    first = result["losses"][0]
    return {
        "change": ", ".join(told),
        "iterations": style.count(len(first["quantized"]), "iteration"),
        "seeds": style.count(len({r["seed"] for r in result["losses"]}), "seed"),
        "rows": f"{first['rows']:,}",
        "massive_rows": style.count(first["massive_rows"], "massive one"),
    }  # fmt: skip


@figure(NOTEBOOK, _loss_numbers)
def loss_curves(result: dict[str, Any]) -> Figure:
    """Loss at every half step from both starts, one thin line a seed."""
    fig = style.new(COLUMN, 2.4)
    ax = fig.add_subplot()
    handles, everything = [], []
    for start in STARTS:
        rows = [r for r in result["losses"] if r["start"] == start]
        look = {"color": COLOUR["DFRot"], "ls": LINE[f"DFRot({start})"]}
        first = {"marker": MARKER[start], "mfc": COLOUR[start], "mec": COLOUR[start], "ms": 4}
        for r in rows:
            x, y = _halves(r)
            everything += list(y)
            ax.plot(x, y, **look, lw=0.8, alpha=0.8)
            ax.plot(x[0], y[0], ls="", zorder=3, **first)
        if rows:
            handles.append(Line2D([], [], **look, **first, lw=0.9, label=f"from {start}"))
    ax.set_yscale("log")
    ax.set_ylim(*style.limits(everything, log=True))
    style.log_ticks(ax.yaxis, *ax.get_ylim())
    ax.grid(axis="y")
    ax.set(xlabel="iteration (two half steps each)", ylabel="weighted relative error")
    ax.xaxis.get_major_locator().set_params(integer=True)
    fig.legend(handles=handles, loc="outside upper right", ncols=2)
    if result["losses"] and not any(r["massive_rows"] for r in result["losses"]):
        style.note(ax, "no massive token: no row was weighted", 0.97, 0.95, ha="right", va="top")
    return fig


def _token_numbers(result: dict[str, Any]) -> dict[str, Any]:
    token = result["token"]
    if not token or not token.get("rotations"):
        return {"text": "no massive token", "index": "none", "site": "no site", "errors": "none"}
    found = token["rotations"]
    errors = ", ".join(f"{n} {number(found[n]['squared_error'])}" for n in TOKEN if n in found)
    return {
        "text": f"“{style.visible(token['text']).replace(chr(92), '')}”",
        "index": f"{token['index']:,}",
        "site": token["site"],
        "errors": errors,
    }


@figure(NOTEBOOK, _token_numbers)
def massive_token(result: dict[str, Any]) -> Figure:
    """One massive token under NR, RO, RH and DFRot: Quant X against X, and the squared error."""
    found = (result["token"] or {}).get("rotations", {})
    names = [n for n in TOKEN if n in found]
    fig = style.new(PAGE, 2.0)
    if not names:
        ax = fig.add_subplot()
        ax.set_axis_off()
        style.note(ax, "this model has no massive token at the site")
        return fig
    for ax, name in zip(fig.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        x, q = array(found[name]["x"]), array(found[name]["q"])
        both = style.limits([*x, *q], margin=0.08)
        for level in np.unique(q[np.isfinite(q)]):
            ax.axhline(level, color="#E4E4E4", lw=0.5, zorder=0)
        ax.plot(both, both, ls="--", lw=0.7, color=COLOUR["ink"], zorder=1)
        ax.plot(x, q, MARKER[name], ms=2.6, mew=0, color=COLOUR[name], alpha=0.6, zorder=2)
        ax.set(xlim=both, ylim=both, aspect="equal", xlabel="$X$")
        ax.locator_params(nbins=4)
        error = number(found[name]["squared_error"])
        ax.set_title(f"{name}, error {error}", color=COLOUR[name], weight="bold", loc="center")
    fig.axes[0].set_ylabel("Quant $X$")
    return fig


def _dfrot_numbers(result: dict[str, Any]) -> dict[str, Any]:
    found = result["scatter"]
    before, after, massive = array(found["RH"]), array(found["DFRot"]), found["massive"]
    normal = np.setdiff1d(np.arange(len(before)), massive)

    def change(rows: Any) -> str:
        if not len(rows):
            return "there is none"
        return f"{number(before[rows].mean())} → {number(after[rows].mean())}"

    below = float(np.mean(after < before))
    return {
        "site": found["site"],
        "tokens": f"{len(before):,}",
        "massive": change(massive),
        "normal": change(normal),
        "below": f"{100 * below:.0f} %",
    }


@figure(NOTEBOOK, _dfrot_numbers)
def dfrot_scatter(result: dict[str, Any]) -> Figure:
    """‖x − Q(x)‖² of each token under RH and under DFRot."""
    found = result["scatter"]
    x, y = array(found["RH"]), array(found["DFRot"])
    fig = style.new(COLUMN, 3.3)
    ax = fig.add_subplot()
    scatter_panel(ax, x, y, found["massive"], style.limits([*x, *y], log=True))
    ax.set_xlabel("$E$(RH)", color=COLOUR["RH"])
    ax.set_ylabel("$E$(DFRot)", color=COLOUR["DFRot"])
    scatter_legend(fig, floor=False)
    return fig


def _floating_point(result: dict[str, Any], bits: str) -> float:
    """FP's perplexity on the windows measured at `bits`, NaN if it was measured on fewer."""
    windows = min(r["windows"] for r in result["rows"] if r["bits"] == bits)
    for r in result["rows"]:
        if r["rotation"] == "FP" and len(r["nll"]) >= windows:
            return float(np.exp(array(r["nll"][:windows]).mean()))
    return math.nan


def _perplexity_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, list[str]] = {}
    for bits, start, cells in _pairs(result):
        pair = [list(cells.get(n, {}).values()) for n in (start, f"DFRot({start})")]
        if all(pair):
            means = " → ".join(number(np.mean(v)) for v in pair)
            told.setdefault(bits, []).append(f"{start} {means}")
    seeds = {
        r["seed"] for r in result["rows"] if r["rotation"] in (*STARTS, "DFRot(RO)", "DFRot(RH)")
    }
    windows = {r["bits"]: r["windows"] for r in result["rows"] if r["rotation"] != "FP"}
    return {
        "windows": ", ".join(f"{style.count(n, 'window')} at {b}" for b, n in windows.items()),
        "means": "; ".join(f"{b}: {', '.join(t)}" for b, t in told.items()) or "nothing to compare",
        "seeds": style.count(len(seeds), "seed"),
    }


def _pairs(result: dict[str, Any]) -> list[tuple[str, str, dict[str, dict[int, float]]]]:
    """[(bits, start, {rotation: {seed: perplexity}})], a start and what is refined from it."""
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for r in result["rows"]:
        start = r["rotation"].removeprefix("DFRot(").removesuffix(")")
        if r["keep"] == "none" and start in STARTS:
            both = found.setdefault((r["bits"], start), {})
            both.setdefault(r["rotation"], {})[r["seed"]] = float(array(r["ppl"]))
    bits = list(dict.fromkeys(b for b, _ in found))
    return [(b, s, found[b, s]) for b in bits for s in STARTS if (b, s) in found]


@figure(NOTEBOOK, _perplexity_numbers)
def dfrot_perplexity(result: dict[str, Any]) -> Figure:
    """Perplexity before and after, a panel with its own scale for each setting of bits and start."""
    pairs = _pairs(result)
    fig = style.new(PAGE if len(pairs) > 1 else COLUMN, 2.5)
    axes = fig.subplots(1, max(len(pairs), 1), squeeze=False)[0]
    for ax, (bits, start, cells) in zip(axes, pairs, strict=False):
        _before_and_after(ax, start, cells)
        fp = _floating_point(result, bits)
        below = f"\nFP {number(fp, 1)}" if math.isfinite(fp) else ""
        ax.set_title(f"{bits}, from {start}{below}")
    axes[0].set_ylabel("perplexity")
    if not pairs:
        style.note(axes[0], "no perplexity was measured")
    return fig


def _before_and_after(ax: Axes, start: str, cells: dict[str, dict[int, float]]) -> None:
    """Means as large markers, told beside them; thin lines join the start and R1 of a seed."""
    names = (start, f"DFRot({start})")
    values = {n: array(list(cells.get(n, {}).values())) for n in names}
    finite = {n: v for n, v in values.items() if len(v) and np.isfinite(v).all()}
    hidden = [f"{n}: ∞" for n, v in values.items() if len(v) and n not in finite]
    everything = [x for v in finite.values() for x in v]
    if log := style.wide(everything):
        ax.set_yscale("log")
    ax.set_ylim(*style.limits(everything, log=log, margin=0.2))
    if log:
        style.log_ticks(ax.yaxis, *ax.get_ylim())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(6))
    for seed in sorted(set(cells.get(names[0], {})) & set(cells.get(names[1], {}))):
        y = [cells[n][seed] for n in names]
        if np.isfinite(y).all():
            ax.plot([0, 1], y, color=COLOUR["ink"], lw=0.6, alpha=0.55, marker=".", ms=3, zorder=2)
    for x, (name, v) in zip((0, 1), values.items(), strict=True):
        if name in finite:
            ink = COLOUR[name]
            ax.plot(x, v.mean(), MARKER[name], color=ink, ms=6, mec="white", mew=0.6, zorder=4)
            ax.annotate(number(v.mean(), 1), (x, v.mean()), (-6 if x == 0 else 6, 0), fontsize=7,
                        textcoords="offset points", ha="right" if x == 0 else "left", va="center",
                        color=ink, weight="bold")  # fmt: skip
    if set(finite) == set(names):
        change = finite[names[1]].mean() / finite[names[0]].mean() - 1
        told = f"{100 * change:+.1f} %" if abs(change) < 0.1 else f"{100 * change:+.0f} %"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # over the grid
        style.note(ax, told.replace("-", "−"), 0.5, 0.99, va="top", color=COLOUR["ink"], bbox=box)
    elif hidden:
        style.note(ax, "\n".join(hidden), 0.98, 0.97, ha="right", va="top")
    ax.set_xticks([0, 1], names)
    ax.set_xlim(-0.75, 1.75)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")


def _distance_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for start in STARTS:
        rows = [r for r in result["losses"] if r["start"] == start]
        if rows:
            moved = float(np.mean(array([r["relative_distance"] for r in rows])))
            cosine = float(np.mean(array([r["mean_column_cosine"] for r in rows])))
            told.append(f"from {start} {number(moved)} (mean cosine of columns {number(cosine)})")
    worst = max(
        (float(array(r["orthogonality_error"])) for r in result["losses"]), default=math.nan
    )
    return {"moved": ", ".join(told), "orthogonality": power(worst)}


@figure(NOTEBOOK, _distance_numbers)
def rotation_distance(result: dict[str, Any]) -> Figure:
    """‖R − R₀‖ / √(2d): how far R1 has moved from its start, 1 being unrelated."""
    fig = style.new(COLUMN, 1.25)
    ax = fig.add_subplot()
    shown = [s for s in STARTS if any(r["start"] == s for r in result["losses"])]
    for i, start in enumerate(shown):
        moved = array([r["relative_distance"] for r in result["losses"] if r["start"] == start])
        ax.plot([0, moved.mean()], [i, i], color=COLOUR["DFRot"], lw=0.8, zorder=1)
        ax.plot(
            moved,
            np.full(len(moved), i),
            MARKER[f"DFRot({start})"],
            color=COLOUR["DFRot"],
            ms=5,
            mec="white",
            zorder=2,
        )
        ax.annotate(number(moved.mean()), (moved.max(), i), (6, 0), textcoords="offset points",
                    va="center", fontsize=7)  # fmt: skip
    ax.axvline(1, color=COLOUR["ink"], ls="--", lw=0.8)
    ax.text(
        0.99,
        0.5,
        "unrelated",
        transform=ax.get_xaxis_transform(),
        fontsize=7,
        ha="right",
        va="center",
    )
    ax.set_yticks(range(len(shown)), [f"DFRot({s})" for s in shown])
    ax.set(xlim=(0, 1.02), ylim=(len(shown) - 0.4, -0.6))
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(r"$\Vert R_1 - R_0\Vert_F\,/\,\sqrt{2d}$ (0: the start itself)")
    return fig

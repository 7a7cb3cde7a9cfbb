"""Figures of notebook 05: the rows of the paper's tables."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dfrot_lab.plots import style
from dfrot_lab.plots.kept_tokens import dots
from dfrot_lab.plots.style import COLOUR, LINE, MARKER, PAGE, array, figure, number

__all__ = ["calibration_ablation", "tables_by_bits"]

NOTEBOOK = "05_tables"
ORDER = ("RO", "DFRot(RO)", "RH", "DFRot(RH)")
COLUMNS = (("rtn", "none"), ("gptq", "none"), ("gptq", "massive"))
TICKS = ("RTN", "GPTQ", "GPTQ,\nmassive\nkept")


def _cells(result: dict[str, Any]) -> dict[tuple[str, str, str, str], np.ndarray]:
    """(bits, method, keep, rotation) → perplexities by seed; every kind of GPTQ is "gptq"."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for r in result["rows"]:
        if r["rotation"] != "FP":
            key = (r["bits"], r["method"].removesuffix("-shared"), r["keep"], r["rotation"])
            found.setdefault(key, []).append(float(array(r["ppl"])))
    return {k: np.array(v) for k, v in found.items()}


def _fp(result: dict[str, Any]) -> float:
    return float(array(next(r["ppl"] for r in result["rows"] if r["rotation"] == "FP")))


def _rows_numbers(result: dict[str, Any]) -> dict[str, Any]:
    cells, told = _cells(result), []
    for bits in dict.fromkeys(b for b, *_ in cells):
        parts = [
            f"{style.label(n)} {number(cells[bits, 'gptq', 'none', n].mean())}"
            for n in ("NR", *ORDER)
            if (bits, "gptq", "none", n) in cells
        ]
        told.append(f"{bits}: " + ", ".join(parts))
    seeds = {r["seed"] for r in result["rows"]}
    windows = max(r["windows"] for r in result["rows"])
    return {
        "means": "; ".join(told),
        "fp": number(_fp(result)),
        "seeds": style.count(len(seeds), "seed"),
        "windows": style.count(windows, "window"),
    }


@figure(NOTEBOOK, _rows_numbers)
def tables_by_bits(result: dict[str, Any]) -> Figure:
    """Tables 1 and 2 at a glance: a panel for each setting of bits, RTN, GPTQ and massive kept."""
    cells = _cells(result)
    bits = list(dict.fromkeys(b for b, *_ in cells))
    fig = style.new(PAGE, 2.9)
    axes = fig.subplots(1, len(bits), squeeze=False)[0]
    for ax, b in zip(axes, bits, strict=True):
        _panel(ax, {k[1:]: v for k, v in cells.items() if k[0] == b}, _fp(result))
        ax.set_title(b)
    axes[0].set_ylabel("perplexity")
    handles = [
        Line2D([], [], ls="", marker=MARKER[n], color=COLOUR[n], label=style.label(n))
        for n in ORDER
    ]
    told = f"floating point, {number(_fp(result))}"
    handles.append(Line2D([], [], color=COLOUR["FP"], ls=LINE["FP"], lw=0.9, label=told))
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig


def _panel(ax: Axes, cells: dict[tuple[str, str, str], np.ndarray], fp: float) -> None:
    everything = [fp]
    for i, (method, keep) in enumerate(COLUMNS):
        for k, name in enumerate(ORDER):
            values = cells.get((method, keep, name), np.empty(0))
            values = values[np.isfinite(values)]
            if len(values):
                # the range: an sd as wide as the mean says nothing on a log scale
                dots(ax, i + 0.2 * (k - 1.5), values, name, size=4.5, aside=0.07, whole=True)
                everything += list(values)
    log = max(everything) > 4 * min(everything)
    if log:
        ax.set_yscale("log")
    ax.set_ylim(*style.limits(everything, log=log, margin=0.1))
    if log:
        style.log_ticks(ax.yaxis, *ax.get_ylim())
    ax.axhline(fp, color=COLOUR["FP"], ls=LINE["FP"], lw=0.9, zorder=1)
    nr = cells.get(("gptq", "none", "NR"))
    if nr is not None:
        style.note(ax, f"NR, GPTQ {number(nr.mean(), 0)}", 0.98, 0.98, ha="right", va="top")
    ax.set_xticks(range(len(TICKS)), TICKS)
    ax.set_xlim(-0.55, len(TICKS) - 0.45)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")


def _start(result: dict[str, Any]) -> float:
    """Perplexity of RH, seed 0, quantized as the rotations of Table 3; NaN where it was not measured."""
    like = result["calibration"]["sample"][0]
    wanted = {"rotation": "RH", "keep": "none", "seed": 0, "bits": like["bits"]}
    wanted["method"] = like["method"]
    rows = [r for r in result.get("rows", []) if wanted.items() <= r.items()]
    return float(array(rows[0]["ppl"])) if rows else np.nan


def _by_sites(result: dict[str, Any]) -> list[tuple[int, float]]:
    """(norm sites used, perplexity) in order; the first sample, R1 as it always is, has all of them."""
    found = [(r["used"], float(array(r["ppl"]))) for r in result["calibration"]["sites"]]
    every = result["calibration"]["sites"][0]["of"]
    first = [r for r in result["calibration"]["sample"] if r["index"] == 0]
    if first and every not in dict(found):
        found.append((every, float(array(first[0]["ppl"]))))
    return sorted(found)


def _calibration_numbers(result: dict[str, Any]) -> dict[str, Any]:
    sample, sites = result["calibration"]["sample"], result["calibration"]["sites"]
    values = array([r["ppl"] for r in sample])
    told = ", ".join(
        f"{n} of {sites[0]['of']}: {number(p)}" for n, p in reversed(_by_sites(result))
    )
    sd = values.std(ddof=1) if len(values) > 1 else 0.0
    return {
        "bits": sample[0]["bits"],
        "samples": style.count(len(sample), "calibration sample"),
        "spread": f"{number(values.mean())} ± {number(sd)} (sd {number(100 * sd / values.mean())} % "
        "of the mean)",
        "sites": told,
        "RH": number(start) if np.isfinite(start := _start(result)) else "not measured",
    }


@figure(NOTEBOOK, _calibration_numbers)
def calibration_ablation(result: dict[str, Any]) -> Figure:
    """Table 3: perplexity of DFRot(RH) by calibration sample, and by number of norm sites used."""
    sample, sites = result["calibration"]["sample"], result["calibration"]["sites"]
    values, start = array([r["ppl"] for r in sample]), _start(result)
    sd = values.std(ddof=1) if len(values) > 1 else 0.0
    fig = style.new(PAGE, 2.3)
    left, right = fig.subplots(1, 2, sharey=True)
    ink = COLOUR["DFRot"]
    look = {"color": ink, "marker": MARKER["DFRot(RH)"], "ms": 4.5, "ls": ""}
    for ax in (left, right):
        ax.axhline(values.mean(), color=ink, lw=0.8, ls=":", zorder=1)
        ax.axhspan(values.mean() - sd, values.mean() + sd, color=ink, alpha=0.15, lw=0, zorder=0)
        if np.isfinite(start):
            ax.axhline(start, color=COLOUR["RH"], ls=(0, (4, 2)), lw=0.9, zorder=1)
        ax.grid(axis="y")
    left.plot([r["index"] + 1 for r in sample], values, **look)
    left.set_xticks([r["index"] + 1 for r in sample])
    left.set(xlabel="calibration sample", ylabel=f"perplexity at {sample[0]['bits']}")
    used, ppl = zip(*_by_sites(result), strict=True)
    right.plot(used, ppl, **look)
    right.set_xticks(used, [str(n) for n in used])
    right.set_xlabel(f"norm sites used, of {sites[0]['of']}")
    left.set_ylim(*style.limits([*values, *ppl, start, values.mean() - sd, values.mean() + sd],
                                margin=0.12))  # fmt: skip
    handles = [Line2D([], [], **look, label="DFRot(RH)")]
    handles.append(Patch(fc=ink, alpha=0.15, label="mean ± sd over samples"))
    if np.isfinite(start):
        told = f"RH itself, {number(start)}"
        handles.append(Line2D([], [], color=COLOUR["RH"], ls=(0, (4, 2)), lw=0.9, label=told))
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig

"""Figures of notebook 01: what rotations leave alone, and what they do to outliers."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dfrot_lab.plots import style
from dfrot_lab.plots.style import COLOUR, COLUMN, LINE, PAGE, array, figure, number, power

__all__ = ["logit_errors", "magnitude_surfaces", "outliers_by_layer", "top_activations"]

NOTEBOOK = "01_rotation_invariance"
ROTATIONS = ("NR", "RO", "RH")
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}  # the rule of the notebook's first claim
MARKER = {"float32": "o", "float64": "D"}


def _worst(result: dict[str, Any], dtype: str) -> str:
    found = [float(array(r["relative_error"])) for r in result["logits"] if r["dtype"] == dtype]
    return power(max(found)) if found else "not measured"


def _logit_numbers(result: dict[str, Any]) -> dict[str, Any]:
    stages = len({r["stage"] for r in result["logits"]})
    return {
        "fp32": _worst(result, "float32"),
        "fp64": _worst(result, "float64"),
        "stages": style.count(stages, "stage"),
    }


@figure(NOTEBOOK, _logit_numbers)
def logit_errors(result: dict[str, Any]) -> Figure:
    """Relative logit error after each thing merged, fp32 and fp64, against the tolerances."""
    stages = list(dict.fromkeys(r["stage"] for r in result["logits"]))
    fig = style.new(COLUMN, 0.9 + 0.24 * len(stages))
    ax = fig.add_subplot()
    smallest = 1e-17
    for dtype, tolerance in TOLERANCE.items():
        rows = [r for r in result["logits"] if r["dtype"] == dtype]
        x = array([r["relative_error"] for r in rows])
        y = [stages.index(r["stage"]) for r in rows]
        name = dtype.replace("float", "fp")
        face = COLOUR["RH"] if dtype == "float32" else "white"
        options = {"color": COLOUR["RH"], "mfc": face, "ls": "", "ms": 4.5, "label": name}
        ax.plot(np.maximum(x, smallest), y, MARKER[dtype], **options)
        ax.axvline(tolerance, color=COLOUR["ink"], lw=0.8, ls="--")
        text = f"{name} tolerance"
        ax.text(tolerance, -0.72, text, fontsize=7, ha="center", va="bottom", color=COLOUR["ink"])
        for value, row in zip(x, y, strict=True):
            if value < smallest:
                ax.annotate("0", (smallest, row), (4, 0), textcoords="offset points", va="center")
    ax.set_xscale("log")
    ax.set_xlim(smallest, 1e-2)
    ax.set_xticks([1e-16, 1e-12, 1e-8, 1e-4])
    ax.set_ylim(len(stages) - 0.5, -0.5)
    ax.set_yticks(range(len(stages)), stages)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y")
    ax.set_xlabel(r"max |$\Delta$logit| / max |logit|")
    fig.legend(loc="outside lower right", ncols=2)
    return fig


def _surface_numbers(result: dict[str, Any]) -> dict[str, Any]:
    found = result["surfaces"]
    largest = {n: float(array(found[n]).max()) for n in ROTATIONS}
    return {
        "site": found["site"],
        "tokens": len(found["NR"]),
        "channels": f"{found['channels']:,}",
        "drop": number(largest["NR"] / max(largest["RO"], largest["RH"]), 1),
    } | {n: number(v, 1) for n, v in largest.items()}


@figure(NOTEBOOK, _surface_numbers)
def magnitude_surfaces(result: dict[str, Any]) -> Figure:
    """|x| by token and channel at one site under NR, RO and RH, on one scale."""
    return surface_row(result["surfaces"], ROTATIONS)


def surface_row(found: dict[str, Any], names: tuple[str, ...]) -> Figure:
    """Three surfaces of |x| on one scale, by rotation; found: as `studies.invariance.surfaces`."""
    heights = {n: array(found[n]) for n in names}
    top = max(float(h.max()) for h in heights.values())
    fig = style.new(PAGE, 2.15)
    fig.set_layout_engine("none")
    for i, (name, z) in enumerate(heights.items()):
        ax = fig.add_axes((-0.025 + 0.33 * i, -0.06, 0.36, 1.12), projection="3d")
        ax.patch.set_alpha(0)
        channels = np.linspace(0, found["channels"], z.shape[1])
        x, y = np.meshgrid(channels, np.arange(z.shape[0]))
        ink = np.array(to_rgb(COLOUR[name]))
        shades = LinearSegmentedColormap.from_list(name, [0.3 + 0.7 * ink, 0.85 * ink, 0.4 * ink])
        ax.plot_surface(
            x, y, z, rcount=z.shape[0], ccount=z.shape[1], cmap=shades, norm=PowerNorm(0.6),
            edgecolor="none", antialiased=False, rasterized=True,
        )  # fmt: skip
        bare_3d(ax)
        ax.set(xlim=(0, found["channels"]), ylim=(0, max(z.shape[0] - 1, 1)), zlim=(0, top))
        ax.set_xlabel("channel", labelpad=-7)
        ax.set_ylabel("token", labelpad=-7)
        ax.locator_params(nbins=4)
        ax.set_box_aspect((1.3, 1, 0.8), zoom=0.9)
        ax.view_init(elev=24, azim=-56)
        title = f"{style.label(name)}: $|x|$ up to {number(z.max(), 1)}"
        fig.text(0.155 + 0.33 * i, 0.93, title, ha="center", weight="bold", color=COLOUR[name])
    return fig


def bare_3d(ax: Any) -> None:
    """White panes, hairline grid, ticks close to their axis."""
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_pane_color((1, 1, 1, 0))
        axis._axinfo["grid"].update(color="#DDDDDD", linewidth=0.4)
        axis.line.set_linewidth(0.5)
    ax.tick_params(labelsize=6, pad=-3)
    ax.tick_params(axis="z", pad=-1)


def _outlier_numbers(result: dict[str, Any]) -> dict[str, Any]:
    worst = {}
    for name in ROTATIONS:
        rows = [r for r in result["outliers"] if r["rotation"] == name]
        for key in ("peak", "kurtosis"):
            worst[f"{key}_{name}"] = number(array([r[f"{key}_mean"] for r in rows]).max(), 1)
    return worst | {"sites": style.count(len({r["site"] for r in result["outliers"]}), "site")}


@figure(NOTEBOOK, _outlier_numbers)
def outliers_by_layer(result: dict[str, Any]) -> Figure:
    """Mean max|x|/rms and mean kurtosis at every norm output, by rotation."""
    fig = style.new(PAGE, 3.3)
    axes = fig.subplots(2, 2, sharex=True, sharey="row")
    titles = {"peak_mean": r"max $|x|$ / rms", "kurtosis_mean": "kurtosis"}
    for row, (key, title) in zip(axes, titles.items(), strict=True):
        everything = array([r[key] for r in result["outliers"]])
        for ax, kind in zip(row, ("attention", "mlp"), strict=True):
            for name in ROTATIONS:
                rows = sorted(
                    (style.site_order(r["site"])[0], float(array(r[key])))
                    for r in result["outliers"]
                    if r["rotation"] == name and style.site_order(r["site"])[1] == kind
                )
                x, y = zip(*rows, strict=True) if rows else ((), ())
                look = {"color": COLOUR[name], "marker": style.MARKER[name], "ls": LINE[name]}
                ax.plot(x, y, **look, ms=2.8, label=style.label(name))
            ax.set_yscale("log")
            ax.grid(axis="y")
        row[0].set_ylim(*style.limits([*everything, *([3.0] if "kurt" in key else [])], log=True))
        style.log_ticks(row[0].yaxis, *row[0].get_ylim())
        row[0].set_ylabel(f"mean {title}")
    for ax in axes[1]:
        ax.axhline(3, color=COLOUR["ink"], lw=0.8, ls=(0, (1, 2)), zorder=0)
        ax.set_xlabel("layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax, kind in zip(axes[0], ("attention input", "MLP input"), strict=True):
        ax.set_title(kind)
    handles, names = axes[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=COLOUR["ink"], lw=0.8, ls=(0, (1, 2))))
    fig.legend(handles, [*names, "Gaussian (kurtosis 3)"], loc="outside upper right", ncols=4)
    return fig


def _top_numbers(result: dict[str, Any]) -> dict[str, Any]:
    row = max(result["top_activations"], key=lambda r: float(array(r["top"]).max()))
    largest, median = float(array(row["top"]).max()), float(array(row["median"]))
    return {
        "layers": style.count(len(result["top_activations"]), "layer"),
        "largest": number(largest, 0),
        "ratio": number(largest / median if median else np.inf, 0),
        "layer": row["layer"],
        "token": row["token"],
        "channel": row["channel"],
    }


@figure(NOTEBOOK, _top_numbers)
def top_activations(result: dict[str, Any]) -> Figure:
    """The three largest |h| of the residual stream after each layer, 99.9 % quantile and median."""
    rows = sorted(result["top_activations"], key=lambda r: r["layer"])
    fig = style.new(COLUMN, 2.5)
    ax = fig.add_subplot()
    x = [r["layer"] for r in rows]
    looks = [("*", "-", 5.5), ("v", "--", 3), ("d", ":", 3)]
    names = ["largest", "2nd", "3rd"]
    for i, ((marker, line, size), name) in enumerate(zip(looks, names, strict=True)):
        y = [float(array(r["top"])[i]) if len(r["top"]) > i else np.nan for r in rows]
        ax.plot(x, y, line, color=COLOUR["massive"], marker=marker, ms=size, mew=0.3, label=name)
    for key, name, line in (("q999", "99.9 %", "-."), ("median", "median", "-")):
        ax.plot(x, array([r[key] for r in rows]), line, color=COLOUR["ink"], label=name)
    ax.set_yscale("log")
    ax.grid(axis="y")
    ax.set(xlabel="layer", ylabel="$|h|$ in the residual stream")
    ax.xaxis.get_major_locator().set_params(integer=True)
    fig.legend(loc="outside upper center", ncols=5, handlelength=1.6, columnspacing=0.8)
    return fig

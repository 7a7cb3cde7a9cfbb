"""Figures of notebook 07: how codes are packed, and what a packed model takes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from dfrot_lab.plots import style
from dfrot_lab.plots.style import COLOUR, PAGE, figure, number

__all__ = ["nibble_packing", "packed_memory"]

NOTEBOOK = "07_int4_kernels"
LOW, HIGH = COLOUR["RH"], COLOUR["RO"]


# --- packing --------------------------------------------------------------------------------------


def _packing_numbers(result: dict[str, Any]) -> dict[str, Any]:
    found = result["nibbles"]
    low, high, byte = found["codes"]["low"][0], found["codes"]["high"][0], found["bytes"][0]
    return {
        "site": found["site"],
        "channels": f"{found['channels']:,}",
        "half": f"{found['channels'] // 2:,}",
        "scale": number(found["scale"], 3),
        "zero": _signed(found["zero"]),
        "first": f"{_signed(low)} and {_signed(high)} become the byte {_signed(byte)}",
    }


def _signed(n: int) -> str:
    return str(n).replace("-", "−")


def _bits(code: int) -> str:
    return format(code & 15, "04b")


def _tint(ink: str, share: float = 0.22) -> tuple[float, ...]:
    return tuple(1 - share + share * np.array(to_rgb(ink)))


def _cell(ax: Axes, x: float, y: float, width: float, ink: str) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x, y), width, 0.9, boxstyle="round,pad=0,rounding_size=0.08",
            fc=_tint(ink), ec=ink, lw=0.8, zorder=2,
        )
    )  # fmt: skip


@figure(NOTEBOOK, _packing_numbers)
def nibble_packing(result: dict[str, Any]) -> Figure:
    """Numbers of one row, their codes, and the bytes that hold code j and code j + K/2."""
    found = result["nibbles"]
    n, half = len(found["bytes"]), found["channels"] // 2
    fig = style.new(PAGE, 2.75)
    fig.set_layout_engine("none")
    ax = fig.add_axes((0.0, 0.0, 1.0, 1.0))
    ax.set(xlim=(-2.3, 2 * n + 1.95), ylim=(-0.62, 5.62))
    ax.axis("off")
    mono = {"family": "DejaVu Sans Mono", "ha": "center", "va": "center", "zorder": 5}
    at = {"low": 0.0, "high": n + 1.25}
    for name, ink in (("low", LOW), ("high", HIGH)):
        for j, (value, code) in enumerate(
            zip(found["values"][name], found["codes"][name], strict=True)
        ):
            x = at[name] + j + 0.5
            channel = j + (half if name == "high" else 0)
            ax.text(x, 4.92, f"{channel}", ha="center", va="center", fontsize=6.5, color="#777777")
            ax.text(x, 4.42, f"{value:.2f}".replace("-", "−"), ha="center", va="center", fontsize=8)
            ax.plot([x, x], [4.08, 3.82], color="#999999", lw=0.7)
            _cell(ax, x - 0.44, 2.86, 0.88, ink)
            ax.text(x, 3.47, _signed(code), ha="center", va="center", fontsize=9, zorder=5)
            ax.text(x, 3.09, _bits(code), fontsize=7, color=ink, **mono)
        dots = {"ha": "center", "va": "center", "fontsize": 9, "color": "#777777"}
        for y in (4.42, 3.3):
            ax.text(at[name] + n + 0.28, y, "…", **dots)
    left, width = (2 * n + 1.25 - 1.85 * n) / 2, 1.7
    for j, byte in enumerate(found["bytes"]):
        x = left + 1.85 * j
        for name, ink, shift in (("high", HIGH, 0.0), ("low", LOW, width / 2)):
            ax.add_patch(
                Rectangle((x + shift, 0.42), width / 2, 0.8, fc=_tint(ink), ec=ink, lw=0.8)
            )
            ax.text(x + shift + width / 4, 0.82, _bits(found["codes"][name][j]), fontsize=8,
                    color=ink, **mono)  # fmt: skip
            start, end = (at[name] + j + 0.5, 2.8), (x + shift + width / 4, 1.28)
            ax.annotate("", end, start, zorder=1, arrowprops={
                "arrowstyle": "-|>,head_length=0.28,head_width=0.12", "color": ink, "lw": 0.8,
                "connectionstyle": "arc3,rad=0", "shrinkA": 0, "shrinkB": 1, "alpha": 0.75,
            })  # fmt: skip
        ax.text(x + width / 2, 0.08, _signed(byte), ha="center", va="center", fontsize=8)
        ax.text(x + width / 2, -0.32, f"byte {j}", ha="center", va="center", fontsize=6.5,
                color="#777777")  # fmt: skip
    ax.text(left + 1.85 * n + 0.1, 0.82, "…", ha="center", va="center", fontsize=9, color="#777777")
    for y, text in ((4.92, "channel"), (4.42, "number x"), (3.3, "code q, 4 bits"),
                    (0.82, "packed, 8 bits"), (0.08, "as int8")):  # fmt: skip
        ax.text(-2.2, y, text, ha="left", va="center", fontsize=7, color="#444444")
    ax.text(at["low"] + n / 2, 5.35, "first half", ha="center", va="center", fontsize=7, color=LOW)
    ax.text(
        at["high"] + n / 2, 5.35, "second half", ha="center", va="center", fontsize=7, color=HIGH
    )
    return fig


# --- memory ---------------------------------------------------------------------------------------


def _size(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:,.{max(0, 2 - int(math.log10(n / size)))}f} {unit}"
    return f"{n:.0f} B"


def _total(found: dict[str, Any]) -> tuple[int, int]:
    return tuple(sum(found[k].values()) for k in ("fp16", "packed"))


def _memory_numbers(result: dict[str, Any]) -> dict[str, Any]:
    found = result["memory"]
    a, b = _total(found)
    large = _total(found["large"])
    peaks = (
        f"{_size(r['fp16'])} and {_size(r['packed'])} at {style.count(r['tokens'], 'token')}"
        for r in found["peak"]
    )
    return {
        "fp16": _size(a),
        "packed": _size(b),
        "ratio": number(a / b),
        "linears": number(found["fp16"]["linears"] / found["packed"]["linears"]),
        "peaks": "; ".join(peaks),
        "name": found["large"]["name"],
        "large": f"{_size(large[0])} and {_size(large[1])}, {large[0] / large[1]:.2f} times less",
    }


@figure(NOTEBOOK, _memory_numbers)
def packed_memory(result: dict[str, Any]) -> Figure:
    """Weights of the model, its peaks, and a large model's weights: FP16 above, packed below."""
    found = result["memory"]
    panels = [("weights", found, None)]
    panels += [(f"peak, {style.count(r['tokens'], 'token')}", found, r) for r in found["peak"]]
    panels.append((f"weights, {found['large']['name']}", found["large"], None))
    fig = style.new(PAGE, 1.75)
    axes = fig.subplots(1, len(panels), sharey=True)
    inks = {"linears": COLOUR["RH"], "rest": "#9AA5AE", "more": COLOUR["massive"]}
    most = {}  # one scale for the panels of a model
    for _, part, peak in panels:
        values = _total(part) if peak is None else (peak["fp16"], peak["packed"])
        most[id(part)] = max(*values, most.get(id(part), 0))
    for ax, (title, part, peak) in zip(axes, panels, strict=True):
        largest = most[id(part)]
        scale, unit = (
            (1e9, "GB") if largest >= 1e9 else (1e6, "MB") if largest >= 1e6 else (1e3, "kB")
        )
        for y, kind in enumerate(("fp16", "packed")):
            pieces = dict(part[kind])
            if peak is not None:
                pieces["more"] = max(0, peak[kind] - sum(pieces.values()))
            start = 0.0
            for name, value in pieces.items():
                ax.barh(y, value / scale, left=start, height=0.62, color=inks[name], lw=0)
                start += value / scale
            ax.annotate(f"{start:.3g}", (start, y), (3, 0), textcoords="offset points", va="center",
                        fontsize=7)  # fmt: skip
        ax.set_title(title)
        ax.set(xlim=(0, 1.22 * largest / scale), ylim=(1.5, -0.5), xlabel=unit)
        ax.set_yticks([0, 1], ["FP16", "packed"])
        ax.tick_params(axis="y", length=0)
        ax.xaxis.get_major_locator().set_params(nbins=3)
    names = ("linears of the layers", "embedding and head, FP16", "activations and temporaries")
    handles = [Patch(fc=ink, ec="none") for ink in inks.values()]
    fig.legend(handles, names, loc="outside upper left", ncols=3)
    return fig

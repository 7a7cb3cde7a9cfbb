"""Figures of notebook 07 that show what was timed: how fast packed products are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dfrot_lab.plots import style
from dfrot_lab.plots.int4_kernels import NOTEBOOK
from dfrot_lab.plots.style import COLOUR, PAGE, array, figure, number

__all__ = ["TIMED", "kernel_speed", "roofline"]

TIMED = ("roofline", "kernel_speed")  # drawn from speed.json, beside the result
# by what is computed: ours in colours, the baseline in ink
INK = {"W4A4": COLOUR["RH"], "quantize + W4A4": COLOUR["DFRot"], "W4A16": COLOUR["RH2"]}
SIGN = {"W4A4": "o", "quantize + W4A4": "D", "W4A16": "^"}
OTHER = {"hadamard_quantize": "P", "quantize_int4": "X", "decode_attention": "p"}
NAMES = {"hadamard_quantize": "Hadamard + quantize", "quantize_int4": "quantize"}
NAMES |= {"decode_attention": "KV4 attention"}


def _who(row: dict[str, Any]) -> str:
    return row["who"].removeprefix("dfrot ")


def _linear(speed: dict[str, Any]) -> list[dict[str, Any]]:
    """The products of ours and of the baseline."""
    return [
        r
        for r in speed["rows"]
        if r["op"] == "linear" and (r["who"] == speed["baseline"] or r["who"] in speed["ours"])
    ]


def _operations(row: dict[str, Any]) -> float:
    """Operations in 10¹² a call: as counted, or of a quantizer about 5 a number, log₂ K more for H."""
    if row["tflops"]:
        return row["tflops"] * row["ms50"] / 1e3
    turns = math.log2(row["k"]) if row["op"] == "hadamard_quantize" else 0
    return (5 + turns) * row["m"] * row["k"] / 1e12


def _points(speed: dict[str, Any]) -> list[tuple[str, str, float, float, int]]:
    """(what, op, operations a byte, TFLOP/s, tokens) of what the roofline shows."""
    rows = _linear(speed)
    rows += [r for r in speed["rows"] if r["op"] in OTHER and r["ours"]]
    found = []
    for r in rows:
        work, seconds = _operations(r), r["ms50"] / 1e3
        intensity = work * 1e12 / (r["gbs"] * 1e9 * seconds)
        what = _who(r) if r["op"] == "linear" else NAMES[r["op"]]
        found.append((what, r["op"], intensity, work / seconds, r["m"]))
    return found


def _where(speed: dict[str, Any]) -> str:
    return f"{speed['device']}, {speed['provenance']['date'][:10]}"


def _best(speed: dict[str, Any], who: str) -> dict[str, Any]:
    return max(
        (r for r in _linear(speed) if r["who"] == who and r["tflops"]), key=lambda r: r["tflops"]
    )


def _rate(tflops: float) -> str:
    return f"{tflops:.0f} TFLOP/s" if tflops >= 10 else f"{1e3 * tflops:.3g} GFLOP/s"


def _roofline_numbers(result: dict[str, Any]) -> dict[str, Any]:
    speed = result["speed"]
    products = {k: v for k, v in speed["ceilings"].items() if k != "copy" and v}
    best = (f"{who.removeprefix('dfrot ')} {_rate(_best(speed, who)['tflops'])}"
            for who in (speed["baseline"], *speed["ours"][:1]))  # fmt: skip
    older = sorted({NAMES[r["op"]] for r in speed["rows"] if r.get("of") and r["op"] in NAMES})
    return {
        "where": _where(speed),
        "copy": number(speed["ceilings"]["copy"], 0),
        "products": ", ".join(f"{k} {_rate(v)}" for k, v in products.items()),
        "best": ", ".join(best),
        "older": f" Of an earlier run: {', '.join(older)}." if older else "",
    }


@figure(NOTEBOOK, _roofline_numbers)
def roofline(result: dict[str, Any]) -> Figure:
    """Operations a second by operations a byte, beside plain products and a copy of the same run."""
    speed = result["speed"]
    roofs = {k: v for k, v in speed["ceilings"].items() if k != "copy" and v}
    copy = speed["ceilings"]["copy"] / 1e3  # TB/s: times FLOP/byte it is TFLOP/s
    points = _points(speed)
    unit, scale = ("10¹²", 1.0) if max(roofs.values()) > 10 else ("10⁹", 1e3)
    xlim = style.limits([*(p[2] for p in points), 1.5 * max(roofs.values()) / copy], log=True)
    # room for the names of the roofs
    xlim = (min(xlim[0], 0.04 * min(roofs.values()) / copy), xlim[1] * 16)
    fig = style.new(PAGE, 2.9)
    ax = fig.add_subplot()
    for i, (name, roof) in enumerate(sorted(roofs.items(), key=lambda kv: -kv[1])):
        x = np.array([xlim[0] if not i else roof / copy, roof / copy, xlim[1]])
        ax.plot(x, scale * np.minimum(copy * x, roof), color="#888888", lw=1.2, zorder=1)
        # the highest above its line and the next below: they may lie close together
        ax.text(xlim[1], scale * roof * (0.94 if i else 1.06),
                f"plain {name} product {scale * roof:,.0f} ", fontsize=7, ha="right",
                va="top" if i else "bottom", color=COLOUR["ink"])  # fmt: skip
    baseline = speed["baseline"]
    drawn: dict[str, Line2D] = {}
    for what, op, x, y, m in points:
        ink = COLOUR["FP"] if what == baseline else INK.get(what, COLOUR["massive"])
        sign = "s" if what == baseline else SIGN.get(what) or OTHER[op]
        face = "white" if what == baseline else ink
        size = _size(m) if op == "linear" else 5.0
        ax.plot(x, scale * y, sign, color=ink, mfc=face, ms=size, mew=0.7, alpha=0.9, zorder=3)
        drawn.setdefault(
            what, Line2D([], [], ls="", marker=sign, color=ink, mfc=face, ms=4.5, mew=0.7)
        )
    ys = [scale * p[3] for p in points] + [scale * v for v in roofs.values()]
    low, high = style.limits(ys, log=True)
    ax.set(xscale="log", yscale="log", xlim=xlim, ylim=(low / 1.3, high * 1.6))
    style.log_ticks(ax.xaxis, *xlim)
    style.log_ticks(ax.yaxis, *ax.get_ylim())
    top = min(0.55 * min(roofs.values()), 0.5 * ax.get_ylim()[1] / scale)
    ax.annotate(f"copy {speed['ceilings']['copy']:,.0f} GB/s", (top / copy, scale * top), (-4, 2),
                textcoords="offset points", fontsize=7, ha="right", va="bottom",
                color=COLOUR["ink"])  # fmt: skip
    ax.set(xlabel="operations a byte", ylabel=f"{unit} operations a second")
    ax.grid()
    tokens = sorted({m for _, op, _, _, m in points if op == "linear"})
    few = tokens if len(tokens) <= 3 else [tokens[0], tokens[len(tokens) // 2], tokens[-1]]
    for m in few:
        look = {"ls": "", "marker": "o", "color": "#888888", "ms": _size(m)}
        drawn[f"M = {m:,}"] = Line2D([], [], **look)
    fig.legend(
        drawn.values(), drawn, loc="outside right upper", title=_titled(speed), alignment="left"
    )
    return fig


def _size(tokens: int) -> float:
    """Of the sign for a product of so many tokens."""
    return 3.0 + 0.75 * math.log2(tokens) ** 0.8


def _titled(speed: dict[str, Any]) -> str:
    """Device and date, a part a line."""
    device, *more = speed["device"].split(", ")
    return "\n".join([device, *more, speed["provenance"]["date"][:10], ""])


def _ratios(speed: dict[str, Any]) -> dict[tuple[str, int, int], dict[str, dict[int, float]]]:
    """(shape, N, K) → what → tokens → times as fast as the baseline."""
    base = {
        (r["n"], r["k"], r["m"]): r["ms50"] for r in _linear(speed) if r["who"] == speed["baseline"]
    }
    found: dict[tuple[str, int, int], dict[str, dict[int, float]]] = {}
    for r in _linear(speed):
        its = base.get((r["n"], r["k"], r["m"]))
        if r["who"] != speed["baseline"] and its:
            shape = found.setdefault((r["shape"], r["n"], r["k"]), {})
            shape.setdefault(_who(r), {})[r["m"]] = its / r["ms50"]
    return found


def _speed_numbers(result: dict[str, Any]) -> dict[str, Any]:
    speed = result["speed"]
    told = []
    for (shape, n, k), lines in _ratios(speed).items():
        for what, by_m in lines.items():
            if what == "quantize + W4A4":
                least, most = min(by_m), max(by_m)
                told.append(f"{shape} ({n:,} × {k:,}) {by_m[least]:.2f} at M = {least:,} and "
                            f"{by_m[most]:.2f} at M = {most:,}")  # fmt: skip
    whole = {r["who"]: r for r in speed["end_to_end"]}
    end = "No whole model was timed"
    if whole:
        end = "Whole model, LLaMA-2-7B's shape: " + "; ".join(
            f"{who} {r['prefill_ms50'] / r['tokens']:.3f} ms a token in prefill, "
            f"{r['decode_ms50']:.2f} in decode"
            for who, r in whole.items()
        )
    return {
        "where": _where(speed),
        "baseline": speed["baseline"],
        "end": end,
        "ratios": "; ".join(told[:4]),
    }


@figure(NOTEBOOK, _speed_numbers)
def kernel_speed(result: dict[str, Any]) -> Figure:
    """Times as fast as the floating-point product, by tokens; time per token of a whole model, if timed."""
    speed = result["speed"]
    shapes = dict(list(_ratios(speed).items())[:2])
    whole = speed["end_to_end"]
    fig = style.new(PAGE, 2.4)
    columns = len(shapes) + bool(whole)
    grid = fig.add_gridspec(2, columns, width_ratios=[1] * len(shapes) + [0.9] * bool(whole))
    values = [v for lines in shapes.values() for by_m in lines.values() for v in by_m.values()]
    limits = style.limits([*values, 1.0], log=True, margin=0.12)
    for i, ((shape, n, k), lines) in enumerate(shapes.items()):
        ax = fig.add_subplot(grid[:, i])
        ax.axhline(1, lw=0.8, ls="--", color=COLOUR["ink"], zorder=1)
        for what, by_m in lines.items():
            m = sorted(by_m)
            ax.plot(m, [by_m[i] for i in m], color=INK[what], marker=SIGN[what], ms=4, label=what)
        ticks = sorted({m for by_m in lines.values() for m in by_m})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{m // 1024}k" if m >= 1024 else str(m) for m in ticks])
        ax.minorticks_off()
        ax.set_yscale("log")
        ax.set_ylim(*limits)
        style.log_ticks(ax.yaxis, *limits)
        ax.set(title=f"{shape}\n{n:,} × {k:,}", xlabel="tokens at once, M")
        ax.grid(axis="y")
    fig.axes[0].set_ylabel(f"times as fast as\n{speed['baseline']}")
    handles, names = fig.axes[0].get_legend_handles_labels()
    for i, phase in enumerate(("prefill", "decode") if whole else ()):
        _time_per_token(fig.add_subplot(grid[i, -1]), whole, phase)
    base = Line2D([], [], lw=0.8, ls="--", color=COLOUR["ink"])
    fig.legend([*handles, base], [*names, speed["baseline"]], loc="outside upper left",
               ncols=len(names) + 1)  # fmt: skip
    return fig


def _time_per_token(ax: Axes, rows: list[dict[str, Any]], phase: str) -> None:
    """Milliseconds a token of each model, in prefill or decode."""
    times = array([r[f"{phase}_ms50"] / (r["tokens"] if phase == "prefill" else 1) for r in rows])
    for y, (row, value) in enumerate(zip(rows, times, strict=True)):
        ink = INK["quantize + W4A4"] if row["who"].startswith("W4A4") else "#9AA5AE"
        ax.barh(y, value, height=0.62, color=ink, lw=0)
        ax.annotate(f"{value:.3g}", (value, y), (3, 0), textcoords="offset points", va="center",
                    fontsize=7)  # fmt: skip
    ax.set_yticks(range(len(rows)), [r["who"] for r in rows])
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, 1.3 * times.max()), ylim=(len(rows) - 0.5, -0.5))
    shape = "LLaMA-2-7B's shape\n" if phase == "prefill" else ""
    ax.set_title(f"{shape}{phase}, ms a token")
    ax.xaxis.get_major_locator().set_params(nbins=4)

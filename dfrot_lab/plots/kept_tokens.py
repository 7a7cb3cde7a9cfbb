"""Figures of notebook 03: what keeping the massive tokens alone in floating point does."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dfrot_lab.plots import style
from dfrot_lab.plots.style import COLOUR, MARKER, PAGE, array, figure, number

__all__ = ["exempted_tokens", "massive_tokens_fp16"]

NOTEBOOK = "03_massive_tokens_fp16"
PLACES = {"none": 0.0, "massive": 1.0, "first": 2.05}
TICKS = {
    "none": "all tokens\nat 4 bits",
    "massive": "massive tokens\nkept in floating point",
    "first": "first token alone\nkept in floating point",
}
ROTATIONS = ("RO", "RH2", "RH")


def _means(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """{(rotation, keep): mean, sd, n}; "first" from its own, fewer windows and seeds."""
    found = {
        (r["rotation"], r["keep"]): {k: float(array(r[k])) for k in ("mean", "sd", "n")}
        for r in result["table"]
    }
    for name in ROTATIONS:
        values = _first(result, name, "first")
        if len(values):
            sd = values.std(ddof=1) if len(values) > 1 else 0.0
            found[name, "first"] = {"mean": values.mean(), "sd": sd, "n": len(values)}
    return found


def _first(result: dict[str, Any], name: str, keep: str) -> np.ndarray:
    """Perplexities of each seed under `keep`, on the windows where the first token alone was kept."""
    rows = [r for r in result.get("first_token", []) if r["rotation"] == name]
    return array([r[keep] for r in rows if keep in r])


def _first_extent(result: dict[str, Any]) -> str:
    rows = result.get("first_token", [])
    seeds = style.count(len({r["seed"] for r in rows}), "seed")
    return f"{style.count(max((r['windows'] for r in rows), default=0), 'window')}, {seeds}"


def _first_told(result: dict[str, Any]) -> str:
    """'RO 31.0 (nothing kept 40.0, massive tokens 30.0), RH …', all on the same windows."""
    keeps = (("nothing", "none"), ("massive tokens", "massive"))
    parts = []
    for name in ("RO", "RH"):
        if len(values := _first(result, name, "first")):
            other = [(text, _first(result, name, keep)) for text, keep in keeps]
            beside = ", ".join(f"{text} kept {number(v.mean())}" for text, v in other if len(v))
            parts.append(f"{name} {number(values.mean())} ({beside})")
    return ", ".join(parts) + f", on {_first_extent(result)}" if parts else "not measured"


def _gaps(result: dict[str, Any]) -> dict[str, float]:
    """RO − RH in perplexity with nothing kept and with massive tokens kept; NaN where unknown."""
    mean = _means(result)
    return {
        keep: mean["RO", keep]["mean"] - mean["RH", keep]["mean"]
        if {("RO", keep), ("RH", keep)} <= set(mean)
        else np.nan
        for keep in ("none", "massive")
    }


def _told(cell: dict[str, float] | None) -> str:
    if cell is None:
        return "not measured"
    sd = f" ± {number(cell['sd'])}" if cell["n"] > 1 and np.isfinite(cell["sd"]) else ""
    return number(cell["mean"]) + sd


def _share(result: dict[str, Any]) -> str:
    share = float(array(result["closed"]["of_means"]))
    return f"{100 * share:.0f} %" if np.isfinite(share) else "an undefined share"


def _hero_numbers(result: dict[str, Any]) -> dict[str, Any]:
    mean, gaps = _means(result), _gaps(result)
    cells = {f"{n}_{k}": _told(mean.get((n, k))) for n in ("FP", "NR", *ROTATIONS) for k in PLACES}
    kept = {r["rotation"]: r for r in result["exempted"]}
    share = 100 * float(array(kept.get("RO", {}).get("share")))
    rows = [r for r in result["rows"] if r["rotation"] == "RO" and r["keep"] == "none"]
    few = int(mean.get(("RH2", "none"), {"n": 0})["n"])
    return cells | {
        "RH2_seeds": style.count(few, "seed"),
        "closed": _share(result),
        "gap": number(gaps["none"]),
        "left": number(gaps["massive"]),
        "pairs": f"{style.percent(share)}" if share > 0 else "none",
        "first": _first_told(result),
        "bits": result["table"][0]["bits"],
        "seeds": style.count(len({r["seed"] for r in rows}), "seed"),
        "windows": style.count(max((r["windows"] for r in rows), default=0), "window"),
    }  # fmt: skip


def dots(
    ax: Axes,
    x: float,
    values: Any,
    name: str,
    alpha: float = 1.0,
    size: float = 6.0,
    aside: float = 0.055,
    whole: bool = False,
) -> None:
    """Mean with its sd (`whole`: the range) as whisker and, `aside` of it, each seed as a small dot."""
    values = array(values)
    values = values[np.isfinite(values)]
    if not len(values):
        return
    ink = COLOUR[name]
    if len(values) > 1:
        mean, sd = values.mean(), values.std(ddof=1)
        # of equal values the mean may lie a last bit beyond them
        range_ = [[max(0.0, mean - values.min())], [max(0.0, values.max() - mean)]]
        ends = range_ if whole else sd
        ax.errorbar(x, mean, ends, color=ink, alpha=alpha, capsize=2.5, lw=1.1, zorder=3)
    face = "white" if name == "RH2" else ink
    ax.plot(
        x, values.mean(), MARKER[name], ms=size, color=ink, mfc=face, mew=1, alpha=alpha, zorder=5
    )
    if len(values) > 1:
        beside = np.full(len(values), x + aside)
        ax.plot(beside, values, ".", ms=5, mew=0, color=ink, alpha=0.75 * alpha, zorder=4)


def _bracket(ax: Axes, x: float, ends: tuple[float, float], text: str, bold: str = "") -> None:
    """A double arrow at x between two perplexities and what it measures beside it."""
    ink = COLOUR["ink"]
    arrow = {
        "arrowstyle": "<->",
        "lw": 0.8,
        "color": ink,
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 6,
    }
    ax.annotate("", (x, ends[0]), (x, ends[1]), arrowprops=arrow)
    middle = np.sqrt(ends[0] * ends[1]) if ax.get_yscale() == "log" else np.mean(ends)
    up = 4.5 if bold else 0
    ax.annotate(
        text, (x, middle), (4, -up), textcoords="offset points", va="center", fontsize=7, color=ink
    )
    if bold:
        ax.annotate(
            bold,
            (x, middle),
            (4, up),
            textcoords="offset points",
            va="center",
            weight="bold",
            color=ink,
        )


@figure(NOTEBOOK, _hero_numbers)
def massive_tokens_fp16(result: dict[str, Any]) -> Figure:
    """Perplexity of RO and RH, all tokens at 4 bits against massive tokens kept: the gap closes."""
    mean, gaps = _means(result), _gaps(result)
    seeds: dict[tuple[str, str], list[float]] = {}
    for r in result["rows"]:
        seeds.setdefault((r["rotation"], r["keep"]), []).append(float(array(r["ppl"])))
    seeds |= {(n, "first"): list(_first(result, n, "first")) for n in ROTATIONS}
    fig = style.new(PAGE, 3.0)
    ax = fig.add_subplot()
    shown = [k for k in PLACES if any(seeds.get((n, k)) for n in ROTATIONS)]
    finite = [v for (n, k), vs in seeds.items() if n in ROTATIONS and k in PLACES for v in vs]
    for (n, k), cell in mean.items():
        if n in ROTATIONS and k in PLACES:
            finite += [cell["mean"] - cell["sd"], cell["mean"] + cell["sd"]]
    fp = mean.get(("FP", "none"))
    finite += [fp["mean"]] if fp else []
    finite = [v for v in finite if np.isfinite(v) and v > 0]
    log = bool(finite) and max(finite) > 6 * min(finite)
    if log:
        ax.set_yscale("log")
    ax.set_ylim(*style.limits(finite, log=log, margin=0.07))
    if log:
        style.log_ticks(ax.yaxis, *ax.get_ylim())
    shift = {"RO": -0.035, "RH": 0.0, "RH2": 0.06}
    for name in ROTATIONS:
        ends = [
            (PLACES[k] + shift[name], mean[name, k]["mean"])
            for k in ("none", "massive")
            if (name, k) in mean
        ]
        if len(ends) == 2 and np.isfinite([y for _, y in ends]).all():
            ax.plot(
                *zip(*ends, strict=True), color=COLOUR[name], ls=style.LINE[name], lw=1.6, zorder=2
            )
        for keep, place in PLACES.items():
            light = {"alpha": 0.6, "size": 5.0} if keep == "first" else {}
            dots(ax, place + shift[name], seeds.get((name, keep), []), name, **light)
    _hero_labels(ax, mean, log)
    _hero_first(ax, result)
    _hero_gaps(ax, mean, gaps, result)
    if fp:
        ax.axhline(fp["mean"], color=COLOUR["FP"], ls=style.LINE["FP"], lw=0.9, zorder=1)
        ax.annotate(f"floating point {number(fp['mean'], 1)}", (-0.42, fp["mean"]), (0, 2.5),
                    textcoords="offset points", fontsize=7, va="bottom")  # fmt: skip
    nr = mean.get(("NR", "none"))
    missing = [f"{style.label(n)}, {k} kept: {number(c['mean'])}" for (n, k), c in mean.items()
               if n in ROTATIONS and not np.isfinite(c["mean"])]  # fmt: skip
    told = [f"Off the scale: no rotation (NR), {number(nr['mean'], 0)}"] if nr else []
    style.note(ax, "\n".join(told + missing), 0.995, 1.0, ha="right", va="top")
    ax.set(xlim=(-0.45, 2.55), ylabel="perplexity")
    ax.set_xticks([PLACES[k] for k in shown], [_tick(k, result) for k in shown], fontsize=8)
    ax.tick_params(axis="x", length=0, pad=5)
    for text, keep in zip(ax.get_xticklabels(), shown, strict=True):
        text.set_color("#888888" if keep == "first" else COLOUR["ink"])
    return fig


def _tick(keep: str, result: dict[str, Any]) -> str:
    return TICKS[keep] + (f"\n({_first_extent(result)})" if keep == "first" else "")


def _hero_labels(ax: Axes, mean: dict[tuple[str, str], dict[str, float]], log: bool) -> None:
    """Name and mean beside each marker, moved apart where they would touch."""
    forth, back = (np.log, np.exp) if log else (np.asarray, np.asarray)
    low, high = forth(ax.get_ylim())
    for keep, place in PLACES.items():
        if keep == "first":  # `_hero_first`
            continue
        there = [n for n in ROTATIONS if (n, keep) in mean and np.isfinite(mean[n, keep]["mean"])]
        spots = style.apart(
            [float(forth(mean[n, keep]["mean"])) for n in there], 0.062 * (high - low)
        )
        for name, spot in zip(there, spots, strict=True):
            left = keep == "none"
            cell, full = mean[name, keep], mean.get(("RO", keep), {"n": 0})["n"]
            if name == "RH2" and cell["n"] < full:
                ax.annotate(style.count(int(cell["n"]), "seed"), (place + 0.06, cell["mean"]), (6, 0),
                            textcoords="offset points", va="center", fontsize=6.5,
                            color=COLOUR[name])  # fmt: skip
            text = f"{style.label(name)}  {number(cell['mean'], 1)}"
            ax.annotate(
                text, (place + (-0.08 if left else 0.12), float(back(spot))), va="center",
                ha="right" if left else "left", color=COLOUR[name], weight="bold",
            )  # fmt: skip


def _hero_first(ax: Axes, result: dict[str, Any]) -> None:
    """Beside the first token's markers what they are to be compared with: the same windows and seeds."""
    for name in ROTATIONS:
        values = {k: _first(result, name, k) for k in PLACES}
        if not len(values["first"]) or not np.isfinite(values["first"]).all():
            continue
        aside = 8 if len(values["first"]) == 1 else 14
        mean = values["first"].mean()
        ax.annotate(f"{name}  {number(mean, 1)}", (PLACES["first"], mean), (aside, 0), va="center",
                    textcoords="offset points", color=COLOUR[name], weight="bold")  # fmt: skip
        beside = [
            f"{text} {number(values[k].mean(), 1)}"
            for k, text in (("none", "nothing kept"), ("massive", "massive kept"))
            if len(values[k]) and np.isfinite(values[k]).all()
        ]
        if beside:
            ax.annotate("\n".join(beside), (PLACES["first"], mean), (aside, -8), va="top",
                        textcoords="offset points", fontsize=6.5, color="#666666",
                        linespacing=1.1)  # fmt: skip


def _hero_gaps(ax: Axes, mean: dict, gaps: dict[str, float], result: dict[str, Any]) -> None:
    ends = {
        k: (mean["RH", k]["mean"], mean["RO", k]["mean"]) for k, v in gaps.items() if np.isfinite(v)
    }
    if "none" in ends and gaps["none"] > 0:
        ax.hlines(ends["none"], 0.03, 0.24, color=COLOUR["ink"], lw=0.4, ls=":", zorder=1)
        _bracket(ax, 0.21, ends["none"], f"gap {number(gaps['none'], 1)}")
    if set(ends) == {"none", "massive"}:
        _bracket(
            ax,
            1.4,
            ends["massive"],
            f"{number(gaps['massive'], 1)} left",
            f"{_share(result)} closed",
        )
    if not ends:
        style.note(ax, "no finite perplexity for both RO and RH", 0.5, 0.9)


def _kept(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of RO, RH and others; NR's model is broken, so its tokens are shown only if alone."""
    rows = [r for r in result["exempted"] if r["rotation"] != "NR"]
    return [r for r in rows or result["exempted"] if r["pairs"]]


def _exempted_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for r in _kept(result):
        share, first = 100 * float(array(r["share"])), r["by_position"].get("first", 0)
        told.append(
            f"{style.label(r['rotation'])}: {style.count(r['pairs'], 'pair')}, {style.percent(share)} of all "
            f"({first:,} of them at the first token of a window)"
        )
    return {"kept": "; ".join(told) or "no pair was kept"}


@figure(NOTEBOOK, _exempted_numbers)
def exempted_tokens(result: dict[str, Any]) -> Figure:
    """Where pairs (token, site) bypassed quantization, by layer, and which tokens they were."""
    rows = _kept(result)
    fig = style.new(PAGE, 2.7)
    by_layer = fig.subplot_mosaic(
        [["attention", "tokens"], ["mlp", "tokens"]], width_ratios=(1.9, 1), sharex=False
    )
    left = [by_layer["attention"], by_layer["mlp"]]
    left[0].sharex(left[1])
    for i, (ax, kind) in enumerate(zip(left, ("attention input", "MLP input"), strict=True)):
        for k, r in enumerate(rows):
            y = array(r["by_site"])[i::2]
            x = np.arange(len(y)) + 0.4 * (k - (len(rows) - 1) / 2)
            ax.bar(x, y, 0.4, color=COLOUR[r["rotation"]], ec="white", lw=0.2)
        ax.set_yscale("symlog", linthresh=1, linscale=0.6)
        highest = max((float(array(r["by_site"]).max()) for r in rows), default=1.0)
        ax.set_ylim(0, 1.6 * highest)
        ax.set_yticks([0, *(10**k for k in range(int(np.log10(max(1.6 * highest, 1))) + 1))])
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
        ax.grid(axis="y")
        ax.set_title(kind, fontsize=7, pad=3)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if not rows:
            style.note(ax, "no token was kept")
    left[0].tick_params(labelbottom=False)
    left[1].set_xlabel("layer")
    fig.supylabel("pairs (token, site) kept")
    _token_bars(by_layer["tokens"], rows)
    handles = [Patch(color=COLOUR[r["rotation"]], label=style.label(r["rotation"])) for r in rows]
    fig.legend(
        handles=handles or [Line2D([], [], ls="", label=" ")], loc="outside upper right", ncols=3
    )
    return fig


def _token_bars(ax: Axes, rows: list[dict[str, Any]], most: int = 9) -> None:
    counts = [{text: float(array(n)) for text, n in r["by_token"]} for r in rows]
    largest: dict[str, float] = {}
    for c in counts:
        for text, n in c.items():
            largest[text] = max(n, largest.get(text, 0.0))
    texts = sorted(largest, key=lambda t: (-largest[t], t))[:most]
    height = 0.8 / max(len(rows), 1)
    for k, (r, c) in enumerate(zip(rows, counts, strict=True)):
        y = np.arange(len(texts)) + height * (k - (len(rows) - 1) / 2)
        values = [c.get(t, 0) for t in texts]
        ax.barh(y, values, height, color=COLOUR[r["rotation"]], ec="white", lw=0.2)
    ax.set_yticks(range(len(texts)), [style.visible(t) for t in texts])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(max(len(texts), 1) - 0.5, -0.5)
    if texts:
        ax.set_xscale("log")
        ax.set_xlim(0.8, 2 * largest[texts[0]])
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    else:
        ax.set_xticks([])
        style.note(ax, "no token was kept")
    ax.set_xlabel("pairs kept, by token")

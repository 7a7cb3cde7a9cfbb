"""Figures of notebook 06: what the reviewers asked."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dfrot_lab.plots import style
from dfrot_lab.plots.invariance import surface_row
from dfrot_lab.plots.style import COLOUR, COLUMN, LINE, MARKER, PAGE, array, figure, number

__all__ = [
    "begin_of_sequence",
    "clipping",
    "column_cosines",
    "corpus_transfer",
    "error_by_site",
    "recollected",
    "refined_surfaces",
    "slips",
    "static_steps",
    "task_loss",
]

NOTEBOOK = "06_reviewers_questions"
PAIR = ("RH", "DFRot(RH)")


def _told(pairs: Any) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in pairs)


def _dots(
    ax: Axes, names: list[str], values: list[float], inks: list[str], seeds: list[Any] | None = None
) -> None:
    """A dot a row on an axis that need not start at 0, its number at the right end.

    seeds: for each row the values of every seed, small dots below it; where `values` is their mean, the
    bar through the dot is their sd.
    """
    seeds = [array(s) for s in seeds or [[]] * len(values)]
    everything = [*array(values), *np.concatenate(seeds)]
    for i, (value, ink, every) in enumerate(zip(array(values), inks, seeds, strict=True)):
        told = number(value)
        if len(every) > 1:
            ax.plot(every, np.full(len(every), i + 0.27), ".", color=ink, ms=4, mew=0, alpha=0.75)
            if np.isclose(value, every.mean()):
                sd = every.std(ddof=1)
                everything += [value - sd, value + sd]
                ax.errorbar(value, i, xerr=sd, color=ink, lw=1.1, capsize=2.5, zorder=3)
                told += f" ± {number(sd)}"
        ax.plot(value, i, "o", color=ink, ms=5, zorder=4)
        ax.annotate(told, (1, i), (4, 0), xycoords=ax.get_yaxis_transform(), fontsize=7,
                    textcoords="offset points", va="center", annotation_clip=False)  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    limits = style.limits(everything, margin=0.08)
    ax.set(xlim=limits, ylim=(len(names) - 0.5, -0.5))
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="y", lw=0.4)


def _other_seeds(result: dict[str, Any], values: list[float]) -> list[list[float]]:
    """For each perplexity of the first seed, those of all seeds, where `slips` measured the same row."""
    ways = [[float(array(r["ppl"])) for r in rows] for rows in _slips(result).values()]
    return [next((w for w in ways if w[0] == float(array(v))), []) for v in values]


def _static_numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "rows": _told(
            (f"{r['rotation']} {r['bits']} per {r['per']}", r["ppl"]) for r in result["static"]
        )
    }


@figure(NOTEBOOK, _static_numbers)
def static_steps(result: dict[str, Any]) -> Figure:
    """Perplexity per token (dynamic) and per tensor (static), a panel a setting of bits."""
    bits = list(dict.fromkeys(r["bits"] for r in result["static"]))
    fig = style.new(PAGE, 1.9)
    for ax, b in zip(fig.subplots(1, len(bits), squeeze=False)[0], bits, strict=True):
        values = []
        for name in PAIR:
            found = {r["per"]: float(array(r["ppl"])) for r in result["static"]
                     if (r["rotation"], r["bits"]) == (name, b)}  # fmt: skip
            y = [found.get(per, np.nan) for per in ("token", "tensor")]
            values += y
            ax.plot([0, 1], y, marker=MARKER[name], color=COLOUR[name], ls=LINE[name], label=name)
        ax.set_yscale("log")
        ax.set_ylim(*style.limits(values, log=True, margin=0.15))
        style.log_ticks(ax.yaxis, *ax.get_ylim())
        ax.set_xticks([0, 1], ["per token,\ndynamic", "per tensor,\nstatic"])
        ax.set(title=b, xlim=(-0.3, 1.3))
        ax.grid(axis="y")
        if b == bits[0]:
            ax.set_ylabel("perplexity")
            ax.legend()
    return fig


def _clip_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for name in PAIR:
        rows = [r for r in result["clipping"] if r["rotation"] == name]
        best = min(rows, key=lambda r: float(array(r["ppl"])))
        plain = next((r for r in rows if r["clip"] == 1), rows[0])
        told.append(f"{name} {number(plain['ppl'])} → {number(best['ppl'])} at {best['clip']:g}")
    return {"best": "; ".join(told)}


@figure(NOTEBOOK, _clip_numbers)
def clipping(result: dict[str, Any]) -> Figure:
    """Perplexity against the clip ratio of activations, RH and DFRot(RH)."""
    fig = style.new(COLUMN, 2.2)
    ax = fig.add_subplot()
    for name in PAIR:
        rows = sorted(
            (r for r in result["clipping"] if r["rotation"] == name), key=lambda r: r["clip"]
        )
        ax.plot([r["clip"] for r in rows], array([r["ppl"] for r in rows]), color=COLOUR[name],
                marker=MARKER[name], ls=LINE[name], ms=4, label=name)  # fmt: skip
    clips = sorted({r["clip"] for r in result["clipping"]})
    if len(clips) <= 8:
        ax.set_xticks(clips, [f"{c:g}" for c in clips])
    ax.set(xlabel="clip ratio of each token's range", ylabel="perplexity")
    ax.grid(axis="y")
    ax.legend()
    return fig


def _transfer_numbers(result: dict[str, Any]) -> dict[str, Any]:
    rows = result["transfer"]
    return {
        "rows": "; ".join(
            f"tested on {t}: "
            + ", ".join(
                f"{'RH' if r['calibrated'] == 'none' else 'refined on ' + r['calibrated']} {number(r['ppl'])}"
                for r in rows
                if r["tested"] == t
            )
            for t in dict.fromkeys(r["tested"] for r in rows)
        )
    }


@figure(NOTEBOOK, _transfer_numbers)
def corpus_transfer(result: dict[str, Any]) -> Figure:
    """A panel for each tested corpus: RH, and DFRot refined on each corpus."""
    tested = list(dict.fromkeys(r["tested"] for r in result["transfer"]))
    fig = style.new(PAGE, 1.6)
    fig.get_layout_engine().set(wspace=0.08)
    axes = fig.subplots(1, len(tested), squeeze=False)[0]
    for ax, t in zip(axes, tested, strict=True):
        rows = [r for r in result["transfer"] if r["tested"] == t]
        names = ["RH" if r["calibrated"] == "none" else f"on {r['calibrated']}" for r in rows]
        inks = [COLOUR["RH" if r["calibrated"] == "none" else "DFRot"] for r in rows]
        values = [r["ppl"] for r in rows]
        _dots(ax, names, values, inks, _other_seeds(result, values))
        ax.set(title=f"tested on {t}", xlabel="perplexity")
    return fig


def _round_numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {"rows": _told((f"round {r['round']}", r["ppl"]) for r in result["recollected"])}


@figure(NOTEBOOK, _round_numbers)
def recollected(result: dict[str, Any]) -> Figure:
    """Perplexity by round of collecting activations again under the current rotation."""
    rows = result["recollected"]
    fig = style.new(COLUMN, 1.5)
    names = [f"round {r['round']}" for r in rows]
    ax = fig.add_subplot()
    values = [r["ppl"] for r in rows]
    _dots(ax, names, values, [COLOUR["DFRot"]] * len(rows), _other_seeds(result, values))
    ax.set_xlabel("perplexity")
    return fig


def _task_numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "rows": "; ".join(
            f"{r['rotation']}{', massive kept' if r['keep'] == 'massive' else ''}: KL {number(r['kl'], 3)}, "
            f"error {number(r['error'], 4)}, perplexity {number(r['ppl'])}"
            for r in result["task_loss"]
        )
    }


@figure(NOTEBOOK, _task_numbers)
def task_loss(result: dict[str, Any]) -> Figure:
    """KL to the floating-point model against the error of activations, and against perplexity."""
    fig = style.new(PAGE, 2.4)
    for ax, (key, text_of_axis) in zip(
        fig.subplots(1, 2, sharey=True),
        (("error", "mean relative error of activations"), ("ppl", "perplexity")),
        strict=True,
    ):
        for r in result["task_loss"]:
            name, kept = r["rotation"], r["keep"] == "massive"
            x, y = float(array(r[key])), float(array(r["kl"]))
            face = "white" if kept else COLOUR[name]
            text = style.label(name) + (", massive kept" if kept else "")
            ax.plot(x, y, MARKER[name], color=COLOUR[name], mfc=face, ms=5, label=text)
        ax.set_xlabel(text_of_axis)
        ax.grid()
    fig.axes[0].legend(loc="upper left", fontsize=6.5)
    fig.axes[0].set_ylabel("KL to FP, nats a token")
    return fig


def _cosine_numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "rows": "; ".join(
            f"{name}: distance {number(np.mean([r['relative_distance'] for r in rows]))}, "
            f"mean cosine {number(np.mean([r['mean_column_cosine'] for r in rows]))}"
            for name in ("DFRot(RH)", "DFRot(RO)")
            if (rows := [r for r in result["similarity"] if r["rotation"] == name])
        )
    }


@figure(NOTEBOOK, _cosine_numbers)
def column_cosines(result: dict[str, Any]) -> Figure:
    """Distribution of the cosines between the columns of R1 and those of its start."""
    fig = style.new(COLUMN, 2.0)
    ax = fig.add_subplot()
    for name in ("DFRot(RO)", "DFRot(RH)"):
        rows = [r["cosines"] for r in result["similarity"] if r["rotation"] == name]
        if rows:
            values = array(rows).ravel()
            start = name[6:-1]
            ax.hist(values, bins=np.linspace(-0.2, 1, 49), density=True, histtype="step",
                    color=COLOUR[start], lw=1.2, label=f"from {start}")  # fmt: skip
    ax.set(xlabel="cosine of a column with its start", ylabel="density", xlim=(-0.2, 1))
    ax.legend(loc="upper left")
    return fig


def _site_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for part in ("massive", "normal"):
        means = []
        for name in ("RO", *PAIR):
            values = [
                r[part] for r in result["errors_by_layer"] if r["rotation"] == name and part in r
            ]
            if values:
                means.append(f"{name} {np.mean(array(values)):.4f}")
        told.append(f"{part}: " + (", ".join(means) or "none"))
    return {"means": "; ".join(told)}


@figure(NOTEBOOK, _site_numbers)
def error_by_site(result: dict[str, Any]) -> Figure:
    """Mean relative error by norm site under RO, RH and DFRot(RH): massive and normal tokens."""
    rows = result["errors_by_layer"]
    sites = list(dict.fromkeys(r["site"] for r in rows))
    fig = style.new(PAGE, 2.5)
    axes = fig.subplots(1, 2, sharex=True)
    for ax, part in zip(axes, ("massive", "normal"), strict=True):
        values = []
        for name in ("RO", *PAIR):
            found = {
                r["site"]: float(array(r[part]))
                for r in rows
                if r["rotation"] == name and part in r
            }
            y = array([found.get(s) for s in sites])
            values += list(y)
            look = {"color": COLOUR[name], "marker": MARKER[name], "ls": LINE[name]}
            ax.plot(np.arange(len(sites)) / 2, y, **look, ms=2.8, lw=0.8, label=name)
        ax.set_yscale("log")
        ax.set_ylim(*style.limits(values, log=True))
        style.log_ticks(ax.yaxis, *ax.get_ylim())
        ax.set(title=f"{part} tokens", xlabel="layer")
        ax.grid(axis="y")
        if not np.isfinite(values).any():
            style.note(ax, f"no {part} token")
    axes[0].set_ylabel("relative error")
    handles, names = axes[1].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper center", ncols=len(names))
    return fig


def _picture_numbers(result: dict[str, Any]) -> dict[str, Any]:
    found = result["pictures"]
    largest = _told((n, array(found[n]).max()) for n in ("NR", *PAIR))
    return {"site": found["site"], "largest": largest, "tokens": len(found["NR"])}


@figure(NOTEBOOK, _picture_numbers)
def refined_surfaces(result: dict[str, Any]) -> Figure:
    """|x| by token and channel: original, RH, DFRot(RH)."""
    return surface_row(result["pictures"], ("NR", *PAIR))


def _bos_numbers(result: dict[str, Any]) -> dict[str, Any]:
    rows = result["bos"]
    if not rows:
        return {"rows": "the tokenizer of this model has no BOS"}
    told = []
    for name in dict.fromkeys(r["rotation"] for r in rows):
        found = {r["bos"]: r["ppl"] for r in rows if r["rotation"] == name}
        told.append(f"{name} {number(found[False])} → {number(found[True])}")
    return {"rows": "; ".join(told)}


@figure(NOTEBOOK, _bos_numbers)
def begin_of_sequence(result: dict[str, Any]) -> Figure:
    """Perplexity without and with BOS in front of each window."""
    fig = style.new(COLUMN, 2.0)
    ax = fig.add_subplot()
    values = []
    for name in dict.fromkeys(r["rotation"] for r in result["bos"]):
        found = {r["bos"]: float(array(r["ppl"])) for r in result["bos"] if r["rotation"] == name}
        y = [found[False], found[True]]
        values += y
        look = {"color": COLOUR[name], "marker": MARKER[name], "ls": LINE[name], "ms": 5}
        ax.plot([0, 1], y, **look, label=name)
    if not values:
        style.note(ax, "the tokenizer has no BOS")
    ax.set_xticks([0, 1], ["as they are", "BOS in front"])
    ax.set(xlim=(-0.25, 1.25), ylim=style.limits(values), ylabel="perplexity")
    ax.grid(axis="y")
    if values:
        low, high = ax.get_ylim()
        ends = style.apart(values[1::2], 0.085 * (high - low))
        for line, y in zip(ax.get_lines(), ends, strict=True):
            ax.annotate(
                line.get_label(), (1.06, y), va="center", fontsize=7, color=line.get_color()
            )
        ax.set_xlim(-0.25, 1.75)
    return fig


def _slips(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    rows = result.get("slips", [])
    return {
        way: [r for r in rows if r["way"] == way] for way in dict.fromkeys(r["way"] for r in rows)
    }


def _slip_numbers(result: dict[str, Any]) -> dict[str, Any]:
    told = []
    for way, rows in _slips(result).items():
        ppl = array([r["ppl"] for r in rows])
        text = f"{way} {number(ppl.mean())}"
        if len(ppl) > 1:
            text += f" ± {number(ppl.std(ddof=1))}"
        if "moved" in rows[0]:
            text += f" (moved {number(np.mean([r['moved'] for r in rows]))})"
        told.append(text)
    seeds = {r["seed"] for r in result["slips"]}
    return {"rows": ", ".join(told), "seeds": style.count(len(seeds), "seed")}


@figure(NOTEBOOK, _slip_numbers)
def slips(result: dict[str, Any]) -> Figure:
    """Perplexity of DFRot(RH) with one slip of the publication at a time: mean ± sd, and every seed."""
    ways = _slips(result)
    fig = style.new(PAGE, 0.35 + 0.26 * len(ways))
    ax = fig.add_subplot()
    inks = [COLOUR["RH" if way == "RH itself" else "DFRot"] for way in ways]
    values = [array([r["ppl"] for r in rows]) for rows in ways.values()]
    _dots(ax, list(ways), [v.mean() for v in values], inks, values)
    ax.set_xlabel("perplexity")
    return fig

"""Study 09: what R1 may be refined for, on equal terms: the same rows, steps, starts and evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tqdm import tqdm

from dfrot_lab.evaluation import spread
from dfrot_lab.lab import Lab
from dfrot_lab.presets import PRESETS, Preset
from dfrot_lab.results import Claim
from dfrot_lab.studies import unseen
from dfrot_lab.studies.perplexities import paired

__all__ = ["claims", "confirm", "labelled", "pareto", "screen", "top"]

GPTQ = "gptq-shared"
AS_MUCH = "dfrot, windows and steps of recommended"
LABELS = {
    "centroids": "int4 centroids (DFRot)",
    "least_squares": "int4 centroids, fitted scales",
    "corners": "cube corners (ConQuR)",
    "whip": "Whip (DartQuant)",
    "kurtosis": "kurtosis (KurTail)",
    "soft_peak": "soft peak (after InfoQuant)",
}


def screen(
    lab: Lab, objectives: list[str], gammas: list[float], seed: int, windows: int, bits: list[str]
) -> list[dict[str, Any]]:
    """Every objective × γ × start, one seed: perplexity at each of `bits`, RTN where weights count."""
    grid = [(o, g, s) for s in ("RH", "RO") for o in objectives for g in gammas]
    out = []
    for start in ("RH", "RO"):  # the starts themselves
        out.append({"objective": "none", "gamma": "none", "start": start})
        out[-1] |= {"ppl": _ppl(lab, start, seed, windows, bits)}
    bar = tqdm(grid, desc="screening", unit="row")
    for objective, gamma, start in bar:
        bar.set_postfix_str(f"{objective} γ={gamma:g} {start}", refresh=False)
        path = lab.rotation_file(f"DFRot({start})", seed, gamma=gamma, objective=objective)
        row = {"objective": objective, "gamma": str(float(gamma)), "start": start}
        out.append(row | {"ppl": _ppl(lab, str(path), seed, windows, bits)})
    return out


def _ppl(lab: Lab, name: str, seed: int, windows: int, bits: list[str]) -> dict[str, float]:
    return {b: lab.perplexity(name, seed, bits=b, windows=windows)["ppl"] for b in bits}


def top(rows: list[dict[str, Any]], settings: list[str], count: int = 3) -> list[dict[str, Any]]:
    """The `count` best objectives by perplexity at each of `settings`, each at its best γ and start.

    Those of the first setting come first; an objective that two settings put forward with the same γ and
    start is there once.
    """
    out: list[dict[str, Any]] = []
    for bits in settings:
        ranked = sorted(
            (r for r in rows if r["objective"] != "none"), key=lambda r: float(r["ppl"][bits])
        )
        best = {r["objective"]: r for r in reversed(ranked)}
        out += [r for r in ranked if best[r["objective"]] is r][:count]
    return [r for i, r in enumerate(out) if r not in out[:i]]


def confirm(
    lab: Lab,
    chosen: list[dict[str, Any]],
    seeds: list[int],
    which: slice,
    bits: str,
    second: str | None,
) -> list[dict[str, Any]]:
    """RH, the presets and the `chosen` of the screening with GPTQ at `bits`, over seeds; and what `dfrot`
    would be with as many windows and steps as `recommended`.

    Each row has, on the evaluation windows `which`, the perplexity there, KL to the floating-point model and
    perplexity at W16A4, and the latter on the corpus `second` too, on as many windows as ranked.
    """
    methods: dict[str, tuple[Preset | None, str]] = {"RH": (None, "RH")}
    methods |= {name: (preset, "RH") for name, preset in PRESETS.items()}
    methods[AS_MUCH] = replace(PRESETS["recommended"], objective="centroids"), "RH"
    for row in chosen:
        made = Preset(objective=row["objective"], gamma=float(row["gamma"])), row["start"]
        if made not in methods.values():
            methods[labelled(row)] = made
    other, out = lab.with_corpus(second) if second else None, []
    grid = [(name, *how, s) for name, how in methods.items() for s in seeds]
    for name, preset, start, seed in tqdm(grid, desc="GPTQ", unit="row"):
        file = start if preset is None else str(preset.rotation_file(lab, seed, start))
        row = {"method": name, "rotation": name, "keep": "none", "seed": seed, "bits": bits}
        row |= unseen.measured(lab, file, seed, which, bits=bits, method=GPTQ)
        row["ppl_w16"] = unseen.measured(lab, file, seed, which)["ppl"]
        row["kl_w16"] = unseen.kl(lab, file, seed, which)
        if other:
            row["ppl_second"] = other.perplexity(file, seed, windows=which.start)["ppl"]
        out.append(row | {"cost": 0.0 if preset is None else preset.cost(lab)})
    return out


def labelled(row: dict[str, Any]) -> str:
    """What the tables call a row of the screening."""
    label = f"{LABELS[row['objective']]}, γ = {float(row['gamma']):g}"
    return label if row["start"] == "RH" else f"{label}, from {row['start']}"


def pareto(rows: list[dict[str, Any]], task: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method: cost in TFLOP, mean ± sd of perplexity and of KL."""
    out = []
    for name in dict.fromkeys(r["method"] for r in rows):
        these = [r for r in rows if r["method"] == name]
        row = {"method": name, "cost": these[0]["cost"]}
        for key in ("ppl", "ppl_w16", "kl_w16", "ppl_second"):
            if key in these[0]:
                row[key] = spread([float(r[key]) for r in these])
        out.append(row)
    for r in task:
        one = {"ppl_w16": spread([float(r["ppl"])]), "kl_w16": spread([float(r["kl_w16"])])}
        out.append({"method": f"task loss from {r['start']}", "cost": r["cost"]} | one)
    return out


def _elsewhere(ours: dict, theirs: dict, second: str) -> list[Claim]:
    """On the corpus that neither calibrated nor chose anything; none where there is none."""
    if "ppl_second" not in ours:
        return []
    a, b = theirs["ppl_second"], ours["ppl_second"]
    return [
        Claim(
            f"And on the corpus {second!r}, by which nothing was chosen, at 16-4-16",
            "left open",
            f"{a['mean']:.2f} ± {a['sd']:.2f} → {b['mean']:.2f} ± {b['sd']:.2f}",
            "means over seeds differ by more than the larger sd",
            a["mean"] - b["mean"] > max(a["sd"], b["sd"]),
        )
    ]


def claims(result: dict[str, Any]) -> list[Claim]:
    """The closing table of notebook 09."""
    mean = {r["method"]: r for r in result["pareto"]}
    ours, theirs = mean["recommended"], mean["dfrot"]
    gap = paired(result["confirm"], ("dfrot", "none"), ("recommended", "none"))
    wider = max(ours["ppl"]["sd"], theirs["ppl"]["sd"])
    equal = mean[AS_MUCH]
    fair = paired(result["confirm"], (AS_MUCH, "none"), ("recommended", "none"))
    bits = result["confirm"][0]["bits"]
    out = [
        Claim(
            f"`recommended` is better than DFRot's objective and γ (`dfrot`) at {bits}, GPTQ",
            "left open",
            f"{theirs['ppl']['mean']:.2f} ± {theirs['ppl']['sd']:.2f} → {ours['ppl']['mean']:.2f} ± "
            f"{ours['ppl']['sd']:.2f}; Δnll {gap['mean']:.4f} [{gap['low']:.4f}, {gap['high']:.4f}]",
            "means over seeds differ by more than the larger sd",
            theirs["ppl"]["mean"] - ours["ppl"]["mean"] > wider,
        ),
        Claim(
            f"So it is where DFRot's objective has as many windows and steps, {bits}, GPTQ",
            "left open",
            f"{equal['ppl']['mean']:.2f} ± {equal['ppl']['sd']:.2f} → {ours['ppl']['mean']:.2f} ± "
            f"{ours['ppl']['sd']:.2f}; Δnll {fair['mean']:.4f} [{fair['low']:.4f}, {fair['high']:.4f}]",
            "means over seeds differ by more than the larger sd",
            equal["ppl"]["mean"] - ours["ppl"]["mean"] > max(ours["ppl"]["sd"], equal["ppl"]["sd"]),
        ),
        Claim(
            "`recommended` is better than DFRot's objective and γ (`dfrot`) at 16-4-16",
            "left open",
            f"{theirs['ppl_w16']['mean']:.2f} ± {theirs['ppl_w16']['sd']:.2f} → "
            f"{ours['ppl_w16']['mean']:.2f} ± {ours['ppl_w16']['sd']:.2f}; KL "
            f"{theirs['kl_w16']['mean']:.4f} → {ours['kl_w16']['mean']:.4f}",
            "means over seeds differ by more than the larger sd",
            theirs["ppl_w16"]["mean"] - ours["ppl_w16"]["mean"]
            > max(ours["ppl_w16"]["sd"], theirs["ppl_w16"]["sd"]),
        ),
        *_elsewhere(ours, theirs, result["second"]),
        Claim(
            "`recommended` costs less than descent on the task loss, and is not worse",
            "SpinQuant: 800 samples of task-loss gradients",
            "; ".join(
                f"task loss from {r['start']}: {float(r['ppl']):.2f} at {r['cost']:.3g} TFLOP"
                for r in result["task_loss"]
            )
            + f"; recommended: {ours['ppl_w16']['mean']:.2f} at {ours['cost']:.3g} TFLOP",
            "lower cost, and a perplexity at 16-4-16 not above the best task-loss row's",
            ours["cost"] < min(r["cost"] for r in result["task_loss"])
            and ours["ppl_w16"]["mean"] <= min(float(r["ppl"]) for r in result["task_loss"]),
        ),
    ]
    return out

"""Study 09: what R1 may be refined for, on equal terms: the same rows, steps, starts and evaluation."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dfrot_lab import (
    cayley,
    evaluation,
    files,
    heads,
    models,
    owners,
    prefix,
    quantized_model,
    rotations,
)
from dfrot_lab import objectives as interface
from dfrot_lab.evaluation import spread
from dfrot_lab.lab import Lab
from dfrot_lab.presets import PRESETS, Preset
from dfrot_lab.quantized_model import ModelSpec
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.results import Claim
from dfrot_lab.rotations import Rotations
from dfrot_lab.studies.perplexities import paired
from dfrot_lab.tables import Table

__all__ = [
    "behind",
    "by_prefix",
    "by_task_loss",
    "by_values",
    "claims",
    "confirm",
    "labelled",
    "pareto",
    "screen",
    "three",
    "top",
    "values_table",
]

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


def behind(lab: Lab, windows: int, count: int) -> slice:
    """The `count` evaluation windows behind the first `windows`, which rank; 0: all the rest.

    Raises ValueError where none is left, or there are not so many: what has chosen cannot confirm.
    """
    there = len(lab.evaluation_tokens(0))
    last = windows + count if count else there
    if not 0 < windows <= last - 2 <= there - 2:  # a paired interval needs two
        raise ValueError(
            f"windows = {windows}, confirm_windows = {count}: the first `windows` rank the objectives, those "
            f"behind them confirm: use at least 1 and 2, {there} together (confirm_windows = 0: the rest)"
        )
    return slice(windows, last)


def _measured(lab: Lab, name: str, seed: int, which: slice, **how: str) -> dict[str, Any]:
    """{ppl, nll} of the evaluation windows `which`."""
    nll = lab.perplexity(name, seed, windows=which.stop, **how)["nll"][which]
    return {"ppl": evaluation.Perplexity(nll).value, "nll": nll}


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
        row |= _measured(lab, file, seed, which, bits=bits, method=GPTQ)
        row["ppl_w16"] = _measured(lab, file, seed, which)["ppl"]
        row["kl_w16"] = _kl(lab, file, seed, which)
        if other:
            row["ppl_second"] = other.perplexity(file, seed, windows=which.start)["ppl"]
        out.append(row | {"cost": 0.0 if preset is None else preset.cost(lab)})
    return out


def labelled(row: dict[str, Any]) -> str:
    """What the tables call a row of the screening."""
    label = f"{LABELS[row['objective']]}, γ = {float(row['gamma']):g}"
    return label if row["start"] == "RH" else f"{label}, from {row['start']}"


def _kl(lab: Lab, file: str, seed: int, which: slice) -> float:
    """Mean KL to the floating-point model in nats a token, kept beside the perplexities."""

    def measure() -> dict[str, Any]:
        model = lab.quantized(file, seed)
        tokens = lab.evaluation_tokens(which.stop)[which]
        return {"kl": statistics.fmean(evaluation.window_kl(model, lab.lm, w) for w in tokens)}

    return float(_kept(lab, "kl", {"rotation": _which(file, seed)}, which, measure)["kl"])


def _kept(
    lab: Lab, kind: str, options: dict[str, Any], which: slice, measure: Callable[[], dict]
) -> dict[str, Any]:
    """What `measure` gives on the evaluation windows `which`, kept beside the perplexities."""
    windows = {"windows": [which.start, which.stop]}
    return lab.kept(kind, options | windows, measure, ["dfrot_lab.prefix"])


def _which(name: str, seed: int) -> list[Any]:
    """What tells a rotation from others: its name and seed, or what its file holds."""
    return [files.sha256(name) if name.endswith(".safetensors") else name, seed]


def by_task_loss(
    lab: Lab, starts: list[str], seed: int, steps: int, length: int, which: slice
) -> list[dict[str, Any]]:
    """SpinQuant's way: Cayley steps on the task loss from each of `starts`, and its budget.

    which: evaluation windows.
    """
    out, tokens = [], lab.calibration_tokens[:, : lab.seqlen // length * length]
    whose = owners.of(lab.model).about  # the lab takes no file that does not say it
    for name in starts:
        start = lab.rotation(name, seed)
        path = (
            Path(lab.folder) / "artefacts" / "rotations" / f"Cayley-{name}-seed{seed}.safetensors"
        )
        about = {"steps": steps, "length": length, "start": _digest(start.tolist())}
        about = {"about": about} | whose
        known = rotations.load(path)[1] if path.exists() else {}
        if {k: known.get(k) for k in about} != about:
            r, losses = cayley.refine(
                lab.lm, tokens.reshape(-1, length), start, QuantSpec(), steps=steps, progress=name,
                checkpoint=path.with_suffix(".checkpoint"), whose=json.dumps(about),
            )  # fmt: skip
            rotations.save(path, r, about | {"losses": losses})
        losses = rotations.load(path)[1]["losses"]
        row = {"start": name, "steps": steps, "tokens": steps * length, "losses": losses}
        row |= {"before": _measured(lab, name, seed, which)["ppl"]}
        row |= {"ppl": _measured(lab, str(path), seed, which)["ppl"]}
        # forward, and backward with respect to activations: two products more for each weight
        row["cost"] = 3 * 2.0 * _weights(lab) * steps * length / 1e12
        out.append(row | {"kl_w16": _kl(lab, str(path), seed, which)})
    return out


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _weights(lab: Lab) -> int:
    return sum(p.numel() for name, p in lab.lm.named_parameters() if "embed" not in name)


def by_prefix(lab: Lab, names: dict[str, str], seed: int, which: slice) -> dict[str, Any]:
    """W16A4 perplexity with and without a prefix in the cache, of each rotation (label → name or file).

    which: evaluation windows.
    """
    first = lab.tokenizer.bos_token_id
    ahead = prefix.choose(lab.activations, lab.calibration_tokens, first, QuantSpec())
    tokens, out = lab.evaluation_tokens(which.stop)[which], []
    spec = ModelSpec.of("16-4-16")
    for label, name in tqdm(names.items(), desc="prefix", unit="row"):

        def measure(name: str = name) -> dict[str, Any]:
            rotation = Rotations.standard(lab.lm, lab.rotation(name, seed))
            model = lab.quantized(name, seed)
            return {"ppl": prefix.perplexity(model, rotation, spec, ahead, tokens).value}

        plain = _measured(lab, name, seed, which)["ppl"]
        found = _kept(
            lab, "prefix", {"rotation": _which(name, seed), "ahead": ahead}, which, measure
        )
        out.append({"rotation": label, "plain": plain, "prefixed": float(found["ppl"])})
    return {"prefix": [lab.tokenizer.decode([t]) for t in ahead], "rows": out}


def by_values(
    lab: Lab, objectives: list[str], seeds: list[int], which: slice
) -> list[dict[str, Any]]:
    """W16A4 perplexity under `recommended` with one Hadamard R2, and with R2 refined for each head.

    R2 is refined for each of `objectives` on what o_proj is given in the lab's own calibration windows, from
    the Hadamard. which: evaluation windows. before, after: its loss, mean over layers.
    """
    size = models.layers(lab.lm)[0].module.self_attn.head_dim
    hadamard = rotations.random_hadamard(size)
    start = hadamard.expand(lab.lm.config.num_key_value_heads, -1, -1)
    x, out, spec = heads.collect(lab.lm, lab.calibration_tokens), [], ModelSpec.of("16-4-16")
    refined = {}
    for name in objectives:
        made = interface.named(name, QuantSpec())
        steps = lab.iterations
        refined[name] = heads.refine_layers(x, start, made, iterations=steps, progress=f"R2 {name}")
    for seed in tqdm(seeds, desc="values", unit="seed"):
        file = str(PRESETS["recommended"].rotation_file(lab, seed))
        row = {"values": "Hadamard", "seed": seed}
        out.append(row | _measured(lab, file, seed, which))
        for name, (r2, losses) in refined.items():
            rotation = Rotations(R1=lab.rotation(file, seed), R2=r2, R4=True)
            row = {"values": name, "seed": seed} | _values(lab, rotation, spec, which)
            row["before"], row["after"] = (
                float(f"{statistics.fmean(run[i] for run in losses):.4g}") for i in (0, -1)
            )
            out.append(row)
    return out


def _values(lab: Lab, rotation: Rotations, spec: ModelSpec, which: slice) -> dict[str, Any]:
    """Perplexity of the model with `rotation` merged, kept by what it is made of."""

    def measure() -> dict[str, Any]:
        model = quantized_model.build(lab.lm, rotation, spec)
        found = evaluation.perplexity(model, lab.evaluation_tokens(which.stop)[which])
        return {"ppl": found.value, "nll": found.nll}

    made = _digest(rotation.R1.tolist(), rotation.R2.tolist())
    found = _kept(lab, "values", {"rotation": made, "spec": str(spec)}, which, measure)
    return {"ppl": float(found["ppl"]), "nll": [float(v) for v in found["nll"]]}


def values_table(result: dict[str, Any]) -> Table:
    """R2 as one Hadamard, and refined for each head: mean ± sd over seeds."""
    rows = []
    for name in dict.fromkeys(r["values"] for r in result["values"]):
        these = [r for r in result["values"] if r["values"] == name]
        found = spread([float(r["ppl"]) for r in these])
        loss = f"{these[0]['before']:.3g} → {these[0]['after']:.3g}" if "after" in these[0] else ""
        label = LABELS.get(name, "one Hadamard for all")
        rows.append((label, f"{found['mean']:.2f} ± {found['sd']:.2f}", loss))
    header = ("R2", "perplexity", "its loss, first step → last")
    title = f"R2 under `recommended`, 16-4-16, {len(these)} seeds"
    return Table(title, header, tuple(rows), frozenset((1, 2)))


def three(lab: Lab, seed: int) -> dict[str, str]:
    """RH and the two presets: label → name or file."""
    return {"RH": "RH"} | {n: str(p.rotation_file(lab, seed)) for n, p in PRESETS.items()}


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

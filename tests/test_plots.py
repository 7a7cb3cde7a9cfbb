"""Figures draw from any honest result, the same bytes each time, with captions counted from it."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from dfrot_lab import plots, results
from dfrot_lab.plots import style

ROOT = Path(__file__).resolve().parents[1]
CASES = ("full", "no massive", "one seed", "infinite")
LAYERS, TOKENS, D = 3, 40, 16
SITES = [f"layers.{i}.{kind}" for i in range(LAYERS) for kind in ("attention", "mlp")]


def synthetic(case: str = "full") -> dict[str, dict]:
    """One small result a notebook, with every key the studies write, as JSON gives it back."""
    rng = np.random.default_rng(0)
    massive = [] if case == "no massive" else [1, 7]
    seeds = [0] if case == "one seed" else [0, 1, 2]
    everything = {
        "01_rotation_invariance": _invariance(rng),
        "02_ro_vs_rh_error": _token_errors(rng, massive, seeds),
        "03_massive_tokens_fp16": _kept_tokens(rng, massive, seeds, case == "infinite"),
        "04_dfrot": _refined(rng, massive, seeds, case == "infinite"),
        "05_tables": _tables(seeds, case == "infinite"),
        "06_reviewers_questions": _questions(rng, massive, seeds),
        "07_int4_kernels": _int4(),
        "08_why_it_works": _why(rng, massive, seeds, case == "infinite"),
        "09_objectives": _objectives(case == "infinite"),
        "10_zero_shot": _zero_shot(seeds, case == "infinite"),
    }
    return json.loads(json.dumps(everything, allow_nan=False))


def _invariance(rng) -> dict:
    stages = ("gains folded", "R1 = RO", "R1 = RH")
    errors = {"float32": 2e-6, "float64": 0.0}
    return {
        "logits": [
            {"stage": s, "dtype": t, "relative_error": e} for t, e in errors.items() for s in stages
        ],
        "surfaces": {"site": SITES[1], "channels": D}
        | {n: rng.exponential(k, (6, 8)).tolist() for n, k in (("NR", 4), ("RO", 1), ("RH", 1))},
        "outliers": [
            {"site": s, "rotation": n, "peak_mean": k, "peak_max": 2 * k, "kurtosis_mean": 3 * k}
            for s in SITES
            for n, k in (("NR", 12.5), ("RO", 3.5), ("RH", 3.0))
        ],
        "top_activations": [
            {"layer": i, "top": [900.0 + i, 90.0, 80.0], "token": 0, "channel": 5, "q999": 30.0}
            | {"median": 0.5}
            for i in range(LAYERS)
        ],
    }


def _token_errors(rng, massive, seeds) -> dict:
    levels = {"NR": (2.0, 0.1), "RO": (0.3, 0.3), "RH": (0.25, 0.05)}
    scatter = {}
    for name, (normal, spiked) in levels.items():
        e = normal * rng.uniform(0.8, 1.25, TOKENS)
        e[massive] = spiked
        scatter[name] = e.tolist()
    rows, table = [], []
    for site in SITES:
        for name, level in levels.items():
            for seed in seeds:
                row = {"site": site, "rotation": name, "seed": seed, "massive": len(massive)}
                for group, value in zip(("normal", "massive"), level, strict=True):
                    there = group == "normal" or (massive and "attention" in site)
                    v = value / D * (1 + 0.05 * seed)
                    row[f"{group}_mean"] = v if there else None
                    row[f"{group}_quantiles"] = [v * q for q in QUANTILES] if there else None
                    row[f"{group}_RH_above_RO"] = 0.4 if there else None
                rows.append(row)
    for name, level in levels.items():
        for group, value in zip(("normal", "massive"), level, strict=True):
            if group == "normal" or massive:
                row = {"rotation": name, "group": group, "mean": value / D, "sd": 1e-4}
                table.append(
                    row | {"n": len(seeds), "quantiles": [value / D * q for q in QUANTILES]}
                )
    return {
        "scatter": scatter
        | {"site": SITES[1], "massive": massive, "massive_text": ["\n"] * len(massive)}
        | {"published_rule": 3},
        "by_layer": rows,
        "statistics": table,
        "shares": {"normal": {"mean": 0.4, "sd": 0.0, "n": len(seeds)}},
        "by_kurtosis": [
            {
                "kurtosis": 3.0 * 2**i,
                "ratio": 1 - 0.1 * i,
                "massive": 0.02 * bool(massive and i > 2),
            }
            | {"n": 60}
            for i in range(4)
        ],
        "floor": 0.29,
        "floor_relative": 0.29 / D,
    }


QUANTILES = (0.6, 0.8, 1.0, 1.2, 1.5)


def _row(rotation, keep, seed, ppl, bits="16-4-16", gamma=None) -> dict:
    infinite = isinstance(ppl, str)
    return {
        "rotation": rotation, "keep": keep, "seed": seed, "bits": bits, "gamma": gamma, "windows": 2,
        "ppl": ppl, "nll": ["inf" if infinite else math.log(ppl)] * 2, "kept": [],
    }  # fmt: skip


def _table(rows) -> list[dict]:
    cells: dict[tuple, list] = {}
    for r in rows:
        cells.setdefault((r["rotation"], r["keep"], r["bits"], r["gamma"]), []).append(r["ppl"])
    out = []
    for (rotation, keep, bits, gamma), v in cells.items():
        cell = {"rotation": rotation, "keep": keep, "bits": bits, "gamma": gamma, "n": len(v)}
        if any(isinstance(x, str) for x in v):
            out.append(cell | {"mean": "inf", "sd": "nan"})
        else:
            sd = float(np.std(v, ddof=1)) if len(v) > 1 else 0.0
            out.append(cell | {"mean": float(np.mean(v)), "sd": sd})
    return out


def _kept_tokens(rng, massive, seeds, infinite) -> dict:
    rows = [_row("FP", "none", 0, 12.5), _row("NR", "none", 0, "inf" if infinite else 43210.0)]
    levels = {("RO", "none"): 40.0, ("RO", "massive"): 30.0, ("RH", "none"): 28.0}
    levels |= {("RH", "massive"): 27.0, ("RH2", "none"): 38.0}
    for (name, keep), level in levels.items():
        for s in seeds:
            ppl = "inf" if infinite and (name, keep) == ("RO", "none") else level + 0.5 * s
            rows.append(_row(name, keep, s, ppl))
    by_site = [0, 4, 0, 120, 1, 0] if massive else [0] * len(SITES)
    pairs = sum(by_site)
    exempt = {
        "pairs": pairs,
        "share": pairs / (len(SITES) * TOKENS),
        "tokens": pairs,
        "token_share": 0.01,
        "by_site": by_site,
        "by_position": {"first": 5, "later": pairs - 5} if massive else {},
        "by_token": [["\n", 90], [" the", 20], ["$x", 10], ["", 3], ["日本", 2]] if massive else [],
    }
    share = "nan" if infinite else 0.75
    return {
        "rows": rows,
        "table": _table(rows),
        "closed": {"by_seed": [share], "of_means": share, "mean": share, "sd": 0.0, "n": 1},
        "exempted": [{"rotation": n} | exempt for n in ("NR", "RO", "RH")],
        "side": [_row(n, "first", 0, 31.0) for n in ("RO", "RH")],
        "first_token": [
            {"rotation": n, "seed": 0, "windows": 1, "none": 41.0, "massive": 30.5, "first": 31.0}
            for n in ("RO", "RH")
        ],
    }


def _refined(rng, massive, seeds, infinite) -> dict:
    levels = {"RO": 40.0, "RH": 28.0, "DFRot(RO)": 29.0, "DFRot(RH)": 27.0}
    rows = [_row("FP", "none", 0, 12.5)]
    for bits in ("16-4-16", "4-4-16"):
        for name, level in levels.items():
            for s in seeds:
                ppl = "inf" if infinite and name == "RO" else level + s
                gamma = "100.0" if name.startswith("DFRot") else None
                rows.append(_row(name, "none", s, ppl, bits, gamma))
    x = rng.normal(size=D)
    token = {
        n: {"x": x.tolist(), "q": (x / 0.4).round().tolist(), "squared_error": e}
        for n, e in (("NR", 2.5), ("RO", 9.75), ("RH", 1.5), ("DFRot", 0.25))
    }
    losses = [
        {
            "start": start,
            "seed": s,
            "quantized": [0.03 / (1 + t) for t in range(5)],
            "rotated": [0.025 / (1 + t) for t in range(5)],
            "rows": 320,
            "massive_rows": len(massive),
            "orthogonality_error": 2e-15,
            "relative_distance": 0.4 + 0.1 * s,
            "mean_column_cosine": 0.7,
        }
        for start in ("RH", "RO")
        for s in seeds
    ]
    gammas = ["1.0", "10.0", "100.0", "inf"]
    return {
        "rows": rows,
        "table": _table(rows),
        "losses": losses,
        "token": {"site": SITES[1], "index": 7, "text": "\n", "rotations": token}
        if massive
        else None,
        "scatter": {"site": SITES[1], "massive": massive}
        | {n: rng.uniform(0.1, 0.4, TOKENS).tolist() for n in ("RH", "DFRot")},
        "gamma": [
            {"start": s, "gamma": g, "ppl": "inf" if infinite and g == "inf" else 30.0 - i}
            for s in ("RH", "RO")
            for i, g in enumerate([*gammas, "none"])
        ],
        "paired": [],
        "parameters_used": {"bits": "16-4-16"},
    }


def _tables(seeds, infinite) -> dict:
    rows = [_row("FP", "none", 0, 12.5, "16-16-16") | {"method": None}]
    levels = {"RO": 90.0, "RH": 60.0, "DFRot(RO)": 62.0, "DFRot(RH)": 55.0}
    for bits, scale in (("4-4-4", 1.2), ("4-8-16", 0.3)):
        nr = "inf" if infinite else 43210.0
        rows.append(_row("NR", "none", 0, nr, bits) | {"method": "gptq-shared"})
        for name, level in levels.items():
            for s in seeds:
                for method, more in (("gptq-shared", 1.0), ("rtn", 1.5)):
                    ppl = "inf" if infinite and name == "RO" else scale * more * (level + s)
                    rows.append(_row(name, "none", s, ppl, bits) | {"method": method})
                if name in ("RO", "RH"):
                    kept = _row(name, "massive", s, scale * (level - 5), bits)
                    rows.append(kept | {"method": "gptq-shared"})
    sample = [{"index": i, "ppl": 55.0 + i, "bits": "4-4-16", "method": "rtn"} for i in range(3)]
    return {
        "rows": rows,
        "table": _table(rows),
        "paired": [],
        "calibration": {
            "sample": sample,
            "sites": [{"used": n, "of": 60, "ppl": 60.0 - n / 10} for n in (45, 8)],
        },
        "gamma": [
            {"start": s, "gamma": g, "ppl": 60.0 - i}
            for s in ("RH", "RO")
            for i, g in enumerate(["1.0", "100.0", "inf", "none"])
        ],
    }


def _questions(rng, massive, seeds) -> dict:
    pair = ("RH", "DFRot(RH)")
    names = ("RO", *pair)
    surface = {
        n: rng.exponential(k, (6, 8)).tolist()
        for n, k in zip(("NR", *pair), (4, 1, 1), strict=True)
    }
    return {
        "static": [
            {"rotation": n, "bits": "16-8-16", "per": per, "ppl": 30.0 + i}
            for n in pair
            for i, per in enumerate(("token", "tensor"))
        ],
        "clipping": [
            {"rotation": n, "clip": c, "ppl": 30.0 + 4 * abs(c - 0.9)}
            for n in pair
            for c in (1.0, 0.9, 0.8)
        ],
        "transfer": [
            {"calibrated": c, "tested": t, "ppl": 30.0 + i}
            for t in ("demo", "lee")
            for i, c in enumerate(("none", "demo", "lee"))
        ],
        "recollected": [{"round": k, "ppl": 30.0 - k} for k in range(3)],
        "task_loss": [
            {
                "rotation": n,
                "keep": k,
                "kl": 0.5 - 0.1 * i,
                "error": 0.02 - 0.001 * i,
                "ppl": 40.0 - i,
            }
            for i, (n, k) in enumerate(
                [("RO", "none"), ("RH", "none"), ("DFRot(RH)", "none"), ("RO", "massive")]
            )
        ],
        "similarity": [
            {"rotation": n, "seed": s, "cosines": rng.uniform(0.2, 1, D).tolist()}
            | {"relative_distance": 0.5, "mean_column_cosine": 0.6}
            for n in ("DFRot(RH)", "DFRot(RO)")
            for s in seeds
        ],
        "pictures": {"site": SITES[1], "channels": D} | surface,
        "errors_by_layer": [
            {"site": s, "rotation": n, "normal": 0.01} | ({"massive": 0.03} if massive else {})
            for s in SITES
            for n in names
        ],
        "bos": [
            {"rotation": n, "bos": b, "ppl": 30.0 + b}
            for n in ("FP", *names)
            for b in (False, True)
        ]
        if massive
        else [],
        "slips": [
            {"way": w, "seed": s, "ppl": 30.0 + i + s} | ({"moved": 0.1 * i} if i else {})
            for i, w in enumerate(("RH itself", "ours", "QR"))
            for s in (0, 1)
        ],
    }


def _int4() -> dict:
    halves = {"low": [3, -7], "high": [-6, 2]}
    linears = {"fp16": {"linears": 4000, "rest": 1000}, "packed": {"linears": 1024, "rest": 1000}}
    rows = [
        {"op": "linear", "who": who, "ours": ours, "shape": "gate", "n": 64, "k": 16, "m": m}
        | dict.fromkeys(("ms20", "ms50", "ms80"), ms * m)
        | {"gbs": 5.0, "tflops": 2e-9 * 64 * 16 / ms}
        for who, ours, ms in (
            ("F.linear fp32", False, 0.1), ("W4A4", True, 0.2), ("quantize + W4A4", True, 0.25),
        )
        for m in (1, 16)
    ]  # fmt: skip
    about = {"device": "a CPU", "date": "2026-01-02T00:00:00", "commit": "0" * 8, "dirty": False}
    speed = {
        "baseline": "F.linear fp32", "ceilings": {"copy": 10.0, "fp32": 0.1}, "device": "a CPU",
        "end_to_end": [], "origin": "cpu", "ours": ["W4A4", "quantize + W4A4"],
        "provenance": about, "rows": rows, "said": "Not measured.", "targets": [],
    }  # fmt: skip
    return {
        "nibbles": {
            "bytes": [-93, 41], "channels": 16, "codes": halves, "scale": 0.21, "zero": -1,
            "site": SITES[1], "values": {"low": [0.9, -1.2], "high": [-1.1, 0.6]},
        },
        "memory": linears
        | {"large": {"name": "a model"} | linears}
        | {"peak": [{"tokens": t, "fp16": 5000 + t, "packed": 2024 + t} for t in (1, 8)]},
        "speed": speed,
    }  # fmt: skip


def _why(rng, massive, seeds, infinite) -> dict:
    kinds = ("symmetric", "asymmetric")
    groups = {"normal": 0.012} | ({"massive": 0.003} if massive else {})
    spread = {n: {"mean": 0.02, "sd": 1e-4, "n": len(seeds)} for n in ("NR", "RO", "RH")}
    rest = rng.uniform(0.01, 0.9, TOKENS)
    tokens = {
        "massive": massive,
        "breadth": rng.uniform(5, 200, TOKENS).tolist(),
        "rest": rest.tolist(),
        "means": [
            {"quantizer": kind, "group": g, "n": 3, "predicted": 0.02} | spread
            for kind in kinds
            for g in groups
        ],
        "limits": {"symmetric": 10.9, "asymmetric": 9.6},
        "d": 576,
    } | {n: (0.01 + 0.002 * rest).tolist() for n in ("NR", "RO", "RH", "predicted")}
    points = [
        {"gamma": gamma, "t": t, "text": text, "loss": 0.01 - 0.004 * t}
        | {g: e * (1 - 0.4 * t) for g, e in groups.items()}
        for gamma in ("1.0", "inf")
        for t in (0.0, 0.5, 1.0, 1.25)
        for text in ("calibration", "held out")
    ]
    swept = [
        {"start": start, "gamma": g, "ppl": "inf" if infinite and start == "RO" else 30.0 - i}
        | dict.fromkeys(("calibration", "held out"), groups)
        for start in ("RH", "RO")
        for i, g in enumerate(("none", "1.0", "100.0"))
    ]
    paper = {"none": 8.1, "1.0": 7.9, "100.0": 7.8}
    return {
        "floor": [
            {"d": d, "quantizer": kind, "floor": 0.02, "RO": 0.0201, "RH": 0.0, "RH2": 0.0199}
            for d in (256, 4096)
            for kind in kinds
        ],
        "spikes": [
            {"k": k, "quantizer": kind, "exact": 0.001 * k, "breadth": float(k)}
            | ({"simulated": 0.00101 * k} if k < 3 else {})
            for k in (1, 2, 3)
            for kind in kinds
        ],
        "tokens": tokens,
        "by_share": [
            {"k": k, "rest": [0.001, 0.1, 1.0], "error": [0.001, 0.005 * k, 0.0141]}
            for k in (1, 2, 3)
        ],
        "rule": {
            "d": 576,
            "thresholds": [
                {"d": d, "quantizer": kind, "threshold": d**0.5 / 7}
                for d in (256, 576, 4096)
                for kind in kinds
            ],
            "found": {n: dict.fromkeys(kinds, 0.5) for n in ("ours", "published")},
            "published": {"symmetric": 8.5, "asymmetric": 9.5},
        },
        "composed": [
            {"rotation": n, "group": g, "values": [e] * len(seeds), "mean": e, "sd": 0.0}
            for n in ("RO", "RH2", "RH")
            for g, e in groups.items()
        ],
        "alike": groups,
        "path": {"rows": points, "share": 0.002, "continuous": {"1.0": True, "inf": not massive}},
        "sweep": {
            "rows": swept,
            "published": [
                {"model": m, "start": s} | paper
                for m in ("LLaMA2-7B", "LLaMA3-8B")
                for s in ("RH", "RO")
            ],
            "windows": 2,
            "bits": "16-4-16",
        },
    }


def _objectives(infinite: bool) -> dict:
    names = ("centroids", "least_squares", "corners", "whip", "kurtosis", "soft_peak")
    bits = ["16-4-16", "4-4-16"]
    screened = [
        {"objective": "none", "gamma": "none", "start": s, "ppl": dict.fromkeys(bits, 35.0)}
        for s in ("RH", "RO")
    ]
    screened += [
        {"objective": o, "gamma": g, "start": s}
        | {
            "ppl": {
                b: "inf" if infinite and o == "whip" else 30.0 + sign * i + float(g) / 50
                for b, sign in zip(bits, (1, -1), strict=True)
            }
        }
        for i, o in enumerate(names)
        for g in ("1.0", "10.0", "100.0")
        for s in ("RH", "RO")
    ]
    methods = {"RH": 0.0, "dfrot": 0.7, "recommended": 1.4, "cube corners (ConQuR), γ = 10": 0.7}
    spreads = {
        key: {"mean": mean, "sd": 0.3, "n": 3}
        for key, mean in (("ppl", 35.0), ("ppl_w16", 31.0), ("kl_w16", 0.35), ("ppl_second", 40.0))
    }
    task = {k: spreads[k] | {"sd": 0.0, "n": 1} for k in ("ppl_w16", "kl_w16")}
    return {
        "screen_bits": bits,
        "windows": 2,
        "confirm_windows": 4,
        "screen": screened,
        "confirm": [{"bits": "4-4-16"}],
        "pareto": [{"method": m, "cost": c} | spreads for m, c in methods.items()]
        + [{"method": "task loss from RH", "cost": 20.0} | task],
        "prefix": {
            "prefix": ["<|im_start|>", "\n"],
            "rows": [
                {"rotation": n, "plain": 32.0, "prefixed": 31.0}
                for n in ("RH", "dfrot", "recommended")
            ],
        },
    }


def test_a_method_that_overflows_is_left_out_of_cost_and_quality():
    """Saved, infinity is a string."""
    result = json.loads(json.dumps(_objectives(False)))
    result["pareto"][1]["ppl_w16"] = {"mean": "inf", "sd": "nan", "n": 3}
    fig = plots.draw("cost_and_quality", result)
    assert len(fig.axes[0].containers) == len(result["pareto"]) - 1
    assert len(fig.axes[1].containers) == len(result["pareto"])


def test_methods_that_a_cheaper_one_beats_are_hollow():
    result = _objectives(False)
    result["pareto"] = [
        r | {k: r[k] | {"mean": m} for k in ("ppl_w16", "kl_w16", "ppl") if k in r}
        for r, m in zip(result["pareto"], (5.0, 3.0, 4.0, 3.5, 1.0), strict=True)
    ]
    fig = plots.draw("cost_and_quality", result)
    by_row = {c[0].get_ydata()[0]: c[0].get_markerfacecolor() for c in fig.axes[0].containers}
    names = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    hollow = {names[int(y)] for y, face in by_row.items() if face == "white"}
    assert hollow == {"recommended", "cube corners, γ = 10"}


def test_chance_is_drawn_and_nr_told_in_words():
    fig = plots.draw("zero_shot_accuracy", _zero_shot([0, 1], False))
    chance = [ax for ax in fig.axes if any(100 / 3 in x.get_ydata() for x in ax.lines)]
    assert [ax.get_title(loc="left") for ax in chance] == ["continuation"]
    told = [t.get_text() for t in fig.axes[3].texts]
    assert told and told[0].startswith("NR, 4-4-16: −4.0")


def _zero_shot(seeds, infinite: bool) -> dict:
    names, tasks = ("FP", "NR", "RO", "RH", "DFRot(RH)"), ("last_word", "continuation")
    settings = {"4-4-16": len(seeds), "4-4-4": 1}

    def cell(mean, half, n, finite=True):
        if not finite:
            return dict.fromkeys(("mean", "low", "high", "sd"), "nan") | {"by_seed": ["nan"] * n}
        by_seed = [mean + half * (s - (n - 1) / 2) / 3 for s in range(n)]
        return {"mean": mean, "low": mean - half, "high": mean + half, "sd": 0.01} | {
            "by_seed": by_seed
        }

    def rows(about, correct, logp, n, finite=True):
        about |= {"seeds": n}
        return [
            *(
                about | {"task": t, "correct": cell(*correct, n), "logp": cell(*logp, n, finite)}
                for t in tasks
            ),
            about | {"task": "mean of tasks", "correct": cell(*correct, n)},
        ]

    table, differences = [], []
    for bits, count in settings.items():
        for i, name in enumerate(names):
            n = 1 if name in ("FP", "NR") else count
            finite = not (infinite and name == "NR")
            about = {"bits": bits, "rotation": name}
            table += rows(about, (0.55 - 0.05 * i, 0.03), (-3.0 - i, 0.5), n, finite)
        for a, b in (("RH", "RO"), ("DFRot(RH)", "RH"), ("FP", "DFRot(RH)")):
            finite = not (infinite and b == "RO")
            about = {"bits": bits, "a": a, "b": b}
            differences += rows(about, (0.01, 0.02), (0.1, 0.05), count, finite)
    about = {"metric": "acc", "items": 500, "tokens": 9000, "hash": "0", "version": "1.0"}
    return {
        "tasks": [{"task": t} | about for t in tasks],
        "averaged": list(tasks),
        "lm_eval": "0.4.13",
        "windows": 2,
        "models": [
            {"rotation": n, "seed": s, "bits": b, "method": "rtn"}
            | {"ppl": "inf" if infinite and n == "NR" else 20.0 + 5 * i + s}
            | {"accuracy": 0.55 - 0.05 * i + 0.004 * s, "logp": dict.fromkeys(tasks, -3.0 - i)}
            for b, count in settings.items()
            for i, n in enumerate(names)
            for s in range(1 if n in ("FP", "NR") else count)
            if n != "FP" or b == "4-4-16"
        ],
        "table": table,
        "differences": differences,
        "ranks": [
            {"bits": b, "value": v, "task": t, "over": over, "names": list(names[first:])}
            | {"methods": "nan" if infinite else 0.8, "models": 0.6, "n": 3 * count}
            for b, count in settings.items()
            for v, t in (("accuracy", "mean of tasks"), *(("logp", t) for t in tasks))
            for over, first in (("all", 0), ("rotated", 2))
        ],
    }


RESULTS = {case: synthetic(case) for case in CASES}
FULL = RESULTS["full"]


def of(name: str, everything: dict[str, dict] = FULL) -> dict:
    return everything[plots.FIGURES[name].notebook]


WITH_MASSIVE = ["error_scatter", "error_bars_3d", "error_by_layer", "error_quantiles"]
WITH_MASSIVE += ["ratio_by_kurtosis", "exempted_tokens", "massive_token", "dfrot_scatter"]
WITH_MASSIVE += ["loss_curves", "spikes_in_noise", "hadamard_wins", "composed_hadamard"]
WITH_MASSIVE += ["loss_landscape", "gain_by_weight"]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in plots.FIGURES
        for case in CASES
        if case == "full" or of(name, RESULTS[case]) != of(name)
    ],
)
def test_every_figure_draws_from_every_result(name, case):
    result = of(name, RESULTS[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing letters and layouts that collapse are warnings
        fig = plots.draw(name, result)
        if case == "full":
            fig.savefig(io.BytesIO(), format="png", dpi=40)
        else:
            fig.draw_without_rendering()
    told = plots.caption(name, result)
    assert fig.axes and "{" not in told and "nan" not in told.lower().split() and len(told) > 60
    assert fig.get_size_inches()[0] in (style.COLUMN, style.PAGE)
    if case == "no massive" and name in WITH_MASSIVE:
        assert any(s in texts(fig) for s in ("no massive", "no token")), texts(fig)


def texts(fig) -> str:
    return "\n".join(t.get_text() for t in fig.findobj(mpl.text.Text))


def test_what_is_off_the_scale_is_told():
    hero = texts(plots.draw("massive_tokens_fp16", of("massive_tokens_fp16")))
    assert "43,210" in hero and "75 % closed" in hero and "gap 12.0" in hero
    infinite = RESULTS["infinite"]
    assert "∞" in texts(plots.draw("massive_tokens_fp16", of("massive_tokens_fp16", infinite)))
    assert "infinite" in texts(plots.draw("gamma_sweep", of("gamma_sweep", infinite)))
    assert "RO: ∞" in texts(plots.draw("dfrot_perplexity", of("dfrot_perplexity", infinite)))


def test_small_gains_have_a_scale_of_their_own():
    """A panel for each setting and start: the seeds of one fill it, whatever the others need."""
    result = copy.deepcopy(of("dfrot_perplexity"))
    for r in result["rows"]:
        if r["bits"] == "4-4-16":
            r["ppl"] *= 1 + 9 * r["seed"]
    fig = plots.draw("dfrot_perplexity", result)
    titles = [ax.get_title(loc="left").splitlines()[0] for ax in fig.axes]
    assert titles == [f"{b}, from {s}" for b in ("16-4-16", "4-4-16") for s in ("RO", "RH")]
    assert [ax.get_yscale() for ax in fig.axes] == ["linear"] * 2 + ["log"] * 2
    for ax, (before, after) in zip(fig.axes, ((41, 30), (29, 28)), strict=False):
        low, high = ax.get_ylim()
        assert high - low < 2 * (before + 1 - (after - 1))
        lines = [line.get_ydata() for line in ax.get_lines() if len(line.get_ydata()) == 2]
        assert sorted(tuple(y) for y in lines) == [(before + k, after + k) for k in (-1, 0, 1)]
    assert "−27 %" in texts(fig) and "−3.4 %" in texts(fig) and "FP 12.5" in texts(fig)


def test_few_weights_are_points_and_many_a_curve():
    result = of("gamma_sweep")
    few = result | {"gamma": [r for r in result["gamma"] if r["gamma"] in ("none", "1.0", "100.0")]}
    drawn = plots.gamma_sweep(few).axes[0]
    assert [t.get_text() for t in drawn.get_xticklabels()] == ["the start", "γ = 1", "γ = 100"]
    assert all(len(line.get_xdata()) == 1 for line in drawn.get_lines()[:6])
    assert len(plots.gamma_sweep(result).axes[0].get_lines()[0].get_xdata()) == 3
    assert "2 weights" in plots.caption("gamma_sweep", few)
    infinite = copy.deepcopy(few)
    infinite["gamma"][0]["ppl"] = "inf"
    assert "infinite: RH, γ = 1" in texts(plots.gamma_sweep(infinite))


@pytest.mark.parametrize("name", ["slips", "corpus_transfer", "recollected"])
def test_no_stem_starts_at_a_cut_axis(name):
    for ax in plots.draw(name, of(name)).axes:
        low, high = ax.get_xlim()
        assert low > 0
        for line in ax.get_lines():
            assert low < line.get_xdata().min() and line.get_xdata().max() < high


def test_slips_have_intervals_and_other_questions_the_seeds_measured_there():
    result = copy.deepcopy(of("slips"))
    assert "30.50 ± 0.71" in texts(plots.slips(result))
    for name, key in (("corpus_transfer", "transfer"), ("recollected", "recollected")):
        result[key][0]["ppl"] = 31.0  # the first seed of "ours"
        dots = [line.get_xdata() for ax in plots.draw(name, result).axes for line in ax.get_lines()]
        assert [31.0, 32.0] in [list(x) for x in dots if len(x) == 2]
        del result["slips"]
        assert not any(
            len(line.get_xdata()) > 1
            for ax in plots.draw(name, result).axes
            for line in ax.get_lines()
        )
        result["slips"] = of("slips")["slips"]


def test_calibration_shows_its_start_and_every_site():
    result = copy.deepcopy(of("calibration_ablation"))
    told = plots.caption("calibration_ablation", result)
    assert "60 of 60: 55.00, 45 of 60: 55.50" in told and "RH itself, not measured" in told
    assert "56.00 ± 1.00 (sd 1.79 % of the mean)" in told
    result["rows"].append(_row("RH", "none", 0, 61.25, "4-4-16") | {"method": "rtn"})
    assert "RH itself, 61.25" in plots.caption("calibration_ablation", result)
    fig = plots.calibration_ablation(result)
    assert "RH itself, 61.25" in texts(fig)
    assert [t.get_text() for t in fig.axes[1].get_xticklabels()] == ["8", "45", "60"]
    for ax in fig.axes:
        assert any(set(line.get_ydata()) == {61.25} for line in ax.get_lines())


def test_axes_and_lines_say_what_they_are():
    assert "floating point, 12.50" in texts(plots.draw("tables_by_bits", of("tables_by_bits")))
    ticks = plots.draw("clipping", of("clipping")).axes[0].get_xticklabels()
    assert [t.get_text() for t in ticks] == ["0.8", "0.9", "1"]
    hero = plots.draw("massive_tokens_fp16", of("massive_tokens_fp16"))
    [label] = [t for t in hero.findobj(mpl.text.Annotation) if t.get_text() == "RO  31.0"]
    assert label.xy == (2.05, 31.0) and abs(label.xyann[0]) < 10
    assert "nothing kept 41.0\nmassive kept 30.5" in texts(hero)


def test_massive_tokens_are_never_thinned_out():
    found = copy.deepcopy(of("error_bars_3d"))
    for n in ("NR", "RO", "RH"):
        found["scatter"][n] = list(np.linspace(1, 2, 3000))
    found["scatter"]["massive"] = list(range(0, 3000, 50))
    told = plots.caption("error_bars_3d", found)
    assert "60 massive tokens" in told and "22 normal tokens" in told
    plots.draw("error_bars_3d", found)


def test_the_screening_tells_both_rankings_and_how_alike_they_are():
    result = of("objective_screening")
    told = plots.caption("objective_screening", result)
    assert "at 16-4-16 from RO 35.00 → 30.02 by centroids (DFRot), γ = 1" in told
    assert "at 4-4-16 from RO 35.00 → 25.02 by soft peak (InfoQuant), γ = 1" in told
    assert "ranking of all 36 at 16-4-16 with that at 4-4-16 -" in told  # another order
    for row in result["screen"]:
        row["ppl"]["4-4-16"] = row["ppl"]["16-4-16"]
    assert "with that at 4-4-16 1.00." in plots.caption("objective_screening", result)
    result["screen_bits"] = ["16-4-16"]
    assert "Kendall" not in plots.caption("objective_screening", result)
    for name in ("cost_and_quality", "prefix_in_cache"):
        assert "evaluation windows 3 to 6" in plots.caption(name, result)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logit_errors", lambda r: r["logits"][0].update(relative_error=7.7e-4)),
        ("magnitude_surfaces", lambda r: r["surfaces"]["NR"][0].__setitem__(0, 77.7)),
        ("outliers_by_layer", lambda r: r["outliers"][0].update(peak_mean=77.7)),
        ("top_activations", lambda r: r["top_activations"][1].update(top=[7777.0, 7.0, 7.0])),
        ("error_scatter", lambda r: r.update(floor=7.77)),
        ("error_bars_3d", lambda r: r["scatter"].update(site="layers.77.mlp")),
        ("error_by_layer", lambda r: r["statistics"][0].update(mean=0.0777)),
        ("error_quantiles", lambda r: r["statistics"][0].update(mean=0.0777)),
        ("ratio_by_kurtosis", lambda r: r["by_kurtosis"][0].update(ratio=0.77)),
        ("massive_tokens_fp16", lambda r: r["closed"].update(of_means=0.77)),
        ("exempted_tokens", lambda r: r["exempted"][1].update(pairs=777)),
        ("loss_curves", lambda r: r["losses"][0].update(rows=777)),
        ("massive_token", lambda r: r["token"]["rotations"]["RO"].update(squared_error=77.7)),
        ("dfrot_scatter", lambda r: r["scatter"].update(site="layers.77.mlp")),
        ("gamma_sweep", lambda r: r["gamma"][1].update(ppl=7.77)),
        ("dfrot_perplexity", lambda r: [x.update(ppl=7.77) for x in r["rows"]]),
        ("tables_by_bits", lambda r: [x.update(ppl=77.7) for x in r["rows"]]),
        ("calibration_ablation", lambda r: r["calibration"]["sites"][0].update(ppl=77.7)),
        ("gamma_sweep_w4a4", lambda r: r["gamma"][1].update(ppl=7.77)),
        ("static_steps", lambda r: r["static"][0].update(ppl=77.7)),
        ("clipping", lambda r: r["clipping"][1].update(ppl=7.77)),
        ("corpus_transfer", lambda r: r["transfer"][0].update(ppl=77.7)),
        ("recollected", lambda r: r["recollected"][0].update(ppl=77.7)),
        ("task_loss", lambda r: r["task_loss"][0].update(ppl=77.7)),
        ("column_cosines", lambda r: [x.update(relative_distance=0.77) for x in r["similarity"]]),
        ("refined_surfaces", lambda r: r["pictures"]["NR"][0].__setitem__(0, 77.7)),
        ("error_by_site", lambda r: [x.update(normal=0.0777) for x in r["errors_by_layer"]]),
        ("begin_of_sequence", lambda r: r["bos"][0].update(ppl=77.7)),
        ("slips", lambda r: [x.update(ppl=77.7) for x in r["slips"]]),
        ("nibble_packing", lambda r: r["nibbles"].update(scale=0.777)),
        ("packed_memory", lambda r: r["memory"]["peak"][0].update(fp16=777_000_000)),
        ("roofline", lambda r: r["speed"]["ceilings"].update(copy=777.0)),
        ("kernel_speed", lambda r: r["speed"].update(device="77 cards")),
        ("gaussian_floor", lambda r: [x["RO"].update(mean=0.0777) for x in r["tokens"]["means"]]),
        ("spikes_under_hadamard", lambda r: r["tokens"]["limits"].update(symmetric=77.7)),
        ("spikes_in_noise", lambda r: [x.update(predicted=0.0777) for x in r["tokens"]["means"]]),
        ("hadamard_wins", lambda r: r["tokens"]["limits"].update(asymmetric=77.7)),
        ("massive_rule", lambda r: r["rule"]["found"]["ours"].update(symmetric=0.077)),
        ("composed_hadamard", lambda r: r["composed"][0].update(mean=0.0777)),
        ("loss_landscape", lambda r: r["alike"].update(massive=0.77)),
        ("objective_screening", lambda r: r["screen"][0]["ppl"].update({"16-4-16": 77.7})),
        ("zero_shot_accuracy", lambda r: [x["correct"].update(mean=0.777) for x in r["table"]]),
        ("paired_accuracy", lambda r: [x["correct"].update(low=-0.777) for x in r["differences"]]),
        ("perplexity_and_accuracy", lambda r: r["ranks"][0].update(methods=0.77)),
        ("cost_and_quality", lambda r: r["pareto"][0]["ppl_w16"].update(mean=77.7)),
        ("prefix_in_cache", lambda r: r["prefix"]["rows"][0].update(plain=77.7)),
        ("gain_by_weight", lambda r: r["sweep"]["rows"][0].update(ppl=77.7)),
        ("rotation_distance", lambda r: [x.update(relative_distance=0.77) for x in r["losses"]]),
    ],
)
def test_captions_are_counted_from_the_result(name, change):
    changed = copy.deepcopy(of(name))
    change(changed)
    before, after = plots.caption(name, of(name)), plots.caption(name, changed)
    seven = [t.replace(".", "").replace(",", "").count("77") for t in (before, after)]
    assert seven[1] > seven[0] == 0


def test_the_case_list_above_and_the_captions_are_complete():
    [mark] = test_captions_are_counted_from_the_result.pytestmark
    assert {name for name, _ in mark.args[1]} == set(plots.FIGURES) == set(plots._templates())
    assert set(plots.FIGURES) <= set(plots.__all__)
    assert all(callable(getattr(plots, name)) for name in plots.FIGURES)


WRITTEN = ("massive_tokens_fp16", "error_scatter", "magnitude_surfaces")
ELSEWHERE = """
import json, sys
from pathlib import Path
from dfrot_lab import plots, tables
root = Path(sys.argv[1])
for name, spec in plots.FIGURES.items():
    result = json.loads((root / spec.notebook / "result.json").read_text())
    fig = plots.draw(name, result)
    if name in sys.argv[2:]:
        plots.save(fig, name, root / spec.notebook / "figures", plots.caption(name, result))
for module in ("torch", "transformers", "matplotlib.pyplot"):
    assert module not in sys.modules, module
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """Figures drawn by a process of its own, with other settings, that must not load torch."""
    root = tmp_path_factory.mktemp("results")
    for notebook, result in FULL.items():
        results.save(root / notebook, result, {})
    environment = os.environ | {
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "MPLBACKEND": "svg",
        "SOURCE_DATE_EPOCH": "1",
    }
    command = [sys.executable, "-c", ELSEWHERE, str(root), *WRITTEN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("name", WRITTEN)
def test_the_bytes_are_the_same_on_every_run(name, elsewhere, tmp_path):
    with mpl.rc_context({"font.size": 20, "savefig.dpi": 50, "pdf.fonttype": 3}):  # a user's own
        fig = plots.draw(name, of(name))
        paths = plots.save(fig, name, tmp_path / "figures", plots.caption(name, of(name)))
        assert mpl.rcParams["font.size"] == 20
    assert [p.suffix for p in paths] == [".pdf", ".png", ".md"]
    for path in paths:
        other = elsewhere / plots.FIGURES[name].notebook / "figures" / path.name
        assert path.read_bytes() == other.read_bytes(), path.name


def test_redraw_draws_what_has_a_result_and_writes_it_whole(tmp_path):
    results.save(tmp_path / "03_massive_tokens_fp16", of("massive_tokens_fp16"), {})
    (tmp_path / "unrelated").mkdir()
    done = plots.redraw(tmp_path)
    folder = tmp_path / "03_massive_tokens_fp16" / "figures"
    assert sorted(done) == sorted(folder.iterdir()) and len(done) == 6
    hero = folder / "massive_tokens_fp16"
    pdf, png = hero.with_suffix(".pdf").read_bytes(), hero.with_suffix(".png").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"CreationDate" not in pdf
    assert b"tIME" not in png and b"Software" not in png
    assert int.from_bytes(png[16:20], "big") >= 200 * style.PAGE
    assert hero.with_suffix(".md").read_text().strip() == plots.caption(
        "massive_tokens_fp16", of("massive_tokens_fp16")
    )


def test_figures_show_themselves_in_jupyter():
    fig = plots.massive_tokens_fp16(of("massive_tokens_fp16"))
    png, size = fig._repr_png_()
    assert png.startswith(b"\x89PNG") and size["width"] == round(96 * style.PAGE)
    assert fig._repr_png_()[0] == png


def test_a_rotation_has_one_colour_and_they_differ():
    names = ("NR", "RO", "RH", "RH2", "DFRot", "massive", "FP")
    assert len({style.COLOUR[n].lower() for n in names}) == len(names)
    assert len({style.MARKER[n] for n in names}) == len(names)
    assert style.COLOUR["DFRot(RO)"] == style.COLOUR["DFRot(RH)"] == style.COLOUR["DFRot"]
    rgb = np.array([mpl.colors.to_rgb(style.COLOUR[n]) for n in names])
    apart = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) + 9 * np.eye(len(names))
    assert apart.min() > 0.25


def test_unknown_names_and_missing_results_say_so_in_a_line(tmp_path):
    with pytest.raises(plots.PlotError, match="'nonsense' is unknown: use one of gamma_sweep, "):
        plots.draw("nonsense", {})
    with pytest.raises(plots.PlotError, match="'nonsense' has no figures"):
        plots.draw_notebook("nonsense", tmp_path)
    with pytest.raises(results.ResultError, match=r"result\.json does not exist"):
        plots.draw_notebook("04_dfrot", tmp_path)
    with pytest.raises(results.ResultError, match=r"holds no NOTEBOOK/result\.json"):
        plots.redraw(tmp_path)
    for ask in (plots.draw, plots.caption):
        with pytest.raises(
            results.ResultError, match=r"needs 'gamma'.*run notebook 04_dfrot"
        ) as caught:
            ask("gamma_sweep", {})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", [".pdf", ".png"])
def test_a_failure_leaves_no_part_of_a_file(broken, tmp_path, monkeypatch):
    fig = plots.draw("rotation_distance", of("rotation_distance"))
    whole = fig.savefig

    def savefig(path, **options):
        if Path(path).suffix == broken:
            Path(path).write_bytes(b"half")
            raise RuntimeError("stop")
        whole(path, **options)

    monkeypatch.setattr(fig, "savefig", savefig)
    (tmp_path / f"rotation_distance{broken}").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"):
        plots.save(fig, "rotation_distance", tmp_path, "caption")
    assert (tmp_path / f"rotation_distance{broken}").read_bytes() == b"old"
    assert not list(tmp_path.glob(".partial-*"))


def test_labels_are_moved_apart_in_order():
    assert style.apart([1.0, 5.0], 1) == [1.0, 5.0]
    assert style.apart([5.0, 1.0, 1.0], 1) == [5.0, 0.5, 1.5]
    moved = style.apart([0.0, 0.1, 0.2, 0.25], 0.5)
    assert moved == sorted(moved) and np.diff(moved).min() >= 0.5 - 1e-9


def test_white_space_of_tokens_is_visible():
    assert style.visible(" the\n") == "␣the↵"
    assert style.visible("") == "∅"
    assert style.visible("日") == "U+65E5"
    assert len(style.visible("a" * 40)) == 12

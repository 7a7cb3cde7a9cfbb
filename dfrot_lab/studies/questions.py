"""Study 06: what the paper's reviewers asked, one function a question; W16A4 unless said."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dfrot_lab import activations, dfrot, evaluation, files, massive, rotations
from dfrot_lab.evaluation import Perplexity, spread
from dfrot_lab.lab import CODE, Lab, parse_rotation
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.results import Claim, rounded
from dfrot_lab.studies.invariance import surfaces

__all__ = [
    "begin_of_sequence",
    "claims",
    "clipping",
    "errors_by_layer",
    "pictures",
    "recollected",
    "refined_again",
    "similarity",
    "slips",
    "static",
    "task_loss",
    "transfer",
]

PAIR = ("RH", "DFRot(RH)")
OURS, SYMMETRIC = "ours", "symmetric in the loop"


def static(lab: Lab, bits: list[str], seed: int, windows: int) -> list[dict[str, Any]]:
    """Perplexity with steps per token, found anew, and per tensor, fixed on calibration text."""
    grid = [(n, b, per) for n in PAIR for b in bits for per in ("token", "tensor")]
    return [
        {"rotation": n, "bits": b, "per": per}
        | {"ppl": lab.perplexity(n, seed, bits=b, windows=windows, per=per)["ppl"]}
        for n, b, per in tqdm(grid, desc="static", unit="row")
    ]


def clipping(lab: Lab, clips: list[float], seed: int, windows: int) -> list[dict[str, Any]]:
    """Perplexity with the range of every token cut to a share `clip` of its own."""
    grid = [(n, c) for n in PAIR for c in clips]
    return [
        {"rotation": n, "clip": c, "ppl": lab.perplexity(n, seed, windows=windows, clip=c)["ppl"]}
        for n, c in tqdm(grid, desc="clipping", unit="row")
    ]


def transfer(lab: Lab, corpora: list[str], seed: int, windows: int) -> list[dict[str, Any]]:
    """Perplexity on each corpus of RH and of DFRot(RH) refined on each corpus."""
    labs = {c: lab if c == lab.corpus else lab.with_corpus(c) for c in corpora}
    refined = {c: str(x.rotation_file("DFRot(RH)", seed)) for c, x in labs.items()}
    out = []
    for test, here in tqdm(labs.items(), desc="corpora"):
        for source, name in {"none": "RH", **refined}.items():
            ppl = here.perplexity(name, seed, windows=windows)["ppl"]
            out.append({"calibrated": source, "tested": test, "ppl": ppl})
    return out


def recollected(lab: Lab, rounds: int, seed: int, windows: int) -> list[dict[str, Any]]:
    """R1 refined again on the activations of the model it quantizes, un-rotated; round 0: as usual."""
    path = lab.rotation_file("DFRot(RH)", seed)
    out = [{"round": 0, "ppl": lab.perplexity(str(path), seed, windows=windows)["ppl"]}]
    for k in range(1, rounds + 1):

        def make(key: str, checkpoint: Path, k: int = k, path: Path = path) -> tuple:
            r, model = rotations.load(path)[0], lab.quantized(str(path), seed)
            r, log = refined_again(lab, model, r, lab.iterations, progress=f"round {k}")
            return r, {"log": asdict(log), "round": k}

        about = {"round": k, "from": files.sha256(path), "seed": seed, "rows": lab.rows}
        about |= {"iterations": lab.iterations, "solver": lab.solver}
        code = (*CODE, "dfrot_lab.studies.questions")
        path = lab.kept_rotation(f"recollected-{k}-seed{seed}", about, make, code)
        ppl = lab.perplexity(str(path), seed, windows=windows)["ppl"]
        loss = rotations.load(path)[1]["log"]["rotated"][-1]
        out.append({"round": k, "ppl": ppl, "loss": float(f"{loss:.6g}")})
    return out


def refined_again(
    lab: Lab,
    model: nn.Module,
    r: Tensor,
    iterations: int,
    objective: str = "centroids",
    progress: str = "again",
) -> tuple[Tensor, dfrot.Log]:
    """(R1, its log) from `r` on, on what the norms of `model`, which has `r`, put out, turned back by Rᵀ.

    The lab's calibration windows, its share of rows and γ = 100. Memory holds these activations once.
    """
    back, tokens, mine = r.mT.float(), lab.calibration_tokens, lab.activations
    x, n = torch.empty(len(mine.sites), tokens.numel(), mine.d), tokens.shape[1]
    for k, window in enumerate(tokens):
        for i, _, y in activations.capture(model, window[None]):
            x[i, k * n : (k + 1) * n] = y[0].float().cpu() @ back
    return dfrot.optimize(
        activations.Activations.of(x), r, QuantSpec(), dfrot.Weighting(),
        iterations=iterations, rows=lab.rows, objective=objective, device=lab.device,
        progress=progress,
    )  # fmt: skip


def task_loss(lab: Lab, seed: int, windows: int) -> list[dict[str, Any]]:
    """KL to the floating-point model, beside perplexity and the mean relative error of activations."""
    grid = [(n, "none") for n in ("RO", "RH", "DFRot(RO)", "DFRot(RH)")]
    grid += [("RO", "massive"), ("RH", "massive")]
    out, held = [], _held_out(lab)
    for name, keep in tqdm(grid, desc="task loss", unit="row"):
        model = lab.quantized(name, seed, keep=keep)
        kl = [evaluation.window_kl(model, lab.lm, w) for w in lab.evaluation_tokens(windows)]
        error = [_error(x, lab.rotation(name, seed), mask, keep) for x, mask in held.values()]
        out.append(
            {"rotation": name, "keep": keep, "kl": sum(kl) / len(kl)}
            | {"error": float(f"{sum(error) / len(error):.6g}")}
            | {"ppl": lab.perplexity(name, seed, keep=keep, windows=windows)["ppl"]}
        )
    return out


def _held_out(lab: Lab) -> dict[str, tuple[Tensor, Tensor]]:
    """Site → (rows of the first evaluation window, mask of the massive ones)."""
    found = {s: lab.held_out(s) for s in lab.activations.sites}
    return {s: (x, massive.is_massive(x, QuantSpec())) for s, x in found.items()}


def _error(x: Tensor, r: Tensor | None, mask: Tensor, keep: str) -> float:
    error = massive.relative_error(x if r is None else x @ r.to(x.dtype), QuantSpec())
    return (error * ~mask if keep == "massive" else error).mean().item()


def similarity(lab: Lab, seeds: list[int]) -> list[dict[str, Any]]:
    """Cosine of each column of R1 with the same column of its start, and ‖R − R₀‖_F/√(2d)."""
    out = []
    for name in ("DFRot(RH)", "DFRot(RO)"):
        for seed in seeds:
            r, start = lab.rotation(name, seed), lab.rotation(parse_rotation(name)[1], seed)
            out.append(
                {"rotation": name, "seed": seed, "cosines": rounded((r * start).sum(0), 4)}
                | {k: float(f"{v:.5g}") for k, v in dfrot.distance(r, start).items()}
            )
    return out


def pictures(lab: Lab, site: str, seed: int) -> dict[str, Any]:
    """|x| by token × channel at `site`: original, RH, DFRot(RH)."""
    return surfaces(lab, site, seed, names=("NR", *PAIR))


def errors_by_layer(lab: Lab, seed: int) -> list[dict[str, Any]]:
    """Mean relative error at every site of a held-out window: massive and normal rows apart."""
    out = []
    for site, (x, mask) in _held_out(lab).items():
        for name in ("RO", *PAIR):
            error = massive.relative_error(lab.rotated(x, name, seed), QuantSpec())
            parts = {"massive": error[mask], "normal": error[~mask]}
            out.append(
                {"site": site, "rotation": name}
                | {k: float(f"{v.mean().item():.5g}") for k, v in parts.items() if len(v)}
            )
    return out


def begin_of_sequence(lab: Lab, seed: int, windows: int) -> list[dict[str, Any]]:
    """Perplexity of the same windows as they are and with BOS in front (the last token dropped)."""
    bos = lab.tokenizer.bos_token_id
    if bos is None:
        return []
    out = []
    for name in ("FP", "RO", *PAIR):
        model = lab.lm if name == "FP" else lab.quantized(name, seed)
        for with_bos in (False, True):
            nll = []
            for w in lab.evaluation_tokens(windows):
                window = torch.cat([w.new_tensor([bos]), w[:-1]]) if with_bos else w
                nll.append(evaluation.window_nll(model, window))
            out.append({"rotation": name, "bos": with_bos, "ppl": Perplexity(nll).value})
    return out


def slips(lab: Lab, seeds: list[int], windows: int) -> list[dict[str, Any]]:
    """DFRot(RH) with one thing as released or as printed: perplexity, evaluated asymmetrically.

    moved: how far R1 is from its start, see `dfrot.distance`.
    """
    ways: dict[str, dict[str, Any] | None] = {
        "RH itself": None,
        OURS: {},
        SYMMETRIC: {"symmetric": True},
        "QR after each SVD": {"qr": True},
        "symmetric and QR, as released": {"symmetric": True, "qr": True},
        "group means, as printed": {"form": "group_mean"},
        "γ for γ²": {"gamma": 10.0},
    }
    out = []
    grid = [(way, options, seed) for way, options in ways.items() for seed in seeds]
    for way, options, seed in tqdm(grid, desc="slips", unit="row"):
        name, row = "RH", {"way": way, "seed": seed}
        if options is not None:
            name = str(lab.rotation_file("DFRot(RH)", seed, **options))
            moved = dfrot.distance(lab.rotation(name), lab.rotation("RH", seed))[
                "relative_distance"
            ]
            row["moved"] = float(f"{moved:.4g}")
        out.append(row | {"ppl": lab.perplexity(name, seed, windows=windows)["ppl"]})
    return out


def claims(result: dict[str, Any]) -> list[Claim]:
    """What the answers come to; the paper says none of this."""
    ppl = {(r["rotation"], r["bits"], r["per"]): r["ppl"] for r in result["static"]}
    bits = list(dict.fromkeys(r["bits"] for r in result["static"]))
    out = [
        Claim(
            f"DFRot also helps static per-tensor steps at {b}",
            "not tested",
            f"RH {ppl['RH', b, 'tensor']:,.2f} → DFRot {ppl['DFRot(RH)', b, 'tensor']:,.2f} "
            f"(per token {ppl['RH', b, 'token']:.2f} → {ppl['DFRot(RH)', b, 'token']:.2f})",
            "lower",
            ppl["DFRot(RH)", b, "tensor"] < ppl["RH", b, "tensor"],
        )
        for b in bits
    ]
    best = {
        n: min((r for r in result["clipping"] if r["rotation"] == n), key=lambda r: r["ppl"])
        for n in PAIR
    }
    way = {
        w: spread([r["ppl"] for r in result["slips"] if r["way"] == w]) for w in (OURS, SYMMETRIC)
    }
    out.append(
        Claim(
            "DFRot stays ahead when both are clipped at their best",
            "not tested",
            ", ".join(f"{n} {r['ppl']:.2f} at {r['clip']:g}" for n, r in best.items())
            + f" (one seed; sd over seeds, unclipped, {way[OURS]['sd']:.2f})",
            "lower by more than the sd over seeds",
            way[OURS]["n"] > 1 and best["RH"]["ppl"] - best["DFRot(RH)"]["ppl"] > way[OURS]["sd"],
        )
    )
    tested = {(r["calibrated"], r["tested"]): r["ppl"] for r in result["transfer"]}
    away = [(c, t) for c, t in tested if c not in ("none", t)]
    if away:
        held = sum(tested[c, t] < tested["none", t] for c, t in away)
        out.append(
            Claim(
                "A rotation refined on one corpus helps on another",
                "not tested",
                f"in {held} of {len(away)} pairs below RH",
                "in every pair",
                held == len(away),
            )
        )
    loss = {(r["rotation"], r["keep"]): r for r in result["task_loss"]}
    order = [
        [k for k, _ in sorted(loss.items(), key=lambda kv, m=m: kv[1][m])] for m in ("kl", "error")
    ]
    out.append(
        Claim(
            "Activation error ranks rotations as the task loss does",
            "assumed",
            "; ".join(
                f"{m}: " + " < ".join(n + ("*" if k == "massive" else "") for n, k in o)
                for m, o in zip(("KL", "error"), order, strict=True)
            )
            + " (*: massive kept)",
            "the same order",
            order[0] == order[1],
        )
    )
    out.append(
        Claim(
            "The quantizer of the evaluation is the right one in the loop",
            "symmetric in the loop, asymmetric in the evaluation (released code)",
            "; ".join(f"{w} {s['mean']:.2f} ± {s['sd']:.2f}" for w, s in way.items()),
            "means over seeds differ by more than the larger sd",
            way[OURS]["n"] > 1
            and way[SYMMETRIC]["mean"] - way[OURS]["mean"] > max(w["sd"] for w in way.values()),
        )
    )
    return out

"""Study 08, the loss: along the path from RH to the refined R1, and what the weight γ of it buys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dfrot_lab import dfrot, geodesics, massive, paper
from dfrot_lab.activations import Activations
from dfrot_lab.lab import Lab
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.results import Claim
from dfrot_lab.studies.perplexities import gamma_sweep

__all__ = ["alike", "claims", "errors", "path", "published", "sweep", "texts"]

STARTS = ("RH", "RO")
TEXTS = ("calibration", "held out")


def texts(lab: Lab) -> dict[str, tuple[Tensor, Tensor]]:
    """Text → (unrotated rows [n, d], mask [n] of the massive ones), every site's.

    "calibration": the rows that R1 was refined on, all massive ones and a share `lab.rows` of the others;
    "held out": drawn alike from the first evaluation window.
    """
    sites = lab.activations.sites
    parts = [_drawn(lab, Activations.of(lab.held_out(s)), i) for i, s in enumerate(sites)]
    found = {"calibration": _drawn(lab, lab.activations), "held out": torch.cat(parts)}
    return {text: (x, massive.is_massive(x, QuantSpec())) for text, x in found.items()}


def _drawn(lab: Lab, x: Activations, seed: int = 0) -> Tensor:
    """The rows that `dfrot.optimize` would take of `x`, [n, d]."""
    plain, spec = dfrot.Weighting(gamma=1.0), QuantSpec()
    few, _ = dfrot.subsample(x, spec, plain, dfrot.row_weights(x, spec, plain)[0], lab.rows, seed)
    return few.X.flatten(0, 1)


def errors(rows: tuple[Tensor, Tensor], r: Tensor, device: str) -> dict[str, float]:
    """{normal, massive: mean relative error of the group under R [d, d]}; without a group of no rows."""
    x, mask = rows
    r = r.to(device, x.dtype)
    found = [massive.relative_error(part.to(device) @ r, QuantSpec()) for part in x.split(4096)]
    error = torch.cat(found).cpu().double()
    groups = {"normal": error[~mask], "massive": error[mask]}
    return {name: float(f"{e.mean().item():.6g}") for name, e in groups.items() if len(e)}


def alike(rows: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Root mean square cosine between two rows of a group: 1 for one direction, 1/√d for random ones."""
    x, mask = rows
    found = {}
    for group, chosen in (("normal", ~mask), ("massive", mask)):
        unit = torch.nn.functional.normalize(x[chosen], dim=-1)
        if len(unit):
            found[group] = float(f"{((unit.mT @ unit).norm() / len(unit)).item():.4g}")
    return found


def weighted(row: dict[str, Any], share: float, gamma: float) -> float:
    """DFRot's loss over Σw²‖x‖², from the errors of both groups and the `share` of massive rows."""
    heavy = 1.0 if math.isinf(gamma) else share * gamma**2
    light = 0.0 if math.isinf(gamma) else 1 - share
    return (light * row["normal"] + heavy * row.get("massive", 0.0)) / (light + heavy)


def path(
    lab: Lab, found: dict[str, tuple[Tensor, Tensor]], gammas: list[float], seed: int, steps: int
) -> dict[str, Any]:
    """Errors of both groups of both `texts` along the geodesic from RH to R1 refined with each γ.

    t goes in 1/`steps` from the start (0) over R1 (1) to 1¼. share: of massive rows in the calibration text;
    loss: weighted with it and the γ that R1 was refined with.
    """
    count = int(found["calibration"][1].sum())
    share = count / (count + (len(found["calibration"][1]) - count) / lab.rows)
    rows, whole, start = [], {}, lab.rotation("RH", seed)
    times = [i / steps for i in range(steps + steps // 4 + 1)]
    bar = tqdm(total=len(gammas) * len(times), desc="path", unit="point")
    for gamma in gammas:
        turned, continuous = geodesics.between(start, lab.rotation("DFRot(RH)", seed, gamma=gamma))
        whole[str(float(gamma))] = continuous
        for t in times:
            r = turned(t)
            for text in TEXTS:
                row = {"gamma": str(float(gamma)), "t": t, "text": text}
                row |= errors(found[text], r, lab.device)
                rows.append(row | {"loss": float(f"{weighted(row, share, gamma):.6g}")})
            bar.update()
    bar.close()
    return {"rows": rows, "share": float(f"{share:.4g}"), "continuous": whole}


def sweep(
    lab: Lab,
    found: dict[str, tuple[Tensor, Tensor]],
    gammas: list[float],
    seed: int,
    windows: int,
    bits: str,
) -> dict[str, Any]:
    """Each start as it is and refined with each γ: errors of both groups on both texts, and perplexity.

    The perplexities are those of notebook 04's sweep, and not measured again where that has run.
    """
    rows = []
    for row in gamma_sweep(lab, gammas, seed, windows, bits):
        name, options = row["start"], {}
        if row["gamma"] != "none":
            name, options = f"DFRot({name})", {"gamma": float(row["gamma"])}
        r = lab.rotation(name, seed, **options)
        rows.append(row | {text: errors(found[text], r, lab.device) for text in TEXTS})
    return {"rows": rows, "published": published(), "windows": windows, "bits": bits}


def published() -> list[dict[str, Any]]:
    """The paper's perplexity at 4-4-16 of each start and of R1 refined with γ = 1 and 100 (GPTQ weights).

    RH is QuaRot of Table 2, the edition of Figures 5 and 6; RO is of Table 1, which alone has it.
    """
    table = paper.numbers()["table2_main_ppl_gptq"]
    out = []
    for model in ("LLaMA2-7B", "LLaMA3-8B"):
        plain = {
            "RH": table["4-4-16"]["QuaRot"][table["models"].index(model)],
            "RO": paper.table1(model, "RO"),
        }
        for start in STARTS:
            refined = {str(float(g)): paper.gamma(model, start, g) for g in (1, 100)}
            out.append({"model": model, "start": start, "none": plain[start]} | refined)
    return out


def at_one(none: float, one: float, weighted: float) -> float:
    """Share of the gain none → weighted that is there with γ = 1; NaN where nothing is gained."""
    return (none - one) / (none - weighted) if weighted < none else math.nan


def claims(result: dict[str, Any]) -> list[Claim]:
    """What the path and the sweep come to."""
    rows = result["path"]["rows"]
    last = list(dict.fromkeys(r["gamma"] for r in rows))[-1]
    shown = "∞" if math.isinf(float(last)) else f"{float(last):g}"
    line = {text: [r for r in rows if r["gamma"] == last and r["text"] == text] for text in TEXTS}
    ends = {text: [next(r for r in line[text] if r["t"] == t) for t in (0, 1)] for text in TEXTS}
    inside = [r["loss"] for r in line["calibration"] if 0 < r["t"] < 1]
    first, final = (r["loss"] for r in ends["calibration"])
    out = [
        Claim(
            f"No barrier lies between RH and R1 (γ = {shown})",
            "not given",
            f"loss {first:.5f} at RH, {final:.5f} at R1, at most {max(inside):.5f} between",
            "nowhere between above the start",
            max(inside) <= first,
        )
    ]
    both = {text: [r.get("massive") for r in ends[text]] for text in TEXTS}
    if all(None not in v for v in both.values()):
        normal = [r["normal"] for r in ends["held out"]]
        gains = {text: 1 - after / before for text, (before, after) in both.items()}
        out.append(
            Claim(
                f"What R1 gains on massive tokens it keeps on other text (γ = {shown})",
                "assumed: R1 comes from one sample (Table 3)",
                f"massive tokens {-gains['calibration']:+.0%} on the calibration text, "
                f"{-gains['held out']:+.0%} held out; normal tokens "
                f"{normal[1] / normal[0] - 1:+.1%} held out",
                "at least half of the gain, held out",
                gains["held out"] >= gains["calibration"] / 2,
            )
        )
    if "massive" in (cosines := result["alike"]):
        out.append(
            Claim(
                "One R1 can serve all massive tokens, since they are nearly one vector",
                "not measured",
                "rms cosine between two "
                + ", ".join(f"{group} tokens {v:.2f}" for group, v in cosines.items()),
                "≥ 0.8 between massive tokens",
                cosines["massive"] >= 0.8,
            )
        )
    return [*out, *_weight(result["sweep"])]


def _weight(sweep: dict[str, Any]) -> list[Claim]:
    """How much of DFRot's gain in perplexity is there without weights, from each start."""
    ppl = {(r["start"], r["gamma"]): float(r["ppl"]) for r in sweep["rows"]}
    heavy = [g for _, g in ppl if g not in ("none", "1.0")]
    if not heavy or ("RH", "1.0") not in ppl:
        return []
    out, where = [], f"({sweep['bits']}, one seed, windows: {sweep['windows'] or 'all'})"
    mine = {s: [ppl[s, g] for g in ("none", "1.0", heavy[-1])] for s in STARTS}
    theirs = {
        s: {r["model"]: [r[g] for g in ("none", "1.0", "100.0")] for r in sweep["published"]
            if r["start"] == s}
        for s in STARTS
    }  # fmt: skip
    out.append(
        Claim(
            "From RH, γ = 100 gains beyond the plain alternation, γ = 1",
            "; ".join(f"{m} {v[1]} → {v[2]}" for m, v in theirs["RH"].items())
            + " (Figure 5, 4-4-16 with GPTQ)",
            f"{mine['RH'][1]:.2f} → {mine['RH'][2]:.2f} {where}",
            "perplexity lower",
            mine["RH"][2] < mine["RH"][1],
        )
    )
    for start in STARTS:
        shares = {m: at_one(*v) for m, v in theirs[start].items()}
        out.append(
            Claim(
                f"From {start}, at least half of DFRot's gain is there without weights",
                "not said; its numbers: "
                + ", ".join(f"{m} {share:.0%}" for m, share in shares.items()),
                f"{' → '.join(f'{v:.2f}' for v in mine[start])} (start, γ = 1, γ = {heavy[-1]}): "
                f"{at_one(*mine[start]):.0%} {where}",
                "≥ 50 % of what the largest γ gains",
                at_one(*mine[start]) >= 0.5,
            )
        )
    return out

"""Study 04: R1 refined by DFRot: losses, one massive token, the γ sweep, perplexity."""

from __future__ import annotations

from typing import Any

import torch

from dfrot_lab import dfrot, massive, paper, rotations
from dfrot_lab.lab import Lab
from dfrot_lab.quantizers import QuantSpec, fake_quantize, squared_error
from dfrot_lab.results import Claim, rounded
from dfrot_lab.studies.perplexities import gamma_sweep, paired, perplexities, table

__all__ = [
    "claims",
    "gamma_sweep",
    "losses",
    "massive_token",
    "paired",
    "perplexities",
    "scatter",
    "summary",
    "table",
]


def losses(lab: Lab, seeds: list[int], gamma: float) -> list[dict[str, Any]]:
    """For each start and seed: loss at every half step, rows used, and how far R1 has moved."""
    rows = []
    for start in ("RH", "RO"):
        for seed in seeds:
            r = lab.rotation(f"DFRot({start})", seed, gamma=gamma)
            log = lab.losses(f"DFRot({start})", seed, gamma=gamma)
            moved = dfrot.distance(r, rotations.START[start](r.shape[-1], seed))
            rows.append(
                {
                    "start": start,
                    "seed": seed,
                    "quantized": rounded(log["quantized"]),
                    "rotated": rounded(log["rotated"]),
                    "rows": log["rows"],
                    "massive_rows": log["massive_rows"],
                    "orthogonality_error": float(f"{rotations.orthogonality_error(r):.1e}"),
                }
                | {k: float(f"{v:.5g}") for k, v in moved.items()}
            )
    return rows


def massive_token(lab: Lab, site: str, gamma: float, seed: int = 0) -> dict[str, Any]:
    """The massive token of `site` that RO hurts most: X and Quant X under NR, RO, RH, DFRot(RH).

    On an evaluation window, which the refined rotation has not seen.
    """
    spec, x = QuantSpec(), lab.held_out(site)
    mask = massive.is_massive(x, spec)
    if not mask.any():
        raise ValueError(f"site {site!r} holds no massive token: choose another site")
    damage = squared_error(lab.rotated(x, "RO", seed), spec).where(mask, torch.tensor(-1.0))
    index = int(damage.argmax())
    token = lab.evaluation_tokens(1)[0, index]
    out = {
        "site": site,
        "index": index,
        "text": lab.tokenizer.decode([int(token)]),
        "rotations": {},
    }
    for name in ("NR", "RO", "RH", "DFRot"):
        y = _rotated(lab, x[index : index + 1], name, gamma, seed)[0]
        q = fake_quantize(y, spec)
        out["rotations"][name] = {
            "x": rounded(y, 5),
            "q": rounded(q, 5),
            "squared_error": float(f"{(y - q).square().sum().item():.5g}"),
        }
    return out


def scatter(lab: Lab, site: str, gamma: float, seed: int = 0) -> dict[str, Any]:
    """‖x − Q(x)‖² of each token at `site` under RH and DFRot(RH), and the massive ones; held out."""
    spec, x = QuantSpec(), lab.held_out(site)
    errors = {
        name: rounded(squared_error(_rotated(lab, x, name, gamma, seed), spec), 5)
        for name in ("RH", "DFRot")
    }
    mask = massive.is_massive(x, spec)
    return errors | {"site": site, "massive": mask.nonzero().flatten().tolist()}


def _rotated(lab: Lab, x: torch.Tensor, name: str, gamma: float, seed: int) -> torch.Tensor:
    if name == "DFRot":
        return lab.rotated(x, "DFRot(RH)", seed, gamma=gamma)
    return lab.rotated(x, name, seed)


def summary(headline: list[dict[str, Any]], closing: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows, table of means, and paired differences start − refined over (seed, window).

    Closing rows at the bits of the headline are left out: they are among its own.
    """
    closing = [r for r in closing if r["bits"] != headline[0]["bits"]]
    pairs = [("RH", "DFRot(RH)"), ("RO", "DFRot(RO)")]
    return {
        "rows": headline + closing,
        "bits": headline[0]["bits"],
        "table": table(headline + closing),
        "paired": [paired(headline, (a, "none"), (b, "none")) for a, b in pairs],
    }


def claims(result: dict[str, Any]) -> list[Claim]:
    """The closing table of notebook 04."""
    bits = result["bits"]
    mean = {r["rotation"]: r["mean"] for r in result["table"] if r["bits"] == bits}
    sd = {r["rotation"]: r["sd"] for r in result["table"] if r["bits"] == bits}
    pair = {(p["a"], p["b"]): p for p in result["paired"]}
    rh = pair["RH none", "DFRot(RH) none"]
    gain = 1 - mean["DFRot(RO)"] / mean["RO"]
    steps = [
        after - before
        for row in result["losses"]
        for before, after in zip(row["quantized"], row["rotated"], strict=True)
    ]
    anew = [
        later - rotated
        for row in result["losses"]
        for later, rotated in zip(row["quantized"][1:], row["rotated"], strict=False)
    ]
    token, paper_token = result["token"]["rotations"], paper.token_errors()
    two, three = "LLaMA2-7B", "LLaMA3-8B"
    published = {
        start: "; ".join(
            f"{m} {paper.table1(m, start)} → {paper.gamma(m, start)}" for m in (two, three)
        )
        for start in ("RO", "RH")
    }
    out = [
        Claim(
            "The Procrustes step never raises the loss",
            "not stated; by construction",
            f"largest change {max(steps):.1e} over {len(steps)} half steps",
            "≤ 1e-6 of Σw²‖x‖², at every half step",
            max(steps) <= 1e-6,
        ),
        Claim(
            "Quantizing anew does not either",
            "not stated; assumed",
            f"{sum(v > 0 for v in anew)} of {len(anew)} half steps rise, "
            f"by {max(anew, default=0):.1e} at most",
            "no half step rises (per-token scales follow max|x|, so it may)",
            max(anew, default=0) <= 0,
        ),
        Claim(
            "DFRot removes the error of a massive token (held-out window)",
            ", ".join(f"{n} {v}" for n, v in paper_token.items())
            + " (Figure 4, LLaMA3-8B, d = 4096)",
            ", ".join(f"{n} {v['squared_error']:.2f}" for n, v in token.items()),
            "DFRot below half of RH",
            token["DFRot"]["squared_error"] < token["RH"]["squared_error"] / 2,
        ),
        Claim(
            "DFRot from RO improves on RO",
            published["RO"] + " (Table 1; Figure 6, γ = 100)",
            f"{mean['RO']:.2f} ± {sd['RO']:.2f} → "
            f"{mean['DFRot(RO)']:.2f} ± {sd['DFRot(RO)']:.2f}, {gain:.0%}",
            "mean over seeds at least 12 % lower",
            gain >= 0.12,
        ),
        Claim(
            "DFRot from RH improves on RH",
            published["RH"] + " (Table 1; Figure 5, γ = 100)",
            f"{mean['RH']:.2f} ± {sd['RH']:.2f} → {mean['DFRot(RH)']:.2f} ± {sd['DFRot(RH)']:.2f}; "
            f"Δnll {rh['mean']:.3f} [{rh['low']:.3f}, {rh['high']:.3f}]",
            "mean lower and the 95 % interval of Δnll over windows above 0",
            mean["DFRot(RH)"] < mean["RH"] and rh["low"] > 0,
        ),
    ]
    for row in result["table"]:
        if row["bits"] != bits and row["rotation"] == "DFRot(RH)":
            base = next(
                r for r in result["table"] if r["bits"] == row["bits"] and r["rotation"] == "RH"
            )
            out.append(
                Claim(
                    f"It holds at {row['bits']} with RTN weights",
                    "; ".join(
                        f"{m} {paper.readme_rtn(m, 'QuaRot-RTN')} → {paper.readme_rtn(m, 'DFRot-RTN')}"
                        for m in (two, three)
                    )
                    + " (README, RTN 4-4-16)",
                    f"{base['mean']:.2f} ± {base['sd']:.2f} → {row['mean']:.2f} ± {row['sd']:.2f}",
                    "mean over seeds lower",
                    row["mean"] < base["mean"],
                )
            )
    return out

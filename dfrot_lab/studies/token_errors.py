"""Study 02: the 4-bit error of every token under NR, RO and RH."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfrot_lab import massive, paper
from dfrot_lab.evaluation import spread
from dfrot_lab.lab import Lab
from dfrot_lab.quantizers import QuantSpec, squared_error
from dfrot_lab.results import Claim, rounded

__all__ = ["by_kurtosis", "by_layer", "claims", "floor", "scatter", "shares", "statistics"]

ROTATIONS = ("NR", "RO", "RH")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def scatter(lab: Lab, site: str, spec: QuantSpec, seed: int = 0) -> dict[str, Any]:
    """‖x − Q(x)‖² of each token at `site` under NR, RO and RH, and which tokens are massive."""
    x = lab.activations.site(site)
    tokens = lab.calibration_tokens.flatten()
    mask = massive.is_massive(x, spec)
    return {name: rounded(_errors(lab, x, name, seed, spec), 5) for name in ROTATIONS} | {
        "site": site,
        "massive": mask.nonzero().flatten().tolist(),
        "massive_text": [lab.tokenizer.decode([int(tokens[i])]) for i in mask.nonzero().flatten()],
        "published_rule": int(massive.published_rule(x, spec).sum()),
    }


def _errors(lab: Lab, x: Tensor, name: str, seed: int, spec: QuantSpec) -> Tensor:
    return squared_error(lab.rotated(x, name, seed), spec)


def floor(lab: Lab, spec: QuantSpec) -> float:
    """The Gaussian floor as a squared error: ε(d)·d for a row of norm √d."""
    d = lab.activations.d
    return massive.gaussian_floor(d, spec) * d


def by_layer(lab: Lab, spec: QuantSpec, seeds: list[int]) -> list[dict[str, Any]]:
    """Mean relative error of normal and massive tokens at every site, by rotation and seed.

    Also the share of each site's tokens whose error grows from RO to RH, and quantiles over tokens.
    """
    rows = []
    for i, site in enumerate(lab.activations.sites):
        x = lab.activations.X[i]
        mask, norm = massive.is_massive(x, spec), x.square().sum(-1)
        for seed in seeds:
            errors = {n: _errors(lab, x, n, seed, spec) / norm for n in ROTATIONS}
            for name, e in errors.items():
                row = {"site": site, "rotation": name, "seed": seed, "massive": int(mask.sum())}
                for group, chosen in (("normal", ~mask), ("massive", mask)):
                    part = e[chosen]
                    row[group + "_mean"] = _short(part.mean()) if len(part) else None
                    row[group + "_quantiles"] = (
                        rounded(torch.quantile(part, torch.tensor(QUANTILES)), 5)
                        if len(part)
                        else None
                    )
                    above = (errors["RH"] > errors["RO"])[chosen].float()
                    row[group + "_RH_above_RO"] = _short(above.mean()) if len(part) else None
                rows.append(row)
    return rows


def _short(value: Tensor) -> float:
    return float(f"{value.item():.5e}")


def by_kurtosis(
    lab: Lab, spec: QuantSpec, seeds: list[int], bins: int = 12
) -> list[dict[str, Any]]:
    """RH's error over RO's against the kurtosis of the unrotated token: is it spikes that RH likes?

    Tokens of every site and seed in bins of equal numbers by kurtosis D·Σx⁴/(Σx²)² (3: Gaussian, D: one
    spike); each row is a bin: mean kurtosis, mean ratio, share of massive tokens, n.
    """
    kurtosis, ratio, mask = [], [], []
    for x in lab.activations.X:
        k = massive.kurtosis(x)
        m = massive.is_massive(x, spec)
        for seed in seeds:
            kurtosis.append(k)
            mask.append(m)
            ratio.append(_errors(lab, x, "RH", seed, spec) / _errors(lab, x, "RO", seed, spec))
    k, r, m = torch.cat(kurtosis), torch.cat(ratio), torch.cat(mask).float()
    rows = []
    for part in k.argsort(stable=True).tensor_split(bins):
        values = {"kurtosis": k[part].mean(), "ratio": r[part].mean(), "massive": m[part].mean()}
        rows.append({name: _short(v) for name, v in values.items()} | {"n": len(part)})
    return rows


def statistics(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over all sites, mean ± sd over seeds: mean error of both groups, and the mean over sites of each
    site's quantiles, by rotation.

    Massive tokens are averaged with the weight of their number at each site.
    """
    table = []
    for name in ROTATIONS:
        for group in ("normal", "massive"):
            means, quantiles = [], []
            for seed in sorted({r["seed"] for r in rows}):
                mine = [r for r in rows if r["rotation"] == name and r["seed"] == seed]
                mine = [r for r in mine if r[group + "_mean"] is not None]
                weights = [r["massive"] if group == "massive" else 1 for r in mine]
                if not mine:
                    continue
                total = sum(weights)
                means.append(
                    sum(w * r[group + "_mean"] for w, r in zip(weights, mine, strict=True)) / total
                )
                quantiles.append(
                    [
                        sum(
                            w * r[group + "_quantiles"][k]
                            for w, r in zip(weights, mine, strict=True)
                        )
                        / total
                        for k in range(len(QUANTILES))
                    ]
                )
            if means:
                average = torch.tensor(quantiles).mean(0)
                table.append(
                    {"rotation": name, "group": group, "quantiles": rounded(average, 5)}
                    | spread(means)
                )
    return table


def shares(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Share of tokens with a larger error under RH than under RO, mean ± sd over seeds, by group."""
    out = {}
    for group in ("normal", "massive"):
        per_seed = []
        for seed in sorted({r["seed"] for r in rows}):
            mine = [r for r in rows if r["rotation"] == "RH" and r["seed"] == seed]
            mine = [r for r in mine if r[group + "_RH_above_RO"] is not None]
            weights = [r["massive"] if group == "massive" else 1 for r in mine]
            if mine:
                values = [w * r[group + "_RH_above_RO"] for w, r in zip(weights, mine, strict=True)]
                per_seed.append(sum(values) / sum(weights))
        if per_seed:
            out[group] = spread(per_seed)
    return out


def claims(result: dict[str, Any]) -> list[Claim]:
    """The closing table of notebook 02."""
    mean = {(r["rotation"], r["group"]): r["mean"] for r in result["statistics"]}
    above = {group: s["mean"] for group, s in result["shares"].items()}
    out = []
    ratio = mean["RH", "normal"] / mean["RO", "normal"]
    out.append(
        Claim(
            "RO and RH are alike on normal tokens",
            "points on the diagonal (Figure 3)",
            f"mean relative error RO {mean['RO', 'normal']:.4f}, RH {mean['RH', 'normal']:.4f}; "
            f"RH above RO on {above['normal']:.0%} of them",
            "RH / RO within 5 % of 1",
            abs(ratio - 1) <= 0.05,
        )
    )
    out.append(
        Claim(
            "RO sits on the Gaussian floor",
            "not given; closed form",
            f"{mean['RO', 'normal']:.5f} against {result['floor_relative']:.5f}",
            "within 5 %",
            abs(mean["RO", "normal"] / result["floor_relative"] - 1) <= 0.05,
        )
    )
    figure4 = paper.token_errors()
    if ("RO", "massive") in mean:
        nr, ro, rh = (mean[n, "massive"] for n in ROTATIONS)
        out.append(
            Claim(
                "RH is far better than RO on massive tokens",
                f"squared error {figure4['RO']} → {figure4['RH']} (Figure 4, one token of LLaMA3-8B)",
                f"mean relative error RO {ro:.5f}, RH {rh:.5f}, {ro / rh:.1f} ×; "
                f"RH above RO on {above['massive']:.0%} of them",
                "RO at least 1.5 × RH",
                ro >= 1.5 * rh,
            )
        )
        out.append(
            Claim(
                "RH is still above no rotation there",
                f"text: below; Figure 4: {figure4['RH']} against {figure4['NR']}, above",
                f"NR {nr:.5f}, RH {rh:.5f}",
                "RH above NR, as the figure (not the text) has it",
                rh > nr,
            )
        )
    return out

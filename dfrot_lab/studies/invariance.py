"""Study 01: rotations change nothing in floating point, but everything about the outliers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfrot_lab import activations, massive, models, quantized_model, rotations
from dfrot_lab.lab import Lab
from dfrot_lab.results import Claim, rounded
from dfrot_lab.rotations import Rotations

__all__ = ["claims", "logit_errors", "outliers", "surfaces", "top_activations"]

_FP = quantized_model.ModelSpec(activations=None)


def logit_errors(lab: Lab, dtype: str, seed: int = 0, tokens: int = 256) -> list[dict[str, Any]]:
    """max|Δlogit| / max|logit| against the untouched model, after each thing that is merged.

    In float64 every RMSNorm is swapped, on both sides, for one that keeps the dtype.
    """
    model = models.load(lab.model, dtype=dtype, device=lab.device, fold=False)
    if dtype == "float64":
        models.preserve_norm_dtype(model)
    window = lab.evaluation_tokens(1)[:, :tokens].to(lab.device)
    with torch.inference_mode():
        reference = model(window).logits
    folded = models.fold_gains(
        model
    )  # in place: with the rotated copy that makes two models, not three
    head_dim = models.layers(folded)[0].module.self_attn.head_dim
    ro, rh = (rotations.START[name](folded.config.hidden_size, seed) for name in ("RO", "RH"))
    r2, rows = rotations.random_hadamard(head_dim, seed), []

    def compare(stage: str, rotation: Rotations) -> None:
        with torch.inference_mode():
            logits = quantized_model.build(folded, rotation, _FP)(window).logits
        error = ((logits - reference).abs().max() / reference.abs().max()).item()
        rows.append({"stage": stage, "dtype": dtype, "relative_error": float(f"{error:.6e}")})

    compare("gains folded", Rotations())
    compare("R1 = RO", Rotations(R1=ro))
    rotations.merge(folded, Rotations(R1=rh))  # once, for the three stages that have it
    compare("R1 = RH", Rotations())
    compare("R1 = RH, R2", Rotations(R2=r2))
    compare("R1 = RH, R2, R4", Rotations(R2=r2, R4=True))
    return rows


def surfaces(
    lab: Lab,
    site: str,
    seed: int = 0,
    tokens: int = 48,
    bins: int = 144,
    names: tuple[str, ...] = ("NR", "RO", "RH"),
) -> dict[str, Any]:
    """|x| by token × channel at `site`, the largest of each bin of channels, under `names`.

    The first `tokens` rows of the calibration window.
    """
    x = lab.activations.site(site)[:tokens]
    return {name: rounded(_binned(lab.rotated(x, name, seed).abs(), bins), 4) for name in names} | {
        "site": site,
        "channels": x.shape[-1],
    }


def _binned(x: Tensor, bins: int) -> Tensor:
    return torch.stack(
        [part.amax(-1) for part in x.tensor_split(min(bins, x.shape[-1]), dim=-1)], -1
    )


def outliers(lab: Lab, seed: int = 0) -> list[dict[str, Any]]:
    """By site and rotation: mean over tokens of max|x|/rms(x), its largest value, mean kurtosis."""
    rows = []
    for i, site in enumerate(lab.activations.sites):
        for name in ("NR", "RO", "RH"):
            x = lab.rotated(lab.activations.X[i], name, seed)
            peak = x.abs().amax(-1) / x.square().mean(-1).sqrt().clamp_min(1e-30)
            kurtosis = massive.kurtosis(x)
            values = {
                "peak_mean": peak.mean(),
                "peak_max": peak.max(),
                "kurtosis_mean": kurtosis.mean(),
            }
            rows.append(
                {"site": site, "rotation": name}
                | {k: float(f"{v.item():.6g}") for k, v in values.items()}
            )
    return rows


def top_activations(lab: Lab) -> list[dict[str, Any]]:
    """The residual stream after each layer: three largest |h|, 99.9 % quantile, median, and where.

    As in Massive Activations (Sun et al., 2024), Figure 3, on the calibration window.
    """
    found: list[Tensor] = []
    hooks = [
        layer.module.register_forward_hook(
            lambda m, i, out: found.append(_hidden(out)[0].float().abs().cpu())
        )
        for layer in models.layers(lab.lm)
    ]
    try:
        activations.capture(lab.lm, lab.calibration_tokens[:1])
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for i, h in enumerate(found):
        top, where = h.flatten().topk(3)
        rows.append(
            {
                "layer": i,
                "top": rounded(top, 5),
                "token": int(where[0] // h.shape[-1]),
                "channel": int(where[0] % h.shape[-1]),
                "q999": float(f"{h.flatten().kthvalue(int(0.999 * h.numel()))[0]:.5g}"),
                "median": float(f"{h.median().item():.5g}"),
            }
        )
    return rows


def _hidden(output: Tensor | tuple) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def claims(result: dict[str, Any]) -> list[Claim]:
    """The closing table of notebook 01."""
    worst = {
        dtype: max(r["relative_error"] for r in result["logits"] if r["dtype"] == dtype)
        for dtype in ("float32", "float64")
    }
    peaks = {
        name: max(r["peak_mean"] for r in result["outliers"] if r["rotation"] == name)
        for name in ("NR", "RO", "RH")
    }
    top = max(result["top_activations"], key=lambda r: r["top"][0])
    ratio = top["top"][0] / top["median"]
    return [
        Claim(
            "Rotations leave the output unchanged",
            "equal (Section 3.1)",
            f"relative logit error {worst['float32']:.1e} in fp32, {worst['float64']:.1e} in fp64",
            "≤ 1e-4 in fp32 and ≤ 1e-9 in fp64, every stage",
            worst["float32"] <= 1e-4 and worst["float64"] <= 1e-9,
        ),
        Claim(
            "Rotations remove outliers",
            "RO and RH both do (Figure 2)",
            f"worst site's mean max|x|/rms: NR {peaks['NR']:.1f}, RO {peaks['RO']:.1f}, RH {peaks['RH']:.1f}",
            "RO and RH below half of NR at its worst site",
            max(peaks["RO"], peaks["RH"]) < peaks["NR"] / 2,
        ),
        Claim(
            "A few activations are massive",
            "> 1000 × the median (Sun et al., 2024)",
            f"{top['top'][0]:.0f} = {ratio:.0f} × the median, layer {top['layer']}, token {top['token']}",
            "largest |h| ≥ 1000 × the layer's median",
            ratio >= 1000,
        ),
    ]

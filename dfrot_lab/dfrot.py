"""DFRot: refine R1 by alternating quantization and orthogonal Procrustes (DFRot, Section 3.4).

    loss(R, B) = Σ_i w_i² ‖x_i R − b_i‖²,   w_i = γ for massive rows, 1 for the others
    (a) B ← Q(XR), row by row, for the R at hand
    (b) R ← argmin over RᵀR = I of loss(R, B) = polar(XᵀW²B) = UVᵀ,  U S Vᵀ = svd(XᵀW²B)

With E = XR − B the product of step (b) is XᵀW²B = G·R − XᵀW²E, where the Gram matrix G = XᵀW²X is formed
once, in fp64: only the small E passes through fp32, which keeps RᵀR = I and the loss accurate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from tqdm import tqdm

from dfrot_lab import files, massive, rotations
from dfrot_lab.activations import Activations, ActivationsError
from dfrot_lab.quantizers import QuantSpec, fake_quantize

__all__ = ["Log", "Weighting", "distance", "loss", "optimize", "polar", "row_weights", "subsample"]


_RULES = {"floor": massive.is_massive, "published": massive.published_rule}


@dataclass(frozen=True)
class Weighting:
    """How massive rows count. gamma: γ ≥ 0, or inf for massive rows alone.

    form "sum": Σ normal + γ² Σ massive, as released. form "group_mean": mean over normal rows + γ² ·
    mean over massive rows, as the paper writes it. rule: "floor" (`massive.is_massive`) or "published".
    """

    gamma: float = 100.0
    form: str = "sum"
    rule: str = "floor"

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"gamma = {self.gamma}: use a number ≥ 0, or inf")
        if self.form not in ("sum", "group_mean"):
            raise ValueError(f"form = {self.form!r}: use 'sum' or 'group_mean'")
        if self.rule not in _RULES:
            raise ValueError(f"rule = {self.rule!r}: use 'floor' or 'published'")


@dataclass(frozen=True)
class Log:
    """Loss per half step: `quantized[t]` after (a), `rotated[t]` after (b) with the codes of (a).

    Both relative to Σ w²‖x‖². `massive_rows` of `rows` were weighted.
    """

    quantized: list[float]
    rotated: list[float]
    rows: int
    massive_rows: int


def row_weights(x: Activations, spec: QuantSpec, weighting: Weighting) -> tuple[list[Tensor], int]:
    """(w² of every row, one tensor [rows] a chunk; how many rows are massive), for UNROTATED rows.

    Raises ActivationsError for NaN or Inf, or when γ asks for massive rows and there are none.
    """
    rule = _RULES[weighting.rule]
    masks = []
    for chunk in x.chunks():
        if not torch.isfinite(chunk).all():
            raise ActivationsError(
                "calibration activations hold NaN or Inf: collect them again in float32"
            )
        masks.append(rule(chunk, spec))
    count = sum(int(m.sum()) for m in masks)
    rows = sum(len(m) for m in masks)
    if math.isinf(weighting.gamma):
        if count == 0:
            raise ActivationsError(
                "gamma = inf, but no calibration row is massive: use a finite gamma"
            )
        normal, heavy = 0.0, 1.0
    else:
        normal, heavy = 1.0, weighting.gamma**2
    if weighting.form == "group_mean":
        normal, heavy = normal / max(rows - count, 1), heavy / max(count, 1)
    heavy, normal = torch.tensor([heavy, normal], dtype=torch.float64)
    return [torch.where(m, heavy, normal) for m in masks], count


def subsample(
    x: Activations,
    spec: QuantSpec,
    weighting: Weighting,
    weights: list[Tensor],
    share: float,
    seed: int = 0,
) -> tuple[Activations, list[Tensor]]:
    """All massive rows and a random `share` of the normal ones, whose w² grows by 1/share.

    The loss keeps its expectation. Share 1 returns `x` as it is; less gathers the rows in memory.
    """
    if not 0 < share <= 1:
        raise ValueError(f"rows = {share}: use a share in (0, 1]")
    if share == 1:
        return x, weights
    generator, picked, scaled = torch.Generator().manual_seed(seed), [], []
    rule = _RULES[weighting.rule]
    for chunk, w in zip(x.chunks(), weights, strict=True):
        heavy = rule(chunk, spec)
        drawn = torch.rand(len(chunk), generator=generator) < share
        kept = heavy | drawn
        picked.append(chunk[kept])
        scaled.append(torch.where(heavy, w, w / share)[kept])
    few = Activations.of(torch.cat(picked))
    return few, list(torch.cat(scaled).split(2048))


def polar(m: Tensor) -> Tensor:
    """The orthogonal polar factor UVᵀ of M [d, d], by SVD in fp64: the rotation nearest to M."""
    u, _, vt = torch.linalg.svd(m.double())
    return u @ vt


def optimize(
    x: Activations,
    start: Tensor,
    spec: QuantSpec,
    weighting: Weighting,
    *,
    iterations: int = 100,
    rows: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    checkpoint: str | Path | None = None,
    every: int = 10,
    qr: bool = False,
    progress: str = "DFRot",
) -> tuple[Tensor, Log]:
    """Refine `start` [d, d] on `x`; returns (R [d, d] fp64 with max|RᵀR − I| ≤ 1e-12, Log).

    spec: the quantizer in the loop, the evaluation's by default in every caller (the released code
    uses the symmetric one). rows: share of the normal rows used (see `subsample`). dtype: of XR and of
    XᵀE; sums over rows are fp64. device: where to compute; R comes back to the CPU. checkpoint: state
    saved there every `every` iterations and taken up again, to the same bytes, after an interruption; the
    file goes when the run is through. qr: a QR after each SVD, as released; it flips signs of columns.
    Raises RotationError for a `start` of another size or not
    orthogonal and ActivationsError for NaN or Inf rows.
    """
    r = rotations.check(start.double(), x.d, "start").clone()
    weights, count = row_weights(x, spec, weighting)
    x, weights = subsample(x, spec, weighting, weights, rows)
    gram = torch.zeros(x.d, x.d, dtype=torch.float64, device=device)
    for chunk, w in _pairs(x, weights, torch.float64, device):
        gram += (chunk * w[:, None]).mT @ chunk
    total = gram.trace().item()
    if total == 0:
        raise ActivationsError(
            f"no calibration row counts: all are zero or weigh 0 (gamma = {weighting.gamma})"
        )
    log = Log([], [], sum(len(w) for w in weights), count)
    checkpoint = Path(checkpoint) if checkpoint else None
    settings = f"{spec} {weighting} {dtype} {iterations} {rows} {qr}"
    key = hashlib.sha256(settings.encode() + r.numpy().tobytes() + gram.cpu().numpy().tobytes())
    if checkpoint and checkpoint.exists():
        r = _resume(checkpoint, key.hexdigest(), log, r)
    r = r.to(device)
    first = len(log.rotated)
    bar = tqdm(
        range(first, iterations), desc=progress, initial=first, total=iterations, mininterval=2
    )
    for t in bar:
        product, error, inner = _accumulate(x, r, weights, spec, dtype)
        m = gram @ r - product
        log.quantized.append(error / total)
        new = polar(m)
        # ‖W(XR⁺ − B)‖² = tr G + ‖WB‖² − 2⟨R⁺, M⟩ with ‖WB‖² = tr G − 2⟨R, XᵀW²E⟩ + ‖WE‖²
        log.rotated.append((2 * total - 2 * inner + error - 2 * (new * m).sum().item()) / total)
        r = torch.linalg.qr(new).Q if qr else new
        bar.set_postfix(loss=f"{log.rotated[-1]:.5f}", refresh=False)
        if checkpoint and (t + 1) % every == 0 and t + 1 < iterations:
            _save_state(checkpoint, key.hexdigest(), log, r)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return r.cpu(), log


def _pairs(x: Activations, weights: list[Tensor], dtype: torch.dtype, device) -> Iterator[tuple]:
    """(chunk [rows, d] as `dtype`, its w² [rows] in fp64), on `device`."""
    for chunk, w in zip(x.chunks(), weights, strict=True):
        yield chunk.to(device, dtype), w.to(device)


def _accumulate(x, r, weights, spec, dtype) -> tuple[Tensor, float, float]:
    """(XᵀW²E [d, d], ‖WE‖², ⟨R, XᵀW²E⟩) for E = XR − Q(XR), summed over chunks in fp64."""
    rotation, product, error = r.to(dtype), torch.zeros_like(r), 0.0
    for rows, w in _pairs(x, weights, dtype, r.device):
        y = rows @ rotation
        e = y - fake_quantize(y, spec)
        error += (e.double().square().sum(-1) * w).sum().item()
        product += (rows.mT @ (e * w[:, None].to(dtype))).double()
    return product, error, (r * product).sum().item()


def loss(x: Activations, r: Tensor, spec: QuantSpec, weighting: Weighting) -> float:
    """Σ w²‖xR − Q(xR)‖² / Σ w²‖x‖² over the rows of `x`, for any rotation R [d, d]."""
    error = total = 0.0
    for chunk, w in zip(x.chunks(), row_weights(x, spec, weighting)[0], strict=True):
        y = chunk @ r.to(chunk.dtype)
        error += ((y - fake_quantize(y, spec)).double().square().sum(-1) * w).sum().item()
        total += (chunk.double().square().sum(-1) * w).sum().item()
    return error / total


def distance(r: Tensor, start: Tensor) -> dict[str, float]:
    """How far R has moved from its start: ‖R − R₀‖_F/√(2d) (0 same, 1 unrelated) and mean column cosine."""
    d = r.shape[-1]
    return {
        "relative_distance": ((r - start).norm() / math.sqrt(2 * d)).item(),
        "mean_column_cosine": (r * start).sum(0).mean().item(),
    }


def _save_state(path: Path, key: str, log: Log, r: Tensor) -> None:
    state = {"R": r.cpu().contiguous()} | {
        half: torch.tensor(getattr(log, half), dtype=torch.float64)
        for half in ("quantized", "rotated")
    }
    with files.atomic(path) as partial:
        partial.write_bytes(serialize(state, metadata={"key": key}))


def _resume(path: Path, key: str, log: Log, r: Tensor) -> Tensor:
    """R of the checkpoint, its losses appended to `log`; `r` if it belongs to another optimisation."""
    with safe_open(path, framework="pt") as f:
        if (f.metadata() or {}).get("key") != key:
            return r
        log.quantized.extend(f.get_tensor("quantized").tolist())
        log.rotated.extend(f.get_tensor("rotated").tolist())
        return f.get_tensor("R")

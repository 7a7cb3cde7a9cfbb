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
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from tqdm import tqdm

from dfrot_lab import files, objectives, polar, products, rotations
from dfrot_lab.activations import Activations, ActivationsError
from dfrot_lab.objectives import Objective
from dfrot_lab.quantizers import QuantSpec, squared_error
from dfrot_lab.weighting import Weighting, importance, row_weights, subsample

__all__ = ["Log", "Weighting", "distance", "loss", "optimize", "row_weights", "subsample"]

SOLVERS, SAMPLINGS = ("svd", "fast"), ("uniform", "importance")


@dataclass(frozen=True)
class Log:
    """Loss per half step: `quantized[t]` after (a), `rotated[t]` after (b) with the codes of (a).

    Both relative to Σ w²‖x‖². `massive_rows` of `rows` were weighted.
    """

    quantized: list[float]
    rotated: list[float]
    rows: int
    massive_rows: int


def optimize(
    x: Activations,
    start: Tensor,
    spec: QuantSpec,
    weighting: Weighting,
    *,
    iterations: int = 100,
    rows: float = 1.0,
    sampling: str = "uniform",
    objective: Objective | str = "centroids",
    solver: str = "fast",
    relax: float = 1.0,
    stop: float = 0.0,
    dtype: torch.dtype = torch.float32,
    error_dtype: torch.dtype | None = None,
    update: bool = False,
    tf32: bool = False,
    device: str = "cpu",
    checkpoint: str | Path | None = None,
    whose: str = "",
    every: int = 10,
    qr: bool = False,
    progress: str = "DFRot",
) -> tuple[Tensor, Log]:
    """Refine `start` [d, d] on `x`; returns (R [d, d] fp64 with max|RᵀR − I| ≤ 1e-12, Log).

    spec: the quantizer in the loop, the evaluation's by default in every caller (the released code
    uses the symmetric one). rows, sampling: share of the rows used, and "uniform" or by "importance" (see
    `weighting.subsample`). objective: one of `objectives.NAMES`, or your own. solver: "svd", the plain
    writing, or "fast": chunks that fit the cache, sums kept in fp32 for a few of them, `polar.polar`.
    relax: ω in R ← polar(XᵀW²(XR − ωE)), E = XR − B, 0 < ω < 2: 1 as published; 1.6 needs a quarter of the
    steps and ends lower (docs/optimiser.md), though no step is then proven to lower the loss.
    stop: end when ten steps have lowered the loss by less than this share of it; 0 never.
    dtype: of XR and of XᵀE, bfloat16 for "fast" alone; sums over rows are fp64. error_dtype: bfloat16 for
    the inputs of XᵀE alone, which is small, so that codes stay those of `dtype`. update: XR by its change
    since an earlier R whose XR is kept, the change by bf16 inputs, on a CPU: XR is off by 0.07 % at most, in
    root mean square (bf16: 0.3, TF32: 0.04); takes rows · d · 4 bytes (`products.Streamed`). tf32: let
    a GPU round the inputs of fp32 products to 10 bits, on its tensor cores. device: where to compute, and
    where rows stay if they take at most half of its free memory; R comes back to the CPU. checkpoint: state
    saved there every `every` iterations and taken up again, to the same bytes, after an interruption, if
    `whose` (what else it rests on, such as the code) is the same; the file goes when the run is through.
    qr: a QR after each SVD, as released; it flips signs of columns.
    Raises RotationError for a `start` of another size or not orthogonal, ActivationsError for NaN or Inf
    rows, ValueError for an unknown name or options that do not go together.
    """
    _check(solver, sampling, relax, stop, dtype, error_dtype, update, tf32, device)
    # a copy: what it keeps of its rows belongs to one run
    objective = deepcopy(
        objectives.named(objective, spec) if isinstance(objective, str) else objective
    )
    r = rotations.check(start.double(), x.d, "start").clone()
    x = x.on(device)
    weights, count = row_weights(x, spec, weighting)
    scores = importance(x, r, spec, weights) if sampling == "importance" and rows < 1 else None
    x, weights = subsample(x, spec, weighting, weights, rows, scores=scores)
    x = x.on(device)
    gram = torch.zeros(x.d, x.d, dtype=torch.float64, device=device)
    for chunk, w in products.pairs(x, weights, torch.float64, device):
        gram += (chunk * w[:, None]).mT @ chunk
    total = gram.trace().item()
    if total == 0:
        raise ActivationsError(
            f"no calibration row counts: all are zero or weigh 0 (gamma = {weighting.gamma})"
        )
    log = Log([], [], sum(len(w) for w in weights), count)
    checkpoint = Path(checkpoint) if checkpoint else None
    settings = (
        f"{spec} {weighting} {dtype} {iterations} {rows} {sampling} {qr} {solver} {stop} {relax}"
    )
    settings += (
        f" {error_dtype}" * (error_dtype is not None)
        + " update" * update
        + " tf32" * tf32
        + f" {type(objective).__name__} {getattr(objective, 'beta', '')} {whose}"
    )
    key = hashlib.sha256(settings.encode() + r.numpy().tobytes() + gram.cpu().numpy().tobytes())
    streamed = products.Streamed(error_dtype, gram if update else None)
    if checkpoint and checkpoint.exists():
        r = _resume(checkpoint, key.hexdigest(), log, r, objective, streamed, device)
    r = r.to(device)
    accumulate, factor = {
        "svd": (products.whole, polar.svd),
        "fast": (streamed, polar.polar),
    }[solver]
    first = len(log.rotated)
    bar = tqdm(
        range(first, iterations), desc=progress, initial=first, total=iterations, mininterval=2
    )
    for t in bar:
        with _tensor_cores(tf32):
            product, value, error = accumulate(x, r, weights, objective, dtype)
        m, inner = gram @ r - product, (r * product).sum().item()
        log.quantized.append(value / total)
        new = factor(m if relax == 1 else gram @ r - relax * product)
        # ‖W(XR⁺ − B)‖² = tr G + ‖WB‖² − 2⟨R⁺, M⟩ with ‖WB‖² = tr G − 2⟨R, XᵀW²E⟩ + ‖WE‖²
        log.rotated.append((2 * total - 2 * inner + error - 2 * (new * m).sum().item()) / total)
        r = torch.linalg.qr(new).Q if qr else new
        bar.set_postfix(loss=f"{log.quantized[-1]:.5f}", refresh=False)
        if _settled(log.quantized, stop):
            bar.set_description(f"{progress}, settled", refresh=False)
            break
        if checkpoint and (t + 1) % every == 0 and t + 1 < iterations:
            _save_state(checkpoint, key.hexdigest(), log, r, objective, streamed.base)
    bar.close()
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return r.cpu(), log


@contextmanager
def _tensor_cores(tf32: bool) -> Iterator[None]:
    """fp32 products on a GPU take TF32 inputs in here, if asked for, and fp32 ones otherwise."""
    cublas = torch.backends.cuda.matmul
    before, cublas.fp32_precision = cublas.fp32_precision, "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        cublas.fp32_precision = before


def _check(
    solver: str,
    sampling: str,
    relax: float,
    stop: float,
    dtype: torch.dtype,
    error_dtype: torch.dtype | None,
    update: bool,
    tf32: bool,
    device: str,
) -> None:
    """Options of `optimize` that are unknown, or do not go together: ValueError."""
    for name, value, known in (("solver", solver, SOLVERS), ("sampling", sampling, SAMPLINGS)):
        if value not in known:
            raise ValueError(f"{name} = {value!r}: use {' or '.join(map(repr, known))}")
    if not 0 < relax < 2:
        raise ValueError(f"relax = {relax}: use a number in (0, 2); 1 is the plain step")
    if not 0 <= stop < 1:
        raise ValueError(f"stop = {stop}: use a share in [0, 1), such as 0.001; 0 never stops")
    if dtype == torch.bfloat16 and solver != "fast":
        raise ValueError("dtype = bfloat16 is for solver 'fast': use float32 or float64")
    if error_dtype not in (None, dtype) and (error_dtype != torch.bfloat16 or solver != "fast"):
        raise ValueError(f"error_dtype = {error_dtype}: use bfloat16, with solver 'fast', or none")
    if update and (dtype != torch.float32 or solver != "fast" or device != "cpu"):
        raise ValueError(
            f"update with dtype = {dtype}, {solver!r}, on {device}: it is for float32 and 'fast' on a CPU"
        )
    if tf32 and (dtype != torch.float32 or not device.startswith("cuda")):
        raise ValueError(f"tf32 with dtype = {dtype} on {device}: it is for float32 on a GPU")


def _settled(losses: list[float], stop: float, over: int = 10) -> bool:
    """Whether the last `over` steps have lowered the loss by less than the share `stop`."""
    return stop > 0 and len(losses) > over and losses[-1 - over] - losses[-1] < stop * losses[-1]


def loss(x: Activations, r: Tensor, spec: QuantSpec, weighting: Weighting) -> float:
    """Σ w²‖xR − Q(xR)‖² / Σ w²‖x‖² over the rows of `x`, for any rotation R [d, d]."""
    error = total = 0.0
    for chunk, w in zip(x.chunks(), row_weights(x, spec, weighting)[0], strict=True):
        y = chunk @ r.to(chunk)
        error += (squared_error(y, spec).double() * w).sum().item()
        total += (chunk.double().square().sum(-1) * w).sum().item()
    return error / total


def distance(r: Tensor, start: Tensor) -> dict[str, float]:
    """How far R has moved from its start: ‖R − R₀‖_F/√(2d) (0 same, 1 unrelated) and mean column cosine."""
    d = r.shape[-1]
    return {
        "relative_distance": ((r - start).norm() / math.sqrt(2 * d)).item(),
        "mean_column_cosine": (r * start).sum(0).mean().item(),
    }


def _save_state(
    path: Path, key: str, log: Log, r: Tensor, objective: Objective, base: Tensor | None
) -> None:
    grids = getattr(objective, "grids", {})
    state = {f"grid.{i}": torch.stack(pair).cpu() for i, pair in grids.items()}
    state |= {"R": r.cpu().contiguous()} | {
        half: torch.tensor(getattr(log, half), dtype=torch.float64)
        for half in ("quantized", "rotated")
    }
    if base is not None:
        state["base"] = base.cpu().contiguous()
    with files.atomic(path) as partial:
        partial.write_bytes(serialize(state, metadata={"key": key}))


def _resume(
    path: Path,
    key: str,
    log: Log,
    r: Tensor,
    objective: Objective,
    streamed: products.Streamed,
    device: str,
) -> Tensor:
    """R of the checkpoint, its losses appended to `log`; `r` if it belongs to another optimisation."""
    try:
        opened = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise rotations.RotationError(
            f"checkpoint {path} cannot be read: {error}; delete it, and the run starts anew"
        ) from error
    with opened as f:
        if (f.metadata() or {}).get("key") != key:
            return r
        log.quantized.extend(f.get_tensor("quantized").tolist())
        log.rotated.extend(f.get_tensor("rotated").tolist())
        for name in f.keys():  # noqa: SIM118 (not a dict)
            if name.startswith("grid."):
                objective.grids[int(name[5:])] = tuple(f.get_tensor(name).to(device))
            if name == "base":
                streamed.base = f.get_tensor(name).to(device)
        return f.get_tensor("R")

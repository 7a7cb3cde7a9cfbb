"""Plan: what a profile will take in memory, disk and time, said before anything is loaded.

Bytes are formulas of the model's configuration. Seconds come from models of its shape with one and with
two layers of random weights, run and built here as the notebooks would: what the second layer adds is
what every layer takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dfrot_lab import activations, dfrot, evaluation, models, profiles, quantized_model, rotations
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.rotations import Rotations

__all__ = ["Plan", "Speed", "measure", "plan", "weights"]

TEXT = (
    340_000  # tokens of WikiText-2's test split under LLaMA-2's tokenizer; fewer with larger ones
)
BASE = 0.9e9  # bytes that Python, torch and transformers take before any model


@dataclass(frozen=True)
class Speed:
    """Seconds of one W16A4 window, one model built, one built with RTN weights, one R1 refined."""

    window: float
    build: float
    rtn: float
    refine: float


@dataclass(frozen=True)
class Plan:
    """Expected bytes, seconds of a window and of each notebook of a profile."""

    memory: int
    disk: int
    window: float
    notebooks: dict[str, float]

    def lines(self) -> list[str]:
        """For the terminal."""
        out = [
            f"memory  {self.memory / 2**30:6.1f} GiB at most (notebook 01, the model twice in fp64)",
            f"disk    {self.disk / 2**30:6.1f} GiB of artefacts, besides the model's own files",
            f"window  {self.window:6.1f} s",
        ]
        out += [f"{name:<26} {seconds / 60:7.1f} min" for name, seconds in self.notebooks.items()]
        return [*out, f"{'in all':<26} {sum(self.notebooks.values()) / 60:7.1f} min"]


def weights(config: Any) -> int:
    """Entries of all matrices, embedding and head untied as folding makes them."""
    d, inner = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or d // config.num_attention_heads
    attention = 2 * d * size * (config.num_attention_heads + config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * d * inner) + 2 * config.vocab_size * d


def measure(config: Any, common: dict[str, Any]) -> Speed:
    """Time one and two layers of `config`'s shape as the profile's `common` asks; of two runs the second."""
    where = common["device"], common["dtype"], common["seqlen"], common["clip_steps"]
    found = [_timed(config, layers, *where) for layers in (1, 2)]
    more = config.num_hidden_layers - 1
    times = (one + more * max(two - one, 0) for one, two in zip(*found, strict=True))
    used = _rows(config, common) * common["rows"]
    return Speed(
        *times, _refining(config.hidden_size, used, common["iterations"], common["device"])
    )


def _rows(config: Any, common: dict[str, Any]) -> int:
    """Rows of calibration activations."""
    return 2 * config.num_hidden_layers * common["calibration"] * common["seqlen"]


def _timed(
    config: Any, layers: int, device: str, dtype: str, seqlen: int, clip_steps: int
) -> tuple[float, float, float]:
    """Seconds of a W16A4 window, of building that model, and of building it with RTN weights."""
    model = models.of_shape(config, layers, dtype=dtype, device=device)
    rotation = Rotations.standard(model, rotations.random_hadamard(config.hidden_size, 0))
    window = torch.arange(seqlen) % config.vocab_size
    spec = quantized_model.ModelSpec.of("16-4-16")
    rtn = quantized_model.ModelSpec.of("4-4-16", clip_steps=clip_steps)

    def build(spec: quantized_model.ModelSpec) -> torch.nn.Module:
        return quantized_model.build(model, rotation, spec)

    built = build(spec)
    calls = (lambda: evaluation.window_nll(built, window), lambda: build(spec), lambda: build(rtn))
    return tuple(_seconds(call, device) for call in calls)


def _seconds(call: Callable, device: str) -> float:
    call()
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _refining(d: int, rows: float, iterations: int, device: str) -> float:
    """Seconds of one refinement: two steps on 2048 rows are timed, products and SVD apart."""
    x = activations.Activations.of(torch.randn(2048, d))
    r = rotations.random_hadamard(d, 0).to(device)
    weights = [torch.ones(2048, dtype=torch.float64)]
    chunk = _seconds(lambda: dfrot._accumulate(x, r, weights, QuantSpec(), torch.float32), device)
    svd = _seconds(lambda: dfrot.polar(r), device)
    return iterations * (rows / 2048 * chunk + svd)


def plan(profile: str, config: Any = None, speed: Speed | None = None) -> Plan:
    """What notebooks 01 to 04 of `profile` will take; None: looked up, and measured.

    Raises ModelError for a model that cannot be looked up, ProfileError for a profile that is none.
    """
    content = profiles.load(profile)
    common = content["common"]
    config = config or models.load_config(common["model"])
    torch.set_num_threads(common["threads"])
    t = speed or measure(config, common)
    seeds = len(common["seeds"])
    three, four = (content["notebooks"][n] for n in ("03_massive_tokens_fp16", "04_dfrot"))
    closing = 2 * four["final_seeds"]
    swept = 2 * sum(g != common["gamma"] for g in four["gammas"])
    w3, s3, w4, s4, final = (
        n or TEXT // common["seqlen"]
        for n in (
            three["windows"], three["side_windows"],
            four["windows"], four["side_windows"], four["final_windows"],
        )
    )  # fmt: skip
    windows3 = (3 + 4 * seeds) * w3  # FP, NR twice; RO and RH twice a seed
    windows3 += three["side_seeds"] * (w3 + s3)
    windows4 = 2 * seeds * w4 + (1 + 2 * seeds) * max(w4 - w3, 0)  # FP, RO, RH: added to 03's
    windows4 += swept * s4 + closing * final
    notebooks = {
        "activations, rotations": common["calibration"] * t.window + 2 * seeds * t.refine,
        "01_rotation_invariance": 2 * t.window + 10 * t.build,
        "02_ro_vs_rh_error": t.window,
        "03_massive_tokens_fp16": windows3 * t.window
        + (1 + 2 * seeds + 2 * three["side_seeds"]) * t.build,
        "04_dfrot": windows4 * t.window
        + (2 * seeds + swept) * t.build
        + closing * t.rtn
        + swept * t.refine,
    }
    d = config.hidden_size
    disk = 4 * _rows(config, common) * d + 8 * d**2 * (2 * seeds + swept)
    return Plan(int(BASE + 16 * weights(config)), disk, t.window, notebooks)

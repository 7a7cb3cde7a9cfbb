"""Speed: how fast this machine is on a model's shape, from one and from two layers of random weights.

They are run and built as the notebooks would: what the second layer adds is what every layer takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from dfrot_lab import (
    activations,
    evaluation,
    gptq,
    models,
    objectives,
    polar,
    products,
    quantized_model,
    rotations,
)
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.rotations import Rotations

__all__ = ["Speed", "measure"]

PARTS = 12  # five of a model with one layer, five of one with two, two of a refinement


@dataclass(frozen=True)
class Speed:
    """Seconds of one W16A4 window, one model built, one built with RTN weights, one R1 refined, one
    GPTQ of all columns from known Hessians, one calibration window through the layers for Hessians.
    """

    window: float
    build: float
    rtn: float
    refine: float
    gptq: float
    hessian: float


def measure(config: Any, common: dict[str, Any], rows: float) -> Speed:
    """Time one and two layers of `config`'s shape as the profile's `common` asks; of two runs the second.

    rows: of activations that an iteration of the refinement uses. What is timed stands on a progress bar.
    """
    where = common["dtype"], common["seqlen"], common["clip_steps"]
    with tqdm(total=PARTS, desc="timing", unit="part") as bar:
        clock = _Clock(common["device"], bar)
        found = [_timed(config, layers, clock, *where) for layers in (1, 2)]
        refine = _refining(config.hidden_size, rows, common["iterations"], clock)
    more = config.num_hidden_layers - 1
    times = [one + more * max(two - one, 0) for one, two in zip(*found, strict=True)]
    return Speed(*times[:3], refine, *times[3:])


@dataclass(frozen=True)
class _Clock:
    """Times calls on `device`; the progress bar has the name of the one that runs."""

    device: str
    bar: tqdm

    def seconds(self, what: str, call: Callable, *, warm: bool = True) -> float:
        """Of `call`; warm: of its second run."""
        self.bar.set_postfix_str(what)
        if warm:
            call()
        start = time.perf_counter()
        call()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        took = time.perf_counter() - start
        self.bar.update()
        return took


def _timed(
    config: Any, layers: int, clock: _Clock, dtype: str, seqlen: int, clip_steps: int
) -> tuple[float, ...]:
    """Seconds of `Speed` without `refine`, for a model of so many layers."""
    model = models.of_shape(config, layers, dtype=dtype, device=clock.device)
    rotation = Rotations.standard(model, rotations.random_hadamard(config.hidden_size, 0))
    window = torch.arange(seqlen) % config.vocab_size
    spec = quantized_model.ModelSpec.of("16-4-16")
    rtn = quantized_model.ModelSpec.of("4-4-16", clip_steps=clip_steps)

    def build(spec: quantized_model.ModelSpec) -> torch.nn.Module:
        return quantized_model.build(model, rotation, spec)

    built = build(spec)
    of = f"{layers} layer{'s' * (layers > 1)}"
    times = [
        clock.seconds(f"{of}: a window", lambda: evaluation.window_nll(built, window)),
        clock.seconds(f"{of}: building it", lambda: build(spec)),
        clock.seconds(f"{of}: weights by RTN", lambda: build(rtn)),
    ]
    hessians: dict[tuple[int, str], torch.Tensor] = {}

    def visit(layer: models.Layer, linears: dict, inputs: Iterator[torch.Tensor]) -> None:
        found = gptq.hessian_of(inputs)
        hessians.update({(layer.index, name): found for name in linears})

    windows = -(-config.intermediate_size // seqlen)  # GPTQ takes no fewer tokens than channels
    tokens = window.expand(windows, seqlen)
    passed = clock.seconds(f"{of}: Hessians", lambda: gptq.walk(model, tokens, visit), warm=False)
    how = gptq.GPTQ(clip_steps=clip_steps)

    def columns() -> None:
        gptq.quantize_with(model, lambda i, name: hessians[i, name], rtn.weights, how)

    return (*times, clock.seconds(f"{of}: GPTQ", columns, warm=False), passed / windows)


def _refining(d: int, rows: float, iterations: int, clock: _Clock) -> float:
    """Seconds of one refinement: two steps on 2048 rows are timed, products and SVD apart."""
    x = activations.Activations.of(torch.randn(2048, d))
    r = rotations.random_hadamard(d, 0).to(clock.device)
    weights = [torch.ones(2048, dtype=torch.float64)]
    centroids = objectives.Centroids(QuantSpec())
    chunk = clock.seconds(
        "refinement: products",
        lambda: products.whole(x, r, weights, centroids, torch.float32),
    )
    factor = clock.seconds("refinement: SVD", lambda: polar.svd(r))
    return iterations * (rows / 2048 * chunk + factor)

"""Plan: what a profile will take in memory, disk and time, said before anything is loaded.

Counts are formulas of the model's configuration; seconds come from the speed of a matrix product and of
an attention that are timed here for a second each, on the device that will be used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from dfrot_lab import models, profiles

__all__ = ["Plan", "Shape", "measure", "plan"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that its cost depends on."""

    layers: int
    d: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    words: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers configuration."""
        head_dim = getattr(config, "head_dim", None)
        return cls(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size,
            config.num_attention_heads, config.num_key_value_heads,
            head_dim or config.hidden_size // config.num_attention_heads,
            config.vocab_size, bool(config.tie_word_embeddings),
        )  # fmt: skip

    @property
    def linears(self) -> int:
        """Weights of the linears inside the layers."""
        attention = 2 * self.d * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.d * self.inner)

    @property
    def weights(self) -> int:
        """All weights, embedding and head untied as folding makes them."""
        return self.linears + 2 * self.words * self.d

    def forward(self, tokens: int) -> tuple[float, float]:
        """(products, attention): floating-point operations of one window of `tokens`."""
        products = 2.0 * tokens * (self.linears + self.words * self.d)
        return products, 2.0 * tokens**2 * self.heads * self.head_dim * self.layers

    def merging(self) -> float:
        """Operations of merging R1: every weight that touches the stream times d."""
        return 2.0 * self.d * self.weights


@dataclass(frozen=True)
class Plan:
    """Expected bytes and seconds of each notebook of a profile; one window's seconds."""

    memory: int
    disk: int
    window: float
    notebooks: dict[str, float]

    def lines(self) -> list[str]:
        """For the terminal."""
        out = [
            f"memory  {self.memory / 2**30:6.1f} GiB (the model twice, and one of its parts in fp32)",
            f"disk    {self.disk / 2**30:6.1f} GiB of artefacts, besides the model's own files",
            f"window  {self.window:6.1f} s",
        ]
        out += [f"{name:<26} {seconds / 60:7.1f} min" for name, seconds in self.notebooks.items()]
        return [*out, f"{'in all':<26} {sum(self.notebooks.values()) / 60:7.1f} min"]


def measure(device: str, dtype: str, shape: Shape, seqlen: int) -> tuple[float, float]:
    """(products, attention): operations a second at this model's shapes; about two seconds."""
    kind = {"device": device, "dtype": getattr(torch, dtype)}
    x = torch.randn(seqlen, shape.d, **kind)
    w = torch.randn(shape.inner, shape.d, **kind)
    q = torch.randn(1, shape.heads, seqlen, shape.head_dim, **kind)
    flops = 2.0 * seqlen * shape.d * shape.inner
    causal = 2.0 * seqlen**2 * shape.heads * shape.head_dim
    attend = lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)  # noqa: E731
    return _speed(lambda: F.linear(x, w), flops, device), _speed(attend, causal, device)


def _speed(call: Any, flops: float, device: str) -> float:
    def synced() -> None:
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    synced()
    runs, start = 0, time.perf_counter()
    while time.perf_counter() - start < 1 or runs < 3:
        synced()
        runs += 1
    return flops * runs / (time.perf_counter() - start)


# measured on the demo model: norms, activations, quantizers and the softmax of the head take so much
# more than the products and the attention; so do the loss and its bookkeeping in the optimiser
OVERHEAD, OPTIMISER = 1.35, 1.3


def plan(profile: str, config: Any = None, speed: tuple[float, float] | None = None) -> Plan:
    """What `profile` will take; config: of its model (looked up when None); speed: as `measure`.

    Raises ModelError for a model that cannot be looked up, ProfileError for a profile that is none.
    """
    content = profiles.load(profile)
    common, own = content["common"], content["notebooks"]
    shape = Shape.of(config or models.load_config(common["model"]))
    torch.set_num_threads(common["threads"])
    speed = speed or measure(common["device"], common["dtype"], shape, common["seqlen"])
    products, attention = shape.forward(common["seqlen"])
    window = OVERHEAD * (products / speed[0] + attention / speed[1])
    build = shape.merging() / speed[0] + 2 * shape.weights * 4 / 4e9  # and copies at 4 GB/s
    rows = 2 * shape.layers * common["calibration"] * common["seqlen"]
    step = 4.0 * rows * common["rows"] * shape.d**2 / speed[0]
    svd = 40.0 * shape.d**3 / (speed[0] / 4)  # in fp64
    refine = OPTIMISER * common["iterations"] * (step + svd)
    seeds = len(common["seeds"])
    third, fourth = own.get("03_massive_tokens_fp16", {}), own.get("04_dfrot", {})
    w3, side3, n3 = third["windows"], third["side_windows"], third["side_seeds"]
    w4, side4 = fourth["windows"], fourth["side_windows"]
    closing = 2 * fourth["final_seeds"]
    swept = 2 * sum(g != common["gamma"] for g in fourth["gammas"])
    clip = (1 + common["clip_steps"]) * 8 * shape.linears * 4 / 4e9  # passes through memory
    notebooks = {
        "activations, rotations": common["calibration"] * window + 2 * seeds * refine,
        "01_rotation_invariance": 2 * window + 8 * build,
        "02_ro_vs_rh_error": window + 60.0 * rows * shape.d * 4 / 4e9,
        "03_massive_tokens_fp16": window * (3 * w3 + 4 * seeds * w3 + n3 * (w3 + side3))
        + build * (1 + 2 * seeds + 2 * n3),
        "04_dfrot": window * (2 * seeds * w4 + swept * side4 + closing * fourth["final_windows"])
        + build * (2 * seeds + swept + closing)
        + swept * refine
        + closing * clip,
    }
    bytes_ = {"float64": 8, "float32": 4}.get(common["dtype"], 2)
    memory = 2 * bytes_ * shape.weights + 4 * shape.words * shape.d + 400 * 2**20
    disk = 4 * rows * shape.d + 8 * shape.d**2 * (2 * seeds + swept)
    return Plan(int(memory), int(disk), window, notebooks)

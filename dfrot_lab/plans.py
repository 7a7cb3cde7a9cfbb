"""Plan: what a profile will take in memory, disk and time, said before anything is loaded.

Bytes are formulas of the model's configuration; seconds are counts of what `speeds` times here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dfrot_lab import models, profiles, speeds
from dfrot_lab.presets import PRESETS
from dfrot_lab.speeds import Speed

__all__ = ["Plan", "plan", "weights"]

TEXT = (
    340_000  # tokens of WikiText-2's test split under LLaMA-2's tokenizer; fewer with larger ones
)
FIGURES = 5  # of the estimates, the first: what `make figures` runs, with what the notebooks share
# the demo profile on two quiet AVX-512 cores, to hold an estimate against
MEASURED = {
    "05_tables": "about 60 min",
    "06_reviewers_questions": "10–30 min",
    "07_int4_kernels": "about 3 min",
    "08_why_it_works": "about 1 min",
    "09_objectives": "about 90 min",
    "10_zero_shot": "about 1 h",
}
# tokens with all choices, roughly: of an item of ours, and of the hub's tasks, which are run whole
ITEM = {"last_word": 75, "continuation": 135}
HUB = {"hellaswag": 4.4e6, "mmlu": 6.2e6}
OTHER = 0.3e6
BASE = 0.9e9  # bytes that Python, torch and transformers take before any model


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
            f"memory  {self.memory / 2**30:6.1f} GiB at most (notebook 01: twice in fp64, once in fp32)",
            f"disk    {self.disk / 2**30:6.1f} GiB of artefacts of all notebooks, besides the model's own",
            f"window  {self.window:6.1f} s",
        ]
        told = list(self.notebooks.items())
        out += ["make figures", *_times(told[:FIGURES]), "the others", *_times(told[FIGURES:])]
        return [*out, f"{'in all':<26} {sum(self.notebooks.values()) / 60:7.1f} min"]


def _times(notebooks: list[tuple[str, float]]) -> list[str]:
    """A line a notebook, with the demo profile's measured time, and their sum."""
    out = []
    for name, seconds in notebooks:
        line = f"  {name:<24} {seconds / 60:7.1f} min"
        if name in MEASURED:
            line += f"  (demo on two idle cores: measured, {MEASURED[name]})"
        out.append(line)
    return [*out, f"  {'together':<24} {sum(t for _, t in notebooks) / 60:7.1f} min"]


def weights(config: Any) -> int:
    """Entries of all matrices, embedding and head untied as folding makes them."""
    d, inner = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or d // config.num_attention_heads
    attention = 2 * d * size * (config.num_attention_heads + config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * d * inner) + 2 * config.vocab_size * d


def _rows(config: Any, common: dict[str, Any]) -> int:
    """Rows of calibration activations."""
    return 2 * config.num_hidden_layers * common["calibration"] * common["seqlen"]


def plan(profile: str, config: Any = None, speed: Speed | None = None) -> Plan:
    """What the notebooks of `profile` will take; None: looked up, and measured.

    Raises ModelError for a model that cannot be looked up, ProfileError for a profile that is none.
    """
    content = profiles.load(profile)
    common = content["common"]
    config = config or models.load_config(common["model"])
    torch.set_num_threads(common["threads"])
    t = speed or speeds.measure(config, common, _rows(config, common) * common["rows"])
    seeds = len(common["seeds"])
    three, four = (content["notebooks"][n] for n in ("03_massive_tokens_fp16", "04_dfrot"))
    closing = 2 * four["final_seeds"]
    swept = 2 * sum(g != common["gamma"] for g in four["gammas"])
    w3, s3, w4, s4, final = (  # 0: the whole split
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
        "05_tables": _tables(content["notebooks"]["05_tables"], common, t),
        "06_reviewers_questions": _questions(
            content["notebooks"]["06_reviewers_questions"], t, common
        ),
        "07_int4_kernels": _packed(content["notebooks"]["07_int4_kernels"], t, common),
        "08_why_it_works": _path(content["notebooks"]["08_why_it_works"], t, common),
        "09_objectives": _objectives(content["notebooks"]["09_objectives"], t, common),
        "10_zero_shot": _zero_shot(content["notebooks"]["10_zero_shot"], t, common),
    }
    disk = _disk(config, content, 2 * seeds + swept)
    return Plan(int(BASE + 20 * weights(config)), disk, t.window, notebooks)


def _disk(config: Any, content: dict[str, Any], shared: int) -> int:
    """Bytes of activations, Hessians and rotations that all notebooks keep; shared: rotations of 04."""
    common, own = content["common"], content["notebooks"]
    d, inner, seeds = config.hidden_size, config.intermediate_size, len(common["seeds"])
    five, six, nine = (own[n] for n in ("05_tables", "06_reviewers_questions", "09_objectives"))
    others = {*six["corpora"], nine["second"]} - {common["corpus"], ""}
    sets = 1 + len(others) + max(0, five["samples"] - 1)
    sets += PRESETS["recommended"].windows / common["calibration"]
    size = getattr(config, "head_dim", None) or d // config.num_attention_heads
    hessian = 2 * d**2 + (config.num_attention_heads * size) ** 2 + inner**2
    made = shared + five["samples"] + len(five["sites"]) + 2 * len(five["gammas"])
    made += 2 * len(nine["objectives"]) * len(nine["gammas"]) + 8 * seeds
    rows = sets * _rows(config, common)
    return int(4 * rows * d + 4 * config.num_hidden_layers * hessian + 8 * d**2 * made)


def _tables(own: dict[str, Any], common: dict[str, Any], t: Speed) -> float:
    """Seconds of notebook 05, see `studies.paper_tables`."""
    w, seeds = own["windows"] or TEXT // common["seqlen"], len(common["seeds"])
    rows = 1 + (1 + 10 * seeds) * len(own["all_bits"])
    side = own["samples"] + len(own["sites"]) + 2 * len(own["gammas"])
    rtn = 4 * seeds  # models quantized by RTN; GPTQ has NR and the rows of the sweeps besides
    exact = 1 + rtn + side
    passes = own["weight_windows"] * (1 if own["gptq"] == "gptq-shared" else exact)
    return (
        (rows + side) * w * t.window
        + exact * (t.build + t.gptq)
        + passes * t.hessian
        + rtn * t.rtn
        + side * t.refine
    )


def _questions(own: dict[str, Any], t: Speed, common: dict[str, Any]) -> float:
    """Seconds of notebook 06, see `studies.questions`, section by section."""
    w = own["windows"] or TEXT // common["seqlen"]
    c, rounds = len(own["corpora"]), own["rounds"]
    static = 4 * len(own["static_bits"])
    rows = static + 2 * len(own["clips"]) + c * (c + 1) + rounds + 6 * 3 + 4 * 2 + 6
    builds = 4 + 2 + c * (c + 1) + 2 * rounds + 6 + 3 + 6
    refined = c - 1 + rounds + 5
    return (
        (rows * w + static / 2 * own["weight_windows"] + rounds + c) * t.window
        + builds * t.build
        + refined * t.refine
    )


def _path(own: dict[str, Any], t: Speed, common: dict[str, Any]) -> float:
    """Seconds of notebook 08, see `studies.landscape`: what it shares with 04 is not counted again.

    A point of the path quantizes two texts of as many rows as an iteration of the refinement.
    """
    points = len(own["gammas"]) * (1.25 * own["steps"] + 1)
    return t.window + 2 * points * t.refine / common["iterations"]


def _packed(own: dict[str, Any], t: Speed, common: dict[str, Any]) -> float:
    """Seconds of notebook 07, see `studies.int4_model`; fp64 takes twice as long.

    A packed linear unpacks first: taken as one with fake quantization, which on a CPU is less than it takes.
    """
    w = own["windows"] or TEXT // common["seqlen"]
    return (1 + 4 + 2 * 2 + 2 * own["draws"]) * w * t.window + 4 * t.rtn


def _objectives(own: dict[str, Any], t: Speed, common: dict[str, Any]) -> float:
    """Seconds of notebook 09, see `studies.objectives` and `studies.alternatives`."""
    w, seeds = own["windows"], len(common["seeds"])
    new = own["confirm_windows"] or max(TEXT // common["seqlen"] - w, 1)
    screened = 2 * len(own["objectives"]) * len(own["gammas"])
    settings = own["screen_bits"]
    best = min(3, len(own["objectives"])) * len(settings)  # three of each ranking, at most
    refined = screened + (1 + best) * seeds  # `dfrot` besides
    steps = 2 * seeds * 100 / common["iterations"]  # `recommended`, and `dfrot` with its steps
    models = (1 + 3 + best) * seeds  # RH besides; each with GPTQ and with W16
    passes = (screened + 2) * len(settings) * w + (3 + 2 * seeds) * new  # prefix, values
    # perplexity of both kinds and KL of two models, the second text; the task loss's two models and KL
    passes += models * (4 * new + bool(own["second"]) * w) + 4 * new
    # forward, and backward with respect to activations: three times a forward pass
    cayley = 3 * own["cayley_steps"] * own["cayley_length"] / common["seqlen"]
    rounded = sum(not b.startswith("16") for b in settings) * (screened + 2)
    builds = (
        (screened + 2) * len(settings)
        - rounded
        + models * (2 + bool(own["second"]))
        + 3
        + 2 * seeds
    )
    return (
        (passes + cayley + 8) * t.window  # 8: calibration windows of `recommended`
        + builds * t.build
        + rounded * t.rtn
        + models * t.gptq
        + own["weight_windows"] * t.hessian
        + (refined + steps) * t.refine
    )


def _zero_shot(own: dict[str, Any], t: Speed, common: dict[str, Any]) -> float:
    """Seconds of notebook 10, see `studies.zero_shot`; a token of a task as one of a window."""
    w, seeds = own["windows"] or TEXT // common["seqlen"], len(common["seeds"])
    models = 3 * seeds  # RO, RH, DFRot; besides them FP, and NR by RTN
    rows = 1 + 1 + min(1, own["side_seeds"]) + 3 * (seeds + min(own["side_seeds"], seeds))
    tokens = sum(
        own["items"] * ITEM[task] if task in ITEM else HUB.get(task, OTHER) for task in own["tasks"]
    )
    quantized = {"rtn": t.rtn}.get(own["method"], t.build + t.gptq)
    passes = {"rtn": 0, "gptq-shared": 1}.get(own["method"], models) * own["weight_windows"]
    return (
        rows * (w + tokens / common["seqlen"]) * t.window
        + models * quantized
        + t.rtn
        + passes * t.hessian
    )

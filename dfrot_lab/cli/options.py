"""Options that several commands share, and the Lab that they ask for."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import click

from dfrot_lab import profiles
from dfrot_lab.files import project_root

__all__ = [
    "OBJECTIVES",
    "SEED",
    "check",
    "folder",
    "home",
    "lab",
    "model_and_corpus",
    "objective",
    "profile",
    "quantizing",
    "weights",
]

OBJECTIVES = ["centroids", "least_squares", "corners", "whip", "kurtosis", "soft_peak"]
SEED = click.IntRange(0, (1 << 32) - 1)  # `rotations.SEEDS`


def profile(function):
    """--profile."""
    text = f"Named parameters: {', '.join(profiles.names())}, or a .yml file."
    return click.option("--profile", default="demo", help=text)(function)


def folder(function):
    """--folder."""
    text = "Where artefacts and results go.  [default: results/PROFILE]"
    return click.option("--folder", type=click.Path(path_type=Path), help=text)(function)


def model_and_corpus(function):
    """--model and --corpus, in place of the profile's."""
    corpus = click.option("--corpus", help="demo, lee, pydoc, wikitext2, c4, or a text file.")
    model = click.option("--model", help="demo, a Hugging Face id, a folder, or a .gguf file.")
    return model(corpus(function))


def weights(function):
    """--bits, --method and --seed of a quantized model."""
    text = "Of the weights: RTN, GPTQ as published, or GPTQ from shared Hessians."
    kinds = click.Choice(["rtn", "gptq", "gptq-shared"])
    method = click.option("--method", type=kinds, default="gptq-shared", help=text)
    bits = click.option("--bits", default="4-4-16", help="Weights-activations-KV cache.")
    seed = click.option("--seed", type=SEED, default=0, help="Of the rotation.")
    return bits(method(seed(function)))


def objective(function):
    """--objective of a refined R1."""
    text = "What R1 is refined for (notebook 9)."
    kinds = click.Choice(OBJECTIVES)
    return click.option("--objective", type=kinds, default="centroids", help=text)(function)


def home(profile: str) -> Path:
    """Where the profile's results go, relative to the project."""
    return Path("results") / Path(profile).stem


def check(profile: str, model: str | None = None, corpus: str | None = None) -> None:
    """What is wrong with profile, model's folder or corpus is told before anything starts."""
    from dfrot_lab import model_folders, notebooks, values

    notebooks.check_profile(profile, project_root() / "notebooks")
    model_folders.check(model or profiles.load(profile)["common"].get("model"))
    values.check(corpus=corpus)


def lab(profile: str, folder: Path | None, **given):
    """A Lab with the profile's parameters, overridden by those in `given` that are not None.

    Another model or corpus gets a folder of its own, so that the profile's artefacts stay.
    """
    check(profile, given.get("model"), given.get("corpus"))
    from dfrot_lab.lab import Lab

    known = {f.name for f in fields(Lab)}
    values = {k: v for k, v in profiles.load(profile)["common"].items() if k in known}
    values |= {k: v for k, v in given.items() if v is not None}
    own = [str(given[k]) for k in ("model", "corpus") if given.get(k)]
    if own and folder is None:
        name = re.sub(r"[^\w.-]+", "-", "-".join(own)).strip("-.")
        if name in (*profiles.names(), Path(profile).stem):  # that folder is the profile's
            name = f"{Path(profile).stem}-{name}"
        folder = Path("results") / name
    return Lab(**values | {"folder": folder or home(profile)})


def quantizing(profile: str, folder: Path | None, **given):
    """`lab` with the calibration windows for GPTQ of the profile's notebook 10: shared Hessians."""
    own = profiles.load(profile)["notebooks"].get("10_zero_shot", {})
    windows = {k: own[k] for k in ("weight_windows",) if k in own}
    return lab(profile, folder, **windows, **given)

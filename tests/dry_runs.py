"""What Snakemake would do: a dry run of the project's Snakefile in a copy of the checkout, as jobs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """A job that would run; `name` is its notebook, or its rule."""

    rule: str
    wildcards: dict[str, str]
    resources: dict[str, str]
    inputs: list[str]

    @property
    def name(self) -> str:
        return self.wildcards.get("notebook", self.rule)


def snakemake(
    checkout: Path,
    *arguments: str,
    code: Path = ROOT,
    path: str = "",
    fails: bool = False,
    **config: str,
) -> str:
    """Snakemake's output in `checkout`; the package is the one in `code`, `path` is first on the PATH."""
    found = {"PYTHONPATH": os.pathsep.join([str(code), str(code / "kernels")])}
    found |= {"PATH": os.pathsep.join([path, os.environ["PATH"]])} if path else {}
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--snakefile", "Snakefile", "--nolock", *arguments,
         "--config", *(f"{name}={value}" for name, value in config.items())],
        cwd=checkout, text=True, capture_output=True, check=False, env=os.environ | found,
    )  # fmt: skip
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def dry_run(checkout: Path, code: Path = ROOT, **config: str) -> list[Job]:
    """The jobs that Snakemake would start; config: profile, notebooks, experiment."""
    config = {"profile": "smoke", "notebooks": "", "experiment": ""} | config
    text = snakemake(checkout, "-n", "--cores", "1", code=code, **config)
    found = []
    for block in re.split(r"\n(?=(?:local)?rule )", text)[1:]:
        told = dict(re.findall(r"^    (\w+): (.*)$", block, re.M))
        wildcards = dict(w.split("=") for w in told.get("wildcards", "").split(", ") if w)
        resources = dict(w.split("=") for w in told.get("resources", "").split(", ") if w)
        rule = re.match(r"(?:local)?rule (\w+)", block)[1]
        inputs = told.get("input", "").split(", ")
        found.append(Job(rule, wildcards, resources, inputs))
    return found

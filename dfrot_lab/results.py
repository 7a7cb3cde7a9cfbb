"""Results: what a notebook found (result.json) and what it was found with (provenance.json).

The first holds the same bytes on every run with the same parameters on the same machine; whatever
differs between two such runs, time and memory among it, goes to the second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dfrot_lab import files

__all__ = ["Claim", "ResultError", "code_digest", "load", "provenance", "rounded", "save"]

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "matplotlib",
    "gguf",
    "tokenizers",
    "dfrot-lab",
)
_STARTED = time.monotonic()


class ResultError(ValueError):
    """A result that is missing or damaged; one line: what, where, what to do."""


@dataclass(frozen=True)
class Claim:
    """One line of a notebook's closing table: paper says / we see / agrees, and the rule for that."""

    claim: str
    paper: str
    ours: str
    rule: str
    agrees: bool


def save(
    folder: str | Path,
    result: dict[str, Any],
    parameters: dict[str, Any],
    about: dict | None = None,
) -> Path:
    """Write `result` and its provenance into `folder`, result last; returns the result's path.

    Claims may be given as `Claim`. Each file is written atomically: whole or not at all.
    """
    folder, result = Path(folder), dict(result)
    parameters = {k: v for k, v in parameters.items() if k != "folder"}  # where is not what
    result["claims"] = [asdict(c) if isinstance(c, Claim) else c for c in result.get("claims", [])]
    result["parameters"] = parameters
    files.write_json(folder / "provenance.json", provenance(parameters) | {"inputs": about or {}})
    return files.write_json(folder / "result.json", result)


def load(folder: str | Path) -> dict[str, Any]:
    """The result in `folder`; ResultError if it is missing or not JSON."""
    path = Path(folder) / "result.json"
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise ResultError(
            f"{path} does not exist: run its notebook first (`make figures`)"
        ) from None
    except ValueError as error:
        raise ResultError(
            f"{path} is damaged ({error}): delete it and run its notebook again"
        ) from error


def rounded(values: Any, digits: int = 6) -> Any:
    """Arrays and tensors as nested lists of `digits` significant digits: enough for any figure."""
    array = np.asarray(values, dtype=np.float64)
    shortened = [float(f"{v:.{digits - 1}e}") for v in array.ravel()]
    return np.array(shortened, dtype=np.float64).reshape(array.shape).tolist()


def code_digest(*modules: str) -> str:
    """SHA-256 over the source of the named modules: results computed by other code are not reused."""
    digest = hashlib.sha256()
    for name in modules:
        digest.update(_source(name))
    return digest.hexdigest()[:16]


@cache
def _source(module: str) -> bytes:
    """As it was when first asked for: what this process runs, whatever is edited meanwhile."""
    return Path(importlib.util.find_spec(module).origin).read_bytes()


def provenance(parameters: dict[str, Any]) -> dict[str, Any]:
    """Commit and dirty flag, versions, device, threads, parameters, wall time, peak memory."""
    import torch

    return {
        "parameters": parameters,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {p: _version(p) for p in PACKAGES},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - _STARTED, 1),
        "peak_memory_MiB": _peak_memory(),
    }


def _peak_memory() -> int | None:
    """Largest resident size so far, MiB; None where the system does not keep it (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))


def _git(*arguments: str) -> str | None:
    """Output of git in the checkout this package lies in; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()

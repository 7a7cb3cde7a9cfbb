"""Backend: the module whose functions are used, chosen by name and never exchanged silently.

"torch" is `reference`, which runs anywhere; "triton" the kernels, functions of the same names and
signatures, which need a CUDA device, or TRITON_INTERPRET=1 set before Python starts.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from dfrot_kernels.checks import KernelError

__all__ = ["default", "get"]

MODULES = {"torch": "dfrot_kernels.reference", "triton": "dfrot_kernels.triton_ops"}


def get(name: str) -> ModuleType:
    """The module of backend `name`; KernelError if there is none, or no Triton for it."""
    if name not in MODULES:
        raise KernelError(f"backend = {name!r}: use one of {', '.join(MODULES)}")
    if name == "triton" and find_spec("triton") is None:
        raise KernelError("backend = 'triton': triton is not installed here, use backend='torch'")
    return import_module(MODULES[name])


def default(device: str | torch.device) -> str:
    """Name: "triton" on a CUDA device or under the interpreter, where triton is installed; else "torch"."""
    runs = torch.device(device).type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return "triton" if runs and find_spec("triton") else "torch"

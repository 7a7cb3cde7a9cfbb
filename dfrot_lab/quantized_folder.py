"""Quantized folder: a quantized model on disk, in the Hugging Face layout, and back.

It holds the weights as rotated, quantized and dequantized, and in config.json what is left to do at run
time: quantized activations and KV cache, the Hadamard R4 before down_proj. Plain transformers does none of
that, so `load` is the way back; `models.load` refuses the folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dfrot_kernels import hadamard
from torch import nn

from dfrot_lab import files, hub, models, quantized_model
from dfrot_lab.quantized_model import ModelSpec

__all__ = ["FolderError", "load", "save"]

KEY = models.QUANTIZED
NOTE = (
    "Weights are dequantized values. Activations and KV cache are quantized, and inputs of down_proj "
    "turned by R4, at run time: load with dfrot_lab.quantized_folder.load, not with plain transformers."
)


class FolderError(ValueError):
    """A folder that cannot be written or is no quantized model; one line: what, which, what to do."""


def save(model: nn.Module, tokenizer: Any, folder: str | Path, about: dict[str, Any]) -> Path:
    """Write a model of `quantized_model.build` and its tokenizer to `folder`, which appears when whole.

    about: {"bits": W-A-KV, …}, kept in config.json. Raises FolderError if `folder` exists, if tokens are
    kept in floating point or steps are static (neither is in the weights), ValueError for a model that
    is not built.
    """
    folder = Path(folder)
    if folder.exists():
        raise FolderError(f"{folder} exists: choose another folder, or delete it")
    for quantizer in quantized_model._quantizers(model):
        if quantizer.keep is not None or quantizer.static is not None:
            raise FolderError("kept tokens and static steps cannot be saved: build without them")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".partial-{folder.name}-", dir=folder.parent))
    setattr(model.config, KEY, about | {"note": NOTE})
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        files.readable(partial)
        os.replace(partial, folder)
    finally:
        delattr(model.config, KEY)
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load(folder: str | Path, *, device: str = "cpu") -> tuple[nn.Module, Any, dict[str, Any]]:
    """(model, tokenizer, about): the model computes what the saved one did, bit for bit.

    Raises FolderError for a folder that `save` did not write.
    """
    transformers = hub.quiet_transformers()
    path = str(folder)
    if not (Path(folder) / "config.json").is_file():
        raise FolderError(f"{folder} is no model folder: it has no config.json")
    about = getattr(transformers.AutoConfig.from_pretrained(path), KEY, None)
    if about is None:
        raise FolderError(f"{folder} holds no quantized model: write one with `dfrot-lab quantize`")
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    plain = plain.to(device).eval().requires_grad_(False)
    spec = ModelSpec.of(about["bits"])
    # the weights are quantized already
    spec = ModelSpec(activations=spec.activations, kv=spec.kv)
    model = quantized_model.build(plain, None, spec)
    if "R4" in model.config.dfrot_merged:
        for layer in models.layers(model):
            layer.mlp_output.online = hadamard.transform
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return model, tokenizer, {k: v for k, v in about.items() if k != "note"}

"""Quantized folder: a quantized model on disk, in the Hugging Face layout, and back.

It holds the weights as rotated, quantized and dequantized, and in config.json what is left to do at run
time: quantized activations and KV cache, the Hadamard R4 before down_proj. Plain transformers does none of
that, so `load` is the way back; `models.load` refuses the folder.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from dfrot_kernels import hadamard
from safetensors import SafetensorError
from torch import nn

from dfrot_lab import files, hub, kv_cache, models, quantized_model, staging
from dfrot_lab.quantized_model import ModelSpec

__all__ = ["FolderError", "check", "load", "save"]

KEY = models.QUANTIZED
NOTE = (
    "Weights are dequantized values. Activations and KV cache are quantized, and inputs of down_proj "
    "turned by R4, at run time: load with dfrot_lab.quantized_folder.load, not with plain transformers."
)


class FolderError(ValueError):
    """A folder that cannot be written or is no quantized model; one line: what, which, what to do."""


def save(model: nn.Module, tokenizer: Any, folder: str | Path, about: dict[str, Any]) -> Path:
    """Write a model of `quantized_model.build` and its tokenizer to `folder`, which appears when whole.

    about: {"bits": W-A-KV, …}, kept in config.json. Raises FolderError if `folder` exists, or if `bits` do
    not tell how the model quantizes (kept tokens, static steps, clipping, groups, Hadamards across heads),
    OSError where the disk is full, ValueError for a model that is not built.
    """
    folder = Path(folder)
    check(folder, model)
    _check_spec(model, about.get("bits"))
    setattr(model.config, KEY, about | {"note": NOTE})
    try:
        with staging.beside(folder) as work:
            model.save_pretrained(work / "whole")
            tokenizer.save_pretrained(work / "whole")
            files.readable(work / "whole")
            os.replace(work / "whole", folder)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"{error} while writing", str(folder)) from error
    finally:
        delattr(model.config, KEY)
    return folder


def check(folder: str | Path, model: nn.Module) -> None:
    """FolderError if `folder` exists, OSError if there is no room for the weights of `model` beside it."""
    folder = Path(folder)
    if folder.exists():
        raise FolderError(f"{folder} exists: choose another folder, or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    size = 1.05 * sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        said = f"{free / 1e9:.1f} GB free where {size / 1e9:.1f} are needed"
        raise OSError(errno.ENOSPC, said, str(folder))


def _check_spec(model: nn.Module, bits: str | None) -> None:
    """FolderError unless the model quantizes as `load` will take `bits` to say."""
    if bits is None:
        raise FolderError("about has no 'bits': say what is quantized, such as {'bits': '4-4-16'}")
    spec = ModelSpec.of(bits)
    for quantizer in quantized_model._quantizers(model):
        if quantizer.keep is not None or quantizer.static is not None:
            raise FolderError("kept tokens and static steps cannot be saved: build without them")
        if quantizer.spec != spec.activations:
            raise FolderError(
                f"activations are quantized as {quantizer.spec}, bits = {bits!r} mean {spec.activations}: "
                "only what bits tell can be saved"
            )
    kv = {getattr(layer.module.self_attn, "kv_spec", None) for layer in models.layers(model)}
    if model.config._attn_implementation != kv_cache.NAME:
        kv = {None}
    if kv != {spec.kv}:
        raise FolderError(f"the KV cache is quantized as {kv}, and bits = {bits!r} mean {spec.kv}")
    if "heads" in model.config.dfrot_merged:
        raise FolderError("Hadamards across heads cannot be saved: build with heads=False")


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

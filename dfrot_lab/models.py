"""Model: load a causal language model and its tokenizer, from the assets, the hub, a folder or a GGUF.

Its parts by role, and the folding of its gains, are `dfrot_lab.architectures`; their names are here too.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfrot_lab import assets, dequantized, hub
from dfrot_lab.architectures import (
    ARCHITECTURES,
    Architecture,
    Layer,
    ModelError,
    architecture,
    base,
    fold_gains,
    head,
    is_folded,
    layers,
    norm_sites,
    preserve_norm_dtype,
)
from dfrot_lab.hub import plain_errors, quiet_transformers
from dfrot_lab.tiny_models import tiny

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Layer",
    "ModelError",
    "architecture",
    "base",
    "check_plain",
    "fold_gains",
    "head",
    "identity",
    "is_folded",
    "layers",
    "load",
    "load_config",
    "load_tokenizer",
    "norm_sites",
    "of_shape",
    "preserve_norm_dtype",
    "tiny",
]

DTYPES = ("float32", "float16", "bfloat16", "float64")
QUANTIZED = "dfrot_quantized"  # the key in config.json of a folder of `dfrot-lab quantize`


def load(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    fold: bool = True,
) -> nn.Module:
    """A transformers causal language model in eval mode, RMSNorm gains folded unless `fold=False`.

    model_id: 'demo' (SmolLM2-135M-Instruct from the packaged assets), 'tiny:llama' (also mistral,
    qwen2, qwen3; random weights with a planted massive token), a Hugging Face id, a folder, or a
    .gguf file. Raises ModelError for an unknown id, dtype or device, an unreachable hub, an
    unsupported family, and as `check_plain`.
    """
    _check(dtype, device)
    if model_id.startswith("tiny:"):
        model = tiny(model_id.removeprefix("tiny:"))
    else:
        model = _from_pretrained(model_id, revision)
    architecture(model)
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    return fold_gains(model) if fold else model


def identity(model_id: str) -> str:
    """What `model_id` names, for the keys of kept results: changes when the files behind it do.

    A packaged asset's SHA-256; names, sizes and times of a local folder or file; id@commit of a model on
    the hub; else the id itself.
    """
    if model_id == "demo":
        return assets.ASSETS["smollm2"].sha256
    path = Path(model_id)
    if not path.exists():
        found = hub.commit(model_id)
        return f"{model_id}@{found}" if found else model_id
    parts = sorted(path.iterdir()) if path.is_dir() else [path]
    return str([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in parts if p.is_file()])


def check_plain(config: dict[str, Any], model_id: str) -> None:
    """ModelError if weights with this `config` (of config.json) are no model's by themselves.

    Such are a folder of `dfrot-lab quantize`, and a checkpoint with R4 or the Hadamard across heads merged:
    what must be done at run time besides is in no file.
    """
    if config.get(QUANTIZED) is not None:
        raise ModelError(
            f"model {model_id!r} was written by `dfrot-lab quantize` and is quantized already: give the "
            "model it was made of, or measure it with `dfrot-lab eval --quantized`"
        )
    merged = config.get("dfrot_merged") or []
    for name, where in (("R4", "down_proj"), ("heads", "o_proj")):
        if name in merged:
            raise ModelError(
                f"model {model_id!r} was saved with {name} merged, and no file holds the Hadamard "
                f"that must stand before its {where}: load the original and build it again"
            )


def load_tokenizer(model_id: str, *, revision: str | None = None):
    """The tokenizer that belongs to `model_id` (bytes for 'tiny:…'); same errors as `load`."""
    transformers = quiet_transformers()

    if model_id.startswith("tiny:"):
        return transformers.ByT5Tokenizer()
    with plain_errors(model_id):
        source, kwargs = _source(model_id, revision)
        return transformers.AutoTokenizer.from_pretrained(source, **kwargs)


def of_shape(config, layers: int, *, dtype: str, device: str) -> nn.Module:
    """A model of `config`'s shape with `layers` layers of random weights, gains folded; for timing."""
    _check(dtype, device)
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:layers]
    model = quiet_transformers().AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype)
    )
    return fold_gains(model.to(device).eval().requires_grad_(False))


def _check(dtype: str, device: str) -> None:
    if dtype not in DTYPES:
        raise ModelError(f"dtype = {dtype!r}: use one of {', '.join(DTYPES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device = {device!r}: this torch sees no CUDA device, use 'cpu'")


def load_config(model_id: str, *, revision: str | None = None):
    """The configuration of `model_id`, without its weights; same errors as `load`."""
    transformers = quiet_transformers()
    if model_id.startswith("tiny:"):
        return tiny(model_id.removeprefix("tiny:")).config
    with plain_errors(model_id):
        source, kwargs = _source(model_id, revision)
        return transformers.AutoConfig.from_pretrained(source, **kwargs)


def _source(model_id: str, revision: str | None) -> tuple[str, dict]:
    """What transformers is to be given for `model_id`."""
    if model_id == "demo":
        return str(dequantized.folder_of(assets.path("smollm2"))), {}
    path = Path(model_id)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model file {model_id} does not exist: check the path")
        return str(dequantized.folder_of(path)), {}
    if path.is_dir():
        return str(path), {}
    if not hub.on_hub(model_id):
        raise ModelError(
            f"model {model_id!r} is neither 'demo', 'tiny:…', a folder, a .gguf file nor a "
            "Hugging Face id of the form owner/name"
        )
    return model_id, {"revision": revision} if revision else {}


def _from_pretrained(model_id: str, revision: str | None) -> nn.Module:
    transformers = quiet_transformers()

    with plain_errors(model_id):
        source, kwargs = _source(model_id, revision)
        config = transformers.AutoConfig.from_pretrained(source, **kwargs)
        if config.model_type not in ARCHITECTURES:  # refuse before gigabytes are read
            architecture(type("Unloaded", (), {"config": config}))
        check_plain(vars(config), model_id)
        return transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32 if model_id == "demo" else "auto", **kwargs
        )

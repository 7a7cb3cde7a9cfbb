"""Check of a compressed-tensors folder: its weights are ours, and so is what it does to activations.

A code of a 4-bit activation turns over at a tie, and one code of a massive token changes everything after it:
two fp32 computations of one W4A4 checkpoint differ by several percent in their logits. In fp64 they agree to
the last digit, so that is what is compared, on as many of the first layers as hold `PARAMETERS` weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dfrot_lab import quantized_model
from dfrot_lab.exports import checks
from dfrot_lab.exports.sources import ExportError
from dfrot_lab.quantized_model import ModelSpec

__all__ = ["EXACT", "ours", "same_activations", "same_weights", "unpacked"]

PARAMETERS = 500_000_000  # 4 GB in fp64, three times over
EXACT = (
    1e-6  # logits are read in fp32; other activations, such as symmetric ones, are 0.1 off or more
)


def unpacked(folder: Path, **options) -> nn.Module:
    """The model in `folder` as transformers alone loads it, its weights no longer packed."""
    model = checks.plain(folder, **options)
    checks.logits(model)  # compressed-tensors unpacks at the first forward pass of the whole model
    return model


def ours(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """A copy of an unpacked `model` without the package's hooks, activations quantized by us as in `spec`."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = next(model.parameters()).dtype
    bare = type(model)(config).to(dtype).eval().requires_grad_(False)
    state = model.state_dict()
    bare.load_state_dict({name: state[name] for name in bare.state_dict()})
    # the weights are quantized already
    only = ModelSpec(activations=spec.activations, kv=spec.kv)
    return quantized_model.build(bare, None, only)


def same_weights(folder: Path, wanted: Mapping[str, Tensor], dtype: str, what: object) -> None:
    """ExportError unless every linear of `folder` unpacks to `wanted`, but for rounding to `dtype`."""
    model, near = unpacked(folder), torch.finfo(getattr(torch, dtype)).eps
    for name, weight in wanted.items():
        found = model.get_submodule(name).weight
        if not bool(((found - weight).abs() <= near * weight.abs()).all()):
            raise ExportError(
                f"{what}: {name} is unpacked to other weights; it was deleted, please report this"
            )


def same_activations(
    folder: Path, spec: ModelSpec, weights: int, what: object, declared=None
) -> float:
    """Relative difference (norm) of the logits of `folder` from those of `ours`, in fp64.

    weights: how many are quantized in all. declared: what the format makes of our quantized model, where it
    is something else. Raises ExportError where they differ.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    layers = config.num_hidden_layers
    few = max(1, min(layers, PARAMETERS * layers // weights))
    if few < layers:
        config.num_hidden_layers = few
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:few]
    model = unpacked(folder, dtype=torch.float64, config=config)
    found, model = checks.logits(model), ours(model, spec)
    wanted = checks.logits(declared(model) if declared else model)
    error = (torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted)).item()
    if not error <= EXACT:
        raise ExportError(
            f"{what} computes something else than our quantized model: logits differ by {error:.3g} "
            f"(norm, relative, in fp64; {EXACT:g} is rounding); it was deleted, please report this"
        )
    return error

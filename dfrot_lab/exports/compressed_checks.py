"""Check of a compressed-tensors folder: its weights are ours, and so is what it computes with them.

A code of a 4-bit activation turns over at a tie, and one code of a massive token changes everything after it:
two fp32 computations of one W4A4 checkpoint differ by several percent in their logits. In fp64 they agree to
the last digit, so that is what is compared, on as many of the first layers as hold `PARAMETERS` weights
(embedding and head apart).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfrot_lab import quantized_model
from dfrot_lab.exports import checks
from dfrot_lab.exports.sources import ExportError
from dfrot_lab.quantized_model import ModelSpec

__all__ = ["EXACT", "ours", "quiet", "same_logits", "same_weights", "unpacked"]

PARAMETERS = 500_000_000  # 4 GB in fp64, three times over
EXACT = (
    1e-6  # logits are read in fp32; other activations, such as symmetric ones, are 0.1 off or more
)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the package's warning, for every linear, that another format was expected."""
    from loguru import logger

    logger.disable("compressed_tensors.compressors.format")
    try:
        yield
    finally:
        logger.enable("compressed_tensors.compressors.format")


def unpacked(folder: Path, **options) -> nn.Module:
    """The model in `folder` as transformers alone loads it, its weights no longer packed."""
    with quiet():
        model = checks.plain(folder, **options)
        checks.logits(
            model
        )  # compressed-tensors unpacks at the first forward pass of the whole model
    return model


def ours(model: nn.Module, spec: ModelSpec, config: Any = None) -> nn.Module:
    """A copy of an unpacked `model` without the package's hooks, activations quantized by us as in `spec`.

    config: other than the model's own.
    """
    config = copy.deepcopy(config or model.config)
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
    """ExportError unless every tensor of `wanted` is in `folder`, unpacked, but for rounding to `dtype`."""
    state, near = unpacked(folder).state_dict(), torch.finfo(getattr(torch, dtype)).eps
    for name, weight in wanted.items():
        found = state.get(name)
        if found is None or not bool(((found - weight).abs() <= near * weight.abs()).all()):
            raise ExportError(
                f"{what}: {name} is read back as something else; it was deleted, please report this"
            )


def same_logits(
    folder: Path,
    spec: ModelSpec,
    config: Any,
    weights: int,
    what: object,
    declared: Callable[[nn.Module], nn.Module] | None = None,
) -> float:
    """Relative difference (norm) of the logits of `folder` from those of `ours` with `config`, in fp64.

    weights: how many are quantized in all. declared: what the format makes of our quantized model, where it
    is something else. Raises ExportError where they differ.
    """
    import transformers

    configs = [transformers.AutoConfig.from_pretrained(folder), copy.deepcopy(config)]
    layers = config.num_hidden_layers
    few = max(1, min(layers, PARAMETERS * layers // weights))
    for c in configs if few < layers else ():
        c.num_hidden_layers = few
        if getattr(c, "layer_types", None):
            c.layer_types = c.layer_types[:few]
    model = unpacked(folder, dtype=torch.float64, config=configs[0])
    found, model = checks.logits(model), ours(model, spec, configs[1])
    wanted = checks.logits(declared(model) if declared else model)
    error = (torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted)).item()
    if not error <= EXACT:
        raise ExportError(
            f"{what} computes something else than our quantized model: logits differ by {error:.3g} "
            f"(norm, relative, in fp64; {EXACT:g} is rounding); it was deleted, please report this"
        )
    return error

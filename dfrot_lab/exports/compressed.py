"""compressed-tensors: rotated 4-bit weights as integer codes, with 4- or 8-bit activations declared.

The codes and steps are those of our fake-quantized model; the package that owns the format stores them.
R1 and R2 are in the weights. R4 is not: it is an online transform, which the format can describe
(`transform_config`) but transformers does not read, so a checkpoint with it would compute nonsense there.
"""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfrot_lab import files, models, quantized_model, staging
from dfrot_lab.exports import checks, compressed_checks, huggingface
from dfrot_lab.exports.sources import ExportError, Recipe, Source, record
from dfrot_lab.linears import InputQuantizer, QuantLinear, grid
from dfrot_lab.quantized_model import ModelSpec
from dfrot_lab.quantizers import fake_quantize

__all__ = ["FORMATS", "write"]

FORMATS = {False: "int-quantized", True: "pack-quantized"}


@torch.no_grad()
def write(
    source: Source,
    target: str | Path,
    recipe: Recipe,
    *,
    bits: str = "4-4-16",
    symmetric: bool = False,
    packed: bool = False,
    method: str = "rtn",
    clip_steps: int = 80,
    calibration: Tensor | None = None,
) -> dict[str, Any]:
    """Write `source`, rotated and quantized, to the new folder `target`; returns its record.

    bits: '4-4-16' or '4-8-16' (W-A-KV): weights symmetric per channel by `method` ("rtn", or "gptq" with
    `calibration` tokens [windows, seqlen]), activations dynamic per token, asymmetric unless `symmetric`;
    the head stays in floating point. packed: eight codes to an int32 instead of one to an int8. The
    folder is loaded again by transformers and compared with our quantized model, see `compressed_checks`.
    Raises ExportError where `target` exists, for other bits, without the package, and for a checkpoint
    that computes something else.
    """
    target = Path(target)
    if target.exists():
        raise ExportError(f"{target} exists: choose another folder, or delete it")
    _needed()
    spec = _spec(bits, symmetric, method=method, clip_steps=clip_steps)
    model = models.load(str(source.folder))
    built = quantized_model.build(model, recipe.rotations, spec, calibration=calibration)
    dtype = huggingface.stored_dtype(source.folder)
    config = copy.deepcopy(model.config)
    del model
    quantized = {n: m for n, m in built.named_modules() if isinstance(m, QuantLinear)}
    codes = {n: grid(m.weight) for n, m in quantized.items()}
    for name, (code, step) in codes.items():  # what will be stored, to the last bit
        stored = step.to(getattr(torch, dtype))[:, None]
        weight, again = quantized[name].weight, (code.to(stored.dtype) * stored).float()
        if (again - weight).abs().max() > 8 * torch.finfo(stored.dtype).eps * weight.abs().max():
            raise ExportError(f"{name}: codes times steps are not its weight; please report this")
        weight.copy_(again)
    with staging.beside(target) as work:
        folder = work / "model"
        lm = _unquantized(built, quantized)
        lm.config = config
        wanted = {n: w.to(getattr(torch, dtype)).float() for n, w in lm.state_dict().items()}
        lm.to(getattr(torch, dtype))
        _save(lm, codes, folder, bits, symmetric, packed)
        for file in source.folder.iterdir():
            small = file.suffix in (".json", ".model", ".txt", ".jinja")
            if small and not (folder / file.name).exists() and not file.name.endswith("index.json"):
                shutil.copyfile(file, folder / file.name)
        compressed_checks.same_weights(folder, wanted, dtype, target)
        weights = sum(code.numel() for code, _ in codes.values())
        declared = _as_declared if symmetric else None
        error = compressed_checks.same_logits(folder, spec, config, weights, target, declared)
        about = record(source, recipe) | {"verified": {"logits": error}}
        about |= {"bits": bits, "method": method, "symmetric": symmetric, "format": FORMATS[packed]}
        about["merged"] = about["merged"] or ["gains"]
        written = files.read_json(folder / "config.json") | {"dfrot_export": about}
        files.write_json(folder / "config.json", written | {"dfrot_merged": about["merged"]})
        checks.recorded(folder, about, target)
        files.readable(folder)
        os.replace(folder, target)
    return about


def _needed() -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise ExportError(
            "the package compressed-tensors is not installed: pip install 'dfrot-lab[export]'"
        ) from error


def _spec(bits: str, symmetric: bool, **options: Any) -> ModelSpec:
    spec = ModelSpec.of(bits, **options)
    if bits not in ("4-4-16", "4-8-16"):
        raise ExportError(
            f"bits = {bits!r}: compressed-tensors is written for '4-4-16' and '4-8-16'"
        )
    return replace(spec, activations=replace(spec.activations, symmetric=symmetric))


class _HalfStep(InputQuantizer):
    """Symmetric with the package's Δ = max|x|/(2^(b−1) − ½), where ours is max|x|/(2^(b−1) − 1).

    The largest number of a token then lies half way between two codes, on both sides of zero.
    """

    def _quantize(self, x: Tensor) -> Tensor:
        high = self.spec.code_range[1] + 0.5
        scale = x.abs().amax(-1, keepdim=True) / high
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return fake_quantize(x, self.spec, scale=scale, zero=torch.zeros_like(scale))


def _as_declared(built: nn.Module) -> nn.Module:
    """`built` with symmetric activations as the package quantizes them, in place."""
    new: dict[int, _HalfStep] = {}
    for module in [m for m in built.modules() if isinstance(m, QuantLinear)]:
        old = module.quantizer
        if id(old) not in new and not isinstance(old, _HalfStep):
            new[id(old)] = _HalfStep(old.readers)
            new[id(old)].spec = old.spec
        module.quantizer = new.get(id(old), old)
    return built


def _unquantized(built: nn.Module, quantized: dict[str, QuantLinear]) -> nn.Module:
    """`built` with plain linears again, which share the fake-quantized weights; in place."""
    for name, module in quantized.items():
        plain = nn.Linear(
            module.in_features, module.out_features, module.bias is not None, device="meta"
        )
        plain.weight, plain.bias = (
            nn.Parameter(module.weight.detach(), requires_grad=False),
            module.bias,
        )
        parent, _, child = name.rpartition(".")
        setattr(built.get_submodule(parent), child, plain)
    return built


def _save(lm, codes: dict, folder: Path, bits: str, symmetric: bool, packed: bool) -> None:
    """Declare the scheme, put our steps in, and let the package store the codes."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    weights = QuantizationArgs(num_bits=4, type="int", strategy="channel", symmetric=True)
    inputs = QuantizationArgs(
        num_bits=int(bits.split("-")[1]),
        type="int",
        strategy="token",
        symmetric=symmetric,
        dynamic=True,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    head = models.architecture(lm).head
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=[head], quantization_status="frozen"
    )
    apply_quantization_config(lm, config, show_progress=False)
    for name, (_, step) in codes.items():
        scale = lm.get_submodule(name).weight_scale
        scale.copy_(step[:, None].to(scale.dtype))
    compressor = ModelCompressor.from_pretrained_model(lm, FORMATS[packed])
    with compressed_checks.quiet():
        compressor.compress_model(lm)
    stored = {n: lm.get_submodule(n) for n in codes}
    for name, (code, _) in codes.items():
        if not packed and not torch.equal(stored[name].weight, code):
            raise ExportError(f"{name}: the stored codes are not ours; please report this")
    lm.save_pretrained(folder)
    compressor.update_config(folder)

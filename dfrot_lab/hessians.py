"""Hessians: XᵀX of every linear's inputs in the floating-point model, kept layer by layer on disk.

A rotation only conjugates them: the inputs of a rotated model are XM for an orthogonal M, so that
H ← MᵀHM. One pass over the calibration tokens then serves GPTQ under every rotation and seed, where
GPTQ as published passes them again through the quantized layers for each (docs/deviations.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from dfrot_lab import files, gptq, models, rotations
from dfrot_lab.rotations import Rotations

__all__ = ["Hessians", "HessiansError", "collect"]


class HessiansError(RuntimeError):
    """Files that are no longer those that were opened; one line: which, why, what to do."""


@dataclass(frozen=True)
class Hessians:
    """The files of `collect` in `folder`, one a layer; head_dim and the sizes are the model's."""

    folder: Path
    head_dim: int
    metadata: dict

    def of(self, rotation: Rotations) -> Callable[[int, str], Tensor]:
        """(layer, name of a linear) → H [in, in] in fp64 of its inputs under `rotation`.

        HessiansError for files that another run has replaced meanwhile.
        """

        def found(layer: int, name: str) -> Tensor:
            with safe_open(self.folder / f"layer-{layer:03d}.safetensors", framework="pt") as f:
                if (f.metadata() or {}).get("key") != self.metadata.get("key"):
                    raise HessiansError(
                        f"{self.folder} holds other Hessians by now, of layer {layer} at least: another run "
                        "with other parameters has replaced them; run again, in a folder of its own"
                    )
                h = f.get_tensor(_key(name)).double()
            for turn in self._turns(layer, name, rotation):
                h = turn(turn(h).mT)  # T(x) = xM, so T(T(H)ᵀ) = MᵀHM
            return h

        return found

    def _turns(
        self, layer: int, name: str, rotation: Rotations
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        if name == "self_attn.o_proj":
            if rotation.R2 is not None:
                r2 = rotation.values(layer).double()
                yield lambda x: rotations.turn_heads(x, r2)
            if rotation.heads:
                yield rotations.across_heads(self.head_dim)
        elif name == "mlp.down_proj":
            if rotation.R4:
                yield rotations.hadamard.transform
        elif rotation.R1 is not None:
            r1 = rotation.R1.double()
            yield lambda x: x @ r1


def _key(name: str) -> str:
    return name.rpartition(".")[2]


def collect(model: nn.Module, tokens: Tensor, folder: str | Path, about: dict) -> Hessians:
    """Hessians of the gain-folded floating-point `model` on `tokens` [windows, seqlen], in fp32 files.

    One layer is in memory at a time, and the hidden states of all windows. about: kept with them.
    `folder`/hessians.json is written last: without it the files are not taken for whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Tensor] = {}
    whose = {"key": about["key"]} if "key" in about else None

    def keep(layer: models.Layer, linears: dict[str, nn.Linear], inputs: Iterator[Tensor]) -> None:
        name = next(iter(linears))
        found[_key(name)] = gptq.hessian_of(inputs).float().contiguous()
        if name == "mlp.down_proj":
            with files.atomic(folder / f"layer-{layer.index:03d}.safetensors") as partial:
                partial.write_bytes(serialize(found, metadata=whose))
            found.clear()

    gptq.walk(model, tokens, keep)
    files.write_json(folder / "hessians.json", about)
    return load(folder, models.layers(model)[0].module.self_attn.head_dim)


def load(folder: str | Path, head_dim: int) -> Hessians:
    """What `collect` left in `folder`."""
    folder = Path(folder)
    return Hessians(folder, head_dim, json.loads((folder / "hessians.json").read_text()))

"""Checkpoint: a model's safetensors shards, rotated tensor by tensor without ever loading the model.

The same algebra as `models.fold_gains` and `rotations.merge`, for models larger than memory: a tensor is
read from its mapped shard, turned a block of rows at a time and written to its place in the new one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from dfrot_lab import files, models, rotations, staging
from dfrot_lab.models import Architecture, ModelError
from dfrot_lab.rotations import RotationError, Rotations

__all__ = ["head_dim", "merge", "open_shard", "shapes", "shards", "sizes"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
ROWS = 1024  # turned at once: 32 MB of fp32 at d = 8192


def merge(source: str | Path, target: str | Path, rotation: Rotations) -> Path:
    """Write the checkpoint in folder `source` to folder `target`, gains folded, R1 and R2 merged.

    The new one loads with plain transformers and computes the same logits; dtype and shards stay. Peak
    memory: one tensor in fp32, `rotation`, a few blocks. `target` appears when it is whole. Raises
    ModelError for a folder that is no supported checkpoint or a quantized one, or a `target` that exists,
    RotationError for a rotation that does not fit, is online (R4, heads) or was merged before, OSError
    where the disk is full.
    """
    source, target = Path(source), Path(target)
    config = _config(source)
    row = _plain(config, source)
    _check(config, rotation, source)
    if target.exists():
        raise ModelError(f"{target} exists: choose another folder, or delete it")
    names = shards(source)
    size = sum((source / name).stat().st_size for name in names)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < 1.05 * size:
        raise OSError(
            28, f"{free / 1e9:.1f} GB free where {1.05 * size / 1e9:.1f} are needed", str(target)
        )
    with staging.beside(target) as work:
        partial = work / "whole"
        partial.mkdir()
        with ExitStack() as stack:
            opened = {n: stack.enter_context(open_shard(source / n)) for n in names}
            where = {k: f for f in opened.values() for k in list(f.keys())}
            _check_names(config, row, where, source)
            tensors = _Tensors(config, row, rotation, where)
            bar = stack.enter_context(
                tqdm(total=len(tensors.where), desc="merging", unit="tensor", mininterval=2)
            )
            placed = {}
            for name, file in opened.items():
                placed |= dict.fromkeys(tensors.write(partial / name, file, bar), name)
        done = [*(config.get("dfrot_merged") or []), "gains"]
        done += [n for n in ("R1", "R2") if getattr(rotation, n) is not None]
        done = list(dict.fromkeys(done))
        _finish(source, partial, config | {"dfrot_merged": done}, placed)
        files.readable(partial)
        os.replace(partial, target)
    return target


def open_shard(path: Path) -> safe_open:
    """A safetensors file, to be used in a with statement; ModelError if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(
            f"{path} cannot be read ({error}): it is damaged or cut short, fetch it again"
        ) from error


def _check_names(config: dict[str, Any], row: Architecture, where: Any, source: Path) -> None:
    """ModelError unless every tensor that a rotation turns is there under the name that it is looked for."""
    parts = (row.attention_norm, row.mlp_norm, *row.attention_inputs, row.attention_output)
    parts += (*row.mlp_inputs, row.mlp_output)
    wanted = [f"{row.embedding}.weight", f"{row.final_norm}.weight"]
    wanted += [] if config.get("tie_word_embeddings") else [f"{row.head}.weight"]
    for layer in range(config["num_hidden_layers"]):
        wanted += [f"{row.layers}.{layer}.{part}.weight" for part in parts]
    if missing := next((name for name in wanted if name not in where), None):
        raise ModelError(
            f"{source} has no tensor {missing}: take a checkpoint of the whole causal model, as "
            "AutoModelForCausalLM saves it"
        )


def shapes(source: str | Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor → (dtype, shape) of the checkpoint in folder `source`, from its headers alone."""
    found = {}
    for name in shards(source):
        with (Path(source) / name).open("rb") as f:
            try:
                (size,) = struct.unpack("<Q", f.read(8))
                # what is no safetensors file may name any size there
                header = json.loads(f.read(min(size, (Path(source) / name).stat().st_size)))
            except (struct.error, ValueError) as error:
                raise ModelError(f"{source}/{name} is damaged ({error}): fetch it again") from error
        found |= {k: (v["dtype"], v["shape"]) for k, v in header.items() if k != "__metadata__"}
    return found


def head_dim(source: str | Path) -> int:
    """Size of a head of the checkpoint in folder `source`."""
    return _head_dim(_config(Path(source)))


def sizes(source: str | Path) -> tuple[int, int]:
    """d of R1 and head_dim of R2 for the checkpoint in folder `source`.

    ModelError for one that is not supported or is quantized, RotationError for one that is rotated.
    """
    config = _config(Path(source))
    _plain(config, Path(source))
    rotations.refuse_rotated(config.get("dfrot_merged") or [], str(source))
    return config["hidden_size"], _head_dim(config)


def _plain(config: dict[str, Any], source: Path) -> Architecture:
    """The family of a floating-point checkpoint; ModelError for any other."""
    row = models.architecture(type("Unloaded", (), {"config": type("C", (), config)()}))
    models.check_plain(config, str(source))
    if "quantization_config" in config:
        raise ModelError(
            f"{source} is quantized already: take the floating-point checkpoint it was made of"
        )
    return row


def _config(source: Path) -> dict[str, Any]:
    try:
        return json.loads((source / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source} is no checkpoint folder: its config.json cannot be read ({error})"
        ) from error


def shards(source: str | Path) -> list[str]:
    """Names of the safetensors files of the checkpoint in folder `source`; ModelError if one is missing."""
    source = Path(source)
    if (source / _INDEX).is_file():
        names = sorted(set(json.loads((source / _INDEX).read_text())["weight_map"].values()))
    else:
        names = [_SINGLE]
    for name in names:
        if not (source / name).is_file():
            raise ModelError(
                f"{source / name} does not exist: only whole safetensors checkpoints can be merged"
            )
    return names


def _head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _check(config: dict[str, Any], rotation: Rotations, source: Path) -> None:
    for name in ("R4", "heads"):
        if getattr(rotation, name):
            raise RotationError(
                f"{name} acts in the running model and no checkpoint holds it: merge R1 and R2 only"
            )
    done = config.get("dfrot_merged") or []
    if twice := [n for n in ("R1", "R2") if n in done and getattr(rotation, n) is not None]:
        raise RotationError(f"{twice} already merged into {source}: take the original")
    if rotation.R1 is not None:
        rotations.check(rotation.R1, config["hidden_size"], "R1")
    if rotation.R2 is not None:
        rotations.check(rotation.R2, _head_dim(config), "R2")


class _Tensors:
    """What becomes of each tensor of a checkpoint: its blocks, in order, turned."""

    def __init__(self, config: dict, row: Architecture, rotation: Rotations, where: dict) -> None:
        self.row, self.where, self.head_dim = row, where, _head_dim(config)
        self.r1 = None if rotation.R1 is None else rotation.R1.float()
        self.r2 = None if rotation.R2 is None else rotation.R2.float()
        self.tied = f"{row.head}.weight" not in where
        self.layer = re.compile(re.escape(row.layers) + r"\.(\d+)\.(.+)\.(weight|bias)")

    def write(self, path: Path, file: Any, bar: tqdm) -> list[str]:
        """Write the tensors of one open shard to `path`; returns their names, a new head among them."""
        names, header, end = list(file.keys()), {}, 0
        head, embedding = f"{self.row.head}.weight", f"{self.row.embedding}.weight"
        names += [head] if self.tied and embedding in names else []
        for name in names:
            part = file.get_slice(name if name in self.where else embedding)
            shape, dtype = part.get_shape(), part.get_dtype()
            if dtype not in _DTYPES:
                raise ModelError(f"{name} is {dtype}: only floating-point weights can be rotated")
            size = _DTYPES[dtype].itemsize
            for n in shape:
                size *= n
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                for block in self._blocks(name, _DTYPES[header[name]["dtype"]]):
                    out.write(block.contiguous().view(torch.uint8).numpy().data)
                bar.update(name in self.where)
        return names

    def _blocks(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        row = self.row
        if name == f"{row.embedding}.weight":
            yield from self._right(name, None, dtype)
        elif name == f"{row.head}.weight":
            source = name if name in self.where else f"{row.embedding}.weight"
            yield from self._right(source, f"{row.final_norm}.weight", dtype)
        elif name == f"{row.final_norm}.weight":
            yield torch.ones_like(self._whole(name)).to(dtype)
        elif found := self.layer.fullmatch(name):
            yield from self._in_layer(name, *found.groups(), dtype)
        else:
            yield self._whole(name).to(dtype)

    def _in_layer(self, name: str, index: str, part: str, kind: str, dtype) -> Iterator[Tensor]:
        row = self.row
        if part in (row.attention_norm, row.mlp_norm):
            yield torch.ones_like(self._whole(name)).to(dtype)
        elif part in (row.attention_output, row.mlp_output):
            yield from self._writer(name, part, kind, dtype)
        elif part in (*row.attention_inputs, *row.mlp_inputs):
            norm = row.attention_norm if part in row.attention_inputs else row.mlp_norm
            gain = f"{row.layers}.{index}.{norm}.weight" if kind == "weight" else None
            yield from self._reader(name, part, gain, dtype)
        else:
            yield self._whole(name).to(dtype)

    def _writer(self, name: str, part: str, kind: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """RᵀW of what writes the stream, its heads turned by R2 first; bR of its bias."""
        w = self._whole(name).float()
        if kind == "weight" and part == self.row.attention_output and self.r2 is not None:
            w = (w.unflatten(1, (-1, self.head_dim)) @ self.r2).flatten(1)
        if self.r1 is None:
            yield w.to(dtype)
            return
        for rows in self.r1.mT.split(ROWS):
            yield (rows @ w).to(dtype)

    def _reader(self, name: str, part: str, gain: str | None, dtype) -> Iterator[Tensor]:
        """W·diag(g)·R1 of what reads the stream; values are turned by R2 head by head."""
        if not part.endswith("v_proj") or self.r2 is None:
            if gain is None:
                yield self._whole(name).to(dtype)
            else:
                yield from self._right(name, gain, dtype)
        elif gain is None:
            heads = self._whole(name).float().unflatten(0, (-1, self.head_dim))
            yield (heads @ self.r2).flatten().to(dtype)
        else:
            w = torch.cat(list(self._right(name, gain, torch.float32)))
            yield (self.r2.mT @ w.unflatten(0, (-1, self.head_dim))).flatten(0, 1).to(dtype)

    def _right(self, name: str, gain: str | None, dtype: torch.dtype) -> Iterator[Tensor]:
        """W·diag(g)·R1, a block of rows at a time."""
        part = self.where[name].get_slice(name)
        g = None if gain is None else self._whole(gain).float()
        for first in range(0, part.get_shape()[0], ROWS):
            w = part[first : first + ROWS].float()
            w = w if g is None else w * g
            yield (w if self.r1 is None else w @ self.r1).to(dtype)

    def _whole(self, name: str) -> Tensor:
        try:
            return self.where[name].get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise ModelError(f"the checkpoint lacks {name}: download it again") from error


def _finish(source: Path, partial: Path, config: dict, placed: dict[str, str]) -> None:
    """Everything that is no weight: configuration, index, tokenizer and whatever else is small."""
    config["tie_word_embeddings"] = False
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if (source / _INDEX).is_file():
        about = json.loads((source / _INDEX).read_text()).get("metadata", {})
        index = {"metadata": about, "weight_map": dict(sorted(placed.items()))}
        (partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for file in source.iterdir():
        other = not (partial / file.name).exists() and file.is_file()
        if other and file.suffix in (".json", ".model", ".txt", ".jinja"):
            shutil.copyfile(file, partial / file.name)

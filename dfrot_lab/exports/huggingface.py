"""Hugging Face folder: the rotated floating-point checkpoint, which plain transformers loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from dfrot_lab import checkpoints, files, staging
from dfrot_lab.exports import checks
from dfrot_lab.exports.sources import ExportError, Recipe, Source, record

__all__ = ["merged", "stored_dtype", "write"]


def write(source: Source, target: str | Path, recipe: Recipe) -> dict[str, Any]:
    """Write `source` with `recipe` merged to the new folder `target`; returns its record.

    Gains are folded, embedding and head untied, dtype and shards stay. The folder is loaded again by
    transformers alone and its logits compared before it takes its place. config.json holds the record as
    `dfrot_export`. Raises ExportError where `target` exists or computes something else, RotationError
    and OSError as `checkpoints.merge`.
    """
    target = Path(target)
    if target.exists():
        raise ExportError(f"{target} exists: choose another folder, or delete it")
    with staging.beside(target) as work:
        folder = merged(source, work / "model", recipe)
        dtype = stored_dtype(folder)
        wanted = checks.logits(checks.plain(source.folder))
        error = checks.compare(checks.logits(checks.plain(folder)), wanted, dtype, target)
        about = record(source, recipe) | {"verified": {"logits": error}}
        config = files.read_json(folder / "config.json") | {"dfrot_export": about}
        files.write_json(folder / "config.json", config)
        checks.recorded(folder, about, target)
        os.replace(folder, target)
    return about


def merged(source: Source, folder: Path, recipe: Recipe) -> Path:
    """`source` with `recipe` merged, in `folder`; without a rotation a copy of it, gains where they were."""
    if recipe.parts:
        return checkpoints.merge(source.folder, folder, recipe.rotations)
    folder.mkdir()
    names = checkpoints.shards(source.folder)
    for file in source.folder.iterdir():
        small = file.suffix in (".json", ".model", ".txt", ".jinja")
        if file.name in names or (file.is_file() and small):
            shutil.copyfile(file, folder / file.name)
    return folder


def stored_dtype(folder: Path) -> str:
    """The coarsest dtype of the checkpoint's tensors, as torch names it."""
    known = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    found = {dtype for dtype, _ in checkpoints.shapes(folder).values()}
    if other := found - set(known):
        raise ExportError(
            f"{folder} holds {', '.join(sorted(other))}: only floating point is exported"
        )
    return max((known[d] for d in found), key=checks.TOLERANCE.__getitem__)

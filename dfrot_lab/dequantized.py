"""Dequantized: a GGUF file as a Hugging Face folder, made once beside the assets."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from dfrot_lab import assets, files
from dfrot_lab.hub import quiet_transformers

__all__ = ["folder_of"]

_FORM = 2  # of the folders; those of form 1 forgot what a GGUF says was merged


def folder_of(gguf: Path) -> Path:
    """A Hugging Face folder of the dequantized `gguf`, made once beside the assets.

    Parsing GGUF takes half a minute each time, and transformers calls such a model "quantized" and
    will not save it: the weights are copied into a fresh model of the same configuration. What an export
    of ours merged (`dfrot.merged`, `dfrot.record`) goes to config.json, or it would be rotated again.
    """
    transformers = quiet_transformers()

    stat = gguf.stat()
    name = f"{gguf.stem}-{stat.st_size}-{stat.st_mtime_ns}-form{_FORM}"
    folder = assets.cache_dir() / "dequantized" / name
    if folder.is_dir():  # also in a cache that is another user's
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        print(f"dequantizing {gguf.name} once, about a minute", flush=True)
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        level = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()
        logging.getLogger("gguf").setLevel(logging.ERROR)
        try:
            with _parsed_once():
                loaded = transformers.AutoModelForCausalLM.from_pretrained(
                    **where, dtype=torch.float32
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
                marks = _marks(gguf)
        finally:
            transformers.utils.logging.set_verbosity(level)
        config = transformers.AutoConfig.for_model(
            **{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        )
        for key, value in marks.items():
            setattr(config, key, value)
        fresh = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fresh.load_state_dict(loaded.state_dict())
        for left in folder.parent.glob(f".partial-{folder.name}-*"):  # of a killed run
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".partial-{folder.name}-", dir=folder.parent))
        try:
            fresh.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            files.readable(partial)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _marks(path: Path) -> dict[str, Any]:
    """dfrot_merged and dfrot_export for config.json, from the GGUF fields that `exports.gguf` writes."""
    from gguf import GGUFReader

    reader, marks = GGUFReader(str(path)), {}
    merged, record = reader.get_field("dfrot.merged"), reader.get_field("dfrot.record")
    if merged is not None and len(merged.data):
        marks["dfrot_merged"] = merged.contents()
    if record is not None:
        marks["dfrot_export"] = json.loads(record.contents())
    return marks


@contextmanager
def _parsed_once() -> Iterator[None]:
    """One reader for one GGUF: transformers parses it anew for configuration, weights and tokenizer."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = lru_cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader

"""Model folder: a Hugging Face checkpoint on disk, looked over before anything is loaded from it.

transformers makes an empty tokenizer of a folder that has none, and then every text has no tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["ModelFolderError", "check", "find"]

# any one set of these is a tokenizer
_TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("tekken.json",),
)
_OF_BYTES = {"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"}  # need no vocabulary


class ModelFolderError(ValueError):
    """A folder that lacks a part of a model; one line: which folder, what is missing, what to do."""


def check(model: str | Path | None) -> None:
    """ModelFolderError if `model` is a folder without a tokenizer; other kinds of model are let by."""
    if model in (None, "demo") or not (folder := Path(model)).is_dir():
        return
    found = any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS)
    if found or _class(folder) in _OF_BYTES:
        return
    wanted = ", ".join(" with ".join(names) for names in _TOKENIZERS)
    raise ModelFolderError(
        f"model folder {folder} has no tokenizer (one of {wanted}): copy it from the model that the "
        "weights come from, or save it there with tokenizer.save_pretrained"
    )


def find(model: str | Path) -> Path:
    """The checkpoint folder behind `model`: the folder itself; of 'demo' or a .gguf file, the dequantized
    one, made now unless it is there. Raises ModelFolderError for what is no folder.
    """
    if str(model) == "demo" or Path(model).suffix == ".gguf":
        from dfrot_lab import models

        return Path(models.load_config(str(model)).name_or_path)
    if not Path(model).is_dir():
        raise ModelFolderError(
            f"{model} is no folder: use 'demo', a .gguf file, or a folder with a safetensors checkpoint "
            "(of a model on the hub: `hf download OWNER/NAME --local-dir FOLDER`)"
        )
    return Path(model)


def _class(folder: Path) -> str | None:
    """The tokenizer's class by tokenizer_config.json, None where nothing says it."""
    try:
        return json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return None

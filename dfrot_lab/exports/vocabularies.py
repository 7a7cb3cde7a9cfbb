"""Vocabulary: a tokenizer in the words of GGUF, from the GGUF a model came from or its tokenizer.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from dfrot_lab.exports.sources import ExportError, Source

__all__ = ["PRE", "add", "pre_tokenizer"]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
# how a text is cut before merges are applied → llama.cpp's name for it
PRE = {
    _CONTRACTIONS + "\\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + "\\p{N}" + _REST: "qwen2",
    "digits, bytes": "smollm",
    "bytes": "gpt-2",
}
_ELSEWHERE = "`dfrot-lab export hf`, then llama.cpp's convert_hf_to_gguf.py; or --no-vocabulary for ids alone"


def add(
    writer: Any, source: Source, words: int, *, pre: str | None = None, wanted: bool = True
) -> None:
    """Add the tokenizer of `source` to a GGUFWriter, with as many tokens as the model has `words`.

    From the GGUF it came from its fields are copied; else byte-level BPE is read from tokenizer.json.
    pre: llama.cpp's name of the pre-tokenizer, where it is not one of `PRE`. wanted: False writes
    `no_vocab`, for token ids alone. Raises ExportError for other tokenizers.
    """
    file = source.folder / "tokenizer.json"
    if not wanted:
        writer.add_tokenizer_model("no_vocab")
    elif source.gguf is not None:
        _copy(writer, source.gguf)
    elif file.is_file():
        _byte_pairs(writer, source.folder, words, pre)
    else:
        raise ExportError(f"{source.model} has no tokenizer.json: {_ELSEWHERE}")


def _copy(writer: Any, path: Path) -> None:
    from gguf import GGUFReader

    for name, field in GGUFReader(path).fields.items():
        if name.startswith("tokenizer."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)


def _byte_pairs(writer: Any, folder: Path, words: int, pre: str | None) -> None:
    import gguf

    about = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = about["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece" if model.get("byte_fallback") else model.get("type")
        raise ExportError(f"a {kind} tokenizer is not written here: {_ELSEWHERE}")
    tokens = {i: (text, gguf.TokenType.NORMAL) for text, i in model["vocab"].items()}
    for extra in about.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if extra["special"] else gguf.TokenType.USER_DEFINED
        tokens[extra["id"]] = extra["content"], kind
    if max(tokens) >= words:
        raise ExportError(f"token {max(tokens)} lies beyond the {words} rows of the embedding")
    unused = gguf.TokenType.UNUSED
    table = [tokens.get(i, (f"[PAD{i}]", unused)) for i in range(words)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or pre_tokenizer(about.get("pre_tokenizer")))
    writer.add_token_list([text for text, _ in table])
    writer.add_token_types([kind for _, kind in table])
    logging.getLogger("gguf").setLevel(logging.ERROR)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=words).add_to_gguf(writer, quiet=True)


def pre_tokenizer(about: dict[str, Any] | None) -> str:
    """llama.cpp's name of the pre-tokenizer that tokenizer.json describes as `about`; ExportError if none."""
    parts = (about or {}).get("pretokenizers", [about or {}])
    said = []
    for part in parts:
        match part.get("type"):
            case "Split":
                said.append(part["pattern"].get("Regex", "?"))
            case "Digits" if part.get("individual_digits"):
                said.append("digits")
            case "ByteLevel":
                said += ["bytes"] if part.get("use_regex", True) else []
            case other:
                said.append(str(other))
    found = PRE.get(", ".join(said))
    if found is None:
        raise ExportError(
            f"llama.cpp's name of the pre-tokenizer {', '.join(said)[:60]!r} is not known here: give --pre, "
            f"or {_ELSEWHERE}"
        )
    return found

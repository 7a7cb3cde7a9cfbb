"""GGUF: the rotated model in one file for llama.cpp, in F32 or F16; llama.cpp quantizes it from there.

llama.cpp rotates neighbouring channels where transformers rotates halves of a head, so rows of q and k
are reordered for the LLaMA family, as its own converter does.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dfrot_lab import checkpoints, staging
from dfrot_lab.exports import checks, huggingface, vocabularies
from dfrot_lab.exports.sources import ExportError, Recipe, Source, record

__all__ = ["DTYPES", "reorder", "write"]

DTYPES = {"F32": np.float32, "F16": np.float16}
_FAMILIES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}


def write(
    source: Source,
    target: str | Path,
    recipe: Recipe,
    *,
    dtype: str = "F32",
    pre: str | None = None,
    vocabulary: bool = True,
) -> dict[str, Any]:
    """Write `source` with `recipe` merged to the GGUF file `target`; returns its record.

    dtype: of matrices; gains and biases are always F32. pre, vocabulary: see `vocabularies.add`. The
    record stands under `dfrot.record`, what was merged under `dfrot.merged`. Before the file takes its
    place transformers' own GGUF reader loads it, and logits are compared, and the ids that its tokenizer
    gives for a few texts (not with `pre`: only llama.cpp knows what that name means); both are told as
    `verified` and by `dfrot.verified.…`. Raises ExportError for an architecture, rotary scaling or
    vocabulary that cannot be written so, and for a file that is wrong.
    """
    target = Path(target)
    if target.exists():
        raise ExportError(f"{target} exists: choose another file, or delete it")
    if dtype not in DTYPES:
        raise ExportError(f"dtype = {dtype!r}: use one of {', '.join(DTYPES)}")
    shape = _Shape(source)
    with staging.beside(target) as work:
        folder = source.folder
        if recipe.parts:
            folder = checkpoints.merge(source.folder, work / "model", recipe.rotations)
        about = record(source, recipe)
        (work / "gguf").mkdir()  # alone in there, so that its reader finds nothing else
        partial = work / "gguf" / "model.gguf"
        _write(partial, folder, shape, dtype, about, source, pre, vocabulary)
        coarse = "float16" if dtype == "F16" else huggingface.stored_dtype(folder)
        wanted = checks.logits(checks.plain(source.folder))
        error = checks.compare(_read(partial, shape, folder), wanted, coarse, target)
        texts = _same_tokens(partial, source, target) if vocabulary and pre is None else 0
        about |= {"verified": {"logits": error, "texts": texts}}
        _tell(partial, about["verified"])
        os.replace(partial, target)
    return about


class _Shape:
    """The configuration of a checkpoint in the words of GGUF; ExportError for what it has no word for."""

    def __init__(self, source: Source) -> None:
        from transformers import AutoConfig

        self.config = c = AutoConfig.from_pretrained(source.folder)
        if c.model_type not in _FAMILIES:
            raise ExportError(
                f"architecture {c.model_type!r} is not written as GGUF here: `dfrot-lab export hf`, then "
                "llama.cpp's convert_hf_to_gguf.py"
            )
        for name in ("attention_bias", "mlp_bias"):
            if getattr(c, name, False) and c.model_type in ("llama", "mistral", "qwen3"):
                raise ExportError(f"{name} = True: GGUF readers expect none in {c.model_type!r}")
        rope = c.rope_parameters
        self.rope = rope.get("rope_type", "default")
        if self.rope not in ("default", "llama3"):
            raise ExportError(
                f"rotary embeddings of type {self.rope!r} are not written here: `dfrot-lab export hf`, "
                "then llama.cpp's convert_hf_to_gguf.py"
            )
        self.theta = rope["rope_theta"]
        self.family = _FAMILIES[c.model_type]
        self.head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads

    def add(self, writer: Any) -> None:
        c = self.config
        # llama.cpp lets every token see all before it: within a sliding window that is the same
        window = (
            getattr(c, "sliding_window", None) if getattr(c, "use_sliding_window", True) else None
        )
        writer.add_context_length(min(c.max_position_embeddings, window or math.inf))
        writer.add_embedding_length(c.hidden_size)
        writer.add_block_count(c.num_hidden_layers)
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count(c.num_attention_heads)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(self.theta)
        writer.add_vocab_size(c.vocab_size)

    def frequencies(self) -> np.ndarray | None:
        """What each rotary frequency is divided by, [head_dim/2] (LLaMA 3.1); None for nothing."""
        if self.rope == "default":
            return None
        r = self.config.rope_parameters
        low, high = r["low_freq_factor"], r["high_freq_factor"]
        turns = r["original_max_position_embeddings"] / (2 * math.pi)
        turns = turns * self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        share = np.clip((turns - low) / (high - low), 0, 1)  # of full speed
        return (1 / ((1 - share) / r["factor"] + share)).astype(np.float32)


def reorder(w: Tensor, heads: int) -> Tensor:
    """Rows of q or k [heads·head_dim, …] (or a bias): channels i and i + head_dim/2 become neighbours."""
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _tensors(folder: Path, shape: _Shape, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF names and values, one at a time; the head of a tied model is left to its embedding."""
    import gguf

    c = shape.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[shape.family], c.num_hidden_layers)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    if (factors := shape.frequencies()) is not None:
        yield "rope_freqs.weight", factors
    for shard in checkpoints.shards(folder):
        with checkpoints.open_shard(folder / shard) as f:
            for name in f.keys():  # noqa: SIM118 (no mapping)
                # a buffer that old checkpoints hold, and no tensor of llama.cpp's
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                called = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if called is None:
                    raise ExportError(f"GGUF has no name for {name} in {c.model_type!r}")
                w = f.get_tensor(name).float()
                if shape.family == "LLAMA" and (part := name.split(".")[-2]) in heads:
                    w = reorder(w, heads[part])
                yield called, w.numpy().astype(DTYPES[dtype] if w.ndim > 1 else np.float32)


def _write(path, folder, shape, dtype, about, source, pre, vocabulary) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[shape.family]])
    try:
        writer.add_name(Path(source.model).name)
        kind = {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16}[dtype]
        writer.add_file_type(kind)
        shape.add(writer)
        if about["merged"]:
            writer.add_array("dfrot.merged", about["merged"])
        writer.add_string("dfrot.record", json.dumps(about, sort_keys=True))
        writer.add_float64("dfrot.verified.logits", math.nan)  # until `_tell`
        writer.add_uint32("dfrot.verified.texts", 0)
        vocabularies.add(writer, source, shape.config.vocab_size, pre=pre, wanted=vocabulary)
        for name, w in _tensors(folder, shape, dtype):  # twice: sizes stand before values
            writer.add_tensor_info(name, w.shape, w.dtype, w.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, w in _tensors(folder, shape, dtype):
            writer.write_tensor_data(np.ascontiguousarray(w))
    finally:
        writer.close()


def _read(path: Path, shape: _Shape, folder: Path) -> Tensor:
    """Logits of the written file through transformers' GGUF reader, which owes nothing to this module."""
    from transformers import AutoConfig

    # it reads neither rope_freqs nor the size of Qwen3's heads: there alone, ours is given
    known = shape.rope == "default" and shape.family != "QWEN3"
    given = {} if known else {"config": AutoConfig.from_pretrained(folder)}
    model = checks.plain(path.parent, gguf_file=path.name, **given)
    for name in ("rms_norm_eps", "num_key_value_heads", "hidden_size", "num_hidden_layers"):
        ours, theirs = getattr(shape.config, name), getattr(model.config, name)
        if abs(ours - theirs) > 1e-6 * ours:
            raise ExportError(f"{name} was written as {theirs} and is {ours}: please report this")
    return checks.logits(model)


def _same_tokens(path: Path, source: Source, target: Path) -> int:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return checks.same_tokens(AutoTokenizer.from_pretrained(source.folder), theirs, target)


def _tell(path: Path, verified: dict[str, Any]) -> None:
    """Put what was found into the places kept for it in the written file."""
    from gguf import GGUFReader

    reader = GGUFReader(path, "r+")
    for name, value in verified.items():
        field = reader.get_field(f"dfrot.verified.{name}")
        field.parts[field.data[0]][0] = value
    reader.data.flush()

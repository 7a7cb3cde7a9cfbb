"""Model: load a causal language model and its tokenizer, from the assets, the hub, a folder or a GGUF.

Its parts by role, and the folding of its gains, are `dfrot_lab.architectures`; their names are here too.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn

from dfrot_lab import assets
from dfrot_lab.architectures import (
    ARCHITECTURES,
    Architecture,
    Layer,
    ModelError,
    architecture,
    fold_gains,
    head,
    is_folded,
    layers,
    norm_sites,
    preserve_norm_dtype,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Layer",
    "ModelError",
    "architecture",
    "check_plain",
    "commit",
    "fold_gains",
    "head",
    "identity",
    "is_folded",
    "layers",
    "load",
    "load_config",
    "load_tokenizer",
    "norm_sites",
    "of_shape",
    "preserve_norm_dtype",
    "snapshot",
    "tiny",
]

DTYPES = ("float32", "float16", "bfloat16", "float64")
QUANTIZED = "dfrot_quantized"  # the key in config.json of a folder of `dfrot-lab quantize`
_FORM = 2  # of dequantized folders; those of form 1 forgot what a GGUF says was merged


def load(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    fold: bool = True,
) -> nn.Module:
    """A transformers causal language model in eval mode, RMSNorm gains folded unless `fold=False`.

    model_id: 'demo' (SmolLM2-135M-Instruct from the packaged assets), 'tiny:llama' (also mistral,
    qwen2, qwen3; random weights with a planted massive token), a Hugging Face id, a folder, or a
    .gguf file. Raises ModelError for an unknown id, dtype or device, an unreachable hub, an
    unsupported family, and as `check_plain`.
    """
    _check(dtype, device)
    if model_id.startswith("tiny:"):
        model = tiny(model_id.removeprefix("tiny:"))
    else:
        model = _from_pretrained(model_id, revision)
    architecture(model)
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    return fold_gains(model) if fold else model


def identity(model_id: str) -> str:
    """What `model_id` names, for the keys of kept results: changes when the files behind it do.

    A packaged asset's SHA-256; names, sizes and times of a local folder or file; id@commit of a model on
    the hub; else the id itself.
    """
    if model_id == "demo":
        return assets.ASSETS["smollm2"].sha256
    path = Path(model_id)
    if not path.exists():
        found = commit(model_id)
        return f"{model_id}@{found}" if found else model_id
    parts = sorted(path.iterdir()) if path.is_dir() else [path]
    return str([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in parts if p.is_file()])


def commit(model_id: str, revision: str | None = None) -> str | None:
    """The commit that `revision` of `model_id` on the hub is; None for other models. Errors as `load`."""
    return snapshot(model_id, revision).name if _on_hub(model_id) else None


@lru_cache  # one process, one commit; and the hub is asked once
def snapshot(model_id: str, revision: str | None = None) -> Path:
    """The folder of the hub's local cache for a commit of `model_id`, config.json there; errors as `load`.

    With the hub out of reach: the commit that was fetched last.
    """
    transformers = _transformers()
    with _plain_errors(model_id):
        file = transformers.utils.cached_file(model_id, "config.json", revision=revision)
        return Path(file).parent


def _on_hub(model_id: str) -> bool:
    """Whether `model_id` has the form of an id on the hub, owner/name, and is no local path."""
    path = Path(model_id)
    local = path.suffix == ".gguf" or path.is_dir() or path.is_absolute()
    return not local and not model_id.startswith((".", "tiny:")) and model_id.count("/") == 1


def check_plain(config: dict[str, Any], model_id: str) -> None:
    """ModelError if weights with this `config` (of config.json) are no model's by themselves.

    Such are a folder of `dfrot-lab quantize`, and a checkpoint with R4 or the Hadamard across heads merged:
    what must be done at run time besides is in no file.
    """
    if config.get(QUANTIZED) is not None:
        raise ModelError(
            f"model {model_id!r} was written by `dfrot-lab quantize` and is quantized already: give the "
            "model it was made of, or measure it with `dfrot-lab eval --quantized`"
        )
    merged = config.get("dfrot_merged") or []
    for name, where in (("R4", "down_proj"), ("heads", "o_proj")):
        if name in merged:
            raise ModelError(
                f"model {model_id!r} was saved with {name} merged, and no file holds the Hadamard "
                f"that must stand before its {where}: load the original and build it again"
            )


def _transformers():
    """transformers, without its own progress bars and their complaint that notebooks lack widgets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tqdm.auto  # noqa: F401  (complains once, when first imported)
        import transformers
    transformers.utils.logging.disable_progress_bar()
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # a hub out of reach is told once, not at each retry
    return transformers


def load_tokenizer(model_id: str, *, revision: str | None = None):
    """The tokenizer that belongs to `model_id` (bytes for 'tiny:…'); same errors as `load`."""
    transformers = _transformers()

    if model_id.startswith("tiny:"):
        return transformers.ByT5Tokenizer()
    with _plain_errors(model_id):
        source, kwargs = _source(model_id, revision)
        return transformers.AutoTokenizer.from_pretrained(source, **kwargs)


def of_shape(config, layers: int, *, dtype: str, device: str) -> nn.Module:
    """A model of `config`'s shape with `layers` layers of random weights, gains folded; for timing."""
    _check(dtype, device)
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:layers]
    model = _transformers().AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return fold_gains(model.to(device).eval().requires_grad_(False))


def _check(dtype: str, device: str) -> None:
    if dtype not in DTYPES:
        raise ModelError(f"dtype = {dtype!r}: use one of {', '.join(DTYPES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device = {device!r}: this torch sees no CUDA device, use 'cpu'")


def load_config(model_id: str, *, revision: str | None = None):
    """The configuration of `model_id`, without its weights; same errors as `load`."""
    transformers = _transformers()
    if model_id.startswith("tiny:"):
        return tiny(model_id.removeprefix("tiny:")).config
    with _plain_errors(model_id):
        source, kwargs = _source(model_id, revision)
        return transformers.AutoConfig.from_pretrained(source, **kwargs)


def _source(model_id: str, revision: str | None) -> tuple[str, dict]:
    """What transformers is to be given for `model_id`."""
    if model_id == "demo":
        return str(_dequantized_folder(assets.path("smollm2"))), {}
    path = Path(model_id)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model file {model_id} does not exist: check the path")
        return str(_dequantized_folder(path)), {}
    if path.is_dir():
        return str(path), {}
    if not _on_hub(model_id):
        raise ModelError(
            f"model {model_id!r} is neither 'demo', 'tiny:…', a folder, a .gguf file nor a "
            "Hugging Face id of the form owner/name"
        )
    return model_id, {"revision": revision} if revision else {}


class _plain_errors:
    """Turn the hub's many exceptions into one ModelError line; never shows a token."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        failures = (OSError, ValueError, SafetensorError)
        if not isinstance(error, failures) or isinstance(error, ModelError):
            return
        text = re.sub(r"hf_\w+", "hf_…", " ".join(str(error).split()))
        if Path(self.model_id).exists() or self.model_id == "demo":
            why = f"{text[:300]}; check that its files are whole"
        elif re.search(r"gated repo|\b40[13] client", text.lower()):
            why = "it is gated: accept its licence on the hub and log in with `hf auth login`"
        elif "connect" in text.lower() or "offline" in text.lower():
            why = "the hub cannot be reached and it is not in the local cache; `demo` works offline"
        else:
            why = text[:300]
        raise ModelError(f"model {self.model_id!r} could not be loaded: {why}") from error


def _from_pretrained(model_id: str, revision: str | None) -> nn.Module:
    transformers = _transformers()

    with _plain_errors(model_id):
        source, kwargs = _source(model_id, revision)
        config = transformers.AutoConfig.from_pretrained(source, **kwargs)
        if config.model_type not in ARCHITECTURES:  # refuse before gigabytes are read
            architecture(type("Unloaded", (), {"config": config}))
        check_plain(vars(config), model_id)
        return transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32 if model_id == "demo" else "auto", **kwargs
        )


def _dequantized_folder(gguf: Path) -> Path:
    """A Hugging Face folder of the dequantized `gguf`, made once beside the assets.

    Parsing GGUF takes half a minute each time, and transformers calls such a model "quantized" and
    will not save it: the weights are copied into a fresh model of the same configuration. What an export
    of ours merged (`dfrot.merged`, `dfrot.record`) goes to config.json, or it would be rotated again.
    """
    transformers = _transformers()

    stat = gguf.stat()
    name = f"{gguf.stem}-{stat.st_size}-{stat.st_mtime_ns}-form{_FORM}"
    folder = assets.cache_dir() / "dequantized" / name
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


def tiny(
    kind: str = "llama",
    *,
    seed: int = 0,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    layers: int = 2,
    intermediate: int = 96,
    tied: bool = True,
    planted: float = 300.0,
    **overrides,
) -> nn.Module:
    """A random model of family `kind` over bytes, for tests and the smoke profile (vocabulary 384).

    Every gain and bias is random, so that folding is really tested. Four channels of the stream are
    loud, as in real models, which keeps ordinary tokens above the Gaussian floor. planted: size, in
    units of the others, of one channel in the newline's embedding: a massive token to be found.
    """
    transformers = _transformers()

    if kind not in ARCHITECTURES:
        raise ModelError(f"tiny model {kind!r} is unknown: use one of {', '.join(ARCHITECTURES)}")
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=384,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        **({"pad_token_id": None, "sliding_window": None} | overrides),
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator, a = torch.Generator().manual_seed(seed), ARCHITECTURES[kind]
    loud = torch.ones(hidden)
    loud[1 :: hidden // 4] = 8
    table = model.get_submodule(a.embedding).weight
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if "norm" in name else noise / p.shape[-1] ** 0.5)
            if p is table:
                p.mul_(loud)
            elif name.endswith((f"{a.attention_output}.weight", f"{a.mlp_output}.weight")):
                p.mul_(0.1 * loud[:, None])  # quiet enough to leave the embedding audible
        newline = transformers.ByT5Tokenizer().convert_tokens_to_ids("\n")
        table[newline, hidden // 3] = planted / hidden**0.5
    return model.eval()

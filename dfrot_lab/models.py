"""Model: load a causal language model and fold its RMSNorm gains, so that it can be rotated.

RMSNorm(x; g) = g ⊙ x/rms(x). With the gain g moved into the linears that follow (W ← W·diag(g)) the
norm commutes with any orthogonal R: rms(xR) = rms(x), hence norm(xR) = norm(x)R (QuaRot, Section 3).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn

from dfrot_lab import assets

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Layer",
    "ModelError",
    "architecture",
    "fold_gains",
    "head",
    "identity",
    "is_folded",
    "layers",
    "load",
    "load_tokenizer",
    "norm_sites",
    "preserve_norm_dtype",
    "tiny",
]


class ModelError(ValueError):
    """A model that cannot be loaded or rotated; one line: what, which value, what to do."""


@dataclass(frozen=True)
class Architecture:
    """Module names of one decoder family; all families here share the residual-stream layout."""

    model_type: str
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_inputs: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_output: str = "self_attn.o_proj"
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output: str = "mlp.down_proj"


# One table: Qwen2 adds biases to q, k, v and Qwen3 normalizes q and k per head, but both sit outside
# the residual stream, so the same names and the same algebra serve all four.
ARCHITECTURES = {t: Architecture(t) for t in ("llama", "mistral", "qwen2", "qwen3")}

DTYPES = ("float32", "float16", "bfloat16", "float64")

_REFUSED = {
    "gemma": "its RMSNorm multiplies by (1 + gain)",
    "gemma2": "its post-norms act on what a sublayer adds, where a gain does not commute with R1",
    "gemma3": "its post-norms act on what a sublayer adds, where a gain does not commute with R1",
    "gemma3_text": "its post-norms act on what a sublayer adds, where a gain does not commute with R1",
    "olmo2": "its post-norms act on what a sublayer adds, where a gain does not commute with R1",
    "gpt2": "its LayerNorm subtracts the mean, which an orthogonal R does not preserve",
    "gpt_neox": "its LayerNorm subtracts the mean, which an orthogonal R does not preserve",
    "opt": "its LayerNorm subtracts the mean, which an orthogonal R does not preserve",
    "phi": "its LayerNorm subtracts the mean, which an orthogonal R does not preserve",
    "phi3": "its q, k, v and gate, up weights are fused and not in our table of module names",
}


@dataclass(frozen=True)
class Layer:
    """One decoder layer, by role: the two norms and the linears that read and write the stream."""

    index: int
    module: nn.Module
    attention_norm: nn.Module
    mlp_norm: nn.Module
    attention_inputs: dict[str, nn.Linear]
    attention_output: nn.Linear
    mlp_inputs: dict[str, nn.Linear]
    mlp_output: nn.Linear

    @property
    def groups(self) -> list[dict[str, nn.Linear]]:
        """The linears by name, those that share an input together, in order of execution."""
        return [
            self.attention_inputs,
            {"self_attn.o_proj": self.attention_output},
            self.mlp_inputs,
            {"mlp.down_proj": self.mlp_output},
        ]


def architecture(model: nn.Module) -> Architecture:
    """The table row of `model`; ModelError with name and reason where there is none."""
    kind = model.config.model_type
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    reason = _REFUSED.get(kind, "it is not in our table of module names")
    raise ModelError(
        f"architecture {kind!r} cannot be rotated: {reason}. Supported: {', '.join(ARCHITECTURES)}"
    )


def layers(model: nn.Module) -> list[Layer]:
    """The decoder layers of `model`, in order, with their parts by role."""
    a = architecture(model)
    return [
        Layer(
            index=i,
            module=m,
            attention_norm=m.get_submodule(a.attention_norm),
            mlp_norm=m.get_submodule(a.mlp_norm),
            attention_inputs={n: m.get_submodule(n) for n in a.attention_inputs},
            attention_output=m.get_submodule(a.attention_output),
            mlp_inputs={n: m.get_submodule(n) for n in a.mlp_inputs},
            mlp_output=m.get_submodule(a.mlp_output),
        )
        for i, m in enumerate(model.get_submodule(a.layers))
    ]


def norm_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The in-layer norms by site name, in order of execution: 'layers.0.attention', 'layers.0.mlp', …"""
    return {
        f"layers.{layer.index}.{role}": norm
        for layer in layers(model)
        for role, norm in (("attention", layer.attention_norm), ("mlp", layer.mlp_norm))
    }


def head(model: nn.Module) -> nn.Linear:
    """The language-model head."""
    return model.get_submodule(architecture(model).head)


def is_folded(model: nn.Module) -> bool:
    """Whether the RMSNorm gains of `model` have been folded."""
    return "gains" in (getattr(model.config, "dfrot_merged", None) or [])


@torch.no_grad()
def fold_gains(model: nn.Module) -> nn.Module:
    """Fold every in-layer and the final RMSNorm gain into the linears that follow, in place.

    W[out, in] ← W·diag(g) in fp64, g ← 1. The embedding and the head are untied first: the head
    takes the final norm's gain, the embedding does not. Folding twice is a no-op. Returns `model`.
    """
    a = architecture(model)
    if is_folded(model):
        return model
    lm_head = head(model)
    if lm_head.weight is model.get_submodule(a.embedding).weight:
        w = lm_head.weight
        lm_head.weight = nn.Parameter(w.detach().clone(), requires_grad=w.requires_grad)
    model.config.tie_word_embeddings = False
    pairs = [(model.get_submodule(a.final_norm), [lm_head])]
    for layer in layers(model):
        pairs.append((layer.attention_norm, list(layer.attention_inputs.values())))
        pairs.append((layer.mlp_norm, list(layer.mlp_inputs.values())))
    for norm, linears in pairs:
        gain = norm.weight.double()
        for linear in linears:
            linear.weight.copy_((linear.weight.double() * gain).to(linear.weight.dtype))
        norm.weight.fill_(1.0)
    model.config.dfrot_merged = ["gains"]
    return model


class _DtypePreservingRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) in the dtype of x; the stock module computes in fp32 (8e-7 error)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def preserve_norm_dtype(model: nn.Module) -> nn.Module:
    """Swap every RMSNorm of `model`, in place, for one that keeps fp64; for exact comparisons."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            parent, _, child = name.rpartition(".")
            norm = _DtypePreservingRMSNorm(module.weight.detach(), module.variance_epsilon)
            setattr(model.get_submodule(parent), child, norm)
    return model


# --- loading ---------------------------------------------------------------------------------------


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
    .gguf file. Raises ModelError for an unknown id, dtype or device, an unreachable hub or an
    unsupported family.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype = {dtype!r}: use one of {', '.join(DTYPES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device = {device!r}: this torch sees no CUDA device, use 'cpu'")
    if model_id.startswith("tiny:"):
        model = tiny(model_id.removeprefix("tiny:"))
    else:
        model = _from_pretrained(model_id, revision)
    architecture(model)
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    return fold_gains(model) if fold else model


def identity(model_id: str) -> str:
    """What `model_id` names, for the keys of kept results: changes when the files behind it do.

    A packaged asset's SHA-256; names, sizes and times of a local folder or file; else the id itself.
    """
    if model_id == "demo":
        return assets.ASSETS["smollm2"].sha256
    path = Path(model_id)
    if not path.exists():
        return model_id
    parts = sorted(path.iterdir()) if path.is_dir() else [path]
    return str([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in parts if p.is_file()])


def _transformers():
    """transformers, without its own progress bars and their complaint that notebooks lack widgets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tqdm.auto  # noqa: F401  (complains once, when first imported)
        import transformers
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_tokenizer(model_id: str, *, revision: str | None = None):
    """The tokenizer that belongs to `model_id` (bytes for 'tiny:…'); same errors as `load`."""
    transformers = _transformers()

    if model_id.startswith("tiny:"):
        return transformers.ByT5Tokenizer()
    with _plain_errors(model_id):
        source, kwargs = _source(model_id, revision)
        return transformers.AutoTokenizer.from_pretrained(source, **kwargs)


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
    if path.is_absolute() or model_id.startswith(".") or model_id.count("/") != 1:
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
        merged = getattr(config, "dfrot_merged", None) or []
        for name, where in (("R4", "down_proj"), ("heads", "o_proj")):
            if name in merged:
                raise ModelError(
                    f"model {model_id!r} was saved with {name} merged, and no file holds the Hadamard "
                    f"that must stand before its {where}: load the original and build it again"
                )
        return transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32 if model_id == "demo" else "auto", **kwargs
        )


def _dequantized_folder(gguf: Path) -> Path:
    """A Hugging Face folder of the dequantized `gguf`, made once beside the assets.

    Parsing GGUF takes half a minute each time, and transformers calls such a model "quantized" and
    will not save it: the weights are copied into a fresh model of the same configuration.
    """
    transformers = _transformers()

    stat = gguf.stat()
    folder = assets.cache_dir() / "dequantized" / f"{gguf.stem}-{stat.st_size}-{stat.st_mtime_ns}"
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
        finally:
            transformers.utils.logging.set_verbosity(level)
        config = transformers.AutoConfig.for_model(
            **{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        )
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

"""Check: whether a written export computes what it was made from, on a few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfrot_lab.exports.sources import ExportError

__all__ = ["TEXTS", "TOLERANCE", "compare", "logits", "plain", "recorded", "same_tokens", "tokens"]

# largest difference of logits over the largest logit: what rounding the turned weights to their dtype does
TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
# cut alike by every pre-tokenizer that is written here: no digits, line breaks or apostrophes
TEXTS = (
    "The capital of France is Paris, and the river there is the Seine.",
    "  two spaces at first,   three inside; then: punctuation ... (and more) !",
    "Grüße aus Köln — una canción, un café naïf",
    "日本語の文章 и русский текст",
)


def tokens(words: int, shape: tuple[int, int] = (2, 24), seed: int = 0) -> Tensor:
    """Random token ids [windows, seqlen] below `words`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, words, shape, generator=generator)


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    """Logits [windows, seqlen, vocabulary] of a transformers `model` on `tokens`, in fp32."""
    return model(tokens(model.config.vocab_size), use_cache=False).logits.float()


def plain(folder: Path, **options) -> nn.Module:
    """The causal language model in `folder` as transformers alone loads it, in fp32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, **{"dtype": torch.float32} | options
    )
    return model.eval().requires_grad_(False)


def recorded(folder: Path, about: dict[str, Any], what: object) -> None:
    """ExportError unless config.json, which got the record `about` after the weights were checked, holds it
    for transformers, and still describes a causal language model.
    """
    import transformers

    found = transformers.AutoConfig.from_pretrained(folder)
    merged = getattr(found, "dfrot_merged", None) or []
    known = getattr(found, "dfrot_export", None) or {}
    if merged != about["merged"] or known.get("fingerprint") != about["fingerprint"]:
        raise ExportError(
            f"{what}: its config.json says {merged} merged where {about['merged']} are, or has lost "
            "dfrot_export; it was deleted, please report this"
        )


def same_tokens(ours: Any, theirs: Any, what: object) -> int:
    """How many of `TEXTS` two tokenizers were given; ExportError for one that they cut into other ids."""
    for text in TEXTS:
        wanted, found = (t(text, add_special_tokens=False)["input_ids"] for t in (ours, theirs))
        if found != wanted:
            raise ExportError(
                f"{what} cuts {text!r} into tokens {found[:8]}… where the model has {wanted[:8]}…; it was "
                "deleted, please report this"
            )
    return len(TEXTS)


def compare(found: Tensor, wanted: Tensor, dtype: str, what: object) -> float:
    """max|found − wanted| / max|wanted|; ExportError where that is more than rounding to `dtype`."""
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= TOLERANCE[dtype]:
        raise ExportError(
            f"{what} computes something else than the model it was made from: logits differ by {error:.3g} "
            f"of the largest where {TOLERANCE[dtype]:g} is rounding; it was deleted, please report this"
        )
    return error

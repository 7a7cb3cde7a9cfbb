"""Check: whether a written export computes what it was made from, on a few tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dfrot_lab.exports.sources import ExportError

__all__ = ["TOLERANCE", "compare", "logits", "plain", "tokens"]

# largest difference of logits over the largest logit: what rounding the turned weights to their dtype does
TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


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


def compare(found: Tensor, wanted: Tensor, dtype: str, what: object) -> float:
    """max|found − wanted| / max|wanted|; ExportError where that is more than rounding to `dtype`."""
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= TOLERANCE[dtype]:
        raise ExportError(
            f"{what} computes something else than the model it was made from: logits differ by {error:.3g} "
            f"of the largest where {TOLERANCE[dtype]:g} is rounding; it was deleted, please report this"
        )
    return error

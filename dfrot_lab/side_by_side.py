"""Side by side: what floating point and two 4-bit models write after the same prompt."""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from dfrot_lab.lab import Lab

__all__ = ["PromptError", "columns", "continuation", "texts", "visible"]

NAMES = ("FP", "RH", "DFRot(RH)")
GAP = "  "


class PromptError(ValueError):
    """A prompt that cannot be continued; one line: what, which value, what to do."""


def texts(
    lab: Lab,
    prompt: str,
    *,
    tokens: int = 60,
    bits: str = "4-4-16",
    method: str = "gptq-shared",
    seed: int = 0,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """{name, text, same} of FP, RH and DFRot(RH): greedy, so that two runs write the same.

    same: how many of the first tokens are those of FP. method, bits: as in `Lab.perplexity`; chat: the
    prompt is a user's message, in the tokenizer's template. Raises PromptError for an empty prompt or
    one too long, and for a tokenizer that has no template.
    """
    ids = _encoded(lab, prompt, tokens, chat)
    lab.spec(bits, "none", method)  # what is wrong with them is told first
    w, a, kv = bits.split("-")
    label = f"W{w}A{a}" + (f"KV{kv}" if int(kv) < 16 else "")
    out, first = [], []
    for name in NAMES:
        model = lab.lm if name == "FP" else lab.quantized(name, seed, bits=bits, method=method)
        written = continuation(model, ids, tokens)
        first = first or written
        alike = [a == b for a, b in zip(written, first, strict=False)]
        same = alike.index(False) if False in alike else len(alike)
        text = visible(lab.tokenizer.decode(written, skip_special_tokens=True), written)
        title = name if name == "FP" else f"{name.removesuffix('(RH)')} {label}"
        out.append({"name": title, "text": text, "same": same, "tokens": len(written)})
    return out


def _encoded(lab: Lab, prompt: str, tokens: int, chat: bool) -> torch.Tensor:
    if not prompt.strip():
        raise PromptError("the prompt is empty: give some text to go on from")
    if tokens < 1:
        raise PromptError(f"tokens = {tokens}: use 1 or more")
    tokenizer = lab.tokenizer
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise PromptError(f"model {lab.model!r} has no chat template: leave out --chat")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    longest = lab.lm.config.max_position_embeddings
    if len(ids) + tokens > longest:
        raise PromptError(
            f"{len(ids)} tokens of prompt and {tokens} more: the model takes {longest}"
        )
    return torch.tensor([ids])


def visible(text: str, tokens: list[int]) -> str:
    """`text` with what cannot be printed escaped as in Python; the ids of its `tokens` where it is blank."""
    if not text.strip():
        return f"blank; token ids {' '.join(map(str, tokens))}"
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text.strip())


@torch.inference_mode()
def continuation(model: nn.Module, ids: torch.Tensor, tokens: int) -> list[int]:
    """The greedy continuation of `ids` [1, n], at most `tokens` tokens, up to the end of text."""
    ids = ids.to(next(model.parameters()).device)
    ends = model.config.eos_token_id
    pad = ends[0] if isinstance(ends, list) else ends
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
        pad_token_id=pad if pad is not None else 0,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def columns(rows: list[dict[str, Any]], width: int) -> str:
    """The texts beside each other, wrapped to `width` characters in all; below each other if too narrow."""
    each = (width - len(GAP) * (len(rows) - 1)) // len(rows)
    if each < 20:
        return "\n\n".join(f"{r['name']}\n{textwrap.fill(r['text'], max(width, 20))}" for r in rows)
    cells = [
        [r["name"], "-" * each, *_wrapped(r["text"], each), "", _told(r, rows[0])] for r in rows
    ]
    lines = zip_longest(*(c[:-2] for c in cells), fillvalue="")
    body = [GAP.join(part.ljust(each) for part in line).rstrip() for line in lines]
    feet = zip_longest(*(textwrap.wrap(c[-1], each) for c in cells), fillvalue="")
    return "\n".join(
        [*body, "", *(GAP.join(part.ljust(each) for part in line).rstrip() for line in feet)]
    )


def _wrapped(text: str, width: int) -> list[str]:
    return [
        line for part in text.splitlines() or [""] for line in textwrap.wrap(part, width) or [""]
    ]


def _told(row: dict[str, Any], first: dict[str, Any]) -> str:
    if row is first:
        return f"{row['tokens']} tokens"
    return f"the first {row['same']} tokens as {first['name']}"

"""Text tasks: zero-shot items made of running prose, in the form that lm-eval reads.

`last_word`: the last word of a passage from what stands before it, as in LAMBADA: a word of the passage.
`continuation`: the sentence that follows, among sentences of the same length from elsewhere in the text.
Both come from the evaluation split of a corpus, which no calibration has seen, the same on every machine.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

__all__ = [
    "TASKS",
    "TaskError",
    "continuation_dataset",
    "continuations",
    "last_word_dataset",
    "last_words",
    "paragraphs",
]

PASSAGE = (40, 60)  # words of a last-word item
CONTEXT, SENTENCE = (8, 25), (8, 20)  # words of a context and of each choice
CHOICES = 3
NEAR, FAR = (
    5,
    200,
)  # sentences between the true continuation and the others: mostly the same article
ALIKE = 0.2  # the most by which the length of another choice differs
WRAPPED = 100  # characters: a block of shorter lines is one paragraph, else each line is one
SEED = 0

_END = re.compile(r"[.!?][\"”’')\]]*\s+(?=[\"“‘'(\[]?[A-Z0-9])")
_SHORTENED = {"mr", "mrs", "ms", "dr", "st", "vs", "jr", "sr", "no", "ca", "c", "cf", "etc", "gen"}
_SHORTENED |= {"col", "lt", "prof", "rev", "inc", "ltd", "co", "vol", "pp", "fl", "b", "d", "r"}
_PLAIN = re.compile(r"[A-Z][^{}|<>=\\_*`\[\]/]*[a-z\d)\"”’'][.!?]")


class TaskError(ValueError):
    """A task that cannot be made or run; one line: what, which value, what to do."""


def paragraphs(text: str) -> list[list[str]]:
    """The sentences of each paragraph of `text`, in order.

    Blank lines separate paragraphs, and so do line breaks unless lines are wrapped.
    """
    out = []
    for block in re.split(r"\n\s*\n", text):
        lines = [" ".join(line.split()) for line in block.splitlines() if line.strip()]
        wrapped = all(len(line) <= WRAPPED for line in lines)
        out += [_sentences(p) for p in ([" ".join(lines)] if wrapped else lines)]
    return out


def _sentences(paragraph: str) -> list[str]:
    """Cut at full stops that are followed by a capital or a digit, not after initials and the like."""
    out, start = [], 0
    for found in _END.finditer(paragraph):
        last = re.split(r"[\s(]", paragraph[start : found.start()])[-1]
        short = len(last) == 1 or "." in last or last.lower() in _SHORTENED
        if not (short and paragraph[found.start()] == "."):
            out.append(paragraph[start : found.end()].strip())
            start = found.end()
    return [s for s in [*out, paragraph[start:].strip()] if s]


def _plain(sentence: str, words: tuple[int, int] = (1, 10**6)) -> bool:
    """Whether it reads as a whole sentence of prose with so many words."""
    return (
        words[0] <= len(sentence.split()) <= words[1]
        and _PLAIN.fullmatch(sentence) is not None
        and sentence.count("(") == sentence.count(")")
        and sentence.count('"') % 2 == 0
    )


def last_words(text: str) -> list[dict[str, str]]:
    """[{context, target}]: passages of whole sentences, none twice, whose last word occurs before it.

    The word has four letters or more; its full stop is left out, as in LAMBADA.
    """
    return [item for sentences in paragraphs(text) for item in _passages(sentences)]


def _passages(sentences: list[str]) -> Iterator[dict[str, str]]:
    begin = 0  # of what is not used yet
    for end, last in enumerate(sentences):
        if not _plain(last):
            begin = end + 1
            continue
        first = end
        while (
            first > begin and sum(len(s.split()) for s in sentences[first : end + 1]) < PASSAGE[0]
        ):
            first -= 1
        context, _, target = " ".join(sentences[first : end + 1])[:-1].rpartition(" ")
        known = re.fullmatch(r"[A-Za-z]{4,}", target) and re.search(
            rf"\b{target}\b", context, re.IGNORECASE
        )
        if known and PASSAGE[0] <= len(context.split()) + 1 <= PASSAGE[1]:
            yield {"context": context, "target": target}
            begin = end + 1


def continuations(text: str) -> list[dict[str, Any]]:
    """[{context, choices, gold}]: a sentence, what follows it, and `CHOICES` − 1 from elsewhere.

    These are `NEAR` to `FAR` sentences away and as long, within `ALIKE`, in characters.
    """
    rng = random.Random(SEED)
    every = [(p, s) for p, sentences in enumerate(paragraphs(text)) for s in sentences]
    fit = [_plain(s, SENTENCE) for _, s in every]
    out, used = [], -1
    for i in range(1, len(every)):
        (p, context), (q, true) = every[i - 1 : i + 1]
        if p != q or i - 1 <= used or not fit[i] or not _plain(context, CONTEXT):
            continue
        around = [*range(i - FAR, i - NEAR + 1), *range(i + NEAR, i + FAR + 1)]
        others = {
            every[j][1]
            for j in around
            if 0 <= j < len(every)
            and fit[j]
            and abs(len(every[j][1]) - len(true)) <= ALIKE * len(true)
        } - {true, context}
        if len(others) < CHOICES - 1:
            continue
        choices = [true, *rng.sample(sorted(others), CHOICES - 1)]
        rng.shuffle(choices)
        out.append({"context": context, "choices": choices, "gold": choices.index(true)})
        used = i
    return out


TASKS = {"last_word": last_words, "continuation": continuations}


def chosen(task: str, corpus: str, items: int) -> list[dict[str, Any]]:
    """`items` items of a task from the evaluation split of `corpus`, spread over all of it.

    Raises TaskError where there are not so many, CorpusError as `corpora.text` does.
    """
    from dfrot_lab import corpora

    if items < 2:
        raise TaskError(f"items = {items}: an interval needs 2 or more")
    # a corpus may repeat itself: no context is used twice, and none that calibration has seen
    seen = " ".join(corpora.text(corpus, "calibration").split())
    found = {i["context"]: i for i in TASKS[task](corpora.text(corpus, "evaluation"))}
    every = [i for context, i in found.items() if context not in seen]
    if len(every) < items:
        raise TaskError(
            f"corpus {corpus!r} gives {len(every)} items of task {task!r}, {items} needed: "
            "ask for fewer (items), or use a longer corpus"
        )
    return [every[i] for i in sorted(random.Random(SEED).sample(range(len(every)), items))]


def last_word_dataset(corpus: str, items: int, **_: Any) -> dict[str, Any]:
    """{"test": dataset} for lm-eval, which passes its own metadata as well."""
    return _dataset("last_word", corpus, items)


def continuation_dataset(corpus: str, items: int, **_: Any) -> dict[str, Any]:
    """{"test": dataset} for lm-eval, which passes its own metadata as well."""
    return _dataset("continuation", corpus, items)


def _dataset(task: str, corpus: str, items: int) -> dict[str, Any]:
    import datasets

    return {"test": datasets.Dataset.from_list(chosen(task, corpus, items))}

"""The hub's tasks as lm-eval has them, on three rows each in the hub's own columns; values by hand."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import datasets
import pytest
import torch
from conftest import logits
from huggingface_hub import constants
from lm_eval import tasks
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from dfrot_lab import corpora, models, zero_shot
from dfrot_lab.zero_shot import TaskError

SUBJECTS = 57
MMLU = "The following are multiple choice questions (with answers) about {}.\n\n"


@dataclass
class Stock:
    """A task: where lm-eval takes it from, rows as they lie there, and what each row asks.

    asked: ([(context, target) of each choice], which is right), in the published prompt of the task.
    """

    metric: str
    path: str
    name: str | None
    splits: tuple[str, ...]  # the last one is evaluated
    rows: list[dict[str, Any]]
    asked: list[tuple[list[tuple[str, str]], int]]


def choices(context: str, *targets: str) -> list[tuple[str, str]]:
    return [(context, " " + t) for t in targets]


def arc(n: int, question: str, labels: str, texts: list[str], key: str) -> dict[str, Any]:
    what = {"text": texts, "label": list(labels)}
    return {"id": f"Row_{n}", "question": question, "choices": what, "answerKey": key}


ARC = [
    arc(1, "Which of these melts first?", "ABCD", ["ice", "iron in a fire", "stone", "glass"], "A"),
    arc(2, "What do roots take up?", "123", ["light", "water", "wind and rain together"], "3"),
    arc(3, "What is a whale?", "ABCDE", ["a fish", "a mammal", "a bird", "a plant", "-"], "B"),
]
ARC_ASKED = [
    (choices("Question: Which of these melts first?\nAnswer:", *ARC[0]["choices"]["text"]), 0),
    (choices("Question: What do roots take up?\nAnswer:", *ARC[1]["choices"]["text"]), 2),
    (choices("Question: What is a whale?\nAnswer:", *ARC[2]["choices"]["text"]), 1),
]
QUESTIONS = [
    {"question": " What is 2 + 3?", "subject": "-", "choices": ["4", "5", "6", "7"], "answer": 1},
    {"question": "Pick D.", "subject": "-", "choices": ["a", "b", "c", "d"], "answer": 3},
    {"question": "Pick A.", "subject": "-", "choices": ["w", "x", "y", "z"], "answer": 0},
]
TASKS = {
    "piqa": Stock(
        "acc_norm", "baber/piqa", None, ("train", "validation"),
        [
            {"goal": "Dry a cup.", "sol1": "Turn it over on a towel.", "sol2": "Wet it.", "label": 0},
            {"goal": "Open a jar?", "sol1": "Shout.", "sol2": "Turn the lid to the left.", "label": 1},
            {"goal": "Cut bread", "sol1": "Use a spoon.", "sol2": "Use a knife.", "label": 1},
        ],
        [
            (choices("Question: Dry a cup.\nAnswer:", "Turn it over on a towel.", "Wet it."), 0),
            (choices("Question: Open a jar?\nAnswer:", "Shout.", "Turn the lid to the left."), 1),
            (choices("Question: Cut bread\nAnswer:", "Use a spoon.", "Use a knife."), 1),
        ],
    ),
    "winogrande": Stock(  # the choice stands in the context, and what follows is scored
        "acc", "allenai/winogrande", "winogrande_xl", ("train", "validation"),
        [
            {"sentence": "The cup missed the bag as the _ was small.", "option1": "cup",
             "option2": "bag", "answer": "2"},
            {"sentence": "Ann paid Eve, so _ was rich.", "option1": "Ann", "option2": "Eve",
             "answer": "2"},
            {"sentence": "He left the car for the bus since the _ was slow.", "option1": "car",
             "option2": "bus", "answer": "1"},
        ],
        [
            ([("The cup missed the bag as the cup", " was small."),
              ("The cup missed the bag as the bag", " was small.")], 1),
            ([("Ann paid Eve, so Ann", " was rich."), ("Ann paid Eve, so Eve", " was rich.")], 1),
            ([("He left the car for the bus since the car", " was slow."),
              ("He left the car for the bus since the bus", " was slow.")], 0),
        ],
    ),
    "hellaswag": Stock(
        "acc_norm", "Rowan/hellaswag", None, ("train", "test", "validation"),
        [
            {"ind": 1, "activity_label": "Rowing", "ctx_a": "A man sits in a boat.", "ctx_b": "he",
             "ctx": "A man sits in a boat. he", "endings": ["rows.", "flies off.", "is a tree.",
             "reads the whole of a long book."], "source_id": "a~1", "split": "val",
             "split_type": "indomain", "label": "0"},
            {"ind": 2, "activity_label": "Home", "ctx_b": "",
             "ctx_a": "[header] How to fold a shirt [title] Lay it flat.",
             "ctx": "[header] How to fold a shirt [title] Lay it flat.",
             "endings": ["[step] Fold it.", "Burn it [substeps] at once.", "Eat.", "Sing to it."],
             "source_id": "w~2", "split": "val", "split_type": "zeroshot", "label": "0"},
            {"ind": 3, "activity_label": "Chess", "ctx_a": "Two play.", "ctx_b": "one of them",
             "ctx": "Two play. one of them", "endings": ["swims.", "eats a rook.", "wins.", "."],
             "source_id": "a~3", "split": "val", "split_type": "indomain", "label": "2"},
        ],
        [
            (choices("Rowing: A man sits in a boat. He", "rows.", "flies off.", "is a tree.",
                     "reads the whole of a long book."), 0),
            (choices("Home: How to fold a shirt. Lay it flat.", " Fold it.", "Burn it at once.",
                     "Eat.", "Sing to it."), 0),
            (choices("Chess: Two play. One of them", "swims.", "eats a rook.", "wins.", "."), 2),
        ],
    ),
    "arc_easy": Stock(
        "acc_norm", "allenai/ai2_arc", "ARC-Easy", ("train", "validation", "test"), ARC, ARC_ASKED
    ),
    "arc_challenge": Stock(
        "acc_norm", "allenai/ai2_arc", "ARC-Challenge", ("train", "validation", "test"),
        ARC[::-1], ARC_ASKED[::-1],
    ),
    "lambada_openai": Stock(
        "acc", "EleutherAI/lambada_openai", "default", ("test",),
        [
            {"text": "She had lost her key, so she went home to find the key"},
            {"text": "and all that he would sing was la la la"},  # a model that repeats is right
            {"text": "\"Is it far?\" \"No,\" he said, \"it is not far"},
        ],
        [
            ([("She had lost her key, so she went home to find the", " key")], 0),
            ([("and all that he would sing was la la", " la")], 0),
            ([("\"Is it far?\" \"No,\" he said, \"it is not", " far")], 0),
        ],
    ),
    "mmlu": Stock(  # every subject has the same rows here, and its own first line
        "acc", "cais/mmlu", None, ("validation", "dev", "test"), QUESTIONS,
        [
            (choices(MMLU.format(subject) + asked + "\nAnswer:", *"ABCD"), gold)
            for subject in ("abstract algebra", "world religions")  # the first and the last
            for asked, gold in (
                ("What is 2 + 3?\nA. 4\nB. 5\nC. 6\nD. 7", 1),
                ("Pick D.\nA. a\nB. b\nC. c\nD. d", 3),
                ("Pick A.\nA. w\nB. x\nC. y\nD. z", 0),
            )
        ],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return models.load("tiny:llama")


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, " la" in one, and <s> before every text, which the tokenizers of LLaMA add as well."""
    words = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "la", "Ġla"]
    numbers = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(kinds.BPE(numbers, [("l", "a"), ("Ġ", "la")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module", autouse=True)
def one_index():
    """lm-eval lists its thousands of task files anew each time, for seconds: here once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", functools.cache(tasks.TaskManager))
        yield


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers lm-eval with the rows above; returns what it was asked for."""
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name))
        task = next(t for t in TASKS.values() if t.path == path and t.name in (None, name))
        # of the other splits one row: whoever evaluates one of them has not three items
        kept = {s: task.rows[: None if s == task.splits[-1] else 1] for s in task.splits}
        return datasets.DatasetDict({s: datasets.Dataset.from_list(r) for s, r in kept.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(corpora, "_why_offline", lambda: None)
    return asked


def tokens(tokenizer, text: str) -> list[int]:
    return [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def by_hand(model, tokenizer, context: str, target: str) -> tuple[float, bool]:
    """log p(target | context) in nats, and whether the model would write it; no padding, no cache."""
    whole, first = tokens(tokenizer, context + target), len(tokens(tokenizer, context))
    p = logits(model, torch.tensor([whole]))[0].log_softmax(-1)
    written = all(p[i - 1].argmax() == whole[i] for i in range(first, len(whole)))
    return sum(p[i - 1, whole[i]].item() for i in range(first, len(whole))), written


def right(task: Stock, requests, found: list[tuple[float, bool]], gold: int) -> int:
    """acc or acc_norm of one item, by its definition."""
    if len(requests) == 1:
        return int(found[0][1])
    scores = [ll for ll, _ in found]
    if task.metric == "acc_norm":  # log-probability a character of the choice, without its space
        scores = [s / (len(target) - 1) for s, (_, target) in zip(scores, requests, strict=True)]
    return int(scores.index(max(scores)) == gold)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_of_the_hub_gives_the_models_own_values(hub, model, tokenizer, name):
    task = TASKS[name]
    found = zero_shot.evaluate(model, tokenizer, name, batch=3)
    assert found["metric"] == task.metric == zero_shot.STOCK[name]
    assert {path for path, _ in hub} == {task.path}
    assert len(hub) == (SUBJECTS if name == "mmlu" else 1)
    assert len(found["logp"]) == len(found["correct"]) == 3 * len(hub)
    assert len(found["hash"]) == 64 and found["version"]
    ours = [[by_hand(model, tokenizer, *r) for r in requests] for requests, _ in task.asked]
    rows = list(zip(task.asked, ours, strict=True))
    logp = [ll[gold][0] for (_, gold), ll in rows]
    correct = [right(task, requests, ll, gold) for (requests, gold), ll in rows]
    shown = [*range(3), *range(-3, 0)] if name == "mmlu" else range(3)
    assert [found["logp"][i] for i in shown] == pytest.approx(logp, rel=1e-5)
    assert [found["correct"][i] for i in shown] == correct
    if name != "mmlu":  # there the other subjects have other first lines
        sent = [c + t for requests, _ in task.asked for c, t in requests]
        assert found["tokens"] == sum(len(tokens(tokenizer, text)) for text in sent)


def test_the_rows_tell_the_metrics_apart(model, tokenizer):
    """Some are right and some wrong, and the length of a choice matters: else nothing was held above."""
    seen = {"acc": [], "acc_norm": []}
    for task in TASKS.values():
        for requests, gold in task.asked:
            found = [by_hand(model, tokenizer, *r) for r in requests]
            seen[task.metric].append(right(task, requests, found, gold))
            if task.metric == "acc_norm":
                plain = max(range(len(found)), key=lambda i, ll=found: ll[i][0])
                seen.setdefault("summed", []).append(int(plain == gold))
    assert all(set(values) == {0, 1} for values in seen.values())
    assert seen["summed"] != seen["acc_norm"]


def test_every_task_that_is_offered_is_held_here():
    assert TASKS.keys() == zero_shot.STOCK.keys()


def test_out_of_reach_of_the_hub_its_cache_is_asked(hub, model, tokenizer, monkeypatch):
    """Offline mode holds while the rows are loaded, and what is not there is told in a line."""
    switches = [(constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    for where, what in switches:
        monkeypatch.setattr(where, what, False)
    monkeypatch.setattr(corpora, "_why_offline", lambda: "the hub cannot be reached")
    cached, states = datasets.load_dataset, []

    def load_dataset(path, **options):
        states.append([getattr(where, what) for where, what in switches])
        return cached(path, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(zero_shot.evaluate(model, tokenizer, "winogrande")["logp"]) == 3
    assert states == [[True, True]]

    def missing(path, **options):
        raise ConnectionError(f"Couldn't reach {path}")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    told = "cannot be reached and it is not in the local cache .Couldn't reach allenai/winogrande"
    with pytest.raises(TaskError, match=f"'winogrande': the hub {told}"):
        zero_shot.evaluate(model, tokenizer, "winogrande")
    monkeypatch.setattr(corpora, "_why_offline", lambda: None)
    with pytest.raises(TaskError, match="'winogrande': loading it failed"):
        zero_shot.evaluate(model, tokenizer, "winogrande")
    assert [getattr(where, what) for where, what in switches] == [False, False]

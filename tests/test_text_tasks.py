"""Items made of text: whole, never twice, from the evaluation split alone, the same every time."""

from __future__ import annotations

import re

import pytest

from dfrot_lab import corpora, text_tasks
from dfrot_lab.corpora import CorpusError
from dfrot_lab.text_tasks import TaskError

TEXT = {split: corpora.text("pydoc", split) for split in corpora.SPLITS}


def flat(text: str) -> str:
    return " ".join(text.split())


def test_sentences_end_at_full_stops_but_not_at_initials_and_the_like():
    text = 'Dr. A. B. Smith came (at 5 p.m. sharp). He saw no. 3 of it! Was "it" 3.5 m? 7 were.'
    assert text_tasks.paragraphs(text) == [
        [
            "Dr. A. B. Smith came (at 5 p.m. sharp).",
            "He saw no. 3 of it!",
            'Was "it" 3.5 m?',
            "7 were.",
        ]
    ]


def test_lines_are_paragraphs_unless_they_are_wrapped():
    long = "Word " * 30
    assert text_tasks.paragraphs("One line.\nIs wrapped.\n\nNext.") == [
        ["One line.", "Is wrapped."], ["Next."],
    ]  # fmt: skip
    assert len(text_tasks.paragraphs(f"{long}end.\n{long}end.\nHeading")) == 3


def test_last_words_stand_in_their_passage_and_passages_never_overlap():
    items, whole = text_tasks.last_words(TEXT["evaluation"]), flat(TEXT["evaluation"])
    assert len(items) > 20
    place = 0
    for item in items:
        assert re.search(rf"\b{item['target']}\b", item["context"], re.IGNORECASE)
        passage = f"{item['context']} {item['target']}"
        assert 40 <= len(passage.split()) <= 60
        place = whole.index(passage, place) + len(passage)
        assert whole[place] in ".!?"


def test_a_continuation_follows_and_the_others_do_not():
    items, whole = text_tasks.continuations(TEXT["evaluation"]), flat(TEXT["evaluation"])
    assert len(items) > 100
    for item in items:
        true = item["choices"][item["gold"]]
        assert f"{item['context']} {true}" in whole
        assert len(set(item["choices"])) == text_tasks.CHOICES
        for other in item["choices"]:
            assert other == true or f"{item['context']} {other}" not in whole
            assert other in whole and abs(len(other) - len(true)) <= 0.2 * len(true)
    share = sum(i["gold"] == 0 for i in items) / len(items)
    assert 0.2 < share < 0.47  # the true one is not always at one place


@pytest.mark.parametrize("task", text_tasks.TASKS)
def test_items_are_of_the_evaluation_split_and_the_same_every_time(task):
    items = text_tasks.chosen(task, "pydoc", 20)
    assert items == text_tasks.chosen(task, "pydoc", 20)
    every = text_tasks.TASKS[task](TEXT["evaluation"])
    seen = flat(TEXT["calibration"])
    assert [i for i in every if i["context"] in seen]  # pydoc repeats itself: left out below
    assert all(i in every for i in items) and len({i["context"] for i in items}) == 20
    assert not [i for i in items if i["context"] in seen]
    assert items[-1] in every[len(every) // 2 :]  # spread over the text, not its beginning


@pytest.mark.parametrize("task", text_tasks.TASKS)
def test_a_small_corpus_is_told_with_the_number_found(task, tmp_path):
    with pytest.raises(TaskError, match=rf"'pydoc' gives \d+ items of task '{task}', 9999 needed"):
        text_tasks.chosen(task, "pydoc", 9999)
    small = tmp_path / "small.txt"
    small.write_text("One.\n\nTwo.\n")
    with pytest.raises(TaskError, match=r"gives 0 items .* 2 needed: ask for fewer"):
        text_tasks.chosen(task, str(small), 2)
    with pytest.raises(TaskError, match="items = 1"):
        text_tasks.chosen(task, "pydoc", 1)
    with pytest.raises(CorpusError, match="unknown corpus"):
        text_tasks.chosen(task, "nowhere", 2)


@pytest.mark.demo
def test_the_demo_corpus_has_500_of_each():
    for task in text_tasks.TASKS:
        items = text_tasks.chosen(task, "demo", 500)
        assert len(items) == 500
        words = [len(str(i["context"]).split()) for i in items]
        assert max(words) <= 60

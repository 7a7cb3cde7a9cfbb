"""Corpora: disjoint splits, exact windows, clear errors. No network; `demo` needs the assets."""

import bz2
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from dfrot_lab import assets, corpora, wikipedia
from dfrot_lab.corpora import CorpusError

TOKENIZER = ByT5Tokenizer()  # a token is a UTF-8 byte, so lengths are known


@pytest.fixture
def story(tmp_path):
    """A text file of 100 numbered paragraphs."""
    file = tmp_path / "story.txt"
    file.write_text("\n\n".join(f"paragraph {i:03d}\nof the story" for i in range(100)))
    return str(file)


@pytest.fixture
def small_assets(tmp_path, monkeypatch):
    """A cache whose `lee` and `wikipedia` files are tiny."""
    monkeypatch.setenv("DFROT_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "path", lambda name: tmp_path / name)
    (tmp_path / "lee").write_text("".join(f"news {i}\n" for i in range(10)))
    (tmp_path / "wikipedia").write_bytes(bz2.compress(dump().encode()))
    return tmp_path


PROSE = "The quick brown fox jumps over the lazy dog, again and again. " * 10


def page(title: str, text: str, namespace: int = 0, head: str = "") -> str:
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns>{head}<revision><text>"
        f"{text.replace('&', '&amp;').replace('<', '&lt;')}</text></revision></page>"
    )


def dump() -> str:
    pages = [
        page("First", MARKUP + PROSE),
        page("Moved", "#REDIRECT [[First]]" + PROSE, head='<redirect title="First"/>'),
        page("Wikipedia:Policy", PROSE, namespace=4),
        page("Fox (disambiguation)", PROSE + "{{disambiguation}}"),
        page("Stub", "Too short."),
        *(page(title, PROSE) for title in ("Second", "Third", "Fourth")),
    ]
    return f'<mediawiki xmlns="urn:mediawiki">{"".join(pages)}</mediawiki>'


MARKUP = """{{Infobox fox|name=F}}
'''Foxes''' ({{IPA-en|f}}; from [[Old English|English]]) run {{convert|5|km|mi}}<ref name="a"/> \
fast.<ref>A note, [[unclosed.</ref> [[File:Fox.jpg|thumb|A [[fox]]]]
{| class="wikitable"
| cell || ''unclosed
{| nested
|}
|}
== Empty ==
== Life ==
They live in dens, <!-- hidden -->which {{lang|fr|ils}} dig.
* [[Short item]]
* This item of a list is a whole sentence, so that it stays in the text as prose.
== See also ==
* This item of a list is a whole sentence, but in a section that is dropped as a whole.
=== Deeper ===
Also dropped.
== Later ==
"""


def parts(corpus: str) -> tuple[list[str], list[str]]:
    first, second = (corpora.text(corpus, split).split("\n\n") for split in corpora.SPLITS)
    return first, second


def test_file_halves_are_disjoint_and_complete(story):
    calibration, evaluation = parts(story)
    assert [int(p[10:13]) for p in calibration + evaluation] == list(range(100))
    assert len(calibration) == 50


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab cé", min_size=1, max_size=40).filter(str.strip), min_size=2))
def test_any_file_splits_in_two(tmp_path_factory, paragraphs):
    file = tmp_path_factory.mktemp("any") / "any.txt"
    file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    calibration, evaluation = parts(str(file))
    assert calibration and evaluation
    assert calibration + evaluation == [p.strip() for p in paragraphs]


def test_lee_splits_by_article(small_assets):
    calibration, evaluation = parts("lee")
    assert calibration == ["news 0", "news 3", "news 6", "news 9"]
    assert sorted(calibration + evaluation) == [f"news {i}" for i in range(10)]


def test_pydoc_splits_by_topic():
    calibration, evaluation = (corpora.text("pydoc", split) for split in corpora.SPLITS)
    assert "assert_stmt" in calibration and "assert_stmt ::=" not in evaluation
    assert min(len(calibration), len(evaluation)) > 100_000
    assert calibration == corpora.text("pydoc", "calibration")


def test_wikipedia_is_cleaned_to_prose(small_assets):
    first, *others = wikipedia.articles()
    assert [first["title"], *(a["title"] for a in others)] == ["First", "Second", "Third", "Fourth"]
    assert first["text"].split("\n") == [
        "Foxes (from English) run 5 km fast.",
        "Life",
        "They live in dens, which ils dig.",
        "This item of a list is a whole sentence, so that it stays in the text as prose.",
        "Later",
        PROSE.strip(),
    ]
    calibration, evaluation = (corpora.text("demo", split) for split in corpora.SPLITS)
    assert calibration.startswith("First\n\nFoxes")
    assert "Fourth" in calibration and "Second" in evaluation and "Third" in evaluation


def test_cleaning_happens_once_and_the_cache_is_checked(small_assets, monkeypatch):
    articles = wikipedia.articles()
    (cached,) = small_assets.glob("wikipedia-*.json")
    monkeypatch.setattr(wikipedia, "_parsed", lambda _: pytest.fail("cleaned again"))
    assert wikipedia.articles() == articles
    cached.write_text("[{")
    with pytest.raises(CorpusError, match=r"wikipedia-\S+ is damaged .*: delete it"):
        wikipedia.articles()


def test_interrupted_cleaning_leaves_nothing(small_assets, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wikipedia.json, "dump", full)
    with pytest.raises(CorpusError, match=r"cannot keep the cleaned text .*No space.*DFROT_CACHE"):
        wikipedia.articles()
    assert not list(small_assets.glob("*.json")) + list(small_assets.glob(".clean-*"))


def test_windows_side_by_side_are_the_text(story):
    tokens = corpora.load(story, "evaluation", TOKENIZER, windows=5, seqlen=63)
    assert tokens.shape == (5, 63) and tokens.dtype == torch.int64
    text = corpora.text(story, "evaluation")
    assert TOKENIZER.decode(tokens.flatten()) == text[: 5 * 63]
    every = corpora.load(story, "evaluation", TOKENIZER, windows=None, seqlen=63)
    assert every.shape == (len(text) // 63, 63)
    assert torch.equal(every[:5], tokens)


def test_random_windows_follow_the_seed_only(story):
    def draw(seed):
        torch.manual_seed(int(time.time()))
        return corpora.load(story, "calibration", TOKENIZER, windows=7, seqlen=50, seed=seed)

    assert draw(1).shape == (7, 50)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    text = corpora.text(story, "calibration")
    assert all(TOKENIZER.decode(window) in text for window in draw(3))


def test_a_random_window_may_be_the_whole_text(story):
    length = len(corpora.text(story, "calibration"))
    window = corpora.load(story, "calibration", TOKENIZER, windows=1, seqlen=length, seed=0)
    assert window.shape == (1, length)


@pytest.mark.parametrize(
    ("windows", "seqlen", "seed", "needed"),
    [(40, 2048, None, 40 * 2048), (None, 9999, None, 9999), (2, 9999, 0, 9999)],
)
def test_too_short_a_corpus_says_what_it_has(story, windows, seqlen, seed, needed):
    length = len(corpora.text(story, "evaluation"))
    message = rf"story.txt' \(evaluation\) has {length} tokens, {needed} needed .*: ask for fewer"
    with pytest.raises(CorpusError, match=message):
        corpora.load(story, "evaluation", TOKENIZER, windows=windows, seqlen=seqlen, seed=seed)


@pytest.mark.parametrize("kwargs", [{"windows": 0}, {"windows": 1, "seqlen": 0}])
def test_no_windows_is_no_request(story, kwargs):
    with pytest.raises(CorpusError, match="use 1 or more"):
        corpora.load(story, "evaluation", TOKENIZER, **kwargs)


def test_all_windows_at_random_is_no_request(story):
    with pytest.raises(CorpusError, match="windows=None with seed=0"):
        corpora.load(story, "evaluation", TOKENIZER, windows=None, seed=0)


def test_unknown_names_list_the_known_ones():
    known = "demo, lee, pydoc, wikitext2, c4"
    with pytest.raises(
        CorpusError, match=f"unknown corpus 'wiki': use one of {known}, or the path"
    ):
        corpora.text("wiki", "evaluation")
    with pytest.raises(CorpusError, match="unknown split 'test': use one of calibration, eval"):
        corpora.text("pydoc", "test")


def test_unsplittable_and_undecodable_files(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("one paragraph\nand no more")
    with pytest.raises(CorpusError, match="has 1 paragraph where many are needed"):
        corpora.text(str(file), "evaluation")
    file.write_bytes(b"\xff\xfe\n\n\xff")
    with pytest.raises(CorpusError, match=r"cannot read corpus .*: save it as UTF-8"):
        corpora.text(str(file), "evaluation")


def test_fingerprint_knows_values_and_shape():
    tokens = torch.arange(6).reshape(2, 3)
    assert corpora.fingerprint(tokens) == corpora.fingerprint(tokens.int().clone())
    assert corpora.fingerprint(tokens) == corpora.fingerprint(tokens.T.contiguous().T)
    assert corpora.fingerprint(tokens) != corpora.fingerprint(tokens.reshape(3, 2))
    assert corpora.fingerprint(tokens) != corpora.fingerprint(tokens + 1)


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers, and a `load_dataset` that records how it was called."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    state = SimpleNamespace(calls=[], offline=[], head=lambda *_, **__: "an answer", error=None)

    def load_dataset(**request):
        state.calls.append(request)
        state.offline.append(constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE)
        if state.error:
            raise state.error
        return {"text": ["row one", "row two"]}

    def head(*args, **kwargs):  # looked up when called: tests replace state.head
        return state.head(*args, **kwargs)

    session = SimpleNamespace(head=head)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


def unreachable(*_args, **_kwargs):
    raise OSError("no network")


def test_hub_corpora_ask_for_the_papers_splits(hub):
    for corpus in ("wikitext2", "c4"):
        for split in corpora.SPLITS:
            assert corpora.text(corpus, split) == "row one\n\nrow two"
    assert [call["split"] for call in hub.calls] == [
        "train", "test", "train[:4096]", "validation[:1100]",
    ]  # fmt: skip
    assert hub.calls[0]["path"] == "Salesforce/wikitext"
    assert hub.calls[0]["name"] == "wikitext-2-raw-v1"
    assert hub.calls[2]["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert hub.calls[3]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert not any(hub.offline)


def test_without_a_network_the_cache_still_serves(hub):
    from huggingface_hub import constants

    hub.head = unreachable
    assert corpora.text("wikitext2", "evaluation") == "row one\n\nrow two"
    assert hub.offline == [True]
    assert constants.HF_HUB_OFFLINE is False  # as before


def test_without_a_network_and_a_cache_the_error_names_the_way_out(hub):
    hub.head, hub.error = unreachable, FileNotFoundError("not\ncached")
    message = (
        r"corpus 'c4' .*cannot be reached and it is not in the local cache \(not cached\): .*demo"
    )
    with pytest.raises(CorpusError, match=message) as caught:
        corpora.text("c4", "evaluation")
    assert "\n" not in str(caught.value)


def test_a_silent_network_does_not_stall(hub, monkeypatch):
    monkeypatch.setattr(corpora, "HUB_TIMEOUT", 0.1)
    hub.head, hub.error = lambda *_, **__: time.sleep(2), FileNotFoundError()
    start = time.monotonic()
    with pytest.raises(CorpusError, match="FileNotFoundError"):
        corpora.text("c4", "evaluation")
    assert time.monotonic() - start < 1.5


def test_offline_mode_asks_nobody(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.head, hub.error = lambda *_, **__: pytest.fail("asked the hub"), ConnectionError("offline")
    with pytest.raises(CorpusError, match=r"offline mode is set \(HF_HUB_OFFLINE\) and it is not"):
        corpora.text("wikitext2", "evaluation")
    assert hub.offline == [True]


@pytest.mark.demo
def test_the_demo_corpus_is_prose_and_large_enough():
    articles = wikipedia.articles()
    assert len(articles) == 96
    assert len({article["title"] for article in articles}) == 96
    everything = "\n".join(article["text"] for article in articles)
    assert 420_000 < len(everything.split()) < 450_000
    for markup in ("[[", "]]", "{|", "<ref", "'''", "http://", "( )", "()"):
        assert markup not in everything, markup
    # 40 windows of 2048 tokens need at most 8 characters a token.
    calibration, evaluation = (corpora.text("demo", split) for split in corpora.SPLITS)
    assert min(len(calibration), len(evaluation)) > 40 * 2048 * 8
    titles = [split.partition("\n")[0] for split in (calibration, evaluation)]
    assert titles == ["Anarchism", "Autism"]


@pytest.mark.demo
def test_the_demo_corpus_through_the_demo_tokenizer():
    from transformers import AutoTokenizer

    model = assets.path("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    for split in corpora.SPLITS:
        tokens = corpora.load("demo", split, tokenizer, windows=40)
        assert tokens.shape == (40, 2048)
        # Text in, text out: no special token, nothing lost.
        assert corpora.text("demo", split).startswith(tokenizer.decode(tokens[0])[:2000])


def test_a_text_under_the_home_folder_is_known_by_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.txt").write_text("one\n\ntwo\n")
    before = corpora.identity("~/own.txt")
    (tmp_path / "own.txt").write_text("one\n\nthree\n")
    assert len(before) == 64 and corpora.identity("~/own.txt") != before

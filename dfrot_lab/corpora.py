"""Text corpora, split into calibration and evaluation, and cut into windows of token ids."""

__all__ = ["CORPORA", "SPLITS", "CorpusError", "check", "fingerprint", "identity", "load", "text"]

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dfrot_lab import assets, wikipedia
from dfrot_lab.wikipedia import CorpusError

CORPORA: dict[str, str] = {
    "demo": "96 English Wikipedia articles, cleaned to prose (demo asset, CC BY-SA 3.0)",
    "lee": "300 short news articles (demo asset)",
    "pydoc": "the help topics of this Python, technical prose (no download)",
    "wikitext2": "WikiText-2 raw (Hugging Face hub)",
    "c4": "the first documents of one shard of C4 (Hugging Face hub)",
}
SPLITS = ("calibration", "evaluation")

SEPARATOR = "\n\n"  # between documents
CALIBRATION_EVERY = 3  # documents 0, 3, 6, … calibrate, the others evaluate
C4_DOCUMENTS = {"calibration": 4096, "evaluation": 1100}  # about 2 and 0.5 million tokens
HUB_TIMEOUT = 3.0  # seconds


def text(corpus: str, split: str) -> str:
    """The text of one split of a corpus; documents are joined by a blank line.

    Args:
        corpus: one of
            `demo`: Wikipedia articles of the demo asset, each a title line and its prose. Every
            third article (0, 3, 6, …) calibrates, the others evaluate.
            `lee`: news articles of the demo asset, split the same way.
            `pydoc`: `pydoc_data.topics` in the order of their names, split the same way. The
            text is that of the running Python and differs between its versions.
            `wikitext2`: `Salesforce/wikitext`, `wikitext-2-raw-v1`: train calibrates, test
            evaluates; rows joined by a blank line, as in the paper.
            `c4`: `allenai/c4`: the first 4096 documents of the first train shard calibrate, the
            first 1100 of the first validation shard evaluate.
            A path to a UTF-8 text file: paragraphs, in order; the first half (by characters)
            calibrates, the second evaluates.
        split: `calibration` or `evaluation`; the two share no document.

    Raises:
        CorpusError: unknown corpus or split, an unreadable file, or an unreachable hub.
        dfrot_lab.assets.AssetError: the demo asset is missing or damaged.
    """
    if split not in SPLITS:
        raise CorpusError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    match corpus:
        case "demo":
            documents = [f"{a['title']}{SEPARATOR}{a['text']}" for a in wikipedia.articles()]
        case "lee":
            lines = assets.path("lee").read_text(encoding="utf-8").splitlines()
            documents = [line.strip() for line in lines if line.strip()]
        case "pydoc":
            documents = _pydoc()
        case "wikitext2" | "c4":
            return SEPARATOR.join(_hub(corpus, split))
        case _:
            return _half_of_file(corpus, split)
    calibration = split == "calibration"
    chosen = [d for i, d in enumerate(documents) if (i % CALIBRATION_EVERY == 0) == calibration]
    return SEPARATOR.join(chosen)


def load(
    corpus: str,
    split: str,
    tokenizer: Any,
    *,
    windows: int | None,
    seqlen: int = 2048,
    seed: int | None = None,
) -> torch.Tensor:
    """Windows of token ids, int64 [windows, seqlen].

    The split's text is tokenized once, as one string and without special tokens: cutting it
    into documents first would change the tokens at the seams.

    Args:
        corpus, split: as in `text`.
        tokenizer: a transformers tokenizer.
        windows: how many; None means all that fit, and needs `seed=None`.
        seqlen: tokens per window.
        seed: None gives the first windows, side by side, with the tail dropped (evaluation). A
            number gives windows at offsets drawn uniformly from a generator of that seed; they
            may overlap (calibration).

    Raises:
        CorpusError: as in `text`; windows or seqlen below 1; or fewer tokens than asked for.
    """
    if seqlen < 1 or (windows is not None and windows < 1):
        raise CorpusError(f"windows={windows}, seqlen={seqlen}: use 1 or more of each")
    if windows is None and seed is not None:
        raise CorpusError(f"windows=None with seed={seed}: give a number of windows, or no seed")
    # verbose=False: a text longer than the model's context is the point here, not a mistake.
    ids = tokenizer(text(corpus, split), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int64)
    needed = seqlen if seed is not None or windows is None else windows * seqlen
    if len(tokens) < needed:
        raise CorpusError(
            f"corpus '{corpus}' ({split}) has {len(tokens)} tokens, {needed} needed "
            f"(windows={windows}, seqlen={seqlen}): ask for fewer or shorter windows, "
            "or use a longer corpus"
        )
    if seed is None:
        count = windows or len(tokens) // seqlen
        return tokens[: count * seqlen].reshape(count, seqlen).clone()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - seqlen + 1, (windows,), generator=generator)
    return tokens[starts[:, None] + torch.arange(seqlen)]


def check(corpus: str) -> None:
    """CorpusError, as `text` would raise it, for a name that is unknown or a file that cannot be split."""
    if corpus not in CORPORA:
        _half_of_file(corpus, "calibration")


def identity(corpus: str) -> str:
    """What `corpus` names, for the keys of kept results: a text file's SHA-256, else the name."""
    path = Path(corpus).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else corpus


def fingerprint(tokens: torch.Tensor) -> str:
    """Hex SHA-256 of the token ids and their shape, for provenance.

    The same on every machine: ids are hashed as little-endian int64 in row-major order.
    """
    ids = tokens.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False)
    return hashlib.sha256(repr(tuple(tokens.shape)).encode() + ids.tobytes()).hexdigest()


def _pydoc() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CorpusError(
            f"corpus 'pydoc': this Python ships no pydoc_data ({error}): use another corpus"
        ) from error
    return [topics[name].strip() for name in sorted(topics)]


def _half_of_file(corpus: str, split: str) -> str:
    file = Path(corpus).expanduser()
    if not file.is_file():
        raise CorpusError(
            f"unknown corpus {corpus!r}: use one of {', '.join(CORPORA)}, "
            "or the path of an existing UTF-8 text file"
        )
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"cannot read corpus '{corpus}' ({error}): save it as UTF-8") from error
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", content) if p.strip()]
    if len(paragraphs) < 2:
        raise CorpusError(
            f"corpus '{corpus}' has {len(paragraphs)} paragraph{'s' * (not paragraphs)} where many are "
            "needed, for calibration and evaluation: give a longer text, paragraphs separated by blank lines"
        )
    half, seen, cut = sum(map(len, paragraphs)) / 2, 0, 0
    while seen < half and cut < len(paragraphs) - 1:
        seen, cut = seen + len(paragraphs[cut]), cut + 1
    chosen = paragraphs[:cut] if split == "calibration" else paragraphs[cut:]
    return SEPARATOR.join(chosen)


def _hub(corpus: str, split: str) -> list[str]:
    """The rows of a hub corpus, from the hub or, where it cannot be reached, from its cache."""
    if corpus == "wikitext2":
        request = {
            "path": "Salesforce/wikitext",
            "name": "wikitext-2-raw-v1",
            "split": "train" if split == "calibration" else "test",
        }
    else:
        part = "train.00000-of-01024" if split == "calibration" else "validation.00000-of-00008"
        key = "train" if split == "calibration" else "validation"
        request = {
            "path": "allenai/c4",
            "data_files": {key: f"en/c4-{part}.json.gz"},
            "split": f"{key}[:{C4_DOCUMENTS[split]}]",
            "verification_mode": "no_checks",  # one shard, so the split sizes cannot match
        }
    why = _why_offline()
    try:
        import datasets

        with _offline() if why else contextlib.nullcontext():
            rows = datasets.load_dataset(**request)
    except Exception as error:  # datasets raises many kinds; each means "no corpus"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        state = f"{why} and it is not in the local cache" if why else "loading it failed"
        raise CorpusError(
            f"corpus '{corpus}' ({request['path']}, {split}): {state} ({reason}): "
            "connect and try again, or use corpus=demo, which works offline"
        ) from error
    return list(rows["text"])


def _why_offline() -> str | None:
    """Why the hub is out of reach, None if it answers; takes `HUB_TIMEOUT` at most.

    Asked first because datasets, without a network, retries for some 20 seconds.
    """
    import huggingface_hub
    from huggingface_hub import constants

    # The library reads the variable only when imported; a notebook may set it later.
    flag = os.environ.get("HF_HUB_OFFLINE", "").upper()
    if huggingface_hub.is_offline_mode() or flag in ("1", "ON", "YES", "TRUE"):
        return "offline mode is set (HF_HUB_OFFLINE)"
    answers: list[object] = []

    def ask() -> None:
        # Through the hub's own session, which knows about proxies; a HEAD carries no token.
        with contextlib.suppress(Exception):
            session = huggingface_hub.get_session()
            answers.append(session.head(constants.ENDPOINT, timeout=HUB_TIMEOUT))

    # In a thread because looking up a host name obeys no timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT)
    return None if answers else f"the hub ({constants.ENDPOINT}) cannot be reached"


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Offline mode for one call; both libraries read the variable only when imported."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before

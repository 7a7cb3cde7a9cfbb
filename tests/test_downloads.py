"""What a profile names is fetched once, where a batch is started: assets, and models and texts of the hub."""

from __future__ import annotations

import pytest
import yaml
from click.testing import CliRunner

from dfrot_lab import assets, corpora, downloads, files, hub, manifest, zero_shot
from dfrot_lab.cli import app
from dfrot_lab.exports import sources


@pytest.fixture
def own(tmp_path):
    """A profile of a hub model, with a second text in one of its notebooks."""
    path = tmp_path / "own.yml"
    notebooks = {"09_objectives": {"second": "c4"}, "06_reviewers_questions": {"corpora": ["lee"]}}
    notebooks["10_zero_shot"] = {"tasks": ["last_word", "piqa"]}
    common = {"model": "owner/name", "corpus": "wikitext2"}
    path.write_text(yaml.safe_dump({"base": "smoke", "common": common, "notebooks": notebooks}))
    return path


@pytest.fixture
def asked(monkeypatch):
    """What would be downloaded."""
    found = []
    monkeypatch.setattr(assets, "fetch", lambda names, **_: found.extend(names))
    monkeypatch.setattr(hub, "commit", lambda m, r=None: "0123abcd" if m == "owner/name" else None)

    def from_hub(model):
        found.append(model)
        return sources.Source(None, model, "0123abcd")

    monkeypatch.setattr(sources, "from_hub", from_hub)
    monkeypatch.setattr(zero_shot, "fetch", found.append)
    monkeypatch.setattr(corpora, "text", lambda c, split: found.append((c, split)) or "")
    return found


def test_a_profile_names_models_and_texts_of_all_its_notebooks(own):
    lms, texts = downloads.named(str(own))
    assert lms == ["owner/name"]
    assert {"wikitext2", "c4", "lee"} <= set(texts)


def test_each_is_fetched_once(own, asked, tmp_path):
    out = tmp_path / "results" / "artefacts" / "assets.json"
    out.parent.mkdir(parents=True)
    done = CliRunner().invoke(app, ["assets", "--profile", str(own), "--out", str(out)])
    assert done.exit_code == 0, done.output
    hub = [(c, s) for c in ("c4", "wikitext2") for s in corpora.SPLITS]
    assert asked[-6:] == ["owner/name", "piqa", *hub] and len(set(asked)) == len(asked)
    assert files.read_json(out) == {"lee": assets.ASSETS["lee"].sha256, "owner/name": "0123abcd"}
    assert "owner/name: 0123abcd" in done.output
    assert manifest.check_inputs(tmp_path / "results", {}) == {}


def test_the_smoke_profile_needs_no_hub(asked):
    found = downloads.fetch("smoke")
    assert set(found) <= set(assets.ASSETS)
    assert not [a for a in asked if isinstance(a, tuple)]

"""SHA256SUMS of what was published, and the artefacts of a batch: what was altered is named."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dfrot_lab import assets, files, manifest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def published(tmp_path):
    (tmp_path / "03").mkdir()
    (tmp_path / "03" / "a.png").write_bytes(b"picture")
    (tmp_path / "03" / "result.json").write_text('{"ppl": 31.6}')
    manifest.write(tmp_path)
    return tmp_path


def test_the_committed_figures_are_as_listed():
    assert manifest.check(ROOT / "figures") == {}


def test_coreutils_read_it_too(published):
    done = subprocess.run(["sha256sum", "-c", manifest.NAME], cwd=published, check=False)
    assert done.returncode == 0
    (published / "03" / "a.png").write_bytes(b"Picture")
    done = subprocess.run(["sha256sum", "-c", manifest.NAME], cwd=published, check=False)
    assert done.returncode == 1


def test_what_is_altered_missing_or_new_is_named(published):
    assert manifest.check(published) == {}
    (published / "03" / "result.json").write_text('{"ppl": 31.7}')
    (published / "03" / "a.png").unlink()
    (published / "03" / "b.png").write_bytes(b"")
    assert manifest.check(published) == {
        "03/a.png": "missing",
        "03/b.png": "not listed",
        "03/result.json": "altered",
    }


def test_publishing_one_notebook_blesses_nothing_in_another(published):
    (published / "04").mkdir()
    (published / "04" / "result.json").write_text("{}")
    (published / "03" / "result.json").write_text('{"ppl": 31.7}')
    manifest.write(published, ["04"])
    assert manifest.check(published) == {"03/result.json": "altered"}
    manifest.write(published, ["03"])
    assert manifest.check(published) == {}


def test_a_manifest_that_is_missing_or_cut_says_so(published):
    path = published / manifest.NAME
    path.write_text(path.read_text()[3:])
    with pytest.raises(manifest.ManifestError, match="line 1"):
        manifest.check(published)
    path.unlink()
    with pytest.raises(manifest.ManifestError, match="dfrot-lab publish"):
        manifest.check(published)


@pytest.fixture
def batch(tmp_path):
    home = tmp_path / "artefacts"
    (home / "rotations").mkdir(parents=True)
    for i in range(2):
        save_file({"R1": np.eye(8) * (i + 1)}, home / "rotations" / f"{i}.safetensors")
    save_file({"X": np.ones(8)}, home / "activations.safetensors", {"dfrot": '{"tokens": "t"}'})
    hashes = {"0.safetensors": files.sha256(home / "rotations" / "0.safetensors")}
    files.write_json(home / "rotations.json", hashes)
    files.write_json(home / "assets.json", {"lee": assets.ASSETS["lee"].sha256})
    return tmp_path


def test_artefacts(batch):
    home = batch / "artefacts"
    assert manifest.check_artefacts(batch, {"03": "t"}) == {}
    assert "recorded in 04" in str(manifest.check_artefacts(batch, {"03": "t", "04": "u"}))
    for name in ("rotations/0.safetensors", "rotations/1.safetensors", "activations.safetensors"):
        whole = (home / name).read_bytes()
        (home / name).write_bytes(whole[:-1])
        wrong = manifest.check_artefacts(batch, {})
        assert wrong == {name: "altered" if name.startswith("rotations/0") else "truncated"}
        (home / name).write_bytes(whole)
    listed = home / "rotations" / "0.safetensors"
    listed.write_bytes(listed.read_bytes()[:-1] + b"\x01")
    assert manifest.check_artefacts(batch, {}) == {"rotations/0.safetensors": "altered"}
    listed.unlink()
    assert manifest.check_artefacts(batch, {}) == {"rotations/0.safetensors": "missing"}


@pytest.mark.parametrize("name", ["assets.json", "rotations.json"])
def test_damaged_lists_are_named(batch, name):
    (batch / "artefacts" / name).write_text('{"half": ')
    assert manifest.check_artefacts(batch, {}) == {name: "damaged"}


def test_assets_are_hashed_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("DFROT_CACHE", str(tmp_path))
    recorded = {"lee": assets.ASSETS["lee"].sha256}
    assert "missing" in manifest.check_assets(recorded)["lee"]
    (tmp_path / assets.ASSETS["lee"].filename).write_text("no news")
    assert "damaged" in manifest.check_assets(recorded)["lee"]
    assert "pinned as" in manifest.check_assets({"lee": "0" * 64})["lee"]
    assert manifest.check_assets({"else": "0" * 64}) == {"else": "unknown to this version"}

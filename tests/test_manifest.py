"""SHA256SUMS of what was published, and what jobs have kept: what was altered is named."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from dfrot_lab import assets, files, kept_files, manifest
from dfrot_lab.cli import app

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
def kept(tmp_path):
    """A results folder with a file of each kind that is kept, all recorded."""
    home = tmp_path / "smoke" / "artefacts"
    for name in ("rotations/0", "hessians/layer-000", "activations"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        about = {"dfrot": '{"tokens": "t"}'}
        save_file({"X": np.arange(100.0)}, home / f"{name}.safetensors", about)
    files.write_json(home / "assets.json", {"lee": assets.ASSETS["lee"].sha256})
    files.write_json(home.parent / "measurements" / "row.json", {"ppl": 31.625})
    files.write_json(home.parent / "03" / "result.json", {"ppl": 31.625})
    assert kept_files.verify(home.parent) == []
    return home.parent


KEPT = [
    "03/result.json",
    "artefacts/activations.safetensors",
    "artefacts/hessians/layer-000.safetensors",
    "artefacts/rotations/0.safetensors",
    "measurements/row.json",
]


def tree(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", KEPT)
def test_one_byte_of_a_kept_file_is_seen_and_nothing_is_touched(kept, name):
    wrong, said = manifest.check_kept(kept)
    assert wrong == {} and said.startswith("6 artefacts, measurements and results")
    path = kept / name
    whole, stat = path.read_bytes(), path.stat()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # behind an unchanged size and time
    before = tree(kept)
    assert manifest.check_kept(kept)[0] == {name: "altered"}
    path.unlink()
    assert manifest.check_kept(kept)[0] == {name: "missing"}
    path.write_bytes(whole)
    assert manifest.check_kept(kept)[0] == {}
    assert before.keys() == tree(kept).keys()


def test_what_nobody_recorded_is_held_against_its_length(kept):
    new = kept / "artefacts" / "rotations" / "1.safetensors"
    new.write_bytes((kept / KEPT[1]).read_bytes())
    wrong, said = manifest.check_kept(kept)
    assert wrong == {} and said.endswith("; 1 more that nobody recorded, of the right length")
    new.write_bytes(new.read_bytes()[:-1])
    assert manifest.check_kept(kept)[0] == {"artefacts/rotations/1.safetensors": "truncated"}


def test_without_a_record_nothing_is_said_to_be_as_recorded(kept):
    (kept / kept_files.MANIFEST).unlink()
    assert manifest.check_kept(kept) == ({}, "")
    (kept / kept_files.MANIFEST).write_text('{"half": ')
    assert manifest.check_kept(kept)[0] == {kept_files.MANIFEST: "damaged"}


def test_a_gallery_in_a_results_folder_is_no_result(kept):
    copy = kept / "gallery" / "03" / "result.json"
    files.write_json(copy, {"ppl": 31.625})
    assert manifest.check_kept(kept)[1].startswith("6 ") and kept_files.verify(kept) == []
    files.write_json(copy, {"ppl": 31.626})  # the next gallery
    assert manifest.check_kept(kept)[0] == {} and kept_files.verify(kept) == []
    assert copy.exists()


def test_inputs_of_the_artefacts(kept):
    assert manifest.check_inputs(kept, {"03": "t"}) == {}
    assert "recorded in 04" in str(manifest.check_inputs(kept, {"03": "t", "04": "u"}))
    listed = kept / "artefacts" / "assets.json"
    files.write_json(listed, {"lee": "0" * 64})
    assert "not what is pinned" in manifest.check_inputs(kept, {})["assets.json"]
    listed.write_text('{"half": ')
    assert manifest.check_inputs(kept, {}) == {"assets.json": "damaged"}
    (kept / "artefacts" / "activations.safetensors").write_bytes(b"x" * 20)
    assert manifest.check_inputs(kept, {})["activations.safetensors"] == "damaged"


def test_assets_are_hashed_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("DFROT_CACHE", str(tmp_path))
    recorded = {"lee": assets.ASSETS["lee"].sha256}
    assert "missing" in manifest.check_assets(recorded)["lee"]
    (tmp_path / assets.ASSETS["lee"].filename).write_text("no news")
    assert "damaged" in manifest.check_assets(recorded)["lee"]
    assert "pinned as" in manifest.check_assets({"lee": "0" * 64})["lee"]
    assert manifest.check_assets({"else": "0" * 64}) == {"else": "unknown to this version"}


def test_a_benchmark_gets_its_line_and_blesses_nothing_else(tmp_path):
    to = tmp_path / "figures"
    files.write_json(to / "01_fake" / "result.json", {"value": 1})
    manifest.write(to)
    files.write_json(to / "01_fake" / "result.json", {"value": 2})
    files.write_json(to / "optimiser.json", {"rows": []})
    for source in (to / "optimiser.json", tmp_path / "elsewhere.json"):
        files.write_json(source, {"rows": [1]})
        done = CliRunner().invoke(app, ["publish", str(source), "--to", str(to)])
        assert done.exit_code == 0, done.output
    assert manifest.check(to) == {"01_fake/result.json": "altered"}
    assert (to / "elsewhere.json").read_bytes() == (tmp_path / "elsewhere.json").read_bytes()

"""Artefacts are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from pathlib import Path

import pytest

from dfrot_lab import files


def test_what_is_written_arrives(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    with files.atomic(path) as partial:
        assert partial.parent == path.parent and partial.suffix == ".bin"
        partial.write_bytes(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, before, error):
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(type(error)), files.atomic(str(path)) as partial:
        partial.write_bytes(b"half")
        raise error
    assert [f.read_bytes() for f in tmp_path.iterdir()] == ([] if before is None else [before])


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["write", "mkstemp", "replace"])
def test_a_full_disk_names_the_file_that_was_wanted(tmp_path, monkeypatch, where):
    path = tmp_path / "result.json"
    path.write_text("old")
    owner, name = {
        "write": (Path, "write_text"),
        "mkstemp": (tempfile, "mkstemp"),
        "replace": (os, "replace"),
    }[where]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(
        OSError, match=r"No space left on device while writing.*result\.json'$"
    ) as e:
        files.write_json(path, {})
    assert e.value.errno == errno.ENOSPC
    assert e.value.filename == str(path)
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"old"]


def test_errors_about_other_files_are_not_renamed(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), files.atomic(tmp_path / "a"):
        (tmp_path / "other").read_bytes()
    with pytest.raises(OSError, match="no number"), files.atomic(tmp_path / "a"):
        raise OSError("no number")


def test_json_round_trip_is_sorted_and_repeatable(tmp_path):
    value = {"b": [1, (2, 3.5)], 7: None, "a": {"x": float("inf"), "y": float("nan")}}
    path = files.write_json(tmp_path / "a.json", value)
    assert files.read_json(path) == {"7": None, "a": {"x": "inf", "y": "nan"}, "b": [1, [2, 3.5]]}
    first = path.read_bytes()
    assert first == files.write_json(path, dict(reversed(value.items()))).read_bytes()
    assert first.endswith(b"}\n") and first.index(b'"a"') < first.index(b'"b"')


def test_sha256(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 100_000)
    assert files.sha256(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()

"""Kept files: altered and truncated ones are named and removed, what jobs have written is not."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from dfrot_lab import files, kept_files


@pytest.fixture
def folder(tmp_path):
    """A folder with one file of each kind that is kept, and with one that is not."""
    home = tmp_path / "smoke"
    for name in (
        "activations",
        "rotations/R",
        "hessians/layer-000",
        "hessians/layer-001",
    ):
        path = home / "artefacts" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"X": torch.arange(1000.0)}, path)
    for name in (
        "artefacts/rotations.json",
        "artefacts/rotations-bits.json",
        "artefacts/hessians/hessians.json",
        "measurements/row.json",
        "03/result.json",
        "03/provenance.json",
    ):
        files.write_json(home / name, {"value": list(range(100))})
    assert kept_files.verify(home) == []
    return home


KEPT = [
    "artefacts/activations.safetensors",
    "artefacts/rotations/R.safetensors",
    "artefacts/hessians/layer-001.safetensors",
    "measurements/row.json",
    "03/result.json",
]


def flip(path, keep_time=False):
    """One bit of the byte in the middle, in place."""
    stat = path.stat()
    with path.open("r+b") as f:
        f.seek(stat.st_size // 2)
        byte = f.read(1)[0]
        f.seek(stat.st_size // 2)
        f.write(bytes([byte ^ 1]))
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def tree(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize("name", KEPT)
def test_a_damaged_file_is_named_and_removed(folder, name, damage):
    before = tree(folder)
    damage(folder / name)
    (line,) = kept_files.verify(folder)
    assert str(folder / name) in line and "sha256" in line
    gone = {name}
    if "rotations/" in name:
        gone |= {"artefacts/rotations.json", "artefacts/rotations-bits.json"}
    if "hessians/" in name:
        gone |= {"artefacts/hessians/hessians.json"}
    assert before - tree(folder) == gone
    assert kept_files.verify(folder) == []


@pytest.mark.parametrize("name", KEPT)
def test_bytes_that_changed_behind_an_unchanged_time_are_seen(folder, name):
    path = folder / name
    flip(path, keep_time=True)
    (line,) = kept_files.verify(folder)
    assert str(path) in line and not path.exists()


def test_beyond_so_many_bytes_they_are_seen_when_asked(folder, monkeypatch):
    small, large = folder / "measurements/row.json", folder / KEPT[0]
    monkeypatch.setattr(kept_files, "_HASHED", large.stat().st_size - 1)
    for path in (small, large):
        flip(path, keep_time=True)
    (line,) = kept_files.verify(folder)
    assert str(small) in line and large.exists()
    (line,) = kept_files.verify(folder, thorough=True)
    assert str(large) in line and not large.exists()


def test_a_touched_file_is_hashed_and_stays(folder):
    os.utime(folder / KEPT[0])
    assert kept_files.verify(folder) == [] and (folder / KEPT[0]).exists()


@pytest.mark.parametrize("name", ["artefacts/new.safetensors", "measurements/new.json"])
def test_a_file_nobody_recorded_is_taken_if_it_is_whole(folder, name):
    path = folder / name
    source = "artefacts/activations.safetensors" if "safetensors" in name else "03/result.json"
    path.write_bytes((folder / source).read_bytes())
    assert kept_files.verify(folder) == []
    other = path.with_stem("cut")
    other.write_bytes(path.read_bytes()[:-10])
    (line,) = kept_files.verify(folder)
    assert str(other) in line and not other.exists() and path.exists()


def test_what_a_job_writes_is_recorded_in_the_folder_of_its_batch(folder):
    (folder / kept_files.BATCH_LOCK).touch()
    with kept_files.recording(folder / "03"):
        files.write_json(folder / "measurements/row.json", {"value": [1]})
    assert kept_files.verify(folder) == []
    assert not (folder / "03" / kept_files.MANIFEST).exists()


def test_what_a_failed_job_has_finished_is_recorded(folder):
    with pytest.raises(KeyError), kept_files.recording(folder):
        files.write_json(folder / "measurements/row.json", {"value": [1]})
        raise KeyError
    assert kept_files.verify(folder) == []


def test_a_job_does_not_vouch_for_what_was_altered_before_it(folder):
    path = folder / KEPT[0]
    flip(path)
    os.utime(path, (time.time() - 60,) * 2)
    with kept_files.recording(folder):
        files.write_json(folder / "measurements/row.json", {"value": [1]})
    (line,) = kept_files.verify(folder)
    assert str(path) in line


def test_a_job_killed_on_the_way_has_recorded_what_it_finished(folder):
    code = (
        "import sys, time; from dfrot_lab import files, kept_files; kept_files._PERIOD = 0.2\n"
        "with kept_files.recording(sys.argv[1]):\n"
        "    files.write_json(sys.argv[1] + '/measurements/row.json', {'value': [1]})\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    job = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert job.stdout.readline() == b"written\n"
    wanted = files.sha256(folder / "measurements/row.json")
    for _ in range(100):
        if kept_files._read(folder)[0]["measurements/row.json"]["sha256"] == wanted:
            break
        time.sleep(0.1)
    job.kill()
    job.wait()
    assert kept_files.verify(folder) == []
    assert (folder / "measurements/row.json").exists()


def test_a_damaged_manifest_is_said_and_made_anew(folder):
    truncate(folder / kept_files.MANIFEST)
    os.truncate(folder / kept_files.MANIFEST, 100)
    (line,) = kept_files.verify(folder)
    assert "damaged" in line
    assert set(KEPT) <= set(files.read_json(folder / kept_files.MANIFEST))


def test_what_was_half_written_goes_unless_somebody_writes_it(folder):
    left = [
        folder / "artefacts/hessians/.partial-layer-000.safetensors-x.safetensors",
        folder / "measurements/.partial-row.json-x.json",
        folder / ".partial-.manifest.json-x.json",
    ]
    for path in left:
        path.write_text("{")
    (folder / ".locks").mkdir()
    with FileLock(folder / ".locks" / "hessians.lock"):
        kept_files.verify(folder)
        assert [path.exists() for path in left] == [True, True, False]
    kept_files.verify(folder)
    assert not any(path.exists() for path in left)


def test_jobs_are_waited_for(folder):
    said, order = [], []

    def job():
        with kept_files.recording(folder):
            started.set()
            time.sleep(0.5)
            order.append("job")

    started = threading.Event()
    thread = threading.Thread(target=job)
    thread.start()
    started.wait()
    with kept_files.no_jobs(folder, said.append):
        order.append("batch")
    thread.join()
    assert order == ["job", "batch"] and len(said) == 1 and str(folder) in said[0]

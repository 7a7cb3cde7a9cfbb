"""Manifests: SHA-256 of what was published and of what jobs have kept, recomputed.

`SHA256SUMS` has the format of coreutils, so `sha256sum -c SHA256SUMS` in its folder checks it too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dfrot_lab import assets, files, kept_files

__all__ = [
    "NAME", "ManifestError", "check", "check_assets", "check_inputs", "check_kept", "write",
]  # fmt: skip

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class ManifestError(ValueError):
    """A manifest that is missing or malformed; one line: what, where, what to do."""


def write(folder: str | Path, published: Iterable[str] | None = None) -> Path:
    """Write folder/SHA256SUMS over every file below `folder`, hidden ones and itself left out.

    published: the subfolders, and files beside them, that are new; what the manifest says of the others
    stays, so that publishing one notebook does not bless what was altered in another. None, or no manifest
    yet: all of them.
    """
    folder = Path(folder)
    found = {p.relative_to(folder).as_posix(): p for p in _below(folder)}
    lines = {}
    if published is not None and (folder / NAME).is_file():
        new = set(published)
        lines = {k: v for k, v in _read(folder / NAME).items() if k.split("/")[0] not in new}
        found = {k: p for k, p in found.items() if k.split("/")[0] in new}
    lines |= {name: files.sha256(p) for name, p in found.items()}
    with files.atomic(folder / NAME) as partial:
        text = "".join(f"{digest}  {name}\n" for name, digest in sorted(lines.items()))
        partial.write_text(text, encoding="utf-8")
    return folder / NAME


def check(folder: str | Path) -> dict[str, str]:
    """File → what is wrong with it ("altered", "missing", "not listed"); empty where all is well.

    Raises ManifestError where the manifest is missing or a line of it cannot be read.
    """
    folder = Path(folder)
    listed = _read(folder / NAME)
    present = {p.relative_to(folder).as_posix(): p for p in _below(folder)}
    wrong = dict.fromkeys(present.keys() - listed.keys(), "not listed")
    for name, digest in listed.items():
        if name not in present:
            wrong[name] = "missing"
        elif files.sha256(present[name]) != digest:
            wrong[name] = "altered"
    return dict(sorted(wrong.items()))


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        raise ManifestError(
            f"{path} is missing or damaged: restore it, or write it with `dfrot-lab publish`"
        ) from None
    listed = {}
    for number, line in enumerate(lines, 1):
        if not (found := _LINE.fullmatch(line)):
            raise ManifestError(f"{path}, line {number}, is no hash and file: restore it")
        listed[found[2]] = found[1]
    return listed


def check_assets(hashes: dict[str, str]) -> dict[str, str]:
    """Asset → what is wrong with it; hashes: as recorded. The cached files are hashed anew."""
    wrong = {}
    for name, digest in hashes.items():
        if name not in assets.ASSETS:
            wrong[name] = "unknown to this version"
        elif digest != assets.ASSETS[name].sha256:
            wrong[name] = (
                f"recorded as {digest[:12]}…, pinned as {assets.ASSETS[name].sha256[:12]}…"
            )
        else:
            try:
                assets.path(name)
            except assets.AssetError as error:
                wrong[name] = str(error)
    return wrong


def check_kept(folder: str | Path) -> tuple[dict[str, str], str]:
    """(file → "altered", "missing", "truncated" or "damaged"; what holds of the rest, "" if of nothing).

    Every artefact, measurement and result is hashed and held against what the jobs recorded
    (`kept_files`); for what nobody recorded there is its length.
    """
    found = kept_files.check(kept_files.root(folder))
    good, new = (sum(v == word for v in found.values()) for word in ("recorded", "new"))
    said = f"{good} artefacts, measurements and results as in {kept_files.MANIFEST}"
    if new:
        said += f"; {new} more that nobody recorded, of the right length"
    wrong = {k: v for k, v in found.items() if v not in ("recorded", "new")}
    return wrong, said if good else ""


def check_inputs(folder: str | Path, tokens: dict[str, str]) -> dict[str, str]:
    """File of folder/artefacts → what in it is not what was recorded elsewhere.

    assets.json has to hold the pinned hashes; tokens, notebook → hash of its calibration tokens, that of
    the activations' metadata. Hashes of the files themselves: `check_kept`.
    """
    home, wrong = Path(folder) / "artefacts", {}
    for name, digest in _listed(home / "assets.json", wrong).items():
        if (
            "/" in name
        ):  # a model of the hub and its commit: the hub's own cache is hashed by itself
            continue
        if name not in assets.ASSETS or digest != assets.ASSETS[name].sha256:
            wrong["assets.json"] = f"records {name} as {digest}, which is not what is pinned"
    activations = home / "activations.safetensors"
    if activations.is_file():
        about = _about(activations)
        if about is None:
            wrong[activations.name] = "damaged"
        elif unlike := [n for n, digest in tokens.items() if digest != about.get("tokens")]:
            wrong[activations.name] = (
                f"collected on other tokens than recorded in {', '.join(unlike)}"
            )
    return wrong


def _listed(path: Path, wrong: dict[str, str]) -> dict[str, str]:
    """Name → hash in `path`; {} where it is not there, and where it is damaged, which `wrong` then says."""
    try:
        return dict(files.read_json(path))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        wrong[path.name] = "damaged"
        return {}


def _about(file: Path) -> dict[str, Any] | None:
    """What our metadata of a safetensors file says; None where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as f:
            return json.loads((f.metadata() or {}).get("dfrot", "{}"))
    except (SafetensorError, OSError, ValueError):
        return None


def _below(folder: Path) -> Iterator[Path]:
    for p in sorted(folder.rglob("*")):
        inside = p.relative_to(folder)
        if (
            p.is_file()
            and inside.as_posix() != NAME
            and not any(part.startswith(".") for part in inside.parts)
        ):
            yield p

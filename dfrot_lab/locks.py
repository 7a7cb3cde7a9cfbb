"""Lock: exact versions of everything the project needs, as installed here when its figures were made.

requirements.lock has a line `name==version` for each distribution, so it serves pip as constraints:

    PIP_CONSTRAINT=requirements.lock make figures

Only what a platform asks for is then installed, so that one file serves Linux and macOS, CPU and CUDA. Local
parts of versions (2.13.0+cpu) are left out: they name a build. So is what a CUDA build of torch brings along,
one exact version of each, triton among them: no published figure uses it.
"""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dfrot_lab import files

__all__ = ["NAME", "LockError", "closure", "free", "read", "requirements", "write"]

NAME = "requirements.lock"
EXTRAS = ("test",)  # what `make` installs beside the project itself
FREE = ("triton", "nvidia-", "cuda-")  # beginnings of names


class LockError(ValueError):
    """Something that cannot be locked; one line: what, which value, what to do."""


def requirements(root: Path, extras: Iterable[str] = EXTRAS) -> list[Requirement]:
    """What pyproject.toml in `root` asks for, with those extras."""
    path = root / "pyproject.toml"
    if not path.is_file():
        raise LockError(f"no pyproject.toml in {root}: run this from a checkout of the project")
    project = tomllib.loads(path.read_text())["project"]
    asked, todo = [Requirement(r) for r in project["dependencies"]], list(extras)
    while todo:
        for r in map(Requirement, project["optional-dependencies"][todo.pop(0)]):
            if r.name == project["name"]:  # an extra that has another in it
                todo += sorted(r.extras)
            else:
                asked.append(r)
    return asked


def closure(asked: Iterable[Requirement]) -> dict[str, str]:
    """Name → version installed here, of all that is asked for and all that those need in turn.

    Markers are those of this platform, and what is `free` is left out. LockError for what is missing, or
    of a version not asked for.
    """
    found: dict[str, str] = {}
    todo = [r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    seen = set()
    while todo:
        r = todo.pop()
        if str(r) in seen:
            continue
        seen.add(str(r))
        if free(r.name):
            continue
        try:
            installed = distribution(r.name)
        except PackageNotFoundError:
            raise LockError(
                f"{r.name} is needed and not installed here: run `make setup`"
            ) from None
        if not r.specifier.contains(installed.version, prereleases=True):
            raise LockError(
                f"{r.name} {installed.version} is installed where {r.specifier} is needed: "
                "make the environment anew with `make clean setup`"
            )
        found[canonicalize_name(r.name)] = Version(installed.version).public
        for needed in map(Requirement, installed.requires or []):
            extras = ("", *r.extras)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                todo.append(needed)
    return dict(sorted(found.items()))


def free(name: str) -> bool:
    """Whether the version of distribution `name` is left to torch."""
    return canonicalize_name(name).startswith(FREE)


def write(root: Path) -> Path:
    """Write the lock of the project in `root`, atomically. Returns its path; raises as `closure`."""
    lines = [
        "# Exact versions for the published figures; `make lock` writes this file.",
        f"# Made with Python {platform.python_version()} on {platform.system()} {platform.machine()}; use: "
        f"PIP_CONSTRAINT={NAME} make figures",
        *(f"{name}=={version}" for name, version in closure(requirements(root)).items()),
    ]
    with files.atomic(root / NAME) as partial:
        partial.write_text("\n".join(lines) + "\n")
    return root / NAME


def read(path: Path) -> dict[str, str]:
    """Name → version of a lock; LockError, naming the line, for anything but `name==version`."""
    found = {}
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, version = line.partition("==")
        if not version or canonicalize_name(name) != name or name in found:
            raise LockError(f"{path} has the line {line!r}: use name==version, each name once")
        found[name] = version
    return found

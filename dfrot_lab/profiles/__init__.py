"""Profiles: named sets of notebook parameters, one YAML file each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dfrot_lab.files import project_root

__all__ = ["ProfileError", "check", "load", "names"]

_HERE = Path(__file__).resolve().parent
_SECTIONS = ("base", "common", "notebooks", "rotations", "resources")
STARTS = ("RH", "RO")  # of rotations that are refined


class ProfileError(ValueError):
    """A profile that is unknown or malformed; one line: what, which value, what to do."""


def names() -> list[str]:
    """The profiles that come with the package."""
    return sorted(p.stem for p in _HERE.glob("*.yml"))


def path(profile: str) -> Path:
    """The YAML file of a packaged profile, or of a profile given as a path."""
    file = Path(profile) if profile.endswith((".yml", ".yaml")) else _HERE / f"{profile}.yml"
    if not file.is_file():
        raise ProfileError(
            f"profile {profile!r} is unknown: use {', '.join(names())}, or a .yml file"
        )
    return file


def load(profile: str) -> dict[str, Any]:
    """The profile as a dict of its sections; a `base` profile fills gaps, `demo` if a file names none.

    Single parameters are filled in, of a notebook's section too. A notebook may be named by its number
    alone ('03'), as for `dfrot-lab run`; here it has its full name. resources: mem_mb (MiB) and runtime
    (minutes) of a job in a batch, in place of the demo model's.
    """
    try:
        content = yaml.safe_load(path(profile).read_text()) or {}
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ProfileError(f"profile {profile!r} is not YAML: {said}") from error
    if not isinstance(content, dict):
        raise ProfileError(f"profile {profile!r} is not a mapping: use {sorted(_SECTIONS)} as keys")
    unknown = set(content) - set(_SECTIONS)
    if unknown:
        raise ProfileError(
            f"profile {profile!r} has unknown sections {sorted(unknown)}: use {sorted(_SECTIONS)}"
        )
    found = {section: content.get(section) or {} for section in _SECTIONS}
    for section in ("common", "notebooks", "rotations", "resources"):
        if not isinstance(found[section], dict):
            raise ProfileError(
                f"profile {profile!r}: {section} = {found[section]!r} is not a mapping of names to values"
            )
    # what a file leaves out are the notebooks' own values, and those are the demo's
    base = found["base"] or ("demo" if path(profile).resolve().parent != _HERE else None)
    below = load(base) if base else None
    known = [p.stem for p in sorted((project_root() / "notebooks").glob("[0-9]*.ipynb"))]
    known += below["notebooks"] if below else []
    found["notebooks"] = _in_full(profile, found["notebooks"], known)
    if below:
        for name, parameters in below["notebooks"].items():
            found["notebooks"][name] = parameters | found["notebooks"].get(name, {})
        for section in ("common", "rotations", "resources"):
            found[section] = below[section] | found[section]
    amounts = found["resources"]
    if set(amounts) - {"mem_mb", "runtime"} or not all(type(v) is int for v in amounts.values()):
        raise ProfileError(
            f"profile {profile!r}: resources = {amounts!r}: use mem_mb (MiB) and runtime (minutes)"
        )
    return found


def _in_full(profile: str, sections: dict[Any, Any], known: list[str]) -> dict[str, Any]:
    """`sections` under the full names in `known`; a number without quotes is an int in YAML."""
    out: dict[str, Any] = {}
    for name, parameters in sections.items():
        text = f"{name:02d}" if isinstance(name, int) else str(name)
        full = next((k for k in known if text in (k, k.split("_")[0])), text)
        if full in out:
            raise ProfileError(f"profile {profile!r} names notebook {full} twice: join the two")
        if not isinstance(parameters, dict | None):
            raise ProfileError(
                f"profile {profile!r}: notebook {text} = {parameters!r} is not a mapping of names to values"
            )
        out[full] = parameters or {}
    return out


def _of_notebook(
    profile: str, content: dict[str, Any], notebook: str, known: set[str]
) -> dict[str, Any]:
    own = content["notebooks"].get(notebook, {})
    if set(own) - known:
        raise ProfileError(
            f"profile {profile!r} sets {sorted(set(own) - known)} for {notebook}, which has no such "
            f"parameter: use {sorted(known)}"
        )
    return {k: v for k, v in content["common"].items() if k in known} | own


def check(profile: str, known: dict[str, set[str]]) -> dict[str, dict[str, Any]]:
    """ProfileError unless every name in `profile` is a notebook's or a parameter of some notebook.

    known: notebook → its parameters. Returns what the profile sets for each.
    """
    content = load(profile)
    stray = set(content["notebooks"]) - set(known)
    if stray:
        raise ProfileError(
            f"profile {profile!r} names notebooks {sorted(stray)}: use {sorted(known)}"
        )
    every = set().union(*known.values())
    stray = set(content["common"]) - every
    if stray:
        raise ProfileError(
            f"profile {profile!r} sets {sorted(stray)}, a parameter of no notebook: use {sorted(every)}"
        )
    starts = content["rotations"].get("starts", [])
    if not isinstance(starts, list) or not all(start in STARTS for start in starts):
        raise ProfileError(
            f"profile {profile!r}: rotations: starts = {starts!r}: use a list of {', '.join(STARTS)}"
        )
    return {name: _of_notebook(profile, content, name, own) for name, own in known.items()}

"""Owner: the model that a rotation was made for, and no other.

Two models of one width take each other's R1 without a complaint from any shape, and so do two revisions
of one model. Whatever merges a rotation from a file asks here first.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dfrot_lab import assets, checkpoints, files, hub, models
from dfrot_lab.models import ModelError
from dfrot_lab.rotations import RotationError

__all__ = ["Owner", "check", "fingerprint", "of"]

NUMBERS = 64  # of the first and of the last row of a tensor, in its fingerprint
_MAKE = "`dfrot-lab optimize --out`, `dfrot-lab export rotation` or `dfrot-lab import-rotation`"


@dataclass(frozen=True)
class Owner:
    """A model by name, and by what tells its revisions apart.

    revision: the commit on the hub, the SHA-256 of a packaged asset or a GGUF, None for others;
    fingerprint: see `fingerprint`, None for weights that are not there as safetensors.
    """

    model: str
    revision: str | None = None
    fingerprint: str | None = None

    @property
    def about(self) -> dict[str, Any]:
        """As metadata of a rotation file."""
        return asdict(self)


def of(model: str) -> Owner:
    """The Owner that `model` (see `models.load`) is; ModelError as `models.load_config`."""
    if model.startswith("tiny:"):
        with tempfile.TemporaryDirectory() as folder:
            models.load(model, fold=False).save_pretrained(folder)
            return Owner(model, None, fingerprint(folder))
    if (revision := hub.commit(model)) is not None:
        folder = hub.snapshot(model)
    else:
        folder = Path(models.load_config(model).name_or_path)
        if model == "demo":
            revision = assets.ASSETS["smollm2"].sha256
        elif Path(model).is_file():
            revision = files.sha256(model)
    try:
        return Owner(model, revision, fingerprint(folder))
    except ModelError:  # weights in another form, such as .bin: the revision or the name decides
        return Owner(model, revision)


@torch.no_grad()
def fingerprint(folder: str | Path) -> str:
    """SHA-256 over every tensor's name, shape, and ends of its first and last row, read as fp32.

    It tells models, fine-tunings and revisions apart from a few kilobytes of a checkpoint of any size,
    however it is cut into shards. ModelError for a folder without a whole safetensors checkpoint.
    """
    parts = {}
    for shard in checkpoints.shards(folder):
        with checkpoints.open_shard(Path(folder) / shard) as f:
            for name in f.keys():  # noqa: SIM118 (no mapping)
                part = f.get_slice(name)
                ends = [part[:1].flatten(), part[-1:].flatten()]
                if len(part.get_shape()) == 1:
                    ends = [part[:NUMBERS]]
                numbers = torch.cat([e[:NUMBERS] for e in ends]).float()
                parts[name] = f"{name}{part.get_shape()}".encode() + numbers.numpy().tobytes()
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(parts[name])
    return digest.hexdigest()


def check(path: str | Path, known: dict[str, Any], owner: Owner) -> None:
    """RotationError unless the rotation in `path`, of metadata `known`, was made for `owner`.

    Where both have a fingerprint it decides, whatever the names; else the revision and the name. A file
    that has nothing to compare is let by only where the owner has neither; then the name decides.
    """
    ours = owner.about
    if known.get("model") is None:
        raise RotationError(
            f"{path} names no model, so that nobody can tell whether it belongs to {owner.model!r}: make "
            f"it with {_MAKE}"
        )
    common = [n for n in ("fingerprint", "revision") if None not in (known.get(n), ours[n])]
    if not common and (owner.fingerprint or owner.revision):
        raise RotationError(
            f"{path} says no fingerprint or revision of the {known['model']!r} it was made for that could be "
            f"compared with {owner.model!r} as it is now: make it with {_MAKE}"
        )
    for name in ["fingerprint"] if "fingerprint" in common else [*common, "model"]:
        if known[name] != ours[name]:
            raise RotationError(
                f"{path} was made for {known['model']!r}: its {name} is {known[name]}, that of "
                f"{owner.model!r} is {ours[name]}; use a rotation made for this model and revision"
            )

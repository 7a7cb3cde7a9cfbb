"""Source: the checkpoint an export starts from, and the rotation that may be merged into it.

A rotation belongs to one model at one revision (`dfrot_lab.owners`); an export refuses any other, and a
checkpoint that is rotated or quantized already.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from dfrot_lab import assets, checkpoints, files, hub, models, rotation_files, rotations, staging
from dfrot_lab.owners import Owner, fingerprint
from dfrot_lab.rotations import Rotations

__all__ = [
    "LEFT_OUT",
    "ExportError",
    "Recipe",
    "Source",
    "fingerprint",
    "from_hub",
    "opened",
    "recipe",
    "record",
    "short",
]

LEFT_OUT = {
    "R3": "an online Hadamard on queries and keys, before a quantized KV cache",
    "R4": "an online Hadamard before down_proj, which no plain linear layer holds",
}


class ExportError(ValueError):
    """What cannot be exported, or was and is wrong; one line: what, which value, what to do."""


@dataclass(frozen=True)
class Source:
    """An unrotated checkpoint in `folder`, what it is called, and the GGUF it came from, if any.

    revision: the commit on the hub, the SHA-256 of a packaged asset or a GGUF, None for a folder.
    """

    folder: Path
    model: str
    revision: str | None = None
    gguf: Path | None = None

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return json.loads((self.folder / "config.json").read_text())

    @property
    def merged(self) -> list[str]:
        """What was merged into it before: [] for a checkpoint as its authors published it."""
        return self.config.get("dfrot_merged") or []

    @property
    def fingerprint(self) -> str:
        """See `owners.fingerprint`."""
        return fingerprint(self.folder)

    @property
    def owner(self) -> Owner:
        """Whose rotations may be merged into it."""
        return Owner(self.model, self.revision, self.fingerprint)


@dataclass(frozen=True)
class Recipe:
    """R1 [d, d] and R2 [head_dim, head_dim] to merge, either None, and what is known of them."""

    R1: Tensor | None = None
    R2: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def rotations(self) -> Rotations:
        """For `checkpoints.merge` and `quantized_model.build`: never R4, which no file holds."""
        return Rotations(R1=self.R1, R2=self.R2)

    @property
    def parts(self) -> list[str]:
        """Names of what is to be merged."""
        return [n for n in ("R1", "R2") if getattr(self, n) is not None]


@contextmanager
def opened(model: str, revision: str | None = None, near: Path | None = None) -> Iterator[Source]:
    """The safetensors checkpoint of `model` (see `models.load`) as a folder; a copy goes afterwards.

    near: where a copy is made, for models that lie in another form. Raises ExportError for a revision
    where there is none and a quantized checkpoint, ModelError as `models.load`.
    """
    path = Path(model)
    packaged = model == "demo"  # whatever folder of that name there is
    remote = not packaged and not path.exists() and hub.on_hub(model)
    if revision and not remote:
        raise ExportError(
            f"revision = {revision!r}: only models on the hub have one, not {model!r}"
        )
    if path.is_dir() and not packaged:
        yield _checked(Source(path, model))
    elif remote:
        yield _checked(from_hub(model, revision))
    else:
        gguf = assets.path("smollm2") if packaged else path if path.is_file() else None
        with staging.beside((near or Path(tempfile.gettempdir())) / "source") as work:
            lm = models.load(model, fold=False)
            lm.save_pretrained(work / "model")
            models.load_tokenizer(model).save_pretrained(work / "model")
            del lm
            yield _checked(Source(work / "model", model, gguf and files.sha256(gguf), gguf))


def from_hub(model: str, revision: str | None = None) -> Source:
    """A model of the hub in its local cache, downloaded where it is not there; ModelError as `load`."""
    commit = hub.commit(model, revision)  # says plainly what is wrong
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return Source(
        Path(snapshot_download(model, revision=commit, allow_patterns=kinds)), model, commit
    )


def _checked(source: Source) -> Source:
    checkpoints.head_dim(source.folder)  # a folder without a config.json is told there
    models.check_plain(source.config, source.model)
    if "quantization_config" in source.config:
        raise ExportError(
            f"{source.model} is quantized already: export the floating-point checkpoint it was made of"
        )
    return source


def recipe(rotation: str, source: Source, *, seed: int = 0, r2: bool = True) -> Recipe:
    """What to merge into `source`: NR, RO, RH or RH2 by name, or a .safetensors file with R1 (and R2).

    r2: also turn the values of every head, by the file's R2 or a random Hadamard of seed 0. Raises
    RotationError for a checkpoint that was rotated before, and as `rotation_files.load` for a file that
    does not fit, or is not for this model or this revision.
    """
    if rotation == "NR":
        return Recipe()
    rotations.refuse_rotated(source.merged, source.model)
    d, size = source.config["hidden_size"], checkpoints.head_dim(source.folder)
    own, about = None, {}
    if rotation in rotations.START:
        r1 = rotations.START[rotation](d, seed)
        about = {"R1": {"rotation": rotation, "seed": seed}}
    else:
        found = rotation_files.load(rotation, source.owner, d, size)
        r1, own = found.R1, found.R2
        about = {"R1": short(found.about) | {"file_sha256": files.sha256(rotation)}}
    if r2:
        about["R2"] = {"rotation": "RH", "seed": 0} if own is None else {"file": "as R1"}
        own = rotations.random_hadamard(size) if own is None else own
    return Recipe(R1=r1, R2=own if r2 else None, about=about)


def short(known: dict[str, Any]) -> dict[str, Any]:
    """Metadata of a rotation without its log, of which the last loss stays."""
    log = known.get("log") or {}
    loss = {"loss": log["rotated"][-1]} if log.get("rotated") else {}
    return {k: v for k, v in known.items() if k != "log"} | loss


def record(source: Source, recipe: Recipe) -> dict[str, Any]:
    """What an export says of itself: the model, what was merged, where that came from, what is missing."""
    if source.merged and not recipe.parts and "dfrot_export" in source.config:
        return source.config["dfrot_export"]  # exported before, now in another format
    return {
        "dfrot_lab": version("dfrot-lab"),
        "model": source.model,
        "revision": source.revision,
        "fingerprint": source.fingerprint,
        "merged": [*source.merged, *(["gains"] if recipe.parts else []), *recipe.parts],
        **recipe.about,
        "left_out": LEFT_OUT if recipe.parts else {},
    }

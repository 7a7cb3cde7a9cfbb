"""Artefacts: model, text, activations, Hessians and rotations for one set of parameters.

Each is computed once and kept under `folder`: what a killed run has finished, the
next one takes up, and what one notebook has measured, another does not measure again. Each kept file
carries the parameters and the digest of the code it came from, and is made anew when they differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from dfrot_lab import (
    activations,
    assets,
    corpora,
    dfrot,
    files,
    hessians,
    hub,
    kept_files,
    models,
    owners,
    results,
    rotation_files,
    rotations,
)
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.refinements import LabError, Refinement, parse_rotation
from dfrot_lab.rotations import Rotations

__all__ = ["Artefacts"]

MODEL_CODE = (
    "dfrot_lab.architectures",
    "dfrot_lab.models",
    "dfrot_lab.dequantized",
    "dfrot_lab.tiny_models",
    "dfrot_lab.activations",
    "dfrot_lab.corpora",
    "dfrot_lab.wikipedia",
)
ROTATION_CODE = (
    "dfrot_kernels.hadamard",
    "dfrot_kernels.reference",
    "dfrot_kernels.backends",
    "dfrot_kernels.common",
    "dfrot_kernels.error",
    "dfrot_lab.quantizers",
    "dfrot_lab.massive",
    "dfrot_lab.objectives",
    "dfrot_lab.polar",
    "dfrot_lab.products",
    "dfrot_lab.rotations",
    "dfrot_lab.weighting",
    "dfrot_lab.dfrot",
)


@dataclass(frozen=True)
class Artefacts:
    """Parameters shared by all notebooks.

    model, dtype, device: see `models.load`; corpus: see `corpora.load`; seqlen: tokens a window; calibration:
    windows for R1, at offsets drawn by calibration_seed; iterations, rows and solver: of `dfrot.optimize`;
    clip_steps: of the weight clip search (0: none); weight_windows: calibration windows for GPTQ and static
    steps; folder: where everything goes, relative to the project; threads: of torch (a fixed number, since
    sums and so results depend on it). LabError for a number below 1 and an unknown dtype.
    """

    model: str = "demo"
    corpus: str = "demo"
    seqlen: int = 2048
    calibration: int = 1
    calibration_seed: int = 0
    iterations: int = 100
    rows: float = 1.0
    solver: str = "svd"
    clip_steps: int = 80
    weight_windows: int = 128
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    folder: str | Path = "results/demo"

    def __post_init__(self) -> None:
        for name in ("seqlen", "calibration", "iterations", "weight_windows", "threads"):
            if getattr(self, name) < 1:
                raise LabError(f"{name} = {getattr(self, name)}: use a positive number")
        if self.dtype not in models.DTYPES:
            raise LabError(f"dtype = {self.dtype!r}: use one of {', '.join(models.DTYPES)}")
        torch.set_num_threads(self.threads)
        object.__setattr__(self, "folder", files.project_root() / self.folder)

    # --- model and text ---------------------------------------------------------------------------

    @cached_property
    def lm(self) -> nn.Module:
        """The floating-point model, gains folded."""
        at = hub.commit(self.model)  # the one that kept files are named by
        return models.load(self.model, revision=at, dtype=self.dtype, device=self.device)

    @cached_property
    def tokenizer(self):
        """The model's tokenizer."""
        return models.load_tokenizer(self.model, revision=hub.commit(self.model))

    @cached_property
    def calibration_tokens(self) -> Tensor:
        """Tokens [calibration, seqlen] at random offsets of the calibration split."""
        return corpora.load(
            self.corpus, "calibration", self.tokenizer,
            windows=self.calibration, seqlen=self.seqlen, seed=self.calibration_seed,
        )  # fmt: skip

    @cached_property
    def _kept(self) -> dict[Any, Any]:
        """Values of this process: tokens by number of windows, rotations, the last model built."""
        return {}

    @cached_property
    def weight_tokens(self) -> Tensor:
        """Tokens [weight_windows, seqlen] of the calibration split, for GPTQ and static steps."""
        return corpora.load(
            self.corpus, "calibration", self.tokenizer,
            windows=self.weight_windows, seqlen=self.seqlen, seed=self.calibration_seed,
        )  # fmt: skip

    def sample(self, index: int) -> Artefacts:
        """The same lab with calibration sample `index`, in a folder of its own; shares the model."""
        other = replace(
            self, calibration_seed=index, folder=Path(self.folder) / "samples" / str(index)
        )
        return self._share(other)

    def evaluation_tokens(self, windows: int) -> Tensor:
        """The first `windows` windows [windows, seqlen] of the evaluation split; 0: all of it."""
        if ("tokens", windows) not in self._kept:
            self._kept["tokens", windows] = corpora.load(
                self.corpus, "evaluation", self.tokenizer,
                windows=windows or None, seqlen=self.seqlen,
            )  # fmt: skip
        return self._kept["tokens", windows]

    def held_out(self, site: str) -> Tensor:
        """The rows [seqlen, d] of `site` on the first evaluation window, which no rotation has seen."""
        if "held out" not in self._kept:
            found = activations.capture(self.lm, self.evaluation_tokens(1))
            self._kept["held out"] = {name: x[0].float().cpu() for _, name, x in found}
        self.activations.site(site)  # an unknown site is named there
        return self._kept["held out"][site].clone()

    @property
    def inputs(self) -> dict[str, Any]:
        """For provenance: the calibration tokens' hash and those of the packaged assets in use."""
        wanted = {
            "smollm2": self.model == "demo",
            "wikipedia": self.corpus == "demo",
            "lee": self.corpus == "lee",
        }
        used = {name: assets.ASSETS[name].sha256 for name, use in wanted.items() if use}
        return {"assets": used, "calibration_tokens": self.activations.metadata["tokens"]}

    @property
    def about(self) -> dict[str, Any]:
        """What the model and the text are, for the keys of kept files and for provenance."""
        return {
            "model": self.model,
            "corpus": self.corpus,
            "seqlen": self.seqlen,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }

    # --- artefacts --------------------------------------------------------------------------------

    @cached_property
    def activations(self) -> activations.Activations:
        """Norm outputs of the model on the calibration tokens, from `folder` or collected now.

        RotationError for a model that is rotated already: R1 would be refined for it and merged again.
        """
        path = Path(self.folder) / "artefacts" / "activations.safetensors"
        key = self._key(
            {"calibration": self.calibration, "seed": self.calibration_seed}, MODEL_CODE
        )
        with self._locked(path):
            if path.exists() and activations.load(path).metadata.get("key") == key:
                return activations.load(path)
            rotations.refuse_rotated(self.lm.config.dfrot_merged, self.model)
            about = {
                "key": key,
                "tokens": corpora.fingerprint(self.calibration_tokens),
            } | self.about
            return activations.collect(self.lm, self.calibration_tokens, path, about)

    @cached_property
    def hessians(self) -> hessians.Hessians:
        """Hessians of the floating-point model on `weight_tokens`, from `folder` or collected now."""
        folder = Path(self.folder) / "artefacts" / "hessians"
        code = (*MODEL_CODE, "dfrot_lab.gptq", "dfrot_lab.hessians")
        key = self._key({"windows": self.weight_windows, "seed": self.calibration_seed}, code)
        head_dim = models.layers(self.lm)[0].module.self_attn.head_dim
        with self._locked(folder):
            if (folder / "hessians.json").exists():
                found = hessians.load(folder, head_dim)
                if found.metadata.get("key") == key:
                    return found
                (folder / "hessians.json").unlink()
            return hessians.collect(self.lm, self.weight_tokens, folder, {"key": key} | self.about)

    def rotation(self, name: str, seed: int = 0, **options) -> Tensor | None:
        """R1 [d, d]: NR (None), RO, RH, RH2, DFRot(RH), DFRot(RO), or the path of a .safetensors file.

        options: see `rotation_file`. Raises RotationError for a file that does not fit the model, or was
        made for another model or revision (`owners.check`).
        """
        if name.endswith(".safetensors"):
            return self._from_file(name).R1
        kind, start = parse_rotation(name)
        if kind == "NR":
            return None
        if start is None:
            if (name, seed) not in self._kept:
                self._kept[name, seed] = rotations.START[kind](self.activations.d, seed)
            return self._kept[name, seed]
        return rotations.load(self.rotation_file(name, seed, **options), self.activations.d)[0]

    def rotations(self, name: str, seed: int = 0, **options) -> Rotations:
        """R1 by its name as for `rotation`, R4, and R2: the file's own if it has one, else a Hadamard."""
        r1 = self.rotation(name, seed, **options)
        standard = Rotations.standard(self.lm, r1)
        r2 = self._from_file(name).R2 if name.endswith(".safetensors") else None
        return standard if r2 is None else replace(standard, R2=r2)

    def _from_file(self, path: str) -> rotation_files.RotationFile:
        size = models.layers(self.lm)[0].module.self_attn.head_dim
        return rotation_files.load(path, self._owner, self.activations.d, size)

    @cached_property
    def _owner(self) -> owners.Owner:
        return owners.of(self.model)

    def rotated(self, x: Tensor, name: str, seed: int = 0, **options) -> Tensor:
        """x·R1 [rows, d] in the dtype of x, by the rotation's name; NR gives `x` itself."""
        r = self.rotation(name, seed, **options)
        return x if r is None else x @ r.to(x.dtype)

    def with_corpus(self, corpus: str) -> Artefacts:
        """The same lab on another corpus, in a folder of its own; shares the model."""
        other = replace(
            self, corpus=corpus, folder=Path(self.folder) / "corpora" / Path(corpus).stem
        )
        return self._share(other)

    def with_calibration(self, windows: int) -> Artefacts:
        """The same lab with so many calibration windows for R1, in a folder of its own; shares the model.

        As many normal rows are used as here, drawn from more text; massive rows all the same.
        """
        other = replace(
            self, calibration=windows, rows=self.rows * min(1.0, self.calibration / windows),
            folder=Path(self.folder) / "calibration" / str(windows),
        )  # fmt: skip
        return self._share(other)

    def _share(self, other: Artefacts) -> Artefacts:
        for shared in ("lm", "tokenizer"):
            other.__dict__[shared] = getattr(self, shared)
        return other

    def losses(self, name: str, seed: int = 0, **options) -> dict[str, Any]:
        """The `dfrot.Log` of a refined rotation, as a dict."""
        return rotations.load(self.rotation_file(name, seed, **options))[1]["log"]

    def rotation_file(self, name: str, seed: int = 0, **how: Any) -> Path:
        """The safetensors file of a refined R1, taken from artefacts/rotations or optimized now.

        name: DFRot(RH) or DFRot(RO); how: fields of `Refinement`, which has the published ones by default.
        """
        start, given = parse_rotation(name)[1], Refinement(**how)
        if start is None:
            raise LabError(f"rotation {name!r} is not refined: use DFRot(RH) or DFRot(RO)")
        stem, options = given.stem(start, f"-seed{seed}"), {"start": start, "seed": seed}
        begin = lambda: rotations.START[start](self.activations.d, seed)  # noqa: E731
        return self.refined(begin, given, stem, options)

    def refined(
        self,
        begin: Callable[[], Tensor],
        given: Refinement,
        stem: str,
        options: dict[str, Any],
        code: tuple[str, ...] = (),
    ) -> Path:
        """R1 refined from `begin()` [d, d], as artefacts/rotations/`stem`… .safetensors.

        options: what else its key depends on; code: modules besides those of every refinement.
        """
        steps = given.iterations or self.iterations
        options = options | {"iterations": steps, "rows": self.rows} | given.options
        options |= {"solver": self.solver} if self.solver != "svd" else {}
        stem += f"-{steps}steps" if steps != self.iterations else ""
        stem += f"-{self.solver}" if self.solver != "svd" else ""
        x = self.activations.spaced(given.sites) if given.sites else self.activations

        def make(key: str, checkpoint: Path) -> tuple[Tensor, dict[str, Any]]:
            r, log = dfrot.optimize(
                x, begin(), QuantSpec(symmetric=given.symmetric), given.weighting,
                iterations=steps, rows=self.rows, device=self.device, qr=given.qr,
                objective=given.objective, solver=self.solver, relax=given.relax, stop=given.stop,
                checkpoint=checkpoint, whose=key, progress=stem,
            )  # fmt: skip
            return r, {"log": asdict(log)} | options

        wanted = options | {"activations": x.metadata["key"]}
        return self.kept_rotation(stem, wanted, make, (*ROTATION_CODE, *code))

    def kept_rotation(
        self,
        stem: str,
        options: dict[str, Any],
        make: Callable[[str, Path], tuple[Tensor, dict[str, Any]]],
        code: tuple[str, ...],
    ) -> Path:
        """artefacts/rotations/`stem`.safetensors, with R1 and metadata from `make(key, checkpoint)`.

        Taken as it is where it was made by the same `options`, model, text and `code` (modules).
        """
        path = Path(self.folder) / "artefacts" / "rotations" / f"{stem}.safetensors"
        key = self._key(options, code)
        with self._locked(path):
            if path.exists() and rotations.load(path)[1].get("key") == key:
                return path
            r, about = make(key, path.with_suffix(".checkpoint"))
            # whose it is: the lab takes no file that does not say it
            return rotations.save(path, r, {"key": key} | about | self.about | self._owner.about)

    # --- keys -------------------------------------------------------------------------------------

    def _key(self, options: dict[str, Any], code: tuple[str, ...]) -> str:
        sources = [models.identity(self.model), corpora.identity(self.corpus)]
        text = json.dumps(
            [options, self.about, sources, results.code_digest(*code)], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Two notebooks that want the same value: one computes, the other waits and reads."""
        lock = Path(self.folder) / ".locks" / f"{path.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock), kept_files.replacing(path):
            files.sweep(path)
            yield

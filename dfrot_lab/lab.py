"""Lab: one set of parameters, and the values a notebook asks of it, each computed once.

Activations, rotations and perplexities are kept under `folder`: what a killed run has finished, the
next one takes up, and what one notebook has measured, another does not measure again. Each kept file
carries the parameters and the digest of the code it came from, and is made anew when they differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
    evaluation,
    files,
    models,
    quantized_model,
    results,
    rotations,
)
from dfrot_lab.quantizers import QuantSpec

__all__ = ["Lab", "LabError", "parse_rotation"]

_MODEL_CODE = (
    "dfrot_lab.models",
    "dfrot_lab.activations",
    "dfrot_lab.corpora",
    "dfrot_lab.wikipedia",
)
_ROTATION_CODE = (
    "dfrot_kernels.hadamard",
    "dfrot_kernels.reference",
    "dfrot_lab.massive",
    "dfrot_lab.rotations",
    "dfrot_lab.dfrot",
)
_PERPLEXITY_CODE = (
    *_ROTATION_CODE,
    "dfrot_lab.gptq",
    "dfrot_lab.kv_cache",
    "dfrot_lab.lab",
    "dfrot_lab.quantizers",
    "dfrot_lab.quantized_model",
    "dfrot_lab.evaluation",
)


class LabError(ValueError):
    """A parameter that makes no sense; one line: what, which value, what to do."""


def rotation_stem(
    start: str, seed: int, gamma: float, form: str = "sum", symmetric: bool = False
) -> str:
    """File name, without suffix, of a refined rotation."""
    return f"DFRot-{start}-gamma{gamma:g}-{form}-{'sym' if symmetric else 'asym'}-seed{seed}"


def parse_rotation(name: str) -> tuple[str, str | None]:
    """('DFRot', start) of 'DFRot(RH)' or 'DFRot(RO)', else (name, None); LabError if unknown."""
    if name in rotations.START:
        return name, None
    if name in ("DFRot(RH)", "DFRot(RO)"):
        return "DFRot", name[6:-1]
    known = [*rotations.START, "DFRot(RH)", "DFRot(RO)"]
    raise LabError(f"rotation {name!r} is unknown: use one of {', '.join(known)}")


@dataclass(frozen=True)
class Lab:
    """Parameters shared by all notebooks.

    model: see `models.load`; corpus: see `corpora.load`; seqlen: tokens a window; calibration: windows
    for R1; iterations and rows: of `dfrot.optimize`; clip_steps: of the weight clip search (0: none);
    folder: where everything goes, relative to the project; threads: of torch (a fixed number, since
    sums and so results depend on it).
    """

    model: str = "demo"
    corpus: str = "demo"
    seqlen: int = 2048
    calibration: int = 1
    calibration_seed: int = 0
    iterations: int = 100
    rows: float = 1.0
    clip_steps: int = 80
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    folder: str | Path = "results/demo"

    def __post_init__(self) -> None:
        for name in ("seqlen", "calibration", "iterations", "threads"):
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
        return models.load(self.model, dtype=self.dtype, device=self.device)

    @cached_property
    def tokenizer(self):
        """The model's tokenizer."""
        return models.load_tokenizer(self.model)

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

    def evaluation_tokens(self, windows: int) -> Tensor:
        """The first `windows` windows [windows, seqlen] of the evaluation split."""
        if ("tokens", windows) not in self._kept:
            self._kept["tokens", windows] = corpora.load(
                self.corpus, "evaluation", self.tokenizer, windows=windows, seqlen=self.seqlen
            )
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
        """Norm outputs of the model on the calibration tokens, from `folder` or collected now."""
        path = Path(self.folder) / "artefacts" / "activations.safetensors"
        key = self._key(
            {"calibration": self.calibration, "seed": self.calibration_seed}, _MODEL_CODE
        )
        with self._locked(path):
            if path.exists() and activations.load(path).metadata.get("key") == key:
                return activations.load(path)
            about = {
                "key": key,
                "tokens": corpora.fingerprint(self.calibration_tokens),
            } | self.about
            return activations.collect(self.lm, self.calibration_tokens, path, about)

    def rotation(self, name: str, seed: int = 0, **options) -> Tensor | None:
        """R1 [d, d]: NR (None), RO, RH, RH2, DFRot(RH), DFRot(RO), or the path of a .safetensors file.

        options: see `rotation_file`. Raises RotationError for a file that does not fit the model.
        """
        if name.endswith(".safetensors"):
            return rotations.load(name, self.activations.d)[0]
        kind, start = parse_rotation(name)
        if kind == "NR":
            return None
        if start is None:
            if (name, seed) not in self._kept:
                self._kept[name, seed] = rotations.START[kind](self.activations.d, seed)
            return self._kept[name, seed]
        return rotations.load(self.rotation_file(name, seed, **options), self.activations.d)[0]

    def rotated(self, x: Tensor, name: str, seed: int = 0, **options) -> Tensor:
        """x·R1 [rows, d] in the dtype of x, by the rotation's name; NR gives `x` itself."""
        r = self.rotation(name, seed, **options)
        return x if r is None else x @ r.to(x.dtype)

    def losses(self, name: str, seed: int = 0, **options) -> dict[str, Any]:
        """The `dfrot.Log` of a refined rotation, as a dict."""
        return rotations.load(self.rotation_file(name, seed, **options))[1]["log"]

    def rotation_file(
        self,
        name: str,
        seed: int = 0,
        *,
        gamma: float = 100.0,
        form: str = "sum",
        symmetric: bool = False,
    ) -> Path:
        """The safetensors file of a refined R1, taken from artefacts/rotations or optimized now.

        form, gamma: see `dfrot.Weighting`; symmetric: the quantizer in the loop, as released.
        """
        start = parse_rotation(name)[1]
        if start is None:
            raise LabError(f"rotation {name!r} is not refined: use DFRot(RH) or DFRot(RO)")
        weighting, spec = dfrot.Weighting(gamma=gamma, form=form), QuantSpec(symmetric=symmetric)
        options = {
            "start": start,
            "seed": seed,
            "gamma": str(float(gamma)),
            "form": form,
            "symmetric": symmetric,
        }
        options |= {"iterations": self.iterations, "rows": self.rows}
        stem = rotation_stem(start, seed, gamma, form, symmetric)
        path = Path(self.folder) / "artefacts" / "rotations" / f"{stem}.safetensors"
        x = self.activations
        key = self._key(options | {"activations": x.metadata["key"]}, _ROTATION_CODE)
        with self._locked(path):
            if path.exists() and rotations.load(path)[1].get("key") == key:
                return path
            r, log = dfrot.optimize(
                x, rotations.START[start](x.d, seed), spec, weighting,
                iterations=self.iterations, rows=self.rows, device=self.device,
                checkpoint=path.with_suffix(".checkpoint"), progress=stem,
            )  # fmt: skip
            return rotations.save(path, r, {"key": key, "log": asdict(log)} | options | self.about)

    def perplexity(
        self,
        name: str,
        seed: int = 0,
        *,
        bits: str = "16-4-16",
        keep: str = "none",
        windows: int = 4,
        gamma: float = 100.0,
    ) -> dict[str, Any]:
        """One row of a table: {rotation, seed, bits, keep, gamma, ppl, nll, kept}.

        kept: [window, position, token, sites] of each token that bypassed quantization somewhere.
        name "FP": the floating-point model. Kept in `folder`/measurements.
        """
        file = name.endswith(".safetensors")
        if name != "FP" and not file:
            parse_rotation(name)
        row = {"rotation": name, "seed": seed, "bits": bits, "keep": keep, "windows": windows}
        row |= {"gamma": str(float(gamma)) if name.startswith("DFRot") else None}
        options = row | ({"file": files.sha256(name)} if file else {})
        if quantized_model.ModelSpec.of(bits, keep=keep).weights:
            options["clip_steps"] = self.clip_steps
        if row["gamma"]:
            options |= {
                "calibration": [self.calibration, self.calibration_seed, self.iterations, self.rows]
            }
        key = self._key(options, (*_MODEL_CODE, *_PERPLEXITY_CODE))
        path = Path(self.folder) / "measurements" / f"{key[:24]}.json"
        with self._locked(path):
            if not path.exists():
                files.write_json(path, row | self._measure(name, seed, bits, keep, windows, gamma))
            found = files.read_json(path)
        return found | {"ppl": float(found["ppl"]), "nll": [float(v) for v in found["nll"]]}

    def _measure(self, name, seed, bits, keep, windows, gamma) -> dict[str, Any]:
        model = self.lm if name == "FP" else self._built(name, seed, bits, keep, gamma)
        nll, kept = [], []
        for i, window in enumerate(self.evaluation_tokens(windows)):
            nll.append(evaluation.window_nll(model, window))
            for position, sites in quantized_model.drain_kept(model) if name != "FP" else ():
                kept.append([i, position, self.tokenizer.decode([int(window[position])]), sites])
        return {"nll": nll, "ppl": evaluation.Perplexity(nll).value, "kept": kept}

    def _built(self, name, seed, bits, keep, gamma) -> nn.Module:
        """The quantized model; rows that differ in what is kept share the last one built."""
        spec = quantized_model.ModelSpec.of(bits, keep=keep, clip_steps=self.clip_steps)
        rotation = rotations.Rotations.standard(self.lm, self.rotation(name, seed, gamma=gamma))
        which = (name, seed, bits, gamma)
        if self._kept.get("which") != which:
            self._kept.pop("built", None)  # before the next one is made: two would not fit
            self._kept["built"] = quantized_model.build(self.lm, rotation, spec)
            self._kept["which"] = which
        return quantized_model.keep_tokens(self._kept["built"], rotation, spec)

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
        with FileLock(lock):
            files.sweep(path)
            yield

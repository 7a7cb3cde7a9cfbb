"""Lab: what a notebook asks of one set of parameters, each value measured once.

Perplexities are kept under `folder`, as the artefacts they rest on: what a killed run has finished, the
next one takes up, and what one notebook has measured, another does not measure again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dfrot_lab import evaluation, files, quantized_model, results
from dfrot_lab.artefacts import MODEL_CODE, ROTATION_CODE, Artefacts
from dfrot_lab.quantized_model import ModelSpec
from dfrot_lab.refinements import LabError, parse_rotation

__all__ = ["Lab", "LabError", "parse_rotation"]

METHODS = ("rtn", "gptq", "gptq-shared")
CODE = (  # what a measurement rests on
    *MODEL_CODE,
    *ROTATION_CODE,
    "dfrot_lab.gptq",
    "dfrot_lab.hessians",
    "dfrot_lab.kv_cache",
    "dfrot_lab.refinements",
    "dfrot_lab.artefacts",
    "dfrot_lab.lab",
    "dfrot_lab.linears",
    "dfrot_lab.quantized_model",
    "dfrot_lab.evaluation",
)


@dataclass(frozen=True)
class Lab(Artefacts):
    """The artefacts of a set of parameters (see `Artefacts`) and the quantized models made of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # as it is now: what is loaded stays what runs, whatever is edited meanwhile
        loaded = [n for n in list(sys.modules) if n.startswith(("dfrot_lab.", "dfrot_kernels."))]
        results.code_digest(*CODE, *loaded)

    def quantized(
        self,
        name: str,
        seed: int = 0,
        *,
        bits: str = "16-4-16",
        keep: str = "none",
        method: str = "rtn",
        gamma: float = 100.0,
    ) -> nn.Module:
        """The quantized model of `perplexity`'s rows; the last one built is reused."""
        return self._built(name, seed, self.spec(bits, keep, method), method, gamma)

    def perplexity(
        self,
        name: str,
        seed: int = 0,
        *,
        bits: str = "16-4-16",
        keep: str = "none",
        windows: int = 4,
        first: int = 0,
        gamma: float = 100.0,
        method: str = "rtn",
        **activations: Any,
    ) -> dict[str, Any]:
        """One row of a table: {rotation, seed, bits, keep, gamma, method, ppl, nll, kept}.

        method: of the weights, where `bits` quantizes them: "rtn", "gptq" as published, or "gptq-shared",
        from one set of floating-point Hessians. windows: 0 for the whole split; first: of them, those before
        it are left out. activations: per, group_size, clip of `ModelSpec.of`.
        kept: [window, position, token, sites] of each token that bypassed quantization somewhere.
        name "FP": the floating-point model. Kept in `folder`/measurements, window by window: those that are
        there are not measured again, whichever they are. LabError for an unknown rotation or method, or a
        `first` beyond the windows; ValueError for bits as `ModelSpec.of`.
        """
        if name != "FP" and not name.endswith(".safetensors"):
            parse_rotation(name)
        windows = windows or len(self.evaluation_tokens(0))
        if not 0 <= first < windows:
            raise LabError(f"first = {first}: use 0 to {windows - 1}, there are {windows} windows")
        row = {"rotation": name, "seed": seed, "bits": bits, "keep": keep}
        row |= {"gamma": str(float(gamma)) if name.startswith("DFRot(") else None}
        spec = self.spec(bits, keep, method, **activations)
        row |= {"method": method if spec.weights else None} | activations
        key = self._key(row | self.rests_on(name, spec, method), CODE)
        path = Path(self.folder) / "measurements" / f"{key[:24]}.json"
        with self._locked(path):
            found = files.read_json(path) if path.exists() else {"nll": [], "kept": []}
            found["nll"] += [None] * (windows - len(found["nll"]))
            if missing := [i for i in range(first, windows) if found["nll"][i] is None]:
                model = self.lm if name == "FP" else self._built(name, seed, spec, method, gamma)
                self._measure(model, missing, found)
                files.write_json(path, row | found)
        nll = [float(v) for v in found["nll"][first:windows]]
        kept = [k for k in found["kept"] if first <= k[0] < windows]
        measured = {"nll": nll, "ppl": evaluation.Perplexity(nll).value, "kept": kept}
        return row | {"windows": windows - first} | measured

    @staticmethod
    def told(name: str) -> str:
        """What tells a rotation from others: its name; of a file, which may change, its SHA-256."""
        return files.sha256(name) if name.endswith(".safetensors") else name

    def rests_on(self, name: str, spec: ModelSpec, method: str) -> dict[str, Any]:
        """What the quantized model of a row rests on besides its own values, for the key of what is kept."""
        out: dict[str, Any] = {}
        if (told := self.told(name)) != name:
            out["file"] = told
        if spec.weights:
            out["clip_steps"] = self.clip_steps
        if spec.static or (spec.weights and method != "rtn"):
            out["weight_windows"] = [self.weight_windows, self.calibration_seed]
        if name.startswith("DFRot("):
            of = [self.calibration, self.calibration_seed, self.iterations, self.rows]
            out["calibration"] = of + ([self.solver] if self.solver != "svd" else [])
        return out

    def kept(
        self,
        kind: str,
        options: dict[str, Any],
        measure: Callable[[], dict],
        code: Sequence[str] = (),
    ) -> dict[str, Any]:
        """What `measure` gives, from `folder`/measurements or measured now: by `options` and the code.

        code: modules that it rests on besides those of a perplexity.
        """
        key = self._key(options, (*CODE, *code))
        path = Path(self.folder) / "measurements" / f"{kind}-{key[:24]}.json"
        with self._locked(path):
            if not path.exists():
                files.write_json(path, measure())
            return files.read_json(path)

    def spec(self, bits: str, keep: str, method: str, **activations: Any) -> ModelSpec:
        """What is quantized in a row of `perplexity`, with this lab's clip steps; LabError for the method."""
        if method not in METHODS:
            raise LabError(f"method = {method!r}: use one of {', '.join(METHODS)}")
        kind = method.removesuffix("-shared")
        return ModelSpec.of(bits, keep=keep, clip_steps=self.clip_steps, method=kind, **activations)

    def _measure(self, model: nn.Module, missing: list[int], found: dict[str, list]) -> None:
        """Put into `found` what the `missing` windows give, in order."""
        tokens = self.evaluation_tokens(missing[-1] + 1)
        for i in missing:
            found["nll"][i] = evaluation.window_nll(model, tokens[i])
            for position, sites in (
                quantized_model.drain_kept(model) if model is not self.lm else ()
            ):
                word = self.tokenizer.decode([int(tokens[i, position])])
                found["kept"].append([i, position, word, sites])
        found["kept"].sort(key=lambda k: k[0])

    def _built(self, name, seed, spec, method, gamma) -> nn.Module:
        """The quantized model; rows that differ in activations or KV cache share the last one built."""
        rotation = self.rotations(name, seed, gamma=gamma)
        which = (self.told(name), seed, spec.weights, method if spec.weights else None, gamma)
        exact = spec.weights is not None and method == "gptq"
        tokens = self.weight_tokens if exact or spec.static else None
        if self._kept.get("which") == which:
            return quantized_model.requantize(
                self._kept["built"], rotation, spec, calibration=tokens
            )
        self._kept.pop("built", None)  # before the next one is made: two would not fit
        self._kept.pop("which", None)
        shared = self.hessians if spec.weights is not None and method == "gptq-shared" else None
        self._kept["built"] = quantized_model.build(
            self.lm, rotation, spec, calibration=tokens, hessians=shared
        )
        self._kept["which"] = which
        return self._kept["built"]

"""Alternatives, of study 09: the task loss as the expensive reference, a prefix in the cache, R2 refined."""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dfrot_lab import (
    cayley,
    corpora,
    evaluation,
    heads,
    models,
    prefix,
    quantized_model,
    rotations,
)
from dfrot_lab import objectives as interface
from dfrot_lab.evaluation import spread
from dfrot_lab.lab import CODE, Lab, LabError
from dfrot_lab.presets import PRESETS
from dfrot_lab.quantized_model import ModelSpec
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.rotations import Rotations
from dfrot_lab.studies import unseen
from dfrot_lab.studies.objectives import LABELS
from dfrot_lab.tables import Table

__all__ = ["by_prefix", "by_task_loss", "by_values", "values_table"]


def by_task_loss(
    lab: Lab, starts: list[str], seed: int, steps: int, length: int, which: slice
) -> list[dict[str, Any]]:
    """SpinQuant's way: Cayley steps on the task loss from each of `starts`, and its budget.

    which: evaluation windows. LabError for a length beyond the windows'.
    """
    if not 1 <= length <= lab.seqlen:
        raise LabError(f"cayley_length = {length}: use 1 to seqlen, {lab.seqlen}")
    out, tokens = [], lab.calibration_tokens[:, : lab.seqlen // length * length]
    for name in starts:
        start = lab.rotation(name, seed)
        about = {"steps": steps, "length": length, "start": _digest(start.tolist())}
        about |= {"tokens": corpora.fingerprint(tokens)}

        def make(key: str, checkpoint: Path, name=name, start=start, about=about) -> tuple:
            r, losses = cayley.refine(
                lab.lm, tokens.reshape(-1, length), start, QuantSpec(), steps=steps, progress=name,
                checkpoint=checkpoint, whose=key,
            )  # fmt: skip
            return r, about | {"losses": losses}

        code = (*CODE, "dfrot_lab.cayley")
        path = lab.kept_rotation(f"Cayley-{name}-seed{seed}", about, make, code)
        losses = rotations.load(path)[1]["losses"]
        row = {"start": name, "steps": steps, "tokens": steps * length, "losses": losses}
        row |= {"before": unseen.measured(lab, name, seed, which)["ppl"]}
        row |= {"ppl": unseen.measured(lab, str(path), seed, which)["ppl"]}
        # forward, and backward with respect to activations: two products more for each weight
        row["cost"] = 3 * 2.0 * _weights(lab) * steps * length / 1e12
        out.append(row | {"kl_w16": unseen.kl(lab, str(path), seed, which)})
    return out


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _weights(lab: Lab) -> int:
    return sum(p.numel() for name, p in lab.lm.named_parameters() if "embed" not in name)


def by_prefix(lab: Lab, seed: int, which: slice) -> dict[str, Any]:
    """W16A4 perplexity of RH and the two presets, with and without a prefix in the cache.

    which: evaluation windows.
    """
    first = lab.tokenizer.bos_token_id
    ahead = prefix.choose(lab.activations, lab.calibration_tokens, first, QuantSpec())
    tokens, out = lab.evaluation_tokens(which.stop)[which], []
    spec = ModelSpec.of("16-4-16")
    names = {"RH": "RH"} | {n: str(p.rotation_file(lab, seed)) for n, p in PRESETS.items()}
    for label, name in tqdm(names.items(), desc="prefix", unit="row"):

        def measure(name: str = name) -> dict[str, Any]:
            rotation = Rotations.standard(lab.lm, lab.rotation(name, seed))
            model = lab.quantized(name, seed)
            return {"ppl": prefix.perplexity(model, rotation, spec, ahead, tokens).value}

        plain = unseen.measured(lab, name, seed, which)["ppl"]
        about = {"rotation": [lab.told(name), seed], "ahead": ahead}
        found = unseen.kept(lab, "prefix", about, which, measure, ["dfrot_lab.prefix"])
        out.append({"rotation": label, "plain": plain, "prefixed": float(found["ppl"])})
    return {"prefix": [lab.tokenizer.decode([t]) for t in ahead], "rows": out}


def by_values(
    lab: Lab, objectives: list[str], seeds: list[int], which: slice
) -> list[dict[str, Any]]:
    """W16A4 perplexity under `recommended` with one Hadamard R2, and with R2 refined for each head.

    R2 is refined for each of `objectives` on what o_proj is given in the lab's own calibration windows, from
    the Hadamard. which: evaluation windows. before, after: its loss, mean over layers.
    """
    size = models.layers(lab.lm)[0].module.self_attn.head_dim
    hadamard = rotations.random_hadamard(size)
    start = hadamard.expand(lab.lm.config.num_key_value_heads, -1, -1)
    x, out, spec = heads.collect(lab.lm, lab.calibration_tokens), [], ModelSpec.of("16-4-16")
    refined = {}
    for name in objectives:
        made = interface.named(name, QuantSpec())
        steps = lab.iterations
        refined[name] = heads.refine_layers(x, start, made, iterations=steps, progress=f"R2 {name}")
    for seed in tqdm(seeds, desc="values", unit="seed"):
        file = str(PRESETS["recommended"].rotation_file(lab, seed))
        row = {"values": "Hadamard", "seed": seed}
        out.append(row | unseen.measured(lab, file, seed, which))
        for name, (r2, losses) in refined.items():
            rotation = Rotations(R1=lab.rotation(file, seed), R2=r2, R4=True)
            row = {"values": name, "seed": seed} | _values(lab, rotation, spec, which)
            row["before"], row["after"] = (
                float(f"{statistics.fmean(run[i] for run in losses):.4g}") for i in (0, -1)
            )
            out.append(row)
    return out


def _values(lab: Lab, rotation: Rotations, spec: ModelSpec, which: slice) -> dict[str, Any]:
    """Perplexity of the model with `rotation` merged, kept by what it is made of."""

    def measure() -> dict[str, Any]:
        model = quantized_model.build(lab.lm, rotation, spec)
        found = evaluation.perplexity(model, lab.evaluation_tokens(which.stop)[which])
        return {"ppl": found.value, "nll": found.nll}

    made = _digest(rotation.R1.tolist(), rotation.R2.tolist())
    found = unseen.kept(lab, "values", {"rotation": made, "spec": str(spec)}, which, measure)
    return {"ppl": float(found["ppl"]), "nll": [float(v) for v in found["nll"]]}


def values_table(result: dict[str, Any]) -> Table:
    """R2 as one Hadamard, and refined for each head: mean ± sd over seeds."""
    rows = []
    for name in dict.fromkeys(r["values"] for r in result["values"]):
        these = [r for r in result["values"] if r["values"] == name]
        found = spread([float(r["ppl"]) for r in these])
        loss = f"{these[0]['before']:.3g} → {these[0]['after']:.3g}" if "after" in these[0] else ""
        label = LABELS.get(name, "one Hadamard for all")
        rows.append((label, f"{found['mean']:.2f} ± {found['sd']:.2f}", loss))
    header = ("R2", "perplexity", "its loss, first step → last")
    title = f"R2 under `recommended`, 16-4-16, {len(these)} seeds"
    return Table(title, header, tuple(rows), frozenset((1, 2)))

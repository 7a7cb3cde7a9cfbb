"""Study 07, the model: the fake-quantized one and what `quantized_model.pack` makes of it, side by side."""

from __future__ import annotations

import copy
import math
import statistics
import weakref
from typing import Any

import torch
from dfrot_kernels.reference import unpack
from scipy.stats import t as student
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dfrot_lab import evaluation, models, quantized_model
from dfrot_lab.lab import Lab
from dfrot_lab.linears import Int4Linear, Int4Quantizer, QuantLinear
from dfrot_lab.quantizers import quantize
from dfrot_lab.tables import Table

__all__ = [
    "BITS",
    "EXACT",
    "WEIGHTS",
    "apart",
    "codes",
    "codes_table",
    "in_fp64",
    "memory",
    "packed_model",
    "perplexities",
    "perplexity_table",
    "ratio",
    "size",
]

BITS = "4-4-16"  # what the int4 kernels compute: weights and activations
WEIGHTS = "4-16-16"  # the weights alone
EXACT = ", in fp64"
# the four inputs of a layer that are quantized, by the linears that read them
ROLES = ("q, k, v", "o", "gate, up", "down (Hadamard first)")
LLAMA_2_7B = {"layers": 32, "hidden": 4096, "inner": 11008, "words": 32000}


def packed_model(lab: Lab, seed: int, backend: str, bits: str = BITS) -> nn.Module:
    """RH at `bits`, its linears packed; the fake-quantized model it comes from stays in the lab."""
    fake = copy.deepcopy(lab.quantized("RH", seed, bits=bits))
    return quantized_model.pack(fake, backend=backend)


def perplexities(
    lab: Lab, packed: nn.Module, seed: int, windows: int, draws: int, backend: str
) -> list[dict[str, Any]]:
    """Floating point, fake-quantized and packed, with quantized activations and without, same windows.

    At 4-bit activations a last bit turns a code at a rounding tie, and every code after it may follow. So
    both models are scored again, `draws` times, with the last bits of their weights' steps changed; and
    both in fp64, from the packed codes and steps, where last bits are too small to turn a code.
    """
    text = lab.evaluation_tokens(windows)
    rows = [_row(lab.perplexity("FP", seed, windows=windows), "floating point", "")]
    for bits in (WEIGHTS, BITS):
        fake = lab.perplexity("RH", seed, bits=bits, windows=windows)
        rows.append(_row(fake, "fake-quantized", bits))
        made = packed if bits == BITS else packed_model(lab, seed, backend, bits)
        rows.append(_row(_scored(made, text), "packed", bits))
        del made
    pair = {"fake-quantized": lab.quantized("RH", seed, bits=BITS), "packed": packed}
    for name, model in pair.items():
        rows.append(_row(_scored(in_fp64(model, packed), text), name + EXACT, BITS))
    for name, model in pair.items():
        for draw in range(1, draws + 1):
            rows.append(_row(_scored(_nudged(model, draw), text), name, BITS, draw))
    return rows


@torch.no_grad()
def in_fp64(model: nn.Module, packed: nn.Module) -> nn.Module:
    """A copy of the fake-quantized `model` or of `packed` itself that computes in fp64 throughout.

    The weights of a fake-quantized one become Δ·w of the packed codes and steps, without rounding; a packed
    one computes through the torch definitions, since the kernels have no fp64.
    """
    wide = models.preserve_norm_dtype(copy.deepcopy(model).double())
    packs = {n: m for n, m in packed.named_modules() if isinstance(m, Int4Linear)}
    for name, module in wide.named_modules():
        if isinstance(module, QuantLinear):
            steps = packs[name].scale.double()[:, None]
            module.weight.copy_(unpack(packs[name].packed).double() * steps)
        elif isinstance(module, (Int4Linear, Int4Quantizer)):
            module.backend = "torch"
    return wide


def _row(found: dict[str, Any], model: str, bits: str, draw: int = 0) -> dict[str, Any]:
    return {"model": model, "bits": bits, "draw": draw, "nll": found["nll"], "ppl": found["ppl"]}


def _scored(model: nn.Module, text: Tensor) -> dict[str, Any]:
    found = evaluation.perplexity(model, text)
    return {"nll": found.nll, "ppl": found.value}


def _nudged(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose weights' steps are −1, 0 or 1 unit in the last place of its dtype off, at random."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    unit = torch.finfo(next(model.parameters()).dtype).eps
    for module in model.modules():
        if isinstance(module, (QuantLinear, Int4Linear)):
            off = torch.randint(-1, 2, (module.out_features, 1), generator=generator)
            packed = isinstance(module, Int4Linear)
            steps = module.scale[:, None] if packed else module.weight.data
            steps.mul_((1 + unit * off).to(steps))
    return model


def apart(result: dict[str, Any]) -> dict[str, float]:
    """ln(perplexity packed / fake-quantized) at `BITS`: of the models themselves, and of means over draws.

    low, high: 95 % interval of the latter, Welch's.
    """
    found = {
        name: [
            statistics.fmean(r["nll"])
            for r in result["perplexity"]
            if r["model"] == name and r["bits"] == BITS
        ]
        for name in ("packed", "fake-quantized")
    }
    a, b = found["packed"], found["fake-quantized"]
    mean = statistics.fmean(a) - statistics.fmean(b)
    shares = [statistics.variance(v) / len(v) if len(v) > 1 else math.inf for v in (a, b)]
    half = math.inf if math.isinf(sum(shares)) else 0.0
    if not half and sum(shares):
        freedom = sum(shares) ** 2 / sum(v**2 / (len(a) - 1) for v in shares)
        half = float(student.ppf(0.975, freedom)) * math.sqrt(sum(shares))
    return {"itself": a[0] - b[0], "means": mean, "low": mean - half, "high": mean + half}


def perplexity_table(result: dict[str, Any]) -> Table:
    """Each model, its range over draws, and how far the packed one is from the fake-quantized one."""
    rows, of = [], {}
    for r in result["perplexity"]:
        of.setdefault((r["model"], r["bits"]), []).append(r["ppl"])
    for (model, bits), values in of.items():
        first, *draws = values
        fake = of.get((model.replace("packed", "fake-quantized"), bits))
        digits = 9 if model.endswith(EXACT) else 3
        away = f"{100 * (first / fake[0] - 1):+.{digits}f} %" if "packed" in model else ""
        span = f"{min(draws):,.2f} to {max(draws):,.2f}" if draws else ""
        rows.append((model, bits, f"{first:,.4f}", away, span))
    n = len(result["perplexity"][0]["nll"])
    title = f"Perplexity on {n} window{'s' * (n > 1)}, RH"
    header = ("model", "bits", "perplexity", "from fake", "last bits changed")
    return Table(title, header, tuple(rows), frozenset((2, 3, 4)))


def size(lab: Lab) -> tuple[int, int]:
    """(hidden, inner) of the model."""
    layer = models.layers(lab.lm)[0]
    return layer.mlp_output.out_features, layer.mlp_output.in_features


@torch.inference_mode()
def codes(
    lab: Lab, packed: nn.Module, seed: int, tokens: int, backend: str
) -> list[dict[str, Any]]:
    """What is quantized in each layer, given equal input: codes of the kernel against the model's own.

    The fake-quantized model is run on the first `tokens` of an evaluation window, and what its linears
    are given goes through `backend`'s kernel too. output: relative error of the packed linear's against
    the fake-quantized one's.
    """
    fake = lab.quantized("RH", seed, bits=BITS)
    packs = {n: m for n, m in packed.named_modules() if isinstance(m, Int4Linear)}
    inputs = _inputs(fake, lab.evaluation_tokens(1)[:1, :tokens])
    rows = []
    for layer in models.layers(fake):
        for role, linears in zip(ROLES, layer.groups, strict=True):
            linear = next(iter(linears.values()))
            name, x = inputs[id(linear)]
            spec, turned = linear.quantizer.spec, packs[name].quantizer.turned
            made = Int4Quantizer(1, spec, backend, turned=turned)(x)
            own = quantize(linear.online(x) if linear.online else x, spec)
            off = (made.codes - own.codes + 8).abs()
            y, z = packs[name](x).double(), linear(x).double()
            rows.append(
                {"layer": layer.index, "input": role, "codes": off.numel()}
                | {"equal": int((off == 0).sum()), "by": int(off.max())}
                | {"output": float(f"{((y - z).norm() / z.norm()).item():.1e}")}
            )
    return rows


def _inputs(model: nn.Module, tokens: Tensor) -> dict[int, tuple[str, Tensor]]:
    """By identity of each fake-quantized linear: its name and what it is given in a forward pass."""
    found: dict[int, tuple[str, Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, given: found.update({id(module): (name, given[0])})

    hooks = [
        m.register_forward_pre_hook(keep(n))
        for n, m in model.named_modules()
        if isinstance(m, QuantLinear)
    ]
    try:
        model(tokens.to(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def codes_table(result: dict[str, Any]) -> Table:
    """Over all layers, by what is quantized."""
    rows = []
    for role in ROLES:
        mine = [r for r in result["codes"] if r["input"] == role]
        total, equal = (sum(r[k] for r in mine) for k in ("codes", "equal"))
        outputs = max(r["output"] for r in mine)
        rows.append((role, f"{total:,}", f"{total - equal:,}", f"{outputs:.0e}"))
    header = ("input of", "codes", "one off", "output, relative error")
    return Table(f"Over {len(mine)} layers, equal input", header, tuple(rows), frozenset((1, 2, 3)))


# --- memory ---------------------------------------------------------------------------------------


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def hold(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key, size)
        return t

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.hold, out)
        return out


@torch.inference_mode()
def _peak(model: nn.Module, tokens: int) -> int:
    """Most bytes alive, weights included, while `tokens` go through: the allocator's count on a GPU."""
    device = next(model.parameters()).device
    window, held = torch.zeros((1, tokens), dtype=torch.long, device=device), _Alive()
    for t in (*model.parameters(), *model.buffers()):
        held.hold(t)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device) - held.now
        torch.cuda.reset_peak_memory_stats(device)
        model(window, use_cache=False, logits_to_keep=1)
        return torch.cuda.max_memory_allocated(device) - before
    with held:
        model(window, use_cache=False, logits_to_keep=1)
    return held.most


def _halved(model: nn.Module) -> nn.Module:
    """`model` with every parameter in fp16, in place: what is packed, its steps and sums stay."""
    for p in model.parameters():
        p.data = p.data.half()
    return model


def memory(lab: Lab, packed: nn.Module, tokens: list[int]) -> dict[str, Any]:
    """Bytes of weights and at the peak of a forward pass: the model in FP16, and packed with the rest so.

    linears: the weights of all layers' linears; rest: embedding and head, which stay in FP16. large: the
    same of LLaMA-2-7B's shape, counted from its sizes.
    """
    whole = _halved(copy.deepcopy(lab.lm))
    names = {n for n, m in packed.named_modules() if isinstance(m, Int4Linear)}
    fp16 = _bytes(whole, names)
    peaks = [{"tokens": n, "fp16": _peak(whole, n)} for n in tokens]
    del whole
    small = _halved(copy.deepcopy(packed))
    four = _bytes(small, names)
    peaks = [row | {"packed": _peak(small, row["tokens"])} for row in peaks]
    return {"fp16": fp16, "packed": four, "peak": peaks, "large": _large(**LLAMA_2_7B)}


def _bytes(model: nn.Module, names: set[str]) -> dict[str, int]:
    found = {"linears": 0, "rest": 0}
    for name, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        kind = "linears" if name.rpartition(".")[0] in names else "rest"
        found[kind] += t.numel() * t.element_size()
    return found


def _large(layers: int, hidden: int, inner: int, words: int) -> dict[str, Any]:
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    numbers, outputs = layers * sum(n * k for n, k in shapes), layers * sum(n for n, _ in shapes)
    rest = 2 * 2 * words * hidden  # embedding and head
    return {
        "name": "LLaMA-2-7B",
        "fp16": {"linears": 2 * numbers, "rest": rest},
        "packed": {"linears": numbers // 2 + 8 * outputs, "rest": rest},  # a step and a sum a row
    }


def ratio(found: dict[str, Any], part: str | None = None) -> float:
    """FP16 over packed, of all weights or of one `part` of what `memory` found."""
    a, b = ((found[k][part] if part else sum(found[k].values())) for k in ("fp16", "packed"))
    return a / b

"""Study 07: kernels that compute on packed 4-bit codes, and the model that is made of them.

Nothing here imports triton: `prepare` has to choose how it runs before anything does.
"""

from __future__ import annotations

import math
import os
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from dfrot_kernels import backends, reference
from torch import Tensor

from dfrot_lab.lab import Lab
from dfrot_lab.results import Claim, rounded
from dfrot_lab.studies.int4_model import BITS, EXACT, WEIGHTS, apart, ratio
from dfrot_lab.tables import Table

__all__ = [
    "claims",
    "correctness",
    "correctness_table",
    "language",
    "nibbles",
    "prepare",
]

SUMMED = ("add_norm_quantize", "hadamard_quantize")  # codes of sums, whose order differs
TIES = 1e-3  # share of codes that may be one off, where such a sum is a rounding tie
SAME = 0.005  # of a perplexity
FLOATS = 2e-3  # largest relative error of floating-point results, fp16's last places


# --- where kernels run ----------------------------------------------------------------------------


def prepare(device: str) -> str:
    """Choose how Triton kernels run, before triton is imported; prints and returns "triton" or "torch".

    On "cuda" they are compiled. On "cpu" TRITON_INTERPRET=1 is set, so that they run in Triton's interpreter;
    where there is no Triton (macOS, Windows) the torch definitions are what runs.
    """
    if find_spec("triton") is None:
        print("Triton is not installed here: the torch definitions run, kernels need Linux.")
        return "torch"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton.language" in sys.modules:
            print("triton was imported before: restart and run this cell first; torch runs now.")
            return "torch"
        os.environ["TRITON_INTERPRET"] = "1"
    if device == "cpu":
        print("No GPU was asked for: Triton kernels run in Triton's interpreter, on the CPU.")
    else:
        print(f"Triton kernels are compiled for {torch.cuda.get_device_name(device)}.")
    return "triton"


def language() -> ModuleType | SimpleNamespace:
    """`triton.language`; where there is no Triton a stand-in with which a kernel can be written down."""
    if find_spec("triton") is None:
        return SimpleNamespace(constexpr=int)
    import triton.language as tl

    return tl


# --- packing ----------------------------------------------------------------------------------------


def nibbles(lab: Lab, site: str, seed: int = 0, shown: int = 4) -> dict[str, Any]:
    """One calibration row at `site` under RH, quantized and packed: the first codes of both halves."""
    row = lab.rotated(lab.activations.site(site)[1:2], "RH", seed)
    flat, packed = (reference.quantize_int4(row, packed=p) for p in (False, True))
    half = row.shape[-1] // 2
    ends = {"low": slice(0, shown), "high": slice(half, half + shown)}
    return {
        "site": site,
        "channels": 2 * half,
        "scale": rounded(flat.scale, 4)[0],
        "zero": int(flat.zero),
        "bytes": packed.codes[0, :shown].tolist(),
        "values": {name: rounded(row[0, at], 3) for name, at in ends.items()},
        "codes": {name: flat.codes[0, at].tolist() for name, at in ends.items()},
    }


# --- every kernel against its reference ---------------------------------------------------------


def _cases(device: str) -> list[tuple[str, str, tuple, dict[str, Any]]]:
    """(function, what it is given, arguments, options): ragged sizes, nothing a multiple of a block."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, long = normal(5, 70), normal(3, 344)
    x[0], x[1, 3] = 0, 1000  # a row of zeros, and one outlier
    w = torch.randint(-8, 8, (37, 70), generator=generator, dtype=torch.int8).to(device)
    w = reference.pack_weight(w, torch.rand(37, generator=generator).to(device) + 0.1)
    tokens, bias = reference.quantize_int4(x), normal(37)
    keys, values = (reference.quantize_kv(normal(2, 2, 19, 32)) for _ in "kv")
    lengths = torch.tensor([19, 7], dtype=torch.int32, device=device)
    fp32 = torch.float32
    return [
        ("quantize_int4", "fp16 [5, 70]", (x,), {}),
        ("quantize_int4", "fp16 [5, 70], symmetric", (x,), {"symmetric": True}),
        ("add_norm_quantize", "fp16 [5, 70] twice", (x, normal(5, 70)), {}),
        ("hadamard_quantize", "fp16 [3, 344], 344 = 86 · 4", (long,), {}),
        ("hadamard_quantize", "fp32 [4, 96], 96 = 12 · 8", (normal(4, 96, dtype=fp32),), {}),
        ("matmul", "[5, 70] · [37, 70]ᵀ, bias", (tokens, w, bias), {"dtype": fp32}),
        ("matmul_fp", "fp16 [5, 70] · [37, 70]ᵀ", (x, w), {}),
        ("quantize_kv", "fp16 [5, 70]", (x,), {}),
        ("dequantize_kv", "[2, 2, 19, 32]", (keys,), {}),
        ("decode_attention", "4 heads on 2, lengths 19 and 7",
         (normal(2, 4, 32), keys, values, lengths), {}),
        ("rotate_quantize_error", "fp32 [9, 70] · [70, 70]",
         (normal(9, 70, dtype=fp32), normal(70, 70, dtype=fp32) / 70**0.5), {}),
        ("quantize_error", "fp32 [9, 70]", (normal(9, 70, dtype=fp32),), {}),
    ]  # fmt: skip


def correctness(device: str, backend: str) -> list[dict[str, Any]]:
    """Every kernel against its reference, on ragged shapes; nothing where the reference is all there is.

    Rows: how many integers differ, by how much at most, and the largest error of floating-point results
    relative to the largest one.
    """
    if backend == "torch":
        return []
    ops, rows = backends.get(backend), []
    for name, given, arguments, options in _cases(device):
        found, wanted = (getattr(o, name)(*arguments, **options) for o in (ops, reference))
        row = {"kernel": name, "given": given, "integers": 0, "differ": 0, "by": 0, "relative": 0.0}
        for a, b in zip(_integers(found), _integers(wanted), strict=True):
            row["integers"] += a.numel()
            row["differ"] += int((a != b).sum())
            row["by"] = max(row["by"], int((a.int() - b.int()).abs().max()))
        for a, b in zip(_floats(found), _floats(wanted), strict=True):
            error = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
            # NaN would vanish in the maximum
            error = error if math.isfinite(error) else 0.0 if torch.equal(a, b) else 1.0
            row["relative"] = max(row["relative"], float(f"{error:.1e}"))
        rows.append(row)
    return rows


def _leaves(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for part in found for t in _leaves(part)]


def _integers(found: Any) -> list[Tensor]:
    """Integer parts, codes two a byte unpacked."""
    parts = [t for t in _leaves(found) if not t.is_floating_point()]
    return [reference.unpack(t) if t.dtype == torch.int8 else t for t in parts]


def _floats(found: Any) -> list[Tensor]:
    return [t for t in _leaves(found) if t.is_floating_point()]


def _right(row: dict[str, Any]) -> bool:
    """Integers exact, but for ties of sums taken in another order; floats to fp16's last places."""
    off = row["integers"] * TIES if row["kernel"] in SUMMED else 0
    return row["differ"] <= off and row["by"] <= 1 and row["relative"] <= FLOATS


def correctness_table(result: dict[str, Any]) -> Table:
    """A row a kernel and input."""
    rows = tuple(
        (
            r["kernel"],
            r["given"],
            f"{r['integers'] - r['differ']:,} of {r['integers']:,}" if r["integers"] else "",
            f"{r['relative']:.0e}" if r["relative"] else "0",
        )
        for r in result["correctness"]
    )
    header = ("kernel", "given", "integers equal", "floats, largest relative error")
    return Table("Each kernel against its reference", header, rows, frozenset((2, 3)))


# --- claims ---------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:+.2f} %" if math.isfinite(share) else "no bound"


def claims(result: dict[str, Any]) -> list[Claim]:
    """The closing table of notebook 07; the paper measures no kernel, so these are what 4 bits promise."""
    held, linears = result["memory"], ratio(result["memory"], "linears")
    large, away = ratio(held["large"]), apart(result)
    ppl = {(r["model"], r["bits"]): r["ppl"] for r in result["perplexity"] if not r["draw"]}
    means, low, high = (math.expm1(away[k]) for k in ("means", "low", "high"))
    draws = max(r["draw"] for r in result["perplexity"])
    total, equal = (sum(r[k] for r in result["codes"]) for k in ("codes", "equal"))
    by = max(r["by"] for r in result["codes"])
    out = [
        Claim(
            "4-bit weights take a quarter of FP16",
            "W4: 4 bits where FP16 has 16",
            f"linears {linears:.2f} × smaller, with a step and a sum for each output; the whole model, "
            f"embedding and head in FP16, {ratio(held):.2f} ×",
            "linears at least 3.5 ×",
            linears >= 3.5,
        ),
        Claim(
            "So does a large model, nearly",
            "not measured",
            f"{held['large']['name']}'s shape, counted: {large:.2f} ×",
            "all weights at least 3.5 ×",
            large >= 3.5,
        ),
        *(
            Claim(
                f"The packed model is the fake-quantized one at {bits}{how}",
                "not claimed: it is what fake quantization stands for",
                f"perplexity {fake:,.3f} fake-quantized, {packed:,.3f} packed, "
                f"{_percent(packed / fake - 1)}",
                "within 0.5 %",
                abs(packed / fake - 1) <= SAME,
            )
            for bits, how in ((WEIGHTS, ""), (BITS, EXACT))
            for fake, packed in [[ppl[name + how, bits] for name in ("fake-quantized", "packed")]]
        ),
        Claim(
            "What sets them apart in fp32 is a last bit, no more",
            "not claimed",
            f"means of {1 + draws} each, last bits of the steps changed: {_percent(means)} "
            f"(95 %: {_percent(low)} to {_percent(high)})",
            "within 0.5 %, or an interval that holds 0",
            abs(means) <= SAME or low <= 0 <= high,
        ),
        Claim(
            "Given equal input, codes are equal up to ties",
            "not claimed",
            f"{total - equal:,} of {total:,} codes differ, by {by} at most",
            "at most 0.1 %, by at most 1",
            total - equal <= TIES * total and by <= 1,
        ),
    ]
    if rows := result["correctness"]:
        wrong = sorted({r["kernel"] for r in rows if not _right(r)})
        out.append(
            Claim(
                "Every kernel computes what its reference defines",
                "not claimed",
                f"{len(rows)} inputs, wrong: {', '.join(wrong) or 'none'}",
                "integers equal (0.1 % one off where a sum comes first), floats to 0.2 %",
                not wrong,
            )
        )
    return out

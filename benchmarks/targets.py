"""The targets the kernels were written for, each met, missed or not measured; none is softened here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.records import ratios
from benchmarks.shapes import TARGET

__all__ = ["judge", "lines", "verdict"]

PREFILL_ROWS = 2048
DECODE_ROWS = 16
LONG = 32768
W4A16 = ("gemlite A16W4", "gemlite A16W4 group 128")
KV4_BYTES = 3.7
HEAD = 128


def verdict(name: str, wanted: float, found: dict[str, float]) -> dict[str, Any]:
    """The worst of `found` (where → value) against `wanted`, which it should reach."""
    worst = min(found.values(), default=None)
    if worst is None:
        said = "not measured"
    elif worst >= wanted:
        said = "met"
    else:
        said = f"missed by {100 * (1 - worst / wanted):.0f} %"
    return {"target": name, "wanted": wanted, "worst": worst, "found": found, "verdict": said}


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdict on each target, from the rows of `kernels.csv`."""
    against = ratios(rows)
    linear = [r for r in against if r["op"] == "linear" and r["shape"] == TARGET]
    prefill = [r for r in linear if r["m"] >= PREFILL_ROWS and r["against"] == "cuBLAS bf16"]
    decode = [r for r in linear if r["m"] <= DECODE_ROWS]
    bf16 = [r for r in decode if r["against"] == "cuBLAS bf16"]
    fused = [
        r for r in rows if r["op"] == "hadamard_quantize" and r["ours"] and r["m"] >= PREFILL_ROWS
    ]
    apart = [r for r in against if r["op"] == "hadamard_quantize" and r["m"] >= PREFILL_ROWS]
    steps = [r for r in apart if r["against"] == "separate" or r["against"].endswith("+ quantize")]
    cache = [r for r in against if r["op"] == "decode_attention" and r["m"] == LONG]
    return [
        verdict(
            "W4A4 prefill with its quantize over cuBLAS bf16, M ≥ 2048, 4096×14336",
            1.4,
            _found(prefill, "dfrot quantize + W4A4"),
        ),
        verdict(
            "W4A4 decode over cuBLAS bf16, M ≤ 16, 4096×14336", 2.3, _found(bf16, "dfrot W4A4")
        ),
        verdict("the same with its quantize", 2.3, _found(bf16, "dfrot quantize + W4A4")),
        verdict(
            "W4A4 decode over gemlite's W4A16, M ≤ 16, 4096×14336",
            1.0,
            _found([r for r in decode if r["against"] in W4A16], "dfrot W4A4"),
        ),
        verdict(
            "fused Hadamard + quantize, share of copy bandwidth, M ≥ 2048",
            0.8,
            {f"K={r['k']} M={r['m']}": r["share"] for r in fused if r["share"]},
        ),
        verdict(
            "fused Hadamard + quantize over separate steps, M ≥ 2048", 1.0, _found(steps, "dfrot")
        ),
        verdict("KV4 smaller than fp16, head_dim 128", KV4_BYTES, _smaller(rows)),
        verdict("KV4 attention over SDPA on fp16, 32k context", 1.0, _found(cache, "dfrot KV4")),
    ]


def _found(chosen: Iterable[dict[str, Any]], ours: str) -> dict[str, float]:
    """Where → ratio, the smallest over the peers (the fastest of them)."""
    found: dict[str, float] = {}
    for r in chosen:
        if r["ours"] == ours:
            where = (
                f"{r['shape']} K={r['k']} M={r['m']}" if "k" in r else f"{r['shape']} T={r['m']}"
            )
            found[where] = min(r["ratio"], found.get(where, r["ratio"]))
    return found


def _smaller(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes of fp16 over those of KV4, as the output of the gated `quantize_kv` has them."""
    return {
        f"{r['shape']}": 2 * HEAD * r["m"] * r["kv_heads"] / r["out_bytes"]
        for r in rows
        if r["op"] == "quantize_kv" and r["ours"] and r["head_dim"] == HEAD and r["gate"] == "ok"
    }


def lines(judged: list[dict[str, Any]]) -> str:
    """One line a target."""
    out = []
    for each in judged:
        worst = (
            "" if each["worst"] is None else f" ({each['worst']:.2f}, wanted {each['wanted']:.2f})"
        )
        out.append(f"{each['verdict']:>14}{worst}: {each['target']}")
    return "\n".join(out)

"""A decoder of LLaMA-2-7B's shape with random weights, in 16 bits and in W4A4: memory and time per token.

`PYTHONPATH=.:kernels python benchmarks/end_to_end.py --out FOLDER` writes end_to_end.csv and .json. Prefill
is one sequence of 2048 tokens up to the last one's logits, decode one more token at context 2048. Before
a model is timed it is compared, one layer deep, prefill and decode: each op of the 4-bit ones with the
reference on equal input; the 16-bit ones decoding the last token against prefilling it.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from dfrot_kernels import backends, reference
from dfrot_kernels.checks import KernelError
from dfrot_kernels.reference import KV, Tokens
from torch import Tensor

from benchmarks.decoder import KINDS, LLAMA_2_7B, TOY, Decoder, Shape
from benchmarks.gates import relative
from benchmarks.records import plain, provenance, write_text
from benchmarks.targets import lines, verdict
from benchmarks.timing import measure

__all__ = ["error_of", "judge", "main", "run"]

LIMIT = 0.02  # ‖y − ŷ‖/‖ŷ‖: fp16 roundings, and a few codes that fall to the other side of a tie
GATED = 64  # tokens of the gate


class Beside:
    """Each op by `ops` and by the reference, on the same arguments; what goes on is the reference's.

    Whole layers cannot be compared: where a sum in another order turns one code at a rounding tie,
    attention hands the difference to every later token, and each quantizer behind it makes it larger.
    After one layer of this shape, right kernels and the reference are a sixth apart.
    """

    def __init__(self, ops: ModuleType) -> None:
        self.ops, self.worst = ops, 0.0

    def __getattr__(self, name: str) -> Callable:
        """The op of that name, twice."""
        ours, definition = getattr(self.ops, name), getattr(reference, name)

        def both(*args: Any, **options: Any) -> Any:
            found, wanted = ours(*args, **options), definition(*args, **options)
            self.worst = max(self.worst, _off(found, wanted))
            return wanted

        return both


def _off(found: Any, wanted: Any) -> float:
    """Relative error of numbers, and of what codes stand for."""
    if isinstance(wanted, Tokens):
        return relative(
            *(t.scale[..., None] * (t.codes - t.zero[..., None]) for t in (found, wanted))
        )
    if isinstance(wanted, KV):
        return relative(*map(reference.dequantize_kv, (found, wanted)))
    if isinstance(wanted, tuple):
        return max(_off(a, b) for a, b in zip(found, wanted, strict=True))
    return relative(found, wanted)


def error_of(model: Decoder, ids: Tensor) -> float:
    """Largest relative error of one layer, prefilling ids[:, :-1] and decoding the last.

    In 4 bits that of each op, given equal input; in 16 of the last token, decoded and prefilled.
    """
    count = ids.shape[1] - 1
    if model.packed:
        twin = copy.copy(model)
        twin.ops = Beside(model.ops)
        twin.hidden(ids[:, :-1], 0, 1)
        twin.hidden(ids[:, -1:], count, 1)
        return twin.ops.worst
    found = [model.hidden(ids[:, :-1], 0, 1), model.hidden(ids[:, -1:], count, 1)]
    whole = model.hidden(ids, 0, 1)
    wanted = [whole[:, :-1], whole[:, -1:]]
    return max(relative(a, b) for a, b in zip(found, wanted, strict=True))


def measured(model: Decoder, row: dict[str, Any], prefill: int, seconds: float) -> dict[str, Any]:
    """`row` with its gate and, if that is ok, with times."""
    generator = torch.Generator(model.device).manual_seed(1)
    ids = torch.randint(model.shape.words, (1, prefill), generator=generator, device=model.device)
    with torch.inference_mode():
        error = error_of(model, ids[:, : GATED + 1])
        row["error"] = error if math.isfinite(error) else None
        if not error <= LIMIT:
            return row | {"gate": "wrong", "reason": f"error {error:.3g}, at most {LIMIT}"}
        runs = {
            "prefill": lambda: model.logits(ids),
            "decode": lambda: model.logits(ids[:, -1:], prefill - 1),
        }
        for name, fn in runs.items():
            t = measure(fn, (), model.device, seconds=seconds, copies=1)
            row |= {f"{name}_ms{q}": getattr(t, f"ms{q}") for q in (20, 50, 80)}
            row[f"{name}_tokens_per_s"] = 1e3 * (prefill if name == "prefill" else 1) / t.ms50
            row[f"{name}_method"] = t.method
    return row | {"gate": "ok"}


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Verdicts on memory, prefill and decode of the 4-bit models against fp16, of 7B's shape alone."""
    fine = [row for row in rows if row["gate"] == "ok" and row["shape"] == asdict(LLAMA_2_7B)]
    base = next((row for row in fine if row["who"] == "fp16"), None)
    packed = [row for row in fine if row["who"].startswith("W4A4")] if base else []
    return [
        verdict("weight memory of fp16 over W4A4", 3.5, _over("weight_bytes", base, packed)),
        verdict("prefill over fp16, end to end", 1.0, _over("prefill_ms50", base, packed)),
        verdict("decode over fp16, end to end", 1.0, _over("decode_ms50", base, packed)),
    ]


def _over(name: str, base: dict | None, packed: list[dict]) -> dict[str, float]:
    return {row["who"]: base[name] / row[name] for row in packed}


def _save(folder: Path, document: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    flat = [row | row["shape"] for row in document["rows"]]
    columns = list(dict.fromkeys(name for row in flat for name in row if name != "shape"))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(flat)
    write_text(folder / "end_to_end.csv", text.getvalue())
    write_text(
        folder / "end_to_end.json",
        json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    p.add_argument("--layers", type=int, help="default: all 32; fewer are not judged")
    p.add_argument(
        "--tokens", type=int, default=2048, help="of the prefill, and context of the decode"
    )
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    p.add_argument("--toy", action="store_true", help="a model for a CPU")
    p.add_argument("--backend", choices=["triton", "torch"], help="default: triton where it runs")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, default=Path("results/benchmarks"), metavar="FOLDER")
    p.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    p.add_argument("--seconds", type=float, default=1.0, help="about this long a measurement")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each kind in turn and write after each; the document."""
    begun, device = time.monotonic(), torch.device(args.device)
    backend = args.backend or backends.default(device)
    ops, shape = backends.get(backend), TOY if args.toy else LLAMA_2_7B
    if args.layers:
        shape = Shape(**asdict(shape) | {"layers": args.layers})
    said = {k: v for k, v in vars(args).items() if k != "out"}
    said["budget"] = None if args.budget == float("inf") else args.budget
    document = {"format": 1, "provenance": provenance(device, backend), "arguments": said}
    document |= {"rows": [], "skipped": []}
    for kind in args.kinds:
        if time.monotonic() - begun > args.budget:
            document["skipped"].append(kind)
            continue
        row = {"who": kind, "shape": asdict(shape), "tokens": args.tokens, "gate": "", "reason": ""}
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            model = Decoder(shape, kind, ops, device, args.tokens)
            for name in ("linear_bytes", "weight_bytes", "cache_bytes"):
                row[name] = getattr(model, name)()
            if device.type == "cuda":  # building holds 64-bit codes for a moment: not the model's
                torch.cuda.reset_peak_memory_stats(device)
            row = measured(model, row, args.tokens, args.seconds)
            del model
        except Exception as error:  # out of memory for one kind leaves the others
            row |= {"gate": "failed", "reason": plain(f"{type(error).__name__}: {error}")}
        if device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        document["rows"].append(row)
        document["targets"] = judge(document["rows"])
        _save(args.out, document)
        print(f"[{time.monotonic() - begun:.0f} s] {_line(row)}", flush=True)
    return document


def _line(row: dict[str, Any]) -> str:
    if row["gate"] != "ok":
        return f"{row['who']}: {row['gate'].upper()}, {row['reason']}"
    return (
        f"{row['who']}: weights {row['weight_bytes'] / 1e9:.3f} GB, cache {row['cache_bytes'] / 1e9:.3f} GB, "
        f"prefill {row['prefill_ms50']:.2f} ms ({row['prefill_tokens_per_s']:.0f} tokens/s), "
        f"decode {row['decode_ms50']:.3f} ms ({row['decode_tokens_per_s']:.1f} tokens/s)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; 1 if a model is wrong or failed, 2 for a request that cannot be met."""
    args = parser().parse_args(argv)
    try:
        document = run(args)
    except KernelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if document["skipped"]:
        print(f"skipped, out of time: {', '.join(document['skipped'])}")
    print(lines(judge(document["rows"])))
    return int(any(row["gate"] != "ok" for row in document["rows"]))


if __name__ == "__main__":
    sys.exit(main())

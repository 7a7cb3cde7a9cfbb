"""Study 07, speed: what was measured, where, and on what; wall-clock numbers, so kept out of result.json.

On a GPU `benchmarks/` is run afresh; without one its committed results are read; where there are none, the
torch definitions are timed on this CPU, which says nothing about the kernels and is labelled so.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from dfrot_kernels import reference
from torch import Tensor
from torch.nn import functional as F

from dfrot_lab import files, results
from dfrot_lab.results import Claim

__all__ = [
    "claims",
    "committed",
    "from_benchmarks",
    "measured_here",
    "save",
    "speed",
    "with_claims",
]

COMMITTED = Path("benchmarks") / "results"  # in a checkout
ROWS = (1, 4, 16, 64, 256)  # tokens at once, on the CPU
SECONDS = 0.02  # of a measurement on the CPU, in each of the turns
TURNS = 3
COLUMNS = ("op", "who", "ours", "shape", "n", "k", "m", "ms20", "ms50", "ms80", "gbs", "tflops")
OURS = ("dfrot W4A4", "dfrot quantize + W4A4", "dfrot W4A16")


def speed(device: str, size: tuple[int, int], folder: Path) -> dict[str, Any]:
    """The measurements to show, and one sentence of where they are from, which is printed as well.

    size: (hidden, inner) of the model, the shape that a CPU is timed at; folder: for a GPU's own results.
    """
    root = files.project_root()
    if device != "cpu" and (root / "benchmarks" / "int4_kernels.py").is_file():
        found = _afresh(root, folder)
    else:
        found = committed(root / COMMITTED) or measured_here(*size)
    print(found["said"])
    return found


# --- benchmarks/ ----------------------------------------------------------------------------------


def _afresh(root: Path, folder: Path) -> dict[str, Any]:
    """A short run of both benchmarks on this GPU; RuntimeError with their last line where one fails."""
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    for script, *options in (
        ("int4_kernels.py", "--peers", "cuBLAS", "--shapes", "llama-3-8b.down", "llama-2-7b.gate",
         "--only", "linear", "hadamard_quantize", "decode_attention", "--budget", "240"),
        ("end_to_end.py", "--kinds", "fp16", "W4A4"),
    ):  # fmt: skip
        command = [
            sys.executable,
            str(root / "benchmarks" / script),
            "--out",
            str(folder),
            *options,
        ]
        started = time.time()
        done = subprocess.run(
            command, cwd=root, env=os.environ | {"PYTHONPATH": paths}, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        written = folder / ("kernels.json" if script.startswith("int4") else "end_to_end.json")
        fresh = written.is_file() and written.stat().st_mtime >= started - 1
        if done.returncode not in (0, 1) or not fresh or "targets" not in files.read_json(written):
            last = (done.stdout.strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"benchmarks/{script} stopped: {last}")
    found = committed(folder, "measured")
    if found is None:
        raise RuntimeError(f"benchmarks/int4_kernels.py left no measurement of a GPU in {folder}")
    return found


def committed(folder: Path, origin: str = "committed") -> dict[str, Any] | None:
    """The newest kernels.json of a GPU under `folder`, with the end_to_end.json beside it; None without one.

    What older ones of the same device, torch and triton have besides is added, row by row and target by
    target; such a row carries the date of its run.
    """
    documents = [(files.read_json(path), path) for path in sorted(folder.glob("**/kernels.json"))]
    # a run that was killed leaves one without verdicts
    documents = [
        (d, path) for d, path in documents if d["provenance"].get("capability") and "targets" in d
    ]
    documents.sort(key=lambda each: each[0]["provenance"]["date"], reverse=True)
    if not documents:
        return None
    newest, path = documents[0]
    same = ("device", "torch", "triton", "backend")
    older = [
        d
        for d, _ in documents[1:]
        if all(d["provenance"][k] == newest["provenance"][k] for k in same)
    ]
    whole = path.with_name("end_to_end.json")
    whole = files.read_json(whole) if whole.is_file() else None
    return from_benchmarks(_with_older(newest, older), whole, origin)


def _with_older(newest: dict[str, Any], older: list[dict[str, Any]]) -> dict[str, Any]:
    """`newest` with the sizes and contestants that only `older` has, and the verdicts that it lacks."""
    rows: dict[tuple, dict[str, Any]] = {}
    verdicts: dict[str, dict[str, Any]] = {}
    for document in (newest, *older):
        from_older = {} if document is newest else {"of": document["provenance"]["date"]}
        for row in document["rows"]:
            if row["gate"] == "ok":
                size = tuple(row.get(c) for c in ("op", "shape", "n", "k", "m", "who"))
                rows.setdefault(size, row | from_older)
        for target in document["targets"]:
            old = verdicts.setdefault(target["target"], target)
            if old["worst"] is None and target["worst"] is not None:
                verdicts[target["target"]] = target | from_older
    added = {each["of"] for each in (*rows.values(), *verdicts.values()) if "of" in each}
    return newest | {
        "rows": [*rows.values()],
        "targets": [*verdicts.values()],
        "added": sorted(added),
    }


def from_benchmarks(
    kernels: dict[str, Any], whole: dict[str, Any] | None, origin: str
) -> dict[str, Any]:
    """What the figures need of the documents that benchmarks/int4_kernels.py and end_to_end.py write."""
    about = kernels["provenance"]
    dirty = " with changes" if about["dirty"] else ""
    backend = "the interpreter" if about["interpreted"] else about["backend"]
    added = (
        f" What it left out is of {', '.join(each.replace('T', ' ')[:16] for each in earlier)}."
        if (earlier := kernels.get("added"))
        else ""
    )
    return {
        "origin": origin,
        "said": f"{origin.capitalize()}: {about['device']}, {about['date'][:10]}, commit "
        f"{(about['commit'] or 'unknown')[:7]}{dirty}, torch {about['torch']}, triton "
        f"{about['triton']}, {backend}.{added}",
        "provenance": about,
        "device": about["device"],
        "ceilings": kernels["sessions"][-1]["ceilings"],
        "baseline": "cuBLAS bf16",
        "ours": list(OURS),
        "rows": [
            {c: r.get(c) for c in COLUMNS} | ({"of": r["of"]} if "of" in r else {})
            for r in kernels["rows"]
            if r["gate"] == "ok"
        ],
        "end_to_end": [r for r in (whole or {}).get("rows", []) if r["gate"] == "ok"],
        "targets": kernels["targets"] + (whole or {}).get("targets", []),
    }


# --- this CPU -------------------------------------------------------------------------------------


def measured_here(hidden: int, inner: int) -> dict[str, Any]:
    """The torch definitions beside F.linear in fp32, at the model's own shapes, on this CPU."""
    about, before = results.provenance({}), _ceilings(hidden, inner)
    rows = [
        {"op": "linear", "shape": name, "n": n, "k": k, "m": m} | row
        for name, n, k in (("gate", inner, hidden), ("down", hidden, inner))
        for m in ROWS
        for row in _linear(n, k, m)
    ]
    for name, fn in (
        ("quantize_int4", reference.quantize_int4),
        ("hadamard_quantize", reference.hadamard_quantize),
    ):
        x = _normal(256, inner)
        about_it = {"op": name, "shape": "down", "n": None, "k": inner, "m": 256}
        rows += [about_it | row for row in _rows({"torch definition": (fn, (x,))}, None)]
    # again, and the fastest product of all: on a shared machine any one of them may be held up
    after = _ceilings(hidden, inner)
    after["fp32"] = max([after["fp32"], *(r["tflops"] for r in rows if r["tflops"])])
    return {
        "origin": "cpu",
        "said": "Not measured: this project's kernels need a GPU, none was at hand, and benchmarks/results "
        f"holds no measurement. Timed instead: their torch definitions on this CPU ({about['processor']}, "
        f"{about['threads']} threads, torch {torch.__version__}), which only make the numbers.",
        "provenance": {"device": about["processor"], "threads": about["threads"]}
        | {"torch": torch.__version__, "commit": about["commit"], "dirty": about["dirty"]}
        | {"date": datetime.now(UTC).isoformat(timespec="seconds")},
        "device": f"{about['processor']} CPU, torch definitions",
        "ceilings": {name: max(before[name], after[name]) for name in before},
        "baseline": "F.linear fp32",
        "ours": ["W4A4", "quantize + W4A4", "W4A16"],
        "rows": rows,
        "end_to_end": [],
        "targets": [],
    }


def _linear(n: int, k: int, m: int) -> list[dict[str, Any]]:
    x = _normal(m, k)
    codes = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    w = reference.pack_weight(codes, torch.full((n,), 0.1))
    tokens, dense = reference.quantize_int4(x, packed=False), codes.float() / 10

    def product(t: Any, w: Any) -> Tensor:
        return reference.matmul(t, w, dtype=torch.float32)

    def chain(x: Tensor, w: Any) -> Tensor:
        return product(reference.quantize_int4(x, packed=False), w)

    return _rows(
        {
            "F.linear fp32": (F.linear, (x, dense)),
            "W4A4": (product, (tokens, w)),
            "quantize + W4A4": (chain, (x, w)),
            "W4A16": (reference.matmul_fp, (x, w)),
        },
        2 * m * n * k,
    )


def _rows(jobs: dict[str, tuple[Callable, tuple]], flops: int | None) -> list[dict[str, Any]]:
    """Quantiles of the time of a call, and the rates for the bytes of its arguments and result.

    The jobs take turns, so that whatever else the machine does holds all of them up.
    """
    times: dict[str, list[float]] = {who: [] for who in jobs}
    for _ in range(TURNS):
        for who, job in jobs.items():
            times[who] += _times(*job)
    rows = []
    for who, (fn, arguments) in jobs.items():
        tenths = statistics.quantiles(times[who], n=10, method="inclusive")
        low, middle, high = tenths[1], tenths[4], tenths[7]
        size = _bytes(arguments) + _bytes(fn(*arguments))
        rows.append(
            {"who": who, "ours": who != "F.linear fp32", "ms20": low, "ms50": middle, "ms80": high}
            | {"gbs": size / middle / 1e6, "tflops": flops / middle / 1e9 if flops else None}
        )
    return rows


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _bytes(x: Any) -> int:
    return x.numel() * x.element_size() if isinstance(x, Tensor) else sum(map(_bytes, x))


@torch.inference_mode()
def _times(fn: Callable, arguments: tuple) -> list[float]:
    """Milliseconds of single calls, after one that is not counted."""
    fn(*arguments)
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        fn(*arguments)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _ceilings(hidden: int, inner: int) -> dict[str, float]:
    """GB/s of a copy as large as a weight, TFLOP/s of a product: the best calls, as ceilings are."""
    x, a, b = _normal(inner, hidden), _normal(512, inner), _normal(inner, hidden)
    copied, product = _times(Tensor.copy_, (torch.empty_like(x), x)), _times(torch.mm, (a, b))
    rate = 2 * 512 * inner * hidden / min(product) / 1e9
    return {"copy": 2 * _bytes(x) / min(copied) / 1e6, "fp32": rate}


# --- what is said of it ---------------------------------------------------------------------------


def claims(found: dict[str, Any], only: str | None = None) -> list[Claim]:
    """A line for each target that was measured, if the measurement's origin is `only`; else none."""
    if only not in (None, found["origin"]):
        return []
    return [
        Claim(
            t["target"],
            "not claimed: a target of this project",
            f"{t['worst']:.2f} on {found['device']}",
            f"at least {t['wanted']:g}",
            t["worst"] >= t["wanted"],
        )
        for t in found["targets"]
        if t["worst"] is not None and math.isfinite(t["worst"])
    ]


def with_claims(result: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """`result` with the lines of a fresh measurement, which its file leaves out as they differ each time."""
    fresh = [asdict(c) for c in claims(found, only="measured")]
    return result | {"claims": [*result["claims"], *fresh]}


def save(home: Path, found: dict[str, Any]) -> Path:
    """Write speed.json beside the result."""
    return files.write_json(home / "speed.json", found)

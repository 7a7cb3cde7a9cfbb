"""Speed of the int4 kernels beside every peer that is installed; the README says how to run it.

Needs torch, triton and numpy alone: `PYTHONPATH=.:kernels python benchmarks/int4_kernels.py --out FOLDER`.
Each output is compared with the reference first: a wrong one is reported as wrong, without a speed. Then
come 20, 50 and 80 % quantiles, the rate as a share of the ceiling measured in the same run, ratios and the
verdict on each target, in kernels.csv (a row as it comes) and kernels.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from dfrot_kernels import backends
from dfrot_kernels.checks import KernelError

from benchmarks import targets
from benchmarks.gates import Group, Job, run_clean
from benchmarks.peers import PEERS, available
from benchmarks.records import COLUMNS, Log, ResumeError, key, plain, provenance, ratios
from benchmarks.shapes import OPS, groups
from benchmarks.timing import Ceilings, Timing, ceilings, measure, nbytes

__all__ = ["Meter", "main", "run"]


def parser() -> argparse.ArgumentParser:
    """The options; `--quick` and `--budget` keep a run short."""
    p = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    p.add_argument("--only", nargs="+", choices=OPS, default=list(OPS), metavar="OP")
    p.add_argument(
        "--shapes", nargs="+", default=[], help="parts of names, such as llama-3-8b.down"
    )
    p.add_argument("--m", nargs="+", type=int, default=[], help="numbers of tokens")
    p.add_argument(
        "--quick", action="store_true", help="the targets' shape, three numbers of tokens"
    )
    p.add_argument("--toy", action="store_true", help="sizes for a CPU")
    p.add_argument("--backend", choices=["triton", "torch"], help="default: triton where it runs")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, default=Path("results/benchmarks"), metavar="FOLDER")
    p.add_argument(
        "--peers", nargs="*", metavar="PART", help="parts of names; none given: ours alone"
    )
    p.add_argument("--resume", action="store_true", help="keep what FOLDER has, measure the rest")
    p.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    p.add_argument("--seconds", type=float, default=0.2, help="about this long a measurement")
    return p


@dataclass(frozen=True)
class Meter:
    """Where and how long is measured, and what is held to which ceilings."""

    device: torch.device
    ceilings: Ceilings
    seconds: float

    def row(self, group: Group, who: str, problem: Any) -> dict[str, Any]:
        """Gate, then time, one contestant: a row of the table. Only gate "ok" has a speed."""
        ours, build = group.contestants[who]
        row = dict.fromkeys(COLUMNS) | {"op": group.op, "who": who, "ours": ours} | group.dims
        try:
            job: Job = build(problem)
            out = run_clean(job.fn, job.args)
            size, error = nbytes(out), job.check(out)
            row |= {"out_bytes": size, "error": error if math.isfinite(error) else None}
            del out
            if not error <= job.limit:
                reason = f"error {error:.3g}, at most {job.limit:.3g}"
                return row | {"gate": "wrong", "reason": reason}
            timing = measure(job.fn, job.args, self.device, seconds=self.seconds)
        except Exception as met:  # one contestant's failure is a row, not the end of the run
            return row | {"gate": "failed", "reason": plain(f"{type(met).__name__}: {met}")}
        return row | _speed(timing, size + nbytes(job.args), job, self.ceilings)


def _speed(t: Timing, size: int, job: Job, ceiling: Ceilings) -> dict[str, Any]:
    floor = ceiling.floor(size, job.flops, job.unit)
    found = asdict(t) | {"gate": "ok", "reason": t.note}
    del found["note"]
    return found | {
        "gbs": size / t.ms50 / 1e6,
        "tflops": job.flops / t.ms50 / 1e9 if job.flops else None,
        "bound": floor[1] if floor else None,
        "share": floor[0] / t.ms50 if floor else None,
    }


def _line(row: dict[str, Any]) -> str:
    sizes = " ".join(
        f"{n}={row[n]}" for n in ("n", "k", "m", "heads", "kv_heads", "head_dim") if row.get(n)
    )
    said = f"{row['op']} {row['shape']} {sizes}  {row['who']}: "
    if row["gate"] != "ok":
        return said + f"{row['gate'].upper()}, {row['reason']}"
    share = f", {row['share']:.0%} of {row['bound']}" if row["share"] else ""
    rate = f", {row['tflops']:.1f} TFLOP/s" if row["tflops"] else ""
    times = f"{row['ms50']:.4f} ms ({row['ms20']:.4f}–{row['ms80']:.4f})"
    return said + f"{times}, {row['gbs']:.0f} GB/s{rate}{share} [{row['method']} ×{row['copies']}]"


class DeviceLost(RuntimeError):
    """After an illegal access nothing more runs in this process."""


def _still_there(device: torch.device, after: str) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLost(after) from error


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each op and size of ours: how many times as fast as each other."""
    found: dict[str, list[str]] = {}
    for r in ratios(rows):
        sizes = " ".join(f"{k}={r[k]}" for k in ("n", "k", "m") if k in r)
        start = f"{r['op']} {r['shape']} {sizes}, times as fast: {r['ours']} over "
        found.setdefault(start, []).append(f"{r['against']} {r['ratio']:.2f}")
    return [start + ", ".join(parts) for start, parts in found.items()]


def _name(group: Group, who: str) -> str:
    return f"{group.op} {' '.join(f'{k}={v}' for k, v in group.dims.items())} {who}"


def run(args: argparse.Namespace) -> tuple[Log, list[str]]:
    """Measure what the arguments ask for; the log and the names of what was skipped."""
    begun, device = time.monotonic(), torch.device(args.device)
    backend = args.backend or backends.default(device)
    ops = backends.get(backend)
    asked = [p for p in PEERS if args.peers is None or any(part in p.name for part in args.peers)]
    absent = {p.name: "not asked for" for p in PEERS if p not in asked} | available(device, asked)
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    origin = provenance(device, backend)
    ceiling = ceilings(device, toy=args.toy)
    shown = ", ".join(f"{k} {v:.1f}" for k, v in asdict(ceiling).items() if v)
    print(f"{origin['device']}, backend {backend}; ceilings in GB/s and TFLOP/s: {shown}")
    said = {
        k: v for k, v in vars(args).items() if k != "out"
    }  # where it was written is nobody's affair
    said["budget"] = None if args.budget == float("inf") else args.budget
    session = {"date": origin["date"], "arguments": said, "ceilings": asdict(ceiling)}
    log = Log(args.out, "kernels", origin, session, resume=args.resume)
    plan = groups(
        *(ops, device, absent),
        only=tuple(args.only),
        shapes=tuple(args.shapes),
        rows=tuple(args.m),
        toy=args.toy,
        quick=args.quick,
    )
    meter, done, skipped = Meter(device, ceiling, args.seconds), log.done, []
    total, count = sum(len(group.contestants) for group in plan), 0
    try:
        for group in plan:
            stem = {"op": group.op} | group.dims
            left = [who for who in group.contestants if key(stem | {"who": who}) not in done]
            count += len(group.contestants) - len(left)
            problem = None
            for who in left:
                count += 1
                if time.monotonic() - begun > args.budget:
                    skipped.append(_name(group, who))
                    continue
                problem = group.make() if problem is None else problem
                row = meter.row(group, who, problem)
                log.add(row)
                print(
                    f"[{count}/{total} {time.monotonic() - begun:.0f} s] {_line(row)}", flush=True
                )
            del problem
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except (KeyboardInterrupt, DeviceLost) as end:
        skipped.append(f"what follows {str(end) or 'the interruption'}")
    session["seconds"] = round(time.monotonic() - begun, 1)
    log.close({"absent": absent, "skipped": skipped, "targets": targets.judge(log.rows)})
    return log, skipped


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print a summary; 1 if one of ours is wrong or failed, 2 for a request that cannot be met."""
    args = parser().parse_args(argv)
    try:
        log, skipped = run(args)
    except (KernelError, ResumeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(_ratios(log.rows)))
    if skipped:
        print(
            f"skipped, out of time: {len(skipped)}, the first {skipped[0]}; --resume measures them"
        )
    print(targets.lines(targets.judge(log.rows)))
    bad = [row for row in log.rows if row["ours"] and row["gate"] != "ok"]
    for row in bad:
        print(f"NOT TIMED: {_line(row)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

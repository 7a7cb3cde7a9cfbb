"""Seconds of a call: on CUDA by events around graph replays over rotating buffers, on the CPU by the clock.

A kernel that is timed again and again on one weight finds it in L2 (60 MB on a large card), as a model
never does. So the arguments are cloned until the copies together exceed the cache several times, and
calls go round them. A CUDA graph of many calls removes the launch gaps, as serving engines do.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Ceilings", "Timing", "ceilings", "measure", "nbytes", "replicate", "rotation"]

CACHES = 4  # the copies together are this many times the cache
MOST_COPIES = 64
CPU_COPIES = 2


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: 20, 50 and 80 % quantiles.

    method: "graph" (quantiles over replays, each the mean of its calls), "events" or "clock" (over
    single calls); note: why not a graph, or why a single copy; copies: argument sets in rotation.
    """

    ms20: float
    ms50: float
    ms80: float
    method: str
    copies: int
    calls: int
    note: str = ""


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run; None where it could not be measured.

    copy: bytes read and written by a large copy, GB/s, the faster of a plain one and a kernel's; bf16 and
    int8: a large square product, TFLOP/s and TOP/s (`torch._int_mm`).
    """

    copy: float | None
    bf16: float | None
    int8: float | None

    def floor(self, size: int, flops: int, unit: str) -> tuple[float, str] | None:
        """Least milliseconds for `size` bytes and `flops` in `unit`, and which of the two binds."""
        times = []
        if self.copy:
            times.append((size / self.copy / 1e6, "copy"))
        rate = getattr(self, unit)
        if rate and flops:
            times.append((flops / rate / 1e9, unit))
        return max(times, default=None)


def nbytes(x: Any) -> int:
    """Bytes of the tensors in `x`: a tensor, a module, or a tuple of such."""
    if isinstance(x, Tensor):
        return x.numel() * x.element_size()
    if isinstance(x, nn.Module):
        return sum(nbytes(t) for t in (*x.parameters(), *x.buffers()))
    return sum(map(nbytes, x)) if isinstance(x, tuple | list) else 0


def replicate(x: Any) -> Any:
    """`x` with every tensor in it cloned, strides kept."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, nn.Module):
        return copy.deepcopy(x)
    if isinstance(x, tuple):
        parts = [replicate(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def rotation(args: tuple, device: torch.device) -> int:
    """How many copies of `args` are needed to outgrow the cache."""
    if device.type != "cuda":
        return CPU_COPIES
    size = max(nbytes(args), 1)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    room = torch.cuda.mem_get_info(device)[0] // 2 // size
    return max(1, min(math.ceil(CACHES * cache / size), MOST_COPIES, room))


def measure(
    fn: Callable,
    args: tuple,
    device: torch.device,
    *,
    seconds: float = 0.2,
    copies: int | None = None,
) -> Timing:
    """Time fn(*args) for about `seconds`; copies: of the arguments, by default as `rotation` says."""
    copies = rotation(args, device) if copies is None else copies
    sets, note = [args], ""
    try:
        sets += [replicate(args) for _ in range(copies - 1)]
    except Exception as error:  # what a peer's module raises when copied is its own affair
        sets, note = [args], f"one copy: {type(error).__name__}"
    if device.type != "cuda":
        return _clock(fn, sets, seconds, note)
    for each in sets:  # compiles and tunes outside the clock
        fn(*each)
    try:
        return _graph(fn, sets, seconds, note)
    except Exception as error:  # any op that may not be captured: named, and timed call by call
        torch.cuda.synchronize()
        note = "; ".join(filter(None, [note, f"no graph: {type(error).__name__}"]))
        return _events(fn, sets, seconds, note)


def _clock(fn: Callable, sets: list[tuple], seconds: float, note: str) -> Timing:
    fn(*sets[0])
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 1000):
        start = time.perf_counter()
        fn(*sets[len(times) % len(sets)])
        times.append(1e3 * (time.perf_counter() - start))
    return _timing(times, "clock", len(sets), len(times), note)


def _between(run: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` runs, by events; one synchronization at the end."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    for start, stop in marks:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in marks]


def _once(fn: Callable, sets: list[tuple]) -> float:
    """Milliseconds a call, roughly: one round through the copies."""
    return max(_between(lambda: [fn(*each) for each in sets], 2)[1] / len(sets), 1e-3)


def _events(fn: Callable, sets: list[tuple], seconds: float, note: str) -> Timing:
    repeats = min(max(int(1e3 * seconds / _once(fn, sets)), 10), 500)
    turn = iter(range(repeats))
    times = _between(lambda: fn(*sets[next(turn) % len(sets)]), repeats)
    return _timing(times, "events", len(sets), repeats, note)


def _graph(fn: Callable, sets: list[tuple], seconds: float, note: str) -> Timing:
    once = _once(fn, sets)
    rounds = min(
        math.ceil(2 / (once * len(sets))), math.ceil(512 / len(sets))
    )  # about 2 ms a replay
    calls = rounds * len(sets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            fn(*sets[i % len(sets)])
    graph.replay()
    repeats = min(max(int(1e3 * seconds / (once * calls)), 10), 200)
    times = [t / calls for t in _between(graph.replay, repeats)]
    return _timing(times, "graph", len(sets), calls * repeats, note)


def _timing(times: list[float], method: str, copies: int, calls: int, note: str) -> Timing:
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(tenths[1], tenths[4], tenths[7], method, copies, calls, note)


def ceilings(device: torch.device, *, toy: bool = False) -> Ceilings:
    """Measure the three ceilings on random data (zeros run faster than real numbers)."""
    cuda = device.type == "cuda"
    size = 2**30 if cuda else 2**20 if toy else 2**26
    n = 8192 if cuda else 64 if toy else 512
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=device)
    words = source.view(torch.int32)
    pairs = (
        (Tensor.copy_, (torch.empty_like(source), source)),
        (_negate, (torch.empty_like(words), words)),
    )
    rates = [_rate(fn, args, device, 2 * size / 1e6) for fn, args in pairs]
    copied = max((rate for rate in rates if rate), default=None)
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    product = _rate(torch.mm, (a, b.T), device, 2 * n**3 / 1e9)
    a, b = torch.randint(-8, 8, (2, n, n), dtype=torch.int8, device=device)
    integer = _rate(torch._int_mm, (a, b.T), device, 2 * n**3 / 1e9)
    return Ceilings(copied, product, integer)


def _negate(out: Tensor, x: Tensor) -> Tensor:
    """A copy by a kernel: in a graph a plain one is left to the copy engine, which is slower."""
    return torch.neg(x, out=out)


def _rate(fn: Callable, args: tuple, device: torch.device, work: float) -> float | None:
    try:
        return work / measure(fn, args, device, copies=1).ms50
    except (RuntimeError, NotImplementedError):  # no int8 product on this device
        return None

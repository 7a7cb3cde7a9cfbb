"""Exercises of notebooks 02, 03 and 06: a token's step, its error, the floor, and what is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from dfrot_lab import massive, quantizers, rotations
from dfrot_lab.answers import Comparison
from dfrot_lab.lessons.lesson import rows, tried
from dfrot_lab.linears import InputQuantizer
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.studies.massive_tokens_fp16 import closed_share

__all__ = ["LESSONS"]

SPEC = QuantSpec()  # 4 bits, asymmetric, per token


# --- 02 --------------------------------------------------------------------------------------------


def _step(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return quantizers.step(x, QuantSpec(bits=bits))


def _step_inputs() -> dict[str, tuple]:
    whole = torch.tensor([[15.0, 0.0, 3.0, 7.0], [-5.0, 10.0, 0.0, 1.0]], dtype=torch.float64)
    zeros = torch.stack([torch.zeros(6), torch.arange(6.0) - 2]).double()
    return {
        "steps of 1": (whole, 4),
        "all above zero: the range still starts there": (rows(2, 5).abs() + 3, 4),
        "all below zero: it still ends there": (-rows(2, 5).abs() - 3, 4),
        "a row of zeros has the step 1": (zeros, 4),
        "3 bits, 17 entries": (rows(3, 17, 1), 3),
        "8 bits, a spike": (rows(4, 33, 2, spike=100.0), 8),
    }


def _error(x: Tensor, r: Tensor) -> Tensor:
    return quantizers.squared_error(x @ r, SPEC)


def _error_inputs() -> dict[str, tuple]:
    d = (4, 12, 33, 64)
    found = {f"RO, d = {n}": (rows(3, n, n), rotations.random_orthogonal(n, n)) for n in d}
    spiky = {f"RH, d = {n}, a spike": (rows(3, n, n, 50.0), rotations.random_hadamard(n, n))
             for n in (4, 12, 64)}  # fmt: skip
    return {"no rotation, d = 4": (rows(2, 4, spike=7.0), rotations.identity(4))} | found | spiky


def _floor(d: int, bits: int) -> float:
    return massive.gaussian_floor(d, QuantSpec(bits=bits))


def _floor_inputs() -> dict[str, tuple]:
    sizes = ((64, 4), (576, 4), (576, 8), (900, 3))
    return {f"d = {d}, {bits} bits": (d, bits) for d, bits in sizes}


# --- 03 --------------------------------------------------------------------------------------------


def _massive(x: Tensor, floor: float) -> Tensor:
    return massive.is_massive(x, SPEC)


def _massive_inputs() -> dict[str, tuple]:
    def case(x: Tensor) -> tuple:
        return x, massive.gaussian_floor(x.shape[-1], SPEC)

    many = rows(200, 128, 3)
    many[::3, 5] = 15 + torch.arange(len(many[::3])) * 10.0
    heavy = torch.zeros(2, 96, dtype=torch.float64)
    heavy[:, :2] = torch.tensor([[40.0, 40.0], [40.0, -17.3]], dtype=torch.float64)
    return {
        "one spike, and noise": case(rows(2, 64, spike=500.0)),
        "spiky, but it errs more than a Gaussian row": case(rows(4, 64, 1, spike=8.0)),
        "200 rows of noise: half err less than the floor": case(rows(200, 64, 2)),
        "spikes of every size": case(many),
        "two spikes and nothing else": case(heavy + rows(2, 96, 4) / 100),
    }


def _keep(y: Tensor, r: Tensor) -> Tensor:
    quantizer = InputQuantizer(readers=1)
    quantizer.spec = SPEC
    quantizer.keep = lambda rotated: massive.is_massive(rotated @ r.mT, SPEC)
    return quantizer(y[None])[0]


def _keep_inputs() -> dict[str, tuple]:
    found = {}
    for n, d in enumerate((16, 36, 65)):
        x, r = rows(3, d, n, spike=900.0), rotations.random_orthogonal(d, n)
        found[f"d = {d}, the first row is massive"] = (x @ r, r)
    r = rotations.random_hadamard(64)
    return found | {"RH, no row is massive": (rows(3, 64, 5) @ r, r)}


def _closed(ro: list[float], rh: list[float], ro_kept: list[float], rh_kept: list[float]) -> float:
    columns = {("RO", "none"): ro, ("RH", "none"): rh}
    columns |= {("RO", "massive"): ro_kept, ("RH", "massive"): rh_kept}
    table = [
        {"rotation": name, "keep": keep, "seed": seed, "ppl": value}
        for (name, keep), values in columns.items()
        for seed, value in enumerate(values)
    ]
    return closed_share(table)["of_means"]


def _closed_inputs() -> dict[str, tuple]:
    return {
        "half of the gap": ([40.0], [30.0], [33.0], [28.0]),
        "all of it": ([8.0], [6.0], [5.5], [5.5]),
        "three seeds: the share of the means": (
            [43.5, 38.0, 41.5], [33.0, 32.0, 32.5], [33.5, 32.75, 34.0], [31.5, 31.25, 31.75],
        ),
        "keeping them makes it worse": ([10.0, 11.0], [9.0, 9.0], [12.0, 12.0], [9.0, 8.5]),
    }  # fmt: skip


# --- 06 --------------------------------------------------------------------------------------------


def _static(calibration: list[Tensor], x: Tensor) -> Tensor:
    spec = QuantSpec(granularity="tensor")
    scale, zero = quantizers.calibrate(calibration, spec)
    return quantizers.fake_quantize(x, spec, scale=scale, zero=zero)


def _static_inputs() -> dict[str, tuple]:
    return {
        "one window": ([rows(2, 3)], rows(2, 3, 1)),
        "two windows of unequal length": ([rows(3, 7, 2), rows(5, 7, 3)], rows(2, 7, 4)),
        "a massive token in calibration": ([rows(4, 9, 5, spike=300.0)], rows(3, 9, 6)),
        "one that calibration has not seen": ([rows(4, 9, 7)], rows(3, 9, 8, spike=300.0)),
        "all above zero": ([rows(4, 5, 9).abs() + 2], rows(2, 5, 10)),
    }


def _clip(x: Tensor, ratio: float) -> Tensor:
    return quantizers.fake_quantize(x, QuantSpec(clip=ratio))


def _clip_inputs() -> dict[str, tuple]:
    return {
        "c = 1: nothing is clipped": (rows(2, 5), 1.0),
        "c = 0.8": (rows(2, 7, 1), 0.8),
        "c = 0.5, a spike": (rows(3, 11, 2, spike=40.0), 0.5),
        "c = 0.9, all above zero": (rows(2, 9, 3).abs() + 1, 0.9),
    }


LESSONS = {
    "02.step": tried(_step, _step_inputs),
    "02.error": tried(_error, _error_inputs),
    # by the integral or by simulation
    "02.floor": tried(_floor, _floor_inputs, Comparison(rtol=0.03)),
    "03.massive": tried(_massive, _massive_inputs),
    "03.keep": tried(_keep, _keep_inputs),
    "03.closed": tried(_closed, _closed_inputs),
    "06.static": tried(_static, _static_inputs),
    "06.clip": tried(_clip, _clip_inputs),
}

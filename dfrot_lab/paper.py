"""Paper: the published numbers, by the key of data/paper.json, so that none is typed twice."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["gamma", "numbers", "readme_rtn", "table1", "token_errors"]


@cache
def numbers() -> dict[str, Any]:
    """All of data/paper.json; its "source" says which edition each key is from."""
    return json.loads((Path(__file__).parent / "data" / "paper.json").read_text())


def table1(model: str, row: str, bits: str = "4-4-16") -> float:
    """Table 1: WikiText-2 perplexity of `row` (GPTQ, RO, RO.FP16, RH, RH.FP16), GPTQ weights."""
    table = numbers()["table1_ro_vs_rh_gptq"]
    return table[model][row][table["columns"].index(bits)]


def gamma(model: str, start: str, value: float | str = 100) -> float:
    """Figures 5 and 6: perplexity at 4-4-16 of DFRot from `start` (RH or RO) with γ = `value`."""
    table = numbers()["gamma_ablation_4-4-16"]
    return table[f"{start}_init"][model][table["gamma"].index(value)]


def readme_rtn(model: str, method: str, bits: str = "4-4-16") -> float:
    """README edition of Table 2 with RTN weights; method: QuaRot-RTN or DFRot-RTN."""
    table = numbers()["table2_readme_rtn"]
    return table[model][method][table["columns"].index(bits)]


def token_errors() -> dict[str, float]:
    """Figure 4: squared error of one massive token of LLaMA3-8B (d = 4096) under each rotation."""
    return numbers()["figure4_massive_token_squared_error_LLaMA3-8B"]

"""The glossary: every term defined once, every reference to code a thing that exists; and who links to it."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "glossary.md").read_text()
ENTRIES = [line for line in TEXT.splitlines() if line.startswith("- ")]
HEADS = [re.match(r"- \*\*(.+?)\*\*", line) for line in ENTRIES]
TERMS = """Act-order|Calibration|Clip ratio|Code|DFRot|Fake quantization|GPTQ|Gaussian floor|Group size
Hadamard matrix|Hessian|KL|KV cache|Kurtosis|Massive activation|Massive token|NR|Norm site
Per-token|Perplexity|Procrustes|Quantizer
R1|R2|R3|R4|RH|RH²|RMSNorm|RO|RTN|Static|Step|Symmetric|W4A4|Zero point|nll|γ"""
BESIDE = (
    "asymmetric",
    "per-channel",
    "dynamic",
    "W-A-KV",
    "online",
)  # defined with their opposites
CODE = sorted(set(re.findall(r"Code: `([\w.]+)`", TEXT)))


def test_every_entry_has_a_term_and_no_term_two():
    assert all(HEADS) and len(HEADS) > 40
    found = [m[1].lower() for m in HEADS]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("term", re.split(r"[|\n]", TERMS))
def test_a_term_is_defined_exactly_once(term):
    assert [m[1] for m in HEADS].count(term) == 1


@pytest.mark.parametrize("term", BESIDE)
def test_a_term_beside_its_opposite_is_defined_exactly_once(term):
    assert TEXT.count(f"*{term}*") == 1 and f"**{term}**" not in TEXT


@pytest.mark.parametrize("name", CODE)
def test_code_that_is_named_exists(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)


def test_readme_and_every_notebook_link_to_it():
    assert "(docs/glossary.md)" in (ROOT / "README.md").read_text()
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        first = "".join(json.loads(path.read_text())["cells"][0]["source"])
        assert "(../docs/glossary.md)" in first, path.name


def test_the_teaching_plan_is_ninety_minutes():
    plan = (ROOT / "docs" / "teaching.md").read_text()
    rows = re.findall(r"^\| (\d+)–(\d+) \|", plan, re.MULTILINE)
    minutes = [(int(a), int(b)) for a, b in rows]
    assert minutes[0][0] == 0 and minutes[-1][1] == 90
    assert all(a[1] == b[0] and a[0] < a[1] for a, b in itertools.pairwise(minutes))
    asked = set(re.findall(r"`(\d\d\.\w+)`", plan))
    from dfrot_lab.lessons import LESSONS

    assert asked and asked <= set(LESSONS)

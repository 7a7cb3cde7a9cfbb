"""Exercises of notebook 07: every stub turns red, every solution green, and so do our own kernels."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from dfrot_kernels import backends

from dfrot_lab import exercises
from dfrot_lab.exercises import EXERCISES

ROOT = Path(__file__).resolve().parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed here")
KERNELS = [name for name, e in EXERCISES.items() if e.kernel]


def cells() -> list[dict]:
    return json.loads((ROOT / "notebooks" / "07_int4_kernels.ipynb").read_text())["cells"]


def stubs() -> dict[str, str]:
    """Exercise → the code of its cell: the one whose next code cell checks it."""
    code = [c for c in cells() if c["cell_type"] == "code"]
    found = {}
    for cell, after in itertools.pairwise(code):
        if "exercise" in cell["metadata"].get("tags", []):
            asked = re.match(r'exercises\.check\("(\w+)", my_(\w+)\)', "".join(after["source"]))
            assert asked and asked[1] == asked[2], "an exercise is followed by its check"
            found[asked[1]] = "".join(cell["source"])
    return found


def solutions() -> dict[str, str]:
    """Exercise → the code folded away in the cells of text."""
    text = "\n".join("".join(c["source"]) for c in cells() if c["cell_type"] == "markdown")
    folded = re.findall(
        r"<summary>Solution</summary>\s+```python\n(.*?)```\n</details>", text, re.DOTALL
    )
    return {re.search(r"def my_(\w+)", code)[1]: code for code in folded}


@pytest.fixture
def defined(tmp_path):
    """Code of the notebook → its function, from a file: Triton reads the source of a kernel."""

    def load(name: str, code: str):
        head = "import triton.language as tl\n\n\n" if HAS_TRITON else ""
        path = tmp_path / f"my_{name}.py"
        path.write_text(head + code)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, f"my_{name}")

    return load


def test_the_notebook_has_every_exercise_once():
    assert list(stubs()) == list(solutions()) == list(EXERCISES)
    for name in EXERCISES:  # a solution only adds to what the stub gives: same arguments
        head = [
            re.search(r"def .*?\):", s, re.DOTALL)[0] for s in (stubs()[name], solutions()[name])
        ]
        assert head[0] == head[1]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_triton if n in KERNELS else ()) for n in EXERCISES]
)
def test_the_stub_fails_and_the_solution_passes(name, defined):
    stub = exercises.check(name, defined(name, stubs()[name]))
    assert stub.state == "failed" and not stub
    assert "wanted" in stub.example and "case 1 of" in stub.text  # the first case can be read
    solved = exercises.check(name, defined(name, solutions()[name]))
    assert solved, solved


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_our_own_pass_the_same_checks(name, backend):
    report = exercises.examine(name, EXERCISES[name].twin(backends.get(backend)))
    assert report, report


MUTATIONS = [
    ("pack", "codes.chunk(2, -1)", "(codes[..., ::2], codes[..., 1::2])"),  # neighbours
    ("pack", "low & 15", "low"),
    ("codes", "+ 12582912.0) - 12582912.0", "+ 0.5) // 1"),  # ties upward
    ("codes", "tl.where(b_scale > 0, b_scale, 1.0)", "b_scale"),
    ("codes", "tl.abs(b_x)", "b_x"),
    ("codes", "    tl.store(p_scale + i_t, b_scale)\n", ""),
    ("quantize_pack", ", b_b), 0), 0.0)", ", b_b), 0), -1e30)"),  # 0 is no longer an extreme
    ("quantize_pack", "0.0, 15.0", "0.0, 14.0"),
    ("quantize_pack", "- 8)\n", ")\n"),
    ("product", "b_x << 4", "b_x"),
    ("product", "b_x & -16, b_w & -16", "b_x & 112, b_w & -16"),  # the sign of the high nibble
    ("product", " - b_zero[:, None] * b_sums", ""),
    ("product", "m_k = i_k < HALF", "m_k = i_k < HALF - 1"),
]


@needs_triton
@pytest.mark.parametrize(("name", "right", "wrong"), MUTATIONS)
def test_a_slip_is_found(name, right, wrong, defined):
    code = solutions()[name]
    assert right in code
    report = exercises.check(name, defined(name, code.replace(right, wrong)))
    assert report.state == "failed" and report.example


@needs_triton
def test_what_goes_wrong_in_a_readers_code_is_a_report():
    def broken(p_x, p_codes, p_scale, K, BLOCK):
        raise RuntimeError("not\nthis")

    def few(p_x):
        pass

    reports = [exercises.check("codes", f) for f in (broken, few, None, 3)]
    assert {r.state for r in reports} == {"failed"}
    assert all("raises " in r.example for r in reports)
    assert "\n\nx [1, 4] = 7, -7, 3, 0" in reports[0].example


def test_a_report_says_in_words_what_its_colour_says():
    passed = exercises.check("pack", backends.get("torch").pack)
    failed = exercises.check("pack", lambda codes: codes)
    for report, word, sign in ((passed, "passed", "✓"), (failed, "failed", "✗")):
        assert word in report._repr_html_() and sign in str(report) == repr(report)
    assert "<pre>" in failed._repr_html_() and "<pre>" not in passed._repr_html_()
    markup = exercises.check("pack", lambda codes: (_ for _ in ()).throw(ValueError("<b>&")))
    assert "&lt;b&gt;&amp;" in markup._repr_html_()


def test_an_argument_that_is_written_to_spoils_nothing():
    def greedy(codes):
        packed = backends.get("torch").pack(codes)
        codes.zero_()
        return packed

    assert exercises.check("pack", greedy) and exercises.check("pack", backends.get("torch").pack)


def test_without_triton_a_kernel_is_not_tried(monkeypatch):
    monkeypatch.setattr(exercises, "find_spec", lambda name: None)
    report = exercises.check("codes", None)
    assert report.state == "needs triton" and not report and "needs triton" in report.headline
    monkeypatch.undo()
    if HAS_TRITON and not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET")
        assert "TRITON_INTERPRET=1" in exercises.check("codes", None).text


def test_an_unknown_exercise_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'knit' is unknown: use one of pack, codes"):
        exercises.check("knit", None)


def test_importing_the_exercises_needs_no_triton():
    import subprocess

    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import dfrot_lab.exercises, dfrot_lab.lessons\n"
        "import dfrot_lab.studies.int4_kernels, dfrot_lab.studies.int4_speed"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

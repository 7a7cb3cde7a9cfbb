"""Exported checkpoints by engine: a run at toy sizes, and the table of docs/export.md."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from benchmarks import compressed
from dfrot_lab import files
from dfrot_lab.evaluation import Perplexity

ROOT = Path(__file__).parents[1]


def fake_vllm(folder: Path) -> Path:
    """An interpreter that refuses 4-bit activations and else gives one nat a token."""
    script, code = folder / "python", folder / "vllm.py"
    # not in the first line of a script, where a path with a space is cut
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{code}" "$@"\n')
    code.write_text(
        """import json, sys
_, _, model, tokens, out = sys.argv
config = json.load(open(model + "/config.json"))
groups = config.get("quantization_config", {}).get("config_groups", {})
if any(g["input_activations"]["num_bits"] == 4 for g in groups.values()):
    print("x\\nValueError: no scheme for W4A4\\nRuntimeError: failed"); sys.exit(1)
json.dump({"vllm": "0", "nll": [1.0 for _ in json.load(open(tokens))]}, open(out, "w"))
"""
    )
    script.chmod(0o755)
    return script


def test_every_engine_is_asked_once(tmp_path):
    pytest.importorskip("compressed_tensors")
    out, page = tmp_path / "c.json", tmp_path / "page.md"
    page.write_text(f"a\n{compressed.MARK}\n{compressed.MARK}\n")
    ask = ["--model", "tiny:llama", "--corpus", "pydoc", "--seqlen", "32", "--method", "rtn"]
    ask += ["--calibration", "1", "--vllm", str(fake_vllm(tmp_path)), "--out", str(out)]
    ask += ["--work", str(tmp_path / "work")]
    done = CliRunner().invoke(compressed.main, [*ask, "--page", str(page)])
    assert done.exit_code == 0, done.output
    rows = files.read_json(out)["rows"]
    assert [r["bits"] for r in rows] == list(compressed.BITS)
    full, w4a8, w4a4 = rows
    assert "ours" not in full and full["vllm"]["nll"] == [1.0, 1.0]
    for row in (w4a8, w4a4):  # other kernels, the same numbers but for ties
        assert row["ours"] == pytest.approx(row["transformers"], rel=1e-3)
    assert w4a4["vllm"] == {"says": "ValueError: no scheme for W4A4"}
    assert "`ValueError: no scheme for W4A4`" in page.read_text()
    again = CliRunner().invoke(compressed.main, ask)
    assert again.exit_code == 0 and "FP, RH" not in again.output  # nothing is measured twice
    other = CliRunner().invoke(compressed.main, [*ask, "--windows", "1"])
    assert other.exit_code == 1 and "windows was 2 and is 1 now" in other.output
    assert "use another --out" in other.output


def test_an_engine_that_ends_without_an_error_is_told(tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho lost\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(click.ClickException, match="vLLM ended with 3: lost"):
        compressed.by_vllm(str(script), tmp_path, torch.zeros(1, 4, dtype=torch.long))


def test_the_committed_numbers_are_those_of_the_page():
    table = files.read_json(ROOT / "figures" / "compressed.json")
    page = (ROOT / "docs" / "export.md").read_text()
    mark = compressed.MARK
    assert f"{mark}\n{compressed.markdown(table)}\n{mark}" in page
    for row in table["rows"]:
        theirs = Perplexity(row["transformers"]).value
        if "ours" in row:
            assert abs(Perplexity(row["ours"]).value / theirs - 1) < 0.05
        if "nll" in row.get("vllm", {}) and row["bits"] == compressed.FULL:
            assert abs(Perplexity(row["vllm"]["nll"]).value / theirs - 1) < 0.005

"""The paper profile on a tiny model of every family: the notebooks' own cells, no hub."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

from dfrot_lab import models, notebooks, plots

ROOT = Path(__file__).parents[1]
# what the hub, a GPU and days would otherwise be needed for; everything else is the paper profile's
SMALL = {
    "corpus": "pydoc", "seqlen": 64, "dtype": "float32", "device": "cpu", "threads": 1,
    "site": "layers.1.mlp", "seeds": [0, 1], "iterations": 5, "windows": 2, "side_windows": 1,
    "confirm_windows": 2,
    "side_seeds": 1, "final_windows": 1, "final_seeds": 1, "weight_windows": 4, "samples": 2,
    "sites": [2, 1], "gammas": [1.0, float("inf")], "corpora": ["pydoc"], "rounds": 1, "tokens": 32,
    "clips": [1.0, 0.9], "clip_steps": 4, "peak_tokens": [1, 32], "draws": 1, "second": "pydoc",
    "cayley_steps": 2, "cayley_length": 32, "tasks": ["last_word", "continuation"], "items": 8,
}  # fmt: skip


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
def test_every_notebook_runs_as_the_paper_profile_asks(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for drawing in ("draw", "draw_notebook"):  # every figure is drawn in test_plots
        monkeypatch.setattr(plots, drawing, lambda *_: None)
    for file in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        if file.stem.startswith("07") and kind != "llama":
            continue  # its kernels are the same for all; packing each family is in test_linears
        known = notebooks.parameters(file)
        given = {k: v for k, v in SMALL.items() if k in known}
        given |= {"model": f"tiny:{kind}", "folder": str(tmp_path)}
        cells = [c for c in nbformat.read(file, 4).cells if c.cell_type == "code"]
        space = {name: default for name, (_, default) in known.items()}
        space |= notebooks.resolve(file, "paper", given)
        for cell in cells[1:]:
            exec(compile(cell.source, file.name, "exec"), space)
        result = json.loads((tmp_path / file.stem / "result.json").read_text())
        assert result["claims"] and result["parameters"]["model"] == f"tiny:{kind}"
    gptq = json.loads((tmp_path / "05_tables" / "result.json").read_text())
    assert {r["method"] for r in gptq["rows"]} == {None, "gptq", "rtn"}  # as published, not shared
    assert (tmp_path / "05_tables" / "tables_1_and_2.tex").is_file()

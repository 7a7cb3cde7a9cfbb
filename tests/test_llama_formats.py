"""llama.cpp's own formats: what is measured, the tables and the page; llama.cpp itself in the slow tests."""

from __future__ import annotations

from pathlib import Path

import click
import gguf as format
import numpy as np
import pytest
import torch
from conftest import logits, random_tokens, relative
from gguf import quants

from benchmarks import llama_formats, llama_table, pages
from benchmarks.llama_formats import Variant
from dfrot_lab import corpora, evaluation, files, models, rotations
from dfrot_lab.evaluation import Perplexity
from dfrot_lab.exports import gguf, sources

ROOT = Path(__file__).parents[1]
ABOUT = {"tokens": "abc", "llama-cpp-python": "0.3.36"}
SHAPE = {"hidden_size": 576, "num_attention_heads": 9, "intermediate_size": 1536}


def cell(row, kind, nll, size=100e6, seed=None, r1=None):
    untied = row != "unrotated"
    about = {"row": row, "seed": seed, "R1": r1, "format": kind}
    return about | {"nll": nll, "bytes": size, "untied": untied}


TABLE = {
    "about": ABOUT,
    "transformers": [3.0, 3.0],
    "cells": [
        cell("unrotated", "F32", [3.0, 3.0], 538e6),
        cell("permuted", "F32", [3.0, 3.0], 651e6, 0),
        cell("permuted", "Q4_0", [3.2, 3.4], 122e6, 0),
        cell("permuted", "Q4_0", [3.4, 3.6], 122e6, 1),
        cell("RH", "Q4_0", [3.1, 3.3], 122e6, 0),
        cell("RH", "Q4_0", [3.1, 3.5], 122e6, 1),
        cell("unrotated", "Q4_0", [3.5, 3.5], 92e6),
    ],
}


def test_the_committed_numbers_are_those_of_the_page():
    table = files.read_json(ROOT / "figures" / "llama_formats.json")
    page = (ROOT / "docs" / "export.md").read_text()
    assert f"{llama_table.MARK}\n{llama_table.markdown(table)}\n{llama_table.MARK}" in page
    wanted = Perplexity(table["transformers"]).value
    whole = [Perplexity(c["nll"]).value for c in table["cells"] if c["format"] == "F32"]
    assert whole and all(abs(found / wanted - 1) < 0.005 for found in whole)
    assert {len(c["nll"]) for c in table["cells"]} == {table["about"]["windows"]}
    assert table["about"]["llama-cpp-python"] in page


def test_perplexity_is_the_mean_over_seeds():
    lines = llama_table.perplexities(TABLE).splitlines()
    assert lines[0] == "| Perplexity | F32 | Q4_0 |"
    assert lines[2] == "| unrotated, by transformers | 20.086 | – |"
    each = torch.tensor([3.2, 3.3]).exp()
    assert lines[5] == f"| RH, 2 seeds | – | {each.mean():.3f} ± {each.std():.3f} |"


def test_sizes_tell_one_table_from_two():
    lines = llama_table.perplexities(TABLE).splitlines()[-2:]
    assert lines == [
        "| MB, one table for embedding and head: unrotated | 538 | 92 |",
        "| MB, two tables for embedding and head: permuted, RH | 651 | 122 |",
    ]


def test_differences_are_paired_by_window_after_the_mean_over_seeds():
    lines = llama_table.differences(TABLE).splitlines()
    assert lines[0] == "| nll − nll of permuted | Q4_0 |"
    d = evaluation.paired_difference([3.1, 3.4], [3.3, 3.5])
    assert lines[3] == f"| RH, 2 seeds | −{-d['mean']:.3f} [−{-d['low']:.3f}, +{d['high']:.3f}] |"
    assert lines[2].startswith("| unrotated | +0.100 [")


def test_what_was_not_measured_is_a_dash():
    table = TABLE | {"cells": TABLE["cells"][:1]}
    assert llama_table.perplexities(table).splitlines()[-1].endswith("| 538 |")
    assert llama_table.differences(TABLE | {"cells": TABLE["cells"][4:]}).count("–") == 2


def test_the_table_takes_its_place_on_the_page(tmp_path):
    page, mark = tmp_path / "page.md", llama_table.MARK
    page.write_text(f"before\n{mark}\nold\n{mark}\nafter\n")
    pages.put(page, "new", mark)
    assert page.read_text() == f"before\n{mark}\nnew\n{mark}\nafter\n"
    page.write_text("no mark")
    with pytest.raises(click.ClickException, match="holds 0 lines"):
        pages.put(page, "new", mark)


def test_a_table_of_another_build_is_not_gone_on_with(tmp_path):
    out = tmp_path / "table.json"
    assert llama_formats.resumed(out, ABOUT, [])["cells"] == []
    files.write_json(out, TABLE)
    assert llama_formats.resumed(out, ABOUT, []) == files.read_json(out)
    with pytest.raises(click.ClickException, match=r"llama-cpp-python = 0\.3\.36, this is 0\.4"):
        llama_formats.resumed(out, ABOUT | {"llama-cpp-python": "0.4"}, [])


def test_refined_rotations_of_two_runs_are_not_averaged(tmp_path):
    out = tmp_path / "table.json"
    files.write_json(out, TABLE | {"cells": [cell("refined", "Q4_0", [3.0, 3.0], r1="aa")]})
    llama_formats.resumed(out, ABOUT, [Variant("refined", 0, "aa"), Variant("refined", 1, "bb")])
    llama_formats.resumed(out, ABOUT, [Variant("RH", 0)])
    with pytest.raises(click.ClickException, match="SHA-256 aa"):
        llama_formats.resumed(out, ABOUT, [Variant("refined", 0, "bb")])


def test_what_is_there_is_not_measured_again(tmp_path):
    path = rotations.save(tmp_path / "R1.safetensors", rotations.random_hadamard(64), {"seed": 3})
    wanted = list(llama_formats.variants(2, [str(path)]))
    assert wanted[-1] == Variant("refined", 3, files.sha256(path)) and len(wanted) == 8
    left = dict(llama_formats.missing(TABLE, wanted, ["Q4_0", "Q8_0"]))
    assert left[Variant("unrotated")] == ["Q8_0"] and left[Variant("RH", 0)] == ["F32", "Q8_0"]
    assert left[Variant("RO", 1)] == ["Q4_0"]  # what does not round, of one seed
    assert Variant("RH", 1) not in left and Variant("permuted", 1) not in left


def test_a_format_that_would_be_replaced_is_refused():
    for kind in llama_formats.FORMATS:
        llama_formats.check_rows(kind, SHAPE, 64)
    for kind in ("Q4_K_M", "Q6_K", "IQ4_XS"):
        with pytest.raises(click.ClickException, match="blocks of 256 and this model rows of 576"):
            llama_formats.check_rows(kind, SHAPE, 64)
    with pytest.raises(click.ClickException, match="'Q9_9' is none"):
        llama_formats.check_rows("Q9_9", SHAPE, 64)


def test_permuting_changes_no_function_but_every_block(saved, tmp_path):
    folder = saved()
    with sources.opened(str(folder)) as s:
        other = llama_formats.permuted(s, tmp_path / "permuted")
    tokens = random_tokens()
    original, turned = models.load(str(folder)), models.load(str(other))
    assert relative(logits(turned, tokens), logits(original, tokens)) < 1e-5
    a, b = (m.model.layers[0].mlp.down_proj.weight for m in (original, turned))
    assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
    first, second = (w[:, :32].amax(-1).sort().values for w in (a, b))  # of every row's first block
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize(
    ("row", "untied"), [("unrotated", False), ("permuted", True), ("RH", True)]
)
def test_the_written_file_has_the_tables_it_is_said_to_have(saved, tmp_path, row, untied):
    with sources.opened(str(saved())) as s:
        rotation = "RH" if row == "RH" else "NR"
        assert llama_formats.written(Variant(row, 0), rotation, s, tmp_path) == untied
    names = {t.name for t in format.GGUFReader(tmp_path / "F32.gguf").tensors}
    assert ("output.weight" in names) == untied


def test_weights_on_the_grid_of_q4_1_grow_in_q5_1():
    """Level k/15 lies at 31k/15 = 2k + k/15 of Q5_1's: rounded to the block's end that is nearer."""
    kinds = format.GGMLQuantizationType
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 1024), dtype=np.float32)
    w = quants.dequantize(quants.quantize(w, kinds.Q4_1), kinds.Q4_1)
    slope = {}
    for name, x in {"on": w, "off": w[:, rng.permutation(1024)]}.items():
        error = quants.dequantize(quants.quantize(x, kinds.Q5_1), kinds.Q5_1) - x
        slope[name] = float((error * x).sum() / (x * x).sum())
    assert slope["on"] > 0.015 and abs(slope["off"]) < 0.002


# --- llama.cpp itself -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.demo
def test_llama_cpp_computes_the_perplexity_of_transformers(tmp_path):
    pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: pip install -e '.[llama]'"
    )
    tokenizer = models.load_tokenizer("demo")
    tokens = corpora.load("demo", "evaluation", tokenizer, windows=1, seqlen=256)
    wanted = evaluation.perplexity(models.load("demo"), tokens).value
    llama_formats.silence()
    with sources.opened("demo", near=tmp_path) as s:
        gguf.write(s, tmp_path / "RH.gguf", sources.recipe("RH", s))
    found = llama_formats.perplexity(tmp_path / "RH.gguf", tokens).value
    assert abs(found / wanted - 1) < 0.005
    small = llama_formats.quantize(tmp_path / "RH.gguf", tmp_path / "small.gguf", "Q8_0")
    assert small.stat().st_size < 0.3 * (tmp_path / "RH.gguf").stat().st_size
    assert abs(llama_formats.perplexity(small, tokens).value / wanted - 1) < 0.02
    # and llama.cpp cuts a text as the model's tokenizer does
    from llama_cpp import Llama

    text = "In 1879, Peirce’s lectures (at Johns Hopkins) drew 25–30 students.\n\nNaïve?  Ja!"
    lm = Llama(str(tmp_path / "RH.gguf"), vocab_only=True, verbose=False)
    assert lm.tokenize(text.encode(), add_bos=False) == tokenizer(text)["input_ids"]


@pytest.mark.slow
@pytest.mark.demo
def test_every_linear_is_in_the_format_of_its_column(tmp_path):
    pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: pip install -e '.[llama]'"
    )
    llama_formats.silence()
    with sources.opened("demo", near=tmp_path) as s:
        gguf.write(s, tmp_path / "RH.gguf", sources.recipe("RH", s), vocabulary=False)
    for kind in llama_formats.FORMATS:
        small = llama_formats.quantize(tmp_path / "RH.gguf", tmp_path / f"{kind}.gguf", kind)
        types = {t.name: t.tensor_type.name for t in format.GGUFReader(small).tensors}
        assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
        linears = [t for n, t in types.items() if n.startswith("blk.") and "norm" not in n]
        assert linears == [kind] * 210

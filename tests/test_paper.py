"""The published numbers are found by name, and the names mean what the paper's tables say."""

import pytest

from dfrot_lab import paper


def test_known_entries():
    assert paper.table1("LLaMA2-7B", "RO") == 7.71
    assert paper.table1("LLaMA3-8B", "RH.FP16", "4-4-4") == 7.82
    assert paper.gamma("LLaMA3-8B", "RH") == 7.780
    assert paper.gamma("LLaMA2-7B", "RO", "inf") == 6.799
    assert paper.readme_rtn("LLaMA2-7B", "DFRot-RTN") == 7.47
    assert paper.token_errors()["RO"] == 85.69


def test_figures_and_tables_of_two_editions_stay_apart():
    numbers = paper.numbers()
    assert numbers["table2_readme_gptq"]["LLaMA2-7B"] != numbers["table2_main_ppl_gptq"]["4-4-16"]


def test_unknown_names_are_errors():
    with pytest.raises(KeyError):
        paper.table1("LLaMA9", "RO")
    with pytest.raises(ValueError, match="not in list"):
        paper.table1("LLaMA2-7B", "RO", "2-2-2")

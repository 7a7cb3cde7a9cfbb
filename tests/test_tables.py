"""Tables say the same in HTML and in text, escape what they show and name what they miss."""

from __future__ import annotations

import re

import pytest

from dfrot_lab import tables
from dfrot_lab.results import ResultError

CLAIMS = {
    "claims": [
        {"claim": "a < b", "paper": "1.0", "ours": "<script>", "rule": "a & b", "agrees": True},
        {"claim": "all", "paper": "100 %", "ours": "70 %", "rule": "≥ 90 %", "agrees": False},
    ]
}
ROWS = {
    "table": [
        {
            "rotation": n,
            "keep": keep,
            "bits": bits,
            "gamma": None,
            "mean": mean,
            "sd": sd,
            "n": count,
        }
        for n, keep, bits, mean, sd, count in [
            ("FP", "none", "16-4-16", 12.5, 0.0, 1),
            ("NR", "none", "16-4-16", "inf", "nan", 2),
            ("RH2", "massive", "4-4-4", 43210.0, 1.5, 3),
        ]
    ]
}


def test_claims_end_in_yes_or_no():
    table = tables.claims_table(CLAIMS)
    assert table.title.endswith("1 of 2 claims agree")
    assert [row[-1] for row in table.rows] == ["yes", "no"]
    assert table.header == ("claim", "paper says", "we see", "rule", "agrees")


def test_html_is_plain_escaped_and_has_headers_for_a_screen_reader():
    html = tables.claims_table(CLAIMS)._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "a &amp; b" in html
    assert "<caption>" in html and html.count('scope="col"') == 5 and html.count('scope="row"') == 2
    assert not re.search(r"http|<link|<style|<img|src=", html)
    assert html.count("<tr>") == html.count("</tr>") == 3


def test_perplexities_with_infinities_and_one_seed():
    table = tables.perplexity_table(ROWS)
    assert table.rows[0] == ("FP", "none", "", "12.50", "", "1")
    assert table.rows[1][3:] == ("∞", "undefined", "2")
    assert table.rows[2] == ("RH²", "massive tokens", "4-4-4", "43,210.00", "1.50", "3")
    assert "γ" not in table.header


def test_gamma_has_a_column_when_there_is_one():
    row = ROWS["table"][0] | {"rotation": "DFRot(RH)"}
    rows = [row | {"gamma": g} for g in ("100.0", "inf")]
    table = tables.perplexity_table({"table": [ROWS["table"][0], *rows]})
    assert [r[table.header.index("γ")] for r in table.rows] == ["", "100", "∞"]


def test_text_is_aligned_and_holds_every_cell():
    table = tables.claims_table(CLAIMS)
    lines = str(table).splitlines()
    assert lines[0] == table.title and set(lines[2]) == {"-", " "}
    assert all(value in str(table) for row in table.rows for value in row)
    numbers = str(tables.perplexity_table(ROWS)).splitlines()
    assert len({line.rstrip()[-1:] for line in numbers[3:]}) == 3
    assert len({len(line) for line in numbers[1:]}) == 1


def test_long_text_wraps_between_words():
    row = {"claim": "word " * 30, "paper": "", "ours": "", "rule": "", "agrees": True}
    lines = str(tables.claims_table({"claims": [row]})).splitlines()
    assert max(map(len, lines)) < 100 and sum("word" in line for line in lines) > 3


@pytest.mark.parametrize(
    ("make", "key"), [(tables.claims_table, "claims"), (tables.perplexity_table, "table")]
)
def test_an_empty_and_a_missing_table_say_so(make, key):
    assert (
        "nothing to show" in str(make({key: []}))
        and "nothing to show" in make({key: []})._repr_html_()
    )
    with pytest.raises(ResultError, match=f"holds no '{key}'"):
        make({})

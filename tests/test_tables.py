"""Tables say the same in HTML and in text, escape what they show and name what they miss."""

from __future__ import annotations

import csv
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


def test_what_the_paper_leaves_open_does_not_agree_with_it():
    left = [
        CLAIMS["claims"][0] | {"paper": paper, "agrees": agrees}
        for paper, agrees in (("left open", True), ("not claimed: …", False), ("assumed", True))
    ]
    title = tables.claims_table({"claims": CLAIMS["claims"] + left}).title
    assert title.endswith("2 of 3 claims agree; 1 of 2 that it does not make hold")


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


# --- notebook 05 ------------------------------------------------------------------------------------


def five() -> dict:
    def row(name, bits, method, mean, keep="none"):
        about = {"rotation": name, "keep": keep, "bits": bits, "gamma": None, "method": method}
        return about | {"mean": mean, "sd": 1.0, "n": 3}

    return {
        "table": [
            row("FP", "16-16-16", None, 20.0),
            row("RH", "4-4-16", "gptq-shared", 40.0),
            row("RH", "4-4-16", "gptq-shared", 38.0, "massive"),
            row("RH", "4-4-16", "rtn", 60.0),
            row("DFRot(RH)", "4-4-16", "gptq", 36.0),
            row("DFRot(RO)", "4-4-16", "gptq", 37.0),
            row("NR", "4-4-16", "gptq", "inf"),
            row("RO", "4-8-16", "gptq", 22.0, "massive"),
            row("RH", "4-7-16", "gptq", 22.0),
        ],
        "paired": [
            {"a": "RO massive", "b": "RH none", "bits": "4-4-4", "method": "gptq", "mean": 0.12345}
            | {"low": -0.1, "high": 0.3, "seed_sd": 0.01}
        ],
    }


def test_the_papers_numbers_stand_beside_ours():
    table = tables.paper_table(five())
    assert len({len(r) for r in table.rows} | {len(table.header)}) == 1
    cells = {row[:3]: row[3:] for row in table.rows}
    # LLaMA2-7B: FP16 5.47; Table 1 RH 6.20, RH.FP16 6.10; README RTN; Table 2 DFRot 6.13
    assert cells["4-4-16", "GPTQ", "RH"][3:5] == ("2.00", "6.20 (1.13)")
    assert cells["4-4-16", "GPTQ", "RH, massive kept"][4] == "6.10 (1.12)"
    assert cells["4-4-16", "RTN", "RH"][4] not in ("–", "6.20 (1.13)")
    assert cells["4-4-16", "GPTQ", "DFRot(RH)"][4] == "6.13 (1.12)"
    assert cells["4-4-16", "GPTQ", "DFRot(RO)"][4] == "–"  # the paper has no such row
    assert (
        cells["4-4-16", "GPTQ", "NR"][0] == "∞" and cells["4-4-16", "GPTQ", "NR"][4] == "no number"
    )
    assert cells["4-8-16", "GPTQ", "RO, massive kept"][4] == "–"
    assert cells["4-7-16", "GPTQ", "RH"][4:] == ("–", "–")


def test_intervals_name_both_sides():
    [row] = tables.intervals_table(five()).rows
    assert row == (
        "4-4-4", "GPTQ", "RO, massive kept − RH", "0.1235", "[-0.1000, 0.3000]", "0.0100",
    )  # fmt: skip


def test_saved_as_csv_latex_and_html(tmp_path):
    table = tables.paper_table(five())
    paths = table.save(tmp_path, "t")
    assert [p.name for p in paths] == ["t.csv", "t.tex", "t.html"]
    rows = list(csv.reader(paths[0].open(encoding="utf-8")))
    assert rows[0] == list(table.header) and [tuple(r) for r in rows[1:]] == list(table.rows)
    tex = paths[1].read_text(encoding="utf-8")
    lines = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert len(lines) == len(table.rows) + 1
    assert {line.count("&") for line in lines} == {len(table.header) - 1}
    assert r"\toprule" in tex and "∞" not in tex and r"$\infty$" in tex
    assert paths[2].read_text(encoding="utf-8").count("<tr>") == len(table.rows) + 1


def test_latex_escapes_what_it_must():
    table = tables.Table("t", ("a & b", "50 %"), (("x_y", "#1"),))
    assert r"a \& b & 50 \% \\" in table.latex() and r"x\_y & \#1 \\" in table.latex()


def test_a_method_of_one_seed_has_no_spread():
    spread = {
        "ppl_w16": {"mean": 33.4, "sd": 0.3, "n": 3},
        "kl_w16": {"mean": 0.4, "sd": 0.01, "n": 3},
    }
    one = {
        "ppl_w16": {"mean": 36.0, "sd": 0.0, "n": 1},
        "kl_w16": {"mean": 0.46, "sd": 0.0, "n": 1},
    }
    rows = [{"method": "a", "cost": 1.0} | spread, {"method": "b", "cost": 2.0} | one]
    made = tables.methods_table({"confirm": [{"bits": "4-4-16"}], "pareto": rows}).rows
    assert made[0][3:5] == ("33.40 ± 0.30", "0.4000 ± 0.0100")
    assert made[1][2:] == ("", "36.00", "0.4600", "")

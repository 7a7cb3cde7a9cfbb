"""Two results compared: every digit where bytes have to be equal, the spread over seeds elsewhere."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfrot_lab import tolerances

SPREAD = [30.0, 30.6, 30.3]  # sample sd 0.3: 0.99 % of the mean


def result():
    row = {"rotation": "RH", "bits": "16-4-16", "keep": "none", "method": None}
    rows = [row | {"seed": i, "ppl": v, "nll": [3.4, 3.5 + i / 100]} for i, v in enumerate(SPREAD)]
    return {
        "rows": [*rows, row | {"rotation": "FP", "seed": 0, "ppl": 20.0, "nll": [3.0, 3.0]}],
        "table": [row | {"mean": 30.3, "sd": 0.3, "n": 3}],
        "errors": [1.0, 0.5, 0.0001, -2.0],
        "positions": [3, 17],
        "logits": [{"relative_error": 1.5e-6}],
        "claims": [{"claim": "a", "paper": "7", "ours": "30.30", "rule": "< 31", "agrees": True}],
    }


def changed(path, value):
    """`result()` with one leaf set; path: 'rows.0.ppl'."""
    found = result()
    *way, last = (int(k) if k.isdigit() else k for k in path.split("."))
    at = found
    for key in way:
        at = at[key]
    at[last] = value
    return found


def paths(found, *, exact):
    return [d.path for d in tolerances.differences(result(), found, exact=exact)]


@pytest.mark.parametrize("exact", [True, False])
def test_a_result_is_itself(exact):
    assert paths(result(), exact=exact) == []


TEXT = json.dumps(result())
DIGITS = [m.start() for m in re.finditer(r"\d", TEXT)]


@given(st.sampled_from(DIGITS), st.integers(1, 9))
def test_any_changed_digit_is_caught_exactly(place, by):
    tampered = TEXT[:place] + str((int(TEXT[place]) + by) % 10) + TEXT[place + 1 :]
    try:
        found = json.loads(tampered)
    except ValueError:
        return  # a leading zero: no JSON any more, which `results.load` tells
    wrong = tolerances.differences(result(), found, exact=True)
    # 0.0 → 0.00 and 1e-06 → 1e-6 do not occur among changed digits: each gives another value
    assert len(wrong) == 1


@pytest.mark.parametrize("value", [30.0001, "30.0", 30, None])
def test_types_count_exactly(value):
    assert paths(changed("rows.0.ppl", value), exact=True) == ["rows[0].ppl"]


@pytest.mark.parametrize(
    ("path", "within", "beyond"),
    [
        ("rows.0.ppl", 30.88, 30.95),  # 3 × 1 %: the sd over seeds is just below it
        ("rows.3.ppl", 20.19, 20.21),  # FP: 1 %
        (
            "rows.0.nll.0",
            3.429,
            3.431,
        ),  # 0.03 nats, no spread at this window … pooled with the next
        ("table.0.mean", 31.2, 31.3),
        ("errors.2", 0.0115, 0.0118),  # 1 % of the root mean square, 1.146
        ("logits.0.relative_error", 1.4e-5, 1.6e-5),
        ("positions.1", 17, 18),
        ("claims.0.ours", "31", None),
        ("claims.0.agrees", True, False),
        ("claims.0.paper", "7", "8"),
    ],
)
def test_elsewhere_a_number_may_move_so_far(path, within, beyond):
    assert paths(changed(path, within), exact=False) == []
    dotted = re.sub(r"\.(\d+)", r"[\1]", path)
    if beyond is not None:
        assert paths(changed(path, beyond), exact=False) == [dotted]


def test_the_spread_over_seeds_widens_the_tolerance():
    reference = result()
    for row, ppl in zip(reference["rows"], [27.0, 30.0, 33.0], strict=False):
        row["ppl"] = ppl  # sd 3: 10 % of the mean, 30 % of tolerance
    found = json.loads(json.dumps(reference))
    found["rows"][0]["ppl"] = 35.0
    assert tolerances.differences(reference, found, exact=False) == []
    found["rows"][0]["ppl"] = 35.2
    [wrong] = tolerances.differences(reference, found, exact=False)
    assert wrong.tolerance == pytest.approx(3 * 0.1 * 27)
    assert str(wrong) == "by 30 % in rows[0].ppl: 35.2 against 27 (tolerance 30 %)"
    # other bits have their own spread
    found = json.loads(json.dumps(reference))
    found["rows"][3]["ppl"] = 21.0
    assert [d.path for d in tolerances.differences(reference, found, exact=False)] == [
        "rows[3].ppl"
    ]


def test_lengths_and_keys():
    assert paths(changed("positions", [3]), exact=False) == ["positions"]
    assert paths(changed("table", []), exact=False) == ["table"]
    assert paths(result() | {"new": 1}, exact=False) == [""]
    assert paths(result() | {"new": 1}, exact=True) == [""]


def test_kept_tokens_are_counted_elsewhere():
    def kept(n):
        sites = ["layers.1.mlp", "layers.2.mlp"]
        tokens = [[0, i, " the", sites] for i in range(n)]
        counts = {"pairs": 2 * n, "by_token": [[" the", 2 * n]] if n < 101 else [[" a", n]]}
        return {"rows": [{"kept": tokens}], "exempted": [counts]}

    def found(n, exact=False):
        return tolerances.differences(kept(100), kept(n), exact=exact)

    assert found(98) == [] and found(98, exact=True)
    assert {d.path for d in found(96)} >= {"rows[0].kept.tokens", "exempted[0].pairs"}
    assert found(101), "another token leads"


def test_the_worst_comes_first():
    found = result()
    found["rows"][0]["ppl"] = 33.0
    found["rows"][1]["ppl"] = 60.0
    assert paths(found, exact=False) == ["rows[1].ppl", "rows[0].ppl"]

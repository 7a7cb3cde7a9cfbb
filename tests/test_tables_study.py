"""Claims of notebooks 05 and 06 hold and fail as their rules say; the grids ask for what the paper has."""

from __future__ import annotations

import itertools
import math

import pytest

from dfrot_lab.studies import paper_tables, questions

BITS = ("4-4-4", "4-4-16", "4-8-16")
FOUR = {"NR": 5e3, "RO": 90.0, "RH": 60.0, "DFRot(RO)": 62.0, "DFRot(RH)": 55.0}


def verdicts(claims):
    return {c.claim: c.agrees for c in claims}


def study5(eight=1.0, rtn=1.5, sample=0.1, **levels):
    """A result with means as in FOUR or given; at 8 bits RO = `eight` × RH."""
    levels = FOUR | levels
    rows = [row("FP", "16-16-16", None, 20.0)]
    for bits in BITS:
        alike = {n: 25.0 * (eight if n == "RO" else 1) for n in levels if n != "NR"}
        for name, level in (levels | (alike if bits == "4-8-16" else {})).items():
            for seed in (0, 1):
                rows.append(row(name, bits, "gptq-shared", level, seed))
                if name != "NR":
                    rows.append(row(name, bits, "rtn", level * rtn, seed))
                if name in ("RO", "RH"):
                    rows.append(row(name, bits, "gptq-shared", level * 0.9, seed, "massive"))
    result = paper_tables.summary(rows, "gptq-shared")
    ppl = [50.0, 50.0 + sample, 50.0 - sample]
    result["calibration"] = {"sample": [{"ppl": p, "bits": "4-4-16"} for p in ppl], "sites": []}
    return result


def row(name, bits, method, ppl, seed=0, keep="none"):
    gamma = "100.0" if name.startswith("DFRot") else None
    about = {"rotation": name, "keep": keep, "seed": seed, "bits": bits, "gamma": gamma}
    return about | {"method": method, "windows": 2, "ppl": ppl, "nll": [math.log(ppl)] * 2}


@pytest.mark.parametrize(
    ("claim", "broken"),
    [
        ("4-4-4, GPTQ: NR ≫ RO > RH ≥ DFRot", {"RO": 59.0}),
        ("4-4-16, GPTQ: NR ≫ RO > RH ≥ DFRot", {"NR": 100.0}),
        ("4-4-16, GPTQ: NR ≫ RO > RH ≥ DFRot", {"DFRot(RH)": 61.0}),
        ("4-8-16, GPTQ: no rotation is worst", {"NR": 20.0}),
        ("GPTQ is better than RTN in every rotated row", {"rtn": 0.99}),
        ("At 4-8-16 with GPTQ RO and RH are alike", {"eight": 1.03}),
        ("The calibration sample hardly matters", {"sample": 2.0}),
    ],
)
def test_claims_of_05_can_fail(claim, broken):
    assert verdicts(paper_tables.claims(study5()))[claim]
    assert not verdicts(paper_tables.claims(study5(**broken)))[claim]


def test_pairs_share_bits_and_weights():
    pairs = paper_tables.summary(study5()["rows"], "gptq-shared")["paired"]
    found = {(p["bits"], p["method"], p["a"], p["b"]): p for p in pairs}
    one = found["4-4-4", "gptq-shared", "RO none", "RH none"]
    assert one["mean"] == pytest.approx(math.log(90 / 60)) and one["seeds"] == 2
    assert ("4-4-4", "rtn", "RH none", "DFRot(RH) none") in found
    assert ("4-4-4", "rtn", "RO massive", "RH massive") not in found


def test_the_grid_shares_models_and_asks_for_every_row_of_table_1():
    asked = []

    class Fake:
        def perplexity(self, name, seed=0, *, bits, windows, keep="none", method="rtn"):
            asked.append((name, seed, method, bits, keep))
            return {"rotation": name}

    paper_tables.measure(Fake(), [0, 1], 2, list(BITS), "gptq")
    assert len(asked) == len(set(asked))
    for name, keep in paper_tables.TABLE1:
        for bits in BITS:
            assert (name, 0, "gptq", bits, keep) in asked
    weights = [(name, seed, method) for name, seed, method, *_ in asked]
    changes = sum(a != b for a, b in itertools.pairwise(weights))
    assert changes == len(set(weights)) - 1  # never back to weights that were left


def study6(static=0.9, clipped=0.9, away=0.9, swap=False, ours=29.0):
    names = ("RO", "RH", "DFRot(RH)")
    return {
        "static": [
            {"rotation": n, "bits": "16-8-16", "per": per}
            | {"ppl": 30.0 * (static if n != "RH" and per == "tensor" else 1)}
            for n in ("RH", "DFRot(RH)")
            for per in ("token", "tensor")
        ],
        "clipping": [
            {"rotation": n, "clip": c, "ppl": 30.0 * (clipped if n != "RH" else 1) - (c < 1)}
            for n in ("RH", "DFRot(RH)")
            for c in (1.0, 0.9)
        ],
        "transfer": [
            {"calibrated": c, "tested": t, "ppl": 30.0 * (away if c not in ("none", t) else 1)}
            for c in ("none", "a", "b")
            for t in ("a", "b")
        ],
        "task_loss": [
            {"rotation": n, "keep": "none", "kl": 1.0 - 0.1 * i, "error": 0.1 * (i if swap else -i)}
            for i, n in enumerate(names)
        ],
        "slips": [
            {"way": w, "seed": s, "ppl": ppl + s}
            for w, ppl in ((questions.OURS, ours), (questions.SYMMETRIC, 30.0))
            for s in (0, 1)
        ],
    }


@pytest.mark.parametrize(
    ("claim", "broken"),
    [
        ("The quantizer of the evaluation is the right one in the loop", {"ours": 31.0}),
        ("The quantizer of the evaluation is the right one in the loop", {"ours": 29.5}),
        ("DFRot also helps static per-tensor steps at 16-8-16", {"static": 1.1}),
        ("DFRot stays ahead when both are clipped at their best", {"clipped": 1.1}),
        ("DFRot stays ahead when both are clipped at their best", {"clipped": 0.99}),
        ("A rotation refined on one corpus helps on another", {"away": 1.1}),
        ("Activation error ranks rotations as the task loss does", {"swap": True}),
    ],
)
def test_claims_of_06_can_fail(claim, broken):
    assert verdicts(questions.claims(study6()))[claim]
    assert not verdicts(questions.claims(study6(**broken)))[claim]

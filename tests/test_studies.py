"""What the notebooks conclude: each statistic by hand, each claim once true and once false."""

import math

import pytest

from dfrot_lab import massive
from dfrot_lab.lab import Lab, LabError
from dfrot_lab.quantizers import QuantSpec, squared_error
from dfrot_lab.studies import (
    invariance,
    massive_tokens_fp16,
    perplexities,
    refined_rotation,
    token_errors,
)


def row(rotation, keep, seed, *nll, bits="16-4-16", gamma=None, kept=()):
    ppl = math.exp(sum(nll) / len(nll))
    return {
        "rotation": rotation, "keep": keep, "seed": seed, "bits": bits, "gamma": gamma,
        "windows": len(nll), "nll": list(nll), "ppl": ppl, "kept": list(kept),
    }  # fmt: skip


def verdicts(claims):
    return {c.claim: c.agrees for c in claims}


# --- tables ----------------------------------------------------------------------------------------


def test_table_is_mean_and_sd_over_seeds():
    rows = [row("RO", "none", s, math.log(p)) for s, p in enumerate((10, 12, 17))]
    (found,) = perplexities.table(rows)
    assert found["mean"] == pytest.approx(13) and found["sd"] == pytest.approx(13**0.5)
    assert found["n"] == 3


def test_table_takes_an_infinite_perplexity():
    rows = [row("NR", "none", s, 3.0) | {"ppl": 1e300 if s else math.inf} for s in (0, 1)]
    assert math.isnan(perplexities.table(rows)[0]["sd"])


def test_pairs_are_windows_not_seeds():
    """Repeating the same windows with more seeds must not narrow the interval."""
    a = [row("RO", "none", s, 3.0, 3.2, 3.5) for s in range(4)]
    b = [row("RH", "none", s, 2.9, 3.0, 2.9) for s in range(4)]
    many = perplexities.paired(a + b, ("RO", "none"), ("RH", "none"))
    one = perplexities.paired(a[:1] + b[:1], ("RO", "none"), ("RH", "none"))
    assert many["n"] == one["n"] == 3 and many["seeds"] == 4
    assert many["mean"] == pytest.approx(0.3)
    assert (many["low"], many["high"]) == pytest.approx((one["low"], one["high"]))
    assert many["seed_sd"] == pytest.approx(0)


def test_rows_that_share_a_model_come_together(monkeypatch):
    asked = []

    class Fake:
        def perplexity(self, name, seed, *, keep, bits, windows, gamma):
            asked.append((name, seed, keep))

    grid = [["FP", "none"], ["RO", "none"], ["RH", "none"], ["RO", "massive"]]
    perplexities.perplexities(Fake(), grid, [0, 1], 1, "16-4-16")
    assert asked == [
        ("FP", 0, "none"), ("RO", 0, "none"), ("RO", 0, "massive"), ("RO", 1, "none"),
        ("RO", 1, "massive"), ("RH", 0, "none"), ("RH", 1, "none"),
    ]  # fmt: skip


# --- 03 --------------------------------------------------------------------------------------------


def study3(ro=40.0, rh=30.0, ro_kept=31.0, rh_kept=29.0, rh2=39.0, nr=9e3, first=32.0, tokens=4):
    """A result with perplexities as given (seeds ± 0.1), `tokens` of 2 × 1000 kept at one site."""
    kept = [[0, 7 * i, "the", ["layers.0.mlp"]] for i in range(tokens)]

    def rows_of(name, keep, ppl, seeds=(0, 1), **more):
        return [
            row(name, keep, s, math.log(ppl) + 0.01 * s, math.log(ppl) + 0.02, **more)
            for s in seeds
        ]

    rows = rows_of("FP", "none", 18.0, (0,)) + rows_of("NR", "none", nr, (0,))
    rows += rows_of("RO", "none", ro) + rows_of("RO", "massive", ro_kept, kept=kept)
    rows += rows_of("RH", "none", rh) + rows_of("RH", "massive", rh_kept, kept=kept)
    rows += rows_of("RH2", "none", rh2)
    side = rows_of("RO", "first", first, (0,))

    class Fake:
        seqlen = 1000
        activations = type("A", (), {"sites": ("layers.0.attention", "layers.0.mlp")})()

    return massive_tokens_fp16.summary(Fake(), rows, side)


def test_closed_share_by_hand():
    closed = study3()["closed"]
    assert closed["by_seed"] == pytest.approx([0.8, 0.8])
    assert closed["of_means"] == pytest.approx(0.8)


def test_exempted_counts_pairs_and_tokens():
    found = next(r for r in study3()["exempted"] if r["rotation"] == "RO")
    assert found["pairs"] == found["tokens"] == 4
    assert found["share"] == pytest.approx(4 / (2 * 2 * 1000))
    assert found["by_site"] == [0, 4]
    assert found["by_position"] == {"first": 1, "later": 3}
    assert found["by_token"] == [("the", 4)]


@pytest.mark.parametrize(
    ("claim", "broken"),
    [
        ("Without rotation 4-bit activations fail", {"nr": 100}),
        ("RO is clearly worse than RH", {"ro": 30.1}),
        ("Keeping massive tokens closes the gap", {"ro_kept": 36}),
        ("Keeping massive tokens closes the gap", {"ro": 29, "ro_kept": 28.9, "rh_kept": 29.0}),
        ("It closes all of the gap", {"rh_kept": 28}),
        ("Structure, not orthogonality, is the cause", {"rh2": 31}),
        ("The first token alone does most of it", {"first": 38}),
        ("The first token alone does most of it", {"ro_kept": 45, "rh_kept": 44, "first": 46}),
        ("Massive tokens are about one in a thousand", {"tokens": 60}),
        ("Massive tokens are about one in a thousand", {"tokens": 0}),
    ],
)
def test_claims_of_03_can_fail(claim, broken):
    holds = {"rh_kept": 30.5} if "all of" in claim else {}
    assert verdicts(massive_tokens_fp16.claims(study3(**holds)))[claim]
    assert not verdicts(massive_tokens_fp16.claims(study3(**broken)))[claim]


# --- 04 --------------------------------------------------------------------------------------------


def study4(
    ro=40.0, rh=30.0, from_ro=30.0, from_rh=28.0, w4=80.0, w4_refined=70.0, rise=0.0, dfrot=1.0
):
    def rows_of(name, ppl, bits="16-4-16"):
        gamma = "100.0" if "DFRot" in name else None
        return [
            row(name, "none", s, math.log(ppl), math.log(ppl) + 0.01, bits=bits, gamma=gamma)
            for s in (0, 1)
        ]

    head = rows_of("RO", ro) + rows_of("RH", rh)
    head += rows_of("DFRot(RO)", from_ro) + rows_of("DFRot(RH)", from_rh)
    closing = rows_of("RH", w4, "4-4-16") + rows_of("DFRot(RH)", w4_refined, "4-4-16")
    errors = {"NR": 5.0, "RO": 10.0, "RH": 4.0, "DFRot": dfrot}
    return refined_rotation.summary(head, closing) | {
        "losses": [{"quantized": [0.02, 0.01 + rise], "rotated": [0.012 + rise * 2, 0.009]}],
        "token": {"rotations": {n: {"squared_error": e} for n, e in errors.items()}},
    }


@pytest.mark.parametrize(
    ("claim", "broken"),
    [
        ("The Procrustes step never raises the loss", {"rise": 0.01}),
        ("DFRot from RO improves on RO", {"from_ro": 36}),
        ("DFRot from RH improves on RH", {"from_rh": 30.5}),
        ("It holds at 4-4-16 with RTN weights", {"w4_refined": 81}),
    ],
)
def test_claims_of_04_can_fail(claim, broken):
    assert verdicts(refined_rotation.claims(study4()))[claim]
    assert not verdicts(refined_rotation.claims(study4(**broken)))[claim]


def test_requantizing_is_judged_by_the_half_step():
    result, claim = study4(), "Quantizing anew does not either"
    assert verdicts(refined_rotation.claims(result))[claim]
    result["losses"][0]["rotated"][0] = 0.008  # below the loss with the codes that follow it, 0.01
    assert not verdicts(refined_rotation.claims(result))[claim]


def test_massive_token_claim():
    claim = "DFRot removes the error of a massive token (held-out window)"
    assert verdicts(refined_rotation.claims(study4()))[claim]
    assert not verdicts(refined_rotation.claims(study4(dfrot=3.0)))[claim]


def test_the_sweep_asks_for_every_gamma_and_for_both_starts():
    asked = []

    class Known:
        def perplexity(self, name, seed, **how):
            asked.append((name, seed, how))
            return {"ppl": len(name) + how.get("gamma", 0.0)}

    found = refined_rotation.gamma_sweep(Known(), [1.0, math.inf], 3, 2, "4-4-16", "gptq")
    assert {(r["start"], r["gamma"]): r["ppl"] for r in found} == {
        ("RH", "none"): 2, ("RH", "1.0"): 10, ("RH", "inf"): math.inf,
        ("RO", "none"): 2, ("RO", "1.0"): 10, ("RO", "inf"): math.inf,
    }  # fmt: skip
    same = {"bits": "4-4-16", "windows": 2, "method": "gptq"}
    assert all(seed == 3 and how.items() >= same.items() for _, seed, how in asked)


# --- 01 and 02, on the tiny model ------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    return Lab(model="tiny:llama", corpus="pydoc", seqlen=64, folder=folder, threads=1)


def test_by_layer_is_the_mean_over_its_group(lab):
    spec = QuantSpec()
    rows = token_errors.by_layer(lab, spec, [3])
    x = lab.activations.site("layers.1.mlp")
    mask = massive.is_massive(x, spec)
    assert mask.any() and not mask.all()
    relative = squared_error(lab.rotated(x, "RH", 3), spec) / x.square().sum(-1)
    found = next(r for r in rows if r["site"] == "layers.1.mlp" and r["rotation"] == "RH")
    assert found["massive"] == int(mask.sum())
    assert found["normal_mean"] == pytest.approx(relative[~mask].mean().item(), rel=1e-4)
    assert found["massive_mean"] == pytest.approx(relative[mask].mean().item(), rel=1e-4)


def test_statistics_weigh_massive_tokens_by_their_number():
    def site(name, count, value):
        base = {"rotation": name, "seed": 0, "massive": count}
        groups = {g + "_mean": value for g in ("normal", "massive")}
        return base | groups | {g + "_quantiles": [value] * 5 for g in ("normal", "massive")}

    rows = [site(n, c, v) for n in token_errors.ROTATIONS for c, v in ((1, 1.0), (3, 2.0))]
    found = {(r["rotation"], r["group"]): r["mean"] for r in token_errors.statistics(rows)}
    assert found["RH", "massive"] == pytest.approx(1.75)
    assert found["RH", "normal"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("claim", "means"),
    [
        ("RO and RH are alike on normal tokens", {("RH", "normal"): 0.012}),
        ("RO sits on the Gaussian floor", {("RO", "normal"): 0.016}),
        ("RH is far better than RO on massive tokens", {("RO", "massive"): 0.011}),
        ("RH is still above no rotation there", {("RH", "massive"): 0.005}),
    ],
)
def test_claims_of_02_can_fail(claim, means):
    good = {
        ("NR", "normal"): 0.1, ("RO", "normal"): 0.014, ("RH", "normal"): 0.014,
        ("NR", "massive"): 0.006, ("RO", "massive"): 0.014, ("RH", "massive"): 0.008,
    }  # fmt: skip

    def result(values):
        stats = [{"rotation": r, "group": g, "mean": m} for (r, g), m in values.items()]
        shares = {g: {"mean": 0.5} for g in ("normal", "massive")}
        return {"statistics": stats, "floor_relative": 0.014, "shares": shares}

    assert verdicts(token_errors.claims(result(good)))[claim]
    assert not verdicts(token_errors.claims(result(good | means)))[claim]


@pytest.mark.parametrize(
    ("claim", "broken"),
    [
        ("Rotations leave the output unchanged", {"error": 1e-3}),
        ("Rotations remove outliers", {"peak": 12.0}),
        ("A few activations are massive", {"top": 500.0}),
    ],
)
def test_claims_of_01_can_fail(claim, broken):
    def result(error=1e-12, peak=4.0, top=5000.0):
        peaks = {"NR": 20.0, "RO": peak, "RH": 3.0}
        return {
            "logits": [{"dtype": d, "relative_error": error} for d in ("float32", "float64")],
            "outliers": [{"rotation": n, "peak_mean": p} for n, p in peaks.items()],
            "top_activations": [{"top": [top, 1, 1], "median": 1.0, "layer": 0, "token": 0}],
        }

    assert verdicts(invariance.claims(result()))[claim]
    assert not verdicts(invariance.claims(result(**broken)))[claim]


def test_top_activations_finds_a_planted_channel(lab):
    rows = invariance.top_activations(lab)
    stream = {r["layer"]: r for r in rows}
    assert len(stream) == 2
    assert stream[0]["top"][0] >= stream[0]["top"][1] >= stream[0]["q999"] >= stream[0]["median"]


def test_a_rotation_file_can_be_measured(lab, tmp_path):
    path = lab.rotation_file("DFRot(RH)", 0)
    by_name = lab.perplexity("DFRot(RH)", 0, windows=1)
    by_file = lab.perplexity(str(path), 0, windows=1)
    assert by_file["nll"] == by_name["nll"]
    with pytest.raises(LabError, match="unknown"):
        lab.perplexity("R1.npy", 0, windows=1)


def test_the_first_token_is_compared_on_the_windows_that_both_have():
    rows = [row("RO", keep, 0, 2.0, 3.0) for keep in ("none", "massive")]
    (found,) = massive_tokens_fp16.first_token(rows, [row("RO", "first", 0, 1.0, 2.0, 9.0, 9.0)])
    assert found["windows"] == 2 and found["first"] == pytest.approx(math.exp(1.5))
    assert found["none"] == found["massive"] == pytest.approx(math.exp(2.5))


def test_without_composed_hadamards_nothing_is_said_of_them():
    assert massive_tokens_fp16._composed([row("RO", "none", 0, 1.0)]) == []


def test_closing_rows_at_the_bits_of_the_headline_are_not_counted_twice():
    names = ("RH", "DFRot(RH)", "RO", "DFRot(RO)")
    rows = [row(n, "none", s, 1.0, 2.0) for n in names for s in (0, 1)]
    again = [row("RH", "none", s, 5.0) for s in (0, 1)]
    found = refined_rotation.summary(rows, again)
    assert found == refined_rotation.summary(rows, [])
    other = [r | {"bits": "4-4-16"} for r in again]
    assert len(refined_rotation.summary(rows, other)["rows"]) == len(rows) + 2


def test_refined_rotations_have_the_weight_that_is_asked_for(tmp_path):
    lab = Lab(
        model="tiny:llama", corpus="pydoc", seqlen=64, iterations=3, clip_steps=2, folder=tmp_path
    )
    (row,) = perplexities.perplexities(lab, [["DFRot(RH)", "none"]], [0], 1, "16-4-16", gamma=7.0)
    assert row["gamma"] == "7.0"
    assert row["ppl"] == lab.perplexity("DFRot(RH)", 0, windows=1, gamma=7.0)["ppl"]

"""Study 08: what is measured on a tiny model by hand, each claim once true and once false."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from dfrot_lab import dfrot, massive, paper, theory
from dfrot_lab.lab import Lab
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.studies import landscape
from dfrot_lab.studies import why_it_works as study


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    return Lab(
        model="tiny:llama", corpus="pydoc", seqlen=96, folder=folder, threads=1, iterations=4
    )  # fmt: skip


@pytest.fixture(scope="module")
def texts(lab):
    return landscape.texts(lab)


# --- theory beside simulation ---------------------------------------------------------------------


def test_simulated_spikes_lie_on_their_curves():
    for row in study.floor(draws=100):
        assert row["RO"] == pytest.approx(row["floor"], rel=0.06)
        assert row["RH2"] == pytest.approx(row["floor"], rel=0.06)
        one = 1 / 225 if row["quantizer"] == "asymmetric" else 0
        assert row["RH"] == pytest.approx(one, abs=1e-8)
    rows = study.spikes(576)
    assert [r["k"] for r in rows if "simulated" in r] == [k for k in range(1, 6) for _ in range(2)]
    for row in rows:
        assert row.get("simulated", row["exact"]) == pytest.approx(row["exact"], rel=0.05)


def test_the_curves_by_share_end_on_the_floor():
    for row in study.by_share(576, QuantSpec()):
        assert row["rest"][-1] == 1
        assert row["error"][-1] == pytest.approx(massive.gaussian_floor(576, QuantSpec()), rel=1e-3)


# --- the tiny model -------------------------------------------------------------------------------


def test_the_calibration_rows_are_those_of_the_optimisation(lab, texts):
    x, mask = texts["calibration"]
    assert len(x) == lab.activations.X[..., 0].numel()  # the default share is all of them
    assert torch.equal(x, lab.activations.X.flatten(0, 1))
    held, _ = texts["held out"]
    assert held.shape == x.shape and not torch.equal(held, x)
    assert mask.any() and not mask.all()


def test_errors_and_weighted_loss_are_those_of_dfrot(lab, texts):
    """Rows of one norm: the loss over Σw²‖x‖² is the weighted mean of the groups' relative errors."""
    r = lab.rotation("RH", 0)
    row = landscape.errors(texts["calibration"], r, "cpu")
    share = texts["calibration"][1].double().mean().item()
    for gamma in (1.0, 100.0, math.inf):
        wanted = dfrot.loss(lab.activations, r, QuantSpec(), dfrot.Weighting(gamma=gamma))
        assert landscape.weighted(row, share, gamma) == pytest.approx(wanted, rel=2e-3)


def test_the_path_starts_at_rh_and_passes_the_refined_rotation(lab, texts):
    found = landscape.path(lab, texts, [100.0], 0, 4)
    rows = [r for r in found["rows"] if r["text"] == "held out"]
    assert [r["t"] for r in rows] == [0, 0.25, 0.5, 0.75, 1, 1.25]
    for t, r in ((0, lab.rotation("RH", 0)), (1, lab.rotation("DFRot(RH)", 0))):
        mine = landscape.errors(texts["held out"], r, "cpu")
        (row,) = [row for row in rows if row["t"] == t]
        assert {k: row[k] for k in mine} == pytest.approx(mine, rel=1e-3)


def test_the_sweep_has_the_starts_and_the_papers_numbers(lab, texts):
    found = landscape.sweep(lab, texts, [1.0], 0, 1, "16-4-16")
    assert [(r["start"], r["gamma"]) for r in found["rows"]] == [
        ("RH", "none"), ("RH", "1.0"), ("RO", "none"), ("RO", "1.0"),
    ]  # fmt: skip
    assert found["rows"][0]["ppl"] == lab.perplexity("RH", 0, windows=1)["ppl"]
    assert found["rows"][1]["held out"] == landscape.errors(
        texts["held out"], lab.rotation("DFRot(RH)", 0, gamma=1.0), "cpu"
    )
    eight = next(r for r in found["published"] if r["model"] == "LLaMA3-8B" and r["start"] == "RH")
    assert (eight["none"], eight["1.0"], eight["100.0"]) == (8.11, 7.875, 7.78)


def test_tokens_are_measured_and_predicted_one_by_one(lab, texts):
    rows = texts["calibration"]
    found = study.tokens(lab, rows, [3], most=20)
    assert len(found["RH"]) == 20 + min(20, int(rows[1].sum()))
    first = rows[0][~rows[1]][0]
    measured = massive.relative_error(lab.rotated(first[None], "RH", 3), QuantSpec()).item()
    assert found["RH"][0] == pytest.approx(measured, rel=1e-3)
    assert found["breadth"][0] == pytest.approx(theory.breadth(first).item(), rel=1e-3)
    assert found["massive"] == list(range(20, len(found["RH"])))
    means = next(
        r for r in found["means"] if (r["quantizer"], r["group"]) == ("asymmetric", "normal")
    )
    assert means["RH"]["mean"] == pytest.approx(sum(found["RH"][:20]) / 20, rel=1e-3)


def test_normal_rows_count_by_their_share():
    """Two of ten rows are massive; half of the normal ones are there, so those count twice."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).sign() * 1e-3
    x[:2, 5] = 8.0
    x[2:] = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    mask = massive.is_massive(x, QuantSpec())
    assert mask.tolist() == [True, True] + [False] * 4
    half = type("Half", (), {"rows": 0.5})()
    assert study.rule(half, (x, mask))["found"]["ours"]["asymmetric"] == pytest.approx(0.2)


def test_cosines_of_one_direction_and_of_many():
    x = torch.cat([torch.eye(4), torch.tensor([[1.0, 2, 3, 4], [-2, -4, -6, -8]])])
    found = landscape.alike((x, torch.tensor([False] * 4 + [True] * 2)))
    assert found == {"normal": 0.5, "massive": 1.0}  # of four axes: with itself 1, else 0


@pytest.mark.parametrize(
    "none, one, all_of_it, share",
    [(8.0, 7.5, 7.0, 0.5), (8.0, 6.0, 7.0, 2.0), (8.0, 7.5, 8.5, None)],
)
def test_share_of_the_gain_without_weights(none, one, all_of_it, share):
    found = landscape.at_one(none, one, all_of_it)
    assert math.isnan(found) if share is None else found == pytest.approx(share)


# --- claims ---------------------------------------------------------------------------------------


def result() -> dict:
    """A result in which every claim holds."""
    error = {"NR": {"mean": 0.1}, "RO": {"mean": 0.0141}, "RH": {"mean": 0.0030}}
    means = [
        {"quantizer": kind, "group": g, "predicted": 0.0030} | error
        for kind in study.SPECS
        for g in ("normal", "massive")
    ]
    thresholds = [
        {"d": 4096, "quantizer": "symmetric", "threshold": 8.0},
        {"d": 4096, "quantizer": "asymmetric", "threshold": 9.0},
    ]
    path = [
        {"gamma": "100.0", "t": t, "text": text, "loss": 0.01 - 0.005 * t}
        | {"normal": 0.012, "massive": 0.003 - 0.002 * t}
        for t in (0.0, 0.5, 1.0)
        for text in landscape.TEXTS
    ]
    swept = [
        {"start": s, "gamma": g, "ppl": p}
        for s in landscape.STARTS
        for g, p in (("none", 30.0), ("1.0", 28.0), ("100.0", 27.0))
    ]
    return {
        "floor": [{"RO": 0.0201, "floor": 0.02}],
        "tokens": {
            "means": means, "massive": [2], "breadth": [100.0, 150.0, 5.0],
            "limits": {"symmetric": 4.0, "asymmetric": 9.6}, "RH": [0.012, 0.012, 0.003], "RO": [0.014] * 3,
        },
        "rule": {
            "d": 576, "thresholds": thresholds, "published": massive.PUBLISHED_THRESHOLDS,
            "found": {n: dict.fromkeys(study.SPECS, 0.1) for n in ("ours", "published")},
        },
        "composed": [
            {"rotation": n, "group": "massive", "mean": m}
            for n, m in (("RO", 0.014), ("RH2", 0.0139), ("RH", 0.003))
        ],
        "alike": {"normal": 0.4, "massive": 0.95},
        "path": {"rows": path},
        "sweep": {
            "rows": swept, "published": landscape.published(), "bits": "16-4-16", "windows": 2,
        },
    }  # fmt: skip


def verdicts(found: dict) -> dict[str, bool]:
    return {c.claim: c.agrees for c in study.claims(found)}


SAY = "3 spikes in Gaussian noise say what RH does to "


@pytest.mark.parametrize(
    ("start", "change"),
    [
        ("RO's error is", lambda r: r["floor"][0].update(RO=0.022)),
        (SAY + "massive", lambda r: r["tokens"]["means"][1].update(predicted=0.004)),
        (SAY + "normal", lambda r: r["tokens"]["means"][2].update(predicted=0.002)),
        ("Few-spike tokens", lambda r: r["tokens"].update(breadth=[100.0, 5.0, 5.0])),
        ("Few-spike tokens", lambda r: r["tokens"].update(breadth=[100.0, 150.0, 50.0])),
        ("Few-spike tokens", lambda r: r["tokens"].update(RH=[0.012, 0.012, 0.02])),
        ("The published thresholds", lambda r: r["rule"]["thresholds"][0].update(threshold=4.0)),
        ("The asymmetric threshold", lambda r: r["rule"]["thresholds"][0].update(threshold=9.9)),
        ("Structure, not", lambda r: r["composed"][1].update(mean=0.004)),
        ("No barrier", lambda r: r["path"]["rows"][2].update(loss=0.02)),
        ("What R1 gains", lambda r: r["path"]["rows"][5].update(massive=0.0029)),
        ("One R1", lambda r: r["alike"].update(massive=0.5)),
        ("From RH, γ = 100", lambda r: r["sweep"]["rows"][2].update(ppl=29.0)),
        ("From RH, at least half", lambda r: r["sweep"]["rows"][1].update(ppl=29.0)),
        ("From RO, at least half", lambda r: r["sweep"]["rows"][4].update(ppl=29.0)),
    ],
)  # fmt: skip
def test_claims_of_08_can_fail(start, change):
    good, bad = result(), copy.deepcopy(result())
    change(bad)
    [claim] = [c for c in verdicts(good) if c.startswith(start)]
    assert verdicts(good)[claim] and not verdicts(bad)[claim]


def test_every_claim_has_its_case():
    [mark] = [m for m in test_claims_of_08_can_fail.pytestmark if m.name == "parametrize"]
    starts = {start for start, _ in mark.args[1]}
    assert all(any(c.startswith(s) for s in starts) for c in verdicts(result()))


def test_without_massive_tokens_the_rest_is_told():
    found = result()
    found["tokens"] |= {"massive": [], "means": found["tokens"]["means"][::2]}
    found |= {"composed": [], "alike": {"normal": 0.4}}
    for row in found["path"]["rows"]:
        del row["massive"]
    told = verdicts(found)
    assert len(told) == len(verdicts(result())) - 5
    assert not any("massive tokens" in c for c in told)


def test_figure_4_is_read_from_the_paper():
    assert f"{paper.token_errors()['RO'] / 4096:.4f}" in study.claims(result())[0].paper

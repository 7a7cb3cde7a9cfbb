"""The optimiser benchmark at toy sizes: its gate can turn red, and the published step is a DFRot step."""

import json

import pytest
import torch
from click.testing import CliRunner
from conftest import haar

from benchmarks import optimiser, published
from dfrot_lab import dfrot, products, rotations
from dfrot_lab.activations import Activations
from dfrot_lab.weighting import Weighting


def test_the_published_step_is_ours_but_for_signs():
    """The QR may turn columns round; the symmetric quantizer does not see it."""
    x, start = published.planted(2000, 32, 0), rotations.random_hadamard(32, 0)
    normal, massive = published.split(x)
    assert 0 < len(massive) < 20
    theirs = published.published_step(normal, massive, start.float()).double()
    ours, _ = dfrot.optimize(
        Activations.of(x), start, published.SPEC, Weighting(published.ALPHA), iterations=1
    )
    signs = (theirs * ours).sum(0).sign()
    assert (theirs * signs - ours).abs().max() < 1e-3
    plain = published.plain_step(torch.cat([normal, published.ALPHA * massive]), start.float())
    assert (plain.double() - ours).abs().max() < 1e-3


def test_planted_rows_have_norm_root_d_and_are_seeded():
    x = published.planted(500, 64, 3)
    assert torch.allclose(x.norm(dim=-1), torch.tensor(8.0))
    assert torch.equal(x, published.planted(500, 64, 3))
    assert not torch.equal(x, published.planted(500, 64, 4))


def test_a_toy_run_prints_and_writes_its_numbers(tmp_path):
    out = tmp_path / "o.json"
    asked = [
        "--sizes",
        "32:600",
        "--equal",
        "32:600:3",
        "--ends",
        "32:600:4:2",
        "--steps",
        "2",
        "--updated",
        "3",
        "--threads",
        "1",
        "--bf16",
    ]
    done = CliRunner().invoke(optimiser.main, [*asked, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0 and "gate: largest difference" in done.output
    found = json.loads(out.read_text())
    (row,) = found["steps"]
    assert row["fp32 ratio"] == pytest.approx(row["published s"] / row["fp32 s"])
    assert row["steps"] == 3 and row["published off"] < 1e-4 and row["fp32 off"] < 1e-12
    assert row["fp32 loss over published"] == pytest.approx(1, rel=0.1)
    assert "fp32, updated loss over published" in row  # as many steps here
    (equal,) = found["equal"]
    assert equal["published off"] < 1e-4 and equal["fast off"] < 1e-12
    (ends,) = found["ends"]
    for name in ("published, fp64", *found["gate, losses"], "relaxed"):
        assert (
            ends[f"{name} over published"] == pytest.approx(1, rel=0.1) and ends[f"{name} sd"] >= 0
        )
    assert row["fp32, updated ratio"] > 0


def test_the_gate_sees_a_wrong_update(monkeypatch):
    right = optimiser.gate_losses(64, "cpu", True)
    assert set(right) == {"fp32", "fp32, error bf16", "fp32, updated", "bf16"}
    assert max(right.values()) < 0.02
    real = products.Streamed._updated
    monkeypatch.setattr(products.Streamed, "_updated", lambda *a: 1.2 * real(*a))
    wrong = optimiser.gate_losses(64, "cpu", True)
    assert [name for name, value in wrong.items() if value > 0.02] == ["fp32, updated"]


def test_a_step_warms_up_unless_one_alone_is_timed_or_it_takes_long(monkeypatch):
    for steps, count, long in ((1, 1, 60.0), (3, 4, 60.0), (3, 3, 0.0)):
        monkeypatch.setattr(optimiser, "LONG", long)
        _, r, made = optimiser.clock(lambda r: r + 1, torch.zeros(1), "cpu", steps)
        assert r.item() == made == count


def test_every_step_is_timed_from_the_first_on():
    x = Activations.of(published.planted(500, 32, 0))
    start = rotations.random_hadamard(32, 0)
    times, r = optimiser.ours(x, start, {}, "cpu", 3)
    assert len(times) == 3 and min(times) > 0
    wanted, _ = dfrot.optimize(x, start, published.SPEC, Weighting(published.ALPHA), iterations=3)
    assert torch.equal(r, wanted)


def test_a_wrong_step_is_not_timed(monkeypatch):
    monkeypatch.setattr(optimiser, "gate", lambda *a: {"entries": 0.0, "newton": 0.1})
    with pytest.raises(AssertionError, match="the fast step is not the plain one"):
        CliRunner().invoke(
            optimiser.main, ["--sizes", "", "--equal", "", "--threads", "1"], catch_exceptions=False
        )


@pytest.mark.parametrize("method", ["mixed", "products", "newton"])
def test_the_gate_sees_a_wrong_iteration(monkeypatch, method):
    """A CPU takes the SVD by itself: what the gate holds against it must have been forced."""
    found = optimiser.gate(32, "cpu")
    assert set(found) == {"entries", "mixed", "products", "newton"} and max(found.values()) < 1e-8
    monkeypatch.setattr(optimiser.polar, method, lambda m: haar(32))
    wrong = optimiser.gate(32, "cpu")
    assert [name for name, value in wrong.items() if value > 1e-8] == [method]

"""Gradient descent on rotations: stays orthogonal, goes downhill, leaves the model alone."""

import pytest
import torch
from conftest import haar, random_tokens
from hypothesis import given
from hypothesis import strategies as st

from dfrot_lab import cayley, models, rotations
from dfrot_lab.quantizers import QuantSpec


@given(st.integers(2, 40), st.integers(0, 99), st.floats(1e-3, 5.0))
def test_a_step_stays_orthogonal_and_has_its_length(d, seed, length):
    r = haar(d, seed)
    g = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = cayley.step(r, g, length)
    assert rotations.orthogonality_error(moved) < 1e-12
    small = cayley.step(r, g, 1e-4)
    assert (small - r).norm().item() == pytest.approx(1e-4 * d**0.5, rel=1e-3)


@given(st.integers(0, 99))
def test_small_steps_lower_what_the_gradient_is_of(seed):
    """f(R) = ⟨C, R⟩, whose gradient is C."""
    r, c = haar(12, seed), haar(12, seed + 1) * 3
    assert (c * cayley.step(r, c, 1e-3)).sum() < (c * r).sum()


def test_no_gradient_no_step_and_nan_is_refused():
    r = haar(6)
    assert torch.allclose(cayley.step(r, torch.zeros(6, 6, dtype=torch.float64), 1.0), r)
    with pytest.raises(ValueError, match="gradient of the task loss holds NaN"):
        cayley.step(r, torch.full((6, 6), torch.nan, dtype=torch.float64), 1.0)


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
def test_the_task_loss_falls_and_the_model_is_left_as_it_was(kind):
    model = models.fold_gains(models.tiny(kind))
    before = {n: p.clone() for n, p in model.named_parameters()}
    wanted = [p.requires_grad for p in model.parameters()]
    tokens = random_tokens(0, (1, 24))
    start = rotations.random_orthogonal(64)
    r, losses = cayley.refine(model, tokens, start, QuantSpec(bits=3), steps=12, length=0.05)
    assert rotations.orthogonality_error(r) < 1e-10
    assert min(losses[6:]) < losses[0]
    assert [p.requires_grad for p in model.parameters()] == wanted
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    assert not any(m._forward_hooks for m in model.modules())


def test_rounding_passes_the_gradient_on():
    """With 16 bits nothing is lost, and nothing is left to gain: the loss does not depend on R."""
    model = models.fold_gains(models.tiny("llama"))
    _, losses = cayley.refine(
        model,
        random_tokens(0, (1, 24)),
        rotations.random_orthogonal(64),
        QuantSpec(bits=16),
        steps=4,
    )
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    model, tokens = models.fold_gains(models.tiny("llama")), random_tokens(0, (3, 24))
    start, file = rotations.random_orthogonal(64), tmp_path / "Cayley.checkpoint"
    options = {"steps": 5, "checkpoint": file, "every": 2}
    wanted = cayley.refine(model, tokens, start, QuantSpec(), steps=5)
    real, made = cayley.step, []

    def step(*args):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return real(*args)

    monkeypatch.setattr(cayley, "step", step)
    with pytest.raises(KeyboardInterrupt):
        cayley.refine(model, tokens, start, QuantSpec(), **options)
    assert file.exists()
    made[:] = [0] * 10
    r, losses = cayley.refine(model, tokens, start, QuantSpec(), **options)
    assert torch.equal(r, wanted[0]) and losses == wanted[1]
    assert len(made) == 10 + 3 and not file.exists()


def test_the_state_of_other_settings_is_not_taken_up(tmp_path):
    model, tokens = models.fold_gains(models.tiny("llama")), random_tokens(0, (3, 24))
    start, file = rotations.random_orthogonal(64), tmp_path / "Cayley.checkpoint"
    wanted = cayley.refine(model, tokens, start, QuantSpec(), steps=3)
    rotations.save(file, haar(64), {"key": "another", "losses": [0.0]})
    r, losses = cayley.refine(model, tokens, start, QuantSpec(), steps=3, checkpoint=file)
    assert torch.equal(r, wanted[0]) and losses == wanted[1]


def test_the_state_of_another_model_is_not_taken_up(tmp_path, monkeypatch):
    tokens, start = random_tokens(0, (3, 24)), rotations.random_orthogonal(64)
    options, other = {"steps": 3, "every": 1}, models.fold_gains(models.tiny("llama", seed=1))
    file, real = tmp_path / "Cayley.checkpoint", rotations.save
    kept = []
    monkeypatch.setattr(rotations, "save", lambda *a: kept.append(real(*a).read_bytes()))
    model = models.fold_gains(models.tiny("llama"))
    cayley.refine(model, tokens, start, QuantSpec(), checkpoint=file, whose="a", **options)
    wanted = cayley.refine(other, tokens, start, QuantSpec(), **options)
    file.write_bytes(kept[0])
    found = cayley.refine(other, tokens, start, QuantSpec(), checkpoint=file, whose="b", **options)
    assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]


def test_a_damaged_state_leaves_the_model_as_it_was(tmp_path):
    model, file = models.fold_gains(models.tiny("llama")), tmp_path / "Cayley.checkpoint"
    model.requires_grad_(True)
    file.write_bytes(b"half")
    with pytest.raises(rotations.RotationError, match="cannot be read"):
        cayley.refine(model, random_tokens(), haar(64), QuantSpec(), steps=2, checkpoint=file)
    assert all(p.requires_grad for p in model.parameters())


def test_a_start_that_does_not_fit():
    model = models.fold_gains(models.tiny("llama"))
    with pytest.raises(rotations.RotationError, match="start is"):
        cayley.refine(model, random_tokens(), haar(8), QuantSpec(), steps=1)

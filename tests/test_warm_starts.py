"""R1 refined from the R1 in a file: what is made is what `optimize` gives, once, and for this model only."""

import pytest
import torch

from dfrot_lab import dfrot, owners, rotations, warm_starts
from dfrot_lab.lab import Lab
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.rotations import RotationError

SMALL = {"corpus": "pydoc", "seqlen": 64, "iterations": 3, "threads": 1}


@pytest.fixture
def lab(tmp_path):
    return Lab(model="tiny:llama", **SMALL, folder=tmp_path / "lab")


def test_it_is_optimize_from_that_rotation(lab):
    start = lab.rotation_file("DFRot(RH)", 1, gamma=1.0)
    path = warm_starts.rotation_file(lab, start, gamma=7.0, symmetric=True, iterations=4)
    wanted, log = dfrot.optimize(
        lab.activations, rotations.load(start)[0], QuantSpec(symmetric=True), dfrot.Weighting(7.0),
        iterations=4, solver="svd",
    )  # fmt: skip
    found, about = rotations.load(path)
    assert torch.equal(found, wanted)
    assert about["log"]["rotated"] == log.rotated
    assert (about["gamma"], about["symmetric"], about["iterations"]) == ("7.0", True, 4)
    owners.check(path, about, owners.of("tiny:llama"))


def test_it_is_made_once_and_anew_for_anything_else(lab, monkeypatch):
    starts = [lab.rotation_file("DFRot(RH)", seed, gamma=1.0) for seed in (0, 1)]
    made = [
        warm_starts.rotation_file(lab, starts[0]),
        warm_starts.rotation_file(lab, starts[1]),
        warm_starts.rotation_file(lab, starts[0], gamma=10.0),
        warm_starts.rotation_file(lab, starts[0], objective="whip"),
        warm_starts.rotation_file(lab, starts[0], relax=1.6),
        warm_starts.rotation_file(lab, starts[0], iterations=2),
    ]
    assert len({rotations.load(path)[0].numpy().tobytes() for path in made}) == len(made)
    monkeypatch.setattr(dfrot, "optimize", lambda *a, **k: pytest.fail("refined again"))
    again = Lab(model="tiny:llama", **SMALL, folder=lab.folder)
    assert warm_starts.rotation_file(again, starts[1]) == made[1]


def test_a_start_of_another_model_or_none_is_refused(lab, tmp_path):
    other = Lab(model="tiny:qwen3", **SMALL, folder=tmp_path / "other")
    theirs = other.rotation_file("DFRot(RH)", 0)
    with pytest.raises(RotationError, match="was made for 'tiny:qwen3'"):
        warm_starts.rotation_file(lab, theirs)
    with pytest.raises(RotationError, match="does not exist"):
        warm_starts.rotation_file(lab, tmp_path / "none.safetensors")

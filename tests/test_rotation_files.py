"""A file of tensors without R names those it holds; other faults are told as before."""

import pytest
import torch
from safetensors.torch import save_file

from dfrot_lab import rotation_files, rotations
from dfrot_lab.exports import rotation_files as exports
from dfrot_lab.owners import Owner
from dfrot_lab.rotation_files import RotationFileError

OURS = Owner("tiny", None, "1234")


def test_a_rotation_is_loaded(tmp_path):
    r = rotations.random_orthogonal(8)
    rotations.save(tmp_path / "R1.safetensors", r, OURS.about | {"seed": 0})
    found = rotation_files.load(tmp_path / "R1.safetensors", OURS, 8, 2)
    assert torch.equal(found.R1, r) and found.R2 is None and found.about["seed"] == 0


def test_a_second_rotation_is_loaded_and_must_fit(tmp_path):
    r, r2 = rotations.random_orthogonal(8), rotations.random_orthogonal(4)
    path = exports.write(tmp_path / "both.safetensors", r, r2, OURS.about)
    assert torch.equal(rotation_files.load(path, OURS, 8, 4).R2, r2)
    with pytest.raises(rotations.RotationError, match=r"R2 in .* is \[4, 4\] but the model needs"):
        rotation_files.load(path, OURS, 8, 2)


def test_a_file_without_r_names_what_it_holds(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"R1": torch.eye(8), "bias": torch.zeros(3)}, path)
    with pytest.raises(RotationFileError) as error:
        rotation_files.load(path, OURS, 8, 2)
    said = str(error.value)
    assert f"{path} holds R1 [8, 8], bias [3], but no tensor 'R'" in said
    assert "orthogonal [d, d] matrix" in said and "delete" not in said and "\n" not in said
    save_file({f"layer{i}": torch.zeros(1) for i in range(9)}, path)
    with pytest.raises(RotationFileError, match=r"layer3 \[1\] and 5 more, but"):
        rotation_files.load(path, OURS, 8, 2)


def test_missing_damaged_and_skewed_files_are_told_as_before(tmp_path):
    path = tmp_path / "R1.safetensors"
    with pytest.raises(rotations.RotationError, match="does not exist"):
        rotation_files.load(path, OURS, 8, 2)
    path.write_bytes(b"no tensors")
    with pytest.raises(rotations.RotationError, match="cannot be read"):
        rotation_files.load(path, OURS, 8, 2)
    save_file({"R": torch.ones(8, 8)}, path)
    with pytest.raises(rotations.RotationError, match="not orthogonal"):
        rotation_files.load(path, OURS, 8, 2)

"""A file of tensors without R names those it holds; other faults are told as before."""

import pytest
import torch
from safetensors.torch import save_file

from dfrot_lab import rotation_files, rotations
from dfrot_lab.rotation_files import RotationFileError


def test_a_rotation_is_loaded(tmp_path):
    r = rotations.random_orthogonal(8)
    rotations.save(tmp_path / "R1.safetensors", r, {"seed": 0})
    assert torch.equal(rotation_files.load(tmp_path / "R1.safetensors"), r)


def test_a_file_without_r_names_what_it_holds(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"R1": torch.eye(8), "bias": torch.zeros(3)}, path)
    with pytest.raises(RotationFileError) as error:
        rotation_files.load(path)
    said = str(error.value)
    assert f"{path} holds R1 [8, 8], bias [3], but no tensor 'R'" in said
    assert "orthogonal [d, d] matrix" in said and "delete" not in said and "\n" not in said
    save_file({f"layer{i}": torch.zeros(1) for i in range(9)}, path)
    with pytest.raises(RotationFileError, match=r"layer3 \[1\] and 5 more, but"):
        rotation_files.load(path)


def test_missing_damaged_and_skewed_files_are_told_as_before(tmp_path):
    path = tmp_path / "R1.safetensors"
    with pytest.raises(rotations.RotationError, match="does not exist"):
        rotation_files.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(rotations.RotationError, match="cannot be read"):
        rotation_files.load(path)
    save_file({"R": torch.ones(8, 8)}, path)
    with pytest.raises(rotations.RotationError, match="not orthogonal"):
        rotation_files.load(path)

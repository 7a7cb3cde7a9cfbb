"""Results and provenance: atomic, byte-stable, and a damaged one says what to do."""

import json

import numpy as np
import pytest
import torch

from dfrot_lab import results
from dfrot_lab.results import Claim, ResultError


def test_round_trip_and_same_bytes(tmp_path):
    result = {"b": [1.5, float("inf")], "a": {"x": 1}, "claims": [Claim("c", "p", "o", "r", True)]}
    path = results.save(tmp_path / "n", result, {"seed": 0, "folder": "/somewhere"})
    first = path.read_bytes()
    loaded = results.load(tmp_path / "n")
    assert loaded["b"] == [1.5, "inf"] and loaded["claims"][0]["agrees"] is True
    assert loaded["parameters"] == {"seed": 0}
    assert results.save(tmp_path / "n", result, {"seed": 0}).read_bytes() == first
    assert result["claims"][0] == Claim("c", "p", "o", "r", True)  # the caller's stays as it was


def test_provenance_says_what_made_it_and_nothing_about_where(tmp_path):
    results.save(tmp_path, {}, {"seed": 0}, {"assets": {"a": "b"}})
    found = json.loads((tmp_path / "provenance.json").read_text())
    assert found["parameters"] == {"seed": 0} and found["inputs"] == {"assets": {"a": "b"}}
    assert {"commit", "dirty", "versions", "threads", "seconds", "peak_memory_MiB"} <= set(found)
    # the wheels with CUDA are 2.13.0 to pip and 2.13.0+cu130 to themselves
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert str(tmp_path) not in json.dumps(found)


def test_missing_and_damaged(tmp_path):
    with pytest.raises(ResultError, match="make figures"):
        results.load(tmp_path)
    (tmp_path / "result.json").write_text('{"half": ')
    with pytest.raises(ResultError, match=r"damaged .* delete it"):
        results.load(tmp_path)


def test_what_cannot_be_written_leaves_the_old_result(tmp_path):
    results.save(tmp_path, {"a": 1}, {})
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(TypeError):
        results.save(tmp_path, {"a": object()}, {})
    assert (tmp_path / "result.json").read_bytes() == before
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list])
def test_rounded_keeps_significant_digits(kind):
    values = kind([123456.789, -0.000123456789, 0.0])
    assert results.rounded(values, 4) == [123500.0, -0.0001235, 0.0]
    assert results.rounded(torch.zeros(2, 0)) == [[], []]


def test_code_digest_follows_the_code():
    one = results.code_digest("dfrot_lab.massive")
    assert one == results.code_digest("dfrot_lab.massive")
    assert one != results.code_digest("dfrot_lab.massive", "dfrot_lab.dfrot")


def test_code_edited_while_it_runs_keeps_its_digest(tmp_path, monkeypatch):
    """What a long run measures is of the code that it has loaded."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_meanwhile.py").write_text("x = 1\n")
    before = results.code_digest("edited_meanwhile")
    (tmp_path / "edited_meanwhile.py").write_text("x = 2\n")
    assert results.code_digest("edited_meanwhile") == before

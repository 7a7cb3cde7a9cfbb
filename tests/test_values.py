"""Values are held against the parsers that read them later, and against the model where it is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfrot_lab import models, notebooks, profiles, rotations, values
from dfrot_lab.values import ParameterError

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_defaults_are_sound(notebook):
    """They are not looked at again when a notebook runs; nor are profiles that come with the package."""
    for name, (_, default) in notebooks.parameters(notebook).items():
        values.check(**{name: default})


@pytest.mark.parametrize("profile", profiles.names())
def test_profiles_are_sound(profile):
    content = profiles.load(profile)
    for section in (content["common"], *content["notebooks"].values()):
        values.check(**section)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("bits", "4-4", "parameter bits = '4-4': use W-A-KV"),
        ("bits", "17-4-16", "parameter bits = '17-4-16': each is 2 to 16"),
        ("screen_bits", ["16-4-16", "0-4-16"], "parameter screen_bits: bits = '0-4-16': each"),
        ("all_bits", ["4-4-16", "16-4-16"], "all_bits = '16-4-16' leaves weights as they are"),
        ("steps", 1, "parameter steps = 1: use two points or more"),
        ("abits", 17, "parameter abits: bits = 17: use 2 to 16"),
        ("clips", [1.0, 1.5], r"parameter clips: clip = 1.5: use a ratio in \(0, 1\]"),
        ("objectives", ["whip", "wip"], "'wip' is unknown: use one of centroids, .*whip"),
        ("method", "awq", "parameter method = 'awq': use one of rtn, gptq, gptq-shared"),
        ("gptq", "rtn", "parameter gptq: method = 'rtn': use one of gptq, gptq-shared"),
        ("dtype", "int8", "parameter dtype = 'int8': use one of float32"),
        ("device", "gpu", "parameter device = 'gpu': use cpu or cuda"),
        ("model_backend", "cutlass", "parameter model_backend = 'cutlass': use one of torch, triton"),
        ("tasks", ["last_word", "last"], "task 'last' is unknown: use one of last_word"),
        ("corpora", ["demo", "nowhere"], "unknown corpus 'nowhere': use one of"),
        ("second", "nowhere", "unknown corpus 'nowhere'"),
        ("rotation", "R5", "parameter rotation 'R5' is unknown: use one of NR"),
        ("rotation", ["RH", "none.safetensors"], "none.safetensors does not exist"),
        ("site", "layers.x.mlp", "parameter site = 'layers.x.mlp': use layers.N.attention"),
        ("gammas", [1.0, -1.0], "parameter gammas = -1.0 is negative"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed(name, value, said):
    with pytest.raises(ParameterError, match=said):
        values.check(**{name: value})


def test_right_values_are_let_by(tmp_path):
    rotations.save(tmp_path / "R1.safetensors", rotations.random_orthogonal(8, 0), {})
    values.check(
        rotation=["NR", "DFRot(RO)", str(tmp_path / "R1.safetensors")], bits="16-5-8", abits=3,
        second="", device="cuda:1", corpora=[str(ROOT / "README.md")], corpus="README.md",
        site="layers.31.attention", gammas=[0.0, float("inf")], method=None, anything="at all",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("site", "sites", "said"),
    [
        ("layers.2.mlp", None, "site = 'layers.2.mlp': model .* has layers.0 to layers.1"),
        ("layers.1.mlp", [4, 5], "sites = 5: model .* has 1 to 4 norm sites"),
        (None, [0], "sites = 0"),
    ],
)
@pytest.mark.parametrize("model", ["tiny:qwen2", "folder"])
def test_sites_are_held_against_the_model(model, site, sites, said, tmp_path):
    if model == "folder":
        model = str(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    values.check_sites(model, "layers.1.attention", [1, 4])
    with pytest.raises(ParameterError, match=said):
        values.check_sites(model, site, sites)


def test_sites_of_a_model_that_is_not_here_are_left_to_it(tmp_path):
    for model in ("owner/name", "no such model", str(tmp_path), str(tmp_path / "m.gguf"), None):
        values.check_sites(model, "layers.99.mlp", [999])


def test_the_layers_that_are_known():
    for kind in models.ARCHITECTURES:
        assert models.load_config(f"tiny:{kind}").num_hidden_layers == values.LAYERS["tiny"]


@pytest.mark.demo
def test_the_layers_of_the_demo_model():
    assert models.load_config("demo").num_hidden_layers == values.LAYERS["demo"]


def test_a_length_beyond_the_windows_is_told_before_anything_runs():
    (notebook,) = (p for p in NOTEBOOKS if p.stem == "09_objectives")
    with pytest.raises(ParameterError, match="cayley_length = 1024: use 1 to seqlen, which is 512"):
        notebooks.resolve(notebook, None, {"seqlen": 512})
    assert notebooks.resolve(notebook, None, {"seqlen": 1024})["seqlen"] == 1024

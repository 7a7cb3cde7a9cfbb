"""The dry run: counts against real models, and times that follow their causes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from dfrot_lab import models, plans, profiles, speeds
from dfrot_lab.speeds import Speed

ROOT = Path(__file__).parents[1]
SPEED = Speed(window=8.0, build=3.0, rtn=10.0, refine=11.0, gptq=30.0, hessian=9.0)


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
def test_weights_are_counted(kind):
    model = models.fold_gains(models.tiny(kind, head_dim=24))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert plans.weights(model.config) == matrices


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
def test_a_model_of_the_shape_is_the_model_but_for_its_layers(kind):
    config = models.tiny(kind, head_dim=24).config
    found = models.of_shape(config, 1, dtype="float32", device="cpu")
    assert found.config.num_hidden_layers == 1 and config.num_hidden_layers == 2
    sizes = {n: p.shape for n, p in models.tiny(kind, head_dim=24, layers=1).named_parameters()}
    assert sizes.items() <= {n: p.shape for n, p in found.named_parameters()}.items()
    assert models.is_folded(found)


def test_layers_are_extrapolated_from_what_the_second_adds(monkeypatch):
    monkeypatch.setattr(
        speeds, "_timed", lambda c, layers, *_: (1 + layers, 2 * layers, 5, layers, 0)
    )
    monkeypatch.setattr(speeds, "_refining", lambda d, rows, iterations, clock: rows)
    config = models.tiny("llama", layers=7).config
    common = profiles.load("smoke")["common"]
    assert speeds.measure(config, common, 210.0) == Speed(8, 14, 5, 210.0, 7, 0)


def test_the_refinement_is_timed_for_the_rows_that_are_used(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(speeds, "measure", lambda *a: asked.append(a[2]) or SPEED)
    changed = "base: smoke\ncommon: {seqlen: 10, calibration: 3, rows: 0.5}\n"
    (tmp_path / "p.yml").write_text(changed)
    plans.plan(str(tmp_path / "p.yml"), models.tiny("llama", layers=7).config)
    assert asked == [2 * 7 * 10 * 3 * 0.5]


@pytest.mark.parametrize("profile", profiles.names())
def test_every_profile_can_be_planned(profile):
    config = models.tiny("llama").config
    found = plans.plan(profile, config, SPEED)
    assert all(seconds > 0 for seconds in found.notebooks.values())
    assert found.memory > 0
    text = "\n".join(found.lines())
    assert "GiB" in text and "in all" in text


def test_what_make_figures_runs_comes_first_and_every_notebook_is_there():
    found = plans.plan("demo", models.tiny("llama").config, SPEED)
    stems = [p.stem for p in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
    assert list(found.notebooks) == ["activations, rotations", *stems]
    lines = found.lines()
    one, two = lines.index("make figures"), lines.index("the others")
    told = [[line.split()[0] for line in part] for part in (lines[one + 1 : two], lines[two + 1 :])]
    assert told == [["activations,", *stems[:4], "together"], [*stems[4:], "together", "in"]]
    minutes = [float(line.split(" min")[0].split()[-1]) for line in lines if " min" in line]
    assert minutes[5] + minutes[-2] == pytest.approx(minutes[-1], abs=0.2)
    assert sum(minutes[:5]) == pytest.approx(minutes[5], abs=0.4)


def test_estimates_stand_beside_what_was_measured():
    lines = plans.plan("demo", models.tiny("llama").config, SPEED).lines()
    assert sum("demo on two idle cores: measured" in line for line in lines) == 6


def test_more_windows_seeds_and_slower_machines_take_longer(tmp_path):
    config = models.tiny("llama").config
    content = yaml.safe_load(profiles.path("demo").read_text())

    def total(speed=SPEED, **changes):
        new = {"base": "demo", "common": changes.pop("common", {})}
        new["notebooks"] = {
            name: content["notebooks"][name] | changes.get(name, {})
            for name in content["notebooks"]
        }
        (tmp_path / "p.yml").write_text(yaml.safe_dump(new))
        return sum(plans.plan(str(tmp_path / "p.yml"), config, speed).notebooks.values())

    plain = total()
    assert total(common={"seeds": [0, 1, 2, 3]}) > plain
    assert total(**{"03_massive_tokens_fp16": {"windows": 8}}) > plain
    assert total(**{"04_dfrot": {"windows": 8}}) > plain
    assert total(**{"05_tables": {"weight_windows": 64}}) > plain
    assert total(**{"05_tables": {"gptq": "gptq"}}) > plain
    assert total(**{"06_reviewers_questions": {"clips": [1.0]}}) < plain
    assert total(**{"07_int4_kernels": {"draws": 6}}) > plain
    assert total(**{"09_objectives": {"gammas": [1.0]}}) < plain
    assert total(**{"09_objectives": {"second": ""}}) < plain
    assert total(**{"09_objectives": {"windows": 3}}) > plain
    assert total(**{"09_objectives": {"confirm_windows": 5}}) > plain
    assert total(**{"09_objectives": {"screen_bits": ["16-4-16"]}}) < plain
    assert total(**{"09_objectives": {"cayley_steps": 240}}) > plain
    assert total(**{"10_zero_shot": {"items": 1000}}) > plain
    assert total(**{"10_zero_shot": {"tasks": ["hellaswag"]}}) > plain
    assert total(**{"10_zero_shot": {"method": "gptq"}}) > plain
    assert total(**{"10_zero_shot": {"method": "rtn"}}) < plain
    for part, seconds in vars(SPEED).items():
        assert total(speed=replace(SPEED, **{part: 2 * seconds})) > plain


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
def test_every_part_is_timed_on_the_tiny_models(kind, capsys):
    common = profiles.load("smoke")["common"]
    found = speeds.measure(models.tiny(kind).config, common, 384)
    assert all(seconds > 0 for seconds in vars(found).values())
    told = capsys.readouterr().err
    assert f"{speeds.PARTS}/{speeds.PARTS}" in told  # every part of the bar is one that is timed
    assert "refinement: SVD" in told


def test_the_whole_split_counts_as_many_windows(tmp_path):
    config = models.tiny("llama").config
    (tmp_path / "p.yml").write_text("base: demo\nnotebooks: {03_massive_tokens_fp16: {windows: 0}}")
    whole = plans.plan(str(tmp_path / "p.yml"), config, SPEED).notebooks
    few = plans.plan("demo", config, SPEED).notebooks
    assert whole["03_massive_tokens_fp16"] > 20 * few["03_massive_tokens_fp16"]


def test_disk_is_what_the_artefacts_take():
    """Of the demo model: 0.28 GB of activations a set of one window, 0.4 of Hessians, 2.7 MB a rotation."""
    config = SimpleNamespace(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152,
    )  # fmt: skip
    found = plans.plan("demo", config, SPEED).disk / 1e9
    sets = (
        1 + 1 + 4 + 8
    )  # of its own text, lee, the samples of Table 3, the windows of `recommended`
    assert found == pytest.approx(sets * 0.2831 + 0.403 + 0.0027 * 85, rel=0.03)

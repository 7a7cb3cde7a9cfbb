"""The dry run: counts against real models, and times that follow their causes."""

from __future__ import annotations

import pytest
import yaml

from dfrot_lab import models, plans, profiles

SPEED = (1e11, 5e10)


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
def test_weights_are_counted(kind):
    model = models.fold_gains(models.tiny(kind, head_dim=24))
    shape = plans.Shape.of(model.config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert shape.weights == matrices


def test_a_forward_is_two_operations_a_weight_and_token():
    shape = plans.Shape(2, 64, 96, 4, 2, 16, 384, True)
    products, attention = shape.forward(10)
    assert products == 2 * 10 * (shape.linears + 384 * 64)
    assert attention == 2 * 100 * 64 * 2  # q kᵀ and p v, half of each masked


@pytest.mark.parametrize("profile", profiles.names())
def test_every_profile_can_be_planned(profile):
    config = models.tiny("llama").config
    found = plans.plan(profile, config, SPEED)
    assert all(seconds > 0 for seconds in found.notebooks.values())
    assert found.memory > 0 and found.disk > 0
    text = "\n".join(found.lines())
    assert "GiB" in text and "in all" in text


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
    assert total(common={"iterations": 100}) > plain
    assert total(speed=(SPEED[0] / 2, SPEED[1])) > plain
    assert total(speed=(SPEED[0], SPEED[1] / 2)) > plain

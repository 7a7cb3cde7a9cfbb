"""The paper's findings on the real model, small enough for minutes: `make test-slow`."""

import statistics

import pytest
from dfrot_kernels import hadamard

from dfrot_lab import gptq, models, quantized_model, rotations
from dfrot_lab.lab import Lab
from dfrot_lab.quantizers import round_to_nearest
from dfrot_lab.rotations import Rotations

pytestmark = [pytest.mark.slow, pytest.mark.demo]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return Lab(seqlen=1024, calibration=2, iterations=20, rows=0.125, folder=folder)


def mean(lab, name, keep="none", seeds=(0, 1, 2), windows=2):
    rows = [lab.perplexity(name, s, keep=keep, windows=windows) for s in seeds]
    return statistics.fmean(r["ppl"] for r in rows)


def test_ro_is_worse_than_rh_and_massive_tokens_are_why(lab):
    ro, rh = mean(lab, "RO"), mean(lab, "RH")
    kept = mean(lab, "RO", "massive") - mean(lab, "RH", "massive")
    assert ro > 1.1 * rh
    assert kept < 0.5 * (ro - rh)
    assert mean(lab, "NR", seeds=(0,)) > 10 * mean(lab, "FP", seeds=(0,))


def test_composed_hadamards_behave_like_random_ones(lab):
    ro, rh, composed = (mean(lab, n) for n in ("RO", "RH", "RH2"))
    assert abs(composed - ro) < abs(composed - rh)


def test_refining_ro_gains_at_least_12_percent(lab):
    assert mean(lab, "DFRot(RO)") < 0.88 * mean(lab, "RO")


def test_gptq_loses_less_than_rtn_in_every_linear(lab):
    """On what each layer is given, as GPTQ sees it; 8 windows suffice for the order."""
    rotation = Rotations.standard(lab.lm, rotations.random_hadamard(lab.activations.d, 0))
    spec = quantized_model.ModelSpec.of("4-16-16").weights
    merged = rotations.merge(models.load("demo"), rotation)
    seen = {}

    def both(w, hessian, spec, how):
        got, plain = exact(w, hessian, spec, how), round_to_nearest(w, spec)
        lost = [
            (((w - x).double() @ hessian) * (w - x).double()).sum().item() for x in (got, plain)
        ]
        seen[len(seen)] = lost[0] / lost[1]
        return got

    exact, gptq.quantize_weight = gptq.quantize_weight, both
    try:
        tokens = lab.evaluation_tokens(8)
        gptq.quantize_layers(merged, tokens, spec, gptq.GPTQ(), online=(None, hadamard.transform))
    finally:
        gptq.quantize_weight = exact
    assert len(seen) == 4 * 30 and max(seen.values()) < 1

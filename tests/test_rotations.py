"""Rotations are orthogonal and, merged, change nothing but the basis of the stream."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import exact, haar, logits, own_for_each_head, random_tokens, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import kstest

from dfrot_lab import activations, models, quantized_model, rotations
from dfrot_lab.rotations import RotationError, Rotations

KINDS = list(models.ARCHITECTURES)
UNQUANTIZED = quantized_model.ModelSpec(activations=None)


@given(st.sampled_from(list(rotations.START)), st.integers(1, 130), st.integers(0, 99))
def test_every_start_is_orthogonal_and_seeded(name, d, seed):
    r = rotations.START[name](d, seed)
    assert r.shape == (d, d) and r.dtype == torch.float64
    assert (r.mT @ r - torch.eye(d, dtype=r.dtype)).abs().max() < 1e-12
    assert torch.equal(r, rotations.START[name](d, seed))
    if name == "NR":
        assert torch.equal(r, torch.eye(d, dtype=r.dtype))
    elif d > 8:
        assert not torch.equal(r, rotations.START[name](d, seed + 1))


@pytest.mark.parametrize("seed", [-1, rotations.SEEDS])
@pytest.mark.parametrize("name", ["RO", "RH", "RH2"])
def test_a_seed_that_the_generator_takes_for_another_is_refused(name, seed):
    with pytest.raises(RotationError, match=f"seed = {seed}: use a whole number from 0"):
        rotations.START[name](8, seed)
    rotations.START[name](8, rotations.SEEDS - 1)


def test_random_orthogonal_is_haar():
    """Under Haar measure (r₀₀ + 1)/2 is Beta((d−1)/2, (d−1)/2) and the trace has mean 0, variance 1."""
    d, many = 6, [rotations.random_orthogonal(6, s) for s in range(400)]
    corner = torch.stack([r[0, 0] for r in many])
    assert kstest((corner.numpy() + 1) / 2, "beta", ((d - 1) / 2, (d - 1) / 2)).pvalue > 0.01
    trace = torch.stack([r.trace() for r in many])
    assert trace.mean().abs() < 0.15 and (trace.var() - 1).abs() < 0.25


@pytest.mark.parametrize("d", [64, 576])
def test_random_hadamard_has_one_magnitude_and_random_rows(d):
    r = rotations.random_hadamard(d, 3)
    assert torch.allclose(r.abs(), torch.full_like(r, d**-0.5), rtol=1e-12)
    flips = r / rotations.random_hadamard(d, 4)  # D is on the left: whole rows change sign
    assert torch.equal(flips.sign(), flips[:, :1].sign().expand(d, d))
    assert 0.3 < (flips[:, 0] > 0).double().mean() < 0.7
    assert rotations.composed_hadamard(d, 3).abs().std() > 0.2 * d**-0.5
    assert torch.equal(
        rotations.composed_hadamard(d, 3, times=1), rotations.random_hadamard(d, 3000)
    )


@st.composite
def architectures(draw) -> tuple[str, dict]:
    kind = draw(st.sampled_from(KINDS))
    hidden = draw(st.sampled_from([33, 36, 45, 48, 60, 64, 72]))
    # LlamaConfig insists that heads divide the hidden size, whatever the head_dim
    groups = [(4, 2), (2, 1), (3, 3), (6, 2), (1, 1)]
    groups = [(h, kv) for h, kv in groups if kind != "llama" or hidden % h == 0]
    heads, kv_heads = draw(st.sampled_from(groups))
    options = {
        "hidden": hidden,
        "intermediate": draw(st.sampled_from([96, 80, 44, 21])),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([4, 6, 8, 12, 20])),
        "tied": draw(st.booleans()),
        "layers": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 99)),
    }
    if kind == "llama":
        options |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    elif kind == "qwen3":
        options |= {"attention_bias": draw(st.booleans())}
    return kind, options


def merged(model, r1: str, seed: int, r2: str = "RH"):
    """`model` folded, R1 and R2 merged and R4 online, nothing quantized."""
    folded = models.fold_gains(copy.deepcopy(model))
    head_dim = models.layers(model)[0].module.self_attn.head_dim
    rotation = Rotations(
        R1=rotations.START[r1](model.config.hidden_size, seed),
        R2=rotations.START[r2](head_dim, seed + 1),
        R4=True,
    )
    return quantized_model.build(folded, rotation, UNQUANTIZED)


@given(architectures(), st.integers(0, 99))
def test_r2_of_each_head_changes_no_logit(shape, seed):
    kind, options = shape
    model = exact(models.fold_gains(models.tiny(kind, **options)))
    turned = rotations.merge(copy.deepcopy(model), Rotations(R2=own_for_each_head(model, seed)))
    assert relative(logits(turned, random_tokens(seed)), logits(model, random_tokens(seed))) < 1e-9
    value = [
        models.layers(m)[0].attention_inputs["self_attn.v_proj"].weight for m in (model, turned)
    ]
    assert relative(*value) > 1e-3


def test_equal_r2_of_all_heads_is_one_r2(llama):
    one = haar(16, 3)
    many = one.expand(2, 2, 16, 16)
    a, b = (rotations.merge(copy.deepcopy(llama), Rotations(R2=r)) for r in (one, many))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert relative(x, y) < 1e-6


@settings(max_examples=60)
@given(architectures(), st.sampled_from(["RO", "RH", "RH2"]), st.sampled_from(["RO", "RH"]))
def test_rotated_logits_equal_the_originals(shape, r1, r2):
    kind, options = shape
    tokens = random_tokens(options["seed"])
    model = models.tiny(kind, **options)
    assert relative(logits(merged(model, r1, 5, r2), tokens), logits(model, tokens)) < 1e-4
    model = exact(model)
    assert relative(logits(merged(model, r1, 5, r2), tokens), logits(model, tokens)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_r1_turns_the_stream_from_x_to_x_r(kind):
    model = exact(models.fold_gains(models.tiny(kind)))
    r, tokens = haar(64), random_tokens()
    turned = rotations.merge(copy.deepcopy(model), Rotations(R1=r))
    pairs = zip(
        activations.capture(model, tokens), activations.capture(turned, tokens), strict=True
    )
    for (_, _, x), (_, _, y) in pairs:
        assert relative(y, x @ r) < 1e-9
        assert relative(y, x @ r.mT) > 0.1


def test_r2_turns_the_values_of_each_head():
    model = exact(models.fold_gains(models.tiny("qwen2")))
    r = haar(16, 1)
    turned = rotations.merge(copy.deepcopy(model), Rotations(R2=r))
    value = "self_attn.v_proj"
    x = torch.randn(7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for before, after in zip(models.layers(model), models.layers(turned), strict=True):
        v = before.attention_inputs[value](x).unflatten(-1, (-1, 16))
        assert v.shape[1] == 2
        assert relative(after.attention_inputs[value](x), (v @ r).flatten(-2)) < 1e-12
        assert torch.equal(
            before.attention_inputs["self_attn.q_proj"].weight,
            after.attention_inputs["self_attn.q_proj"].weight,
        )


def test_r4_without_its_online_half_is_another_function(llama):
    tokens = random_tokens()
    turned = rotations.merge(copy.deepcopy(llama), Rotations(R4=True))
    assert relative(logits(turned, tokens), logits(llama, tokens)) > 0.01
    assert turned.config.dfrot_merged == ["gains", "R4"]


def test_merging_rounds_once_in_the_models_dtype():
    model = models.fold_gains(models.tiny("llama")).to(torch.bfloat16)
    w, r = model.model.layers[0].mlp.up_proj.weight.detach().clone(), haar(64)
    rotations.merge(model, Rotations(R1=r))
    found = model.model.layers[0].mlp.up_proj.weight
    assert found.dtype == torch.bfloat16
    wanted = (w.double() @ r).to(torch.bfloat16)
    assert (found != wanted).float().mean() < 1e-3  # where fp32 falls on the other side of a tie
    assert torch.allclose(found, wanted, rtol=2**-7, atol=0)


def test_a_large_table_is_turned_in_blocks():
    w, r = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), haar(8)
    wanted = w.double() @ r
    rotations._turn_rows(w, r, rows=7)
    assert torch.allclose(w.double(), wanted, rtol=0, atol=1e-6)


def test_an_exact_fp32_rotation_merges_too(llama):
    """A Hadamard of order 64 is orthogonal to the last bit in fp32 as well."""
    r, tokens = rotations.random_hadamard(64), random_tokens()
    wanted = rotations.merge(copy.deepcopy(llama), Rotations(R1=r))
    found = rotations.merge(copy.deepcopy(llama), Rotations(R1=r.float()))
    assert torch.equal(logits(found, tokens), logits(wanted, tokens))


def test_standard_is_what_the_paper_runs():
    model = models.tiny("llama", head_dim=12)
    assert Rotations.standard(model, None) == Rotations()
    r = haar(64)
    found = Rotations.standard(model, r)
    assert found.R1 is r and found.R4 and found.R2.shape == (12, 12)


# --- refusals --------------------------------------------------------------------------------------


def test_gains_must_be_folded():
    with pytest.raises(RotationError, match=r"not folded: call models\.fold_gains"):
        rotations.merge(models.tiny("llama"), Rotations())


def test_nothing_is_merged_twice(llama):
    rotations.merge(llama, Rotations(R1=haar(64)))
    models.fold_gains(llama)  # a no-op, which keeps the record of what was merged
    with pytest.raises(RotationError, match=r"\['R1'\] already merged .* load it afresh"):
        rotations.merge(llama, Rotations(R1=haar(64), R2=haar(16)))
    rotations.merge(llama, Rotations(R2=haar(16)))
    with pytest.raises(RotationError, match=r"\['R2'\] already merged"):
        rotations.merge(llama, Rotations(R2=haar(16)))


def test_parts_merged_one_after_another_are_the_whole(llama):
    at_once = rotations.merge(copy.deepcopy(llama), Rotations(R1=haar(64), R2=haar(16), R4=True))
    for part in (Rotations(R4=True), Rotations(R1=haar(64)), Rotations(R2=haar(16))):
        rotations.merge(llama, part)
    assert sorted(llama.config.dfrot_merged) == sorted(at_once.config.dfrot_merged)
    for ours, theirs in zip(llama.parameters(), at_once.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize(
    "rotation, said",
    [
        (Rotations(R1=haar(32)), r"R1 is \[32, 32\] but the model needs \[64, 64\]"),
        (Rotations(R1=haar(64)[None]), r"R1 is \[1, 64, 64\] but the model needs"),
        (Rotations(R1=haar(64)[:, :32]), r"R1 is \[64, 32\]"),
        (Rotations(R1=haar(64) * 1.001), r"R1 is not orthogonal: max\|RᵀR − I\| = 0.002.* > 1e-10"),
        (Rotations(R1=haar(64).float()), "R1 is not orthogonal: .* project it"),
        (Rotations(R1=haar(64) * torch.nan), "R1 is not orthogonal: .* = nan"),
        (Rotations(R1=haar(64), R2=haar(64)), r"R2 is \[64, 64\] but the model needs \[16, 16\]"),
        (Rotations(R1=haar(64), R2=haar(16) * 2), "R2 is not orthogonal"),
        (
            Rotations(R2=haar(16).expand(2, 3, 16, 16)),
            r"R2 is \[2, 3, 16, 16\] but the model needs",
        ),
        (
            Rotations(R2=haar(16).expand(2, 2, 16, 16) * 2),
            "R2 of layer 0, head 0 is not orthogonal",
        ),
    ],
)
def test_a_wrong_matrix_is_refused_and_the_model_left_alone(llama, rotation, said):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    with pytest.raises(RotationError, match=said):
        rotations.merge(llama, rotation)
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())
    assert llama.config.dfrot_merged == ["gains"]


# --- files -----------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 99))
def test_saved_rotations_come_back_to_the_bit(tmp_path_factory, d, seed):
    path = tmp_path_factory.mktemp("r") / "new" / "R1.safetensors"
    r, about = haar(max(d, 2), seed), {"gamma": float("inf"), "seed": seed, "of": ["a", "γ"]}
    assert rotations.save(path, r.mT, about) == path
    found, metadata = rotations.load(path, max(d, 2))
    assert torch.equal(found, r.mT) and metadata == about
    assert [f.name for f in path.parent.iterdir()] == ["R1.safetensors"]


def test_bad_rotation_files(tmp_path):
    path = tmp_path / "R1.safetensors"
    with pytest.raises(RotationError, match=r"R1\.safetensors does not exist: make it with"):
        rotations.load(path)
    with pytest.raises(RotationError, match="not orthogonal"):
        rotations.save(path, torch.ones(3, 3), {})
    assert not path.exists()
    rotations.save(path, haar(6), {})
    with pytest.raises(
        RotationError, match=r"R1\.safetensors is \[6, 6\] but the model needs \[8, 8\]"
    ):
        rotations.load(path, 8)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        RotationError, match=r"R1\.safetensors cannot be read: .*; delete it and make it"
    ):
        rotations.load(path)
    save_file({"Q": torch.eye(3)}, path)
    with pytest.raises(RotationError, match="cannot be read"):
        rotations.load(path)
    save_file({"R": 2 * torch.eye(3)}, path)
    with pytest.raises(RotationError, match=r"not orthogonal: .* = 3 > 1e-10"):
        rotations.load(path)


@given(st.integers(2, 30), st.floats(1e-9, 1e-3))
def test_orthogonality_error_measures(d, size):
    r = haar(d, 1)
    assert rotations.orthogonality_error(r) < 1e-13
    assert rotations.orthogonality_error(r * (1 + size)) == pytest.approx(
        2 * size + size**2, rel=1e-3
    )
    assert rotations.check(r, d) is r

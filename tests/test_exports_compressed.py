"""compressed-tensors: what the official package and transformers read back, against our own model."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import logits, random_tokens, relative
from safetensors.torch import load_file, save_file

from dfrot_lab import corpora, models, profiles, quantized_model, quantizers, rotations
from dfrot_lab.cli import app
from dfrot_lab.exports import checks, compressed, compressed_checks, sources
from dfrot_lab.exports.sources import ExportError
from dfrot_lab.linears import grid
from dfrot_lab.quantized_model import ModelSpec
from dfrot_lab.quantizers import QuantSpec
from dfrot_lab.rotations import Rotations

BOTH = Rotations(R1=rotations.random_hadamard(64), R2=rotations.random_hadamard(16))


@pytest.fixture
def package():
    return pytest.importorskip(
        "compressed_tensors",
        reason="compressed-tensors is not installed: pip install -e '.[export]'",
    )


def export(tmp_path, kind="llama", **options):
    with sources.opened(f"tiny:{kind}") as s:
        recipe = sources.recipe("RH", s)
        return compressed.write(s, tmp_path / "out", recipe, **options)


def ours(kind, bits):
    return quantized_model.build(models.load(f"tiny:{kind}"), BOTH, ModelSpec.of(bits))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("bits", ["4-4-16", "4-8-16"])
@pytest.mark.parametrize("packed", [False, True])
def test_transformers_computes_what_we_compute(package, tmp_path, kind, bits, packed):
    about = export(tmp_path, kind, bits=bits, packed=packed)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = random_tokens(7)
    assert relative(logits(model, tokens), logits(ours(kind, bits), tokens)) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    declared = config["quantization_config"]
    assert declared["format"] == about["format"] == compressed.FORMATS[packed]
    group = declared["config_groups"]["group_0"]
    inputs, weights = group["input_activations"], group["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["symmetric"]) == (4, "channel", True)
    assert (inputs["num_bits"], inputs["dynamic"]) == (int(bits[2]), True)
    assert declared["ignore"] == ["lm_head"]
    # the rotation is recorded, and not as something an engine should apply once more
    assert config["dfrot_merged"] == config["dfrot_export"]["merged"] == ["gains", "R1", "R2"]
    assert config["dfrot_export"]["R1"] == {"rotation": "RH", "seed": 0}
    assert set(config["dfrot_export"]["left_out"]) == {"R3", "R4"}
    assert not declared["transform_config"]


def test_the_package_unpacks_our_codes(package, tmp_path):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    export(tmp_path, packed=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    code, step = grid(ours("llama", "4-4-16").get_submodule(name).weight)
    assert stored[f"{name}.weight_packed"].dtype == torch.int32
    assert stored[f"{name}.weight_packed"].numel() * 8 == code.numel()
    assert torch.equal(unpack_from_int32(stored[f"{name}.weight_packed"], 4, code.shape), code)
    torch.testing.assert_close(stored[f"{name}.weight_scale"][:, 0], step)


def test_symmetric_activations_are_the_packages_not_ours(package, tmp_path):
    """Its step puts the largest number of a token half way between two codes: ±1 comes back 1/15 off."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(num_bits=4, strategy="token", symmetric=True, dynamic=True)
    x = torch.tensor([[[1.0, -1.0, 1.0, -1.0]]])  # a massive token under a Hadamard
    theirs = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, None), args)
    assert ((theirs - x).abs() * 15).round().tolist() == [[[1, 1, 1, 1]]]
    assert torch.equal(quantizers.fake_quantize(x, QuantSpec(symmetric=True)), x)
    about = export(tmp_path, symmetric=True)
    assert about["symmetric"] is True and about["verified"]["logits"] < 1e-5


def test_a_packed_export_warns_of_nothing_and_can_be_read_by_others(package, tmp_path, capfd):
    export(tmp_path, packed=True)
    assert "may fail" not in "".join(capfd.readouterr())
    others = [p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()]
    umask = os.umask(0)
    os.umask(umask)
    assert set(others) == {0o666 & ~umask}


def test_bfloat16_stays(package, tmp_path):
    models.tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    with sources.opened(str(tmp_path / "half")) as s:
        compressed.write(s, tmp_path / "out", sources.recipe("RH", s), bits="4-8-16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


def test_gptq_weights_are_stored_too(package, tmp_path):
    tokens = random_tokens(3, (4, 64))
    about = export(tmp_path, method="gptq", calibration=tokens)
    assert about["method"] == "gptq"
    spec = ModelSpec.of("4-4-16", method="gptq")
    wanted = quantized_model.build(models.load("tiny:llama"), BOTH, spec, calibration=tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(logits(model, random_tokens()), logits(wanted, random_tokens())) < 1e-5


def test_the_command_calibrates_gptq_on_the_profiles_text(package, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["export", "compressed", "--model", "tiny:qwen2", "--rotation", "RH", "--bits", "4-8-16",
              "--method", "gptq", "--profile", "smoke", "--out", str(out)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "gains, R1, R2 merged" in done.output
    about = json.loads((out / "config.json").read_text())["dfrot_export"]
    assert (about["method"], about["bits"]) == ("gptq", "4-8-16")
    # the codes are those of GPTQ on 128 windows of the profile's corpus and length, not of RTN
    common, model = profiles.load("smoke")["common"], models.load("tiny:qwen2")
    tokenizer = models.load_tokenizer("tiny:qwen2")
    tokens = corpora.load("pydoc", "calibration", tokenizer, windows=128, seqlen=96, seed=0)
    name, codes = "model.layers.1.mlp.down_proj", {}
    for method in ("gptq", "rtn"):
        spec = ModelSpec.of("4-8-16", method=method, clip_steps=common["clip_steps"])
        given = tokens if method == "gptq" else None
        built = quantized_model.build(model, BOTH, spec, calibration=given)
        codes[method] = grid(built.get_submodule(name).weight)[0]
    stored = load_file(out / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(stored, codes["gptq"]) and not torch.equal(stored, codes["rtn"])


def test_an_exported_checkpoint_is_no_source(package, tmp_path):
    export(tmp_path)
    with (
        pytest.raises(ExportError, match="quantized already"),
        sources.opened(str(tmp_path / "out")),
    ):
        pass
    with pytest.raises(ExportError, match="exists"):
        export(tmp_path)


def test_a_wrong_step_is_not_left(package, tmp_path, monkeypatch):
    def wrong(w):
        code, step = grid(w)
        return code, step * (1 + 0.2 * (torch.arange(len(step)) == 0))

    monkeypatch.setattr(compressed, "grid", wrong)
    with pytest.raises(ExportError, match="codes times steps are not its weight"):
        export(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "tensor", "wrong"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight_packed", lambda w: w ^ (w == w[0, 0])),
        ("llama", "model.layers.1.mlp.up_proj.weight_scale", lambda w: w * 1.01),
        ("llama", "lm_head.weight", lambda w: w.roll(1, 0)),
        ("llama", "model.norm.weight", lambda w: 2 * w),
        ("qwen2", "model.layers.0.self_attn.q_proj.bias", lambda w: -w),
    ],
)
def test_what_is_read_back_as_something_else_is_not_left(
    package, tmp_path, monkeypatch, kind, tensor, wrong
):
    save = compressed._save

    def altered(lm, codes, folder, *how):
        save(lm, codes, folder, *how)
        stored = load_file(folder / "model.safetensors")
        stored[tensor] = wrong(stored[tensor])
        save_file(stored, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(compressed, "_save", altered)
    with pytest.raises(
        ExportError, match=f"{tensor.split('_packed')[0].split('_scale')[0]} is read"
    ):
        export(tmp_path, kind, packed=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["rope_theta", "rms_norm_eps"])
def test_another_config_is_not_left(package, tmp_path, monkeypatch, what):
    save = compressed._save

    def altered(lm, codes, folder, *how):
        save(lm, codes, folder, *how)
        config = json.loads((folder / "config.json").read_text())
        where = config["rope_parameters"] if what == "rope_theta" else config
        where[what] *= 10
        (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(compressed, "_save", altered)
    with pytest.raises(ExportError, match="something else than our quantized model: logits differ"):
        export(tmp_path)


def test_activations_that_are_declared_otherwise_are_not_left(package, tmp_path, monkeypatch):
    save = compressed._save

    def wrong(lm, codes, folder, bits, symmetric, packed):
        save(lm, codes, folder, "4-8-16", symmetric, packed)

    monkeypatch.setattr(compressed, "_save", wrong)
    with pytest.raises(ExportError, match="something else than our quantized model: logits differ"):
        export(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_large_model_is_compared_on_its_first_layers(package, tmp_path, kind, monkeypatch):
    compared, plain = [], checks.plain

    def counted(folder, **options):
        compared.append(plain(folder, **options))
        return compared[-1]

    monkeypatch.setattr(checks, "plain", counted)
    monkeypatch.setattr(compressed_checks, "PARAMETERS", 1)
    assert export(tmp_path, kind)["verified"]["logits"] < 1e-6
    assert [len(models.layers(m)) for m in compared] == [2, 1]


def test_other_bits_are_refused(package, tmp_path):
    with pytest.raises(ExportError, match="written for '4-4-16' and '4-8-16'"):
        export(tmp_path, bits="3-4-16")


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    done = CliRunner().invoke(
        app, ["export", "compressed", "--model", "tiny:llama", "--rotation", "RH",
              "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert done.exit_code == 1
    assert "pip install 'dfrot-lab[export]'" in done.output

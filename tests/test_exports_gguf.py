"""GGUF: tensors, words and vocabulary of the written file."""

from __future__ import annotations

import json

import gguf as format
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import byte_pairs, logits, random_tokens, relative

from dfrot_lab import models, rotations
from dfrot_lab.cli import app
from dfrot_lab.exports import checks, gguf, sources, vocabularies
from dfrot_lab.exports.sources import ExportError

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture
def written(saved, tmp_path):
    """A tiny model of a kind, and its GGUF."""

    def write(kind="llama", rotation="RH", dtype="F32", **options):
        folder, path = saved(kind, **options), tmp_path / "model.gguf"
        with sources.opened(str(folder)) as s:
            recipe = sources.recipe(rotation, s)
            about = gguf.write(s, path, recipe, dtype=dtype, vocabulary=False)
        return folder, format.GGUFReader(path), about

    return write


def value(reader, name):
    return reader.get_field(name).contents()


def tensors(reader):
    return {t.name: np.array(t.data) for t in reader.tensors}


@pytest.mark.parametrize("kind", models.ARCHITECTURES)
def test_the_tensors_are_the_merged_ones(written, tmp_path, kind):
    folder, reader, about = written(kind, tied=True)
    model = models.fold_gains(models.load(str(folder)))
    both = rotations.Rotations(R1=rotations.random_hadamard(64), R2=rotations.random_hadamard(16))
    weights = {k: v.numpy() for k, v in rotations.merge(model, both).state_dict().items()}
    found = tensors(reader)
    near = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(
        found["token_embd.weight"], weights["model.embed_tokens.weight"], **near
    )
    np.testing.assert_allclose(found["output.weight"], weights["lm_head.weight"], **near)
    down = weights["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_allclose(found["blk.1.ffn_down.weight"], down, **near)
    q = weights["model.layers.0.self_attn.q_proj.weight"]
    if kind in ("llama", "mistral"):  # pairs (i, i + 8) of every head side by side
        order = [16 * h + i + 8 * half for h in range(4) for i in range(8) for half in (0, 1)]
        q = q[order]
    np.testing.assert_allclose(found["blk.0.attn_q.weight"], q, **near)
    assert (found["output_norm.weight"] == 1).all()
    assert value(reader, "dfrot.merged") == ["gains", "R1", "R2"] == about["merged"]
    assert json.loads(value(reader, "dfrot.record")) | {"verified": about["verified"]} == about
    assert about["verified"]["texts"] == 0  # there is no vocabulary
    arch = "llama" if kind == "mistral" else kind
    assert value(reader, "general.architecture") == arch
    assert value(reader, f"{arch}.attention.head_count_kv") == 2
    assert value(reader, f"{arch}.attention.key_length") == 16


def test_an_unrotated_tied_model_keeps_its_gains_and_one_table(written, saved):
    _, reader, about = written(rotation="NR")
    found = tensors(reader)
    assert "output.weight" not in found and about["merged"] == []
    assert reader.get_field("dfrot.merged") is None
    gain = models.tiny("llama").model.layers[0].input_layernorm.weight.detach().numpy()
    np.testing.assert_array_equal(found["blk.0.attn_norm.weight"], gain)


def test_half_precision_keeps_gains_and_biases_in_full(written):
    _, reader, _ = written("qwen2", dtype="F16")
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.0.attn_q.weight"] == "F16"
    assert types["blk.0.attn_q.bias"] == types["output_norm.weight"] == "F32"
    assert value(reader, "general.file_type") == format.LlamaFileType.MOSTLY_F16


def test_llama3_frequencies_are_those_of_transformers(written):
    folder, reader, _ = written(rope_parameters=LLAMA3)
    model = models.load(str(folder))
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    wanted = plain / model.model.rotary_emb.inv_freq.numpy()
    assert wanted.max() > 7  # the scaling is there
    np.testing.assert_allclose(tensors(reader)["rope_freqs.weight"], wanted, rtol=1e-5)


def test_a_wrong_order_of_channels_is_not_left(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "reorder", lambda w, heads: w)
    with sources.opened(str(saved())) as s, pytest.raises(ExportError, match="something else"):
        gguf.write(s, tmp_path / "a.gguf", sources.recipe("RH", s), vocabulary=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_reorder_puts_halves_of_a_head_side_by_side():
    w = torch.arange(12)  # two heads of 6
    assert gguf.reorder(w, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.fixture
def rotated(saved, tmp_path, monkeypatch):
    """A rotated GGUF with a vocabulary, and an empty cache."""
    monkeypatch.setenv("DFROT_CACHE", str(tmp_path / "cache"))
    folder, path = saved(), tmp_path / "rotated.gguf"
    byte_pairs(folder)
    with sources.opened(str(folder)) as s:
        gguf.write(s, path, sources.recipe("RH", s))
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_rotated_gguf_is_not_rotated_again(rotated, tmp_path):
    """By any command, nor by way of the folder that it is dequantized to."""
    rotations.save(tmp_path / "R1.safetensors", rotations.random_orthogonal(64), {"model": "any"})
    file, out, lab = tmp_path / "R1.safetensors", tmp_path / "again", tmp_path / "lab"
    cached = models.load_config(str(rotated)).name_or_path
    assert models.load_config(cached).dfrot_merged == ["gains", "R1", "R2"]
    for model, few in ((rotated, None), (cached, 4)):
        smoke = ("--profile", "smoke", "--model", model, "--folder", lab)
        asked = (
            ("merge", model, "--rotation", file, "--out", out),
            ("export", "hf", "--model", model, "--rotation", "RH", "--out", out),
            ("quantize", *smoke, "--method", "rtn", "--rotation", "RH", "--out", out),
            ("optimize", *smoke),
            ("export", "rotation", *smoke, "--out", tmp_path / "again.safetensors"),
            ("eval", *smoke, "--method", "rtn", "--rotation", "RH"),
            ("generate", "Hi", *smoke),
            ("collect", *smoke),
            ("run", "02", "--profile", "smoke", "-p", "model", model, "--folder", lab),
        )
        for arguments in asked[:few]:
            done = invoke(*arguments)
            assert done.exit_code == 1, (arguments, done.output)
            assert "is rotated already (gains, R1, R2 merged)" in done.output, arguments
            assert not out.exists() and not list(lab.rglob("*.safetensors"))


def test_a_rotated_gguf_is_passed_on_as_it_is(rotated, tmp_path):
    done = invoke("export", "hf", "--model", rotated, "--rotation", "NR", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    tokens, first = random_tokens(), models.load(str(tmp_path / "source"))
    assert (
        relative(logits(models.load(str(tmp_path / "out")), tokens), logits(first, tokens)) < 1e-5
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dfrot_merged"] == ["gains", "R1", "R2"]
    assert config["dfrot_export"]["model"] == str(tmp_path / "source")  # what was there at first


def test_a_folder_dequantized_before_marks_were_kept_is_not_used(rotated, tmp_path):
    stat = rotated.stat()
    old = tmp_path / "cache" / "dequantized" / f"rotated-{stat.st_size}-{stat.st_mtime_ns}"
    models.tiny("llama").save_pretrained(old)
    assert models.load_config(str(rotated)).dfrot_merged == ["gains", "R1", "R2"]


def test_what_was_verified_stands_in_the_file(saved, tmp_path):
    folder, path = saved(), tmp_path / "a.gguf"
    byte_pairs(folder)
    with sources.opened(str(folder)) as s:
        about = gguf.write(s, path, sources.recipe("RH", s))
    verified, reader = about["verified"], format.GGUFReader(path)
    assert 0 < verified["logits"] < 1e-5 and verified["texts"] == len(checks.TEXTS)
    assert value(reader, "dfrot.verified.logits") == verified["logits"]
    assert value(reader, "dfrot.verified.texts") == verified["texts"]


def test_a_wrong_vocabulary_is_not_left(saved, tmp_path, monkeypatch):
    folder, add = saved(), format.GGUFWriter.add_token_list

    def swapped(self, tokens):
        i, j = tokens.index("t"), tokens.index("h")
        tokens[i], tokens[j] = tokens[j], tokens[i]
        add(self, tokens)

    byte_pairs(folder)
    monkeypatch.setattr(format.GGUFWriter, "add_token_list", swapped)
    with sources.opened(str(folder)) as s, pytest.raises(ExportError, match="into tokens"):
        gguf.write(s, tmp_path / "a.gguf", sources.recipe("RH", s))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention_bias": True}, "attention_bias = True"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "'linear'",
        ),
    ],
)
def test_what_gguf_cannot_say_is_refused(saved, tmp_path, options, said):
    with sources.opened(str(saved(**options))) as s, pytest.raises(ExportError, match=said):
        gguf.write(s, tmp_path / "a.gguf", sources.recipe("RH", s), vocabulary=False)
    assert not list(tmp_path.glob("*gguf*"))


def test_a_window_bounds_the_context(written):
    _, reader, _ = written("mistral", sliding_window=128)
    assert value(reader, "llama.context_length") == 128


# --- vocabulary -----------------------------------------------------------------------------------


def test_byte_pairs_are_read_from_tokenizer_json(saved, tmp_path):
    folder = saved()
    raw = byte_pairs(folder)
    with sources.opened(str(folder)) as s:
        gguf.write(s, tmp_path / "model.gguf", sources.recipe("RH", s))
    reader = format.GGUFReader(tmp_path / "model.gguf")
    tokens = value(reader, "tokenizer.ggml.tokens")
    types = value(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == 384
    size = raw.get_vocab_size()
    assert tokens[:size] == [raw.id_to_token(i) for i in range(size)]
    kind = format.TokenType
    assert types[0] == kind.CONTROL and types[size - 1] == kind.USER_DEFINED
    assert types[1] == kind.NORMAL and set(types[size:]) == {kind.UNUSED}
    assert value(reader, "tokenizer.ggml.pre") == "qwen2"
    assert value(reader, "tokenizer.ggml.bos_token_id") == 0
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    joined = [m if isinstance(m, str) else " ".join(m) for m in merges]
    assert value(reader, "tokenizer.ggml.merges") == joined


def test_an_unknown_pre_tokenizer_asks_for_its_name(saved, tmp_path):
    folder = saved()
    byte_pairs(folder, cut="a+|b")
    with sources.opened(str(folder)) as s:
        recipe = sources.recipe("RH", s)
        with pytest.raises(ExportError, match="give --pre"):
            gguf.write(s, tmp_path / "a.gguf", recipe)
        gguf.write(s, tmp_path / "a.gguf", recipe, pre="gpt-2")
    assert value(format.GGUFReader(tmp_path / "a.gguf"), "tokenizer.ggml.pre") == "gpt-2"


def test_the_command_writes_what_its_options_say(saved, tmp_path):
    folder, out = saved(), tmp_path / "new" / "model.gguf"
    raw = byte_pairs(folder, cut="a+|b")
    done = invoke("export", "gguf", "--model", folder, "--rotation", "RO", "--seed", 2, "--no-r2",
                  "--dtype", "F16", "--pre", "gpt-2", "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"{out}: gains, R1 merged" in done.output
    reader = format.GGUFReader(out)
    original = models.load(str(folder), fold=False).model.embed_tokens.weight.double()
    wanted = original @ rotations.random_orthogonal(64, 2)
    found = tensors(reader)["token_embd.weight"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-3, atol=1e-3)
    assert value(reader, "dfrot.merged") == ["gains", "R1"]
    assert json.loads(value(reader, "dfrot.record"))["R1"] == {"rotation": "RO", "seed": 2}
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    words = value(reader, "tokenizer.ggml.tokens")
    assert words[: raw.get_vocab_size()] == [
        raw.id_to_token(i) for i in range(raw.get_vocab_size())
    ]
    assert [p.name for p in out.parent.iterdir()] == ["model.gguf"]


def test_the_command_leaves_the_vocabulary_out_if_told(tmp_path):
    out = tmp_path / "model.gguf"
    ask = ("export", "gguf", "--model", "tiny:qwen3", "--rotation", "RH", "--out", out)
    done = invoke(*ask)
    assert done.exit_code == 1 and "no tokenizer.json" in done.output and not out.exists()
    done = invoke(*ask, "--no-vocabulary")
    assert done.exit_code == 0, done.output
    reader = format.GGUFReader(out)
    assert value(reader, "tokenizer.ggml.model") == "no_vocab"
    assert value(reader, "general.architecture") == "qwen3"
    assert value(reader, "dfrot.merged") == ["gains", "R1", "R2"]


def test_no_tokenizer_is_told(saved, tmp_path):
    with sources.opened(str(saved())) as s, pytest.raises(ExportError, match=r"no tokenizer\.json"):
        gguf.write(s, tmp_path / "a.gguf", sources.recipe("RH", s))


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "use_regex": True},
                ],
            },
            "smollm",
        ),
    ],
)
def test_pre_tokenizers_by_name(about, name):
    assert vocabularies.pre_tokenizer(about) == name


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_vocabulary_is_read_as_its_own_gguf_has_it(tmp_path):
    with sources.opened("demo", near=tmp_path) as s:
        wanted = format.GGUFReader(s.gguf)
        without = sources.Source(s.folder, s.model)
        writer = format.GGUFWriter(tmp_path / "words.gguf", "llama")
        vocabularies.add(writer, without, s.config["vocab_size"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
    found = format.GGUFReader(tmp_path / "words.gguf")
    for part in ("model", "tokens", "merges", "bos_token_id", "eos_token_id"):
        name = f"tokenizer.ggml.{part}"
        assert value(found, name) == value(wanted, name), name
    # transformers reads a GGUF's vocabulary with GPT-2's pre-tokenizer; no merge joins digits, so ids agree
    assert value(wanted, "tokenizer.ggml.pre") == "smollm"
    assert value(found, "tokenizer.ggml.pre") == "gpt-2"

"""A folder without a tokenizer is told as such; a name is turned into a folder where there is one."""

import json
from pathlib import Path

import pytest
import transformers
from click.testing import CliRunner

from dfrot_lab import assets, model_folders, models
from dfrot_lab.cli import app
from dfrot_lab.model_folders import ModelFolderError


@pytest.mark.parametrize(
    "names", [["tokenizer.json"], ["tokenizer.model"], ["vocab.json", "merges.txt"]]
)
def test_any_tokenizer_will_do(tmp_path, names):
    for name in names:
        with pytest.raises(ModelFolderError, match="has no tokenizer"):
            model_folders.check(tmp_path)
        (tmp_path / name).touch()
    model_folders.check(tmp_path)


def test_a_tokenizer_of_bytes_needs_no_vocabulary(tmp_path):
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    model_folders.check(tmp_path)
    for text in ('{"tokenizer_class": "LlamaTokenizer"}', "[]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ModelFolderError, match="has no tokenizer"):
            model_folders.check(tmp_path)


@pytest.mark.parametrize("model", ["demo", "tiny:llama", "owner/name", "nowhere/model.gguf", None])
def test_what_is_no_folder_is_let_by(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # the name means the model all the same
    model_folders.check(model)


@pytest.mark.parametrize("command", ["run", "collect", "optimize", "plan", "batch"])
def test_every_command_tells_it_before_anything_starts(command, tmp_path):
    models.tiny("llama").save_pretrained(tmp_path / "model")
    profile = tmp_path / "mine.yml"
    profile.write_text(json.dumps({"base": "smoke", "common": {"model": str(tmp_path / "model")}}))
    asked = [command, *(["03"] if command == "run" else []), "--profile", str(profile)]
    asked += [] if command in ("plan", "batch") else ["--folder", str(tmp_path / "results")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 1, done.output
    assert f"model folder {tmp_path / 'model'} has no tokenizer (one of tokenizer" in done.output
    assert "tokenizer.save_pretrained" in done.output and "corpus" not in done.output
    assert len(done.output.splitlines()) == 1 and not (tmp_path / "results").exists()


def test_the_dequantized_folder_is_found(tmp_path, monkeypatch):
    models.tiny("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(assets, "path", lambda name: Path(f"{name}.gguf"))
    monkeypatch.setattr(models.dequantized, "folder_of", lambda gguf: tmp_path / "model")
    assert model_folders.find("demo") == tmp_path / "model"
    assert model_folders.find(tmp_path / "model") == tmp_path / "model"
    with pytest.raises(ModelFolderError, match="owner/name is no folder: use 'demo'"):
        model_folders.find("owner/name")
    with pytest.raises(models.ModelError, match=r"nowhere\.gguf does not exist"):
        model_folders.find("nowhere.gguf")

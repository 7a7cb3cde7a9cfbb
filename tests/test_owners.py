"""A rotation is merged into the model and revision that it was made for, by whatever command."""

from __future__ import annotations

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import byte_pairs, haar, logits, random_tokens, relative
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from dfrot_lab import hub as remote
from dfrot_lab import models, owners, rotations
from dfrot_lab.cli import app
from dfrot_lab.exports import gguf, rotation_files, sources
from dfrot_lab.lab import Lab
from dfrot_lab.owners import Owner
from dfrot_lab.rotations import RotationError


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


# --- the rule -------------------------------------------------------------------------------------

HERE = Owner("mine", "2222", "bbbb")


@pytest.mark.parametrize(
    ("known", "owner", "said"),
    [
        ({}, HERE, "names no model"),
        ({"fingerprint": "bbbb"}, HERE, "names no model"),
        ({"model": "mine"}, HERE, "no fingerprint or revision"),
        ({"model": "mine", "revision": None, "fingerprint": None}, HERE, "no fingerprint or"),
        ({"model": "mine", "revision": "1111"}, HERE, "its revision is 1111, that of 'mine' is"),
        ({"model": "other", "revision": "2222"}, HERE, "its model is other"),
        ({"model": "mine", "revision": "2222"}, HERE, None),
        ({"model": "mine", "revision": "2222", "fingerprint": "aaaa"}, HERE, "its fingerprint is"),
        ({"model": "moved", "revision": "1111", "fingerprint": "bbbb"}, HERE, None),
        ({"model": "mine", "revision": "2222"}, Owner("mine", None, "bbbb"), "no fingerprint or"),
        ({"model": "mine"}, Owner("mine"), None),
        ({"model": "other"}, Owner("mine"), "its model is other"),
    ],
)
def test_what_decides(known, owner, said):
    if said is None:
        owners.check("R1.safetensors", known, owner)
        return
    with pytest.raises(RotationError, match=said) as error:
        owners.check("R1.safetensors", known, owner)
    assert "\n" not in str(error.value) and "R1.safetensors" in str(error.value)


def test_weights_that_are_no_safetensors_have_no_fingerprint(saved):
    folder = saved()
    assert owners.of(str(folder)) == Owner(str(folder), None, owners.fingerprint(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert owners.of(str(folder)) == Owner(str(folder))


# --- every command --------------------------------------------------------------------------------


@pytest.fixture
def refined(tmp_path):
    """R1 of tiny:llama, as the README has it made."""
    out = tmp_path / "R1.safetensors"
    done = invoke("optimize", "--profile", "smoke", "--folder", tmp_path / "lab", "--out", out)
    assert done.exit_code == 0, done.output
    return out


def test_optimize_says_whose_its_rotation_is(refined):
    about = rotations.load(refined)[1]
    with sources.opened("tiny:llama") as s:
        assert about["fingerprint"] == s.fingerprint == owners.of("tiny:llama").fingerprint
    assert about["model"] == "tiny:llama" and about["revision"] is None


def test_another_models_r1_is_refused_by_every_command(refined, saved, tmp_path):
    other, out = saved("qwen2", name="qwen2"), tmp_path / "out"
    smoke = ("--profile", "smoke", "--model", "tiny:qwen2", "--folder", tmp_path / "other")
    given = ("--rotation", refined)
    for asked in (
        ("merge", other, *given, "--out", out),
        ("quantize", *smoke, *given, "--method", "rtn", "--out", out),
        ("eval", *smoke, *given, "--method", "rtn"),
        ("eval", *smoke, *given, "--method", "rtn", "--zero-shot", "--items", 4),
        ("export", "hf", "--model", "tiny:qwen2", *given, "--out", out),
        ("export", "gguf", "--model", other, *given, "--no-vocabulary", "--out", out),
        ("export", "compressed", "--model", other, *given, "--out", out),
    ):
        done = invoke(*asked)
        assert done.exit_code == 1, (asked, done.output)
        assert "was made for 'tiny:llama': its fingerprint is" in done.output, (asked, done.output)
        assert not out.exists()


def test_its_own_model_takes_it(refined, saved, tmp_path):
    smoke = ("--profile", "smoke", "--folder", tmp_path / "lab", "--rotation", refined)
    for asked in (
        ("merge", saved(), "--rotation", refined, "--out", tmp_path / "merged"),
        ("quantize", *smoke, "--method", "rtn", "--out", tmp_path / "q"),
        ("eval", *smoke, "--method", "rtn", "--windows", 1),
        ("export", "hf", "--model", saved(), "--rotation", refined, "--out", tmp_path / "hf"),
    ):
        done = invoke(*asked)
        assert done.exit_code == 0, (asked, done.output)


def test_a_fine_tuning_in_the_same_place_is_another_model(refined, saved, tmp_path):
    folder = saved(seed=1)
    done = invoke("merge", folder, "--rotation", refined, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "its fingerprint is" in done.output


# --- R2 -------------------------------------------------------------------------------------------


@pytest.fixture
def both(tmp_path):
    """R1 and an R2 of their own for tiny:llama."""
    about = owners.of("tiny:llama").about
    return rotation_files.write(tmp_path / "both.safetensors", haar(64), haar(16, 1), about)


def test_merge_and_export_take_the_files_own_r2(both, saved, tmp_path):
    folder = saved()
    for asked in (
        ("merge", folder, "--out", tmp_path / "a"),
        ("export", "hf", "--model", folder, "--out", tmp_path / "b"),
    ):
        done = invoke(*asked, "--rotation", both)
        assert done.exit_code == 0, done.output
    wanted = models.load("tiny:llama")
    rotations.merge(wanted, rotations.Rotations(R1=haar(64), R2=haar(16, 1)))
    name = "model.layers.1.self_attn.o_proj.weight"
    for found in ("a", "b"):
        w = load_file(tmp_path / found / "model.safetensors")[name]
        torch.testing.assert_close(w, wanted.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_quantize_and_eval_take_the_files_own_r2(both, tmp_path):
    lab = Lab(model="tiny:llama", corpus="pydoc", seqlen=96, clip_steps=4, threads=1,
              folder=tmp_path / "lab")  # fmt: skip
    found = lab.rotations(str(both))
    assert torch.equal(found.R2, haar(16, 1)) and torch.equal(found.R1, haar(64)) and found.R4
    alone = rotation_files.write(
        tmp_path / "alone.safetensors", haar(64), None, owners.of("tiny:llama").about
    )
    assert torch.equal(lab.rotations(str(alone)).R2, rotations.random_hadamard(16))
    ppl = [lab.perplexity(str(f), bits="4-4-4", windows=1)["ppl"] for f in (both, alone)]
    assert ppl[0] != ppl[1]


# --- the hub --------------------------------------------------------------------------------------

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local cache of the hub with owner/name at two commits; returns a way to move its main branch."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--owner--name"
    for commit, seed in ((OLD, 0), (NEW, 1)):
        folder = repository / "snapshots" / commit
        models.tiny("llama", seed=seed).save_pretrained(folder)
        transformers.ByT5Tokenizer().save_pretrained(folder)
    (repository / "refs").mkdir()

    def move(commit):
        (repository / "refs" / "main").write_text(commit)
        remote.snapshot.cache_clear()  # as in a new process

    move(OLD)
    yield move
    remote.snapshot.cache_clear()


def test_a_model_on_the_hub_is_known_by_its_commit(hub):
    assert (
        remote.commit("owner/name") == OLD and models.identity("owner/name") == f"owner/name@{OLD}"
    )
    old = owners.of("owner/name")
    assert (old.model, old.revision) == ("owner/name", OLD)
    assert old.fingerprint == owners.of("tiny:llama").fingerprint
    hub(NEW)
    new = owners.of("owner/name")
    assert models.identity("owner/name") == f"owner/name@{NEW}" and new.revision == NEW
    assert new.fingerprint != old.fingerprint
    assert remote.commit("owner/name", OLD) == OLD


def test_identities_of_other_models_stay(tmp_path, monkeypatch):
    def asked(*args):
        raise AssertionError(f"the hub was asked for {args}")

    monkeypatch.setattr(remote, "snapshot", asked)
    for name in ("tiny:llama", "no such model", "nowhere/model.gguf", "/nowhere", "./a/b"):
        assert models.identity(name) == name
    assert "model.gguf" not in models.identity("demo") and len(models.identity("demo")) == 64


def test_a_rotation_of_an_older_commit_is_neither_reused_nor_merged(hub, tmp_path):
    lab = ("--profile", "smoke", "--model", "owner/name", "--folder", tmp_path / "lab")
    files = {}
    for commit in (OLD, NEW):
        hub(commit)
        files[commit] = tmp_path / f"{commit[0]}.safetensors"
        done = invoke("export", "rotation", *lab, "--out", files[commit])
        assert done.exit_code == 0, done.output
    old, new = (rotations.load(files[c]) for c in (OLD, NEW))
    assert (old[1]["revision"], new[1]["revision"]) == (OLD, NEW)
    assert not torch.equal(old[0], new[0])  # not the kept one under another name
    for asked in (
        ("export", "hf", "--model", "owner/name", "--out", tmp_path / "out"),
        ("quantize", *lab, "--method", "rtn", "--out", tmp_path / "out"),
        ("eval", *lab, "--method", "rtn"),
    ):
        done = invoke(*asked, "--rotation", files[OLD])
        assert done.exit_code == 1 and "its fingerprint is" in done.output, (asked, done.output)
    done = invoke("export", "hf", "--model", "owner/name", "--revision", OLD,
                  "--rotation", files[OLD], "--out", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    about = json.loads((tmp_path / "out" / "config.json").read_text())["dfrot_export"]
    assert about["revision"] == OLD == about["R1"]["revision"]


@pytest.fixture
def downloads(hub, tmp_path, monkeypatch):
    """The hub has NEW as branch v2; what an export fetches comes as {commit: folder}, and only that."""
    there, made = tmp_path / "hub" / "models--owner--name", {}
    (there / "refs" / "v2").write_text(NEW)
    (there / "snapshots" / NEW / "pytorch_model.bin").write_text(
        "the same in a form that is not read"
    )

    def snapshot_download(model, *, revision, allow_patterns):
        assert model == "owner/name"
        source, made[revision] = there / "snapshots" / revision, tmp_path / "downloaded" / revision
        made[revision].mkdir(parents=True)
        for name in filter_repo_objects(os.listdir(source), allow_patterns=allow_patterns):
            shutil.copyfile(source / name, made[revision] / name)
        return str(made[revision])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return made


def test_the_revision_that_was_asked_for_is_exported(downloads, tmp_path):
    done = invoke("export", "hf", "--model", "owner/name", "--revision", "v2", "--rotation", "RH",
                  "--out", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    about = json.loads((tmp_path / "out" / "config.json").read_text())["dfrot_export"]
    assert (about["model"], about["revision"]) == ("owner/name", NEW)
    assert list(downloads) == [NEW]  # by its commit: a branch may move meanwhile
    names = os.listdir(downloads[NEW])
    assert "model.safetensors" in names and "pytorch_model.bin" not in names
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted, tokens = models.tiny("llama", seed=1), random_tokens()
    assert relative(logits(exported, tokens), logits(wanted, tokens)) < 1e-5


def test_r1_is_exported_only_at_the_revision_it_is_refined_on(downloads, tmp_path):
    out, lab = tmp_path / "R1.safetensors", tmp_path / "lab"
    asked = ("export", "rotation", "--profile", "smoke", "--model", "owner/name", "--folder", lab)
    wrong = invoke(*asked, "--revision", "v2", "--out", out)
    said = f"revision = 'v2' is {NEW}, and R1 is refined on {OLD}: fetch that revision into a"
    assert wrong.exit_code == 1 and said in wrong.output
    assert not out.exists() and not lab.exists()  # told before any work
    done = invoke(*asked, "--revision", "main", "--out", out)
    assert done.exit_code == 0, done.output
    about = rotations.load(out, 64)[1]
    assert (about["model"], about["revision"]) == ("owner/name", OLD)
    assert about["fingerprint"] == owners.fingerprint(downloads[OLD])


# --- GGUF -----------------------------------------------------------------------------------------


def test_a_gguf_is_known_by_the_weights_in_it(saved, tmp_path, monkeypatch):
    """However it is opened: as the lab loads it, and as an export copies it."""
    monkeypatch.setenv("DFROT_CACHE", str(tmp_path / "cache"))
    folder, path = saved(), tmp_path / "plain.gguf"
    byte_pairs(folder)
    with sources.opened(str(folder)) as s:
        gguf.write(s, path, sources.recipe("NR", s))
    with sources.opened(str(path)) as s:
        assert s.owner == owners.of(str(path)) and s.merged == []

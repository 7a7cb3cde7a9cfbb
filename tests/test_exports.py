"""Exports: what other programs load computes the same, and what cannot be right is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import haar, logits, random_tokens, relative
from filelock import FileLock
from safetensors.torch import load_file

from dfrot_lab import models, rotations
from dfrot_lab.cli import app
from dfrot_lab.exports import checks, huggingface, rotation_files, sources
from dfrot_lab.exports.sources import ExportError
from dfrot_lab.rotations import RotationError

# what a user of the export runs: a clean process, far from the project, that has no dfrot_lab
ELSEWHERE = """
import sys, torch, transformers
try:
    import dfrot_lab
    sys.exit("dfrot_lab can be imported here")
except ImportError:
    pass
torch.set_num_threads(1)
for i, folder in enumerate(sys.argv[1:]):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        torch.save(model(torch.load("tokens.pt"), use_cache=False).logits, f"{i}.pt")
"""


def elsewhere(folders, tokens, away):
    """Logits of each of `folders` from one new process without this package, which runs in `away`."""
    away.mkdir()
    torch.save(tokens, away / "tokens.pt")
    # the editable install is a path hook: with -S it is not set up, site-packages are given by hand
    packages = [p for p in sys.path if p.endswith("site-packages")]
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(packages), "HOME": str(away)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", ELSEWHERE, *folders],
        cwd=away, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(away / f"{i}.pt") for i in range(len(folders))]


def opened(folder):
    return sources.opened(str(folder))


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


# --- Hugging Face ---------------------------------------------------------------------------------


FAMILIES = [(kind, how) for kind in models.ARCHITECTURES for how in ("RH", "refined")]


def refined(model, folder, *options):
    """The path of an R1 (and R2) refined for `model`, as `export rotation` writes it."""
    out = folder / "R1.safetensors"
    done = invoke(
        "export", "rotation", "--model", model, "--folder", folder, "--out", out, *options
    )
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """(folder, R1, logits of `random_tokens` elsewhere) of every family's exports; one process for all."""
    base, made = tmp_path_factory.mktemp("reloaded"), {}
    for kind, how in FAMILIES:
        model, out = f"tiny:{kind}", base / f"{kind}-{how}"
        file = refined(model, base / kind, "--profile", "smoke") if how == "refined" else how
        done = invoke("export", "hf", "--model", model, "--rotation", file, "--out", out)
        assert done.exit_code == 0, done.output
        r1 = rotations.load(file)[0] if how == "refined" else rotations.random_hadamard(64)
        made[kind, how] = out, r1
    found = elsewhere([out for out, _ in made.values()], random_tokens(), base / "away")
    return {k: (*v, found[i]) for i, (k, v) in enumerate(made.items())}


@pytest.mark.parametrize(("kind", "how"), FAMILIES)
def test_a_folder_computes_the_same_in_a_process_without_this_package(reloaded, kind, how):
    folder, r1, found = reloaded[kind, how]
    original = models.tiny(kind)
    assert relative(found, logits(original, random_tokens())) < 1e-5
    # and it is another model than the original: the rotation is there
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    wanted = (original.model.embed_tokens.weight.double() @ r1).float()
    torch.testing.assert_close(table, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_model_refined_computes_the_same_in_a_process_without_this_package(tmp_path):
    file = refined("demo", tmp_path / "lab", "--profile", "demo", "--iterations", "2")
    out, ids = tmp_path / "out", checks.tokens(49152)
    done = invoke("export", "hf", "--rotation", file, "--out", out)
    assert done.exit_code == 0, done.output
    original = models.load("demo", fold=False)
    assert relative(elsewhere([out], ids, tmp_path / "away")[0], logits(original, ids)) < 1e-4
    table = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    wanted = original.model.embed_tokens.weight.double() @ rotations.load(file)[0]
    assert relative(table, wanted) < 1e-5


def test_a_folder_says_what_it_holds(saved, tmp_path):
    source = saved()
    done = invoke("export", "hf", "--model", source, "--rotation", "RH", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "gains, R1, R2 merged" in done.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    about = config["dfrot_export"]
    assert config["dfrot_merged"] == about["merged"] == ["gains", "R1", "R2"]
    assert config["tie_word_embeddings"] is False
    assert about["R1"] == {"rotation": "RH", "seed": 0}
    assert about["fingerprint"] == sources.fingerprint(source)
    assert set(about["left_out"]) == {"R3", "R4"}
    assert 0 < about["verified"]["logits"] < 1e-5


def test_a_wrong_export_is_not_left(saved, tmp_path, monkeypatch):
    merge = huggingface.checkpoints.merge

    def wrong(source, target, rotation):
        merge(source, target, rotation)
        file = target / "model.safetensors"
        found = load_file(file)
        found["model.layers.1.mlp.down_proj.weight"][3] += 0.5
        from safetensors.torch import save_file

        save_file(found, file, {"format": "pt"})
        return target

    monkeypatch.setattr(huggingface.checkpoints, "merge", wrong)
    with opened(saved()) as s, pytest.raises(ExportError, match="computes something else"):
        huggingface.write(s, tmp_path / "out", sources.recipe("RO", s))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_half_precision_is_compared_by_its_own_rounding(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        models.tiny("qwen2").to(dtype).save_pretrained(tmp_path / name)
        with opened(tmp_path / name) as s:
            about = huggingface.write(s, tmp_path / f"out-{name}", sources.recipe("RH", s))
        assert huggingface.stored_dtype(tmp_path / f"out-{name}") == name
        assert 1e-5 < about["verified"]["logits"] < checks.TOLERANCE[name]


def test_without_a_rotation_the_files_are_the_source(saved, tmp_path):
    source = saved()
    with opened(source) as s:
        about = huggingface.write(s, tmp_path / "out", sources.recipe("NR", s))
    assert about["merged"] == [] and about["verified"]["logits"] == 0
    same = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert same == (source / "model.safetensors").read_bytes()


# --- never twice, never another's -----------------------------------------------------------------


def test_a_rotated_checkpoint_is_not_rotated_again(saved, tmp_path):
    with opened(saved()) as s:
        huggingface.write(s, tmp_path / "once", sources.recipe("RH", s))
        first = sources.record(s, sources.recipe("RH", s))
    with opened(tmp_path / "once") as s:
        with pytest.raises(RotationError, match="is rotated already"):
            sources.recipe("RH", s)
        about = huggingface.write(s, tmp_path / "again", sources.recipe("NR", s))
    assert {k: about[k] for k in first} == first  # what was merged is not forgotten
    done = invoke(
        "export", "hf", "--model", tmp_path / "once", "--rotation", "RO", "--out", tmp_path / "x"
    )
    assert done.exit_code == 1 and "is rotated already" in done.output
    assert not (tmp_path / "x").exists()


def test_a_quantized_checkpoint_is_refused(saved, tmp_path):
    source = saved()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="quantized already"), opened(source):
        pass


@pytest.mark.parametrize("rotation", ["RH", "NR"])
def test_a_folder_of_quantize_is_no_source(rotation, tmp_path):
    made = invoke("quantize", "--profile", "smoke", "--folder", tmp_path / "lab", "--method", "rtn",
                  "--rotation", rotation, "--out", tmp_path / "q")  # fmt: skip
    assert made.exit_code == 0, made.output
    r1 = rotation_files.write(tmp_path / "R1.safetensors", haar(64), None, {"model": "any"})
    smoke = ("--profile", "smoke", "--model", tmp_path / "q", "--folder", tmp_path / "other")
    out = ("--out", tmp_path / "out")
    asked = [("export", f, "--model", tmp_path / "q", "--rotation", name, *out)
             for f in ("hf", "gguf", "compressed") for name in ("NR", "RH")]  # fmt: skip
    asked += [("merge", tmp_path / "q", "--rotation", r1, *out)]
    asked += [("quantize", *smoke, "--rotation", "NR", *out), ("eval", *smoke, "--rotation", "FP")]
    for arguments in asked:
        done = invoke(*arguments)
        assert done.exit_code == 1 and "written by `dfrot-lab quantize`" in done.output, arguments
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["hf", "gguf", "compressed", "rotation"])
@pytest.mark.parametrize("name", ["./nofolder", "nofile.gguf", "some/nofile.gguf", "a/folder/x"])
def test_a_misspelled_model_is_named(kind, name, tmp_path):
    how = ("--profile", "smoke", "--folder", tmp_path / "lab") if kind == "rotation" else ()
    how = how or ("--rotation", "RH")
    done = invoke("export", kind, "--model", name, *how, "--out", tmp_path / "out.gguf")
    assert done.exit_code == 1 and not (tmp_path / "out.gguf").exists()
    said = (
        f"model file {name} does not exist"
        if name.endswith("gguf")
        else f"model '{name}' is neither"
    )
    assert said in done.output, (done.output, done.exception)


@pytest.mark.parametrize("part", ["R4", "heads"])
def test_a_checkpoint_with_an_online_hadamard_is_no_source(part, saved, tmp_path):
    source = saved()
    config = json.loads((source / "config.json").read_text())
    config["dfrot_merged"] = ["gains", part]
    (source / "config.json").write_text(json.dumps(config))
    done = invoke("export", "hf", "--model", source, "--rotation", "NR", "--out", tmp_path / "out")
    assert done.exit_code == 1 and f"saved with {part} merged" in done.output


def test_another_models_rotation_is_refused(saved, tmp_path):
    mine, other = saved(), saved(name="other", seed=1)
    file = tmp_path / "R1.safetensors"
    with opened(mine) as s:
        about = {"model": s.model, "fingerprint": s.fingerprint}
        rotation_files.write(file, haar(64), None, about)
        assert sources.recipe(str(file), s).about["R1"]["fingerprint"] == s.fingerprint
    with opened(other) as s, pytest.raises(RotationError, match="its fingerprint is"):
        sources.recipe(str(file), s)


def test_another_revision_is_refused(saved, tmp_path):
    source = saved()
    made = {"model": "owner/name", "revision": "1111"}
    rotations.save(tmp_path / "R1.safetensors", haar(64), made)
    at = sources.Source(source, "owner/name", "2222")
    with pytest.raises(RotationError, match="its revision is 1111, that of 'owner/name' is 2222"):
        sources.recipe(str(tmp_path / "R1.safetensors"), at)
    right = sources.Source(source, "owner/name", "1111")
    assert sources.recipe(str(tmp_path / "R1.safetensors"), right).parts == ["R1", "R2"]
    named = sources.Source(source, "owner/other", "1111")
    with pytest.raises(RotationError, match="its model is owner/name"):
        sources.recipe(str(tmp_path / "R1.safetensors"), named)


def test_a_rotation_that_names_no_model_is_refused(saved, tmp_path):
    rotations.save(tmp_path / "R1.safetensors", haar(64), {})
    with opened(saved()) as s, pytest.raises(RotationError, match="names no model"):
        sources.recipe(str(tmp_path / "R1.safetensors"), s)


def test_a_rotation_that_could_be_anyones_is_refused(saved, tmp_path):
    """Of the right name, as `optimize --out` wrote them once, but without anything to compare."""
    source, file = saved(), tmp_path / "R1.safetensors"
    rotations.save(file, haar(64), {"model": "owner/name"})
    at = sources.Source(source, "owner/name", "1111")
    with pytest.raises(RotationError, match="no fingerprint or revision of the 'owner/name'"):
        sources.recipe(str(file), at)


def test_a_revision_of_a_folder_is_refused(saved):
    done = invoke("export", "hf", "--model", saved(), "--revision", "main", "--rotation", "RH",
                  "--out", "nowhere")  # fmt: skip
    assert done.exit_code == 1 and "only models on the hub have one" in done.output


def test_a_fingerprint_sees_content_not_shards(saved, tmp_path):
    source = saved()
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "cut", max_shard_size="60KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    assert sources.fingerprint(tmp_path / "cut") == sources.fingerprint(source)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "tuned")
    assert sources.fingerprint(tmp_path / "tuned") != sources.fingerprint(source)


def test_a_configuration_that_lost_its_record_is_not_left(saved, tmp_path, monkeypatch):
    write = huggingface.files.write_json

    def forgetful(path, value):
        write(path, {k: v for k, v in value.items() if k != "dfrot_merged"})

    monkeypatch.setattr(huggingface.files, "write_json", forgetful)
    with (
        opened(saved()) as s,
        pytest.raises(ExportError, match=r"its config\.json says \[\] merged"),
    ):
        huggingface.write(s, tmp_path / "out", sources.recipe("RO", s))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_what_a_killed_export_left_is_swept_and_a_running_one_is_not(saved, tmp_path):
    killed, running, new = (tmp_path / f".partial-out-{8 * name}" for name in ("a", "b", "c"))
    older, other = tmp_path / ".partial-out-dddddddd", tmp_path / ".partial-else-eeeeeeee"
    longer = tmp_path / ".partial-out-7b-ffffffff"  # of another target
    for folder in (killed, running, new, older, other, longer):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    (killed / ".lock").touch()
    for folder in (older, longer):
        os.utime(folder, (0, 0))  # of a version without locks
    with FileLock(running / ".lock"), opened(saved()) as s:
        huggingface.write(s, tmp_path / "out", sources.recipe("RO", s))
    assert (tmp_path / "out" / "config.json").is_file()
    assert not killed.exists() and not older.exists()
    assert running.exists() and new.exists() and other.exists() and longer.exists()


# --- rotations alone ------------------------------------------------------------------------------


def test_a_rotation_leaves_with_its_story_and_merges_where_it_belongs(tmp_path):
    out = tmp_path / "R1.safetensors"
    done = invoke("export", "rotation", "--profile", "smoke", "--folder", tmp_path / "results",
                  "--start", "RO", "--gamma", "10", "--seed", 3, "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    r, about = rotations.load(out, 64)
    assert (about["model"], about["gamma"], about["start"], about["seed"]) == (
        "tiny:llama", "10.0", "RO", 3,
    )  # fmt: skip
    assert len(about["calibration_tokens"]) == 64 and len(about["fingerprint"]) == 64
    assert 0 < about["loss"] < 1 and "log" not in about
    assert torch.equal(load_file(out)["R2"], rotations.random_hadamard(16))
    merged = invoke(
        "export", "hf", "--model", "tiny:llama", "--rotation", out, "--out", tmp_path / "hf"
    )
    assert merged.exit_code == 0, merged.output
    known = json.loads((tmp_path / "hf" / "config.json").read_text())["dfrot_export"]["R1"]
    assert known["loss"] == about["loss"] and known["seed"] == 3
    refused = invoke(
        "export", "hf", "--model", "tiny:qwen2", "--rotation", out, "--out", tmp_path / "no"
    )
    assert refused.exit_code == 1 and "use a rotation made for this model" in refused.output
    again = invoke("export", "rotation", "--profile", "smoke", "--out", out)
    assert again.exit_code == 1 and "exists" in again.output
    assert torch.equal(rotations.load(out)[0], r)


def test_a_preset_leaves_with_its_story(tmp_path):
    out, smoke = tmp_path / "R1.safetensors", ("--profile", "smoke", "--folder", tmp_path / "lab")
    done = invoke("export", "rotation", *smoke, "--preset", "recommended", "--out", out)
    assert done.exit_code == 0, done.output
    r, about = rotations.load(out, 64)
    assert (about["preset"], about["objective"], about["iterations"]) == (
        "recommended", "kurtosis", 100,
    )  # fmt: skip
    plain = tmp_path / "plain.safetensors"
    done = invoke("optimize", *smoke, "--preset", "recommended", "--out", plain)
    assert done.exit_code == 0 and torch.equal(rotations.load(plain)[0], r)
    other = invoke("export", "rotation", *smoke, "--out", tmp_path / "dfrot.safetensors")
    assert other.exit_code == 0, other.output
    tokens = rotations.load(tmp_path / "dfrot.safetensors")[1]["calibration_tokens"]
    assert about["calibration_tokens"] != tokens  # eight windows, not one
    both = invoke("export", "rotation", "--preset", "dfrot", "--gamma", 1, "--out", tmp_path / "x")
    assert both.exit_code == 2 and "--preset settles --gamma" in both.output


def test_an_imported_rotation_is_made_orthogonal_and_says_by_how_much(tmp_path):
    exact = haar(64, 5)
    np.save(tmp_path / "R1.npy", exact.float().numpy())
    done = invoke("import-rotation", tmp_path / "R1.npy", "--model", "tiny:llama",
                  "--out", tmp_path / "R1.safetensors")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "before" in done.output and "moved by" in done.output
    r, about = rotations.load(tmp_path / "R1.safetensors", 64)
    found = about["imported"]
    rounded = exact.float().double()
    assert found["before"] == pytest.approx(rotations.orthogonality_error(rounded))
    assert 1e-9 < found["before"] < 1e-6 and found["after"] < 1e-13
    assert found["moved"] == pytest.approx(torch.linalg.norm(r - rounded).item())
    assert (r - exact).abs().max() < 1e-7
    with sources.opened("tiny:llama") as s:
        assert sources.recipe(str(tmp_path / "R1.safetensors"), s).parts == ["R1", "R2"]


def test_a_transposed_file_is_turned_back(tmp_path):
    np.save(tmp_path / "R1.npy", haar(16).mT.float().numpy())
    r, _ = rotation_files.read_npy(tmp_path / "R1.npy", 16, transpose=True)
    assert (r - haar(16)).abs().max() < 1e-7


@pytest.mark.parametrize("options", [(), ("--transpose",)])
def test_the_command_turns_a_transposed_file_back_if_told(tmp_path, options):
    np.save(tmp_path / "R1.npy", haar(64).mT.float().numpy())
    out = tmp_path / "R1.safetensors"
    done = invoke("import-rotation", tmp_path / "R1.npy", "--model", "tiny:llama", *options,
                  "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    r, about = rotations.load(out, 64)
    assert (r - (haar(64) if options else haar(64).mT)).abs().max() < 1e-7
    assert about["model"] == "tiny:llama" and about["imported"]["after"] < 1e-13


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (haar(64).numpy() * 1.02, "a singular value is 0.02 from 1"),
        (np.zeros((64, 64)), "a singular value is 1 from 1"),
        (haar(32).numpy(), r"is \[32, 32\] but the model needs \[64, 64\]"),
        (np.full((64, 64), np.nan), "NaN or Inf"),
        (np.eye(64, dtype=int), "no array of real numbers"),
        (b"not numpy", "cannot be read as .npy"),
    ],
)
def test_what_is_no_rotation_is_not_imported(tmp_path, array, said):
    if isinstance(array, bytes):
        (tmp_path / "R1.npy").write_bytes(array)
    else:
        np.save(tmp_path / "R1.npy", array)
    with pytest.raises(RotationError, match=said):
        rotation_files.read_npy(tmp_path / "R1.npy", 64)


def test_no_pickle_is_opened(tmp_path):
    np.save(tmp_path / "R1.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(RotationError, match=r"cannot be read as \.npy"):
        rotation_files.read_npy(tmp_path / "R1.npy", 64)


def test_export_names_its_formats():
    done = invoke("export", "--help")
    assert done.exit_code == 0
    for verb in ("hf", "gguf", "compressed", "rotation"):
        assert verb in done.output

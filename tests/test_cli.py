"""The commands beside `run`: optimize, collect, redraw, publish; errors are one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from dfrot_lab import assets, batches, files, models, owners, profiles, rotations
from dfrot_lab.cli import app, options

ROOT = Path(__file__).parents[1]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def smoke(tmp_path):
    return ("--profile", "smoke", "--folder", tmp_path)


def test_help_lists_every_command_in_the_order_of_use():
    done = invoke("--help")
    assert done.exit_code == 0
    listed = done.output.split("Commands:\n")[1]
    assert re.findall(r"^  ([\w-]+)", listed, re.M) == [
        "assets", "run", "batch", "plan", "redraw", "verify", "publish", "gallery",
        "collect", "optimize", "merge", "quantize", "eval", "generate",
        "export", "import-rotation", "lock",
    ]  # fmt: skip


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "dfrot_lab.cli", "export", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(verb in done.stdout for verb in ("compressed", "gguf", "hf", "rotation"))


def test_completion_script():
    done = subprocess.run(
        [Path(sys.executable).with_name("dfrot-lab")],
        env={"_DFROT_LAB_COMPLETE": "zsh_source", "PATH": "/usr/bin:/bin"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "#compdef dfrot-lab" in done.stdout


def test_collect_says_what_it_collected(smoke):
    done = invoke("collect", *smoke)
    assert done.exit_code == 0, done.output
    assert "4 sites × 96 tokens × 64 channels" in done.output


def test_optimize_writes_a_rotation_with_its_story(smoke, tmp_path):
    out = tmp_path / "R1.safetensors"
    done = invoke("optimize", *smoke, "--start", "RO", "--gamma", "10", "--seed", 3, "--out", out)
    assert done.exit_code == 0, done.output
    r, about = rotations.load(out, 64)
    assert rotations.orthogonality_error(r) < 1e-12
    assert about["model"] == "tiny:llama"
    assert (about["start"], about["gamma"], about["seed"]) == ("RO", "10.0", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optimize", "--model", "no such model"), "model 'no such model'"),
        (("optimize", "--gamma", "-1"), "gamma = -1"),
        (("collect", "--corpus", "nowhere.txt"), "nowhere.txt"),
        (("collect", "--model", "tiny:gemma"), "'gemma'"),
    ],
)
def test_errors_are_one_line(arguments, message, smoke, tmp_path):
    done = invoke(arguments[0], *smoke, *arguments[1:])
    assert done.exit_code == 1
    error = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert len(error) == 1 and message in error[0]
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "-1"), "-1 is not in the range 0<=x<=4294967295"),
        (("--out", "R1.pt"), "--out R1.pt gets R1 as safetensors: give it the ending .safetensors"),
        (("--all", "--out", "R1.safetensors"), "gets names and hashes: give it the ending .json"),
        (("--preset", "dfrot", "--gamma", "100"), "--preset settles --gamma: leave one or"),
        (
            ("--preset", "dfrot", "--iterations", "3", "--form", "sum", "--symmetric"),
            "--preset settles --form, --symmetric, --iterations",
        ),
        (("--all", "--preset", "dfrot", "--seed", "0"), "--all settles --seed, --preset"),
        (("--preset", "best"), "'best' is not one of 'dfrot', 'recommended'"),
        (("--iterations", "0"), "0 is not in the range x>=1"),
        (("--relax", "2"), "2.0 is not in the range 0<x<2"),
        (("--stop", "-0.1"), "-0.1 is not in the range 0<=x<1"),
        (("--preset", "dfrot", "--objective", "whip"), "--preset settles --objective"),
        (("--objective", "whip", "--symmetric"), "and --objective whip has none: leave one or"),
        (("--objective", "peak"), "'peak' is not one of 'centroids', 'least_squares', 'corners'"),
        (("--start", "RX"), "'RX' is not one of 'RH', 'RO', and no .safetensors file"),
        (
            ("--start", "R1.safetensors"),
            "R1.safetensors does not exist: make it with `dfrot-lab opt",
        ),
    ],
)
def test_optimize_refuses_before_any_work(arguments, message, smoke, tmp_path):
    done = invoke("optimize", *smoke, *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_optimize_by_either_solver(smoke, tmp_path):
    ends = {}
    for solver in ("svd", "fast"):
        out = tmp_path / f"{solver}.safetensors"
        done = invoke("optimize", *smoke, "--solver", solver, "--out", str(out))
        assert done.exit_code == 0, done.output
        about = rotations.load(out)[1]
        assert about.get("solver", "svd") == solver
        ends[solver] = about["log"]["rotated"][-1]
    assert ends["fast"] == pytest.approx(ends["svd"], rel=1e-3)


def test_optimize_replaces_no_other_file(smoke, tmp_path):
    out = tmp_path / "R1.safetensors"
    for _ in range(2):  # the same again is no loss
        done = invoke("optimize", *smoke, "--out", out)
        assert done.exit_code == 0, done.output
    before = out.read_bytes()
    done = invoke("optimize", *smoke, "--gamma", 1, "--out", out)
    assert done.exit_code == 1 and out.read_bytes() == before
    said, kept = " ".join(done.output.split()).split("This R1 is kept as ")
    assert "R1.safetensors exists and is another file: choose another name." in said
    assert rotations.load(kept.replace(" ", ""), 64)[1]["gamma"] == "1.0"
    note = tmp_path / "note.safetensors"
    note.write_text("mine")
    assert invoke("optimize", *smoke, "--out", note).exit_code == 1 and note.read_text() == "mine"


def test_each_way_to_refine_has_a_file_of_its_own(smoke):
    """Or a run would replace what an earlier one had told the path of."""
    ways = ((), ("--iterations", 3), ("--solver", "fast"), ("--gamma", "100.0000001"))
    ways += (("--relax", "1.6"), ("--relax", "1.60000001"), ("--stop", "0.1"))
    found = [invoke("optimize", *smoke, *way).stdout.split()[-1] for way in ways]
    assert len(set(found)) == 7 and all(Path(p).is_file() for p in found)
    same = invoke("optimize", *smoke, "--iterations", 4)  # the profile's number: the lab's own file
    assert same.stdout.split()[-1] == found[0]
    out = smoke[-1] / "R.safetensors"
    how = ("--iterations", 5, "--objective", "kurtosis")
    done = invoke("export", "rotation", *smoke, *how, "--out", out)
    assert done.exit_code == 0, done.output
    assert rotations.load(out)[1]["objective"] == "kurtosis"
    done = invoke("export", "rotation", *smoke, "--preset", "dfrot", *how[2:], "--out", out)
    assert "--preset settles --objective" in done.output and done.exit_code == 2
    assert rotations.load(found[0])[1]["iterations"] == 4
    assert options.SEED.max == rotations.SEEDS - 1


def test_optimize_for_another_objective_and_until_it_settles(smoke, tmp_path):
    out, first = tmp_path / "R1.safetensors", tmp_path / "first.safetensors"
    how = ("--objective", "kurtosis", "--relax", "1.6", "--stop", "0.9", "--iterations", "30")
    done = invoke("optimize", *smoke, *how, "--out", out)
    assert done.exit_code == 0, done.output
    about = rotations.load(out)[1]
    assert (about["objective"], about["relax"], about["stop"]) == ("kurtosis", "1.6", "0.9")
    assert len(about["log"]["rotated"]) == 11  # after ten steps it has not lowered itself by 90 %
    done = invoke("optimize", *smoke, "--start", out, *how, "--out", first)
    assert done.exit_code == 0, done.output
    about = rotations.load(first)[1]
    assert (about["objective"], about["relax"], about["stop"]) == ("kurtosis", "1.6", "0.9")


def test_optimize_from_a_file(smoke, tmp_path):
    first, *ends = (tmp_path / f"{name}.safetensors" for name in ("first", "hand", "preset"))
    done = invoke("optimize", *smoke, "--gamma", "1", "--seed", 3, "--out", first)
    assert done.exit_code == 0, done.output
    for end, how in zip(ends, (("--gamma", "7"), ("--preset", "recommended")), strict=True):
        done = invoke("optimize", *smoke, "--start", first, *how, "--out", end)
        assert done.exit_code == 0, done.output
    r, about = rotations.load(ends[0], 64)
    assert (about["start"], about["gamma"]) == (files.sha256(first), "7.0")
    assert not r.equal(rotations.load(first)[0])
    _, about = rotations.load(ends[1], 64)
    assert (about["objective"], about["iterations"]) == ("kurtosis", 100)
    assert (tmp_path / "calibration" / "8" / "artefacts" / "activations.safetensors").is_file()
    done = invoke("optimize", *smoke, "--start", first, "--seed", 1)
    assert done.exit_code == 2 and "--start settles --seed" in done.output
    done = invoke("optimize", *smoke, "--model", "tiny:qwen3", "--start", first)
    assert done.exit_code == 1 and "was made for 'tiny:llama'" in done.output


def test_optimize_by_preset(smoke, tmp_path):
    found = {}
    for name in ("dfrot", "recommended"):
        found[name] = tmp_path / f"{name}.safetensors"
        done = invoke("optimize", *smoke, "--preset", name, "--seed", 2, "--out", found[name])
        assert done.exit_code == 0, done.output
    plain = tmp_path / "plain.safetensors"
    assert invoke("optimize", *smoke, "--seed", 2, "--out", plain).exit_code == 0
    dfrot, about = rotations.load(found["dfrot"], 64)
    assert dfrot.equal(rotations.load(plain, 64)[0]) and "objective" not in about
    recommended, about = rotations.load(found["recommended"], 64)
    assert not recommended.equal(dfrot)
    assert (about["objective"], about["gamma"], about["seed"]) == ("kurtosis", "100.0", 2)
    assert (tmp_path / "calibration" / "8" / "artefacts" / "activations.safetensors").is_file()


@pytest.mark.parametrize("r2", [True, False])
def test_merge_writes_a_checkpoint(tmp_path, r2):
    models.tiny("mistral").save_pretrained(tmp_path / "model")
    about = {"model": "mine", "fingerprint": owners.fingerprint(tmp_path / "model")}
    rotations.save(tmp_path / "R1.safetensors", rotations.random_orthogonal(64, 0), about)
    options = ("--rotation", tmp_path / "R1.safetensors", "--out", tmp_path / "merged")
    done = invoke("merge", tmp_path / "model", *options, "--r2" if r2 else "--no-r2")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dfrot_merged"] == ["gains", "R1", "R2"][: 2 + r2]
    again = invoke("merge", tmp_path / "model", *options)
    assert again.exit_code == 1 and "exists: choose another folder" in again.output


def test_merge_reads_the_demo_model_from_its_dequantized_folder(tmp_path, monkeypatch):
    models.tiny("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(assets, "path", Path)
    monkeypatch.setattr(models.dequantized, "folder_of", lambda gguf: tmp_path / "model")
    about = {"model": "mine", "fingerprint": owners.fingerprint(tmp_path / "model")}
    rotations.save(tmp_path / "R1.safetensors", rotations.random_orthogonal(64, 0), about)
    options = ("--rotation", tmp_path / "R1.safetensors", "--out", tmp_path / "merged")
    done = invoke("merge", "demo", *options)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    missing = invoke("merge", "owner/name", *options)
    assert missing.exit_code == 1 and "owner/name is no folder: use 'demo'" in missing.output


def test_merge_names_the_tensors_of_a_file_without_r(tmp_path):
    models.tiny("llama").save_pretrained(tmp_path / "model")
    save_file({"R1": torch.eye(64)}, tmp_path / "other.safetensors")
    options = ("--rotation", tmp_path / "other.safetensors", "--out", tmp_path / "merged")
    done = invoke("merge", tmp_path / "model", *options)
    assert done.exit_code == 1 and "holds R1 [64, 64], but no tensor 'R'" in done.output
    assert not (tmp_path / "merged").exists()


def test_plan_says_memory_disk_and_time():
    done = invoke("plan", "--profile", "smoke")
    assert done.exit_code == 0, done.output
    assert all(word in done.stdout for word in ("memory", "disk", "04_dfrot", "in all"))
    said = done.stderr.splitlines()
    assert said[0].startswith("timing one and two layers of the shape of 'tiny:llama' here: ")
    assert "timing: 100%" in done.stderr and "timing" not in done.stdout


def test_a_missing_asset_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("DFROT_CACHE", str(tmp_path / "empty"))
    done = invoke("collect", "--profile", "demo", "--folder", tmp_path)
    assert done.exit_code == 1
    assert "dfrot-lab assets" in done.output


def test_redraw_and_publish(tmp_path):
    results = tmp_path / "results"
    done = invoke("run", "02", "--profile", "smoke", "--folder", results)
    assert done.exit_code == 0, done.output
    figures = results / "02_ro_vs_rh_error" / "figures"
    before = {p.name: p.read_bytes() for p in figures.iterdir()}
    for p in figures.iterdir():
        p.unlink()
    code = (
        "import sys\nfrom dfrot_lab.cli import app\n"
        f"app(['redraw', {str(results)!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert {p.name: p.read_bytes() for p in figures.iterdir()} == before

    done = invoke("publish", results, "--to", tmp_path / "figures")
    assert done.exit_code == 0, done.output
    published = tmp_path / "figures" / "02_ro_vs_rh_error"
    assert {p.name for p in published.iterdir()} == {*before, "result.json", "provenance.json"}
    json.loads((published / "result.json").read_text())


def test_redraw_of_nothing_says_what_to_run(tmp_path):
    done = invoke("redraw", tmp_path)
    assert done.exit_code == 1
    assert "make figures" in done.output


@pytest.mark.parametrize(
    "text, said",
    [
        ("base: smoke\ncommon: {sedes: [0]}\n", r"sets \['sedes'\], a parameter of no notebook"),
        ("base: smoke\nnotebooks: {'99_x': {}}\n", r"names notebooks \['99_x'\]"),
        ("base: smoke\nnotebooks: {03: {}, 03_massive_tokens_fp16: {}}\n", "03_m.* twice: join"),
        ("base: smoke\nnotebooks: {03: [windows]}\n", r"notebook 03 = \['windows'\] is not a map"),
        ("common: [1]\n", r"common = \[1\] is not a mapping"),
        ("- 1\n", "is not a mapping: use"),
        ("base: smoke\ncommon: {bits: 17-4-16}\n", "bits = '17-4-16': each is 2 to 16"),
        ("base: smoke\nnotebooks: {05: {all_bits: [4-4-4, 4-1-4]}}\n", "all_bits: .*'4-1-4'"),
        ("base: smoke\nnotebooks: {05: {gptq: rtn}}\n", "'rtn': use one of gptq, gptq-shared"),
        (
            "base: smoke\nnotebooks: {09: {objectives: [whipp]}}\n",
            "'whipp' is unknown: use .*whip,",
        ),
        ("base: smoke\nnotebooks: {10: {method: awq}}\n", "method = 'awq': use one of rtn, gptq,"),
        ("base: smoke\nnotebooks: {03: {windos: 3}}\n", r"sets \['windos'\] for 03_massive"),
        ("base: smoke\nnotebooks: {03: {windows: x}}\n", "windows = 'x' is not of type int"),
        ("base: smoke\ncommon: {site: layer.0.mlp}\n", "'layer.0.mlp': use layers.N.attention or"),
        ("base: smoke\nrotations: {starts: [RX]}\n", r"starts = \['RX'\]: use a list of RH, RO"),
        ("common: {a: [1\n", "is not YAML"),
    ],
)
@pytest.mark.parametrize("command", [["plan"], ["optimize"], ["batch"], ["collect"]])
def test_a_wrong_profile_is_told_before_anything_starts(tmp_path, command, text, said):
    profile = tmp_path / "mine.yml"
    profile.write_text(text)
    done = CliRunner().invoke(app, [*command, "--profile", str(profile)])
    assert done.exit_code == 2 and re.search(said, done.output), done.output
    assert "Traceback" not in done.output and len(done.output.splitlines()) < 3


def commands(group, *above):
    """(its words, itself) of every command below `group`."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)
        else:
            yield (*above, name), command


OF_A_PROFILE = [
    (words, command)
    for words, command in commands(app)
    if any(p.name == "profile" for p in command.params)
]


@pytest.mark.parametrize(
    ("words", "command"), OF_A_PROFILE, ids=[" ".join(words) for words, _ in OF_A_PROFILE]
)
def test_an_unknown_profile_is_status_2_of_every_command(words, command, tmp_path):
    needed = {"notebook": ["03"], "prompt": ["Hi"], "rotation": ["--rotation", "RH"]}
    needed["out"] = ["--out", tmp_path / "R1.safetensors"]
    arguments = [a for p in command.params if p.required for a in needed[p.name]]
    named = next(p for p in command.params if p.name == "profile")
    asked = ["huge"] if isinstance(named, click.Argument) else ["--profile", "huge"]
    done = invoke(*words, *asked, *arguments)
    assert done.exit_code == 2, done.output
    assert "profile 'huge' is unknown: use demo, full" in done.output
    assert len(done.output.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_those_commands_are_all():
    assert {" ".join(words) for words, _ in OF_A_PROFILE} == {
        "assets", "run", "batch", "plan", "verify", "gallery", "collect", "optimize", "quantize",
        "eval", "generate", "export compressed", "export rotation",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("windows", "-1", "windows = -1 is negative: use 0 or more"),
        ("bits", "16-4", "bits = '16-4': use W-A-KV, such as '4-4-16'"),
        ("bits", "16-17-4", "bits = '16-17-4': each is 2 to 16"),
        ("seeds", "1.5", r"seeds = 1.5 is not of type list: write '\[0, 1\]'"),
    ],
)
def test_a_wrong_value_is_told_before_anything_starts(tmp_path, name, value, said):
    asked = ["run", "03", "--profile", "smoke", "--folder", str(tmp_path / "r"), "-p", name, value]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 1 and re.search(said, done.output), done.output
    assert not (tmp_path / "r").exists()


def test_a_profile_file_without_a_base_leaves_the_rest_to_the_demo(tmp_path):
    profile = tmp_path / "mine.yml"
    profile.write_text("common: {seeds: [7]}\n")
    found, demo = profiles.load(str(profile)), profiles.load("demo")
    assert found["common"] == demo["common"] | {"seeds": [7]}
    assert found["notebooks"] == demo["notebooks"]


@pytest.mark.parametrize("site", ["layers.2.mlp", "layers.0.attn"])
def test_a_site_that_the_model_has_not_starts_no_batch(tmp_path, site, monkeypatch):
    monkeypatch.setattr(batches, "_supervised", lambda *_: pytest.fail("started"))
    profile = tmp_path / "mine.yml"
    profile.write_text(f"base: smoke\ncommon: {{site: {site}}}\n")
    done = invoke("batch", "--profile", profile, "--only", "02")
    assert done.exit_code != 0 and f"site = '{site}'" in done.output
    assert not (ROOT / "results" / "mine").exists()

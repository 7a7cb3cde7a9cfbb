"""Experiments: grids refused by name, artefacts shared by points that agree, summaries, dry runs."""

from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from dry_runs import dry_run

from dfrot_lab import experiments, files, kept_files, notebooks, profiles
from dfrot_lab.artefacts import Artefacts
from dfrot_lab.experiments import ExperimentError

ROOT = Path(__file__).parents[1]
INVARIANCE, ERRORS, KEPT, REFINED = (
    "01_rotation_invariance", "02_ro_vs_rh_error", "03_massive_tokens_fp16", "04_dfrot",
)  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project with notebooks, without results."""
    folder = tmp_path / "a checkout"
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    (folder / "Snakefile").symlink_to(ROOT / "Snakefile")
    monkeypatch.chdir(folder)
    return folder


def grid(root, notebooks=("03",), name="trial", profile="smoke", **lists):
    """The experiment of `lists`, found."""
    content = {name: {"profile": profile, "notebooks": list(notebooks), "grid": lists}}
    (root / "experiments.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    return experiments.find(name, profile, root)


@pytest.mark.parametrize("name", experiments.read(ROOT))
def test_those_that_come_with_the_project_are_sound(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("dfrot_lab.models.load_config", lambda name: name)  # no hub here
    profile = experiments.default_profile(name, ROOT)
    found = experiments.find(name, profile, ROOT)
    experiments.check(found)
    assert len(found.points) == math.prod(map(len, experiments.read(ROOT)[name]["grid"].values()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("other: {notebooks: ['03'], grid: {}}", "'trial' is unknown: use one of other"),
        ("trial: {notebook: ['03'], grid: {}}", r"unknown keys \['notebook'\]"),
        ("trial: {notebooks: '03', grid: {}}", "'03' is no list of notebooks"),
        ("trial: {notebooks: ['33'], grid: {}}", "notebook '33' is unknown"),
        ("trial: {notebooks: ['03'], grid: {bits: 16-4-16}}", "must map parameters to lists"),
        ("trial: {notebooks: ['03'], grid: {bits: []}}", "must map parameters to lists"),
        ("trial: {notebooks: ['03'], grid: {seeds: [[0], [0]]}}", "the point seeds-0 twice"),
        ("trial: [1, 2", "is not YAML"),
        ("- trial", "must map names"),
    ],
)
def test_a_malformed_experiment_is_refused(root, text, said):
    (root / "experiments.yml").write_text(text)
    with pytest.raises(ValueError, match=said):
        experiments.find("trial", "smoke", root)


@pytest.mark.parametrize("name", [KEPT, "artefacts", "logs", "../up", ""])
def test_a_name_that_is_no_folder_of_its_own_is_refused(root, name):
    with pytest.raises(ExperimentError, match="no notebook's"):
        grid(root, name=name, seeds=[[0]])


def test_without_a_list_of_experiments_it_says_so(root):
    with pytest.raises(ExperimentError, match=r"experiments.yml does not exist"):
        experiments.find("trial", "smoke", root)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"seeds": [[0]], "bit": ["16-4-16"]}, "point seeds-0_bit-16-4-16: bit is a parameter of none"),
        ({"gammas": [[1.0]]}, "gammas is a parameter of none"),  # of 04, not of 03
        ({"bits": ["16-4-16", "4 bits"]}, "point bits-4-bits: .*'4 bits': use W-A-KV"),
        ({"windows": [-1]}, "point windows-1: .*negative"),
        ({"seqlen": [64, "long"]}, "point seqlen-long: .*is not of type int"),
        ({"seeds": [0]}, "point seeds-0: .*is not of type list"),
        ({"gamma": [[1.0]]}, "gamma is a parameter of none"),
        ({"corpus": ["pydoc", "nowhere"]}, "point corpus-nowhere: .*nowhere"),
        ({"model": ["tiny:llama", "tiny:gpt"]}, "point model-tiny-gpt: .*'gpt' is unknown"),
    ],
)  # fmt: skip
def test_a_point_that_no_notebook_would_take_is_named(root, lists, said):
    found = grid(root, **lists)
    with pytest.raises(ExperimentError, match=said):
        experiments.check(found)


def test_points_that_agree_share_and_the_others_do_not(root):
    found = grid(
        root, ("03", "04"), model=["tiny:llama", "tiny:qwen2"], bits=["16-4-16", "16-8-16"],
        seeds=[[1], [0, 1]], gamma=[10.0],
    )  # fmt: skip
    experiments.check(found)
    home = Path("results/smoke")
    assert found.notebooks == [KEPT, REFINED] and len(found.points) == 8
    assert len({p.folder for p in found.points}) == 8
    qwen = home / "trial" / "shared" / "model-tiny-qwen2"
    assert {s.folder for s in found.shares} == {home, qwen}
    for point in found.points:
        assert point.share.folder == (qwen if point.values["model"] == "tiny:qwen2" else home)
        assert (point.share.seeds, point.share.gammas) == ([1, 0], [10.0])


def test_what_artefacts_depend_on_parts_them():
    named = {f.name for f in fields(Artefacts)}
    assert named - {"folder", "clip_steps"} <= set(experiments.SHARED)


def test_profiles_and_links_of_a_point_hold_what_it_is(root):
    found = grid(root, ("03", "04"), model=["tiny:llama", "tiny:qwen2"], gammas=[[1.0], [7.0]])
    experiments.prepare(found)
    for point in found.points:
        read = profiles.load(str(point.profile))
        assert read["common"]["model"] == point.values["model"]
        assert read["common"]["seqlen"] == 96  # of the base
        assert read["notebooks"][REFINED]["gammas"] == point.values["gammas"]
        for stem in found.notebooks:
            taken = notebooks.resolve(root / "notebooks" / f"{stem}.ipynb", str(point.profile), {})
            assert {
                k: v for k, v in taken.items() if k in point.values
            }.items() <= point.values.items()
        (root / point.folder / "artefacts" / "from-point").write_text(point.name)
        assert (root / point.share.folder / "artefacts" / "from-point").read_text() == point.name
    for share in found.shares:
        read = profiles.load(str(share.profile))
        assert read["common"]["seeds"] == [0, 1] and read["rotations"]["gammas"] == [100.0]


def test_preparing_again_touches_nothing_and_mends_a_wrong_link(root):
    found = grid(root, seeds=[[0], [1]])
    experiments.prepare(found)
    times = {p: p.lstat().st_mtime_ns for p in root.rglob("*") if "results" in p.parts}
    experiments.prepare(found)
    assert times == {p: p.lstat().st_mtime_ns for p in root.rglob("*") if "results" in p.parts}
    link = root / found.points[0].folder / "artefacts"
    link.unlink()
    link.symlink_to(root / "elsewhere")
    experiments.prepare(found)
    assert link.resolve() == (root / "results/smoke/artefacts").resolve()


def test_links_are_no_second_copies_of_what_is_kept(root):
    found = grid(root, seeds=[[0], [1]])
    experiments.prepare(found)
    home = root / "results" / "smoke"
    files.write_json(home / "measurements" / "row.json", {"value": 1})
    kept_files.verify(home)
    assert list(files.read_json(home / kept_files.MANIFEST)) == ["measurements/row.json"]


def write_result(root, point, notebook, agrees, mean):
    claim = {"claim": "RH < RO", "ours": f"RH {mean}", "agrees": agrees, "paper": "", "rule": ""}
    rows = [
        {"rotation": "RH", "bits": "16-4-16", "keep": "none", "gamma": None, "method": None,
         "mean": mean, "sd": 0.5, "n": 2},
    ]  # fmt: skip
    files.write_json(
        root / point.folder / notebook / "result.json", {"claims": [claim], "table": rows}
    )


def test_the_summary_has_a_row_a_claim_and_a_perplexity(root):
    found = grid(root, seeds=[[0], [0, 1]], bits=["16-4-16", "16-8-16"])
    values = {p.name: 30.0 + i for i, p in enumerate(found.points[:3])}
    for point in found.points[:3]:
        write_result(root, point, KEPT, point is found.points[0], values[point.name])
    line = experiments.summarize(found)
    lost = f"{found.points[3].name}/{KEPT}"
    assert line.startswith("3 of 4 notebooks") and line.endswith(f"missing: {lost}")
    told = files.read_json(root / found.folder / "summary.json")
    assert told["missing"] == [lost] and len(told["rows"]) == 6
    with (root / found.folder / "summary.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 6
    claims = [r for r in rows if r["kind"] == "claim"]
    assert [r["agrees"] for r in claims] == ["True", "False", "False"]
    assert claims[0]["quantity"] == "RH < RO" and claims[0]["value"] == "RH 30.0"
    for row, point in zip(
        [r for r in rows if r["kind"] == "perplexity"], found.points, strict=False
    ):
        assert row["quantity"] == "perplexity of RH, bits 16-4-16, keep none"
        assert (float(row["value"]), row["sd"], row["n"]) == (values[point.name], "0.5", "2")
        assert (row["seeds"], row["bits"]) == (str(point.values["seeds"]), point.values["bits"])


def test_the_summary_takes_every_published_result(root):
    published = sorted(p.parent.name for p in ROOT.glob("figures/*/result.json"))
    found = grid(root, published, seeds=[[0]])
    for name in published:
        target = root / found.points[0].folder / name
        target.mkdir(parents=True)
        shutil.copy(ROOT / "figures" / name / "result.json", target)
    assert experiments.summarize(found).startswith(f"{len(published)} of {len(published)} ")
    rows = files.read_json(root / found.folder / "summary.json")["rows"]
    for name in published:
        result = files.read_json(ROOT / "figures" / name / "result.json")
        own = [r for r in rows if r["notebook"] == name]
        assert sum(r["kind"] == "claim" for r in own) == len(result["claims"])
        table = result.get("table", [])
        assert sum(r["kind"] == "perplexity" for r in own) == sum("task" not in r for r in table)
        assert sum(r["kind"] == "accuracy" for r in own) == sum("task" in r for r in table)


def test_the_summary_takes_accuracies(root):
    found = grid(root, ("10",), seeds=[[0]])
    interval = {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 12, "sd": 0.1}
    row = {"bits": "4-4-16", "rotation": "RH", "task": "last_word", "seeds": 3}
    result = {
        "claims": [],
        "table": [row | {"correct": interval, "logp": interval | {"mean": -2.0}}],
    }
    files.write_json(root / found.points[0].folder / found.notebooks[0] / "result.json", result)
    experiments.summarize(found)
    told = files.read_json(root / found.folder / "summary.json")["rows"]
    assert [(r["kind"], r["value"], r["sd"], r["n"]) for r in told] == [
        ("accuracy", 0.4, 0.1, 3), ("log-probability", -2.0, 0.1, 3),
    ]  # fmt: skip
    assert told[0]["quantity"] == "accuracy of RH, bits 4-4-16, task last_word"


@pytest.fixture
def checkout(root):
    """What the Snakefile reads besides."""
    for name in ("dfrot_lab", "kernels"):
        (root / name).symlink_to(ROOT / name)
    return root


def test_snakemake_makes_what_is_shared_once(checkout):
    found = grid(checkout, ("03", "04"), model=["tiny:llama", "tiny:qwen2"], seeds=[[0], [1]])
    experiments.prepare(found)
    jobs = dry_run(checkout, experiment="trial")
    shares = {str(s.folder) for s in found.shares}
    for rule in ("assets", "activations", "rotations"):
        assert sorted(j.wildcards["home"] for j in jobs if j.rule == rule) == sorted(shares)
    points = {(str(p.folder), n): p for p in found.points for n in found.notebooks}
    run = {(j.wildcards["folder"], j.name): j for j in jobs if j.rule == "notebook"}
    assert set(run) == set(points)
    for (folder, name), job in run.items():
        home, inputs = points[folder, name].share.folder, job.inputs
        assert f"{home}/artefacts/activations.safetensors" in inputs
        assert (f"{home}/artefacts/rotations-trial.json" in inputs) == (name == REFINED)
        assert f"notebooks/{name}.ipynb" in inputs


@pytest.mark.parametrize("home", ["./2024", "/elsewhere/my results"])
def test_a_folder_of_its_own_has_all_that_a_grid_makes(checkout, home, tmp_path):
    home = home.replace("/elsewhere", str(tmp_path))
    grid(checkout, model=["tiny:llama", "tiny:qwen2"], seeds=[[0]])
    found = experiments.find("trial", "smoke", checkout, Path(home))
    experiments.prepare(found)
    jobs = dry_run(checkout, experiment="trial", folder=home)
    folders = {
        Path(j.wildcards["home"] if "home" in j.wildcards else j.wildcards["folder"])
        for j in jobs
        if j.rule != "all"
    }
    assert folders == {s.folder for s in found.shares} | {p.folder for p in found.points}
    assert all(folder.is_relative_to(Path(home)) for folder in folders)
    assert not (checkout / "results").exists()


def test_hessians_are_as_many_windows_as_the_points_ask_for(checkout):
    found = grid(checkout, ("05",), weight_windows=[2, 4], seeds=[[0], [1]])
    experiments.prepare(found)
    jobs = dry_run(checkout, experiment="trial")
    homes = [j.wildcards["home"] for j in jobs if j.rule == "hessians"]
    assert sorted(homes) == sorted(str(s.folder) for s in found.shares) and len(homes) == 2
    made = {f"{home}/artefacts/hessians/hessians.json" for home in homes}
    for job in jobs:
        if job.rule == "notebook":
            assert len(made & set(job.inputs)) == 1 and job.resources["hessians"] == "0"


def test_jobs_ask_for_what_the_profile_and_the_grid_say(checkout):
    own = {"base": "smoke", "resources": {"mem_mb": 12345, "runtime": 77}}
    (checkout / "own.yml").write_text(yaml.safe_dump(own))
    found = grid(checkout, profile="own.yml", device=["cpu", "cuda"])
    experiments.prepare(found)
    jobs = dry_run(checkout, experiment="trial", profile="own.yml")
    asked = [j.resources for j in jobs if j.rule in ("activations", "notebook")]
    assert len(asked) == 4
    for resources in asked:
        assert (resources["mem_mb"], resources["runtime"], resources["gpu"]) == ("12345", "77", "1")


@pytest.mark.slow
def test_a_grid_of_two_points_runs_and_is_summarized(tmp_path):
    folder = tmp_path / "a checkout"
    for name in ("dfrot_lab", "kernels", "notebooks", "cluster"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    content = {"pair": {"notebooks": ["02"], "grid": {"seeds": [[0], [1]]}}}
    (folder / "experiments.yml").write_text(yaml.safe_dump(content))

    def batch() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "dfrot_lab.cli", "batch", "--profile", "smoke", "--experiment", "pair"],
            cwd=folder, text=True, capture_output=True, check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [folder, folder / "kernels"]))},
        )  # fmt: skip

    done = batch()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "2 of 2 notebooks have results" in done.stderr
    home = folder / "results" / "smoke"
    both = [home / "pair" / f"seeds-{s}" / ERRORS / "result.json" for s in (0, 1)]
    first, second = (files.read_json(p) for p in both)
    assert (first["parameters"]["seeds"], second["parameters"]["seeds"]) == ([0], [1])
    assert first["statistics"] != second["statistics"]
    assert len(list(folder.rglob("activations.safetensors"))) == 1
    rows = files.read_json(home / "pair" / "summary.json")["rows"]
    assert len(rows) == len(first["claims"]) + len(second["claims"])
    times = [p.stat().st_mtime_ns for p in both]
    again = batch()
    assert again.returncode == 0 and "Nothing to be done" in again.stdout + again.stderr
    assert times == [p.stat().st_mtime_ns for p in both]

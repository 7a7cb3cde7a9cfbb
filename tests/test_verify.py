"""`dfrot-lab verify`: what is as committed passes, one digit or byte that is not fails and is named."""

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dfrot_lab import assets, files, kept_files, manifest, pictures, results
from dfrot_lab.cli import app
from dfrot_lab.verify import VerifyError, verify

ROOT = Path(__file__).parents[1]
NAME = "03_massive_tokens_fp16"  # two figures, drawn from different keys


@pytest.fixture(autouse=True)
def cached(monkeypatch):
    """The packaged assets need not be there: test_manifest hashes them."""
    monkeypatch.setattr(assets, "path", Path)


@pytest.fixture
def trees(tmp_path):
    """(results, reference): the committed figures of one notebook, as made and as published."""
    reference, made = tmp_path / "figures", tmp_path / "results"
    shutil.copytree(ROOT / "figures" / NAME, reference / NAME)
    manifest.write(reference)
    (made / NAME / "figures").mkdir(parents=True)
    for file in (reference / NAME).iterdir():
        within = NAME if file.suffix == ".json" else f"{NAME}/figures"
        shutil.copyfile(file, made / within / file.name)
    (made / kept_files.BATCH_LOCK).touch()
    recorded(made)
    return made, reference


def recorded(made):
    """As after a run: the hashes of what is there now."""
    (made / kept_files.MANIFEST).unlink(missing_ok=True)
    assert kept_files.verify(made) == []


def statuses(report):
    return {line.name: line.status for line in report.lines}


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    files.write_json(path, found)


@pytest.fixture
def undrawn(monkeypatch):
    """Nothing is drawn again, which takes a second a figure; one test does."""
    monkeypatch.setattr(pictures, "stale", lambda home, names: [])


def elsewhere(made):
    edit(made / NAME / "provenance.json", lambda p: p.update(processor="another processor"))


def test_as_committed(trees):
    report = verify("demo", *trees)
    assert report.verdict == "REPRODUCED: 2 of 2 committed figures reproduced"
    assert report.reproduced
    assert set(statuses(report).values()) == {"reproduced"}
    json.dumps(report.as_json(), allow_nan=False)


def test_one_digit_of_a_result_fails_the_figures_drawn_from_it(trees):
    made, reference = trees
    edit(made / NAME / "result.json", lambda r: r["exempted"][1].update(pairs=874))
    recorded(made)
    report = verify("demo", made, reference)
    assert statuses(report) == {
        "reference": "reproduced",
        "assets": "reproduced",
        "kept files": "reproduced",
        "exempted_tokens": "differs",
        "massive_tokens_fp16": "differs",  # its caption counts them
        "result.json": "differs",
        "claims": "reproduced",
    }
    assert not report.reproduced
    assert "exempted[1].pairs: 874 against 873" in "\n".join(report.text())


def test_figures_are_told_apart_by_the_keys_they_read(trees):
    made, reference = trees
    edit(made / NAME / "result.json", lambda r: r["rows"][2].update(ppl=43.4768))
    found = statuses(verify("demo", made, reference))
    assert found["massive_tokens_fp16"] == "differs"
    assert found["exempted_tokens"] == "reproduced"


@pytest.mark.parametrize("file", ["result.json", "massive_tokens_fp16.png", "exempted_tokens.md"])
def test_a_tampered_reference_is_told_from_a_difference(trees, file):
    made, reference = trees
    path = reference / NAME / file
    path.write_bytes(path.read_bytes().replace(b"3", b"4", 1))
    report = verify("demo", made, reference)
    assert statuses(report)["reference"] == "differs" and not report.reproduced
    assert f"{NAME}/{file} altered" in "\n".join(report.text())


@pytest.mark.parametrize(
    ("suffix", "far"), [(".png", False), (".pdf", False), (".md", False), (".png", True)]
)
def test_a_tampered_picture_fails_here_and_elsewhere(trees, suffix, far):
    made, reference = trees
    if far:  # where it can be drawn alike
        here = {p: version(p) for p in ("matplotlib", "numpy")}
        elsewhere(made)
        edit(made / NAME / "provenance.json", lambda p: p["versions"].update(here))
    path = made / NAME / "figures" / f"exempted_tokens{suffix}"
    path.write_bytes(path.read_bytes()[:-2] + b"x\n")
    report = verify("demo", made, reference)
    found = statuses(report)
    assert found["pictures" if far else "exempted_tokens"] == "differs"
    assert found["massive_tokens_fp16"] == "reproduced"
    assert not report.reproduced and f"exempted_tokens{suffix}" in "\n".join(report.text())


def test_elsewhere_numbers_may_move_within_the_spread_and_no_further(trees, undrawn):
    made, reference = trees
    elsewhere(made)
    path = made / NAME / "result.json"
    edit(path, lambda r: r["first_token"][0].update(first=35.9))  # 1.9 %
    recorded(made)
    report = verify("demo", made, reference)
    assert report.reproduced and statuses(report)["result.json"] == "reproduced"
    assert "processor another processor against" in "\n".join(report.text())
    edit(path, lambda r: r["first_token"][0].update(first=45.2))
    report = verify("demo", made, reference)
    assert statuses(report)["result.json"] == "differs"
    assert "first_token[0].first" in "\n".join(report.text())


def test_elsewhere_one_digit_within_the_tolerance_fails_by_its_hash(trees, undrawn):
    made, reference = trees
    elsewhere(made)
    assert verify("demo", made, reference).reproduced
    path = made / NAME / "result.json"
    edit(path, lambda r: r["first_token"][0].update(first=r["first_token"][0]["first"] + 0.001))
    report = verify("demo", made, reference)
    assert statuses(report)["result.json"] == "reproduced"
    assert [line.name for line in report.lines if line.failed] == ["kept files"]
    assert f"({NAME}/result.json altered)" in "\n".join(report.text())
    assert report.verdict.startswith("NOT REPRODUCED: 2 of 2 committed figures reproduced; 1 line")


def test_one_byte_of_an_artefact_fails(trees, undrawn):
    made, reference = trees
    path = made / "artefacts" / "hessians" / "layer-000.safetensors"
    path.parent.mkdir(parents=True)
    save_file({"H": np.ones(64)}, path)
    recorded(made)
    assert verify("demo", made, reference).reproduced
    path.write_bytes(path.read_bytes()[:-1] + b"\x3e")  # of a number, which stays one
    report = verify("demo", made, reference)
    assert [line.name for line in report.lines if line.failed] == ["kept files"]
    assert "artefacts/hessians/layer-000.safetensors altered" in "\n".join(report.text())


def test_hashes_that_nobody_recorded_are_told_in_the_verdict(trees):
    made, reference = trees
    (made / kept_files.MANIFEST).unlink()
    report = verify("demo", made, reference)
    assert statuses(report)["kept files"] == "not compared"
    assert report.verdict.endswith("figures reproduced; no hashes of kept files")


def test_a_reference_of_results_is_hashed_by_what_its_jobs_recorded(trees):
    made, _ = trees
    other = Path(shutil.copytree(made, made.parent / "others"))
    assert verify("demo", made, other).reproduced
    edit(other / NAME / "result.json", lambda r: r["first_token"][0].update(first=1))
    report = verify("demo", made, other)
    assert statuses(report)["reference"] == "differs"
    assert statuses(report)["kept files"] == "reproduced"


def test_a_claim_that_turns_fails_elsewhere(trees, undrawn):
    made, reference = trees
    elsewhere(made)
    edit(made / NAME / "result.json", lambda r: r["claims"][0].update(agrees=False))
    assert statuses(verify("demo", made, reference))["claims"] == "differs"


def test_other_parameters_cannot_be_compared(trees):
    made, reference = trees
    for file in ("result.json", "provenance.json"):
        edit(made / NAME / file, lambda r: r["parameters"].update(seeds=[0]))
    report = verify("demo", made, reference)
    assert statuses(report)["exempted_tokens"] == "not comparable" and not report.reproduced
    assert "seeds [0] against [0, 1, 2]" in "\n".join(report.text())


def test_other_inputs_fail(trees):
    made, reference = trees
    edit(made / NAME / "provenance.json", lambda p: p["inputs"].update(calibration_tokens="00"))
    report = verify("demo", made, reference)
    assert statuses(report)["inputs"] == "differs" and not report.reproduced


def test_a_missing_figure_and_a_damaged_result(trees):
    made, reference = trees
    (made / NAME / "figures" / "exempted_tokens.pdf").unlink()
    assert statuses(verify("demo", made, reference))["exempted_tokens"] == "missing"
    (made / NAME / "result.json").write_text("[1]")
    report = verify("demo", made, reference)
    assert statuses(report)["exempted_tokens"] == "differs" and not report.reproduced


def test_not_run_is_no_failure_unless_asked_for(trees):
    made, reference = trees
    for other in ("02_ro_vs_rh_error", "09_objectives"):
        shutil.copytree(ROOT / "figures" / other, reference / other)
    manifest.write(reference)
    report = verify("demo", made, reference)
    found = statuses(report)
    assert found["error_scatter"] == "missing"  # of the first four
    assert found["prefix_in_cache"] == "not run"
    assert report.not_run == ["09_objectives"]
    assert "2 of 10 committed figures reproduced; notebook 09 not run;" in report.verdict
    report = verify("demo", made, reference, asked=[NAME])
    assert report.reproduced and "prefix_in_cache" not in statuses(report)
    assert report.verdict == "REPRODUCED: 2 of 2 committed figures of 03 reproduced"
    assert not verify("demo", made, reference, asked=["09_objectives"]).reproduced
    assert statuses(verify("demo", made, reference, every=True))["prefix_in_cache"] == "missing"
    assert "09_objectives: not run (`make objectives` runs it)" in "\n".join(
        verify("demo", made, reference).text()
    )


def test_the_verdict_says_how_much_of_what_is_committed_was_run(trees):
    made, reference = trees
    for other in ("07_int4_kernels", "09_objectives"):
        shutil.copytree(ROOT / "figures" / other, reference / other)
    manifest.write(reference)
    report = verify("demo", made, reference)
    assert report.reproduced
    assert report.verdict == (
        "REPRODUCED AS FAR AS RUN: 2 of 9 committed figures reproduced; notebooks 07, 09 not run"
    )
    shutil.copytree(reference / "07_int4_kernels", made / "07_int4_kernels")
    recorded(made)
    report = verify("demo", made, reference)
    assert report.reproduced and report.figures["not compared"] == 2
    assert report.verdict == (
        "REPRODUCED AS FAR AS RUN: 4 of 9 committed figures reproduced; notebook 09 not run; "
        "2 timed, never compared"
    )
    assert report.as_json()["figures"]["committed"] == 9


def test_nothing_to_compare(trees, tmp_path):
    made, reference = trees
    with pytest.raises(VerifyError, match="make figures"):
        verify("demo", tmp_path / "empty", reference)
    with pytest.raises(VerifyError, match="name a reference"):
        verify("demo", made, tmp_path / "empty")
    with pytest.raises(VerifyError, match="holds no 04_dfrot"):
        verify("demo", made, reference, asked=["04_dfrot"])


# --- any digit ------------------------------------------------------------------------------------

SMALL = {"rows": [{"seed": 0, "ppl": 31.625}, {"seed": 1, "ppl": 3e-07}], "n": 10, "flag": True}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A notebook without figures, in two results folders."""
    home = tmp_path_factory.mktemp("small")
    for name in ("a", "b"):
        results.save(home / name / "99_small", SMALL, {"seeds": [0, 1], "threads": 2})
        (home / name / "99_small" / "figures").mkdir()  # a results folder, which has no manifest
    edit(home / "a" / "99_small" / "provenance.json", lambda p: p.update(seconds=1e9))
    return home


TEXT = (json.dumps(SMALL | {"parameters": {"seeds": [0, 1], "threads": 2}, "claims": []}, indent=1,
                   sort_keys=True) + "\n")  # fmt: skip
DIGITS = [m.start() for m in re.finditer(r"\d", TEXT)]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(DIGITS), st.integers(1, 9))
def test_any_changed_digit_of_a_result_is_caught(small, place, by):
    path = small / "a" / "99_small" / "result.json"
    tampered = TEXT[:place] + str((int(TEXT[place]) + by) % 10) + TEXT[place + 1 :]
    path.write_text(TEXT)
    assert verify("x", small / "a", small / "b").reproduced
    path.write_text(tampered)
    assert not verify("x", small / "a", small / "b").reproduced
    assert not verify("x", small / "b", small / "a").reproduced


# --- the command ----------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_exit_status_and_json(trees, tmp_path):
    made, reference = trees
    there = ("demo", "--folder", made, "--against", reference)
    done = invoke(*there, "--json", tmp_path / "verdict.json")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1].startswith("REPRODUCED: 2 of 2 committed figures")
    assert files.read_json(tmp_path / "verdict.json")["reproduced"] is True
    (made / NAME / "figures" / "exempted_tokens.md").write_text("another caption\n")
    done = invoke(*there, "--json", tmp_path / "verdict.json")
    assert done.exit_code == 1
    assert "NOT REPRODUCED" in done.output.splitlines()[-1]
    found = files.read_json(tmp_path / "verdict.json")
    lines = [line for n in found["notebooks"] for line in n["lines"]]
    assert {"exempted_tokens"} == {line["name"] for line in lines if line["status"] == "differs"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-profile"], "profile 'no-such-profile' is unknown"),
        (["smoke"], "profile 'smoke' has no committed reference (figures/ holds demo"),
        (["demo", "--only", "77"], "notebook '77' is unknown"),
        (["demo", "--folder", "nowhere"], "nowhere holds no NOTEBOOK/result.json"),
    ],
)
def test_what_cannot_be_compared_exits_with_2(arguments, said):
    done = invoke(*arguments)
    assert done.exit_code == 2 and said in done.output
    assert len(done.output.splitlines()) == 1


def test_publish_writes_the_manifest(trees, tmp_path):
    made, _ = trees
    to = tmp_path / "published"
    done = CliRunner().invoke(app, ["publish", str(made), "--to", str(to)])
    assert done.exit_code == 0, done.output
    assert manifest.check(to) == {}
    assert verify("demo", made, to).reproduced

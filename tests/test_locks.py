"""The lock satisfies pyproject, covers what is imported, and is what the published figures were made with."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from dfrot_lab import locks

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = locks.read(ROOT / locks.NAME)
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "extra": ""}
OURS = {"dfrot-lab"}
DEVELOPMENT = {
    "selenium",
    "llama-cpp-python",
}  # of extras that the lock is not for, imported where asked for


def pinned(name: str) -> bool:
    return canonicalize_name(name) in LOCK or locks.free(name)


def test_the_lock_has_a_version_in_range_of_everything_pyproject_asks_for():
    asked = locks.requirements(ROOT)
    assert {r.name for r in asked} >= {"torch", "transformers", "pytest", "compressed-tensors"}
    assert "dfrot-lab" not in {r.name for r in asked}
    for r in asked:
        assert pinned(r.name), r
        if not locks.free(r.name):
            assert r.specifier.contains(LOCK[canonicalize_name(r.name)]), r


def test_the_lock_is_closed():
    """What a locked distribution needs on Linux is locked too, in a version it accepts."""
    for name, version in LOCK.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if Version(installed.version).public != version:
            continue  # another environment: what that version needed is not known here
        for needed in map(Requirement, installed.requires or []):
            if needed.marker is None or needed.marker.evaluate(LINUX | {"python_version": "3.11"}):
                assert pinned(needed.name), f"{name} needs {needed}"
                if not locks.free(needed.name):
                    found = LOCK[canonicalize_name(needed.name)]
                    assert needed.specifier.contains(found, prereleases=True), f"{name}: {needed}"


def test_the_published_figures_were_made_with_it():
    made = sorted((ROOT / "figures").glob("*/provenance.json"))
    assert made
    for path in made:
        for name, version in json.loads(path.read_text())["versions"].items():
            if name not in OURS and version:
                at = f"{path.parent.name}: {name} {version}, run `make figures publish lock`"
                assert LOCK[canonicalize_name(name)] == Version(version).public, at


def test_what_the_code_imports_is_locked():
    known, files = packages_distributions(), []
    for folder in ("dfrot_lab", "kernels", "tests", "benchmarks"):
        files += sorted((ROOT / folder).rglob("*.py"))
    imported = set()
    for node in (n for f in files for n in ast.walk(ast.parse(f.read_text()))):
        if isinstance(node, ast.Import):
            imported |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module.split(".")[0])
    needed = {canonicalize_name(d) for m in imported for d in known.get(m, [])} - OURS
    assert {"torch", "numpy", "nbclient"} <= needed
    assert {n for n in needed if not pinned(n)} <= DEVELOPMENT


def test_every_locked_version_admits_both_pythons():
    checked = 0
    for name, version in LOCK.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if Version(installed.version).public == version:
            wanted = SpecifierSet(installed.metadata["Requires-Python"] or "")
            assert wanted.contains("3.11.9") and wanted.contains("3.12.9"), name
            checked += 1
    if checked < len(LOCK) // 2:
        pytest.skip("this environment is another one: versions that are not installed tell nothing")


def test_pyproject_states_nothing_twice():
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    names = [canonicalize_name(Requirement(r).name) for one in lists for r in one]
    stated = [n for n in names if n not in OURS]  # dfrot-lab[test] in dev is a reference
    assert len(stated) == len(set(stated))


@pytest.mark.parametrize("path", ["environment.yml", "binder/environment.yml"])
def test_a_conda_environment_repeats_nothing_and_has_a_python_that_will_do(path):
    conda = yaml.safe_load((ROOT / path).read_text())["dependencies"]
    names = {d.split("=")[0]: d.partition("=")[2] for d in conda if isinstance(d, str)}
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    stated = {canonicalize_name(Requirement(r).name) for one in lists for r in one}
    assert not {canonicalize_name(n) for n in names} & stated
    assert SpecifierSet(PROJECT["requires-python"]).contains(names["python"] + ".1")
    assert f"Programming Language :: Python :: {names['python']}" in PROJECT["classifiers"]
    for part in (d for d in conda if not isinstance(d, str)):
        assert all(r.startswith("-e .") for r in part["pip"])  # the project itself, nothing else


@pytest.mark.parametrize("folder", ["dfrot_lab", "kernels", "tests", "benchmarks"])
def test_the_source_compiles_without_a_warning(folder):
    """What Python 3.11 warns of as deprecated syntax, such as stray backslashes, 3.12 complains about."""
    code = (
        "import pathlib, sys\n"
        "for f in pathlib.Path(sys.argv[1]).rglob('*.py'): compile(f.read_text(), f, 'exec')"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, folder], check=True, cwd=ROOT)


def test_no_module_that_python_3_12_has_dropped():
    gone = {"asynchat", "asyncore", "distutils", "imp", "smtpd"}
    for path in [*(ROOT / "dfrot_lab").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not gone & {a.name.split(".")[0] for a in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in gone, path


# --- the command ------------------------------------------------------------------------------------


def project(folder: Path, *dependencies: str) -> Path:
    text = f"[project]\nname = 'x'\ndependencies = {json.dumps(dependencies)}\n"
    (folder / "pyproject.toml").write_text(text + "optional-dependencies.test = ['pytest>=1']\n")
    return folder


def test_writing_and_reading_give_the_closure(tmp_path):
    path = locks.write(project(tmp_path, "seaborn", "nothing-at-all; sys_platform == 'none'"))
    found = locks.read(path)
    assert {"seaborn", "matplotlib", "numpy", "pandas", "pytest", "pluggy"} <= set(found)
    assert not {"torch", "nothing-at-all", "colorama"} & set(found)
    assert found == locks.closure(locks.requirements(tmp_path))
    assert all("+" not in v for v in found.values())
    text = path.read_text()
    assert locks.write(tmp_path).read_text() == text
    assert "://" not in text and "@" not in text and str(Path.home()) not in text


def test_what_torch_chooses_is_left_free():
    asked = locks.requirements(ROOT)
    assert "triton" in {r.name for r in asked} and not any(locks.free(n) for n in LOCK)
    assert not any(locks.free(n) for n in locks.closure(asked)) and locks.free("nvidia_nccl_cu13")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("no-such-distribution-here", "no-such-distribution-here is needed and not installed here"),
        ("numpy<1", r"numpy \S+ is installed where <1 is needed"),
    ],
)
def test_what_is_not_there_is_named(asked, said, tmp_path):
    with pytest.raises(locks.LockError, match=said):
        locks.write(project(tmp_path, asked))
    assert not (tmp_path / locks.NAME).exists()


def test_outside_a_checkout_there_is_nothing_to_lock(tmp_path):
    with pytest.raises(locks.LockError, match="run this from a checkout"):
        locks.write(tmp_path)


@pytest.mark.parametrize("line", ["torch", "torch>=2", "Torch==2", "numpy==1\nnumpy==2"])
def test_a_line_that_is_no_pin_is_named(line, tmp_path):
    (tmp_path / "lock").write_text(f"# a comment\n\n{line}\n")
    with pytest.raises(locks.LockError, match="use name==version, each name once"):
        locks.read(tmp_path / "lock")

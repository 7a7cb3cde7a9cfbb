"""The wheel carries what code needs; installed in a checkout whose path has spaces, it makes the figures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dfrot_lab import batches

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"dfrot_lab": "dfrot_lab", "kernels/dfrot_kernels": "dfrot_kernels"}
LEFT = shutil.ignore_patterns(".*", "results", "__pycache__", "build", "dist", "*.egg-info")


def python(*arguments, cwd: Path, path: Path | None = None, **environment):
    given = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    if path:
        given["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=given, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the source, so that building leaves nothing behind in ours."""
    copy = tmp_path_factory.mktemp("wheel") / "a checkout with spaces"
    return Path(shutil.copytree(ROOT, copy, ignore=LEFT))


@pytest.fixture(scope="module")
def wheel(checkout) -> Path:
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    out = checkout.parent / "wheels"
    out.mkdir()
    python("-W", "ignore", "-c", code, out, cwd=checkout)
    shutil.rmtree(checkout / "build")
    return next(out.glob("dfrot_lab-*-py3-none-any.whl"))


@pytest.fixture(scope="module")
def site(wheel) -> Path:
    """The wheel, unpacked."""
    folder = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as z:
        z.extractall(folder)
    return folder


def test_every_file_of_the_packages_is_in_it_and_nothing_else(wheel):
    wanted = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as z:
        found = {n for n in z.namelist() if ".dist-info/" not in n}
        about = "".join(z.read(n).decode() for n in z.namelist() if n.endswith("/METADATA"))
    assert found == wanted
    assert {"dfrot_lab/data/style.mplstyle", "dfrot_lab/data/captions.yml"} <= found
    assert {"dfrot_lab/data/paper.json", "dfrot_lab/profiles/smoke.yml"} <= found
    assert "Requires-Python: >=3.11" in about and "Python :: 3.12" in about


def test_what_code_reads_is_found_from_the_wheel_alone(site, checkout):
    code = """
import json, dfrot_lab, dfrot_kernels, dfrot_kernels.reference
from dfrot_lab import files, notebooks, paper, plots, profiles, results
print(json.dumps({
    "from": [dfrot_lab.__file__, dfrot_kernels.__file__],
    "data": [plots.style.SHEET.is_file(), plots.CAPTIONS.is_file()],
    "paper": paper.table1("LLaMA2-7B", "RO"),
    "profiles": profiles.names(),
    "root": str(files.project_root()),
    "notebook": str(notebooks.find("03", files.project_root())),
    "commit": results._git("rev-parse", "HEAD"),
}))"""
    found = json.loads(python("-P", "-c", code, cwd=checkout / "notebooks", path=site))
    assert all(Path(p).is_relative_to(site) for p in found["from"])
    assert all(found["data"]) and found["paper"] > 1
    assert found["profiles"] == sorted(p.stem for p in ROOT.glob("dfrot_lab/profiles/*.yml"))
    assert Path(found["root"]) == checkout
    assert Path(found["notebook"]) == checkout / "notebooks" / "03_massive_tokens_fp16.ipynb"
    assert found["commit"] is None  # a wheel lies in no checkout


def test_outside_a_checkout_it_says_so(site, tmp_path):
    code = "from dfrot_lab.cli import app; app()"
    with pytest.raises(AssertionError, match=r"no Snakefile in .*: run this from a checkout"):
        python("-P", "-c", code, "batch", "--profile", "smoke", cwd=tmp_path, path=site)


def test_a_wheel_of_other_code_is_refused(site, checkout, tmp_path):
    """The Snakefile watches the checkout: results of a wheel that differs would look new and be old."""
    other = tmp_path / "another checkout"
    shutil.copytree(checkout, other)
    changed = other / "kernels" / "dfrot_kernels" / "hadamard.py"
    changed.write_text(changed.read_text() + "\n")
    code = "from dfrot_lab.cli import app; app()"
    with pytest.raises(AssertionError, match=r"hadamard\.py is not what is installed in .*site"):
        python("-P", "-c", code, "batch", "--profile", "smoke", cwd=other, path=site)
    assert not (other / "results").exists()


def test_the_code_of_a_checkout_is_compared_byte_by_byte(checkout, tmp_path):
    batches._check_code(checkout)  # a copy of what is imported here
    batches._check_code(tmp_path)  # no packages beside that Snakefile
    batches._check_code(ROOT)
    shutil.copytree(checkout / "dfrot_lab", tmp_path / "dfrot_lab")
    (tmp_path / "dfrot_lab" / "new.py").touch()
    with pytest.raises(batches.BatchError, match=r"dfrot_lab/new\.py is not what is installed"):
        batches._check_code(tmp_path)


@pytest.mark.slow
def test_the_installed_wheel_makes_the_figures(wheel, checkout):
    """`make figures`, smoke profile, in .venv of a checkout with spaces in its path: to the gallery."""
    python("-m", "venv", "--without-pip", checkout / ".venv", cwd=checkout)
    (site,) = (checkout / ".venv").glob("lib/python*/site-packages")
    here = [p for p in sys.path if p.endswith("site-packages")]
    (site / "environment.pth").write_text("\n".join(here) + "\n")  # its .pth files are not read
    inside = checkout / ".venv" / "bin" / "python"
    asked = ("install", "-q", "--no-deps", "--no-index", wheel)
    python("-m", "pip", "--python", inside, *asked, cwd=checkout)
    (checkout / ".venv" / ".ready").touch()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["JUPYTER_PATH"] = f"{sys.prefix}/share/jupyter"  # of the borrowed packages, too
    done = subprocess.run(
        ["make", "figures", "PROFILE=smoke", "CORES=1"],
        cwd=checkout, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    made = checkout / "results" / "smoke"
    notebooks = sorted(p.stem for p in (ROOT / "notebooks").glob("0[1-4]_*.ipynb"))
    assert sorted(p.parent.name for p in made.glob("*/result.json")) == notebooks
    for name in notebooks:
        assert json.loads((made / name / "result.json").read_text())["claims"]
        assert list((made / name / "figures").glob("*.pdf"))
        assert "As executed" in (made / "gallery" / f"{name}.html").read_text()
    code = "import dfrot_lab; print(dfrot_lab.__file__)"
    ran = subprocess.run([inside, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert Path(ran.stdout.strip()).is_relative_to(site)

"""The shape of the repository that other things rely on."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_kernels_folder_is_not_a_package():
    # Hugging Face's `kernels` would be shadowed and `import transformers` break
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_the_core_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import dfrot_kernels.reference, dfrot_lab.lab, dfrot_lab.studies.refined_rotation"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_command_line_starts_without_torch():
    code = "import sys, dfrot_lab.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("profile", ["smoke", "paper"])
def test_a_packaged_profile_is_checked_without_torch(profile):
    """By every job of a batch, that is: torch would take seconds and a quarter of a gigabyte each time."""
    code = (
        "import sys; from pathlib import Path; from dfrot_lab import notebooks\n"
        f"notebooks.check_profile({profile!r}, Path('notebooks'))\n"
        "for file in Path('notebooks').glob('[0-9]*.ipynb'):\n"
        f"    notebooks.resolve(file, {profile!r}, {{}})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_environment_yml_repeats_nothing_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = {d.split(";")[0].split(">")[0].split("=")[0].strip() for d in project["dependencies"]}
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    names = {d.split("=")[0] for d in conda if isinstance(d, str)}
    assert names <= {"python", "pip", "make", "git"}
    assert not names & stated


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_source_notebooks_are_clean_and_short(path):
    notebook = json.loads(path.read_text())
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)
    for cell in code:
        lines = [line for line in "".join(cell["source"]).splitlines() if line.strip()]
        # a reader's own code goes into an exercise: a function, as long as it has to be
        if not {"parameters", "exercise"} & set(cell["metadata"].get("tags", [])):
            assert len(lines) <= 10, "".join(cell["source"])
            assert not any(line.startswith(("def ", "class ", "for ", "if ")) for line in lines)
    assert "claims_table" in "".join("".join(c["source"]) for c in code)


def test_every_deviation_has_its_row():
    rows = [
        line
        for line in (ROOT / "docs" / "deviations.md").read_text().splitlines()
        if line[:2] == "| "
    ]
    numbers = [int(line.split("|")[1]) for line in rows[1:]]
    assert numbers == list(range(1, len(numbers) + 1))


def test_no_benchmark_shadows_a_package_that_transformers_looks_for():
    """A script's own folder is first on the path: `import kernels` in transformers once found ours."""
    code = "import sys; sys.path.insert(0, 'benchmarks'); from transformers import LlamaConfig"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

"""Seconds that a batch adds to its notebooks: Snakemake, a process a job, a kernel, locks and hashes.

They are its wall time less that of the cells. Notebooks run one after the other on the smoke profile, their
artefacts there already. The gate: the results are those of `dfrot-lab run`, byte by byte.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]


def checkout(folder: Path) -> Path:
    """A copy of what a batch needs, with results of its own."""
    for name in ("dfrot_lab", "kernels", "notebooks", "cluster"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    return folder


def call(folder: Path, *arguments: str) -> float:
    """Wall seconds of `dfrot-lab` in `folder`; ClickException with its last lines if it fails."""
    paths = os.pathsep.join([str(folder), str(folder / "kernels")])
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dfrot_lab.cli", *arguments], cwd=folder, text=True, check=False,
        env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise click.ClickException(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}")
    return time.perf_counter() - start


def inside(notebook: Path) -> float:
    """Seconds of an executed notebook's cells, by papermill."""
    cells = json.loads(notebook.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    return sum(c["metadata"]["papermill"]["duration"] or 0.0 for c in code)


def added(folder: Path, names: list[str]) -> float:
    """Seconds that a batch of `names` adds to their cells."""
    home = folder / "results" / "smoke"
    for name in names:
        shutil.rmtree(home / name, ignore_errors=True)
    only = [word for name in names for word in ("--only", name)]
    wall = call(folder, "batch", "--profile", "smoke", "--cores", "1", *only)
    return wall - sum(inside(home / name / "notebook.ipynb") for name in names)


def check(folder: Path, names: list[str]) -> None:
    """ClickException unless the batch's results are those of `dfrot-lab run`."""
    for name in names:
        call(folder, "run", name, "--profile", "smoke", "--folder", "results/direct")
        one, two = (folder / "results" / f / name / "result.json" for f in ("smoke", "direct"))
        if one.read_bytes() != two.read_bytes():
            raise click.ClickException(f"{name}: the batch's result is not that of `dfrot-lab run`")


@click.command()
@click.option("--only", multiple=True, default=("02", "03", "04"), help="Notebooks; repeatable.")
@click.option("--repeats", default=3, help="Medians are over so many.")
def main(only: tuple[str, ...], repeats: int) -> None:
    """Run once to make the artefacts, check, then time a batch of one, of all, and with nothing to do."""
    names = [p.stem for n in only for p in (ROOT / "notebooks").glob(f"{n}*.ipynb")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkout(Path(temporary) / "checkout")
        added(folder, names)
        check(folder, names)
        one = statistics.median(added(folder, names[:1]) for _ in range(repeats))
        text = f"a batch of one notebook adds {one:.1f} s"
        if len(names) > 1:
            every = statistics.median(added(folder, names) for _ in range(repeats))
            each = (every - one) / (len(names) - 1)
            text += f", of {len(names)} {every:.1f} s: {each:.1f} s a notebook and {one - each:.1f} s once"
        idle = ["batch", "--profile", "smoke", "--only", names[0]]
        nothing = statistics.median(call(folder, *idle) for _ in range(repeats))
    load = os.getloadavg()[0]
    click.echo(f"{text}; nothing to do: {nothing:.1f} s (medians of {repeats}, load {load:.1f})")


if __name__ == "__main__":
    main()

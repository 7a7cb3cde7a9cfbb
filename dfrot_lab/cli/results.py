"""Commands on results that are there: redraw, verify, publish, gallery."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from dfrot_lab import profiles
from dfrot_lab.cli import options
from dfrot_lab.files import project_root

__all__ = ["gallery", "publish", "redraw", "verify"]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results/demo"))
def redraw(folder: Path) -> None:
    """Draw every figure in FOLDER again from its saved result, without the model or torch."""
    from dfrot_lab import plots

    click.echo(f"{len(plots.redraw(folder))} files under {folder}")


@click.command()
@click.argument("profile", default="demo")
@options.folder
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="The reference: figures/, or other results.  [default: figures, of the demo profile]",
)
@click.option(
    "--only", multiple=True, help="A notebook, such as 05, that must be there; repeatable."
)
@click.option("--all", "every", is_flag=True, help="Every notebook of the reference must be there.")
@click.option("--tolerant", is_flag=True, help="Within tolerances on the same machine too.")
@click.option(
    "--json", "out", type=click.Path(path_type=Path), help="Write the verdicts there as well."
)
def verify(profile, folder, against, only, every, tolerant, out) -> None:
    """Hold results against the committed reference, figure by figure, and recompute hashes.

    Exit status: 0 reproduced; 1 something differs or is missing; 2 nothing to compare.
    """
    from dfrot_lab import files, manifest, notebooks
    from dfrot_lab import verify as verifying

    root = project_root()
    try:
        profiles.load(profile)
        if against is None and profile != "demo":
            raise verifying.VerifyError(
                f"profile {profile!r} has no committed reference (figures/ holds demo; "
                "docs/reproducing.md says why): name other results with --against FOLDER"
            )
        names = [notebooks.find(name, root).stem for name in only]
        report = verifying.verify(
            profile,
            folder or root / options.home(profile),
            against or root / "figures",
            asked=names,
            every=every,
            tolerant=tolerant,
        )
    except (
        manifest.ManifestError,
        notebooks.NotebookError,
        profiles.ProfileError,
        verifying.VerifyError,
    ) as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(2) from error
    if out:
        files.write_json(out, report.as_json())
    click.echo("\n".join(report.text()))
    raise SystemExit(0 if report.reproduced else 1)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results/demo"))
@click.option(
    "--to", type=click.Path(path_type=Path), default=Path("figures"), help="Committed figures."
)
def publish(folder: Path, to: Path) -> None:
    """Copy figures, captions and results of FOLDER into figures/, with their SHA256SUMS, for committing.

    FOLDER may also be the .json of a benchmark, written into figures/ or elsewhere.
    """
    from dfrot_lab import files, manifest

    if folder.is_file() and folder.suffix == ".json":
        if folder.name in ("result.json", "provenance.json", "speed.json"):
            raise click.ClickException(f"{folder} is a notebook's: publish the folder of its run")
        files.read_json(folder)
        target = to / folder.name
        to.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and target.samefile(folder)):
            shutil.copyfile(folder, target)
        click.echo(target)
        manifest.write(to, [folder.name])
        return
    sources = sorted(folder.glob("*/result.json"))
    if not sources:
        raise click.ClickException(f"{folder} holds no result.json: run `make figures` first")
    for source in sources:
        target = to / source.parent.name
        target.mkdir(parents=True, exist_ok=True)
        beside = [p for pattern in ("tables_*", "speed.json") for p in source.parent.glob(pattern)]
        figures = source.parent.glob("figures/[!.]*")
        for file in [source, source.with_name("provenance.json"), *figures, *beside]:
            shutil.copyfile(file, target / file.name)
        click.echo(target)
    manifest.write(to, [source.parent.name for source in sources])


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--profile", help="As elsewhere.  [default: the experiment's, else demo]")
@click.option("--experiment", help="One of experiments.yml, for its profile.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The site.  [default: results/PROFILE/gallery]"
)
def gallery(
    folder: Path | None, profile: str | None, experiment: str | None, out: Path | None
) -> None:
    """Build a static site of FOLDER's claims, figures, executed notebooks and experiments.

    It asks no other host. Without FOLDER: results/PROFILE, and the committed figures/ for notebooks that
    were not run there.
    """
    from dfrot_lab import experiments
    from dfrot_lab import gallery as sites

    root = project_root()
    if experiment:
        profile = profile or experiments.default_profile(experiment, root)
    profiles.path(profile or "demo")  # an unknown one is told
    home = root / options.home(profile or "demo")
    out = out or home / "gallery"
    shown = sites.build([folder] if folder else [home, root / "figures"], out, root)
    for origin, names in shown.items():
        click.echo(
            f"from {origin}: {', '.join(names)}" if origin else f"no result: {', '.join(names)}"
        )
    click.echo(out / "index.html")

"""Commands that make R1 and merge it: collect, optimize, merge."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from dfrot_lab import profiles
from dfrot_lab.cli import options
from dfrot_lab.presets import PRESETS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["collect", "merge", "optimize"]


@click.command()
@options.profile
@options.model_and_corpus
@options.folder
@click.option("--hessians", type=int, help="Instead, Hessians for GPTQ from so many windows.")
def collect(
    profile: str,
    model: str | None,
    corpus: str | None,
    folder: Path | None,
    hessians: int | None,
) -> None:
    """Collect the calibration activations: the outputs of every in-layer norm."""
    from dfrot_lab import kept_files

    lab = options.lab(profile, folder, model=model, corpus=corpus, weight_windows=hessians)
    with kept_files.recording(lab.folder):
        if hessians:
            click.echo(f"Hessians of {hessians} windows in {lab.hessians.folder}")
            return
        x = lab.activations
        click.echo(f"{len(x.sites)} sites × {x.X.shape[1]} tokens × {x.d} channels")


QUANTIZED = ("centroids", "least_squares")  # objectives with the quantizer in the loop


class _Start(click.ParamType):
    """RH, RO, or a .safetensors file that is there."""

    name = "RH|RO|FILE"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in ("RH", "RO"):
            return value
        if not value.endswith(".safetensors"):
            self.fail(f"{value!r} is not one of 'RH', 'RO', and no .safetensors file", param, ctx)
        if not Path(value).is_file():
            self.fail(f"{value} does not exist: make it with `dfrot-lab optimize`", param, ctx)
        return value


@click.command()
@options.profile
@options.model_and_corpus
@click.option("--all", "every", is_flag=True, help="Every rotation the profile's notebooks share.")
@click.option("--start", type=_Start(), default="RH", help="Or the R1 of a .safetensors file.")
@click.option(
    "--gamma", type=float, default=100.0, help="Weight of massive rows; inf for them alone."
)
@click.option("--seed", type=options.SEED, default=0, help="Of the start.")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="A named way to refine; settles --gamma, --form … --iterations.",
)
@click.option(
    "--form", type=click.Choice(["sum", "group_mean"]), default="sum", help="Of the loss."
)
@click.option("--symmetric", is_flag=True, help="The symmetric quantizer in the loop, as released.")
@options.objective
@click.option(
    "--relax",
    type=click.FloatRange(0, 2, min_open=True, max_open=True),
    default=1.0,
    help="ω of over-relaxed steps: with centroids 1.6 gets as low in fewer.",
)
@click.option(
    "--stop",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="End when ten steps lower the loss by a lesser share, such as 0.001; 0 never.",
)
@click.option("--iterations", type=click.IntRange(min=1), help="Override the profile's number.")
@click.option(
    "--solver",
    type=click.Choice(["svd", "fast"]),
    help="The plain step, or the fast one (docs/optimiser.md).  [default: the profile's, else svd]",
)
@options.folder
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Also write R1 there (.safetensors); with --all, their names and hashes (.json).",
)
@click.pass_context
def optimize(
    ctx, profile, model, corpus, every, start, gamma, seed, preset, form, symmetric, objective,
    relax, stop, iterations, solver, folder, out,
) -> None:  # fmt: skip
    """Refine R1 (DFRot); save it as safetensors with metadata. Resumes when interrupted."""
    warm = start not in ("RH", "RO")
    _refuse(ctx, every, preset, warm, out)
    if symmetric and objective not in QUANTIZED:
        raise click.UsageError(
            f"--symmetric is of the quantizer in the loop, and --objective {objective} has none: leave one "
            "or the other out"
        )
    from dfrot_lab import files, kept_files, rotations, warm_starts

    lab = options.lab(
        profile, folder, model=model, corpus=corpus, solver=solver,
        iterations=iterations if every else None,
    )  # fmt: skip
    if every:
        settings, made = profiles.load(profile), {}
        common, shared = settings["common"], settings["rotations"]
        wanted = product(shared["starts"], common["seeds"], shared.get("gammas", [common["gamma"]]))
        with kept_files.recording(lab.folder):
            for kind, n, weight in wanted:
                path = lab.rotation_file(f"DFRot({kind})", n, gamma=weight)
                made[path.name] = files.sha256(path)
                click.echo(path)
            if out:
                files.write_json(out, made)
        return
    how = {"gamma": gamma, "form": form, "symmetric": symmetric, "objective": objective}
    how |= {"relax": relax, "stop": stop, "iterations": iterations}
    with kept_files.recording(lab.folder):
        if preset and warm:
            path = warm_starts.by_preset(lab, start, PRESETS[preset])
        elif warm:
            path = warm_starts.rotation_file(lab, start, **how)
        elif preset:
            path = PRESETS[preset].rotation_file(lab, seed, start)
        else:
            path = lab.rotation_file(f"DFRot({start})", seed, **how)
    if out:
        r, about = rotations.load(path)
        if not out.exists():
            rotations.save(out, r, about)
        elif not _holds(out, r):
            raise click.ClickException(
                f"{out} exists and is another file: choose another name. This R1 is kept as {path}"
            )
    click.echo(out or path)


def _holds(out: Path, r: Tensor) -> bool:
    """Whether `out` is a file with this R1."""
    from dfrot_lab import rotations

    try:
        return rotations.load(out)[0].equal(r)
    except rotations.RotationError:
        return False


def _refuse(
    ctx: click.Context, every: bool, preset: str | None, warm: bool, out: Path | None
) -> None:
    """Options of `optimize` that contradict each other, told before any work."""
    by_hand = ["gamma", "form", "symmetric", "objective", "relax", "stop"]
    settled = {"preset": [*by_hand, "iterations"]} if preset else {}
    settled |= {"start": ["seed"]} if warm else {}
    settled |= {"all": ["start", "seed", "preset", *by_hand]} if every else {}
    for one, others in settled.items():
        given = [n for n in others if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE]
        if given:
            told = ", ".join(f"--{name}" for name in given)
            raise click.UsageError(f"--{one} settles {told}: leave one or the other out")
    suffix = ".json" if every else ".safetensors"
    if out and out.suffix != suffix:
        what = "names and hashes" if every else "R1 as safetensors"
        raise click.UsageError(f"--out {out} gets {what}: give it the ending {suffix}")


@click.command()
@click.argument("model")
@click.option("--rotation", required=True, help="R1 as .safetensors, from `optimize`.")
@click.option(
    "--r2/--no-r2", default=True, help="Also R2 of every head: the file's, or a Hadamard."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new folder.")
def merge(model: str, rotation: str, r2: bool, out: Path) -> None:
    """Merge R1 (and R2) into the safetensors checkpoint in folder MODEL, tensor by tensor.

    MODEL may also be 'demo' or a .gguf file: then its dequantized folder is read.
    """
    from dfrot_lab import checkpoints, model_folders, rotation_files

    source = model_folders.find(model)
    both = rotation_files.for_merging(rotation, model, source, r2=r2)
    click.echo(checkpoints.merge(source, out, both))

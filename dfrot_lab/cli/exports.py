"""Commands: `dfrot-lab export hf|gguf|compressed|rotation` and `dfrot-lab import-rotation`."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from dfrot_lab import profiles
from dfrot_lab.cli import options
from dfrot_lab.presets import PRESETS

__all__ = ["export", "import_rotation"]

_GROUP = {"help_option_names": ["-h", "--help"], "show_default": True}
_PATH = click.Path(path_type=Path)


def _model(function):
    text = "demo, a Hugging Face id, a folder, or a .gguf file."
    revision = click.option("--revision", help="Branch, tag or commit of a model on the hub.")
    return click.option("--model", default="demo", help=text)(revision(function))


def _rotation(function):
    text = "NR (none), RO, RH, RH2, or a .safetensors file from `optimize` or `export rotation`."
    kind = options.SEED
    seed = click.option("--seed", type=kind, default=0, help="Of a rotation given by name.")
    r2 = click.option("--r2/--no-r2", default=True, help="Also R2, the values of every head.")
    return click.option("--rotation", required=True, help=text)(seed(r2(function)))


def _out(kind: str):
    return click.option("--out", required=True, type=_PATH, help=f"The new {kind}.")


@click.group(context_settings=_GROUP)
def export() -> None:
    """Write a rotated model for other engines; what is written is loaded again and compared."""


@export.command()
@_model
@_rotation
@_out("folder")
def hf(model, revision, rotation, seed, r2, out) -> None:
    """A Hugging Face folder in floating point, R1 and R2 merged."""
    from dfrot_lab.exports import huggingface

    _write(huggingface.write, model, revision, rotation, seed, r2, out)


@export.command()
@_model
@_rotation
@_out(".gguf file")
@click.option("--dtype", type=click.Choice(["F32", "F16"]), default="F32", help="Of matrices.")
@click.option("--pre", help="llama.cpp's name of the pre-tokenizer, where it is not known here.")
@click.option("--vocabulary/--no-vocabulary", default=True, help="Without: for token ids alone.")
def gguf(model, revision, rotation, seed, r2, out, dtype, pre, vocabulary) -> None:
    """A GGUF file for llama.cpp, which quantizes it from there."""
    from dfrot_lab.exports import gguf as writer

    how = {"dtype": dtype, "pre": pre, "vocabulary": vocabulary}
    _write(writer.write, model, revision, rotation, seed, r2, out, **how)


@export.command()
@_model
@_rotation
@_out("folder")
@click.option("--bits", type=click.Choice(["4-4-16", "4-8-16"]), default="4-4-16", help="W-A-KV.")
@click.option("--symmetric", is_flag=True, help="Activations symmetric, as more kernels have them.")
@click.option("--packed", is_flag=True, help="Eight codes to an int32, not one to an int8.")
@click.option("--method", type=click.Choice(["rtn", "gptq"]), default="rtn", help="Of the weights.")
@click.option(
    "--profile", default="demo", help="Calibration text and windows for GPTQ; clip steps."
)
@click.option("--corpus", help="Other than the profile's.")
def compressed(
    model, revision, rotation, seed, r2, out, bits, symmetric, packed, method, profile, corpus
) -> None:
    """A compressed-tensors folder: 4-bit weights, activations quantized at run time."""
    from dfrot_lab.exports import compressed as writer

    common = profiles.load(profile)["common"]
    how = {"bits": bits, "symmetric": symmetric, "packed": packed, "method": method}
    how["clip_steps"] = common.get("clip_steps", 80)
    if method == "gptq":
        from dfrot_lab import corpora, models

        how["calibration"] = corpora.load(
            corpus or common["corpus"],
            "calibration",
            models.load_tokenizer(model, revision=revision),
            windows=common.get("weight_windows", 128),
            seqlen=common.get("seqlen", 2048),
            seed=common.get("calibration_seed", 0),
        )
    _write(writer.write, model, revision, rotation, seed, r2, out, **how)


def _write(write, model, revision, rotation, seed, r2, out, **how) -> None:
    from dfrot_lab.exports import sources

    out.parent.mkdir(parents=True, exist_ok=True)
    with sources.opened(model, revision, near=out.parent) as source:
        found = write(source, out, sources.recipe(rotation, source, seed=seed, r2=r2), **how)
    click.echo(f"{out}: {', '.join(found['merged']) or 'nothing'} merged")


@export.command()
@click.option("--profile", default="demo", help="As in `dfrot-lab optimize`.")
@click.option("--model", help="demo, a Hugging Face id, a folder, or a .gguf file.")
@click.option("--revision", help="Branch, tag or commit that the model on the hub must be at.")
@click.option("--corpus", help="demo, lee, pydoc, wikitext2, c4, or a text file.")
@click.option("--folder", type=_PATH, help="Where artefacts are kept.  [default: results/PROFILE]")
@click.option("--start", type=click.Choice(["RH", "RO"]), default="RH")
@click.option("--gamma", type=float, default=100.0, help="Weight of massive rows.")
@click.option("--seed", type=options.SEED, default=0, help="Of the start.")
@options.objective
@click.option("--iterations", type=click.IntRange(min=1), help="Override the profile's number.")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="Instead of --gamma, --objective and --iterations.",
)
@click.option("--r2/--no-r2", default=True, help="Also the Hadamard R2 of a head.")
@_out(".safetensors file")
@click.pass_context
def rotation(
    ctx, profile, model, revision, corpus, folder, start, gamma, seed, objective, iterations, preset, r2,
    out,
) -> None:  # fmt: skip
    """R1 (and R2) alone, refined now or taken from FOLDER, with all that it was made for."""
    by_hand = [n for n in ("gamma", "objective", "iterations")
               if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE]  # fmt: skip
    if preset and by_hand:
        raise click.UsageError(
            f"--preset settles --{', --'.join(by_hand)}: leave one or the other out"
        )
    from dfrot_lab import checkpoints, hub, rotations
    from dfrot_lab.exports import rotation_files, sources
    from dfrot_lab.rotation_files import load

    if out.exists():
        raise sources.ExportError(f"{out} exists: choose another file, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    lab = options.lab(profile, folder, model=model, corpus=corpus)
    with sources.opened(lab.model, revision, near=out.parent) as source:
        default = hub.commit(lab.model)
        if revision and source.revision != default:
            raise sources.ExportError(
                f"revision = {revision!r} is {source.revision}, and R1 is refined on {default}: fetch that "
                "revision into a folder and give it as --model"
            )
        owner, (d, size) = source.owner, checkpoints.sizes(source.folder)
    if preset:
        path, lab = PRESETS[preset].rotation_file(lab, seed, start), PRESETS[preset].lab(lab)
    else:
        how = {"gamma": gamma, "objective": objective, "iterations": iterations}
        path = lab.rotation_file(f"DFRot({start})", seed, **how)
    found = load(path, owner, d, size)
    about = {"preset": preset} if preset else {}
    about |= sources.short(found.about)
    about |= {"calibration_tokens": lab.inputs["calibration_tokens"]}
    second = None
    if r2:
        second = rotations.random_hadamard(size)
        about["R2"] = {"rotation": "RH", "seed": 0}
    click.echo(rotation_files.write(out, found.R1, second, about))


@click.command("import-rotation", context_settings=_GROUP)
@click.argument("file", type=_PATH)
@_model
@click.option("--transpose", is_flag=True, help="The file means x → xRᵀ, not x → xR.")
@_out(".safetensors file")
def import_rotation(file, model, revision, transpose, out) -> None:
    """R1 from a .npy FILE, as the paper's authors save it: re-orthogonalised, and by how much."""
    from dfrot_lab.exports import rotation_files, sources

    out.parent.mkdir(parents=True, exist_ok=True)
    with sources.opened(model, revision, near=out.parent) as source:
        d = source.config["hidden_size"]
        r1, found = rotation_files.read_npy(file, d, transpose=transpose)
        about = {"model": source.model, "revision": source.revision}
        about |= {"fingerprint": source.fingerprint, "imported": found.about}
    rotation_files.write(out, r1, None, about)
    click.echo(
        f"max|RᵀR − I| = {found.before:.2e} before, {found.after:.2e} after; moved by "
        f"{found.moved:.2e} (Frobenius), {found.largest:.2e} at most"
    )
    click.echo(out)

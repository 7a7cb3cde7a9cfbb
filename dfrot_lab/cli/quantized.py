"""Commands on quantized models: quantize, eval, generate."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
from click.core import ParameterSource

from dfrot_lab import __version__, values
from dfrot_lab.cli import options

__all__ = ["evaluate", "generate", "quantize"]


@click.command()
@options.profile
@options.model_and_corpus
@click.option("--rotation", default="DFRot(RH)", help="NR, RO, RH, DFRot(RH), or a .safetensors.")
@click.option("--gamma", type=float, default=100.0, help="Of DFRot.")
@options.weights
@options.folder
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new folder.")
def quantize(profile, model, corpus, rotation, gamma, bits, method, seed, folder, out) -> None:
    """Rotate and quantize; write the dequantized weights as a Hugging Face folder.

    Activations and KV cache are quantized at run time: `dfrot_lab.quantized_folder.load`.
    """
    from dfrot_lab import kept_files, quantized_folder

    values.check(rotation=rotation, gamma=gamma, bits=bits)
    lab = options.quantizing(profile, folder, model=model, corpus=corpus)
    if out.exists():  # before the model is loaded
        raise click.ClickException(f"{out} exists: choose another folder, or delete it")
    spec = lab.spec(bits, "none", method)
    quantized_folder.check(out, lab.lm)  # before hours of GPTQ
    with kept_files.recording(lab.folder):
        built = lab.quantized(rotation, seed, bits=bits, method=method, gamma=gamma)
    about = {"model": lab.model, "rotation": rotation, "seed": seed, "bits": bits}
    about |= {"gamma": gamma if rotation.startswith("DFRot(") else None}
    about |= {"method": method if spec.weights else None, "version": __version__}
    click.echo(quantized_folder.save(built, lab.tokenizer, out, about))


@click.command(name="eval")
@options.profile
@options.model_and_corpus
@click.option("--rotation", multiple=True, help="Repeatable.  [default: FP, RO, RH and DFRot(RH)]")
@click.option(
    "--quantized", type=click.Path(path_type=Path), help="A folder of `quantize` instead."
)
@click.option("--gamma", type=float, default=100.0, help="Of DFRot.")
@options.weights
@click.option("--windows", type=int, default=2, help="Of perplexity; 0: the whole split.")
@click.option("--zero-shot", is_flag=True, help="Also the two tasks that work offline.")
@click.option(
    "--task", multiple=True, help="Zero-shot tasks: piqa, …, mmlu with the hub; repeatable."
)
@click.option("--items", type=int, default=500, help="Of each of our own tasks.")
@options.folder
@click.option(
    "--out", type=click.Path(path_type=Path), help="Also write the numbers there (.json)."
)
@click.pass_context
def evaluate(
    ctx, profile, model, corpus, rotation, quantized, gamma, bits, method, seed, windows, zero_shot,
    task, items, folder, out,
) -> None:  # fmt: skip
    """Perplexity, and zero-shot accuracy through lm-eval, as a table; what is measured is kept.

    A second table has the paired differences from RH (from the first model where RH is not asked for).
    """
    from dfrot_lab import files, kept_files, scores
    from dfrot_lab.zero_shot import OFFLINE

    settled = ("rotation", "gamma", "bits", "method", "seed", "model") if quantized else ()
    given = [n for n in settled if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE]
    if given:
        told = ", ".join(f"--{name}" for name in given)
        raise click.UsageError(f"--quantized settles {told}: leave one or the other out")
    names = list(rotation) or ["FP", "RO", "RH", "DFRot(RH)"]
    rotated = [name for name in names if name != "FP"]
    values.check(rotation=rotated, gamma=gamma, bits=bits, windows=windows, items=items)
    tasks = list(dict.fromkeys([*(OFFLINE if zero_shot else ()), *task]))
    lab = options.quantizing(profile, folder, model=model, corpus=corpus)
    how, paired = {"windows": windows, "tasks": tasks, "items": items}, []
    about = dict(lab.about)
    if quantized:
        rows = [scores.of_folder(lab, quantized, **how)]
        about |= {"model": rows[0].pop("model"), "quantized": str(quantized)}
    else:
        how |= {"bits": bits, "method": method, "gamma": gamma}
        with kept_files.recording(lab.folder):
            rows = scores.measured(lab, names, seed, **how)
        paired = scores.differences(rows)
    if out:
        files.write_json(out, {"rows": rows, "differences": paired, "about": about})
    click.echo(scores.scores_table(rows))
    if paired:
        click.echo(f"\n{scores.differences_table(paired)}")


@click.command()
@click.argument("prompt")
@options.profile
@options.model_and_corpus
@options.weights
@click.option("--tokens", type=int, default=60, help="How many to write.")
@click.option("--chat", is_flag=True, help="PROMPT is a message, in the model's chat template.")
@options.folder
def generate(prompt, profile, model, corpus, bits, method, seed, tokens, chat, folder) -> None:
    """Continue PROMPT greedily in floating point, with RH and with DFRot at 4 bits, side by side."""
    from dfrot_lab import kept_files, side_by_side

    values.check(bits=bits, tokens=tokens)
    lab = options.quantizing(profile, folder, model=model, corpus=corpus)
    if lab.model.startswith("tiny:"):
        told = f"model {lab.model!r} has random weights: what it writes means nothing"
        click.echo(told, err=True)
    how = {"tokens": tokens, "bits": bits, "method": method, "seed": seed, "chat": chat}
    with kept_files.recording(lab.folder):
        rows = side_by_side.texts(lab, prompt, **how)
    click.echo(side_by_side.columns(rows, shutil.get_terminal_size((100, 24)).columns))

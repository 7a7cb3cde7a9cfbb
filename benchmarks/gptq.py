"""Time of GPTQ of the demo model, as published and from shared Hessians; wanted: under five minutes each.

The gate comes first: the output error of every linear is below that of round-to-nearest.
"""

import tempfile
import time

import click
import torch

from dfrot_lab import corpora, gptq, hessians, models, rotations
from dfrot_lab.quantizers import QuantSpec, round_to_nearest
from dfrot_lab.rotations import Rotations

SPEC = QuantSpec(symmetric=True, granularity="channel")


def rtn_errors(
    model: torch.nn.Module, of: hessians.Hessians, rotation: Rotations, steps: int
) -> dict:
    """Relative output error of each linear quantized by RTN, on the Hessians of the same tokens."""
    hessian, out = of.of(rotation), {}
    for layer in models.layers(model):
        for linears in layer.groups:
            h = hessian(layer.index, next(iter(linears)))
            for name, linear in linears.items():
                w = linear.weight.double()
                lost = w - round_to_nearest(linear.weight, SPEC, steps=steps).double()
                error, whole = (((m @ h) * m).sum().item() for m in (lost, w))
                out[f"layers.{layer.index}.{name}"] = error / whole
    return out


@click.command()
@click.option(
    "--windows", default=32, help="Calibration windows of 2048 tokens; the paper has 128."
)
@click.option("--clip-steps", default=10, help="Of the clip search; the paper has 80.")
@click.option("--threads", default=2)
def main(windows: int, clip_steps: int, threads: int) -> None:
    """Collect, quantize in both ways, check, print."""
    torch.set_num_threads(threads)
    tokenizer = models.load_tokenizer("demo")
    tokens = corpora.load("demo", "calibration", tokenizer, windows=windows, seqlen=2048, seed=0)
    how = gptq.GPTQ(clip_steps=clip_steps)

    def rotated() -> tuple[torch.nn.Module, Rotations]:
        model = models.load("demo")
        r = Rotations.standard(model, rotations.random_hadamard(model.config.hidden_size, 0))
        return rotations.merge(model, r), r

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        shared = hessians.collect(models.load("demo"), tokens, folder, {})
        collected = time.perf_counter() - start
        model, rotation = rotated()
        rtn = rtn_errors(model, shared, rotation, clip_steps)
        start = time.perf_counter()
        errors = {"gptq-shared": gptq.quantize_with(model, shared.of(rotation), SPEC, how)}
        columns = time.perf_counter() - start
    model, rotation = rotated()
    start = time.perf_counter()
    online = rotations.online(model, rotation)
    errors["gptq"] = gptq.quantize_layers(model, tokens, SPEC, how, online=online)
    published = time.perf_counter() - start
    for method, found in errors.items():
        worse = [name for name, error in found.items() if error >= rtn[name]]
        assert not worse, f"{method} is no better than RTN at {', '.join(worse)}"
        ratios = torch.tensor([found[name] / rtn[name] for name in found])
        print(
            f"{method}: output error {ratios.median():.2f} × RTN's in the median linear, "
            f"{ratios.max():.2f} × at most, below it in all {len(found)}"
        )
    print(f"gptq, as published, {windows} × 2048 tokens: {published:.0f} s")
    print(f"gptq-shared: Hessians once {collected:.0f} s, then {columns:.0f} s a rotation")


if __name__ == "__main__":
    main()

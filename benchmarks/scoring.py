"""Time of a W16A4 forward with R4 over that of the floating-point model, in one run; wanted: 1.5 at most."""

import statistics
import time

import click
import torch

from dfrot_lab import corpora, evaluation, models, quantized_model, rotations
from dfrot_lab.rotations import Rotations


@click.command()
@click.option("--rounds", default=5, help="Timed pairs; their order alternates.")
@click.option("--threads", default=2)
def main(rounds: int, threads: int) -> None:
    """Check both, then time them in turn on one 2048-token window of the demo model."""
    torch.set_num_threads(threads)
    model, tokenizer = models.load("demo"), models.load_tokenizer("demo")
    window = corpora.load("demo", "evaluation", tokenizer, windows=1, seqlen=2048)[0]
    rotation = Rotations.standard(model, rotations.random_hadamard(model.config.hidden_size, 0))
    exact = quantized_model.build(model, rotation, quantized_model.ModelSpec(activations=None))
    wanted, found = (evaluation.window_nll(m, window) for m in (model, exact))
    assert abs(found / wanted - 1) < 1e-4, "the rotated model does not compute the original"
    quantized = quantized_model.requantize(exact, rotation, quantized_model.ModelSpec.of("16-4-16"))
    evaluation.window_nll(quantized, window)  # once before the clock
    times: dict[str, list[float]] = {"floating point": [], "W16A4": []}
    for i in range(rounds):
        pair = [("floating point", model), ("W16A4", quantized)]
        for name, m in pair if i % 2 else pair[::-1]:
            start = time.perf_counter()
            evaluation.window_nll(m, window)
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        print(f"{name}: {statistics.median(seconds):.2f} s a window, {min(seconds):.2f} at best")
    ratios = [q / f for f, q in zip(*times.values(), strict=True)]
    print(f"W16A4 / floating point: {statistics.median(ratios):.2f} (median of {rounds} pairs)")


if __name__ == "__main__":
    main()

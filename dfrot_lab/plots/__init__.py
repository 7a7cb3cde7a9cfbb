"""Plots: a result.json goes in, a figure with its caption comes out; no model and no torch.

Every figure of `FIGURES` is also a function of this module: `plots.error_scatter(result)`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from dfrot_lab import files, results
from dfrot_lab.plots import style
from dfrot_lab.plots.gammas import gamma_sweep, gamma_sweep_w4a4
from dfrot_lab.plots.int4_kernels import nibble_packing, packed_memory
from dfrot_lab.plots.int4_speed import TIMED, kernel_speed, roofline
from dfrot_lab.plots.invariance import (
    logit_errors,
    magnitude_surfaces,
    outliers_by_layer,
    top_activations,
)
from dfrot_lab.plots.kept_tokens import exempted_tokens, massive_tokens_fp16
from dfrot_lab.plots.landscape import gain_by_weight, loss_landscape
from dfrot_lab.plots.objectives import cost_and_quality, objective_screening, prefix_in_cache
from dfrot_lab.plots.paper_tables import calibration_ablation, tables_by_bits
from dfrot_lab.plots.questions import (
    begin_of_sequence,
    clipping,
    column_cosines,
    corpus_transfer,
    error_by_site,
    recollected,
    refined_surfaces,
    slips,
    static_steps,
    task_loss,
)
from dfrot_lab.plots.refined import (
    dfrot_perplexity,
    dfrot_scatter,
    loss_curves,
    massive_token,
    rotation_distance,
)
from dfrot_lab.plots.style import FIGURES, FigureSpec
from dfrot_lab.plots.token_errors import (
    error_bars_3d,
    error_by_layer,
    error_quantiles,
    error_scatter,
    ratio_by_kurtosis,
)
from dfrot_lab.plots.why_it_works import (
    composed_hadamard,
    gaussian_floor,
    hadamard_wins,
    massive_rule,
    spikes_in_noise,
    spikes_under_hadamard,
)
from dfrot_lab.plots.zero_shot import paired_accuracy, perplexity_and_accuracy, zero_shot_accuracy

__all__ = [
    "FIGURES",
    "FigureSpec",
    "PlotError",
    "begin_of_sequence",
    "calibration_ablation",
    "caption",
    "clipping",
    "column_cosines",
    "composed_hadamard",
    "corpus_transfer",
    "cost_and_quality",
    "dfrot_perplexity",
    "dfrot_scatter",
    "draw",
    "draw_notebook",
    "error_bars_3d",
    "error_by_layer",
    "error_by_site",
    "error_quantiles",
    "error_scatter",
    "exempted_tokens",
    "gain_by_weight",
    "gamma_sweep",
    "gamma_sweep_w4a4",
    "gaussian_floor",
    "hadamard_wins",
    "kernel_speed",
    "logit_errors",
    "loss_curves",
    "loss_landscape",
    "magnitude_surfaces",
    "massive_rule",
    "massive_token",
    "massive_tokens_fp16",
    "nibble_packing",
    "objective_screening",
    "outliers_by_layer",
    "packed_memory",
    "paired_accuracy",
    "perplexity_and_accuracy",
    "prefix_in_cache",
    "ratio_by_kurtosis",
    "recollected",
    "redraw",
    "refined_surfaces",
    "roofline",
    "rotation_distance",
    "save",
    "slips",
    "spikes_in_noise",
    "spikes_under_hadamard",
    "static_steps",
    "tables_by_bits",
    "task_loss",
    "top_activations",
    "zero_shot_accuracy",
]

CAPTIONS = style.SHEET.with_name("captions.yml")


class PlotError(ValueError):
    """A figure or caption that does not exist; one line: what, which name, what to do."""


def draw(name: str, result: dict[str, Any]) -> Figure:
    """The figure `name` of FIGURES, drawn from its notebook's result."""
    return _spec(name).draw(result)


def caption(name: str, result: dict[str, Any]) -> str:
    """The caption of `name`, its numbers taken from `result`."""
    numbers = _spec(name).numbers(result)
    template = _templates().get(name)
    if template is None:
        raise PlotError(f"figure {name!r} has no caption: write one in {CAPTIONS.name}")
    try:
        return " ".join(template.format_map(numbers).split())
    except KeyError as error:
        raise PlotError(
            f"the caption of {name!r} asks for {error.args[0]!r}: not counted"
        ) from None


def save(fig: Figure, name: str, folder: str | Path, caption: str) -> list[Path]:
    """Write NAME.pdf, NAME.png and NAME.md (the caption): the same bytes on every run, each atomic."""
    folder = Path(folder)
    paths = [folder / f"{name}{suffix}" for suffix in (".pdf", ".png", ".md")]
    with style.context():
        with files.atomic(paths[0]) as partial:
            fig.savefig(partial, metadata={"CreationDate": None})
        with files.atomic(paths[1]) as partial:
            fig.savefig(partial, metadata={"Software": None})
    with files.atomic(paths[2]) as partial:
        partial.write_text(caption.strip() + "\n", encoding="utf-8")
    return paths


def draw_notebook(notebook: str, folder: str | Path) -> list[Path]:
    """Draw every figure of `notebook` from folder/result.json into folder/figures/.

    What was timed is in speed.json beside it, since it differs between runs; the figures that show it are
    left out where it is not there.
    """
    names = [name for name, spec in FIGURES.items() if spec.notebook == notebook]
    if not names:
        raise PlotError(
            f"notebook {notebook!r} has no figures: use one of {', '.join(_notebooks())}"
        )
    result, timed = results.load(folder), Path(folder) / "speed.json"
    if timed.is_file():
        result["speed"] = files.read_json(timed)
    names = [name for name in names if "speed" in result or name not in TIMED]
    return [
        path
        for name in names
        for path in save(draw(name, result), name, Path(folder) / "figures", caption(name, result))
    ]


def redraw(root: str | Path) -> list[Path]:
    """`draw_notebook` for each folder of `root` that is named as a notebook and holds a result."""
    folders = [n for n in _notebooks() if (Path(root) / n / "result.json").is_file()]
    if not folders:
        raise results.ResultError(f"{root} holds no NOTEBOOK/result.json: run `make figures` first")
    return [path for name in folders for path in draw_notebook(name, Path(root) / name)]


def _spec(name: str) -> FigureSpec:
    if name not in FIGURES:
        raise PlotError(f"figure {name!r} is unknown: use one of {', '.join(FIGURES)}")
    return FIGURES[name]


def _notebooks() -> list[str]:
    return sorted({spec.notebook for spec in FIGURES.values()})


@lru_cache(maxsize=1)
def _templates() -> dict[str, str]:
    return yaml.safe_load(CAPTIONS.read_text(encoding="utf-8"))

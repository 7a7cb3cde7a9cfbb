"""Value: what a parameter may be, by its name, told before a model is loaded or a notebook runs.

The parsers are those that read the values later; each is imported when there is something for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dfrot_lab.files import project_root, read_json

__all__ = ["ParameterError", "check", "check_length", "check_sites"]

# decoder layers of what is known without a file: SmolLM2, pinned by its SHA-256, and `models.tiny`
LAYERS = {"demo": 30, "tiny": 2}


class ParameterError(ValueError):
    """A value that a parameter cannot have; one line: which, what, what is allowed."""


def check(**given: Any) -> None:
    """ParameterError unless each value, or each entry of a list, is one that its parameter may have.

    No number may be negative; bits, methods, objectives, tasks … must be known; of a name that nothing is
    known about, every other value is let by.
    """
    for name, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            if one is None:  # an option that was not given
                continue
            if isinstance(one, int | float) and one < 0:
                raise ParameterError(f"parameter {name} = {one!r} is negative: use 0 or more")
            try:
                _TESTS.get(name, lambda _: None)(one)
            except ValueError as error:
                told = str(error) if str(error).startswith(name) else f"{name}: {error}"
                raise ParameterError(f"parameter {told}") from error


def check_sites(model: str | None, site: str | None, sites: Iterable[int] | None) -> None:
    """ParameterError for a site, or a number of sites, that `model` has not.

    Of a model whose number of layers nothing here tells (one of the hub that was never fetched, a .gguf
    file) the activations tell it.
    """
    layers = _layers(model)
    if layers is None:
        return
    if site is not None and int(site.split(".")[1]) >= layers:
        raise ParameterError(
            f"parameter site = {site!r}: model {model!r} has layers.0 to layers.{layers - 1}"
        )
    for count in sites or ():
        if not 1 <= count <= 2 * layers:
            raise ParameterError(
                f"parameter sites = {count}: model {model!r} has 1 to {2 * layers} norm sites"
            )


def check_length(name: str, length: int | None, seqlen: int | None) -> None:
    """ParameterError for a length beyond the windows that pieces of it are cut from."""
    if length is not None and seqlen is not None and not 1 <= length <= seqlen:
        raise ParameterError(f"parameter {name} = {length}: use 1 to seqlen, which is {seqlen}")


def _layers(model: str | None) -> int | None:
    """Decoder layers of `model`; None where they are not known without loading or asking the hub."""
    if model is None:
        return None
    if (known := LAYERS.get(model.split(":")[0])) is not None:
        return known
    file = project_root() / model / "config.json"
    if not file.is_file() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json")
        file = Path(cached) if isinstance(cached, str) else file
    try:
        return int(read_json(file)["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):  # told when the model is loaded
        return None


def _bits(value: str) -> None:
    from dfrot_lab.quantized_model import ModelSpec

    ModelSpec.of(str(value))


def _two(value: int) -> None:
    if value < 2:
        raise ValueError(f"steps = {value}: use two points or more")


def _weight_bits(value: str) -> None:
    from dfrot_lab.quantized_model import ModelSpec

    if ModelSpec.of(str(value)).weights is None:
        raise ValueError(f"all_bits = {value!r} leaves weights as they are: use such as 4-4-16")


def _activations(field: str) -> Callable[[Any], None]:
    def test(value: Any) -> None:
        from dfrot_lab.quantizers import QuantSpec

        QuantSpec(**{field: value})

    return test


def _objective(value: str) -> None:
    from dfrot_lab import objectives
    from dfrot_lab.quantizers import QuantSpec

    objectives.named(value, QuantSpec())


def _method(value: str, *refused: str) -> None:
    from dfrot_lab.lab import METHODS

    _one_of("method", value, [m for m in METHODS if m not in refused])


def _dtype(value: str) -> None:
    from dfrot_lab.models import DTYPES

    _one_of("dtype", value, DTYPES)


def _device(value: str) -> None:
    import torch

    try:
        torch.device(value)
    except RuntimeError:
        raise ValueError(f"device = {value!r}: use cpu or cuda") from None


def _backend(value: str) -> None:
    from dfrot_kernels.backends import MODULES

    _one_of("model_backend", value, MODULES)


def _task(value: str) -> None:
    from dfrot_lab import zero_shot

    zero_shot.check([value])


def _corpus(value: str) -> None:
    """A known name, or a text file here or in the project, where notebooks run; '' is none."""
    from dfrot_lab import corpora

    inside = project_root() / value
    if value:
        corpora.check(str(inside) if inside.is_file() else value)


def _rotation(value: str) -> None:
    from dfrot_lab import refinements, rotations

    if value.endswith(".safetensors"):
        rotations.load(value)
    else:
        refinements.parse_rotation(value)


def _site(value: str) -> None:
    if not re.fullmatch(r"layers\.\d+\.(attention|mlp)", value):
        raise ValueError(f"site = {value!r}: use layers.N.attention or layers.N.mlp, N from 0")


def _one_of(name: str, value: Any, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} = {value!r}: use one of {', '.join(known)}")


_TESTS: dict[str, Callable[[Any], None]] = {
    **dict.fromkeys(
        ("bits", "final_bits", "side_bits", "gptq_bits", "static_bits", "screen_bits"),
        _bits,
    ),
    "steps": _two,
    "all_bits": _weight_bits,
    "abits": _activations("bits"),
    "clips": _activations("clip"),
    "objectives": _objective,
    "method": _method,
    "gptq": lambda value: _method(value, "rtn"),
    "dtype": _dtype,
    "device": _device,
    "model_backend": _backend,
    "tasks": _task,
    **dict.fromkeys(("corpus", "corpora", "second"), _corpus),
    "rotation": _rotation,
    "site": _site,
}

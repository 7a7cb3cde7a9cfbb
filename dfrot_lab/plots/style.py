"""The look of every figure: widths, a colour, marker and line for each rotation, small helpers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dfrot_lab.results import ResultError

__all__ = [
    "COLOUR",
    "COLUMN",
    "FIGURES",
    "LABEL",
    "LINE",
    "MARKER",
    "PAGE",
    "FigureSpec",
    "LabFigure",
    "context",
    "figure",
]

SHEET = Path(__file__).resolve().parents[1] / "data" / "style.mplstyle"
COLUMN, PAGE = 3.3, 6.75  # inches

_NAMES = ("NR", "RO", "RH", "RH2", "DFRot", "massive", "ink")
_CYCLE = mpl.rc_params_from_file(SHEET, use_default_template=False)["axes.prop_cycle"]
COLOUR = {
    name: "#" + c.lstrip("#") for name, c in zip(_NAMES, _CYCLE.by_key()["color"], strict=True)
}
COLOUR |= {"FP": "#000000", "DFRot(RO)": COLOUR["DFRot"], "DFRot(RH)": COLOUR["DFRot"]}
MARKER = {"NR": "X", "RO": "s", "RH": "o", "RH2": "^", "DFRot": "D", "massive": "*", "FP": "_"}
MARKER |= {"DFRot(RO)": "d", "DFRot(RH)": "D"}  # diamonds, of which the thin one started from RO
LINE = {"NR": ":", "RO": "-", "RH": "-", "RH2": "--", "DFRot": "-", "FP": (0, (4, 2))}
LINE |= {"DFRot(RO)": (0, (4, 1.2, 1, 1.2)), "DFRot(RH)": (0, (4, 1.2))}
LABEL = {"RH2": "RH²"}  # where it differs from the name in a result


def percent(value: float) -> str:
    """Two digits, without an exponent: 0.18 %, 68 %, 100 %."""
    return f"{value:.0f} %" if abs(value) >= 10 else f"{value:.2g} %"


def context() -> AbstractContextManager[None]:
    """The style sheet alone, whatever the caller has set, until the block ends."""
    return matplotlib.style.context(SHEET, after_reset=True)


class LabFigure(Figure):
    """A Figure that carries its style with it and shows itself in Jupyter, with pyplot or without."""

    def draw(self, renderer: Any) -> None:
        """Draw under the style sheet, so that it looks the same shown as saved."""
        with context():
            super().draw(renderer)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        buffer, (width, height) = BytesIO(), self.get_size_inches()
        with context():
            self.savefig(buffer, format="png", dpi=192, metadata={"Software": None})
        return buffer.getvalue(), {"width": round(96 * width), "height": round(96 * height)}


@dataclass(frozen=True)
class FigureSpec:
    """A figure: the notebook whose result it shows, result → Figure, result → caption's numbers."""

    notebook: str
    draw: Callable[[dict[str, Any]], LabFigure]
    numbers: Callable[[dict[str, Any]], dict[str, Any]]


FIGURES: dict[str, FigureSpec] = {}


def figure(notebook: str, numbers: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable:
    """Enter the decorated function into FIGURES under its name; it then draws in the style sheet.

    A key that the result lacks raises ResultError.
    """

    def register(function: Callable[[dict[str, Any]], LabFigure]) -> Callable:
        name = function.__name__

        @wraps(function)
        def styled(result: dict[str, Any]) -> LabFigure:
            with context(), complete(name, notebook):
                return function(result)

        def counted(result: dict[str, Any]) -> dict[str, Any]:
            with complete(name, notebook):
                return numbers(result)

        FIGURES[name] = FigureSpec(notebook, styled, counted)
        return styled

    return register


@contextmanager
def complete(name: str, notebook: str) -> Iterator[None]:
    """Turn a missing key into one line that names figure, key and notebook."""
    try:
        yield
    except KeyError as error:
        raise ResultError(
            f"figure {name!r} needs {error.args[0]!r}, which the result does not hold: "
            f"run notebook {notebook} again"
        ) from error


# --- numbers ------------------------------------------------------------------------------------


def array(values: Any) -> np.ndarray:
    """Floats of a result, where None is NaN and NaN and infinities may be strings."""
    if isinstance(values, np.ndarray):
        return values.astype(float)
    if isinstance(values, list | tuple):
        if values and isinstance(values[0], list | tuple):
            return np.array([array(v) for v in values])
        return np.array([np.nan if v is None else float(v) for v in values], dtype=float)
    return np.array(np.nan if values is None else float(values))


def number(value: float | str | None, digits: int = 2) -> str:
    """1,234 or 12.30: a figure as the reader wants it, ∞ and 'no value' among them."""
    value = float(array(value))
    if math.isnan(value):
        return "no value"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def power(value: float) -> str:
    """2.3e-6 as 2.3 × 10⁻⁶."""
    if not value or not math.isfinite(value):
        return number(value, 0)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10" + str(int(exponent)).translate(
        str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    )


def count(n: int, noun: str) -> str:
    """'1 seed', '3 seeds', 'no seed'."""
    return f"{n:,} {noun}s" if n > 1 else f"{n or 'no'} {noun}"


def site_order(site: str) -> tuple[int, str]:
    """(12, 'mlp') of 'layers.12.mlp'."""
    head, kind = site.rsplit(".", 1)
    return int(head.rsplit(".", 1)[-1]), kind


def visible(text: str, longest: int = 12) -> str:
    """A token with its white space shown: ␣ ↵ ⇥; what no font here draws as U+XXXX."""
    signs = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "$": r"\$"}
    shown = [
        signs.get(c, c if c.isprintable() and ord(c) < 0x2500 else f"U+{ord(c):04X}") for c in text
    ]
    shown = shown if len(shown) <= longest else [*shown[: longest - 1], "…"]
    return "".join(shown) or "∅"


def apart(places: Iterable[float], gap: float) -> list[float]:
    """The places, moved as little as needed to lie `gap` or more from each other, order kept."""
    places = list(places)
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[list[int]] = []
    centre = lambda g: sum(places[i] for i in g) / len(g)  # noqa: E731
    for i in order:
        groups.append([i])
        while (
            len(groups) > 1
            and centre(groups[-1]) - centre(groups[-2])
            < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            last = groups.pop()
            groups[-1] += last
    out = [0.0] * len(places)
    for g in groups:
        for k, i in enumerate(g):
            out[i] = centre(g) + gap * (k - (len(g) - 1) / 2)
    return out


# --- drawing ------------------------------------------------------------------------------------


def label(name: str) -> str:
    """The rotation's name as printed."""
    return LABEL.get(name, name)


def new(width: float, height: float) -> LabFigure:
    """An empty figure of a width on the page, in inches."""
    return LabFigure(figsize=(width, height))


def note(axes: Axes, text: str, x: float = 0.5, y: float = 0.5, **options: Any) -> None:
    """Say in the figure what it cannot show."""
    options = {"ha": "center", "va": "center", "fontsize": 7, "color": "#666666"} | options
    axes.text(x, y, text, **({"transform": axes.transAxes} | options))


def log_ticks(axis: Any, low: float, high: float) -> None:
    """Plain numbers at 1, 2, 5 on a log axis of up to two decades, else powers of ten."""
    decades = math.log10(high / low) if high > low > 0 else 1.0
    if decades > 4:
        return
    choices = [
        (0.8, (1.0, 2.0, 3.0, 4.0, 5.0, 7.0)),
        (1.1, (1.0, 2.0, 3.0, 5.0)),
        (1.6, (1.0, 2.0, 5.0)),
        (2.6, (1.0, 3.0)),
        (4.0, (1.0,)),
    ]
    subs = next(s for most, s in choices if decades <= most)
    axis.set_major_locator(MaxNLocator(5) if decades < 0.4 else LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1000 else f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def limits(values: Iterable[float], log: bool = False, margin: float = 0.06) -> tuple[float, float]:
    """The range of all finite (and, for a log axis, positive) values, with a margin."""
    v = np.asarray(list(values), dtype=float)
    v = v[np.isfinite(v) & ((v > 0) | (not log))]
    if not len(v):
        return (0.1, 10.0) if log else (0.0, 1.0)
    low, high = (np.log(v.min()), np.log(v.max())) if log else (v.min(), v.max())
    pad = margin * (high - low) or (0.7 if log else 0.1 * abs(high) or 1.0)
    return (math.exp(low - pad), math.exp(high + pad)) if log else (low - pad, high + pad)


def wide(values: list[float]) -> bool:
    """Whether the positive ones are more than fourfold apart: a log axis serves them better."""
    finite = [v for v in values if math.isfinite(v) and v > 0]
    return bool(finite) and max(finite) > 4 * min(finite)

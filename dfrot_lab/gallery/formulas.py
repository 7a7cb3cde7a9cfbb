"""Formulas: LaTeX becomes MathML when the site is built, so that a page needs no script for them."""

from __future__ import annotations

import re
from xml.etree import ElementTree

__all__ = ["FormulaError", "mathml"]

# thin spaces that hold a sign to its operand in TeX and only widen MathML
_FINE = re.compile(r"\\!")


class FormulaError(ValueError):
    """A formula that cannot be rendered; one line: which, why, what to do."""


def mathml(latex: str, display: bool = False) -> str:
    """The formula as a `<math>` element, its source as `alttext`.

    FormulaError where the converter fails, gives no well-formed XML, or lets a command through as text.
    """
    from latex2mathml.converter import convert

    source = " ".join(latex.split())
    try:
        text = convert(_FINE.sub("", source), display="block" if display else "inline")
        root = ElementTree.fromstring(text)
    except Exception as error:  # the converter raises its own, IndexError, KeyError …
        raise FormulaError(
            f"formula {source!r} has no MathML ({type(error).__name__}: {error}): "
            "write it with commands that latex2mathml knows"
        ) from error
    left = [t for t in root.itertext() if re.search(r"\\[a-zA-Z]", t)]
    if left:
        raise FormulaError(
            f"formula {source!r}: {left[0]!r} is unknown to latex2mathml: use another command"
        )
    alt = source.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<math ", f'<math alttext="{alt}" ', 1)

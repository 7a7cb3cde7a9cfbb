"""Formulas: LaTeX becomes MathML when the site is built, so that a page needs no script for them."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

__all__ = ["FormulaError", "mathml"]

_OPEN, _CLOSE = ("(", "[", "{", "⟨"), (")", "]", "}", "⟩", "!")
_BARS = ("|", "‖")
_SIGNS = ("+", "−", "±", "∓")
_LIMITS = ("min", "max", "sup", "inf", "lim")
_SCRIPTS = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}
_SCRIPTS |= {v: v for v in _SCRIPTS.values()}
_PARTS = {"mfrac": 2, "msub": 2, "msup": 2, "mroot": 2, "munder": 2, "mover": 2, "msubsup": 3}
_TIGHT = {"lspace": "0", "rspace": "0"}


class FormulaError(ValueError):
    """A formula that cannot be rendered; one line: which, why, what to do."""


def mathml(latex: str, display: bool = False) -> str:
    """The formula as a `<math>` element, its source as `alttext`.

    FormulaError where the converter fails, gives no well-formed XML, or lets a command through as text.
    """
    from latex2mathml.converter import convert

    source = " ".join(latex.split())
    try:
        # TeX's negative thin space only widens MathML; in HTML the element needs no namespace
        text = convert(source.replace(r"\!", ""), display="block" if display else "inline")
        root = ElementTree.fromstring(re.sub(r' xmlns="[^"]*"', "", text, count=1))
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
    for element in root.iter():
        if len(element) != _PARTS.get(element.tag, len(element)):
            raise FormulaError(
                f"formula {source!r} lacks a part of its <{element.tag}>: complete it"
            )
    _space(root, display)
    root.set("alttext", source)
    return ElementTree.tostring(root, encoding="unicode")


def _space(root: Element, display: bool) -> None:
    """Set fences, signs, slashes, functions and limits as TeX does; MathML's defaults are wider."""
    opened = dict.fromkeys(_BARS, False)  # |x| and ‖x‖: every other bar closes
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in [e for e in root.iter() if not len(e)]:
        text = element.text or ""
        if element.tag == "mo" and text in _BARS:
            opened[text] = not opened[text]
            element.set("form", "prefix" if opened[text] else "postfix")
            element.attrib |= {"fence": "true", "stretchy": "false"} | _TIGHT
        elif element.tag == "mo" and text == "/":
            element.attrib |= _TIGHT
        elif text in _SIGNS and _is_sign(element, parents):
            element.tag = "mo"
            element.attrib |= {"form": "prefix"} | _TIGHT
        elif text in ("∞", "⊤"):
            element.tag = "mi"  # things, not operators
        elif element.tag == "mi" and "Α" <= text <= "Ω" and len(text) == 1:
            element.set("mathvariant", "normal")  # TeX's capitals are upright
        elif element.tag in ("mi", "mo") and re.fullmatch("[a-z]{2,}", text) and text != "mod":
            element.tag = "mi"
            _apply(element, parents, display)


def _is_sign(element: Element, parents: dict[Element, Element]) -> bool:
    """Whether a + or − in a row is a sign: an operator or an opening stands before it."""
    row = list(parents[element])
    before = [e for e in row[: row.index(element)] if e.tag != "mspace"]
    if not before:
        return parents[element].tag in ("math", "mrow")
    last = before[-1]
    return last.tag == "mo" and (last.text or "") not in _CLOSE and last.get("form") != "postfix"


def _apply(function: Element, parents: dict[Element, Element], display: bool) -> None:
    """Limits below and above in a display; a thin space behind a function, where no bracket follows."""
    whole = outer = function
    while outer in parents and outer.tag != "mfrac":
        outer = parents[outer]
    display = display and outer.tag != "mfrac"  # a fraction's parts are set as in a line of text
    while parents[whole].tag in _SCRIPTS and parents[whole][0] is whole:
        whole = parents[whole]
        if display and function.text in _LIMITS:
            whole.tag = _SCRIPTS[whole.tag]
    row = parents[whole]
    place = list(row).index(whole) + 1
    if row.tag not in ("math", "mrow", "mstyle") or place == len(row):
        return
    following = next(e for e in row[place].iter() if not len(e))
    if following.tag != "mspace" and (following.text or "") not in _OPEN:
        row.insert(place, Element("mspace", {"width": "0.167em"}))

"""Rendering: notebooks, captions and claims to HTML, formulas to MathML; nothing is fetched by a reader."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from html import unescape
from importlib import resources
from typing import Any

from jinja2 import pass_context
from nbconvert.exporters.html import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from traitlets.config import Config

from dfrot_lab.gallery.entries import Scrubber
from dfrot_lab.gallery.formulas import mathml

__all__ = ["claim", "coded", "inline", "markdown", "notebook", "plain", "title"]

_INTO_CHECKOUT = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")
_DRAWN = re.compile(r'plots\.draw\(\s*"(\w+)"')
_IMAGES = ("image/png", "image/jpeg")
_LINE = 24  # signs of a formula that fit into any line


class _Renderer(IPythonRenderer):
    """nbconvert's Markdown, with MathML for formulas and headings one level down, below the page's."""

    def block_math(self, body: str) -> str:
        return f'<div class="formula">{mathml(body, display=True)}</div>'

    def inline_math(self, body: str) -> str:
        found = mathml(body)
        signs = len(unescape(re.sub(r"<[^>]+>", "", found)))
        # MathML is not broken into lines: what may be wider than a phone scrolls there by itself
        return f'<span class="long">{found}</span>' if signs > _LINE else found

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        level = min(level + 1, 6)
        return f"<h{level}>{text}</h{level}>\n"


class _Exporter(HTMLExporter):
    """The notebook's cells alone, in our template; images go to files."""

    @pass_context
    def markdown2html(self, context, source):
        return markdown(source)


def markdown(source: str) -> str:
    """Markdown with formulas as HTML; a formula that stands alone is no paragraph."""
    text = MarkdownWithMath(renderer=_Renderer(escape=False)).render(source)
    return re.sub(r'<p>(<div class="formula".*?</div>)</p>', r"\1", text, flags=re.S)


def inline(source: str) -> str:
    """One paragraph of Markdown without its `<p>`."""
    return markdown(source).strip().removeprefix("<p>").removesuffix("</p>")


def plain(source: str) -> str:
    """Markdown as text alone, for an alternative text."""
    return " ".join(unescape(re.sub(r"<[^>]+>", "", inline(source))).split())


def coded(text: str) -> str:
    """Plain text as HTML, what stands in backticks as code: claims are written like this."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def title(node: Any, name: str) -> str:
    """The notebook's first heading, without Markdown's signs; its name in words where it has none."""
    for cell in node.cells if node else []:
        found = re.match(r"# (.+)", cell.source) if cell.cell_type == "markdown" else None
        if found:
            return plain(found[1])
    number, _, words = name.partition("_")
    return f"{number.lstrip('0')} · {words.replace('_', ' ')}"


def claim(node: Any) -> str:
    """The paragraph that says what the notebook claims, as HTML; empty where there is none."""
    for cell in node.cells if node else []:
        found = re.search(r"\*\*Claim\.\*\*\s*(.+?)(?:\n\n|\Z)", cell.source, re.S)
        if cell.cell_type == "markdown" and found:
            return inline(found[1])
    return ""


def notebook(
    node: Any, name: str, captions: Mapping[str, str], scrub: Scrubber
) -> tuple[str, dict[str, bytes]]:
    """The cells as HTML, and the images they show by their path in the site (NAME/…).

    captions: figure → caption, which become alternative texts. The first heading is the page's title and
    not repeated.
    """
    node = _prepared(node, captions, scrub)
    config = Config()
    config.HTMLExporter.preprocessors = []
    config.HTMLExporter.default_preprocessors = [
        "nbconvert.preprocessors.ExtractOutputPreprocessor"
    ]
    config.ExtractOutputPreprocessor.enabled = True
    config.ExtractOutputPreprocessor.extract_output_types = set(_IMAGES)
    exporter = _Exporter(
        config=config,
        template_name="notebook",
        extra_template_basedirs=[str(resources.files(__package__) / "templates")],
    )
    found = {"output_files_dir": name, "unique_key": "output"}
    body, about = exporter.from_notebook_node(node, resources=found)
    return body, dict(about.get("outputs") or {})


def _prepared(node: Any, captions: Mapping[str, str], scrub: Scrubber) -> Any:
    """A copy that names no machine and whose images have alternative texts."""
    import nbformat

    node = nbformat.from_dict(dict(deepcopy(node), metadata=_language(node)))
    first = next((c for c in node.cells if c.cell_type == "markdown"), None)
    if first:
        first.source = re.sub(r"\A# .+\n*", "", first.source)
    for cell in node.cells:
        cell.source = scrub(cell.source)
        if cell.cell_type == "markdown":  # a file of the checkout is not part of the site
            cell.source = _INTO_CHECKOUT.sub(r"\1 (`\2`)", cell.source)
        cell.metadata = {"tags": cell.metadata.get("tags", [])}
        if cell.cell_type == "code":
            drawn = _DRAWN.findall(cell.source)
            figure = drawn[-1] if drawn else ""
            alt = plain(captions[figure]) if figure in captions else f"Output: {figure or 'image'}"
            cell.outputs = [_output(output, alt, scrub) for output in cell.outputs]
    return node


def _output(output: Any, alt: str, scrub: Scrubber) -> Any:
    if "data" in output:  # images are base64, which may look like a path
        output.data = {
            kind: scrub.value(data) if kind.startswith("text/") else data
            for kind, data in output.data.items()
        }
        output.metadata = {kind: {"alt": alt} for kind in _IMAGES if kind in output.data}
    for key in ("text", "traceback", "evalue"):
        if key in output:
            output[key] = scrub.value(output[key])
    return output


def _language(node: Any) -> dict[str, Any]:
    return {k: v for k, v in node.metadata.items() if k in ("kernelspec", "language_info")}

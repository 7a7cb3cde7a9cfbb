"""Wikipedia: the demo articles as clean prose, out of a MediaWiki dump; cleaned once, then cached."""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from filelock import FileLock
from tqdm import tqdm

from dfrot_lab import assets, files

if TYPE_CHECKING:
    from mwparserfromhell.nodes import Tag, Template
    from mwparserfromhell.wikicode import Wikicode

__all__ = ["CorpusError", "articles"]

CLEANER_VERSION = 1  # raise it whenever the cleaned text changes


class CorpusError(ValueError):
    """A corpus is unknown, unreachable or too short; the message says what to do."""


def articles() -> list[dict[str, str]]:
    """The demo articles, [{title, text}] in the order of the dump; cleaned once, then cached."""
    source = assets.path("wikipedia")
    digest = assets.ASSETS["wikipedia"].sha256[:12]
    parser = version("mwparserfromhell")
    cached = source.parent / f"wikipedia-{digest}-v{CLEANER_VERSION}-mwparserfromhell{parser}.json"
    try:
        if not cached.exists():
            with FileLock(source.parent / ".clean.lock"):
                if not cached.exists():  # another process may have written it meanwhile
                    found = list(_parsed(source))
                    with files.atomic(cached) as partial, partial.open("w", encoding="utf-8") as f:
                        json.dump(found, f, ensure_ascii=False, indent=0)
        return json.loads(cached.read_text(encoding="utf-8"))
    except OSError as error:
        raise CorpusError(
            f"corpus 'demo': cannot keep the cleaned text in {source.parent} ({error}): "
            "free some space, or set DFROT_CACHE to a folder you can write to"
        ) from error
    except json.JSONDecodeError as error:
        raise CorpusError(f"corpus 'demo': {cached} is damaged ({error}): delete it") from error


def _parsed(dump: Path) -> Iterator[dict[str, str]]:
    """Articles of a MediaWiki dump: main namespace, no redirects, no disambiguation pages."""
    import mwparserfromhell

    with (
        open(dump, "rb") as raw,
        tqdm.wrapattr(raw, "read", total=dump.stat().st_size, desc="cleaning Wikipedia") as bar,
        bz2.open(bar) as stream,
    ):
        for _, page in ElementTree.iterparse(stream):
            if not page.tag.endswith("}page"):
                continue
            ns = page.tag.removesuffix("page")
            markup = page.findtext(f"{ns}revision/{ns}text") or ""
            if (
                page.findtext(f"{ns}ns") == "0"
                and page.find(f"{ns}redirect") is None
                and not DISAMBIGUATION.search(markup)
            ):
                prose = _prose(mwparserfromhell.parse(_without_blocks(markup)))
                if len(prose.split()) >= ARTICLE_WORDS:
                    yield {"title": page.findtext(f"{ns}title") or "", "text": prose}
            page.clear()


# What the reader of an article does not read as its prose.
DISAMBIGUATION = re.compile(r"\{\{\s*(disambig|disambiguation|hndis|geodis|given name)\b", re.I)
DROPPED_SECTIONS = frozenset({
    "see also", "references", "external links", "further reading", "notes", "bibliography",
    "footnotes", "sources", "citations", "notes and references", "works cited", "gallery",
    "filmography", "discography", "works", "selected works", "primary sources",
    "explanatory notes", "other uses",
})  # fmt: skip
DROPPED_TAGS = frozenset({
    "ref", "references", "table", "gallery", "timeline", "imagemap", "div", "source",
    "syntaxhighlight", "score",
})  # fmt: skip
DROPPED_LINKS = re.compile(r"\s*(file|image|category|media|[a-z]{2,3}|simple)\s*:\S", re.I)
UNSEEN = re.compile(r"<!--.*?-->|<ref\b[^>]*/>|<ref\b[^>]*>.*?</ref\s*>", re.I | re.S)
TABLE = re.compile(r"^[:* \t]*\{\|(?:(?!^[:* \t]*\{\|).)*?^[ \t]*\|\}(?!\})", re.M | re.S)
LEFTOVER = re.compile(r"\[\[|\]\]|\{\||</?ref\b|^\s*[|!}]", re.I)  # a line of broken markup
ARTICLE_WORDS = 100  # shorter articles are lists or stubs
HEADING, ITEM = "\x01", "\x02"  # mark the lines that are headings and list items
ITEM_WORDS = 12  # shorter list items are names and links, not sentences
SHOWN_TEMPLATES = {  # template name -> number of the argument that the reader sees
    "lang": 2, "transl": 3, "quote": 1, "blockquote": 1, "cquote": 1, "nihongo": 1,
    "nowrap": 1, "smaller": 1, "small": 1, "big": 1, "vanchor": 1, "sc": 1, "angbr": 1,
    "frac": 1, "val": 1, "visible anchor": 1, "lang-ar": 1, "lang-sq": 1,
}  # fmt: skip


def _without_blocks(markup: str) -> str:
    """The markup less comments, footnotes and tables, which the parser often fails to close."""
    markup, found = UNSEEN.sub("", markup), 1
    while found:  # innermost tables first
        markup, found = TABLE.subn("", markup)
    return markup


def _prose(code: Wikicode) -> str:
    """Paragraphs and headings of one article, one a line."""
    lines: list[str] = []
    dropped_level = 0  # level of the section being dropped, 0 for none
    for line in _render(code).splitlines():
        if line.startswith(HEADING):
            level, title = int(line[1]), _tidy(line[2:])
            if dropped_level and level > dropped_level:
                continue
            dropped_level = level if title.lower() in DROPPED_SECTIONS else 0
            if lines and lines[-1].startswith(HEADING):
                lines.pop()  # a heading with no prose under it
            if not dropped_level:
                lines.append(HEADING + title)
        elif not dropped_level:
            words = _tidy(line)
            short = line.startswith(ITEM) and len(words.split()) < ITEM_WORDS
            if words and not short and not LEFTOVER.search(words):
                lines.append(words)
    if lines and lines[-1].startswith(HEADING):
        lines.pop()
    return "\n".join(line.removeprefix(HEADING) for line in lines)


def _render(code: Wikicode) -> str:
    """What a reader sees of `code`, still untidy."""
    from mwparserfromhell import nodes

    parts: list[str] = []
    for node in code.nodes:
        match node:
            case nodes.Text():
                parts.append(node.value)
            case nodes.Wikilink():
                if not DROPPED_LINKS.match(str(node.title)):
                    parts.append(_render(node.text or node.title))
            case nodes.Heading():
                title = _render(node.title).replace("\n", " ")
                parts.append(f"\n{HEADING}{node.level}{title}\n")
            case nodes.ExternalLink() if node.title is not None:
                parts.append(_render(node.title))
            case nodes.HTMLEntity():
                parts.append(node.normalize())
            case nodes.Template():
                parts.append(_shown(node))
            case nodes.Tag():
                parts.append(_inside(node))
            case _:
                pass  # comments, template arguments, bare links
    return "".join(parts)


def _inside(tag: Tag) -> str:
    """The part of an HTML or list tag that reads as text."""
    name = str(tag.tag).strip().lower()
    if name in ("li", "dd", "dt") and tag.wiki_markup:
        return ITEM
    if name == "br":
        return " "
    if name in DROPPED_TAGS or tag.contents is None:
        return ""
    if name == "math":  # TeX, on one line
        return str(tag.contents).replace("\n", " ")
    return _render(tag.contents)


def _shown(template: Template) -> str:
    """The part of a template that reads as text; most have none."""
    name, _, value = str(template.name).strip().lower().partition(":")
    args = [_render(p.value).strip() for p in template.params if not p.showkey]
    match name:
        case "convert" | "cvt":  # {{convert|5|km|mi}}, {{convert|5|to|9|km|mi}}
            is_range = args[1:2] in (["to"], ["-"], ["–"], ["and"], ["x"])
            shown = " ".join(args[: 4 if is_range else 2])
        case "as of":
            shown = ("as of " if template.has("lc") else "As of ") + " ".join(args)
        case "formatnum":
            shown = value
        case "chem":
            shown = "".join(args)
        case "nbsp" | "spaces":
            shown = " "
        case _:
            index = SHOWN_TEMPLATES.get(name, 0)
            shown = args[min(index, len(args)) - 1] if index and args else ""
    return shown


def _tidy(line: str) -> str:
    """One line without the gaps and marks that dropped markup leaves."""
    line = line.strip(f"{ITEM}*#:; \t\xa0").replace("\xa0", " ").replace("'''", "")
    line = re.sub(r"''|__[A-Z]+__|\u200b|\ufeff", "", line)
    line = re.sub(r"\(\s*[;,:]?\s*(or|also)?[\s;,:/]*\)|\[\s*\]", "", line)
    line = re.sub(r"\(\s*([;,:]\s*)*", "(", line)
    line = re.sub(r"[;,:]?\s+\)", ")", line)
    line = re.sub(r"[,;]\s*;", ";", line)
    line = re.sub(r"\s+([,.;:!?])(?=\s|$)", r"\1", line)
    return re.sub(r"\s+", " ", line).strip()

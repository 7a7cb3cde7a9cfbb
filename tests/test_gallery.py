"""The gallery: what a page says of a result, whole sites from a tiny folder and figures/, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import nbformat
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure as Canvas

from dfrot_lab import files, gallery, tables
from dfrot_lab.cli import app
from dfrot_lab.gallery import entries, findings, rendering
from dfrot_lab.gallery.formulas import FormulaError, mathml
from dfrot_lab.results import ResultError

ROOT = Path(__file__).parents[1]
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
CLAIMS = [
    {"claim": "`a` is <b>", "paper": "yes (Table 1)", "ours": "1 & 2", "rule": "≤ 2", "agrees": True},
    {"claim": "b", "paper": "5", "ours": "7", "rule": "equal", "agrees": False},
    {"claim": "c", "paper": "not said", "ours": "2", "rule": "≤ 2", "agrees": False},
]  # fmt: skip


class Page(HTMLParser):
    """Elements of a page; a tag that is closed out of turn, or twice the same id, is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        ids = [a["id"] for _, a in self.elements if "id" in a]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # MathML's <mspace/>
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if not {"code", "pre", "script", "style"} & set(self.open):
            self.text.append(data)

    def all(self, tag):
        return [a for t, a in self.elements if t == tag]


def notebook(*cells, path="/some where/checkout/notebooks/98_fake.ipynb"):
    node = nbformat.v4.new_notebook(cells=list(cells))
    node.metadata["papermill"] = {"input_path": path}
    return node


def png(path, size=(2.0, 1.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Canvas(figsize=size).savefig(path, dpi=100)
    return path


def run_folder(home, name="98_fake", claims=CLAIMS, **parameters):
    """A results folder with one notebook, as `dfrot-lab run` leaves it."""
    import base64

    folder = home / name
    parameters = {"model": "tiny", "corpus": "words", "seqlen": 8, "dtype": "float32"} | parameters
    files.write_json(folder / "result.json", {"claims": claims, "parameters": parameters})
    about = {
        "commit": "0123456789abcdef",
        "processor": "Abacus",
        "seconds": 3.5,
        "parameters": parameters,
    }
    files.write_json(folder / "provenance.json", about)
    image = png(folder / "figures" / "dots.png").read_bytes()
    (folder / "figures" / "dots.md").write_text(
        "**Two dots.** |x| of `a` at 5 %.\n", encoding="utf-8"
    )
    (folder / "figures" / "dots.pdf").write_bytes(b"%PDF-1.4\n")
    code = nbformat.v4.new_code_cell('plots.draw("dots", result)', execution_count=1)
    data = {"image/png": base64.b64encode(image).decode(), "text/plain": "<Figure>"}
    code.outputs = [
        nbformat.v4.new_output("execute_result", data, execution_count=1),
        nbformat.v4.new_output("stream", text="saved /some where/checkout/results/x.json"),
    ]
    head = "# 98 · A *fake*\n\n**Claim.** $a_1 < b$ holds.\n\n$$\\sum_i x_i^2$$\n"
    node = notebook(nbformat.v4.new_markdown_cell(head), code)
    nbformat.write(node, folder / "notebook.ipynb")
    return folder


def build(home, tmp_path, root=None):
    gallery.build([home], tmp_path / "site", root or tmp_path)
    return tmp_path / "site"


def check(site):
    """Well-formed, whole, self-contained, described: what holds for every site."""
    pages = {p.name: Page(p) for p in sorted(site.glob("*.html"))}
    for name, page in pages.items():
        ids = {a["id"] for _, a in page.elements if "id" in a}
        assert [t for t, a in page.elements if t == "h1"] == ["h1"], name
        for tag, a in page.elements:
            for key in ("src", "href", "srcset", "data", "poster"):
                url = a.get(key)
                if url is None:
                    continue
                parts = urlsplit(url)
                if parts.scheme:
                    assert (tag, key, parts.scheme) == ("a", "href", "https"), (name, url)
                    continue
                assert not parts.netloc, (name, url)
                target = site / unquote(parts.path) if parts.path else site / name
                assert target.is_file(), (name, url)
                if parts.fragment and parts.path.endswith(".html"):
                    there = {e["id"] for _, e in pages[parts.path].elements if "id" in e}
                    assert parts.fragment in there, (name, url)
                elif parts.fragment:
                    assert parts.fragment in ids, (name, url)
            if tag == "img":
                assert a["alt"].strip(), (name, a)
        assert not re.search(r"\$|\\[a-z]+\{", "".join(page.text)), name  # no formula left as LaTeX
        policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
        assert "default-src 'none'" in policy
        assert "http" not in policy
    for file in site.glob("*.[cj]s*"):
        assert "http" not in file.read_text()
        assert "@import" not in file.read_text()
    return pages


def test_a_run_becomes_a_page(tmp_path):
    site = build(run_folder(tmp_path / "run").parent, tmp_path)
    pages = check(site)
    assert set(pages) == {"index.html", "tables.html", "98_fake.html"}
    text = (site / "98_fake.html").read_text()
    assert "<h1>98 · A fake</h1>" in text
    assert "<code>a</code> is &lt;b&gt;" in text
    words = re.findall(r'class="verdict \w+"><span aria-hidden="true">.</span> ([\w ]+)<', text)
    assert words == ["agrees", "does not agree", "does not hold"]
    assert "<strong>1 of 2</strong> claims of the paper agree" in text
    assert "As executed" in text
    for told in ("0123456789", "Abacus", "3.5 s", "float32"):
        assert told in text
    page = pages["98_fake.html"]
    assert [a["alt"] for a in page.all("img")] == ["Two dots. |x| of a at 5 %."] * 2
    assert (site / "98_fake" / "dots.pdf").is_file()
    assert len(page.all("math")) == 3  # the claim above and in the notebook, and the sum
    front = (site / "index.html").read_text()
    assert "<strong>1 of the 2 claims</strong>" in front
    assert "not the paper" not in front


def test_the_committed_figures_make_a_whole_site(tmp_path):
    shown = gallery.build([ROOT / "figures"], tmp_path / "site", ROOT)
    pages = check(tmp_path / "site")
    notebooks = {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")}
    results = {p.parent.name for p in (ROOT / "figures").glob("*/result.json")}
    assert set(shown["figures"]) == results
    assert set(shown.get("", [])) == notebooks - results
    assert set(pages) == {f"{n}.html" for n in notebooks} | {"index.html", "tables.html"}
    front = (tmp_path / "site" / "index.html").read_text()
    closed = files.read_json(ROOT / "figures/03_massive_tokens_fp16/result.json")["closed"]
    assert f'<p class="big">{closed["of_means"]:.0%}'.replace("%", "\u00a0%") in front
    assert "no number for this finding" not in front
    for name in results:
        text = (tmp_path / "site" / f"{name}.html").read_text()
        assert "Source only." in text
        claims = files.read_json(ROOT / "figures" / name / "result.json")["claims"]
        assert text.count('<th role="rowheader"') == len(claims)
        source = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
        drawn = set(
            re.findall(r'plots\.draw\(\s*"(\w+)"', "\n".join(c.source for c in source.cells))
        )
        assert drawn <= {a.get("id") for a in pages[f"{name}.html"].all("figure")}
    both = (tmp_path / "site" / "tables.html").read_text()
    assert "same order" in both


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    home = run_folder(tmp_path / "run").parent
    for name in ("one", "two"):
        gallery.build([home, ROOT / "figures"], tmp_path / name, ROOT)
    tree = {
        p.relative_to(tmp_path / "one"): p for p in (tmp_path / "one").rglob("*") if p.is_file()
    }
    again = {
        p.relative_to(tmp_path / "two"): p for p in (tmp_path / "two").rglob("*") if p.is_file()
    }
    assert tree.keys() == again.keys()
    assert all(tree[k].read_bytes() == again[k].read_bytes() for k in tree)


def test_no_machine_is_named(tmp_path):
    home = tmp_path / "run"
    folder = run_folder(home, model="/data/big disk/models/llama", corpus=str(tmp_path / "my.txt"))
    cell = nbformat.v4.new_code_cell("1 / 0", execution_count=1)
    lines = [
        f"File \x1b[32m{ROOT}/dfrot_lab/lab.py:12\x1b[39m",
        "File \x1b[32m/opt/env/lib/python3.11/site-packages/torch/x.py\x1b[39m",
        "<td>/a</td> and/or W/A/KV",
    ]
    cell.outputs = [
        nbformat.v4.new_output("error", ename="E", evalue="no /data/x/y/z.bin", traceback=lines)
    ]
    nbformat.write(notebook(cell), folder / "notebook.failed.ipynb")
    site = build(home, tmp_path, ROOT)
    every = "".join(p.read_text() for p in site.rglob("*") if p.suffix in (".html", ".json"))
    for place in (
        str(tmp_path), str(ROOT), "some where", "/data/", "/opt/", str(Path.home()), socket.gethostname(),
    ):  # fmt: skip
        assert place not in every.replace("localhost", ""), place
    assert "…/dfrot_lab/lab.py" in every
    assert "…/x.py" in every
    assert "and/or W/A/KV" in every


def test_a_failed_run_is_shown_as_one(tmp_path):
    home = tmp_path / "run"
    folder = home / "98_fake"
    folder.mkdir(parents=True)
    cell = nbformat.v4.new_code_cell("1 / 0", execution_count=1)
    cell.outputs = [
        nbformat.v4.new_output("error", ename="E", evalue="by <zero>", traceback=["E: by"])
    ]
    nbformat.write(notebook(cell), folder / "notebook.failed.ipynb")
    site = build(home, tmp_path)
    check(site)
    text = (site / "98_fake.html").read_text()
    assert "A run that did not finish" in text
    assert "E: by &lt;zero&gt;" in text
    assert "No result." in text
    assert "did not finish" in (site / "index.html").read_text()
    run_folder(home)
    text = (build(home, tmp_path) / "98_fake.html").read_text()
    assert "everything else on this page is of the last run that did finish" in text


def test_results_of_another_setting_are_not_mixed_in(tmp_path):
    run_folder(tmp_path / "a", "01_here")
    run_folder(tmp_path / "b", "02_alike")
    run_folder(tmp_path / "b", "01_here", claims=[])
    run_folder(tmp_path / "b", "03_other", model="huge")
    shown = gallery.build([tmp_path / "a", tmp_path / "b"], tmp_path / "site", tmp_path)
    assert shown == {"a": ["01_here"], "b": ["02_alike"]}
    shown = gallery.build([tmp_path / "none", tmp_path / "b"], tmp_path / "site", tmp_path)
    assert shown == {"b": ["01_here", "02_alike", "03_other"]}


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda f: (f / "result.json").write_text("{"), ResultError, "result.json is damaged"),
        (lambda f: (f / "result.json").write_text("[1]"), ResultError, "no list of claims"),
        (lambda f: (f / "provenance.json").write_text("{"), gallery.GalleryError, "provenance.json is"),
        (lambda f: (f / "notebook.ipynb").write_text("{"), gallery.GalleryError, "no readable notebook"),
        (lambda f: (f / "figures/dots.md").unlink(), gallery.GalleryError, "no caption dots.md"),
        (lambda f: (f / "figures/dots.png").write_text("x"), gallery.GalleryError, "no PNG"),
        (lambda f: (f / "result.json").unlink(), gallery.GalleryError, "holds no NOTEBOOK/result.json"),
    ],
)  # fmt: skip
def test_damage_is_told_and_the_site_stays(tmp_path, spoil, error, says):
    folder = run_folder(tmp_path / "run")
    site = build(folder.parent, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in site.rglob("*")}
    spoil(folder)
    with pytest.raises(error, match=says) as told:
        build(folder.parent, tmp_path)
    assert "\n" not in str(told.value)
    assert {p: p.stat().st_mtime_ns for p in site.rglob("*")} == before
    assert sorted(os.listdir(tmp_path)) == ["run", "site"]


def test_a_site_that_breaks_halfway_is_not_there(tmp_path):
    folder = run_folder(tmp_path / "run")
    node = nbformat.read(folder / "notebook.ipynb", 4)
    node.cells.append(nbformat.v4.new_markdown_cell(r"$\nosuchcommand{x}$"))
    nbformat.write(node, folder / "notebook.ipynb")
    with pytest.raises(FormulaError, match="nosuchcommand"):
        build(folder.parent, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["run"]


def test_only_a_gallery_is_replaced(tmp_path):
    home = run_folder(tmp_path / "run").parent
    (tmp_path / "site").mkdir()
    site = build(home, tmp_path)  # an empty folder may go
    (site / "old.html").write_text("")
    assert not (build(home, tmp_path) / "old.html").exists()
    shutil.rmtree(site)
    site.mkdir()
    (site / "thesis.tex").write_text("years of work")
    with pytest.raises(gallery.GalleryError, match="is no gallery"):
        build(home, tmp_path)
    assert (site / "thesis.tex").read_text() == "years of work"


def test_no_provenance_is_said(tmp_path):
    folder = run_folder(tmp_path / "run")
    (folder / "provenance.json").unlink()
    site = build(folder.parent, tmp_path)
    check(site)
    assert "No provenance." in (site / "98_fake.html").read_text()


def test_the_command_says_where_from(tmp_path):
    home = run_folder(tmp_path / "run").parent
    done = CliRunner().invoke(app, ["gallery", str(home), "--out", str(tmp_path / "site")])
    assert done.exit_code == 0, done.output
    assert "from run: 98_fake" in done.output
    assert str(tmp_path / "site" / "index.html") in done.output
    done = CliRunner().invoke(
        app, ["gallery", str(tmp_path / "no"), "--out", str(tmp_path / "site")]
    )
    assert done.exit_code == 1
    assert done.output.startswith("Error: ")
    assert "make figures" in done.output


def test_provenance_is_one_click_from_the_front_page(tmp_path):
    gallery.build([ROOT / "figures"], tmp_path / "site", ROOT)
    front = (tmp_path / "site" / "index.html").read_text()
    tiles = re.findall(r'<p class="from">.*?</p>', front)
    differ = re.findall(r"<li><span class=\"verdict no\">.*?</li>", front)
    captions = re.findall(r"<figcaption>.*?</figcaption>", front)
    assert len(tiles) == 6 and differ and len(captions) == 1
    for part in (*tiles, *differ, *captions):
        assert re.search(r'href="\d\d_\w+\.html#provenance"', part), part


def test_every_formula_of_the_notebooks_is_mathml():
    seen = 0
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                html = rendering.markdown("".join(cell["source"]))
                for found in re.findall(r"<math.*?</math>", html, re.S):
                    root = ElementTree.fromstring(found)
                    assert root.get("alttext")
                    assert not [e for e in root.iter() if e.tag == "merror"]
                    seen += 1
    assert seen > 100


@pytest.mark.parametrize("bad", [r"\frac{1}", r"\nosuchcommand{x}", r"\left( x", "x^"])
def test_a_formula_that_cannot_be_rendered_is_named(bad):
    with pytest.raises(FormulaError) as told:
        mathml(bad)
    assert repr(" ".join(bad.split())) in str(told.value)


def test_formulas_are_spaced_as_in_tex():
    def tokens(latex, display=False):
        return [e for e in ElementTree.fromstring(mathml(latex, display)).iter() if not len(e)]

    bars = [t for t in tokens(r"\lVert x\rVert_1 / \lVert y \rVert") if t.text == "‖"]
    assert [t.get("form") for t in bars] == ["prefix", "postfix"] * 2
    assert all(t.get("stretchy") == "false" for t in bars)
    signs = {
        k: [t.get("form") for t in tokens(k) if t.text == "−"] for k in ("a - b", "(-b)", "a^2 - b")
    }
    assert signs == {"a - b": [None], "(-b)": ["prefix"], "a^2 - b": [None]}
    assert [t.tag for t in tokens(r"\log p")] == ["mi", "mspace", "mi"]
    assert "mspace" not in [t.tag for t in tokens(r"\log(p)")]
    assert "<munder>" in mathml(r"\min_R x", True)
    assert "<munder>" not in mathml(r"\frac{\max_k x}{2}", True)
    assert "&lt;" in mathml("a < b").split('alttext="')[1].split('"')[0]


def test_a_finding_without_its_numbers_says_so():
    found = findings.findings(
        {"03_massive_tokens_fp16": {"claims": [], "parameters": {}}, "98_fake": {}}
    )
    assert [(f.value, f.notebook) for f in found] == [("–", "03_massive_tokens_fp16")]
    assert "lacks" in found[0].detail


def test_the_order_of_rows_is_judged_with_its_spread():
    header = ("bits", "weights", "rotation", "perplexity", "sd", "n", "× FP", "A: paper, × FP")
    rows = tuple(
        ("4-4-4", "GPTQ", name, ours, sd, "3", "1", paper)
        for name, ours, sd, paper in [
            ("NR", "1,000.0", "", "∞"), ("RO", "40.0", "1.0", "8.0 (1.2)"),
            ("RH", "30.0", "1.0", "6.0 (1.1)"), ("x", "30.5", "0.1", "5.9 (1.1)"),
            ("y", "20.0", "0.1", "7.0 (1.1)"), ("z", "9.0", "0.1", "–"),
        ]
    )  # fmt: skip
    rows += (("4-4-16", "GPTQ", "RO", "5.0", "", "1", "1", "5.0 (1)"),)
    order = findings.same_order(tables.Table("t", header, rows), 7)
    assert order == ["same", "same", "other", "other", "other", None, None]
    assert findings.same_order(tables.Table("t", header, (*rows[:4], rows[5])), 7) == [
        "same", "same", "spread", "spread", None,
    ]  # fmt: skip


def test_titles_and_claims_come_from_the_notebook():
    node = notebook(
        nbformat.v4.new_markdown_cell("# 1 · $R_1$ *x*\n\n**Claim.** One\nline.\n\nNot this.")
    )
    assert rendering.claim(node) == "One\nline."
    assert rendering.title(None, "07_int4_kernels") == "7 · int4 kernels"
    assert rendering.claim(None) == ""


def test_entries_keep_the_order_in_which_figures_are_drawn(tmp_path):
    folder = run_folder(tmp_path / "run")
    png(folder / "figures" / "alone.png")
    (folder / "figures" / "alone.md").write_text("Alone.")
    (entry,) = entries.read([tmp_path / "run"], tmp_path)
    assert [f.name for f in entry.figures] == ["dots", "alone"]
    assert [f.size for f in entry.figures] == [(200, 100)] * 2

"""The gallery as a reader meets it: a headless Chromium, from a file and from a server of this machine."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from dfrot_lab import experiments, gallery

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[1]
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1280,900",
)  # fmt: skip
NOTEBOOKS = sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
EXECUTED = "03_massive_tokens_fp16"
# every page of the site of figures/, and those of a smoke run that it has nothing like: with outputs, a grid
PAGES = [f"published/{name}" for name in ("index", "tables", *NOTEBOOKS)]
PAGES += [f"run/{name}" for name in ("index", "tables", EXECUTED, "experiment-pair")]
ONCE = pytest.mark.parametrize("base", ["file"], indirect=True)  # what a server changes nothing of
BARE = {"tables", "experiment-pair"}  # no image
BARE |= {n for n in NOTEBOOKS if not (ROOT / "figures" / n / "result.json").is_file()}
# relative luminance of the ground behind an element's text, and of the text
CONTRAST = """
const lum = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = e => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c)) return lum(c);
  }
};
let worst = [99, ""];
for (const e of document.querySelectorAll("main *, header a, footer p")) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility()) continue;
  const pair = [lum(getComputedStyle(e).color), ground(e)].sort((a, b) => b - a);
  const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
  if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 200)];
}
return worst;
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """results/smoke of a project: a notebook as `dfrot-lab run` leaves it, and a grid of two points."""
    root = tmp_path_factory.mktemp("project")
    (root / "notebooks").symlink_to(ROOT / "notebooks")
    grid = {
        "pair": {"notebooks": ["03"], "grid": {"bits": ["16-4-16", "16-8-16"], "seeds": [[0, 1]]}}
    }
    (root / "experiments.yml").write_text(yaml.safe_dump(grid))
    home = root / "results" / "smoke"
    asked = ["run", "03", "--profile", "smoke", "--folder", str(home)]
    done = subprocess.run(
        [sys.executable, "-m", "dfrot_lab.cli", *asked],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = experiments.find("pair", "smoke", root)
    for point in found.points:
        copy = root / point.folder / EXECUTED
        shutil.copytree(home / EXECUTED, copy)
        text = (copy / "result.json").read_text()
        (copy / "result.json").write_text(text.replace("16-4-16", point.values["bits"]))
    experiments.summarize(found)
    return home


@pytest.fixture(scope="module")
def site(tmp_path_factory, run):
    out = tmp_path_factory.mktemp("site") / "a gallery"  # a space, as a reader's folder may have
    gallery.build([ROOT / "figures"], out / "published", ROOT)
    gallery.build([run], out / "run", run.parents[1])
    return out


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(site):
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(scope="module", params=["file", "http"])
def base(request, site):
    return site.as_uri() if request.param == "file" else request.getfixturevalue("server")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install -e '.[browser]'")
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in found.items() if path is None]
    # asked for by name (make test-browser), so that what is missing fails rather than skips
    assert not missing, f"{missing} not found: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(found["chromedriver"])
    )
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def view(browser, base):
    """A function that opens a page in a window of a width, in a theme of the system."""

    def show(page, width=1280, theme="light"):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": theme}]},
        )
        browser.get(f"{base}/{page}.html")
        browser.execute_script(
            "document.querySelectorAll('img').forEach(i => (i.loading = 'eager'))"
        )
        browser.execute_async_script(
            "const done = arguments[0];"
            "Promise.allSettled([...document.images].map(i => i.decode())).then(() => done())"
        )
        return browser

    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    return show


def requested(browser):
    """Every address that the browser asked for, from its performance log."""
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_whole_silent_and_alone(view, base, page):
    browser = view(page)
    images = browser.execute_script(
        "return [...document.images].map(i => [i.src, i.complete && i.naturalWidth, i.alt.trim()])"
    )
    assert images or page.split("/")[1] in BARE
    assert [i for i in images if not i[1] or not i[2]] == []
    assert len(images) >= len(browser.find_elements("css selector", "figure"))
    assert browser.execute_script("return document.styleSheets.length") == 1
    assert browser.get_log("browser") == []
    urls = list(requested(browser))
    assert any(u.endswith(f"{page}.html") for u in urls)
    here = urlsplit(base)
    assert [u for u in urls if urlsplit(u)[:2] != here[:2]] == []


def test_another_host_is_out_of_reach(view):
    """The log does see such a request, and the page's policy stops it."""
    browser = view("published/index")
    list(requested(browser))
    browser.execute_async_script(
        "const i = new Image(); i.onerror = i.onload = () => arguments[0]();"
        "i.src = 'http://elsewhere.invalid/a.png'"
    )
    assert any("Content Security Policy" in e["message"] for e in browser.get_log("browser"))


@ONCE
@pytest.mark.parametrize("width", [390, 768])
@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_wider_than_the_screen(view, page, width):
    browser = view(page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    small = browser.execute_script(
        "return [...document.querySelectorAll('main p, main li, main td')].filter(e =>"
        " e.checkVisibility() && parseFloat(getComputedStyle(e).fontSize) < 12).length"
    )
    assert small == 0


@ONCE
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_text_stands_out_in_either_theme(view, page, theme):
    ratio, where = view(page, theme=theme).execute_script(CONTRAST)
    assert ratio >= 4.5, where  # WCAG 2.2, level AA


def test_the_theme_is_chosen_and_kept(view):
    browser = view("published/index")
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(ground)
    browser.find_element("id", "theme").click()
    dark = browser.execute_script(ground)
    assert light != dark
    assert view("published/tables").execute_script(ground) == dark  # the system still says light
    browser.find_element("id", "theme").click()
    assert browser.execute_script(ground) == light
    browser.execute_script("localStorage.clear()")
    assert view("published/index", theme="dark").execute_script(ground) == dark


def test_the_keyboard_is_enough(view):
    from selenium.webdriver import Keys

    browser = view("published/index")
    press(browser, Keys.TAB)
    focus = browser.switch_to.active_element
    assert focus.text == "Skip to the content"
    assert focus.rect["x"] >= 0  # seen while it has the focus
    press(browser, Keys.ENTER)
    assert browser.switch_to.active_element.get_attribute("id") == "main"
    seen = []
    for _ in range(200):
        press(browser, Keys.TAB)
        focus = browser.switch_to.active_element
        assert focus.tag_name != "body", f"the last notebook's card is not reached: {seen}"
        seen.append(focus.get_attribute("href"))
        # the outline is the element's own, or that of the card whose link it is
        assert browser.execute_script(
            "const e = arguments[0], card = e.closest('.cards li');"
            "return [e, card].some(x => x && getComputedStyle(x).outlineStyle !== 'none')",
            focus,
        ), focus.get_attribute("outerHTML")
        if focus.find_elements("xpath", "self::a[parent::h3]") and focus.text.startswith("9 ·"):
            break
    assert len(seen) > 15
    press(browser, Keys.ENTER)
    assert browser.find_element("css selector", "h1").text.startswith("9 ·")


@ONCE
def test_an_executed_notebook_shows_its_outputs_and_parameters(view):
    browser = view(f"run/{EXECUTED}")
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.notebook img')]"
        ".map(i => [i.getAttribute('src'), i.naturalWidth, i.alt, i.closest('.output') !== null])"
    )
    assert len(shown) >= 2
    for src, width, alt, inside in shown:
        assert src.startswith(f"{EXECUTED}/output_") and width > 100 and inside
        assert len(alt) > 20 and not alt.startswith("Output:")  # the figure's caption
    (cell,) = browser.find_elements("css selector", ".cell.injected")
    assert 'model = "tiny:llama"' in cell.text and cell.is_displayed()
    label = "return getComputedStyle(arguments[0], '::before').content"
    assert "Parameters of this run" in browser.execute_script(label, cell)
    tables = browser.find_elements("css selector", ".notebook .output table")
    assert any("paper says" in t.text for t in tables)
    assert "As executed" in browser.find_element("css selector", "#notebook ~ .note").text
    assert browser.find_elements("css selector", ".output.error") == []


@ONCE
def test_an_experiment_is_found_from_the_front_page(view):
    browser = view("run/index")
    link = browser.find_element("css selector", "#experiments ~ ul h3 a")
    browser.execute_script("arguments[0].click()", link)
    assert browser.find_element("css selector", "h1").text == "Experiment pair"
    table = browser.find_element("css selector", "table.data")
    heads = [e.text for e in table.find_elements("css selector", "thead th")]
    assert heads[-2:] == ["16-4-16", "16-8-16"]
    assert len(table.find_elements("css selector", "tbody tr")) > 3


@ONCE
def test_provenance_is_one_click_from_every_number_of_the_front_page(view):
    browser = view("published/index")
    lost = browser.execute_script(
        "return [...document.querySelectorAll('.tiles li, .differ li, .cards li, figure')]"
        ".filter(e => !e.querySelector('a[href$=\"#provenance\"]')"
        " && !e.textContent.includes('source only')).map(e => e.textContent.slice(0, 60))"
    )
    assert lost == []


def test_formulas_are_drawn(view):
    browser = view("published/08_why_it_works")
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect())"
        ".map(r => [r.width, r.height])"
    )
    assert len(sizes) > 30
    assert all(w > 3 and h > 5 for w, h in sizes)
    bar, below = browser.execute_script(
        "const f = document.querySelector('mfrac'); return [...f.children].map(c => "
        "c.getBoundingClientRect().top)"
    )
    assert below > bar  # a fraction, not a line of text


def test_a_screenshot_has_both_ink_and_ground(view, tmp_path):
    import matplotlib.image

    for theme in ("light", "dark"):
        path = tmp_path / f"{theme}.png"
        assert view("published/index", theme=theme).save_screenshot(str(path))
        grey = matplotlib.image.imread(path)[..., :3].mean(-1)
        assert grey.shape[1] == 1280
        assert grey.max() - grey.min() > 0.7
        assert (grey.mean() > 0.7) == (theme == "light")

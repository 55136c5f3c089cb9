import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_report import LONG_WORD, SCRIPT, sources_of, write_benchmark, write_evaluation, write_training

from longqlora.reporting.html_report import inline_svg, render_report

CHROMIUM = shutil.which("chromium")
PDF_PAGE = re.compile(rb"/Type\s*/Page\b")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder of results with everything but an ablation and tasks of the harness."""
    folder = tmp_path_factory.mktemp("results")
    write_evaluation(folder)
    write_training(folder)
    write_benchmark(folder, "train/long", 90)
    return folder


@pytest.fixture(scope="module")
def report(results) -> Path:
    path = results / "report.html"
    render_report(sources_of(results), str(path))
    return path


class Elements(HTMLParser):
    """Names, ids and addresses of the elements of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.names: Counter[str] = Counter()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names[tag] += 1
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]


@pytest.fixture(scope="module")
def elements(report) -> Elements:
    return Elements(report.read_text())


def test_the_report_is_one_file_that_loads_nothing(elements):
    assert all(address.startswith(("#", "data:")) for address in elements.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & {*elements.names} - {"link"}  # its icon is empty
    assert elements.names["svg"] == 5


def test_ids_are_unique_although_drawings_share_theirs(elements):
    repeated = [name for name, count in Counter(elements.ids).items() if count > 1]
    assert repeated == []
    targets = {address[1:] for address in elements.addresses if address.startswith("#")}
    assert targets <= {*elements.ids}


def test_hostile_texts_are_shown_as_they_are(report, elements):
    assert elements.names["img"] == 0
    assert "&lt;script&gt;document.title" in report.read_text()
    assert "<script" not in report.read_text()
    assert "</pre>&amp;" not in report.read_text()  # of an answer
    assert "&lt;/pre&gt;&amp;amp;" in report.read_text()


def test_the_report_of_an_experiment_is_small(report):
    assert report.stat().st_size < 4 * 2**20


def test_contents_list_the_sections_that_are_there(results, tmp_path):
    evaluation = tmp_path / "evaluation"
    write_evaluation(evaluation)
    html = {}
    for folder in (results, evaluation):
        render_report(sources_of(folder), str(tmp_path / "report.html"))
        html[folder] = (tmp_path / "report.html").read_text()
    sections = {folder: re.findall(r'<section id="(\w+)"', text) for folder, text in html.items()}
    assert sections[results] == [
        "perplexity", "price", "retrieval", "training", "merges", "answers", "data", "cost", "provenance"
    ]  # fmt: skip
    assert sections[evaluation] == ["perplexity", "price", "retrieval", "provenance"]
    for folder, text in html.items():
        assert re.findall(r'<li><a href="#(\w+)">', text) == sections[folder]


def test_a_drawing_has_ids_of_its_own_and_follows_the_color_scheme():
    svg = (
        '<?xml version="1.0"?><svg width="72pt" viewBox="0 0 72 36" version="1.1"><style>*{}</style><!-- x -->'
        '<defs><path id="p"/></defs><use xlink:href="#p" clip-path="url(#p)" style="fill: #ffffff; stroke: #000000"/></svg>'
    )
    drawing = inline_svg(svg, "a-", 'a "plot" & more')
    assert 'id="a-p"' in drawing
    assert 'xlink:href="#a-p" clip-path="url(#a-p)" style="fill: var(--plot); stroke: var(--plot-ink)"' in drawing
    assert 'aria-label="a &quot;plot&quot; &amp; more"' in drawing
    assert "max-width: 96px" in drawing
    assert not {"<style", "<!--", "<?xml"} & {*re.findall(r"<\W*\w*", drawing)}


# --- in a browser ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on the path")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra test")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, report):
    """A function that opens the report, and the messages and requests that this causes."""
    pages = []

    def run(width: int = 1280, color_scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=color_scheme)
        pages.append(page)
        page.heard = []
        page.on("console", lambda message: page.heard.append(message.text))
        page.on("pageerror", lambda error: page.heard.append(str(error)))
        page.on("request", lambda request: page.heard.append(request.url))
        page.goto(report.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        return page

    yield run
    for page in pages:
        page.close()


@pytest.mark.process
def test_a_browser_shows_tables_and_plots_and_asks_for_nothing(opened, report):
    page = opened()
    assert [heard for heard in page.heard if not heard.startswith("data:")] == [report.as_uri()]
    assert page.title().startswith("trial of <script>")
    assert page.locator("table:visible").count() >= 7
    sizes = page.locator(".plot svg").evaluate_all("drawings => drawings.map(each => each.getBoundingClientRect().height)")
    assert len(sizes) == 5
    assert min(sizes) > 100
    assert page.locator("section#perplexity td", has_text="<script>").first.is_visible()
    assert page.locator("article pre", has_text="</pre>&amp;").count() == 1
    assert SCRIPT in page.locator("article h4").inner_text()
    assert LONG_WORD[:100] in page.locator("article .question").inner_text()


@pytest.mark.process
@pytest.mark.parametrize("width", [320, 400, 800, 1280])
def test_the_page_does_not_scroll_sideways(opened, width):
    assert opened(width).evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.process
def test_every_table_can_be_read_on_a_phone_by_scrolling_it(opened):
    page = opened(400)
    outside = page.locator("table").evaluate_all("tables => tables.filter(each => !each.closest('.scroll')).length")
    assert outside == 0
    first = page.locator("#perplexity .scroll").first
    assert first.evaluate("box => (box.scrollLeft = 9999, box.scrollLeft)") > 0


CONTRAST = """
() => {
  const light = color => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255);
    const [r, g, b] = parts.map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (!color.endsWith(', 0)')) return light(color);
    }
    return 1;
  };
  const found = [...document.querySelectorAll('h1, h2, h3, h4, p, td, th, dt, dd, li, nav a, summary, pre, article span')]
    .map(element => [light(getComputedStyle(element).color), behind(element)]);
  const drawings = [...document.querySelectorAll('.plot svg')]
    .map(each => [light(getComputedStyle(each).fill), light(getComputedStyle(each).backgroundColor)]);
  return Math.min(...[...found, ...drawings].map(([a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)));
}
"""
"""The lowest contrast of a text with what is behind it, as WCAG 2 defines it."""


@pytest.mark.process
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_texts_and_plots_are_legible_in_both_color_schemes(opened, color_scheme):
    page = opened(color_scheme=color_scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    is_dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 64
    assert is_dark == (color_scheme == "dark")
    assert page.evaluate(CONTRAST) >= 4.5  # level AA


@pytest.mark.process
def test_the_report_prints_on_white_paper_from_a_dark_screen(opened):
    page = opened(color_scheme="dark")
    pdf = page.pdf(format="A4", print_background=True)
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(PDF_PAGE.findall(pdf)) <= 15
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    paper = page.evaluate("document.documentElement.clientWidth")
    widest = page.locator("table").evaluate_all("tables => Math.max(...tables.map(each => each.getBoundingClientRect().right))")
    assert widest <= paper

"""The report in a browser: every figure drawn, nothing logged, nobody contacted, fit for a phone and the dark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import report_examples as examples
from dropkit.report import to_html
from dropkit.report.html import plots

pytestmark = pytest.mark.browser
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
REPORTS = {
    "regression": examples.regression_report,
    "classification": lambda: examples.classification_report(classes=12),
    "hostile": lambda: examples.classification_report(hostile=True),
}


@pytest.fixture(scope="module")
def figures() -> dict[str, list[str]]:
    """The names of the figures each page must show."""
    return {}


@pytest.fixture(scope="module")
def pages(tmp_path_factory, figures) -> dict[str, Path]:
    """The reports as files."""
    folder, found = tmp_path_factory.mktemp("reports"), {}
    for name, make in REPORTS.items():
        report = make()
        found[name] = folder / f"{name}.html"
        found[name].write_text(to_html(report), encoding="utf-8")
        figures[name] = sorted(plots(report))
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Chromium is not installed; continuous integration must open the report in it.")
        pytest.skip("Chromium is not installed (apt-get install chromium); the report was not opened.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield started
        started.close()


class Opened:
    """A report in a tab, with what it logged and whom it asked for."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str) -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.context.route("**/*", self.answer)
        self.page.goto(path.as_uri())

    def hear(self, message: Any) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)

    def answer(self, route: Any) -> None:
        if route.request.url.startswith(("file:", "data:")):
            route.continue_()
        else:
            self.asked.append(route.request.url)
            route.abort()


@pytest.fixture
def opened(browser, pages, request) -> Iterator[Opened]:
    name, width, scheme = request.param
    tab = Opened(browser, pages[name], width, scheme)
    yield tab
    tab.context.close()


def views(*schemes: str, widths: tuple[int, ...] = (1280,)) -> Any:
    cases = [(name, width, scheme) for name in REPORTS for width in widths for scheme in schemes]
    return pytest.mark.parametrize("opened", cases, indirect=True, ids=lambda case: "-".join(map(str, case)))


DRAWN = """() => [...document.querySelectorAll('svg[data-figure]')].map(svg => {
    const box = svg.getBoundingClientRect();
    const shapes = [...svg.querySelectorAll('path, use')].filter(s => s.closest('defs') === null);
    const seen = shapes.filter(s => { const b = s.getBoundingClientRect(); return b.width + b.height > 0; });
    return {name: svg.dataset.figure, width: box.width, height: box.height, shapes: seen.length,
            words: svg.querySelectorAll('text').length};
})"""


@views("light", "dark", widths=(375, 1280))
def test_every_figure_is_drawn_nothing_is_logged_and_nobody_is_asked(opened, figures, request):
    name = request.node.callspec.params["opened"][0]
    drawn = opened.page.evaluate(DRAWN)
    assert sorted(figure["name"] for figure in drawn) == figures[name]
    for figure in drawn:
        assert figure["width"] > 250, figure
        assert figure["height"] > 100, figure
        assert figure["shapes"] >= 8, figure
        assert figure["words"] >= 6, figure
    assert opened.complaints == []
    assert opened.asked == []


OVERLAPS = """() => [...document.querySelectorAll('svg[data-figure]')].flatMap(svg => {
    const frame = svg.getBoundingClientRect(), found = [];
    const words = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
    const boxes = words.map(t => t.getBoundingClientRect());
    boxes.forEach((a, i) => {
        const inside = a.left > frame.left - 1 && a.right < frame.right + 1
            && a.top > frame.top - 1 && a.bottom < frame.bottom + 1;
        if (!inside)
            found.push(svg.dataset.figure + ': outside: ' + words[i].textContent);
        boxes.slice(i + 1).forEach((b, j) => {
            const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
            const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
            const turned = /rotate\\((?!-?0|-?90)/;
            const slanted = [words[i], words[i + 1 + j]].some(t => turned.test(t.getAttribute('transform') || ''));
            if (w > 1 && h > 2 && !slanted)
                found.push(svg.dataset.figure + ': ' + words[i].textContent + ' / ' + words[i + 1 + j].textContent);
        });
    });
    return found;
})"""


@views("light", widths=(375, 1280))
def test_words_in_figures_neither_overlap_nor_leave_the_frame(opened):
    assert opened.page.evaluate(OVERLAPS) == []


@views("light", widths=(320, 375))
def test_a_phone_scrolls_tables_inside_their_box_and_never_the_page(opened):
    measure = "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wide, shown = opened.page.evaluate(measure)
    assert wide <= shown
    boxes = opened.page.evaluate(
        "() => [...document.querySelectorAll('.table')]"
        ".map(t => [t.scrollWidth, t.clientWidth, getComputedStyle(t).overflowX])"
    )
    assert any(inner > outer for inner, outer, _ in boxes)
    assert {overflow for *_, overflow in boxes} == {"auto"}


COLOURS = """() => ({
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    card: getComputedStyle(document.querySelector('.drawing')).backgroundColor,
    figure: getComputedStyle(document.querySelector('svg[data-figure] text')).fill,
})"""


def lightness(colour: str) -> float:
    red, green, blue = (
        int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3]
    )
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """As the Web Content Accessibility Guidelines 2.2 define it."""
    dark, light = sorted((lightness(a), lightness(b)))
    return (light + 0.05) / (dark + 0.05)


@views("light")
def test_the_button_turns_page_and_figures_dark_and_back(opened):
    light = opened.page.evaluate(COLOURS)
    opened.page.click("#theme")
    dark = opened.page.evaluate(COLOURS)
    assert lightness(light["paper"]) > 0.5 > lightness(dark["paper"])
    assert all(light[part] != dark[part] for part in light)
    opened.page.click("#theme")
    assert opened.page.evaluate(COLOURS) == light


@views("dark")
def test_the_page_follows_the_system(opened):
    dark = opened.page.evaluate(COLOURS)
    assert lightness(dark["paper"]) < 0.1
    opened.page.emulate_media(color_scheme="light")
    assert lightness(opened.page.evaluate(COLOURS)["paper"]) > 0.5
    opened.page.emulate_media(media="print", color_scheme="dark")
    assert lightness(opened.page.evaluate(COLOURS)["paper"]) == pytest.approx(1)


TEXTS = """() => ['body', '.note', '.reading', 'figcaption', 'td', 'thead th', '.below', '.kicker', '.card.good strong',
    '.card.fair strong', '.card.bad strong', 'nav a', 'svg[data-figure] text']
  .flatMap(path => [...document.querySelectorAll(path)].slice(0, 40)).map(part => {
    let under = part;
    while (under && ['rgba(0, 0, 0, 0)', 'transparent'].includes(getComputedStyle(under).backgroundColor))
        under = under.parentElement;
    const svg = part instanceof SVGElement;
    return [part.tagName, part.closest('#predictions svg') ? 'cell' : getComputedStyle(part)[svg ? 'fill' : 'color'],
            getComputedStyle(under).backgroundColor];
  })"""


@views("light", "dark")
def test_text_stands_out_from_what_lies_under_it(opened):
    found = [(tag, text, under) for tag, text, under in opened.page.evaluate(TEXTS) if text != "cell"]
    assert len(found) > 60
    assert [case for case in found if contrast(case[1], case[2]) < 4.5] == []


@views("light")
def test_hostile_names_are_shown_and_do_nothing(opened, request):
    if request.node.callspec.params["opened"][0] == "hostile":
        assert "</svg><script>alert('x')</script>" in opened.page.inner_text("h1")
    assert opened.page.evaluate("() => document.querySelectorAll('script').length") == 1
    assert opened.complaints == []

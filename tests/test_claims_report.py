"""The page of claims: verdicts with their figures, charts drawn, nobody contacted, fit for phones and the dark."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import claim_examples as examples
from dropkit.claims import Chart, Results, Series, Setting
from dropkit.claims.figures import draw
from dropkit.claims.marks import looks_of, power
from dropkit.claims.page import headline, page_of, to_html
from dropkit.claims.runner import write_report
from test_browser import COLOURS, DRAWN, OVERLAPS, Opened, browser, contrast, lightness

__all__ = ["browser"]  # a fixture
CHARTS = [examples.LINE, examples.SCALES, examples.BARS, examples.POINTS, examples.KINDS]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {"plain": to_html(examples.results()), "hostile": to_html(examples.results(hostile=True))}


# --- what stands on the page ---------------------------------------------------------------------------


def test_the_page_says_of_each_claim_what_it_is_and_how_it_fell(pages):
    page = pages["plain"]
    for outcome in examples.results().outcomes:
        section = page[page.index(f'<section id="{outcome.name}"') :].partition("</section>")[0]
        for said in (outcome.title, outcome.article, outcome.condition, outcome.data, outcome.setup):
            assert said in section
        assert all(remark in section for remark in outcome.remarks)
        assert section.count("<svg") == section.count("<figcaption") == len(outcome.charts)
        assert section.count("<tr") == 1 + len(outcome.figures)
        for one in outcome.figures:
            assert one.rule.says in section
            assert one.rule.in_words() in section
            assert one.reason in section
    for left in examples.results().unfinished:
        section = page[page.index(f'<section id="{left.name}"') :].partition("</section>")[0]
        assert left.status in section
        assert left.line.replace("'", "&#39;") in section


def test_every_verdict_is_as_large_as_the_others(pages):
    pills = re.findall(
        r'<p class="ruling"><span class="verdict (\w+)">.*?</span> ([a-z ]+)</span>', pages["plain"]
    )
    assert pills == [
        ("good", "holds"),
        ("bad", "does not hold here"),
        ("fair", "holds within"),
        ("bad", "does not hold here"),
        ("plain", "failed"),
        ("plain", "not run"),
    ]


def test_every_link_leads_somewhere_on_the_page(pages):
    page = pages["hostile"]
    targets = re.findall(r'href="#([^"]+)"', page)
    assert {"holds_here", "falls", "hostile", "lacks"} <= set(targets)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(targets) <= set(ids)


def verdicts(**numbers: int) -> Results:
    found = {one.name: one for one in examples.results().outcomes}
    kinds = {"held": "holds_here", "within": "within", "fell": "falls"}
    return Results(
        Setting(), tuple(found[kinds[kind]] for kind, number in numbers.items() for _ in range(number))
    )


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({}, "No claim has been tried yet."),
        ({"held": 1}, "The claim holds here."),
        ({"fell": 1}, "The claim does not hold here."),
        ({"held": 1, "within": 1}, "Both claims hold here."),
        ({"held": 2, "within": 1}, "All 3 claims hold here."),
        ({"fell": 3}, "None of 3 claims holds here."),
        ({"held": 1, "fell": 1}, "1 of 2 claims holds here; 1 does not."),
        ({"held": 3, "within": 1, "fell": 2}, "4 of 6 claims hold here; 2 do not."),
    ],
)
def test_the_headline_counts(numbers, said):
    assert headline(verdicts(**numbers)) == said


def test_the_cards_count_every_verdict_and_name_the_claims():
    cards = {card.label: (card.value, card.note, card.tone) for card in page_of(examples.results()).cards}
    assert cards == {
        "hold": ("1", "holds here", "good"),
        "hold within their margin": ("1", "within", "fair"),
        "do not hold here": ("2", "falls and opposite", "bad"),
        "failed to run": ("1", "raises", "plain"),
        "not run, a package is missing": ("1", "lacks", "plain"),
    }
    assert page_of(verdicts(held=1)).cards[2] == dataclasses.replace(
        page_of(examples.results()).cards[2], value="0", note="none", tone="plain"
    )


def test_equal_results_give_equal_pages(pages):
    again = Results.from_json(examples.results(hostile=True).to_json())
    assert to_html(again) == pages["hostile"]


def test_the_report_is_written_beside_its_record(tmp_path, pages):
    paths = write_report(examples.results(), tmp_path)
    assert [path.name for path in paths] == ["claims.json", "report.html"]
    assert paths[1].read_text(encoding="utf-8") == pages["plain"]
    assert Results.from_json(paths[0].read_text(encoding="utf-8")) is not None
    assert len(list(tmp_path.iterdir())) == 2


# --- charts --------------------------------------------------------------------------------------------


def drawn(**changes: object) -> str:
    return draw(dataclasses.replace(examples.LINE, **changes), "c-line")


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_a_chart_is_in_the_colours_of_the_page_and_has_its_words(chart):
    svg = draw(chart, f"c-{chart.name}")
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    words = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
    for word in {*chart.x_label.split(), *chart.y_label.split(), *" ".join(chart.x_names).split()}:
        assert word in words
    if len(chart.series) > 1:
        for series in chart.series:
            assert series.name in words
    assert chart.level_name in words
    assert draw(chart, f"c-{chart.name}") == svg


def test_an_error_moves_its_bar_and_a_level_its_line():
    wide = drawn(series=(dataclasses.replace(examples.LINE.series[0], error=(0.3,) * 9),))
    assert wide != drawn()
    assert drawn(level=0.5) != drawn(level=0.6) != drawn()


@pytest.mark.parametrize("style", ["measured", "predicted", "bars", "points"])
@pytest.mark.parametrize("y_log", [False, True])
@pytest.mark.parametrize("y", [(math.nan, math.nan), (0.0, 0.0), (1.0, math.inf), (-1.0, 1e-9), (3.0, 3.0)])
def test_values_that_cannot_be_shown_leave_gaps(style, y_log, y):
    series = Series("s", (1.0, 2.0), y, (0.5, math.nan), style)
    svg = drawn(series=(series,), y_log=y_log, x_log=True)
    assert "<svg" in svg
    assert ">rate p</text>" in svg


@pytest.mark.parametrize(("series", "colours"), [(4, {"first", "second"}), (3, {"muted"})])
def test_predictions_have_the_colours_of_what_they_predict_where_each_has_one(series, colours):
    chart = dataclasses.replace(
        examples.SCALES, series=examples.SCALES.series[:series], level=None, level_name=""
    )
    dashed = [line for line in draw(chart, "c").split("<path") if "stroke-dasharray" in line]
    assert {re.search(r"stroke: var\(--(\w+)\)", line)[1] for line in dashed} == colours


def test_no_two_of_six_series_and_no_two_of_three_predictions_look_alike():
    measured = [Series(f"m{i}", (1.0, 2.0), (i, i + 1.0), (), "measured") for i in range(6)]
    assert len(set(looks_of(measured))) == 6
    laws = [Series(f"p{i}", (1.0, 2.0), (i, i + 1.0), (), "predicted") for i in range(3)]
    assert len(set(looks_of([*measured[:1], *laws]))) == 4


def test_few_places_are_ticks_themselves():
    ticks = re.findall(r"<text[^>]*>([0-9.\u202f]+)</text>", draw(examples.SCALES, "c"))
    assert {"100", "300", "1\u202f000", "3\u202f000", "10\u202f000"} <= set(ticks)
    assert {f"0.{k}" for k in range(9)} <= set(re.findall(r"<text[^>]*>([0-9.]+)</text>", drawn()))
    odd = drawn(series=(Series("s", (0.0123456, 0.5, 0.9), (1.0, 2.0, 3.0)),), x_log=True)
    assert {"0.01", "0.1"} < set(re.findall(r"<text[^>]*>([0-9.]+)</text>", odd))


@given(st.floats(1e-12, 1e12))
def test_a_tick_of_a_logarithmic_axis_says_its_value(value):
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    lead, _, tail = power(value).replace("\u202f", "").rpartition("10")
    shown = power(value).replace("\u202f", "")
    if tail and tail[0] in "⁻⁰¹²³⁴⁵⁶⁷⁸⁹":
        read = float(lead.rstrip("·") or 1) * 10.0 ** int(tail.translate(digits))
    else:
        read = float(shown)
    assert read == pytest.approx(value, rel=6e-3)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1.0, "1"),
        (0.01, "0.01"),
        (300.0, "300"),
        (5e-6, "5·10⁻⁶"),
        (1e7, "10⁷"),
        (20000.0, "20\u202f000"),
        (0.0, ""),
    ],
)
def test_ticks_as_people_write_them(value, said):
    assert power(value) == said


def test_a_chart_without_a_legend_needs_none():
    one = Chart("one", "One series.", "x", "y", examples.LINE.series)
    assert "gain" not in re.findall(r"<text[^>]*>([^<]*)</text>", draw(one, "c"))


# --- in the browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, pages) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("claims")
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.fixture
def opened(browser, files, request) -> Iterator[Opened]:
    name, width, scheme = request.param
    tab = Opened(browser, files[name], width, scheme)
    yield tab
    tab.context.close()


def views(*names: str, schemes: tuple[str, ...] = ("light",), widths: tuple[int, ...] = (1280,)) -> Any:
    cases = [(name, width, scheme) for name in names for width in widths for scheme in schemes]
    marked = pytest.mark.parametrize(
        "opened", cases, indirect=True, ids=lambda case: "-".join(map(str, case))
    )
    return lambda test: pytest.mark.browser(marked(test))


@views("plain", "hostile", schemes=("light", "dark"), widths=(375, 1280))
def test_every_chart_is_drawn_nothing_is_logged_and_nobody_is_asked(opened):
    found = opened.page.evaluate(DRAWN)
    assert len(found) == len({figure["name"] for figure in found}) >= 8
    for figure in found:
        assert figure["width"] > 250, figure
        assert figure["height"] > 100, figure
        assert figure["shapes"] >= 8, figure
        assert figure["words"] >= 6, figure
    assert opened.complaints == []
    assert opened.asked == []
    assert opened.page.evaluate("() => document.querySelectorAll('script').length") == 1


@views("plain", widths=(375, 1280))
def test_words_in_charts_neither_overlap_nor_leave_the_frame(opened):
    assert opened.page.evaluate(OVERLAPS) == []


@views("plain", "hostile", widths=(320, 375))
def test_a_phone_scrolls_tables_inside_their_box_and_never_the_page(opened):
    wide, shown = opened.page.evaluate(
        "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= shown


@views("plain")
def test_a_link_in_the_table_leads_to_its_claim_and_the_button_to_the_dark(opened):
    opened.page.click("a[href='#opposite']")
    opened.page.wait_for_function(
        "() => document.querySelector('#opposite').getBoundingClientRect().top < 100"
    )
    light = opened.page.evaluate(COLOURS)
    opened.page.click("#theme")
    dark = opened.page.evaluate(COLOURS)
    assert lightness(light["paper"]) > 0.5 > lightness(dark["paper"])
    assert all(light[part] != dark[part] for part in light)


TEXTS = """() => ['body', '.note', '.article', 'figcaption', 'td', 'thead th', '.below', '.kicker', '.why', '.name',
    '.verdict', '.declared dt', '.notes dt', '.asked', '.shown th', '.says', 'svg[data-figure] text']
  .flatMap(path => [...document.querySelectorAll(path)].slice(0, 40)).map(part => {
    let under = part;
    while (under && ['rgba(0, 0, 0, 0)', 'transparent'].includes(getComputedStyle(under).backgroundColor))
        under = under.parentElement;
    return [part.className, getComputedStyle(part)[part instanceof SVGElement ? 'fill' : 'color'],
            getComputedStyle(under).backgroundColor];
  })"""


@views("plain", schemes=("light", "dark"))
def test_text_stands_out_from_what_lies_under_it(opened):
    found = opened.page.evaluate(TEXTS)
    assert len(found) > 100
    assert [case for case in found if contrast(case[1], case[2]) < 4.5] == []


@views("hostile")
def test_hostile_words_are_shown_and_do_nothing(opened):
    assert opened.page.inner_text("#hostile h2") == examples.HOSTILE
    assert opened.complaints == []

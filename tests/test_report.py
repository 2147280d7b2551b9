"""The record survives JSON, the page says what the record says, and nothing from a table becomes markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

import report_examples as examples
from dropkit.errors import ModelDirectoryError, OptionError
from dropkit.evaluation import Competitor
from dropkit.evaluation.records import Score
from dropkit.report import ColumnSummary, FitReport, Search, Timing, making, quality, to_html, to_text
from dropkit.report.drawing import INK, VARIABLES
from dropkit.report.html import draw, plots
from dropkit.report.page import page_of
from dropkit.report.wording import (
    count,
    listed,
    measured,
    number,
    percent,
    printable,
    short,
    standing,
    verdict,
)

MAKERS = {
    "regression": examples.regression_report,
    "binary": lambda **kw: examples.classification_report(classes=2, **kw),
    "three classes": examples.classification_report,
    "thirty classes": lambda **kw: examples.classification_report(classes=30, **kw),
    "few rows": lambda **kw: examples.regression_report(5, **kw),
    "few rows of classes": lambda **kw: examples.classification_report(4, **kw),
    "one row": lambda **kw: examples.regression_report(1, **kw),
}


@pytest.fixture(scope="module")
def reports() -> dict[str, FitReport]:
    return {name: make() for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def pages(reports) -> dict[str, str]:
    return {name: to_html(report) for name, report in reports.items()}


class Tags(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", MAKERS)
def test_a_record_survives_json(reports, name):
    report = reports[name]
    assert FitReport.from_json(report.to_json()) == report
    json.loads(report.to_json(), parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_seconds_are_no_part_of_what_makes_two_reports_equal(reports):
    report = reports["regression"]
    slower = dataclasses.replace(report, timing=Timing(9.0, 9.0, 9.0))
    assert slower == report
    assert slower.to_json(timing=False) == report.to_json(timing=False)
    assert slower.to_json() != report.to_json()
    assert dataclasses.replace(report, model=dataclasses.replace(report.model, seed=8)) != report


def test_a_number_that_is_none_becomes_null_and_comes_back(reports):
    report = reports["regression"]
    trial = dataclasses.replace(report.search.trials[0], validation_loss=math.inf, gap=math.nan)
    broken = dataclasses.replace(report, search=Search((trial, *report.search.trials[1:]), chosen=2))
    again = FitReport.from_json(broken.to_json())
    assert math.isnan(again.search.trials[0].validation_loss)
    assert again.search.trials[1:] == report.search.trials[1:]
    assert "1 candidate diverged" in to_html(again)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 99),
        (("data", "rows"), "many"),
        (("data", "rows"), True),
        (("data", "task"), "guessing"),
        (("data", "columns"), {}),
        (("model", "versions"), [["torch"]]),
        (("held_out",), {"rows": 3}),
        (("search", "trials"), [None]),
        (("surprise",), 1),
    ],
)
def test_an_altered_report_is_refused_with_the_place(reports, path, value):
    data = json.loads(reports["regression"].to_json())
    part = data
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(ModelDirectoryError, match=path[-1]):
        FitReport.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', "\x00"])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ModelDirectoryError):
        FitReport.from_json(text)


@pytest.mark.parametrize("name", MAKERS)
def test_a_page_has_every_figure_once_and_contacts_nobody(reports, pages, name):
    page = pages[name]
    found = Tags(page)
    drawn = [value for key, value in found.attributes if key == "data-figure"]
    assert sorted(drawn) == sorted(plots(reports[name]))
    assert all(value for key, value in found.attributes if key == "aria-label")
    assert "://" not in page
    assert not {"img", "iframe", "object", "embed", "image", "audio", "video"} & set(found.tags)
    assert [
        value for key, value in found.attributes if key in {"src", "href"} and not value.startswith("#")
    ] == ["data:,"]
    assert len(page.encode()) < 2_000_000


@pytest.mark.parametrize("name", ["regression", "three classes"])
def test_the_same_record_gives_the_same_bytes(reports, pages, name):
    again = FitReport.from_json(reports[name].to_json())
    assert to_html(again) == pages[name]


@pytest.mark.parametrize("name", ["regression", "three classes"])
def test_ids_on_a_page_are_unique_and_references_resolve(pages, name):
    page = pages[name]
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]*)\)|href="#([^"]+)"', page)
    assert len(used) > 100
    assert {a or b for a, b in used} <= set(ids)


def test_no_stand_in_colour_is_left_and_all_are_declared(pages):
    for page in pages.values():
        assert "#0a0b0" not in page
        for variable in set(re.findall(r"var\((--[a-z]+)\)", page)):
            assert page.count(f"{variable}:") >= 3 or variable in {"--serif", "--sans", "--mono"}
    assert INK in VARIABLES


@pytest.mark.parametrize("name", ["regression", "three classes"])
def test_nothing_from_the_table_becomes_markup(pages, name):
    plain, hostile = pages[name], to_html(MAKERS[name](hostile=True))
    a, b = Tags(plain), Tags(hostile)
    for tag in ("script", "svg", "style", "table", "section", "figure", "title"):
        assert a.tags.count(tag) == b.tags.count(tag), tag
    assert not [key for key, _ in b.attributes if key.startswith("on")]
    assert hostile.count("<script>") == 1
    assert "<script>alert" not in hostile
    assert b.text.count("<script>alert('x')</script>") > 10  # it is there, as text
    assert not set("\x00\x1b\u202e") & set(hostile)


@pytest.mark.parametrize("name", ["regression", "three classes"])
def test_a_terminal_is_told_nothing_to_obey(name):
    text = to_text(MAKERS[name](hostile=True, compared=False))
    assert "<script>alert('x')</script>" in text
    assert not {c for c in text if not c.isprintable()} - set("\n\u202f")


def test_hostile_text_inside_a_figure_is_text():
    svg = draw("confusion", examples.classification_report(hostile=True), examples.HOSTILE)
    assert "&lt;/svg&gt;&lt;script" in svg
    assert "<script" not in svg
    assert svg.count("</svg>") == 1
    assert re.search(r'aria-label="[^"]*&quot;', svg)


def test_dollars_in_a_name_are_not_mathematics():
    held = examples.classification_report(compared=False).held_out
    report = dataclasses.replace(
        examples.classification_report(compared=False),
        held_out=dataclasses.replace(held, classes=("$y_1$", "$\\frac$", "a_b^c")),
    )
    svg = draw("confusion", report, "")
    assert svg.count("$y_1$") == svg.count("$\\frac$") == svg.count("a_b^c") == 2  # once on each axis


@given(st.text())
def test_printable_text_is_what_xml_can_hold(text):
    element = ET.Element("t")
    element.text = printable(text)
    assert ET.fromstring(ET.tostring(element)).text == (element.text or None)
    assert len(short(text, 9)) <= 9


def test_the_script_that_runs_is_the_one_the_policy_names(pages):
    page = pages["regression"]
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.replace("&#39;", "'").replace("&#43;", "+")
    assert "default-src 'none'" in page


def test_many_rows_are_thinned_and_the_page_says_so():
    report = examples.regression_report(20_000, compared=False)
    page = to_html(report)
    assert "800 of 20\u202f000 rows drawn" in page
    assert len(page.encode()) < 1_000_000
    assert len(report.to_json()) < 1_000_000


def test_parts_that_were_not_measured_leave_no_trace(reports):
    bare = dataclasses.replace(
        reports["regression"], search=None, curves=None, members=None, comparison=None, timing=None
    )
    page = page_of(bare)
    assert [section.name for section in page.sections] == [
        "predictions",
        "calibration",
        "spread",
        "least-certain",
        "data",
        "again",
    ]
    assert "given, not searched for" in to_text(bare)
    assert to_html(bare).count("<svg") == 3
    with pytest.raises(OptionError, match="trade-off"):
        draw("trade-off", bare, "")


def test_no_dropout_is_said_where_it_won(reports):
    report = reports["regression"]
    plain = dataclasses.replace(
        report,
        model=dataclasses.replace(report.model, rate=0.0),
        search=dataclasses.replace(report.search, chosen=0),
    )
    assert "no dropout was best" in " ".join(to_text(plain).split())
    assert "no dropout was best" in to_html(plain)
    assert "no dropout was best" not in to_text(report)


def test_members_that_agree_are_named_and_not_drawn(reports):
    report = reports["regression"]
    none = dataclasses.replace(report.members, spread=(0.0,) * 4, monte_carlo_error=(0.0,) * 4)
    agreed = to_html(dataclasses.replace(report, members=none))
    assert "agree exactly" in agreed
    assert agreed.count("<svg") == len(plots(report)) - 1


def test_the_text_says_the_headline_and_the_table(reports):
    text = to_text(reports["regression"], width=72)
    flat = " ".join(text.split())
    assert " ".join(page_of(reports["regression"]).headline.split()) in flat
    assert "gradient boosting" in text
    assert all(len(line) <= 72 for line in text.splitlines())


def test_sentences_carry_the_numbers_of_the_record(reports):
    report = reports["regression"]
    inside = sum(
        low <= y <= high
        for y, low, high in zip(
            report.held_out.points.true,
            report.held_out.points.lower,
            report.held_out.points.upper,
            strict=True,
        )
    )
    said = page_of(report).sections[1].here[0]
    assert said == f"{percent(inside / 60)} of the 60 held-out rows fall inside their 90\u202f% interval."
    classes = reports["three classes"]
    right = sum(classes.held_out.confusion[k][k] for k in range(3))
    assert page_of(classes).sections[1].here[0].startswith(f"{right} of 60 held-out rows are named right")


def rival(difference, error, name="RMSE"):
    return Competitor("boosting", "", (Score(name, 1.0, 0.1, difference, error),))


@pytest.mark.parametrize(
    ("name", "difference", "error", "place"),
    [
        ("RMSE", -1.0, 0.4, 1),
        ("RMSE", 1.0, 0.4, -1),
        ("RMSE", 1.0, 0.6, 0),
        ("accuracy", 0.2, 0.05, 1),
        ("accuracy", -0.2, 0.05, -1),
        ("accuracy", 0.0, 0.0, 0),
    ],
)
def test_a_verdict_is_given_beyond_two_standard_errors_and_in_the_right_direction(
    name, difference, error, place
):
    assert standing(rival(difference, error, name).scores[0], rows=100) == place
    assert standing(rival(difference, error, name).scores[0], rows=10) == 0
    word = {1: "beats", -1: "loses to", 0: "is level with"}[place]
    assert word in verdict([rival(difference, error, name)], name, rows=100)
    assert "too few" in verdict([rival(difference, error, name)], name, rows=10)


def test_the_page_admits_a_loss(reports):
    report = reports["regression"]
    first, *rest = report.comparison.models
    better = [
        dataclasses.replace(
            m, scores=tuple(dataclasses.replace(s, difference=2.0, difference_error=0.1) for s in m.scores)
        )
        for m in rest
    ]
    lost = dataclasses.replace(
        report, comparison=dataclasses.replace(report.comparison, models=(first, *better))
    )
    assert "loses to gradient boosting (by 2.00 ± 0.10)" in to_html(lost)
    assert "beaten" in to_text(lost)
    assert [card.tone for card in page_of(lost).cards if card.value == "beaten"] == ["bad"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.23456, "1.23"),
        (-0.04567, "−0.0457"),
        (12345.6, "12\u202f346"),
        (1.2e-7, "1.20e−07"),
        (3e12, "3.00e+12"),
        (math.nan, "not defined"),
        (math.inf, "∞"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (53.1234, 1.23, "53.1 ± 1.2"),
        (54.1, 3.3, "54 ± 3"),
        (0.2124, 0.0213, "0.212 ± 0.021"),
        (5, 0, "5.00"),
        (-2, 0.5, "−2.0 ± 0.5"),
    ],
)
def test_measured_values_end_where_their_error_begins(value, error, text):
    assert measured(value, error) == text


@given(st.floats(0, 1))
def test_a_share_is_all_or_nothing_only_where_it_is(share):
    text = percent(share)
    assert (text == "0\u202f%") == (share == 0)
    assert (text == "100\u202f%") == (share == 1)


def test_words():
    assert [count(1, "row"), count(1200, "row"), count(2, "entry", "entries")] == [
        "1 row",
        "1\u202f200 rows",
        "2 entries",
    ]
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_a_columns_note_is_told_once_and_names_wear_the_pages_quotes(reports):
    report = reports["regression"]
    columns = (ColumnSummary("id's", "number", 0, 60, False, "it counts the rows"), *report.data.columns)
    data = dataclasses.replace(
        report.data,
        columns=columns,
        task_reason=f"Regression: {report.data.target!r} holds many numbers.",
        warnings=('"id\'s" is left out: it counts the rows.', "'x': 3 cells are odd", "Something else"),
    )
    said = " ".join(making.data(dataclasses.replace(report, data=data)).here)
    assert "it counts the rows" not in said
    assert f"Regression: “{report.data.target}” holds many numbers." in said
    assert "3 cells are odd." in said
    assert said.endswith("Something else.")


@pytest.mark.parametrize(("folds", "words"), [(4, "4 folds of 70 rows"), (1, "one division of 70 rows")])
def test_the_page_says_which_rows_chose_the_rate(reports, folds, words):
    report = reports["regression"]
    search = dataclasses.replace(report.search, folds=folds, rows=70)
    told = dataclasses.replace(report, search=search)
    assert words in making.search(told).plot.caption
    assert ("4 folds" in making.data(told).here[0]) == (folds == 4)
    assert "helped to choose the rate" in " ".join(quality.calibration(told).here)
    assert "choose the epoch" in " ".join(quality.calibration(dataclasses.replace(told, search=None)).here)

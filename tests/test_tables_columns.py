"""What a column is follows from its cells by written rules; the target says which task it asks for."""

from __future__ import annotations

import datetime as dt
import decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dropkit.errors import OptionError, TableError
from dropkit.tables.cells import Column
from dropkit.tables.columns import describe_column, describe_columns, read_column
from dropkit.tables.reading import open_table
from dropkit.tables.target import describe_target


def column(cells, **options) -> Column:
    return describe_column(pd.Series(cells, dtype=options.pop("dtype", object)), "c", **options)


def values(cells, **options) -> list:
    series = pd.Series(cells, dtype=object)
    return read_column(series, describe_column(series, "c", **options)).tolist()


NAN = float("nan")
DAY = "datetime64[us]"


@pytest.mark.parametrize(
    ("cells", "kind", "form", "read"),
    [
        (["1", "-2.5", "3e-2", " .5 ", "NA"], "number", "plain", [1, -2.5, 0.03, 0.5, NAN]),
        (["1,234.5", "12", "1,000,000"], "number", "thousands", [1234.5, 12, 1e6]),
        (["1,5", "1.234,25", "7"], "number", "decimal comma", [1.5, 1234.25, 7]),
        (["0", "1", "1"], "number", "plain", [0, 1, 1]),
        (["Yes", "no", "?", "YES"], "boolean", "", [1, 0, NAN, 1]),
        (["true", "FALSE"], "boolean", "", [1, 0]),
        (["01234", "02345", "99999"], "category", "", ["01234", "02345", "99999"]),
        (["red", "", "blue"], "category", "", ["red", None, "blue"]),
        (["1_000", "2_000"], "category", "", ["1_000", "2_000"]),
        (
            ["2024-01-31", "2023-12-01 12:30:00", ""],
            "date",
            "ISO8601",
            ["2024-01-31", "2023-12-01T12:30", None],
        ),
        (
            ["2024-01-31T00:00:00+02:00", "2024-01-31T00:00:00Z"],
            "date",
            "ISO8601",
            ["2024-01-30T22", "2024-01-31"],
        ),
        (["31.01.2024", "01.02.2024"], "date", "%d.%m.%Y", ["2024-01-31", "2024-02-01"]),
        (["31 Jan 2024", "1 Feb 2024"], "date", "%d %b %Y", ["2024-01-31", "2024-02-01"]),
        (["Jan 31, 2024", "Feb 1, 2024"], "date", "%b %d, %Y", ["2024-01-31", "2024-02-01"]),
        (["31/01/2024", "01/02/2024"], "date", "%d/%m/%Y", ["2024-01-31", "2024-02-01"]),
        (["01/31/2024", "02/01/2024"], "date", "%m/%d/%Y", ["2024-01-31", "2024-02-01"]),
        (["01/02/2024", "03/04/2024"], "category", "", ["01/02/2024", "03/04/2024"]),
    ],
)
def test_the_kind_of_text_is_found(cells, kind, form, read):
    found = column(cells)
    assert (found.kind, found.form) == (kind, form)
    if kind == "date":
        expected = np.array([np.datetime64(day or "NaT") for day in read], dtype=DAY)
        np.testing.assert_array_equal(read_column(pd.Series(cells, dtype=object), found), expected)
    else:
        np.testing.assert_array_equal(values(cells), read)


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (pd.Series([1, 2, 3]), "number"),
        (pd.Series([1, None, 3], dtype="Int64"), "number"),
        (pd.Series([decimal.Decimal("1.5"), None]), "number"),
        (pd.Series([True, False]), "boolean"),
        (pd.Series([True, None], dtype="boolean"), "boolean"),
        (pd.Series([True, None, False], dtype=object), "boolean"),
        (pd.Series(["a", None, "b"]), "category"),
        (pd.Series(["a", "b"], dtype="string"), "category"),
        (pd.Series(["a", None, "b"], dtype="category"), "category"),
        (pd.Series([1, 2, None], dtype="category"), "number"),
        (pd.Series(pd.to_datetime(["2024-01-01", None])), "date"),
        (pd.Series(pd.to_datetime(["2024-01-01"]).tz_localize("Asia/Tokyo")), "date"),
        (pd.Series([dt.date(2024, 1, 1), None]), "date"),
        (pd.Series(pd.to_timedelta(["1h", "2h"])), "number"),
        (pd.Series(pd.arrays.SparseArray([0.0, 1.0])), "number"),
    ],
)
def test_a_typed_column_keeps_its_meaning(cells, kind):
    found = describe_column(cells, "c", keep=True)
    assert found.kind == kind
    read = read_column(cells, found)
    assert (pd.isna(read) == cells.isna().to_numpy()).all()


def test_the_same_whole_number_is_the_same_label_in_any_type():
    asked = Column("c", "category")
    for cells in (
        pd.Series([3, 4]),
        pd.Series([3.0, 4.0]),
        pd.Series(["3", "4"]),
        pd.Series([3, 4], dtype="Int64"),
    ):
        assert read_column(cells, asked).tolist() == ["3", "4"]


def test_columns_that_cannot_help_are_dropped_with_the_reason():
    n = 40
    frame = pd.DataFrame(
        {
            "gone": [None] * n,
            "same": ["x"] * n,
            "name": [f"person {i}" for i in range(n)],
            "note": [f"note {i}" if i % 2 else None for i in range(n)],
            "id": np.arange(n) + 100,
            "half": ["x", None] * (n // 2),
            "nested": [[1, 2]] * n,
            "good": np.arange(n)[::-1] ** 2,
        }
    )
    said = {c.name: c for c in describe_columns(frame)}
    assert said["gone"].dropped == "every cell is missing"
    assert said["same"].dropped == "every row says x"
    assert "40 different values in 40 filled rows" in str(said["name"].dropped)
    assert said["note"].only_filled
    assert said["note"].dropped is None
    assert said["id"].dropped == "it counts the rows"
    assert said["half"].dropped is None
    assert "lists" in str(said["nested"].dropped)
    assert said["good"].dropped is None
    asked = {
        c.name: c
        for c in describe_columns(frame, kinds={"id": "number", "name": "category"}, ignore=["good"])
    }
    assert asked["id"].dropped is None
    assert asked["name"].dropped is None
    assert asked["good"].dropped == "left out as asked"
    assert describe_columns(frame[["id", "same"]], keep_all=True)[1].dropped is None


def test_a_row_counter_is_known_in_a_sample_too():
    frame = (
        pd.DataFrame({"id": np.arange(1000) + 1, "x": np.arange(1000) % 7})
        .sample(100, random_state=0)
        .sort_index()
    )
    assert describe_columns(frame)[0].dropped == "it counts the rows"


def test_a_few_stray_words_among_numbers_are_missing_and_said():
    cells = [str(i) for i in range(200)] + ["unknown", "unknown"]
    found = column(cells)
    assert (found.kind, found.strays, found.missing) == ("number", ("unknown",), 2)
    assert "2 cells that say 'unknown'" in found.note
    assert np.isnan(values(cells)[-1])
    with pytest.raises(TableError, match=r"'c' is a number column, and row 1 holds 'odd'"):
        read_column(pd.Series(["odd"]), found)
    assert column([str(i) for i in range(15)] + ["a", "b", "c"]).kind == "category"  # too many to be strays


@pytest.mark.parametrize("bad", ["inf", "-Infinity", "1e400", "2e100"])
def test_an_infinite_number_is_named_with_column_and_row(bad):
    with pytest.raises(TableError, match=r"Column 'c', row 3, holds .*must be finite .* leave it empty"):
        column(["1", "2", bad])
    with pytest.raises(TableError, match=r"Column 'c', row 2"):
        column([1.0, float(bad)])


@given(st.lists(st.floats(-1e99, 1e99), min_size=1), st.data())
def test_reading_numbers_is_exact_and_row_by_row(numbers, data):
    cells = pd.Series([repr(x) for x in numbers], dtype=object)
    asked = Column("c", "number", form="plain")
    read = read_column(cells, asked)
    assert read.tolist() == numbers
    cut = data.draw(st.integers(0, len(numbers)))
    assert (
        np.concatenate([read_column(cells[:cut], asked), read_column(cells[cut:], asked)]).tolist() == numbers
    )


@pytest.mark.parametrize(
    ("kind", "cells", "row", "what"),
    [
        ("number", ["1", "many"], 2, "not a number"),
        ("number", ["1_0"], 1, "not a number"),
        ("boolean", ["yes", "maybe"], 2, "neither yes nor no"),
        ("boolean", [1.0, 2.0], 2, "neither yes nor no"),
        ("date", ["2024-01-01", "soon"], 2, "not a date like 2024-12-31"),
        ("date", [7.0], 1, "not a date"),
        ("number", pd.to_datetime(["2024-01-01"]), 1, "a date"),
    ],
)
def test_a_cell_of_another_type_is_named(kind, cells, row, what):
    with pytest.raises(TableError, match=f"'c' is a {kind} column, and row {row} holds .*which is {what}"):
        column(cells, kind=kind, dtype=None)


def test_options_are_checked():
    frame = pd.DataFrame({"a": [1, 2]})
    with pytest.raises(
        OptionError, match="kind 'colour' was given for column 'a'; a kind is one of number, category"
    ):
        describe_columns(frame, kinds={"a": "colour"})
    with pytest.raises(TableError, match="'b' was named in the options and is not in the table: 'a'"):
        describe_columns(frame, ignore=["b"])


# The target.

TASKS = {
    "text": (["a", "b"] * 5, "classification", ("a", "b")),
    "truth": ([True, False] * 5, "classification", ("false", "true")),
    "yes": (["yes", "no"] * 5, "classification", ("no", "yes")),
    "two values": (["0", "1"] * 5, "classification", ("0", "1")),
    "codes": (["2", "10", "1"] * 50, "classification", ("1", "2", "10")),
    "fractions": (["1.5", "2.5", "3.5"] * 50, "regression", ()),
    "many whole": ([str(i) for i in range(30)] * 4, "regression", ()),
    "rare grades": (["5"] * 200 + ["6"] * 200 + ["8"], "regression", ()),
}


@pytest.mark.parametrize("case", TASKS)
def test_the_task_is_found_and_said(case):
    cells, task, classes = TASKS[case]
    found = describe_target(pd.Series(cells, name="y"))
    assert (found.task, found.classes) == (task, classes)
    assert found.reason.startswith(task.capitalize())
    assert "'y'" in found.reason
    codes = found.encode(pd.Series(cells, name="y"))
    if task == "classification":
        assert [found.classes[code] for code in codes] == [str(c).lower() for c in cells]
        assert np.bincount(codes).tolist() == list(found.counts)
    else:
        assert codes.tolist() == [float(c) for c in cells]


def test_the_task_can_be_given():
    cells = pd.Series([1, 2, 3] * 50, name="y")
    assert describe_target(cells).task == "classification"
    assert describe_target(cells, "regression").task == "regression"
    assert (
        describe_target(pd.Series(np.arange(30) % 15 + 0.5, name="y"), "classification").classes[0] == "0.5"
    )


NO_TARGET = {
    "gap": (
        ["1", "", "3"],
        "auto",
        r"no value in 1 of 3 rows, first in row 2\. .* leave out the row or fill",
    ),
    "all gone": ([None, None], "auto", r"no value in any of 2 rows"),
    "constant": (["7"] * 4, "auto", r"is 7 in every one of 4 rows; there is nothing to predict"),
    "one row": (["7"], "auto", r"has one row with a target; learning needs at least two"),
    "infinite": ([1.0, float("inf")], "auto", r"row 2, holds inf; numbers must be finite"),
    "text": (
        ["a", "b"] * 3,
        "regression",
        r"holds text such as 'a'; regression needs numbers\. Choose classification",
    ),
    "dates": (["2024-01-01", "2024-01-02"], "auto", r"holds dates such as 2024-01-01"),
    "seen once": (
        ["a"] * 5 + ["b"] * 5 + ["c"],
        "auto",
        r"Class c of target 'y' is seen once; every class needs",
    ),
    "names": ([f"n{i}" for i in range(50)], "auto", r"50 different values in 50 rows.*free text"),
    "numbers as classes": (list(range(50)), "classification", r"50 different values.*Choose regression"),
}


@pytest.mark.parametrize("case", NO_TARGET)
def test_a_target_that_cannot_be_learned_says_why(case):
    cells, task, message = NO_TARGET[case]
    with pytest.raises(TableError, match=message) as caught:
        describe_target(pd.Series(cells, name="y"), task)
    assert "\n" not in str(caught.value)


def test_rows_without_a_target_can_be_left_out():
    cells = pd.Series(["a", None, "b", "a", "b"], name="y")
    target = describe_target(cells, missing="drop")
    assert (target.rows, target.missing) == (4, 1)
    assert target.encode(cells).tolist() == [0, -1, 1, 0, 1]
    with pytest.raises(TableError, match=r"row 1, is of class 'z'; the classes are a, b"):
        target.encode(pd.Series(["z"]))
    with pytest.raises(OptionError, match="task='guess'"):
        describe_target(cells, "guess")


def test_real_columns_are_what_a_reader_would_say(shared_data):
    if shared_data is None:
        pytest.skip("the shared data are not here")
    frame = open_table(shared_data / "tabular_missing" / "titanic.csv").sample(1000)
    said = {c.name: c for c in describe_columns(frame)}
    assert {name for name, c in said.items() if c.dropped} == {"PassengerId", "Name", "Ticket"}
    assert said["Cabin"].only_filled
    assert {name for name, c in said.items() if c.kind == "category"} >= {"Sex", "Embarked"}
    assert (said["Age"].kind, said["Age"].missing) == ("number", 177)
    assert describe_target(frame["Survived"]).classes == ("0", "1")
    horses = open_table(shared_data / "tabular_missing" / "horse-colic.csv").sample(1000)
    assert describe_target(horses["column_24"]).counts == (191, 109)
    with pytest.raises(TableError, match="no value in 1 of 300 rows, first in row 133"):
        describe_target(horses["column_23"])
    wine = open_table(shared_data / "uci_regression" / "wine" / "data.txt").sample(2000)
    assert describe_target(wine["column_12"]).task == "regression"

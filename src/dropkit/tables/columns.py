"""What each column of a table holds, found from its cells.

The rules, in the order they are tried (`kinds` overrides them column by column):

- boolean: every cell is one of true/false, yes/no, y/n, t/f, on/off in any case. 0/1 is a number.
- number: every cell is a number: 12, -1.5, 2e-3; or, if the whole column reads so, 1,234.5 with thousands separators
  or 1,5 and 1.234,5 with a decimal comma. At most 3 other words in at most 5 % of the rows count as missing, and
  that is said. Whole numbers written with leading zeros (0123) are codes, so categories.
- date: every cell is a date in one format: ISO 8601, 31.12.2024, 31 Dec 2024, Dec 31, 2024, or 31/12/2024 where
  the data tell day from month. If they do not, the column is a category, and that is said.
- category: everything else. Where more than half of the filled rows have values of their own (20 or more), the values
  say nothing about new rows: the column is dropped, or only whether it is filled in is kept.

All-missing and constant columns are dropped, and so are whole numbers that count the rows. Whole numbers with few
different values are numbers. A number that is infinite is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dropkit.errors import OptionError, TableError
from dropkit.tables.cells import (
    BOOLEAN_PAIRS,
    KINDS,
    NUMBER_FORMS,
    Column,
    Kind,
    label_of,
    plain_values,
    read_column,
    to_kind,
)

__all__ = [
    "KINDS",
    "SAMPLE_ROWS",
    "Column",
    "Kind",
    "describe_column",
    "describe_columns",
    "label_of",
    "read_column",
]

SAMPLE_ROWS = 100_000
"""Rows a description rests on: a longer table is represented by so many rows drawn uniformly."""

_STRAY_WORDS, _STRAY_SHARE = 3, 0.05
_OWN_VALUE_SHARE, _OWN_VALUE_LEAST = 0.5, 20
_COUNTER_ROWS = 20  # a shorter run of 1, 2, 3, ... may well be a measurement

_CODE = re.compile(r"0\d+", re.ASCII)
_DIGITS = re.compile(r"\d+", re.ASCII)
_ISO = re.compile(
    r"\d{4}-\d{2}(-\d{2}([ T]\d{2}(:?\d{2}(:?\d{2}([.,]\d+)?)?)?\s?(Z|[+-]\d{2}:?\d{2})?)?)?", re.ASCII
)
_DATE_FORMATS = [
    *("%Y/%m/%d", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S"),
    *("%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S"),
    *("%d %b %Y", "%d %B %Y", "%d-%b-%Y", "%b %d, %Y", "%B %d, %Y"),
]
_DAY_OR_MONTH = ("%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y")
_TIMES = ("", " %H:%M", " %H:%M:%S")


def describe_columns(
    frame: pd.DataFrame,
    *,
    kinds: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    keep_all: bool = False,
) -> tuple[Column, ...]:
    """Describe every column of a sample, in table order.

    Args:
        frame: rows of the table; its index counts rows of the table from 0, so that messages can name them.
        kinds: {column: kind} where the caller knows better. Such a column is never taken for an identifier.
        ignore: columns to leave out whatever they hold (the target, say).
        keep_all: leave no column out on account of its values: for arrays, whose columns were chosen by hand.

    Raises:
        TableError: a column asked for is not there; an infinite number; a cell that the kind asked for cannot hold.
        OptionError: a kind that is none.
    """
    kinds = dict(kinds or {})
    names = [str(name) for name in frame.columns]
    for name in (*kinds, *ignore):
        if name not in names:
            raise TableError(
                f"Column {name!r} was named in the options and is not in the table: {_listed(names)}."
            )
    for name, kind in kinds.items():
        if kind not in KINDS:
            raise OptionError(
                f"kind {kind!r} was given for column {name!r}; a kind is one of {', '.join(KINDS)}."
            )
    described = []
    for place, name in enumerate(names):
        if name in ignore:
            described.append(Column(name, "category", rows=len(frame), dropped="left out as asked"))
        else:
            described.append(describe_column(frame.iloc[:, place], name, kind=kinds.get(name), keep=keep_all))
    return tuple(described)


def describe_column(cells: pd.Series, name: str, *, kind: str | None = None, keep: bool = False) -> Column:
    """Describe one column by the rules at the top of this file.

    Args:
        cells: the cells; the index counts rows of the table from 0.
        name: of the column.
        kind: given by the caller, or None to find it.
        keep: never leave the column out.

    Raises:
        TableError: an infinite number, or a cell that is not of the given kind.
    """
    values = plain_values(cells)
    if values is None:
        return Column(
            name, "category", rows=len(cells), dropped="its cells are lists, records or bytes, not values"
        )
    counts = _counts(values)
    column = _as_asked(values, counts, name, kind) if kind else _found(values, counts, name)
    known = sum(times for value, times in counts.items() if value not in column.strays)
    top = sorted(counts.items(), key=lambda item: -item[1])[:3]
    column = replace(
        column,
        rows=len(cells),
        missing=len(cells) - known,
        distinct=len(counts) - len(column.strays),
        examples=tuple(label_of(value) for value, _ in top),
    )
    read = to_kind(values, column, cells)  # an infinite number or a wrong cell speaks up here
    return column if keep else _left_out(column, read, cells.index, asked=kind is not None)


def number_form(texts: Sequence[str]) -> str | None:
    """Find the one form in which all these texts are numbers, or None."""
    for form, pattern in NUMBER_FORMS.items():
        if all(pattern.fullmatch(text) for text in texts):
            return form
    return None


def date_form(texts: Sequence[str]) -> tuple[str | None, str]:
    """Find the one format in which all these texts are dates.

    Returns:
        (format, "") or (None, why none was chosen although they look like dates).
    """
    if not texts or not all(len(text) >= 6 and any(map(str.isdigit, text)) for text in texts[:50]):
        return None, ""
    if all(map(_ISO.fullmatch, texts)):
        return ("ISO8601", "") if _parses(texts, "ISO8601") else (None, "")
    for form in _DATE_FORMATS:
        if _parses(texts, form):
            return form, ""
    for time in _TIMES:
        fits = [form + time for form in _DAY_OR_MONTH if _parses(texts, form + time)]
        if len(fits) == 1:
            return fits[0], ""
        if fits:
            return (
                None,
                f"dates such as {texts[0]} may be day or month first, so they are text: write 2024-12-31",
            )
    return None, ""


def _parses(texts: Sequence[str], form: str) -> bool:
    for part in (texts[:3], texts):  # cheap refusal before the whole column is tried
        cells = pd.Series(list(part), dtype=object)
        if pd.to_datetime(cells, format=form, errors="coerce", utc=True).isna().any():
            return False
    return True


def _counts(values: np.ndarray) -> Counter[Any]:
    """How often each value occurs, in order of appearance."""
    if values.dtype != object:
        values = values[~pd.isna(values)]
    return Counter(value for value in values.tolist() if value is not None)


def _found(values: np.ndarray, counts: Counter[Any], name: str) -> Column:
    """Find the kind of a column from its plain values."""
    if values.dtype == np.float64:
        return Column(name, "number", form="plain")
    if values.dtype == bool or (counts and all(isinstance(value, bool) for value in counts)):
        return Column(name, "boolean")
    if values.dtype != object:
        return Column(name, "date", form="ISO8601")
    texts = [label_of(value) for value in counts]
    if not texts:
        return Column(name, "category")
    if len(texts) <= 12 and any({text.lower() for text in texts} <= set(pair) for pair in BOOLEAN_PAIRS):
        return Column(name, "boolean")
    if any(map(_CODE.fullmatch, texts)) and all(map(_DIGITS.fullmatch, texts)):
        return Column(name, "category", note="whole numbers with leading zeros are codes, not quantities")
    if form := number_form(texts):
        return Column(name, "number", form=form)
    if stray := _numbers_but_for(counts):
        form, words = stray
        note = f"{sum(counts[word] for word in words)} cells that say {_listed(words)} are read as missing"
        return Column(name, "number", form=form, strays=tuple(words), note=note)
    form_of_dates, note = date_form(texts)
    if form_of_dates:
        return Column(name, "date", form=form_of_dates)
    return Column(name, "category", note=note)


def _as_asked(values: np.ndarray, counts: Counter[Any], name: str, kind: str) -> Column:
    """Give a column the kind its owner says it has; the form is still found from the cells."""
    texts = [label_of(value) for value in counts] if values.dtype == object else []
    match kind:
        case "number":
            return Column(name, "number", form=number_form(texts) or "plain")
        case "date":
            form, either = date_form(texts) if texts else ("ISO8601", "")
            return Column(name, "date", form=form or ("%d/%m/%Y" if either else "ISO8601"))
        case "boolean":
            return Column(name, "boolean")
        case _:
            return Column(name, "category")


def _numbers_but_for(counts: Counter[Any]) -> tuple[str, list[str]] | None:
    """The form and the few stray words of a column that is otherwise numbers."""
    texts = [text for text in counts if isinstance(text, str)]
    words = [text for text in texts if not any(form.fullmatch(text) for form in NUMBER_FORMS.values())]
    if len(texts) < len(counts) or not 1 <= len(words) <= _STRAY_WORDS:
        return None
    rest = [text for text in texts if text not in words]
    if len(rest) < 10 or sum(counts[word] for word in words) > _STRAY_SHARE * counts.total():
        return None
    form = number_form(rest)
    return (form, words) if form else None


def _left_out(column: Column, values: np.ndarray, rows: pd.Index, *, asked: bool) -> Column:
    """Say why a column cannot help, where that is so."""
    known = column.rows - column.missing
    if not known:
        return replace(column, dropped="every cell is missing")
    if column.distinct == 1 and not column.missing:
        return replace(column, dropped=f"every row says {column.examples[0]}")
    if asked:
        return column
    if column.kind == "number" and not column.missing and known >= _COUNTER_ROWS:
        steps = values - rows.to_numpy()  # the sample knows its row numbers
        if np.all(steps == steps[0]):
            return replace(column, dropped="it counts the rows")
    if column.kind == "category" and column.distinct >= max(_OWN_VALUE_LEAST, _OWN_VALUE_SHARE * known):
        said = f"{column.distinct} different values in {known} filled rows"
        if 0.01 * column.rows <= column.missing <= 0.99 * column.rows:
            return replace(column, only_filled=True, note=f"{said}: only whether it is filled in is used")
        return replace(column, dropped=f"{said}: a name or free text says nothing about new rows")
    return column


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(map(repr, names[:most])) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )

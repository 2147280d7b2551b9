"""The one place where a cell becomes a value, column by column and each cell by itself."""

from __future__ import annotations

import datetime as dt
import decimal
import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from dropkit.errors import TableError
from dropkit.tables.text import MISSING

Kind = Literal["number", "category", "boolean", "date"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MOST = 1e100
"""Largest number a table may hold; nothing is measured beyond, and sums of squares stay finite."""

BOOLEAN_PAIRS = (("true", "false"), ("yes", "no"), ("y", "n"), ("t", "f"), ("on", "off"))
_SPELLED = {"1": True, "0": False} | {word: i == 0 for pair in BOOLEAN_PAIRS for i, word in enumerate(pair)}

NUMBER_FORMS = {
    "plain": re.compile(
        r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|infinity)", re.IGNORECASE | re.ASCII
    ),
    "thousands": re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)(\.\d*)?", re.ASCII),
    "decimal comma": re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d+)(,\d*)?([eE][+-]?\d+)?", re.ASCII),
}


@dataclass(frozen=True, slots=True)
class Column:
    """What a column holds and how its cells are read.

    Attributes:
        name: as in the table.
        kind: "number", "category", "boolean" or "date".
        form: how text is read: a number form ("plain", "thousands", "decimal comma") or a date format; "" otherwise.
        rows: rows looked at.
        missing: how many of them have no value.
        distinct: different values among the rest.
        examples: up to 3 frequent values.
        strays: words in a column of numbers that are read as missing.
        only_filled: the values are as good as one per row; only whether there is one is used.
        dropped: why the column is left out, or None.
        note: what else a reader should know, or "".
    """

    name: str
    kind: Kind
    form: str = ""
    rows: int = 0
    missing: int = 0
    distinct: int = 0
    examples: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()
    only_filled: bool = False
    dropped: str | None = None
    note: str = ""


def read_column(cells: pd.Series, column: Column) -> np.ndarray:
    """Turn cells into values, each by itself, so that the rows around it change nothing.

    Args:
        cells: text, or values of any type; the index counts rows of the table from 0.
        column: how to read them.

    Returns:
        (rows,): float64 with NaN for numbers; float64 0, 1 or NaN for booleans; datetime64[us] with NaT for dates;
        objects, str or None, for categories.

    Raises:
        TableError: a cell is of another type or infinite; the message names the column, the row and the cell.
    """
    values = plain_values(cells)
    if values is None:
        raise _wrong(column, cells, 0, "a list, a record or bytes")
    return to_kind(values, column, cells)


def to_kind(values: np.ndarray, column: Column, cells: pd.Series) -> np.ndarray:
    """As `read_column`, from the plain form of the cells; the cells themselves are for messages."""
    match column.kind:
        case "number":
            return _numbers(values, column, cells)
        case "boolean":
            return _booleans(values, column, cells)
        case "date":
            return _dates(values, column, cells)
        case "category":
            return _labels(values)


def plain_values(cells: pd.Series) -> np.ndarray | None:
    """Bring a column of any dtype to one of four plain forms; None for cells that are no values (lists, bytes).

    Returns:
        float64 with NaN; bool; datetime64[us] in UTC with NaT; or objects: stripped text or bool, None where missing.
    """
    kind = cells.dtype
    if isinstance(kind, pd.CategoricalDtype):
        return plain_values(cells.astype(object))
    if isinstance(kind, pd.SparseDtype):
        return plain_values(cells.astype(kind.subtype))
    if pd.api.types.is_bool_dtype(kind):
        return cells.to_numpy(dtype=bool) if not cells.isna().any() else plain_values(cells.astype(object))
    if pd.api.types.is_complex_dtype(kind):
        return None
    if pd.api.types.is_numeric_dtype(kind):
        return cells.to_numpy(dtype=np.float64, na_value=np.nan)
    if pd.api.types.is_datetime64_any_dtype(kind):
        return plain_dates(pd.to_datetime(cells, utc=True))
    if pd.api.types.is_timedelta64_dtype(kind):
        return np.asarray(cells.dt.total_seconds(), dtype=np.float64)
    return _plain_objects(cells.tolist())


def plain_dates(dates: pd.Series) -> np.ndarray:
    """Dates with a time zone as datetime64[us] in UTC."""
    return dates.dt.tz_localize(None).to_numpy(dtype="datetime64[us]")


def label_of(value: Any) -> str:
    """The text a value goes by as a category.

    3 and 3.0 are both "3", since a gap turns a column of whole numbers into one of fractions.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, np.datetime64):
        return str(value.astype("datetime64[us]")).removesuffix("T00:00:00.000000")
    if isinstance(value, dt.date):
        return label_of(
            pd.to_datetime(pd.Series([value], dtype=object), utc=True).dt.tz_localize(None).to_numpy()[0]
        )
    as_float = float(value)
    return str(int(as_float)) if as_float.is_integer() and abs(as_float) < 1e15 else repr(as_float)


def _plain_objects(listed: list[Any]) -> np.ndarray | None:
    """Numbers or dates where all cells are such, else text; truth values stay what they are."""
    try:  # the common case: the cells of a text table
        bare = list(map(str.strip, listed))
        return _objects(
            bare if MISSING.isdisjoint(bare) else [None if text in MISSING else text for text in bare]
        )
    except TypeError:
        pass
    clean = [None if _is_missing(value) else value for value in listed]
    present = [value for value in clean if value is not None]
    if not all(isinstance(value, _VALUES) for value in present):
        return None
    truths = sum(isinstance(value, bool | np.bool_) for value in present)
    if present and not truths and all(isinstance(value, _NUMBERS) for value in present):
        return np.array([np.nan if value is None else float(value) for value in clean], dtype=np.float64)
    if present and all(isinstance(value, _DATES) for value in present):
        return plain_dates(pd.to_datetime(pd.Series(clean, dtype=object), utc=True))
    if truths == len(clean):
        return np.array(clean, dtype=bool)
    texts = [
        bool(v) if isinstance(v, bool | np.bool_) else None if v is None else label_of(v).strip()
        for v in clean
    ]
    return _objects([None if text in MISSING else text for text in texts])


_NUMBERS = (numbers.Real, decimal.Decimal)
_DATES = (dt.date, np.datetime64)
_VALUES = (str, np.bool_, *_NUMBERS, *_DATES)


def _is_missing(value: Any) -> bool:
    if value is None or value is pd.NA or value is pd.NaT:
        return True
    return isinstance(value, float | np.floating | decimal.Decimal) and math.isnan(value)


def _objects(values: Sequence[Any]) -> np.ndarray:
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out


def _numbers(values: np.ndarray, column: Column, cells: pd.Series) -> np.ndarray:
    if values.dtype == bool:
        values = values.astype(np.float64)
    elif values.dtype == object:
        fast = _plain_numbers(values) if column.form == "plain" else None
        values = _parse_numbers(values, column, cells) if fast is None else fast
    elif values.dtype != np.float64:
        known = ~np.isnat(values)
        if known.any():
            raise _wrong(column, cells, int(np.argmax(known)), "a date")
        return np.full(len(values), np.nan)
    outside = np.abs(values) > MOST
    if outside.any():
        raise _infinite(column, cells, int(np.argmax(outside)))
    return values


def _plain_numbers(values: np.ndarray) -> np.ndarray | None:
    """Plain numbers at the speed of float(); None where that might read other text than `NUMBER_FORMS` allows."""
    listed = values.tolist()
    texts = listed if None not in listed else [text for text in listed if text is not None]
    try:
        joined = "".join(texts)
        if "_" in joined or not joined.isascii():
            return None
        known = np.array(list(map(float, texts)), dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if np.isnan(known).any():
        return None
    if len(known) == len(values):
        return known
    out = np.full(len(values), np.nan)
    out[[text is not None for text in listed]] = known
    return out


def _parse_numbers(values: np.ndarray, column: Column, cells: pd.Series) -> np.ndarray:
    pattern = NUMBER_FORMS.get(column.form, NUMBER_FORMS["plain"])
    out = np.full(len(values), np.nan)
    for row, text in enumerate(values.tolist()):
        if text is None or text in column.strays:
            continue
        if isinstance(text, bool):
            out[row] = text
            continue
        if not pattern.fullmatch(text):
            raise _wrong(column, cells, row, "not a number")
        if column.form == "thousands":
            text = text.replace(",", "")
        elif column.form == "decimal comma":
            text = text.replace(".", "").replace(",", ".")
        out[row] = float(text)
    return out


def _booleans(values: np.ndarray, column: Column, cells: pd.Series) -> np.ndarray:
    if values.dtype == bool:
        return values.astype(np.float64)
    if values.dtype == np.float64:
        wrong = ~(np.isnan(values) | (values == 0) | (values == 1))
        if wrong.any():
            raise _wrong(column, cells, int(np.argmax(wrong)), "neither yes nor no")
        return values
    if values.dtype != object:
        raise _wrong(column, cells, 0, "a date")
    out = np.full(len(values), np.nan)
    for row, text in enumerate(values.tolist()):
        if text is None:
            continue
        said = text if isinstance(text, bool) else _SPELLED.get(text.lower())
        if said is None:
            raise _wrong(column, cells, row, "neither yes nor no")
        out[row] = said
    return out


def _dates(values: np.ndarray, column: Column, cells: pd.Series) -> np.ndarray:
    if values.dtype.kind == "M":
        return values
    if values.dtype == object:
        dates = pd.to_datetime(pd.Series(values, dtype=object), format=column.form, errors="coerce", utc=True)
        wrong = dates.isna().to_numpy() & np.array([text is not None for text in values.tolist()], dtype=bool)
        if not wrong.any():
            return plain_dates(dates)
    else:
        wrong = ~np.isnan(values) if values.dtype == np.float64 else np.ones(len(values), dtype=bool)
        if not wrong.any():
            return np.full(len(values), np.datetime64("NaT", "us"))
    form = "like 2024-12-31" if column.form == "ISO8601" else f"written as {column.form}"
    raise _wrong(column, cells, int(np.argmax(wrong)), f"not a date {form}")


def _labels(values: np.ndarray) -> np.ndarray:
    if values.dtype == object:
        return _objects([label_of(value) if isinstance(value, bool) else value for value in values.tolist()])
    missing = np.zeros(len(values), dtype=bool) if values.dtype == bool else pd.isna(values)
    return _objects([None if gone else label_of(value) for value, gone in zip(values, missing, strict=True)])


def _wrong(column: Column, cells: pd.Series, place: int, what: str) -> TableError:
    return TableError(
        f"Column {column.name!r} is a {column.kind} column, and row {int(cells.index[place]) + 1} holds "
        f"{str(cells.iloc[place])[:60]!r}, which is {what}. "
        "Mend the cell, leave it empty, or fit anew with another kind for this column."
    )


def _infinite(column: Column, cells: pd.Series, place: int) -> TableError:
    return TableError(
        f"Column {column.name!r}, row {int(cells.index[place]) + 1}, holds {str(cells.iloc[place])[:60]}; "
        f"numbers must be finite and within ±{MOST:g}. Mend the cell, or leave it empty if the value is not known."
    )

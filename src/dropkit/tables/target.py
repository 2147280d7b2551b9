"""The column to predict: which task it asks for, why, and its classes.

Found when the task is "auto", and said aloud:

- text and truth values: classification;
- numbers, two different ones: classification;
- whole numbers, at most 10 different ones, each in at least 1 % of the rows: classification (a code such as 1, 2, 3);
- all other numbers: regression.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import pandas as pd

from dropkit.errors import OptionError, TableError
from dropkit.tables.cells import Column, label_of, read_column
from dropkit.tables.columns import describe_column

Task = Literal["regression", "classification"]

MOST_CLASSES = 1000
_CODES, _CODE_SHARE = 10, 0.01


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be predicted.

    Attributes:
        column: the target column and how its cells are read.
        task: "regression" or "classification".
        reason: why this task, a sentence to print.
        classes: labels in the order of the model's outputs: by value if all are numbers, else by text. Empty for
            regression.
        counts: rows of each class.
        rows: rows with a value.
        missing: rows without one.
    """

    column: Column
    task: Task
    reason: str
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    rows: int
    missing: int

    @property
    def name(self) -> str:
        """The column's name."""
        return self.column.name

    def encode(self, cells: pd.Series) -> np.ndarray:
        """Turn cells of the target column into what a network learns.

        Args:
            cells: the index counts rows of the table from 0.

        Returns:
            (rows,): float64 with NaN where missing for regression; int64 class index with -1 where missing otherwise.

        Raises:
            TableError: a cell of another type, infinite, or of a class that is none of `classes`.
        """
        values = read_column(cells, self.column)
        if self.task == "regression":
            return values.astype(np.float64, copy=False)
        place = {label: index for index, label in enumerate(self.classes)}
        labels = _class_labels(values)
        codes = np.array([-1 if label is None else place.get(label, -2) for label in labels], dtype=np.int64)
        if (codes == -2).any():
            at = int(np.argmax(codes == -2))
            raise TableError(
                f"Target {self.name!r}, row {int(cells.index[at]) + 1}, is of class {labels[at]!r}; the classes are "
                f"{_shown(self.classes)}. Correct the cell or leave the row out."
            )
        return codes


def describe_target(
    cells: pd.Series,
    task: str = "auto",
    *,
    name: str | None = None,
    missing: Literal["refuse", "drop"] = "refuse",
) -> Target:
    """Find the task from all cells of the target column.

    Args:
        cells: the whole column, its index counting rows from 0.
        task: "auto", "regression" or "classification".
        name: of the column; the name of `cells` by default.
        missing: "refuse" rows without a target, or "drop" them (the caller leaves them out).

    Raises:
        TableError: fewer than two rows, missing or infinite values, one value only, text for a regression, dates,
            a class seen once, more than 1000 classes.
        OptionError: a task that is none.
    """
    if task not in ("auto", "regression", "classification"):
        raise OptionError(f"task={task!r} was given; a task is auto, regression or classification.")
    name = str(cells.name) if name is None else name
    column = describe_column(cells, name, keep=True)
    _check_filled(column, cells, missing)
    if column.kind == "date":
        raise TableError(
            f"Target {name!r} holds dates such as {column.examples[0]}. "
            "Give a number or a class, such as days since a start."
        )
    if column.kind == "boolean":  # as classes, truth values keep the spelling of the table
        column = describe_column(cells, name, kind="category", keep=True)
    found, reason = _task(column, read_column(cells, column), task)
    if found == "regression":
        if column.kind != "number":
            raise TableError(
                f"Target {name!r} holds text such as {column.examples[0]!r}; regression needs numbers. "
                "Choose classification, or give a column of numbers."
            )
        return Target(column, found, reason, (), (), column.rows - column.missing, column.missing)
    counts = Counter(label for label in _class_labels(read_column(cells, column)) if label is not None)
    _check_classes(column, counts)
    classes = tuple(sorted(counts, key=_by_value if column.kind == "number" else str))
    return Target(
        column=column,
        task=found,
        reason=reason,
        classes=classes,
        counts=tuple(counts[label] for label in classes),
        rows=column.rows - column.missing,
        missing=column.missing,
    )


def _task(column: Column, values: np.ndarray, asked: str) -> tuple[Task, str]:
    name = column.name
    if asked != "auto":
        return cast(Task, asked), f"{asked.capitalize()} on {name!r}, as asked."
    override = "If it should be {0}, give --task {0}."
    if column.kind != "number":
        return "classification", f"Classification: {name!r} holds {column.distinct} different labels."
    known = values[~np.isnan(values)]
    distinct, times = np.unique(known, return_counts=True)
    shown = _shown([label_of(value) for value in distinct[:_CODES]])  # told only where there are no more
    if len(distinct) == 2:
        return (
            "classification",
            f"Classification: {name!r} has two values, {shown}. {override.format('regression')}",
        )
    if np.any(distinct != np.floor(distinct)):
        return "regression", f"Regression: {name!r} holds numbers with fractions ({len(distinct)} different)."
    if len(distinct) <= _CODES and times.min() >= _CODE_SHARE * len(known):
        return (
            "classification",
            f"Classification: {name!r} has few whole numbers, {shown}. {override.format('regression')}",
        )
    why = f"{len(distinct)} different whole numbers" + (
        ", some of them rare" if len(distinct) <= _CODES else ""
    )
    return "regression", f"Regression: {name!r} holds {why}. {override.format('classification')}"


def _check_filled(column: Column, cells: pd.Series, missing: str) -> None:
    name, known = column.name, column.rows - column.missing
    if column.dropped:  # lists, records, bytes
        raise TableError(f"Target {name!r} cannot be predicted: {column.dropped}. Give numbers or labels.")
    if known == 0:
        raise TableError(
            f"Target {name!r} has no value in any of {column.rows} rows. Give a table with known targets."
        )
    if column.missing and missing == "refuse":
        values = read_column(cells, column)
        gaps = np.array([v is None or v != v for v in values.tolist()], dtype=bool)
        first = int(cells.index[int(np.argmax(gaps))]) + 1
        strays = f" ({column.note})" if column.strays else ""
        rows = "row" if column.missing == 1 else "rows"
        raise TableError(
            f"Target {name!r} has no value in {column.missing} of {column.rows} rows, first in row {first}{strays}. "
            f"Learning needs a target in every row: leave out the {rows} or fill them in."
        )
    if known == 1:
        raise TableError(
            "The table has one row with a target; learning needs at least two, and many more to be of use."
        )
    if column.distinct == 1:
        raise TableError(
            f"Target {name!r} is {column.examples[0]} in every one of {known} rows; there is nothing to predict. "
            "Name another column."
        )


def _check_classes(column: Column, counts: Counter[str]) -> None:
    name = column.name
    if len(counts) > MOST_CLASSES or len(counts) > max(20, counts.total() // 2):
        kind = (
            "Choose regression."
            if column.kind == "number"
            else "Names and free text cannot be predicted: name another column."
        )
        raise TableError(
            f"Target {name!r} has {len(counts)} different values in {counts.total()} rows; a classification has "
            f"at most {MOST_CLASSES} classes, and rows enough of each. {kind}"
        )
    once = sorted(label for label, times in counts.items() if times == 1)
    if once:
        said = "Class" if len(once) == 1 else "Classes"
        raise TableError(
            f"{said} {_shown(once)} of target {name!r} {'is' if len(once) == 1 else 'are'} seen once; every class "
            "needs at least two rows, one to learn from and one to check on. Leave the row out, merge the class "
            "into another, or add rows."
        )


def _class_labels(values: np.ndarray) -> list[str | None]:
    if values.dtype == np.float64:
        return [None if np.isnan(value) else label_of(value) for value in values]
    return cast("list[str | None]", values.tolist())


def _by_value(label: str) -> float:
    return float(label)


def _shown(labels: list[str] | tuple[str, ...], most: int = 10) -> str:
    return ", ".join(labels[:most]) + (f" and {len(labels) - most} more" if len(labels) > most else "")

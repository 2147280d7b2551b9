"""From a table to a matrix: scikit-learn's transformers, set up from plain numbers and words.

A fitted encoder is a record of medians, means, scales and labels. The transformers are rebuilt from it at every use, so
the record can be written as JSON and read back without loss, and no code is ever loaded from a file.

Every row is encoded by itself: the rows around it, the size of a chunk or the number of files change no bit of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from dropkit.errors import ModelDirectoryError, TableError
from dropkit.records import rebuild
from dropkit.tables.cells import KINDS, MOST, NUMBER_FORMS, Column, read_column
from dropkit.tables.source import check_names, suggest

MOST_LABELS = 64
"""Most one-hot columns of a category, the pool of rare labels included."""

MOST_RARE = 10_000
"""Most rare labels that are remembered, to tell a rare label from one never seen."""

_FAR = 10.0  # standard deviations; a column with a value beyond this has a heavy tail
_BOUND = 1e30  # a scaled number stays within on its way to `_soft`, whose logarithm would pass infinity on


@dataclass(frozen=True, slots=True)
class NumberPart:
    """One encoded number: z = (t(x) - mean) / scale, with x the median where it is missing.

    t(x) = x, or asinh((x - center) / spread) where the column has a heavy tail.

    Attributes:
        column: where it comes from.
        part: "value", or of a date "days" (since 1970), "month", "day", "weekday" or "hour".
        median, mean, scale: of the rows the encoder learned from.
        tail: (center, spread) or None.
        gap: whether a second feature says that the value is missing.
    """

    column: str
    part: str
    median: float
    mean: float
    scale: float
    tail: tuple[float, float] | None
    gap: bool


@dataclass(frozen=True, slots=True)
class CategoryPart:
    """One category: a feature for each frequent label, one for the pool of rare labels, one for "missing".

    Attributes:
        column: where it comes from.
        labels: frequent labels, each with a feature of its own.
        rare: labels that share one feature.
        pool: whether that feature is there; labels never seen go there too, and are all zeros where it is not.
        gap: whether a feature says that the value is missing.
    """

    column: str
    labels: tuple[str, ...]
    rare: tuple[str, ...]
    pool: bool
    gap: bool

    @property
    def width(self) -> int:
        """How many features."""
        return len(self.labels) + self.pool + self.gap


@dataclass(frozen=True, slots=True)
class Encoded:
    """Encoded rows, and what in them was not known when the encoder was fitted.

    Attributes:
        matrix: (rows, D) float32.
        unseen: {column: cells with a label that was not in the rows the encoder learned from}.
        gaps: {column: missing cells, where there were none then}; they become the median, or zeros for a category.
    """

    matrix: np.ndarray
    unseen: Mapping[str, int] = field(default_factory=dict)
    gaps: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A fitted encoding of a table's columns.

    Attributes:
        columns: every column of the table as described, the dropped ones too.
        numbers: encoded numbers, in the order of the features.
        categories: encoded categories, after them.
    """

    columns: tuple[Column, ...]
    numbers: tuple[NumberPart, ...]
    categories: tuple[CategoryPart, ...]

    @classmethod
    def fit(cls, frame: pd.DataFrame, columns: Sequence[Column]) -> Encoder:
        """Learn medians, scales and labels.

        Args:
            frame: rows of the table, all or a uniform sample; its index counts the rows of the table.
            columns: descriptions of these columns (`describe_columns`).

        Raises:
            TableError: no column is left to learn from, or a cell is of another type than its column.
        """
        kept = [column for column in columns if column.dropped is None]
        if not kept:
            why = "; ".join(f"{column.name!r}: {column.dropped}" for column in columns)
            raise TableError(f"No column is left to learn from ({why}). Give a table with columns that vary.")
        frame = _named(frame)
        numbers: list[NumberPart] = []
        categories: list[CategoryPart] = []
        for column in kept:
            values = read_column(frame[column.name], column)
            if column.kind == "category":
                categories.append(_fit_category(values, column))
            else:
                for part, own in _parts(values, column).items():
                    if part in ("value", "days") or np.nanmin(own) < np.nanmax(
                        own
                    ):  # dates without hours have none
                        numbers.append(_fit_number(own, column.name, part))
        return cls(tuple(columns), tuple(numbers), tuple(categories))

    @property
    def used(self) -> tuple[Column, ...]:
        """The columns that must be there to encode a table."""
        return tuple(column for column in self.columns if column.dropped is None)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """D names, in the order of the matrix."""
        names = [n.column if n.part == "value" else f"{n.column} ({n.part})" for n in self.numbers]
        names += [f"{n.column} is missing" for n in self.numbers if n.gap]
        for c in self.categories:
            names += [f"{c.column} = {label}" for label in c.labels]
            names += [f"{c.column} = (other)"] * c.pool + [f"{c.column} is missing"] * c.gap
        return tuple(names)

    @property
    def features(self) -> int:
        """D, the width of the matrix."""
        return len(self.numbers) + sum(n.gap for n in self.numbers) + sum(c.width for c in self.categories)

    def check_columns(self, names: Sequence[str], where: str = "the table") -> tuple[str, ...]:
        """Return the columns of a new table that are not used, or say which needed one is not there.

        Raises:
            TableError: a column the encoder learned from is missing.
        """
        lacking = [column.name for column in self.used if column.name not in names]
        if lacking:
            said = "column" if len(lacking) == 1 else "columns"
            listed = ", ".join(map(repr, lacking[:8])) + (" and more" if len(lacking) > 8 else "")
            hint = suggest(lacking[0], tuple(names))
            raise TableError(
                f"{where} lacks the {said} {listed}, which the model learned from. {hint} Add what is missing."
            )
        needed = {column.name for column in self.used}
        return tuple(name for name in names if name not in needed)

    def transform(self, frame: pd.DataFrame) -> Encoded:
        """Encode rows; columns that are not used are ignored.

        Raises:
            TableError: a column is missing, or a cell is of another type than its column or infinite.
        """
        frame = _named(frame)
        self.check_columns(list(frame.columns))
        values = {column.name: read_column(frame[column.name], column) for column in self.used}
        of_column = {column.name: column for column in self.used}
        unseen: dict[str, int] = {}
        gaps: dict[str, int] = {}
        matrix = np.zeros((len(frame), self.features), dtype=np.float32)
        if not len(frame):
            return Encoded(matrix)
        if self.numbers:
            parts = {
                name: _parts(values[name], of_column[name])
                for name in dict.fromkeys(n.column for n in self.numbers)
            }
            raw = np.stack([parts[n.column][n.part] for n in self.numbers], axis=1)
            for n, empty in zip(self.numbers, np.isnan(raw).sum(axis=0), strict=True):
                if empty and not n.gap:
                    gaps[n.column] = int(empty)
            block = _encode_numbers(raw, self.numbers)
            matrix[:, : block.shape[1]] = block
        if self.categories:
            codes = np.empty((len(frame), len(self.categories)), dtype=np.int64)
            for k, c in enumerate(self.categories):
                codes[:, k], unknown, empty = _codes(values[c.column], c)
                if unknown:
                    unseen[c.column] = unknown
                if empty and not c.gap:
                    gaps[c.column] = empty
            matrix[:, self.features - sum(c.width for c in self.categories) :] = _one_hot(
                codes, self.categories
            )
        return Encoded(matrix, unseen, gaps)

    def to_json(self) -> dict[str, Any]:
        """The encoder as plain data; `from_json` gives back an equal one, bit for bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Encoder:
        """Rebuild an encoder, trusting nothing.

        Raises:
            ModelDirectoryError: the data do not describe an encoder.
        """
        try:
            encoder = rebuild(cls, data, "encoder")
            _check(encoder)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelDirectoryError(
                f"The encoder of the model is not valid ({type(error).__name__}: {error}). "
                "Copy the model anew or fit again."
            ) from None
        return encoder


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with its column names as text, each there once."""
    names = check_names([str(name) for name in frame.columns], "the table")
    return frame.set_axis(list(names), axis=1)


def _parts(values: np.ndarray, column: Column) -> dict[str, np.ndarray]:
    """Numbers that stand for a column: itself, or the parts of a date."""
    if column.kind != "date":
        return {"value": values}
    gone = np.isnat(values)
    day, month = values.astype("datetime64[D]"), values.astype("datetime64[M]")
    of_day = values - day
    parts = {
        "days": (values - np.datetime64(0, "us")) / np.timedelta64(86_400_000_000, "us"),
        "month": month.astype(np.int64) % 12 + 1.0,
        "day": (day - month.astype("datetime64[D]")) / np.timedelta64(1, "D") + 1.0,
        "weekday": (day.astype(np.int64) + 3) % 7 + 0.0,  # 1970-01-01 was a Thursday; Monday is 0
        "hour": of_day / np.timedelta64(3_600_000_000, "us"),
    }
    return {name: np.where(gone, np.nan, part) for name, part in parts.items()}


def _fit_number(values: np.ndarray, column: str, part: str) -> NumberPart:
    """Learn one number. A heavy tail (a value beyond 10 standard deviations) is drawn in by asinh.

    Unlike quantiles or clipping, asinh has no bound: a value far outside the table still looks far outside.
    """
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import RobustScaler, StandardScaler

    raw = values.reshape(-1, 1)
    gap = bool(np.isnan(values).any())
    known = raw[~np.isnan(values)]
    if (
        not len(known) or known.min() == known.max()
    ):  # the mean of equal numbers may differ from them by rounding
        value = float(known[0, 0]) if len(known) else 0.0
        return NumberPart(column, part, value, value, 1.0, None, gap)
    median = float(SimpleImputer(strategy="median").fit(known).statistics_[0])
    scaler = StandardScaler().fit(known)
    tail = None
    if np.abs(scaler.transform(known)).max() > _FAR:
        robust = RobustScaler(unit_variance=True).fit(known)
        away = np.abs(known - robust.center_)
        # more than half of the rows share one value: measure the others
        spread = (
            float(robust.scale_[0])
            if np.ptp(np.quantile(known, [0.25, 0.75])) > 0
            else float(np.median(away[away > 0]))
        )
        tail = (float(robust.center_[0]), spread)
        scaler = StandardScaler().fit(_drawn_in(known, tail))
    return NumberPart(
        column,
        part,
        median,
        float(scaler.mean_[0]),
        float(scaler.scale_[0]),
        tail,
        gap and part in ("value", "days"),
    )


def _drawn_in(values: np.ndarray, tail: tuple[float, float]) -> np.ndarray:
    return np.arcsinh((values - tail[0]) / tail[1])


def _soft(z: np.ndarray) -> np.ndarray:
    """z itself up to 10 standard deviations, and beyond only by its logarithm: 10 + log(1 + |z| - 10), with its sign.

    A column that had such values in training is drawn in by asinh already, so this is for new rows: a network is
    straight far outside, and one mistyped cell would be answered by a number as absurd as itself.
    """
    beyond = np.maximum(np.abs(z) - _FAR, 0.0)
    return np.sign(z) * (np.minimum(np.abs(z), _FAR) + np.log1p(beyond))


def _encode_numbers(raw: np.ndarray, numbers: Sequence[NumberPart]) -> np.ndarray:
    """Fill gaps, draw in tails and scale, all numbers of the table together: (rows, numbers + gaps) float64."""
    from sklearn.impute import MissingIndicator, SimpleImputer
    from sklearn.preprocessing import FunctionTransformer, RobustScaler, StandardScaler

    medians = np.array([[n.median for n in numbers]])
    imputer = SimpleImputer(strategy="median").fit(medians)  # the median of one row is the row
    scaler = StandardScaler().fit(medians)
    scaler.mean_, scaler.scale_ = np.array([n.mean for n in numbers]), np.array([n.scale for n in numbers])
    filled = imputer.transform(raw)
    heavy = [k for k, n in enumerate(numbers) if n.tail is not None]
    if heavy:
        tails = np.array([numbers[k].tail for k in heavy])
        robust = RobustScaler().fit(medians[:, heavy])
        robust.center_, robust.scale_ = tails[:, 0], tails[:, 1]
        filled[:, heavy] = FunctionTransformer(np.arcsinh).transform(robust.transform(filled[:, heavy]))
    scaled = _soft(np.clip(scaler.transform(filled), -_BOUND, _BOUND))
    gaps = [k for k, n in enumerate(numbers) if n.gap]
    if not gaps:
        return np.asarray(scaled)
    indicator = MissingIndicator(features="all").fit(medians[:, gaps])
    return np.hstack([scaled, indicator.transform(raw[:, gaps])])


def _fit_category(values: np.ndarray, column: Column) -> CategoryPart:
    """Learn which labels are frequent: in 10 rows (in 1 % below 1000 rows, in 2 at least), and of these the top 63."""
    from sklearn.preprocessing import OneHotEncoder

    filled = np.array([value for value in values.tolist() if value is not None], dtype=object)
    gap = len(filled) < len(values)
    if column.only_filled or not len(filled):
        return CategoryPart(column.name, (), (), pool=column.only_filled, gap=gap)
    least = max(2, min(10, len(values) // 100))
    learned = OneHotEncoder(
        min_frequency=least,
        max_categories=MOST_LABELS,
        handle_unknown="infrequent_if_exist",
        sparse_output=False,
    ).fit(filled.reshape(-1, 1))
    pooled = learned.infrequent_categories_[0]
    rare = frozenset() if pooled is None else frozenset(pooled.tolist())
    labels = tuple(label for label in learned.categories_[0].tolist() if label not in rare)
    return CategoryPart(column.name, labels, tuple(sorted(rare))[:MOST_RARE], pool=bool(rare), gap=gap)


def _codes(values: np.ndarray, part: CategoryPart) -> tuple[np.ndarray, int, int]:
    """The feature each label switches on (-1: none), the number of labels never seen, and of missing cells."""
    missing = pd.isna(values)
    pool = len(part.labels) if part.pool else -1
    where = {label: code for code, label in enumerate(part.labels)} | dict.fromkeys(part.rare, pool)
    listed = values.tolist()
    codes = np.array([where.get(label, -2) for label in listed], dtype=np.int64)
    unknown = (codes == -2) & ~missing
    codes[codes == -2] = pool
    codes[missing] = len(part.labels) + part.pool if part.gap else -1
    # a column of names has labels nobody remembered, so none of them is news
    remembered = bool(part.labels or part.rare)
    return codes, int(unknown.sum()) if remembered else 0, int(missing.sum())


def _one_hot(codes: np.ndarray, categories: Sequence[CategoryPart]) -> np.ndarray:
    from sklearn.preprocessing import OneHotEncoder

    encoder = OneHotEncoder(
        categories=[np.arange(c.width) for c in categories],
        handle_unknown="ignore",
        sparse_output=False,
        dtype=np.float32,
    )
    return np.asarray(encoder.fit(np.zeros((1, len(categories)), dtype=np.int64)).transform(codes))


def _check(encoder: Encoder) -> None:
    """What single fields cannot show: kinds, scales, and parts that belong to columns."""
    used = {column.name: column for column in encoder.used}
    if len({column.name for column in encoder.columns}) != len(encoder.columns) or not used:
        raise ValueError("columns are named twice, or none is used")
    for column in encoder.columns:
        if column.kind not in KINDS or (column.kind == "number" and column.form not in ("", *NUMBER_FORMS)):
            raise ValueError(f"column {column.name!r} is of kind {column.kind!r}, form {column.form!r}")
    for n in encoder.numbers:
        parts = ("days", "month", "day", "weekday", "hour") if used[n.column].kind == "date" else ("value",)
        if (
            n.part not in parts
            or not np.all(np.abs([n.median, n.mean, n.scale, *(n.tail or ())]) <= MOST)  # null is read as NaN
            or n.scale <= 0
            or (n.tail is not None and n.tail[1] <= 0)
            or used[n.column].kind == "category"
        ):
            raise ValueError(f"number {n.column!r} has no such part, or a scale that is not positive")
    for c in encoder.categories:
        if used[c.column].kind != "category" or len(set(c.labels)) != len(c.labels) or c.width == 0:
            raise ValueError(f"category {c.column!r} is not one")

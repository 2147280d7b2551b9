"""A table as rows under named columns, read in chunks as often as needed; and tables that are in memory already."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import pandas as pd

from dropkit.errors import OptionError, TableError

CHUNK_ROWS = 20_000
"""Rows held in memory at a time, unless a caller asks for another number."""

Keep = Callable[[int], np.ndarray]
"""Asked once for each batch of n rows, from top to bottom: which of them are wanted, (n,) bool."""


class TableSource(ABC):
    """Rows under named columns, read in chunks as often as needed.

    Attributes:
        name: where the table comes from, for messages.
        columns: names in file order, each once.
        header: False where the file named no columns and they are called column_1, column_2, ...
        notes: what was decided while opening, in sentences for the reader of the report.
    """

    def __init__(
        self, name: str, columns: Sequence[str], *, header: bool = True, notes: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.columns = tuple(columns)
        self.header = header
        self.notes = tuple(notes)
        self._rows: int | None = None

    @abstractmethod
    def _read(self, rows: int, columns: Sequence[str], keep: Keep) -> Iterator[pd.DataFrame]:
        """Yield frames with the named columns, of the wanted rows among each batch of at most `rows` rows."""

    def chunks(self, rows: int = CHUNK_ROWS, columns: Sequence[str] | None = None) -> Iterator[pd.DataFrame]:
        """Yield the table from top to bottom; the index of each frame counts the rows of the table from 0.

        Args:
            rows: most rows in a frame, at least 1.
            columns: the columns wanted, all by default.

        Raises:
            TableError: a column is not there, or the file breaks off or changes shape on the way.
            OptionError: rows is below 1.
        """
        if rows < 1:
            raise OptionError(f"rows={rows!r} was given; a chunk has at least 1 row.")
        wanted = self.columns if columns is None else tuple(self.column(name) for name in columns)
        start = 0
        for frame in self._read(rows, wanted, lambda n: np.ones(n, dtype=bool)):
            frame.index = pd.RangeIndex(start, start + len(frame))
            start += len(frame)
            yield frame
        self._rows = start

    def count(self) -> int:
        """Number of rows; unless the table was read before, this reads it once."""
        if self._rows is None:
            for _ in self.chunks(columns=self.columns[:1]):
                pass
        assert self._rows is not None
        return self._rows

    def cells(self, column: str) -> pd.Series:
        """All cells of one column, in memory."""
        parts = [frame[column] for frame in self.chunks(columns=[self.column(column)])]
        return pd.concat(parts) if len(parts) > 1 else parts[0]

    def sample(self, n: int, seed: int = 0) -> pd.DataFrame:
        """Draw n rows uniformly without replacement in one pass, in table order; the whole table if it is no longer.

        Row i gets the i-th number of a generator as its key, and the n smallest keys win. So the sample does not depend
        on how the table is cut into chunks; the index of the frame tells which rows were drawn.

        Source: Efraimidis and Spirakis 2006, doi 10.1016/j.ipl.2005.11.003, with equal weights.
        """
        if n < 1:
            raise OptionError(f"n={n!r} was given; a sample has at least 1 row.")
        generator = np.random.Generator(np.random.Philox(key=seed))
        frames: list[pd.DataFrame] = []
        keys, places = np.empty(0), np.empty(0, dtype=np.int64)
        seen, bar = 0, np.inf

        def keep(rows: int) -> np.ndarray:
            nonlocal keys, places, seen
            drawn = generator.random(rows)
            wanted = drawn < bar
            keys = np.concatenate([keys, drawn[wanted]])
            places = np.concatenate([places, seen + np.flatnonzero(wanted)])
            seen += rows
            return wanted

        for frame in self._read(CHUNK_ROWS, self.columns, keep):
            frames.append(frame)
            if len(keys) > 2 * n:  # now and then: who cannot win any more goes, and the bar is lowered
                winners = np.sort(np.argpartition(keys, n - 1)[:n])
                frames = [pd.concat(frames).iloc[winners]]
                keys, places = keys[winners], places[winners]
                bar = keys.max()
        self._rows = seen
        winners = np.sort(np.argpartition(keys, n - 1)[:n]) if len(keys) > n else np.arange(len(keys))
        sample = (pd.concat(frames) if len(frames) > 1 else frames[0]).iloc[winners]
        sample.index = pd.Index(places[winners])
        return sample

    def column(self, name: str) -> str:
        """The name itself if the table has such a column, or else an error that says which it has.

        Raises:
            TableError: there is no such column.
        """
        if name in self.columns:
            return name
        raise TableError(f"Column {name!r} is not in {self.name}. {suggest(name, self.columns)}")


class FrameTable(TableSource):
    """A table that is in memory already."""

    def __init__(self, frame: pd.DataFrame, columns: Sequence[str], name: str = "the table") -> None:
        super().__init__(name, check_names(columns, name))
        self._frame = frame
        self._rows = len(frame)

    def _read(self, rows: int, columns: Sequence[str], keep: Keep) -> Iterator[pd.DataFrame]:
        places = [self.columns.index(column) for column in columns]
        for start in range(0, max(len(self._frame), 1), rows):
            part = self._frame.iloc[start : start + rows, places]
            part = part[keep(len(part))]
            part.columns = pd.Index(columns, dtype=object)
            yield part


def from_frame(data: Any, name: str = "the table") -> TableSource:
    """A pandas DataFrame or a 2-D array (columns x0, x1, ...) as a table.

    Raises:
        TableError: other axes, no columns, or two columns of one name.
    """
    if isinstance(data, pd.DataFrame):
        if isinstance(data.columns, pd.MultiIndex):
            raise TableError(
                f"{name} has columns on {data.columns.nlevels} levels; flatten them to one name each."
            )
        return FrameTable(data, [str(column) for column in data.columns], name)
    array = np.asarray(data)
    if array.ndim != 2:
        raise TableError(f"{name} has {array.ndim} axes; a table has two, rows and columns.")
    return FrameTable(pd.DataFrame(array), [f"x{i}" for i in range(array.shape[1])], name)


def check_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """The names, if each is there once.

    Raises:
        TableError: no columns, or names used twice.
    """
    if not names:
        raise TableError(f"{where} has no columns. A table has at least one.")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        listed = ", ".join(repr(name) for name in twice[:5]) + (" and more" if len(twice) > 5 else "")
        raise TableError(
            f"{where} has more than one column called {listed}. Give every column a name of its own."
        )
    return tuple(names)


def suggest(name: str, columns: Sequence[str]) -> str:
    """Which column was meant, perhaps, and which there are."""
    close = [c for c in columns if c.lower() == name.lower()] or get_close_matches(
        name, columns, n=1, cutoff=0.6
    )
    if not close and f"column_{name}" in columns:
        close = [f"column_{name}"]
    listed = ", ".join(columns[:12]) + (f" and {len(columns) - 12} more" if len(columns) > 12 else "")
    return (f"Did you mean {close[0]!r}? " if close else "") + f"Its columns are: {listed}."


def one_line(error: BaseException) -> str:
    """What a library has to say, shortened to a sentence."""
    text = " ".join(str(error).split())[:200]
    return text if text.endswith(".") else text + "."

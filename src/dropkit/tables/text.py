"""Tables written as text: CSV, TSV, and numbers between blanks, with every cell exactly as it was written."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader, StringIO, TextIOWrapper
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from dropkit.errors import OptionError, TableError
from dropkit.tables.source import Keep, TableSource, check_names, one_line

_SPELLINGS = (
    ", ?, ., NA, N/A, n/a, na, #N/A, #NA, <NA>, NaN, nan, -nan, -NaN, NAN, NaT, NULL, Null, null, None, none"
)
MISSING = frozenset(_SPELLINGS.split(", ")) | {"missing", "Missing", "MISSING"}
"""Spellings of "no value", after blanks at both ends are cut off."""

_PROBE = 1 << 18  # characters looked at to find delimiter and header
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_GZIP = b"\x1f\x8b"
_NOT_TABLES = {  # how files begin that people hand over by mistake
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive (an Excel workbook is one)",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word document",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"SQLite format 3": "an SQLite database",
    b"\x7fELF": "a program",
}
WANTED = "A table is a CSV or TSV file (also .gz) or a Parquet file."


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a text table is written.

    Attributes:
        delimiter: between cells; " " stands for any run of blanks.
        quoted: whether "..." holds a cell together. Where quotes are part of the text, they are left alone.
        width: cells in a row.
    """

    delimiter: str
    quoted: bool
    width: int


class TextTable(TableSource):
    """A CSV or TSV file, or numbers between blanks. Every cell comes as it is written."""

    def __init__(self, path: Path, *, header: bool | Literal["auto"], encoding: str | None) -> None:
        self._path = path
        notes: list[str] = []
        self._encoding = _find_encoding(path, encoding)
        if encoding is None and self._encoding == "cp1252":
            notes.append(f"{path.name} is not UTF-8 and is read as Windows-1252 (Western European).")
        with self._open() as file:
            probe = file.read(_PROBE)
            whole = not file.read(1)
        _check_is_table(path, probe)
        self._dialect = _find_dialect(path, probe, whole=whole)
        try:
            first, *second = islice(self._records(), 2)
        except csv.Error as error:
            raise self._misquoted(error) from None
        self._header_rows = int(not _is_data(first) if header == "auto" else header)
        if self._header_rows:
            names = [cell.strip() or f"unnamed_{i + 1}" for i, cell in enumerate(first)]
            unnamed = [name for name, cell in zip(names, first, strict=True) if not cell.strip()]
            if unnamed:
                notes.append(f"Columns without a name are called {', '.join(unnamed)}.")
        else:
            names = [f"column_{i + 1}" for i in range(len(first))]
            why = "as asked" if header is False else "the first row holds numbers only"
            notes.append(
                f"{path.name} is read without a header ({why}): its columns are column_1 to {names[-1]}."
            )
        super().__init__(
            str(path), check_names(names, str(path)), header=bool(self._header_rows), notes=notes
        )
        if self._header_rows and not second:
            raise TableError(
                f"{path} has a header ({len(names)} columns) and no rows. Give a table with rows."
            )

    def _open(self) -> TextIOWrapper:
        return TextIOWrapper(_open_bytes(self._path), encoding=self._encoding, newline="")

    def _records(self) -> Iterator[list[str]]:
        """Rows that hold anything, the header first."""
        with self._open() as file:
            for row in _parse(file, self._dialect):
                if not _blank(row):
                    yield row

    def _read(self, rows: int, columns: Sequence[str], keep: Keep) -> Iterator[pd.DataFrame]:
        width = len(self.columns)
        places = [self.columns.index(name) for name in columns]
        try:
            records = islice(self._records(), self._header_rows, None)
            while batch := list(islice(records, rows)):
                if any(map(width.__ne__, map(len, batch))):
                    raise self._ragged()
                batch = list(compress(batch, keep(len(batch)).tolist()))
                cells = list(zip(*batch, strict=True)) or [()] * width
                yield pd.DataFrame({self.columns[i]: _objects(cells[i]) for i in places}, dtype=object)
        except csv.Error as error:
            raise self._misquoted(error) from None
        except (
            OSError,
            EOFError,
            zlib.error,
            UnicodeError,
        ) as error:  # the file has changed since it was opened
            raise TableError(
                f"{self.name} cannot be read to its end: {one_line(error)} Open it again."
            ) from None

    def _ragged(self) -> TableError:
        """Read again, slowly, to say which line has too few or too many cells."""
        width = len(self.columns)
        with self._open() as file:
            lines = _Lines(file)
            row = next(row for row in _parse(lines, self._dialect) if not _blank(row) and len(row) != width)
        found = "1 cell" if len(row) == 1 else f"{len(row)} cells"
        return TableError(
            f"{self.name}, line {lines.number}, has {found} where the table has {width} columns "
            f"(cells are separated by {_DELIMITERS[self._dialect.delimiter]}). Mend the line or quote the cell."
        )

    def _misquoted(self, error: csv.Error) -> TableError:
        """Read again to say where the row starts that the parser gave up on."""
        started = 1
        with self._open() as file, contextlib.suppress(csv.Error):
            lines = _Lines(file)
            for _ in _parse(lines, self._dialect):
                started = lines.number + 1
        return TableError(
            f"{self._path}: the row that starts on line {started} has a quote out of place ({error}). "
            'Close the quote, or write a quote inside a cell as "".'
        )


# Between commas a quote always holds a cell together; between tabs it may be part of the text.
_QUOTED = {",": (True,), ";": (True,), "\t": (True, False), "|": (True, False), " ": (False,)}
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "blanks"}


class _Lines:
    """Lines of a file, counted as they are handed on."""

    def __init__(self, file: TextIOWrapper) -> None:
        self._file, self.number = file, 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            yield line


def _objects(cells: Sequence[str]) -> np.ndarray:
    column = np.empty(len(cells), dtype=object)
    column[:] = cells
    return column


def _blank(row: Sequence[str]) -> bool:
    return not row or (len(row) == 1 and not row[0].strip())


def _is_data(first: Sequence[str]) -> bool:
    """Whether a first row holds values, not names: numbers and missing marks only, and no mere count 0, 1, 2, ..."""
    cells = [cell.strip() for cell in first]
    numbers = [cell for cell in cells if _NUMBER.fullmatch(cell)]
    if not numbers or any(cell not in MISSING and not _NUMBER.fullmatch(cell) for cell in cells):
        return False
    return len(cells) == 1 or cells != [str(i) for i in range(len(cells))]


def _parse(lines: Any, dialect: Dialect) -> Iterator[list[str]]:
    if dialect.delimiter == " ":
        return (line.split() for line in lines)
    quoting: Any = csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE
    return csv.reader(
        lines, delimiter=dialect.delimiter, quoting=quoting, strict=dialect.quoted, skipinitialspace=True
    )


def _check_is_table(path: Path, probe: str) -> None:
    """Refuse text that is no table."""
    if not probe.strip():
        raise TableError(f"{path} holds blanks only. {WANTED}")
    if re.match(r"\s*<(!doctype|html|\?xml|svg|head)", probe, re.IGNORECASE):
        raise TableError(f"{path} is a web page or XML, not a table. {WANTED}")
    if re.match(r"\s*(\{\s*\"|\[\s*[\[{])", probe):
        raise TableError(f"{path} looks like JSON, not a table. {WANTED}")


def _find_dialect(path: Path, probe: str, *, whole: bool) -> Dialect:
    """Choose the delimiter under which the first rows have one and the same number of cells, more than one.

    Tab, semicolon and bar go before the comma, which is also a decimal mark; blanks count only between numbers.
    Where nothing fits exactly the delimiter of the extension or the most regular one is taken, and the
    row that does not fit is named on reading.
    """
    text = probe if whole else probe[: probe.rfind("\n") + 1] or probe
    by_extension = "\t" if ".tsv" in path.suffixes else ","
    best: tuple[float, Dialect] | None = None
    for delimiter in ("\t", ";", "|", ",", " "):
        for quoted in _QUOTED[delimiter]:
            rows = _rows_of_probe(text, Dialect(delimiter, quoted, 0), whole=whole)
            if not rows:
                continue
            (width, times), *_ = Counter(len(row) for row in rows).most_common(1)
            if width < 2 or (delimiter == " " and not _mostly_numbers(rows)):
                continue
            if times == len(rows) and len(rows) > 1:
                return Dialect(delimiter, quoted, width)
            fit = times / len(rows) + (1.0 if delimiter == by_extension else 0.0)
            if best is None or fit > best[0]:
                best = fit, Dialect(delimiter, quoted, width)
    return best[1] if best is not None else Dialect(by_extension, True, 1)


def _rows_of_probe(text: str, dialect: Dialect, *, whole: bool, most: int = 500) -> list[list[str]]:
    """Parse the first rows; none when the quotes do not work out."""
    rows: list[list[str]] = []
    try:
        for row in islice(_parse(StringIO(text, newline=""), dialect), most):
            if not _blank(row):
                rows.append(row)
    except csv.Error as error:
        if whole or "unexpected end" not in str(error):  # the probe may cut a quoted cell in two
            return []
    return rows


def _mostly_numbers(rows: list[list[str]]) -> bool:
    cells = list(chain.from_iterable(rows[1:] or rows))
    return sum(bool(_NUMBER.fullmatch(cell)) or cell in MISSING for cell in cells) > 0.5 * len(cells)


def _open_bytes(path: Path) -> BufferedReader:
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    return cast(BufferedReader, gzip.open(path, "rb")) if packed else path.open("rb")


def _find_encoding(path: Path, asked: str | None) -> str:
    """Read the file once to know that it is text, all of it, in which encoding."""
    try:
        with _open_bytes(path) as file:
            start = file.read(64)
            for magic, what in _NOT_TABLES.items():
                if start.startswith(magic):
                    raise TableError(f"{path} is {what}, not a table. {WANTED} Export the data as CSV.")
            if asked is not None:
                return _check_encoding(path, file, start, asked)
            if start.startswith((b"\xff\xfe", b"\xfe\xff")):
                return _check_encoding(path, file, start, "utf-16")
            decoder = _decoder("utf-8")
            block, encoding, ended = start, "utf-8-sig", False
            while not ended:
                if b"\0" in block:
                    raise TableError(f"{path} holds binary data, not text. {WANTED}")
                ended = not block
                try:
                    decoder.decode(block, final=ended)
                except UnicodeDecodeError:
                    encoding = "cp1252"
                    decoder = _decoder("latin-1")  # decodes anything; only the search for zero bytes goes on
                block = file.read(1 << 20)
            if encoding == "cp1252":
                file.seek(0)
                return _check_encoding(path, file, b"", "cp1252")
            return encoding
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TableError(f"{path} is a damaged gzip file: {one_line(error)} Pack it anew.") from None
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error.strerror or error}.") from None


def _check_encoding(path: Path, file: BufferedReader, start: bytes, encoding: str) -> str:
    try:
        decoder = _decoder(encoding)
    except LookupError:
        raise OptionError(
            f"encoding={encoding!r} was given; give one that Python knows, like 'latin-1'."
        ) from None
    try:
        decoder.decode(start)
        while block := file.read(1 << 20):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeError:
        raise TableError(
            f"{path} is neither UTF-8 nor {encoding} text. Save it as UTF-8, or name the encoding."
        ) from None
    return encoding


def _decoder(encoding: str) -> Any:
    return codecs.getincrementaldecoder(encoding)(errors="strict")

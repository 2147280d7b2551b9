"""Open a table: CSV, TSV or Parquet, found by content; or a folder of Parquet files.

A text table is read as text: what a cell means is decided once for a whole column (`columns.py`), never chunk by chunk,
so the size of the chunks changes nothing. A Parquet file and a table in memory keep their own types.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd

from dropkit.errors import TableError
from dropkit.tables.source import CHUNK_ROWS, Keep, TableSource, check_names, from_frame, one_line
from dropkit.tables.text import WANTED, TextTable

__all__ = ["CHUNK_ROWS", "ParquetTable", "TableSource", "TextTable", "from_frame", "open_table"]

_PARQUET = b"PAR1"


def open_table(
    path: str | Path,
    *,
    header: bool | Literal["auto"] = "auto",
    encoding: str | None = None,
) -> TableSource:
    """Open a CSV, TSV or Parquet file, plain or packed with gzip, found by its content; or a folder of Parquet files.

    Args:
        path: the file, or a folder whose files that end in .parquet are one table, in the order of their names.
        header: whether the first row names the columns. "auto" takes it as data when every cell of it is a number or
            missing (and it does not just count 0, 1, 2, ...); the columns are then column_1, column_2, ...
        encoding: of a text table; None means UTF-8 (UTF-16 by its mark), and Windows-1252 with a note if it is neither.

    Raises:
        TableError: no such file, a folder without Parquet files or of files with other columns, not a table, empty, a
            header without rows, columns of the same name.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith((".", "_")))
        if not files:
            raise TableError(f"{path} is a folder without a file that ends in .parquet. {WANTED}")
        return ParquetTable(path, files)
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise TableError(f"{path} does not exist. Give the path of a CSV or Parquet file.") from None
    except (OSError, ValueError) as error:
        raise TableError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if not start:
        raise TableError(f"{path} is empty (0 bytes). {WANTED}")
    if start.startswith(_PARQUET):
        return ParquetTable(path)
    return TextTable(path, header=header, encoding=encoding)


class ParquetTable(TableSource):
    """Parquet files one below the other, a batch of rows at a time; a row group of the columns asked for is in memory.

    Args:
        path: what the user named.
        files: in order; by default the path itself.
    """

    def __init__(self, path: Path, files: Sequence[Path] | None = None) -> None:
        self._files = [path] if files is None else list(files)
        schemas, rows = zip(*map(_look_into, self._files), strict=True)
        types = schemas[0]
        for file, other in zip(self._files[1:], schemas[1:], strict=True):
            if other != types:
                raise TableError(
                    f"{file} {_difference(types, other)} {self._files[0].name}. Write all files alike."
                )
        names = [name for name, _ in types]
        index = [name for name in names if re.fullmatch(r"__index_level_\d+__", name)]
        notes = [f"The row labels stored with {path.name} are left out."] if index else []
        super().__init__(str(path), check_names([n for n in names if n not in index], str(path)), notes=notes)
        if not sum(rows):
            raise TableError(f"{path} has {len(names)} columns and no rows. Give a table with rows.")

    def _read(self, rows: int, columns: Sequence[str], keep: Keep) -> Iterator[pd.DataFrame]:
        import pyarrow.parquet

        for path in self._files:
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=rows, columns=list(columns)):
                        # the index that pandas may have stored in the file is no part of the table
                        frame = batch.to_pandas(ignore_metadata=True, date_as_object=False)[list(columns)]
                        yield frame[keep(len(frame))]
            except (OSError, pyarrow.ArrowException) as error:
                raise _damaged(path, error) from None


def _look_into(path: Path) -> tuple[list[tuple[str, str]], int]:
    """Names and types of the columns of a Parquet file, and its number of rows."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            return [(f.name, str(f.type)) for f in schema], int(file.metadata.num_rows)
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise _damaged(path, error) from None


def _difference(types: list[tuple[str, str]], other: list[tuple[str, str]]) -> str:
    """In words, how the columns of a file differ from those of the first."""
    names, others = dict(types), dict(other)
    for name in dict.fromkeys((*names, *others)):
        if name not in others:
            return f"lacks the column {name!r} of"
        if name not in names:
            return f"has a column {name!r}, which is not in"
        if names[name] != others[name]:
            return f"holds {others[name]} in the column {name!r}, beside {names[name]} in"
    return "has its columns in another order than"


def _damaged(path: Path, error: Exception) -> TableError:
    return TableError(f"{path} is a damaged Parquet file: {one_line(error)} Write it anew.")

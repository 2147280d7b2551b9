"""Open a table: CSV, TSV or Parquet, found by content.

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
    """Open a CSV, TSV or Parquet file, plain or packed with gzip, found by its content.

    Args:
        path: the file.
        header: whether the first row names the columns. "auto" takes it as data when every cell of it is a number or
            missing (and it does not just count 0, 1, 2, ...); the columns are then column_1, column_2, ...
        encoding: of a text table; None means UTF-8 (UTF-16 by its mark), and Windows-1252 with a note if it is neither.

    Raises:
        TableError: no such file, a folder, not a table, empty, a header without rows, columns of the same name.
    """
    path = Path(path)
    if path.is_dir():
        raise TableError(f"{path} is a folder. {WANTED} Give the path of one file.")
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
    """A Parquet file, one batch of rows at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        self._path = path
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names, rows = list(file.schema_arrow.names), int(file.metadata.num_rows)
        except Exception as error:  # pyarrow raises many kinds for a damaged file
            raise self._damaged(error) from None
        index = [name for name in names if re.fullmatch(r"__index_level_\d+__", name)]
        notes = [f"The row labels stored with {path.name} are left out."] if index else []
        super().__init__(str(path), check_names([n for n in names if n not in index], str(path)), notes=notes)
        if rows == 0:
            raise TableError(f"{path} has {len(names)} columns and no rows. Give a table with rows.")

    def _read(self, rows: int, columns: Sequence[str], keep: Keep) -> Iterator[pd.DataFrame]:
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                for batch in file.iter_batches(batch_size=rows, columns=list(columns)):
                    # the index that pandas may have stored in the file is no part of the table
                    frame = batch.to_pandas(ignore_metadata=True, date_as_object=False)[list(columns)]
                    yield frame[keep(len(frame))]
        except (OSError, pyarrow.ArrowException) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> TableError:
        return TableError(f"{self._path} is a damaged Parquet file: {one_line(error)} Write it anew.")

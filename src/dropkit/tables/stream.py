"""A whole table, encoded chunk by chunk into one matrix in memory or in a file."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dropkit.errors import OutputError
from dropkit.tables.encoder import Encoder
from dropkit.tables.source import CHUNK_ROWS, TableSource
from dropkit.tables.target import Target


@dataclass(frozen=True, slots=True)
class EncodedTable:
    """A whole table, encoded.

    Attributes:
        x: (N, D) float32 in memory, or a copy-on-write map of a file.
        y: (N,) float64 or int64 targets, or None if none was asked for.
        rows: (N,) int64, which row of the table (from 0) each row of x is; those without a target may be left out.
        unseen: as in `Encoded`, over the whole table.
        gaps: as in `Encoded`.
    """

    x: np.ndarray
    y: np.ndarray | None
    rows: np.ndarray
    unseen: Mapping[str, int]
    gaps: Mapping[str, int]


def encode_stream(
    source: TableSource,
    encoder: Encoder,
    *,
    target: Target | None = None,
    path: str | Path | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> EncodedTable:
    """Encode a table chunk by chunk; the size of the chunks changes nothing in the result.

    In memory at a time: one chunk of the table and 16 N bytes of targets and row numbers. The matrix takes
    4 N D bytes, on disk if `path` names a file and else in memory as well.

    Args:
        source: the table.
        encoder: fitted to such a table.
        target: read the target column as well; rows without a target are left out.
        path: a new file for x, which the caller removes when done. None keeps x in memory.
        chunk_rows: rows read at a time.

    Raises:
        TableError: as `Encoder.transform` and `Target.encode`.
        OutputError: the file cannot be written, or the disk is full.
    """
    wanted = [column.name for column in encoder.used]
    encoder.check_columns(source.columns, source.name)
    if target is not None:
        wanted.append(source.column(target.name))
    matrix = _Matrix(encoder.features, path)
    targets: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    unseen: Counter[str] = Counter()
    gaps: Counter[str] = Counter()
    with matrix:
        for frame in source.chunks(chunk_rows, columns=list(dict.fromkeys(wanted))):
            if target is not None:
                y = target.encode(frame[target.name])
                filled = ~np.isnan(y) if target.task == "regression" else y >= 0
                frame, y = frame[filled], y[filled]
                targets.append(y)
            encoded = encoder.transform(frame)
            matrix.append(encoded.matrix)
            rows.append(frame.index.to_numpy(dtype=np.int64))
            unseen.update(encoded.unseen)
            gaps.update(encoded.gaps)
    return EncodedTable(
        x=matrix.whole(),
        y=np.concatenate(targets) if targets else None,
        rows=np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64),
        unseen=dict(unseen),
        gaps=dict(gaps),
    )


class _Matrix:
    """Rows put one below the other, in memory or in a file."""

    def __init__(self, width: int, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._blocks = [np.zeros((0, width), dtype=np.float32)]
        self._rows, self._width = 0, width
        self._file: BinaryIO | None = None

    def __enter__(self) -> None:
        if self._path is not None:
            try:
                self._file = self._path.open("xb")
            except OSError as error:
                raise self._refused(error) from None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None or self._path is None:
            return
        try:
            self._file.close()
        except OSError as error:
            self._path.unlink(missing_ok=True)
            raise self._refused(error) from None
        if kind is not None:
            self._path.unlink(missing_ok=True)

    def append(self, block: np.ndarray) -> None:
        self._rows += len(block)
        if self._file is None:
            self._blocks.append(block)
            return
        try:  # written, not mapped: a full disk is then an error one can tell, not a signal that ends the program
            self._file.write(block.tobytes())
        except OSError as error:
            raise self._refused(error) from None

    def whole(self) -> np.ndarray:
        if self._path is None or self._rows == 0:
            return np.concatenate(self._blocks)
        # copy-on-write: torch warns of arrays it may not write to
        return np.memmap(self._path, dtype=np.float32, mode="c", shape=(self._rows, self._width))

    def _refused(self, error: OSError) -> OutputError:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        return OutputError(
            f"{self._path}: the encoded table could not be written: {why}. Free some space, or choose another folder "
            "for temporary files with TMPDIR."
        )

"""A model of tables asked about Parquet files that do not fit one machine, through Ray Data.

Each part is predicted by itself, and neither chunks nor tiles change a bit of a prediction, so any number of workers
write the files that one writes, and the figures that `dropkit predict` writes without them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dropkit.engines.ray_parts import ROWS, Part, Worker, list_files, make_parts, write_parts
from dropkit.engines.workers import check_workers
from dropkit.tables.model import Seen, TableModel
from dropkit.tables.reading import open_table
from dropkit.tables.source import from_frame


@dataclass(frozen=True, slots=True)
class TablePrediction:
    """What was written.

    Attributes:
        path: folder of Parquet files, whose rows in order of their names are those of the table.
        rows, parts: how many.
        columns: names of the columns that were added.
        notes: what the table held that the model had not met, in sentences.
        digest: SHA-256 over the bytes of all files in order; equal digests are equal predictions.
    """

    path: Path
    rows: int
    parts: int
    columns: tuple[str, ...]
    notes: tuple[str, ...]
    digest: str

    def to_json(self) -> str:
        """The record as JSON."""
        return json.dumps(
            {
                "path": str(self.path), "rows": self.rows, "parts": self.parts, "columns": self.columns,
                "notes": self.notes, "digest": self.digest,
            },
            ensure_ascii=False,
        )  # fmt: skip


def predict_table(
    model: str | Path,
    table: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    workers: int = 2,
    threads: int = 1,
    rows: int = ROWS,
) -> TablePrediction:
    """Ask the committee of a model about every row of a data set, with many workers of a Ray cluster.

    Uses the cluster that `ray.init` has connected to, or starts one on this machine. Workers read model and input and
    write the answers themselves, so all of them must be able to reach those places.

    Args:
        model: the directory that `dropkit fit` wrote.
        table: a Parquet file, a folder of them, taken in the order of their names, or a list of files.
        out: a folder, which appears when it is complete: all columns of the table, then those of the answer.
        workers: processes that predict, each with one CPU of the cluster.
        threads: of torch, in each.
        rows: of a part, at least; row groups are not cut.

    Returns:
        What was written.

    Raises:
        MissingPackageError: Ray is not installed.
        ModelDirectoryError: the model is damaged, altered, incomplete or of a newer release.
        TableError: a file cannot be read, or lacks a column.
        OptionError: fewer than one worker, or more than the cluster has CPUs.
        OutputError: out exists, its parent does not, or the disk refuses.
        EngineError: a worker failed; its own error is told.
    """
    check_workers(workers)
    loaded = TableModel.read(model)  # here, not in the log of a worker
    files = list_files(table)
    for file in files:
        loaded.check_source(open_table(file))
    parts = make_parts(files, rows)
    done = write_parts(parts, out, TableWorker, (str(Path(model).resolve()), threads), workers=workers)
    seen = Seen()
    for said in map(json.loads, done.said):
        seen.unseen.update(said["unseen"])
        seen.gaps.update(said["gaps"])
    return TablePrediction(done.path, done.rows, done.parts, loaded.answer_columns, seen.notes, done.digest)


class TableWorker(Worker):
    """What runs in each worker: reads a part, asks the model, and writes the rows with their answers.

    Args:
        model: its directory.
        threads: of torch.
        folder: where the answers go.
    """

    def __init__(self, model: str, threads: int, folder: str) -> None:
        super().__init__(folder)
        torch.set_num_threads(threads)
        self.model = TableModel.read(model)

    def predict(self, part: Part) -> str:
        """Write the rows of one part with their answers; counts of what the model had not met."""
        import pyarrow as pa
        from pyarrow import parquet as pq

        with pq.ParquetFile(part.file) as file:
            table = file.read_row_groups(range(*part.groups))
        seen, names = Seen(), list(self.model.answer_columns)
        source = from_frame(table.to_pandas(ignore_metadata=True, date_as_object=False), part.file)
        frames = [frame[names] for frame in self.model.stream(source, seen)]
        for name in names:
            table = table.append_column(name, pa.array([value for frame in frames for value in frame[name]]))
        temporary = self.folder / f".{part.name}.{part.number}"
        pq.write_table(table, temporary)
        temporary.replace(self.folder / part.name)
        return json.dumps({"unseen": seen.unseen, "gaps": seen.gaps})

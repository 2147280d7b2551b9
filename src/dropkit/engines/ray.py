"""Predictions over Parquet files that do not fit one machine, through Ray Data.

How the files are cut into parts depends on the files alone, and each part is predicted by itself: the same rows at the
same places of the same tiles, whoever does it and whenever. So 1 and N workers write the same files, byte for byte, if
the machines are of one kind and each worker has the same number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dropkit.committee import Committee, Prediction, RegressionPrediction
from dropkit.committee.saving import load, read_committee
from dropkit.engines.ray_parts import (
    ROWS,
    Columns,
    DatasetPrediction,
    Part,
    Worker,
    list_files,
    make_parts,
    write_parts,
)
from dropkit.errors import OptionError, TableError

TILES_AT_ONCE = 8
ROW = "row"

Prepare = Callable[[Columns], Tensor | np.ndarray[Any, Any]]


def predict_dataset(
    committee: Committee | str | Path,
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    columns: Sequence[str] | None = None,
    prepare: Prepare | None = None,
    model: Callable[[], nn.Module] | None = None,
    keep: Sequence[str] = (),
    workers: int = 2,
    cpus: float = 1.0,
    threads: int = 1,
    rows: int = ROWS,
) -> DatasetPrediction:
    """Ask a committee about a data set in Parquet files, with many workers of a Ray cluster.

    Uses the cluster that `ray.init` has connected to, or starts one on this machine. Workers read the input and write
    the answers themselves, so both must lie where all of them can reach them.

    Args:
        committee: a committee, which travels to the workers by Ray's own serialisation (pickle, between processes that
            trust each other), or the directory of one that `save` wrote, beside `model`.
        source: a Parquet file, a folder of them, taken in the order of their names, or a list of files.
        out: a folder, which appears when it is complete; its parent must be there.
        columns: of numbers, which make x (B, columns).
        prepare: {column: array} of some rows -> x, in place of that; with it `columns` says what is read, by default
            all. It travels to the workers.
        model: makes a model of the structure that was saved; see `dropkit.committee.saving.load`.
        keep: columns of the input to write beside the answers.
        workers: processes that predict.
        cpus: of the cluster, for each of them.
        threads: of torch, in each. The last bits of an answer may depend on this number, so keep it.
        rows: of a part, at least. It decides how row groups are put together, so keep it too.

    Returns:
        What was written: column `row`, the row's number in the whole data set, `keep`, and the prediction:
        mean, std, epistemic (and aleatoric) of each output, or probability of each class, entropy and
        mutual_information.

    Raises:
        MissingPackageError: Ray is not installed.
        TableError: a file cannot be read, or a column is missing or holds no numbers.
        OptionError: an option is out of range, or the cluster has too few CPUs for the workers.
        OutputError: out exists, its parent does not, or the disk refuses.
        EngineError: a worker failed; its own error is told.
        ModelDirectoryError: the saved committee does not fit, or is damaged.
    """
    _check_options(columns, prepare, workers, threads, rows)
    if isinstance(committee, Committee) is not (model is None):
        raise OptionError(
            "give a committee, or the directory of a saved one together with model=, which makes it anew."
        )
    if not isinstance(committee, Committee):
        read_committee(committee)  # here, not in the log of a worker
        committee = Path(committee).resolve()
    parts = make_parts(list_files(source), rows, columns, keep)
    worker = (committee, model, columns, prepare, tuple(keep), threads)
    return write_parts(parts, out, PartWorker, worker, workers=workers, cpus=cpus)


class PartWorker(Worker):
    """What runs in each worker: reads a part, asks the committee, and writes the answers.

    Args:
        committee: itself, or where it was saved.
        model: makes a model for a saved one.
        columns, prepare, keep, threads: as in `predict_dataset`.
        folder: where the answers go.
    """

    def __init__(
        self,
        committee: Committee | Path,
        model: Callable[[], nn.Module] | None,
        columns: Sequence[str] | None,
        prepare: Prepare | None,
        keep: Sequence[str],
        threads: int,
        folder: str,
    ) -> None:
        super().__init__(folder)
        torch.set_num_threads(threads)
        if not isinstance(committee, Committee):
            assert model is not None
            committee = load(committee, model)
        self.committee = committee
        self.columns, self.prepare, self.keep = columns, prepare, tuple(keep)

    def predict(self, part: Part) -> str:
        """Write the answers of one part, under its name when it is complete."""
        import pyarrow as pa
        from pyarrow import parquet as pq

        wanted = None if self.columns is None else list(dict.fromkeys((*self.columns, *self.keep)))
        with pq.ParquetFile(part.file) as file:
            table = file.read_row_groups(range(*part.groups), columns=wanted)
        temporary = self.folder / f".{part.name}.{os.getpid()}"
        step = self.committee.tile * TILES_AT_ONCE
        writer = None
        try:
            for start in range(0, part.rows, step):
                rows = table.slice(start, step)
                ids = torch.arange(part.row + start, part.row + start + len(rows))
                prediction = self.committee.predict(
                    self._inputs(rows, part.file), ids=ids if self.committee.per_row else None
                )
                said = {ROW: ids.numpy(), **{name: rows[name] for name in self.keep}, **answers(prediction)}
                answered = pa.table(said)
                writer = writer or pq.ParquetWriter(temporary, answered.schema)
                writer.write_table(answered)
        finally:
            if writer is not None:
                writer.close()
        temporary.replace(self.folder / part.name)
        return ""

    def _inputs(self, rows: Any, file: str) -> Any:
        names = rows.column_names if self.columns is None else self.columns
        values = {name: rows[name].to_numpy() for name in names}
        if self.prepare is not None:
            return self.prepare(values)
        for name, column in values.items():
            if column.dtype.kind not in "iufb":
                raise TableError(
                    f"{file} has a column {name!r} of {column.dtype}; numbers are needed. Give prepare=."
                )
        return np.stack(list(values.values()), axis=1).astype(np.float32)


def answers(prediction: Prediction) -> Columns:
    """A prediction as columns: one for each figure and output."""
    if isinstance(prediction, RegressionPrediction):
        parts = ["mean", "std", "epistemic"] + (["aleatoric"] if prediction.noise is not None else [])
    else:
        parts = ["probabilities", "entropy", "mutual_information"]
    columns: Columns = {}
    for name in parts:
        values = getattr(prediction, name).detach().cpu()
        values = values.reshape(len(values), -1)
        width = values.shape[1]
        label = "probability" if name == "probabilities" else name
        for k in range(width):
            columns[label if width == 1 else f"{label}_{k}"] = values[:, k].numpy()
    return columns


def _check_options(
    columns: Sequence[str] | None, prepare: Prepare | None, workers: int, threads: int, rows: int
) -> None:
    for name, value in (("workers", workers), ("threads", threads), ("rows", rows)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}={value!r} was given; a whole number from 1 on is allowed.")
    if prepare is None and not columns:
        raise OptionError("say which columns make x: columns=[...], or prepare=, a function that makes it.")
    if isinstance(columns, str):
        raise OptionError(f"columns={columns!r} was given; a list of names is needed.")

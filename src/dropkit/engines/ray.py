"""Predictions over Parquet files that do not fit one machine, through Ray Data.

How the files are cut into parts depends on the files alone, and each part is predicted by itself: the same rows at the
same places of the same tiles, whoever does it and whenever. So 1 and N workers write the same files, byte for byte, if
the machines are of one kind and each worker has the same number of threads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dropkit.committee import Committee, Prediction, RegressionPrediction
from dropkit.committee.saving import load, read_committee
from dropkit.errors import EngineError, MissingPackageError, OptionError, OutputError, TableError

# Rows of one part, at least; row groups of a file are not cut.
ROWS = 1 << 17
TILES_AT_ONCE = 8
ROW = "row"

_NAMED = re.compile(r"[\w.]+(Error|Exception): ")

Columns = dict[str, np.ndarray[Any, Any]]
Prepare = Callable[[Columns], Tensor | np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Part:
    """Some row groups of one file, predicted together by one worker.

    Attributes:
        number: which part.
        file: path of the input.
        groups: row groups of the file, from the first up to but without the second.
        row: number of the first row in the whole data set.
        rows: how many.
    """

    number: int
    file: str
    groups: tuple[int, int]
    row: int
    rows: int

    @property
    def name(self) -> str:
        """The file that the answers are written to."""
        return f"part-{self.number:06d}.parquet"


@dataclass(frozen=True, slots=True)
class DatasetPrediction:
    """What was written.

    Attributes:
        path: folder of Parquet files, whose rows in order of their names are those of the input.
        rows, parts: how many.
        columns: of each file.
        digest: SHA-256 over the bytes of all files in order; equal digests are equal predictions.
    """

    path: Path
    rows: int
    parts: int
    columns: tuple[str, ...]
    digest: str


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
    ray = start_ray()
    parts = make_parts(list_files(source), rows, columns, keep)
    place = Path(out).absolute()
    if os.path.lexists(place) or not place.parent.is_dir():
        what = "exists" if os.path.lexists(place) else f"cannot be made: {place.parent} is not a folder"
        raise OutputError(f"{out} {what}. Give another path.")
    there = float(ray.cluster_resources().get("CPU", 0))
    if workers * cpus > there:
        raise OptionError(
            f"workers={workers} with {cpus:g} CPUs each were asked for, and the cluster has {there:g}; they would wait "
            "for each other without end. Ask for fewer."
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent))
    try:
        worker = (committee, model, columns, prepare, tuple(keep), threads, str(temporary))
        written = _run(ray, parts, worker, workers, cpus)
        if len(written) != len(parts):
            raise OutputError(
                f"{len(parts) - len(written)} of {len(parts)} parts were not written. Nothing was left."
            )
        digest, names = _seal(temporary, parts)
        temporary.chmod(0o755)
        temporary.rename(place)
    except OSError as error:
        if isinstance(error, OutputError | TableError):
            raise
        raise OutputError(
            f"{out} could not be written: {error.strerror or error}. Nothing was left there."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when all went well
    return DatasetPrediction(place, sum(part.rows for part in parts), len(parts), names, digest)


def start_ray() -> Any:
    """Ray, connected to a cluster; one of this machine where there is none.

    Raises:
        MissingPackageError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    if importlib.util.find_spec("ray") is None:
        raise MissingPackageError(
            "predicting on many machines needs ray, which is not installed. Get it: pip install 'dropkit[ray]'."
        )
    import ray
    import ray.data

    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    return ray


def list_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of a data set, in order.

    Raises:
        TableError: there is none.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    else:
        files = [Path(file) for file in source]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        what = f"{missing[0]} is not a file" if missing else f"{source} holds no file that ends in .parquet"
        raise TableError(f"{what}. Give a Parquet file, a folder of them, or a list of files.")
    return [file.resolve() for file in files]


def make_parts(
    files: Sequence[Path], rows: int, columns: Sequence[str] | None = None, keep: Sequence[str] = ()
) -> list[Part]:
    """Cut files into runs of whole row groups of at least `rows` rows each (the last of a file may have fewer).

    Raises:
        TableError: a file is no Parquet file, or lacks a column.
    """
    from pyarrow import ArrowException
    from pyarrow import parquet as pq

    parts: list[Part] = []
    row = 0
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                names, metadata = set(opened.schema_arrow.names), opened.metadata
        except (ArrowException, OSError) as error:
            raise TableError(f"{file} cannot be read as Parquet: {error}") from None
        for name in (*(columns or ()), *keep):
            if name not in names:
                raise TableError(f"{file} has no column {name!r}; it has {', '.join(sorted(names)[:10])}.")
        first, there = 0, 0
        for group in range(metadata.num_row_groups):
            there += metadata.row_group(group).num_rows
            if there >= rows or (group == metadata.num_row_groups - 1 and there):
                parts.append(Part(len(parts), str(file), (first, group + 1), row, there))
                first, row, there = group + 1, row + there, 0
    if not parts:
        raise TableError(f"{files[0]} and {len(files) - 1} more hold no rows; there is nothing to predict.")
    return parts


class PartWorker:
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
        torch.set_num_threads(threads)
        if not isinstance(committee, Committee):
            assert model is not None
            committee = load(committee, model)
        self.committee = committee
        self.columns, self.prepare, self.keep = columns, prepare, tuple(keep)
        self.folder = Path(folder)

    def __call__(self, batch: Columns) -> Columns:
        """Predict the parts of a batch; the numbers of those that were written."""
        for values in zip(
            *(batch[name] for name in ("number", "file", "first", "last", "row", "rows")), strict=True
        ):
            number, file, first, last, row, rows = values
            self.predict(Part(int(number), str(file), (int(first), int(last)), int(row), int(rows)))
        return {"number": batch["number"]}

    def predict(self, part: Part) -> None:
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


def _run(ray: Any, parts: Sequence[Part], worker: tuple[Any, ...], workers: int, cpus: float) -> list[int]:
    """Have all parts predicted; the numbers of those that were."""
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        items = [
            {
                "number": p.number,
                "file": p.file,
                "first": p.groups[0],
                "last": p.groups[1],
                "row": p.row,
                "rows": p.rows,
            }
            for p in parts
        ]
        done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            PartWorker,
            fn_constructor_args=worker,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
            num_cpus=cpus,
        )
        return sorted(int(row["number"]) for row in done.take_all())
    except ray.exceptions.RayError as error:
        raise EngineError(
            f"a worker could not do its work: {_told_by(error)}. Nothing was written."
        ) from error
    finally:
        context.enable_progress_bars = before


def _told_by(error: BaseException) -> str:
    """The error of a worker, which Ray puts as a traceback into the text of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if _NAMED.match(line) and not line.startswith("ray.")]
    return (named or lines or [type(error).__name__])[-1].rstrip(".")


def _seal(folder: Path, parts: Sequence[Part]) -> tuple[str, tuple[str, ...]]:
    """The digest of all parts and their columns."""
    from pyarrow import parquet as pq

    digest = hashlib.sha256()
    for part in parts:
        with (folder / part.name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest(), tuple(pq.read_schema(folder / parts[0].name).names)


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

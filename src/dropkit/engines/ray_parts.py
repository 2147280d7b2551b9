"""A data set in Parquet files cut into parts, each of which some worker of a Ray cluster predicts by itself.

How files are cut depends on the files alone, so 1 and N workers write the same files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dropkit.errors import EngineError, MissingPackageError, OptionError, OutputError, TableError

# Rows of one part, at least; row groups of a file are not cut.
ROWS = 1 << 17

_NAMED = re.compile(r"[\w.]+(Error|Exception): ")

Columns = dict[str, np.ndarray[Any, Any]]


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
        said: what was to be told of each part.
    """

    path: Path
    rows: int
    parts: int
    columns: tuple[str, ...]
    digest: str
    said: tuple[str, ...] = ()


class Worker(ABC):
    """What runs in each worker: predicts parts, and writes the answers.

    Args:
        folder: where they go.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, batch: Columns) -> Columns:
        """Predict the parts of a batch: the numbers of those that were written, and what is to be told of them."""
        fields = (batch[name] for name in ("number", "file", "first", "last", "row", "rows"))
        said = [
            self.predict(Part(int(number), str(file), (int(first), int(last)), int(row), int(rows)))
            for number, file, first, last, row, rows in zip(*fields, strict=True)
        ]
        return {"number": batch["number"], "said": np.array(said, dtype=object)}

    @abstractmethod
    def predict(self, part: Part) -> str:
        """Write the answers of one part, under its name when it is complete; what is to be told of its rows."""


def write_parts(
    parts: Sequence[Part],
    out: str | Path,
    kind: type[Worker],
    arguments: tuple[Any, ...],
    *,
    workers: int,
    cpus: float = 1.0,
) -> DatasetPrediction:
    """Have workers write all parts into a folder, which appears when it is complete.

    Args:
        parts: of the data set.
        out: the folder; its parent must be there.
        kind, arguments: of the workers; the folder they write to is added as the last argument.
        workers: how many.
        cpus: of the cluster, for each.

    Raises:
        MissingPackageError: Ray is not installed.
        OptionError: the cluster has too few CPUs for the workers.
        OutputError: out exists, its parent does not, or the disk refuses.
        EngineError: a worker failed; its own error is told.
    """
    ray = start_ray()
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
        said = _run(ray, parts, kind, (*arguments, str(temporary)), workers, cpus)
        if len(said) != len(parts):
            raise OutputError(
                f"{len(parts) - len(said)} of {len(parts)} parts were not written. Nothing was left."
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
    return DatasetPrediction(place, sum(part.rows for part in parts), len(parts), names, digest, said)


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


def _run(
    ray: Any, parts: Sequence[Part], kind: type[Worker], arguments: tuple[Any, ...], workers: int, cpus: float
) -> tuple[str, ...]:
    """Have all parts predicted; what was told of each."""
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
            kind,
            fn_constructor_args=arguments,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
            num_cpus=cpus,
        )
        rows = sorted(done.take_all(), key=lambda row: int(row["number"]))
        return tuple(str(row["said"]) for row in rows)
    except ray.exceptions.RayError as error:
        raise EngineError(
            f"a worker could not do its work: {told_by(error)}. Nothing was written."
        ) from error
    finally:
        context.enable_progress_bars = before


def told_by(error: BaseException) -> str:
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

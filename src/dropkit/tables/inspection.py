"""A model of a table and rows of it, inspected: what dropout does to it, site by site, with the columns' names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dropkit.errors import TableError
from dropkit.measure.inspected import Inspection
from dropkit.measure.inspection import LEAST_ROWS, inspect
from dropkit.tables.model import TableModel
from dropkit.tables.source import TableSource
from dropkit.training.losses import LOSSES


def inspect_table(
    model: str | Path | TableModel,
    table: TableSource,
    *,
    members: int = 64,
    seed: int = 0,
    rows: int = 1000,
    new: TableSource | None = None,
    deep: bool = False,
    tolerance: float | None = None,
) -> Inspection:
    """Inspect the network of a fitted model on rows of a table that has the target.

    The loss is the one it was trained with; the prediction is the mean, or the probabilities of the classes.

    Args:
        model: what `dropkit fit` wrote, or a model that has been read.
        table: the columns the model learned from, and the target; rows without a target are left out.
        members, seed, deep, tolerance: as in `dropkit.inspect`.
        rows: most rows that are looked at, drawn by the seed.
        new: rows that it was not trained on, for the generalisation gap.

    Returns:
        An `Inspection`; features of the input are called by their columns.

    Raises:
        ModelDirectoryError: the model is damaged, altered, incomplete or of a newer release.
        TableError: a column or the target is missing, or too few rows have a target.
        NoMaskError: the model was fitted without dropout.
        MeasurementError: as in `dropkit.inspect`.
    """
    known = model if isinstance(model, TableModel) else TableModel.read(model)
    gaussian = known.spec.likelihood == "gaussian"
    per_row = LOSSES[known.spec.likelihood]

    def negative_log_likelihood(outputs: Tensor, y: Tensor) -> Tensor:
        return per_row(outputs, y)

    negative_log_likelihood.__name__ = "negative log-likelihood"  # as the record says it
    x, y = _encoded(known, table, rows, seed)
    fresh = None if new is None else _encoded(known, new, rows, seed)
    with _one_thread():
        return inspect(
            known.network,
            x,
            y,
            loss=negative_log_likelihood,
            members=members,
            seed=seed,
            rows=rows,
            new=fresh,
            deep=deep,
            columns=known.encoder.feature_names,
            answer=_mean if gaussian else _probabilities,
            tolerance=tolerance,
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """A network of a table is small: threads would wait for each other more than they help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _mean(outputs: Tensor) -> Tensor:
    return outputs[..., 0]


def _probabilities(outputs: Tensor) -> Tensor:
    return outputs.softmax(dim=-1)


def _encoded(model: TableModel, table: TableSource, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows as the network takes them, and their targets."""
    name = model.target.name
    model.encoder.check_columns(table.columns, table.name)
    if name not in table.columns:
        raise TableError(
            f"{table.name} lacks the target {name!r}; what dropout does to the loss can only be measured with it. "
            "Give a table that has the column."
        )
    frame = table.sample(rows, seed)
    y = model.target.encode(frame[name])
    has = y >= 0 if y.dtype == np.int64 else np.isfinite(y)
    if has.sum() < LEAST_ROWS:
        raise TableError(
            f"{table.name} has {int(has.sum())} rows with a target among {len(frame)} looked at; at least {LEAST_ROWS} "
            "are needed. Give more rows."
        )
    frame, y = frame[pd.Series(has, index=frame.index)], y[has]
    x = torch.from_numpy(model.encoder.transform(frame).matrix)
    return x, torch.from_numpy(y if y.dtype == np.int64 else y.astype(np.float32))

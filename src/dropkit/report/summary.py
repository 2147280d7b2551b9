"""From a finished fit to the parts of its record: the table, the network, the search and the curves."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import numpy as np
import pandas as pd
import sklearn
import torch

from dropkit.report.record import ColumnSummary, DataSummary, LearningCurves, ModelSummary, Search, Trial
from dropkit.tables.cells import Column
from dropkit.tables.target import Target
from dropkit.training import Fit


def data_summary(
    source: str, target: Target, columns: Sequence[Column], fit: Fit, test_rows: int, warnings: Sequence[str]
) -> DataSummary:
    """The table: its rows, its columns, and what a reader should know about them."""
    return DataSummary(
        source=source,
        rows=len(fit.train_rows) + len(fit.validation_rows) + test_rows,
        training_rows=len(fit.train_rows),
        validation_rows=len(fit.validation_rows),
        test_rows=test_rows,
        target=target.name,
        task=target.task,
        task_reason=target.reason,
        columns=tuple(
            ColumnSummary(c.name, c.kind, c.missing, c.distinct, c.dropped is None, c.dropped or c.note)
            for c in columns
        ),
        warnings=tuple(warnings),
    )


def model_summary(fit: Fit, members: int, command: str, *, rate_given: bool) -> ModelSummary:
    """The network, and what is needed to have it again."""
    from dropkit import __version__

    versions = {
        "dropkit": __version__, "torch": torch.__version__, "numpy": np.__version__, "pandas": pd.__version__,
        "scikit-learn": sklearn.__version__, "Python": platform.python_version(),
    }  # fmt: skip
    return ModelSummary(
        hidden=fit.spec.hidden,
        rate=fit.spec.rate,
        input_rate=fit.spec.input_rate,
        weight_decay=fit.weight_decay,
        members=members,
        parameters=sum(parameter.numel() for parameter in fit.network.parameters()),
        seed=fit.seed,
        epochs=fit.best_epoch,
        versions=tuple(versions.items()),
        command=command,
        rate_given=rate_given,
    )


def search_summary(fit: Fit) -> Search | None:
    """The candidates and the winner, or None where the rate was given."""
    if fit.search is None:
        return None
    trials = fit.search.trials
    return Search(
        trials=tuple(
            Trial(
                rate=trial.candidate.rate,
                input_rate=trial.candidate.input_rate,
                width=trial.candidate.hidden[0] if trial.candidate.hidden else 0,
                weight_decay=trial.candidate.weight_decay,
                train_loss=trial.train,
                validation_loss=trial.validation,
                standard_error=trial.standard_error,
                gap=trial.gap,
                epochs=round(trial.epochs_to_converge),
            )
            for trial in trials
        ),
        chosen=[trial.candidate for trial in trials].index(fit.search.chosen),
        verdict=fit.search.verdict,
        folds=fit.search.folds,
        rows=fit.search.rows,
    )


def learning_curves(fit: Fit) -> LearningCurves:
    """Losses by epoch."""
    curve = fit.curve
    return LearningCurves(tuple(curve.epochs), tuple(curve.train), tuple(curve.validation), curve.best_epoch)

"""The record of a finished fit: plain data, written to JSON and read back as the same record."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

from dropkit.errors import ModelDirectoryError
from dropkit.evaluation import ClassificationEvaluation, Comparison, RegressionEvaluation, SpreadByMembers
from dropkit.records import finite, rebuild

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class ColumnSummary:
    """One column of the table.

    Attributes:
        name: as in the file.
        kind: number, category, boolean, date ...
        missing: rows without a value.
        distinct: different values.
        used: whether the model sees it.
        note: why it was dropped, or what was done to it; may be empty.
    """

    name: str
    kind: str
    missing: int
    distinct: int
    used: bool = True
    note: str = ""


@dataclass(frozen=True, slots=True)
class DataSummary:
    """Where the rows came from and what they were used for.

    Attributes:
        source: name of the file or data set.
        rows: rows with a target.
        training_rows: rows the weights were learned from.
        validation_rows: rows that chose the epoch, helped to choose the rate, and calibrated.
        test_rows: rows nobody looked at before the report.
        target: name of the column to predict.
        task: what kind of target it is.
        task_reason: why it was taken for that kind, one sentence.
        columns: all but the target.
        warnings: what a person should know, one sentence each.
    """

    source: str
    rows: int
    training_rows: int
    validation_rows: int
    test_rows: int
    target: str
    task: Literal["regression", "classification"]
    task_reason: str
    columns: tuple[ColumnSummary, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """The network that was chosen, and what is needed to have it again.

    Attributes:
        hidden: units in each hidden layer.
        rate: chance to drop a hidden unit.
        input_rate: chance to drop an input.
        weight_decay: strength of the L2 penalty.
        members: thinned networks in the committee.
        parameters: weights and biases of one network.
        seed: of splits, weights and masks.
        epochs: passes over the training rows until the weights that were kept.
        versions: name and version of what the run depended on.
        command: the line that fits it again.
        rate_given: True if the user set the rate, so that there was nothing to choose.
    """

    hidden: tuple[int, ...]
    rate: float
    input_rate: float
    weight_decay: float
    members: int
    parameters: int
    seed: int
    epochs: int
    versions: tuple[tuple[str, str], ...] = ()
    command: str = ""
    rate_given: bool = False


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate of the search.

    Attributes:
        rate: chance to drop a hidden unit.
        input_rate: chance to drop an input.
        width: units in each hidden layer.
        weight_decay: strength of the L2 penalty.
        train_loss: negative log-likelihood on the training rows at the best epoch, masks off, nats per row.
        validation_loss: the committee's on the validation rows; the smallest wins.
        standard_error: of `validation_loss`, over rows.
        gap: validation loss minus training loss, both with masks off.
        epochs: until it had converged; a mean where there were several folds.
    """

    rate: float
    input_rate: float
    width: int
    weight_decay: float
    train_loss: float
    validation_loss: float
    standard_error: float
    gap: float
    epochs: float


@dataclass(frozen=True, slots=True)
class Search:
    """All candidates, and which of them won.

    Attributes:
        trials: in the order they were listed.
        chosen: index of the winner.
        verdict: the outcome in one sentence; empty to let the report write it.
        folds: how often the rows were divided anew; 1 is one division.
        rows: rows that took part, none of them held out; 0 where that is not known.
    """

    trials: tuple[Trial, ...]
    chosen: int
    verdict: str = ""
    folds: int = 1
    rows: int = 0


@dataclass(frozen=True, slots=True)
class LearningCurves:
    """Loss by epoch of the chosen network, nats per row.

    Attributes:
        epoch: passes done; 0 is the fresh network.
        training: without masks, on training rows.
        validation: without masks, on validation rows.
        best_epoch: whose weights were kept.
    """

    epoch: tuple[int, ...]
    training: tuple[float, ...]
    validation: tuple[float, ...]
    best_epoch: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall-clock seconds, no part of what makes two runs equal; search 0 where it is part of the training."""

    search: float
    training: float
    total: float


@dataclass(frozen=True, slots=True)
class FitReport:
    """Everything a report says about a finished fit.

    Attributes:
        data: the table.
        model: the network.
        held_out: what it does on rows it never saw; its kind goes with `data.task`.
        search: None if there was nothing to choose.
        curves: None if training was not recorded.
        members: spread against committee size; None if not measured.
        comparison: against other models; None if not made.
        timing: left out when two reports are compared, and when `to_json(timing=False)`.
        schema: version of this layout.
    """

    data: DataSummary
    model: ModelSummary
    held_out: RegressionEvaluation | ClassificationEvaluation
    search: Search | None = None
    curves: LearningCurves | None = None
    members: SpreadByMembers | None = None
    comparison: Comparison | None = None
    timing: Timing | None = field(default=None, compare=False)
    schema: int = SCHEMA

    def to_json(self, *, timing: bool = True) -> str:
        """Strict JSON, keys in the order of the record; a number that is not finite becomes null.

        Args:
            timing: False leaves the seconds out, so that equal runs give equal bytes.
        """
        record = self if timing else dataclasses.replace(self, timing=None)
        return json.dumps(finite(dataclasses.asdict(record)), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> FitReport:
        """The record that `to_json` wrote.

        Raises:
            ModelDirectoryError: not JSON, of a newer schema, or with parts missing or of another type.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ModelDirectoryError(
                f"The report is not JSON ({error}). Fit again to write a new one."
            ) from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ModelDirectoryError(
                f"The report has schema {schema!r}; this dropkit reads schema {SCHEMA}. "
                "A newer report needs a newer dropkit; a damaged one is written again by fitting again."
            )
        report = rebuild(cls, data, "report")
        assert isinstance(report, FitReport)
        return report

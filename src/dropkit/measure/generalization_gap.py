"""Loss on new rows minus loss on the training rows, with the error that a finite table leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.measure.capacity import effective_degrees
from dropkit.measure.linear import linear_model
from dropkit.measure.losses import LossFunction
from dropkit.measure.records import Measurement, said_of_prediction, with_error
from dropkit.measure.sampling import check_error, check_seed, check_whole, mean_and_error
from dropkit.measure.subject import Subject, check_finite, check_rows, subject_of


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneralizationGap(Measurement):
    """Mean loss on new rows minus mean loss on the training rows, both without masks.

    Attributes:
        training, new: the two losses.
        masked: mean training loss under masks, which is what an optimizer sees; more than `training` by the penalty.
        rows: how many training and new rows.
    """

    training: float
    new: float
    masked: float
    rows: tuple[int, int]

    def to_text(self) -> str:
        """The gap, and whether it can be told from 0."""
        clear = abs(float(self.measured)) > 2 * float(self.standard_error)
        told = "" if clear else " It cannot be told from 0 with so few rows."
        return (
            f"The {self.loss} is {self.training:.4g} on the training rows and {self.new:.4g} on new ones: a gap of "
            f"{with_error(self.measured, self.standard_error)} "
            f"{said_of_prediction(self.predicted, self.formula)}.{told} "
            f"Under masks the training rows cost {self.masked:.4g}."
        )


def generalization_gap(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    new_x: Tensor,
    new_y: Tensor,
    loss: LossFunction | None = None,
    members: int = 64,
    seed: int = 0,
    tolerance: float | None = None,
) -> GeneralizationGap:
    """Loss on new rows minus loss on the training rows, with its error over rows.

    For a linear model at the optimum of dropout's own loss, with noise of variance s^2 on the targets, the expected
    gap on new targets at the same inputs is 2 s^2 df / B, df its effective degrees of freedom.

    Args:
        model, x, y, loss: as in `penalty`; x and y are what it was trained on.
        new_x, new_y: rows it has not seen.
        members: passes for the loss under masks.
        seed: which masks.
        tolerance: largest standard error of the gap that is accepted; the error says how many new rows would do.

    Returns:
        A `GeneralizationGap`.

    Raises:
        NoMaskError, MeasurementError, ShapeError, OptionError: as in `penalty`.

    Source: Mallows 1973, Technometrics 15; Efron 2004, JASA 99 (optimism).
    """
    check_whole("members", members)
    check_seed(seed)
    check_rows(new_x, new_y)
    subject = subject_of(model, x, y, loss)
    known = row_losses(subject, subject.x, subject.y)
    fresh = row_losses(subject, new_x.to(subject.x), new_y.to(subject.y))
    check_finite(fresh, "the loss on new rows")
    (training, one), (new, other) = mean_and_error(known), mean_and_error(fresh)
    error = torch.hypot(one, other)
    if tolerance is not None and float(other) > tolerance:
        check_error(tolerance, other, len(fresh), "new rows")
    check_error(tolerance, error, min(len(known), len(fresh)), "rows")
    predicted, formula = _optimism(subject)
    return GeneralizationGap(
        predicted=predicted,
        measured=new - training,
        standard_error=error,
        formula=formula,
        loss=subject.loss.name,
        training=float(training),
        new=float(new),
        masked=float(subject.noisy_losses(seed, members).mean()),
        rows=(len(known), len(fresh)),
    )


def row_losses(subject: Subject, x: Tensor, y: Tensor) -> Tensor:
    """(B,) float64, the loss of each row without masks."""
    with torch.no_grad():
        outputs = subject.outputs(x=x)
        losses = [subject.loss(outputs[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    return torch.stack(losses).double()


def _optimism(subject: Subject) -> tuple[Tensor | None, str]:
    linear = linear_model(subject)
    if linear is None or linear.targets is None:
        return None, "no formula: not a linear model with squared error"
    degrees = effective_degrees(linear) + linear.has_bias
    residual = linear.design @ linear.weight.T + linear.bias - linear.targets
    left = len(linear.design) - degrees
    if left <= 0:
        return None, "no formula: as many degrees of freedom as rows"
    variance = float(residual.square().sum(dim=0).mean()) / left
    value = 2 * variance * degrees / len(linear.design)
    formula = "2 s^2 df / B, for a model at its optimum, new targets at the same inputs"
    return torch.tensor(value if math.isfinite(value) else math.nan, dtype=torch.float64), formula

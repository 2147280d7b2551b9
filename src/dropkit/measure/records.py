"""What every instrument returns: a prediction, a measurement with its error, and the formula's name."""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dropkit.records import finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Parent of the records of `dropkit.measure`; never built itself.

    Attributes:
        predicted: what the formula says; None where there is none for this model.
        measured: what was found.
        standard_error: of `measured`, from the masks or rows that were drawn.
        formula: which formula `predicted` is from and when it is exact, or why there is none.
        loss: which loss was taken.
        predicted_error: standard error of `predicted` where random directions stand for many derivatives; None where
            it is exact.
    """

    predicted: Tensor | None
    measured: Tensor
    standard_error: Tensor
    formula: str
    loss: str
    predicted_error: Tensor | None = None

    @property
    def deviation(self) -> Tensor | None:
        """(measured - predicted) / error of their difference; None where nothing is predicted."""
        if self.predicted is None:
            return None
        error = self.standard_error
        if self.predicted_error is not None:
            error = torch.hypot(error, self.predicted_error)
        return (self.measured - self.predicted) / error

    @abstractmethod
    def to_text(self) -> str:
        """What was found, in plain words."""

    def to_json(self) -> str:
        """The record as JSON; tensors as lists, null for what is not finite."""
        return json.dumps(finite(plain_value(self)), indent=2)


def plain_value(value: Any) -> Any:
    """Records and tensors as dicts and lists."""
    if isinstance(value, Tensor):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain_value(item) for item in value]
    return value


def with_error(value: float | Tensor, error: float | Tensor) -> str:
    """A figure and its error as people write them: 0.1234 ± 0.0012."""
    return f"{float(value):.4g} ± {float(error):.2g}"


def said_of_prediction(predicted: Tensor | None, formula: str) -> str:
    """The prediction in brackets behind a figure."""
    if predicted is None:
        return f"({formula})"
    return f"(predicted {float(predicted):.4g}; {formula})"

"""The loss an instrument takes: by the target's dtype, or the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dropkit.errors import OptionError, ShapeError

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """A mean over the rows.

    Attributes:
        name: as records say it.
        function: outputs (B, *out) and targets (B, ...) -> (), the mean over rows (and over what one row predicts).
        quadratic: whether it is a polynomial of second degree in the outputs, so that second order is exact.
    """

    name: str
    function: LossFunction
    quadratic: bool = False

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Outputs (B, *out), targets (B, ...) -> ()."""
        return self.function(outputs, y)


def choose_loss(loss: LossFunction | None, y: Tensor) -> Loss:
    """The loss asked for, or the one that the target's dtype says.

    Floating targets: mean squared error. Switches (bool): cross-entropy of one logit. Whole numbers: cross-entropy, the
    classes on the last axis of the outputs.

    Args:
        loss: (outputs, y) -> () a mean over rows, or (B,) a loss for each row; None: by dtype.
        y: targets.

    Raises:
        OptionError: the loss cannot be called.
    """
    if loss is not None:
        if not callable(loss):
            raise OptionError(
                f"loss={loss!r} was given; a function of outputs and targets is needed, or None."
            )
        own = loss
        name = getattr(loss, "__name__", type(loss).__name__)
        return Loss(name, lambda outputs, y: own(outputs, y).mean(), quadratic=loss is F.mse_loss)
    if y.is_floating_point():
        return Loss("mean squared error", mean_squared_error, quadratic=True)
    if y.dtype is torch.bool:
        return Loss("binary cross-entropy", binary_cross_entropy)
    return Loss("cross-entropy", cross_entropy)


def mean_squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean over rows and outputs of (outputs - y)^2; a last axis of size 1 may be missing in y."""
    return (_aligned(outputs, y) - y).square().mean()


def binary_cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean over rows of log(1 + e^f) - y f, for logits f; a last axis of size 1 may be missing in y."""
    logits = _aligned(outputs, y)
    return (F.softplus(logits) - y.to(logits.dtype) * logits).mean()


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean over rows (and positions) of -log softmax(outputs)[y], outputs (B, ..., C), y (B, ...)."""
    if outputs.shape[:-1] != y.shape:
        raise ShapeError(
            f"outputs of shape {tuple(outputs.shape)} and classes of shape {tuple(y.shape)} were given; "
            "logits (B, ..., C) need classes (B, ...)."
        )
    return -outputs.log_softmax(dim=-1).gather(-1, y.long().unsqueeze(-1)).mean()


def _aligned(outputs: Tensor, y: Tensor) -> Tensor:
    if outputs.shape == y.shape:
        return outputs
    if outputs.shape[-1:] == (1,) and outputs.shape[:-1] == y.shape:
        return outputs.squeeze(-1)
    raise ShapeError(
        f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(y.shape)} were given; "
        "they need one shape, (B, *out), less perhaps a last axis of size 1."
    )

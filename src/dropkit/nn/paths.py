"""Paths: the branch of a residual block is dropped as a whole."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dropkit.errors import OptionError, ShapeError, check_probability
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer

Mode = Literal["row", "batch"]


def drop_path(
    x: Tensor,
    p: float | Tensor = 0.0,
    training: bool = True,
    *,
    scale_by_keep: bool = True,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Drop the whole branch of a row.

    y[b] = x[b] * keep[b] / (1 - p),    keep[b] ~ Bernoulli(1 - p)

    The residual sum around it then skips the branch. Rates that rise with depth: `dropkit.nn.schedules.ramp`.

    Args:
        x: (B, *features), a branch before its residual sum; floating or complex.
        p: chance to drop, in [0, 1]; a number, or a tensor that broadcasts against (B, 1, ...).
        training: False gives x back.
        scale_by_keep: divide by 1 - p, which keeps the mean. Without, the mean is (1 - p) x, and evaluation, where
            nothing is dropped, sees larger branches than training did.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        Shape, dtype and device of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: x has no dim of rows.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Huang et al. 2016, arXiv:1603.09382, for each row as in Larsson et al. 2017, arXiv:1605.07648 (where the
    name comes from); `scale_by_keep` as in timm.

    Example:
        >>> import torch, dropkit as dk
        >>> with dk.masks(seed=2):
        ...     dk.functional.drop_path(torch.ones(3, 2), p=0.5)
        tensor([[2., 2.],
                [0., 0.],
                [0., 0.]])
    """
    if x.ndim == 0:
        raise ShapeError("x of shape () was given; allowed: (B, *features), dim 0 counting the rows.")
    if scale_by_keep:
        return dropout(x, p, training, shared=range(1, x.ndim), site=site, owner=owner)
    if not isinstance(p, Tensor):
        check_probability(p)
    if not training:
        return x
    gate = dropout(x.new_ones(x.shape[0], *[1] * (x.ndim - 1)), p, site=site, owner=owner)
    return torch.where(gate == 0, 0.0, x)


def stochastic_depth(
    x: Tensor,
    p: float | Tensor,
    mode: Mode,
    training: bool = True,
    *,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """`drop_path` with a choice: a decision for each row, or one for all rows of the step.

    y[b] = x[b] * keep[b] / (1 - p)   ("row"),    y = x * keep / (1 - p)   ("batch")

    With "batch" the decision depends on seed, site and step alone, so that the parts of a split batch agree.

    Args:
        x, p, training, site, owner: as in `drop_path`.
        mode: "row" or "batch".

    Returns:
        Shape, dtype and device of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: x has no dim of rows.
        OptionError: another mode.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Huang et al. 2016, arXiv:1603.09382, which decides for the batch; signature of torchvision.ops.
    """
    _check_mode(mode)
    if mode == "row":
        return drop_path(x, p, training, site=site, owner=owner)
    return dropout(x, p, training, shared=range(x.ndim), site=site, owner=owner)


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise OptionError(f"mode={mode!r} was given; allowed: {get_args(Mode)}.")


class DropPath(RateLayer):
    """The branch of each row as a whole; the layer around `drop_path`. Drop-in for timm's layer of this name.

    Args:
        p: chance to drop, in [0, 1].
        scale_by_keep: divide by 1 - p, which keeps the mean.
    """

    def __init__(self, p: Rate = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__(p)
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """(B, *features) -> the same shape; the identity while nobody asks for noise."""
        return drop_path(
            x, self.rate, self.active, scale_by_keep=self.scale_by_keep, site=self.site, owner=self
        )

    def extra_repr(self) -> str:
        """p, and the scale where it is left out."""
        return f"p={self.p}" + ("" if self.scale_by_keep else ", scale_by_keep=False")


class StochasticDepth(RateLayer):
    """The branch of each row, or of all; the layer around `stochastic_depth`. Drop-in for torchvision's.

    Args:
        p: chance to drop, in [0, 1].
        mode: "row" or "batch".
    """

    def __init__(self, p: Rate, mode: Mode = "row") -> None:
        super().__init__(p)
        _check_mode(mode)
        self.mode: Mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """(B, *features) -> the same shape; the identity while nobody asks for noise."""
        return stochastic_depth(x, self.rate, self.mode, self.active, site=self.site, owner=self)

    def extra_repr(self) -> str:
        """p and mode, as torchvision shows them."""
        return f"p={self.p}, mode={self.mode}"

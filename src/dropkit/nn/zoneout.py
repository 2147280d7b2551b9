"""Zoneout: what is forgotten is a change of state; the unit keeps its old value."""

from __future__ import annotations

import torch
from torch import Tensor

from dropkit.errors import ShapeError, check_probability
from dropkit.masks.philox import survivor_scale
from dropkit.nn.axes import check_axes
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer


def share_of_new(p: float | Tensor, like: Tensor) -> Tensor:
    """1 - p of the rate that is really used, as the engine rounds it."""
    scale = survivor_scale(torch.as_tensor(p, dtype=torch.float64))
    return torch.where(scale > 0, 1 / scale, 0.0).to(like)


def mix(new: Tensor, old: Tensor, share: Tensor | None) -> Tensor:
    """new where the share is 1, old where it is 0; a value that is not taken may be NaN."""
    if share is None:
        return new
    return torch.where(share == 0, 0.0, share * new) + torch.where(share == 1, 0.0, (1 - share) * old)


def zoneout(
    new: Tensor,
    old: Tensor,
    p: float | Tensor = 0.1,
    training: bool = True,
    *,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Let units keep their old value instead of the new one.

    y[b, e] = keep[b, e] new[b, e] + (1 - keep[b, e]) old[b, e],    keep[b, e] ~ Bernoulli(1 - p)

    Nothing is scaled. Without noise the shares are the expected ones, (1 - p) new + p old, which is the exact mean.

    Args:
        new, old: (B, *features), a state after and before a step.
        p: chance that a unit keeps its old value, in [0, 1].
        training: False gives the mean.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        (B, *features).

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: new and old have different shapes.
        OptionError: whole numbers.

    Source: Krueger et al. 2017, arXiv:1606.01305.

    Example:
        >>> import torch, dropkit as dk
        >>> with dk.masks(seed=0):
        ...     dk.functional.zoneout(torch.ones(1, 4), torch.zeros(1, 4), p=0.5)
        tensor([[1., 1., 0., 1.]])
    """
    rate = p if isinstance(p, Tensor) else check_probability(p)
    check_axes(new, "B ...")
    if new.shape != old.shape:
        raise ShapeError(
            f"new of shape {tuple(new.shape)} and old of shape {tuple(old.shape)} were given; they are one state at "
            "two times, so their shapes agree."
        )
    if not training:
        return mix(new, old, share_of_new(rate, new))
    noise = dropout(torch.ones_like(new), rate, site=site, owner=owner)
    return mix(new, old, (noise != 0).to(new.dtype))


class Zoneout(RateLayer):
    """Layer around `zoneout`, for a recurrence that is written as a loop: `h = self.zoneout(cell(x, h), h)`.

    Each call within a pass has a mask of its own. `LSTM` and `GRU` have zoneout built in. In evaluation the expected
    shares are taken; a committee member has masks.

    Args:
        p: chance that a unit keeps its old value, in [0, 1].
    """

    def __init__(self, p: Rate = 0.1) -> None:
        super().__init__(p)

    def forward(self, new: Tensor, old: Tensor) -> Tensor:  # type: ignore[override]
        """(B, *features) twice -> the same shape."""
        return zoneout(new, old, self.rate, self.active, site=self.site, owner=self)

    def extra_repr(self) -> str:
        """The rate."""
        return super().extra_repr().split(",")[0]

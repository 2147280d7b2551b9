"""Dropout of single features: the original form, one mask element for each activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dropkit.errors import ShapeError, check_probability
from dropkit.masks.laws import multiply
from dropkit.nn.layer import RateLayer


def dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    shared: Sequence[int] = (),
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Inverted dropout: drop elements, and scale what stays so that the mean is kept.

    y[b, e] = x[b, e] * keep[b, e] / (1 - p),    keep[b, e] ~ Bernoulli(1 - p)

    The rate is rounded to a multiple of 2**-16 (below that, of 2**-32), and the scale is that of the rounded rate.
    A higher p keeps the dropped set and adds to it. A dropped NaN or infinity is 0, and its gradient is 0.

    Args:
        x: (B, *features), any floating or complex dtype; dim 0 counts the rows.
        p: chance to drop, in [0, 1]; a number, or a 0-d tensor (one for each network under torch.func.vmap). A tensor
            of more dims broadcasts against x, (D,) for one rate a feature, (B, 1) for one a sample; its masks come from
            32-bit numbers, and are others than those of a number.
        training: False gives x back.
        inplace: write the result into x.
        shared: dims along which one mask serves all; with 0 among them, all rows.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        (B, *features), dtype, device and memory format of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: a shared dim that x does not have, or samples that are not one for each row.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Srivastava et al. 2014, JMLR 15; inverted scaling as in torch.nn.functional.dropout.

    Example:
        >>> import torch, dropkit as dk
        >>> with dk.masks(seed=0):
        ...     dk.functional.dropout(torch.ones(2, 4), p=0.5)
        tensor([[2., 2., 0., 2.],
                [2., 0., 0., 2.]])
    """
    rate = p if isinstance(p, Tensor) else check_probability(p)
    if not training:
        return x
    if isinstance(rate, Tensor) and rate.ndim:
        result = _at_rates(x, rate, shared, site, owner)
    else:
        result = multiply("bernoulli", x, rate, shared, site, owner)
    return x.copy_(result) if inplace else result


def _at_rates(x: Tensor, p: Tensor, shared: Sequence[int], site: str | None, owner: object | None) -> Tensor:
    """Dropout with a rate for each element of the mask: dropped where the uniform law's number is below p."""
    try:
        fits = torch.broadcast_shapes(p.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits or any(
        p.ndim >= x.ndim - dim % x.ndim and p.shape[dim % x.ndim - x.ndim] > 1 for dim in shared
    ):
        raise ShapeError(
            f"rates of shape {tuple(p.shape)} were given for an input of shape {tuple(x.shape)}; they broadcast "
            "against it, and have size 1 along shared dims."
        )
    p = p.to(torch.float64)
    uniform = multiply("uniform", torch.ones_like(x, dtype=torch.float64), 0.25, shared, site, owner) / 2
    scale = torch.where(p < 1, 1 / (1 - p), 0.0).to(x.dtype)
    return torch.where(uniform >= p, x * scale, 0)


class Dropout(RateLayer):
    """Drop-in for torch.nn.Dropout; the layer around `dropout`.

    Acts in training mode, and in evaluation when a committee member is asked for (`dk.masks(member=...)`).

    Args:
        p: chance to drop, in [0, 1]: a number, a tensor that broadcasts against the input, or a schedule.
        inplace: write the result into the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, *features) -> the same shape; the identity while nobody asks for noise."""
        return dropout(x, self.rate, self.active, self.inplace, site=self.site, owner=self)

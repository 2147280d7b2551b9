"""ShakeDrop: a branch is dropped by a random factor, and its gradient by another one."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dropkit.errors import OptionError, ShapeError, check_probability
from dropkit.nn.classic import kept_share
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer
from dropkit.nn.uniform import part_of, uniform_numbers

Level = Literal["batch", "row", "channel", "element"]
Interval = tuple[float, float]


class _Shake(torch.autograd.Function):
    """x times one factor; the gradient times another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, ahead: Tensor, back: Tensor) -> Tensor:
        return x * ahead

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ahead, back = inputs
        ctx.save_for_backward(back)
        ctx.save_for_forward(ahead)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return gradients[0] * back, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        (ahead,) = ctx.saved_tensors  # forward mode has one direction only: that of the function
        return tangent * ahead


def shake_drop(
    x: Tensor,
    p: float | Tensor = 0.5,
    alpha: Interval = (-1.0, 1.0),
    beta: Interval | None = (0.0, 1.0),
    training: bool = True,
    *,
    level: Level = "row",
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Shake a branch: with chance p its factor is random, and that of its gradient another random number.

    forward     y = (k + a - k a) x,    k ~ Bernoulli(1 - p),  a ~ U(alpha)
    backward    dx = (k + b - k b) dy,  the same k,            b ~ U(beta)
    evaluation  y = (1 - p + p E[a]) x,  the mean

    So a kept branch (k = 1) is left as it is, and a shaken one is multiplied by a, its gradient by b. k, a and b
    are three draws with addresses of their own. A committee member has one k and one a.

    Args:
        x: (B, *features), a branch before its residual sum.
        p: chance to shake, in [0, 1]; a number or a 0-d tensor. The paper lets it rise with depth to 0.5:
            `dropkit.nn.schedules.ramp`.
        alpha: interval of the factor, (-1, 1) in the paper.
        beta: interval of the gradient's factor, (0, 1) in the paper; None takes a again, which makes the gradient that
            of the function.
        training: False takes the mean.
        level: how far one a and one b reach: all rows ("batch"), a row, a channel of a row, or one element. k is one
            for all rows with "batch", else one for each row.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        Shape, dtype and device of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        OptionError: an unknown level, or an interval that is none.
        ShapeError: x has no dim of rows, or for "channel" no channels.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Yamada et al. 2019, arXiv:1802.02375, eq. 6 (there 1 - p, the chance of b_l = 1, falls with depth).
    """
    _check_shape(alpha, beta, level)
    if not isinstance(p, Tensor):
        check_probability(p)
    if x.ndim < (2 if level == "channel" else 1):
        axes = "(B, C, ...)" if level == "channel" else "(B, ...)"
        raise ShapeError(f"x of shape {tuple(x.shape)} was given; level={level!r} needs {axes}.")
    if not training:
        kept = kept_share(p)
        mean = kept + (1 - kept) * sum(alpha) / 2
        return x * (mean.to(x.dtype) if isinstance(mean, Tensor) else mean)
    gates = x.new_ones(x.shape[0], *[1] * (x.ndim - 1), dtype=torch.float32)
    rows = (0,) if level == "batch" else ()
    shake = dropout(gates, p, shared=rows, site=part_of(site, "gate"), owner=owner) == 0

    def factor(part: str, interval: Interval) -> Tensor:
        shape = [size if dim <= _REACH[level] else 1 for dim, size in enumerate(x.shape)]
        numbers = uniform_numbers(shape, device=x.device, shared=rows, site=part_of(site, part), owner=owner)
        random = interval[0] + (interval[1] - interval[0]) * numbers
        return torch.where(shake, random, 1.0).to(x.dtype)

    ahead = factor("forward", alpha)
    back = ahead if beta is None else factor("backward", beta)
    if (
        torch.compiler.is_compiling()
    ):  # which does not trace a derivative in both directions: 0 with a gradient
        through = x * back
        return (x * ahead).detach() + (through - through.detach())
    return _Shake.apply(x, ahead, back)


# The last dim along which the random factors differ.
_REACH = {"batch": 0, "row": 0, "channel": 1, "element": 1 << 30}


def _check_shape(alpha: Interval, beta: Interval | None, level: str) -> None:
    if level not in get_args(Level):
        raise OptionError(f"level={level!r} was given; allowed: {get_args(Level)}.")
    for name, interval in (("alpha", alpha), ("beta", beta)):
        if interval is not None and (len(interval) != 2 or not interval[0] <= interval[1]):
            raise OptionError(f"{name}={interval!r} was given; an interval is (low, high) with low <= high.")


class ShakeDrop(RateLayer):
    """Shaken branches; the layer around `shake_drop`. In evaluation the branch is multiplied by its mean factor.

    Args:
        p: chance to shake, in [0, 1].
        alpha: interval of the factor.
        beta: interval of the gradient's factor; None takes the factor itself.
        level: how far one factor reaches: "batch", "row", "channel" or "element".
    """

    def __init__(
        self,
        p: Rate = 0.5,
        alpha: Interval = (-1.0, 1.0),
        beta: Interval | None = (0.0, 1.0),
        level: Level = "row",
    ) -> None:
        super().__init__(p)
        _check_shape(alpha, beta, level)
        self.alpha = alpha
        self.beta = beta
        self.level: Level = level

    def forward(self, x: Tensor) -> Tensor:
        """(B, *features) -> the same shape."""
        return shake_drop(
            x, self.rate, self.alpha, self.beta, self.active, level=self.level, site=self.site, owner=self
        )

    def extra_repr(self) -> str:
        """p, intervals and level."""
        return f"p={self.p}, alpha={self.alpha}, beta={self.beta}, level={self.level!r}"

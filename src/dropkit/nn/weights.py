"""Weights that are forgotten: DropConnect, with one mask of the weights for a pass or one for every row."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dropkit.errors import OptionError, ProbabilityError, check_probability
from dropkit.masks import address
from dropkit.nn.convolution import Convolution, check_map, is_batched, map_of, one_for_all_rows, take_over
from dropkit.nn.features import dropout
from dropkit.nn.gaussian import gaussian_dropout
from dropkit.nn.layer import Rate, RateLayer
from dropkit.nn.weight_rows import is_served, row_masked

Inference = Literal["masks", "gaussian"]


def drop_connect(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    per_row: bool = True,
    convolution: Convolution | None = None,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """A linear map or convolution with inverted dropout on its weights; the bias always stays.

    y[b, o] = sum over i of weight[o, i] * keep[b, o, i] / (1 - p) * x[b, i] + bias[o]

    keep[b, o, i] ~ Bernoulli(1 - p) is that of `dropout` for an input of shape (B, *weight.shape), or with one mask for
    all rows (1, *weight.shape). The mean over masks is the plain map, exactly. On a CPU the linear map with a mask for
    each row draws bits in tiles and forgets them: what is kept for backward is x and the weight, and nothing of size
    B O I is ever there. Convolutions, and the linear map on other devices, mask the weights of a few rows at a time.
    torch.func, forward mode, derivatives of derivatives and compiled graphs are served by plain operations with the
    same masks, which hold masked weights for all rows at once.

    Args:
        x: (B, *, I), or (B, I, *space) for a convolution; without B, one row.
        weight: (O, I), or (O, I / groups, *kernel).
        bias: (O,) or None.
        p: chance to drop a weight, in [0, 1]; a number, or a tensor that broadcasts against (B, *weight.shape).
        training: False gives the plain map.
        per_row: each row has a mask of its own, as in the paper; False: one mask for the whole pass, of sample 0. A
            committee member's mask serves all rows either way.
        convolution: stride, padding, dilation and groups; None for a linear map.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        (B, *, O), or (B, O, *space).

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: x, weight and bias do not go together, or samples are not one for each row.
        OptionError: x and weight are of different dtypes, or not floating.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Wan et al. 2013, ICML, "Regularization of Neural Networks using DropConnect" (there p is the chance to keep,
        and nothing is scaled; that is this map with p for their 1 - p, and the weights times 1 - p).

    Example:
        >>> import torch, dropkit as dk
        >>> with dk.masks(seed=0):
        ...     dk.functional.drop_connect(torch.ones(2, 4), torch.eye(4), p=0.5)
        tensor([[2., 0., 2., 2.],
                [2., 2., 0., 0.]])
    """
    rate = p if isinstance(p, Tensor) else check_probability(p)
    check_map(x, weight, bias, convolution)
    apply = map_of(convolution)
    if not training:
        return apply(x, weight, bias)
    if not per_row or one_for_all_rows():
        masked = dropout(weight[None], rate, shared=(0,), site=site, owner=owner)
        return apply(x, masked[0], bias)
    batched = is_batched(x, convolution)
    rows = x if batched else x[None]
    if is_served(x, weight, rate):
        y = row_masked(rows, weight, address.draw(owner, site), float(rate), convolution)
    else:
        masked = dropout(weight.expand(len(rows), *weight.shape), rate, site=site, owner=owner)
        y = map_of(convolution, by_row=True)(rows, masked, None)
    if bias is not None:
        bias = bias.to(y.dtype)  # of autocast
        y = y + (bias if convolution is None else bias.view(-1, *[1] * convolution.space))
    return y if batched else y[0]


def drop_connect_moments(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, p: float | Tensor = 0.5, *,
    convolution: Convolution | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean and variance of `drop_connect` over all masks, exactly and without drawing one.

    mean[b, o] = sum over i of weight[o, i] x[b, i] + bias[o]
    variance[b, o] = p / (1 - p) * sum over i of weight[o, i]**2 x[b, i]**2

    Args:
        x, weight, bias, convolution: as there.
        p: chance to drop a weight, in [0, 1); a number, or a tensor that broadcasts against the weight.

    Returns:
        Two tensors of the shape of the map's output.

    Raises:
        ProbabilityError: p is outside [0, 1); at 1 the variance is infinite.
        ShapeError, OptionError: as there.

    Source: Wan et al. 2013, ICML, section 3.2 (there without inverted scaling).
    """
    ratio = _variance_ratio(p)
    check_map(x, weight, bias, convolution)
    apply = map_of(convolution)
    return apply(x, weight, bias), apply(x.square(), ratio * weight.square(), None)


def _variance_ratio(p: float | Tensor) -> float | Tensor:
    """p / (1 - p)."""
    if not isinstance(p, Tensor) and check_probability(p) == 1:
        raise ProbabilityError(
            "p=1 was given; inverted dropout has variance p / (1 - p), so p < 1 is needed here."
        )
    return p / (1 - p)


class DropConnect(RateLayer):
    """A linear or convolutional layer whose weights are dropped; the layer around `drop_connect`.

    It takes over the parameters of the module it is made from: its state dict has the keys `weight` and `bias` of that
    module, so checkpoints go either way.

    Args:
        module: nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d. Stride, padding and its mode, dilation, groups are kept.
        p: chance to drop a weight, in [0, 1]: a number, a tensor that broadcasts against
            (B, *weight.shape), or a schedule.
        per_row: each row has a mask of its own in training; False: one mask a pass, of which a step costs as much as
            the plain layer's, at the price of a noisier gradient. A committee member's mask serves all rows either way.
        inference: what a member is in evaluation: "masks", the network without the dropped weights; "gaussian", the
            paper's approximation, mean + standard deviation * eps with one eps of each output of the member.

    Raises:
        OptionError: a module of another kind.

    Source: Wan et al. 2013, ICML; the Gaussian inference is its section 3.2, where each activation is the mean over
        such draws. A committee's mean, over members, is that mean.
    """

    weight: Tensor
    bias: Tensor | None
    convolution: Convolution | None
    described: str

    def __init__(
        self, module: nn.Module, p: Rate = 0.5, *, per_row: bool = True, inference: Inference = "masks"
    ) -> None:
        super().__init__(p)
        if inference not in get_args(Inference):
            raise OptionError(
                f"inference={inference!r} was given; there are {' and '.join(map(repr, get_args(Inference)))}."
            )
        take_over(self, module)
        self.per_row, self.inference = per_row, inference

    def forward(self, x: Tensor) -> Tensor:
        """As the plain module's; the plain module itself while nobody asks for noise."""
        if self.inference == "gaussian" and not self.training and self.active:
            mean, variance = drop_connect_moments(
                x, self.weight, self.bias, self.rate, convolution=self.convolution
            )
            eps = gaussian_dropout(torch.ones_like(mean), 0.5, site=self.site, owner=self) - 1
            # Where nothing varies the root's slope is infinite; its gradient is 0 there.
            deviation = torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)
            return mean + deviation * eps
        return drop_connect(
            x, self.weight, self.bias, self.rate, self.active, per_row=self.per_row, convolution=self.convolution,
            site=self.site, owner=self,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The rate, then the plain module."""
        rate = super().extra_repr().rpartition(",")[0]  # without inplace
        return f"{rate}, per_row={self.per_row}, {self.described}"

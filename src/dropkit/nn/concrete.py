"""Rates that are learned by a relaxed mask: Concrete dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropkit.errors import OptionError, ProbabilityError, ShapeError, check_probability
from dropkit.masks.ops import normalise_shared
from dropkit.nn.convolution import Convolution, channel_dim, check_map, is_batched, map_of, take_over
from dropkit.nn.gaussian import uniform_dropout
from dropkit.nn.layer import StochasticLayer

SYMMETRIC = 0.25  # the rate at which uniform noise reaches from 0 to 2


def concrete_dropout(
    x: Tensor,
    logit: Tensor,
    training: bool = True,
    *,
    temperature: float = 0.1,
    relaxed: bool = True,
    shared: Sequence[int] = (),
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Dropout whose mask is a smooth function of its rate, so that the rate has a gradient.

    p = sigmoid(logit),    z[b, e] = sigmoid((logit + log u[b, e] - log(1 - u[b, e])) / temperature),    u ~ U(0, 1)
    y[b, e] = x[b, e] * (1 - z[b, e]) / (1 - p)

    Rounded, z is 1 with chance p exactly (`relaxed=False`: a mask that keeps the mean). The relaxed mask keeps it
    nearly: at temperature 0.1 the mean of (1 - z) / (1 - p) is 0.9987 at p = 0.1, 0.9980 at 0.2, 1 at 0.5 and 1.0078
    at 0.8, and what is missing goes with the square of the temperature.

    Args:
        x: (B, *features), floating; dim 0 counts the rows.
        logit: 0-d, log(p / (1 - p)); gradients flow to it where the mask is relaxed, and through 1 / (1 - p) always.
        training: False gives x back.
        temperature: of the relaxation, above 0; towards 0 masks become hard and the gradient of p noisy.
        relaxed: z itself; False: z rounded to 0 or 1.
        shared: dims along which one mask value serves all; with 0 among them, all rows.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        (B, *features), dtype of x.

    Raises:
        OptionError: a temperature that is not above 0, or x is not floating.
        ShapeError: a logit that is not one number, a shared dim that x does not have, or samples that are not one for
            each row.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Gal, Hron and Kendall 2017, arXiv:1705.07832, eq. 5 (there temperature is t, and survivors are not scaled);
        the relaxation is that of Maddison et al. 2016, arXiv:1611.00712.
    """
    _check(x, logit, temperature)
    if not training:
        return x
    dims = normalise_shared(shared, x.ndim)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sizes = [1 if dim in dims and dim else size for dim, size in enumerate(x.shape)]
    ones = torch.ones(sizes, dtype=dtype, device=x.device)
    rows = (0,) if 0 in dims else ()
    u = uniform_dropout(ones, SYMMETRIC, shared=rows, site=site, owner=owner) / 2
    # float32 rounds the uppermost u to 1, whose logit is infinite: that value is dropped, and its gradient is 0.
    stays = -(logit.to(dtype) + torch.logit(u)) / temperature
    scale = 1 + logit.to(dtype).exp()  # 1 / (1 - p)
    if not relaxed:
        return torch.where(stays > 0, x * scale.to(x.dtype), 0)
    return x * (torch.sigmoid(stays) * scale).to(x.dtype)


def _check(x: Tensor, logit: Tensor, temperature: float) -> None:
    if not x.is_floating_point():
        raise OptionError(f"x of {x.dtype} was given; it is floating-point numbers.")
    if logit.ndim:
        raise ShapeError(f"logit of shape {tuple(logit.shape)} was given; it is one number, ().")
    check_temperature(temperature)


def check_temperature(temperature: float) -> float:
    """Return a temperature, or say what is wrong with it.

    Raises:
        OptionError: it is not a number above 0.
    """
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, (int, float))
        or not 0 < temperature < math.inf
    ):
        raise OptionError(f"temperature={temperature!r} was given; it is a number above 0, such as 0.1.")
    return float(temperature)


def check_learnable(p: float) -> float:
    """Return the rate that learning begins with, or say what is wrong with it.

    Raises:
        ProbabilityError: it is not inside (0, 1).
    """
    if not 0 < check_probability(p) < 1:
        raise ProbabilityError(
            f"p={p!r} was given; a rate that is learned begins inside (0, 1), such as 0.1."
        )
    return float(p)


@dataclass(frozen=True, slots=True)
class ConcreteRegularisation:
    """What a layer's weights and rate cost, in nats for the whole data set; differentiable.

    Attributes:
        weight: length_scale^2 / 2 * sum of squares of the weights / (1 - p).
        entropy: - K H(p), with K mask values a row; it pulls p towards 1/2.
    """

    weight: Tensor
    entropy: Tensor

    @property
    def total(self) -> Tensor:
        """The sum: the divergence from the prior, up to a constant."""
        return self.weight + self.entropy


def concrete_regularisation(
    weight: Tensor, logit: Tensor, units: int, length_scale: float = 1e-2
) -> ConcreteRegularisation:
    """The divergence of a dropout layer's posterior from its prior, up to a constant.

    KL = length_scale^2 / 2 * (1 - p) * sum of (W / (1 - p))^2 - K H(p),    H(p) = - p log p - (1 - p) log(1 - p)

    W / (1 - p) is what is kept of the weights: the paper's M. Added to a mean loss in nats, divide by the number of
    rows of the training set: loss = mean negative log likelihood + KL / N.

    Args:
        weight: any shape.
        logit: log(p / (1 - p)), 0-d.
        units: K, how many values the mask of a row has.
        length_scale: of the prior N(0, 1 / length_scale^2) of the weights.

    Source: Gal, Hron and Kendall 2017, eq. 3 and 4.
    """
    log_p, log_keep = F.logsigmoid(logit), F.logsigmoid(-logit)
    negative_entropy = log_p.exp() * log_p + log_keep.exp() * log_keep
    squares = weight.square().sum() * (1 + logit.exp())
    return ConcreteRegularisation(length_scale**2 / 2 * squares, units * negative_entropy)


class ConcreteDropout(StochasticLayer):
    """A linear or convolutional layer whose inputs are dropped at a rate that is learned.

    In training the mask is relaxed, and a value of its own for each feature of each row; before a convolution, for each
    channel. A committee member drops by the rounded mask at the learned rate, one for all rows: a thinned network. In
    evaluation it is the plain layer.

    The layer takes over the parameters of the module it is made from, under their own names, `weight` and `bias`; its
    state dict has the key `logit` besides. Nothing is stored by a pass: the cost of the rate is asked for by
    `regularisation()`, and belongs into the loss.

    Args:
        module: nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d.
        p: the rate that learning begins with, in (0, 1).
        temperature: of the relaxation.
        length_scale: of the prior of the weights; a larger one pulls p down.

    Raises:
        ProbabilityError: p is outside (0, 1).
        OptionError: a module of another kind, a temperature or length scale that is not above 0.

    Source: Gal, Hron and Kendall 2017, arXiv:1705.07832.

    Example:
        >>> import torch, dropkit as dk
        >>> layer = dk.nn.ConcreteDropout(torch.nn.Linear(8, 4))
        >>> loss = layer(torch.randn(32, 8)).square().mean() + layer.regularisation().total / 1000
        >>> loss.backward()
        >>> layer.logit.grad is not None
        True
    """

    weight: Tensor
    bias: Tensor | None
    convolution: Convolution | None
    described: str

    def __init__(
        self, module: nn.Module, p: float = 0.1, *, temperature: float = 0.1, length_scale: float = 1e-2
    ) -> None:
        super().__init__()
        p = check_learnable(p)
        take_over(self, module)
        self.logit = nn.Parameter(self.weight.new_tensor(math.log(p) - math.log1p(-p)))
        self.temperature = check_temperature(temperature)
        if isinstance(length_scale, bool) or not 0 < length_scale < math.inf:
            raise OptionError(f"length_scale={length_scale!r} was given; it is a number above 0.")
        self.length_scale = length_scale

    @property
    def p(self) -> Tensor:
        """The learned rate, 0-d."""
        return torch.sigmoid(self.logit)

    @property
    def units(self) -> int:
        """How many values the mask of a row has: features, or channels."""
        groups = 1 if self.convolution is None else self.convolution.groups
        return self.weight.shape[1] * groups

    def regularisation(self) -> ConcreteRegularisation:
        """What weights and rate cost, in nats for the whole data set; see `concrete_regularisation`."""
        return concrete_regularisation(self.weight, self.logit, self.units, self.length_scale)

    def divergence(self) -> Tensor:
        """The same as one number."""
        return self.regularisation().total

    def forward(self, x: Tensor) -> Tensor:
        """As the plain module's; the plain module itself while nobody asks for noise."""
        check_map(x, self.weight, self.bias, self.convolution)
        batched = is_batched(x, self.convolution)
        rows = x if batched else x[None]
        space = tuple(range(channel_dim(rows, self.convolution) + 1, rows.ndim))
        dropped = concrete_dropout(
            rows, self.logit, self.active, temperature=self.temperature, relaxed=self.training, shared=space,
            site=self.site, owner=self,
        )  # fmt: skip
        return map_of(self.convolution)(dropped if batched else dropped[0], self.weight, self.bias)

    def extra_repr(self) -> str:
        """The rate as it is now, then the plain module."""
        return f"p={self.p.item():.4g}, temperature={self.temperature}, {self.described}"

"""Weights with a variance of their own that is learned: variational dropout, sparse by its prior."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropkit.errors import OptionError, ShapeError
from dropkit.nn.concrete import check_learnable
from dropkit.nn.convolution import Convolution, check_map, is_batched, map_of, one_for_all_rows, take_over
from dropkit.nn.gaussian import gaussian_dropout
from dropkit.nn.layer import StochasticLayer

Prior = Literal["log-uniform", "ard"]

UNIT_VARIANCE = 0.5  # the rate at which Gaussian noise has variance 1
TINY = 1e-16  # keeps the logarithm of a weight that is 0 finite
# Fit of the divergence from the log-uniform prior, Molchanov et al. 2017, eq. 14.
K1, K2, K3 = 0.63576, 1.87320, 1.48695


def variational_divergence(log_alpha: Tensor, prior: Prior = "log-uniform") -> Tensor:
    """KL of N(w, alpha w^2) from a prior of weights, in nats, for each weight; least where alpha is infinite.

    log-uniform    KL = k1 - k1 sigmoid(k2 + k3 log alpha) + 1/2 log(1 + 1 / alpha),    up to the prior's constant
    ard            KL = 1/2 log(1 + 1 / alpha),    a normal prior of each weight, at the variance that suits best

    The first is a fit with k1 = 0.63576, k2 = 1.87320, k3 = 1.48695. Exactly it is E log|e + alpha^(-1/2)| - E log|e|
    with e ~ N(0, 1), from which the fit is never farther than 0.0094 nats.

    Args:
        log_alpha: any shape; alpha = variance / w^2, which is p / (1 - p) of the dropout with that variance.
        prior: which one.

    Returns:
        The shape of log_alpha, 0 or more up to the error of the fit.

    Raises:
        OptionError: an unknown prior.

    Source: Molchanov, Ashukha and Vetrov 2017, arXiv:1701.05369, eq. 14; log-uniform prior: Kingma, Salimans and
        Welling 2015, arXiv:1506.02557; ard: Kharitonov et al. 2018, arXiv:1811.00596.
    """
    if prior not in get_args(Prior):
        raise OptionError(f"prior={prior!r} was given; there are {' and '.join(map(repr, get_args(Prior)))}.")
    ard = F.softplus(-log_alpha) / 2
    return ard if prior == "ard" else ard + K1 * torch.sigmoid(-(K2 + K3 * log_alpha))


def variational_dropout(
    x: Tensor,
    weight: Tensor,
    log_variance: Tensor,
    bias: Tensor | None = None,
    training: bool = True,
    *,
    convolution: Convolution | None = None,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """A linear map or convolution by weights drawn from N(weight, exp(log_variance)).

    y[b, o] = mean[b, o] + sqrt(variance[b, o]) * eps[b, o],    eps ~ N(0, 1)
    mean = weight x + bias,    variance = exp(log_variance) x^2

    which is what weights drawn for each row give, with less noisy gradients (local reparametrisation). In a convolution
    the places of a map have noise of their own, as in the paper. For a committee member, in place of it,

    y[b, o] = sum over i of (weight[o, i] + exp(log_variance[o, i] / 2) * eps[o, i]) * x[b, i] + bias[o]

    with one eps for all rows: one network, drawn from the posterior.

    Args:
        x: (B, *, I), or (B, I, *space) for a convolution; without B, one row.
        weight: (O, I), or (O, I / groups, *kernel).
        log_variance: as weight.
        bias: (O,) or None.
        training: False gives the plain map.
        convolution: stride, padding, dilation and groups; None for a linear map.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        (B, *, O), or (B, O, *space).

    Raises:
        ShapeError: shapes that do not go together, or samples that are not one for each row.
        OptionError: numbers that are not floating.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Kingma, Salimans and Welling 2015, arXiv:1506.02557, section 2.3; Molchanov et al. 2017, arXiv:1701.05369.
    """
    check_map(x, weight, bias, convolution)
    if log_variance.shape != weight.shape:
        raise ShapeError(
            f"log_variance of shape {tuple(log_variance.shape)} was given; it is one number for each weight, "
            f"{tuple(weight.shape)}."
        )
    apply = map_of(convolution)
    if not training:
        return apply(x, weight, bias)
    if one_for_all_rows():
        noise = _standard_normal(torch.ones_like(weight)[None], (0,), site, owner)[0]
        return apply(x, weight + (log_variance / 2).exp() * noise, bias)
    mean = apply(x, weight, bias)
    variance = apply(x.square(), log_variance.exp(), None)
    batched = is_batched(x, convolution)
    ones = torch.ones_like(mean) if batched else torch.ones_like(mean)[None]
    noise = _standard_normal(ones, (), site, owner)
    # The root's slope is infinite at 0, where a row of zeros comes in.
    return mean + (variance + TINY).sqrt() * (noise if batched else noise[0])


def _standard_normal(ones: Tensor, shared: tuple[int, ...], site: str | None, owner: object | None) -> Tensor:
    return gaussian_dropout(ones, UNIT_VARIANCE, shared=shared, site=site, owner=owner) - 1


class VariationalDropout(StochasticLayer):
    """A linear or convolutional layer that learns the variance of each of its weights, and which of them it needs.

    log_alpha = log_variance - log weight^2 says how noisy a weight is; one above the threshold is dropped with a chance
    near 1, and is 0 in evaluation and in every committee member. `divergence()` belongs into the loss, divided by the
    number of rows of the training set, often after a warm-up in which its weight rises from 0.

    The layer takes over the parameters of the module it is made from, under their own names, `weight` and `bias`; its
    state dict has the key `log_variance` besides.

    Args:
        module: nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d.
        p: the rate that learning begins with, in (0, 1), the same for each weight: alpha = p / (1 - p).
        prior: "log-uniform", or "ard": a normal one whose variance suits each weight best.
        threshold: log_alpha above which a weight is cut; 3 is p = 0.95.

    Raises:
        ProbabilityError: p is outside (0, 1).
        OptionError: a module of another kind, an unknown prior, or a threshold that is no number.

    Source: Molchanov, Ashukha and Vetrov 2017, arXiv:1701.05369.

    Example:
        >>> import torch, dropkit as dk
        >>> layer = dk.nn.VariationalDropout(torch.nn.Linear(8, 4), p=0.01)
        >>> loss = layer(torch.randn(32, 8)).square().mean() + layer.divergence() / 1000
        >>> layer.pruned_share
        0.0
    """

    weight: Tensor
    bias: Tensor | None
    convolution: Convolution | None
    described: str

    def __init__(
        self, module: nn.Module, p: float = 0.01, *, prior: Prior = "log-uniform", threshold: float = 3.0
    ) -> None:
        super().__init__()
        p = check_learnable(p)
        take_over(self, module)
        variational_divergence(torch.zeros(()), prior)  # refuses an unknown one
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or math.isnan(threshold):
            raise OptionError(f"threshold={threshold!r} was given; it is a number to compare log_alpha with.")
        self.prior, self.threshold = prior, threshold
        squares = self.weight.detach().square() + TINY
        self.log_variance = nn.Parameter(squares.log() + math.log(p) - math.log1p(-p))

    @property
    def log_alpha(self) -> Tensor:
        """Shape of the weight; log of variance / weight^2."""
        return self.log_variance - (self.weight.square() + TINY).log()

    @property
    def p(self) -> Tensor:
        """Shape of the weight; the rate of the dropout with this variance, alpha / (1 + alpha)."""
        return torch.sigmoid(self.log_alpha)

    @property
    def pruned(self) -> Tensor:
        """Shape of the weight, bool; True where it is cut in evaluation."""
        return self.log_alpha.detach() > self.threshold

    @property
    def pruned_share(self) -> float:
        """How much of the weight is cut."""
        return self.pruned.double().mean().item()

    def divergence(self) -> Tensor:
        """KL from the prior, in nats, summed over weights; see `variational_divergence`."""
        return variational_divergence(self.log_alpha, self.prior).sum()

    def forward(self, x: Tensor) -> Tensor:
        """As the plain module's; in evaluation, without the weights that are cut."""
        weight: Tensor = self.weight
        log_variance: Tensor = self.log_variance
        if not self.training:
            cut = self.pruned
            weight, log_variance = weight.masked_fill(cut, 0), log_variance.masked_fill(cut, -math.inf)
        return variational_dropout(
            x,
            weight,
            log_variance,
            self.bias,
            self.active,
            convolution=self.convolution,
            site=self.site,
            owner=self,
        )

    def extra_repr(self) -> str:
        """How much is cut, then the plain module."""
        return f"pruned_share={self.pruned_share:.4g}, prior={self.prior!r}, {self.described}"

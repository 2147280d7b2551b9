"""Negative log-likelihoods, of one network and of a committee, in nats.

A Gaussian output is (mean, log variance): the logarithm keeps the variance positive. Every network first
passes it through `bound_log_variance`, so that what is trained is what the committee later says.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dropkit.errors import ShapeError

# For a standardised target: from a thousandth of its variance scale's square to far beyond its own spread.
LOWEST_LOG_VARIANCE, HIGHEST_LOG_VARIANCE = -14.0, 5.0


def bound_log_variance(
    log_variance: Tensor, low: float = LOWEST_LOG_VARIANCE, high: float = HIGHEST_LOG_VARIANCE
) -> Tensor:
    """Bend a log variance softly into (low, high), so that no row can make the loss explode.

    s = high - softplus(high - raw),    bounded = low + softplus(s - low)

    A hard clamp would have no gradient outside and leave a network stuck there; a target that is constant, or fitted
    exactly, would otherwise send the variance to zero and the gradient to infinity.

    Args:
        log_variance: any shape, of a standardised target.
        low: lower bound.
        high: upper bound.

    Returns:
        The shape given; nearly the identity between the bounds.

    Source: Chua et al. 2018, arXiv:1805.12114, appendix A.1.
    """
    below = high - F.softplus(high - log_variance)
    return low + F.softplus(below - low)


def gaussian_nll(outputs: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of y under a Gaussian with the given mean and log variance, per row.

    -log N(y; mu, e^s) = (log(2 pi) + s + (y - mu)^2 e^-s) / 2

    Args:
        outputs: (..., 2), mean and log variance; leading axes (members, networks) broadcast against y.
        y: (...), in the unit of the mean.

    Returns:
        (...), nats.

    Raises:
        ShapeError: the last axis of outputs is not 2.
    """
    if outputs.shape[-1:] != (2,):
        raise ShapeError(
            f"outputs of shape {tuple(outputs.shape)} were given; mean and log variance need (..., 2)."
        )
    mean, log_variance = outputs.unbind(-1)
    return 0.5 * (math.log(2 * math.pi) + log_variance + (y - mean).square() * torch.exp(-log_variance))


def categorical_nll(outputs: Tensor, y: Tensor) -> Tensor:
    """Negative log-probability of class y, per row.

    -log softmax(outputs)[y]

    Args:
        outputs: (..., C) logits; leading axes (members, networks) broadcast against y.
        y: (...) int64 class indices.

    Returns:
        (...), nats.
    """
    log_probabilities = torch.log_softmax(outputs, dim=-1)
    index = y.expand(log_probabilities.shape[:-1]).unsqueeze(-1)
    return -log_probabilities.gather(-1, index).squeeze(-1)


def committee_nll(member_nll: Tensor) -> Tensor:
    """Negative log-likelihood of a committee: its members' predictive densities are averaged, not their losses.

    -log( (1/M) sum_m e^-nll[m] ) = log M - logsumexp_m(-nll[m])

    Args:
        member_nll: (M, ...), nats: `gaussian_nll` or `categorical_nll` of each member.

    Returns:
        (...), nats; never above the mean of the members' (Jensen).
    """
    return math.log(member_nll.shape[0]) - torch.logsumexp(-member_nll, dim=0)


LOSSES = {"gaussian": gaussian_nll, "categorical": categorical_nll}

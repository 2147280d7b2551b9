"""Counts of molecules: reading them, halving them, and how unlikely they are under three laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.errors import OptionError, ShapeError


def read_counts(data: Any) -> NDArray[np.float32]:
    """The raw counts of an AnnData or of a matrix.

    Args:
        data: AnnData (its layer "counts", else X), a scipy sparse matrix, or an array; cells x genes.

    Returns:
        (cells, genes) float32 whole numbers.

    Raises:
        ShapeError: not cells x genes.
        OptionError: a value is negative, not finite or not whole; normalised data are no counts.
    """
    layers = getattr(data, "layers", None)
    matrix = data if layers is None else layers.get("counts", data.X)
    found = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, np.float32)
    if found.ndim != 2 or not found.size:
        raise ShapeError(
            f"Counts of shape {found.shape} were given; they are (cells, genes), neither of them 0."
        )
    if not np.isfinite(found).all() or (found < 0).any() or (found != np.round(found)).any():
        raise OptionError(
            "The matrix holds values that are no counts (negative, broken or not finite numbers), as after "
            'normalisation. Give raw counts, in X or in the layer "counts".'
        )
    return found


def thin_counts(counts: NDArray[np.float32], share: float, *, seed: int = 0) -> NDArray[np.float32]:
    """Each molecule is kept with chance `share`: one part of a data set, counts - result being the other.

    kept[c, g] ~ Binomial(counts[c, g], share)

    For Poisson counts the two parts are independent, so that one trains and the other tests, cell by cell.

    Args:
        counts: (cells, genes) whole numbers.
        share: in (0, 1).
        seed: of the draw.

    Raises:
        OptionError: share outside (0, 1).

    Source: molecular cross-validation, Batson et al. 2019, bioRxiv 786269.
    """
    if not 0 < share < 1:
        raise OptionError(f"share={share} was given; it lies between 0 and 1, both excluded.")
    generator = np.random.default_rng([seed, 53])
    return generator.binomial(counts.astype(np.int64), share).astype(np.float32)


def poisson_nll(counts: Tensor, mean: Tensor) -> Tensor:
    """Minus log probability of counts under Poisson(mean), elementwise, nats.

    mean - k log(mean) + log k!

    Args:
        counts: (*shape) whole numbers; mean: broadcastable, positive.
    """
    return mean - torch.xlogy(counts, mean) + torch.lgamma(counts + 1)


def negative_binomial_nll(counts: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    """Minus log probability under the negative binomial law of variance mean + dispersion * mean^2, nats.

    With r = 1 / dispersion:  -log Gamma(k + r) + log Gamma(r) + log k! + r log(1 + mean / r) + k log(1 + r / mean)

    Args:
        counts: (*shape) whole numbers; mean: broadcastable, positive.
        dispersion: broadcastable, positive; near 0 this is Poisson.

    Source: the NB2 form of Hilbe 2011, as single-cell models have it (Love et al. 2014).
    """
    r = 1 / dispersion
    whole = torch.lgamma(counts + r) - torch.lgamma(r) - torch.lgamma(counts + 1)
    return r * torch.log1p(mean * dispersion) + counts * torch.log1p(r / mean) - whole


def zero_inflated_nll(counts: Tensor, mean: Tensor, dispersion: Tensor, inflation: Tensor) -> Tensor:
    """Minus log probability where a count is 0 with chance pi, and negative binomial otherwise, nats.

    P(0) = pi + (1 - pi) NB(0),    P(k) = (1 - pi) NB(k)

    Args:
        counts, mean, dispersion: as in `negative_binomial_nll`.
        inflation: logit of pi, broadcastable.
    """
    log_pi, log_rest = torch.nn.functional.logsigmoid(inflation), torch.nn.functional.logsigmoid(-inflation)
    regular = log_rest - negative_binomial_nll(counts, mean, dispersion)
    return -torch.where(counts == 0, torch.logaddexp(log_pi, regular), regular)

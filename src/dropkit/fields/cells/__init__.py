"""Single cells: count models as losses, a denoising autoencoder, and a check of where a data set's zeros come from."""

from dropkit.fields.cells.autoencoder import CountAutoencoder, Likelihood, train_autoencoder
from dropkit.fields.cells.counts import (
    negative_binomial_nll,
    poisson_nll,
    read_counts,
    thin_counts,
    zero_inflated_nll,
)
from dropkit.fields.cells.zeros import ZeroCheck, check_zeros

__all__ = [
    "CountAutoencoder",
    "Likelihood",
    "ZeroCheck",
    "check_zeros",
    "negative_binomial_nll",
    "poisson_nll",
    "read_counts",
    "thin_counts",
    "train_autoencoder",
    "zero_inflated_nll",
]

"""Where the zeros of a count matrix come from: sampling, genes that vary, or something that removes counts.

Per gene with mean mu and variance mu + phi mu^2:  P(0) = exp(-mu)   Poisson: sampling alone
                                                   P(0) = (1 + phi mu)^(-1/phi)   negative binomial: cells differ
                                                   P(0) = pi + (1 - pi) exp(-mu / (1 - pi))   masks at one rate pi

A mask keeps a floor of zeros however large the mean is; sampling does not. The dispersion comes from the variance, so
a gene whose counts have a tail much heavier than the negative binomial's looks less inflated than it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dropkit.errors import OptionError
from dropkit.fields.cells.counts import read_counts

Floats = NDArray[np.float64]
LEAST_CELLS, LEAST_GENES = 50, 20
COUNTED = 1.0  # mean count from which a gene tells: rarer ones are nearly all zeros under any law
EXCESS = 0.05  # zero share beyond the negative binomial from which zeros count as inflated: cell types add a little


@dataclass(frozen=True, slots=True, eq=False)
class ZeroCheck:
    """Zero shares per gene, seen and predicted.

    Attributes:
        mean: (G,) counts a cell; dispersion: (G,) phi, by moments.
        observed: (G,) share of cells with a zero.
        poisson, negative_binomial, one_dispersion, mask: (G,) predicted shares: of the two laws gene by gene, of the
            negative binomial with one phi for all genes, and of masks at one rate, both fitted to the zeros.
        rate: that of the masks.
        excess: mean of observed - negative_binomial over genes of mean count 1 and more, or, with fewer than 10 of
            them, over the 10 of largest mean.
        excess_error: standard error of it over these genes.
    """

    mean: Floats
    dispersion: Floats
    observed: Floats
    poisson: Floats
    negative_binomial: Floats
    one_dispersion: Floats
    mask: Floats
    rate: float
    excess: float
    excess_error: float

    @property
    def inflated(self) -> bool:
        """Whether zeros exceed what counts of that mean and variance have, by more than 5 points and 3 errors."""
        return self.excess - 3 * self.excess_error > EXCESS

    def error(self, predicted: Floats) -> float:
        """Mean over genes of |observed - predicted|."""
        return float(np.abs(self.observed - predicted).mean())

    def to_text(self) -> str:
        """What was found, and what to do."""
        laws = {
            "Poisson": self.poisson,
            "negative binomial, gene by gene": self.negative_binomial,
            "negative binomial, one dispersion": self.one_dispersion,
            f"masks at one rate ({self.rate:.3f})": self.mask,
        }
        lines = [f"{len(self.mean):,} genes; mean |observed - predicted| share of zeros:"]
        lines += [f"  {name:<34} {self.error(law):.4f}" for name, law in laws.items()]
        lines.append(
            f"Zeros beyond the negative binomial: {self.excess:+.4f} ± {self.excess_error:.4f}. "
            + (
                "The counts are zero-inflated, as reads without molecular tags are: compare a zero-inflated model."
                if self.inflated
                else "The counts are not zero-inflated: a negative binomial model needs no mask and no extra zeros."
            )
        )
        return "\n".join(lines)


def check_zeros(data: Any, *, least_cells: int = 3) -> ZeroCheck:
    """Compare each gene's share of zeros with what sampling, variation and masks predict.

    Args:
        data: AnnData, sparse matrix or array of raw counts, cells x genes.
        least_cells: genes seen in fewer cells are left out.

    Raises:
        ShapeError, OptionError: not raw counts; fewer than 50 cells or 20 genes.

    Source: Svensson 2020, Nature Biotechnology 38, 147.
    """
    counts = read_counts(data).astype(np.float64)
    counts = counts[:, (counts > 0).sum(0) >= least_cells]
    if len(counts) < LEAST_CELLS or counts.shape[1] < LEAST_GENES:
        raise OptionError(
            f"{len(counts)} cells and {counts.shape[1]} genes (seen in at least {least_cells} cells) were given; "
            f"shares of zeros need {LEAST_CELLS} cells and {LEAST_GENES} genes."
        )
    mean, variance, observed = counts.mean(0), counts.var(0, ddof=1), (counts == 0).mean(0)
    dispersion = np.maximum((variance - mean) / mean**2, 0)
    by_gene = negative_binomial_zeros(mean, dispersion)
    one = _best(np.geomspace(1e-3, 100, 400), lambda phi: negative_binomial_zeros(mean, phi), observed)
    rate = _best(np.linspace(0, 0.99, 400), lambda pi: mask_zeros(mean, pi), observed)
    telling = mean >= min(COUNTED, np.sort(mean)[-10])
    off = (observed - by_gene)[telling]
    return ZeroCheck(
        mean, dispersion, observed, np.exp(-mean), by_gene, negative_binomial_zeros(mean, one), mask_zeros(mean, rate),
        rate, float(off.mean()), float(off.std(ddof=1) / len(off) ** 0.5),
    )  # fmt: skip


def negative_binomial_zeros(mean: Floats, dispersion: Floats | float) -> Floats:
    """(1 + phi mu)^(-1/phi), and exp(-mu) where phi is 0."""
    phi = np.maximum(np.broadcast_to(np.asarray(dispersion, np.float64), mean.shape), 1e-12)
    return np.exp(-np.log1p(phi * mean) / phi)


def mask_zeros(mean: Floats, rate: float) -> Floats:
    """pi + (1 - pi) exp(-mu / (1 - pi)): Poisson counts of which a share pi is set to 0, at the same mean."""
    return rate + (1 - rate) * np.exp(-mean / (1 - rate))


def _best(grid: Floats, law: Any, observed: Floats) -> float:
    """The value of the grid whose law is nearest, by mean absolute error."""
    return float(grid[np.argmin([np.abs(observed - law(value)).mean() for value in grid])])

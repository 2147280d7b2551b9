"""Does the spread know which rows are wrong, or strange? Rows ranked by it, ones that matter against the others."""

from __future__ import annotations

import torch
from torch import Tensor

from dropkit.errors import ShapeError


def midranks(values: Tensor) -> Tensor:
    """Ranks 1 ... n of (n,) values in float64; equal values share the mean of their ranks."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(dim=0).double()
    return (last - (counts.double() - 1.0) / 2.0)[place]


def auroc(spread: Tensor, positive: Tensor) -> float | None:
    """Chance that a positive row has more spread than another one, ties counting half (area under the ROC curve).

    A = (sum over positive rows of rank - P (P + 1) / 2) / (P N),    P positive rows and N others

    Args:
        spread: (n,), any number that grows with doubt.
        positive: (n,) bool: wrong rows, or rows from elsewhere.

    Returns:
        In [0, 1]; 0.5 says the spread tells nothing. None where there are no positive rows or no others.

    Raises:
        ShapeError: the two are not (n,) each.

    Example:
        >>> auroc(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([False, False, True]))
        1.0

    Source: Mann and Whitney 1947, Ann. Math. Stat. 18, 50-60.
    """
    if spread.ndim != 1 or spread.shape != positive.shape:
        raise ShapeError(
            f"spread of shape {tuple(spread.shape)} and flags of shape {tuple(positive.shape)} were given; (n,) each."
        )
    flags = positive.bool()
    here = int(flags.sum())
    others = len(flags) - here
    if here == 0 or others == 0:
        return None
    return float((midranks(spread)[flags].sum() - here * (here + 1) / 2) / (here * others))

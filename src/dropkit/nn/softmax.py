"""Softmax of rows that lie in the cache, in place: the exponentials, their sum and its logarithm.

In float32 the exponential is a polynomial that LLVM vectorises (Numba calls the C library's once for each element
otherwise); in float64 torch's own is used.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

Array = np.ndarray[Any, Any]

_F = np.float32
LOWEST = _F(-87.0)  # exp(-87) = 1.6e-38 is the last normal number; below it the result is 0
_LOG2E = _F(1 / math.log(2))
_LN2_HIGH = _F(0.693359375)  # few bits, so that n * _LN2_HIGH is exact
_LN2_LOW = _F(math.log(2) - 0.693359375)
_ROUND = _F(
    1.5 * 2**23
)  # y + _ROUND has no bits left for a fraction: its last bits are y rounded to an integer
_C2, _C3, _C4, _C5, _C6, _C7 = (_F(1 / math.factorial(k)) for k in range(2, 8))
_LANES = 64


@njit(nogil=True, cache=True, fastmath={"contract"})
def _exp_minus(row: Array, shift: np.float32) -> None:
    """row = exp(row - shift), to within one unit of the last place, for row <= shift (or a little above).

    exp(y) = 2**n exp(y - n log 2) with n = round(y / log 2); the second factor by its Taylor series, |r| <= 0.347.
    """
    for i in range(len(row)):
        y = row[i] - shift
        low = y < LOWEST
        y = LOWEST if low else y  # in this order, so that NaN stays
        z = y * _LOG2E + _ROUND
        n = z - _ROUND
        r = (y - n * _LN2_HIGH) - n * _LN2_LOW
        series = ((((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2) * r + _F(1)) * r + _F(1)
        power = np.int32((_F(z).view(np.int32) << 23) + (127 << 23)).view(np.float32)
        row[i] = _F(0) if low else series * power


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _sum(row: Array) -> np.float32:
    total = _F(0)
    for i in range(len(row)):
        total += row[i]
    return total


@njit(nogil=True, cache=True)
def _maximum(row: Array, best: Array) -> np.float32:
    """The largest number of a row, NaN aside; `best` is a buffer of _LANES numbers, so that lanes stay independent."""
    best[:] = _F(-np.inf)
    whole = len(row) // _LANES * _LANES
    for at in range(0, whole, _LANES):
        part = row[at : at + _LANES]
        for i in range(_LANES):
            best[i] = part[i] if part[i] > best[i] else best[i]
    top = _F(-np.inf)
    for i in range(_LANES):
        top = max(top, best[i])
    for i in range(whole, len(row)):
        top = row[i] if row[i] > top else top
    return top


@njit(nogil=True, cache=True)
def _softmax_float32(scores: Array, logsumexp: Array, total: Array) -> None:
    best = np.empty(_LANES, np.float32)
    for i in range(len(scores)):
        row = scores[i]
        top = _maximum(row, best)
        if top == -np.inf:  # all masked, or NaN
            top = _F(0)
        _exp_minus(row, top)
        total[i] = _sum(row)
        logsumexp[i] = top + np.log(total[i]) if total[i] != 0 else _F(np.inf)


@njit(nogil=True, cache=True)
def _exp_float32(scores: Array, logsumexp: Array) -> None:
    for i in range(len(scores)):
        _exp_minus(scores[i], logsumexp[i])


def softmax_rows(scores: Tensor, logsumexp: Tensor) -> Tensor:
    """Exponentials of rows in place, up to a factor of each row: their sums.

    scores[i, j] = exp(scores[i, j] - max_j scores[i, j]),    total[i] = sum_j scores[i, j]

    Args:
        scores: (rows, columns) float32 or float64, contiguous; overwritten.
        logsumexp: (rows,), written: log sum_j exp(scores[i, j]); +inf for a row that is -inf throughout, so that
            `exp_rows` gives 0 there.

    Returns:
        (rows,) total; 0 for a row that is -inf throughout.
    """
    if scores.dtype == torch.float32:
        total = torch.empty_like(logsumexp)
        _softmax_float32(scores.numpy(), logsumexp.numpy(), total.numpy())
        return total
    top = scores.amax(dim=1)
    top.masked_fill_(top == -torch.inf, 0)
    torch.exp(scores.sub_(top[:, None]), out=scores)
    total = scores.sum(dim=1)
    torch.add(top, total.log(), out=logsumexp)
    logsumexp.masked_fill_(total == 0, torch.inf)
    return total


def exp_rows(scores: Tensor, logsumexp: Tensor) -> None:
    """The same softmax again, from what was kept of it: scores[i, j] = exp(scores[i, j] - logsumexp[i]), in place.

    Args:
        scores: (rows, columns) float32 or float64, contiguous; overwritten.
        logsumexp: (rows,), from `softmax_rows`.
    """
    if scores.dtype == torch.float32:
        _exp_float32(scores.numpy(), logsumexp.numpy())
    else:
        torch.exp(scores.sub_(logsumexp[:, None]), out=scores)

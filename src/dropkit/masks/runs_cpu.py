"""Numba kernels for stretches of a mask, from any element on: rows of attention, steps of time.

The bits are those of `cpu.dropout_rows`; what is dropped is dropped in place and unscaled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from dropkit.masks.cpu import BATCH, EVERYTHING, _dropped_by_refinement, _philox_run
from dropkit.masks.philox import LANES, REFINE

Array = np.ndarray[Any, Any]

_U = np.uint64


@njit(nogil=True, cache=True)
def _run_lanes(
    first: int, sample_id: np.uint64, key: np.uint64, member: np.uint64, step: int, fine: int, words: Array,
    second: Array,
) -> None:  # fmt: skip
    """Fill `words` with the lanes of BATCH blocks of one sample from block `first` on, refined where fine > 0."""
    _philox_run(first, sample_id, key, member, _U(step), words)
    if fine > 0:
        _philox_run(first | REFINE, sample_id, key, member, _U(step), second)
        _dropped_by_refinement(words.view(np.uint16), second.view(np.uint16), fine)


@njit(nogil=True, cache=True)
def drop_runs(
    x: Array, length: int, ids: Array, firsts: Array, key: np.uint64, member: np.uint64, step: int, t: int, fine: int
) -> None:  # fmt: skip
    """Drop elements of x in place, unscaled: run u is the elements [firsts[u], firsts[u] + length) of sample ids[u].

    A run may begin and end anywhere, also within a block of eight.

    Args:
        x: flat, (runs length,).
        length: elements of a run.
        ids: (runs,) uint64 sample ids.
        firsts: (runs,) int64, index of a run's first element in its sample's mask.
        key, member, step, t, fine: one number each.
    """
    words, second = np.empty(2 * BATCH, np.uint64), np.empty(2 * BATCH, np.uint64)
    lane = words.view(np.uint16)
    zero = x.dtype.type(0)
    if t >= EVERYTHING:
        x[:] = zero
        return
    limit = np.uint16(1 if fine > 0 else t)
    for u in range(len(firsts)):
        at, stop = u * length, (u + 1) * length
        first, skip = firsts[u] // LANES, firsts[u] % LANES
        while at < stop:
            _run_lanes(first, ids[u], key, member, step, fine, words, second)
            count = min(LANES * BATCH - skip, stop - at)
            target, use = x[at : at + count], lane[skip : skip + count]
            for i in range(count):
                target[i] = target[i] if use[i] >= limit else zero
            at, first, skip = at + count, first + BATCH, 0


@njit(nogil=True, cache=True)
def drop_softmax_runs(
    weight: Array, gradient: Array, delta: Array, width: int, scale: float, length: int, ids: Array, firsts: Array,
    key: np.uint64, member: np.uint64, step: int, t: int, fine: int,
) -> None:  # fmt: skip
    """Backward of dropout and softmax in one pass, in place; runs as in `drop_runs`.

    gradient = weight * (keep * scale * gradient - delta of the row),    then    weight = weight * keep

    Args:
        weight: flat, (runs length,): the softmax before its dropout; on return dropped, unscaled.
        gradient: flat likewise: of the dropped weights; on return of the scores.
        delta: (rows,) sum over a row of weight * its gradient.
        width: elements of a row; runs hold whole rows.
        scale: of the survivors.
        length, ids, firsts, key, member, step, t, fine: as in `drop_runs`.
    """
    words, second = np.empty(2 * BATCH, np.uint64), np.empty(2 * BATCH, np.uint64)
    lane = words.view(np.uint16)
    zero, factor = weight.dtype.type(0), weight.dtype.type(scale)
    limit = np.uint16(1 if fine > 0 else min(t, EVERYTHING - 1))
    nothing_stays = t >= EVERYTHING
    for u in range(len(firsts)):
        at, stop = u * length, (u + 1) * length
        first, skip = firsts[u] // LANES, firsts[u] % LANES
        while at < stop:
            if nothing_stays:
                words[:] = _U(0)
            else:
                _run_lanes(first, ids[u], key, member, step, fine, words, second)
            end = min(at + LANES * BATCH - skip, stop)
            while at < end:  # to the end of the row, or of the lanes
                row = at // width
                count = min((row + 1) * width, end) - at
                p, g, use, mean = weight[at : at + count], gradient[at : at + count], lane[skip:], delta[row]
                for i in range(count):
                    stays = use[i] >= limit
                    g[i] = p[i] * ((g[i] * factor if stays else zero) - mean)
                    p[i] = p[i] if stays else zero
                at, skip = at + count, skip + count
            first, skip = first + BATCH, 0

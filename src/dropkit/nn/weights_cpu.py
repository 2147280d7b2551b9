"""Numba kernels of a linear map in which every row has a weight mask of its own, and no masked weights are stored.

For rows (B, I) and weights (O, I) there are B O I mask elements. The bits of a tile of columns, as many as a batch of
counters gives, are drawn, used and forgotten:

    Philox blocks      B O I / 8, forward and backward; most of the time
    products           B O I forward, 2 B O I backward
    memory             the results: (B, O) forward, (O, I) and at most four of (B, I) backward

The mask element of row b, output o and column i is element o I + i of sample b, as in `dropout` of (B, O, I). The
order of every sum depends on O and I alone: neither batch nor number of threads changes a bit of a row's result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from dropkit.masks.cpu import (
    BATCH,
    SHORT_ROW,
    VECTOR,
    WORDS_DRAWN,
    _dropped_by_refinement,
    _philox_batch,
    _philox_run,
)
from dropkit.masks.philox import LANES, REFINE

Array = np.ndarray[Any, Any]

TILE = BATCH * LANES  # columns at a time, whose bits fill a batch of counters
RAGGED_TILE = TILE - LANES  # where rows begin within a block, which may cost a tile one block more
GROUPS = 4  # of outputs whose gradients by x are summed apart, so that threads share them out; always as many
MIN_GROUP = 16  # outputs; fewer are not worth a group of their own

_U = np.uint64
_REFINE = _U(REFINE)

# Sums may be regrouped, which lets LLVM keep them in vectors, and products fused into them. No other liberty is taken.
_REGROUPED = {"reassoc", "nsz", "contract"}


@njit(nogil=True, cache=True)
def tile_width(columns: int) -> int:
    """How many columns a tile has."""
    return min(columns, TILE if columns % LANES == 0 else RAGGED_TILE)


@njit(nogil=True, cache=True)
def group_count(outputs: int) -> int:
    """Into how many groups backward divides the outputs."""
    return max(1, min(GROUPS, outputs // MIN_GROUP))


@njit(nogil=True, cache=True)
def _tile_lanes(
    first: int, blocks: int, ids: Array, start: int, count: int, key: np.uint64, member: np.uint64, step: int,
    fine: int, block: Array, sample: Array, words: Array, second: Array,
) -> None:  # fmt: skip
    """Fill `words` with the lanes of the blocks from `first` on of rows `start` to `start + count`, row after row.

    Args:
        blocks: of a row; count times as many are at most BATCH.
        words, second: (WORDS_DRAWN,) uint64; what lies past the last row's end means nothing.
    """
    if blocks >= SHORT_ROW:
        whole = (blocks + VECTOR - 1) // VECTOR * VECTOR  # what a row has too much, the next one overwrites
        for r in range(count):
            place, row_id = 2 * r * blocks, ids[start + r]
            _philox_run(first, row_id, key, member, _U(step), words[place : place + 2 * whole])
            if fine > 0:
                _philox_run(first | REFINE, row_id, key, member, _U(step), second[place : place + 2 * whole])
    else:
        at = 0
        for r in range(count):
            for j in range(blocks):
                block[at] = _U(first + j)
                sample[at] = ids[start + r]
                at += 1
        _philox_batch(block, sample, key, member, _U(step), words[: 2 * BATCH])
        if fine > 0:
            for i in range(BATCH):
                block[i] |= _REFINE
            _philox_batch(block, sample, key, member, _U(step), second[: 2 * BATCH])
    if fine > 0:
        _dropped_by_refinement(words.view(np.uint16), second.view(np.uint16), fine)


@njit(nogil=True, cache=True, fastmath=_REGROUPED)
def _masked_dot(w: Array, x: Array, lane: Array, limit: np.uint16) -> float:
    """Sum of w * x where the lane keeps: a dropped NaN or infinity counts 0."""
    zero = w.dtype.type(0)
    total = zero
    for i in range(len(w)):
        product = w[i] * x[i]
        total += product if lane[i] >= limit else zero
    return total


@njit(nogil=True, cache=True, fastmath=_REGROUPED)
def _masked_add(target: Array, source: Array, factor: float, lane: Array, limit: np.uint16) -> None:
    """target += factor * source where the lane keeps."""
    zero = target.dtype.type(0)
    for i in range(len(target)):
        product = factor * source[i]
        target[i] += product if lane[i] >= limit else zero


@njit(nogil=True, cache=True)
def forward_rows(
    x: Array, weight: Array, out: Array, ids: Array, key: np.uint64, member: np.uint64, step: int, t: int, fine: int,
    start: int, stop: int,
) -> None:  # fmt: skip
    """out[b, o] = sum over i of weight[o, i] * keep[b, o, i] * x[b, i], unscaled, for the outputs `start` to `stop`.

    Args:
        x: (B, I).
        weight: (O, I), dtype of x.
        out: (B, O), zeros.
        ids: (B,) uint64 sample ids.
        key, member, step, t, fine: of the mask, one number each; t below 65536.
        start, stop: the unit that threads share out.
    """
    rows, columns = x.shape
    width = tile_width(columns)
    block, sample = np.zeros(BATCH, np.uint64), np.zeros(BATCH, np.uint64)
    words, second = np.zeros(WORDS_DRAWN, np.uint64), np.zeros(WORDS_DRAWN, np.uint64)
    lane, limit = words.view(np.uint16), np.uint16(1 if fine > 0 else t)
    for o in range(start, stop):
        for left in range(0, columns, width):
            right = min(left + width, columns)
            element = o * columns + left
            skip = element % LANES
            blocks = (skip + right - left + LANES - 1) // LANES
            together = BATCH // blocks
            w = weight[o, left:right]
            for b in range(0, rows, together):
                count = min(together, rows - b)
                _tile_lanes(
                    element // LANES, blocks, ids, b, count, key, member, step, fine, block, sample, words, second
                )  # fmt: skip
                for r in range(count):
                    at = r * blocks * LANES + skip
                    out[b + r, o] += _masked_dot(w, x[b + r, left:right], lane[at : at + right - left], limit)


@njit(nogil=True, cache=True)
def backward_rows(
    x: Array, weight: Array, gradient: Array, dx: Array, dw: Array, ids: Array, key: np.uint64, member: np.uint64,
    step: int, t: int, fine: int, start: int, stop: int,
) -> None:  # fmt: skip
    """Gradients of `forward_rows` by both its inputs, for the units `start` to `stop`: a tile, a group of outputs.

    dx[b, i] = sum over o of gradient[b, o] * keep[b, o, i] * weight[o, i]
    dw[o, i] = sum over b of gradient[b, o] * keep[b, o, i] * x[b, i]

    Args:
        x, weight, ids, key, member, step, t, fine: as there.
        gradient: (O, B), the transpose of the output's gradient.
        dx: (G, B, I) zeros, one term for each group of outputs, or (0, B, I): not wanted.
        dw: (O, I) zeros, or (0, I): not wanted.
        start, stop: the unit that threads share out, among tiles times groups; no two write to the same place.
    """
    rows, columns = x.shape
    width = tile_width(columns)
    block, sample = np.zeros(BATCH, np.uint64), np.zeros(BATCH, np.uint64)
    words, second = np.zeros(WORDS_DRAWN, np.uint64), np.zeros(WORDS_DRAWN, np.uint64)
    lane, limit = words.view(np.uint16), np.uint16(1 if fine > 0 else t)
    groups = group_count(len(weight))
    share = (len(weight) + groups - 1) // groups
    for unit in range(start, stop):
        group = unit % groups
        left = unit // groups * width
        right = min(left + width, columns)
        for o in range(group * share, min((group + 1) * share, len(weight))):
            element = o * columns + left
            skip = element % LANES
            blocks = (skip + right - left + LANES - 1) // LANES
            together = BATCH // blocks
            for b in range(0, rows, together):
                count = min(together, rows - b)
                _tile_lanes(
                    element // LANES, blocks, ids, b, count, key, member, step, fine, block, sample, words, second
                )  # fmt: skip
                for r in range(count):
                    at = r * blocks * LANES + skip
                    use, g = lane[at : at + right - left], gradient[o, b + r]
                    if len(dx) > 0:
                        _masked_add(dx[group, b + r, left:right], weight[o, left:right], g, use, limit)
                    if len(dw) > 0:
                        _masked_add(dw[o, left:right], x[b + r, left:right], g, use, limit)

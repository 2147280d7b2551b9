"""Numba kernels of the fused tails: bias, dropout, residual and normalisation, a row at a time.

With n elements of b bytes, the floors are: the sum alone, read x and residual, write the sum, 3 n b; with a norm behind
it, one write more, 4 n b; its backward, read the gradient and the sum, write two gradients, 4 n b. All else of a row
(its lanes, its deviations) stays in the cache. The bits are those of `cpu.dropout_rows`, n / 8 Philox blocks.

A row here is what is normalised, the last dim. A sample has `per_sample` such rows, and its mask runs through them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from dropkit.masks.cpu import BATCH, WORDS_DRAWN, draw_blocks
from dropkit.masks.philox import LANES

Array = np.ndarray[Any, Any]

CHUNK = 256  # rows whose parameter gradients are summed together, always the same: threads change no bit

_U = np.uint64

# Sums alone may be regrouped, which lets LLVM keep them in vectors. No other liberty is taken.
_REGROUPED = {"reassoc", "nsz"}


@njit(nogil=True, cache=True)
def tile_rows(width: int) -> int:
    """How many rows' bits to draw at a time, so that few of a batch of counters are drawn in vain."""
    blocks = width // LANES
    if width % LANES != 0 or blocks >= 8 * BATCH:
        return 1
    rows = 1
    while rows < BATCH and rows * blocks % BATCH != 0:
        rows *= 2
    return rows


@njit(nogil=True, cache=True)
def _draw_lanes(
    row: int, rows: int, width: int, per_sample: int, key: np.uint64, member: np.uint64, samples: Array, step: int,
    block: Array, sample: Array, words: Array,
) -> int:  # fmt: skip
    """Fill `words` with the lanes of rows `row` to `row + rows`; returns the place of the first one's first lane."""
    per_row = (per_sample * width + LANES - 1) // LANES  # blocks of a sample
    at = row % per_sample * width
    first = row // per_sample * per_row + at // LANES
    count = (at % LANES + rows * width + LANES - 1) // LANES
    for i in range(0, count, BATCH):
        place = words[2 * i : 2 * i + WORDS_DRAWN]
        draw_blocks(first + i, per_row, samples, 0, key, member, _U(step), 0, block, sample, place)
    return at % LANES


@njit(nogil=True, cache=True)
def _add(x: Array, bias: Array, residual: Array, lane: Array, t: int, scale: float, out: Array) -> None:
    """out = residual + dropout(x + bias); an empty bias is none."""
    zero, factor, limit = x.dtype.type(0), x.dtype.type(scale), np.uint16(t)
    if t == 0 and len(bias) == 0:
        for i in range(len(x)):
            out[i] = residual[i] + x[i] * factor
    elif t == 0:
        for i in range(len(x)):
            out[i] = residual[i] + (x[i] + bias[i]) * factor
    elif len(bias) == 0:
        for i in range(len(x)):
            out[i] = residual[i] + (x[i] * factor if lane[i] >= limit else zero)
    else:
        for i in range(len(x)):
            out[i] = residual[i] + ((x[i] + bias[i]) * factor if lane[i] >= limit else zero)


@njit(nogil=True, cache=True, fastmath=_REGROUPED)
def _sum(values: Array) -> float:
    total = values.dtype.type(0)
    for i in range(len(values)):
        total += values[i]
    return total


@njit(nogil=True, cache=True, fastmath=_REGROUPED)
def _square_sum(values: Array, mean: float) -> float:
    total = values.dtype.type(0)
    for i in range(len(values)):
        total += (values[i] - mean) * (values[i] - mean)
    return total


@njit(nogil=True, cache=True)
def _normalise(total: Array, mean: float, inverse: float, weight: Array, bias: Array, out: Array) -> None:
    """out = (total - mean) * inverse * weight + bias; an empty weight or bias is none."""
    if len(weight) == 0:
        for i in range(len(total)):
            out[i] = (total[i] - mean) * inverse
    elif len(bias) == 0:
        for i in range(len(total)):
            out[i] = (total[i] - mean) * inverse * weight[i]
    else:
        for i in range(len(total)):
            out[i] = (total[i] - mean) * inverse * weight[i] + bias[i]


@njit(nogil=True, cache=True)
def add_rows(
    x: Array, bias: Array, residual: Array, total: Array, per_sample: int, key: np.uint64, member: np.uint64,
    samples: Array, step: int, t: int, scale: float, norm: int, weight: Array, norm_bias: Array, eps: float,
    out: Array, means: Array, inverses: Array, start: int, stop: int,
) -> None:  # fmt: skip
    """total = residual + dropout(x + bias), and its norm where one is asked for, for the rows `start` to `stop`.

    Args:
        x, residual, total, out: (R, D), out empty without a norm.
        bias, weight, norm_bias: (D,) or empty for none.
        per_sample: rows of one sample; R is a multiple of it.
        key, member, step: the address.
        samples: (R / per_sample,) uint64.
        t, scale: threshold, at most 65535, and what survivors are multiplied with.
        norm: 0 none, 1 LayerNorm, 2 RMSNorm.
        eps: what is added to the variance or the mean square.
        means, inverses: (R,), what backward needs; empty without a norm.
        start, stop: range of rows, the unit that threads share out.
    """
    width = x.shape[1]
    tile = tile_rows(width)
    blocks = (tile * width + 2 * LANES - 1) // LANES
    words = np.empty(2 * blocks + WORDS_DRAWN, np.uint64)
    lane = words.view(np.uint16)
    block, sample = np.empty(BATCH, np.uint64), np.empty(BATCH, np.uint64)
    size = x.dtype.type(width)
    for first in range(start, stop, tile):
        last = min(first + tile, stop)
        at = 0
        if t > 0:
            at = _draw_lanes(
                first, last - first, width, per_sample, key, member, samples, step, block, sample, words
            )
        for row in range(first, last):
            _add(x[row], bias, residual[row], lane[at : at + width], t, scale, total[row])
            at += width
            if norm == 0:
                continue
            mean = _sum(total[row]) / size if norm == 1 else x.dtype.type(0)
            inverse = x.dtype.type(1 / np.sqrt(_square_sum(total[row], mean) / size + eps))
            means[row], inverses[row] = mean, inverse
            _normalise(total[row], mean, inverse, weight, norm_bias, out[row])


@njit(nogil=True, cache=True, fastmath=_REGROUPED)
def _projections(
    gradient: Array, total: Array, mean: float, inverse: float, weight: Array
) -> tuple[float, float]:
    """Sums of gradient * weight, alone and times the normalised values."""
    plain, along = total.dtype.type(0), total.dtype.type(0)
    if len(weight) == 0:
        for i in range(len(total)):
            plain += gradient[i]
            along += gradient[i] * ((total[i] - mean) * inverse)
    else:
        for i in range(len(total)):
            plain += gradient[i] * weight[i]
            along += gradient[i] * weight[i] * ((total[i] - mean) * inverse)
    return plain, along


@njit(nogil=True, cache=True)
def _through_norm(
    gradient: Array, total: Array, mean: float, inverse: float, weight: Array, plain: float, along: float, out: Array
) -> None:  # fmt: skip
    """out = inverse * (gradient * weight - plain - normalised * along), plain and along being means here."""
    if len(weight) == 0:
        for i in range(len(total)):
            out[i] = inverse * (gradient[i] - plain - (total[i] - mean) * inverse * along)
    else:
        for i in range(len(total)):
            out[i] = inverse * (gradient[i] * weight[i] - plain - (total[i] - mean) * inverse * along)


@njit(nogil=True, cache=True)
def _drop(gradient: Array, lane: Array, t: int, scale: float, out: Array) -> None:
    zero, factor, limit = out.dtype.type(0), out.dtype.type(scale), np.uint16(t)
    if t == 0:
        for i in range(len(out)):
            out[i] = gradient[i] * factor
    else:
        for i in range(len(out)):
            out[i] = gradient[i] * factor if lane[i] >= limit else zero


@njit(nogil=True, cache=True)
def _accumulate(
    gradient: Array, total: Array, mean: float, inverse: float, dropped: Array, weight_sum: Array, bias_sum: Array,
    sum_of_dropped: Array,
) -> None:  # fmt: skip
    """Add a row to the gradients of weight, norm bias and bias; empty sums are not asked for."""
    if len(weight_sum) > 0:
        for i in range(len(total)):
            weight_sum[i] += gradient[i] * ((total[i] - mean) * inverse)
    if len(bias_sum) > 0:
        for i in range(len(total)):
            bias_sum[i] += gradient[i]
    if len(sum_of_dropped) > 0:
        for i in range(len(total)):
            sum_of_dropped[i] += dropped[i]


@njit(nogil=True, cache=True)
def norm_backward_rows(
    gradient: Array, extra: Array, total: Array, means: Array, inverses: Array, per_sample: int, key: np.uint64,
    member: np.uint64, samples: Array, step: int, t: int, scale: float, norm: int, weight: Array, d_x: Array,
    d_residual: Array, d_weight: Array, d_norm_bias: Array, d_bias: Array, start: int, stop: int,
) -> None:  # fmt: skip
    """Gradients of `add_rows` with a norm, for the chunks `start` to `stop` of CHUNK rows each.

    Args:
        gradient: (R, D), of the norm's output.
        extra: (R, D), of the sum where that is used as well, or empty.
        total, means, inverses: what the forward pass kept.
        d_x, d_residual: (R, D), written.
        d_weight, d_norm_bias, d_bias: (chunks, D), zeros to be added to; (chunks, 0) where not asked for.
        per_sample ... weight: as in `add_rows`.
    """
    rows, width = total.shape
    tile = tile_rows(width)
    words = np.empty(2 * ((tile * width + 2 * LANES - 1) // LANES) + WORDS_DRAWN, np.uint64)
    lane = words.view(np.uint16)
    block, sample = np.empty(BATCH, np.uint64), np.empty(BATCH, np.uint64)
    size = total.dtype.type(width)
    for chunk in range(start, stop):
        end = min((chunk + 1) * CHUNK, rows)
        for first in range(chunk * CHUNK, end, tile):
            last = min(first + tile, end)
            at = 0
            if t > 0:
                at = _draw_lanes(
                    first, last - first, width, per_sample, key, member, samples, step, block, sample, words
                )
            for row in range(first, last):
                mean, inverse, target = means[row], inverses[row], d_residual[row]
                plain, along = _projections(gradient[row], total[row], mean, inverse, weight)
                plain = plain / size if norm == 1 else total.dtype.type(0)
                _through_norm(gradient[row], total[row], mean, inverse, weight, plain, along / size, target)
                if len(extra) > 0:
                    for i in range(width):
                        target[i] += extra[row, i]
                _drop(target, lane[at : at + width], t, scale, d_x[row])
                at += width
                _accumulate(
                    gradient[row], total[row], mean, inverse, d_x[row], d_weight[chunk], d_norm_bias[chunk],
                    d_bias[chunk],
                )  # fmt: skip

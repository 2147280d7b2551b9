"""Numba kernel for committees of small perceptrons: each member's thinned network on blocks of rows in the cache.

Where layers are narrow, a pass of torch's operators is all overhead and memory: ten thousand members of a net of
50 units write and read 100 MB a layer, for two multiply-adds a byte. Here a member's activations stay in the
first-level cache, (unit, row) with the rows beside one another for the vector units, and a unit that the member has
not got is not computed.

    operations   q_in q_out of the dense network's multiply-adds; about 20 G a second on a core with AVX-512
    memory       the input, once for all members; the output
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]

ROWS = 64  # rows of a block
IDENTITY, RELU, LEAKY_RELU, TANH, SIGMOID = range(5)


# One multiply-add may be one instruction; nothing else may be changed, NaN and infinities least of all.
@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def run_members(
    x: Array, widths: Array, weights: Array, biases: Array, activations: Array, slopes: Array, noise: Array,
    inputs: int, dense: Array, scale_in: float, before: Array, after: Array, out: Array, start: int, stop: int,
) -> None:  # fmt: skip
    """Write what members start .. stop - 1 make of all rows.

        a[0] = x * noise_in,   z[l] = W[l] a[l - 1] + b[l],   a[l] = f(z[l] * noise_before) * noise_after

    Args:
        x: (D, R) rows side by side, R a multiple of ROWS.
        widths: (L + 1,) of the input and of each layer.
        weights: all W[l] (out, in), one after the other.
        biases: likewise.
        activations: (L,) which f.
        slopes: (L,) of LEAKY_RELU.
        noise: (M, N) all noise of a member; 0 where a unit is dropped.
        inputs: where the input's noise begins in a row of `noise`; -1: it has none.
        dense: (units of the first layer, R) W[0] x without noise, of which a member takes off what it dropped; empty:
            each member multiplies what it kept.
        scale_in: where `dense` is given, the one number that inputs are multiplied with if they are kept.
        before, after: (L,) the same for each layer.
        out: (M, R, C), written.
        start, stop: which members.
    """
    layers, rows = len(activations), x.shape[1]
    widest = 0
    for width in widths:
        widest = max(widest, width)
    one, zero = x.dtype.type(1), x.dtype.type(0)
    values, results = np.empty((widest, ROWS), x.dtype), np.empty((widest, ROWS), x.dtype)
    units, made = np.empty(widest, np.int64), np.empty(widest, np.int64)
    dropped, kept_scale = np.empty(widths[0], np.int64), x.dtype.type(scale_in)
    for member in range(start, stop):
        for first in range(0, rows, ROWS):
            count, lost = 0, 0
            if len(dense) > 0:
                for j in range(widths[0]):
                    if noise[member, inputs + j] == 0:
                        dropped[lost] = j
                        lost += 1
            few = len(dense) > 0 and 2 * lost < widths[0]
            for j in range(0 if few else widths[0]):
                factor = noise[member, inputs + j] if inputs >= 0 else one
                if factor != 0:
                    line = values[count]
                    for r in range(ROWS):
                        line[r] = x[j, first + r] * factor
                    units[count] = j
                    count += 1
            row_start, bias_start = 0, 0
            for layer in range(layers):
                width, kind, produced = widths[layer], activations[layer], 0
                last = layer == layers - 1
                for unit in range(widths[layer + 1]):
                    factor = noise[member, after[layer] + unit] if after[layer] >= 0 else one
                    if factor == 0 and not last:
                        continue
                    scale = noise[member, before[layer] + unit] if before[layer] >= 0 else one
                    line = results[produced]
                    row = weights[row_start + unit * width : row_start + (unit + 1) * width]
                    bias = biases[bias_start + unit]
                    j = 0
                    if scale == 0 or factor == 0:
                        for r in range(ROWS):
                            line[r] = zero
                    elif few and layer == 0:
                        _take_off(dense[unit], x, row, dropped, lost, first, kept_scale, bias, line)
                        if scale != 1:
                            for r in range(ROWS):
                                line[r] *= scale
                    else:
                        if count >= 4:
                            w0, w1, w2, w3 = row[units[0]], row[units[1]], row[units[2]], row[units[3]]
                            v0, v1, v2, v3 = values[0], values[1], values[2], values[3]
                            for r in range(ROWS):
                                line[r] = bias + (w0 * v0[r] + w1 * v1[r] + w2 * v2[r] + w3 * v3[r])
                            j = 4
                        else:
                            for r in range(ROWS):
                                line[r] = bias
                        while j + 4 <= count:
                            w0, w1, w2, w3 = (
                                row[units[j]],
                                row[units[j + 1]],
                                row[units[j + 2]],
                                row[units[j + 3]],
                            )
                            v0, v1, v2, v3 = values[j], values[j + 1], values[j + 2], values[j + 3]
                            for r in range(ROWS):
                                line[r] += w0 * v0[r] + w1 * v1[r] + w2 * v2[r] + w3 * v3[r]
                            j += 4
                        while j < count:
                            w0, v0 = row[units[j]], values[j]
                            for r in range(ROWS):
                                line[r] += w0 * v0[r]
                            j += 1
                        if scale != 1:
                            for r in range(ROWS):
                                line[r] *= scale
                    if kind == RELU:
                        for r in range(ROWS):
                            # NaN stays: it is not below 0.
                            line[r] = zero if line[r] < 0 else line[r] * factor
                    elif kind != IDENTITY:
                        _activate(kind, slopes[layer], line)
                    if kind != RELU and factor != 1:
                        for r in range(ROWS):
                            line[r] = line[r] * factor if factor != 0 else zero
                    made[produced] = unit
                    produced += 1
                row_start += width * widths[layer + 1]
                bias_start += widths[layer + 1]
                values, results = results, values
                units, made = made, units
                count = produced
            for unit in range(widths[layers]):
                line = values[unit]
                for r in range(ROWS):
                    out[member, first + r, unit] = line[r]


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _take_off(
    dense: Array,
    x: Array,
    row: Array,
    dropped: Array,
    lost: int,
    first: int,
    scale: float,
    bias: float,
    line: Array,
) -> None:
    """line = bias + scale * (dense - what the dropped inputs gave), for a block of rows."""
    if lost == 0:
        for r in range(ROWS):
            line[r] = bias + scale * dense[first + r]
    elif lost == 1:
        w0, v0 = row[dropped[0]], x[dropped[0]]
        for r in range(ROWS):
            line[r] = bias + scale * (dense[first + r] - w0 * v0[first + r])
    else:
        w0, v0, w1, v1 = row[dropped[0]], x[dropped[0]], row[dropped[1]], x[dropped[1]]
        for r in range(ROWS):
            line[r] = dense[first + r] - w0 * v0[first + r] - w1 * v1[first + r]
        for j in range(2, lost):
            w0, v0 = row[dropped[j]], x[dropped[j]]
            for r in range(ROWS):
                line[r] -= w0 * v0[first + r]
        for r in range(ROWS):
            line[r] = bias + scale * line[r]


@njit(nogil=True, cache=True)
def _activate(kind: int, slope: float, line: Array) -> None:
    if kind == LEAKY_RELU:
        small = line.dtype.type(slope)
        for r in range(len(line)):
            line[r] = line[r] * small if line[r] < 0 else line[r]
    elif kind == TANH:
        for r in range(len(line)):
            line[r] = np.tanh(line[r])
    else:
        for r in range(len(line)):
            line[r] = 1 / (1 + np.exp(-line[r]))

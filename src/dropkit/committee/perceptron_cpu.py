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


# "contract": a multiply-add may be one instruction; nothing else may be changed, NaN and infinities least of all.
# Inner functions are written into their caller: a call counts references of its arrays, for which threads would fight.
_inner = njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy", inline="always")


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
    # Arrays are read by both indices, without views: a view counts its references, which threads would fight for.
    values, results = np.empty((widest, ROWS), x.dtype), np.empty((widest, ROWS), x.dtype)
    units, made = np.empty(widest, np.int64), np.empty(widest, np.int64)
    part, base = np.empty((widths[0], ROWS), x.dtype), np.empty((len(dense), ROWS), x.dtype)
    dropped, kept_scale = np.empty(widths[0], np.int64), x.dtype.type(scale_in)
    for first in range(0, rows, ROWS):
        part[:] = x[:, first : first + ROWS]
        base[:] = dense[:, first : first + ROWS]
        for member in range(start, stop):
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
                    for r in range(ROWS):
                        values[count, r] = part[j, r] * factor
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
                    at, bias = row_start + unit * width, biases[bias_start + unit]
                    if scale == 0 or factor == 0:
                        for r in range(ROWS):
                            results[produced, r] = zero
                    elif few and layer == 0:
                        _take_off(
                            results, produced, base, unit, part, dropped, lost, weights, at, bias, kept_scale
                        )
                    else:
                        _multiply(results, produced, values, units, count, weights, at, bias)
                    if scale != 1 and scale != 0:
                        for r in range(ROWS):
                            results[produced, r] *= scale
                    if kind == RELU:
                        for r in range(ROWS):
                            value = results[produced, r]
                            # NaN stays: it is not below 0.
                            results[produced, r] = zero if value < 0 else value * factor
                    else:
                        if kind != IDENTITY:
                            _activate(kind, slopes[layer], results, produced)
                        for r in range(ROWS):
                            results[produced, r] = results[produced, r] * factor if factor != 0 else zero
                    made[produced] = unit
                    produced += 1
                row_start += width * widths[layer + 1]
                bias_start += widths[layer + 1]
                values, results = results, values
                units, made = made, units
                count = produced
            for r in range(ROWS):
                for unit in range(widths[layers]):
                    out[member, first + r, unit] = values[unit, r]


@_inner
def _multiply(
    results: Array,
    produced: int,
    values: Array,
    units: Array,
    count: int,
    weights: Array,
    at: int,
    bias: float,
) -> None:
    """results[produced] = bias + the unit's weights times what the member kept, four inputs at a time."""
    j = 0
    if count >= 4:
        w0, w1 = weights[at + units[0]], weights[at + units[1]]
        w2, w3 = weights[at + units[2]], weights[at + units[3]]
        for r in range(ROWS):
            results[produced, r] = bias + (
                w0 * values[0, r] + w1 * values[1, r] + w2 * values[2, r] + w3 * values[3, r]
            )
        j = 4
    else:
        for r in range(ROWS):
            results[produced, r] = bias
    while j + 4 <= count:
        w0, w1 = weights[at + units[j]], weights[at + units[j + 1]]
        w2, w3 = weights[at + units[j + 2]], weights[at + units[j + 3]]
        for r in range(ROWS):
            results[produced, r] += (
                w0 * values[j, r] + w1 * values[j + 1, r] + w2 * values[j + 2, r] + w3 * values[j + 3, r]
            )
        j += 4
    while j < count:
        w0 = weights[at + units[j]]
        for r in range(ROWS):
            results[produced, r] += w0 * values[j, r]
        j += 1


@_inner
def _take_off(
    results: Array, produced: int, base: Array, unit: int, part: Array, dropped: Array, lost: int, weights: Array,
    at: int, bias: float, scale: float,
) -> None:  # fmt: skip
    """results[produced] = bias + scale * (all inputs' product less what the dropped ones gave)."""
    if lost == 0:
        for r in range(ROWS):
            results[produced, r] = bias + scale * base[unit, r]
    elif lost == 1:
        w0, j0 = weights[at + dropped[0]], dropped[0]
        for r in range(ROWS):
            results[produced, r] = bias + scale * (base[unit, r] - w0 * part[j0, r])
    else:
        w0, j0, w1, j1 = weights[at + dropped[0]], dropped[0], weights[at + dropped[1]], dropped[1]
        for r in range(ROWS):
            results[produced, r] = base[unit, r] - w0 * part[j0, r] - w1 * part[j1, r]
        for k in range(2, lost):
            w0, j0 = weights[at + dropped[k]], dropped[k]
            for r in range(ROWS):
                results[produced, r] -= w0 * part[j0, r]
        for r in range(ROWS):
            results[produced, r] = bias + scale * results[produced, r]


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _activate(kind: int, slope: float, results: Array, produced: int) -> None:
    """f of one line, in place."""
    small = results.dtype.type(slope)
    for r in range(ROWS):
        value = results[produced, r]
        if kind == LEAKY_RELU:
            results[produced, r] = value * small if value < 0 else value
        elif kind == TANH:
            results[produced, r] = np.tanh(value)
        else:
            results[produced, r] = 1 / (1 + np.exp(-value))

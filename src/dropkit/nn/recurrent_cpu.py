"""Numba kernels between the matrix products of a recurrence: gates, noise, and the state that the next step sees.

Floor: the products alone. At T 100, B 32, I = H = 256 an LSTM with its backward pass has 10 G of multiply-adds in 206
products; everything else here touches each of the T B 4 H gates a few times while they are in the cache.

Buffers are packed: the rows of step 0, then those of step 1. Noise has dims of size 1 where it serves all, as in
`StepNoise`; an array of no elements is no noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]


@njit(nogil=True, cache=True)
def _row_of(noise: Array, t: int, row: int) -> Array:
    """The noise of a row at a step."""
    return noise[t if noise.shape[0] > 1 else 0, row if noise.shape[1] > 1 else 0]


@njit(nogil=True, cache=True)
def see_state(h: Array, noise: Array, t: int, start: int, rows: int, seen: Array) -> None:
    """seen[g] = h * noise[g] for the rows of step t: the state as the gates read it; a dropped NaN is 0.

    Args:
        h: (B, P).
        noise: (T or 1, R or 1, G or 1, P), or of no elements.
        start: the step's first row in the packed buffers.
        seen: (G or 1, N, P), written.
    """
    zero = h.dtype.type(0)
    for row in range(rows):
        source = h[row]
        if noise.size == 0:
            seen[0, start + row, :] = source
            continue
        factors = _row_of(noise, t, row)
        for g in range(len(factors)):
            target, factor = seen[g, start + row], factors[g]
            for j in range(len(source)):
                target[j] = source[j] * factor[j] if factor[j] != zero else zero


@njit(nogil=True, cache=True)
def add_seen(dh: Array, gradient: Array, noise: Array, t: int, rows: int) -> None:
    """Backward of `see_state`: dh += sum over g of gradient[g] * noise[g]."""
    for row in range(rows):
        target = dh[row]
        if noise.size == 0:
            source = gradient[0, row]
            for j in range(len(target)):
                target[j] += source[j]
            continue
        factors = _row_of(noise, t, row)
        for g in range(len(factors)):
            source, factor = gradient[g, row], factors[g]
            for j in range(len(target)):
                target[j] += source[j] * factor[j]


@njit(nogil=True, cache=True)
def _keep_old(old: Array, new: Array, share: Array) -> None:
    """new <- share * new + (1 - share) * old."""
    one = new.dtype.type(1)
    for j in range(len(new)):
        new[j] = share[j] * new[j] + (one - share[j]) * old[j]


@njit(nogil=True, cache=True)
def _split_by_share(gradient: Array, noise: Array, t: int, row: int, new: Array, old: Array) -> None:
    """Gradients of the new and the old value of what `_keep_old` mixed; old may be gradient itself."""
    new[:] = gradient
    if noise.size == 0:
        old[:] = 0
        return
    share, one = _row_of(noise, t, row), gradient.dtype.type(1)
    for j in range(len(new)):
        old[j] = new[j] * (one - share[j])
    for j in range(len(new)):
        new[j] *= share[j]


@njit(nogil=True, cache=True)
def lstm_cell(
    gates: Array, update: Array, cell: Array, t: int, start: int, rows: int, c: Array, old: Array, new: Array
) -> None:
    """new = f c + i g * update, for the rows of step t; c <- cell new + (1 - cell) c; old = c before.

    Args:
        gates: (N, 4 H), i, f, g, o after their nonlinearities.
        update: (T or 1, R or 1, H) factor on g, or of no elements.
        cell: (T or 1, R or 1, H) share that is new, or of no elements.
        c: (B, H), overwritten.
        old, new: (N, H), written.
    """
    size = c.shape[1]
    zero = c.dtype.type(0)
    for row in range(rows):
        gate, state, before, target = gates[start + row], c[row], old[start + row], new[start + row]
        before[:] = state
        i, f, g = gate[:size], gate[size : 2 * size], gate[2 * size : 3 * size]
        if update.size == 0:
            for j in range(size):
                target[j] = f[j] * before[j] + i[j] * g[j]
        else:
            u = _row_of(update, t, row)
            for j in range(size):
                target[j] = f[j] * before[j] + (i[j] * (g[j] * u[j]) if u[j] != zero else zero)
        state[:] = target
        if cell.size > 0:
            _keep_old(before, state, _row_of(cell, t, row))


@njit(nogil=True, cache=True)
def lstm_output(
    gates: Array, tanh: Array, hidden: Array, t: int, start: int, rows: int, h: Array, out: Array
) -> None:
    """h <- o tanh(c), with zoneout, after step t; and into out.

    Args:
        gates: (N, 4 H).
        tanh: (N, H), of the new cells.
        hidden: (T or 1, R or 1, H) share that is new, or of no elements.
        h: (B, H), overwritten.
        out: (N, H), written.
    """
    size = h.shape[1]
    for row in range(rows):
        o, target, squashed, state = (
            gates[start + row, 3 * size :],
            out[start + row],
            tanh[start + row],
            h[row],
        )
        for j in range(size):
            target[j] = o[j] * squashed[j]
        if hidden.size > 0:
            _keep_old(state, target, _row_of(hidden, t, row))
        state[:] = target


@njit(nogil=True, cache=True)
def lstm_backward(
    gradient: Array, gates: Array, old: Array, tanh: Array, update: Array, cell: Array, hidden: Array, t: int,
    start: int, rows: int, dh: Array, dc: Array, d_gates: Array,
) -> None:  # fmt: skip
    """Gradients of the gates of step t before their nonlinearities, and of the state before it but for what it saw.

    Args:
        gradient: (N, H), of out.
        gates, old, tanh, update, cell, hidden: as the forward pass left them.
        dh, dc: (B, H), gradients of the state after step t; then of the state before it.
        d_gates: (N, 4 H), written.
    """
    size = dc.shape[1]
    new_h, new_c, factor = np.empty(size, dc.dtype), np.empty(size, dc.dtype), np.ones(size, dc.dtype)
    one = dc.dtype.type(1)
    for row in range(rows):
        at = start + row
        d_state, d_cell, outer = dh[row], dc[row], gradient[at]
        for j in range(size):
            d_state[j] += outer[j]
        _split_by_share(d_state, hidden, t, row, new_h, d_state)
        _split_by_share(d_cell, cell, t, row, new_c, d_cell)
        if update.size > 0:
            factor = _row_of(update, t, row)
        gate, target, squashed, before = gates[at], d_gates[at], tanh[at], old[at]
        i, f, g, o = gate[:size], gate[size : 2 * size], gate[2 * size : 3 * size], gate[3 * size :]
        di, df, dg, do = (
            target[:size],
            target[size : 2 * size],
            target[2 * size : 3 * size],
            target[3 * size :],
        )
        # One result a loop: LLVM makes vectors only where few arrays could overlap.
        for j in range(size):
            new_c[j] += new_h[j] * o[j] * (one - squashed[j] * squashed[j])
        for j in range(size):
            do[j] = new_h[j] * squashed[j] * o[j] * (one - o[j])
        for j in range(size):
            df[j] = new_c[j] * before[j] * f[j] * (one - f[j])
        for j in range(size):
            d_cell[j] += new_c[j] * f[j]
        for j in range(size):
            new_c[j] *= factor[j]
        for j in range(size):
            di[j] = new_c[j] * g[j] * i[j] * (one - i[j])
        for j in range(size):
            dg[j] = new_c[j] * i[j] * (one - g[j] * g[j])


@njit(nogil=True, cache=True)
def gru_output(
    gates: Array,
    update: Array,
    hidden: Array,
    t: int,
    start: int,
    rows: int,
    h: Array,
    old: Array,
    out: Array,
) -> None:
    """h after step t, with zoneout, into the state and into out; old = h before it.

    Args:
        gates: (N, 3 H), r, z, n after their nonlinearities.
        update, hidden: as in `lstm_cell` and `lstm_output`.
        h: (B, H), overwritten.
        old, out: (N, H), written.
    """
    size = h.shape[1]
    zero, one = h.dtype.type(0), h.dtype.type(1)
    for row in range(rows):
        at = start + row
        state, target = h[row], out[at]
        old[at, :] = state
        z, n = gates[at, size : 2 * size], gates[at, 2 * size :]
        if update.size == 0:
            for j in range(size):
                target[j] = (one - z[j]) * n[j] + z[j] * state[j]
        else:
            u = _row_of(update, t, row)
            for j in range(size):
                new = n[j] * u[j] if u[j] != zero else zero
                target[j] = (one - z[j]) * new + z[j] * state[j]
        if hidden.size > 0:
            _keep_old(state, target, _row_of(hidden, t, row))
        state[:] = target


@njit(nogil=True, cache=True)
def gru_backward(
    gradient: Array, gates: Array, old: Array, from_state: Array, update: Array, hidden: Array, t: int, start: int,
    rows: int, dh: Array, d_inputs: Array, d_states: Array,
) -> None:  # fmt: skip
    """Gradients of both parts of the gates of step t, and of the state before it but for what it saw.

    Args:
        gradient: (N, H), of out.
        gates, old, update, hidden: as the forward pass left them.
        from_state: (N, H), W_hn h + b_hn.
        dh: (B, H), gradient of the state after step t; then of the state before it.
        d_inputs, d_states: (N, 3 H), of what comes from the inputs and from the state, written.
    """
    size = dh.shape[1]
    new_h, factor = np.empty(size, dh.dtype), np.ones(size, dh.dtype)
    one = dh.dtype.type(1)
    for row in range(rows):
        at = start + row
        d_state, outer, before, gate, b = dh[row], gradient[at], old[at], gates[at], from_state[at]
        for j in range(size):
            d_state[j] += outer[j]
        _split_by_share(d_state, hidden, t, row, new_h, d_state)
        if update.size > 0:
            factor = _row_of(update, t, row)
        r, z, n = gate[:size], gate[size : 2 * size], gate[2 * size :]
        a, s = d_inputs[at], d_states[at]
        ar, az, an, sn = a[:size], a[size : 2 * size], a[2 * size :], s[2 * size :]
        for j in range(size):
            az[j] = new_h[j] * (before[j] - n[j] * factor[j]) * z[j] * (one - z[j])
        for j in range(size):
            an[j] = new_h[j] * (one - z[j]) * factor[j] * (one - n[j] * n[j])
        for j in range(size):
            d_state[j] += new_h[j] * z[j]
        for j in range(size):
            ar[j] = an[j] * b[j] * r[j] * (one - r[j])
        for j in range(size):
            sn[j] = an[j] * r[j]
        s[: 2 * size] = a[: 2 * size]

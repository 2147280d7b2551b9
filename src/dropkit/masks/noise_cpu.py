"""Numba kernels of the laws in `noise.py`: the same noise bit for bit, in one pass over memory.

The floor of a call on n elements of b bytes is one read and one write, 2 n b bytes, and n / 4 Philox blocks. Nothing
is stored for backward. Nothing here may be compiled with fastmath: its liberties would change the noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from dropkit.masks.cpu import BATCH, WORDS_DRAWN, draw_blocks
from dropkit.masks.noise import (
    ATANH,
    COSINE,
    MANTISSA_BITS,
    QUARTER_TURN,
    SINE,
    SQRT_HALF_BITS,
    TWO_LN_2,
    WORDS,
)
from dropkit.masks.philox import WORD

Array = np.ndarray[Any, Any]

PAIRS = 2 * BATCH  # pairs of words in a batch of blocks
CHUNK = 1 << 20  # elements of an exact mask that are ranked at a time: about 30 MB of words and ranks

_U = np.uint64
_WORD, _HALF = _U(WORD), _U(32)


@njit(nogil=True, cache=True)
def _uniform_batch(words: Array, noise: Array) -> None:
    """`noise.uniform` of a batch: (PAIRS,) uint64, two words each, to (2 PAIRS,) float64."""
    word = words.view(np.uint32)
    for i in range(2 * PAIRS):
        noise[i] = np.float64(2 * np.int64(word[i]) + 1 - (1 << 32)) * 2.0**-32


@njit(
    nogil=True, cache=True, error_model="numpy"
)  # no check for a division by zero, which would stop the vectors
def _radii(words: Array, radius: Array, exponent: Array) -> None:
    """sqrt of `noise.minus_two_log` of the lower words, into (PAIRS,) radius; exponent is scratch."""
    bits = radius.view(np.int64)
    for i in range(PAIRS):
        radius[i] = np.float64(np.int64(((words[i] & _WORD) << _U(1)) | _U(1)))
    for i in range(PAIRS):
        k = (bits[i] - SQRT_HALF_BITS) >> MANTISSA_BITS
        bits[i] -= k << MANTISSA_BITS
        exponent[i] = np.float64(33 - k)
    for i in range(PAIRS):
        m = radius[i]
        s = (m - 1.0) / (m + 1.0)
        z = s * s
        # Written out, here and below: LLVM makes vectors of the outer loop where there is no inner one.
        total = ((ATANH[0] * z + ATANH[1]) * z + ATANH[2]) * z + ATANH[3]
        total = ((total * z + ATANH[4]) * z + ATANH[5]) * z + ATANH[6]
        total = (total * z + ATANH[7]) * z + ATANH[8]
        radius[i] = np.sqrt(exponent[i] * TWO_LN_2 - 4.0 * (s + s * (z * total)))


@njit(nogil=True, cache=True)
def _gaussian_batch(words: Array, noise: Array, radius: Array, cosines: Array, sines: Array) -> None:
    """`noise.gaussian` of a batch: (PAIRS,) uint64 to (2 PAIRS,) float64; the rest is scratch, (PAIRS,) each."""
    _radii(words, radius, cosines)
    for i in range(PAIRS):
        word = np.int64(words[i] >> _HALF)
        quarter = (word + (1 << 29)) >> 30
        angle = np.float64(word - (quarter << 30)) * QUARTER_TURN
        z = angle * angle
        sine = ((SINE[0] * z + SINE[1]) * z + SINE[2]) * z + SINE[3]
        sine = ((sine * z + SINE[4]) * z + SINE[5]) * z + SINE[6]
        cosine = ((COSINE[0] * z + COSINE[1]) * z + COSINE[2]) * z + COSINE[3]
        cosine = (((cosine * z + COSINE[4]) * z + COSINE[5]) * z + COSINE[6]) * z + COSINE[7]
        sine = angle + angle * (z * sine)
        cosine = 1.0 + z * cosine
        odd = (quarter & 1) == 1
        cosines[i] = radius[i] * ((sine if odd else cosine) * np.float64(1 - ((quarter + 1) & 2)))
        sines[i] = radius[i] * ((cosine if odd else sine) * np.float64(1 - (quarter & 2)))
    for i in range(PAIRS):
        noise[2 * i] = cosines[i]
        noise[2 * i + 1] = sines[i]


@njit(nogil=True, cache=True)
def _close_gaps(values: Array, first: int, last: int, per_row: int, width: int) -> int:
    """Move together, in place, what blocks leave apart at the ends of rows; returns how many values are left."""
    if width % WORDS == 0:
        return (last - first) * WORDS
    length, source, j = 0, 0, first % per_row
    while first < last:
        count = min(last - first, per_row - j)
        elements = min(count * WORDS, width - j * WORDS)
        if source > length:
            for i in range(elements):
                values[length + i] = values[source + i]
        length += elements
        source += count * WORDS
        first += count
        j = 0
    return length


@njit(nogil=True, cache=True)
def noise_rows(
    x: Array, out: Array, key: np.uint64, member: np.uint64, samples: Array, step: int, spread: float,
    is_gaussian: bool, width: int, start: int, stop: int,
) -> None:  # fmt: skip
    """out = x * (1 + spread * noise) for the blocks `start` to `stop` of all rows.

    Args:
        x, out: flat, (rows * width,).
        key, member, step: the address.
        samples: (rows,) uint64.
        spread: what the noise of `noise.py` is multiplied with.
        is_gaussian: the law; uniform otherwise.
        width: elements of a row.
        start, stop: range of blocks among the rows * ceil(width / 4); the unit that threads share out.
    """
    per_row = (width + WORDS - 1) // WORDS
    block, sample, words = (
        np.empty(BATCH, np.uint64),
        np.empty(BATCH, np.uint64),
        np.empty(WORDS_DRAWN, np.uint64),
    )
    noise = np.empty(2 * PAIRS, np.float64)
    radius, cosines, sines = np.empty(PAIRS), np.empty(PAIRS), np.empty(PAIRS)
    for first in range(start, stop, BATCH):
        last = min(first + BATCH, stop)
        draw_blocks(first, per_row, samples, 0, key, member, _U(step), 0, block, sample, words)
        if is_gaussian:
            _gaussian_batch(words, noise, radius, cosines, sines)
        else:
            _uniform_batch(words, noise)
        length = _close_gaps(noise, first, last, per_row, width)
        begin = first // per_row * width + first % per_row * WORDS
        source, target, factor = x[begin : begin + length], out[begin : begin + length], noise[:length]
        for i in range(length):
            target[i] = source[i] * x.dtype.type(1.0 + spread * factor[i])


@njit(nogil=True, cache=True)
def word_rows(out: Array, key: np.uint64, member: np.uint64, samples: Array, step: int, width: int) -> None:
    """Fill (rows * width,) uint32 with `noise.words`."""
    per_row = (width + WORDS - 1) // WORDS
    blocks = per_row * len(samples)
    block, sample, words = (
        np.empty(BATCH, np.uint64),
        np.empty(BATCH, np.uint64),
        np.empty(WORDS_DRAWN, np.uint64),
    )
    word = words.view(np.uint32)
    for first in range(0, blocks, BATCH):
        last = min(first + BATCH, blocks)
        draw_blocks(first, per_row, samples, 0, key, member, _U(step), 0, block, sample, words)
        length = _close_gaps(word, first, last, per_row, width)
        begin = first // per_row * width + first % per_row * WORDS
        out[begin : begin + length] = word[:length]


def exact_keep_rows(
    key: np.uint64, member: np.uint64, samples: Array, step: int, width: int, drop: int
) -> Array:
    """`noise.exact_keep` without sorting: word and index make one number, and the drop-th smallest is the border.

    Args:
        key, member, step: the address.
        samples: (rows,) uint64.

    Returns:
        (rows, width) bool.
    """
    if drop == 0 or drop == width:
        return np.full((len(samples), width), drop == 0)
    keep = np.empty((len(samples), width), np.bool_)
    index = np.arange(width, dtype=np.uint64)
    rows = max(CHUNK // width, 1)
    for first in range(0, len(samples), rows):
        ids = samples[first : first + rows]
        word = np.empty(len(ids) * width, np.uint32)
        word_rows(word, key, member, ids, step, width)
        rank = word.astype(np.uint64).reshape(len(ids), width) << _HALF | index
        border = np.partition(rank, drop - 1, axis=1)[:, drop - 1 : drop]
        keep[first : first + rows] = rank > border
    return keep

"""Numba kernels: bits, comparison and scaling in one pass over memory; bit for bit the masks of `philox.py`.

The floor of a call on n elements of b bytes is one read and one write, 2 n b bytes, and n / 8 Philox blocks of
ten rounds. Nothing else is written, and no mask is stored.

All kernels see one layout, (A, R, B, row):
    A   groups that differ in their address (vmapped members or keys), each with a key and a member;
    R   replicas that share the bits of their group (vmapped inputs, candidate networks), each with its own rate;
    B   rows, each with its sample id (1 where the mask is shared over the batch);
    row the elements of one sample, contiguous.

What makes LLVM vectorise: each 32-bit Philox word lives in a 64-bit lane and is masked before the multiply; the
loop runs over 64 counters with the ten rounds inside; the bits go through a small buffer that a second loop
applies in contiguous slices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from dropkit.masks.philox import LANES, MULTIPLIER_0, MULTIPLIER_1, REFINE, ROUNDS, WEYL_0, WEYL_1, WORD

Array = np.ndarray[Any, Any]

BATCH = (
    128  # counters drawn at a time: their lanes, 2 KiB, and what they are applied to stay in the first cache
)
VECTOR = 8  # 64-bit numbers in the widest vector: a run of blocks is rounded up to it
WORDS_DRAWN = 2 * (BATCH + VECTOR)
SHORT_ROW = 16  # blocks of a row from which on a row is drawn as a run, without a list of counters
EVERYTHING = 1 << 16  # the threshold that drops every lane

_U = np.uint64
_WORD, _HALF = _U(WORD), _U(32)
_M0, _M1, _W0, _W1 = _U(MULTIPLIER_0), _U(MULTIPLIER_1), _U(WEYL_0), _U(WEYL_1)


def _cast(operation: str, result: Any, given: Any = None) -> Any:
    """An LLVM cast that numba has no word for, as a function for kernels."""

    def typed(_: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, operation)(arguments[0], context.get_value_type(signature.return_type))

        return result(given or value), generate

    return intrinsic(typed)


_pointer = _cast(
    "inttoptr", types.voidptr
)  # a number as what `carray` takes: passing arrays costs a call more
_as_float = _cast("bitcast", types.float32, types.uint32)
_as_bits = _cast("bitcast", types.uint32, types.float32)


@njit(nogil=True, cache=True, inline="never")
def _philox_batch(
    block: Array, sample: Array, key: np.uint64, member: np.uint64, step: np.uint64, words: Array
) -> None:
    """Fill `words` (2 BATCH,) uint64 with the blocks of BATCH counters, two 64-bit words each.

    Upper halves are left dirty until the end: the vector multiply reads the lower ones alone.
    """
    for i in range(BATCH):
        c0 = block[i]
        c1 = sample[i] & _WORD
        c2 = step
        c3 = (sample[i] >> _HALF) | (member << _U(8))
        k0, k1 = key & _WORD, key >> _HALF
        for _ in range(ROUNDS):
            product_0, product_1 = (c0 & _WORD) * _M0, (c2 & _WORD) * _M1
            c0 = (product_1 >> _HALF) ^ c1 ^ k0
            c1 = product_1
            c2 = (product_0 >> _HALF) ^ c3 ^ k1
            c3 = product_0
            k0, k1 = k0 + _W0, k1 + _W1
        words[2 * i] = (c0 & _WORD) | (c1 << _HALF)
        words[2 * i + 1] = (c2 & _WORD) | (c3 << _HALF)


@njit(nogil=True, cache=True, inline="never")
def _philox_run(
    first: int, sample: np.uint64, key: np.uint64, member: np.uint64, step: np.uint64, words: Array
) -> None:
    """`_philox_batch` for len(words) / 2 blocks of one sample, from `first` on, whose first rounds share much."""
    s1, s3 = sample & _WORD, (sample >> _HALF) | (member << _U(8))
    for i in range(len(words) // 2):
        c0, c1, c2, c3 = _U(first + i), s1, step, s3
        k0, k1 = key & _WORD, key >> _HALF
        for _ in range(ROUNDS):
            product_0, product_1 = (c0 & _WORD) * _M0, (c2 & _WORD) * _M1
            c0 = (product_1 >> _HALF) ^ c1 ^ k0
            c1 = product_1
            c2 = (product_0 >> _HALF) ^ c3 ^ k1
            c3 = product_0
            k0, k1 = k0 + _W0, k1 + _W1
        words[2 * i] = (c0 & _WORD) | (c1 << _HALF)
        words[2 * i + 1] = (c2 & _WORD) | (c3 << _HALF)


@njit(nogil=True, cache=True)
def _dropped_by_refinement(lane: Array, second: Array, fine: int) -> None:
    """Turn the lanes of a rate below 2**-16 into 0 (dropped) and 1 (kept), to be compared with t = 1."""
    for i in range(len(lane)):
        lane[i] = 0 if lane[i] == 0 and second[i] < fine else 1


@njit(nogil=True, cache=True)
def _round_to_bfloat16(bits: np.uint32) -> np.uint16:
    """The bits of a float32, rounded to those of the nearest bfloat16, a half to even; a NaN stays one."""
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)  # rounding could carry a NaN over to infinity
    return np.uint16(quiet if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)


@njit(nogil=True, cache=True)
def _scale(x: Array, out: Array, scale: float) -> None:
    """out = x * scale; bfloat16, as its bits in uint16, in float32 and rounded once."""
    if x.itemsize == 2:
        factor = np.float32(scale)
        for i in range(len(x)):
            out[i] = _round_to_bfloat16(_as_bits(_as_float(np.uint32(x[i]) << np.uint32(16)) * factor))
    else:
        same = x.dtype.type(scale)
        for i in range(len(x)):
            out[i] = x[i] * same


@njit(nogil=True, cache=True)
def _apply(x: Array, out: Array, lane: Array, t: int, scale: float) -> None:
    """out = x * scale where lane >= t, else 0: a dropped NaN or infinity is 0. bfloat16 as in `_scale`."""
    limit = lane.dtype.type(t)
    if x.itemsize == 2:
        factor = np.float32(scale)
        for i in range(len(x)):
            value = _round_to_bfloat16(_as_bits(_as_float(np.uint32(x[i]) << np.uint32(16)) * factor))
            out[i] = value if lane[i] >= limit else np.uint16(0)
    else:
        zero, same = x.dtype.type(0), x.dtype.type(scale)
        for i in range(len(x)):
            value = x[i] * same
            out[i] = value if lane[i] >= limit else zero


@njit(nogil=True, cache=True)
def _counters(first: int, per_row: int, ids: Array, offset: int, block: Array, sample: Array) -> None:
    """Block index and sample id of the BATCH blocks that begin at `first`; those past the end are not used.

    Without ids (an empty array) row b has the id offset + b.
    """
    b, j = first // per_row, first % per_row
    last = len(ids) - 1
    if per_row == 1:  # a row each
        block[:] = _U(0)
        for i in range(BATCH):
            sample[i] = _U(offset + b + i) if last < 0 else ids[min(b + i, last)]
        return
    i = 0
    while i < BATCH:
        stop = min(i + per_row - j, BATCH)
        row_id = _U(offset + b) if last < 0 else ids[min(b, last)]
        for k in range(i, stop):
            block[k] = _U(j + k - i)
            sample[k] = row_id
        b, j, i = b + 1, 0, stop


@njit(nogil=True, cache=True)
def draw_blocks(
    first: int, per_row: int, ids: Array, offset: int, key: np.uint64, member: np.uint64, step: np.uint64,
    refine: int, block: Array, sample: Array, words: Array,
) -> None:  # fmt: skip
    """Fill `words` with the BATCH blocks that begin at `first`, counted through rows of `per_row` blocks each.

    Args:
        ids, offset: as in `_counters`.
        refine: REFINE for the second block of a rate below 2**-16, else 0.
        block, sample: (BATCH,) uint64, room to work in.
        words: (WORDS_DRAWN,) uint64; what lies past the last row's end means nothing.
    """
    if per_row < SHORT_ROW:
        _counters(first, per_row, ids, offset, block, sample)
        for i in range(BATCH):
            block[i] |= _U(refine)
        _philox_batch(block, sample, key, member, step, words[: 2 * BATCH])
        return
    b, j, i = first // per_row, first % per_row, 0
    while i < BATCH:
        count = min(per_row - j, BATCH - i)
        row_id = _U(offset + b) if len(ids) == 0 else ids[min(b, len(ids) - 1)]
        whole = (count + VECTOR - 1) // VECTOR * VECTOR  # the next row writes over what is too much
        _philox_run(j | refine, row_id, key, member, step, words[2 * i : 2 * (i + whole)])
        b, j, i = b + 1, 0, i + count


@njit(nogil=True, cache=True)
def _compact(lane: Array, first: int, last: int, per_row: int, width: int) -> int:
    """Close the gaps that blocks leave at the ends of rows, in place; returns how many lanes are left.

    The elements of neighbouring blocks then lie side by side as they do in memory, whatever the width.
    """
    if width % LANES == 0:
        return (last - first) * LANES
    if per_row == 1:
        for i in range(last - first):
            for k in range(width):
                lane[i * width + k] = lane[i * LANES + k]
        return (last - first) * width
    length, source, j = 0, 0, first % per_row
    while first < last:
        count = min(last - first, per_row - j)
        elements = min(count * LANES, width - j * LANES)
        if source > length:
            for i in range(elements):
                lane[length + i] = lane[source + i]
        length += elements
        source += count * LANES
        first += count
        j = 0
    return length


@njit(nogil=True, cache=True)
def dropout_rows(
    x: Array, x_group: int, x_replica: int, out: Array, keys: Array, members: Array, samples: Array, offset: int,
    step: int, t: Array, fine: Array, scale: Array, rows: int, width: int, start: int, stop: int,
) -> None:  # fmt: skip
    """Elementwise dropout of the blocks `start` to `stop` of every group.

    Args:
        x: flat input; group a, replica r, row b begins at a x_group + r x_replica + b width.
        out: flat output, (A, R, rows, width).
        keys, members: (A,) uint64.
        samples: (A or 1, rows) uint64, or (1, 0): row b has the id offset + b.
        offset: see samples.
        step: one number for all.
        t, fine, scale: (A, R).
        rows, width: B and the elements of a row.
        start, stop: range of blocks among the rows * ceil(width / 8) of a group; the unit that threads share out.
    """
    per_row = (width + LANES - 1) // LANES
    groups, replicas = t.shape
    block, sample = np.empty(BATCH, np.uint64), np.empty(BATCH, np.uint64)
    words, second = np.empty(WORDS_DRAWN, np.uint64), np.empty(WORDS_DRAWN, np.uint64)
    lane, second_lane = words.view(np.uint16), second.view(np.uint16)
    plain = np.empty(LANES * BATCH, np.uint16)
    for a in range(groups):
        ids = samples[min(a, len(samples) - 1)]
        refined = fine[a].max() > 0
        for first in range(start, stop, BATCH):
            last = min(first + BATCH, stop)
            draw_blocks(first, per_row, ids, offset, keys[a], members[a], _U(step), 0, block, sample, words)
            length = _compact(lane, first, last, per_row, width)
            if refined:
                draw_blocks(
                    first, per_row, ids, offset, keys[a], members[a], _U(step), REFINE, block, sample, second
                )
                _compact(second_lane, first, last, per_row, width)
            begin = first // per_row * width + first % per_row * LANES
            for r in range(replicas):
                use, limit = lane, t[a, r]
                if fine[a, r] > 0:
                    plain[:] = lane[: len(plain)]
                    _dropped_by_refinement(plain, second_lane, fine[a, r])
                    use, limit = plain, 1
                at = (a * replicas + r) * rows * width + begin
                target = out[at : at + length]
                at = a * x_group + r * x_replica + begin
                source = x[at : at + length]
                if limit >= EVERYTHING:
                    target[:] = 0
                elif limit == 0:
                    _scale(source, target, scale[a, r])
                else:
                    _apply(source, target, use[:length], limit, scale[a, r])


def _door(dtype: Any) -> Any:
    """`dropout_rows` of one x, from numbers alone, in one dtype of x."""

    @njit(nogil=True, cache=True)
    def dropout_elements(
        x: int, out: int, rows: int, width: int, key: int, member: int, samples: int, offset: int, step: int, t: int,
        fine: int, scale: float, start: int, stop: int,
    ) -> None:  # fmt: skip
        source, target = carray(_pointer(x), rows * width, dtype), carray(_pointer(out), rows * width, dtype)
        ids = carray(_pointer(samples), (1, rows if samples != 0 else 0), np.uint64)
        keys, members = np.array([_U(key)]), np.array([_U(member)])
        limits, fines, scales = np.array([[t]]), np.array([[fine]]), np.array([[scale]])
        dropout_rows(
            source,
            0,
            0,
            target,
            keys,
            members,
            ids,
            offset,
            step,
            limits,
            fines,
            scales,
            rows,
            width,
            start,
            stop,
        )

    return dropout_elements


# By dtype: dropout of x at one address, given where x, the result and the ids (0 for none) lie in memory. A call
# takes 1 us, half of it the allocations; with arrays it takes 5.
DOORS = {
    torch.float32: _door(np.float32),
    torch.float64: _door(np.float64),
    torch.bfloat16: _door(np.uint16),
    torch.uint8: _door(np.uint8),  # what is kept of ones: a mask
}


@njit(nogil=True, cache=True)
def dropout_shared(
    x: Array, x_group: int, x_replica: int, out: Array, keep: Array, scale: Array, replicas: int, rows: int,
    mask_width: int, sizes: tuple[int, ...], strides: tuple[int, ...], start: int, stop: int,
) -> None:  # fmt: skip
    """Dropout whose mask is constant along some dimensions, by index arithmetic.

    Args:
        x, out: as in `dropout_rows`; a row has the collapsed sizes (n0, n1, n2, n3).
        keep: flat (A, R, rows, mask_width) uint8.
        scale: flat (A R,).
        replicas, rows, mask_width: R, B and the elements of one sample's mask.
        sizes, strides: four collapsed dims of a row and their strides in the mask, 0 where it is shared; tuples.
        start, stop: range among the A R rows n0 outermost slices; the unit that threads share out.
    """
    n0, n1, n2, n3 = sizes[0], sizes[1], sizes[2], sizes[3]
    slice_size = n1 * n2 * n3
    for index in range(start, stop):
        i0 = index % n0
        b = (index // n0) % rows
        ar = index // (n0 * rows)
        a, r = ar // replicas, ar % replicas
        mask = keep[(ar * rows + b) * mask_width : (ar * rows + b + 1) * mask_width]
        x_row = a * x_group + r * x_replica + (b * n0 + i0) * slice_size
        out_row = index * slice_size
        for i1 in range(n1):
            for i2 in range(n2):
                m = i0 * strides[0] + i1 * strides[1] + i2 * strides[2]
                at = (i1 * n2 + i2) * n3
                source, target = x[x_row + at : x_row + at + n3], out[out_row + at : out_row + at + n3]
                if strides[3] != 0:
                    _apply(source, target, mask[m : m + n3], 1, scale[ar])  # keep is 0 or 1
                elif mask[m]:  # one decision for the whole line
                    _scale(source, target, scale[ar])
                else:
                    target[:] = 0


def _shared_door(dtype: Any) -> Any:
    """`dropout_shared` of one x, from numbers alone, in one dtype of x."""

    @njit(nogil=True, cache=True)
    def dropout_lines(
        x: int, out: int, keep: int, rows: int, mask_width: int, scale: float, sizes: tuple[int, ...],
        strides: tuple[int, ...], start: int, stop: int,
    ) -> None:  # fmt: skip
        elements = rows * sizes[0] * sizes[1] * sizes[2] * sizes[3]
        source, target = carray(_pointer(x), elements, dtype), carray(_pointer(out), elements, dtype)
        mask = carray(_pointer(keep), rows * mask_width, np.uint8)
        scales = np.array([scale])
        dropout_shared(source, 0, 0, target, mask, scales, 1, rows, mask_width, sizes, strides, start, stop)

    return dropout_lines


SHARED_DOORS = {
    torch.float32: _shared_door(np.float32),
    torch.float64: _shared_door(np.float64),
    torch.bfloat16: _shared_door(np.uint16),
}

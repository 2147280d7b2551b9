"""Triton kernels: bits, comparison and scaling in one pass over memory; bit for bit the masks of `philox.py`.

The floor of a call on n elements of b bytes is one read and one write, 2 n b bytes, and n / 8 Philox blocks of ten
rounds. Nothing else is written: no mask, no noise. Backward is the same kernel on the gradient.

How the bits lie over the threads. A program has a tile of counters. Each thread makes whole Philox blocks, four 32-bit
words in registers, and reads them as eight 16-bit lanes, which decide about eight neighbouring elements of one sample:

    counters (BLOCKS,)  ->  four words (BLOCKS,) each  ->  lanes (BLOCKS, USED)    tl.join stays within a thread

USED is 8, or less for masks of fewer than eight elements a sample, whose blocks have lanes to spare. In `elementwise`
each block is drawn once. In `strided`, where one mask element decides about Q elements, the tile is (BLOCKS, USED, Q'):
lanes are broadcast along Q', and a block is drawn again only by the next Q' of its Q. A tile has 2048 elements or so,
hence at most as many Philox blocks for an element as without sharing.

Both kernels see groups that differ in their address and replicas that share the bits of their group, as in `cpu.py`.
Numbers of one network come as scalars; of several, and for float64, from a table in the memory of the GPU. Scalars
that change from call to call are not specialised, so that a new step compiles nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dropkit.masks import philox

ROUNDS = tl.constexpr(philox.ROUNDS)
MULTIPLIER_0, MULTIPLIER_1 = tl.constexpr(philox.MULTIPLIER_0), tl.constexpr(philox.MULTIPLIER_1)
WEYL_0, WEYL_1 = tl.constexpr(philox.WEYL_0), tl.constexpr(philox.WEYL_1)
LANES, LANE_BITS = tl.constexpr(philox.LANES), tl.constexpr(philox.LANE_BITS)
REFINE = tl.constexpr(philox.REFINE)
LANE = tl.constexpr(philox.LANE_VALUES - 1)
WORD_BITS = tl.constexpr(32)
FIELDS = tl.constexpr(4)  # of a network in the table: key, member, t, fine

# A new value of these is a new call, not a new kernel.
CHANGING = ["key_low", "key_high", "member", "step", "row_offset", "t", "fine", "scale", "rows", "tiles"]


@triton.jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """Philox4x32 of uint32 counters (BLOCKS,) and a key of two uint32 scalars: four words (BLOCKS,)."""
    for _ in tl.static_range(ROUNDS):
        high_0, high_1 = tl.umulhi(c0, MULTIPLIER_0), tl.umulhi(c2, MULTIPLIER_1)
        low_0, low_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c2 = high_1 ^ c1 ^ k0, high_0 ^ c3 ^ k1
        c1, c3 = low_1, low_0
        k0, k1 = k0 + WEYL_0, k1 + WEYL_1
    return c0, c1, c2, c3


@triton.jit
def halves(words):
    """(..., ) words to (..., 2) lanes, low half first."""
    return tl.join(words & LANE, words >> LANE_BITS)


@triton.jit
def block_lanes(block, low, step, high, k0, k1, USED: tl.constexpr):
    """The first USED lanes of each block, (BLOCKS, USED) int32.

    joined[b, i, j] is word 2 i + j of block b: the pairs are joined first with the word they are two apart from.
    """
    w0, w1, w2, w3 = philox_words(block, low, step, high, k0, k1)
    if USED == 1:
        lanes = tl.expand_dims(w0 & LANE, 1)
    elif USED == 2:
        lanes = halves(w0)
    elif USED == 4:
        lanes = halves(tl.join(w0, w1))
    else:
        lanes = halves(tl.join(tl.join(w0, w2), tl.join(w1, w3)))
    return tl.reshape(lanes, (block.shape[0], USED)).to(tl.int32)


@triton.jit
def draw(
    block, row, group, rows, key_low, key_high, member, table, replicas, samples, samples_stride, row_offset, step,
    USED: tl.constexpr, REFINED: tl.constexpr,
):  # fmt: skip
    """Lanes of the blocks `block` of the samples in rows `row` of a group, and those that refine tiny rates.

    Returns:
        Two (BLOCKS, USED) int32; without REFINED the second is the first again.
    """
    if table is not None:
        address = table + group * replicas * FIELDS
        key = tl.load(address)
        key_low, key_high = key, key >> WORD_BITS
        member = tl.load(address + 1)
    k0, k1 = key_low.to(tl.uint32), key_high.to(tl.uint32)
    if samples is not None:
        ids = tl.load(samples + group * samples_stride + row, mask=row < rows, other=0)
    else:
        ids = row.to(tl.int64) + row_offset
    low = ids.to(tl.uint32)
    high = (ids >> WORD_BITS).to(tl.uint32) | (member.to(tl.uint32) << 8)
    c0, c2 = block.to(tl.uint32), low * 0 + step.to(tl.uint32)
    lane = block_lanes(c0, low, c2, high, k0, k1, USED)
    second = lane
    if REFINED:
        second = block_lanes(c0 | REFINE, low, c2, high, k0, k1, USED)
    return lane, second


@triton.jit
def threshold(table, network):
    """t and fine of a network in the table."""
    address = table + network * FIELDS
    return tl.load(address + 2).to(tl.int32), tl.load(address + 3).to(tl.int32)


@triton.jit
def kept(lane, second, t, fine, REFINED: tl.constexpr):
    """Which elements stay, as `philox.bernoulli_keep` has it."""
    keep = lane >= t
    if REFINED:
        keep = keep & ((lane != 0) | (second >= fine))
    return keep


@triton.jit
def scaled(values, keep, scale):
    """values * scale where kept, else 0, also for a NaN; 16-bit values are multiplied in float32 and rounded once."""
    if values.dtype == tl.float64 or values.dtype == tl.float32:
        result = values * scale
    else:
        result = (values.to(tl.float32) * scale).to(values.dtype)
    return tl.where(keep, result, 0.0)


@triton.jit(do_not_specialize=CHANGING)
def elementwise(
    x, out, x_group, x_replica, x_row, out_network, out_row, rows, width, per_row, tiles,
    key_low, key_high, member, step, row_offset, t, fine, scale,
    table, scales, replicas, samples, samples_stride,
    BLOCKS: tl.constexpr, USED: tl.constexpr, FULL: tl.constexpr, FLAT: tl.constexpr, REFINED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One mask element for each element: a tile is BLOCKS blocks of the rows of a group.

    Args:
        x, out: group a, replica r, row b, element e at a x_group + r x_replica + b x_row + e, and at
            (a replicas + r) out_network + b out_row + e.
        rows, width, per_row, tiles: B, elements and blocks of a row, tiles of a group.
        key_low, key_high, member, step, row_offset, t, fine, scale: of the one network, where table is None.
        table: (A R, FIELDS) int64.
        scales: (A R,), in the dtype in which is multiplied.
        replicas: R.
        samples: (1 or A, B) int64 row ids, or None for row_offset and on.
        samples_stride: from one group's to the next.
        FULL: the blocks' USED lanes are all in use, as width allows.
        FLAT: besides, rows follow one another without a gap.
        WIDE: offsets need 64 bits.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0).to(INDEX)
    group, tile = program // tiles, program % tiles
    index = tile * BLOCKS + tl.arange(0, BLOCKS).to(INDEX)
    lane_index = tl.arange(0, USED).to(INDEX)
    row, block = index // per_row, index % per_row
    inside = tl.expand_dims(row < rows, 1)
    if FLAT:
        at = tl.expand_dims(index * USED, 1) + tl.expand_dims(lane_index, 0)
        out_at = at
    else:
        element = tl.expand_dims(block * LANES, 1) + tl.expand_dims(lane_index, 0)
        at = tl.expand_dims(row * x_row, 1) + element
        out_at = tl.expand_dims(row * out_row, 1) + element
        if not FULL:
            inside = inside & (element < width)
    if table is None:  # the read is on its way while the bits are made
        values = tl.load(x + at, mask=inside)
        lane, second = draw(
            block, row, group, rows, key_low, key_high, member, table, replicas, samples, samples_stride,
            row_offset, step, USED, REFINED,
        )  # fmt: skip
        keep = kept(lane, second, t, fine, REFINED)
        tl.store(out + out_at, scaled(values, keep, scale), mask=inside)
    else:
        lane, second = draw(
            block, row, group, rows, key_low, key_high, member, table, replicas, samples, samples_stride,
            row_offset, step, USED, REFINED,
        )  # fmt: skip
        for r in range(replicas):
            network = group * replicas + r
            own_t, own_fine = threshold(table, network)
            keep = kept(lane, second, own_t, own_fine, REFINED)
            values = tl.load(x + group * x_group + r * x_replica + at, mask=inside)
            result = scaled(values, keep, tl.load(scales + network))
            tl.store(out + network * out_network + out_at, result, mask=inside)


@triton.jit(do_not_specialize=CHANGING)
def strided(
    x, out, x_group, x_replica, x_row, out_network, out_row, rows, width, per_row, tiles,
    own_size, x_own_outer, x_own, out_own_outer, out_own,
    shared_total, shared_size, x_shared_outer, x_shared, out_shared_outer, out_shared, shared_tiles,
    key_low, key_high, member, step, row_offset, t, fine, scale,
    table, scales, replicas, samples, samples_stride,
    BLOCKS: tl.constexpr, USED: tl.constexpr, FULL: tl.constexpr, SHARED: tl.constexpr, OWN_OUTER: tl.constexpr,
    SHARED_OUTER: tl.constexpr, SHARED_INNER: tl.constexpr, REFINED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One mask element for several elements, or memory in another order: a tile is BLOCKS blocks by SHARED elements.

    Mask element m of a row decides about the elements q = 0 .. shared_total - 1, which lie at
    (m // own_size) own_outer + (m % own_size) own + (q // shared_size) shared_outer + (q % shared_size) shared.

    Args:
        x, out, x_group ... row_offset, t ... samples_stride: as in `elementwise`; width counts mask elements.
        own_size ... out_own: of the dims with masks of their own, merged into two.
        shared_total ... out_shared: of the dims that share, merged into two.
        shared_tiles: into how many tiles shared_total falls.
        SHARED: elements q of a tile.
        OWN_OUTER, SHARED_OUTER: whether there are two such dims.
        SHARED_INNER: neighbours in memory share a decision, so what is dropped is not read.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0).to(INDEX)
    shared_tile, program = program % shared_tiles, program // shared_tiles
    group, tile = program // tiles, program % tiles
    index = tile * BLOCKS + tl.arange(0, BLOCKS).to(INDEX)
    row, block = index // per_row, index % per_row
    inside = tl.expand_dims(row < rows, 1)
    m = tl.expand_dims(block * LANES, 1) + tl.expand_dims(tl.arange(0, USED).to(INDEX), 0)
    if not FULL:
        inside = inside & (m < width)
    if OWN_OUTER:
        at = m // own_size * x_own_outer + m % own_size * x_own
        out_at = m // own_size * out_own_outer + m % own_size * out_own
    else:
        at, out_at = m * x_own, m * out_own
    at += tl.expand_dims(row * x_row, 1)
    out_at += tl.expand_dims(row * out_row, 1)
    q = shared_tile * SHARED + tl.arange(0, SHARED).to(INDEX)
    if SHARED_OUTER:
        q_at = q // shared_size * x_shared_outer + q % shared_size * x_shared
        out_q_at = q // shared_size * out_shared_outer + q % shared_size * out_shared
    else:
        q_at, out_q_at = q * x_shared, q * out_shared
    at = tl.expand_dims(at, 2) + tl.expand_dims(tl.expand_dims(q_at, 0), 0)
    out_at = tl.expand_dims(out_at, 2) + tl.expand_dims(tl.expand_dims(out_q_at, 0), 0)
    inside = tl.expand_dims(inside, 2) & tl.expand_dims(tl.expand_dims(q < shared_total, 0), 0)
    lane, second = draw(
        block, row, group, rows, key_low, key_high, member, table, replicas, samples, samples_stride,
        row_offset, step, USED, REFINED,
    )  # fmt: skip
    for r in range(replicas):
        network = group * replicas + r
        if table is None:
            keep, factor = kept(lane, second, t, fine, REFINED), scale
        else:
            own_t, own_fine = threshold(table, network)
            keep, factor = kept(lane, second, own_t, own_fine, REFINED), tl.load(scales + network)
        keep = tl.expand_dims(keep, 2)
        wanted = inside
        if SHARED_INNER:
            wanted = inside & keep
        values = tl.load(x + group * x_group + r * x_replica + at, mask=wanted)
        tl.store(out + network * out_network + out_at, scaled(values, keep, factor), mask=inside)

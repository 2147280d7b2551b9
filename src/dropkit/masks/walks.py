"""Edges that random walks pass: the operator `dropkit::keep_off_walks`.

Item i of a graph (its i-th edge) starts walks with chance p, by the numbering of rows in `scattered.py`. Walk r leaves
from the edge's source, and at its step s takes one of the n edges that leave the node it is at, in the order in which
they were given, all equally likely: number  word n // 2**32, of the 32-bit word e % 4 in block e // 4, where
e = (i walks + r) length + s. A walk that is at a node without such an edge ends.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dropkit.errors import ShapeError
from dropkit.masks.philox import MULTIPLIER_0, MULTIPLIER_1, REFINE, ROUNDS, WEYL_0, WEYL_1, WORD
from dropkit.masks.scattered_ops import Where, _keep_rows, one_by_one, places_in_graphs

Array = np.ndarray[Any, Any]

_U = np.uint64
_WORD, _HALF = _U(WORD), _U(32)

_library = torch.library.Library("dropkit", "FRAGMENT")
_library.define(
    "keep_off_walks(Tensor starts, Tensor steps, Tensor edge_index, Tensor? graphs, Tensor p, int nodes, int walks, "
    "int length, bool undirected) -> Tensor"
)


@njit(nogil=True, cache=True)
def _word(element: int, sample: np.uint64, key: np.uint64, member: np.uint64, step: np.uint64) -> np.uint64:
    """One 32-bit word, as `noise.words` has it."""
    c0, c1, c2 = _U(element >> 2), sample & _WORD, step
    c3 = (sample >> _HALF) | (member << _U(8))
    k0, k1 = key & _WORD, key >> _HALF
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * _U(MULTIPLIER_0), c2 * _U(MULTIPLIER_1)
        c0, c1, c2, c3 = (
            (product_1 >> _HALF) ^ c1 ^ k0,
            product_1 & _WORD,
            (product_0 >> _HALF) ^ c3 ^ k1,
            product_0 & _WORD,
        )
        k0, k1 = (k0 + _U(WEYL_0)) & _WORD, (k1 + _U(WEYL_1)) & _WORD
    which = element & 3
    return c0 if which == 0 else c1 if which == 1 else c2 if which == 2 else c3


@njit(nogil=True, cache=True)
def _walk(
    source: Array, target: Array, first: Array, leaving: Array, starts: Array, places: Array, ids: Array,
    key: np.uint64, member: np.uint64, step: np.uint64, walks: int, length: int, keep: Array,
) -> None:  # fmt: skip
    """Clear keep[e] of every edge e that a walk passes.

    Args:
        source, target: (E,) nodes of the edges.
        first, leaving: the edges that leave node v are leaving[first[v]:first[v + 1]].
        starts: edges from whose source walks go out.
        places, ids: (E,) number of an edge in its graph, and sample id.
        key, member, step: of the address.
        walks, length: from each start, and steps of each.
        keep: (E,) bool, written.
    """
    for edge in starts:
        for walk in range(walks):
            node = source[edge]
            for s in range(length):
                n = first[node + 1] - first[node]
                if n == 0:
                    break
                word = _word((places[edge] * walks + walk) * length + s, ids[edge], key, member, step)
                passed = leaving[first[node] + np.int64((word * _U(n)) >> _HALF)]
                keep[passed] = False
                node = target[passed]


def _keep_off_walks(
    starts: Tensor, steps: Tensor, edge_index: Tensor, graphs: Tensor | None, p: Tensor, nodes: int, walks: int,
    length: int, undirected: bool,
) -> Tensor:  # fmt: skip
    """Which edges no walk passes, (E,) bool.

    Args:
        starts, steps: addresses, of which edges start walks and of where these go; see `scattered_ops.py`.
        edge_index: (2, E) int64.
        graphs: (E,) int64, the graph of each edge, or None: one graph.
        p: () float64, chance of an edge to start walks.
        nodes: N, at least one more than the last node of edge_index.
        walks, length: from each start, and steps of each.
        undirected: whether an edge falls where its other direction does.

    Raises:
        ShapeError: so many steps that there are no bits for them.
    """
    source, target = edge_index.contiguous().numpy()
    edges = len(source)
    keep = np.ones(edges, np.bool_)
    if edges * walks * length >= 4 * REFINE:
        raise ShapeError(
            f"{edges} edges, {walks} walks and {length} steps were given; at most 2**33 steps have bits of their own."
        )
    begins = np.flatnonzero(~_keep_rows(starts, graphs, p, edges, 1, False).numpy()[:, 0])
    where = Where(steps, p)
    places = np.arange(edges) if graphs is None else places_in_graphs(graphs.numpy())
    ids = np.broadcast_to(where.ids(None), edges) if graphs is None else where.ids(graphs.numpy())
    leaving = np.argsort(source, kind="stable")
    first = np.concatenate(([0], np.cumsum(np.bincount(source, minlength=nodes))))
    _walk(
        source, target, first, leaving, begins, places, ids, _U(where.key % 2**64), where.member,
        _U(where.step), walks, length, keep,
    )  # fmt: skip
    if undirected:
        low, high = np.minimum(source, target), np.maximum(source, target)
        pairs = high * (high + 1) // 2 + low
        keep &= ~np.isin(pairs, pairs[~keep])
    return torch.from_numpy(keep)


def _fake(starts: Tensor, steps: Tensor, edge_index: Tensor, *_: Any) -> Tensor:
    return torch.empty(edge_index.shape[1], dtype=torch.bool)


_library.impl("keep_off_walks", _keep_off_walks, "CPU")
torch.library.register_fake("dropkit::keep_off_walks", _fake, lib=_library)
torch.library.register_vmap(
    "dropkit::keep_off_walks", one_by_one(torch.ops.dropkit.keep_off_walks), lib=_library
)

keep_off_walks = torch.ops.dropkit.keep_off_walks.default

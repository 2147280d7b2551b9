"""The torch operators over `scattered.py`: `dropkit::keep_rows` and `dropkit::keep_pairs`, which items of graphs stay.

Deterministic, because their address is an input, and without a derivative: they give bool masks. They work on the
CPU; under torch.func.vmap the networks are served one after another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropkit.errors import AddressError, ShapeError
from dropkit.masks import address, scattered
from dropkit.masks.address import SAMPLES, SEEDS
from dropkit.masks.compiled import HEAD
from dropkit.masks.cpu import BATCH
from dropkit.masks.philox import LANES, threshold
from dropkit.masks.scattered import find_runs
from dropkit.masks.threads import in_parallel

Array = np.ndarray[Any, Any]

_library = torch.library.Library("dropkit", "FRAGMENT")
_library.define(
    "keep_rows(Tensor address, Tensor? batch, Tensor p, SymInt rows, SymInt width, bool together) -> Tensor"
)
_library.define("keep_pairs(Tensor address, Tensor pairs, Tensor? batch, Tensor? graphs, Tensor p) -> Tensor")


def draw_address(owner: object | None, site: str | None, purpose: int = address.NOISE) -> Tensor:
    """The address of the next draw in one tensor, (5,) or (5 + graphs,) int64, as `compiled.py` has it."""
    if torch.compiler.is_compiling():
        where: Tensor = torch.ops.dropkit.draw(site, owner is not None, purpose)
        return where
    drawn = address.draw(owner, site, purpose)
    numbers = (drawn.key, drawn.member, drawn.step, drawn.row_offset, int(drawn.batch_shared))
    head = torch.stack([torch.as_tensor(number, dtype=torch.int64) for number in numbers])
    return head if drawn.samples is None else torch.cat((head, drawn.samples))


class Where:
    """An address in one tensor, as `compiled.py` draws it, and a rate, as the kernels take them."""

    def __init__(self, where: Tensor, p: Tensor) -> None:
        key, member, self.step, self.row_offset, self.batch_shared = where[:HEAD].tolist()
        self.key, self.member = key, np.uint64(member)
        self.samples = where[HEAD:].numpy() if len(where) > HEAD else None
        self.t, self.fine = (int(x) for x in threshold(p.double()))

    def ids(self, graphs: Array | None) -> Array:
        """Sample ids, (n,) uint64, of n graphs, or of the only one; zeros for a member, whose masks do not ask.

        Raises:
            ShapeError: samples that are not one for each graph.
            AddressError: an id beyond 2**40.
        """
        count = 1 if graphs is None else int(graphs.max(initial=-1)) + 1
        if self.batch_shared:
            return np.zeros(1 if graphs is None else len(graphs), np.uint64)
        if self.samples is not None:
            if count > len(self.samples) or (graphs is None and len(self.samples) != 1):
                raise ShapeError(
                    f"{len(self.samples)} sample ids were given for {count} graph{'s' * (count != 1)}; one id for each "
                    "is needed. Which graph each node or edge belongs to is said by batch=."
                )
            chosen = self.samples if graphs is None else self.samples[graphs]
            return np.ascontiguousarray(chosen).view(np.uint64)
        if self.row_offset + count > SAMPLES:
            raise AddressError(
                f"{count} graphs from row_offset={self.row_offset} on were given; a row id lies in [0, 2**40)."
            )
        return (
            np.array([self.row_offset], np.uint64)
            if graphs is None
            else (graphs + self.row_offset).view(np.uint64)
        )

    @property
    def address(self) -> tuple[Any, ...]:
        """Key, member, step, t and fine, as the kernels take them."""
        return np.uint64(self.key % SEEDS), self.member, self.step, self.t, self.fine


def order_of_graphs(batch: Array) -> tuple[Array | None, Array]:
    """How to sort items by their graph, and where each graph then begins.

    Args:
        batch: (n,) graph ids.

    Returns:
        (n,) order, None where they are sorted, and (runs,) first items.
    """
    begins = np.empty(len(batch), np.int64)
    runs = find_runs(batch, begins)
    if runs >= 0:
        return None, begins[:runs]
    order = np.argsort(batch, kind="stable")
    return order, begins[: find_runs(batch[order], begins)]


def places_in_graphs(batch: Array) -> Array:
    """How many items of the same graph stand before each; (n,) of (n,) graph ids in any order."""
    order, begins = order_of_graphs(batch)
    in_order = np.arange(len(batch)) - np.repeat(begins, np.diff(begins, append=len(batch)))
    if order is None:
        return in_order
    places = np.empty(len(batch), np.int64)
    places[order] = in_order
    return places


def _keep_rows(
    address: Tensor, batch: Tensor | None, p: Tensor, rows: int, width: int, together: bool
) -> Tensor:
    """Whether each of `width` elements of each item stays, (rows, width) bool.

    Args:
        address: (5,) or (5 + graphs,) int64, see `compiled.py`; its rows are graphs.
        batch: (rows,) int64, the graph of each item, or None: one graph.
        p: () float64.
        rows, width: items, and mask elements of one.
        together: all items of a graph have the elements of its first one.
    """
    where, order, begins = Where(address, p), None, np.zeros(1, np.int64)
    if batch is None:
        ids = where.ids(None)
    else:
        graphs = batch.numpy()
        order, begins = order_of_graphs(graphs)
        ids = where.ids(graphs[begins] if order is None else graphs[order[begins]])
    items = np.diff(begins, append=rows)
    ends = np.arange(1, len(begins) + 1) if together else np.append(begins[1:], rows)
    ends = ends * width
    out = np.empty(ends[-1] if len(ends) else 0, np.bool_)

    def run(start: int, stop: int) -> None:
        arguments = (ids, ends, *where.address, out, start, stop)
        scattered.keep_runs(*arguments)

    in_parallel(run, len(out), len(out), grain=BATCH * LANES)
    keep = out.reshape(-1, width) if width else np.empty((rows, 0), np.bool_)
    if together and width:
        keep = np.repeat(keep, items, axis=0)
    if order is None:
        return torch.from_numpy(keep)
    in_place = np.empty_like(keep)
    in_place[order] = keep
    return torch.from_numpy(in_place)


def _keep_pairs(
    address: Tensor, pairs: Tensor, batch: Tensor | None, graphs: Tensor | None, p: Tensor
) -> Tensor:
    """Whether each pair of nodes stays, (E,) bool.

    Args:
        address, p: as in `_keep_rows`.
        pairs: (2, E) int64, nodes of the whole batch.
        batch, graphs: (N,) and (E,) int64, the graph of each node and edge, or both None: one graph.
    """
    where, out = Where(address, p), np.empty(pairs.shape[1], np.bool_)
    u, v = pairs.contiguous().numpy()
    ids = where.ids(None if graphs is None else graphs.numpy())
    places = np.empty(0, np.int64) if batch is None else places_in_graphs(batch.numpy())

    def run(start: int, stop: int) -> None:
        arguments = (ids, u, v, places, *where.address, out, start, stop)
        scattered.keep_pairs(*arguments)

    if len(out):
        in_parallel(run, len(out), 4 * len(out), grain=BATCH)
    return torch.from_numpy(out)


def _fake_rows(
    address: Tensor, batch: Tensor | None, p: Tensor, rows: int, width: int, together: bool
) -> Tensor:
    return torch.empty((rows, width), dtype=torch.bool)


def _fake_pairs(address: Tensor, pairs: Tensor, *_: Any) -> Tensor:
    return torch.empty(pairs.shape[1], dtype=torch.bool)


def one_by_one(operator: Any) -> Any:
    """The rule of an operator under torch.func.vmap: networks one after another."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        networks = [
            [
                arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg
                for arg, dim in zip(args, in_dims, strict=True)
            ]
            for i in range(info.batch_size)
        ]
        return torch.stack([operator(*network) for network in networks]), 0

    return rule


for _name, _kernel, _fake in (
    ("keep_rows", _keep_rows, _fake_rows),
    ("keep_pairs", _keep_pairs, _fake_pairs),
):
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"dropkit::{_name}", _fake, lib=_library)
    torch.library.register_vmap(
        f"dropkit::{_name}", one_by_one(getattr(torch.ops.dropkit, _name)), lib=_library
    )

keep_rows, keep_pairs = torch.ops.dropkit.keep_rows.default, torch.ops.dropkit.keep_pairs.default

"""Thinning through operators that only move units: reshaped, transposed, sliced, joined."""

# What each method does stands once, in `Rule`.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from dropkit.committee.thinning.reading import Reading, aten, expression, hint
from dropkit.committee.thinning.rules import Factors, Live, Needs, Rule, Sets, Writer, full, with_values
from dropkit.committee.thinning.units import Units, concatenated, every, factor, kron, part, place


def source(node: fx.Node) -> fx.Node:
    """What a shape is given to."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return x


class Moved(Rule):
    """Dims in another order, with dims of size 1 added or taken away.

    Args:
        order: reading, node -> for each dim of the result the dim of the input it is, or None for a new one.
    """

    named = True

    def __init__(self, order: Callable[[Reading, fx.Node], Sequence[int | None]]) -> None:
        self.order = order

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        inside = live(source(node))
        return tuple(every(1) if d is None else inside[d] for d in self.order(reading, node))

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        yield source(node), self._inside(reading, node, need)

    def _inside(self, reading: Reading, node: fx.Node, sets: Sets) -> Sets:
        inside = list(full(reading, source(node)))
        for units, d in zip(sets, self.order(reading, node), strict=True):
            if d is not None:
                inside[d] = units
        return tuple(inside)

    def write(self, w: Writer, node: fx.Node) -> None:
        order = self.order(w.reading, node)
        held = tuple(every(1) if d is None else u for u, d in zip(w.held(node), order, strict=True))
        want = self._inside(w.reading, node, held)
        value, raw = w.take_unscaled(source(node), want)
        factors: Factors = ()
        if all(d in order for d, _ in raw):
            factors = tuple((order.index(d), f) for d, f in raw)
        else:
            value = w.take(source(node), want)
        w.put(node, *with_values(node, {source(node): value}), held, factors)


def permuted(reading: Reading, node: fx.Node) -> list[int | None]:
    """permute and its kin."""
    n = len(reading.sizes(source(node)))
    if node.target in (aten.t.default, aten.mT.default, aten.numpy_T.default):
        order = list(range(n))
        order[-2:] = order[-2:][::-1]
        return list(order)
    if node.target is aten.permute.default:
        return [d % n for d in node.args[1]]  # type: ignore[union-attr,operator,misc]
    order = list(range(n))
    a, b = (int(d) % n for d in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return list(order)


def unsqueezed(reading: Reading, node: fx.Node) -> list[int | None]:
    """A new dim."""
    n = len(reading.sizes(node))
    order: list[int | None] = list(range(n - 1))
    order.insert(int(node.args[1]) % n, None)  # type: ignore[arg-type]
    return order


def squeezed(reading: Reading, node: fx.Node) -> list[int | None]:
    """Dims of size 1 less."""
    sizes, symbols = reading.sizes(source(node)), reading.open_dims(source(node))
    n = len(sizes)
    dims = node.args[1] if len(node.args) > 1 else list(range(n))
    gone = {d % n for d in (dims if isinstance(dims, list | tuple) else [dims])}  # type: ignore[operator]
    return [d for d in range(n) if not (d in gone and sizes[d] == 1 and not symbols[d])]


class Reshaped(Rule):
    """view, reshape, flatten, unflatten: dims that become one, and one that becomes several."""

    named = True

    def groups(self, reading: Reading, node: fx.Node) -> list[tuple[list[int], list[int]]]:
        """Dims of the input and of the result that hold the same elements; as few together as can be."""
        before, after = reading.shape(source(node)), reading.shape(node)
        found: list[tuple[list[int], list[int]]] = []
        i = j = 0
        while i < len(before) or j < len(after):
            a, b = [i] if i < len(before) else [], [j] if j < len(after) else []
            i, j = i + len(a), j + len(b)
            while _product(before, a) != _product(after, b):
                more_a = hint(_product_hint(before, a)) < hint(_product_hint(after, b))
                if (more_a or j == len(after)) and i < len(before):
                    a.append(i)
                    i += 1
                elif j < len(after):
                    b.append(j)
                    j += 1
                else:  # symbols that cannot be told apart: all dims together
                    return [(list(range(len(before))), list(range(len(after))))]
            found.append((a, b))
        return found

    def _closed(self, reading: Reading, node: fx.Node, a: list[int], b: list[int]) -> bool:
        """Whether units can be followed through a group: one dim on one side, and no open size."""
        before, after = reading.open_dims(source(node)), reading.open_dims(node)
        return min(len(a), len(b)) == 1 and not any([*(before[d] for d in a), *(after[d] for d in b)])

    def _forth(self, reading: Reading, node: fx.Node, inside: Sets) -> Sets:
        """Sets of the input as sets of the result."""
        sets = list(full(reading, node))
        for a, b in self.groups(reading, node):
            if self._closed(reading, node, a, b):
                for d, units in zip(b, _along([inside[d] for d in a], [sets[d].n for d in b]), strict=True):
                    sets[d] = units
        return tuple(sets)

    def _back(self, reading: Reading, node: fx.Node, sets: Sets) -> Sets:
        """Sets of the result as sets of the input."""
        inside = list(full(reading, source(node)))
        for a, b in self.groups(reading, node):
            if self._closed(reading, node, a, b):
                for d, units in zip(a, _along([sets[d] for d in b], [inside[d].n for d in a]), strict=True):
                    inside[d] = units
        return tuple(inside)

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        return self._forth(reading, node, live(source(node)))

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        yield source(node), self._back(reading, node, need)

    def write(self, w: Writer, node: fx.Node) -> None:
        x, reading = source(node), w.reading
        held = list(full(reading, node))
        want = list(full(reading, x))
        same: dict[int, int] = {}
        for a, b in self.groups(reading, node):
            if not self._closed(reading, node, a, b):
                continue
            if len(a) == 1:
                for d in b:
                    held[d] = w.held(node)[d]
                want[a[0]] = _joined([held[d] for d in b])
            else:
                for d in a:
                    want[d] = w.held(x)[d]
                held[b[0]] = _joined([want[d] for d in a])
            if len(a) == len(b) == 1:
                same[a[0]] = b[0]
        value, raw = w.take_unscaled(x, tuple(want))
        factors: Factors = ()
        if all(d in same for d, _ in raw):
            factors = tuple((same[d], f) for d, f in raw)
        else:
            value = w.take(x, tuple(want))
        sizes = list[Any](reading.sizes(node))
        for a, b in self.groups(reading, node):
            for d in b:
                if reading.open_dims(node)[d]:
                    sizes[d] = w.call(aten.sym_size.int, value, a[0]) if len(a) == len(b) == 1 else -1
        w.put_sizes(node, aten.reshape.default, value, sizes, tuple(held), factors)


def _product(shape: Sequence[Any], dims: Sequence[int]) -> Any:
    product: Any = 1
    for d in dims:
        product = product * expression(shape[d])
    return product


def _product_hint(shape: Sequence[Any], dims: Sequence[int]) -> int:
    product = 1
    for d in dims:
        product *= hint(shape[d])
    return product


def _joined(sets: Sequence[Units]) -> Units:
    joined = every(1)
    for units in sets:
        joined = kron(joined, units)
    return joined


def _along(sets: Sequence[Units], sizes: Sequence[int]) -> list[Units]:
    """Sets of dims as sets of the dims of other sizes that hold the same elements; one of the two is a single dim."""
    if len(sizes) == 1:
        return [_joined(sets)]
    if not sizes:  # a dim of size 1 went
        return []
    (whole,) = sets or [every(1)]
    found = []
    for n in sizes[:-1]:
        rest = whole.n // n
        found.append(factor(whole, (n, rest), "left"))
        whole = factor(whole, (n, rest), "right")
    return [*found, whole]


class Expanded(Rule):
    """One unit said many times."""

    named = True

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        x, out = source(node), reading.sizes(node)
        offset = len(out) - len(reading.sizes(x))
        sets = list(full(reading, node))
        for d, units in enumerate(live(x)):
            if units.n == out[d + offset]:
                sets[d + offset] = units
        return tuple(sets)

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        x, out = source(node), reading.sizes(node)
        offset, inside = len(out) - len(reading.sizes(x)), list(full(reading, x))
        for d, units in enumerate(inside):
            if units.n == out[d + offset]:
                inside[d] = need[d + offset]
        yield x, tuple(inside)

    def write(self, w: Writer, node: fx.Node) -> None:
        x, out = source(node), w.reading.sizes(node)
        offset, want = len(out) - len(w.reading.sizes(x)), list(full(w.reading, x))
        held = list(full(w.reading, node))
        for d, units in enumerate(want):
            if units.n == out[d + offset]:
                held[d + offset] = want[d] = w.held(node)[d + offset]
        old = [-1] * offset + list(w.reading.sizes(x))
        sizes = [-1 if n == m else given for n, m, given in zip(old, out, node.args[1], strict=True)]  # type: ignore[arg-type]
        w.put(node, (w.take(x, tuple(want)), sizes), {}, tuple(held))


class Slice(Rule):
    """Some of the units of one dim: a slice, one of them, or one of the pieces that a tensor is split into.

    Args:
        where: reading, node -> the tensor, the dim, start, step, and whether the dim is gone.
    """

    named = True

    def __init__(
        self, where: Callable[[Reading, fx.Node], tuple[fx.Node, int, int, int, bool] | None]
    ) -> None:
        self.where = where

    def _place(self, reading: Reading, node: fx.Node) -> tuple[fx.Node, int, int, int, bool]:
        where = self.where(reading, node)
        assert where is not None
        return where

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        x, dim, start, step, gone = self._place(reading, node)
        sets = list(live(x))
        if gone:
            del sets[dim]
        else:
            sets[dim] = part(sets[dim], start, reading.sizes(node)[dim], step)
        return tuple(sets)

    def _inside(self, reading: Reading, node: fx.Node, sets: Sets) -> Sets:
        x, dim, start, step, gone = self._place(reading, node)
        n, inside = reading.sizes(x)[dim], list(sets)
        if gone:
            inside.insert(dim, place(every(1), n, start))
        elif not reading.open_dims(x)[dim]:
            inside[dim] = place(inside[dim], n, start, step)
        else:
            inside[dim] = every(n)
        return tuple(inside)

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        yield self._place(reading, node)[0], self._inside(reading, node, need)

    def write(self, w: Writer, node: fx.Node) -> None:
        x, dim, _, _, gone = self._place(w.reading, node)
        held = list(w.held(node))
        if w.reading.open_dims(x)[dim]:
            held[dim] = full(w.reading, node)[dim]
            value = w.take(x, self._inside(w.reading, node, tuple(held)))
            w.put(node, *with_values(node, {x: value}), tuple(held))
            return
        value = w.take(x, self._inside(w.reading, node, tuple(held)))
        w.put_value(node, (aten.squeeze.dim, (value, dim)) if gone else value, tuple(held))


def sliced(reading: Reading, node: fx.Node) -> tuple[fx.Node, int, int, int, bool] | None:
    """slice.Tensor(x, dim, start, end, step)."""
    x = source(node)
    _, dim, start, _, step = (*node.args, *[None] * 5)[:5]
    dim = int(dim or 0) % len(reading.sizes(x))  # type: ignore[arg-type]
    n, step = reading.sizes(x)[dim], 1 if step is None else step
    start = 0 if start is None else start
    if not isinstance(start, int) or not isinstance(step, int):
        return None
    return x, dim, max(0, start + n if start < 0 else min(start, n)), step, False


def selected(reading: Reading, node: fx.Node) -> tuple[fx.Node, int, int, int, bool] | None:
    """select.int(x, dim, index)."""
    x, dim, index = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(dim, int)
    dim %= len(reading.sizes(x))
    if not isinstance(index, int) or reading.open_dims(x)[dim]:
        return None
    return x, dim, index % reading.sizes(x)[dim], 1, True


PIECES = (
    aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.unbind.int,
    aten.tensor_split.sections,
)  # fmt: skip


def a_piece(reading: Reading, node: fx.Node) -> tuple[fx.Node, int, int, int, bool] | None:
    """One of the tensors that chunk, split or unbind give."""
    whole, index = node.args
    assert isinstance(whole, fx.Node)
    assert isinstance(index, int)
    x = source(whole)
    gone = whole.target is aten.unbind.int
    given = whole.args[1 if gone else 2 :] or [whole.kwargs.get("dim", 0)]
    dim = int(given[0]) % len(reading.sizes(x))  # type: ignore[arg-type]
    if reading.open_dims(x)[dim]:
        return None
    if gone:
        return x, dim, index, 1, True
    start = sum(hint(v.shape[dim]) for v in whole.meta["val"][:index])
    return x, dim, start, 1, False


class Joined(Rule):
    """cat: one tensor after the other along a dim."""

    named = True

    @staticmethod
    def place(reading: Reading, node: fx.Node) -> tuple[list[fx.Node], int]:
        """The tensors, and the dim."""
        tensors = node.args[0]
        assert isinstance(tensors, list | tuple)
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return list(tensors), int(dim) % len(reading.sizes(node))  # type: ignore[arg-type]

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        tensors, dim = self.place(reading, node)
        sets = list(full(reading, node))
        if not reading.open_dims(node)[dim]:
            sets[dim] = concatenated(*(live(x)[dim] for x in tensors))
        return tuple(sets)

    def _inside(self, reading: Reading, node: fx.Node, sets: Sets) -> list[tuple[fx.Node, Sets]]:
        tensors, dim = self.place(reading, node)
        at, found = 0, []
        for x in tensors:
            n = reading.sizes(x)[dim]
            own = every(n) if reading.open_dims(node)[dim] else part(sets[dim], at, n)
            found.append((x, (*sets[:dim], own, *sets[dim + 1 :])))
            at += n
        return found

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        return self._inside(reading, node, need)

    def write(self, w: Writer, node: fx.Node) -> None:
        _, dim = self.place(w.reading, node)
        held = w.held(node)
        inside = self._inside(w.reading, node, held)
        values = [w.take(x, sets) for x, sets in inside]
        own = concatenated(*(sets[dim] for _, sets in inside))
        w.put(node, (values, dim), {}, (*held[:dim], own, *held[dim + 1 :]))

"""How each operator of torch gets along with fewer units: one rule an operator, three questions a rule.

live    Which units of the result can be other than 0, given which ones of the inputs can?
need    Which units of the inputs does it take to have the needed units of the result?
write   The operator on the units that are left.

An operator without a rule gets every unit, zeros filled in, and gives every unit.
"""

# What each method does stands once, in `Rule`.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from dropkit.committee.graph import DRAW
from dropkit.committee.thinning.reading import Reading, aten
from dropkit.committee.thinning.units import Units, both, either, every, kron

Sets = tuple[Units, ...]
Needs = Iterable[tuple[fx.Node, Sets]]


class Writer(Protocol):
    """What a rule asks of the one who writes the thinned graph."""

    reading: Reading

    def live(self, node: fx.Node) -> Sets:
        """Units that can be other than 0, for each dim."""

    def held(self, node: fx.Node) -> Sets:
        """Units of a node that are needed and can be other than 0."""

    def needed(self, node: fx.Node) -> Sets:
        """Units that somebody needs."""

    def take(self, node: fx.Node, want: Sets) -> fx.Node:
        """The value of an input with just these units, missing ones as zeros."""

    def take_unscaled(self, node: fx.Node, want: Sets) -> tuple[fx.Node, Factors]:
        """The same, and the factors of masks that are still to be multiplied."""

    def weight(self, node: fx.Node, want: Sets, factors: Factors = ()) -> fx.Node:
        """The same for a weight, times factors along its dims."""

    def put(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], held: Sets, factors: Factors = ()
    ) -> None:
        """Write the node with these arguments; its result holds these units."""

    def put_value(self, node: fx.Node, value: Any, held: Sets, factors: Factors = ()) -> None:
        """The node's value is this one: a node of the new graph, a number, or (operator, args, kwargs)."""

    def put_sizes(
        self, node: fx.Node, target: Any, value: Any, sizes: Sequence[Any], held: Sets, factors: Factors = ()
    ) -> None:
        """A value in another shape; dims that are cut have as many units as are held."""

    def plain(self, node: fx.Node) -> Any:
        """Whatever there is of a value, for its size and kind alone."""

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Another operator in the new graph."""

    def count(self, units: Units) -> fx.Node:
        """How many units are held, as a number of the new graph."""

    def norm_into(self, node: fx.Node) -> fx.Node | None:
        """The batch norm that is to be put into a product's weights."""

    def norm_is_in(self, node: fx.Node) -> bool:
        """Whether a batch norm is in the weights before it."""

    def shift(self, bias: fx.Node | None, norm: fx.Node | None, units: Units) -> fx.Node | None:
        """The bias of a product, with a batch norm in it."""

    def corrected(self, node: fx.Node) -> int | None:
        """The site whose dropped units a product, once made densely, is to be corrected by."""

    def prepared_product(
        self, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, norm: fx.Node | None, site: int,
        want: Sets,
    ) -> fx.Node:  # fmt: skip
        """The dense product, made once."""

    def product(
        self, node: fx.Node, of_out: Units, of_in: Units, each: float, instead_of: Units | None = None
    ) -> None:
        """Note a product of out x in units, `each` multiply-adds a row for a pair."""


# (dim, ("site", number)) and the like: what is still to be multiplied along a dim.
Factors = tuple[tuple[int, tuple[str, Any]], ...]
Live = Callable[[fx.Node], Sets]


class Rule:
    """An operator that gets every unit of all its inputs, and gives every unit."""

    named = False  # whether the operator has a rule of its own

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        """Units of the result that can be other than 0, one set for each dim."""
        return full(reading, node)

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        """Units of the inputs that are needed."""
        return [(i, full(reading, i)) for i in tensor_inputs(node)]

    def write(self, w: Writer, node: fx.Node) -> None:
        """The operator on what is left."""
        values = {i: w.take(i, full(w.reading, i)) for i in tensor_inputs(node)}
        args, kwargs = with_values(node, values)
        held = full(w.reading, node) if is_tensor(node) else ()
        w.put(node, args, kwargs, held)


def full(reading: Reading, node: fx.Node) -> Sets:
    """Every unit of each dim."""
    return tuple(every(n) for n in reading.sizes(node))


def is_tensor(node: fx.Node) -> bool:
    """Whether a node is one tensor, and not a number or several tensors."""
    return node.op == "get_attr" or isinstance(node.meta.get("val"), torch.Tensor)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that are tensors of values; an address has no units."""
    return [i for i in node.all_input_nodes if is_tensor(i) and i.target is not DRAW]


def with_values(node: fx.Node, values: dict[fx.Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments, with new ones for some; others are looked up by the writer."""
    args = fx.map_arg(node.args, lambda n: values.get(n, n))
    kwargs = fx.map_arg(node.kwargs, lambda n: values.get(n, n))
    return args, kwargs


def to_output(sets: Sets, sizes: Sequence[int], out: Sequence[int]) -> Sets:
    """An input's sets as those of a result that it is broadcast to."""
    offset = len(out) - len(sizes)
    spread = [every(n) for n in out[:offset]]
    for units, size, target in zip(sets, sizes, out[offset:], strict=True):
        spread.append(kron(units, every(target)) if size == 1 and target != 1 else units)
    return tuple(spread)


def to_input(sets: Sets, sizes: Sequence[int], out: Sequence[int]) -> Sets:
    """A result's sets as those of an input that is broadcast to it."""
    offset = len(out) - len(sizes)
    return tuple(
        every(1) if size == 1 and target != 1 else units
        for units, size, target in zip(sets[offset:], sizes, out[offset:], strict=True)
    )


class Pointwise(Rule):
    """f, element by element, with broadcasting.

    Args:
        zero: node -> how its result can be 0: ("all", inputs) where all these inputs are, ("any", inputs) where one
            of them is, None: at no place that is known beforehand.
        scales: f(s x) = s f(x) for positive s, of its first argument.
    """

    named = True

    def __init__(
        self, zero: Callable[[fx.Node], tuple[str, list[fx.Node]] | None], scales: bool = False
    ) -> None:
        self.zero = zero
        self.scales = scales

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        out = reading.sizes(node)
        known = self.zero(node)
        if known is None:
            return full(reading, node)
        how, inputs = known
        sets = [to_output(live(i), reading.sizes(i), out) for i in inputs]
        join = either if how == "all" else both
        return tuple(join(*along) for along in zip(*sets, strict=True)) if out else ()

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        out = reading.sizes(node)
        held = tuple(map(both, need, self.live(reading, node, live)))
        for i in tensor_inputs(node):
            # Where the result is 0 whatever the input, nothing of the input is needed.
            wanted = held if self._only_where_live(node) else need
            yield i, to_input(wanted, reading.sizes(i), out)

    def _only_where_live(self, node: fx.Node) -> bool:
        known = self.zero(node)
        return known is not None and known[0] == "any"

    def write(self, w: Writer, node: fx.Node) -> None:
        out, held = w.reading.sizes(node), w.held(node)
        values: dict[fx.Node, Any] = {}
        factors: Factors = ()
        for i in tensor_inputs(node):
            want = to_input(held, w.reading.sizes(i), out)
            if self.scales and i is node.args[0] and w.reading.sizes(i) == out:
                values[i], factors = w.take_unscaled(i, want)
            else:
                values[i] = w.take(i, want)
        w.put(node, *with_values(node, values), held, factors)


def _tensors(*arguments: Any) -> list[fx.Node]:
    return [a for a in arguments if isinstance(a, fx.Node) and is_tensor(a)]


def first_zero(node: fx.Node) -> tuple[str, list[fx.Node]]:
    """f(0) = 0 in the first argument."""
    return "any", _tensors(node.args[0])


def kept_zero(node: fx.Node) -> tuple[str, list[fx.Node]]:
    """0 where the one argument that counts is."""
    return "all", _tensors(node.args[0])


def product_zero(node: fx.Node) -> tuple[str, list[fx.Node]]:
    """0 where one factor is."""
    return "any", _tensors(*node.args[:2])


def sum_zero(node: fx.Node) -> tuple[str, list[fx.Node]] | None:
    """0 where all terms are; a number other than 0 leaves no zero."""
    terms = node.args[:2]
    if any(isinstance(t, int | float) and t != 0 for t in terms) or len(_tensors(*terms)) < sum(
        isinstance(t, fx.Node) for t in terms
    ):
        return None
    return "all", _tensors(*terms)


def never_zero(node: fx.Node) -> None:
    """f(0) is not 0."""
    return


def clamped_zero(node: fx.Node) -> tuple[str, list[fx.Node]] | None:
    """0 stays where the bounds let it be."""
    bounds = (
        [*node.args[1:], None, None][:2]
        if node.target is not aten.clamp_max.default
        else [None, node.args[1]]
    )
    low, high = bounds
    inside = (low is None or (isinstance(low, int | float) and low <= 0)) and (
        high is None or (isinstance(high, int | float) and high >= 0)
    )
    return ("all", _tensors(node.args[0])) if inside and not node.kwargs else None


def power_zero(node: fx.Node) -> tuple[str, list[fx.Node]] | None:
    """0 to a positive power is 0."""
    power = node.args[1]
    return ("all", _tensors(node.args[0])) if isinstance(power, int | float) and power > 0 else None


def filled_zero(node: fx.Node) -> tuple[str, list[fx.Node]] | None:
    """0 where something is filled in stays 0 only if that is 0."""
    return ("all", _tensors(node.args[0])) if node.args[2] == 0 else None


def chosen_zero(node: fx.Node) -> tuple[str, list[fx.Node]] | None:
    """0 where both choices are."""
    choices = node.args[1:3]
    if any(isinstance(c, int | float) and c != 0 for c in choices):
        return None
    return "all", _tensors(*choices)


class BatchNorm(Rule):
    """y = (x - mean) / sqrt(var + eps) * w + b, channel by channel, with statistics that are kept."""

    named = True

    @staticmethod
    def applies(node: fx.Node) -> bool:
        """Only with kept statistics; those of the batch belong to no member."""
        return node.args[5] is False and node.args[3] is not None

    @staticmethod
    def vectors(node: fx.Node) -> list[fx.Node]:
        """weight, bias, mean and variance, as far as they are there."""
        return [n for n in node.args[1:5] if isinstance(n, fx.Node)]

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        yield x, need
        for vector in self.vectors(node):
            yield vector, (need[1],)

    def write(self, w: Writer, node: fx.Node) -> None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        held = w.held(node)
        if w.norm_is_in(node):
            w.put_value(node, w.plain(x), held)
            return
        values = {x: w.take(x, held)} | {v: w.weight(v, (held[1],)) for v in self.vectors(node)}
        w.put(node, *with_values(node, values), held)


class Along(Rule):
    """An operator that mixes the units of some dims and lets each slice of the others be by itself.

    Args:
        mixed: node, number of dims -> the dims that are mixed; they get every unit.
        zero: whether a slice of zeros gives zeros.
        scales: f(s x) = s f(x) for positive s.
        keeps: whether the result has all dims of the input, or those that are mixed are gone unless `keepdim`.
    """

    named = True

    def __init__(
        self,
        mixed: Callable[[fx.Node, int], Sequence[int]],
        zero: bool = False,
        scales: bool = False,
        keeps: bool = True,
    ) -> None:
        self.mixed = mixed
        self.zero = zero
        self.scales = scales
        self.keeps = keeps

    def _source(self, node: fx.Node) -> fx.Node:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        return x

    def pairs(self, reading: Reading, node: fx.Node) -> list[tuple[int, int]]:
        """(dim of the input, dim of the result) of the dims that are let be."""
        n, out = len(reading.sizes(self._source(node))), len(reading.sizes(node))
        mixed = {d % n for d in self.mixed(node, n)}
        rest = [d for d in range(n) if d not in mixed]
        if out == n:
            return [(d, d) for d in rest]
        return list(zip(rest, range(out), strict=True))

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        sets = list(full(reading, node))
        if self.zero:
            inside = live(self._source(node))
            for d, e in self.pairs(reading, node):
                sets[e] = inside[d]
        return tuple(sets)

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        x = self._source(node)
        sets = list(full(reading, x))
        for d, e in self.pairs(reading, node):
            sets[d] = need[e]
        yield x, tuple(sets)
        for other in tensor_inputs(node):
            if other is not x:
                yield other, full(reading, other)

    def write(self, w: Writer, node: fx.Node) -> None:
        x = self._source(node)
        pairs = dict(self.pairs(w.reading, node))
        held, sets = list(full(w.reading, node)), list(full(w.reading, x))
        for d, e in pairs.items():
            held[e] = sets[d] = w.held(node)[e]
        factors: Factors = ()
        if self.scales:
            value, raw = w.take_unscaled(x, tuple(sets))
            if all(d in pairs for d, _ in raw):
                factors = tuple((pairs[d], f) for d, f in raw)
            else:
                value = w.take(x, tuple(sets))
        else:
            value = w.take(x, tuple(sets))
        values = {x: value}
        for other in tensor_inputs(node):
            if other is not x:
                values[other] = w.take(other, full(w.reading, other))
        w.put(node, *with_values(node, values), tuple(held), factors)


def reduced(node: fx.Node, n: int) -> Sequence[int]:
    """The dims that a sum or mean goes over."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if dims is None or dims == []:
        return range(n)
    return dims if isinstance(dims, list | tuple) else [dims]  # type: ignore[list-item]


def last_argument(node: fx.Node, n: int) -> Sequence[int]:
    """The one dim of a softmax."""
    return [node.args[1]]  # type: ignore[list-item]


def normalised(node: fx.Node, n: int) -> Sequence[int]:
    """The last dims, as many as the shape of a layer norm says."""
    return range(n - len(node.args[1]), n)  # type: ignore[arg-type]


def positions(node: fx.Node, n: int) -> Sequence[int]:
    """All but batch and channels."""
    return range(2, n)

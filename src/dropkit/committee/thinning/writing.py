"""Writing the thinned graph: each operator anew, on the units that are needed and can be other than 0."""

# What each method does stands once, in `Writer`.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dropkit.committee.graph import DRAW, DROPOUT_AT
from dropkit.committee.thinning.cut import (
    AddressOf,
    Count,
    FactorOf,
    Gathered,
    Moves,
    Prepared,
    Recipe,
    Shift,
    align,
)
from dropkit.committee.thinning.products import Convolution, Linear
from dropkit.committee.thinning.reading import NOISE_AT, Reading, at, aten
from dropkit.committee.thinning.rules import BatchNorm, Factors, Sets, full, is_tensor
from dropkit.committee.thinning.table import is_needed, rule_of
from dropkit.committee.thinning.units import Units, both, either, every

# A site that drops at most this share is corrected rather than cut: the correction is the smaller product then, also
# with the dense one, whose rows it is taken from, to be read.
DELTA_RATE = 0.4
_PRODUCTS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product of the thinned graph.

    Attributes:
        of_out, of_in: units of result and input that take part.
        each: multiply-adds a row for a pair of them.
        instead_of: the units of the input that would take part, where a product that is made densely, once for all
            members, is corrected by this one.
    """

    of_out: Units
    of_in: Units
    each: float
    instead_of: Units | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """The thinned graph and how to feed it; fields as in `Thinning`."""

    module: fx.GraphModule
    cut: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    recipes: tuple[Recipe, ...]
    prepared: tuple[Prepared, ...]
    products: tuple[Product, ...]


@dataclass(slots=True)
class _Value:
    """A node of the new graph, the units it holds, and factors that it is still to be multiplied with."""

    node: Any
    held: Sets
    factors: Factors = ()
    scaled: Any = None


class Writing:
    """One run through a recorded graph; the `Writer` of the rules.

    Args:
        reading: the model.
        boundary: nodes whose values are given; none: the model's inputs.
        fold, delta: as in `thin`.
    """

    def __init__(self, reading: Reading, boundary: Sequence[fx.Node], fold: bool, delta: bool) -> None:
        self.reading = reading
        self.boundary = boundary
        self.fold = fold
        self.delta = delta
        self.graph = fx.Graph()
        self.recipes: dict[Recipe, fx.Node] = {}
        self.prepared: dict[Prepared, fx.Node] = {}
        self.products: list[Product] = []
        self.filled: dict[int, str] = {}  # site -> where its dropped units come back
        self._given = set(boundary)
        self._live: dict[fx.Node, Sets] = {}
        self._needs: dict[fx.Node, Sets] = {}
        self._values: dict[fx.Node, _Value] = {}
        self._aligned: dict[tuple[Any, Sets], Any] = {}
        self._fresh: set[fx.Node] = (
            set()
        )  # new nodes that own their memory, and whose backward does not read it
        self._sums: set[fx.Node] = set()  # new nodes that add two tensors of one shape and kind
        self._in_weights: set[fx.Node] = set()  # batch norms
        self._last: dict[str, fx.Node | None] = {"given": None, "prepared": None, "recipes": None}
        self._read_zeros()
        self._read_needs()

    def _read_zeros(self) -> None:
        for node in self.reading.nodes:
            if node.op == "output" or not is_tensor(node) or node.target is DRAW:
                continue
            given = node in self._given or node in self.reading.constants or node.op == "placeholder"
            reading = self.reading
            self._live[node] = (
                full(reading, node) if given else rule_of(reading, node).live(reading, node, self.live)
            )

    def _read_needs(self) -> None:
        for node in reversed(self.reading.nodes):
            if node.op == "output":
                for i in node.all_input_nodes:
                    self._need(i, full(self.reading, i) if is_tensor(i) else ())
                continue
            if node not in self._needs or node in self._given or node in self.reading.constants:
                continue
            if node.op != "call_function" or node.target is DRAW:
                continue
            rule = rule_of(self.reading, node)
            needs = rule.need(self.reading, node, self._needs[node], self.live)
            for i, sets in needs:
                self._need(i, sets)
            for i in node.all_input_nodes:
                value = i.meta.get("val")
                if is_needed(value) or (isinstance(value, tuple | list) and not rule.named):
                    self._need(i, ())

    def _need(self, node: fx.Node, sets: Sets) -> None:
        known = self._needs.get(node)
        self._needs[node] = sets if known is None else tuple(map(either, known, sets))

    def live(self, node: fx.Node) -> Sets:
        return self._live[node]

    def needed(self, node: fx.Node) -> Sets:
        return self._needs[node]

    def held(self, node: fx.Node) -> Sets:
        return tuple(map(both, self._needs[node], self._live[node]))

    # Values of the new graph

    def run(self) -> Written:
        """Write it all."""
        for node in self.boundary:
            value = self._placeholder("given", node.name)
            self._values[node] = _Value(value, full(self.reading, node) if is_tensor(node) else ())
        output = None
        for node in self.reading.nodes:
            if node.op == "output":
                output = fx.map_arg(node.args[0], self._output)
            elif node in self._given or node in self.reading.constants or node.target is DRAW:
                continue
            elif node.op == "placeholder":
                if not self.boundary:
                    value = self._placeholder("given", str(node.target))
                    self._values[node] = _Value(value, full(self.reading, node) if is_tensor(node) else ())
            elif node in self._needs:
                rule_of(self.reading, node).write(self, node)
        self.graph.output(output)
        self.graph.eliminate_dead_code()
        if self.boundary:
            self._write_in_place()
        self.graph.lint()
        used = [(r, n) for r, n in self.recipes.items() if n.users]
        for node in self.recipes.values():
            if not node.users:
                self.graph.erase_node(node)
        module = fx.GraphModule({}, self.graph, "Thinned")
        order = {n: at for at, n in enumerate(self.graph.nodes)}
        used.sort(key=lambda pair: order[pair[1]])
        cut = frozenset[int]().union(*(p.of_out.sites | p.of_in.sites for p in self.products))
        names = tuple(dict.fromkeys(s.name for i, s in enumerate(self.reading.sites) if i in cut))
        return Written(
            module,
            names,
            self._left(cut),
            tuple(r for r, _ in used),
            tuple(self.prepared),
            tuple(self.products),
        )

    def _write_in_place(self) -> None:
        """Let relu and sums write into a fresh product that nobody else reads; its backward does not need it."""
        for node in self.graph.nodes:
            fresh = node.args[0] if node.args else None
            if not isinstance(fresh, fx.Node) or len(fresh.users) != 1 or fresh not in self._fresh:
                continue
            if node.target is aten.relu.default:
                node.target = aten.relu_.default
                self._fresh.add(node)
            elif node in self._sums and node.args[1] is not fresh:
                node.target = aten.add_.Tensor
                self._fresh.add(node)

    def _left(self, cut: frozenset[int]) -> tuple[tuple[str, str], ...]:
        reading = self.reading
        left = []
        for node, reason in reading.reasons.items():
            left += [(reading.graph.draws[draw], reason) for draw in reading.draws_of(node)]
        for i, site in enumerate(reading.sites):
            if i not in cut:
                left.append((site.name, self.filled.get(i, "no weight meets its units alone")))
        return tuple(left)

    def _output(self, node: fx.Node) -> Any:
        return self.take(node, full(self.reading, node)) if is_tensor(node) else self._values[node].node

    def _placeholder(self, kind: str, name: str) -> fx.Node:
        """A new input: given values come first, then prepared ones, then a member's arguments."""
        kinds = list(self._last)
        before = [self._last[k] for k in kinds[: kinds.index(kind) + 1]]
        after = next((n for n in reversed(before) if n is not None), None)
        with self.graph.inserting_after(after):
            node = self.graph.placeholder(name)
        self._last[kind] = node
        return node

    def argument(self, recipe: Recipe) -> fx.Node:
        """An input that a member brings."""
        if recipe not in self.recipes:
            name = f"member_{len(self.recipes)}_{recipe.name.replace('.', '_')}"
            self.recipes[recipe] = self._placeholder("recipes", name)
        return self.recipes[recipe]

    def count(self, units: Units) -> fx.Node:
        return self.argument(Count(units))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        if target in _PRODUCTS:
            self._fresh.add(node)
        return node

    def plain(self, node: fx.Node) -> Any:
        if node in self.reading.constants:
            return self.weight(node, full(self.reading, node))
        return self._values[node].node

    def take(self, node: fx.Node, want: Sets) -> Any:
        if node in self.reading.constants:
            return self.weight(node, want)
        value = self._values[node]
        if value.factors and value.scaled is None:
            scaled = value.node
            for dim, factor in value.factors:
                recipe = FactorOf(factor, value.held[dim], dim, len(value.held), node)
                scaled = self.call(aten.mul.Tensor, scaled, self.argument(recipe))
            value.scaled = scaled
        return self._align(node, value.scaled if value.factors else value.node, value.held, want)

    def take_unscaled(self, node: fx.Node, want: Sets) -> tuple[Any, Factors]:
        if node in self.reading.constants:
            return self.weight(node, want), ()
        value = self._values[node]
        if value.scaled is not None:
            return self._align(node, value.scaled, value.held, want), ()
        return self._align(node, value.node, value.held, want), value.factors

    def _align(self, node: fx.Node, value: Any, held: Sets, want: Sets) -> Any:
        key = (value, want)
        if key in self._aligned:
            return self._aligned[key]
        device = node.meta["val"].device
        for dim, (have, wanted) in enumerate(zip(held, want, strict=True)):
            if have is wanted:
                continue
            if wanted.kind == "all":
                for site in have.sites:
                    users = ", ".join(sorted({_said(u) for u in node.users}))
                    self.filled.setdefault(site, f"its units go into {users}, which takes all of them")
            moves = [self.argument(Moves(p, have, wanted, device)) for p in ("index", "fills")]
            value = self.call(align, value, dim, *moves)
        self._aligned[key] = value
        return value

    def weight(self, node: fx.Node, want: Sets, factors: Factors = ()) -> Any:
        if node in self.reading.constants:
            return self.argument(Gathered(node, want, factors))
        value = self.take(node, want)
        for dim, factor in factors:
            recipe = FactorOf(factor, want[dim], dim, len(want), node)
            value = self.call(aten.mul.Tensor, value, self.argument(recipe))
        return value

    def put(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], held: Sets, factors: Factors = ()
    ) -> None:
        def old(n: fx.Node) -> Any:
            if n in self._values:
                return self._values[n].node
            if n in self.reading.constants:
                return self.weight(n, full(self.reading, n))
            return self.argument(AddressOf(n, written=not by_function)) if n.target is DRAW else n

        # Functions take an address as it was drawn; a module that is handed on is made of operators.
        by_function = bool(self.boundary) and node.target in (DROPOUT_AT, NOISE_AT)
        if by_function:
            args = (node.target, *args)
        target: Any = at if by_function else node.target
        made = self.graph.call_function(target, fx.map_arg(args, old), fx.map_arg(kwargs, old))
        self._values[node] = _Value(made, held, factors)
        if node.target is aten.add.Tensor and not kwargs and len({_kind(a) for a in (node, *node.args)}) == 1:
            self._sums.add(made)

    def put_value(self, node: fx.Node, value: Any, held: Sets, factors: Factors = ()) -> None:
        if isinstance(value, tuple):
            target, args, *kwargs = value
            self.put(node, args, kwargs[0] if kwargs else {}, held, factors)
            self._values[node].node.target = target
            if target is aten.add.Tensor:  # a product and its correction
                self._sums.add(self._values[node].node)
        else:
            self._values[node] = _Value(value, held, factors)

    def put_sizes(
        self, node: fx.Node, target: Any, value: Any, sizes: Sequence[Any], held: Sets, factors: Factors = ()
    ) -> None:
        given = [s if u.kind == "all" else self.count(u) for s, u in zip(sizes, held, strict=True)]
        self.put_value(node, (target, (value, given)), held, factors)

    # Products

    def product(
        self, node: fx.Node, of_out: Units, of_in: Units, each: float, instead_of: Units | None = None
    ) -> None:
        self.products.append(Product(of_out, of_in, each, instead_of))

    def _constant(self, *nodes: Any) -> bool:
        return all(n in self.reading.constants for n in nodes if isinstance(n, fx.Node))

    def norm_into(self, node: fx.Node) -> fx.Node | None:
        if not self.fold or len(node.users) != 1:
            return None
        norm = next(iter(node.users))
        rule = rule_of(self.reading, norm) if norm.op == "call_function" else None
        _, weight, bias = Linear.parts(node)
        if not isinstance(rule, BatchNorm) or not self._constant(weight, bias, *rule.vectors(norm)):
            return None
        if (
            norm.args[0] is not node
            or self.held(norm) != self.held(node)
            or (len(self.held(node)) == 3 and (not isinstance(rule_of(self.reading, node), Convolution)))
        ):
            return None
        self._in_weights.add(norm)
        return norm

    def norm_is_in(self, node: fx.Node) -> bool:
        return node in self._in_weights

    def shift(self, bias: fx.Node | None, norm: fx.Node | None, units: Units) -> fx.Node | None:
        if norm is not None:
            return self.argument(Shift(norm, bias, units))
        return None if bias is None else self.weight(bias, (units,))

    def corrected(self, node: fx.Node) -> int | None:
        x, weight, bias = Linear.parts(node)
        number = self.reading.site_at.get(x)
        if not self.delta or number is None or not self._constant(weight, bias):
            return None
        site = self.reading.sites[number]
        fits = x.target is DROPOUT_AT and site.source in self._given and site.n == self.held(x)[site.dim].n
        by_units = site.dim == rule_of(self.reading, node).unit_dim(self.reading, node)  # type: ignore[attr-defined]
        return number if fits and by_units and 0.0 < site.rate <= DELTA_RATE else None

    def prepared_product(
        self, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, norm: fx.Node | None, site: int,
        want: Sets,
    ) -> fx.Node:  # fmt: skip
        rows: Factors = () if norm is None else ((0, ("norm", norm)),)
        whole = Gathered(weight, full(self.reading, weight), (*rows, (1, ("scale", site))))
        units = every(self.reading.sizes(weight)[0])
        shift: Gathered | Shift | None = None
        if norm is not None:
            shift = Shift(norm, bias, units)
        elif bias is not None:
            shift = Gathered(bias, (units,))
        recipe = Prepared(node, x, whole, shift)
        if recipe not in self.prepared:
            self.prepared[recipe] = self._placeholder("prepared", f"once_{node.name}")
        return self._align(node, self.prepared[recipe], full(self.reading, node), want)


def _kind(value: Any) -> Any:
    """Shape and dtype of a recorded tensor."""
    made = value.meta.get("val") if isinstance(value, fx.Node) else None
    return (tuple(map(str, made.shape)), made.dtype) if isinstance(made, torch.Tensor) else value


def _said(node: fx.Node) -> str:
    return "the output" if node.op == "output" else str(node.target).removesuffix(".default")


def write(reading: Reading, boundary: Sequence[fx.Node], fold: bool, delta: bool) -> Written:
    """The thinned graph of a model from a boundary on, or from its inputs."""
    return Writing(reading, boundary, fold, delta).run()

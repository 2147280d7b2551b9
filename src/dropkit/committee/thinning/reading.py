"""What thinning knows of a recorded model: shapes, what is constant, and which masks drop whole units.

A site can be thinned where its mask, for one member, varies along one dimension only (features, channels, heads): a
dropped unit is then zero in every row and position. A mask that is one number for all, a dropped path, drops all units.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dropkit.committee.graph import DRAW, DROPOUT_AT, Graph
from dropkit.masks import noise_ops, ops
from dropkit.masks.address import Draw
from dropkit.masks.noise_ops import exact_count
from dropkit.masks.philox import survivor_scale

NOISE_AT = torch.ops.dropkit.noise_at.default
aten = torch.ops.aten
# In place of a size that only the values of a tensor decide.
_UNKNOWN = 10007
_WHERE = aten.where.ScalarOther
_FACTORIES = (aten.ones_like.default, aten.new_ones.default, aten.ones.default)


@dataclass(frozen=True, slots=True)
class Site:
    """A place where whole units are dropped.

    Attributes:
        node: whose result has the zeros.
        source: what goes in.
        name: of the site, for people.
        dim: of the units.
        n: how many there are.
        law: "dropped": node is a draw of a mask; "hidden": node takes the source where a mask of its own stands.
        rate: the expected share of dropped units, for predicting costs.
        single: one rate for all units, so that survivors have one factor.
    """

    node: fx.Node
    source: fx.Node
    name: str
    dim: int
    n: int
    law: str
    rate: float
    single: bool


class Reading:
    """A recorded model as thinning sees it.

    Args:
        graph: of the model.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.module = graph.module
        self.nodes = list(graph.module.graph.nodes)
        self.constants: set[fx.Node] = set()
        self.noise: set[fx.Node] = set()
        for node in self.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr":
                self.constants.add(node)
            elif node.op == "call_function" and _is_tensor(node):
                if inputs and all(i in self.constants for i in inputs) and not _grows(node):
                    self.constants.add(node)
                elif node.target in (DROPOUT_AT, NOISE_AT) or (
                    all(i in self.constants or i in self.noise for i in inputs)
                ):
                    self._add_noise(node)
        self.sites: list[Site] = []
        self.site_at: dict[fx.Node, int] = {}
        self.reasons: dict[fx.Node, str] = {}
        for node in self.nodes:
            self._look(node)
        for draw in graph.draws:
            for user in draw.users:
                if user.target not in (DROPOUT_AT, NOISE_AT):
                    self.reasons[user] = f"its mask acts inside of {user.target}, which is run as a whole"

    def _add_noise(self, node: fx.Node) -> None:
        """Note a node that is made of draws, constants and ones alone."""
        first = node.args[0] if node.args else None
        plain = node.target in (DROPOUT_AT, NOISE_AT)
        if plain and not (isinstance(first, fx.Node) and first.target in _FACTORIES):
            return
        if plain and node.args[2] not in self.constants:
            return
        if plain or any(i in self.noise for i in node.all_input_nodes):
            self.noise.add(node)

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        """Sizes of a tensor; the rows may be a symbol."""
        if node.op == "get_attr":
            return tuple(self.attribute(node).shape)
        return tuple(node.meta["val"].shape)

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a tensor, as recorded."""
        return tuple(hint(s) for s in self.shape(node))

    def open_dims(self, node: fx.Node) -> tuple[bool, ...]:
        """Which sizes are symbols, so that nothing may be cut there."""
        return tuple(not isinstance(s, int) for s in self.shape(node))

    def attribute(self, node: fx.Node) -> Tensor:
        """The weight, buffer or constant that a get_attr node names."""
        value: Any = self.module
        for name in str(node.target).split("."):
            value = getattr(value, name)
        assert isinstance(value, Tensor)
        return value

    def constant(self, node: fx.Node, known: dict[fx.Node, Any] | None = None) -> Tensor:
        """The value of a constant node, from the weights as they are now."""
        known = {} if known is None else known
        if node not in known:
            if node.op == "get_attr":
                known[node] = self.attribute(node)
            else:
                known[node] = self._call(node, lambda n: self.constant(n, known))
        value = known[node]
        assert isinstance(value, Tensor)
        return value

    @staticmethod
    def _call(node: fx.Node, value: Any) -> Any:
        args = fx.map_arg(node.args, value)
        kwargs = fx.map_arg(node.kwargs, value)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _look(self, node: fx.Node) -> None:
        """Whether a node drops whole units; if not, why."""
        if node.target is NOISE_AT:
            if node.args[4] in ("uniform", "gaussian"):
                if node not in self.noise:
                    self.reasons[node] = f"its noise is {node.args[4]}, which is never 0"
                return
            self._site(node, node.args[0], node.args[1], node.args[2], node.args[3], "dropped")
        elif node.target is DROPOUT_AT:
            self._site(node, node.args[0], node.args[1], node.args[2], node.args[3], "dropped")
        elif node.target is _WHERE and node.args[0] in self.noise and node.args[2] == 0:
            self._hidden(node)

    def _site(self, node: fx.Node, source: Any, draw: Any, p: Any, shared: Any, law: str) -> None:
        if p not in self.constants:
            self.reasons[node] = "its rate is computed from the rows"
            return
        name = self.graph.draws[draw]
        sizes, symbols = self.sizes(node), self.open_dims(node)
        varied = [d for d in range(1, len(sizes)) if d not in shared and (symbols[d] or sizes[d] > 1)]
        self._register(node, source, name, varied, law, float(self.constant(p).max()), True)

    def _hidden(self, node: fx.Node) -> None:
        """A rate for each unit: the source stays where random numbers say so."""
        source, condition = node.args[1], node.args[0]
        if not isinstance(source, fx.Node) or not isinstance(condition, fx.Node):
            return
        draw = next(iter(self.draws_of(condition)))
        sizes, own = self.sizes(node), self.sizes(condition)
        offset = len(sizes) - len(own)
        varied = [d for d in range(max(1, offset), len(sizes)) if own[d - offset] > 1]
        # What its rates are is up to the numbers it is compared with; for a prediction a half will do.
        self._register(node, source, self.graph.draws[draw], varied, "hidden", 0.5, False)

    def _register(
        self,
        node: fx.Node,
        source: fx.Node,
        name: str,
        varied: Sequence[int],
        law: str,
        rate: float,
        single: bool,
    ) -> None:
        sizes, symbols = self.sizes(node), self.open_dims(node)
        if len(varied) > 1:
            dims = " and ".join(str(d) for d in varied)
            self.reasons[node] = (
                f"its mask is another one along each of dims {dims} of {shown(self.shape(node))}: no unit is dropped "
                "in all positions"
            )
            return
        # A mask that is one number drops all units; they are counted along the channels.
        dim = varied[0] if varied else (1 if len(sizes) >= 4 else len(sizes) - 1)
        if dim < 1 or symbols[dim]:
            self.reasons[node] = f"no dim of {shown(self.shape(node))} can be cut"
            return
        self.site_at[node] = len(self.sites)
        self.sites.append(Site(node, source, name, dim, sizes[dim], law, rate, single))

    def draws_of(self, node: fx.Node) -> list[fx.Node]:
        """The draws that noise is made of."""
        found: dict[fx.Node, None] = {}
        waiting = [i for i in node.all_input_nodes if i.target is DRAW] or [node]
        while waiting:
            here = waiting.pop()
            if here.target is DRAW:
                found[here] = None
            elif here not in self.constants:
                waiting += here.all_input_nodes
        return list(found)

    def scale(self, site: Site, known: dict[fx.Node, Any]) -> Tensor:
        """() float64, what a site multiplies survivors with, where one rate serves all of them."""
        p = self.constant(site.node.args[2], known).to(torch.float64)  # type: ignore[arg-type]
        if site.node.target is DROPOUT_AT:
            return survivor_scale(p)
        left = site.n - exact_count(float(p), site.n)
        return torch.tensor(site.n / left if left else 0.0, dtype=torch.float64)

    def factors(self, site: Site, addresses: dict[fx.Node, Draw], known: dict[fx.Node, Any]) -> Tensor:
        """(n,) what a member's mask multiplies each unit with; 0 where it is dropped.

        Args:
            site: which one.
            addresses: the member's draws.
            known: constants that are known already, added to.
        """
        made = site.node.meta["val"]
        if site.law == "hidden":
            condition = site.node.args[0]
            assert isinstance(condition, fx.Node)
            keep = self._noise(condition, addresses, known)
            dim = site.dim - (len(self.sizes(site.node)) - keep.ndim)
            width = keep.shape[dim] if keep.ndim else 1
            result: Tensor = keep.reshape(-1)[:width].expand(site.n).to(made.dtype)
            return result
        shape = [1] * made.ndim
        shape[site.dim] = site.n
        _, draw, p, *rest = site.node.args
        assert isinstance(draw, fx.Node)
        assert isinstance(p, fx.Node)
        ones = torch.ones(shape, dtype=made.dtype, device=made.device)
        given: list[Any] = list(rest)
        return at(site.node.target, ones, addresses[draw], self.constant(p, known), *given).reshape(-1)

    def _noise(self, node: fx.Node, addresses: dict[fx.Node, Draw], known: dict[fx.Node, Any]) -> Any:
        """The value of a noise node for one row."""

        def value(inner: fx.Node) -> Any:
            if inner in self.constants:
                return self.constant(inner, known)
            if inner in addresses:
                return addresses[inner]
            if inner.target in (DROPOUT_AT, NOISE_AT):
                given: Any = fx.map_arg(inner.args, value)
                return at(inner.target, *given)
            if inner.target in _FACTORIES:
                made = inner.meta["val"]
                return torch.ones((1, *self.sizes(inner)[1:]), dtype=made.dtype, device=made.device)
            return self._call(inner, value)

        return value(node)


def at(target: Any, x: Tensor, where: Draw, p: Tensor, shared: Sequence[int], *law: str) -> Tensor:
    """What the operators dropout_at and noise_at do, by functions, which take less time to call."""
    dims = (0, *shared) if where.batch_shared and x.ndim and 0 not in shared else tuple(shared)
    if target is DROPOUT_AT:
        return ops.dropout(x, where.key, where.member, p, *where[2:5], dims)
    return noise_ops.noise(x, *where.tensors(), p, *where[2:5], dims, *law)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _grows(node: fx.Node) -> bool:
    """Whether a weight is said many times (expand), which is better done where it is used."""
    return node.target is aten.expand.default


def hint(size: Any) -> int:
    """A size as a number, also where it is a symbol, of whose sets there is only the one of all units."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else _UNKNOWN


def expression(size: Any) -> Any:
    """A size as something that can be multiplied and compared without being fixed."""
    return size if isinstance(size, int) else size.node.expr


def shown(shape: Sequence[Any]) -> str:
    """A shape for people: an open size is B."""
    return (
        "("
        + ", ".join(str(s) if isinstance(s, int) else "B" for s in shape)
        + ("," * (len(shape) == 1))
        + ")"
    )


def is_getitem(node: fx.Node) -> bool:
    """Whether a node takes one of several results."""
    return node.target is operator.getitem

"""Thinned for real: a member without the units that it drops.

A member's mask is known before the pass. Where it is shared over rows and positions, a dropped unit is zero in all of
them: the columns of the next weights that would meet it, and the rows of the last weights that would compute it, are
cut out. What is left costs q_in x q_out of the dense product, if shares q of the units stay.

The structure is decided once for a model: which sets of units each value holds, as formulas over the masks
(`units.py`). A member then brings its masks; weights are gathered, and the same graph runs on fewer units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_structure

from dropkit.committee.graph import Graph
from dropkit.committee.thinning.cut import Cut, Recipe, Whole, align
from dropkit.committee.thinning.reading import Reading
from dropkit.committee.thinning.units import Valuation, expected
from dropkit.committee.thinning.writing import Product, write
from dropkit.masks import compiled
from dropkit.masks.address import masks


@dataclass(frozen=True, slots=True)
class Work:
    """Predicted cost of one row through what is run for each member.

    Attributes:
        dense: multiply-adds of the products, all units there.
        thinned: the same with dropped units cut out, on average over members.
        gathered: values of weights that are gathered once for a member, however many rows there are.
        once: multiply-adds a row that are spent once for all members, on top of the prefix.
    """

    dense: float
    thinned: float
    gathered: float
    once: float

    def __str__(self) -> str:
        share = self.thinned / self.dense if self.dense else 1.0
        return f"{self.thinned:,.0f} of {self.dense:,.0f} multiply-adds a row ({share:.0%})"


@dataclass(frozen=True, slots=True)
class Thinning:
    """How a model's members are run on the units they keep.

        whole = thinning.whole()                            # once, the weights being as they are
        ready = thinning.prepare(*frontier, whole=whole)    # once for a tile
        arguments = thinning.arguments(seed, k, whole)      # once for a member, whatever the tiles
        y = thinning.suffix(*ready, *arguments)

    Attributes:
        suffix: (*ready, *arguments) -> the model's outputs, a flat tuple.
        cut: names of the sites whose dropped units are cut out of weights.
        left: (name, why) of sites whose dropped units are computed all the same.
    """

    suffix: fx.GraphModule
    cut: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    _reading: Reading = field(repr=False)
    _recipes: tuple[Recipe, ...] = field(repr=False)
    _prepared: tuple[Any, ...] = field(repr=False)
    _products: tuple[Product, ...] = field(repr=False)
    _boundary: tuple[fx.Node, ...] = field(repr=False)
    _images: bool = field(repr=False)

    def whole(self) -> Whole:
        """The weights that all members are cut from. It does not follow a weight that is changed later."""
        return Whole(self._reading)

    def prepare(self, *frontier: Any, whole: Whole | None = None) -> tuple[Any, ...]:
        """What all members start from: the frontier's values, and products that each member corrects only.

        Args:
            frontier: of the graph, in its order.
            whole: where it is there already.
        """
        cut = Cut(whole or self.whole(), {}, [], Valuation([]))
        # Convolutions of odd numbers of channels are quicker where the channels of a position lie side by side.
        frontier = tuple(_channels_last(value) for value in frontier)
        values = dict(zip(self._boundary, frontier, strict=True))
        return (*frontier, *(p.value(cut, values) for p in self._prepared))

    def arguments(self, seed: int, member: int, whole: Whole | None = None) -> tuple[Any, ...]:
        """The thinned weights of one member, and what else sets it apart.

        They carry gradients to the model's weights.

        Args:
            seed, member: which one.
            whole: where it is there already.
        """
        cut = self._cut(seed, member, whole or self.whole())
        return tuple(recipe.value(cut) for recipe in self._recipes)

    def work(self) -> Work:
        """Expected multiply-adds, from the rates; units are taken to be dropped independently."""
        rates = [site.rate for site in self._reading.sites]
        dense = thinned = once = 0.0
        for p in self._products:
            dense += p.each * p.of_out.n * p.of_in.n
            thinned += p.each * expected(p.of_out, rates).sum() * expected(p.of_in, rates).sum()
            once += p.each * p.of_out.n * p.of_in.n if p.instead_of is not None else 0.0
        gathered = sum(recipe.size(rates) for recipe in self._recipes)
        return Work(dense, float(thinned), float(gathered), once)

    def _cut(self, seed: int, member: int, whole: Whole) -> Cut:
        """The masks of one member."""
        reading = self._reading
        with masks(seed=seed, member=member), torch.no_grad():
            addresses = {draw: compiled.drawn(*draw.args, **draw.kwargs) for draw in reading.graph.draws}  # type: ignore[arg-type]
            factors = [reading.factors(site, addresses, whole.constants) for site in reading.sites]
        keep = [(f != 0).cpu().numpy() for f in factors]
        return Cut(whole, addresses, factors, Valuation(keep, self._images))


def thin(graph: Graph, *, whole: bool = False, fold: bool = True, delta: bool = True) -> Thinning:
    """Work out how the members of a recorded model can be run on fewer units.

    Args:
        graph: of the model.
        whole: from the model's inputs on; by default from the frontier on, the prefix being computed once.
        fold: put batch norms into the weights before them, which is exact but for rounding.
        delta: where the first product meets a mask that drops less than half, compute it once densely and take off
            what is dropped: y = scale (z - h_dropped W_dropped^T) + b,  z = h W^T. Rounding is then that of the dense
            product, which may be larger than that of the thinned one by the share of z that is taken off.

    Returns:
        The thinning; where nothing can be cut, `cut` is empty.
    """
    reading = Reading(graph)
    boundary = () if whole else graph.frontier
    written = write(reading, boundary, fold=fold, delta=delta and not whole)
    return Thinning(
        written.module,
        written.cut,
        written.left,
        reading,
        written.recipes,
        written.prepared,
        written.products,
        boundary,
        not whole and any("conv" in str(node.target) for node in reading.nodes),
    )


def thin_module(graph: Graph, seed: int, member: int) -> nn.Module:
    """Thinned network `member` as a module of its own, without the units that it drops.

    Its weights are thinned copies under the names that they had, with the masks' scale in them; they can be trained,
    saved and exported like any others. Noise that cannot be cut out keeps its mask, the one of this member.

    Args:
        graph: of the model.
        seed, member: which one.

    Returns:
        A module with the model's inputs and outputs.

    Example:
        >>> import torch, dropkit as dk
        >>> from dropkit.committee.graph import record
        >>> from dropkit.committee.look import committee_copy
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 64), dk.nn.Dropout(0.5), torch.nn.Linear(64, 1))
        >>> graph = record(committee_copy(model)[0], torch.zeros(2, 3))
        >>> small = thin_module(graph, seed=0, member=7)
        >>> sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        True
    """
    thinning = thin(graph, whole=True, fold=False)
    with torch.no_grad():
        arguments = thinning.arguments(seed, member)
    return specialised(thinning, arguments, graph)


def specialised(thinning: Thinning, arguments: Sequence[Any], graph: Graph) -> fx.GraphModule:
    """The suffix with a member's arguments inside: weights as parameters, the rest as buffers and numbers."""
    own = fx.Graph()
    held: dict[str, Any] = {}
    values: dict[fx.Node, Any] = {}
    placeholders = thinning.suffix.graph.find_nodes(op="placeholder")
    inputs = len(placeholders) - len(arguments)
    given = dict(zip(placeholders[inputs:], zip(thinning._recipes, arguments, strict=True), strict=True))
    for node in thinning.suffix.graph.nodes:
        if node in given:
            recipe, value = given[node]
            if isinstance(value, Tensor):
                name = recipe.name
                while name in held or any(n.startswith(name + ".") for n in held):
                    name += "_"
                is_weight = recipe.is_weight(thinning._reading)
                value = value.detach().clone()
                held[name] = nn.Parameter(value) if is_weight else value
                values[node] = own.get_attr(name)
            else:
                values[node] = value
        elif node.op == "output":
            outputs = fx.map_arg(node.args[0], values.__getitem__)
            own.output(outputs[0] if _is_plain(graph.module.graph._codegen, inputs) else outputs)
        elif (
            node.op == "call_function"
            and node.target is align
            and all(values.get(a, a) is None for a in node.args[2:4])
        ):
            values[node] = values[node.args[0]]
        else:
            values[node] = own.node_copy(node, values.__getitem__)
    original = graph.module.graph._codegen
    if not _is_plain(original, inputs):
        own.set_codegen(
            original
        )  # inputs or outputs have a structure, which it takes apart and puts together
    module = fx.GraphModule(held, own, "Thinned")
    module.graph.eliminate_dead_code()
    module.recompile()
    return module.eval()


def _is_plain(codegen: Any, inputs: int) -> bool:
    """Whether a graph goes from tensors by position to one tensor."""
    info = getattr(codegen, "pytree_info", None)
    if info is None:
        return True
    return info.in_spec == tree_structure((tuple(range(inputs)), {})) and info.out_spec == tree_structure(0)


def _channels_last(value: Any) -> Any:
    """Images with the channels of a position side by side; other values as they are."""
    is_image = isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
    return value.contiguous(memory_format=torch.channels_last) if is_image else value

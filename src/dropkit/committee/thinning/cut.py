"""What a member brings to a thinned network: its masks, and the weights and indices that are made of them."""

# What each method does stands once, in `Recipe`.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from dropkit.committee.thinning.reading import Reading
from dropkit.committee.thinning.rules import Factors, Sets
from dropkit.committee.thinning.units import Units, Valuation, expected
from dropkit.masks.address import Draw, as_int64


class Whole:
    """The weights that all members are cut from, as they are now: batch norms and the masks' scales in them.

    Args:
        reading: the model.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.constants: dict[fx.Node, Any] = {}
        self._weights: dict[Any, Tensor] = {}

    def constant(self, node: fx.Node) -> Tensor:
        """A weight, or what is computed from weights alone."""
        return self.reading.constant(node, self.constants)

    def weight(self, node: fx.Node, factors: Factors) -> Tensor:
        """A weight times what all members multiply it with, along its dims."""
        key = (node, factors)
        if key not in self._weights:
            value = self.constant(node)
            for dim, (kind, which) in factors:
                if kind == "norm":
                    value = value * self.slope(which).reshape(
                        [-1 if d == dim else 1 for d in range(value.ndim)]
                    )
                elif self.reading.sites[which].law != "hidden":
                    scale = self.reading.scale(self.reading.sites[which], self.constants).to(value.dtype)
                    value = value * (-scale if kind == "lost" else scale)
            self._weights[key] = value
        return self._weights[key]

    def slope(self, norm: fx.Node) -> Tensor:
        """(C,) what a batch norm in evaluation multiplies its channels with."""
        _, weight, _, _, variance, *_ = norm.args
        slope = torch.rsqrt(self.constant(variance) + norm.args[7])  # type: ignore[arg-type,operator]
        return slope * self.constant(weight) if isinstance(weight, fx.Node) else slope

    def shift(self, norm: fx.Node, bias: fx.Node | None) -> Tensor:
        """(C,) the bias of a product with a batch norm in it: (bias - mean) slope + shift."""
        key = (norm, bias)
        if key not in self._weights:
            _, _, shift, mean, *_ = norm.args
            value = -self.constant(mean)  # type: ignore[arg-type]
            if bias is not None:
                value = value + self.constant(bias)
            value = value * self.slope(norm)
            self._weights[key] = value + self.constant(shift) if isinstance(shift, fx.Node) else value
        return self._weights[key]


@dataclass(slots=True)
class Cut:
    """One member's masks.

    Attributes:
        whole: the weights.
        addresses: of its draws.
        factors: (n,) for each site, what its units are multiplied with.
        units: the sets of units that this member holds.
    """

    whole: Whole
    addresses: dict[fx.Node, Draw]
    factors: Sequence[Tensor]
    units: Valuation
    _made: dict[Any, Any] = field(default_factory=dict)

    def index(self, units: Units, device: torch.device) -> Tensor:
        """The held units as an index."""
        index = self.made((units, device), lambda: torch.from_numpy(self.units.indices(units)).to(device))
        assert isinstance(index, Tensor)
        return index

    def made(self, key: Any, make: Callable[[], Any]) -> Any:
        """A value that is made once for a member."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def without(self, factor: tuple[str, Any], units: Units, device: torch.device) -> Tensor | None:
        """Where held units must not count: those that a site drops, or for "lost" ones those that it keeps; or None.

        A set holds such units only to have a better size.
        """

        def find() -> Tensor | None:
            keep = self.units.keep[factor[1]][self.units.indices(units)]
            wrong = np.flatnonzero(keep if factor[0] == "lost" else ~keep)
            return torch.from_numpy(wrong).to(device) if len(wrong) else None

        found = self.made((factor, units, device), find)
        assert found is None or isinstance(found, Tensor)
        return found


class Recipe(Protocol):
    """How an argument of the thinned network is made for a member."""

    @property
    def name(self) -> str:
        """Its name in a module of its own."""

    def value(self, cut: Cut) -> Any:
        """The argument."""

    def size(self, rates: Sequence[float]) -> float:
        """How many values are gathered, on average."""

    def is_weight(self, reading: Reading) -> bool:
        """Whether it is made of a weight that is learned."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Some units of a weight, times factors along its dims.

    Attributes:
        node: the weight, or what is computed from weights.
        sets: units, for each dim.
        factors: to multiply, for dims.
    """

    node: fx.Node
    sets: Sets
    factors: Factors = ()

    @property
    def name(self) -> str:
        return str(self.node.target) if self.node.op == "get_attr" else f"constant_{self.node.name}"

    def value(self, cut: Cut) -> Tensor:
        value = cut.whole.weight(self.node, self.factors)
        cuts = [d for d, units in enumerate(self.sets) if units.kind != "all"]
        # The dim of which least is left goes first: less is moved twice.
        cuts.sort(key=lambda d: len(cut.units.indices(self.sets[d])) / self.sets[d].n)
        for d in cuts:
            value = value.index_select(d, cut.index(self.sets[d], value.device))
        for dim, factor in self.factors:
            wrong = (
                None if factor[0] in ("norm", "scale") else cut.without(factor, self.sets[dim], value.device)
            )
            if wrong is not None:
                value = value.index_fill_(dim, wrong, 0) if cuts else value.index_fill(dim, wrong, 0)
        return value

    def size(self, rates: Sequence[float]) -> float:
        if all(units.kind == "all" for units in self.sets):
            return 0.0
        return float(np.prod([expected(units, rates).sum() for units in self.sets]))

    def is_weight(self, reading: Reading) -> bool:
        return reading.constant(self.node).requires_grad


@dataclass(frozen=True, slots=True)
class Shift:
    """The bias of a product with a batch norm folded in: (b - mean) slope + shift.

    Attributes:
        norm: the batch norm.
        bias: of the product, or None.
        units: its rows.
    """

    norm: fx.Node
    bias: fx.Node | None
    units: Units

    name = "shift"

    def value(self, cut: Cut) -> Tensor:
        value = cut.whole.shift(self.norm, self.bias)
        return (
            value if self.units.kind == "all" else value.index_select(0, cut.index(self.units, value.device))
        )

    def size(self, rates: Sequence[float]) -> float:
        return float(self.units.n)

    def is_weight(self, reading: Reading) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class FactorOf:
    """What a site multiplies its held units with, shaped to a value's dims."""

    factor: tuple[str, Any]
    units: Units
    dim: int
    ndim: int
    like: fx.Node

    name = "factor"

    def value(self, cut: Cut) -> Tensor:
        like = self.like.meta["val"]
        own = cut.factors[self.factor[1]].to(like.device, like.dtype)
        made = own.index_select(0, cut.index(self.units, like.device))
        return made.reshape([-1 if d == self.dim else 1 for d in range(self.ndim)])

    def size(self, rates: Sequence[float]) -> float:
        return 0.0

    def is_weight(self, reading: Reading) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Moves:
    """Where the units of one set stand in another one.

    Attributes:
        part: "index": for each wanted unit its place among the held ones, one past the last for a missing one; None
            where both sets are the same. "fills": whether any is missing.
        held, want: the sets.
        device: of the value.
    """

    part: str
    held: Units
    want: Units
    device: torch.device

    @property
    def name(self) -> str:
        return self.part

    def value(self, cut: Cut) -> Tensor | bool | None:
        index, fills = cut.made((self.held, self.want, self.device), lambda: self._both(cut))
        result: Tensor | bool | None = index if self.part == "index" else fills
        return result

    def _both(self, cut: Cut) -> tuple[Tensor | None, bool]:
        held, want = cut.units.indices(self.held), cut.units.indices(self.want)
        if np.array_equal(held, want):
            return None, False
        place = np.full(self.held.n, len(held), np.int64)
        place[held] = np.arange(len(held))
        index = place[want]
        return torch.from_numpy(index).to(self.device), bool((index == len(held)).any())

    def size(self, rates: Sequence[float]) -> float:
        return 0.0

    def is_weight(self, reading: Reading) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Count:
    """How many units of a set are held."""

    units: Units

    name = "count"

    def value(self, cut: Cut) -> int:
        return len(cut.units.indices(self.units))

    def size(self, rates: Sequence[float]) -> float:
        return 0.0

    def is_weight(self, reading: Reading) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class AddressOf:
    """The address of a draw whose mask is not cut out.

    Attributes:
        draw: which.
        written: as numbers in a tensor, for operators; or as it was drawn, for functions.
    """

    draw: fx.Node
    written: bool

    @property
    def name(self) -> str:
        return str(self.draw.name)

    def value(self, cut: Cut) -> Tensor | Draw:
        where = cut.addresses[self.draw]
        if not self.written:
            return where
        numbers = (where.step, where.row_offset, int(where.batch_shared))
        return torch.stack((*where.tensors(), *map(as_int64, numbers)))

    def size(self, rates: Sequence[float]) -> float:
        return 0.0

    def is_weight(self, reading: Reading) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Prepared:
    """A product that is computed once for all members, on every unit: scale (x W^T) + b.

    Attributes:
        node: the product.
        x: what goes in, a node of the frontier.
        weight: the whole weight, times what all members multiply it with.
        bias: the whole bias.
    """

    node: fx.Node
    x: fx.Node
    weight: Gathered
    bias: Gathered | Shift | None

    def value(self, cut: Cut, values: dict[fx.Node, Any]) -> Tensor:
        """The product, from the frontier's values."""
        bias = (
            None if self.bias is None else self.bias.value(cut)
        )  # of every unit, which no member's masks have to say
        assert callable(self.node.target)
        rest = self.node.args[3:]
        result = self.node.target(values[self.x], self.weight.value(cut), bias, *rest)
        assert isinstance(result, Tensor)
        return result


def align(x: Tensor, dim: int, index: Tensor | None, fills: bool) -> Tensor:
    """Units of one set from those of another one; what is missing is 0.

    Args:
        x: (.., n, ..) units that are held, along dim.
        dim: of the units.
        index: (m,) which of them, n for a missing one; None for all.
        fills: whether any is missing.

    Returns:
        (.., m, ..), in the memory format of x.
    """
    if index is None:
        return x
    if (
        dim == 1
        and x.ndim == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return align(x.permute(0, 2, 3, 1), 3, index, fills).permute(0, 3, 1, 2)
    if fills:
        x = torch.cat((x, x.new_zeros((*x.shape[:dim], 1, *x.shape[dim + 1 :]))), dim)
    return x.index_select(dim, index)

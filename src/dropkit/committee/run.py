"""Ways to run members on tiles of rows: the pass that all share, once; then many members at once, or one by one.

A `Way` has two halves. `prefix` turns a tile's inputs into what no mask has touched, `member` turns that into one
member's answer. What a way has to prepare for a member, it prepares once for all tiles that are in memory together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dropkit.committee.thinning import Thinning
from dropkit.errors import LackOfMemoryError
from dropkit.masks.address import masks

Leaves = tuple[Tensor, ...]
Values = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows on their way through the model.

    Attributes:
        inputs: what the model is called with, the rows first in each.
        kwargs: the same by name.
        ids: (B,) row ids, where each row has masks of its own; None where a member's masks are those of all rows.
    """

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    ids: Tensor | None = None


class Way(ABC):
    """How members are run; never built itself."""

    seed: int

    def shared(self) -> Any:
        """What all members and tiles of one question need; made once for it."""
        return None

    @abstractmethod
    def prefix(self, tile: Tile, shared: Any = None) -> Values:
        """What no mask has touched, computed once for all members."""

    def prepare(self, member: int | Tensor, shared: Any = None) -> Any:
        """What a member needs beside the values; made once for all tiles in memory."""
        return member

    @abstractmethod
    def member(self, prepared: Any, values: Values, ids: Tensor | None) -> Leaves:
        """One member's answer, each leaf (B, *out)."""

    def several(self, values: Values, ids: Tensor | None, start: int, stop: int) -> Leaves:
        """Members start .. stop - 1 in one pass, each leaf (stop - start, B, *out)."""
        run = torch.func.vmap(lambda k: self.member(self.prepare(k), values, ids))
        leaves: Leaves = run(torch.arange(start, stop))
        return leaves


class Eager(Way):
    """The model itself, as Python runs it."""

    def __init__(self, network: nn.Module, seed: int, flatten: Callable[[Any], Leaves]) -> None:
        self.network, self.seed, self.flatten = network, seed, flatten

    def prefix(self, tile: Tile, shared: Any = None) -> Values:
        """Nothing is known to be untouched: the inputs as they are."""
        return (tile.inputs, tile.kwargs)

    def member(self, prepared: Any, values: Values, ids: Tensor | None) -> Leaves:
        """A whole pass."""
        return self.flatten(run_member(self.network, values[0], values[1], self.seed, prepared, ids)[0])


class Recorded(Way):
    """The two halves of a recorded graph."""

    def __init__(self, prefix: fx.GraphModule, suffix: fx.GraphModule, seed: int) -> None:
        self.first, self.second, self.seed = prefix, suffix, seed

    def prefix(self, tile: Tile, shared: Any = None) -> Values:
        """The frontier."""
        return tuple(self.first(*flat_inputs(tile)))

    def member(self, prepared: Any, values: Values, ids: Tensor | None) -> Leaves:
        """The suffix."""
        with masks(seed=self.seed, member=prepared, samples=ids):
            return tuple(self.second(*values))


class Thinned(Way):
    """A recorded graph whose members run on the units that they keep."""

    def __init__(self, prefix: fx.GraphModule, thinning: Thinning, seed: int) -> None:
        self.first, self.thinning, self.seed = prefix, thinning, seed

    def shared(self) -> Any:
        """The weights that members are cut from."""
        return self.thinning.whole()

    def prefix(self, tile: Tile, shared: Any = None) -> Values:
        """The frontier, and the products that each member corrects only."""
        return self.thinning.prepare(*self.first(*flat_inputs(tile)), whole=shared)

    def prepare(self, member: int | Tensor, shared: Any = None) -> Any:
        """The member's weights."""
        assert isinstance(member, int)
        return self.thinning.arguments(self.seed, member, shared)

    def member(self, prepared: Any, values: Values, ids: Tensor | None) -> Leaves:
        """The suffix on fewer units."""
        return tuple(self.thinning.suffix(*values, *prepared))


def flat_inputs(tile: Tile) -> list[Any]:
    """The tensors of a tile in the order in which a recorded graph takes them."""
    return tree_leaves((tile.inputs, tile.kwargs))


def run_member(
    network: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], seed: int, member: int | Tensor,
    ids: Tensor | None = None,
) -> tuple[Any, tuple[str, ...]]:  # fmt: skip
    """Thinned network `member` on some rows, and the names of the sites that drew a mask."""
    with masks(seed=seed, member=member, samples=ids) as context:
        # A model that writes into its input (ReLU(inplace=True) comes first) must not change what the next member sees.
        fresh, named = tree_map_only(Tensor, torch.clone, (inputs, kwargs))
        return network(*fresh, **named), context.drawn


def ask(way: Way, tiles: Sequence[Tile], start: int, stop: int, at_once: int) -> list[Leaves]:
    """Members start .. stop - 1 on some tiles.

    Args:
        way: how.
        tiles: whose prefixes are in memory together.
        start, stop: which members.
        at_once: how many go through one pass; 1 runs them one after the other, without a transform.

    Returns:
        For each tile its leaves, (stop - start, B, *out).
    """
    shared = way.shared()
    values = [way.prefix(tile, shared) for tile in tiles]
    parts: list[list[Leaves]] = [[] for _ in tiles]
    for k in range(start, stop, max(at_once, 1)):
        for i, answer in enumerate(
            _some_members(way, shared, values, tiles, k, min(k + at_once, stop), at_once)
        ):
            parts[i].append(answer)
    return [tuple(_joined(leaf) for leaf in zip(*part, strict=True)) for part in parts]


def ask_within_memory(way: Way, tiles: Sequence[Tile], start: int, stop: int, at_once: int) -> list[Leaves]:
    """`ask`, in smaller pieces where the machine has not the memory: fewer tiles, then fewer members at once.

    Raises:
        LackOfMemoryError: one member on one tile does not fit.
    """
    try:
        return ask(way, tiles, start, stop, at_once)
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error) else "no memory"
    if len(tiles) > 1:
        half = len(tiles) // 2
        parts = (tiles[:half], tiles[half:])
        return [leaves for part in parts for leaves in ask_within_memory(way, part, start, stop, at_once)]
    if min(at_once, stop - start) > 1:
        return ask_within_memory(way, tiles, start, stop, min(at_once, stop - start) // 2)
    raise LackOfMemoryError(
        f"one member on {count_rows(tiles[0])} rows does not fit the memory of this machine ({reason}). "
        "Give the committee a smaller tile."
    )


def _is_lack_of_memory(error: Exception) -> bool:
    """Torch says it with a RuntimeError of one of these texts."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "std::bad_alloc")
    )


def count_rows(tile: Tile) -> int:
    """How many rows a tile has."""
    leaves = tree_leaves((tile.inputs, tile.kwargs))
    return next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))


def _some_members(
    way: Way, shared: Any, values: list[Values], tiles: Sequence[Tile], start: int, stop: int, at_once: int
) -> list[Leaves]:
    if at_once <= 1:
        prepared = way.prepare(start, shared)
        return [
            tuple(leaf[None] for leaf in way.member(prepared, value, tile.ids))
            for value, tile in zip(values, tiles, strict=True)
        ]
    return [way.several(value, tile.ids, start, stop) for value, tile in zip(values, tiles, strict=True)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))

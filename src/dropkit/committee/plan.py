"""How a committee runs a model: what is computed once, thinned, run together, and what could not be helped.

The decision is made on the first rows that come, from the model, its rates and the shape of the rows alone, so that
neither the number of rows nor the memory that happens to be free changes a single bit of the output.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dropkit.committee.graph import Graph, RecordingError, halve, reach_kernels, record
from dropkit.committee.look import Look, Trouble, look, output_leaves, some_names
from dropkit.committee.perceptron import Kernel, find_perceptron
from dropkit.committee.run import Eager, Leaves, Recorded, Thinned, Tile, Way, count_rows
from dropkit.committee.thinning import Thinning, thin
from dropkit.conversion.records import Conversion
from dropkit.masks.address import masks

How = Literal["thinned", "batched", "loop", "once"]

# What one chunk of members may hold of the widest layer. From 4 to 16 MiB ran alike where it was tried; less pays
# for more passes, more takes memory for nothing.
CHUNK_BYTES = 8 << 20
# A model is recorded where its members' work is worth the second or so that this takes: multiply-adds of all members.
RECORD_FROM = 2e9
KERNEL_MEMBERS = 1 << 14  # of one call of the perceptrons' kernel
# What predicted seconds are made of; only their ratios matter. Multiply-adds and bytes a second, seconds a call.
RATE, BANDWIDTH, CALL, CALL_TOGETHER = 3e10, 8e9, 6e-6, 4e-5
MOVED_TOGETHER = 1.5  # many members' activations leave the cache between two operators


@dataclass(frozen=True, slots=True)
class Plan:
    """What a committee decided about a model and a shape of rows; `print` explains it.

    Attributes:
        how: "thinned": member after member, each on smaller weights; "batched": many members in one pass; "loop":
            member after member on the whole weights; "once": no mask acts, so one pass serves all.
        reason: why.
        recorded: whether the model could be written down as a graph, so that what no mask touches is computed once.
        sites: the places that draw a mask, in the order of the pass.
        silent: noisy places that stay silent.
        rows: of one pass.
        members_at_once: members of one pass.
        widest: the most values per row that an operation puts out.
        bytes: rows * members_at_once * widest * size of a value; a pass holds a few times that.
        prefix: multiply-adds computed once, for these rows.
        suffix: multiply-adds of each member, as run.
        dense: multiply-adds of one whole pass of the model.
        notes: what was thinned and what could not be helped, a sentence each.
        kept: bytes of a tile that are kept between members.
        rebuild: as many values as the output has tensors -> its structure with these in their places.
        seconds: predicted for one member and these rows, by way; only the ratios mean something.
    """

    how: How
    reason: str
    recorded: bool
    sites: tuple[str, ...]
    silent: tuple[str, ...]
    rows: int
    members_at_once: int
    widest: int
    bytes: int
    prefix: float = 0.0
    suffix: float = 0.0
    dense: float = 0.0
    notes: tuple[str, ...] = ()
    kept: int = 0
    rebuild: Callable[[Sequence[Any]], Any] = field(default=lambda values: values[0], repr=False)
    seconds: dict[str, float] = field(default_factory=dict)

    def runs_as(self, other: Plan) -> bool:
        """Whether rows of both can be run side by side."""
        return (self.how, self.members_at_once) == (other.how, other.members_at_once)

    def __str__(self) -> str:
        lines = [
            f"{self.how}: {self.reason}",
            f"sites: {some_names(self.sites, 8) or 'none'}",
            f"one pass: {self.members_at_once} members x {self.rows} rows, widest layer {self.widest} values, "
            f"{self.bytes / 2**20:.1f} MiB",
        ]
        if self.recorded and self.dense:
            lines.append(
                f"computed once: {self.prefix / self.dense:.0%} of a pass; for each member: "
                f"{self.suffix / self.dense:.0%}"
            )
        if self.silent:
            lines.append(f"silent: {some_names(self.silent)}")
        return "\n".join((*lines, *self.notes))


def make_plan(
    network: nn.Module,
    tile: Tile,
    seed: int,
    members: int,
    allow: Collection[Trouble],
    conversion: Conversion | None,
    grad: bool,
    ways: dict[Any, Ways],
) -> tuple[Plan, Way]:
    """Look at a copied network with some rows, and decide how its members are run.

    Args:
        network: a committee's copy.
        tile: rows of the size that will come.
        seed, members: of the committee.
        allow: troubles that are accepted.
        conversion: what was converted in the copy.
        grad: whether the answer is to be differentiated.
        ways: of graphs recorded so far that take any number of rows, by the shape of a row; one may be added.

    Raises:
        NoMaskError, OptionError, ShapeError: as `look`.
    """
    seen = look(network, tile, seed, allow, conversion)
    eager = Eager(network, seed, lambda result: output_leaves(result, count_rows(tile)))
    choice = _Choice(tile, seen, eager)
    if not seen.drops:
        return choice.made(
            "once", "every rate is 0 or no mask acts, so all members are the same network", eager
        )
    if not grad and tile.ids is None and (found := choice.by_kernel(network)):
        return found
    if seen.operations * members < RECORD_FROM:
        return choice.of_the_model("Too little work to be worth recording the model as a graph.")
    leaves = [leaf for leaf in tree_leaves((tile.inputs, tile.kwargs)) if isinstance(leaf, Tensor)]
    kind = tuple((tuple(leaf.shape[1:]), leaf.dtype) for leaf in leaves)
    if kind in ways and count_rows(tile) > 1:
        return choice.of_the_graph(ways[kind])
    try:
        graph = record(network, tile.inputs, tile.kwargs, how="kernels")
    except RecordingError as error:
        return choice.of_the_model(
            f"The model could not be recorded as a graph ({error}), so what no mask touches is not set apart."
        )
    found_ways = Ways.of(graph, seed)
    if graph.is_open:
        ways[kind] = found_ways
    return choice.of_the_graph(found_ways)


@dataclass(frozen=True, slots=True)
class Ways:
    """The ways to run a recorded model; they serve rows of all numbers that the graph takes.

    Attributes:
        recorded: its two halves as they are.
        thinned: the same on the units that a member keeps.
        together: whether torch.func.vmap can follow all its masks.
    """

    recorded: Recorded
    thinned: Thinned
    together: bool

    @classmethod
    def of(cls, graph: Graph, seed: int) -> Ways:
        """From a graph."""
        halves = halve(graph)
        suffix, together = reach_kernels(halves.suffix)
        recorded = Recorded(halves.prefix, suffix, seed)
        return cls(recorded, Thinned(halves.prefix, thin(graph), seed), together)


class _Choice:
    """The ways to run one model on one shape of rows, and what speaks for each.

    Args:
        tile: the rows.
        seen: the first look.
        eager: the model as it is.
    """

    def __init__(self, tile: Tile, seen: Look, eager: Eager) -> None:
        self.tile, self.seen, self.eager = tile, seen, eager
        self.rows, self.size = count_rows(tile), seen.leaves[0].element_size()
        self.notes: list[str] = []
        self.figures: dict[str, Any] = {"dense": seen.operations, "rebuild": seen.rebuild}
        self.widest = seen.widest
        self._alone: Leaves | None = None

    @property
    def alone(self) -> Leaves:
        """What members 0 and 1 put out as the model runs them, one after the other: what every way is held to."""
        if self._alone is None:
            second = self.eager.member(1, self.eager.prefix(self.tile), self.tile.ids)
            self._alone = _stacked((self.seen.leaves, second))
        return self._alone

    @property
    def at_once(self) -> int:
        """How many members' widest layers fit one chunk: a power of two, so that few shapes occur."""
        held = max(self.rows * self.widest * self.size, 1)
        return 1 << max(int(math.log2(max(CHUNK_BYTES / held, 1))), 0)

    def made(self, how: How, reason: str, way: Way, at_once: int = 1) -> tuple[Plan, Way]:
        """The plan."""
        held = self.rows * self.widest * self.size * at_once
        recorded, seen = isinstance(way, Recorded | Thinned), self.seen
        plan = Plan(
            how, reason, recorded, seen.sites, seen.silent, self.rows, at_once, self.widest, held,
            notes=tuple(self.notes), **self.figures,
        )  # fmt: skip
        return plan, way

    def by_kernel(self, network: nn.Module) -> tuple[Plan, Way] | None:
        """For perceptrons of narrow layers."""
        perceptron = find_perceptron(network)
        if perceptron is None:
            return None
        kernel = Kernel(perceptron, self.eager.seed)
        values = kernel.prefix(self.tile)
        if values[0].ndim != 2 or not _agree(kernel.several(values, None, 0, 2), self.alone):
            return None
        reason = "a small perceptron: one kernel runs all members, each without its dropped units"
        return self.made("thinned", reason, kernel, KERNEL_MEMBERS)

    def of_the_model(self, note: str) -> tuple[Plan, Way]:
        """Without a graph: many members in one pass where memory and torch.func.vmap allow it."""
        self.notes.append(note)
        one = "one member fills the memory meant for a pass" if self.at_once == 1 else ""
        why = one or self.why_not_together(self.eager)
        if why:
            return self.made("loop", why, self.eager)
        return self.made("batched", "members run together", self.eager, self.at_once)

    def of_the_graph(self, ways: Ways) -> tuple[Plan, Way]:
        """The way with the least predicted time that gives the model's numbers."""
        way = ways.recorded
        measured = _measure(way, self.tile)
        both = (way.member(k, measured.values, self.tile.ids) for k in (0, 1))
        if not _agree(_stacked(both), self.alone):
            return self.of_the_model(
                "The recorded graph gives other numbers than the model, so it is not used."
            )
        self.widest = max(self.widest, measured.widest)
        thinning = ways.thinned.thinning if self.tile.ids is None else None
        work = self._work(measured, thinning)
        seconds = self._seconds(measured, thinning, work, together=ways.together and self.at_once > 1)
        self.figures |= {"prefix": measured.prefix, "suffix": measured.suffix, "seconds": seconds}
        self.figures["kept"] = _bytes(measured.values)
        once = "what no mask has touched is computed once"
        while True:
            how = min(seconds, key=seconds.__getitem__)
            if how == "thinned" and thinning is not None:
                thinned = ways.thinned
                values = thinned.prefix(self.tile)
                if _agree(
                    _stacked(thinned.member(thinned.prepare(k), values, None) for k in (0, 1)), self.alone
                ):
                    self.figures |= {"suffix": work, "kept": _bytes(values)}
                    return self.made(
                        "thinned", f"each member runs on the units that it keeps; {once}", thinned
                    )
                why = "the thinned network gives other numbers than the model"
            elif how == "batched":
                why = self.why_not_together(way)
                if not why:
                    return self.made("batched", f"members run together; {once}", way, self.at_once)
            else:
                return self.made("loop", f"members run one after the other; {once}", way)
            self.notes.append(f"Not {how}: {why}.")
            del seconds[how]

    def why_not_together(self, way: Way) -> str:
        """Why members 0 and 1 cannot be run in one pass; "" where they can."""
        try:
            with warnings.catch_warnings():
                # torch.func warns where it would fall back on a slow loop of its own.
                warnings.simplefilter("error")
                together = way.several(way.prefix(self.tile), self.tile.ids, 0, 2)
        except Exception as error:  # the loop ran: whatever is wrong lies between the model and vmap
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"torch.func.vmap cannot run this model ({lines[0]})"
        if _agree(together, self.alone):
            return ""
        return "torch.func.vmap gives this model other numbers than one member after the other"

    def _work(self, measured: Measured, thinning: Thinning | None) -> float:
        """Multiply-adds of a thinned member; notes say where it is thinned, and where not and why."""
        if thinning is None:
            return measured.suffix
        whys: dict[str, list[str]] = {}
        for name, why in thinning.left:
            whys.setdefault(why, []).append(name)
        work = thinning.work()
        if thinning.cut:
            self.notes.append(f"Thinned at {some_names(thinning.cut, 8)}: {work}.")
        self.notes += [f"Not thinned at {some_names(names)}: {why}." for why, names in whys.items()]
        return max(measured.suffix - self.rows * (work.dense - work.thinned), 0.0)

    def _seconds(
        self, measured: Measured, thinning: Thinning | None, operations: float, together: bool
    ) -> dict[str, float]:
        """Predicted for one member, by way."""
        moving, calling = measured.moved / BANDWIDTH, measured.calls * CALL
        seconds = {"loop": calling + measured.suffix / RATE + moving}
        if together:
            calls = measured.calls * CALL_TOGETHER / self.at_once
            seconds["batched"] = calls + measured.suffix / RATE + MOVED_TOGETHER * moving
        if thinning is not None and thinning.cut:
            work = thinning.work()
            share = math.sqrt(work.thinned / work.dense) if work.dense else 1.0
            gathering = 2 * work.gathered * self.size / BANDWIDTH
            seconds["thinned"] = calling + operations / RATE + share * moving + gathering
        return seconds


def _stacked(members: Iterable[Leaves]) -> Leaves:
    """Leaves of several members, (M, B, *out)."""
    return tuple(torch.stack(parts) for parts in zip(*members, strict=True))


def _agree(ours: Leaves, theirs: Leaves) -> bool:
    """Whether two ways give the same function, up to rounding."""
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4 * _scale(b), equal_nan=True)
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )


def _scale(values: Tensor) -> float:
    """The largest finite size; 1 where there is none."""
    return float(values.abs().nan_to_num(0.0, posinf=0.0).max()) or 1.0 if values.numel() else 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What one tile of a recorded model costs.

    Attributes:
        values: of the frontier.
        prefix, suffix: multiply-adds.
        calls: operators of the suffix.
        moved: bytes that they read and write.
        widest: the most values per row that one of them puts out.
    """

    values: tuple[Any, ...]
    prefix: float
    suffix: float
    calls: int
    moved: float
    widest: int


class _Counting(fx.Interpreter):
    """Runs a graph and counts what its operators put out."""

    def __init__(self, module: fx.GraphModule, rows: int) -> None:
        super().__init__(module)
        self.rows, self.calls, self.moved, self.widest = rows, 0, 0.0, 0

    def run_node(self, node: fx.Node) -> Any:
        """One operator."""
        result = super().run_node(node)
        if node.op == "call_function":
            self.calls += 1
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf._base is None:
                    self.moved += 2.0 * leaf.numel() * leaf.element_size()
                    self.widest = max(self.widest, -(-leaf.numel() // self.rows))
        return result


def _measure(way: Recorded, tile: Tile) -> Measured:
    with FlopCounterMode(display=False) as first:
        values = way.prefix(tile)
    counting = _Counting(way.second, count_rows(tile))
    with FlopCounterMode(display=False) as second, masks(seed=way.seed, member=0, samples=tile.ids):
        counting.run(*values)
    prefix, suffix = (counter.get_total_flops() / 2 for counter in (first, second))
    return Measured(values, prefix, suffix, counting.calls, counting.moved, counting.widest)


def _bytes(values: tuple[Any, ...]) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _at_once(row_bytes: int) -> int:
    """How many members' widest layers fit one chunk: a power of two, so that few shapes occur."""
    return 1 << max(int(math.log2(max(CHUNK_BYTES / max(row_bytes, 1), 1))), 0)

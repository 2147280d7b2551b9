"""A committee of thinned networks: the front door to Monte Carlo dropout.

Member k is one network, the model with the units taken out that its masks drop: the same for every row, batch,
order and process. So its answers may be compared between rows, differentiated, and asked for again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dropkit.committee.averages import Averages, averages
from dropkit.committee.graph import Graph, RecordingError, record
from dropkit.committee.look import TROUBLES, Trouble, committee_copy, every_layer_runs
from dropkit.committee.moments import Covariance, moments
from dropkit.committee.moments.record import Moments
from dropkit.committee.outputs import Inputs, call_arguments, count_rows, flatten, joined, moved, take
from dropkit.committee.plan import Plan, Ways, make_plan
from dropkit.committee.prediction import (
    ClassificationPrediction,
    Prediction,
    RegressionPrediction,
    warn_of_rows,
)
from dropkit.committee.run import Leaves, Tile, Way, ask, ask_within_memory, run_member
from dropkit.committee.summary import Summary
from dropkit.committee.thinning import thin_module
from dropkit.committee.tolerance import Tolerance, draw_leaves_until
from dropkit.errors import DropkitWarning, MomentsError, NoMaskError, OptionError, ShapeError
from dropkit.masks.address import MEMBERS, SEEDS

if TYPE_CHECKING:
    from dropkit.committee.calibrated import CalibratedCommittee
    from dropkit.committee.onnx import Export

Likelihood = Literal["point", "gaussian", "categorical"]
LIKELIHOODS: tuple[Likelihood, ...] = ("point", "gaussian", "categorical")
CHECK_ROWS = 32  # on which moments are compared with sampled members


class Committee:
    """M thinned networks of one model, asked together.

    Rows go through the model in tiles, the last one of what is left. The members' answers are the same bit for bit
    under any split of the rows at multiples of the tile, and with `predict_chunks` under any split at all (on one
    machine, with one number of threads); in other company a row's answer may differ in its last bits, as matrix
    products round by their sizes.

    Args:
        model: any module whose output tensors have the rows first. Dropout of torch's own, and calls of
            torch.nn.functional.dropout, are converted (`dropkit.convert`). The model is not changed: the committee
            works on a copy of its structure, in evaluation mode (BatchNorm uses and keeps its running statistics),
            which shares weights and buffers. Rates and structure are those of now.
        members: M, at least 2.
        seed: which committee, 64 bits. Member k does not depend on M.
        likelihood: what the output is. "point": numbers (rows, *out). "gaussian": (rows, ..., 2), mean and log
            variance. "categorical": (rows, C), logits.
        tile: rows of one pass.
        per_row: False: member k is one function, the same for every row. True: each row has masks of its own in each
            member, as in the literature on Monte Carlo dropout; "member" k is then no function, and rows that are
            asked together are independent. A row is known by its id.
        memory: bytes that may be held beside the answer; it bounds what is kept of the rows between members.
        allow: troubles that are accepted and otherwise raise: "no spread", "silent sites", "dropout on the output",
            "other randomness".

    Raises:
        OptionError: an option is outside its range.

    Example:
        >>> import torch, dropkit as dk
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), dk.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        >>> prediction = dk.Committee(model, members=16, seed=0).predict(torch.zeros(5, 3))
        >>> prediction.mean.shape, prediction.members
        (torch.Size([5, 1]), 16)

    Source: Gal and Ghahramani 2016, arXiv:1506.02142, sec. 4; there each row has masks of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        members: int = 64,
        seed: int = 0,
        likelihood: Likelihood = "point",
        *,
        tile: int = 256,
        per_row: bool = False,
        memory: int = 512 << 20,
        allow: Sequence[Trouble] = (),
    ) -> None:
        if likelihood not in LIKELIHOODS:
            raise OptionError(f"likelihood={likelihood!r} was given; it is one of {', '.join(LIKELIHOODS)}.")
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"a {type(model).__name__} was given; a committee is made of a torch.nn.Module."
            )
        if isinstance(allow, str) or not set(allow) <= set(TROUBLES):
            raise OptionError(
                f"allow={allow!r} was given; it holds some of {', '.join(map(repr, TROUBLES))}."
            )
        self.members = _whole("members", members, 2, MEMBERS)
        self.seed = _whole("seed", seed, 0, SEEDS - 1)
        self.tile = _whole("tile", tile, 1, 2**31)
        self.memory = _whole("memory", memory, 1, 2**62)
        self.likelihood = likelihood
        self.per_row = per_row
        self.allow = frozenset(allow)
        self.network, self.conversion = committee_copy(model)
        self._plans: dict[tuple[Any, ...], tuple[Plan, Way]] = {}
        self._graphs: dict[Any, Graph] = {}
        self._ways: dict[Any, Ways] = {}

    def __repr__(self) -> str:
        return (
            f"Committee({type(self.network).__name__}, members={self.members}, seed={self.seed}, "
            f"likelihood={self.likelihood!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "_plans": {},
            "_graphs": {},
            "_ways": {},
        }  # a plan is made anew where the copy runs

    def predict(
        self,
        x: Inputs,
        *,
        tolerance: Tolerance | None = None,
        maximum: int = 4096,
        grad: bool = False,
        ids: Tensor | None = None,
    ) -> Any:
        """Ask the committee about rows.

        Args:
            x: (B, ...), a tensor or an array (also one on disk: it is read tile by tile); or what the model takes: a
                tuple of arguments or a mapping of named ones, with the rows first in each.
            tolerance: draw members until the standard error of the mean (of the probabilities) and that of the spread
                (of the mutual information) are at most this, row by row; or a pair, one each. In the unit of the
                output. Nothing but sums is kept, however many members it takes.
            maximum: with a tolerance, where to stop in any case; then a `DropkitWarning` says what was reached.
            grad: True keeps the graph, so that the answer can be differentiated by x and by the weights.
            ids: (B,) which rows these are, where each has masks of its own; by default 0, 1, ...

        Returns:
            A `ClassificationPrediction` for likelihood "categorical", else a `RegressionPrediction`; with a tolerance
            a `ClassificationSummary` or `RegressionSummary`. A model that puts out a structure (dict, tuple,
            dataclass) gets the same structure with one of these in place of each tensor.

        Raises:
            NoMaskError: no mask acts in the model, some noise stays silent, or all members agree to the last bit.
            ShapeError: the output is not what the likelihood says.
            OptionError: tolerance or maximum are out of range, or the model draws other random numbers.
            LackOfMemoryError: one member on one tile does not fit the memory of the machine.
        """
        if tolerance is None:
            leaves, rebuild = self._leaves(x, 0, self.members, grad, self._read, ids)
            answer = [self._prediction(leaf) for leaf in leaves]
            for prediction in answer:
                warn_of_rows(prediction.not_finite, stacklevel=2)
            return rebuild(answer)
        if grad:
            raise OptionError(
                "tolerance and grad=True were given; what is differentiated has a fixed number of members."
            )
        _whole("maximum", maximum, self.members, MEMBERS)
        rows = count_rows(x)
        ids = self._ids(0, rows) if ids is None else ids

        def some(index: Tensor, start: int, stop: int) -> list[Tensor]:
            filled = self._filled(index)
            part = None if ids is None else ids[filled]
            leaves, _ = self._leaves(take(x, filled), start, stop, False, self._read, part, check=False)
            return [leaf[:, : len(index)] for leaf in leaves]

        found = draw_leaves_until(
            some, rows, tolerance, maximum, first=self.members, likelihood=self.likelihood
        )
        rebuild = self._planned(self._tile(x, 0, min(rows, self.tile), ids))[0].rebuild
        if rows and "no spread" not in self.allow and all(_agree_on_all(each) for each in found):
            raise NoMaskError(self._no_spread_message(x, rows))
        return rebuild(found)

    def predict_chunks(self, chunks: Iterable[Inputs]) -> Iterator[Any]:
        """Ask about rows that come in pieces of any size; the answers come tile by tile.

        Whatever the pieces, the tiles are the same, and so is every bit of the answers and of what is computed from
        them. (The members' answers are also those of `predict` on all rows at once, bit for bit; their mean over a
        larger table may be rounded differently in the last place, as sums are vectorised by the shape.)

        Args:
            chunks: (B_i, ...) each, or structures as in `predict`.

        Yields:
            Predictions of `tile` rows, the last one of what is left; in order, their rows are those of the chunks.
        """
        waiting: list[Inputs] = []
        done = 0
        for chunk in chunks:
            waiting.append(self._moved(chunk))
            if sum(count_rows(part) for part in waiting) >= self.tile:
                rows = joined(waiting)
                full = count_rows(rows) // self.tile * self.tile
                for at in range(0, full, self.tile):
                    yield self.predict(take(rows, slice(at, at + self.tile)), ids=self._ids(done, self.tile))
                    done += self.tile
                waiting = [take(rows, slice(full, None))]
        if sum(count_rows(part) for part in waiting):
            rows = joined(waiting)
            yield self.predict(rows, ids=self._ids(done, count_rows(rows)))

    def samples(self, x: Inputs, *, grad: bool = False, ids: Tensor | None = None) -> Any:
        """What each member puts out, as it is: (M, B, *out), in the structure of the model's output."""
        leaves, rebuild = self._leaves(x, 0, self.members, grad, lambda output: output, ids)
        return rebuild(leaves)

    def member(self, k: int, x: Inputs | None = None) -> nn.Module:
        """Thinned network k as a module of its own, a function without chance.

        It gives row k of `samples`: the same network, so the same numbers up to rounding, which depends on how many
        rows and members go through a matrix product at once.

        Args:
            k: 0 to M - 1.
            x: rows of the kind that will come, at least two. With them the module is the smaller network itself, its
                weights thinned copies without the units that the member drops, where the model can be recorded. Without
                them it is a `Member`, which shares the weights of the model and masks them.

        Raises:
            OptionError: there is no such member.
        """
        _whole("k", k, 0, self.members - 1)
        if x is None:
            return Member(self.network, self.seed, k)
        try:
            graph = self.graph(x)
        except RecordingError as error:
            warnings.warn(
                f"the model could not be recorded as a graph ({error}), so member {k} is not thinned.",
                DropkitWarning,
                stacklevel=2,
            )
            return Member(self.network, self.seed, k)
        return thin_module(graph, self.seed, k)

    def graph(self, x: Inputs) -> Graph:
        """The model as a graph of torch's operators, recorded on rows of this kind.

        Raises:
            RecordingError: the model cannot be recorded.
        """
        tile = self._tile(x, 0, min(count_rows(x), self.tile), None)
        with self._ready(grad=False):
            return record(self.network, tile.inputs, tile.kwargs)

    def plan(self, x: Inputs) -> Plan:
        """How rows of this shape are run, and why; decided on the first rows that come, then kept."""
        rows = min(count_rows(x), self.tile)
        return self._planned(self._tile(x, 0, rows, self._ids(0, rows)))[0]

    def moments(self, x: Tensor, *, covariance: Covariance = "diagonal", check: int = 64) -> Moments:
        """Mean and variance of the members' outputs in one pass, without sampling.

        Exact where only linear maps follow the only mask. Else an approximation, whose error against sampled members is
        measured on the first rows and stands in the record. Classes: of the logits; `Moments.probabilities` reads them.

        Args:
            x: (B, ...).
            covariance: as in `dropkit.committee.moments.moments`.
            check: how many members are sampled for the comparison, on at most 32 rows; 0 for none.

        Raises:
            MomentsError: the model cannot be recorded, or an operator below a mask has no rule.
        """
        rows = self._moved(x)
        try:
            found = moments(self._graph_of_a_row(rows[:1]), rows, covariance=covariance)
        except RecordingError as error:
            raise MomentsError(
                f"the model could not be recorded as a graph ({error}). Ask members: predict(x)."
            ) from error
        if found.exact or not check or not len(rows):
            return found
        few = self._leaves(rows[:CHECK_ROWS], 0, max(check, 3), False, lambda output: output, None)[0]
        return found.checked(few[0])

    def _graph_of_a_row(self, row: Tensor) -> Graph:
        kind = ("one row", tuple(row.shape), row.dtype)
        if kind not in self._graphs:
            self._graphs[kind] = self.graph(row)
        return self._graphs[kind]

    def averages(self, x: Tensor, y: Tensor | None = None) -> Averages:
        """Weight scaling, the arithmetic and the geometric average of the members beside each other.

        Args:
            x: (B, ...).
            y: (B,) classes or (B, *out) numbers, to score them by.
        """
        with self._ready(grad=False):
            plain = self.network(self._moved(x))
        return averages(plain, self.samples(x), y, self.likelihood)

    def calibrate(self, x: Inputs, y: Tensor, **options: Any) -> CalibratedCommittee:
        """Make the committee's promises agree with rows that trained nothing; see `dropkit.committee.calibrate`."""
        from dropkit.committee.calibrated import calibrate

        return calibrate(self, x, y, **options)

    def export(self, path: str | Path, x: Tensor, **options: Any) -> Export:
        """Write the committee as an ONNX file, its masks inside; see `dropkit.committee.export`."""
        from dropkit.committee.onnx import export

        return export(self, path, x, **options)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the committee as a directory of safetensors and JSON; see `dropkit.committee.save`."""
        from dropkit.committee.saving import save

        return save(self, path, force=force)

    @staticmethod
    def load(path: str | Path, model: nn.Module | Callable[[], nn.Module]) -> Committee:
        """A committee that `save` wrote, every member as it was; see `dropkit.committee.load`."""
        from dropkit.committee.saving import load

        return load(path, model)

    def _planned(self, tile: Tile, grad: bool = False) -> tuple[Plan, Way]:
        leaves = tree_leaves((tile.inputs, tile.kwargs))
        key = (grad, *((tuple(leaf.shape), leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)))
        if key not in self._plans:
            with self._ready(grad=False):
                self._plans[key] = make_plan(
                    self.network,
                    tile,
                    self.seed,
                    self.members,
                    self.allow,
                    self.conversion,
                    grad,
                    self._ways,
                )
        return self._plans[key]

    @contextmanager
    def _ready(self, grad: bool) -> Iterator[None]:
        with torch.set_grad_enabled(grad), every_layer_runs(self.network):
            yield

    def _leaves(
        self,
        x: Inputs,
        start: int,
        stop: int,
        grad: bool,
        read: Callable[[Tensor], Tensor],
        ids: Tensor | None,
        check: bool = True,
    ) -> tuple[list[Tensor], Callable[[Sequence[Any]], Any]]:
        """Members start .. stop - 1 of each tensor of the output, (stop - start, B, *out); and its structure."""
        rows = count_rows(x)
        ids = self._ids(0, rows) if ids is None else ids
        tiles: list[Leaves] = []
        with self._ready(grad):
            for block, plan, way in self._blocks(x, rows, ids, grad):
                for leaves in self._ask(way, block, plan, start, stop):
                    tiles.append(
                        tuple(map(read, leaves))
                    )  # tile by tile: exp and softmax round by their place, too
        found = [torch.cat(parts, dim=1)[:, :rows] for parts in zip(*tiles, strict=True)]
        looked = check and rows and plan.how != "once" and "no spread" not in self.allow
        if looked and all(map(_all_agree, found)):
            raise NoMaskError(self._no_spread_message(x, rows))
        return found, plan.rebuild

    def _filled(self, index: Tensor) -> Tensor:
        """Some rows, the last of them again until the last tile holds a power of two: each size is planned once."""
        left = len(index) % self.tile
        size = min(1 << max(left - 1, 0).bit_length(), self.tile)
        return torch.cat((index, index[-1:].expand(size - left))) if left else index

    def _no_spread_message(self, x: Inputs, rows: int) -> str:
        return (
            f"masks act at {', '.join(self.plan(x).sites)}, yet all members agree to the last bit on all {rows} rows: "
            "what they drop does not reach the output. Are the inputs or the activations all 0? Or accept it: "
            "allow=('no spread',)."
        )

    def _blocks(
        self, x: Inputs, rows: int, ids: Tensor | None, grad: bool
    ) -> Iterator[tuple[list[Tile], Plan, Way]]:
        """Tiles of one size that are run together: what is kept of them between members fits the memory."""
        block: list[Tile] = []
        held: tuple[Plan, Way] | None = None
        for at in range(0, max(rows, 1), self.tile):
            tile = self._tile(x, at, min(rows - at, self.tile), ids)
            planned = self._planned(tile, grad)
            full = held is not None and (len(block) + 1) * held[0].kept > self.memory
            if (
                block
                and held is not None
                and (full or not planned[0].runs_as(held[0]) or planned[1] is not held[1])
            ):
                yield block, *held
                block = []
            held = planned
            block.append(tile)
        if held is not None:
            yield block, *held

    def _ask(self, way: Way, tiles: list[Tile], plan: Plan, start: int, stop: int) -> list[Leaves]:
        if plan.how == "once":
            answers = ask(way, tiles, 0, 1, 1)
            return [
                tuple(leaf.expand(stop - start, *leaf.shape[1:]) for leaf in leaves) for leaves in answers
            ]
        return ask_within_memory(way, tiles, start, stop, plan.members_at_once)

    def _ids(self, start: int, rows: int) -> Tensor | None:
        return torch.arange(start, start + rows) if self.per_row else None

    def _moved(self, x: Inputs) -> Any:
        """Rows in the dtype and on the device of the weights; integers (indices) keep their dtype."""
        weight = next((p for p in self.network.parameters() if p.is_floating_point()), None)
        device, dtype = (None, None) if weight is None else (weight.device, weight.dtype)
        return moved(x, device, dtype)

    def _tile(self, x: Inputs, at: int, rows: int, ids: Tensor | None) -> Tile:
        """Rows at .. at + rows - 1; where there are none, one of zeros, so that the output's shape is known."""
        part = self._moved(take(x, slice(at, at + rows)))
        flat = flatten(part)
        # Copies, so that they begin where memory is aligned: matrix products round by that, too.
        leaves = [leaf.clone(memory_format=torch.contiguous_format) for leaf in flat.leaves]
        if not rows:
            leaves = [leaf.new_zeros((1, *leaf.shape[1:])) for leaf in leaves]
        inputs, kwargs = call_arguments(flat.rebuild(leaves))
        if self.per_row:
            ids = self._ids(0, 1) if not rows or ids is None else ids[at : at + rows]
        return Tile(inputs, kwargs, ids if self.per_row else None)

    def _read(self, output: Tensor) -> Tensor:
        """(M, B, *out) of the model -> numbers, mean and variance, or class probabilities."""
        given, last = tuple(output.shape[1:]), output.shape[-1] if output.ndim > 2 else 0
        if self.likelihood == "gaussian":
            if last != 2:
                raise ShapeError(f"outputs {given} were given; likelihood='gaussian' needs (rows, ..., 2).")
            return torch.stack((output[..., 0], output[..., 1].exp()), dim=-1)
        if self.likelihood == "categorical":
            if output.ndim != 3 or last < 2:
                raise ShapeError(
                    f"outputs {given} were given; likelihood='categorical' needs (rows, C) with C >= 2."
                )
            return output.softmax(dim=-1)
        return output

    def _prediction(self, samples: Tensor) -> Prediction:
        if self.likelihood == "categorical":
            return ClassificationPrediction(samples)
        if self.likelihood == "gaussian":
            return RegressionPrediction(samples[..., 0], samples[..., 1])
        return RegressionPrediction(samples)


class Member(nn.Module):
    """Thinned network k of a committee: a function, without chance, for use wherever a module is.

    It stays in evaluation mode, whatever mode is asked for, and shares its weights with the committee and the
    model (`copy.deepcopy` gives one with weights of its own).
    """

    def __init__(self, network: nn.Module, seed: int, member: int) -> None:
        super().__init__()
        self.network = network
        self.seed = seed
        self.member = member
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """(B, ...) -> (B, *out), whatever the model takes and gives."""
        with every_layer_runs(self.network):
            return run_member(self.network, args, kwargs, self.seed, self.member)[0]

    def train(self, mode: bool = True) -> Member:
        """Stays as it is: in training mode BatchNorm would look at the batch, and the member would be no function."""
        return super().train(False)

    def extra_repr(self) -> str:
        """Which member of which committee."""
        return f"member={self.member}, seed={self.seed}"


def _all_agree(samples: Tensor) -> bool:
    """Whether all members are equal; the first two tell mostly."""
    return bool((samples[:2] == samples[:1]).all()) and bool((samples == samples[:1]).all())


def _agree_on_all(summary: Summary) -> bool:
    """Whether all members said the same of all rows."""
    return _all_agree(summary.kept.samples) and not bool(summary.standard_error.nan_to_num().any())


def _whole(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionError(f"{name}={value!r} was given; a whole number from {low} to {high} is allowed.")
    return value

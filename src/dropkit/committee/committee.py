"""A committee of thinned networks: the front door to Monte Carlo dropout.

Member k is one network, the model with the units taken out that its masks drop: the same for every row, batch,
order and process. So its answers may be compared between rows, differentiated, and asked for again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dropkit.committee.plan import Plan, committee_copy, every_layer_runs, make_plan, run_member
from dropkit.committee.prediction import ClassificationPrediction, Prediction, RegressionPrediction
from dropkit.errors import DropkitWarning, OptionError, ShapeError
from dropkit.masks.address import MEMBERS, SEEDS

Likelihood = Literal["point", "gaussian", "categorical"]
LIKELIHOODS: tuple[Likelihood, ...] = ("point", "gaussian", "categorical")
Rows = Tensor | np.ndarray[Any, Any]


class Committee:
    """M thinned networks of one model, asked together.

    Rows go through the model in tiles of fixed size, the last one filled up by repeating its last row. Matrix
    products give other last bits for other batch sizes; with tiles, row i meets the same sizes at the same place
    whether it comes with ten rows or a million. So the members' answers are the same bit for bit under any split at
    multiples of the tile, and with `predict_chunks` under any split at all (on one machine, with one number of
    threads).

    Memory: tile * members at once * widest layer * 4 bytes, a few times over (`plan(x)` says it), and the answer,
    members * rows * outputs * 4 bytes.

    Args:
        model: any module that maps (rows, ...) to (rows, *out) and draws masks. It is not changed: the committee
            works on a copy of its structure, in evaluation mode (BatchNorm uses and keeps its running statistics),
            which shares weights and buffers. Rates and structure are those of now.
        members: M, at least 2.
        seed: which committee, 64 bits. Member k does not depend on M.
        likelihood: what the output is. "point": numbers (rows, *out). "gaussian": (rows, ..., 2), mean and log
            variance. "categorical": (rows, C), logits.
        tile: rows of one pass.
        allow_no_spread: True accepts, without a word, a model in which nothing is dropped.

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
        allow_no_spread: bool = False,
    ) -> None:
        if likelihood not in LIKELIHOODS:
            raise OptionError(f"likelihood={likelihood!r} was given; it is one of {', '.join(LIKELIHOODS)}.")
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"a {type(model).__name__} was given; a committee is made of a torch.nn.Module."
            )
        self.members = _whole("members", members, 2, MEMBERS)
        self.seed = _whole("seed", seed, 0, SEEDS - 1)
        self.tile = _whole("tile", tile, 1, 2**31)
        self.likelihood = likelihood
        self.allow_no_spread = allow_no_spread
        self._network = committee_copy(model)
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def __repr__(self) -> str:
        return (
            f"Committee({type(self._network).__name__}, members={self.members}, seed={self.seed}, "
            f"likelihood={self.likelihood!r})"
        )

    def predict(
        self, x: Rows, *, tolerance: float | None = None, maximum: int = 4096, grad: bool = False
    ) -> Prediction:
        """Ask the committee about rows.

        Args:
            x: (B, ...), a tensor or an array (also one on disk: it is read tile by tile).
            tolerance: draw members, twice as many each time, until the standard error of the mean (of the
                probabilities) is at most this for every row and output. In the unit of the output.
            maximum: with a tolerance, where to stop in any case; then a `DropkitWarning` says what was reached.
            grad: True keeps the graph, so that the answer can be differentiated by x and by the weights.

        Returns:
            A `ClassificationPrediction` for likelihood "categorical", else a `RegressionPrediction`.

        Raises:
            NoMaskError: no mask acts in the model.
            ShapeError: the output is not what the likelihood says.
            OptionError: tolerance or maximum are out of range.
        """
        if tolerance is None:
            return self._prediction(self._samples(x, 0, self.members, grad))
        if not tolerance > 0.0:
            raise OptionError(f"tolerance={tolerance!r} was given; a standard error to reach is positive.")
        _whole("maximum", maximum, self.members, MEMBERS)
        samples = self._samples(x, 0, self.members, grad)
        while True:
            prediction = self._prediction(samples)
            asked = prediction.members
            error = prediction.standard_error.detach()
            worst = float(error.max()) if error.numel() else 0.0
            if worst <= tolerance:
                return prediction
            if asked >= maximum:
                need = math.ceil(asked * (worst / tolerance) ** 2) if math.isfinite(worst) else "more"
                warnings.warn(
                    f"tolerance={tolerance:g} was not reached: the largest standard error is {worst:.3g} with {asked} "
                    f"members; about {need} would do.",
                    DropkitWarning,
                    stacklevel=2,
                )
                return prediction
            samples = torch.cat((samples, self._samples(x, asked, min(2 * asked, maximum), grad)))

    def predict_chunks(self, chunks: Iterable[Rows]) -> Iterator[Prediction]:
        """Ask about rows that come in pieces of any size; the answers come tile by tile.

        Whatever the pieces, the tiles are the same, and so is every bit of the answers and of what is computed from
        them. (The members' answers are also those of `predict` on all rows at once, bit for bit; their mean over a
        larger table may be rounded differently in the last place, as sums are vectorised by the shape.)

        Args:
            chunks: (B_i, ...) each.

        Yields:
            Predictions of `tile` rows, the last one of what is left; in order, their rows are those of the chunks.
        """
        waiting: list[Tensor] = []
        for chunk in chunks:
            waiting.append(self._tensor(chunk))
            if sum(len(part) for part in waiting) >= self.tile:
                rows = torch.cat(waiting)
                full = len(rows) - len(rows) % self.tile
                yield from (self.predict(tile) for tile in torch.split(rows[:full], self.tile))
                waiting = [rows[full:]]
        if sum(len(part) for part in waiting):
            yield self.predict(torch.cat(waiting))

    def samples(self, x: Rows, *, grad: bool = False) -> Tensor:
        """What each member puts out, as it is: (M, B, *out)."""
        return self._samples(x, 0, self.members, grad, lambda output: output)

    def member(self, k: int) -> Member:
        """Thinned network k as a module of its own.

        It gives row k of `samples`: the same network, so the same numbers up to rounding, which depends on how many
        rows and members go through a matrix product at once.

        Raises:
            OptionError: there is no such member.
        """
        return Member(self._network, self.seed, _whole("k", k, 0, self.members - 1))

    def plan(self, x: Rows) -> Plan:
        """How rows of this shape are run, and why; decided on the first rows that come, then kept."""
        first = self._tile(x, 0)
        key = (tuple(first.shape[1:]), first.dtype)
        if key not in self._plans:
            with self._ready(grad=False):
                self._plans[key] = make_plan(self._network, first, self.seed, self.allow_no_spread)
        return self._plans[key]

    @contextmanager
    def _ready(self, grad: bool) -> Iterator[None]:
        with torch.set_grad_enabled(grad), every_layer_runs(self._network):
            yield

    def _samples(
        self, x: Rows, start: int, stop: int, grad: bool, read: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Members start .. stop - 1, read as the likelihood says: (stop - start, B, *out)."""
        plan = self.plan(x)
        read = read or self._read
        rows = len(x)
        with self._ready(grad):
            # Whole tiles are read before they are cut: exp and softmax, too, round by their place in the tensor.
            tiles = [
                read(self._members(self._tile(x, at), plan, start, stop))
                for at in range(0, max(rows, 1), self.tile)
            ]
            samples = torch.cat(tiles, dim=1)[:, :rows]
        if plan.how != "once" and rows and bool((samples == samples[:1]).all()):
            warnings.warn(
                f"masks act at {', '.join(plan.sites)}, yet all members agree to the last bit on all {rows} rows: what "
                "they drop does not reach the output. Are the inputs or the activations all 0?",
                DropkitWarning,
                stacklevel=3,
            )
        return samples

    def _members(self, tile: Tensor, plan: Plan, start: int, stop: int) -> Tensor:
        def run(member: int | Tensor) -> Tensor:
            return run_member(self._network, tile, self.seed, member)[0]

        if plan.how == "once":
            output = run(0)
            return output.expand(stop - start, *output.shape)
        if plan.how == "loop":
            return torch.stack([run(k) for k in range(start, stop)])
        step = plan.members_at_once
        parts = [torch.func.vmap(run)(torch.arange(k, min(k + step, stop))) for k in range(start, stop, step)]
        return torch.cat(parts)

    def _tensor(self, x: Rows) -> Tensor:
        """Rows in the dtype and on the device of the weights; integers (indices) keep their dtype."""
        tensor = x if isinstance(x, Tensor) else torch.tensor(np.ascontiguousarray(x))
        weight = next((p for p in self._network.parameters() if p.is_floating_point()), None)
        if weight is None:
            return tensor
        return tensor.to(weight.device, weight.dtype if tensor.is_floating_point() else tensor.dtype)

    def _tile(self, x: Rows, at: int) -> Tensor:
        if not isinstance(x, Tensor | np.ndarray) or x.ndim == 0:
            raise ShapeError(f"{type(x).__name__} was given; rows are a tensor or an array (B, ...).")
        rows = self._tensor(x[at : at + self.tile])
        missing = self.tile - len(rows)
        if missing == 0:
            return rows
        filling = rows[-1:] if len(rows) else rows.new_zeros((1, *rows.shape[1:]))
        return torch.cat((rows, filling.expand(missing, *rows.shape[1:])))

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

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, *out)."""
        with every_layer_runs(self.network):
            return run_member(self.network, x, self.seed, self.member)[0]

    def train(self, mode: bool = True) -> Member:
        """Stays as it is: in training mode BatchNorm would look at the batch, and the member would be no function."""
        return super().train(False)

    def extra_repr(self) -> str:
        """Which member of which committee."""
        return f"member={self.member}, seed={self.seed}"


def _whole(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionError(f"{name}={value!r} was given; a whole number from {low} to {high} is allowed.")
    return value

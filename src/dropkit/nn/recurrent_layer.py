"""What LSTM and GRU share: parameters, layouts, and the way of a batch through layers, directions and their noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dropkit.errors import AddressError, OptionError, ShapeError
from dropkit.masks import address, compiled
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, StochasticLayer, check_rate, rate_now
from dropkit.nn.recurrent_cells import StepNoise, Weights, gru_step, lstm_step, run_steps
from dropkit.nn.recurrent_fused import gru_fused, is_served, lstm_fused
from dropkit.nn.recurrent_noise import NoiseSource
from dropkit.nn.schedules import Schedule
from dropkit.nn.sequences import is_plain, times_noise
from dropkit.nn.zoneout import share_of_new

Recurrent = Literal["state", "update"]
State = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of sequences, time first.

    Attributes:
        data: (T, B, I), or (N, I) of a packed batch.
        sizes: (T,) rows of each step of a packed batch, else None.
        order, back: permutations of the rows of a packed batch, into it and out of it; None: as they are.
        rows, times: B and T.
        single: one sequence was given, without an axis for rows.
    """

    data: Tensor
    sizes: Tensor | None
    order: Tensor | None
    back: Tensor | None
    rows: int
    times: int
    single: bool

    @property
    def rows_of_step(self) -> Sequence[int]:
        """How many rows there are at each step."""
        return [self.rows] * self.times if self.sizes is None else cast(list[int], self.sizes.tolist())


class RecurrentLayer(StochasticLayer):
    """Parent of LSTM and GRU; never built itself. Their docstrings have the arguments."""

    gates: ClassVar[int]
    states: ClassVar[tuple[str, ...]]  # names of what is carried from step to step
    RATES: ClassVar[tuple[str, ...]] = (
        "dropout", "input_dropout", "recurrent_dropout", "output_dropout", "weight_dropout",
    )  # fmt: skip

    def __init__(
        self, sizes: tuple[int, int, int, int], bias: bool, batch_first: bool, bidirectional: bool,
        rates: dict[str, Rate], locked: bool, tied: bool, recurrent: Recurrent, zoneout: dict[str, Rate],
        device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers, self.proj_size = _check_sizes(*sizes)
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        if recurrent not in get_args(Recurrent):
            raise OptionError(
                f"recurrent={recurrent!r} was given; allowed: {', '.join(get_args(Recurrent))}."
            )
        self.locked, self.tied, self.recurrent = locked, tied, recurrent
        self.zoned = tuple(zoneout)
        for name, p in (*rates.items(), *((f"zoneout_{state}", p) for state, p in zoneout.items())):
            rate = p if isinstance(p, Schedule) else check_rate(p)
            if isinstance(rate, Tensor):
                self.register_buffer(name, rate, persistent=False)
            else:
                setattr(self, name, rate)
        for name, shape in self._shapes():
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the parameters, in torch's order."""
        G, H, P = self.gates, self.hidden_size, self.state_size
        for layer in range(self.num_layers):
            inputs = self.input_size if layer == 0 else P * len(self._directions)
            for suffix in self._directions:
                end = f"_l{layer}{suffix}"
                yield f"weight_ih{end}", (G * H, inputs)
                yield f"weight_hh{end}", (G * H, P)
                if self.bias:
                    yield f"bias_ih{end}", (G * H,)
                    yield f"bias_hh{end}", (G * H,)
                if self.proj_size:
                    yield f"weight_hr{end}", (P, H)

    @property
    def state_size(self) -> int:
        """P, the size of the state that is put out: projected, where it is."""
        return self.proj_size or self.hidden_size

    @property
    def _directions(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def reset_parameters(self) -> None:
        """All weights uniform in +-1 / sqrt(H), drawn in torch's order."""
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing to do here; kept for code that was written for torch.nn.LSTM."""

    def _weights(self, layer: int, suffix: str) -> Weights:
        end = f"_l{layer}{suffix}"
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        ih, hh, *others = (getattr(self, name + end, None) for name in names)
        return Weights(cast(Tensor, ih), cast(Tensor, hh), *others)

    def _rate(self, name: str) -> float | Tensor:
        """The rate of now; the number 0 where there is none."""
        return rate_now(getattr(self, name), self)

    def _run(
        self, x: Tensor | PackedSequence, hx: tuple[Tensor, ...] | None, start: int
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
        """All layers; states (L D, B, size) in and out."""
        batch = self._batch(x)
        state = self._states(batch, hx)
        noise = NoiseSource(
            self, self.site, batch.rows, batch.times, _check_start(start), batch.order, self.locked
        )
        if start and self.active and self._is_noisy and not torch.compiler.is_compiling():
            _require_context(start)
        data, ends = self._between(batch.data, batch.sizes, "input_dropout", "input", noise), []
        for layer in range(self.num_layers):
            if layer:
                data = self._between(data, batch.sizes, "dropout", f"l{layer}.input", noise)
            first = layer * len(self._directions)
            own = tuple(part[first : first + len(self._directions)] for part in state)
            data, end = self._layer(layer, data, batch, own, noise)
            ends.append(end)
        data = self._between(data, batch.sizes, "output_dropout", "output", noise)
        final = tuple(torch.cat(parts) for parts in zip(*ends, strict=True))
        return self._given_back(data, final, batch)

    def _between(self, x: Tensor, sizes: Tensor | None, rate: str, name: str, noise: NoiseSource) -> Tensor:
        p = self._rate(rate)
        return x if not self.active or _is_zero(p) else noise.apply(name, x, p, sizes)

    def _layer(
        self, layer: int, x: Tensor, batch: Batch, state: tuple[Tensor, ...], source: NoiseSource
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in all directions: by torch's own kernel where the noise can be written into the weights."""
        native = _is_native(x)
        weights, noises = [], []
        for suffix in self._directions:
            place = f"l{layer}{suffix}"
            own, noise = self._noisy(self._weights(layer, suffix), place, source, x)
            if native and noise.state is not None and noise.state.shape[:2] == (1, 1):
                own, noise = _written_in(own, noise)
            weights.append(own)
            noises.append(noise)
        if native and all(noise.is_none for noise in noises):
            return self._kernel(x, batch.sizes, state, weights)
        sizes, flat = batch.rows_of_step, x.flatten(0, -2)
        plain = is_plain(x) and not torch.is_autocast_enabled("cpu")
        outputs, ends = [], []
        for i, (own, noise) in enumerate(zip(weights, noises, strict=True)):
            parts = tuple(part[i] for part in state)
            if plain and is_served(flat, own, noise):
                fused = lstm_fused if len(parts) == 2 else gru_fused
                out, end = fused(flat, sizes, parts, own, noise, bool(i))
            else:
                step = lstm_step if len(parts) == 2 else gru_step
                out, end = run_steps(step, flat, sizes, parts, own, noise, bool(i))
            outputs.append(out.view(*x.shape[:-1], self.state_size))
            ends.append(end)
        joined = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        return joined, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))

    def _noisy(
        self, weights: Weights, place: str, source: NoiseSource, like: Tensor
    ) -> tuple[Weights, StepNoise]:
        """Weights with their mask, and the noise inside the recurrence."""
        shares = {}
        for name in self.zoned:
            p = self._rate(f"zoneout_{name}")
            size = self.state_size if name == "hidden" else self.hidden_size
            if _is_zero(p):
                continue
            if not self.active:
                shares[name] = share_of_new(p, like)
            else:
                drawn = source.draw(f"{place}.{name}", (size,), p, like, locked=False)
                shares[name] = (drawn != 0).to(like.dtype)
        if not self.active:
            return weights, StepNoise(**shares)
        p = self._rate("weight_dropout")
        if not _is_zero(p):
            masked = dropout(
                weights.hh[None], p, shared=(0,), site=source.place(f"{place}.weight"), owner=self
            )
            weights = weights._replace(hh=masked[0])
        p = self._rate("recurrent_dropout")
        if _is_zero(p):
            return weights, StepNoise(**shares)
        if self.recurrent == "update":
            update = source.draw(f"{place}.update", (self.hidden_size,), p, like)
            return weights, StepNoise(update=update, **shares)
        gates = 1 if self.tied else self.gates
        return weights, StepNoise(
            state=source.draw(f"{place}.state", (gates, self.state_size), p, like), **shares
        )

    def _kernel(
        self, x: Tensor, sizes: Tensor | None, state: tuple[Tensor, ...], weights: Sequence[Weights]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """torch's own."""
        flat = [w for own in weights for w in own if w is not None]
        run = getattr(torch._VF, "lstm" if len(state) == 2 else "gru")
        hx = state if len(state) == 2 else state[0]
        shared = (flat, self.bias, 1, 0.0, self.training, self.bidirectional)
        out, *end = run(x, hx, *shared, False) if sizes is None else run(x, sizes, hx, *shared)
        return out, tuple(end)

    @property
    def _is_noisy(self) -> bool:
        zoned = (f"zoneout_{name}" for name in self.zoned)
        return not all(_is_zero(getattr(self, name)) for name in (*self.RATES, *zoned))

    def _batch(self, x: Tensor | PackedSequence) -> Batch:
        data = x.data if isinstance(x, PackedSequence) else x
        if not data.is_floating_point():
            raise OptionError(f"x of {data.dtype} was given; a floating dtype is needed: x.float().")
        packed = isinstance(x, PackedSequence)
        if data.ndim not in ((2,) if packed else (2, 3)) or data.shape[-1] != self.input_size:
            axes = (
                "(N, I)" if packed else "(B, T, I) or (T, I)" if self.batch_first else "(T, B, I) or (T, I)"
            )
            raise ShapeError(
                f"x of shape {tuple(data.shape)} was given; allowed: {axes} with I={self.input_size}."
            )
        if isinstance(x, PackedSequence):
            sizes = x.batch_sizes
            return Batch(data, sizes, x.sorted_indices, x.unsorted_indices, int(sizes[0]), len(sizes), False)
        single = data.ndim == 2
        data = data.unsqueeze(1) if single else data.transpose(0, 1) if self.batch_first else data
        if not len(data):
            raise ShapeError(f"x of shape {tuple(x.shape)} was given; a sequence has one step at least.")
        return Batch(data, None, None, None, data.shape[1], data.shape[0], single)

    def _states(self, batch: Batch, hx: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Initial states (L D, B, size), rows in the order of packing; zeros where none are given."""
        lead = self.num_layers * len(self._directions)
        sizes = [self.state_size if name == "hidden" else self.hidden_size for name in self.states]
        if hx is None:
            return tuple(batch.data.new_zeros(lead, batch.rows, size) for size in sizes)
        if len(hx) != len(sizes):
            raise ShapeError(f"{len(hx)} initial states were given; {len(sizes)} are needed: {self.states}.")
        states = []
        for name, given, size in zip(self.states, hx, sizes, strict=True):
            wanted = (lead, size) if batch.single else (lead, batch.rows, size)
            if given.shape != wanted:
                axes = "(L D, H)" if batch.single else "(L D, B, H)"
                raise ShapeError(
                    f"an initial {name} state of shape {tuple(given.shape)} was given; needed: {axes} = {wanted}, "
                    "layers times directions first."
                )
            whole = given.unsqueeze(1) if batch.single else given
            states.append(whole if batch.order is None else whole.index_select(1, batch.order))
        return tuple(states)

    def _given_back(
        self, data: Tensor, states: tuple[Tensor, ...], batch: Batch
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
        if batch.sizes is not None:
            if batch.back is not None:
                states = tuple(part.index_select(1, batch.back) for part in states)
            return PackedSequence(data, batch.sizes, batch.order, batch.back), states
        if batch.single:
            return data.squeeze(1), tuple(part.squeeze(1) for part in states)
        return (data.transpose(0, 1) if self.batch_first else data), states

    def extra_repr(self) -> str:
        """Sizes, and the options that differ from their defaults."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {
            "num_layers": 1, "proj_size": 0, "bias": True, "batch_first": False, "bidirectional": False,
            **dict.fromkeys(self.RATES, 0.0), **dict.fromkeys((f"zoneout_{name}" for name in self.zoned), 0.0),
            "locked": True, "tied": True, "recurrent": "state",
        }  # fmt: skip
        for name, default in defaults.items():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                parts.append(f"{name}=tensor of {tuple(value.shape)}")
            elif value != default:
                parts.append(f"{name}={value}")
        return ", ".join(parts)


def _written_in(weights: Weights, noise: StepNoise) -> tuple[Weights, StepNoise]:
    """A state mask that serves all steps and rows is one of the columns of W_hh: W (h * m) = (W * m) h."""
    assert noise.state is not None
    mask = noise.state[0, 0].unsqueeze(1)  # (G or 1, 1, P)
    masked = times_noise(weights.hh.unflatten(0, (len(mask), -1)), mask).flatten(0, 1)
    return weights._replace(hh=masked), StepNoise(None, *noise.all()[1:])


def _is_native(x: Tensor) -> bool:
    """Whether torch's own kernels can run: they know no compiler and no transform, but a graph may name them."""
    return x.device.type in ("cpu", "cuda") and (compiled.members_recorded() or is_plain(torch.empty(0)))


def _is_zero(p: Rate) -> bool:
    return isinstance(p, float) and p == 0


def _check_sizes(inputs: int, hidden: int, layers: int, projected: int) -> tuple[int, int, int, int]:
    named = {
        "input_size": (inputs, 1),
        "hidden_size": (hidden, 1),
        "num_layers": (layers, 1),
        "proj_size": (projected, 0),
    }
    for name, (size, least) in named.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise OptionError(f"{name}={size!r} was given; a whole number from {least} on is needed.")
    if projected >= hidden:
        raise OptionError(
            f"proj_size={projected} was given; a projection is smaller than hidden_size={hidden}, or 0 for none."
        )
    return inputs, hidden, layers, projected


def _check_start(start: int) -> int:
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise OptionError(f"start={start!r} was given; the place of a step is a whole number from 0 on.")
    return start


def _require_context(start: int) -> None:
    if address.current() is None:
        raise AddressError(
            f"start={start} was given without a masks(...) context, so the masks of the chunk before are gone. Run all "
            "chunks of a sequence with dropkit.masks(seed=..., step=...), the same step for each."
        )

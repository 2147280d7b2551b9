"""The rate chosen again after training: another committee of the same weights, if held-out rows like it better.

A network trained at one rate may be asked at another. Weights are not touched; only what falls, and how often.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dropkit.committee.mixture import mixture_log_density
from dropkit.committee.prediction import (
    ClassificationPrediction,
    Prediction,
    RegressionPrediction,
    check_rows,
)
from dropkit.errors import NoMaskError, OptionError, ShapeError
from dropkit.nn.layer import StochasticLayer
from dropkit.nn.schedules import Schedule

Kind = Literal["multiplier", "rate"]
MULTIPLIERS = (0.0, 0.25, 0.5, 0.75, 1.5, 2.0, 3.0)
MOST = 0.95
# How layers, dropkit's and others', call a number that is a rate.
RATE_NAMES = frozenset(
    {
        "p", "input_p", "prob", "drop_prob", "dropout", "dropout_p", "input_dropout", "recurrent_dropout",
        "output_dropout", "weight_dropout", "hidden_dropout", "attention_dropout", "attn_dropout", "activation_dropout",
        "zoneout_hidden", "zoneout_cell", "zoneout_h", "zoneout_c",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rates:
    """What `with_rates` did to a model.

    Attributes:
        network: a copy of the structure around the same weights and buffers.
        changed: names of the modules whose rates were changed.
        left: names of the noisy modules without a rate that could be (learned ones, fixed masks).
    """

    network: nn.Module
    changed: tuple[str, ...]
    left: tuple[str, ...]


def with_rates(model: nn.Module, change: Callable[[float], float]) -> Rates:
    """The model with other rates: dropkit's layers, and modules whose calls `dropkit.convert` serves.

    Args:
        model: it is not changed.
        change: rate -> rate. What comes out is cut to [0, 0.95], as at 1 nothing is left. A schedule counts as its
            last word, a tensor of rates is changed number by number.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    network = copy.deepcopy(model, shared)
    changed, left = [], []

    def new(rate: float) -> float:
        return min(max(float(change(rate)), 0.0), MOST)

    for name, module in network.named_modules():
        own = isinstance(module, StochasticLayer)
        if not own and "dropkit_site" not in vars(module):
            continue
        found = False
        for key, value in (*vars(module).items(), *module._buffers.items()):
            if key not in RATE_NAMES or isinstance(value, bool):
                continue
            if isinstance(value, Tensor):
                rates = [new(v) for v in value.detach().flatten().tolist()]
                module._buffers[key] = torch.tensor(rates, dtype=value.dtype, device=value.device).reshape(
                    value.shape
                )
            elif isinstance(value, Schedule | int | float):
                setattr(module, key, new(value.final if isinstance(value, Schedule) else value))
            else:
                continue
            found = True
        if found:
            changed.append(name)
        elif own:
            left.append(name)
    return Rates(network, tuple(changed), tuple(left))


@dataclass(frozen=True, slots=True)
class RateChoice:
    """Which rates were tried on held-out rows, and what became of it; NLL in nats per row.

    The members of all candidates have the same addresses, and masks are monotone in the rate, so candidates
    differ by their rates and little by luck. All errors are over rows, and `gain_error` is paired by row.

    Attributes:
        kind: "multiplier" of all rates, or one "rate" for all sites.
        tried: multipliers or rates.
        nll: one for each: mean negative log-likelihood of the rows.
        standard_error: of `nll`.
        gain: `before` minus `nll`.
        gain_error: of `gain`.
        before: NLL at the rates of training.
        before_error: of `before`.
        chosen: the multiplier or rate with the smallest NLL, where it gains more than one `gain_error`; None where
            none does, and the rates stay.
        noise: variance of the noise that suits the rows best, for the rates of training and then for each tried; empty
            unless the model is a point model, whose likelihood needs it.
        rows: how many rows.
        members: of each committee.
        changed: modules whose rates were changed.
        left: noisy modules whose rates were not.
    """

    kind: Kind
    tried: tuple[float, ...]
    nll: tuple[float, ...]
    standard_error: tuple[float, ...]
    gain: tuple[float, ...]
    gain_error: tuple[float, ...]
    before: float
    before_error: float
    chosen: float | None
    noise: tuple[float, ...]
    rows: int
    members: int
    changed: tuple[str, ...]
    left: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of plain values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    def __str__(self) -> str:
        lines = [f"{self.kind:>10}  {'NLL':>9}  {'gain':>9}  +-"]
        lines += [f"{'as trained':>10}  {self.before:9.4f}"]
        for value, nll, gain, error in zip(self.tried, self.nll, self.gain, self.gain_error, strict=True):
            mark = "  chosen" if value == self.chosen else ""
            lines.append(f"{value:10g}  {nll:9.4f}  {gain:9.4f}  {error:.4f}{mark}")
        return "\n".join(lines)


def choose_rates(
    network: nn.Module,
    ask: Callable[[nn.Module], Prediction],
    y: Tensor,
    *,
    multipliers: Sequence[float] | None = None,
    rates: Sequence[float] | None = None,
) -> tuple[RateChoice, nn.Module]:
    """Try other rates on rows that the network was not trained on, and keep the likeliest.

    Args:
        network: a model with dropkit's masks; it is not changed.
        ask: a model -> the prediction of its committee for the held-out rows, with one seed for all.
        y: what was seen there, shaped like the prediction's mean; (B,) class indices.
        multipliers: of all rates, each at least 0; `MULTIPLIERS` where neither is given.
        rates: one rate for all sites instead, each in [0, 0.95].

    Returns:
        The record, and the network with the chosen rates (`network` itself where they stay).

    Raises:
        OptionError: a multiplier or rate is out of range, both were given, or there are none.
        ShapeError: there are fewer than 2 rows, or y does not belong to the prediction.
        NoMaskError: the model has no rate that could be changed.
    """
    kind, tried = _candidates(multipliers, rates)
    present = ask(network)
    before, noise = _losses(present, y)
    noises = [] if noise is None else [noise]
    losses, networks, done = [], [], Rates(network, (), ())
    for value in tried:
        change = _constant(value) if kind == "rate" else _times(value)
        done = with_rates(network, change)
        if not done.changed:
            raise NoMaskError(
                "a model without a rate that could be changed was given"
                + (f"; {', '.join(done.left)} have learned or fixed masks." if done.left else ".")
            )
        loss, noise = _losses(ask(done.network), y)
        losses.append(loss)
        networks.append(done.network)
        noises += [] if noise is None else [noise]
    gains = [_mean_and_error(before - loss) for loss in losses]
    best = max(range(len(tried)), key=lambda i: gains[i][0])
    better = gains[best][0] > gains[best][1]
    own = _mean_and_error(before)
    each = [_mean_and_error(loss) for loss in losses]
    choice = RateChoice(
        kind=kind,
        tried=tried,
        nll=tuple(mean for mean, _ in each),
        standard_error=tuple(error for _, error in each),
        gain=tuple(mean for mean, _ in gains),
        gain_error=tuple(error for _, error in gains),
        before=own[0],
        before_error=own[1],
        chosen=tried[best] if better else None,
        noise=tuple(noises),
        rows=len(y),
        members=present.members,
        changed=done.changed,
        left=done.left,
    )
    return choice, networks[best] if better else network


def best_noise(prediction: RegressionPrediction, y: Tensor) -> float:
    """The one noise variance under which seen values are likeliest, for members that predict none.

    maximise over v: sum over rows of log mean over m of Normal(y; samples[m], v), on a grid of log v, then by
    golden sections around its best point.

    Args:
        prediction: of a point model.
        y: (B, *out), in the unit of the output.

    Returns:
        v, that unit squared, between 1e-6 and 10 of the mean squared error of the mean (and never 0).
    """
    check_rows(y, prediction.samples.shape[1:])
    samples = prediction.samples.detach().double()
    seen = y.detach().to(samples)
    scale = max(float((seen - samples.mean(dim=0)).square().mean()), torch.finfo(torch.float64).tiny ** 0.5)

    def loss(log_v: float) -> float:
        return -float(mixture_log_density(seen, samples, torch.full_like(samples, math.exp(log_v))).mean())

    low, high, points = math.log(scale * 1e-6), math.log(scale * 10.0), 33
    step = (high - low) / (points - 1)
    grid = [low + i * step for i in range(points)]
    middle = min(grid, key=loss)
    a, b = max(low, middle - step), min(high, middle + step)
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = b - golden * (b - a), a + golden * (b - a)
    at_left, at_right = loss(left), loss(right)
    for _ in range(30):  # to 1e-6 of the grid's step
        if at_left < at_right:
            b, right, at_right = right, left, at_left
            left = b - golden * (b - a)
            at_left = loss(left)
        else:
            a, left, at_left = left, right, at_right
            right = a + golden * (b - a)
            at_right = loss(right)
    return math.exp((a + b) / 2.0)


def _losses(prediction: Prediction, y: Tensor) -> tuple[Tensor, float | None]:
    """(B,) negative log-likelihood of each row, and the noise that a point model was given for it."""
    noise = None
    if isinstance(prediction, RegressionPrediction) and prediction.noise is None:
        noise = best_noise(prediction, y)
        prediction = prediction.with_noise(noise)
    loss = -prediction.log_likelihood(y).detach().double()
    if len(loss) < 2:
        raise ShapeError(f"{len(loss)} rows were given; rates are compared on at least 2 held-out rows.")
    if not bool(loss.isfinite().all()):
        raise OptionError(
            "a likelihood that is not finite was met; look at the rows' inputs, values and noise."
        )
    return loss if isinstance(prediction, ClassificationPrediction) else loss.unsqueeze(-1).flatten(1).sum(
        dim=1
    ), noise


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def _candidates(
    multipliers: Sequence[float] | None, rates: Sequence[float] | None
) -> tuple[Kind, tuple[float, ...]]:
    if multipliers is not None and rates is not None:
        raise OptionError("multipliers and rates were both given; a rate is either scaled or set.")
    kind: Kind = "multiplier" if rates is None else "rate"
    tried = tuple(float(v) for v in (rates if rates is not None else multipliers or MULTIPLIERS))
    most = math.inf if kind == "multiplier" else MOST
    if not tried or not all(0.0 <= v <= most and math.isfinite(v) for v in tried):
        allowed = "at least 0" if kind == "multiplier" else f"from 0 to {MOST}"
        raise OptionError(f"{kind}s {tried} were given; at least one, each {allowed}.")
    return kind, tried


def _times(value: float) -> Callable[[float], float]:
    return lambda p: p * value


def _constant(value: float) -> Callable[[float], float]:
    return lambda p: value

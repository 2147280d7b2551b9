"""What the noise of one dropout site does: at the layer, to the outputs, to the gradient, to a BatchNorm behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dropkit.measure.gradient_noise import gradients
from dropkit.measure.noise import NoisyNetwork
from dropkit.measure.sampling import jackknife, mean_and_error
from dropkit.measure.subject import Subject, check_finite
from dropkit.measure.variance_shift import UNTOUCHED, inputs_of_norms

NORM_DRAWS = 16  # masks for each row: their mean over rows is all that is asked
STILL = 1e-12  # a variance below this share of the mean square is rounding

Answer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its standard error."""

    value: float
    error: float

    def __truediv__(self, other: Estimate) -> Estimate:
        """The quotient of two figures whose errors are independent."""
        value = self.value / other.value
        return Estimate(value, math.hypot(self.error, value * other.error) / abs(other.value))


@dataclass(frozen=True, slots=True)
class NormInput:
    """The BatchNorm whose input the masks of one site change most.

    Attributes:
        name: its qualified name.
        ratio: variance of its input without masks over that with the masks of this site, mean over channels.
    """

    name: str
    ratio: Estimate


@dataclass(frozen=True, slots=True)
class NoiseFigures:
    """What the masks of one site do, the other sites being silent.

    Attributes:
        noise: variance over masks of what the layer hands on, over its variance over rows; None where rows do not
            differ there or share one mask.
        offset: mean square over variance over rows of what the layer reads: 1 where it is centred; None likewise.
        reach: variance over masks of the prediction, over its variance over rows; None where all rows get one answer.
        share: variance over masks of the prediction, over that with all sites.
        cost: what the masks add to the loss.
        gradient: what the masks add to the variance of the minibatch gradient, over that without masks; None where
            there is no gradient by weights.
        bias: length of mean gradient under masks minus plain gradient, over the length of the plain one, chance taken
            off; None likewise.
        norm: the BatchNorm behind that changes most; None where there is none.
    """

    noise: Estimate | None
    offset: Estimate | None
    reach: Estimate | None
    share: Estimate | None
    cost: Estimate | None
    gradient: Estimate | None
    bias: float | None
    norm: NormInput | None


@dataclass(frozen=True, slots=True)
class _Passes:
    """What passes under masks left: what each adds to the loss, and per pair half of the squared distances."""

    losses: Tensor
    outputs: Tensor
    gradient: Tensor | None
    bias: float | None


def noise_figures(
    subject: Subject, members: int, seed: int, batch: int, plain_variance: float | None, answer: Answer
) -> tuple[NoiseFigures, ...]:
    """Figures of each site of a model that could be recorded, in the order of the pass.

    noise = p/(1-p) sum_j mean(h_j^2) / sum_j Var(h_j),    h what the mask multiplies, Var over rows

    Variances over masks are means over pairs of passes of half the squared distance. Masks of a site are the same
    whether it acts alone or among the others.

    Args:
        subject: whose `noise` is there.
        members: passes with masks, each row with its own; half as many pairs.
        seed: which masks.
        batch: rows of a minibatch.
        plain_variance: of the minibatch gradient without masks, summed over weights; None: no gradient is asked for.
        answer: outputs -> what counts as the prediction.
    """
    noise = subject.noise
    assert noise is not None
    with torch.no_grad():
        read = noise.inputs(subject.x)
        differ = _variance_over_rows(answer(subject.outputs()))
        norms = _norm_inputs(subject, noise, min(members, NORM_DRAWS), seed)
    together = _passes(subject, noise, None, members, seed, plain_variance is not None, answer)
    found = []
    for i, site in enumerate(noise.sites):
        alone = _passes(subject, noise, i, members, seed, plain_variance is not None, answer)
        own = not site.tied and read[i].ndim > 0 and len(read[i]) == len(subject.x)
        offset = _offset(read[i]) if own else None
        added = Estimate(*map(float, mean_and_error(alone.outputs)))
        gradient = None
        if alone.gradient is not None and plain_variance:
            mean, error = (float(part) / plain_variance for part in mean_and_error(alone.gradient))
            rows = 1.0 if site.tied else len(subject.x) / batch  # of masks that rows share, no batch gets rid
            gradient = Estimate(mean * rows, error * rows)
        found.append(
            NoiseFigures(
                noise=None
                if offset is None
                else Estimate(site.variance * offset.value, site.variance * offset.error),
                offset=offset,
                reach=None if differ is None else added / differ,
                share=_share(alone.outputs, together.outputs),
                cost=Estimate(*map(float, mean_and_error(alone.losses))),
                gradient=gradient,
                bias=alone.bias,
                norm=norms[i],
            )
        )
    return tuple(found)


def _passes(
    subject: Subject,
    noise: NoisyNetwork,
    only: int | None,
    members: int,
    seed: int,
    with_gradient: bool,
    answer: Answer,
) -> _Passes:
    """Passes with the masks of one site (None: of all), and half of the squared distances of pairs of them."""
    like = subject.x if subject.x.is_floating_point() else torch.zeros((), device=subject.x.device)
    weights = list(subject.weights.values()) if with_gradient else []
    with torch.set_grad_enabled(bool(weights)):
        base = subject.loss_of(noise(subject.x, noise.none(like)))
    plain = gradients(base, weights) if weights else []
    away = [torch.zeros_like(part) for part in plain]
    losses: list[Tensor] = []
    outputs: list[Tensor] = []
    slopes: list[Tensor] = []
    before: tuple[Tensor, list[Tensor]] | None = None
    pairs = members // 2
    for k in range(2 * pairs):
        with torch.set_grad_enabled(bool(weights)):
            out = noise(subject.x, noise.drawn(like, seed, k, only=only))
            loss = subject.loss_of(out)
        slope = gradients(loss, weights) if weights else []
        losses.append((loss.detach() - base.detach()).double())
        said = answer(out.detach()).double()
        check_finite(said, "the prediction under masks")
        for total, part, at in zip(away, slope, plain, strict=True):
            total += (part - at) / (2 * pairs)
        if before is None:
            before = said, slope
            continue
        outputs.append(0.5 * (said - before[0]).square().mean())
        slopes.append(0.5 * _square_distance(slope, before[1]))
        before = None
    if not weights:
        return _Passes(torch.stack(losses), torch.stack(outputs), None, None)
    gradient = torch.stack(slopes)
    check_finite(gradient, "a gradient under masks")
    length = sum(float(part.square().sum()) for part in plain)
    moved = sum(float(part.square().sum()) for part in away) - float(gradient.mean()) / (2 * pairs)
    bias = math.sqrt(max(moved, 0.0) / length) if length > 0 else None
    return _Passes(torch.stack(losses), torch.stack(outputs), gradient, bias)


def _square_distance(one: list[Tensor], other: list[Tensor]) -> Tensor:
    parts = [(a - b).square().sum() for a, b in zip(one, other, strict=True)]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


def _share(alone: Tensor, together: Tensor) -> Estimate | None:
    """Of the variance under all masks, what is there under one site's; the pairs of passes have the same masks."""
    if len(together) < 2 or not float(together.sum()) > 0:
        return None
    value, error = jackknife(torch.stack((alone, together), dim=1), lambda mean: mean[0] / mean[1])
    return Estimate(float(value), float(error))


def _variance_over_rows(values: Tensor) -> Estimate | None:
    """Mean over what one row holds, with its jackknife error; None where rows do not differ."""
    rows = values.double().reshape(len(values), -1)
    variance, square = _leave_one_out(rows)
    if not float(variance[0]) > STILL * float(square[0]):
        return None
    return Estimate(float(variance[0]) / rows.shape[1], _jackknife_error(variance[1:]) / rows.shape[1])


def _offset(values: Tensor) -> Estimate | None:
    """Mean square over variance over rows, both summed over what one row holds."""
    variance, square = _leave_one_out(values.double().reshape(len(values), -1))
    if not float(variance[0]) > STILL * float(square[0]) or not bool((variance > 0).all()):
        return None
    ratio = square / variance
    return Estimate(float(ratio[0]), _jackknife_error(ratio[1:]))


def _leave_one_out(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean square, summed over columns: of all rows first, then without each row, (1 + B,)."""
    count = len(rows)
    squares, total = rows.square().sum(dim=1), rows.sum(dim=0)
    left = torch.cat((squares.sum()[None], squares.sum() - squares))
    mean_squares = torch.cat((total.square().sum()[None], (total - rows).square().sum(dim=1)))
    size = torch.full((1 + count,), count - 1.0, dtype=rows.dtype, device=rows.device)
    size[0] = count
    return (left - mean_squares / size) / (size - 1), left / size


def _jackknife_error(without: Tensor) -> float:
    count = len(without)
    return float(((without - without.mean()).square().sum() * (count - 1) / count).sqrt())


def _norm_inputs(
    subject: Subject, noise: NoisyNetwork, draws: int, seed: int
) -> tuple[NormInput | None, ...]:
    """For each site, the BatchNorm whose input varies least without its masks, compared with what it does with them."""
    module, names = inputs_of_norms(noise)
    if not names:
        return (None,) * len(noise.sites)
    like = subject.x if subject.x.is_floating_point() else torch.zeros((), device=subject.x.device)
    quiet = [_moments(values) for values in module(subject.x, *noise.none(like))]
    found = []
    for i in range(len(noise.sites)):
        noisy: list[list[Tensor]] = [[] for _ in names]
        for k in range(draws):
            for kept, values in zip(
                noisy, module(subject.x, *noise.drawn(like, seed, k, only=i)), strict=True
            ):
                kept.append(_moments(values))
        found.append(_most_changed(names, quiet, [torch.stack(one) for one in noisy]))
    return tuple(found)


def _most_changed(names: list[str], quiet: list[Tensor], noisy: list[Tensor]) -> NormInput | None:
    worst: NormInput | None = None
    for name, still, draws in zip(names, quiet, noisy, strict=True):
        variance = still[1] - still[0].square()
        alive = variance > STILL * still[1]
        if not bool(alive.any()):
            continue

        def ratio(mean: Tensor, variance: Tensor = variance, alive: Tensor = alive) -> Tensor:
            return (variance / (mean[1] - mean[0].square()))[alive].mean()

        value, error = jackknife(draws, ratio)
        here = NormInput(name, Estimate(float(value), float(error)))
        if abs(here.ratio.value - 1) > UNTOUCHED and (worst is None or here.ratio.value < worst.ratio.value):
            worst = here
    return worst


def _moments(values: Tensor) -> Tensor:
    """Mean and mean square of each channel over rows and places, (2, C)."""
    channels = values.double().movedim(1, 0).flatten(1)
    return torch.stack((channels.mean(dim=1), channels.square().mean(dim=1)))

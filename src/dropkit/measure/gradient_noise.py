"""Variance of the minibatch gradient, and how much of it is dropout's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.errors import MeasurementError
from dropkit.measure.linear import linear_gradient_moments, linear_model
from dropkit.measure.losses import LossFunction
from dropkit.measure.neighbours import masks_on_gradients
from dropkit.measure.records import Measurement, said_of_prediction, with_error
from dropkit.measure.sampling import check_error, check_seed, check_whole, variance_and_error
from dropkit.measure.subject import Subject, check_finite, subject_of


@dataclass(frozen=True, slots=True)
class LayerNoise:
    """Variance of the gradient of one weight tensor, summed over its elements.

    Attributes:
        name: of the weight.
        sites: whose masks multiply its gradient, unit by unit.
        plain: s^2 / B, without masks.
        article: (s^2 + p mu^2) / (q B), with q the product over `sites`; None where the model cannot be recorded.
        exact: that of the linear model, whose residual is noisy too; None elsewhere.
        measured, standard_error: a mask for each row.
        shared_article: s^2 / (q B) + (p / q) mu^2, for one mask for the whole batch.
        shared_measured, shared_error: the same, measured.
    """

    name: str
    sites: tuple[str, ...]
    plain: float
    article: float | None
    exact: float | None
    measured: float
    standard_error: float
    shared_article: float | None
    shared_measured: float
    shared_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientNoise(Measurement):
    """Variance of the minibatch gradient, summed over the weights: rows drawn anew for each batch, with replacement.

    `predicted` is the exact figure of the linear model where this is one, else the article's.

    Attributes:
        batch: B, rows of a minibatch.
        plain: s^2 / B, what the choice of rows alone gives.
        article: (s^2 + p mu^2) / (q B): a gradient that the mask multiplies once. In a network the residual and the
            signal behind are noisy too, so it is a lower bound in most of them.
        exact: of the linear model with squared error; None elsewhere.
        shared: measured with one mask for the whole batch, whose part does not shrink with B.
        shared_error: its standard error.
        shared_article: s^2 / (q B) + (p / q) mu^2.
        signal: |E g|^2, the squared length of the mean gradient without masks.
        layers: weight by weight.
        tied: sites whose masks are shared by all rows in training as well.
    """

    batch: int
    plain: float
    article: float | None
    exact: float | None
    shared: float
    shared_error: float
    shared_article: float | None
    signal: float
    layers: tuple[LayerNoise, ...]
    tied: tuple[str, ...]

    @property
    def inflation(self) -> float:
        """How many times the variance is that of the plain gradient; infinite where that is 0."""
        return float(self.measured) / self.plain if self.plain > 0 else math.inf

    def to_text(self) -> str:
        """What the noise is, against the plain one, and what sharing masks would do."""
        near = abs(float(self.measured) - self.plain) < 2 * float(self.standard_error)
        chance = " (a difference that chance may make)" if near else ""
        text = (
            f"With batches of {self.batch}, dropout makes the gradient's variance "
            f"{self.inflation:.3g} times what it is "
            f"without{chance}: {with_error(self.measured, self.standard_error)} "
            f"{said_of_prediction(self.predicted, self.formula)}. One mask for the whole batch would give "
            f"{with_error(self.shared, self.shared_error)}: that part does not shrink with the batch."
        )
        if self.tied:
            text += f" The masks of {', '.join(map(repr, self.tied))} are shared by the batch as they stand."
        return text


def gradient_noise(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossFunction | None = None,
    members: int = 256,
    seed: int = 0,
    batch: int = 32,
    tolerance: float | None = None,
) -> GradientNoise:
    """Variance of the minibatch gradient, over the choice of rows and masks, and what formulas say of it.

    article: a gradient with mean mu and variance s^2 over rows, times a mask of its own for each row:
        Var = (s^2 + p mu^2) / (q B),    q = 1 - p
    exact for the linear model with squared error; it can be many times larger, as the residual is noisy too:
        E g_j = 2 x_j (A + w_j x_j / q),    E g_j^2 = 4 x_j^2 / q ((A + w_j x_j / q)^2 + V),
        A = sum over i != j of w_i x_i + b - y,    V = p/q sum over i != j of w_i^2 x_i^2

    Args:
        model, x, y, loss: as in `penalty`.
        members: minibatches drawn, each with masks of its own.
        seed: which rows and masks.
        batch: B, rows of a minibatch.
        tolerance: largest standard error of the total variance that is accepted.

    Returns:
        A `GradientNoise`.

    Raises:
        NoMaskError, MeasurementError, ShapeError, OptionError: as in `penalty`.

    Example:
        >>> import torch, dropkit as dk
        >>> model = torch.nn.Sequential(dk.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        >>> x = torch.arange(24.0).view(6, 4).cos()
        >>> noise = dk.measure.gradient_noise(model, x, x.sum(1), batch=8)
        >>> noise.exact > noise.article > noise.plain
        True
    """
    check_whole("members", members)
    check_whole("batch", batch, 1)
    check_seed(seed)
    subject = subject_of(model, x, y, loss)
    names, weights = list(subject.weights), list(subject.weights.values())
    means, squares = _plain_moments(subject, weights)
    own = _draws(subject, weights, members, seed, batch, shared=False)
    shared = _draws(subject, weights, members, seed, batch, shared=True)
    near = masks_on_gradients(subject.noise) if subject.noise is not None else {}
    exact = _exact(subject, batch)
    layers = []
    for i, name in enumerate(names):
        s2, mu2 = float((squares[i] - means[i].square()).sum()), float(means[i].square().sum())
        sites = [subject.noise.sites[k] for k in near.get(name, ())] if subject.noise is not None else []
        q = math.prod(1 - site.rate for site in sites)
        known = subject.noise is not None and q > 0
        mine, mine_error = variance_and_error(own[i])
        one, one_error = variance_and_error(shared[i])
        layers.append(
            LayerNoise(
                name=name,
                sites=tuple(site.name for site in sites),
                plain=s2 / batch,
                article=(s2 + (1 - q) * mu2) / (q * batch) if known else None,
                exact=exact.get(name),
                measured=float(mine),
                standard_error=float(mine_error),
                shared_article=s2 / (q * batch) + (1 / q - 1) * mu2 if known else None,
                shared_measured=float(one),
                shared_error=float(one_error),
            )
        )
    measured, error = variance_and_error(torch.cat([part.flatten(1) for part in own], dim=1))
    together, together_error = variance_and_error(torch.cat([part.flatten(1) for part in shared], dim=1))
    check_error(tolerance, error, members, "members")
    article = _sum([layer.article for layer in layers])
    whole = _sum([layer.exact for layer in layers])
    predicted = whole if whole is not None else article
    return GradientNoise(
        predicted=None if predicted is None else torch.tensor(predicted, dtype=torch.float64),
        measured=measured,
        standard_error=error,
        formula=_formula(whole, article, subject.why),
        loss=subject.loss.name,
        batch=batch,
        plain=sum(layer.plain for layer in layers),
        article=article,
        exact=whole,
        shared=float(together),
        shared_error=float(together_error),
        shared_article=_sum([layer.shared_article for layer in layers]),
        signal=sum(float(mean.square().sum()) for mean in means),
        layers=tuple(layers),
        tied=tuple(site.name for site in subject.noise.sites if site.tied) if subject.noise else (),
    )


def _formula(exact: float | None, article: float | None, why: str) -> str:
    if exact is not None:
        return "exact for the linear model with squared error"
    if article is not None:
        return "(s^2 + p mu^2) / (q B), which leaves out the noise of the residual and of the layers behind"
    return f"no formula: {why}"


def _sum(parts: list[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def gradients(loss: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    """Gradient of a loss by each weight, float64; zeros where it does not reach."""
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [
        torch.zeros_like(w, dtype=torch.float64) if g is None else g.detach().double()
        for g, w in zip(found, weights, strict=True)
    ]


def _plain_moments(subject: Subject, weights: list[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and mean square over rows of the gradient of one row's loss, without masks."""
    means, squares = ([torch.zeros_like(w, dtype=torch.float64) for w in weights] for _ in range(2))
    for i in range(len(subject.x)):
        row = slice(i, i + 1)
        found = gradients(subject.loss(subject.outputs(x=subject.x[row]), subject.y[row]), weights)
        for mean, square, gradient in zip(means, squares, found, strict=True):
            mean += gradient / len(subject.x)
            square += gradient.square() / len(subject.x)
    return means, squares


def _draws(
    subject: Subject, weights: list[nn.Parameter], members: int, seed: int, batch: int, shared: bool
) -> list[Tensor]:
    """(members, *weight) gradients of minibatches."""
    size = sum(w.numel() for w in weights) * members * 8
    if size > 1 << 32:
        raise MeasurementError(
            f"{members} gradients of this model take {size / 2**30:.0f} GiB. Give fewer members, or set "
            "requires_grad_(False) on weights that are not meant."
        )
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    found = []
    for k in range(members):
        rows = torch.randint(len(subject.x), (batch,), generator=generator)
        samples = None if shared else torch.arange(batch)
        outputs = subject.outputs(seed, k, samples, subject.x[rows])
        found.append(gradients(subject.loss(outputs, subject.y[rows]), weights))
    stacked = [torch.stack(parts) for parts in zip(*found, strict=True)]
    for part in stacked:
        check_finite(part, "a gradient under masks")
    return stacked


def _exact(subject: Subject, batch: int) -> dict[str, float]:
    """Variance of the minibatch gradient of a linear model, by the name of its weights."""
    linear = linear_model(subject)
    if linear is None or linear.targets is None:
        return {}
    first, second = linear_gradient_moments(linear)
    return {
        name: float((second[name].mean(dim=0) - first[name].mean(dim=0).square()).sum()) / batch
        for name in first
    }

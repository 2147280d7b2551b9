"""Three ways to make one prediction of many thinned networks, beside each other.

weight scaling     the plain evaluation pass: all units, no mask
arithmetic mean    of the members: of their probabilities, of their mixture of normal laws, of their values
geometric mean     of the members' densities, scaled to sum to 1; for one softmax layer behind one mask it is weight
                   scaling exactly (Srivastava et al. 2014, sec. 9; Baldi and Sadowski 2013)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dropkit.committee.moments.record import Figure
from dropkit.committee.prediction import RegressionPrediction, check_rows, pick_class
from dropkit.errors import OptionError, ShapeError

Likelihood = Literal["point", "gaussian", "categorical"]


@dataclass(frozen=True, slots=True)
class Average:
    """One way to average, and how good it is.

    Attributes:
        prediction: (B, C) probabilities, or (B, *out) means, in the unit of the output.
        noise: (B, *out), variance predicted for the data, that unit squared; None unless the likelihood is Gaussian.
        loss: negative log-likelihood in nats, mean over the rows; None without y, or for a point model.
        rmse: root mean square error, in the unit of y; None without y, or for classes.
        accuracy: share of rows whose most probable class is right; None without y, or for numbers.

    Standard errors are over rows.
    """

    prediction: Tensor
    noise: Tensor | None = None
    loss: Figure | None = None
    rmse: Figure | None = None
    accuracy: Figure | None = None

    def __str__(self) -> str:
        figures = {"loss": self.loss, "rmse": self.rmse, "accuracy": self.accuracy}
        return ", ".join(f"{name} {figure}" for name, figure in figures.items() if figure is not None)


@dataclass(frozen=True, slots=True)
class Averages:
    """Weight scaling, arithmetic and geometric mean of the same members on the same rows.

    Attributes:
        weight_scaling, arithmetic, geometric: see the head of this module. For a point model the geometric mean of
            normal densities of one width is the normal density around the arithmetic mean: the two are the same.
        members, rows: what was asked.
    """

    weight_scaling: Average
    arithmetic: Average
    geometric: Average
    members: int
    rows: int

    def __str__(self) -> str:
        lines = [f"{self.members} members on {self.rows} rows (+- standard error over rows)"]
        for name in ("weight_scaling", "arithmetic", "geometric"):
            lines.append(f"{name.replace('_', ' '):<16}{getattr(self, name)}".rstrip())
        return "\n".join(lines)


def averages(
    plain: Tensor, members: Tensor, y: Tensor | None = None, likelihood: Likelihood = "point"
) -> Averages:
    """Average the members' outputs in three ways, and score them where the truth is known.

    Args:
        plain: (B, *out), the plain evaluation pass: logits for classes, (B, ..., 2) mean and log variance for Gaussian
            heads, else numbers.
        members: (M, B, *out), the members' outputs, as they are.
        y: (B,) classes, or (B, *out) numbers.
        likelihood: what the outputs are, as in `Committee`.

    Raises:
        ShapeError: the shapes do not agree with each other or with the likelihood.
        OptionError: no such likelihood.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[2.0, 0.0]], [[-2.0, 0.0]]])  # two members that contradict each other
        >>> found = averages(torch.zeros(1, 2), logits, likelihood="categorical")
        >>> [each.prediction.round(decimals=3).tolist() for each in (found.arithmetic, found.geometric)]
        [[[0.5, 0.5]], [[0.5, 0.5]]]

    Source: Srivastava et al. 2014, J. Mach. Learn. Res. 15, sec. 7.5 and 9.
    """
    if members.ndim < 2 or members.shape[0] < 1 or members.shape[1:] != plain.shape:
        raise ShapeError(
            f"members' outputs of shape {tuple(members.shape)} were given beside a plain pass of {tuple(plain.shape)}; "
            "the axes are (M, B, *out) and (B, *out)."
        )
    plain, members = plain.double(), members.double()
    if likelihood == "categorical":
        three = _classes(plain, members, y)
    elif likelihood == "gaussian":
        three = _normal(plain, members, y)
    elif likelihood == "point":
        mean = members.mean(dim=0)
        three = [_scored(Average(each), y) for each in (plain, mean, mean)]
    else:
        raise OptionError(f"likelihood={likelihood!r} was given; it is one of point, gaussian, categorical.")
    weight_scaling, arithmetic, geometric = three
    return Averages(weight_scaling, arithmetic, geometric, len(members), len(plain))


def geometric_probabilities(members: Tensor) -> Tensor:
    """Renormalised geometric mean of class probabilities, from logits or log probabilities.

    q[b, c] = exp(mean over m of log p[m, b, c]) / sum over k of the same = softmax(mean over m of members[m, b])[c]

    Args:
        members: (M, B, C) logits; a constant added to a row changes nothing.
    """
    return members.log_softmax(dim=-1).mean(dim=0).softmax(dim=-1)


def _classes(plain: Tensor, members: Tensor, y: Tensor | None) -> list[Average]:
    if plain.ndim != 2 or plain.shape[1] < 2:
        raise ShapeError(
            f"outputs of shape {tuple(plain.shape)} were given; classes need logits (B, C), C >= 2."
        )
    found = []
    for probabilities in (
        plain.softmax(dim=-1), members.softmax(dim=-1).mean(dim=0), geometric_probabilities(members)
    ):  # fmt: skip
        if y is None:
            found.append(Average(probabilities))
            continue
        chosen = pick_class(probabilities, y)
        loss = -chosen.clamp_min(torch.finfo(torch.float64).tiny).log()
        right = (probabilities.argmax(dim=-1) == y.to(probabilities.device)).double()
        found.append(Average(probabilities, loss=over_rows(loss), accuracy=over_rows(right)))
    return found


def _normal(plain: Tensor, members: Tensor, y: Tensor | None) -> list[Average]:
    """Arithmetic: the mixture of the members' normal laws. Geometric: the normal law of their mean precision."""
    if plain.ndim < 2 or plain.shape[-1] != 2:
        raise ShapeError(
            f"outputs of shape {tuple(plain.shape)} were given; likelihood='gaussian' needs (B, ..., 2)."
        )
    means, noises = members[..., 0], members[..., 1].exp()
    mean = means.mean(dim=0)
    mixture = Average(mean, noises.mean(dim=0) + (means - mean).square().mean(dim=0))
    precision = (1 / noises).mean(dim=0)
    found = [
        Average(plain[..., 0], plain[..., 1].exp()),
        mixture,
        Average((means / noises).mean(dim=0) / precision, 1 / precision),
    ]
    if y is None:
        return found
    two = [means, noises] if len(members) > 1 else [t.expand(2, *t.shape[1:]) for t in (means, noises)]
    check_rows(y, mean.shape)
    scored = []
    for each in found:
        if each is mixture:
            density = RegressionPrediction(*two).log_likelihood(y)
        else:
            assert each.noise is not None
            squared = (y.double() - each.prediction).square()
            density = -0.5 * (squared / each.noise + each.noise.log() + math.log(2 * math.pi))
        loss = -density.flatten(1).mean(dim=1) if density.ndim > 1 else -density
        scored.append(_scored(each, y, over_rows(loss)))
    return scored


def _scored(each: Average, y: Tensor | None, loss: Figure | None = None) -> Average:
    if y is None:
        return each
    check_rows(y, each.prediction.shape)
    squared = (y.to(each.prediction) - each.prediction).square()
    mean = over_rows(squared.flatten(1).mean(dim=1) if squared.ndim > 1 else squared)
    root = math.sqrt(mean.value)
    # The root's error to first order.
    rmse = Figure(root, mean.standard_error / (2 * root) if root > 0 else 0.0)
    return Average(each.prediction, each.noise, loss, rmse)


def over_rows(values: Tensor) -> Figure:
    """Mean of (B,) and its standard error, std / sqrt(B); not a number for a single row."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Figure(float(values.mean()), error)

"""How many functions dropout leaves within reach: degrees of freedom, and how well random labels are learned
by heart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.errors import OptionError
from dropkit.measure.fitting import fit, fresh
from dropkit.measure.linear import LinearModel, linear_model
from dropkit.measure.losses import LossFunction
from dropkit.measure.records import Measurement, said_of_prediction, with_error
from dropkit.measure.sampling import check_error, check_seed, check_whole, mean_and_error
from dropkit.measure.subject import subject_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity(Measurement):
    """Loss on random labels, learned with dropout, minus that learned without, at equal epochs; both without masks.

    Attributes:
        with_dropout, without: the two losses, mean over label draws.
        chance: the loss of an answer that knows nothing of the row.
        degrees, full_degrees: effective degrees of freedom of the linear model with dropout and without; None
            elsewhere.
        epochs: steps of training.
    """

    with_dropout: float
    without: float
    chance: float
    degrees: float | None
    full_degrees: float | None
    epochs: int

    def to_text(self) -> str:
        """How much less is learned by heart."""
        text = (
            f"After {self.epochs} steps on random labels (where knowing nothing costs {self.chance:.4g}) the loss is "
            f"{self.without:.4g} without dropout and {self.with_dropout:.4g} with it: "
            f"{with_error(self.measured, self.standard_error)} {said_of_prediction(self.predicted, self.formula)}."
        )
        if self.degrees is not None and self.full_degrees is not None:
            text += f" Dropout leaves {self.degrees:.4g} of {self.full_degrees:.4g} degrees of freedom."
        return text


def capacity(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossFunction | None = None,
    members: int = 4,
    seed: int = 0,
    epochs: int = 300,
    learning_rate: float = 0.01,
    tolerance: float | None = None,
) -> Capacity:
    """How well copies of the model learn random labels by heart, with dropout and without, at equal epochs.

    df = tr[X (X'X + p/(1-p) diag(X'X))^-1 X'] for a linear model; on pure noise of variance s^2 its loss falls from
    s^2 to s^2 (B - 2 tr S + tr S^2) / B, S being the matrix in the trace.

    Args:
        model, x, y, loss: as in `penalty`. y says what labels are like: whole numbers and switches are shuffled;
            numbers are replaced by Gaussian ones of the same mean and variance. Weights are drawn anew
            (`reset_parameters`).
        members: draws of labels; each trains two copies.
        seed: of labels, weights and masks.
        epochs: steps on all rows at once; of the last half of them the weights are averaged.
        learning_rate: of Adam.
        tolerance: largest standard error that is accepted.

    Returns:
        A `Capacity`.

    Raises:
        NoMaskError, MeasurementError, ShapeError, OptionError: as in `penalty`.

    Source: Zhang et al. 2017, arXiv:1611.03530 (random labels); Hastie, Tibshirani and Friedman 2009, sec. 7.6.
    """
    check_whole("members", members)
    check_whole("epochs", epochs, 2)
    check_seed(seed)
    if not learning_rate > 0:
        raise OptionError(f"learning_rate={learning_rate!r} was given; a positive number is needed.")
    subject = subject_of(model, x, y, loss)
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    found = []
    for k in range(members):
        labels = _random_labels(subject.y, generator)
        losses = []
        for noisy in (True, False):
            network = fit(
                fresh(subject.network, seed + k), subject.x, labels, subject.loss, epochs=epochs,
                learning_rate=learning_rate, seed=seed + k, noisy=noisy,
            )  # fmt: skip
            with torch.no_grad():
                losses.append(subject.loss(network(subject.x.clone()), labels).double())
        found.append(torch.stack(losses))
    both = torch.stack(found)  # (K, 2)
    measured, error = mean_and_error(both[:, 0] - both[:, 1])
    check_error(tolerance, error, members, "members")
    linear = linear_model(subject)
    squared = linear is not None and linear.targets is not None
    formula = (
        "the linear model's, after convergence"
        if squared
        else "no formula: not a linear model with squared error"
    )
    return Capacity(
        predicted=_predicted(linear, subject.y) if linear is not None and squared else None,
        measured=measured,
        standard_error=error,
        formula=formula,
        loss=subject.loss.name,
        with_dropout=float(both[:, 0].mean()),
        without=float(both[:, 1].mean()),
        chance=_chance(subject.y),
        degrees=None if linear is None else effective_degrees(linear),
        full_degrees=None if linear is None else float(torch.linalg.matrix_rank(linear.design)),
        epochs=epochs,
    )


def smoother(linear: LinearModel, noise_variance: float) -> Tensor:
    """S with fitted = S y, (B, B), of the weights that dropout leads to; a bias, which no mask touches, is fitted too.

    Args:
        linear: the model.
        noise_variance: p / (1 - p); 0 gives least squares.
    """
    design = linear.design
    penalty = noise_variance * design.square().sum(dim=0)
    if linear.has_bias:
        design = torch.cat((design, design.new_ones(len(design), 1)), dim=1)
        penalty = torch.cat((penalty, penalty.new_zeros(1)))
    gram = design.T @ design + torch.diag(penalty)
    return design @ torch.linalg.pinv(gram, hermitian=True) @ design.T


def effective_degrees(linear: LinearModel) -> float:
    """tr[X (X'X + p/(1-p) diag(X'X))^-1 X'], less the one that a bias takes."""
    return float(smoother(linear, linear.noise_variance).trace()) - linear.has_bias


def _predicted(linear: LinearModel, y: Tensor) -> Tensor:
    """Loss on Gaussian labels with dropout minus without, expected, after convergence; labels centred about a bias."""
    rows = len(linear.design)
    variance = y.double().var(unbiased=False)
    mean = 0.0 if linear.has_bias else float(y.double().mean())
    left = []
    for noise_variance in (linear.noise_variance, 0.0):
        residual = torch.eye(rows, dtype=torch.float64) - smoother(linear, noise_variance)
        constant = mean * residual.sum(dim=1)
        left.append((variance * residual.square().sum() + constant.square().sum()) / rows)
    return left[0] - left[1]


def _random_labels(y: Tensor, generator: torch.Generator) -> Tensor:
    if not y.is_floating_point():
        return y[torch.randperm(len(y), generator=generator)]
    noise = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    return y.mean() + noise * y.std(unbiased=False)


def _chance(y: Tensor) -> float:
    if y.is_floating_point():
        return float(y.double().var(unbiased=False))
    shares = torch.unique(y, return_counts=True)[1].double() / y.numel()
    return float(-(shares * shares.log()).sum())

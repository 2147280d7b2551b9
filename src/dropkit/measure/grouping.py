"""Whether correlated features share the credit: weights under dropout, ridge, elastic net and lasso, side by side."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.errors import MeasurementError, OptionError
from dropkit.measure.linear import LinearModel, linear_model, ridge
from dropkit.measure.losses import LossFunction
from dropkit.measure.records import Measurement
from dropkit.measure.sampling import check_error, check_seed, check_whole
from dropkit.measure.subject import subject_of


@dataclass(frozen=True, slots=True)
class Pair:
    """Two features that go together.

    Attributes:
        first, second: their places.
        correlation: of the two, uncentred (the cosine of their columns), which is what dropout sees.
        apart: |b_i - b_j| of the weights dropout leads to, on columns of length 1.
        bound: (q/p) |y| sqrt(2 (1 - correlation)), which it cannot pass.
    """

    first: int
    second: int
    correlation: float
    apart: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping(Measurement):
    """Weights of a linear model, (D,): `measured` are the model's own, `predicted` those that dropout leads to.

    `standard_error` is that of the weights over new noise on the targets.

    Attributes:
        least_squares, ridge, elastic_net, lasso: weights of the others; ridge with the mean of dropout's penalties, the
            other two with the same strength as seen by sklearn on columns of length 1.
        pairs: features whose correlation is at least `threshold`, strongest first.
        threshold: as given.
    """

    least_squares: Tensor
    ridge: Tensor
    elastic_net: Tensor
    lasso: Tensor
    pairs: tuple[Pair, ...]
    threshold: float

    def to_text(self) -> str:
        """The strongest pair, under each method."""
        if not self.pairs:
            return f"No two features have a correlation of {self.threshold:g} or more, so none share credit."
        pair = self.pairs[0]
        ways = {
            "dropout": self.predicted if self.predicted is not None else self.measured,
            "ridge": self.ridge,
            "elastic net": self.elastic_net,
            "lasso": self.lasso,
        }
        said = ", ".join(
            f"{n} {float(w[pair.first]):.3g} and {float(w[pair.second]):.3g}" for n, w in ways.items()
        )
        return (
            f"Features {pair.first} and {pair.second} (correlation {pair.correlation:.3f}) get the "
            f"weights: {said}; the "
            f"model has {float(self.measured[pair.first]):.3g} and {float(self.measured[pair.second]):.3g}."
        )


def grouping(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossFunction | None = None,
    members: int = 64,
    seed: int = 0,
    threshold: float = 0.9,
    tolerance: float | None = None,
) -> Grouping:
    """How correlated inputs of a linear model share the credit, under dropout and under other penalties.

    dropout: b = (X'X + p/(1-p) diag(X'X))^-1 X'y,    |b_i - b_j| <= (q/p) |y| sqrt(2 (1 - rho_ij)) on unit columns

    Columns and targets are centred where the model has a bias; then the closed form is that of dropout on centred
    inputs.

    Args:
        model, x, y, loss: as in `penalty`; the model is one linear layer of one output behind dropout.
        members, seed: not needed by the closed forms; accepted as by every instrument.
        threshold: correlation from which two features count as a pair.
        tolerance: largest standard error of a weight that is accepted; the error says how many rows would do.

    Returns:
        A `Grouping`.

    Raises:
        MeasurementError: the model is not linear with one output and squared error.
        NoMaskError, ShapeError, OptionError: as in `penalty`.

    Source: Zou and Hastie 2005, JRSS B 67, theorem 1 (for the elastic net; the bound here is ridge's).
    """
    check_whole("members", members)
    check_seed(seed)
    if not 0 <= threshold <= 1:
        raise OptionError(f"threshold={threshold!r} was given; a correlation from 0 to 1 is needed.")
    subject = subject_of(model, x, y, loss)
    linear = linear_model(subject)
    if linear is None or linear.targets is None or linear.targets.shape[1] != 1:
        raise MeasurementError(
            "the weights of this model have no closed form: grouping needs dropout, then one torch.nn.Linear with one "
            "output, and squared error."
        )
    design, targets = linear.design, linear.targets
    if linear.has_bias:
        design, targets = design - design.mean(dim=0), targets - targets.mean(dim=0)
    lengths = design.norm(dim=0)
    if not bool((lengths > 0).all()):
        raise MeasurementError(f"feature {int(lengths.argmin())} does not vary; leave it out.")
    known = ridge(design, targets, linear.noise_variance)
    error = _errors(design, targets, known, linear)
    check_error(tolerance, error, len(design), "rows")
    unit = design / lengths
    scaled = (known.squeeze(1) * lengths).tolist()
    cosine = unit.T @ unit
    slack = float(targets.norm()) / linear.noise_variance
    pairs = [
        Pair(
            i,
            j,
            float(cosine[i, j]),
            abs(scaled[i] - scaled[j]),
            slack * max(2 * (1 - float(cosine[i, j])), 0.0) ** 0.5,
        )
        for i in range(len(cosine))
        for j in range(i + 1, len(cosine))
        if float(cosine[i, j]) >= threshold
    ]
    gram = design.T @ design
    even = linear.noise_variance * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return Grouping(
        predicted=known.squeeze(1),
        measured=linear.weight[0],
        standard_error=error,
        formula="(X'X + p/(1-p) diag(X'X))^-1 X'y, exact for squared error",
        loss=subject.loss.name,
        least_squares=torch.linalg.lstsq(design, targets, driver="gelsd").solution.squeeze(1),
        ridge=torch.linalg.solve(gram + even, design.T @ targets).squeeze(1),
        elastic_net=_sparse(unit, targets, linear, 0.5) / lengths,
        lasso=_sparse(unit, targets, linear, 1.0) / lengths,
        pairs=tuple(sorted(pairs, key=lambda pair: -pair.correlation)),
        threshold=threshold,
    )


def _errors(design: Tensor, targets: Tensor, weights: Tensor, linear: LinearModel) -> Tensor:
    """Standard errors of the weights over new noise on the targets, its variance taken from the residual."""
    gram = design.T @ design
    inverse = torch.linalg.pinv(gram + linear.noise_variance * torch.diag(gram.diagonal()), hermitian=True)
    degrees = float((inverse @ gram).trace()) + linear.has_bias
    residual = targets - design @ weights
    variance = float(residual.square().sum()) / max(len(design) - degrees, 1.0)
    return (variance * (inverse @ gram @ inverse).diagonal().clamp(min=0)).sqrt()


def _sparse(unit: Tensor, targets: Tensor, linear: LinearModel, share: float) -> Tensor:
    """Elastic net on columns of length 1, as strong as the ridge of the same rate; share 1 is the lasso."""
    solver = importlib.import_module("sklearn.linear_model").ElasticNet
    strength = linear.noise_variance * float((unit.T @ targets).abs().max()) / (1 + linear.noise_variance)
    fitted = solver(
        alpha=strength / len(unit) / max(share, 0.5) * 0.5,
        l1_ratio=share,
        fit_intercept=False,
        max_iter=10**5,
    )
    return torch.from_numpy(fitted.fit(unit.numpy(), targets.squeeze(1).numpy()).coef_)

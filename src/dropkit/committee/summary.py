"""What a committee says when its members are not kept: the records of `predict(x, tolerance=...)`.

They answer what a `Prediction` answers, in float64, from sums whose size does not grow with the members. Rows may
have met different numbers of members. What takes whole members (quantiles, the likelihood of a number, covariance
between rows) is asked of `kept`, the first members that every row met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dropkit.committee.information import doubt
from dropkit.committee.prediction import (
    ClassificationPrediction,
    Interval,
    RegressionPrediction,
    check_level,
    pick_class,
    temper,
)
from dropkit.committee.streaming import CentralMoments, Disagreement, placed
from dropkit.errors import OptionError, ShapeError


@dataclass(frozen=True, slots=True)
class RegressionSummary:
    """What members said about one batch of numbers; total = epistemic + aleatoric, as in `RegressionPrediction`.

    Standard errors are those of a fixed number of members. Where members were drawn until an error was small
    enough (`draw_until`), the number itself looks at the data, and the errors are a little too small.

    Attributes:
        moments: of the members' means, in the unit of the model's output.
        noise: (B, *out) float64, mean of the variances that the members predict, unit squared; None for a point model.
        converged: (B,) bool, whether the tolerance was reached; True throughout where none was asked for.
        not_finite: (B,) int64, of how many members a row had an output that is not finite. Its statistics are
            nan or infinite then, and it was asked no further.
        kept: the first members of all rows, as they are.
    """

    moments: CentralMoments
    noise: Tensor | None
    converged: Tensor
    not_finite: Tensor
    kept: RegressionPrediction

    @property
    def members(self) -> Tensor:
        """(B,) int64, how many members each row met."""
        return self.moments.count

    @property
    def mean(self) -> Tensor:
        """(B, *out), mean over members."""
        return self.moments.mean

    @property
    def epistemic(self) -> Tensor:
        """(B, *out), variance between member means, unit squared, unbiased for a fixed number of members."""
        return self.moments.variance

    @property
    def variance(self) -> Tensor:
        """The same as `epistemic`."""
        return self.moments.variance

    @property
    def aleatoric(self) -> Tensor:
        """(B, *out), mean over members of the predicted noise variance, unit squared; 0 for a point model."""
        return torch.zeros_like(self.mean) if self.noise is None else self.noise

    @property
    def total(self) -> Tensor:
        """(B, *out), epistemic + aleatoric variance, unit squared."""
        return self.epistemic + self.aleatoric

    @property
    def std(self) -> Tensor:
        """(B, *out), square root of `total`, in the unit of the output."""
        return self.total.sqrt()

    @property
    def standard_error(self) -> Tensor:
        """(B, *out), error of `mean` that comes from asking so many members only."""
        return self.moments.standard_error

    @property
    def standard_error_of_spread(self) -> Tensor:
        """(B, *out), error of the spread sqrt(epistemic), from the fourth moment: no normal law is assumed."""
        return self.moments.standard_error_of_spread

    def interval(self, level: float = 0.9, *, factor: float | None = None) -> Interval:
        """mean +- z * std with z of the normal law at this level, or with the factor that was given.

        The law is an assumption: the shape of the members' mixture is not kept. `kept.interval(level)` has the
        quantiles of the first members' mixture instead.

        Raises:
            OptionError: level is not inside (0, 1), or factor is negative or not a number.
        """
        if factor is None:
            tail = torch.tensor((1.0 + check_level(level)) / 2.0, dtype=torch.float64)
            factor = float(torch.special.ndtri(tail))
        if not factor >= 0.0:
            raise OptionError(
                f"factor={factor!r} was given; an interval's half width is factor * std, factor >= 0."
            )
        half = self.std * factor if math.isfinite(factor) else torch.full_like(self.mean, math.inf)
        return Interval(self.mean - half, self.mean + half)

    def log_likelihood(self, y: Tensor) -> Tensor:
        """How likely the seen values are under the mixture of the kept members; see `RegressionPrediction`."""
        return self.kept.log_likelihood(y)

    def rescaled(self, scale: float, shift: float = 0.0) -> RegressionSummary:
        """The summary of scale * output + shift."""
        moments = CentralMoments(
            count=self.moments.count,
            mean=self.moments.mean * scale + shift,
            second=self.moments.second * scale**2,
            third=self.moments.third * scale**3,
            fourth=self.moments.fourth * scale**4,
        )
        noise = None if self.noise is None else self.noise * scale**2
        return replace(self, moments=moments, noise=noise, kept=self.kept.rescaled(scale, shift))

    def merged(self, other: RegressionSummary) -> RegressionSummary:
        """Of the same rows with the members of both, as two machines have them; `kept` are those of the first.

        A row has converged here if it has in both.

        Raises:
            ShapeError: the rows or outputs are not the same, or only one of both predicts noise.
        """
        moments = self.moments.merged(other.moments)
        return replace(
            self,
            moments=moments,
            noise=joined_noise(self, other),
            converged=self.converged & other.converged,
            not_finite=self.not_finite + other.not_finite,
        )

    def rows(self, index: slice | Tensor | Sequence[int]) -> RegressionSummary:
        """The summary of some of the rows."""
        at = as_index(index)
        return RegressionSummary(
            self.moments.rows(at),
            None if self.noise is None else self.noise[at],
            self.converged[at],
            self.not_finite[at],
            self.kept.rows(at),
        )

    def placed(self, index: Tensor, rows: RegressionSummary) -> RegressionSummary:
        """With the rows at `index` replaced, all but what is kept."""
        noise = None
        if self.noise is not None and rows.noise is not None:
            noise = placed(self.noise, index, rows.noise)
        return replace(
            self,
            moments=self.moments.placed(index, rows.moments),
            noise=noise,
            converged=placed(self.converged, index, rows.converged),
            not_finite=placed(self.not_finite, index, rows.not_finite),
        )


@dataclass(frozen=True, slots=True)
class ClassificationSummary:
    """What members said about the classes of one batch; see `ClassificationPrediction`.

    Attributes:
        disagreement: moments and divergences of the members' probabilities.
        converged: (B,) bool, whether the tolerance was reached; True throughout where none was asked for.
        not_finite: (B,) int64, for how many members a row had no probabilities. Its statistics are nan then.
        kept: the first members of all rows, as they are.
        temperature: what `probabilities` are calibrated with; 1 changes nothing.
    """

    disagreement: Disagreement
    converged: Tensor
    not_finite: Tensor
    kept: ClassificationPrediction
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise OptionError(f"temperature={self.temperature!r} was given; it is positive and finite.")

    @property
    def members(self) -> Tensor:
        """(B,) int64, how many members each row met."""
        return self.disagreement.probabilities.count

    @property
    def probabilities(self) -> Tensor:
        """(B, C), mean of the members' probabilities, tempered."""
        return temper(self.disagreement.probabilities.mean, self.temperature)

    @property
    def label(self) -> Tensor:
        """(B,) int64, the most probable class; the lowest index of several."""
        return self.disagreement.probabilities.mean.argmax(dim=-1)

    @property
    def standard_error(self) -> Tensor:
        """(B, C), error of `probabilities` that comes from asking so many members only.

        At temperature T other than 1 an upper bound, exact for two classes, as how classes move together is not kept:
        with q the mean, p the tempered one and k the other classes,

            p_c / T * (se_c (1 - p_c) / q_c + sum over k of p_k se_k / q_k)
        """
        error = self.disagreement.probabilities.standard_error
        if self.temperature == 1.0:
            return error
        p = self.probabilities
        relative = error / self.disagreement.probabilities.mean.clamp_min(torch.finfo(torch.float64).tiny)
        weighted = p * relative
        others = weighted.sum(dim=-1, keepdim=True) - weighted
        return p / self.temperature * (relative * (1.0 - p) + others)

    @property
    def entropy(self) -> Tensor:
        """(B,), nats: how undecided `probabilities` are, doubt and disagreement of the members together."""
        return doubt(self.probabilities)

    @property
    def expected_entropy(self) -> Tensor:
        """(B,), nats: how undecided the members are on average (the aleatoric part), at temperature 1."""
        return (doubt(self.disagreement.probabilities.mean) - self.mutual_information).clamp_min(0.0)

    @property
    def mutual_information(self) -> Tensor:
        """(B,), nats: how much the members disagree (the epistemic part, known as BALD)."""
        return self.disagreement.mutual_information

    @property
    def standard_error_of_spread(self) -> Tensor:
        """(B,), nats: error of `mutual_information` that comes from asking so many members only."""
        return self.disagreement.shares.standard_error

    def log_likelihood(self, y: Tensor) -> Tensor:
        """log probabilities[b, y[b]], nats, of all members, for (B,) class indices."""
        return pick_class(self.probabilities, y).clamp_min(torch.finfo(torch.float64).tiny).log()

    def merged(self, other: ClassificationSummary) -> ClassificationSummary:
        """Of the same rows with the members of both; `kept` and temperature are those of the first.

        Raises:
            ShapeError: the rows or classes are not the same.
        """
        return replace(
            self,
            disagreement=self.disagreement.merged(other.disagreement),
            converged=self.converged & other.converged,
            not_finite=self.not_finite + other.not_finite,
        )

    def rows(self, index: slice | Tensor | Sequence[int]) -> ClassificationSummary:
        """The summary of some of the rows."""
        at = as_index(index)
        return ClassificationSummary(
            self.disagreement.rows(at),
            self.converged[at],
            self.not_finite[at],
            self.kept.rows(at),
            self.temperature,
        )

    def placed(self, index: Tensor, rows: ClassificationSummary) -> ClassificationSummary:
        """With the rows at `index` replaced, all but what is kept."""
        return replace(
            self,
            disagreement=self.disagreement.placed(index, rows.disagreement),
            converged=placed(self.converged, index, rows.converged),
            not_finite=placed(self.not_finite, index, rows.not_finite),
        )


Summary = RegressionSummary | ClassificationSummary


def joined_noise(one: RegressionSummary, other: RegressionSummary) -> Tensor | None:
    """The mean noise of the members of both, weighted by how many each row met."""
    if one.noise is None and other.noise is None:
        return None
    if one.noise is None or other.noise is None:
        raise ShapeError("members with noise and members without were given; they are of two likelihoods.")
    counts = [m.count.double().reshape(-1, *[1] * (one.noise.ndim - 1)) for m in (one.moments, other.moments)]
    return one.noise + (other.noise - one.noise) * (counts[1] / (counts[0] + counts[1]))


def as_index(index: slice | Tensor | Sequence[int]) -> slice | Tensor:
    """What indexes a tensor's first axis without surprise: a slice or a tensor."""
    return index if isinstance(index, slice | Tensor) else torch.as_tensor(list(index), dtype=torch.int64)

"""What a committee says about a batch of rows: frozen records that know their units.

Samples come first in every shape: (M, B, ...), M members, B rows. Statistics are computed in float64 from
differences between members: the mean of squares minus the square of the mean loses all its digits in float32
where the values are large against their spread.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dropkit.committee.information import check_class_probabilities, disagreement, divergence, doubt
from dropkit.committee.mixture import mixture_log_density, mixture_quantile, sample_quantile
from dropkit.committee.streaming import CentralMoments
from dropkit.errors import DropkitWarning, OptionError, ShapeError


class Interval(NamedTuple):
    """From `lower` to `upper`, each (B, *out), in the unit of the model's output."""

    lower: Tensor
    upper: Tensor

    def covers(self, y: Tensor) -> int:
        """How many values lie inside, ends included.

        Raises:
            ShapeError: y has another shape than the ends.
        """
        check_rows(y, self.lower.shape)
        value = y.to(self.lower)
        return int(((self.lower <= value) & (value <= self.upper)).sum())


@dataclass(frozen=True, slots=True)
class RegressionPrediction:
    """What M members say about one batch of numbers.

    total = epistemic + aleatoric, all three variances. Epistemic is the unbiased variance between the members'
    means, so it estimates that of all members there could be; aleatoric is the mean of the noise that the members
    predict for the data. A point model predicts no noise: its aleatoric part is 0 and its intervals are
    about the function, not about the data.

    Attributes:
        samples: (M, B, *out) member means, in the unit of the model's output; M at least 2.
        noise: (M, B, *out) member variances, that unit squared; None for a point model.
    """

    samples: Tensor
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        if self.samples.ndim < 2 or self.samples.shape[0] < 2:
            raise ShapeError(
                f"samples of shape {tuple(self.samples.shape)} were given; the axes are (M, B, *out) with at least "
                "2 members, as the spread between members is what is asked for."
            )
        if self.noise is not None and self.noise.shape != self.samples.shape:
            given = f"{tuple(self.noise.shape)} beside samples of shape {tuple(self.samples.shape)}"
            raise ShapeError(f"noise of shape {given} was given; there is one variance for each member mean.")

    @property
    def members(self) -> int:
        """M, how many members were asked."""
        return self.samples.shape[0]

    @property
    def mean(self) -> Tensor:
        """(B, *out), mean over members."""
        return mean_and_variance(self.samples)[0].to(self.samples.dtype)

    @property
    def epistemic(self) -> Tensor:
        """(B, *out), variance between member means, unit squared, divided by M - 1."""
        return mean_and_variance(self.samples)[1].to(self.samples.dtype)

    @property
    def variance(self) -> Tensor:
        """The same as `epistemic`: spread of the model's output over members."""
        return self.epistemic

    @property
    def aleatoric(self) -> Tensor:
        """(B, *out), mean over members of the predicted noise variance, unit squared; 0 for a point model."""
        if self.noise is None:
            return torch.zeros_like(self.samples[0])
        return self.noise.mean(dim=0, dtype=torch.float64).to(self.samples.dtype)

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
        """(B, *out), error of `mean` that comes from asking M members only; falls like 1 / sqrt(M)."""
        return (self.epistemic / self.members).sqrt()

    @property
    def standard_error_of_spread(self) -> Tensor:
        """(B, *out), error of the spread sqrt(epistemic) that comes from asking M members only.

        From the members' fourth moment, so no normal law is assumed; with few members it is itself a rough guess.
        """
        moments = CentralMoments.of(self.samples)
        return moments.standard_error_of_spread.to(self.samples.dtype)

    @property
    def not_finite(self) -> Tensor:
        """(B,) int64, of how many members an output (or noise) is not finite; then the row's statistics are not."""
        return (
            count_not_finite(self.samples)
            if self.noise is None
            else count_not_finite(self.samples, self.noise)
        )

    def joint_covariance(self, rows: slice | Tensor | Sequence[int] = slice(None)) -> Tensor:
        """How the outputs of some rows move together from member to member; see `joint_covariance`.

        Returns:
            (b, *out, b, *out), unit squared, divided by M - 1; its diagonal is `epistemic`.
        """
        return joint_covariance(self.samples[:, rows])

    def interval(self, level: float = 0.9, *, factor: float | None = None) -> Interval:
        """Where the value lies with probability `level`, if the committee is right.

        With noise: the (1 - level) / 2 and (1 + level) / 2 quantiles of the mixture of the members' normal laws,
            F(q) = mean over m of Phi((q - samples[m]) / sqrt(noise[m])).
        A point model: the same quantiles of the members' values, interpolated linearly.
        With a factor (as `ConformalInterval` gives it): mean +- factor * std, and the level is not looked at.

        Raises:
            OptionError: level is not inside (0, 1), or factor is negative or not a number.
        """
        if factor is not None:
            if not factor >= 0.0:
                raise OptionError(
                    f"factor={factor!r} was given; an interval's half width is factor * std, factor >= 0."
                )
            half = self.std * factor if math.isfinite(factor) else torch.full_like(self.mean, math.inf)
            return Interval(self.mean - half, self.mean + half)
        tail = (1.0 - check_level(level)) / 2.0
        return Interval(self.quantile(tail), self.quantile(1.0 - tail))

    def quantile(self, q: float) -> Tensor:
        """(B, *out), quantile of the members' mixture of normal laws, or of their values for a point model.

        Raises:
            OptionError: q is not inside (0, 1).
        """
        check_level(q, "q")
        means = self.samples.detach().double()
        if self.noise is None:
            return sample_quantile(means, q).to(self.samples.dtype)
        return mixture_quantile(means, self.noise.detach().double().sqrt(), q).to(self.samples.dtype)

    def log_likelihood(self, y: Tensor) -> Tensor:
        """How likely the seen values are under the members' mixture of normal laws.

        L[b] = log mean over m of Normal(y[b]; samples[m, b], noise[m, b])

        Args:
            y: (B, *out), in the unit of the output.

        Returns:
            (B, *out), in nats (the density is per unit of the output).

        Raises:
            OptionError: a point model predicts no noise.
            ShapeError: y has another shape than `mean`.
        """
        if self.noise is None:
            raise OptionError(
                "a likelihood was asked of a point model, which predicts no noise. Use likelihood='gaussian', or give "
                "the noise: prediction.with_noise(variance)."
            )
        check_rows(y, self.samples.shape[1:])
        density = mixture_log_density(y, self.samples.double(), self.noise.double())
        return density.to(self.samples.dtype)

    def with_noise(self, variance: float | Tensor) -> RegressionPrediction:
        """The same members with this noise variance for all of them (float, or broadcastable to (B, *out)).

        Raises:
            OptionError: a variance is not positive.
        """
        noise = torch.as_tensor(variance, dtype=self.samples.dtype, device=self.samples.device)
        if not bool((noise > 0).all()):
            raise OptionError(f"variance={variance!r} was given; a noise variance is positive.")
        return replace(self, noise=noise.expand(self.samples.shape))

    def rescaled(self, scale: float, shift: float = 0.0) -> RegressionPrediction:
        """The prediction of scale * output + shift: from standardised targets back to the user's unit.

        In float64, so that a large shift does not eat the spread.
        """
        noise = None if self.noise is None else self.noise.double() * scale**2
        return RegressionPrediction(self.samples.double() * scale + shift, noise)

    def first(self, members: int) -> RegressionPrediction:
        """What a smaller committee, the first `members` of this one, would have said."""
        check_fewer(members, self.members)
        return RegressionPrediction(
            self.samples[:members], None if self.noise is None else self.noise[:members]
        )

    def rows(self, index: slice | Tensor | Sequence[int]) -> RegressionPrediction:
        """The prediction for some of the rows."""
        return RegressionPrediction(
            self.samples[:, index], None if self.noise is None else self.noise[:, index]
        )


@dataclass(frozen=True, slots=True)
class ClassificationPrediction:
    """What M members say about the classes of one batch.

    Probabilities are averaged, never logits: one very sure member out of many must not outvote the others.
    A temperature (see `Temperature`) acts on the average and leaves the members as they are, so
    entropy = expected_entropy + mutual_information where the temperature is 1.

    Attributes:
        samples: (M, B, C) class probabilities of each member; M at least 2.
        temperature: what `probabilities` are calibrated with; 1 changes nothing.
    """

    samples: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_class_probabilities(self.samples, unknown=True)
        if self.samples.shape[0] < 2:
            raise ShapeError(f"{self.samples.shape[0]} member was given; a spread takes at least 2.")
        if not 0.0 < self.temperature < math.inf:
            raise OptionError(
                f"temperature={self.temperature!r} was given; a temperature is positive and finite."
            )

    @property
    def members(self) -> int:
        """M, how many members were asked."""
        return self.samples.shape[0]

    @property
    def probabilities(self) -> Tensor:
        """(B, C), mean of the members' probabilities, tempered: q ** (1 / T), then scaled to sum to 1."""
        return temper(self.samples.mean(dim=0, dtype=torch.float64), self.temperature).to(self.samples.dtype)

    @property
    def label(self) -> Tensor:
        """(B,) int64, the most probable class; the lowest index of several. A temperature does not change it."""
        return self.samples.mean(dim=0, dtype=torch.float64).argmax(dim=-1)

    @property
    def standard_error(self) -> Tensor:
        """(B, C), error of `probabilities` that comes from asking M members only.

        At temperature 1 the standard deviation over members / sqrt(M); else that of the tempering linearised
        around the mean q:  d p_c = p_c / T * (d q_c / q_c - sum over k of p_k * d q_k / q_k).
        """
        member = self.samples.double()
        if self.temperature != 1.0:
            mean = member.mean(dim=0)
            tempered = temper(mean, self.temperature)
            relative = member / mean.clamp_min(torch.finfo(torch.float64).tiny)
            pull = (tempered * relative).sum(dim=-1, keepdim=True)
            member = tempered / self.temperature * (relative - pull)
        return (mean_and_variance(member)[1] / self.members).sqrt().to(self.samples.dtype)

    @property
    def standard_error_of_spread(self) -> Tensor:
        """(B,), nats: error of `mutual_information` that comes from asking M members only.

        Standard deviation over members of KL(samples[m] || mean) / sqrt(M), to first order. The estimate is also low
        by about half the sum over classes of variance / probability, divided by M: an error of order 1 / M.
        """
        member = self.samples.double()
        shares = divergence(member, mean_and_variance(member)[0])
        return (mean_and_variance(shares)[1] / self.members).sqrt().to(self.samples.dtype)

    @property
    def not_finite(self) -> Tensor:
        """(B,) int64, of how many members the probabilities are no numbers; then the row's statistics are not."""
        return count_not_finite(self.samples)

    def joint_covariance(self, rows: slice | Tensor | Sequence[int] = slice(None)) -> Tensor:
        """How the probabilities of some rows move together from member to member; see `joint_covariance`.

        Returns:
            (b, C, b, C), divided by M - 1.
        """
        return joint_covariance(self.samples[:, rows])

    @property
    def entropy(self) -> Tensor:
        """(B,), nats: how undecided `probabilities` are, from the members' doubt and their disagreement together."""
        return doubt(self.probabilities.double()).to(self.samples.dtype)

    @property
    def expected_entropy(self) -> Tensor:
        """(B,), nats: how undecided the members are on average (the aleatoric part)."""
        return doubt(self.samples.double()).mean(dim=0).to(self.samples.dtype)

    @property
    def mutual_information(self) -> Tensor:
        """(B,), nats: how much the members disagree (the epistemic part, known as BALD)."""
        return disagreement(self.samples)

    def log_likelihood(self, y: Tensor) -> Tensor:
        """How likely the seen classes are: L[b] = log probabilities[b, y[b]].

        A probability that is 0 in the samples' dtype counts as the smallest normal number of that dtype
        (float32: -87.3 nats), so that one row cannot make a whole average infinite.

        Args:
            y: (B,) int64 class indices.

        Raises:
            ShapeError: y is not (B,).
            OptionError: a class index is outside 0 .. C - 1.
        """
        chosen = pick_class(self.probabilities, y)
        return chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log()

    def first(self, members: int) -> ClassificationPrediction:
        """What a smaller committee, the first `members` of this one, would have said."""
        check_fewer(members, self.members)
        return replace(self, samples=self.samples[:members])

    def rows(self, index: slice | Tensor | Sequence[int]) -> ClassificationPrediction:
        """The prediction for some of the rows."""
        return replace(self, samples=self.samples[:, index])


Prediction = RegressionPrediction | ClassificationPrediction


def mean_and_variance(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the members, in float64.

    With d[m] = samples[m] - samples[0], which is exact where members are close and 0 where they agree:
    mean = samples[0] + mean(d),    variance = (sum over m of d[m] ** 2 - M mean(d) ** 2) / (M - 1)

    The difference loses at most a factor M of the digits, when member 0 is far from all others; sums are in float64.

    Args:
        samples: (M, ...), M at least 2.
    """
    members, first = samples.shape[0], samples[0]
    deviation = samples - first
    shift = deviation.mean(dim=0, dtype=torch.float64)
    squares = deviation.square().sum(dim=0, dtype=torch.float64)
    return first.double() + shift, (squares - members * shift.square()).clamp_min(0.0) / (members - 1)


def joint_covariance(samples: Tensor) -> Tensor:
    """Covariance over members of everything that a batch of rows puts out.

    cov[i, j] = sum over m of (samples[m, i] - mean[i]) (samples[m, j] - mean[j]) / (M - 1)

    It says something because member m is one function for all rows. Members that draw masks anew for each
    row have no covariance between rows but by chance.

    Args:
        samples: (M, b, *out), M at least 2.

    Returns:
        (b, *out, b, *out) float64; symmetric, no negative eigenvalue, of rank M - 1 at most.
    """
    value = samples.double()
    deviation = value - value[0]
    deviation = (deviation - deviation.mean(dim=0)).flatten(1)
    return (deviation.T @ deviation / (len(value) - 1)).reshape(*samples.shape[1:], *samples.shape[1:])


def count_not_finite(*samples: Tensor) -> Tensor:
    """(B,) int64: of how many members a row has an output that is not finite, in any of (M, B, *out) tensors."""
    if all(bool(s.detach().sum().isfinite()) for s in samples):
        return torch.zeros(samples[0].shape[1], dtype=torch.int64, device=samples[0].device)
    finite = torch.stack([s.detach().isfinite()[..., None].flatten(2).all(dim=-1) for s in samples])
    return (~finite.all(dim=0)).sum(dim=0)


def warn_of_rows(not_finite: Tensor, stacklevel: int = 2) -> None:
    """A `DropkitWarning` that names the first rows whose outputs were not finite, if there are any.

    Args:
        not_finite: (B,), of how many members.
        stacklevel: as in `warnings.warn`, counted from the caller.
    """
    rows = not_finite.nonzero().flatten().tolist()
    if rows:
        named = ", ".join(str(row) for row in rows[:6]) + (
            f" and {len(rows) - 6} more" if len(rows) > 6 else ""
        )
        warnings.warn(
            f"outputs of {len(rows)} of {len(not_finite)} rows are not finite: rows {named}. Their statistics are nan "
            "or infinite, those of the other rows are not touched. Look at these rows' inputs.",
            DropkitWarning,
            stacklevel=stacklevel + 1,
        )


def temper(probabilities: Tensor, temperature: float) -> Tensor:
    """Sharpen (T < 1) or flatten (T > 1) class probabilities: p[c] ** (1 / T) / sum over k of p[k] ** (1 / T).

    For one network this is softmax(logits / T).

    Args:
        probabilities: (..., C). A 0 counts as the smallest normal number of the dtype.
    """
    if temperature == 1.0:
        return probabilities
    floored = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny)
    return torch.softmax(floored.log() / temperature, dim=-1)


def pick_class(probabilities: Tensor, y: Tensor) -> Tensor:
    """(B,), the probability of each row's class; checks the classes.

    Raises:
        ShapeError: y is not (B,).
        OptionError: a class index is outside 0 .. C - 1 or not an integer.
    """
    check_rows(y, probabilities.shape[:1])
    classes = probabilities.shape[-1]
    if y.is_floating_point() or y.dtype == torch.bool:
        raise OptionError(
            f"classes of {y.dtype} were given; a class is an integer index, 0 to {classes - 1}."
        )
    if y.numel() and not (0 <= int(y.min()) and int(y.max()) < classes):
        raise OptionError(
            f"classes from {int(y.min())} to {int(y.max())} were given; they run from 0 to {classes - 1}."
        )
    return probabilities.gather(-1, y.to(probabilities.device, torch.int64)[:, None])[:, 0]


def check_rows(y: Tensor, shape: Sequence[int]) -> None:
    """Say so if y has not this shape: broadcasting (B,) against (B, 1) would silently compare all with all."""
    if tuple(y.shape) != tuple(shape):
        raise ShapeError(
            f"y of shape {tuple(y.shape)} was given for a prediction of shape {tuple(shape)}; they must agree."
        )


def check_level(level: float, name: str = "level") -> float:
    """Return the level, or say that it is not inside (0, 1)."""
    if not 0.0 < level < 1.0:
        hint = f" As a percentage, write {level / 100}." if 1 < level < 100 else ""
        raise OptionError(f"{name}={level!r} was given; it lies between 0 and 1, both excluded.{hint}")
    return level


def check_fewer(members: int, there: int) -> None:
    """Say so if a committee of `there` members has no first `members`, or if they are too few for a spread."""
    if not 2 <= members <= there:
        raise OptionError(
            f"the first {members} members were asked for; there are {there}, and a spread takes at least 2."
        )

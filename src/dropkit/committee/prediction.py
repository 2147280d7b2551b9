"""What a committee says about a batch of rows: frozen records that know their units.

Samples come first in every shape: (M, B, ...), M members, B rows. Statistics are computed in float64 from
differences between members: the mean of squares minus the square of the mean loses all its digits in float32
where the values are large against their spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dropkit.committee.information import (
    check_class_probabilities,
    entropy,
    expected_entropy,
    mutual_information,
)
from dropkit.errors import OptionError, ShapeError


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
            # torch.quantile refuses more than 16 million elements; sorting does not.
            return _interpolate(means.sort(dim=0).values, q).to(self.samples.dtype)
        return _mixture_quantile(means, self.noise.detach().double().sqrt(), q).to(self.samples.dtype)

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
        noise = self.noise.double()
        squared = (y.to(noise) - self.samples.double()).square()
        log_density = -0.5 * (squared / noise + noise.log() + math.log(2.0 * math.pi))
        return (torch.logsumexp(log_density, dim=0) - math.log(self.members)).to(self.samples.dtype)

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
        check_class_probabilities(self.samples)
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
    def entropy(self) -> Tensor:
        """(B,), nats: how undecided `probabilities` are, from the members' doubt and their disagreement together."""
        return entropy(self.probabilities)

    @property
    def expected_entropy(self) -> Tensor:
        """(B,), nats: how undecided the members are on average (the aleatoric part)."""
        return expected_entropy(self.samples)

    @property
    def mutual_information(self) -> Tensor:
        """(B,), nats: how much the members disagree (the epistemic part, known as BALD)."""
        return mutual_information(self.samples)

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
    mean = samples[0] + mean(d),    variance = sum over m of (d[m] - mean(d)) ** 2 / (M - 1)

    Args:
        samples: (M, ...), M at least 2.
    """
    samples = samples.double()
    deviation = samples - samples[0]
    shift = deviation.mean(dim=0)
    return samples[0] + shift, (deviation - shift).square().sum(dim=0) / (samples.shape[0] - 1)


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


def _interpolate(ordered: Tensor, q: float) -> Tensor:
    position = q * (ordered.shape[0] - 1)
    below = min(int(position), ordered.shape[0] - 2)
    return torch.lerp(ordered[below], ordered[below + 1], position - below)


def _mixture_quantile(means: Tensor, stds: Tensor, q: float) -> Tensor:
    """Solve mean over m of Phi((x - means[m]) / stds[m]) = q for x, by Newton steps kept inside a bracket.

    The mixture's quantile lies between the smallest and the largest of its members' quantiles.
    """
    z = float(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)))
    stds = stds.clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
    member = means + stds * z
    low, high = member.amin(dim=0), member.amax(dim=0)
    x = member.mean(dim=0)
    for turn in range(200):  # 4 to 8 turns do mostly
        scaled = (x - means) / stds
        excess = torch.special.ndtr(scaled).mean(dim=0) - q
        low, high = torch.where(excess < 0, x, low), torch.where(excess > 0, x, high)
        density = (torch.exp(-0.5 * scaled.square()) / (stds * math.sqrt(2.0 * math.pi))).mean(dim=0)
        newton = torch.where(excess == 0, x, x - excess / density)
        done = (newton - x).abs() <= 1e-12 * torch.maximum(x.abs(), high - low)
        # Between two far modes Newton creeps or leaves the bracket: halve there, and on each fourth turn anyway.
        inside = (newton > low) & (newton < high) & (turn % 4 != 3)
        x = torch.where(done | inside, newton, (low + high) / 2)
        if bool(done.all()):
            break
    return x

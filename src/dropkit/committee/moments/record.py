"""What moments say: mean and variance of all members there could be, and how far that is from some that were asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dropkit.errors import OptionError, ShapeError


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and its standard error."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.3g} +- {self.standard_error:.1g}"


@dataclass(frozen=True, slots=True)
class Check:
    """How far moments are from what members say, over some rows and all outputs.

    Attributes:
        mean_error: root mean square of (mean - mean of the members), in units of the members' standard deviation
            (root mean square too). Sampling alone makes it `mean_floor`.
        mean_floor: 1 / sqrt(M).
        std_ratio: standard deviation in one pass / that of the members, root mean squares; 1 is right. Its standard
            error is that of sampling, by leaving out one member after the other.
        members, rows: what was asked.
    """

    mean_error: float
    mean_floor: float
    std_ratio: Figure
    members: int
    rows: int

    @property
    def agrees(self) -> bool:
        """Whether both errors are no larger than twice (mean) and three times (std) what sampling explains."""
        off = abs(self.std_ratio.value - 1)
        return self.mean_error <= 2 * self.mean_floor and off <= 3 * self.std_ratio.standard_error + 1e-6

    def __str__(self) -> str:
        off = 100 * (self.std_ratio.value - 1)
        error = 100 * self.std_ratio.standard_error
        verdict = "within sampling error" if self.agrees else "more than sampling explains"
        return (
            f"against {self.members} members on {self.rows} rows: standard deviation {off:+.1f} % (+- {error:.1f} % of "
            f"sampling), mean off by {self.mean_error:.2f} standard deviations (sampling alone {self.mean_floor:.2f}); "
            f"{verdict}"
        )


class Joint(Protocol):
    """What gives the covariance between outputs."""

    def covariance(self, rows: slice = slice(None)) -> Tensor:
        """(rows, n, n), with n the number of outputs of a row."""
        ...


@dataclass(frozen=True, slots=True)
class Factors:
    """Covariance by the sources that were carried to the output.

    cov[b] = sum over s of factor[b, s] factor[b, s]^T + diag(what of each variance they leave unexplained)

    Attributes:
        factor: (B, S, *out).
        variance: (B, *out).
    """

    factor: Tensor
    variance: Tensor

    def covariance(self, rows: slice = slice(None)) -> Tensor:
        """(rows, n, n)."""
        factor = self.factor[rows].flatten(2)
        own = self.variance[rows].flatten(1) - factor.square().sum(dim=1)
        return factor.mT @ factor + torch.diag_embed(own.clamp_min(0.0))


@dataclass(frozen=True, slots=True)
class LastLayer:
    """Covariance by a last linear layer, W (n, D).

    cov[b] = a a^T * (W diag(own[b]) W^T + sum over s of (W f[b, s]) (W f[b, s])^T)

    Attributes:
        x: (B, ...), the network's inputs.
        weight: W.
        scale: gives a, (n,), what the layer's outputs are multiplied with before they are the network's.
        laws: rows -> own, (R, D), and f, (R, S, D), the law of the layer's inputs.
    """

    x: Tensor
    weight: Tensor
    scale: Callable[[], Tensor]
    laws: Callable[[Tensor], tuple[Tensor, Tensor]]

    def covariance(self, rows: slice = slice(None)) -> Tensor:
        """(rows, n, n)."""
        own, factor = self.laws(self.x[rows])
        weight = self.scale()[:, None] * self.weight
        through = factor @ weight.T
        return (weight * own[:, None, :]) @ weight.T + through.mT @ through


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance over all members there could be, of the model's output as it is.

    For classes these are logits: see `probabilities` for what can be said about those.

    Attributes:
        mean: (B, *out), in the unit of the output.
        variance: (B, *out), that unit squared; of all members, so nothing is divided by M - 1.
        exact: True where the network is a straight line from its masks on: no error but rounding.
        left: the approximations that were made, "operator: what".
        sources: chances that were carried through with their correlations.
        joint: what gives the covariance between outputs, or None where correlations were not carried that far.
        check: the comparison with members, or None where there was none.
    """

    mean: Tensor
    variance: Tensor
    exact: bool
    left: tuple[str, ...]
    sources: int
    joint: Joint | None = None
    check: Check | None = None

    @property
    def standard_error(self) -> None:
        """None: there is no sampling error; what is off is in `check`."""
        return None

    @property
    def std(self) -> Tensor:
        """(B, *out), square root of the variance."""
        return self.variance.sqrt()

    def covariance(self, rows: slice = slice(None)) -> Tensor:
        """Covariance between the outputs of a row, (rows, n, n) with n the number of outputs; computed when asked for.

        Raises:
            OptionError: it was not carried; ask for covariance="full".
        """
        if self.joint is None:
            raise OptionError(
                "covariances were asked for, and only variances were carried: the last layer is not linear. Ask for "
                "moments with covariance='full'."
            )
        return self.joint.covariance(rows)

    def probabilities(self) -> Tensor:
        """(B, C), mean class probabilities where the output is logits, by an approximation.

        q[c] ~ 1 / sum over k of exp((m[k] - m[c]) / sqrt(1 + pi / 8 * Var(z[k] - z[c])))

        Each pair of classes is taken as one logistic unit under a Gaussian; the result is scaled to sum to 1.
        Without a covariance, logits are taken as independent.

        Raises:
            ShapeError: the output is not (B, C) with C at least 2.

        Source: Lu, Ie and Sha 2020, Mean-field approximation to Gaussian-softmax integral, arXiv:2006.07584 ("mf2").
        """
        if self.mean.ndim != 2 or self.mean.shape[1] < 2:
            given = tuple(self.mean.shape)
            raise ShapeError(
                f"outputs of shape {given} were given; class probabilities need logits (B, C), C >= 2."
            )
        between = torch.zeros(len(self.mean), 1, 1, dtype=self.mean.dtype, device=self.mean.device)
        if self.joint is not None:
            between = self.covariance()
            between = between - torch.diag_embed(between.diagonal(dim1=1, dim2=2))
        of_pair = (self.variance[:, :, None] + self.variance[:, None, :] - 2 * between).clamp_min(0.0)
        of_pair = of_pair * (1 - torch.eye(self.mean.shape[1], dtype=of_pair.dtype, device=of_pair.device))
        apart = (self.mean[:, None, :] - self.mean[:, :, None]) / (1 + math.pi / 8 * of_pair).sqrt()
        return torch.softmax(-torch.logsumexp(apart, dim=-1), dim=-1)

    def checked(self, samples: Tensor) -> Moments:
        """The same with a comparison with members that were asked about the first rows.

        Args:
            samples: (M, R, *out), what M >= 3 members put out for the first R rows.

        Raises:
            ShapeError: the shapes do not agree.
        """
        return replace(self, check=compare(self, samples))

    def __str__(self) -> str:
        how = "exact" if self.exact else "approximated: " + "; ".join(self.left)
        said = f"mean and variance in one pass, {self.sources} sources carried; {how}"
        return said if self.check is None else f"{said}; {self.check}"


def compare(moments: Moments, samples: Tensor) -> Check:
    """Moments against members, (M, R, *out) on the first R rows; see `Check`.

    Raises:
        ShapeError: the shapes do not agree, or there are less than three members.
    """
    members, rows = samples.shape[:2]
    if members < 3 or samples.shape[2:] != moments.mean.shape[1:] or rows > len(moments.mean) or rows == 0:
        raise ShapeError(
            f"samples of shape {tuple(samples.shape)} were given for moments of shape {tuple(moments.mean.shape)}; "
            "the axes are (M, R, *out), M >= 3 members on the first R rows."
        )
    drawn = samples.double() - samples[0].double()
    shift = drawn.mean(dim=0)
    apart = (drawn - shift).square()
    variance = float(apart.sum(dim=0).mean()) / (members - 1)
    predicted = float(moments.variance[:rows].double().mean())
    off = float((moments.mean[:rows].double() - samples[0].double() - shift).square().mean())
    if variance == 0.0:
        ratio = Figure(1.0 if predicted == 0.0 else math.inf, 0.0)
        return Check(0.0 if off == 0.0 else math.inf, 1 / math.sqrt(members), ratio, members, rows)
    # Without member m: the sum of squares falls by M / (M - 1) times its own square.
    fall = apart.flatten(1).mean(dim=1) * members / (members - 1)
    without = (variance * (members - 1) - fall) / (members - 2)
    ratios = (predicted / without.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    spread = (ratios - ratios.mean()).square().sum() * (members - 1) / members
    ratio = Figure(math.sqrt(predicted / variance), float(spread.sqrt()))
    return Check(math.sqrt(off / variance), 1 / math.sqrt(members), ratio, members, rows)

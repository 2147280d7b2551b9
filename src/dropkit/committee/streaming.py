"""Statistics of members that come in pieces: nothing but a few sums is kept, however many members there are.

All sums are of powers of deviations from the mean so far, in float64, and two of them are joined by exact identities
whose terms do not cancel. (The mean of squares minus the square of the mean would lose its digits where
the values are large against their spread.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dropkit.committee.information import divergence
from dropkit.errors import ShapeError

Index = Tensor | slice


@dataclass(frozen=True, slots=True)
class CentralMoments:
    """Mean and sums of powers of the deviations from it, over n members; n may differ from row to row.

    S_k[b] = sum over m of (x[m, b] - mean[b]) ** k

    Attributes:
        count: (B,) int64, n, how many members each row has met.
        mean: (B, *out) float64, in the unit of x.
        second: (B, *out), S_2.
        third: (B, *out), S_3.
        fourth: (B, *out), S_4.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [6.0], [7.0]])
        >>> halves = CentralMoments.of(x[:1]).merged(CentralMoments.of(x[1:]))
        >>> halves.mean, halves.variance
        (tensor([4.], dtype=torch.float64), tensor([8.6667], dtype=torch.float64))

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances";
        Pébay 2008, SAND2008-6212, eq. 3.1, for the third and fourth.
    """

    count: Tensor
    mean: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor

    @classmethod
    def of(cls, samples: Tensor) -> CentralMoments:
        """Of one piece.

        Args:
            samples: (m, B, *out), at least one member.

        Raises:
            ShapeError: there is no member, or no axis of rows.
        """
        if samples.ndim < 2 or samples.shape[0] == 0:
            raise ShapeError(
                f"samples of shape {tuple(samples.shape)} were given; the axes are (members, rows, *out), with at "
                "least one member."
            )
        value = samples.double()
        # Deviations from the first member are exact where members are close, and 0 where they agree.
        deviation = value - value[0]
        shift = deviation.mean(dim=0)
        deviation = deviation - shift
        square = deviation.square()
        return cls(
            count=torch.full((value.shape[1],), value.shape[0], dtype=torch.int64, device=value.device),
            mean=value[0] + shift,
            second=square.sum(dim=0),
            third=(square * deviation).sum(dim=0),
            fourth=square.square().sum(dim=0),
        )

    def merged(self, other: CentralMoments) -> CentralMoments:
        """Of the same rows with the members of both.

        With d = mean_B - mean_A and n = a + b members, as a = n_A and b = n_B:

            mean = mean_A + d b / n
            S_2 = S_2A + S_2B + d^2 a b / n
            S_3 = S_3A + S_3B + d^3 a b (a - b) / n^2 + 3 d (a S_2B - b S_2A) / n
            S_4 = S_4A + S_4B + d^4 a b (a^2 - a b + b^2) / n^3
                  + 6 d^2 (a^2 S_2B + b^2 S_2A) / n^2 + 4 d (a S_3B - b S_3A) / n

        Raises:
            ShapeError: the rows or outputs are not the same.
        """
        if self.mean.shape != other.mean.shape:
            raise ShapeError(
                f"statistics of (B, *out) = {tuple(self.mean.shape)} and {tuple(other.mean.shape)} were given; "
                "members are joined for the same rows."
            )
        a, b = (self._for_values(m.count.double()) for m in (self, other))
        n = a + b
        d = other.mean - self.mean
        share = a * b / n
        return CentralMoments(
            count=self.count + other.count,
            mean=self.mean + d * (b / n),
            second=self.second + other.second + d.square() * share,
            third=self.third
            + other.third
            + d**3 * share * (a - b) / n
            + 3.0 * d * (a * other.second - b * self.second) / n,
            fourth=self.fourth
            + other.fourth
            + d**4 * share * (a.square() - a * b + b.square()) / n.square()
            + 6.0 * d.square() * (a.square() * other.second + b.square() * self.second) / n.square()
            + 4.0 * d * (a * other.third - b * self.third) / n,
        )

    @property
    def variance(self) -> Tensor:
        """(B, *out), unbiased variance over members, unit squared; nan for a single member."""
        return self.second / (self._n - 1.0)

    @property
    def standard_error(self) -> Tensor:
        """(B, *out), of the mean: sqrt(variance / n)."""
        return (self.variance / self._n).sqrt()

    @property
    def standard_error_of_variance(self) -> Tensor:
        """(B, *out), unit squared: Monte Carlo error of `variance`, whatever the law of the members.

        sqrt((S_4 / n - variance^2 (n - 3) / (n - 1)) / n), which for a normal law tends to variance sqrt(2 / n).

        Source: Cramér 1946, "Mathematical methods of statistics", sec. 27.4.
        """
        n, variance = self._n, self.variance
        # S_4 / n >= (S_2 / n)^2, so what stands under the root is never negative but by rounding.
        inner = self.fourth / n - variance.square() * (n - 3.0) / (n - 1.0)
        return (inner.clamp_min(0.0) / n).sqrt()

    @property
    def standard_error_of_spread(self) -> Tensor:
        """(B, *out), in the unit of x: of the standard deviation s, se(s^2) / (2 s); 0 where all members agree."""
        spread = self.variance.sqrt()
        error = self.standard_error_of_variance / (2.0 * spread)
        return torch.where(spread == 0.0, spread, error)

    def rows(self, index: Index) -> CentralMoments:
        """Of some of the rows."""
        return CentralMoments(
            self.count[index], self.mean[index], self.second[index], self.third[index], self.fourth[index]
        )

    def placed(self, index: Tensor, rows: CentralMoments) -> CentralMoments:
        """With the rows at `index` replaced by others."""
        return CentralMoments(
            placed(self.count, index, rows.count),
            placed(self.mean, index, rows.mean),
            placed(self.second, index, rows.second),
            placed(self.third, index, rows.third),
            placed(self.fourth, index, rows.fourth),
        )

    @property
    def _n(self) -> Tensor:
        return self._for_values(self.count.double())

    def _for_values(self, per_row: Tensor) -> Tensor:
        return per_row.reshape(-1, *[1] * (self.mean.ndim - 1))


@dataclass(frozen=True, slots=True)
class Disagreement:
    """How far members' class probabilities lie from their mean, in pieces that can be joined.

    divergence[b] = sum over m of KL(p[m, b] || q[b]),    q = mean over m of p;  divergence / n = mutual information

    Attributes:
        probabilities: moments of p, (B, C).
        divergence: (B,) float64, nats, never negative.
        shares: moments over members of KL(p[m, b] || q[b]), (B,), with the q that was known when they came. Their
            spread is the error of the mutual information.
    """

    probabilities: CentralMoments
    divergence: Tensor
    shares: CentralMoments

    @classmethod
    def of(cls, probs: Tensor) -> Disagreement:
        """Of one piece, (m, B, C) class probabilities, which the caller has checked."""
        moments = CentralMoments.of(probs)
        member = divergence(probs.double(), moments.mean)
        return cls(moments, member.sum(dim=0), CentralMoments.of(member))

    def with_members(self, probs: Tensor) -> Disagreement:
        """Of the same rows with more members, (m, B, C)."""
        moments = self.probabilities.merged(CentralMoments.of(probs))
        late = CentralMoments.of(divergence(probs.double(), moments.mean))
        return Disagreement(
            moments,
            self._joined(Disagreement.of(probs), moments),
            self.shares.merged(late),
        )

    def merged(self, other: Disagreement) -> Disagreement:
        """Of the same rows with the members of both.

        sum over m of KL(p[m] || q) = divergence_A + n_A KL(q_A || q) + divergence_B + n_B KL(q_B || q):
        every term is at least 0, so members that agree leave exactly 0.
        """
        moments = self.probabilities.merged(other.probabilities)
        return Disagreement(moments, self._joined(other, moments), self.shares.merged(other.shares))

    @property
    def mutual_information(self) -> Tensor:
        """(B,), nats, between 0 and log C."""
        return self.divergence / self.probabilities.count

    def rows(self, index: Index) -> Disagreement:
        """Of some of the rows."""
        return Disagreement(self.probabilities.rows(index), self.divergence[index], self.shares.rows(index))

    def placed(self, index: Tensor, rows: Disagreement) -> Disagreement:
        """With the rows at `index` replaced by others."""
        return Disagreement(
            self.probabilities.placed(index, rows.probabilities),
            placed(self.divergence, index, rows.divergence),
            self.shares.placed(index, rows.shares),
        )

    def _joined(self, other: Disagreement, moments: CentralMoments) -> Tensor:
        total = torch.zeros_like(self.divergence)
        for part in (self, other):
            apart = divergence(part.probabilities.mean, moments.mean)
            total = total + part.divergence + part.probabilities.count * apart
        return total


def placed(values: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """A copy of (B, ...) values with the rows at `index` replaced."""
    return values.index_copy(0, index, rows)

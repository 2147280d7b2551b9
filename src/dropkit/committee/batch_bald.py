"""Which rows to label next: what their labels would say about the members, jointly for a batch of rows.

Labels of two rows tell less together than each by itself where the members disagree about both in the same way. That
can only be seen because member m is one function: its answers to several rows belong together, and given the
member, labels are independent. (With masks drawn anew for each row there is no joint answer to speak of.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropkit.committee.information import doubt
from dropkit.committee.prediction import ClassificationPrediction, Prediction, RegressionPrediction
from dropkit.errors import OptionError, ShapeError

LIMIT = 4096
# Values of one piece of candidates: 64 MiB of float64.
VALUES_AT_ONCE = 1 << 23


@dataclass(frozen=True, slots=True)
class BatchSelection:
    """Rows chosen one after the other, each for what it adds to those before it.

    Attributes:
        indices: (n,) int64 rows, in the order of choice.
        scores: (n,) float64, nats: what each adds; they never grow where they are exact.
        standard_errors: (n,) of the scores, rough; 0 where they are exact.
    """

    indices: Tensor
    scores: Tensor
    standard_errors: Tensor

    @property
    def joint_mutual_information(self) -> float:
        """Nats: what the labels of all chosen rows say together about which member is right, at most log M."""
        return float(self.scores.sum())

    @property
    def exact(self) -> int:
        """How many of the scores, from the first, are exact and not estimated."""
        return int((self.standard_errors == 0.0).long().cumprod(dim=0).sum())


def information_gain(prediction: Prediction) -> Tensor:
    """What the label of each row by itself would say about the members, in nats.

    Classes: mutual information of label and member (BALD). Numbers, with all laws taken as normal:

        I[b] = 1/2 sum over outputs of log(1 + epistemic / aleatoric)    (one output; several: 1/2 log det)

    Args:
        prediction: (M, B, ...); for numbers with noise, as a label without noise would say everything.

    Returns:
        (B,) float64, at least 0.

    Raises:
        OptionError: a point model.

    Source: MacKay 1992, Neural Computation 4, 590-604, eq. 12; Houlsby et al. 2011, arXiv:1112.5745.
    """
    if isinstance(prediction, ClassificationPrediction):
        return prediction.mutual_information.double()
    deviation, noise = _scaled(prediction)
    return _log_det_gain(deviation, noise, torch.eye(len(deviation), dtype=torch.float64))


def select_batch(
    prediction: Prediction,
    size: int,
    *,
    candidates: Tensor | Sequence[int] | None = None,
    limit: int = LIMIT,
    seed: int = 0,
) -> BatchSelection:
    """Choose rows whose labels say most about the members together, greedily.

    Classes (BatchBALD): the next row is the one with the largest

        I(y[b]; member | y[chosen]) = sum over labels of the chosen, P(labels) (H(E[p[m, b]]) - E[H(p[m, b])]),

    E the mean over members weighted by how likely each made these labels. This is the growth of the joint mutual
    information, by the chain rule, and no summand is negative. While the chosen rows have at most `limit`
    labellings with chance above 0, all of them are visited and the score is exact; beyond, `limit` of
    them stand for all, drawn by systematic resampling, which estimates the score without bias but for the choice.
    Numbers: the same with normal laws, 1/2 log det(1 + cov(chosen and b) / noise); always exact.

    The joint information is submodular, so the greedy batch has at least 1 - 1/e = 63 % of that of the best batch.

    Args:
        prediction: (M, B, ...), of consistent members, as `Committee` has them.
        size: how many rows, 1 to the number of candidates.
        candidates: which rows may be chosen; all by default.
        limit: most labellings that are visited. Time and memory of a choice grow with limit * B * C.
        seed: of the labellings that are drawn.

    Raises:
        OptionError: size or limit are out of range, a point model, a summary, or a candidate that is not finite.
        ShapeError: candidates are no rows, or not distinct.

    Example:
        >>> sure, torn = [0.99, 0.01], [0.5, 0.5]
        >>> first = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.8, 0.2], torn])
        >>> second = torch.tensor([[0.1, 0.9], [0.1, 0.9], [0.8, 0.2], torn])
        >>> select_batch(ClassificationPrediction(torch.stack((first, second))), 2).indices.tolist()
        [0, 1]

    Source: Kirsch, van Amersfoort and Gal 2019, arXiv:1906.08158; Nemhauser, Wolsey and Fisher 1978 for the bound.
    """
    if not isinstance(prediction, ClassificationPrediction | RegressionPrediction):
        raise OptionError(
            f"a {type(prediction).__name__} was given; what rows say together takes whole members, as in its `kept`."
        )
    pool = _pool(candidates, prediction.samples.shape[1])
    unknown = pool[prediction.not_finite.cpu()[pool] > 0]
    if len(unknown):
        raise OptionError(
            f"rows {unknown[:6].tolist()} have members whose output is not finite; leave them out: candidates=...."
        )
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= len(pool):
        raise OptionError(f"size={size!r} was given; from 1 to {len(pool)} rows can be chosen.")
    if limit < 1:
        raise OptionError(f"limit={limit!r} was given; at least 1 labelling is visited.")
    chosen: list[int] = []
    scores, errors = [], []
    if isinstance(prediction, ClassificationPrediction):
        labellings = Labellings.none(prediction.samples, limit, seed)
        open_rows = torch.ones(len(pool), dtype=torch.bool)
        bound = torch.full((len(pool),), torch.inf, dtype=torch.float64)
        for _ in range(size):
            place = labellings.best(pool, bound, open_rows)
            score, error = labellings.gain_of(int(pool[place]))
            open_rows[place] = False
            chosen.append(int(pool[place]))
            scores.append(score)
            errors.append(error)
            if len(chosen) < size:
                labellings = labellings.with_row(chosen[-1])
    else:
        deviation, noise = _scaled(prediction)
        within = torch.eye(len(deviation), dtype=torch.float64)  # covariance of what picks the member
        for _ in range(size):
            gains = _log_det_gain(deviation[:, pool], noise[pool], within)
            gains[torch.isin(pool, torch.tensor(chosen, dtype=torch.int64))] = -torch.inf
            place = int(gains.argmax())
            chosen.append(int(pool[place]))
            scores.append(float(gains[place]))
            errors.append(0.0)
            seen = within @ deviation[:, chosen[-1]]  # (M, K)
            inner = deviation[:, chosen[-1]].T @ seen + torch.diag(noise[chosen[-1]])
            within = within - seen @ torch.linalg.solve(inner, seen.T)
    return BatchSelection(
        torch.tensor(chosen),
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(errors, dtype=torch.float64),
    )


def joint_mutual_information(
    prediction: ClassificationPrediction, rows: Tensor | Sequence[int], *, limit: int = 1 << 16
) -> float:
    """What the labels of some rows say together about which member is right, in nats; exact.

    I(y[rows]; member) = H(y[rows]) - sum over rows of mean over m of H(p[m, row])

    Args:
        prediction: of consistent members.
        rows: distinct ones.
        limit: most labellings that are visited.

    Raises:
        OptionError: there are more labellings than the limit.
        ShapeError: rows are not distinct rows of the prediction.
    """
    labellings = Labellings.none(prediction.samples, limit, seed=0)
    total = 0.0
    for row in _pool(rows, prediction.samples.shape[1]).tolist():
        if labellings.sampled:
            raise OptionError(f"{len(rows)} rows were given, which have more than limit={limit} labellings.")
        total += labellings.gain_of(row)[0]
        labellings = labellings.with_row(row)
    return total


@dataclass(frozen=True, slots=True)
class Labellings:
    """The labels that chosen rows may get, how likely, and how likely each member made them.

    Attributes:
        probs: (M, B, C) float64, the members' probabilities for all rows.
        doubts: (M, B), their entropies.
        weight: (K,), chance of each labelling; sums to 1.
        posterior: (K, M), chance of each member given the labelling; rows sum to 1.
        limit: most labellings to keep.
        sampled: whether these stand for more.
        generator: what draws them.
    """

    probs: Tensor
    doubts: Tensor
    weight: Tensor
    posterior: Tensor
    limit: int
    sampled: bool
    generator: torch.Generator

    @classmethod
    def none(cls, probs: Tensor, limit: int, seed: int) -> Labellings:
        """Of no rows: one labelling, and all members alike."""
        probs = probs.detach().double().cpu()
        members = probs.shape[0]
        one = torch.ones(1, dtype=torch.float64)
        alike = torch.full((1, members), 1.0 / members, dtype=torch.float64)
        return cls(probs, doubt(probs), one, alike, limit, False, torch.Generator().manual_seed(seed))

    def gains(self, rows: Tensor) -> Tensor:
        """(K, b): what each of b rows would say about the member, given each labelling; at least 0."""
        mean = torch.einsum("km,mbc->kbc", self.posterior, self.probs[:, rows])
        return (doubt(mean) - self.posterior @ self.doubts[:, rows]).clamp_min(0.0)

    def gain_of(self, row: int) -> tuple[float, float]:
        """The expected gain of one row, and its rough standard error if labellings were sampled."""
        each = self.gains(torch.tensor([row]))[:, 0]
        mean = float(self.weight @ each)
        if not self.sampled:
            return mean, 0.0
        spread = float(self.weight @ (each - mean).square()) ** 0.5
        return mean, max(spread / len(self.weight) ** 0.5, torch.finfo(torch.float64).tiny)

    def best(self, pool: Tensor, bound: Tensor, open_rows: Tensor) -> int:
        """Place in the pool of the row with the largest expected gain; notes the gains it looks at in `bound`.

        A gain never grows as rows are chosen, so those whose last gain is below the best of now are not looked at
        again (while labellings are exact; sampled gains may grow by chance, and all are looked at).
        """
        step = max(1, VALUES_AT_ONCE // (len(self.weight) * self.probs.shape[-1]))
        order = torch.where(open_rows, bound, -torch.inf).argsort(descending=True, stable=True)
        order = order[open_rows[order]]
        best, found = -1.0, int(order[0])
        for places in order.split(step):
            if not self.sampled and float(bound[places[0]]) < best:
                break
            bound[places] = self.weight @ self.gains(pool[places])
            top = float(bound[places].max())
            # The lowest row among equals, whatever the order of looking.
            equal = places[bound[places] == top]
            first = int(equal[pool[equal].argmin()])
            if top > best or (top == best and int(pool[first]) < int(pool[found])):
                best, found = top, first
        return found

    def with_row(self, row: int) -> Labellings:
        """Of the chosen rows and one more: each labelling goes on with every class, thinned out beyond the limit."""
        chance = self.posterior[:, :, None] * self.probs[None, :, row]  # (K, M, C)
        each = chance.sum(dim=1)  # (K, C): of the class, given the labelling
        weight = (self.weight[:, None] * each).flatten()
        at = weight.nonzero().flatten()
        sampled = self.sampled or len(at) > self.limit
        if len(at) > self.limit:
            # Systematic resampling: each labelling is taken floor or ceil of limit * weight times.
            start = torch.rand((), generator=self.generator, dtype=torch.float64)
            marks = (start + torch.arange(self.limit, dtype=torch.float64)) / self.limit
            ladder = weight[at].cumsum(dim=0)
            taken = torch.searchsorted(ladder / ladder[-1], marks).clamp_max(len(at) - 1)
            at = at[taken]
            new = torch.full((self.limit,), 1.0 / self.limit, dtype=torch.float64)
        else:
            new = weight[at] / weight[at].sum()
        k, c = at // each.shape[1], at % each.shape[1]
        posterior = chance[k, :, c]
        posterior = posterior / posterior.sum(dim=1, keepdim=True)
        return Labellings(self.probs, self.doubts, new, posterior, self.limit, sampled, self.generator)


def _scaled(prediction: RegressionPrediction) -> tuple[Tensor, Tensor]:
    """(M, B, K) deviations with D^T D = covariance over members, and (B, K) noise variances."""
    if prediction.noise is None:
        raise OptionError(
            "a point model was given, whose labels have no noise and say everything. Use likelihood='gaussian', or "
            "give the noise: prediction.with_noise(variance)."
        )
    value = prediction.samples.detach().double().cpu()[..., None].flatten(2)
    deviation = value - value[0]
    deviation = (deviation - deviation.mean(dim=0)) / (len(value) - 1) ** 0.5
    return deviation, prediction.noise.detach().double().cpu().mean(dim=0)[..., None].flatten(1)


def _log_det_gain(deviation: Tensor, noise: Tensor, within: Tensor) -> Tensor:
    """(B,), 1/2 log det(1 + D_b^T W D_b / noise_b) for (M, B, K) deviations D and an (M, M) covariance W."""
    scaled = deviation / noise.sqrt()
    moved = torch.einsum("mn,nbk->mbk", within, scaled)
    inner = torch.einsum("mbk,mbl->bkl", scaled, moved)
    identity = torch.eye(inner.shape[-1], dtype=torch.float64)
    return 0.5 * torch.linalg.slogdet(identity + inner)[1].clamp_min(0.0)


def _pool(candidates: Tensor | Sequence[int] | None, rows: int) -> Tensor:
    if candidates is None:
        return torch.arange(rows)
    pool = torch.as_tensor(candidates, dtype=torch.int64).cpu().flatten()
    if len(pool) and not (0 <= int(pool.min()) and int(pool.max()) < rows):
        raise ShapeError(
            f"rows from {int(pool.min())} to {int(pool.max())} were given; they run from 0 to {rows - 1}."
        )
    if len(pool.unique()) != len(pool):
        raise ShapeError("a row was given twice; each can be chosen once.")
    return pool

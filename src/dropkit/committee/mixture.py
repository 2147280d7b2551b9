"""The members' normal laws taken together: an equal mixture of M normal laws, one mixture for each row and output.

A point model has values in their place, whose law puts 1 / M on each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dropkit.errors import ShapeError

# Pairs of members looked at together, times values: 32 MiB of float64.
PAIRS_AT_ONCE = 1 << 22


def mixture_log_density(y: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Log density of the mixture, nats per unit of y.

    L = log mean over m of Normal(y; means[m], variances[m])

    Args:
        y: (...).
        means: (M, ...) float64.
        variances: (M, ...), above 0.
    """
    squared = (y.to(means) - means).square()
    log_density = -0.5 * (squared / variances + variances.log() + math.log(2.0 * math.pi))
    return torch.logsumexp(log_density, dim=0) - math.log(means.shape[0])


def mixture_quantile(means: Tensor, stds: Tensor, q: float) -> Tensor:
    """Solve mean over m of Phi((x - means[m]) / stds[m]) = q for x, by Newton steps kept inside a bracket.

    The mixture's quantile lies between the smallest and the largest of its members' quantiles.

    Args:
        means: (M, ...) float64.
        stds: (M, ...), at least 0.
        q: in (0, 1).
    """
    z = float(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)))
    stds = stds.clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
    member = means + stds * z
    low, high = member.amin(dim=0), member.amax(dim=0)
    x = member.mean(dim=0)
    settled = ~x.isfinite()  # has no quantile to find, and keeps nobody waiting
    for turn in range(200):  # 4 to 8 turns do mostly
        scaled = (x - means) / stds
        excess = torch.special.ndtr(scaled).mean(dim=0) - q
        low, high = torch.where(excess < 0, x, low), torch.where(excess > 0, x, high)
        density = (torch.exp(-0.5 * scaled.square()) / (stds * math.sqrt(2.0 * math.pi))).mean(dim=0)
        newton = torch.where(excess == 0, x, x - excess / density)
        done = (newton - x).abs() <= 1e-12 * torch.maximum(x.abs(), high - low)
        # Between two far modes Newton creeps or leaves the bracket: halve there, and on each fourth turn anyway.
        inside = (newton > low) & (newton < high) & (turn % 4 != 3)
        moved = torch.where(done | inside, newton, (low + high) / 2)
        # What has settled stays, so that its last bits do not depend on how long its company takes.
        x = torch.where(settled, x, moved)
        settled = settled | done
        if bool(settled.all()):
            break
    return x


def sample_quantile(samples: Tensor, q: float) -> Tensor:
    """The quantile of M values, linear between neighbours in order; nan where a value is.

    Args:
        samples: (M, ...), M at least 2. (`torch.quantile` refuses more than 16 million elements; sorting does not.)
        q: in (0, 1).
    """
    ordered = samples.sort(dim=0).values
    position = q * (ordered.shape[0] - 1)
    below = min(int(position), ordered.shape[0] - 2)
    value = torch.lerp(ordered[below], ordered[below + 1], position - below)
    return torch.where(ordered[-1].isnan(), ordered[-1], value)  # nan sorts last


def sample_crps(samples: Tensor, y: Tensor, *, fair: bool = False) -> Tensor:
    """Continuous ranked probability score of M values: how far their law lies from what was seen.

    CRPS = mean over m of |x[m] - y| - 1/2 mean over m, n of |x[m] - x[n]|
         = integral of (F(t) - [y <= t])^2 dt,    F the law with 1 / M on each value

    In order of size, sum over m, n of |x[m] - x[n]| = 2 sum over i = 1 .. M of (2 i - M - 1) x_(i): M log M steps.

    Args:
        samples: (M, ...), in the unit of y.
        y: (...).
        fair: divide the pairs by M (M - 1) instead of M^2, which on average gives the score of the law that the
            values were drawn from; may be a little below 0. Takes 2 members.

    Returns:
        (...) float64, in the unit of y; |x - y| for a single value. Smaller is better.

    Raises:
        ShapeError: y is not shaped like one member, or the fair score was asked of one member.

    Example:
        >>> sample_crps(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0]))
        tensor([0.5000], dtype=torch.float64)

    Source: Gneiting and Raftery 2007, JASA 102, 359-378, eq. 20 and 21; fair: Ferro 2014, Q. J. R. Meteorol. Soc. 140.
    """
    _check_like_one_member(samples, y)
    members = samples.shape[0]
    if fair and members < 2:
        raise ShapeError("1 member was given; the fair score takes at least 2, as it compares members.")
    value, seen = samples.double(), y.double().to(samples.device)
    # About the first member, so that a large common value does not eat the differences.
    ordered = (value - value[0]).sort(dim=0).values
    weight = torch.arange(1 - members, members, 2, dtype=torch.float64, device=value.device)
    pairs = torch.einsum("m,m...->...", weight, ordered)  # half of the sum over both orders
    return (value - seen).abs().mean(dim=0) - pairs / (members * (members - 1 if fair else members))


def mixture_crps(means: Tensor, variances: Tensor, y: Tensor) -> Tensor:
    """Continuous ranked probability score of the mixture, in closed form.

    CRPS = mean over m of A(y - mean_m, var_m) - 1/2 mean over m, n of A(mean_m - mean_n, var_m + var_n),
    A(d, v) = E|d + sqrt(v) Z| = sqrt(2 v / pi) exp(-d^2 / (2 v)) + d erf(d / sqrt(2 v))

    Args:
        means: (M, ...), in the unit of y.
        variances: (M, ...), at least 0, that unit squared; 0 everywhere gives `sample_crps`.
        y: (...).

    Returns:
        (...) float64, in the unit of y. Smaller is better. M^2 / 2 steps; memory is bounded.

    Raises:
        ShapeError: the shapes do not belong together.

    Source: Grimit, Gneiting, Berrocal and Johnson 2006, Q. J. R. Meteorol. Soc. 132, 2925-2942, eq. 5.
    """
    _check_like_one_member(means, y)
    if variances.shape != means.shape:
        raise ShapeError(
            f"variances of shape {tuple(variances.shape)} beside means of shape {tuple(means.shape)} were given; "
            "there is one for each member."
        )
    mean, variance = means.double(), variances.double()
    seen = y.double().to(mean.device)
    members = mean.shape[0]
    score = _expected_distance(seen - mean, variance).mean(dim=0)
    step = max(1, PAIRS_AT_ONCE // max(1, mean.numel()))
    pairs = torch.zeros_like(seen)
    for at in range(0, members, step):
        m, v = mean[at : at + step, None], variance[at : at + step, None]
        pairs = pairs + _expected_distance(m - mean, v + variance).sum(dim=(0, 1))
    return score - pairs / (2.0 * members**2)


def _expected_distance(d: Tensor, v: Tensor) -> Tensor:
    scale = (2.0 * v).sqrt()
    ratio = torch.where(scale > 0.0, d / torch.where(scale > 0.0, scale, 1.0), torch.inf * d.sign())
    ratio = torch.where(d == 0.0, torch.zeros_like(d), ratio)
    return scale / math.sqrt(math.pi) * torch.exp(-ratio.square()) + d * torch.erf(ratio)


def _check_like_one_member(samples: Tensor, y: Tensor) -> None:
    if samples.ndim < 1 or samples.shape[0] == 0 or y.shape != samples.shape[1:]:
        raise ShapeError(
            f"y of shape {tuple(y.shape)} beside samples of shape {tuple(samples.shape)} was given; samples are "
            "(M, ...) with at least one member, y is like one of them."
        )

"""An attack with a certificate: how much privacy a training function has lost for sure, from one run.

m canaries are each put into the training data with chance 1/2. After training they are scored; the k highest are
guessed to be members, the k lowest not, the rest is left open. A training that is (epsilon, delta)-private lets no
attacker be right much oftener than exp(epsilon) / (1 + exp(epsilon)) of the time, so many right guesses refute it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dropkit.errors import OptionError, ShapeError

LEAST = 50  # canaries below which a bound says next to nothing
MOST_EPSILON = 50.0
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)  # of the canaries guessed on each side


@dataclass(frozen=True, slots=True)
class Audit:
    """What an attacker could tell, and what follows for privacy.

    Attributes:
        epsilon: lower bound; a smaller one is refuted at `level` (0: nothing is refuted).
        delta: for which it is stated.
        level: chance that the bound is wrong.
        guesses: made on members and non-members together; right: of them.
        auc: area under the ROC curve of the scores.
        canaries: m.
    """

    epsilon: float
    delta: float
    level: float
    guesses: int
    right: int
    auc: float
    canaries: int

    def to_text(self) -> str:
        """The bound in words."""
        found = f"{self.right} of {self.guesses} guesses right over {self.canaries} canaries, area {self.auc:.3f}. "
        if self.epsilon == 0:
            return found + "Nothing is refuted; that is no proof of privacy."
        return found + (
            f"With confidence {100 * (1 - self.level):g} % this training is not (epsilon, {self.delta:g})-private for "
            f"any epsilon below {self.epsilon:.2f}."
        )


def audit(
    train: Callable[[NDArray[np.bool_]], NDArray[np.floating[Any]]],
    canaries: int,
    *,
    delta: float = 1e-5,
    level: float = 0.05,
    seed: int = 0,
) -> Audit:
    """Audit a training function by one run.

    Args:
        train: (m,) bool, which canaries are members -> (m,) scores after training on them, higher for "member".
        canaries: m, at least 50.
        delta: of the privacy that is put to the test.
        level: chance that the bound is wrong; the numbers of guesses tried share it evenly.
        seed: of who is a member.

    Raises:
        OptionError: fewer than 50 canaries, or delta or level outside (0, 1).
        ShapeError: not one score for each canary.

    Source: Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, theorem 5.2.
    """
    if canaries < LEAST:
        raise OptionError(f"{canaries} canaries were given; a bound from one run needs at least {LEAST}.")
    if not 0 < delta < 1 or not 0 < level < 1:
        raise OptionError(f"delta={delta} and level={level} were given; both lie between 0 and 1.")
    members = draw_members(canaries, seed)
    scores = np.asarray(train(members), np.float64)
    if scores.shape != members.shape:
        raise ShapeError(f"Scores of shape {scores.shape} came back; there are ({canaries} canaries).")
    order = np.argsort(-scores, kind="stable")
    best: Audit | None = None
    for share in SHARES:
        k = max(1, int(share * canaries))
        right = int(members[order[:k]].sum() + (~members[order[-k:]]).sum())
        bound = epsilon_bound(canaries, 2 * k, right, delta=delta, level=level / len(SHARES))
        if best is None or bound > best.epsilon:
            best = Audit(bound, delta, level, 2 * k, right, _area(scores, members), canaries)
    assert best is not None
    return best


def draw_members(canaries: int, seed: int = 0) -> NDArray[np.bool_]:
    """Which canaries `audit` of this seed makes members: (m,) bool."""
    return np.random.default_rng([seed, 61]).random(canaries) < 0.5


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Chance of so many right guesses, at most, if training is (epsilon, delta)-private.

    P(W >= v) + 2 m delta max_i P(v - i <= W < v) / i,    W ~ Binomial(r, exp(epsilon) / (1 + exp(epsilon)))

    Args:
        canaries: m; guesses: r of them; right: v of these.
        epsilon: at least 0; delta: in [0, 1).
    """
    from scipy import stats

    chance = 1 / (1 + math.exp(-epsilon))
    enough = float(stats.binom.sf(right - 1, guesses, chance))
    if delta == 0 or right == 0:
        return min(1.0, enough)
    below = np.cumsum(
        stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, chance)
    )  # P(v - i <= W < v) for i = 1 ... v
    return min(1.0, enough + 2 * canaries * delta * float((below / np.arange(1, right + 1)).max()))


def epsilon_bound(canaries: int, guesses: int, right: int, *, delta: float, level: float) -> float:
    """The largest epsilon that so many right guesses refute at this level; 0 where they refute none."""
    low, high = 0.0, MOST_EPSILON
    if p_value(canaries, guesses, right, 0.0, delta) > level:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, right, middle, delta) <= level
        low, high = (middle, high) if refuted else (low, middle)
    return low


def membership_scores(model: nn.Module, x: Tensor, y: Tensor) -> NDArray[np.float64]:
    """How well a classifier knows each row: log odds of the row's own class, in evaluation mode.

    log p_y - log sum over the other classes of p

    Args:
        model: (N, D) -> (N, C) logits; its mode comes back as it was.
        x: (N, D) rows; y: (N,) classes.

    Source: the statistic of LiRA, Carlini et al. 2022, arXiv:2112.03570.
    """
    mode = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(x).double()
    finally:
        model.train(mode)
    own = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], -torch.inf).logsumexp(1, keepdim=True)
    return (own - others)[:, 0].numpy()


def _area(scores: NDArray[np.float64], members: NDArray[np.bool_]) -> float:
    from scipy import stats

    count = int(members.sum()) * int((~members).sum())
    return (
        float(stats.mannwhitneyu(scores[members], scores[~members]).statistic) / count
        if count
        else float("nan")
    )

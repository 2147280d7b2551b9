"""The claims in the order of the article."""

from __future__ import annotations

from dropkit.claims import (
    bayes,
    bias,
    capacity,
    classic,
    coadaptation,
    convergence,
    ensemble,
    flatness,
    grouping,
    inverted,
    mcdropout,
    noise,
    penalty,
    stability,
    tradeoff,
    variance_law,
)
from dropkit.claims.claim import Claim

CLAIMS: tuple[Claim, ...] = (
    inverted.CLAIM,
    classic.CLAIM,
    coadaptation.CLAIM,
    ensemble.CLAIM,
    stability.CLAIM,
    tradeoff.CLAIM,
    capacity.CLAIM,
    penalty.CLAIM,
    grouping.CLAIM,
    noise.CLAIM,
    convergence.CLAIM,
    bias.CLAIM,
    flatness.CLAIM,
    mcdropout.CLAIM,
    variance_law.CLAIM,
    bayes.CLAIM,
)

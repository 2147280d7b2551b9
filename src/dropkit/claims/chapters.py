"""The claims in the order of the article."""

from __future__ import annotations

from dropkit.claims.claim import Claim
from dropkit.claims.experiments import (
    bayes,
    bias,
    capacity,
    cells,
    classic,
    coadaptation,
    convergence,
    design,
    ensemble,
    flatness,
    graphs,
    grouping,
    inverted,
    mcdropout,
    missing_mar,
    missing_mcar,
    noise,
    penalty,
    privacy,
    stability,
    tradeoff,
    variance_law,
)

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
    graphs.CLAIM,
    missing_mcar.CLAIM,
    missing_mar.CLAIM,
    cells.CLAIM,
    privacy.CLAIM,
    design.CLAIM,
)

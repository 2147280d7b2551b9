"""Dropout gives no guarantee of privacy: an exact counter-example, an audit, and DP-SGD beside it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dropkit.claims import data
from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Series, Setting, critical
from dropkit.claims.experiments import networks
from dropkit.claims.experiments.networks import error_percent, over_seeds
from dropkit.fields.privacy import (
    Audit,
    audit,
    draw_members,
    dropout_delta,
    membership_scores,
    proven_epsilon,
    train_privately,
)
from dropkit.functional import dropout
from dropkit.masks import masks
from dropkit.training import Fold

RATES, HIDDEN = (0.0, 0.5, 0.8), (256,)
NOISE, CLIP, BATCH, DELTA = 1.0, 1.0, 128, 1e-5


def experiment(
    setting: Setting,
    *,
    ordinary: int = 1000,
    canaries: int = 1000,
    epochs: int = 40,
    private_epochs: int = 15,
) -> Findings:
    """The counter-example, and one-run audits of training without dropout, with it, and by DP-SGD."""
    found = data.images("mnist")
    if setting.full:
        canaries, ordinary = 4 * canaries, 4 * ordinary
    canaries = min(canaries, len(found.x_train) // 3)
    ordinary = min(ordinary, len(found.x_train) - canaries)
    seeds = range(setting.seed, setting.seed + setting.seeds)
    x, y = found.x_train[: canaries + ordinary], found.y_train[: canaries + ordinary].copy()
    y[:canaries] = np.random.default_rng(setting.seed).integers(
        0, 10, canaries
    )  # a wrong label is learned by heart
    trained = networks.train(
        x,
        y,
        hidden=HIDDEN,
        rates=RATES,
        seeds=seeds,
        folds=_folds(canaries, ordinary, seeds),
        epochs=epochs,
        batch=64,
    )
    errors = error_percent(trained.outputs(found.x_test), found.y_test)
    audits = [
        [_audit(trained.network(i, k), x[:canaries], y[:canaries], seed) for k, seed in enumerate(seeds)]
        for i in range(len(RATES))
    ]
    private, wrong = [], []
    for seed in seeds:
        members = np.flatnonzero(np.r_[draw_members(canaries, seed), np.ones(ordinary, bool)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(x.shape[1], HIDDEN[0]), nn.ReLU(), nn.Linear(HIDDEN[0], 10))
        run = train_privately(
            model, torch.from_numpy(x[members]), torch.from_numpy(y[members]), noise=NOISE, clip=CLIP, batch=BATCH,
            epochs=private_epochs, delta=DELTA, seed=seed,
        )  # fmt: skip
        private.append((_audit(run.model, x[:canaries], y[:canaries], seed), run.epsilon))
        with torch.no_grad():
            wrong.append(float(error_percent(run.model(torch.from_numpy(found.x_test)), found.y_test)))
    proven = [epsilon for _, epsilon in private]
    bounds = [[one.epsilon for one in row] for row in audits] + [[one.epsilon for one, _ in private]]
    areas = [[one.auc for one in row] for row in audits] + [[one.auc for one, _ in private]]
    again = proven_epsilon(
        canaries // 2 + ordinary, noise=NOISE, batch=BATCH, epochs=private_epochs, accountant="dp-accounting"
    )
    return Findings(
        figures={
            "counterexample": _counterexample(setting),
            "refuted": over_seeds(bounds[1]),
            "never_exceeds": over_seeds(np.subtract(bounds[-1], proven)),
            "without": over_seeds(bounds[0]),
            "high_rate": over_seeds(np.subtract(areas[2], areas[0])),
            "accountants": Measured(again, 0.0, float(np.mean(proven))),
            "error": over_seeds(np.subtract(wrong, errors[1].numpy())),
        },
        charts=(_chart(bounds, proven),),
        data=f"{found.name}: {ordinary} images and {canaries} canaries with labels drawn at random, each a member with "
        "chance 1/2",
        setup=f"Perceptron of {HIDDEN[0]} units, Adam, {epochs} epochs, dropout {RATES[1]} or {RATES[2]}; "
        f"DP-SGD by Opacus with noise {NOISE:g}, clipping {CLIP:g}, {private_epochs} epochs, batches of {BATCH}; "
        f"bounds at confidence 95 %, delta {DELTA:g}.",
        remarks=(
            "A bound of 0 is no proof of privacy: a stronger attack may find more.",
            "Opacus' accountant is checked by dp-accounting's, both by Renyi differential privacy.",
        ),
    )  # fmt: skip


def _folds(canaries: int, ordinary: int, seeds: range) -> list[Fold]:
    """Member canaries and all ordinary rows; cut to one length, from the ordinary rows, as a stack wants it."""
    rows = [np.flatnonzero(np.r_[draw_members(canaries, seed), np.ones(ordinary, bool)]) for seed in seeds]
    least = min(map(len, rows))
    return [Fold(r[:least], np.empty(0, np.int64), seed) for r, seed in zip(rows, seeds, strict=True)]


def _audit(model: nn.Module, x: NDArray[np.float32], y: NDArray[np.int64], seed: int) -> Audit:
    scores = membership_scores(model, torch.from_numpy(x), torch.from_numpy(y))
    return audit(lambda members: scores, len(x), delta=DELTA, seed=seed)


def _counterexample(setting: Setting) -> Measured:
    """How often one release of x m / q shows that x is there, against delta for an epsilon of 50."""
    draws, rate = 200_000, 0.3
    with masks(seed=setting.seed):
        released = dropout(torch.ones(draws, 1), rate)
    share = float((released != 0).double().mean())
    return Measured(share, (share * (1 - share) / draws) ** 0.5, dropout_delta(rate, 50.0))


def _chart(bounds: list[list[float]], proven: list[float]) -> Chart:
    positions = (0.0, 1.0, 2.0, 3.0)
    found = [over_seeds(row) for row in bounds]
    halves = [critical(f.degrees) * f.standard_error for f in found]
    return Chart(
        "audit", "Lower bounds on epsilon by an audit of one run, means over seeds with 95 % intervals; the dashed "
        "line is what is proven of DP-SGD.", "training", "epsilon that is refuted",
        (Series("audit", positions, tuple(f.value for f in found), tuple(halves), "bars"),),
        x_names=("no dropout", f"dropout {RATES[1]}", f"dropout {RATES[2]}", "DP-SGD"),
        level=float(np.mean(proven)), level_name="proven for DP-SGD",
    )  # fmt: skip


CLAIM = Claim(
    name="privacy",
    title="Dropout is not privacy",
    article="The randomness of dropout gives no guarantee of privacy; differential privacy needs calibrated noise.",
    prediction="delta >= q in one step for every epsilon; an audit refutes small epsilons for training with dropout, "
    "and never one above what is proven of DP-SGD.",
    condition="",
    rules=(
        Rule("counterexample", "share of releases that give a person away, p = 0.3", "equal"),
        Rule("refuted", "epsilon refuted by the audit, dropout 0.5", "above", bound=1.0),
        Rule("never_exceeds", "epsilon refuted minus epsilon proven, DP-SGD", "below"),
        Rule("without", "epsilon refuted, no dropout", "shown"),
        Rule("high_rate", "area of the attack with dropout 0.8 minus without", "shown"),
        Rule("accountants", "epsilon of DP-SGD by dp-accounting, beside Opacus'", "shown"),
        Rule("error", "test error of DP-SGD minus of dropout 0.5, percentage points", "shown"),
    ),
    experiment=experiment,
    seconds=80,
    extras=("privacy",),
)  # fmt: skip

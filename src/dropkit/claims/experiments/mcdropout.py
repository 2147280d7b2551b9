"""Masks on at test time: does the members' disagreement rise on unseen kinds of rows, and fall with more data?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Series, Setting, critical
from dropkit.claims.experiments.networks import Networks, line, over_seeds, train
from dropkit.claims.experiments.spread import LinearSpread, between_clusters, linear_spread
from dropkit.claims.experiments.unseen import BINS, Kinds, Quality, committees, ensembles_of, kinds
from dropkit.training import Fold

RATE, LOW_RATE = 0.5, 0.1  # of hidden units
ENSEMBLE = 5  # networks
BATCH = 100


def experiment(
    setting: Setting, *, rows: int | None = None, hidden: tuple[int, ...] | None = None,
    epochs: int | None = None, members: int | None = None, toy_epochs: int = 400,
) -> Findings:  # fmt: skip
    """Committees of masks, ensembles and single networks on Fashion-MNIST, asked about MNIST; and two exact cases.

    Args:
        setting: seeds and form.
        rows: to learn from.
        hidden: widths.
        epochs: of all networks.
        members: of each committee of masks.
        toy_epochs: of the networks between two clusters.
    """
    data = kinds(rows or (8000 if setting.full else 5000))
    hidden = hidden or ((256, 256) if setting.full else (128, 128))
    epochs = epochs or (30 if setting.full else 20)
    members = members or (100 if setting.full else 32)
    seeds = tuple(range(setting.seed, setting.seed + setting.seeds))
    many = tuple(range(ENSEMBLE * seeds[0], ENSEMBLE * (seeds[-1] + 1)))
    few = len(data.x) // 10
    longer = round(epochs * _steps(len(data.x)) / _steps(few))  # as many steps for all

    def trained(size: int, rates: tuple[float, ...], own: tuple[int, ...], ends: int) -> Networks:
        # All rows are named even where few are learned from: of 10 classes few rows may miss one.
        folds = [Fold(np.arange(size), np.empty(0, np.int64), stream=seed) for seed in own]
        return train(
            data.x, data.y, hidden=hidden, rates=rates, seeds=own, epochs=ends, batch=BATCH, evaluate_every=ends,
            folds=folds,
        )  # fmt: skip

    low, masks = committees(trained(len(data.x), (LOW_RATE, RATE), seeds, epochs), data, members)
    (fewer,) = committees(trained(few, (RATE,), seeds, longer), data, members)
    ensembles, single = ensembles_of(trained(len(data.x), (0.0,), many, epochs), data, ENSEMBLE)
    linear = linear_spread(seeds, rate=RATE)
    between, between_ensembles = between_clusters(seeds, rate=LOW_RATE, epochs=toy_epochs)

    ways = {"masks": masks, "low": low, "ensemble": ensembles, "single": single}
    figures = _figures(ways, fewer) | {
        "limit": over_seeds(linear.committee[-1] / linear.limit, predicted=1.0),
        "fall": over_seeds(np.log10(linear.committee[0] / linear.committee[-1])),
        "posterior_fall": over_seeds(np.log10(linear.posterior[0] / linear.posterior[-1])),
        "between": over_seeds(between),
        "between_ensemble": over_seeds(between_ensembles),
    }
    return Findings(
        figures=figures,
        charts=(_detection_chart(ways, data), _calibration_chart(ways, data), _linear_chart(linear)),
        data=data.said,
        setup=(
            f"{data.x.shape[1]}-{'-'.join(map(str, hidden))}-{int(data.y.max()) + 1} ReLU networks, rate {RATE} (and "
            f"{LOW_RATE}) on hidden units, {members} members with the same masks for all seeds; ensembles of "
            f"{ENSEMBLE} networks without dropout; Adam at 0.001, batch {BATCH}, {epochs} epochs, {setting.seeds} "
            "seeds of weights and order of the same rows. With a tenth of the rows as many steps. Linear model: "
            f"{linear.sizes[0]} to {linear.sizes[-1]:,} rows of 8 independent features."
        ),
        remarks=(
            _against_one_network(figures["over_single"]),
            "At a fixed rate the spread is no posterior's: the linear model's tends to p q sum of w² x² and stays "
            "there however many rows are added, while the posterior's variance falls as 1/N.",
            "With one hidden layer the variance over masks is convex in the input, so that midway between two clusters "
            "it is never larger than at both; that of an ensemble can be.",
            f"Calibration error: {BINS} equal bins, test rows; temperatures fitted on {len(data.x_held):,} others.",
        ),
    )


def _steps(rows: int) -> int:
    """Of an epoch."""
    return rows // min(rows, BATCH)


def _each(found: list[Quality], name: str) -> NDArray[np.float64]:
    return np.array([getattr(one, name) for one in found], np.float64)


def _figures(ways: Mapping[str, list[Quality]], fewer: list[Quality]) -> dict[str, Measured]:
    masks, ensembles = ways["masks"], ways["ensemble"]
    return {
        "information": over_seeds(_each(masks, "information")),
        "data": over_seeds(np.log(_each(fewer, "spread") / _each(masks, "spread"))),
        "entropy": over_seeds(_each(masks, "entropy")),
        "low_information": over_seeds(_each(ways["low"], "information")),
        "single_entropy": over_seeds(_each(ways["single"], "entropy")),
        "ensemble_information": over_seeds(_each(ensembles, "information")),
        "ensemble_entropy": over_seeds(_each(ensembles, "entropy")),
        "over_single": over_seeds(_each(masks, "information") - _each(ways["single"], "entropy")),
        "over_ensemble": over_seeds(_each(masks, "information") - _each(ensembles, "information")),
        "accuracy": over_seeds(_each(masks, "accuracy")),
        "ensemble_accuracy": over_seeds(_each(ensembles, "accuracy")),
        "before": over_seeds(_each(masks, "before")),
        "after": over_seeds(_each(masks, "after")),
        "ensemble_before": over_seeds(_each(ensembles, "before")),
        "ensemble_after": over_seeds(_each(ensembles, "after")),
        "single_before": over_seeds(_each(ways["single"], "before")),
    }


def _against_one_network(gain: Measured) -> str:
    seen = abs(gain.value) > critical(gain.degrees) * gain.standard_error
    said = ("better" if gain.value > 0 else "worse") if seen else "neither better nor worse"
    return (
        f"As a detector of unseen kinds the committee's disagreement is {said} than the plain entropy of one network "
        f"trained without dropout ({gain.value:+.3f} ± {gain.standard_error:.3f} of AUROC): entropy needs no committee."
    )


NAMES = {
    "masks": f"masks, rate {RATE}", "low": f"masks, rate {LOW_RATE}", "ensemble": f"ensemble of {ENSEMBLE}",
    "single": "one network",
}  # fmt: skip


def _bars(said: str, ways: Mapping[str, list[Quality]], name: str) -> Series:
    values = np.stack([_each(way, name) for way in ways.values()])
    return line(said, range(len(ways)), torch.from_numpy(values), "bars")


def _detection_chart(ways: Mapping[str, list[Quality]], data: Kinds) -> Chart:
    return Chart(
        "detection",
        f"Chance that an unseen kind of row has more doubt than a test row. {data.said}; bars are intervals of level "
        "0.95 over seeds.",
        "", "area under the ROC curve",
        (_bars("mutual information", ways, "information"), _bars("entropy", ways, "entropy")),
        x_names=tuple(NAMES[way] for way in ways), level=0.5, level_name="chance",
    )  # fmt: skip


def _calibration_chart(ways: Mapping[str, list[Quality]], data: Kinds) -> Chart:
    return Chart(
        "calibration",
        f"Expected calibration error on test rows, {BINS} bins, before and after one temperature fitted on "
        f"{len(data.x_held):,} rows apart; bars are intervals of level 0.95 over seeds.",
        "", "calibration error",
        (_bars("before", ways, "before"), _bars("after", ways, "after")),
        x_names=tuple(NAMES[way] for way in ways),
    )  # fmt: skip


def _linear_chart(found: LinearSpread) -> Chart:
    values = {"masks": found.committee / found.limit, "posterior": found.posterior / found.limit}
    return Chart(
        "rows",
        f"Variance of a linear model's prediction against training rows, rate {RATE}, in units of p q sum of w² x²; "
        "bars are intervals of level 0.95 over seeds.",
        "training rows N", "variance",
        tuple(line(said, found.sizes, torch.from_numpy(each)) for said, each in values.items()),
        x_log=True, y_log=True, level=1.0, level_name="limit of the masks' variance",
    )  # fmt: skip


CLAIM = Claim(
    name="mcdropout",
    title="Masks on at test time: spread as doubt",
    article="With masks on at test time the disagreement of the thinned networks tells how unsure the model is for "
    "want of data: its epistemic uncertainty.",
    prediction="More mutual information on kinds of rows that were never shown (area under the ROC curve above 0.5); "
    "less on test rows with ten times the data; in the linear model the variance tends to p q sum of w² x², not to 0.",
    condition="As a ranking of rows, and for one amount of data against another as measured. Not as the size of an "
    "epistemic uncertainty: at a fixed rate the spread does not vanish with data, and with one hidden layer it is not "
    "larger between clusters than at them.",
    rules=(
        Rule("information", f"AUROC of mutual information, unseen kinds against test rows, rate {RATE}", "above", 0.5),
        Rule("data", "log of the mean mutual information of test rows: learned from a tenth of the rows, over from all",
             "above"),
        Rule("limit", "linear model, 10 000 rows: variance over masks, in units of p q sum of w² x²", "equal"),
        Rule("entropy", f"AUROC of entropy, rate {RATE}", "shown"),
        Rule("low_information", f"AUROC of mutual information, rate {LOW_RATE}", "shown"),
        Rule("single_entropy", "AUROC of the entropy of one network without dropout", "shown"),
        Rule("ensemble_information", f"AUROC of mutual information, ensemble of {ENSEMBLE}", "shown"),
        Rule("ensemble_entropy", f"AUROC of entropy, ensemble of {ENSEMBLE}", "shown"),
        Rule("over_single", "AUROC of the committee's mutual information minus that of one network's entropy", "shown"),
        Rule("over_ensemble", "AUROC of mutual information, committee minus ensemble", "shown"),
        Rule("accuracy", f"accuracy of the committee, rate {RATE}", "shown"),
        Rule("ensemble_accuracy", f"accuracy of the ensemble of {ENSEMBLE}", "shown"),
        Rule("before", f"calibration error of the committee, {BINS} bins", "shown"),
        Rule("after", f"calibration error of the committee at its temperature, {BINS} bins", "shown"),
        Rule("ensemble_before", f"calibration error of the ensemble, {BINS} bins", "shown"),
        Rule("ensemble_after", f"calibration error of the ensemble at its temperature, {BINS} bins", "shown"),
        Rule("single_before", f"calibration error of one network without dropout, {BINS} bins", "shown"),
        Rule("fall", "linear model: decades by which the variance over masks falls from 30 to 10 000 rows", "shown"),
        Rule("posterior_fall", "linear model: decades by which the posterior's variance falls", "shown"),
        Rule("between", "one hidden layer: variance midway between two clusters over that at them, masks (theory: at "
             "most 1)", "shown"),
        Rule("between_ensemble", f"the same of ensembles of {ENSEMBLE}", "shown"),
    ),
    experiment=experiment,
    seconds=70.0,
)  # fmt: skip

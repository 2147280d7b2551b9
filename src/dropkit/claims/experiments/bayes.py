"""Averaging over masks as averaging over a posterior: likelihood of the members' average on UCI tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dropkit.claims.claim import Chart, Claim, Findings, Rule, Setting
from dropkit.claims.data import UCI, Table, table
from dropkit.claims.experiments.likelihoods import HIDDEN, RATES, Floats, Scores, score
from dropkit.claims.experiments.networks import line, over_seeds

SHORT = ("boston", "concrete", "energy")


def experiment(
    setting: Setting,
    *,
    names: Sequence[str] | None = None,
    splits: int | None = None,
    epochs: int | None = None,
    members: int | None = None,
) -> Findings:
    """Likelihoods on the test rows of published splits.

    Args:
        setting: seeds (two splits for each, unless `splits` says) and form.
        names: of the tables.
        splits: the first so many published ones, at most 20.
        epochs: at most.
        members: T.
    """
    names = names or (UCI if setting.full else SHORT)
    splits = splits or (20 if setting.full else min(20, 2 * setting.seeds))
    epochs = epochs or (400 if setting.full else 200)
    members = members or (1000 if setting.full else 200)
    tables: dict[str, Table] = {}
    for one in map(table, names):  # without the files one set stands in for all, and is scored once
        tables.setdefault(one.name.partition(" in place of ")[0], one)
    found = [score(one, splits, epochs=epochs, members=members, seed=setting.seed) for one in tables.values()]
    against_plain = np.mean([one.plain - one.average for one in found], axis=0)
    against_scaled = np.mean([one.scaled - one.average for one in found], axis=0)
    single = np.mean([one.growth[1] - one.scaled for one in found], axis=0)
    return Findings(
        figures={
            "plain": over_seeds(against_plain),
            "scaled": over_seeds(against_scaled),
            "single": over_seeds(single),
        },
        charts=(_sets_chart(found, splits, members), _growth_chart(found, splits)),
        data=f"{', '.join(one.name for one in found)}; {splits} "
        f"{'published ' if any(len(one.published) for one in found) else ''}splits each",
        setup=(
            f"One hidden layer of {HIDDEN[0]} ReLU units, predicted mean and variance, Adam at 0.01, at most {epochs} "
            "epochs of batch 32 (128 from 2000 training rows on, and then at most 100); dropout on inputs and hidden "
            f"units at the rate of {', '.join(map(str, RATES))} that is best on validation rows; {members} members."
        ),
        remarks=_remarks(found),
    )


def _sets_chart(found: Sequence[Scores], splits: int, members: int) -> Chart:
    columns: dict[str, list[Floats]] = {
        "without dropout": [one.plain for one in found],
        "dropout, weight scaling": [one.scaled for one in found],
        f"dropout, average of {members}": [one.average for one in found],
        "published": [one.published for one in found],
    }
    drawn = []
    for k, (said, values) in enumerate(columns.items()):
        there = [i for i, each in enumerate(values) if len(each)]
        if there:  # beside one another, not on top
            places = [i + 0.15 * (k - 1.5) for i in there]
            drawn.append(line(said, places, _tensor([values[i] for i in there]), "points"))
    return Chart(
        "likelihood",
        f"Test negative log-likelihood, {splits} splits; bars are intervals of level 0.95 over splits.",
        "table", "nats a row", tuple(drawn), x_names=tuple(one.name for one in found),
    )  # fmt: skip


def _growth_chart(found: Sequence[Scores], splits: int) -> Chart:
    lines = [
        line(one.name, list(one.growth), _tensor([values - one.scaled for values in one.growth.values()]))
        for one in found
    ]
    return Chart(
        "members",
        f"Average of T members against weight scaling, paired over {splits} splits; below 0 the average is better.",
        "members T", "difference of negative log-likelihood, nats a row", tuple(lines), x_log=True,
        level=0.0, level_name="weight scaling",
    )  # fmt: skip


def _tensor(values: Sequence[Floats]) -> Tensor:
    return torch.from_numpy(np.stack(values))


def _remarks(found: Sequence[Scores]) -> tuple[str, ...]:
    said = []
    for one in found:
        against = {"the network without dropout": one.plain, "weight scaling": one.scaled}
        if len(one.published):
            against["the published result (paired by split)"] = one.published
        gains = {text: over_seeds(values - one.average) for text, values in against.items()}
        parts = [f"{gain.value:+.3f} ± {gain.standard_error:.3f} over {text}" for text, gain in gains.items()]
        counts = Counter(one.rates)
        rates = ", ".join(f"{rate:g} ({counts[rate]})" for rate in sorted(counts))
        said.append(
            f"{one.name}: the average gains {', '.join(parts)}, nats a row. Rates chosen (splits): {rates}."
        )
    if any(len(one.published) for one in found):
        said.append(
            "Published: the rerun of Monte Carlo dropout (Gal and Ghahramani 2016, arXiv:1506.02142) with rates chosen "
            "split by split, 4000 epochs, 10 000 members and one noise variance for all rows."
        )
    said.append(
        "Rates at the low end mean that dropout is nearly off. That averaging helps is what a posterior would do too; "
        "it does not show that the masks are one."
    )
    return tuple(said)


CLAIM = Claim(
    name="bayes",
    title="Averaging over masks as averaging over a posterior",
    article="Dropout approximates Bayesian inference: averaging the thinned networks averages over a posterior, and "
    "gives a better predictive distribution than one network.",
    prediction="The average of T members has a lower negative log-likelihood on test rows than the network trained "
    "without dropout, and than weight scaling (Gal and Ghahramani 2016, arXiv:1506.02142).",
    condition="With enough members, and where a rate above 0 suits the table (the best rates of these are near 0). "
    "As a better average, not as a posterior: with one hidden layer the spread between two clusters cannot exceed that "
    "at them (arXiv:1909.00719).",
    rules=(
        Rule("plain", "negative log-likelihood without dropout minus that of the average, mean over tables, nats a row",
             "above"),
        Rule("scaled", "negative log-likelihood of weight scaling minus that of the average, mean over tables, nats a "
             "row", "above"),
        Rule("single", "negative log-likelihood of one member minus that of weight scaling, nats a row", "shown"),
    ),
    experiment=experiment,
    seconds=45.0,
)  # fmt: skip

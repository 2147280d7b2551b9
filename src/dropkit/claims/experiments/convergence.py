"""What the noise costs in epochs, beside what it saves in the gap.

epochs(p) = first epoch whose training loss, masks off, is at most 5 % of log C;    gap = new loss - training loss
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.claims.claim import Chart, Claim, Findings, Rule, Series, Setting
from dropkit.claims.data import Images, images
from dropkit.claims.experiments.networks import Networks, line, over_seeds, train
from dropkit.training import Candidate, Fold, Plan, Search
from dropkit.training.search import search_candidates

RATES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8)
TARGET = 0.05  # share of log C, the loss of guessing
VALIDATION = 500


def experiment(
    setting: Setting,
    *,
    rows: int = 1000,
    hidden: Sequence[int] = (128, 128),
    epochs: int | None = None,
    search_rates: Sequence[float] = (0.0, 0.2, 0.5, 0.8),
    search_epochs: int = 40,
) -> Findings:
    """Follow the training loss at all rates, and let the search for the rate choose on the same rows.

    Args:
        setting: seeds and form.
        rows: training rows that each seed draws.
        hidden: widths.
        epochs: passes over the rows; a network that does not reach the target counts with this number.
        search_rates: that compete in the search.
        search_epochs: of the search, at most.
    """
    found = images("mnist")
    epochs = epochs or (200 if setting.full else 60)
    classes, most = int(found.y_train.max()) + 1, len(found.y_train)
    target = TARGET * math.log(classes)
    seeds = range(setting.seed, setting.seed + setting.seeds)
    # The rows that nobody learns from are the last ones: their order in the file knows nothing of us.
    validation = np.arange(most - min(VALIDATION, most - min(rows, most * 3 // 4)), most)
    networks = train(
        found.x_train, found.y_train, hidden=hidden, rates=RATES, seeds=seeds, rows=rows, epochs=epochs, batch=50,
        validation=validation,
    )  # fmt: skip
    needed, missed = epochs_to_target(networks, target)
    gap = _curves(networks, "validation")[:, :, -1] - networks.train_losses
    own = torch.tensor(
        [[one.curve.epochs_to_converge for one in row] for row in networks.trained], dtype=torch.float64
    )
    curves = _curves(networks, "train").mean(dim=1)
    on = RATES.index(0.5)
    search = _search(found, validation, rows, hidden, search_rates, search_epochs, setting.seed)
    every = networks.trained[0][0].curve.epochs
    late = [f"{p:g}" for p, each in zip(RATES, missed, strict=True) if bool(each.any())]
    return Findings(
        figures={
            "epochs": over_seeds(needed[on] - needed[0]),
            "gap": over_seeds(gap[0] - gap[on]),
            "times": over_seeds(needed[on] / needed[0]),
            "own": over_seeds(own[on] - own[0]),
        },
        charts=(
            Chart(
                "epochs", f"Epochs until the training loss, masks off, is {target:.3f} nats, {found.name}; bars: 95 % "
                "over seeds.", "rate p", "epochs",
                (line("to the target", RATES, needed), line("to 95 % of the fall of the validation loss", RATES, own)),
            ),
            Chart(
                "gap", f"Validation loss minus training loss after {epochs} epochs, masks off.", "rate p",
                "gap, nats a row", (line("gap", RATES, gap),),
            ),
            Chart(
                "curves", "Training loss, masks off, mean over seeds.", "epoch", "cross-entropy, nats a row",
                tuple(Series(f"p = {p:g}", tuple(every[1:]), tuple(curve[1:].tolist()))
                      for p, curve in zip(RATES, curves, strict=True)),
                y_log=True, level=target, level_name="target",
            ),
        ),
        data=f"{found.name}: {rows:,} training rows that each seed draws, {len(validation):,} others to validate.",
        setup=f"Perceptrons of {'-'.join(map(str, hidden))} hidden units, Adam at 0.001, batches of 50, {epochs} "
        f"epochs, dropout on hidden units, {setting.seeds} seeds. Target: {100 * TARGET:g} % of log {classes} = "
        f"{target:.3f} nats on the training rows, masks off.",
        remarks=(
            f"Rates with networks that miss the target in {epochs} epochs, counted as {epochs}: "
            f"{', '.join(late) or 'none'}.",
            _weighed(search, search_epochs),
        ),
    )  # fmt: skip


def epochs_to_target(networks: Networks, target: float) -> tuple[Tensor, Tensor]:
    """First epoch at which the training loss, masks off, is at most the target; the last one where none is.

    Returns:
        (R, S) epochs, float64, and (R, S) bool, which networks never got there.
    """
    losses = _curves(networks, "train")
    epochs = torch.tensor(networks.trained[0][0].curve.epochs, dtype=torch.float64)
    reached = losses <= target
    missed = ~reached.any(dim=-1)
    first = reached.int().argmax(dim=-1)  # the first of equal maxima
    return torch.where(missed, epochs[-1], epochs[first]), missed


def _curves(networks: Networks, which: str) -> Tensor:
    """(R, S, looks) float64."""
    return torch.tensor([[getattr(one.curve, which) for one in row] for row in networks.trained]).double()


def _search(
    found: Images,
    validation: NDArray[np.int64],
    rows: int,
    hidden: Sequence[int],
    rates: Sequence[float],
    epochs: int,
    seed: int,
) -> Search:
    """What dropkit's own search makes of the same rows: one fold, the first seed's."""
    free = np.setdiff1d(np.arange(len(found.y_train)), validation)
    drawn = np.sort(np.random.default_rng([seed, 77]).permutation(free)[:rows])
    search, _, _ = search_candidates(
        found.x_train, found.y_train, [Candidate(p, 0.0, 0.0, tuple(hidden)) for p in rates],
        [Fold(drawn, validation, stream=seed)], likelihood="categorical", outputs=int(found.y_train.max()) + 1,
        plan=Plan(max_epochs=epochs, batch=50, learning_rate=0.001), seed=seed,
    )  # fmt: skip
    return search


def _weighed(search: Search, epochs: int) -> str:
    """What the search saw of each rate, and by what it chose."""
    seen = "; ".join(
        f"p = {t.candidate.rate:g}: validation {t.validation:.3f}, gap {t.gap:.3f}, {t.epochs_to_converge:.0f} epochs"
        for t in search.trials
    )
    return (
        f"dropkit's own search ({epochs} epochs at most, patience {Plan().patience}, weights averaged) on the first "
        f"seed's rows chose {search.chosen.rate:g}. It compares the validation loss of a committee and weighs epochs "
        "only by its budget and its patience; gap and epochs to 95 % of the fall are reported beside it. "
        f"Seen, nats: {seen}."
    )


CLAIM = Claim(
    name="convergence",
    title="Noise costs epochs and buys a smaller gap",
    article="The noise of dropout means more epochs until convergence; in return the final gap is smaller, and "
    "choosing the rate weighs the one against the other.",
    prediction="With p = 0.5 against none: more epochs until the training loss, masks off, is 5 % of log C; a smaller "
    "gap between validation and training loss at the end. No formula.",
    condition="At an equal learning rate. Loss is looked at with masks off; under masks it is higher by the penalty, "
    "and the cost in epochs would look larger.",
    rules=(
        Rule("epochs", "epochs to the target, p = 0.5 minus p = 0", "above"),
        Rule("gap", "validation minus training loss at the end, p = 0 minus p = 0.5, nats", "above"),
        Rule("times", "epochs to the target, p = 0.5 over p = 0", "shown"),
        Rule("own", "epochs to 95 % of the fall of the validation loss, p = 0.5 minus p = 0", "shown"),
    ),
    experiment=experiment,
    seconds=60,
)  # fmt: skip

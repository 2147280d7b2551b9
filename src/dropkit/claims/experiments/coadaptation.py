"""Whether hidden units stand on their own: accuracy as random ones are removed, their correlations, the dearest one.

figure of robustness = mean over the share removed, from 0 to 0.9, of accuracy(share) / accuracy(0)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.claims.claim import Chart, Claim, Findings, Rule, Setting
from dropkit.claims.data import images
from dropkit.claims.experiments.networks import Networks, error_percent, line, over_seeds, train

RATES = (0.0, 0.2, 0.5)
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def experiment(
    setting: Setting,
    *,
    rows: int = 1000,
    test_rows: int | None = None,
    hidden: Sequence[int] = (128, 128),
    epochs: int = 100,
    removals: int | None = None,
) -> Findings:
    """Train with and without dropout, then take hidden units away.

    Args:
        setting: seeds and form.
        rows: training rows that each seed draws.
        test_rows: at most.
        hidden: widths.
        epochs: passes over the rows, for all rates the same.
        removals: random removals for each share; the same units of all networks.
    """
    found = images("mnist")
    test_rows = test_rows or (10_000 if setting.full else 2000)
    removals = removals or (64 if setting.full else 8)
    seeds = range(setting.seed, setting.seed + setting.seeds)
    networks = train(
        found.x_train, found.y_train, hidden=hidden, rates=RATES, seeds=seeds, epochs=epochs, rows=rows,
        evaluate_every=1 << 30,
    )  # fmt: skip
    x, y = found.x_test[:test_rows], found.y_test[:test_rows]
    left = relative_accuracy(networks, x, y, removals, scaled=False)  # (shares, R, S)
    rescaled = relative_accuracy(networks, x, y, removals, scaled=True)
    units = networks.last_hidden(x)
    alike = mean_correlation(units)
    lost = unit_costs(networks, units, y)  # (R, S, U)
    dearest, mean_cost = lost.amax(dim=-1), lost.mean(dim=-1)
    plain = 100 - error_percent(networks.outputs(x), y)
    on = RATES.index(0.5)
    area, rescaled_area = area_under(left), area_under(rescaled)
    charts = (
        Chart(
            "removal", f"Accuracy as a random share of all hidden units is set to 0, {found.name}; bars: 95 % over "
            "seeds.", "share of hidden units removed", "accuracy over that of the whole network",
            tuple(line(f"trained at p = {p:g}", SHARES, left[:, i]) for i, p in enumerate(RATES)),
        ),
        Chart(
            "correlation", "Mean size of the correlation between two units of the last hidden layer over test rows.",
            "rate p", "mean |correlation|", (line("last hidden layer", RATES, alike),),
        ),
    )  # fmt: skip
    accuracies = ", ".join(
        f"{float(each.mean()):.2f} % (p = {p:g})" for p, each in zip(RATES, plain, strict=True)
    )
    ties = ", ".join(f"{float(each.mean()):.3f} (p = {p:g})" for p, each in zip(RATES, alike, strict=True))
    return Findings(
        figures={
            "area": over_seeds(area[on] - area[0]),
            "dearest": over_seeds(dearest[on] - dearest[0]),
            "correlation": over_seeds(alike[on] - alike[0]),
            "area_rescaled": over_seeds(rescaled_area[on] - rescaled_area[0]),
            "mean_cost": over_seeds(mean_cost[on] - mean_cost[0]),
        },
        charts=charts,
        data=f"{found.name}: {rows:,} training rows that each seed draws, {len(y):,} test rows.",
        setup=f"Perceptrons of {'-'.join(map(str, hidden))} hidden units, {epochs} epochs of Adam at 0.001, dropout on "
        f"hidden units alone, {setting.seeds} seeds. Removed units are set to 0 and nothing is scaled; {removals} "
        "random removals for each share.",
        remarks=(
            f"Accuracy of the whole networks: {accuracies}.",
            f"Mean size of the correlation between two units: {ties}.",
            "Each network is compared with its own accuracy when whole. A network trained with dropout has met "
            "removals in training; that it stands them is what dropout trains for.",
            "Units that can stand in for each other may be correlated: robust and independent are two statements, and "
            "are judged apart.",
        ),
    )


def relative_accuracy(
    networks: Networks, x: NDArray[np.float32], y: NDArray[np.int64], removals: int, *, scaled: bool
) -> Tensor:
    """Mean accuracy over random removals of a share of all hidden units, over that of the whole network.

    Args:
        networks: R rates, S seeds.
        x, y: rows to be right on.
        removals: how many for each share.
        scaled: whether the units that are left are multiplied by 1 / (1 - share).

    Returns:
        (shares, R, S) float64; 1 at share 0.
    """
    whole = 100 - error_percent(networks.outputs(x), y)
    found = [torch.ones_like(whole)]
    for share in SHARES[1:]:
        right = [
            100 - error_percent(networks.outputs(x, member=k, rate=share, scaled=scaled), y)
            for k in range(removals)
        ]
        found.append(torch.stack(right).mean(dim=0) / whole)
    return torch.stack(found)


def area_under(curve: Tensor) -> Tensor:
    """(shares, ...) -> (...), the mean height of the curve over the shares, by trapezoids."""
    return torch.trapezoid(curve, torch.tensor(SHARES, dtype=curve.dtype), dim=0) / (SHARES[-1] - SHARES[0])


def mean_correlation(units: Tensor) -> Tensor:
    """Mean size of the correlation between two units over rows; units that do not vary are left out.

    Args:
        units: (R, S, N, U) activations.

    Returns:
        (R, S) float64; NaN where fewer than two units vary.
    """
    found = []
    for one in units.flatten(0, 1).double():
        varying = one[:, one.std(dim=0) > 0]
        count = varying.shape[1]
        if count < 2:
            found.append(torch.tensor(torch.nan, dtype=torch.float64))
            continue
        sizes = torch.corrcoef(varying.T).abs()
        found.append((sizes.sum() - sizes.diagonal().sum()) / (count * (count - 1)))
    return torch.stack(found).reshape(units.shape[:2])


def unit_costs(networks: Networks, units: Tensor, y: NDArray[np.int64]) -> Tensor:
    """Accuracy that is lost when a single unit of the last hidden layer is set to 0.

    Args:
        networks: R rates, S seeds.
        units: (R, S, N, U) activations of that layer.
        y: (N,) classes.

    Returns:
        (R, S, U) percentage points, float64; below 0 where a unit did harm.
    """
    weight, bias = networks.parameters[-2:]
    found = []
    for h, w, b in zip(units.flatten(0, 1), weight, bias, strict=True):
        logits = h @ w + b
        without = logits - h.T[:, :, None] * w[:, None, :]  # (U, N, C)
        found.append(error_percent(without, y) - error_percent(logits, y))
    return torch.stack(found).reshape(*units.shape[:2], -1)


CLAIM = Claim(
    name="coadaptation",
    title="Units that are useful on their own",
    article="Dropout keeps neurons from relying on few others: no unit is irreplaceable, and what is left is a "
    "collection of robust and independent feature detectors.",
    prediction="With p = 0.5 against none: accuracy falls more slowly as random units are removed (larger area under "
    "relative accuracy), the dearest single unit costs less accuracy, and units are less correlated. No formula; after "
    "Srivastava et al. 2014, JMLR 15, sec. 7.1.",
    condition="Relative to each network's own accuracy when whole. “Independent” is read as uncorrelated over test "
    "rows; useful on its own does not imply it.",
    rules=(
        Rule("area", "mean relative accuracy over shares 0 to 0.9 removed, p = 0.5 minus p = 0", "above"),
        Rule("dearest", "accuracy lost with the dearest unit of the last hidden layer, p = 0.5 minus p = 0, points",
             "below"),
        Rule("correlation", "mean |correlation| of two units of that layer, p = 0.5 minus p = 0", "below"),
        Rule("area_rescaled", "as the first, with the units left scaled up by 1 / (1 - share)", "shown"),
        Rule("mean_cost", "accuracy lost with one unit of the last hidden layer, mean, p = 0.5 minus p = 0, points",
             "shown"),
    ),
    experiment=experiment,
    seconds=30,
)  # fmt: skip

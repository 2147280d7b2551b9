"""Dropout's bargain: more loss on the training rows, less on new ones, over subsets of 100 to 10 000 images.

gap = loss on new rows - loss on the training rows, both without masks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Series, Setting
from dropkit.claims.data import Images, images
from dropkit.claims.experiments.networks import (
    Networks,
    cross_entropy,
    error_percent,
    line,
    over_seeds,
    train,
)

DECIDING = 1000  # rows of the subset that decides, fixed before the run: the middle of the ladder
INPUT_RATE = 0.2
BATCH = 50
SIZES = (100, 300, 1000, 3000, 10_000)
FULL_SIZES = (*SIZES, 30_000, 60_000)
RATES = (0.0, 0.2, 0.5, 0.8)
FULL_RATES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8)


@dataclass(frozen=True, slots=True)
class _Losses:
    """Without masks: loss on training and test rows in nats, test error in percent; each (R, S)."""

    training: Tensor
    test: Tensor
    error: Tensor

    @property
    def gap(self) -> Tensor:
        return self.test - self.training


def experiment(
    setting: Setting,
    *,
    sizes: Sequence[int] | None = None,
    hidden: Sequence[int] = (200, 200),
    narrow: Sequence[int] = (16, 16),
    updates: int | None = None,
    epochs: int | None = None,
) -> Findings:
    """Train on subsets with and without dropout, and at all rates on the one that decides.

    Args:
        setting: seeds and form.
        sizes: rows of the subsets, rising, 1 000 (or all rows, where there are fewer) among them.
        hidden: widths.
        narrow: widths of the small network, which is tried on the largest subset.
        updates: steps that the smallest subsets are given at least.
        epochs: passes over the rows at least.
    """
    found = images("mnist")
    updates = updates or (4000 if setting.full else 1500)
    epochs = epochs or (20 if setting.full else 15)
    most = len(found.y_train)
    ladder = [n for n in sizes or (FULL_SIZES if setting.full else SIZES) if n <= most]
    seeds = range(setting.seed, setting.seed + setting.seeds)

    def losses(rows: int, widths: Sequence[int], rates: Sequence[float] = (0.0, 0.5)) -> _Losses:
        batch = min(BATCH, rows)
        networks = train(
            found.x_train, found.y_train, hidden=widths, rates=rates, seeds=seeds, rows=rows, batch=batch,
            epochs=max(epochs, -(-updates // (rows // batch))), input_rate=INPUT_RATE, evaluate_every=1 << 30,
        )  # fmt: skip
        return _losses(networks, found)

    middle = ladder.index(min(DECIDING, ladder[-1]))
    rates = FULL_RATES if setting.full else RATES
    wide = losses(ladder[middle], hidden, rates)
    pair = [0, rates.index(0.5)]
    curves = [
        _Losses(wide.training[pair], wide.test[pair], wide.error[pair])
        if n == ladder[middle]
        else losses(n, hidden)
        for n in ladder
    ]
    small = losses(ladder[-1], narrow)
    training, gap = curves[middle].training, curves[middle].gap
    gain = torch.stack([each.error[0] - each.error[1] for each in curves])
    saved = torch.stack([each.test[0] - each.test[1] for each in curves])
    remarks = [_where(ladder, gain), _other_loss(ladder, saved)]
    best = rates[int(wide.error.mean(dim=1).argmin())]
    remarks.append(
        f"Lowest mean test error at {ladder[middle]:,} rows: at rate {best:g}, chosen by looking at the test rows."
    )
    charts = [
        Chart(
            "error", f"Test error against training rows, {found.name}; bars: 95 % over seeds.", "training rows",
            "test error, percent",
            tuple(line(f"p = {p:g}", ladder, torch.stack([each.error[i] for each in curves]))
                  for i, p in enumerate((0.0, 0.5))), x_log=True, y_log=True,
        ),
        Chart(
            "losses", f"Loss without masks at {ladder[middle]:,} training rows against the rate.", "rate p",
            "cross-entropy, nats a row",
            (line("training rows", rates, wide.training), line("test rows", rates, wide.test),
             line("gap", rates, wide.gap)),
        ),
    ]  # fmt: skip
    if setting.full and most == 60_000:
        chart, said = published_line(found, seeds)
        charts.append(chart)
        remarks.append(said)
    return Findings(
        figures={
            "training": over_seeds(training[1] - training[0]),
            "error": over_seeds(gain[middle]),
            "gap": over_seeds(gap[0] - gap[1]),
            "loss": over_seeds(saved[middle]),
            "error_fewest": over_seeds(gain[0]),
            "error_most": over_seeds(gain[-1]),
            "error_narrow": over_seeds(small.error[0] - small.error[1]),
        },
        charts=tuple(charts),
        data=f"{found.name}: subsets of {', '.join(f'{n:,}' for n in ladder)} training rows that each seed draws; "
        f"{len(found.y_test):,} test rows.",
        setup=f"Perceptrons {_widths(hidden)} (small one: {_widths(narrow)}), Adam at 0.001, batches of {BATCH}, at "
        f"least {epochs} epochs and {updates} updates, equal for all rates; inputs dropped at {INPUT_RATE} wherever "
        f"hidden units are dropped; {setting.seeds} seeds. Published runs of this kind take up to a million updates.",
        remarks=tuple(remarks),
    )  # fmt: skip


def _losses(networks: Networks, found: Images) -> _Losses:
    outputs = networks.outputs(found.x_test)
    return _Losses(
        networks.train_losses, cross_entropy(outputs, found.y_test), error_percent(outputs, found.y_test)
    )


def _sign(value: Measured) -> int:
    """1, -1 or 0, where the figure cannot be told from 0."""
    rule = Rule("", "", "above")
    if rule.judge(value) == "holds":
        return 1
    return -1 if Rule("", "", "below").judge(value) == "holds" else 0


def _where(ladder: Sequence[int], gain: Tensor) -> str:
    """At which sizes dropout lowers the test error, raises it, or neither can be seen."""
    signs = [_sign(over_seeds(each)) for each in gain]

    def named(sign: int) -> str:
        return ", ".join(f"{n:,}" for n, s in zip(ladder, signs, strict=True) if s == sign) or "none"

    return (
        f"Training rows at which p = 0.5 lowers the test error: {named(1)}; raises it: {named(-1)}; "
        f"cannot be told: {named(0)}."
    )


def _other_loss(ladder: Sequence[int], gain: Tensor) -> str:
    said = ", ".join(f"{float(each.mean()):+.3f} ({n:,})" for n, each in zip(ladder, gain, strict=True))
    return f"Test cross-entropy without dropout minus with p = 0.5, nats, by training rows: {said}."


def published_line(
    found: Images, seeds: Sequence[int], hidden: Sequence[int] = (1024, 1024, 1024), epochs: int = 25
) -> tuple[Chart, str]:
    """The network of 3 x 1024 units on all rows beside the published line: a chart, and what to say of it."""
    networks = train(
        found.x_train, found.y_train, hidden=hidden, rates=(0.5,), seeds=seeds, epochs=epochs,
        input_rate=INPUT_RATE, average=10 * (len(found.x_train) // 128), evaluate_every=1 << 30,
    )  # fmt: skip
    errors = error_percent(networks.outputs(found.x_test), found.y_test)[0]
    reached = over_seeds(errors)
    chart = Chart(
        "published", f"Test error of {_widths(hidden)} units on all of {found.name}, seed by seed.", "seed",
        "test error, percent", (Series("dropkit", tuple(seeds), tuple(errors.tolist()), style="points"),),
        level=1.25, level_name="published, without max-norm",
    )  # fmt: skip
    return chart, (
        f"{_widths(hidden)} hidden units on all {len(found.x_train):,} rows, p = 0.5, inputs 0.2, {epochs} epochs "
        f"({epochs * (len(found.x_train) // 128):,} updates; the published run took 1,000,000), Adam, weights averaged "
        f"over about 10 epochs, no max-norm: {reached.value:.2f} ± {reached.standard_error:.2f} % test error; "
        "published: 1.25 % without max-norm, 1.06 % with it."
    )


def _widths(hidden: Sequence[int]) -> str:
    return "-".join(str(width) for width in hidden)


CLAIM = Claim(
    name="tradeoff",
    title="Worse on the training rows, better on new ones",
    article="Dropout raises the training risk, lowers the risk on new data, and makes the gap between them smaller.",
    prediction="At equal updates and p = 0.5: training loss up, test error down, gap down. Source of the rates (0.5, "
    "inputs 0.2): Srivastava et al. 2014, JMLR 15, who saw no gain on the smallest subsets, and a gain that grows with "
    "data and then falls.",
    condition="The network without dropout must overfit: wide for its data, and trained long enough. On very few rows, "
    "on plenty of rows, and in small networks dropout need not help, and can hurt.",
    rules=(
        Rule("training", "training loss at 1 000 rows, p = 0.5 minus p = 0, masks off, nats", "above"),
        Rule("error", "test error at 1 000 rows, p = 0 minus p = 0.5, percent", "above"),
        Rule("gap", "test minus training loss at 1 000 rows, p = 0 minus p = 0.5, nats", "above"),
        Rule("loss", "test loss at 1 000 rows, p = 0 minus p = 0.5, nats", "shown"),
        Rule("error_fewest", "test error on the smallest subset, p = 0 minus p = 0.5, percent", "shown"),
        Rule("error_most", "test error on the largest subset, p = 0 minus p = 0.5, percent", "shown"),
        Rule("error_narrow", "the same in a network of 16-16 hidden units, percent", "shown"),
    ),
    experiment=experiment,
    seconds=150,
)  # fmt: skip

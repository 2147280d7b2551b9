"""How far predictions move when one training row is replaced by another, with dropout and without.

linear model, squared error:    fitted = X (X'X + p/(1-p) diag(X'X))^-1 X' y,    so the change is known
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dropkit.claims.claim import Chart, Claim, Findings, Rule, Setting
from dropkit.claims.data import images, table
from dropkit.claims.experiments.networks import drawn_folds, error_percent, line, over_seeds, train
from dropkit.measure import Stability, stability
from dropkit.nn import Dropout
from dropkit.training import Fold

RATES = (0.0, 0.2, 0.5)
CLOSE = 0.05  # share by which finite training may miss the closed form


def experiment(
    setting: Setting,
    *,
    rows: int = 300,
    replaced: int | None = None,
    test_rows: int = 1000,
    hidden: Sequence[int] = (64,),
    epochs: int = 100,
    linear_rows: int = 60,
    linear_steps: int = 600,
) -> Findings:
    """Replace one training row at a time and train again, a network and a linear model.

    Args:
        setting: seeds and form.
        rows: training rows of a network.
        replaced: rows that are replaced, one at a time.
        test_rows: rows, at most, whose predictions are followed.
        hidden: widths.
        epochs: passes over the rows.
        linear_rows: training rows of the linear model.
        linear_steps: its steps on all rows at once.
    """
    found = images("mnist")
    replaced = replaced or (32 if setting.full else 8)
    seeds = range(setting.seed, setting.seed + setting.seeds)
    folds = [fold for seed in seeds for fold in replace_one(len(found.y_train), rows, replaced, seed)]
    networks = train(
        found.x_train, found.y_train, hidden=hidden, rates=RATES, seeds=range(len(folds)), folds=folds,
        epochs=epochs, batch=50, evaluate_every=1 << 30,
    )  # fmt: skip
    x, y = found.x_test[:test_rows], found.y_test[:test_rows]
    outputs = networks.outputs(x)
    grid = (len(RATES), len(seeds), replaced + 1)
    wrong = error_percent(outputs, y).reshape(grid)[:, :, 0].mean(dim=1)
    moved = changes(outputs.reshape(*grid, *outputs.shape[2:]))  # (R, S, replaced, N)
    mean, most = moved.mean(dim=(2, 3)), moved.amax(dim=(2, 3))
    on = RATES.index(0.5)
    line_up = [_linear(seed, linear_rows, replaced, linear_steps) for seed in seeds]
    predicted, measured = _ratios(line_up)
    return Findings(
        figures={
            "mean": over_seeds(mean[0] - mean[on]),
            "largest": over_seeds(most[0] - most[on]),
            "linear": over_seeds(predicted),
            "linear_measured": over_seeds(measured, 1.0),
        },
        charts=(
            Chart(
                "replaced", f"Change of the predicted probabilities when one of {rows} training rows is another, "
                f"{found.name}; bars: 95 % over seeds.", "rate p", "total variation distance",
                (line("mean over rows and replacements", RATES, mean), line("largest", RATES, most)), y_log=True,
            ),
        ),
        data=f"{found.name}: {rows} training rows that each seed draws, {len(x):,} test rows. Linear model: "
        f"{table('concrete').name}, {linear_rows} rows.",
        setup=f"Perceptrons of {'-'.join(map(str, hidden))} hidden units, {epochs} epochs of Adam at 0.001; {replaced} "
        f"rows replaced one at a time, {setting.seeds} seeds; same weights at the start, same order, same masks of "
        f"all other rows. Linear model: dropout 0.5 on its inputs, {linear_steps} steps on all rows "
        "(`dk.measure.stability`).",
        remarks=(
            "Test error, percent: "
            + ", ".join(f"{float(w):.1f} (p = {p:g})" for p, w in zip(RATES, wrong, strict=True))
            + ".",
            f"Mean change: {float(mean[0].mean()):.4f} without, {float(mean[on].mean()):.4f} at p = 0.5; largest: "
            f"{float(most[0].mean()):.3f} and {float(most[on].mean()):.3f} (total variation, 0 to 1).",
            "Largest changes are of single test rows near a border between classes, where training decides by "
            "chance.",
        ),
    )  # fmt: skip


def replace_one(length: int, rows: int, replaced: int, seed: int) -> list[Fold]:
    """The seed's rows, and `replaced` copies of them in each of which one row is a row from outside.

    Args:
        length: N, rows there are; at least rows + replaced.
        rows: training rows.
        replaced: copies.
        seed: of the draw; also the stream, so that all copies share weights at the start and order.
    """
    (whole,) = drawn_folds(length, (seed,), rows)
    generator = np.random.default_rng([seed, 78])
    positions = generator.permutation(rows)[:replaced]
    others = generator.permutation(np.setdiff1d(np.arange(length), whole.train))[:replaced]
    folds = [whole]
    for position, other in zip(positions, others, strict=True):
        train_rows = whole.train.copy()
        train_rows[position] = other  # in its place, so that the order of all other rows stays
        folds.append(Fold(train_rows, whole.validation, whole.stream))
    return folds


def changes(outputs: Tensor) -> Tensor:
    """Total variation distance between a network's predictions and those with one row replaced.

    d = 1/2 sum_c |P_c - P'_c|

    Args:
        outputs: (R, S, 1 + replaced, N, C) logits, the untouched rows' first.

    Returns:
        (R, S, replaced, N), float64.
    """
    probabilities = outputs.double().softmax(dim=-1)
    return (probabilities[:, :, 1:] - probabilities[:, :, :1]).abs().sum(dim=-1) / 2


def _linear(seed: int, rows: int, replaced: int, steps: int) -> Stability:
    """Replace-one stability of a linear model on a table, standardised, dropout 0.5 on its inputs."""
    source = table("concrete")
    drawn = np.random.default_rng([seed, 79]).permutation(len(source.y))[:rows]
    x, y = torch.from_numpy(source.x[drawn]).float(), torch.from_numpy(source.y[drawn]).float()
    x = (x - x.mean(dim=0)) / x.std(dim=0).clamp_min(1e-6)
    y = (y - y.mean()) / y.std()
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(Dropout(0.5), nn.Linear(x.shape[1], 1))
    return stability(model, x, y[:, None], members=replaced, seed=seed, epochs=steps, learning_rate=0.02)


def _ratios(found: Sequence[Stability]) -> tuple[list[float], list[float]]:
    """By seed: closed form with dropout over closed form without, and measured over predicted."""
    predicted, measured = [], []
    for one in found:
        assert one.predicted is not None
        assert one.without_predicted is not None
        predicted.append(float(one.predicted) / one.without_predicted)
        measured.append(float(one.measured) / float(one.predicted))
    return predicted, measured


CLAIM = Claim(
    name="stability",
    title="Predictions that hang less on one row",
    article="Averaging over thinned networks makes predictions less sensitive to the replacement of a single training "
    "row.",
    prediction="With p = 0.5 against none, mean and largest change of the predicted probabilities over test rows and "
    "replaced rows are smaller. Linear model: change of the fit from the closed form, smaller with dropout, and "
    "reached in training to 5 %. Source of the notion: Bousquet and Elisseeff 2002, JMLR 2.",
    condition="At equal epochs. A network so confident that its probabilities are 0 and 1 hardly moves on most rows.",
    rules=(
        Rule("mean", "mean change of predicted probabilities (total variation), p = 0 minus p = 0.5", "above"),
        Rule("largest", "largest change, mean over seeds, p = 0 minus p = 0.5", "above"),
        Rule("linear", "linear model, closed form: change with p = 0.5 over change without", "below", bound=1.0),
        Rule("linear_measured", "linear model: measured change over the closed form, p = 0.5", "equal",
             relative=CLOSE),
    ),
    experiment=experiment,
    seconds=60,
)  # fmt: skip

"""Whether dropout leaves fewer functions within reach: random labels at equal epochs, and degrees of freedom.

df(p) = tr[X (X'X + p/(1-p) diag(X'X))^-1 X']        linear model, dropout on its inputs
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dropkit.claims.claim import Chart, Claim, Findings, Rule, Series, Setting
from dropkit.claims.data import images, table
from dropkit.claims.experiments.networks import Networks, drawn_folds, error_percent, line, over_seeds, train
from dropkit.measure import capacity
from dropkit.nn import Dropout

RATES = (0.0, 0.2, 0.5, 0.8)
CLOSE = 0.05  # share by which finite training may miss the closed form


def experiment(
    setting: Setting,
    *,
    rows: int = 500,
    hidden: Sequence[int] = (128, 128),
    epochs: Sequence[int] | None = None,
    linear_rows: int = 100,
    draws: int = 8,
    linear_steps: int = 600,
) -> Findings:
    """Learn labels that mean nothing, at all rates for equally long.

    Args:
        setting: seeds and form.
        rows: training rows that each seed draws.
        hidden: widths.
        epochs: budgets, rising; the first decides, the last shows what more time does.
        linear_rows: rows of the linear model.
        draws: of Gaussian labels for it.
        linear_steps: its steps on all rows at once.
    """
    found = images("mnist")
    epochs = epochs or ((40, 200, 1000) if setting.full else (40, 200))
    seeds = range(setting.seed, setting.seed + setting.seeds)
    classes = int(found.y_train.max()) + 1
    labels = np.random.default_rng([setting.seed, 80]).integers(classes, size=len(found.y_train))
    losses, wrong = [], []
    for budget in epochs:
        networks = train(
            found.x_train, labels, hidden=hidden, rates=RATES, seeds=seeds, rows=rows, epochs=budget, batch=50,
            evaluate_every=1 << 30,
        )  # fmt: skip
        losses.append(networks.train_losses)
        wrong.append(_own_errors(networks, found.x_train, labels, rows))
    on = RATES.index(0.5)
    ratios, degrees = _linear(setting, linear_rows, draws, linear_steps)
    steps = tuple(p / 20 for p in range(20))
    design = _rows_of_table(setting.seed, linear_rows)[0]
    return Findings(
        figures={
            "loss": over_seeds(losses[0][on] - losses[0][0]),
            "degrees": over_seeds(degrees),
            "linear": over_seeds(ratios, 1.0),
            "error": over_seeds(wrong[0][on] - wrong[0][0]),
            "error_longer": over_seeds(wrong[-1][on]),
        },
        charts=(
            Chart(
                "labels", f"Random labels learned by heart, {rows} rows of {found.name}; bars: 95 % over seeds.",
                "rate p", "training rows still wrong, percent",
                tuple(line(f"{n} epochs", RATES, each) for n, each in zip(epochs, wrong, strict=True)),
                level=100 * (1 - 1 / classes), level_name="guessing",
            ),
            Chart(
                "degrees", f"Effective degrees of freedom of the linear model, {table('concrete').name}.", "rate p",
                "degrees of freedom",
                (Series("closed form", steps, tuple(degrees_of_freedom(design, p) for p in steps),
                        style="predicted"),),
            ),
        ),
        data=f"Inputs of {found.name}, {rows} rows that each seed draws, labels drawn at random. Linear model: "
        f"{table('concrete').name}, {linear_rows} rows, Gaussian labels.",
        setup=f"Perceptrons of {'-'.join(map(str, hidden))} hidden units, Adam at 0.001, batches of 50, "
        f"{' and '.join(map(str, epochs))} epochs, equal for all rates, {setting.seeds} seeds. Linear model: dropout "
        f"0.5 on its inputs, {linear_steps} steps on all rows, {draws} draws of labels a seed (`dk.measure.capacity`).",
        remarks=(
            "Rows still wrong at p = 0.5, percent: "
            + ", ".join(
                f"{float(e[on].mean()):.1f} after {n} epochs" for n, e in zip(epochs, wrong, strict=True)
            )
            + "; without dropout: "
            + ", ".join(f"{float(e[0].mean()):.1f}" for e in wrong)
            + ".",
            "Every weight vector that is possible without dropout is possible with it; what shrinks is what is reached "
            "in given time, and in the linear model the freedom of the optimum.",
        ),
    )  # fmt: skip


def degrees_of_freedom(design: Tensor, p: float) -> float:
    """Effective degrees of freedom of least squares under dropout on its inputs.

    df = tr[X (X'X + p/(1-p) diag(X'X))^-1 X'];    a bias is not counted: centre the columns

    Args:
        design: X, (B, D), centred.
        p: chance to drop an input, below 1.

    Source: Hastie, Tibshirani and Friedman 2009, sec. 7.6.
    """
    wide = design.double()
    gram = wide.T @ wide
    penalised = gram + p / (1 - p) * torch.diag(gram.diagonal())
    return float((torch.linalg.pinv(penalised, hermitian=True) @ gram).trace())


def _own_errors(networks: Networks, x: NDArray[np.float32], labels: NDArray[np.int64], rows: int) -> Tensor:
    """(R, S): training rows of each seed that its networks put into a wrong class, percent."""
    found = []
    for s, fold in enumerate(drawn_folds(len(x), networks.seeds, rows)):
        found.append(error_percent(networks.outputs(x[fold.train])[:, s], labels[fold.train]))
    return torch.stack(found, dim=1)


def _rows_of_table(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """Standardised rows of the table, float32: (rows, D) and (rows, 1)."""
    source = table("concrete")
    drawn = np.random.default_rng([seed, 79]).permutation(len(source.y))[:rows]
    x, y = torch.from_numpy(source.x[drawn]), torch.from_numpy(source.y[drawn, None])
    x, y = ((part - part.mean(dim=0)) / part.std(dim=0).clamp_min(1e-6) for part in (x, y))
    return x.float(), y.float()


def _linear(setting: Setting, rows: int, draws: int, steps: int) -> tuple[list[float], list[float]]:
    """By seed: measured over predicted rise of the loss on random labels, and the share of degrees of freedom left."""
    ratios, degrees = [], []
    for seed in range(setting.seed, setting.seed + setting.seeds):
        x, y = _rows_of_table(seed, rows)
        with torch.random.fork_rng(devices=[]):
            model = nn.Sequential(Dropout(0.5), nn.Linear(x.shape[1], 1))
        one = capacity(model, x, y, members=draws, seed=seed, epochs=steps, learning_rate=0.02)
        assert one.predicted is not None
        assert one.degrees is not None
        assert one.full_degrees is not None
        ratios.append(float(one.measured) / float(one.predicted))
        degrees.append(one.degrees / one.full_degrees)
    return ratios, degrees


CLAIM = Claim(
    name="capacity",
    title="Fewer functions within reach",
    article="Dropout shrinks the part of the hypothesis space that learning reaches: effective capacity falls.",
    prediction="Random labels are fitted worse at equal epochs with p = 0.5 than without. Linear model: fewer "
    "effective degrees of freedom, tr[X (X'X + p/(1-p) diag(X'X))^-1 X'], and from them the loss on Gaussian labels, "
    "reached to 5 %. Source: Zhang et al. 2017, arXiv:1611.03530 (random labels).",
    condition="At equal epochs, or at the optimum of the loss under masks. The set of functions that the network can "
    "represent is the same; a wide network that trains long enough may learn random labels by heart all the same.",
    rules=(
        Rule("loss", "training loss on random labels, masks off, p = 0.5 minus p = 0, nats", "above"),
        Rule("degrees", "linear model: degrees of freedom at p = 0.5 over those at p = 0", "below", bound=1.0),
        Rule("linear", "linear model: rise of the loss on Gaussian labels, measured over closed form", "equal",
             relative=CLOSE),
        Rule("error", "training rows wrong, p = 0.5 minus p = 0, percent", "shown"),
        Rule("error_longer", "training rows wrong at p = 0.5 after the longest training, percent", "shown"),
    ),
    experiment=experiment,
    seconds=60,
)  # fmt: skip

"""Does dropout find flatter minima? Eigenvalue, trace, perturbed losses and a curvature that rescaling leaves alone.

All figures are of the loss without masks, so that they describe the network that is used and not its noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Series, Setting, critical
from dropkit.claims.data import Images, images
from dropkit.claims.experiments.networks import Networks, drawn_folds, line, over_seeds, train
from dropkit.measure import Flatness, flatness
from dropkit.training import Fold

RATE = 0.5  # of hidden units
BATCH = 50
SIZE = 0.05  # of the perturbations, relative to each filter's length
MEASURES = {
    "top": "largest Hessian eigenvalue",
    "trace": "Hessian trace",
    "random": "rise of the loss under random steps of 5 % of each filter's length",
    "adversarial": "rise of the loss in the worst such direction found",
    "invariant": "sum of w² d²L/dw², which rescaling leaves alone",
}


def experiment(
    setting: Setting,
    *,
    rows: int | None = None,
    hidden: tuple[int, ...] | None = None,
    epochs: int = 100,
    directions: int = 16,
) -> Findings:
    """Train the same networks with and without dropout, and measure both at equal steps and at equal training loss.

    Args:
        setting: seeds and form.
        rows: training rows of each seed; the loss is measured on the same rows.
        hidden: widths.
        epochs: of the comparison at equal steps.
        directions: random ones, for traces and perturbations.
    """
    rows = rows or (4000 if setting.full else 1000)
    hidden = hidden or ((256, 256) if setting.full else (64, 64))
    seeds = tuple(range(setting.seed, setting.seed + setting.seeds))
    data = images("mnist")
    folds = drawn_folds(len(data.x_train), seeds, rows)

    def trained(until: list[int] | None = None) -> Networks:
        return train(
            data.x_train, data.y_train, hidden=hidden, rates=(0.0, RATE), seeds=seeds, epochs=epochs,
            batch=BATCH, until=until, folds=folds,
        )  # fmt: skip

    steps = trained()
    ends = ends_at_equal_loss(steps)
    loss = trained([end for row in ends for end in row])
    found = {
        "steps": _measured(steps, data, folds, directions),
        "loss": _measured(loss, data, folds, directions),
    }
    contrasts = {
        f"{name}_{way}": contrast(*([_value(one, name) for one in row] for row in pairs))
        for way, pairs in found.items()
        for name in (*MEASURES, "plain", "gradient")
    }
    figures = {name: over_seeds(values) for name, values in contrasts.items()}
    return Findings(
        figures=figures,
        charts=(_chart(contrasts, data, setting),),
        data=f"{data.name}, {min(rows, len(data.x_train)):,} training rows drawn by each seed",
        setup=(
            f"{len(data.x_train[0])}-{'-'.join(map(str, hidden))}-{int(data.y_train.max()) + 1} ReLU network, rate 0 "
            f"against {RATE} on hidden units, Adam at 0.001, batch {BATCH}, {epochs} epochs, {setting.seeds} seeds; "
            f"the loss without masks on all training rows, {directions} random directions."
        ),
        remarks=_remarks(found, ends, figures),
    )


def ends_at_equal_loss(networks: Networks) -> list[list[int]]:
    """Epochs, (2 rates, S seeds), at which a pair has the training loss of the one that ends higher.

    The one that ends lower is stopped at its first epoch at or below that loss. A coarse last step leaves it a little
    lower, and with cross-entropy lower is flatter: what is left of the difference speaks for the one that was stopped.
    """
    ends = [[0] * len(networks.seeds) for _ in networks.rates]
    for s in range(len(networks.seeds)):
        curves = [row[s].curve for row in networks.trained]
        target = max(curve.train[-1] for curve in curves)
        for r, curve in enumerate(curves):
            reached = (e for e, loss in zip(curve.epochs, curve.train, strict=True) if loss <= target)
            ends[r][s] = curve.epochs[-1] if curve.train[-1] == target else next(reached)
    return ends


def _measured(
    networks: Networks, data: Images, folds: Sequence[Fold], directions: int
) -> list[list[Flatness]]:
    """(2 rates, S seeds): each network on the rows it learned from."""
    found = []
    for row in networks.trained:
        line = []
        for seed, fold, one in zip(networks.seeds, folds, row, strict=True):
            own = fold.train
            # The instrument asks for a layer that drops; without masks its rate is of no consequence.
            network = replace(one, spec=replace(one.spec, rate=RATE)).network()
            line.append(
                flatness(
                    network, torch.from_numpy(data.x_train[own]), torch.from_numpy(data.y_train[own]),
                    members=directions, seed=seed, size=SIZE,
                )
            )  # fmt: skip
        found.append(line)
    return found


def _value(measured: Flatness, name: str) -> float:
    return float(measured.measured) if name == "random" else float(getattr(measured, name))


def contrast(plain: Sequence[float], dropped: Sequence[float]) -> NDArray[np.float64]:
    """(S,) (a - b) / (|a| + |b|), in [-1, 1]: 1/3 where a is twice b. Defined too where a curvature is negative."""
    a, b = np.asarray(plain, np.float64), np.asarray(dropped, np.float64)
    size = np.abs(a) + np.abs(b)
    return np.asarray(np.where(size > 0, (a - b) / np.where(size > 0, size, 1.0), 0.0))


def _chart(contrasts: Mapping[str, NDArray[np.float64]], data: Images, setting: Setting) -> Chart:
    def series(way: str, said: str) -> Series:
        values = np.stack([contrasts[f"{name}_{way}"] for name in MEASURES])
        return line(said, range(len(MEASURES)), torch.from_numpy(values), "bars")

    return Chart(
        "flatness",
        f"How much sharper the loss is without dropout, (without - with) / (without + with): 1/3 is twice, "
        f"{data.name}, {setting.seeds} seeds; bars are intervals of level 0.95. Above 0: dropout is flatter.",
        "measure",
        "(without - with) / (without + with)",
        (series("loss", "at equal training loss"), series("steps", "at equal steps")),
        x_names=("top eigenvalue", "trace", "random rise", "adversarial rise", "rescaling-invariant"),
        level=0.0,
        level_name="equally flat",
    )


def _remarks(
    found: dict[str, list[list[Flatness]]], ends: list[list[int]], figures: dict[str, Measured]
) -> tuple[str, ...]:
    losses = {
        way: [float(np.mean([one.plain for one in row])) for row in pairs] for way, pairs in found.items()
    }
    said = [
        f"Training losses without masks, in nats, without and with dropout: {losses['steps'][0]:.3g} and "
        f"{losses['steps'][1]:.3g} at equal steps; {losses['loss'][0]:.3g} and {losses['loss'][1]:.3g} at equal loss, "
        f"where the networks without dropout ended at epoch {min(ends[0])} to {max(ends[0])}, those with at "
        f"{min(ends[1])} to {max(ends[1])}.",
        "The Hessian of cross-entropy shrinks with the loss itself, so at equal steps a network that fits better looks "
        "flatter for that alone; the comparison at equal training loss decides.",
        "Eigenvalue and trace change when one ReLU layer is scaled up and the next one down; filter-normalised steps "
        "and the last measure do not.",
    ]
    halves = {name: critical(one.degrees) * one.standard_error for name, one in figures.items()}
    flatter, sharper = (
        [
            said
            for name, said in MEASURES.items()
            if sign * figures[f"{name}_steps"].value > halves[f"{name}_steps"]
        ]
        for sign in (1, -1)
    )
    said.append(
        f"At equal steps dropout is the flatter one by {', '.join(flatter) or 'no measure'}; the sharper one by "
        f"{', '.join(sharper) or 'no measure'}; by the others no difference is seen."
    )
    return tuple(said)


CLAIM = Claim(
    name="flatness",
    title="Flatter minima",
    article="The noise of dropout leads the weights to wide, flat minima, where small changes cost little.",
    prediction="The contrast (without - with) / (without + with) is above 0 in every measure of sharpness, declared "
    "before the run; 1/3 is twice as sharp. No formula; Zhang and Xu 2022, arXiv:2207.05952, report the sign.",
    condition="At equal training loss. At equal steps the network that fits its rows better can look flatter for that "
    "alone.",
    rules=(
        *(Rule(f"{name}_loss", f"contrast of the {said}, at equal training loss", "above")
          for name, said in MEASURES.items()),
        *(Rule(f"{name}_steps", f"contrast of the {said}, at equal steps", "shown")
          for name, said in MEASURES.items()),
        Rule("plain_loss", "contrast of the training loss where it was made equal", "shown"),
        Rule("plain_steps", "contrast of the training loss at equal steps", "shown"),
        Rule("gradient_loss", "contrast of the gradient's length at equal training loss", "shown"),
        Rule("gradient_steps", "contrast of the gradient's length at equal steps", "shown"),
    ),
    experiment=experiment,
    extras=("measure",),
    seconds=65.0,
)  # fmt: skip

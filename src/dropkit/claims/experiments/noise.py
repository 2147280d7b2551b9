"""The gradient's variance under dropout: the article's formula, where it is exact, and where it is far too small."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Series, Setting
from dropkit.claims.data import images
from dropkit.claims.experiments.draws import BOUND, beside_law, measured_series
from dropkit.claims.experiments.linear import dropout_weights, linear_network, standardised_table, wide
from dropkit.claims.experiments.networks import Networks, over_seeds
from dropkit.claims.experiments.second_order import TRAINED, image_networks
from dropkit.functional import dropout
from dropkit.masks import masks
from dropkit.measure import gradient_noise
from dropkit.measure.gradient_noise import GradientNoise, LayerNoise
from dropkit.measure.linear import LinearModel, linear_gradient_moments
from dropkit.measure.sampling import variance_and_error

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
BATCH = 8
BATCHES = (1, 4, 16, 64, 256)
MANY = 256  # rows under one mask
RATE = 0.3  # of the linear model
LAYERS = ("hidden1.weight", "output.weight")


def experiment(
    setting: Setting,
    draws: int | None = None,
    rows: int = 2000,
    hidden: int = 32,
    epochs: int | None = None,
) -> Findings:
    """Masks on gradients, as the article has them; a linear model; each layer of trained networks.

    Args:
        setting: seeds and length.
        draws: minibatches at each rate; None: 2 000, in the long form 20 000.
        rows: training rows of the networks.
        hidden: their width.
        epochs: of their training; None: 20, in the long form 60.
    """
    count = draws or (20_000 if setting.full else 2000)
    table_name, x, y = standardised_table("concrete")
    design, targets = wide(x), wide(y)
    best = dropout_weights(design, targets, 0.0)
    gradients = 2 * design * (design @ best / 2 - targets)[:, None]
    own = {rate: masked(gradients, rate, BATCH, False, count, setting.seed) for rate in RATES}
    sized = {
        shared: {size: masked(gradients, 0.5, size, shared, count // 4, setting.seed + 1) for size in BATCHES}
        for shared in (False, True)
    }
    linear = gradient_noise(
        linear_network(best, RATE), design, targets, members=count, seed=setting.seed, batch=32
    )
    assert linear.exact is not None
    assert linear.article is not None
    ratios, residuals = row_ratios(design, targets, best, RATE)
    nets = image_networks(setting, rows, hidden, epochs or (60 if setting.full else 20))
    layers = _layers(nets, count // 20)
    figures = {f"article {rate:g}": own[rate] for rate in (0.3, 0.9)}
    figures |= {
        "shared": sized[True][MANY],
        "linear": Measured(float(linear.measured), float(linear.standard_error), linear.exact),
        "beyond": Measured(
            float(linear.measured) / linear.article, float(linear.standard_error) / linear.article
        ),
        "rows": Measured(float((ratios > 10).double().mean()), 0.0),
        "median": Measured(float(ratios.median()), 0.0),
    }
    for name in LAYERS:
        found = [layer for one in layers for layer in one.layers if layer.name == name]
        figures[f"inflation {name}"] = over_seeds([layer.measured / layer.plain for layer in found])
        figures[f"beyond {name}"] = over_seeds([layer.measured / (layer.article or 1.0) for layer in found])
    return Findings(
        figures=figures,
        charts=(
            _rate_chart(own, table_name),
            _batch_chart(sized, table_name),
            _layer_chart(layers, setting.seeds),
            Chart(
                "rows",
                "How many times larger than the article's formula the variance of one row's gradient is, linear "
                f"model on {table_name} at its least-squares weights, p = {RATE:g}, a point for each of 200 rows.",
                "distance of the row's target from its prediction, in standard deviations of the target",
                "exact / article's",
                (Series("row", tuple(residuals[:200].tolist()), tuple(ratios[:200].tolist()), style="points"),),
                x_log=True, y_log=True,
            ),
        ),
        data=(
            f"{table_name}, {len(x)} rows, standardised; {images('mnist').name}, {rows} rows drawn for each "
            "seed, 200 test rows measured"
        ),
        setup=(
            f"{count:,} minibatches of {BATCH} rows for each rate; linear model: {count:,} of 32; networks "
            f"{images('mnist').x_train.shape[1]}-{hidden}-10 trained and measured at p = {TRAINED:g}, "
            f"{setting.seeds} seeds, {count // 20} minibatches of 32."
        ),
        remarks=(
            "The formula is exact for gradients that a mask of their own multiplies once. In a model the "
            "residual is noisy as well, and its noise stays where the plain gradient vanishes: near an optimum "
            "the formula is too small by any factor.",
            "One mask for the whole batch leaves (p/q) mu^2 whatever the batch: tied masks do not average out.",
        ),
    )  # fmt: skip


def masked(gradients: Tensor, rate: float, batch: int, shared: bool, draws: int, seed: int) -> Measured:
    """Variance of the mean of a minibatch of gradients under masks on their elements, beside the article's formula.

    own masks:  sum over parameters of (s^2 + p mu^2) / (q B)
    one for all: s^2 / (q B) + (p / q) mu^2

    Args:
        gradients: (N, P), one row each; minibatches are drawn with replacement.
        rate: p.
        batch: B.
        shared: whether one mask serves a minibatch.
        draws: minibatches.
        seed: of rows and masks.
    """
    q, generator = 1 - rate, torch.Generator().manual_seed(seed)
    mean = gradients.mean(dim=0)
    s2, mu2 = float((gradients.square().mean(dim=0) - mean.square()).sum()), float(mean.square().sum())
    predicted = s2 / (q * batch) + rate / q * mu2 if shared else (s2 + rate * mu2) / (q * batch)
    found = []
    for step, part in enumerate(torch.full((draws,), batch).split(max(1, 4096 // batch))):
        drawn = gradients[torch.randint(len(gradients), (len(part), batch), generator=generator)]
        with masks(seed=seed, step=step):
            found.append(dropout(drawn, rate, shared=(1,) if shared else (), site="gradients").mean(dim=1))
    value, error = variance_and_error(torch.cat(found))
    return Measured(float(value), float(error), predicted)


def row_ratios(x: Tensor, y: Tensor, weights: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """For each row of a linear model, the exact variance of its gradient over masks over the article's, and |residual|.

    The article's, for one row: (p / q) mu^2, mu its plain gradient.

    Args:
        x: (N, D); y: (N,); weights: (D,).
        rate: p.

    Returns:
        (N,) and (N,), float64.
    """
    model = LinearModel("", x, weights[None], torch.zeros(1, dtype=x.dtype), False, y[:, None], rate)
    first, second = (moment["weight"][:, 0] for moment in linear_gradient_moments(model))
    residual = x @ weights - y
    plain = 2 * x * residual[:, None]
    article = rate / (1 - rate) * plain.square().sum(dim=1)
    return (second - first.square()).sum(dim=1) / article, residual.abs()


def _layers(nets: Networks, members: int) -> list[GradientNoise]:
    """The instrument on each network at the rate of its training, on 200 test images."""
    data = images("mnist")
    x, y = torch.tensor(data.x_test[:200]), torch.from_numpy(data.y_test[:200])
    return [
        gradient_noise(nets.network(0, s), x, y, members=members, seed=seed, batch=32)
        for s, seed in enumerate(nets.seeds)
    ]


def _rate_chart(own: dict[float, Measured], name: str) -> Chart:
    return Chart(
        "rate",
        f"Variance of the mean of {BATCH} gradients of a linear model on {name}, each under a mask of its own, "
        "summed over the weights; bars are two standard errors.",
        "rate p", "variance", beside_law("measured", own, "(s² + p μ²) / (q B)"), y_log=True,
    )  # fmt: skip


def _batch_chart(sized: dict[bool, dict[int, Measured]], name: str) -> Chart:
    series: list[Series] = []
    for shared, said in ((False, "a mask for each row"), (True, "one mask for the batch")):
        found = {float(size): one for size, one in sized[shared].items()}
        series += beside_law(said, found, f"{said}, formula")
    return Chart(
        "batch",
        f"The same against the batch, p = 0.5, on {name}: shared masks do not average out. Bars are two standard "
        "errors.",
        "rows B of a minibatch", "variance", tuple(series), x_log=True, y_log=True,
    )  # fmt: skip


def _layer_chart(found: list[GradientNoise], seeds: int) -> Chart:
    names = tuple(layer.name for layer in found[0].layers)
    ways: dict[str, Callable[[LayerNoise], float]] = {
        "without masks": lambda layer: layer.plain,
        "article's formula": lambda layer: layer.article or math.nan,
        "measured": lambda layer: layer.measured,
        "measured, one mask for the batch": lambda layer: layer.shared_measured,
    }
    series = []
    for said, way in ways.items():
        each = [over_seeds([way(one.layers[i]) for one in found]) for i in range(len(names))]
        series.append(measured_series(said, range(len(names)), each, "bars"))
    return Chart(
        "layers",
        f"Variance of the gradient, summed over each weight of trained networks, batch of 32, p = {TRAINED:g}, "
        f"{seeds} seeds; bars are two standard errors.",
        "weight", "variance", tuple(series), x_names=names, y_log=True,
    )  # fmt: skip


CLAIM = Claim(
    name="noise",
    title="Dropout inflates the gradient's variance",
    article="The variance of a minibatch gradient grows with the rate, from its least at p = 0 to no bound at p = 1.",
    prediction=(
        "Var = (s² + p μ²) / (q B) where a mask of its own multiplies each gradient once; s²/(q B) + (p/q) μ² "
        "under one mask for the batch; for a linear model the exact form with the noise of the residual."
    ),
    condition=(
        "Masks multiply each row's gradient once and are drawn for each row. In a model the residual is noisy "
        "as well, and the formula is a lower bound."
    ),
    rules=(
        *(
            Rule(f"article {rate:g}", f"masked gradients, batch of 8, p = {rate:g}: variance", "equal", tolerance=BOUND)
            for rate in (0.3, 0.9)
        ),
        Rule("shared", "the same with one mask for a batch of 256, p = 0.5", "equal", tolerance=BOUND),
        Rule("linear", "gradient of a linear model at least squares, batch of 32, p = 0.3, against the exact formula",
             "equal", tolerance=BOUND),
        *(
            Rule(f"inflation {name}", f"network, {name}: variance over that without masks, p = 0.5", "above", bound=1.0)
            for name in LAYERS
        ),
        Rule("beyond", "linear model: measured variance over the article's", "shown"),
        Rule("rows", "share of single rows whose variance is over 10 times the article's", "shown"),
        Rule("median", "the same factor of the median row", "shown"),
        *(Rule(f"beyond {name}", f"network, {name}: measured variance over the article's", "shown") for name in LAYERS),
    ),
    experiment=experiment,
    seconds=11.0,
)  # fmt: skip

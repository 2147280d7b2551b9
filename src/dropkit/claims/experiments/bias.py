"""The expected gradient under dropout is not the gradient of the plain network, though activations keep their mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Series, Setting
from dropkit.claims.data import images
from dropkit.claims.experiments.draws import measured_series
from dropkit.claims.experiments.linear import dropout_weights, linear_network, standardised_table, wide
from dropkit.claims.experiments.networks import Networks, over_seeds
from dropkit.claims.experiments.second_order import TRAINED, image_networks, set_rate
from dropkit.masks import masks
from dropkit.measure import gradient_bias
from dropkit.measure.gradient_bias import GradientBias

RATE = 0.3  # of the linear model
ASKED = (0.1, 0.5)  # rates at which the networks are measured


def experiment(
    setting: Setting,
    members: int | None = None,
    rows: int = 2000,
    hidden: int = 32,
    epochs: int | None = None,
) -> Findings:
    """A linear model halfway to least squares, and networks trained on images.

    Args:
        setting: seeds and length.
        members: passes with masks; None: 400, in the long form 4 000.
        rows: training rows of the networks.
        hidden: their width.
        epochs: of their training; None: 20, in the long form 60.
    """
    count = members or (4000 if setting.full else 400)
    name, *columns = standardised_table("concrete")
    x, y = (wide(part) for part in columns)
    weights = dropout_weights(x, y, 0.0) / 2
    model = linear_network(weights, RATE)
    seeds = tuple(range(setting.seed, setting.seed + setting.seeds))
    linear = [gradient_bias(model, x, y, members=count, seed=seed) for seed in seeds]
    exact = 2 * RATE / (1 - RATE) * weights * x.square().mean(dim=0)
    measured = torch.stack([one.measured for one in linear])
    # Independent repetitions of one measurement: their errors are known from all their masks together.
    pooled = (
        torch.stack([one.standard_error for one in linear]).square().mean(dim=0).sqrt() / len(seeds) ** 0.5
    )
    figures = {
        "outputs": _outputs(model, x, count, setting.seed),
        "linear": over_seeds(measured @ exact / exact.square().sum(), predicted=1.0),
        "worst": Measured(float(((measured.mean(dim=0) - exact) / pooled).abs().max()), 0.0),
        "linear seen": over_seeds([one.relative for one in linear]),
    }
    nets = _networks(
        image_networks(setting, rows, hidden, epochs or (60 if setting.full else 20)), max(count // 4, 20)
    )
    for rate, found in nets.items():
        figures |= {
            f"seen {rate:g}": over_seeds(torch.stack([seen(one) for one in found])),
            f"cosine {rate:g}": over_seeds([cosine(one) for one in found]),
            f"slope {rate:g}": over_seeds([slope(one) for one in found], predicted=1.0),
        }
    places = tuple(float(i) for i in range(x.shape[1]))
    return Findings(
        figures=figures,
        charts=(
            Chart(
                "linear",
                f"Mean gradient under masks minus plain gradient, linear model on {name}, p = {RATE:g}; bars "
                "are two standard errors.",
                "feature", "bias of the gradient",
                (
                    Series("2 (p/q) w mean(x²)", places, tuple(exact.tolist()), style="points"),
                    Series("measured", places, tuple(measured.mean(dim=0).tolist()), tuple((2 * pooled).tolist()),
                           style="points"),
                ),
            ),
            _network_chart(nets, setting.seeds),
        ),
        data=(
            f"{name}, {len(x)} rows, standardised; {images('mnist').name}, {rows} rows drawn for each seed, 300 "
            "test rows measured"
        ),
        setup=(
            f"{count} passes for each of {len(seeds)} seeds; networks "
            f"{images('mnist').x_train.shape[1]}-{hidden}-10 trained at p = {TRAINED:g}, {max(count // 4, 20)} "
            "passes each."
        ),
        remarks=(
            "In the linear model nothing but the gradient of the adaptive L2 penalty is left: take it off, and "
            "the bias is 0.",
            "In the networks second order has the direction; its length leaves out what a unit does that is "
            "lost whole.",
        ),
    )  # fmt: skip


def _outputs(model: nn.Module, x: Tensor, members: int, seed: int) -> Measured:
    """<E f - f, f> / <f, f>: by how much masks move the mean output; 0 for a linear model."""
    rows = torch.arange(len(x))
    with torch.no_grad():
        plain = model.eval()(x)
        drawn = []
        for member in range(members):
            with masks(seed=seed, member=member, samples=rows):
                drawn.append(((model(x) - plain) * plain).sum() / plain.square().sum())
    return over_seeds(torch.stack(drawn), predicted=0.0)


def _networks(nets: Networks, members: int) -> dict[float, list[GradientBias]]:
    """The instrument on each network at each rate, on 300 test images."""
    data = images("mnist")
    x, y = torch.tensor(data.x_test[:300]), torch.from_numpy(data.y_test[:300])
    found: dict[float, list[GradientBias]] = {rate: [] for rate in ASKED}
    for s, seed in enumerate(nets.seeds):
        network = nets.network(0, s)
        for rate in ASKED:
            set_rate(network, rate)
            found[rate].append(gradient_bias(network, x, y, members=members, seed=seed))
    return found


def seen(found: GradientBias) -> Tensor:
    """Squared length of the bias over that of the plain gradient, its own noise taken off: unbiased, below 0 by chance
    where there is no bias.
    """
    plain = sum(float(layer.plain.square().sum()) for layer in found.layers)
    return (found.measured.square().sum() - found.standard_error.square().sum()) / plain


def slope(found: GradientBias) -> float:
    """<measured, predicted> / <predicted, predicted>, 1 where second order is the whole truth."""
    assert found.predicted is not None
    return float(found.measured @ found.predicted / found.predicted.square().sum())


def cosine(found: GradientBias) -> float:
    """Cosine of the angle between the bias and its prediction; the measurement's own noise taken off its length."""
    assert found.predicted is not None
    length = (found.measured.square().sum() - found.standard_error.square().sum()).clamp(min=1e-300).sqrt()
    return float(found.measured @ found.predicted / (found.predicted.norm() * length))


def _network_chart(nets: dict[float, list[GradientBias]], seeds: int) -> Chart:
    names = ("cosine to second order", "length along second order")
    series = []
    for rate, found in nets.items():
        both = [over_seeds([way(one) for one in found]) for way in (cosine, slope)]
        series.append(measured_series(f"p = {rate:g}", (0.0, 1.0), both, "bars"))
    return Chart(
        "networks",
        f"The bias in trained networks beside its second-order prediction, {seeds} seeds; bars are two standard "
        "errors.",
        "", "measured / predicted", tuple(series), x_names=names, level=1.0, level_name="second order exact",
    )  # fmt: skip


CLAIM = Claim(
    name="bias",
    title="The expected gradient is biased",
    article=(
        "Inverted dropout keeps the mean of activations, and yet the expected gradient is not that of the "
        "network without dropout: the noise meets the curvature of the loss."
    ),
    prediction=(
        "E grad L - grad L = 2 (p/q) w_j mean(x_j²) for squared error of a linear model, the penalty's gradient "
        "and nothing else; 1/2 grad sum Var(e) d²L/de² to second order elsewhere (Wei et al., 2020)."
    ),
    condition="",
    rules=(
        Rule("outputs", "linear model: share by which masks move the mean output", "equal"),
        Rule("linear", "linear model: bias along the penalty's gradient, over it", "equal", relative=0.01),
        Rule("worst", "largest distance of a weight's bias from the formula, in standard errors", "below", bound=4.0),
        Rule("linear seen", "linear model: length of the bias over that of the plain gradient", "above"),
        *(
            Rule(f"seen {rate:g}", f"network, p = {rate:g}: squared length of the bias over that of the plain gradient",
                 "above")
            for rate in ASKED
        ),
        *(
            Rule(f"cosine {rate:g}", f"network, p = {rate:g}: cosine between the bias and its second order", "above",
                 bound=0.5)
            for rate in ASKED
        ),
        *(
            Rule(f"slope {rate:g}", f"network, p = {rate:g}: bias along its second order, over it", "shown")
            for rate in ASKED
        ),
    ),
    experiment=experiment,
    seconds=11.0,
)  # fmt: skip

"""The original form: m a in training, q a at test time; the same function as inverted dropout, weights divided by q."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropkit.nn as dnn
from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Setting
from dropkit.claims.data import Images, images
from dropkit.claims.experiments.draws import BOUND, mean_figure, measured_series, variance_figure
from dropkit.claims.experiments.inverted import VALUE
from dropkit.claims.experiments.linear import wide
from dropkit.claims.experiments.networks import over_seeds, train
from dropkit.masks import masks

RATE = 0.3125  # of the single activation; a multiple of 2^-16
INPUT_RATE, HIDDEN_RATE = 0.25, 0.5  # of the networks
RATES = (0.1, 0.3, 0.5, 0.7)  # of the chart
STEP = (
    0.1  # of the inverted form; of the classic form, for the weights that read masked values, divided by q^2
)
INPUT_STEP, HIDDEN_STEP = STEP / (1 - INPUT_RATE) ** 2, STEP / (1 - HIDDEN_RATE) ** 2
EXACT = 1e-9  # relative; rounding of float64 over some hundred steps stays far below


def experiment(
    setting: Setting,
    draws: int | None = None,
    rows: int = 2000,
    hidden: int = 32,
    steps: int | None = None,
    epochs: int | None = None,
) -> Findings:
    """One activation under classic masks; networks trained in both forms; what forgetting the factor q costs.

    Args:
        setting: seeds and length.
        draws: masks of the single activation; None: 200 000, in the long form 2 000 000.
        rows: training rows.
        hidden: width.
        steps: of the two descents that are compared; None: 100, in the long form 1 500.
        epochs: of the networks of the chart; None: 15, in the long form 60.
    """
    data = images("mnist")
    seeds = range(setting.seed, setting.seed + setting.seeds)
    pairs = [_pair(data, seed, rows, hidden, steps or (1500 if setting.full else 100)) for seed in seeds]
    figures = _one(draws or (2_000_000 if setting.full else 200_000), setting.seed)
    for name in pairs[0]:
        figures[name] = Measured(max(pair[name] for pair in pairs), 0.0)
    scaled, unscaled, linear, through = _at_test_time(
        data, tuple(seeds), rows, hidden, epochs or (60 if setting.full else 15)
    )
    figures["unscaled"] = over_seeds(unscaled[:, RATES.index(0.5)] - scaled[:, RATES.index(0.5)])
    figures["linear"] = over_seeds(linear, predicted=0.0)
    figures["through"] = over_seeds(through)
    return Findings(
        figures=figures,
        charts=(
            Chart(
                "test-time",
                f"Cross-entropy on {data.name}'s test rows of networks trained with classic dropout, {len(seeds)} "
                "seeds; bars are two standard errors.",
                "rate p of the hidden units", "test loss, nats",
                (
                    measured_series("times q at test time", RATES, [over_seeds(one) for one in scaled.T], "measured"),
                    measured_series("used as trained", RATES, [over_seeds(one) for one in unscaled.T], "measured"),
                ),
                y_log=True,
            ),
        ),
        data=f"{data.name}: {rows} training rows drawn for each seed, {len(data.x_test)} test rows",
        setup=(
            f"{data.x_train.shape[1]}-{hidden}-10 ReLU, {len(seeds)} seeds. Compared: plain gradient descent with "
            f"rates {INPUT_RATE} and {HIDDEN_RATE} in float64, the same masks. Chart: Adam, hidden units dropped."
        ),
        remarks=(
            "The factor promises the mean output, not the lowest loss: a network trained with dropout for few "
            "epochs is unsure of itself, and without the factor its larger logits may even score better. A lower loss "
            "with the factor was first set down as part of the verdict; it came out opposite, and is only shown.",
            "A step of the same size is another step: with W' = q W behind the mask, the classic form needs the "
            "step of the inverted form divided by q^2 to stay the same function.",
            "The factor q gives the mean output where the output is linear in the mask. Through the next "
            "ReLU it is an approximation; the last figure says how far it is off for masks on the inputs.",
        ),
    )  # fmt: skip


def _one(draws: int, seed: int) -> dict[str, Measured]:
    layer = dnn.ClassicDropout(RATE)
    x = torch.full((draws, 1), VALUE, dtype=torch.float64)
    with masks(seed=seed):
        y = layer(x).squeeze(1)
    tested = float(layer.eval()(x[:1]))
    return {
        "mean": mean_figure(y, tested),
        "test": Measured(tested, 0.0, (1 - RATE) * VALUE),
        "variance": variance_figure(y, RATE * (1 - RATE) * VALUE**2),
    }


def _pair(data: Images, seed: int, rows: int, hidden: int, steps: int) -> dict[str, float]:
    """Train a network in both forms under the same masks; the largest relative differences of their outputs."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(data.x_train), generator=generator)[:rows].numpy()
    x, y = wide(data.x_train[drawn]), torch.from_numpy(data.y_train[drawn])
    probe = wide(data.x_test[:256])
    classic = _network(x.shape[1], hidden, generator)
    inverted = dnn.to_inverted(classic)
    before = {name: p.detach().clone() for name, p in classic.named_parameters()}
    back = dnn.to_classic(inverted)
    there = max(_apart(p.detach(), before[name]) for name, p in back.named_parameters())
    sizes = {"1.weight": INPUT_STEP, "4.weight": HIDDEN_STEP}
    for step in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        for network, own in ((classic, sizes), (inverted, {})):
            with masks(seed=seed, step=step):
                loss = F.cross_entropy(network(x[batch]), y[batch])
            parameters = dict(network.named_parameters())
            slopes = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                for (name, parameter), slope in zip(parameters.items(), slopes, strict=True):
                    parameter.sub_(own.get(name, STEP) * slope)
    turned = dnn.to_inverted(classic)
    with torch.no_grad():
        noisy = [_under(network, probe, seed=seed, step=steps) for network in (classic, turned)]
        quiet = [network.eval()(probe) for network in (classic, turned, inverted)]
        members = [_under(network, probe, seed=seed, member=3) for network in (classic, turned)]
    return {
        "there and back": there,
        "converted": max(_apart(*noisy), _apart(*quiet[:2]), _apart(*members)),
        "trained": _apart(quiet[0], quiet[2]),
    }


def _network(inputs: int, hidden: int, generator: torch.Generator) -> nn.Sequential:
    network = nn.Sequential(
        dnn.ClassicDropout(INPUT_RATE), nn.Linear(inputs, hidden), nn.ReLU(),
        dnn.ClassicDropout(HIDDEN_RATE), nn.Linear(hidden, 10),
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-1, 1, generator=generator).mul_(parameter.shape[-1] ** -0.5)
    dnn.name_sites(network)
    return network


def _under(network: nn.Module, x: Tensor, **address: int) -> Tensor:
    with masks(**address):  # type: ignore[arg-type]
        return network(x)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _at_test_time(
    data: Images, seeds: tuple[int, ...], rows: int, hidden: int, epochs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(S, R) test losses with the factor q and without; (S,) share of the logits by which masks move their mean, for
    masks on the hidden units and for masks on the inputs.
    """
    nets = train(
        data.x_train, data.y_train, hidden=(hidden,), rates=RATES, seeds=seeds, epochs=epochs, rows=rows
    )
    x, y = torch.tensor(data.x_test), torch.from_numpy(data.y_test)
    losses = torch.zeros(2, len(seeds), len(RATES), dtype=torch.float64)
    moved = torch.zeros(2, len(seeds), dtype=torch.float64)
    with torch.no_grad():
        for i in range(len(RATES)):
            for s in range(len(seeds)):
                network = dnn.to_classic(nets.network(i, s))
                losses[0, s, i] = F.cross_entropy(network(x), y)
                losses[1, s, i] = F.cross_entropy(_without(network)(x), y)
                if RATES[i] == 0.5:
                    moved[0, s] = _moved(network, x[:256], seeds[s], 0.0)
                    moved[1, s] = _moved(network, x[:256], seeds[s], INPUT_RATE)
    return losses[0], losses[1], moved[0], moved[1]


def _without(network: nn.Module) -> nn.Module:
    """The network as trained, without masks and without the factor."""
    layers = [nn.Identity() if isinstance(m, dnn.ClassicDropout) else m for m in network.children()]
    return nn.Sequential(*layers)


def _moved(network: nn.Module, x: Tensor, seed: int, input_rate: float, members: int = 100) -> float:
    """<E f - f, f> / <f, f> over rows and logits, f of evaluation: with masks on the hidden units alone, or on the
    inputs alone.
    """
    layers: list[Callable[[Tensor], Tensor]] = list(network.children())
    first = next(i for i, layer in enumerate(layers) if isinstance(layer, dnn.ClassicDropout))
    plain = network(x).double()
    rows = torch.arange(len(x))
    total = torch.zeros_like(plain)
    for member in range(members):
        with masks(seed=seed, member=member, samples=rows):
            if input_rate == 0:
                total += network(x)
                continue
            noisy = dnn.ClassicDropout(input_rate)(x) / (1 - input_rate)
        for layer in layers[first + 1 :]:
            noisy = layer(noisy)
        total += noisy
    return float(((total / members - plain) * plain).sum() / plain.square().sum())


CLAIM = Claim(
    name="classic",
    title="The original form scales at test time",
    article=(
        "All neurons work at test time, their weights scaled by the chance they were kept with; the expected "
        "output is that of training."
    ),
    prediction=(
        "Training m a, with mean q a and variance a² p q; test q a; the same function as inverted dropout with "
        "weights q W behind the mask, while training too where its step is divided by q² (Srivastava et al., "
        "2014, section 10)."
    ),
    condition=(
        "The expected output is that of training where the output is linear in the mask: one layer. Deeper, the "
        "factor is an approximation."
    ),
    rules=(
        Rule("mean", f"mean of an activation of 1.7 in training, p = {RATE:g}, against its test value", "equal",
             tolerance=BOUND),
        Rule("test", "its value at test time, against q a", "equal"),
        Rule("variance", "its variance in training, against a² p q", "equal", tolerance=BOUND),
        Rule("there and back", "to_classic(to_inverted(net)): relative change of weights", "below", bound=EXACT),
        Rule("converted", "to_inverted(net): largest relative change of an output, in training, test and as a member",
             "below", bound=EXACT),
        Rule("trained", "both forms trained, classic steps divided by q²: largest relative difference of outputs",
             "below", bound=EXACT),
        Rule("unscaled", "test loss without the factor q minus with it, p = 0.5, nats", "shown"),
        Rule("linear", "share of the logits by which masks on the hidden units move their mean", "equal"),
        Rule("through", "the same for masks on the inputs (p = 0.25), which pass through a ReLU", "shown"),
    ),
    experiment=experiment,
    seconds=10.0,
)  # fmt: skip

"""One network as the average of many thinned ones: single members, T of them averaged, and the weight-scaled net.

softmax layer:    softmax(w x + b) = prod over masks of P(y | mask)^P(mask), renormalised         exactly
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Series, Setting
from dropkit.claims.data import Images, images
from dropkit.claims.experiments.networks import class_loss, error_percent, line, over_seeds, train

RATE = 0.5
CLOSE = 0.05  # share by which weight scaling may miss the average of many members


def experiment(
    setting: Setting,
    *,
    rows: int = 1000,
    test_rows: int = 2000,
    members: int | None = None,
    hidden: Sequence[int] = (256, 256),
    epochs: int = 100,
    units: int = 10,
) -> Findings:
    """Test loss of members, of their averages and of the whole network; and one softmax layer over all its masks.

    Args:
        setting: seeds and form.
        rows: training rows that each seed draws.
        test_rows: at most.
        members: size of the committee.
        hidden: widths.
        epochs: passes over the rows.
        units: inputs of the softmax layer, whose 2^units masks are all visited.
    """
    found = images("mnist")
    members = members or (512 if setting.full else 128)
    seeds = range(setting.seed, setting.seed + setting.seeds)
    networks = train(
        found.x_train, found.y_train, hidden=hidden, rates=(RATE,), seeds=seeds, epochs=epochs, rows=rows,
        evaluate_every=1 << 30,
    )  # fmt: skip
    x, y = found.x_test[:test_rows], found.y_test[:test_rows]
    scaled = networks.outputs(x)[0].log_softmax(dim=-1)  # (S, N, C)
    arithmetic = torch.zeros_like(scaled, dtype=torch.float64)
    geometric = torch.zeros_like(arithmetic)
    single, counts, averages = [], [], []
    for k in range(members):
        logs = networks.outputs(x, member=k)[0].log_softmax(dim=-1).double()
        arithmetic += logs.exp()
        geometric += logs
        single.append(class_loss(logs, y))
        if (k + 1) & k == 0 or k + 1 == members:
            counts.append(k + 1)
            averages.append(class_loss((arithmetic / (k + 1)).log(), y))
    one, curve = torch.stack(single).mean(dim=0), torch.stack(averages)  # (S,), (T, S)
    mean = (arithmetic / members).log()
    whole = class_loss(scaled, y)
    product = class_loss((geometric / members).log_softmax(dim=-1), y)
    enough = _members_needed(counts, curve, whole)
    ratio = exact_ratio(found, setting.seed, units)
    return Findings(
        figures={
            "single": over_seeds(one - curve[-1]),
            "loss": _paired(whole, curve[-1]),
            "error": _paired(error_percent(scaled, y), error_percent(mean, y)),
            "exact": Measured(ratio, 0.0, 1.0),
            "geometric": _paired(whole, product),
            "enough": Measured(float(enough or members), 0.0),
        },
        charts=(
            Chart(
                "members", f"Test loss of T averaged members, {found.name}; bars: 95 % over seeds.",
                "members averaged, T", "cross-entropy, nats a row",
                (
                    line("average of T members", counts, curve),
                    _level("one member, mean", counts, one),
                    _level("weight-scaled network", counts, whole),
                ),
                x_log=True,
            ),
        ),
        data=f"{found.name}: {rows:,} training rows that each seed draws, {len(y):,} test rows.",
        setup=f"Perceptron of {'-'.join(map(str, hidden))} hidden units, p = {RATE}, {epochs} epochs of Adam at 0.001, "
        f"{setting.seeds} seeds, {members} members. The softmax layer reads the {units} pixels that vary most and is "
        f"asked under all {2**units:,} masks.",
        remarks=(
            f"The average first reaches the loss of the weight-scaled network with {enough} members."
            if enough
            else f"The average of {members} members does not reach the loss of the weight-scaled network.",
            "A member's mean loss is above that of the average for every set of members (Jensen); what is measured is "
            "by how much.",
            f"Test loss, nats: weight-scaled {float(whole.mean()):.3f}, geometric mean of all members "
            f"{float(product.mean()):.3f}, their arithmetic mean "
            f"{float(curve[-1].mean()):.3f}. The arithmetic mean is the softer answer, which costs less where members "
            "are too sure, and more where they are not.",
            "With hidden layers weight scaling is an approximation of the geometric mean, not an identity.",
        ),
    )  # fmt: skip


def exact_ratio(found: Images, seed: int, units: int, rows: int = 200) -> float:
    """Of a softmax layer: the probability by weight scaling over that by the geometric mean of all masks.

    Returns:
        The ratio that lies farthest from 1, over rows and classes; float64.
    """
    pixels = np.argsort(-found.x_train[:1000].var(axis=0), kind="stable")[:units]
    x = np.ascontiguousarray(found.x_train[:1000, pixels])
    layer = train(
        x, found.y_train[:1000], hidden=(), rates=(RATE,), input_rate=RATE, seeds=(seed,), epochs=50,
        learning_rate=0.01, evaluate_every=1 << 30,
    )  # fmt: skip
    weight, bias = (part.double() for part in layer.trained[0][0].weights[0])
    inputs = torch.from_numpy(x[:rows]).double()
    scaled = (inputs @ weight.T + bias).log_softmax(dim=1)
    ratio = (scaled - geometric_mean(inputs, weight, bias, RATE)).exp().flatten()
    return float(ratio[(ratio - 1).abs().argmax()])


def geometric_mean(x: Tensor, weight: Tensor, bias: Tensor, p: float) -> Tensor:
    """Renormalised geometric mean of a softmax layer over all masks of its inputs, as log probabilities.

    log P(y) = sum over masks of P(mask) log softmax(w (x mask / (1 - p)) + b)_y + const

    Args:
        x: (N, D), D small: 2^D masks are visited.
        weight: (C, D); bias: (C,).
        p: chance to drop an input, below 1.

    Returns:
        (N, C).

    Source: Srivastava et al. 2014, JMLR 15; Goodfellow et al. 2013, arXiv:1302.4389, sec. 2.
    """
    width = x.shape[1]
    total = torch.zeros(len(x), len(weight), dtype=x.dtype)
    for mask in range(1 << width):
        keep = torch.tensor([mask >> j & 1 for j in range(width)], dtype=x.dtype)
        kept = int(keep.sum())
        chance = (1 - p) ** kept * p ** (width - kept)
        total += chance * ((x * keep / (1 - p)) @ weight.T + bias).log_softmax(dim=1)
    return total.log_softmax(dim=1)


def _paired(value: Tensor, predicted: Tensor) -> Measured:
    """The mean over seeds beside its prediction; the error is that of their difference, seed by seed."""
    off = over_seeds(value - predicted)
    return Measured(float(value.mean()), off.standard_error, float(predicted.mean()), off.degrees)


def _members_needed(counts: Sequence[int], curve: Tensor, whole: Tensor) -> int | None:
    """The fewest members whose average, over seeds, is no worse than the weight-scaled network; None: all are."""
    return next(
        (t for t, at in zip(counts, curve, strict=True) if float(at.mean()) <= float(whole.mean())), None
    )


def _level(name: str, counts: Sequence[int], value: Tensor) -> Series:
    mean = float(value.mean())
    return Series(name, tuple(float(t) for t in (counts[0], counts[-1])), (mean, mean), style="predicted")


CLAIM = Claim(
    name="ensemble",
    title="One network averages many",
    article="Dropout trains a vast ensemble of thinned networks that share weights, and the final network, used whole, "
    "behaves like their average.",
    prediction="A single member loses more on test rows than the average of many. The weight-scaled network loses what "
    "that average loses, to 5 %. For one softmax layer weight scaling is the renormalised geometric mean of all masks, "
    "exactly. Source: Srivastava et al. 2014, JMLR 15.",
    condition="The identity is one of the geometric mean and of a single softmax layer. Behind hidden layers weight "
    "scaling only approximates it, and the average that a committee reports is the arithmetic one.",
    rules=(
        Rule("single", "test loss of one member minus that of all averaged, nats", "above"),
        Rule("loss", "test loss of the weight-scaled network, nats; predicted: all averaged", "equal", relative=CLOSE),
        Rule("error", "its test error, percent; predicted: all averaged", "equal", relative=CLOSE),
        Rule("exact", "softmax layer: probability by weight scaling over that by the geometric mean, the ratio "
             "farthest from 1", "equal"),
        Rule("geometric", "test loss of the weight-scaled network; predicted: geometric mean of all members", "shown"),
        Rule("enough", "members whose average first reaches the weight-scaled network (else: all tried)", "shown"),
    ),
    experiment=experiment,
    seconds=30,
)  # fmt: skip

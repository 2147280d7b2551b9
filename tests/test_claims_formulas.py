"""The claims that have formulas: their closed forms against slow references, and their experiments in a tiny form.

Experiments run on the sets that come with scikit-learn, so that nothing else need be there. Seeds are fixed, so that a
check of chance never flickers; single figures are asked for 4 standard errors, which a right one misses in one of
16 000 runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dropkit as dk
from dropkit.claims import CLAIMS
from dropkit.claims.claim import Claim, Findings, Measured, Setting, Verdict, judge
from dropkit.claims.experiments import (
    bias,
    classic,
    grouping,
    inverted,
    kinds,
    linear,
    noise,
    penalty,
    second_order,
    variance_law,
)
from dropkit.claims.experiments.draws import difference, mean_figure, variance_figure
from dropkit.claims.experiments.networks import over_seeds
from dropkit.claims.experiments.second_order import over_prediction, set_rate
from dropkit.errors import OptionError
from dropkit.measure.gradient_bias import GradientBias

MODULES = (inverted, classic, penalty, grouping, noise, bias, variance_law)
NETWORK = {"rows": 200, "hidden": 4, "epochs": 1}
SIZES: dict[str, dict[str, Any]] = {
    "inverted": {"draws": 2000},
    "classic": {"draws": 2000, "steps": 5, **NETWORK},
    "penalty": {"members": 24, "steps": 1500, **NETWORK},
    "grouping": {"repetitions": 2, "steps": 1000, "noises": (0.1, 1.0)},
    "noise": {"draws": 400, **NETWORK},
    "bias": {"members": 24, **NETWORK},
    "variance_law": {"draws": 16_000, "steps": 1000, "epochs": 1, "members": 16, "hidden": 16},
}
SEEDS = 2  # a run by `dropkit claims` has 5 and more
# What follows from a definition or a closed form alone holds in any size, on any data.
EXACT = {
    "inverted": {rule.quantity for rule in inverted.CLAIM.rules},
    "classic": {"mean", "test", "variance", "there and back", "converted", "trained"},
    "penalty": {"linear", "reached", "moved", "moved reached", "louder"},
    "grouping": {"bound", "descended", "kept", "exact", "units"},
    "noise": {"article 0.3", "article 0.9", "shared", "linear"},
    "bias": {"outputs", "worst", "linear seen"},
    "variance_law": {
        "classic 0.3", "classic 0.7", "before", "behind", "ends", "inverted 0.3", "inverted 0.9", "no peak",
        *(f"trained {rate:g}" for rate in variance_law.RATES), "copies 0.5", "copies 0.8",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One thread, and no data but scikit-learn's own."""
    torch.set_num_threads(1)
    monkeypatch.setenv("DROPKIT_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def run(module: Any, seed: int = 0) -> Findings:
    return module.experiment(Setting(seeds=SEEDS, seed=seed), **SIZES[module.CLAIM.name])


KEPT: dict[str, Findings] = {}


def tiny(module: Any) -> Findings:
    """The findings at seed 0, which several tests look at."""
    if module.CLAIM.name not in KEPT:
        KEPT[module.CLAIM.name] = run(module)
    return KEPT[module.CLAIM.name]


def verdicts(module: Any, findings: Findings) -> dict[str, Verdict | None]:
    return {one.rule.quantity: one.verdict for one in judge(module.CLAIM, findings)[1]}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.CLAIM.name)
def test_an_experiment_measures_what_its_rules_ask_and_exact_laws_hold_in_any_size(module: Any) -> None:
    findings = tiny(module)
    found = verdicts(module, findings)
    wrong = {name for name in EXACT[module.CLAIM.name] if found[name] == "does not hold here"}
    assert not wrong, {name: findings.figures[name] for name in wrong}
    assert all(math.isfinite(one.value) and math.isfinite(one.error) for one in findings.figures.values())
    assert len({chart.name for chart in findings.charts}) == len(findings.charts) >= 1
    for chart in findings.charts:
        for series in chart.series:
            assert len(series.x) == len(series.y) > 0
            assert len(series.error) in (0, len(series.x))
            assert not chart.y_log or min(series.y) > 0
            assert not chart.x_log or min(series.x) > 0
            assert not chart.x_names or max(series.x) < len(chart.x_names)
    assert module.CLAIM in CLAIMS
    assert "in place of" in findings.data or module is inverted


def test_no_kind_of_dropout_hangs_on_torchs_own_generator() -> None:
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(run(inverted).figures)
    assert found[0] == found[1]


@pytest.mark.parametrize("module", [inverted, noise], ids=lambda module: module.CLAIM.name)
def test_equal_seeds_give_equal_findings_and_other_seeds_other_figures(module: Any) -> None:
    first, again, other = tiny(module), run(module), run(module, seed=7)
    assert first == again
    assert first.figures != other.figures


# Planted faults: each makes figures fail that were right without it (the test above), and only through them.


def _unscaled(dropout: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, p, **options: (1 - p) * dropout(x, p, **options)


def _plain_ridge(x: Tensor, y: Tensor, rate: float, bias: bool = False) -> Tensor:
    """The closed form with p in place of p/q."""
    penalty = rate * torch.diag(x.square().sum(dim=0))
    centred, targets = (x - x.mean(dim=0), y - y.mean()) if bias else (x, y)
    return torch.linalg.solve(centred.T @ centred + penalty, centred.T @ targets)


def _by_variance(x: Tensor, y: Tensor, rate: float, bias: bool = False) -> Tensor:
    """The closed form with the variance of a feature in place of its mean square."""
    centred, targets = (x - x.mean(dim=0), y - y.mean()) if bias else (x, y)
    penalty = rate / (1 - rate) * torch.diag((x - x.mean(dim=0)).square().sum(dim=0))
    return torch.linalg.solve(centred.T @ centred + penalty, centred.T @ targets)


def _even_ridge(x: Tensor, y: Tensor, rate: float) -> Tensor:
    """One penalty for all features."""
    gram = x.T @ x
    return torch.linalg.solve(
        gram + rate / (1 - rate) * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ y
    )


class _Biased(dk.nn.Dropout):
    """Drops at another rate than it says."""

    def forward(self, x: Tensor) -> Tensor:
        return dk.functional.dropout(x, 0.9 * self.p, self.active, site=self.site, owner=self)


class _Loud(dk.nn.ClassicDropout):
    """Classic masks with the scale of inverted ones."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (1 - self.p)


def _never_shared(gradients: Tensor, rate: float, **options: Any) -> Tensor:
    """A mask for each row, whatever was asked."""
    return dk.functional.dropout(gradients, rate, site="gradients")


def part(module: Any, figures: dict[str, Measured]) -> tuple[Claim, Findings]:
    """A claim with the rules of these figures alone."""
    rules = tuple(rule for rule in module.CLAIM.rules if rule.quantity in figures)
    return dataclasses.replace(module.CLAIM, rules=rules), Findings(figures, (), "", "")


def part_of_classic() -> tuple[Claim, Findings]:
    return part(classic, classic._one(20_000, 0))


def part_of_penalty() -> tuple[Claim, Findings]:
    _, x, y = linear.standardised_table("concrete")
    plain, closed = (penalty.dropout_weights(linear.wide(x), linear.wide(y), p) for p in (0.0, penalty.RATE))
    reached = linear.descend(x, y, penalty.RATE, repetitions=16, seed=0, steps=1500)
    end = over_seeds(penalty.along(reached, plain, closed), predicted=1.0)
    return part(penalty, {"reached": end, **penalty._loud(x, y, 1500, 0)})


def part_of_noise() -> tuple[Claim, Findings]:
    gradients = linear.wide(np.arange(12.0).reshape(4, 3))
    return part(noise, {"shared": noise.masked(gradients, 0.5, 64, True, 400, 0)})


def part_of_grouping() -> tuple[Claim, Findings]:
    _, x, y = linear.standardised_table("concrete")
    exact, units, _ = grouping._exact_copies(x, y)
    return part(grouping, {"exact": Measured(exact, 0.0), "units": Measured(units, 0.0)})


PARTS: dict[Any, Callable[[], tuple[Claim, Findings]]] = {
    classic.dnn: part_of_classic,
    penalty: part_of_penalty,
    linear: part_of_penalty,
    noise: part_of_noise,
    grouping: part_of_grouping,
}
PLANTED: tuple[tuple[str, Any, str, Any, set[str]], ...] = (
    ("a biased layer", kinds, "DropPath", _Biased, {"variance DropPath"}),
    ("inverted scale in the classic layer", classic.dnn, "ClassicDropout", _Loud, {"variance"}),
    ("p for p/q", penalty, "dropout_weights", _plain_ridge, {"reached", "moved reached"}),
    ("variance for mean square", penalty, "dropout_weights", _by_variance, {"moved", "moved reached"}),
    ("descent without scale", linear, "dropout", _unscaled(linear.dropout), {"reached", "moved reached"}),
    ("masks that are never shared", noise, "dropout", _never_shared, {"shared"}),
    ("ridge for dropout", grouping, "dropout_weights", _even_ridge, {"units"}),
)


@pytest.mark.parametrize(
    ("target", "name", "planted", "fails"), [p[1:] for p in PLANTED], ids=[p[0] for p in PLANTED]
)
def test_a_planted_fault_turns_the_verdict(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, planted: Any, fails: set[str]
) -> None:
    if target is kinds:
        kind = kinds.Kind("DropPath", "paths", kinds._masked(planted, (4, 3), 0, 1))
        claim, findings = inverted.claim_of([kind]), inverted.experiment(Setting(), 20_000, [kind])
    else:
        monkeypatch.setattr(target, name, planted)
        claim, findings = PARTS[target]()
    verdict, judged = judge(claim, findings)
    assert verdict == "does not hold here"
    assert fails <= {one.rule.quantity for one in judged if one.verdict == "does not hold here"}


WRONG: tuple[tuple[Any, str, Callable[[float], float]], ...] = (
    # The figure, and by what a wrong formula of it differs: (module, quantity, prediction -> wrong prediction).
    (inverted, "variance Dropout", lambda law: law * (1 - inverted.RATE)),
    (inverted, "variance Zoneout", lambda law: law / (1 - inverted.RATE)),
    (penalty, "linear", lambda law: law * (1 - penalty.RATE)),
    (noise, "article 0.9", lambda law: law * 0.1 / 0.19),  # 1/q for (1 + p)/q, where s² is mu²
    (noise, "linear", lambda law: law / 2.5),
    (variance_law, "classic 0.3", lambda law: law / 0.7),
    (variance_law, "inverted 0.3", lambda law: law * 0.7**2),
    (variance_law, "copies 0.8", lambda law: law * 0.16 / 0.25),
)


@pytest.mark.parametrize(
    ("module", "quantity", "wrong"), WRONG, ids=[f"{m.CLAIM.name} {q}" for m, q, _ in WRONG]
)
def test_errors_are_small_enough_to_tell_a_wrong_formula_apart(
    module: Any, quantity: str, wrong: Callable[[float], float]
) -> None:
    right = tiny(module).figures[quantity]
    assert right.predicted is not None
    planted = dataclasses.replace(right, predicted=wrong(right.predicted))
    assert judge(*part(module, {quantity: right}))[0] != "does not hold here"
    assert judge(*part(module, {quantity: planted}))[0] == "does not hold here"


@pytest.mark.parametrize("rate", [0.125, 0.5])
@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.name)
def test_every_kind_keeps_its_own_laws_at_other_rates(kind: kinds.Kind, rate: float) -> None:
    drawn = kind.draw(rate, 8000, 3)
    mean, error = float(drawn.sums.mean()), float(drawn.sums.std()) / len(drawn.sums) ** 0.5
    assert abs(mean - drawn.mean) <= 4 * error
    # At 1/2 all squared distances may be equal, and the error of their mean is then that of the mean itself.
    squares = (drawn.sums - drawn.mean).square()
    error = max(float(squares.std()), 2**0.5 * float(squares.mean()) / 10) / len(squares) ** 0.5
    assert abs(float(squares.mean()) - drawn.variance) <= 4 * error
    assert drawn.quiet < 1e-12


# Closed forms against slow references.


def every_mask(features: int, rate: float) -> list[tuple[float, Tensor]]:
    """All masks of so many features, scaled, with their chances."""
    return [
        (
            math.prod(1 - rate if k else rate for k in keep),
            torch.tensor(keep, dtype=torch.float64) / (1 - rate),
        )
        for keep in itertools.product([0.0, 1.0], repeat=features)
    ]


def small_table(rows: int = 7, features: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    x[:, 0] += 2.0
    return x, x.sum(dim=1) + torch.randn(rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_closed_form_is_least_squares_over_all_masks(rate: float, with_bias: bool) -> None:
    x, y = small_table()
    free = torch.ones(len(x), 1, dtype=torch.float64)
    blocks, targets = [], []
    for chance, mask in every_mask(3, rate):
        rows = torch.cat((x * mask, free), dim=1) if with_bias else x * mask
        blocks.append(chance**0.5 * rows)
        targets.append(chance**0.5 * y)
    slow = torch.linalg.lstsq(torch.cat(blocks), torch.cat(targets)[:, None], driver="gelsd").solution[:3, 0]
    torch.testing.assert_close(linear.dropout_weights(x, y, rate, bias=with_bias), slow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_bias", [False, True])
def test_descent_ends_at_the_closed_form(with_bias: bool) -> None:
    x, y = small_table(40)
    found = linear.descend(
        x.numpy(), y.numpy(), 0.4, repetitions=24, seed=2, steps=1500, step_size=0.02, bias=with_bias
    )
    error = found.std(dim=0) / 24**0.5
    expected = linear.dropout_weights(x, y, 0.4, bias=with_bias)
    assert bool(
        ((found.mean(dim=0) - expected).abs() <= 4.5 * error).all()
    )  # Student's t with 23 degrees: 1 in 6000
    assert bool((error < 0.1 * expected.abs().max()).all())


def test_descent_says_when_its_steps_were_too_large() -> None:
    x, y = small_table()
    with pytest.raises(OptionError, match="smaller"):
        linear.descend(x.numpy(), y.numpy(), 0.5, repetitions=2, seed=0, steps=2000, step_size=5.0)


def test_a_column_that_does_not_vary_is_left_out() -> None:
    x = np.stack((np.arange(4.0), np.ones(4)), axis=1)
    found = linear.standardised(x)
    assert found.shape == (4, 1)
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-15)


def test_linear_network_is_the_linear_model() -> None:
    weights, x = (
        torch.tensor([1.0, -2.0], dtype=torch.float64),
        torch.tensor([[3.0, 1.0]], dtype=torch.float64),
    )
    network = linear.linear_network(weights, 0.5, torch.tensor(0.25)).eval()
    assert float(network(x).detach()) == 1.25
    assert isinstance(network[0], dk.nn.Dropout)
    assert network[0].p == 0.5
    assert network[0].site == "0"


@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_variance_of_a_row_is_that_over_all_masks(rate: float) -> None:
    x, y = small_table()
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    ratios, residuals = noise.row_ratios(x, y, weights, rate)
    for i in range(len(x)):
        first, second = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for chance, mask in every_mask(3, rate):
            row = x[i] * mask
            gradient = 2 * row * (row @ weights - y[i])
            first += chance * gradient
            second += chance * gradient.square()
        plain = 2 * x[i] * (x[i] @ weights - y[i])
        article = rate / (1 - rate) * float(plain.square().sum())
        assert math.isclose(float(ratios[i]), float((second - first.square()).sum()) / article, rel_tol=1e-9)
        assert math.isclose(float(residuals[i]), abs(float(x[i] @ weights - y[i])), rel_tol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_the_articles_variance_is_that_over_all_rows_and_masks(shared: bool) -> None:
    """Two rows of two parameters, drawn twice: 4 pairs of rows, 16 pairs of masks."""
    gradients = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.float64)
    first, second = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for rows in itertools.product([0, 1], repeat=2):
        for (one, left), (two, right) in itertools.product(every_mask(2, 0.3), repeat=2):
            if shared and not torch.equal(left, right):
                continue
            chance = (one if shared else one * two) / 4
            mean = (gradients[rows[0]] * left + gradients[rows[1]] * right) / 2
            first += chance * mean
            second += chance * mean.square()
    slow = float((second - first.square()).sum())
    found = noise.masked(gradients, 0.3, 2, shared, 4000, 1)
    assert found.predicted is not None
    assert math.isclose(found.predicted, slow, rel_tol=1e-12)
    assert abs(found.value - slow) <= 4 * found.standard_error


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("rate", [0.2, 0.8])
def test_copies_share_a_weight_and_their_variance_is_s_times_one_minus_s(copies: int, rate: float) -> None:
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).repeat(1, copies)
    weights = linear.dropout_weights(x, x[:, 0], rate)
    variance = rate / (1 - rate) * float(weights.square().sum())
    s = copies / (copies + rate / (1 - rate))
    assert math.isclose(variance, s * (1 - s), rel_tol=1e-12)
    found = variance_law._trained(x[:, 0].numpy(), copies, rate, 1500, 0)
    assert found.predicted is not None
    assert math.isclose(found.predicted, variance, rel_tol=1e-12)


def test_both_forms_part_ways_where_the_step_is_not_divided_by_q_squared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = classic.images("mnist")
    right = classic._pair(data, 0, 200, 4, 5)
    assert max(right.values()) < classic.EXACT
    monkeypatch.setattr(classic, "HIDDEN_STEP", classic.STEP)
    assert classic._pair(data, 0, 200, 4, 5)["trained"] > 1e4 * classic.EXACT


def test_a_rate_is_set_where_something_drops_and_nowhere_else() -> None:
    network = nn.Sequential(dk.nn.Dropout(0.0), nn.Linear(2, 2), dk.nn.Dropout(0.5), nn.Dropout(0.3))
    set_rate(network, 0.1)
    assert [layer.p for layer in network if not isinstance(layer, nn.Linear)] == [0.0, 0.1, 0.3]


def test_the_hidden_layer_is_measured_at_the_rate_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def watch(network: nn.Module, *given: Any, **options: Any) -> Any:
        asked.extend(layer.p for layer in network.modules() if isinstance(layer, dk.nn.Dropout))
        return dk.measure.penalty(network, *given, **options)

    monkeypatch.setattr(second_order, "penalty", watch)
    nets = second_order.image_networks(Setting(seeds=2), **NETWORK)
    found = second_order.hidden_penalties(nets, 0.2, members=4)
    assert asked == [0.0, 0.2, 0.0, 0.2]  # the inputs are not dropped
    assert [one.predicted for one in found] == [1.0, 1.0]
    assert nets.rates == (second_order.TRAINED,)


def test_weights_fitted_under_masks_pay_less() -> None:
    paid = [
        second_order.logistic_penalty(0.5, under_masks=masked, members=64, seed=0) for masked in (False, True)
    ]
    assert paid[0].value - paid[1].value > 4 * math.hypot(paid[0].error, paid[1].error)


def test_along_is_0_at_the_start_and_1_at_the_end() -> None:
    start, end = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    reached = torch.stack((start, end, (start + end) / 2, 2 * end - start))
    torch.testing.assert_close(penalty.along(reached, start, end), torch.tensor([0.0, 1.0, 0.5, 2.0]))


def test_figures_of_draws_are_numpys() -> None:
    draws = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, variance = mean_figure(draws, 6.0, 2.0), variance_figure(draws, 3.0, 2.0)
    assert math.isclose(mean.value, np.mean(draws.numpy()) / 2)
    assert math.isclose(mean.standard_error, np.std(draws.numpy(), ddof=1) / 50**0.5 / 2)
    assert math.isclose(variance.value, np.var(draws.numpy(), ddof=1) / 2)
    assert (mean.predicted, variance.predicted) == (3.0, 1.5)
    apart = difference(Measured(3.0, 0.3), Measured(1.0, 0.4))
    assert (apart.value, apart.standard_error) == (2.0, 0.5)
    over = over_prediction(Measured(6.0, 0.2, 4.0, predicted_error=0.4))
    assert (over.value, over.standard_error, over.predicted, over.predicted_error) == (1.5, 0.05, 1.0, 0.1)


def test_a_variance_has_the_error_that_its_repetitions_show() -> None:
    """Of 200 repetitions of 400 draws, the spread of the variances against the error that each states: within 15 %,
    three standard errors of such a spread.
    """
    draws = torch.randn(200, 400, generator=torch.Generator().manual_seed(1), dtype=torch.float64).exp()
    found = [variance_figure(row.clamp(max=3), 0.0) for row in draws]
    spread = float(np.std([one.value for one in found], ddof=1))
    stated = float(np.mean([one.standard_error for one in found]))
    assert abs(spread / stated - 1) < 0.15


def test_direction_and_length_of_a_bias() -> None:
    """A layer of two weights, its plain gradient (3, 4), bias (1, 1) predicted as (2, 0), noise 0."""
    network = linear.linear_network(torch.ones(2, dtype=torch.float64), 0.5)
    x, y = small_table(6, 2)
    found = dk.measure.gradient_bias(network, x, y, members=4)
    plain = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    made: GradientBias = dataclasses.replace(
        found, predicted=torch.tensor([2.0, 0.0]), measured=torch.tensor([1.0, 1.0]),
        standard_error=torch.zeros(2, dtype=torch.float64),
        layers=tuple(dataclasses.replace(layer, plain=plain) for layer in found.layers),
    )  # fmt: skip
    assert math.isclose(bias.slope(made), 0.5)
    assert math.isclose(bias.cosine(made), 0.5**0.5, rel_tol=1e-6)
    assert math.isclose(float(bias.seen(made)), 2 / 25, rel_tol=1e-6)
    noisy = dataclasses.replace(made, standard_error=torch.ones(2))
    assert float(bias.seen(noisy)) == 0.0


def test_exact_copies_are_shared_evenly_in_any_unit_under_dropout_alone() -> None:
    x = linear.standardised(small_table(30, 3)[0].numpy())
    y = x @ np.array([2.0, 1.0, -1.0])
    same, scaled, ridge = grouping._exact_copies(x, y)
    assert max(same, scaled) < 1e-10
    assert ridge > 0.5


def test_a_network_without_its_factor_is_the_one_as_trained() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), dk.nn.ClassicDropout(0.5), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    plain = nn.Sequential(network[0], network[1], network[3])
    assert torch.equal(classic._without(network)(x), plain(x))
    assert not torch.allclose(network(x), plain(x))

"""The claims about learning: their figures against slow sums, their verdicts where dropout does nothing at all."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropkit.claims import CLAIMS
from dropkit.claims.claim import Setting, judge
from dropkit.claims.experiments import capacity, coadaptation, convergence, ensemble, stability, tradeoff
from dropkit.claims.experiments.networks import error_percent, train

TINY = Setting(seeds=5)
EXPERIMENTS = {
    coadaptation: {"rows": 60, "test_rows": 80, "hidden": (12, 9), "epochs": 5, "removals": 2},
    ensemble: {"rows": 60, "test_rows": 80, "members": 6, "hidden": (12,), "epochs": 5, "units": 4},
    stability: {
        "rows": 40, "replaced": 2, "test_rows": 60, "hidden": (8,), "epochs": 5, "linear_rows": 40, "linear_steps": 60,
    },
    tradeoff: {"sizes": (50, 100), "hidden": (12,), "narrow": (4,), "updates": 20, "epochs": 2},
    capacity: {
        "rows": 50, "hidden": (12,), "epochs": (4, 8), "linear_rows": 40, "draws": 2, "linear_steps": 60,
    },
    convergence: {
        "rows": 80, "hidden": (12,), "epochs": 6, "search_rates": (0.0, 0.5), "search_epochs": 2,
    },
}  # fmt: skip


LINEAR = {module: functools.cache(module._linear) for module in (stability, capacity)}


@pytest.fixture(autouse=True)
def no_shared_files(monkeypatch):
    monkeypatch.setenv("DROPKIT_DATA", "/nowhere")  # scikit-learn's sets stand in


@pytest.fixture
def linear_models_once(monkeypatch):
    """The linear models are those of the first test that asks: they take longer than all networks."""
    for module, once in LINEAR.items():
        monkeypatch.setattr(module, "_linear", once)


@functools.cache
def found_in(module):
    """The findings of a tiny run; the fixtures of the tests that ask are those above."""
    return module.experiment(TINY, **EXPERIMENTS[module])


@pytest.fixture(scope="module")
def networks():
    generator = np.random.default_rng(1)
    x = generator.standard_normal((50, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0)
    return x, y, train(x, y, hidden=(8, 6), rates=(0.0, 0.5), seeds=(0, 1), epochs=20, learning_rate=0.02)


@pytest.mark.parametrize("module", EXPERIMENTS, ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.usefixtures("linear_models_once")
def test_an_experiment_answers_every_rule_and_equal_seeds_give_equal_figures(module):
    findings = found_in(module)
    verdict, judged = judge(module.CLAIM, findings)
    assert verdict in ("holds", "holds within", "does not hold here")
    assert all(math.isfinite(one.found.value) and math.isfinite(one.found.error) for one in judged)
    assert "in place of mnist" in findings.data
    for chart in findings.charts:
        for series in chart.series:
            assert len(series.x) == len(series.y) > 0
            assert len(series.error) in (0, len(series.y))
    assert module.CLAIM in CLAIMS
    assert repr(module.experiment(TINY, **EXPERIMENTS[module])) == repr(findings)


@pytest.mark.parametrize("module", [coadaptation, tradeoff, capacity, convergence, stability])
@pytest.mark.usefixtures("linear_models_once")
def test_where_no_mask_acts_no_difference_is_seen(module, monkeypatch):
    """All networks are trained at rate 0 and called by the rates asked for: every difference is rounding."""

    def without_masks(*args, rates, **options):
        return dataclasses.replace(train(*args, rates=[0.0] * len(rates), **options), rates=tuple(rates))

    monkeypatch.setattr(module, "train", without_masks)
    findings = module.experiment(TINY, **EXPERIMENTS[module])
    verdict, judged = judge(module.CLAIM, findings)
    assert verdict == "does not hold here"
    for one in judged:
        if one.rule.kind in ("above", "below") and one.rule.bound == 0:
            assert one.found.value == pytest.approx(0, abs=1e-6)  # rounding of networks side by side
            assert one.verdict == "does not hold here"


def heights(findings, chart, series):
    """{x: y} of a series, by the beginnings of the names."""
    (drawn,) = (c for c in findings.charts if c.name == chart)
    (one,) = (each for each in drawn.series if re.match(re.escape(series) + r"(?![.\d])", each.name))
    return dict(zip(one.x, one.y, strict=True))


def mean_height(curve):
    return float(np.trapezoid(list(curve.values()), list(curve)) / 0.9)


def against(findings, chart, series, at=0.5):
    """Height at the rate minus height without dropout."""
    drawn = heights(findings, chart, series)
    return drawn[at] - drawn[0.0]


FIGURES = [
    (coadaptation, "area", lambda f: mean_height(heights(f, "removal", "trained at p = 0.5"))
     - mean_height(heights(f, "removal", "trained at p = 0"))),
    (coadaptation, "correlation", lambda f: against(f, "correlation", "last")),
    (ensemble, "single", lambda f: heights(f, "members", "one member")[6] - heights(f, "members", "average")[6]),
    (ensemble, "loss", lambda f: heights(f, "members", "weight-scaled")[6]),
    (stability, "mean", lambda f: -against(f, "replaced", "mean")),
    (stability, "largest", lambda f: -against(f, "replaced", "largest")),
    (tradeoff, "training", lambda f: against(f, "losses", "training rows")),
    (tradeoff, "loss", lambda f: -against(f, "losses", "test rows")),
    (tradeoff, "gap", lambda f: -against(f, "losses", "gap")),
    (tradeoff, "error", lambda f: heights(f, "error", "p = 0")[100] - heights(f, "error", "p = 0.5")[100]),
    (tradeoff, "error_fewest", lambda f: heights(f, "error", "p = 0")[50] - heights(f, "error", "p = 0.5")[50]),
    (capacity, "error", lambda f: against(f, "labels", "4 epochs")),
    (capacity, "error_longer", lambda f: heights(f, "labels", "8 epochs")[0.5]),
    (convergence, "epochs", lambda f: against(f, "epochs", "to the target")),
    (convergence, "own", lambda f: against(f, "epochs", "to 95 %")),
    (convergence, "gap", lambda f: -against(f, "gap", "gap")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "quantity", "drawn"), FIGURES, ids=[f"{m.CLAIM.name}-{q}" for m, q, _ in FIGURES]
)
@pytest.mark.usefixtures("linear_models_once")
def test_a_figure_is_the_difference_that_the_chart_shows(module, quantity, drawn):
    findings = found_in(module)
    assert findings.figures[quantity].value == pytest.approx(drawn(findings), rel=1e-5, abs=1e-6)


def test_masks_raise_the_training_loss_and_cost_epochs():
    """What no choice of rows changes: with masks, a short training gets less far on its own rows."""
    assert judge(tradeoff.CLAIM, found_in(tradeoff))[1][0].verdict == "holds"
    options = EXPERIMENTS[convergence] | {"rows": 200, "hidden": (64,), "epochs": 100}
    assert convergence.experiment(TINY, **options).figures["epochs"].value > 0


# Weight scaling and the geometric mean.


@given(p=st.floats(0.01, 0.95), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_weight_scaling_of_a_softmax_layer_is_the_geometric_mean(p, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*shape, generator=generator).double() for shape in ((3, 4), (5, 4), (5,)))
    slow = torch.ones(3, 5, dtype=torch.float64)
    for mask in product((0.0, 1.0), repeat=4):
        chance = math.prod(1 - p if kept else p for kept in mask)
        slow *= ((x * torch.tensor(mask, dtype=torch.float64) / (1 - p)) @ weight.T + bias).softmax(
            dim=1
        ) ** chance
    slow /= slow.sum(dim=1, keepdim=True)
    found = ensemble.geometric_mean(x, weight, bias, p).exp()
    torch.testing.assert_close(found, slow, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, (x @ weight.T + bias).softmax(dim=1), rtol=1e-9, atol=1e-12)


def test_masks_of_another_rate_break_the_identity_and_the_verdict(monkeypatch):
    right = ensemble.geometric_mean
    monkeypatch.setattr(ensemble, "geometric_mean", lambda x, w, b, p: right(x, w, b, p + 0.1) / (1 - p))
    findings = ensemble.experiment(TINY, **EXPERIMENTS[ensemble])
    _, judged = judge(ensemble.CLAIM, findings)
    assert {one.rule.quantity: one.verdict for one in judged}["exact"] == "does not hold here"


def test_fewest_members_that_do_as_well_as_the_whole_network():
    curve = torch.tensor([[0.9, 1.1], [0.6, 0.8], [0.4, 0.6]])
    assert ensemble._members_needed((1, 2, 4), curve, torch.tensor([0.7, 0.75])) == 2
    assert ensemble._members_needed((1, 2, 4), curve, torch.tensor([0.1, 0.2])) is None


# Units taken away.


def test_the_area_under_a_curve_is_its_mean_height():
    constant = torch.full((len(coadaptation.SHARES), 2), 0.7)
    torch.testing.assert_close(coadaptation.area_under(constant), torch.full((2,), 0.7))
    falling = 1 - torch.tensor(coadaptation.SHARES)
    assert float(coadaptation.area_under(falling)) == pytest.approx(0.55)


def test_correlation_counts_pairs_that_vary(networks):
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4000, generator=generator)
    dead = torch.zeros(4000)
    units = torch.stack((torch.stack((one, -2 * one, dead), 1), torch.stack((one, other, dead), 1)))[None]
    found = coadaptation.mean_correlation(units)[0]
    assert float(found[0]) == pytest.approx(1)
    assert float(found[1]) == pytest.approx(
        abs(float(torch.corrcoef(torch.stack((one, other)))[0, 1])), abs=1e-6
    )
    assert coadaptation.mean_correlation(units[..., 2:]).isnan().all()


def test_the_cost_of_a_unit_is_that_of_a_network_without_its_outgoing_weights(networks):
    x, y, trained = networks
    costs = coadaptation.unit_costs(trained, trained.last_hidden(x), y)
    assert costs.shape == (2, 2, 6)
    for r, s, unit in product(range(2), range(2), range(6)):
        network = trained.network(r, s)
        with torch.no_grad():
            whole = error_percent(network(torch.from_numpy(x)), y)
            network.output.weight[:, unit] = 0
            without = error_percent(network(torch.from_numpy(x)), y)
        assert float(costs[r, s, unit]) == pytest.approx(float(without - whole), abs=1e-9)
    assert float(costs.abs().max()) > 0


def test_relative_accuracy_starts_at_one_and_is_each_networks_own(networks):
    x, y, trained = networks
    found = coadaptation.relative_accuracy(trained, x, y, 3, scaled=False)
    assert torch.equal(found[0], torch.ones(2, 2, dtype=torch.float64))
    whole = 100 - error_percent(trained.outputs(x), y)
    at = coadaptation.SHARES.index(0.5)
    right = [100 - error_percent(trained.outputs(x, member=k, rate=0.5, scaled=False), y) for k in range(3)]
    torch.testing.assert_close(found[at], sum(right) / 3 / whole)
    assert float(found[-1].mean()) < float(found[1].mean())


# One row replaced.


@given(
    length=st.integers(20, 80), seed=st.integers(0, 50), rows=st.integers(4, 10), replaced=st.integers(1, 4)
)
def test_a_copy_differs_in_one_row_from_outside_and_keeps_the_order(length, seed, rows, replaced):
    whole, *copies = stability.replace_one(length, rows, replaced, seed)
    assert len(copies) == replaced
    for copy in copies:
        (changed,) = np.flatnonzero(copy.train != whole.train)
        assert copy.train[changed] not in whole.train
        assert copy.stream == whole.stream == seed


def test_change_is_the_total_variation_distance():
    logits = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    found = stability.changes(logits)
    assert found.shape == (2, 3, 3, 5)
    p, q = logits.softmax(-1)[1, 2, 0, 4], logits.softmax(-1)[1, 2, 3, 4]
    assert float(found[1, 2, 2, 4]) == pytest.approx(float((p - q).clamp_min(0).sum()))
    certain = torch.tensor([[800.0, 0.0], [0.0, 800.0], [800.0, 0.0]])[None, None, :, None]
    assert stability.changes(certain).flatten().tolist() == [1.0, 0.0]


def test_the_closed_form_is_reached_and_a_wrong_one_is_seen(monkeypatch):
    right = stability._linear(0, 60, 4, 600)
    wrong = dataclasses.replace(right, predicted=1.2 * right.predicted)
    options = EXPERIMENTS[stability] | {"epochs": 1}
    for record, expected in ((right, True), (wrong, False)):
        monkeypatch.setattr(stability, "_linear", lambda *_, record=record: record)
        _, judged = judge(stability.CLAIM, stability.experiment(TINY, **options))
        verdicts = {one.rule.quantity: one.verdict for one in judged}
        assert (verdicts["linear_measured"] != "does not hold here") == expected


# Degrees of freedom.


@given(p=st.floats(0, 0.95), seed=st.integers(0, 500))
@settings(max_examples=25)
def test_degrees_of_freedom_are_the_trace_of_the_smoother(p, seed):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed)).double()
    x = x - x.mean(dim=0)
    penalty = torch.diag(p / (1 - p) * x.square().sum(dim=0))
    slow = float((x @ torch.linalg.inv(x.T @ x + penalty) @ x.T).trace())
    assert capacity.degrees_of_freedom(x, p) == pytest.approx(slow, rel=1e-8)
    assert capacity.degrees_of_freedom(x, 0.0) == pytest.approx(4)
    assert capacity.degrees_of_freedom(x, min(p + 0.01, 0.96)) < capacity.degrees_of_freedom(x, p) + 1e-12


def test_uncorrelated_columns_keep_a_share_q_of_their_degrees_of_freedom():
    x = torch.linalg.qr(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).double())[0] * 5
    assert capacity.degrees_of_freedom(x, 0.3) == pytest.approx(0.7 * 3)


# Epochs to a target.


def test_epochs_to_the_target_are_the_first_and_the_last_where_it_is_missed(networks):
    _, _, trained = networks

    def with_curve(network, losses):
        curve = dataclasses.replace(network.curve, epochs=(0, 2, 4, 6), train=losses)
        return dataclasses.replace(network, curve=curve)

    losses = [[(2.0, 1.0, 0.5, 0.7), (2.0, 1.9, 1.8, 1.7)], [(0.4, 0.3, 0.2, 0.1), (2.0, 0.6, 0.7, 0.4)]]
    rows = tuple(
        tuple(with_curve(n, c) for n, c in zip(networks_of, curves, strict=True))
        for networks_of, curves in zip(trained.trained, losses, strict=True)
    )
    epochs, missed = convergence.epochs_to_target(dataclasses.replace(trained, trained=rows), 0.6)
    assert epochs.tolist() == [[4, 6], [0, 6]]
    assert missed.tolist() == [[False, True], [False, False]]


# What is said of sizes.


def test_sizes_are_told_apart_by_their_intervals():
    gain = torch.tensor(
        [[1.0, 1.1, 0.9, 1.0, 1.0], [-1.0, 1.0, -2.0, 2.0, 0.1], [-1.0, -1.1, -0.9, -1.0, -1.0]]
    )
    said = tradeoff._where((100, 1000, 10_000), gain)
    assert said == (
        "Training rows at which p = 0.5 lowers the test error: 100; raises it: 10,000; cannot be told: 1,000."
    )


def test_the_long_form_tries_more_rates_and_the_published_network_says_its_budget():
    findings = tradeoff.experiment(Setting(full=True), **EXPERIMENTS[tradeoff])
    assert set(heights(findings, "losses", "test rows")) == set(tradeoff.FULL_RATES)
    judge(tradeoff.CLAIM, findings)
    found = tradeoff.images("mnist")
    chart, said = tradeoff.published_line(found, (0, 1), hidden=(6, 5), epochs=3)
    assert "6-5 hidden units on all 1,297 rows" in said
    assert "3 epochs (30 updates; the published run took 1,000,000)" in said
    assert (len(chart.series[0].y), chart.level) == (2, 1.25)

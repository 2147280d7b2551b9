"""Flat minima, doubt and the Bayesian reading: each figure against a slow or exact one, each sign both ways."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dropkit.claims import CLAIMS, Setting, judge
from dropkit.claims.data import Table
from dropkit.claims.experiments import bayes as bayes_claim
from dropkit.claims.experiments import flatness as flatness_claim
from dropkit.claims.experiments import likelihoods
from dropkit.claims.experiments import mcdropout as mcdropout_claim
from dropkit.claims.experiments.flatness import MEASURES, contrast, ends_at_equal_loss
from dropkit.claims.experiments.likelihoods import RATES, Scores, member_losses, plain_loss, score
from dropkit.claims.experiments.networks import Networks, drawn_folds, train
from dropkit.claims.experiments.spread import (
    FEATURES,
    NOISE,
    between_clusters,
    linear_spread,
    members_variance,
)
from dropkit.claims.experiments.unseen import Kinds, Quality, ensembles_of, kinds, quality
from dropkit.masks import masks
from dropkit.measure import Flatness
from dropkit.training import (
    Curve,
    Fold,
    NetworkSpec,
    StackResult,
    Trained,
    build_network,
    categorical_nll,
    gaussian_nll,
    train_stack,
)

SETTING = Setting(seeds=5, seed=3)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sets that come with scikit-learn, whatever lies beside the repository."""
    monkeypatch.setenv("DROPKIT_DATA", "/nowhere")


def test_the_claims_are_listed() -> None:
    names = {claim.name for claim in CLAIMS}
    assert {"flatness", "mcdropout", "bayes"} <= names


# Flat minima


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=5))
def test_contrast_is_bounded_turns_its_sign_and_knows_no_unit(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    found = contrast(a, b)
    assert np.all(np.abs(found) <= 1)
    np.testing.assert_array_equal(found, -contrast(b, a))
    np.testing.assert_allclose(found, contrast([8 * v for v in a], [8 * v for v in b]), rtol=1e-12)
    assert contrast([2.0, 0.0], [1.0, 0.0]) == pytest.approx([1 / 3, 0.0])


def _with_curve(losses: list[float]) -> Trained:
    spec = NetworkSpec(2, (2,), 2, 0.0, 0.0, "categorical")
    curve = Curve(tuple(range(len(losses))), tuple(losses), (math.nan,) * len(losses))
    return Trained(spec, (), 0.0, 1.0, curve, torch.zeros(0))


def test_the_lower_one_of_a_pair_stops_at_the_other_ones_loss() -> None:
    plain = [_with_curve([2.0, 1.0, 0.3, 0.2, 0.1]), _with_curve([2.0, 1.5, 1.4, 1.3, 1.2])]
    # The second pair: the curve dips below its own end on the way, and still goes to the end.
    dropped = [_with_curve([2.0, 1.5, 0.9, 0.2, 0.4]), _with_curve([2.0, 1.25, 1.1, 1.0, 0.9])]
    networks = Networks((0.0, 0.5), (0, 1), (tuple(plain), tuple(dropped)))
    assert ends_at_equal_loss(networks) == [[2, 4], [4, 2]]


def test_a_network_trained_until_an_epoch_is_the_one_that_was_there() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((80, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    options = {"hidden": (8,), "rates": (0.0, 0.5), "seeds": (0, 1), "rows": 40, "batch": 10}
    folds = drawn_folds(80, (0, 1), 40)
    whole = train(x, y, epochs=6, **options)
    part = train(x, y, epochs=6, until=[2, 3, 4, 6], **options)
    for k, end in enumerate([2, 3, 4, 6]):
        rate, seed = divmod(k, 2)
        own = folds[seed].train
        with torch.no_grad():
            logits = part.network(rate, seed)(torch.from_numpy(x[own]))
        loss = float(categorical_nll(logits, torch.from_numpy(y[own])).mean())
        assert loss == pytest.approx(whole.trained[rate][seed].curve.train[end], rel=1e-4)


def _flat(sharpness: float) -> Flatness:
    figure = torch.tensor(sharpness)
    return Flatness(
        predicted=None, measured=figure, standard_error=figure * 0, formula="", loss="cross-entropy", plain=0.1,
        member=None, size=0.05, top=sharpness, trace=sharpness, trace_error=0.0, adversarial=sharpness,
        invariant=sharpness, invariant_error=0.0, gradient=0.1,
    )  # fmt: skip


@pytest.mark.parametrize(("plain", "verdict"), [(2.0, "holds"), (0.5, "does not hold here")])
def test_dropout_is_flatter_where_its_figures_are_smaller(
    monkeypatch: pytest.MonkeyPatch, plain: float, verdict: str
) -> None:
    def fake(networks: Networks, *rest: object) -> list[list[Flatness]]:
        return [[_flat(size + 0.01 * s) for s in range(5)] for size in (plain, 1.0)]

    monkeypatch.setattr(flatness_claim, "_measured", fake)
    findings = flatness_claim.experiment(SETTING, rows=30, hidden=(4,), epochs=2)
    assert judge(flatness_claim.CLAIM, findings)[0] == verdict
    said = " ".join(findings.remarks)
    assert ("the sharper one by no measure" in said) == (plain > 1)
    assert ("the flatter one by no measure" in said) == (plain < 1)


def test_flatness_measures_the_trained_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[Networks, list[list[Flatness]]]] = []
    own = flatness_claim._measured

    def watched(networks: Networks, *rest: object) -> list[list[Flatness]]:
        measured.append((networks, own(networks, *rest)))
        return measured[-1][1]

    monkeypatch.setattr(flatness_claim, "_measured", watched)
    findings = flatness_claim.experiment(Setting(seeds=2), rows=200, hidden=(8,), epochs=20, directions=2)
    verdict, judged = judge(flatness_claim.CLAIM, findings)
    deciding = {one.rule.quantity for one in judged if one.verdict is not None}
    assert deciding == {f"{name}_loss" for name in MEASURES}
    assert verdict in ("holds", "does not hold here")
    assert all(math.isfinite(one.found.value) for one in judged)
    assert "digits in place of mnist" in findings.data
    assert abs(findings.figures["plain_loss"].value) < abs(findings.figures["plain_steps"].value)
    assert len(measured) == 2
    for networks, found in measured:  # without masks, on the rows that each was trained on
        for trained_row, found_row in zip(networks.trained, found, strict=True):
            losses = [one.curve.train[-1] for one in trained_row]
            assert [one.plain for one in found_row] == pytest.approx(losses, rel=1e-4)


# The Bayesian reading


def _small_table(test: list[int]) -> Table:
    generator = np.random.default_rng(1)
    x = generator.standard_normal((60, 3)) * [1.0, 10.0, 0.1]
    y = 50 + x[:, 0] + 0.5 * generator.standard_normal(60)
    split = (np.arange(40), np.array(test))
    return Table(x, y, (split,), "small", {"test_ll": np.array([-1.25])})


def test_test_rows_are_met_last() -> None:
    options = {"epochs": 3, "members": 5, "seed": 0}
    together = score(_small_table([50, 51]), 1, **options)
    each = [score(_small_table([row]), 1, **options) for row in (50, 51)]
    for name in ("plain", "scaled", "average"):
        apart = np.mean([getattr(one, name) for one in each])
        assert getattr(together, name) == pytest.approx(apart, rel=1e-5)
    assert together.rates == each[0].rates == each[1].rates
    assert together.published == pytest.approx([1.25])  # a loss, as ours
    assert together.rates[0] > 0


def test_rows_outside_a_split_change_nothing() -> None:
    """Neither scaling nor training sees them."""
    table = _small_table([50, 51])
    x, y = table.x.copy(), table.y.copy()
    x[52:], y[52:] = 1000.0, -1000.0
    options = {"epochs": 3, "members": 5, "seed": 0}
    one, other = score(table, 1, **options), score(replace(table, x=x, y=y), 1, **options)
    for name in ("plain", "scaled", "average"):
        assert getattr(one, name) == pytest.approx(getattr(other, name))


def test_densities_are_averaged_and_not_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    each = torch.tensor([[0.0, 4.0], [2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    monkeypatch.setattr(likelihoods, "member_losses", lambda *given, **options: each)
    found = score(_small_table([50, 51]), 1, epochs=2, members=3, seed=0)
    for t in (1, 2, 3):
        expected = np.mean([-math.log(sum(math.exp(-float(v)) for v in row[:t]) / t) for row in each.T])
        assert found.growth[t] == pytest.approx(expected)
    assert found.average == found.growth[3]


def test_validation_rows_choose_the_rate_and_the_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[Fold], StackResult, dict[str, object]]] = []

    def watched(*given: object, **options: object) -> StackResult:
        result = train_stack(*given, **options)
        calls.append((list(given[4]), result, options))
        return result

    monkeypatch.setattr(likelihoods, "train_stack", watched)
    table = _small_table([50, 51])
    table = replace(table, splits=(table.splits[0], (np.arange(20, 60), np.arange(5))))
    found = score(table, 2, epochs=80, members=2, seed=0)
    (search_folds, search, _), (folds, refit, options) = calls
    assert min(options["epochs"]) < 70  # it had time to get worse again
    for f in range(2):
        own = search.trained[f::2]  # all rates of the split; the first is 0
        assert [one.spec.rate for one in own] == [0.0, *RATES]
        best = min(own[1:], key=lambda one: one.committee_loss)
        assert found.rates[f] == best.spec.rate == refit.trained[2 + f].spec.rate
        assert best.spec.input_rate == best.spec.rate
        assert refit.trained[f].spec.rate == 0.0
        assert options["epochs"][f] == max(1, own[0].curve.best_epoch)
        assert options["epochs"][2 + f] == max(1, best.curve.best_epoch)
        train_rows = table.splits[f][0] + 60 * f
        np.testing.assert_array_equal(search_folds[f].train, train_rows[:32])
        np.testing.assert_array_equal(search_folds[f].validation, train_rows[32:])
        np.testing.assert_array_equal(folds[f].train, train_rows)


def test_losses_are_in_the_unit_of_the_target() -> None:
    """y times 10 costs log 10 nats a row, whatever was learned."""
    table = _small_table([50, 51, 52])
    options = {"epochs": 3, "members": 5, "seed": 0}
    one, ten = score(table, 1, **options), score(replace(table, y=10 * table.y), 1, **options)
    for name in ("plain", "scaled", "average"):
        assert getattr(ten, name) - getattr(one, name) == pytest.approx(math.log(10), abs=1e-4)


def test_members_are_asked_one_by_one() -> None:
    spec = NetworkSpec(3, (6,), 2, 0.4, 0.2, "gaussian")
    torch.manual_seed(0)
    network = build_network(spec, 1.0, 2.0)
    weights = tuple(
        (layer.weight.detach(), layer.bias.detach())
        for layer in network
        if isinstance(layer, torch.nn.Linear)
    )
    trained = Trained(spec, weights, 1.0, 2.0, Curve((0,), (0.0,), (0.0,)), torch.zeros(0))
    x, y = torch.randn(7, 3), torch.randn(7, dtype=torch.float64)
    found = member_losses(trained, x, y, members=4, seed=11)
    for m in range(4):
        with masks(seed=11, member=m), torch.no_grad():
            expected = gaussian_nll(network.eval()(x).double(), y)
        torch.testing.assert_close(found[m], expected, rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3
    with torch.no_grad():
        assert plain_loss(trained, x, y) == pytest.approx(float(gaussian_nll(network(x).double(), y).mean()))


def test_members_that_drop_nothing_are_whole_networks() -> None:
    spec = NetworkSpec(3, (6,), 2, 1e-9, 1e-9, "gaussian")
    torch.manual_seed(0)
    linears = [layer for layer in build_network(spec) if isinstance(layer, torch.nn.Linear)]
    weights = tuple((layer.weight.detach(), layer.bias.detach()) for layer in linears)
    trained = Trained(spec, weights, 0.0, 1.0, Curve((0,), (0.0,), (0.0,)), torch.zeros(0))
    x, y = torch.randn(7, 3), torch.randn(7, dtype=torch.float64)
    each = member_losses(trained, x, y, members=2, seed=0)
    assert each.mean(dim=1).tolist() == pytest.approx([plain_loss(trained, x, y)] * 2, rel=1e-5)


@pytest.mark.parametrize(
    ("gain_plain", "gain_scaled", "verdict"),
    [(0.3, 0.2, "holds"), (-0.3, 0.2, "does not hold here"), (0.3, -0.2, "does not hold here")],
)
def test_the_average_must_beat_both(
    monkeypatch: pytest.MonkeyPatch, gain_plain: float, gain_scaled: float, verdict: str
) -> None:
    def fake(data: Table, splits: int, **options: object) -> Scores:
        average = 1 + 0.01 * np.arange(splits)
        wobble = 0.01 * np.cos(np.arange(splits))
        return Scores(
            "small", average + gain_plain + wobble, average + gain_scaled + wobble, average, {1: average + 1},
            (0.01,) * splits, average + 0.5 + wobble,
        )  # fmt: skip

    monkeypatch.setattr(bayes_claim, "score", fake)
    findings = bayes_claim.experiment(SETTING, members=1)
    assert judge(bayes_claim.CLAIM, findings)[0] == verdict
    assert findings.figures["plain"].value == pytest.approx(gain_plain, abs=0.01)
    assert "+0.50" in findings.remarks[0]  # against the published


def test_bayes_runs_on_a_stand_in_once_for_all_tables() -> None:
    findings = bayes_claim.experiment(SETTING, names=("boston", "energy"), splits=2, epochs=2, members=3)
    judge(bayes_claim.CLAIM, findings)
    assert findings.data.count("diabetes") == 1
    assert "published" not in f"{findings.data} {' '.join(findings.remarks)}".lower()
    assert [line.name for line in findings.charts[0].series][-1] == "dropout, average of 3"


# Doubt


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_variance_over_masks_is_that_of_all_masks(rate: float) -> None:
    """4000 members; the standard error of a variance is below 4 % here, so 20 % is 5 of them: 1 in 10^6 by chance."""
    generator = torch.Generator().manual_seed(0)
    weights, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 1), (6, 4)))
    outcomes, chances = [], []
    for keep in itertools.product([0.0, 1.0], repeat=4):
        outcomes.append((x * torch.tensor(keep) / (1 - rate)) @ weights)
        chances.append(math.prod(1 - rate if k else rate for k in keep))
    values, weight = torch.stack(outcomes), torch.tensor(chances, dtype=torch.float64)[:, None, None]
    mean = (weight * values).sum(0)
    exact = float((weight * (values - mean).square()).sum(0).mean())
    assert exact == pytest.approx(float(rate / (1 - rate) * (x.square() @ weights.square()).mean()))
    assert members_variance(weights, x, rate, 4000, seed=1) == pytest.approx(exact, rel=0.2)


def test_the_spread_of_a_linear_model_stays_and_a_posteriors_falls() -> None:
    found = linear_spread(range(3), rate=0.3, sizes=(100, 10000), members=2000)
    np.testing.assert_allclose(found.committee[1] / found.limit, 1, atol=0.15)
    np.testing.assert_allclose(found.posterior[0] / found.posterior[1], 100, rtol=0.4)
    np.testing.assert_allclose(found.posterior[1] * 10000, NOISE**2 * FEATURES, rtol=0.3)  # s^2 E|x|^2


def test_between_clusters_masks_agree_and_ensembles_do_not() -> None:
    committees, ensembles = between_clusters(range(2), rate=0.1, epochs=200, members=100)
    assert committees.shape == ensembles.shape == (2,)
    assert np.all(committees < 1)  # convexity
    assert np.all(ensembles > 1)


def test_kinds_that_were_never_shown_are_not_among_the_others() -> None:
    found = kinds(300)
    assert set(found.y) == set(found.y_held) == set(found.y_test) == set(range(5))
    learned = {row.tobytes() for row in found.x}
    assert not learned & {row.tobytes() for row in found.x_held}
    assert len(found.x) == 300
    assert len(found.x_other) > 100
    assert not {row.tobytes() for row in found.x_test} & {row.tobytes() for row in found.x_other}
    assert len(kinds(10**6).x_held) > 100


def _sure(classes: list[int], certainty: float) -> torch.Tensor:
    probabilities = torch.full((len(classes), 3), (1 - certainty) / 2)
    probabilities[torch.arange(len(classes)), torch.tensor(classes)] = certainty
    return probabilities


def _rows(y_test: list[int]) -> Kinds:
    none, y = np.zeros((0, 1), np.float32), np.array(y_test)
    return Kinds(none, y, none, y, none, y, none, "")


def test_quality_ranks_disagreement_and_measures_calibration() -> None:
    agree = _sure([0, 1, 2, 0], 0.8).expand(2, -1, -1)
    differ = torch.stack((_sure([0, 1], 0.9), _sure([1, 2], 0.9)))
    found = quality([agree, agree, differ], _rows([0, 1, 2, 1]))
    assert (found.information, found.entropy) == (1.0, 1.0)
    assert found.accuracy == 0.75
    assert found.before == pytest.approx(0.05, abs=1e-6)  # 0.8 sure, 0.75 right
    assert found.spread == pytest.approx(0.0, abs=1e-6)
    swapped = quality([differ, differ, agree], _rows([0, 1]))
    assert (swapped.information, swapped.entropy) == (0.0, 0.0)
    alike = quality([agree, agree, agree], _rows([0, 1, 2, 1]))
    assert alike.information == 0.5


def test_temperature_is_fitted_on_held_rows_and_measured_on_test_rows() -> None:
    classes = [0, 1, 2] * 40
    truth = [c if i % 2 else (c + 1) % 3 for i, c in enumerate(classes)]
    certain = _sure(classes, 0.98).expand(2, -1, -1)
    found = quality([certain, certain, certain], _rows(truth))  # 0.98 sure, half right
    assert found.before == pytest.approx(0.48, abs=1e-6)
    assert found.after < 0.02
    right = replace(_rows(truth), y_held=np.array(classes))  # on held rows always right: nothing to take back
    assert quality([certain, certain, certain], right).after > 0.4


class _Answers:
    """Networks that answer a row with their own number as the class."""

    seeds = tuple(range(4))

    def outputs(self, x: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> torch.Tensor:
        logits = torch.zeros(1, 4, len(x), 4)
        for i in range(4):
            logits[0, i, :, i] = 4.0
        return logits


def test_ensembles_share_no_network() -> None:
    rows = np.zeros((3, 1), np.float32)
    data = Kinds(rows, np.zeros(3, np.int64), rows, np.array([0, 1, 0]), rows, np.array([2, 2, 3]), rows, "")
    ensembles, single = ensembles_of(_Answers(), data, size=2)
    assert [round(one.accuracy, 3) for one in ensembles] == [0.0, 0.667]  # of networks 0 and 1, 2 and 3
    assert [round(one.accuracy, 3) for one in single] == [0.0, 0.667]  # networks 0 and 2
    assert all(one.spread > 0.5 for one in ensembles)
    assert all(one.spread == pytest.approx(0, abs=1e-9) for one in single)


SMALL = {"rows": 300, "hidden": (6,), "epochs": 2, "members": 3, "toy_epochs": 3}


def _fake_quality(information: float, spread: float) -> Quality:
    return Quality(information, 0.7, 0.8, 0.1, 0.05, spread)


@pytest.mark.parametrize(
    ("information", "fewer", "verdict"),
    [(0.9, 0.2, "holds"), (0.3, 0.2, "does not hold here"), (0.9, 0.05, "does not hold here")],
)
def test_doubt_must_be_larger_elsewhere_and_smaller_with_data(
    monkeypatch: pytest.MonkeyPatch, information: float, fewer: float, verdict: str
) -> None:
    def fake(networks: Networks, data: Kinds, members: int) -> list[list[Quality]]:
        own = 0.1 if len(networks.rates) == 2 else fewer
        return [[_fake_quality(information + 0.001 * s, own + 0.001 * s) for s in range(5)]] * len(
            networks.rates
        )

    monkeypatch.setattr(mcdropout_claim, "committees", fake)
    findings = mcdropout_claim.experiment(SETTING, **SMALL)
    assert judge(mcdropout_claim.CLAIM, findings)[0] == verdict


def test_mcdropout_runs_small_and_a_wrong_formula_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = mcdropout_claim.experiment(SETTING, **SMALL)
    verdicts = {one.rule.quantity: one.verdict for one in judge(mcdropout_claim.CLAIM, findings)[1]}
    assert verdicts["limit"] == "holds"
    assert findings.figures["posterior_fall"].value > 2
    assert abs(findings.figures["fall"].value) < 0.3
    right = linear_spread

    def wrong(*args: object, rate: float, **options: object) -> object:
        found = right(*args, rate=rate, **options)
        return replace(found, limit=found.limit / (1 - rate))  # p in place of p q

    monkeypatch.setattr(mcdropout_claim, "linear_spread", wrong)
    planted = mcdropout_claim.experiment(SETTING, **SMALL)
    assert judge(mcdropout_claim.CLAIM, planted)[0] == "does not hold here"
    assert {one.rule.quantity: one.verdict for one in judge(mcdropout_claim.CLAIM, planted)[1]}[
        "limit"
    ] == "does not hold here"

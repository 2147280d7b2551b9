"""Rates chosen again after training: found where a better one is known, left where none is."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor, nn

import dropkit as dk
from dropkit.committee import Committee
from dropkit.committee.calibrate import ConformalInterval, Temperature
from dropkit.committee.calibrated import CalibratedCommittee, around, calibrate, network_of
from dropkit.committee.conformal_sets import ConformalSet
from dropkit.committee.prediction import Prediction, RegressionPrediction
from dropkit.committee.rate_choice import best_noise, choose_rates, with_rates
from dropkit.committee.summary import ClassificationSummary
from dropkit.errors import NoMaskError, OptionError, ShapeError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Everything(nn.Module):
    """One of each kind of place where a rate is held."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = dk.nn.Dropout(0.2)
        self.scheduled = dk.nn.Dropout(dk.nn.schedules.linear(0.0, 0.4, steps=5))
        self.each = dk.nn.Dropout(torch.tensor([0.1, 0.3]))
        self.lstm = dk.nn.LSTM(2, 2, recurrent_dropout=0.2, input_dropout=0.1)
        self.attention = dk.nn.MultiheadAttention(4, 2, dropout=0.2)
        self.learned = dk.nn.ConcreteDropout(nn.Linear(2, 2), p=0.2)
        self.linear = nn.Linear(2, 2)


def test_every_kind_of_rate_is_changed_in_a_copy_around_the_same_weights() -> None:
    model = Everything()
    done = with_rates(model, lambda p: 2 * p)
    network = done.network
    assert network.plain.p == pytest.approx(0.4)
    assert network.scheduled.p == pytest.approx(0.8)  # of its last word
    torch.testing.assert_close(network.each.p, torch.tensor([0.2, 0.6]))
    assert (network.lstm.recurrent_dropout, network.lstm.input_dropout) == pytest.approx((0.4, 0.2))
    assert network.attention.p == pytest.approx(0.4)
    assert done.changed == ("plain", "scheduled", "each", "lstm", "attention")
    assert done.left == ("learned",)
    assert model.plain.p == 0.2
    assert model.each.p.tolist() == pytest.approx([0.1, 0.3])
    assert network.linear.weight is model.linear.weight
    assert with_rates(model, lambda p: 9 * p).network.plain.p == 0.95  # at 1 nothing would be left


def test_a_converted_model_is_changed_too() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1))
    done = with_rates(dk.convert(model).model, lambda p: p / 2)
    found = {
        name: getattr(m, "p", None) or getattr(m, "dropout", None) for name, m in done.network.named_modules()
    }
    assert found["1"] == pytest.approx(0.1)
    assert found["2.self_attn"] == pytest.approx(0.05)
    assert found["2.dropout1"] == pytest.approx(0.05)


class Line(nn.Module):
    """One masked linear layer and a noise it is sure of; its spread is p / (1 - p) sum of (w x)^2."""

    def __init__(self, rate: float, features: int = 40, noise: float = 0.05) -> None:
        super().__init__()
        self.drop = dk.nn.Dropout(rate)
        self.weight = nn.Parameter(normal(features, seed=3) / features**0.5)
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        mean = self.drop(x) @ self.weight
        return torch.stack((mean, torch.full_like(mean, math.log(self.noise))), dim=-1)


def test_the_rate_that_made_the_data_is_found() -> None:
    # y is for each row the answer of a member of its own at rate 0.3; the committee was "trained" at 0.1.
    x, model = normal(400, 40), Line(0.1)
    keep = torch.rand(400, 40, generator=torch.Generator().manual_seed(5)) >= 0.3
    y = (x * keep / 0.7) @ model.weight.detach() + 0.05**0.5 * normal(400, seed=6)
    committee = Committee(model, members=64, seed=0, likelihood="gaussian")
    calibrated = calibrate(committee, x, y, rates=(0.02, 0.05, 0.2, 0.3, 0.45, 0.7))
    choice = calibrated.rates
    assert choice is not None
    assert choice.chosen == 0.3
    at = choice.tried.index(0.3)
    assert choice.gain[at] > 3 * choice.gain_error[at]
    assert network_of(calibrated.committee).get_submodule("drop").p == 0.3
    assert network_of(committee).get_submodule("drop").p == 0.1  # what was given is as it was
    assert (choice.kind, choice.rows, choice.members) == ("rate", 200, 64)
    assert "chosen" in str(choice)
    json.dumps(choice.to_json(), allow_nan=False)
    thrice = calibrate(committee, x, y, multipliers=(0.5, 3.0)).rates
    assert thrice is not None
    assert (thrice.kind, thrice.chosen) == ("multiplier", 3.0)
    assert thrice.nll[1] == pytest.approx(choice.nll[at])


def test_rates_stay_where_nothing_is_gained() -> None:
    x, model = normal(200, 40), Line(0.3)
    keep = torch.rand(200, 40, generator=torch.Generator().manual_seed(5)) >= 0.3
    y = (x * keep / 0.7) @ model.weight.detach() + 0.05**0.5 * normal(200, seed=6)
    committee = Committee(model, members=64, likelihood="gaussian")
    calibrated = calibrate(committee, x, y, multipliers=(0.2, 2.5))
    assert calibrated.rates is not None
    assert calibrated.rates.chosen is None
    assert calibrated.committee is committee
    assert all(g <= e for g, e in zip(calibrated.rates.gain, calibrated.rates.gain_error, strict=True))


def test_a_point_model_gets_the_noise_that_suits_each_rate() -> None:
    model = nn.Sequential(dk.nn.Dropout(0.2), nn.Linear(40, 1)).double()
    x, y = normal(60, 40), normal(60, 1, seed=1)
    choice = calibrate(Committee(model, members=16), x, y, multipliers=(0.5, 0.0)).rates
    assert choice is not None
    assert len(choice.noise) == 3  # at the rates of training, and at each tried
    # Without members that spread, the noise takes all of the error, and its likelihood is that of one normal law.
    error = -choice.nll[1]
    assert error == pytest.approx(-0.5 * math.log(2 * math.pi * math.e * choice.noise[2]), rel=1e-6)


def test_the_record_is_that_of_asking_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), dk.nn.Dropout(0.4), nn.Linear(16, 3)).double()
    x, y = normal(50, 3), torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(2))
    committee = Committee(model, members=12, seed=7, likelihood="categorical")
    choice, _ = choose_rates(
        network_of(committee), lambda net: around(committee, net).predict(x), y, multipliers=(0.5, 0.0)
    )
    by_hand = {}
    for rate in (0.4, 0.2, 0.0):
        other = nn.Sequential(model[0], model[1], dk.nn.Dropout(rate), model[3])
        asked = Committee(other, members=12, seed=7, likelihood="categorical", allow=("no spread",)).predict(
            x
        )
        by_hand[rate] = -asked.log_likelihood(y).numpy()
    assert choice.before == pytest.approx(by_hand[0.4].mean())
    for i, rate in enumerate((0.2, 0.0)):
        difference = by_hand[0.4] - by_hand[rate]
        assert choice.nll[i] == pytest.approx(by_hand[rate].mean())
        assert choice.gain[i] == pytest.approx(difference.mean())
        assert choice.gain_error[i] == pytest.approx(difference.std(ddof=1) / math.sqrt(50))  # paired
        assert choice.standard_error[i] == pytest.approx(by_hand[rate].std(ddof=1) / math.sqrt(50))
    assert choice.noise == ()


def test_the_noise_is_the_one_a_general_optimiser_finds() -> None:
    samples, y = normal(9, 30, 1), normal(30, 1, seed=4) * 1.7
    prediction = RegressionPrediction(samples)

    def loss(log_v: float) -> float:
        return -float(prediction.with_noise(math.exp(log_v)).log_likelihood(y).mean())

    best = min(
        (optimize.minimize_scalar(loss, bracket=(a, a + 0.5)) for a in np.linspace(-6, 3, 10)),
        key=lambda r: r.fun,
    )
    assert math.log(best_noise(prediction, y)) == pytest.approx(best.x, abs=1e-5)


# --- the whole way ---------------------------------------------------------------------------------------


def classifier(likelihood: str = "categorical", outputs: int = 4) -> Committee:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), dk.nn.Dropout(0.3), nn.Linear(32, outputs)).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return Committee(model, members=16, likelihood=likelihood)  # type: ignore[arg-type]


def test_classes_get_a_temperature_and_sets_from_different_rows() -> None:
    committee = classifier()
    x = normal(500, 3)
    truth = committee.predict(x).probabilities
    y = torch.multinomial(truth.sqrt(), 1, generator=torch.Generator().manual_seed(3))[
        :, 0
    ]  # less sure than it says
    calibrated = calibrate(committee, x, y)
    assert isinstance(calibrated.calibration, Temperature)
    assert 1.5 < calibrated.calibration.temperature < 2.7  # the square root is T = 2
    assert calibrated.calibration.rows == 250
    assert calibrated.sets is not None
    assert calibrated.sets.rows == 250
    assert calibrated.sets.levels == (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    assert calibrate(committee, x, y).sets == calibrated.sets
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    chosen_on, promised_on = order[:250], order[250:]
    assert calibrated.calibration == Temperature.fit(committee.predict(x[chosen_on]), y[chosen_on])
    tempered = calibrated.predict(x[promised_on])  # what new rows will be judged by
    assert calibrated.sets == ConformalSet.fit(tempered, y[promised_on], calibrated.sets.levels)
    new = normal(400, 3, seed=9)
    y_new = torch.multinomial(
        committee.predict(new).probabilities.sqrt(), 1, generator=torch.Generator().manual_seed(4)
    )
    prediction = calibrated.predict(new)
    assert prediction.temperature == calibrated.calibration.temperature
    # Five standard errors of a share of 400 rows, and of the threshold from 250: 1 false alarm in 10^6, one-sided.
    share = calibrated.class_sets(prediction).covers(y_new[:, 0]) / 400
    assert share > 0.9 - 5 * math.sqrt(0.09 / 400 + 0.09 / 250)


def test_numbers_get_intervals_from_all_rows_unless_rates_are_chosen() -> None:
    committee = classifier("gaussian", 2)
    x, y = normal(60, 3), normal(60, seed=5)
    plain = calibrate(committee, x, y)
    assert isinstance(plain.calibration, ConformalInterval)
    assert plain.calibration.rows == 60
    assert plain.rates is None
    assert plain.sets is None
    tuned = calibrate(committee, x, y, multipliers=(0.5, 2.0))
    assert isinstance(tuned.calibration, ConformalInterval)
    assert tuned.calibration.rows == 30
    assert tuned.rates is not None
    assert tuned.rates.noise == ()  # the model predicts its own
    whole = CalibratedCommittee.fit(committee, x, y)
    assert whole.calibration == plain.calibration


class Named(Committee):
    """Asked by name, as a committee of a model with two arguments is."""

    def predict(self, x: dict[str, Tensor]) -> Prediction:  # type: ignore[override]
        return super().predict(torch.cat((x["a"], x["b"][:, None]), dim=1))


def test_a_structure_of_inputs_is_divided_like_a_tensor() -> None:
    x, y = normal(40, 3), torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(1))
    committee = classifier()
    named = Named(network_of(committee), members=16, likelihood="categorical")
    divided = calibrate(named, {"a": x[:, :2], "b": x[:, 2]}, y)
    assert divided.sets == calibrate(committee, x, y).sets
    assert divided.sets is not None


def test_a_tolerance_is_passed_on_and_the_summary_tempered() -> None:
    committee = classifier()
    x, y = normal(100, 3), torch.randint(0, 4, (100,), generator=torch.Generator().manual_seed(1))
    calibrated = calibrate(committee, x, y)
    assert isinstance(calibrated.calibration, Temperature)
    assert calibrated.calibration.temperature > 1.5  # labels that have nothing to do with what it says
    summary = calibrated.predict(x[:9], tolerance=(0.02, math.inf), maximum=2000)
    assert isinstance(summary, ClassificationSummary)
    assert summary.temperature == calibrated.calibration.temperature
    assert calibrated.class_sets(summary).included.shape == (9, 4)


def test_a_structure_of_outputs_is_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(dk.nn.Dropout(0.3), nn.Linear(3, 4)).double()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"first": self.inner(x), "second": self.inner(x)}

    committee = Committee(Both(), members=8, likelihood="categorical")
    with pytest.raises(ShapeError, match="puts out a dict"):
        calibrate(committee, normal(20, 3), torch.zeros(20, dtype=torch.int64))


def test_few_rows_calibrate_nothing() -> None:
    committee = classifier()
    x, y = normal(4, 3), torch.tensor([0, 1, 2, 3])
    calibrated = calibrate(committee, x, y, levels=(0.9,))
    assert calibrated.sets is None
    with pytest.raises(OptionError, match="9 of them"):
        calibrated.class_sets(calibrated.predict(x))
    numbers = calibrate(classifier("gaussian", 2), x, normal(4), levels=(0.9,))
    assert numbers.calibration is None


def test_mistakes_are_named() -> None:
    committee = classifier()
    x, y = normal(20, 3), torch.zeros(20, dtype=torch.int64)
    for bad in ({"rates": (1.0,)}, {"rates": ()}, {"multipliers": (-1.0,)}, {"multipliers": (math.inf,)}):
        with pytest.raises(OptionError, match="at least one"):
            calibrate(committee, x, y, **bad)
    with pytest.raises(OptionError, match="both"):
        calibrate(committee, x, y, rates=(0.1,), multipliers=(1.0,))
    with pytest.raises(ShapeError, match="must agree"):
        calibrate(committee, x, y[:7])
    with pytest.raises(ShapeError, match="at least 2"):
        calibrate(committee, x[:2], y[:2], multipliers=(0.5,))
    learned = nn.Sequential(dk.nn.ConcreteDropout(nn.Linear(3, 4), p=0.2), nn.Tanh()).double()
    with pytest.raises(NoMaskError, match="0 have learned"):
        calibrate(Committee(learned, members=4, likelihood="categorical"), x, y, multipliers=(0.5,))

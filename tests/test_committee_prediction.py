"""What the records of a committee's answer say, against definitions, closed forms and other libraries."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor

from dropkit.committee.information import entropy
from dropkit.committee.prediction import ClassificationPrediction, RegressionPrediction, temper, warn_of_rows
from dropkit.errors import DropkitWarning, NotProbabilitiesError, OptionError, ShapeError


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def gaussian() -> RegressionPrediction:
    return RegressionPrediction(normal(7, 5, seed=1), normal(7, 5, seed=2).exp())


@pytest.fixture
def classes() -> ClassificationPrediction:
    return ClassificationPrediction(normal(9, 6, 4, seed=3).mul(2).softmax(dim=-1))


def test_variances_are_those_of_the_definition(gaussian: RegressionPrediction) -> None:
    samples, noise = gaussian.samples.numpy(), gaussian.noise.numpy()
    np.testing.assert_allclose(gaussian.mean.numpy(), samples.mean(0))
    np.testing.assert_allclose(gaussian.epistemic.numpy(), samples.var(0, ddof=1))
    np.testing.assert_allclose(gaussian.aleatoric.numpy(), noise.mean(0))
    np.testing.assert_allclose(gaussian.total.numpy(), samples.var(0, ddof=1) + noise.mean(0))
    np.testing.assert_allclose(gaussian.std.numpy() ** 2, gaussian.total.numpy())
    np.testing.assert_allclose(gaussian.standard_error.numpy(), samples.std(0, ddof=1) / math.sqrt(7))
    assert torch.equal(gaussian.variance, gaussian.epistemic)
    assert gaussian.members == 7


def test_the_law_of_total_variance_holds_for_the_mixture_itself() -> None:
    # The mixture of the members' normal laws, integrated numerically: its variance is the mean of theirs plus the
    # variance of their means, divided by M there and by M - 1 in `epistemic`, which speaks of all members there are.
    means, noise = normal(4, seed=1), normal(4, seed=2).exp()
    prediction = RegressionPrediction(means[:, None], noise[:, None])

    def moment(k: int, about: float = 0.0) -> float:
        def summand(y: float) -> float:
            return float((y - about) ** k * stats.norm.pdf(y, means.numpy(), noise.sqrt().numpy()).mean())

        return float(integrate.quad(summand, -40, 40, limit=400, points=means.tolist())[0])

    variance = moment(2, about=moment(1))
    assert moment(1) == pytest.approx(float(prediction.mean), abs=1e-9)
    assert variance == pytest.approx(float(prediction.aleatoric + prediction.epistemic * 3 / 4), rel=1e-7)


def test_the_error_of_the_spread_is_what_leaving_members_out_shows() -> None:
    samples = normal(300, 3, seed=5).exp()  # far from normal: kurtosis of a lognormal law
    keep = ~torch.eye(300, dtype=torch.bool)
    without = torch.stack([RegressionPrediction(samples[k]).epistemic.sqrt() for k in keep])
    jackknife = ((without - without.mean(0)).square().sum(0) * (299 / 300)).sqrt()
    prediction = RegressionPrediction(samples)
    torch.testing.assert_close(prediction.standard_error_of_spread, jackknife, rtol=0.1, atol=0.0)
    under_a_normal_law = prediction.epistemic.sqrt() / math.sqrt(2 * 299)
    assert bool((jackknife > 1.5 * under_a_normal_law).all())  # the trap is real


def test_a_row_that_is_not_finite_is_counted_and_touches_no_other(
    gaussian: RegressionPrediction, classes: ClassificationPrediction
) -> None:
    samples = gaussian.samples.clone()
    samples[3, 2], samples[5, 2], samples[0, 4] = math.nan, math.inf, -math.inf
    spoiled = RegressionPrediction(samples, gaussian.noise)
    assert spoiled.not_finite.tolist() == [0, 0, 2, 0, 1]
    fine = torch.tensor([0, 1, 3])
    for name in ("mean", "total", "standard_error", "standard_error_of_spread"):
        assert torch.equal(getattr(spoiled, name)[fine], getattr(gaussian, name)[fine])
        assert not bool(getattr(spoiled, name)[[2, 4]].isfinite().any())
    assert torch.equal(spoiled.interval(0.9).lower[fine], gaussian.interval(0.9).lower[fine])
    probs = classes.samples.clone()
    probs[1, 3] = math.nan
    unknown = ClassificationPrediction(probs)
    assert unknown.not_finite.tolist() == [0, 0, 0, 1, 0, 0]
    for name in (
        "probabilities",
        "entropy",
        "mutual_information",
        "standard_error",
        "standard_error_of_spread",
    ):
        kept = torch.tensor([0, 1, 2, 4, 5])
        assert torch.equal(getattr(unknown, name)[kept], getattr(classes, name)[kept])
        assert bool(getattr(unknown, name)[3].isnan().all())
    with pytest.warns(DropkitWarning, match="2 of 5 rows are not finite: rows 2, 4"):
        warn_of_rows(spoiled.not_finite)


def test_a_small_spread_on_a_large_value_survives_float32() -> None:
    # 1e4 + 0.01 * normal; what float32 stores is itself rounded in steps of 1/1024, so the truth is taken from there.
    samples = (1e4 + 0.01 * normal(4096, 3)).float()
    truth = samples.double().numpy().var(0, ddof=1)
    assert float((samples.square().mean(0) - samples.mean(0).square()).abs().max()) > 1.0  # the trap is real
    np.testing.assert_allclose(RegressionPrediction(samples).epistemic.numpy(), truth, rtol=1e-6)
    assert truth == pytest.approx(1e-4, rel=0.2)  # standard error of a variance of 4096: 2.2 %


def test_log_likelihood_is_that_of_the_mixture(gaussian: RegressionPrediction) -> None:
    y = normal(5, seed=9)
    density = stats.norm.pdf(y.numpy(), gaussian.samples.numpy(), gaussian.noise.sqrt().numpy()).mean(0)
    np.testing.assert_allclose(gaussian.log_likelihood(y).numpy(), np.log(density), rtol=1e-12)
    far = gaussian.log_likelihood(y + 1e3)  # every density underflows, its logarithm does not
    assert bool(torch.isfinite(far).all())


@given(
    seed=st.integers(0, 10**6),
    q=st.one_of(st.floats(1e-6, 1 - 1e-6), st.sampled_from([0.05, 0.5, 0.95])),
    spread=st.sampled_from([1e-6, 1.0, 1e4]),
    sharp=st.sampled_from([1e-9, 1e-2, 1.0, 1e3]),
)
def test_quantiles_invert_the_mixture(seed: int, q: float, spread: float, sharp: float) -> None:
    prediction = RegressionPrediction(
        spread * normal(5, 3, seed=seed), sharp * normal(5, 3, seed=seed + 1).exp()
    )
    x = prediction.quantile(q).numpy()
    scale = prediction.noise.sqrt().numpy()

    def distribution(at: np.ndarray) -> np.ndarray:
        return stats.norm.cdf(at, prediction.samples.numpy(), scale).mean(0)

    step = 1e-9 * (np.abs(x) + spread + math.sqrt(sharp))
    assert (distribution(x - step) <= q + 1e-12).all()
    assert (distribution(x + step) >= q - 1e-12).all()


def test_equal_members_give_the_normal_interval() -> None:
    prediction = RegressionPrediction(torch.full((3, 1), 2.0).double(), torch.full((3, 1), 9.0).double())
    lower, upper = prediction.interval(0.95)
    assert float(lower) == pytest.approx(2 - 1.959963984540054 * 3, rel=1e-12)
    assert float(upper) == pytest.approx(2 + 1.959963984540054 * 3, rel=1e-12)


def test_a_point_model_speaks_of_the_function_only() -> None:
    prediction = RegressionPrediction(normal(11, 4))
    assert torch.equal(prediction.aleatoric, torch.zeros(4, dtype=torch.float64))
    lower, upper = prediction.interval(0.8)
    np.testing.assert_allclose(lower.numpy(), np.quantile(prediction.samples.numpy(), 0.1, axis=0))
    np.testing.assert_allclose(upper.numpy(), np.quantile(prediction.samples.numpy(), 0.9, axis=0))
    with pytest.raises(OptionError, match="with_noise"):
        prediction.log_likelihood(torch.zeros(4))
    np.testing.assert_allclose(prediction.with_noise(0.25).total.numpy(), prediction.epistemic.numpy() + 0.25)


def test_a_factor_sets_the_half_width(gaussian: RegressionPrediction) -> None:
    lower, upper = gaussian.interval(factor=1.5)
    torch.testing.assert_close(upper - lower, 3.0 * gaussian.std)
    torch.testing.assert_close(upper + lower, 2.0 * gaussian.mean)
    assert bool(torch.isinf(gaussian.interval(factor=math.inf).upper).all())


def test_another_unit_is_the_same_prediction(gaussian: RegressionPrediction) -> None:
    there = gaussian.rescaled(scale=-2.5, shift=1e6)
    y = normal(5, seed=4)
    torch.testing.assert_close(there.mean, gaussian.mean * -2.5 + 1e6)
    torch.testing.assert_close(there.total, gaussian.total * 6.25)
    torch.testing.assert_close(
        there.log_likelihood(y * -2.5 + 1e6), gaussian.log_likelihood(y) - math.log(2.5), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(there.interval(0.9).upper, gaussian.interval(0.9).lower * -2.5 + 1e6)


def test_fewer_members_and_rows_are_parts_of_the_same(
    gaussian: RegressionPrediction, classes: ClassificationPrediction
) -> None:
    assert torch.equal(gaussian.first(3).mean, RegressionPrediction(gaussian.samples[:3]).mean)
    assert torch.equal(gaussian.rows([4, 0]).total, gaussian.total[[4, 0]])
    assert torch.equal(classes.first(3).probabilities, classes.samples[:3].mean(0))
    assert torch.equal(classes.rows(slice(1, 3)).samples, classes.samples[:, 1:3])
    for record in (gaussian, classes):
        with pytest.raises(OptionError, match="at least 2"):
            record.first(1)


def test_probabilities_are_averaged_never_logits() -> None:
    sure, others = torch.tensor([12.0, 0.0]), torch.tensor([0.0, 1.0])
    logits = torch.stack((sure, others, others, others))[:, None]
    prediction = ClassificationPrediction(logits.softmax(dim=-1))
    assert int(prediction.label) == 1  # three of four
    assert int(logits.mean(dim=0).argmax()) == 0  # the trap is real


def test_class_doubt_adds_up(classes: ClassificationPrediction) -> None:
    torch.testing.assert_close(classes.entropy, classes.expected_entropy + classes.mutual_information)
    torch.testing.assert_close(classes.entropy, entropy(classes.probabilities))
    chosen = torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(
        classes.log_likelihood(chosen).exp(), classes.probabilities[torch.arange(6), chosen]
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_temperature_acts_on_the_average(classes: ClassificationPrediction, temperature: float) -> None:
    tempered = ClassificationPrediction(classes.samples, temperature)
    power = classes.samples.mean(0) ** (1 / temperature)
    torch.testing.assert_close(tempered.probabilities, power / power.sum(-1, keepdim=True))
    assert torch.equal(tempered.label, classes.label)
    assert torch.equal(tempered.mutual_information, classes.mutual_information)
    logits = normal(6, 4, seed=8)
    torch.testing.assert_close(temper(logits.softmax(-1), temperature), (logits / temperature).softmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_standard_error_is_what_leaving_members_out_shows(temperature: float) -> None:
    # The jackknife is exact for a mean and agrees to first order for a smooth function of one.
    samples = (0.3 * normal(150, 2, 3, seed=5) + normal(2, 3, seed=6)).softmax(dim=-1)
    members = len(samples)
    keep = ~torch.eye(members, dtype=torch.bool)
    without = torch.stack([ClassificationPrediction(samples[k], temperature).probabilities for k in keep])
    jackknife = ((without - without.mean(0)).square().sum(0) * (members - 1) / members).sqrt()
    error = ClassificationPrediction(samples, temperature).standard_error
    torch.testing.assert_close(error, jackknife, rtol=1e-10 if temperature == 1.0 else 0.03, atol=0.0)


def test_one_impossible_row_does_not_make_an_average_infinite() -> None:
    prediction = ClassificationPrediction(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]))
    assert float(prediction.log_likelihood(torch.tensor([1]))) == pytest.approx(-87.3365, abs=1e-3)


def test_mistakes_are_named(gaussian: RegressionPrediction, classes: ClassificationPrediction) -> None:
    with pytest.raises(ShapeError, match="at least 2 members"):
        RegressionPrediction(torch.zeros(1, 4))
    with pytest.raises(ShapeError, match="one variance for each"):
        RegressionPrediction(torch.zeros(2, 4), torch.zeros(4))
    with pytest.raises(ShapeError, match="must agree"):
        gaussian.log_likelihood(torch.zeros(5, 1))  # would broadcast to (5, 5)
    with pytest.raises(OptionError, match=r"write 0\.9"):
        gaussian.interval(90)
    with pytest.raises(OptionError, match="factor"):
        gaussian.interval(factor=-1.0)
    with pytest.raises(OptionError, match="positive"):
        gaussian.with_noise(0.0)
    with pytest.raises(NotProbabilitiesError, match="softmax"):
        ClassificationPrediction(torch.zeros(2, 3, 4))
    with pytest.raises(OptionError, match="0 to 3"):
        classes.log_likelihood(torch.tensor([0, 1, 2, 3, 4, 0]))
    with pytest.raises(OptionError, match="integer"):
        classes.log_likelihood(torch.zeros(6))
    with pytest.raises(OptionError, match="temperature"):
        ClassificationPrediction(classes.samples, 0.0)
    with pytest.raises(ShapeError, match="at least 2"):
        ClassificationPrediction(classes.samples[:1])


def test_a_record_can_be_copied_and_not_changed(gaussian: RegressionPrediction) -> None:
    assert torch.equal(copy.deepcopy(gaussian).mean, gaussian.mean)
    with pytest.raises(AttributeError):
        gaussian.samples = torch.zeros(2, 2)  # type: ignore[misc]


def test_a_prediction_can_be_differentiated() -> None:
    x = normal(3, 2).requires_grad_()
    prediction = RegressionPrediction(torch.stack((x, 2 * x)), torch.stack((x, x)).exp())
    assert torch.autograd.gradcheck(
        lambda v: RegressionPrediction(torch.stack((v, v.sin())), torch.stack((v, v)).exp()).total, x
    )
    prediction.log_likelihood(torch.zeros(3, 2)).sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())

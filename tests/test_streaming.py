"""Members in pieces say what members together say, and asking stops where it is known enough."""

from __future__ import annotations

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from dropkit.committee.information import divergence
from dropkit.committee.prediction import ClassificationPrediction, RegressionPrediction
from dropkit.committee.streaming import CentralMoments, Disagreement
from dropkit.committee.summary import ClassificationSummary, RegressionSummary
from dropkit.committee.tolerance import (
    Stream,
    check_tolerance,
    draw_leaves_until,
    draw_until,
    next_look,
    summarise,
)
from dropkit.errors import DropkitWarning, NotProbabilitiesError, OptionError, ShapeError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * normal(*shape, seed=seed)).softmax(dim=-1)


def exact_sums(values: list[float]) -> list[float]:
    """Mean and sums of powers of deviations, in rational arithmetic."""
    exact = [Fraction(v) for v in values]
    mean = sum(exact) / len(exact)
    return [float(mean), *(float(sum((v - mean) ** k for v in exact)) for k in (2, 3, 4))]


cuts = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@settings(max_examples=60)
@given(cuts=cuts, seed=st.integers(0, 10**6), offset=st.sampled_from([0.0, 1.0, -1e6, 1e9]))
def test_pieces_give_the_sums_of_all_members(cuts: list[int], seed: int, offset: float) -> None:
    samples = offset + normal(sum(cuts), 2, 1, seed=seed).exp()
    moments = None
    for piece in samples.split(cuts):
        new = CentralMoments.of(piece)
        moments = new if moments is None else moments.merged(new)
    assert moments is not None
    size = float(samples.std(correction=0, dim=0).max())  # of a deviation
    for b in range(2):
        expected = exact_sums(samples[:, b, 0].tolist())
        found = [float(v[b, 0]) for v in (moments.mean, moments.second, moments.third, moments.fourth)]
        # Rounding of the mean, 2^-53 of its size, is felt once for each power of a deviation.
        slack = 8 * (abs(offset) + size) * 2.0**-53
        n = sum(cuts)
        assert found[0] == pytest.approx(expected[0], abs=slack, rel=1e-15)
        for k, (have, want) in enumerate(zip(found[1:], expected[1:], strict=True), start=2):
            assert have == pytest.approx(
                want, rel=1e-9, abs=8 * k * n * slack * max(size, slack) ** (k - 1) * n
            )


def test_a_small_spread_on_a_large_value_survives_many_merges() -> None:
    samples = 1e8 + 1e-3 * normal(4096, 1, seed=3)
    moments = CentralMoments.of(samples[:1])
    for k in range(1, 4096):
        moments = moments.merged(CentralMoments.of(samples[k : k + 1]))
    truth = samples.numpy().astype(np.longdouble).var(ddof=1)
    assert (
        float((samples.square().mean() - samples.mean().square()).abs()) > 1e-6
    )  # the trap is real: 1e-6 is the truth
    assert float(moments.variance) == pytest.approx(float(truth), rel=1e-3)
    assert int(moments.count) == 4096


@pytest.mark.parametrize(
    ("law", "fourth"),
    [("normal", 3.0), ("uniform", 1.8), ("exponential", 9.0), ("one in five", 3.25)],
)
def test_the_error_of_the_spread_is_that_of_many_committees(law: str, fourth: float) -> None:
    rng = np.random.default_rng(11)
    members, committees = 400, 4000
    shape = (members, committees)
    draws = {
        "normal": lambda: rng.standard_normal(shape),
        "uniform": lambda: rng.uniform(-math.sqrt(3), math.sqrt(3), shape),
        "exponential": lambda: rng.exponential(size=shape) - 1,
        "one in five": lambda: ((rng.random(shape) < 0.2) - 0.2) / 0.4,
    }[law]()
    moments = CentralMoments.of(torch.from_numpy(draws))
    # Var s^2 = (kurtosis - (M - 3) / (M - 1)) / M at unit variance, and s moves half as much as s^2.
    theory = math.sqrt((fourth - (members - 3) / (members - 1)) / members) / 2
    assert float(moments.standard_error_of_spread.mean()) == pytest.approx(theory, rel=0.1)
    seen = float(moments.variance.sqrt().std())
    # A standard deviation over 4000 committees has a relative error of about 1.1 % (sqrt(1 / 2n), kurtosis near 3);
    # 8 % is seven of these, and leaves room for terms of order 1 / M.
    assert seen == pytest.approx(theory, rel=0.08)


def test_a_normal_law_would_have_been_wrong() -> None:
    # What would be said under a normal law, s / sqrt(2 M), is half of the truth for exponential members.
    draws = torch.from_numpy(np.random.default_rng(5).exponential(size=(4000, 50)))
    moments = CentralMoments.of(draws)
    assert float((moments.standard_error_of_spread / (moments.variance / 8000).sqrt()).mean()) > 1.7


def test_members_that_agree_have_no_error() -> None:
    moments = CentralMoments.of(torch.full((5, 3), 7.25)).merged(CentralMoments.of(torch.full((9, 3), 7.25)))
    assert torch.equal(moments.variance, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(moments.standard_error_of_spread, torch.zeros(3, dtype=torch.float64))
    agree = Disagreement.of(classes(1, 4, 3).expand(5, 4, 3)).with_members(classes(1, 4, 3).expand(8, 4, 3))
    assert torch.equal(agree.mutual_information, torch.zeros(4, dtype=torch.float64))


@settings(max_examples=40)
@given(cuts=cuts, seed=st.integers(0, 10**6), scale=st.sampled_from([1e-5, 1.0, 30.0]))
def test_divergences_are_joined_exactly(cuts: list[int], seed: int, scale: float) -> None:
    probs = classes(sum(cuts), 3, 4, seed=seed, scale=scale)
    whole = ClassificationPrediction(torch.cat((probs, probs)))  # two of each: as many as a spread takes
    merged = None
    for piece in (*probs.split(cuts), probs):
        new = Disagreement.of(piece)
        merged = new if merged is None else merged.merged(new)
    assert merged is not None
    torch.testing.assert_close(merged.mutual_information, whole.mutual_information, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(merged.probabilities.mean, whole.probabilities, rtol=1e-12, atol=0.0)


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 50.0))
def test_a_divergence_is_that_of_its_definition(seed: int, scale: float) -> None:
    p, q = classes(5, seed=seed, scale=scale), classes(5, seed=seed + 1, scale=scale)
    expected = math.fsum(a * math.log(a / b) - a + b for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert float(divergence(p, q)) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert float(divergence(p, p)) == 0.0


@pytest.mark.parametrize("cut", [[300], [32, 16, 24, 228], [100, 200]])
def test_a_summary_agrees_with_the_prediction_of_all_members(cut: list[int]) -> None:
    samples = torch.stack((normal(300, 4, 2), normal(300, 4, 2, seed=1).exp()), dim=-1)
    stream = Stream(4, "gaussian")
    for piece in samples.split(cut):
        stream.add(piece)
    summary, whole = stream.summary, RegressionPrediction(samples[..., 0], samples[..., 1])
    assert isinstance(summary, RegressionSummary)
    for name in ("mean", "epistemic", "variance", "aleatoric", "total", "std", "standard_error"):
        torch.testing.assert_close(getattr(summary, name), getattr(whole, name), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(summary.standard_error_of_spread, whole.standard_error_of_spread)
    assert summary.members.tolist() == [300] * 4
    torch.testing.assert_close(summary.rescaled(-3.0, 2.0).total, whole.rescaled(-3.0, 2.0).total)
    torch.testing.assert_close(
        summary.rescaled(-3.0, 2.0).standard_error_of_spread, whole.rescaled(-3.0).standard_error_of_spread
    )
    assert torch.equal(summary.kept.samples, samples[: min(cut[0], 64), ..., 0])
    torch.testing.assert_close(summary.rows([2, 0]).mean, whole.mean[[2, 0]])
    assert torch.equal(
        summary.rows([2]).log_likelihood(torch.zeros(1, 2)),
        summary.kept.rows([2]).log_likelihood(torch.zeros(1, 2)),
    )


@pytest.mark.parametrize("cut", [[300], [32, 16, 24, 228]])
def test_a_summary_of_classes_agrees_with_the_prediction(cut: list[int]) -> None:
    probs = classes(300, 5, 3, scale=0.7)
    stream = Stream(5, "categorical")
    for piece in probs.split(cut):
        stream.add(piece)
    summary, whole = stream.summary, ClassificationPrediction(probs)
    assert isinstance(summary, ClassificationSummary)
    for name in (
        "probabilities",
        "label",
        "entropy",
        "expected_entropy",
        "mutual_information",
        "standard_error",
    ):
        torch.testing.assert_close(getattr(summary, name), getattr(whole, name), rtol=1e-9, atol=1e-12)
    # Early members were measured against the mean of their time: a matter of the second order.
    torch.testing.assert_close(
        summary.standard_error_of_spread, whole.standard_error_of_spread, rtol=0.1, atol=0.0
    )
    y = torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(summary.log_likelihood(y), whole.log_likelihood(y))
    assert summary.rows([1]).probabilities.shape == (1, 3)


def test_the_error_of_mutual_information_is_what_leaving_members_out_shows() -> None:
    probs = classes(200, 3, 4)
    keep = ~torch.eye(200, dtype=torch.bool)
    without = torch.stack([ClassificationPrediction(probs[k]).mutual_information for k in keep])
    jackknife = ((without - without.mean(0)).square().sum(0) * (199 / 200)).sqrt()
    torch.testing.assert_close(
        ClassificationPrediction(probs).standard_error_of_spread, jackknife, rtol=0.02, atol=0.0
    )


def test_the_error_of_two_tempered_classes_is_exact_and_of_more_a_bound() -> None:
    for number in (2, 5):
        probs = classes(40, 6, number)
        whole = ClassificationPrediction(probs, 2.5).standard_error
        summary = summarise(probs, "categorical")
        assert isinstance(summary, ClassificationSummary)
        tempered = ClassificationSummary(
            summary.disagreement, summary.converged, summary.not_finite, summary.kept, temperature=2.5
        )
        if number == 2:
            torch.testing.assert_close(tempered.standard_error, whole)
        assert bool((tempered.standard_error >= whole * (1 - 1e-9)).all())


def test_the_interval_is_the_normal_one_and_the_kept_members_have_their_own() -> None:
    samples = normal(64, 3)
    summary = summarise(samples)
    assert isinstance(summary, RegressionSummary)
    lower, upper = summary.interval(0.95)
    torch.testing.assert_close(upper - summary.mean, summary.std * stats.norm.ppf(0.975))
    torch.testing.assert_close(summary.mean - lower, summary.std * stats.norm.ppf(0.975))
    torch.testing.assert_close(summary.interval(factor=2.0).upper, summary.mean + 2 * summary.std)
    np.testing.assert_allclose(
        summary.kept.interval(0.9).lower.numpy(), np.quantile(samples.numpy(), 0.05, axis=0)
    )


# --- stopping ------------------------------------------------------------------------------------------


def reading(samples: Tensor, asked: list[tuple[int, ...]] | None = None):
    """What a committee would give, from samples that are already there; notes what it was asked."""

    def ask(rows: Tensor, start: int, stop: int) -> Tensor:
        if asked is not None:
            asked.append((len(rows), start, stop))
        return samples[start:stop, rows]

    return ask


def test_each_row_stops_by_itself_and_the_easy_ones_first() -> None:
    spread = torch.tensor([0.0, 0.05, 0.5, 1.0])
    samples = spread[:, None] * normal(2000, 4, 2)
    asked: list[tuple[int, ...]] = []
    summary = draw_until(reading(samples, asked), 4, 0.05, 2000)
    members = summary.members.tolist()
    assert members == sorted(members)
    assert members[0] == 32
    assert len(set(members)) == 3  # the two small ones at the first look
    assert summary.converged.all()
    assert float(summary.standard_error.max()) <= 0.05
    assert all(stop - start <= 64 for _, start, stop in asked)
    for b, m in enumerate(members):
        torch.testing.assert_close(summary.mean[b], samples[:m, b].mean(0))
        torch.testing.assert_close(summary.variance[b], samples[:m, b].var(0))


@settings(max_examples=12)
@given(order=st.permutations(range(5)), alone=st.integers(0, 4))
def test_a_row_stops_where_it_stops_in_any_company(order: list[int], alone: int) -> None:
    samples = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64) * normal(1000, 5)
    together = draw_until(reading(samples), 5, 0.06, 1000)
    shuffled = draw_until(reading(samples[:, order]), 5, 0.06, 1000)
    assert torch.equal(shuffled.members, together.members[order])
    torch.testing.assert_close(shuffled.variance, together.variance[order])
    single = draw_until(reading(samples[:, [alone]]), 1, 0.06, 1000)
    assert int(single.members) == int(together.members[alone])


def test_the_spread_has_a_tolerance_of_its_own() -> None:
    samples = normal(4000, 3)
    mean_only = draw_until(reading(samples), 3, (0.05, math.inf), 4000)
    spread_only = draw_until(reading(samples), 3, (math.inf, 0.02), 4000)
    # 1 / sqrt(n) = 0.05 takes 400; 1 / sqrt(2 n) = 0.02 takes 1250
    assert 350 <= int(mean_only.members.min()) <= int(mean_only.members.max()) <= 900
    assert 1100 <= int(spread_only.members.min()) <= int(spread_only.members.max()) <= 2800
    assert float(spread_only.standard_error_of_spread.max()) <= 0.02


def test_classes_stop_by_probability_and_by_mutual_information() -> None:
    probs = classes(3000, 6, 3)
    for limits in ((0.01, math.inf), (math.inf, 0.005), (0.01, 0.01)):
        summary = draw_until(reading(probs), 6, limits, 3000, likelihood="categorical")
        assert summary.converged.all()
        assert float(summary.standard_error.max()) <= limits[0]
        assert float(summary.standard_error_of_spread.max()) <= limits[1]
        assert int(summary.members.max()) < 3000


LAWS = {
    "normal": lambda g: torch.randn(1100, 3000, generator=g, dtype=torch.float64),
    "exponential": lambda g: -torch.rand(1100, 3000, generator=g, dtype=torch.float64).log() - 1,
    "one in ten": lambda g: (torch.rand(1100, 3000, generator=g) < 0.1).double() - 0.1,
}


@pytest.mark.parametrize(
    ("law", "within", "reported"),
    [("normal", 0.97, 0.93), ("exponential", 0.95, 0.89), ("one in ten", 0.92, 0.83)],
)
def test_what_stopping_early_does_to_the_promise(law: str, within: float, reported: float) -> None:
    # Seeded, so the figures never flicker; the docstring of draw_until states them over more rows and laws. The
    # standard error of a share near 0.9 of 3000 rows is 0.005, and the bounds lie two or more below what was seen.
    samples = LAWS[law](torch.Generator().manual_seed(17))
    scale = float(samples.std())
    for members in (50, 200):
        tolerance = scale / math.sqrt(members)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a few rows reach the maximum
            summary = draw_until(reading(samples), 3000, (tolerance, math.inf), 1100)
        assert float((summary.mean.abs() <= 2 * tolerance).double().mean()) >= within
        held = float((summary.mean.abs() <= 2 * summary.standard_error).double().mean())
        assert reported <= held <= 0.97


def test_outputs_that_come_together_stop_together() -> None:
    samples = [normal(900, 4, 2), normal(900, 4, seed=1) * torch.tensor([0.1, 1.0, 2.0, 0.1])]

    def ask(rows: Tensor, start: int, stop: int) -> list[Tensor]:
        return [each[start:stop, rows] for each in samples]

    one, other = draw_leaves_until(ask, 4, (0.1, math.inf), 900)
    assert torch.equal(one.members, other.members)
    assert torch.equal(one.converged, other.converged)
    each = [draw_until(reading(s), 4, (0.1, math.inf), 900).members for s in samples]
    assert torch.equal(one.members, torch.stack(each).amax(dim=0))
    torch.testing.assert_close(other.mean[2], samples[1][: int(other.members[2]), 2].mean())


def test_a_row_that_is_not_finite_is_named_and_touches_no_other() -> None:
    samples = normal(200, 4, 2)
    spoiled = samples.clone()
    spoiled[40, 2, 1] = math.inf
    spoiled[3, 1, 0] = math.nan
    asked: list[tuple[int, ...]] = []
    with pytest.warns(DropkitWarning, match="2 of 4 rows are not finite: rows 1, 2"):
        summary = draw_until(reading(spoiled, asked), 4, 0.09, 200)
    good = draw_until(reading(samples[:, [0, 3]]), 2, 0.09, 200)
    assert torch.equal(summary.mean[[0, 3]], good.mean)
    assert torch.equal(summary.standard_error_of_spread[[0, 3]], good.standard_error_of_spread)
    assert summary.not_finite.tolist() == [0, 1, 1, 0]
    assert summary.converged.tolist() == [True, False, False, True]
    assert summary.members.tolist()[1:3] == [32, 48]  # asked no further
    assert not summary.mean[1:3].isfinite().all(dim=-1).any()


def test_classes_that_are_not_finite_touch_no_other() -> None:
    probs = classes(64, 3, 4)
    spoiled = probs.clone()
    spoiled[5, 1] = math.nan
    with pytest.warns(DropkitWarning, match="1 of 3 rows are not finite: rows 1"):
        summary = draw_until(reading(spoiled), 3, None, 64, likelihood="categorical")
    assert torch.equal(summary.entropy[[0, 2]], summarise(probs, "categorical").entropy[[0, 2]])
    assert summary.entropy[1].isnan()
    whole = ClassificationPrediction(spoiled)
    assert whole.not_finite.tolist() == [0, 1, 0]
    assert whole.mutual_information.isnan().tolist() == [False, True, False]
    spoiled[5, 1, 0] = 0.5  # not all of it is unknown: no softmax gave that
    with pytest.raises(NotProbabilitiesError):
        ClassificationPrediction(spoiled)


def test_what_was_not_reached_is_said() -> None:
    with pytest.warns(DropkitWarning, match=r"not reached for 2 of 3 rows.*64 members\. About \d+ would do"):
        summary = draw_until(reading(torch.tensor([0.0, 1.0, 2.0]) * normal(64, 3)), 3, 0.01, 64)
    assert summary.converged.tolist() == [True, False, False]


def test_without_a_tolerance_all_members_are_met_in_pieces() -> None:
    asked: list[tuple[int, ...]] = []
    samples = normal(200, 3)
    summary = draw_until(reading(samples, asked), 3, None, 200)
    assert summary.members.tolist() == [200] * 3
    assert summary.converged.all()
    assert [a[1:] for a in asked] == [(0, 64), (64, 128), (128, 192), (192, 200)]
    torch.testing.assert_close(summary.variance, samples.var(0))


def test_no_rows_are_no_trouble() -> None:
    summary = draw_until(reading(normal(64, 0, 2)), 0, 0.1, 64)
    assert summary.mean.shape == (0, 2)


def test_two_machines_agree_with_one() -> None:
    samples = torch.stack((normal(90, 3), normal(90, 3, seed=1).exp()), dim=-1)
    halves = summarise(samples[:30], "gaussian"), summarise(samples[30:], "gaussian")
    both, one = halves[0].merged(halves[1]), summarise(samples, "gaussian")  # type: ignore[arg-type]
    assert isinstance(both, RegressionSummary)
    torch.testing.assert_close(both.total, one.total)
    torch.testing.assert_close(both.standard_error_of_spread, one.standard_error_of_spread)
    assert both.members.tolist() == [90] * 3


def test_looks_do_not_depend_on_rows() -> None:
    looks = [32]
    while looks[-1] < 1000:
        looks.append(next_look(looks[-1]))
    assert looks[:5] == [32, 48, 72, 112, 168]
    assert all(b <= 1.5 * a + 8 for a, b in itertools.pairwise(looks))


def test_mistakes_are_named() -> None:
    samples = normal(64, 3)
    for bad in (0.0, -1.0, math.nan, (0.1, 0.0), (0.1,), "0.1"):
        with pytest.raises(OptionError, match="positive standard error"):
            check_tolerance(bad)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="first"):
        draw_until(reading(samples), 3, 0.1, 64, first=1)
    with pytest.raises(OptionError, match="first"):
        draw_until(reading(samples), 3, 0.1, 16)
    with pytest.raises(ShapeError, match="for 4 rows"):
        draw_until(lambda i, a, b: samples[a:b], 4, 0.1, 64)
    with pytest.raises(ShapeError, match="gaussian"):
        summarise(samples, "gaussian")
    with pytest.raises(ShapeError, match="first piece"):
        Stream(3).add(samples[:, :1], torch.tensor([0]))
    with pytest.raises(ShapeError, match="no members"):
        _ = Stream(3).summary
    with pytest.raises(ShapeError, match="same rows"):
        CentralMoments.of(samples).merged(CentralMoments.of(samples[:, :2]))
    with pytest.raises(ShapeError, match="at least one member"):
        CentralMoments.of(samples[:0])
    with pytest.raises(ShapeError, match="two likelihoods"):
        summarise(samples).merged(summarise(torch.stack((samples, samples.exp()), -1), "gaussian"))  # type: ignore[arg-type]

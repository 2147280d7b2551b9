"""The inspection: its figures against closed forms, its advice against planted faults, its silence where none is.

Statistical checks ask for 3.5 standard errors at fixed seeds (one right value in 2000 fails, and then always).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropkit as dk
from dropkit.errors import MeasurementError, NoMaskError, OptionError, ShapeError, TableError
from dropkit.jobs import fit_table
from dropkit.measure.advice import CLEAR, MODEL_RULES, SITE_RULES, advise, beyond
from dropkit.measure.inspected import Inspection, ModelFigures, SiteInspection
from dropkit.measure.learned import learned
from dropkit.measure.site_figures import Estimate
from dropkit.measure.subject import subject_of
from dropkit.report.inspection import to_html
from dropkit.tables.inspection import inspect_table
from dropkit.tables.model import TableModel
from dropkit.tables.source import from_frame
from table_examples import QUICK, change_model, kinds, measurements
from test_browser import DRAWN, OVERLAPS, Opened, browser
from test_measure_penalty import ERRORS, OnceOnly, one_thread, table

__all__ = ["browser", "one_thread"]

ROWS = 200


def rules(found: Inspection) -> list[tuple[str, str]]:
    return [(finding.site, finding.rule) for finding in found.findings]


def near(figure: Estimate | None, expected: float, room: float = 0.0) -> None:
    assert figure is not None
    assert abs(figure.value - expected) < ERRORS * figure.error + room, (figure, expected)


# --- figures against what is known exactly ----------------------------------------------------------------


@pytest.fixture(scope="module")
def line() -> tuple[nn.Module, Tensor, Tensor, Tensor, Inspection]:
    """A linear model with dropout on its inputs, of which all is known in closed form."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64) + torch.tensor([0.0, 0.0, 1.0, 2.0])
    w = torch.tensor([1.0, -2.0, 0.5, 0.25], dtype=torch.float64)
    y = x @ w + 0.3 * torch.randn(ROWS, generator=generator, dtype=torch.float64)
    model = nn.Sequential(dk.nn.Dropout(0.25), nn.Linear(4, 1)).double()
    with torch.no_grad():
        model[1].weight.copy_(w[None])
        model[1].bias.zero_()
    return model, x, y, w, dk.inspect(model, x, y, members=400, batch=8, columns=["a", "b", "c", "d"])


def test_a_deep_inspection_reads_three_instruments_more(line) -> None:
    model, x, y, _, found = line
    deep = dk.inspect(model, x[:40], y[:40], members=8, deep=True)
    more = {"flatness", "capacity", "stability"}
    assert not more & {reading.instrument for reading in found.readings}
    assert more <= {reading.instrument for reading in deep.readings}, deep.skipped


def test_noise_over_signal_is_the_ratio_of_two_variances(line) -> None:
    _, x, _, _, found = line
    (site,) = found.sites
    ratio = (1 / 3) * float(x.square().mean(dim=0).sum() / x.var(dim=0).sum())
    assert site.noise is not None
    assert site.noise.value == pytest.approx(ratio, rel=1e-9)
    assert site.offset is not None
    assert site.offset.value == pytest.approx(3 * ratio, rel=1e-9)


def test_the_jackknife_of_noise_over_signal_is_that_of_leaving_out_each_row(line) -> None:
    _, x, _, _, found = line
    ratios = []
    for row in range(ROWS):
        rest = torch.cat((x[:row], x[row + 1 :]))
        ratios.append(float(rest.square().mean(dim=0).sum() / rest.var(dim=0).sum()) / 3)
    mean = sum(ratios) / ROWS
    error = math.sqrt((ROWS - 1) / ROWS * sum((r - mean) ** 2 for r in ratios))
    assert found.sites[0].noise is not None
    assert found.sites[0].noise.error == pytest.approx(error, rel=1e-6)


def test_what_reaches_the_prediction_is_that_of_the_linear_model(line) -> None:
    _, x, _, w, found = line
    added = (1 / 3) * float((x * w).square().sum(dim=1).mean())
    near(found.sites[0].reach, added / float((x @ w).var()))
    assert found.sites[0].share == Estimate(1.0, 0.0)  # there is one site


def test_the_gradients_added_variance_is_that_of_every_mask_visited(line) -> None:
    """All 16 masks of each row are visited: the variance over masks, mean over rows, for a batch of 8."""
    _, x, y, w, found = line
    added = torch.zeros(())
    gradients, chances = [], []
    for keep in itertools.product([0.0, 1.0], repeat=4):
        masked = x * torch.tensor(keep, dtype=torch.float64) / 0.75
        residual = 2 * (masked @ w - y)
        gradients.append(torch.cat((residual[:, None] * masked, residual[:, None]), dim=1))
        chances.append(math.prod(0.75 if k else 0.25 for k in keep))
    stacked, weights = torch.stack(gradients), torch.tensor(chances, dtype=torch.float64)[:, None, None]
    mean = (weights * stacked).sum(dim=0)
    added = (weights * (stacked - mean).square()).sum(dim=(0, 2)).mean() / 8
    plain = 2 * (x @ w - y)[:, None] * torch.cat((x, torch.ones(ROWS, 1, dtype=torch.float64)), dim=1)
    spread = plain.var(dim=0, unbiased=False).sum() / 8
    near(found.sites[0].gradient, float(added / spread))
    bias = (mean.mean(dim=0) - plain.mean(dim=0)).norm() / plain.mean(dim=0).norm()
    assert found.sites[0].bias == pytest.approx(float(bias), rel=0.05)


def test_the_penalty_and_who_pays_it_are_those_of_the_instrument(line) -> None:
    _, x, _, w, found = line
    (site,) = found.sites
    exact = (1 / 3) * float((w.square() * x.square().mean(dim=0)).sum())
    assert site.predicted == pytest.approx(exact, rel=1e-6)
    near(site.penalty, exact)
    assert site.dearest == "b"  # the weight of -2
    assert site.reads_x


def test_what_was_learned_is_the_variance_less_the_residual(line) -> None:
    model, x, y, w, found = line
    known = learned(subject_of(model, x, y))
    assert known is not None
    assert known[0] == pytest.approx(float(y.var(unbiased=False)), rel=1e-6)
    gain = (y - y.mean()).square() - (x @ w - y).square()
    assert known[1].value == pytest.approx(float(gain.mean()), rel=1e-6)
    assert known[1].error == pytest.approx(float(gain.std()) / math.sqrt(ROWS), rel=1e-4)
    assert found.figures.gain == known[1]


def test_the_best_constant_of_a_classifier_is_the_shares_of_the_classes() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(60, 3, generator=generator), torch.arange(60) % 3 // 2
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    known = learned(subject_of(model, x, y))
    shares = torch.bincount(y) / 60
    assert known is not None
    assert known[0] == pytest.approx(float(-(shares * shares.log()).sum()), rel=1e-4)


def test_shares_of_sites_are_of_the_spread_under_all(line) -> None:
    """Two linear sites one after another: the second sees the noise of the first, so that shares sum to below 1."""
    _, x, y, w, _ = line
    model = nn.Sequential(
        dk.nn.Dropout(0.1), nn.Linear(4, 4, bias=False), dk.nn.Dropout(0.5), nn.Linear(4, 1)
    )
    model.double()
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(4))
        model[3].weight.copy_(w[None])
        model[3].bias.zero_()
    found = dk.inspect(model, x, y, members=200)
    parts = (x * w).square().sum(dim=1).mean()
    one, two = float(0.1 / 0.9 * parts), float(parts)
    both = (1 + 1 / 9) * 2 * float(parts) - float(parts)  # E m1^2 m2^2 h^2 - h^2
    near(found.sites[0].share, one / both)
    near(found.sites[1].share, two / both)


def test_the_norm_behind_is_named_with_what_it_sees() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    y = x.sum(dim=1)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    (site,) = dk.inspect(model, x, y, members=32).sites
    weight = model[1].weight.detach()
    quiet = (x @ weight.T).var(dim=0, unbiased=False)
    noisy = quiet + (x.square() @ weight.square().T).mean(dim=0)  # p/(1-p) = 1
    assert site.norm == "2"
    assert site.shift is not None
    near(site.shift, 1 / float((quiet / noisy).mean()), room=0.01)


# --- advice -----------------------------------------------------------------------------------------------


def trained(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def classes() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 8, generator=generator)
    return x, (x[:, :3].sum(dim=1) > 0).long()


def network(rate: float, *behind: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(rate), nn.Linear(16, 8), *behind)


def head(*, norm: bool = False, last: float = 0.0) -> list[nn.Module]:
    return [nn.BatchNorm1d(8)] * norm + [nn.ReLU(), nn.Linear(8, 2)] + [nn.Dropout(last)] * bool(last)


def test_a_high_rate_before_batchnorm_is_found_and_named(classes) -> None:
    x, y = classes
    found = dk.inspect(
        trained(network(0.9, *head(norm=True)), x, y, nn.functional.cross_entropy), x, y, members=32
    )
    assert {("2", "variance shift"), ("2", "noise")} <= set(rules(found))
    text = {finding.rule: finding.message for finding in found.findings}
    assert "BatchNorm '4'" in text["variance shift"]
    assert "times its signal" in text["noise"]
    assert "Lower p, or move it behind BatchNorm '4'" in text["noise"]
    weights = [finding.weight for finding in found.findings if finding.weight is not None]
    assert weights == sorted(weights, reverse=True)
    assert min(weights) > 1


def test_dropout_on_the_output_is_found_and_comes_first(classes) -> None:
    x, y = classes
    found = dk.inspect(
        trained(network(0.1, *head(last=0.3)), x, y, nn.functional.cross_entropy), x, y, members=16
    )
    assert rules(found)[0] == ("6", "last layer")
    assert found.findings[0].weight is None


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_where_nothing_is_wrong_nothing_is_said(classes, rate: float) -> None:
    x, y = classes
    found = dk.inspect(trained(network(rate, *head()), x, y, nn.functional.cross_entropy), x, y, members=32)
    assert found.findings == ()
    assert "Nothing to change" in found.to_text()


def test_an_untrained_network_gets_no_advice_for_its_hidden_layers(classes) -> None:
    x, y = classes
    assert dk.inspect(network(0.9, *head()), x, y, members=16).findings == ()


def test_a_column_far_from_centred_is_found_on_the_input() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(ROWS, 5, generator=generator)
    x[:, 0] += 30
    y = x.sum(dim=1)
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 1))
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[1].bias.zero_()
    found = dk.inspect(model, x, y, members=32, columns=["year", "b", "c", "d", "e"])
    assert ("0", "far from centred") in rules(found)
    assert ("0", "noise") not in rules(found)
    assert ("0", "loud feature") in rules(found)
    assert found.sites[0].loud == ("year",)
    assert "'year' alone pays" in next(f.message for f in found.findings if f.rule == "loud feature")


def test_new_rows_that_fare_worse_are_overfitting(classes) -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(40, 8, generator=generator), torch.randint(0, 2, (40,), generator=generator)
    model = trained(network(0.05, *head()), x, y, nn.functional.cross_entropy)
    new = torch.randn(300, 8, generator=generator), torch.randint(0, 2, (300,), generator=generator)
    found = dk.inspect(model, (x, y), new=new, members=8)
    assert ("", "overfitting") in rules(found)
    assert any(reading.instrument == "generalization_gap" for reading in found.readings)


def test_a_model_worse_than_a_constant_is_told_so(classes) -> None:
    x, y = classes
    model = trained(network(0.1, *head()), x, 1 - y, nn.functional.cross_entropy)
    found = dk.inspect(model, x, y, members=8)
    assert ("", "nothing learned") in rules(found)


FIGURES = ModelFigures(
    loss="loss", plain=0.1, constant=1.0, gain=Estimate(0.9, 0.01), penalty=None, gradient=None, batch=32, gap=None,
    power=None,
)  # fmt: skip
SITE = SiteInspection(
    site="s", what="Dropout", where="", mode="eval", rate=0.5, width=16, reads_x=True, loud=("unit 3",), norm="bn",
    penalty=Estimate(0.3, 0.0),
)  # fmt: skip
PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "noise": ({"reach": Estimate(1.0, 0.0), "offset": Estimate(1.0, 0.0)}, "noise"),
    "far from centred": ({"reach": Estimate(1.0, 0.0), "offset": Estimate(50.0, 0.0)}, "noise"),
    "penalty": ({}, "undone"),
    "variance shift": ({}, "shift"),
    "gradient noise": ({"undone": Estimate(0.3, 0.0)}, "gradient"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_advice_comes_above_the_limit_by_three_errors_and_not_before(name: str) -> None:
    others, field = PLANTED[name]
    limit = next(rule.limit for rule in SITE_RULES if rule.name == name)
    quiet = replace(SITE, **others)

    def said(value: float, error: float) -> list[tuple[str, float | None]]:
        site = replace(quiet, **{field: Estimate(value, error)})
        return [(f.rule, f.weight) for f in advise((site,), FIGURES) if f.rule == name]

    error = 0.1 * limit
    assert said(limit, 0.0) == []
    assert said(limit + 0.99 * CLEAR * error, error) == []
    ((_, weight),) = said(limit + 1.01 * CLEAR * error, error)
    assert weight == pytest.approx(1 + 0.01 * CLEAR * 0.1)
    assert said(math.nan, 0.0) == []


def test_every_rule_of_a_site_is_planted_above() -> None:
    assert {rule.name for rule in SITE_RULES} - set(PLANTED) == {"loud feature"}
    assert {rule.name for rule in MODEL_RULES} == {"nothing learned", "overfitting", "memory"}
    assert beyond(None, 1.0) is None


def test_a_memory_that_explodes_is_told_of() -> None:
    (finding,) = advise((), replace(FIGURES, power=Estimate(40.0, 1.0)))
    assert (finding.rule, finding.site) == ("memory", "")
    assert advise((), replace(FIGURES, power=Estimate(40.0, 11.0))) == ()


# --- what cannot be measured ------------------------------------------------------------------------------


class Branching(nn.Module):
    """Cannot be recorded: its way depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(x)
        return self.out(h) if h.sum() > 0 else -self.out(h)


def test_what_cannot_run_is_a_line_and_no_crash() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    found = dk.inspect(Branching(), x, x.sum(dim=1), members=4)
    assert {skip.instrument for skip in found.skipped} == {"coadaptation", "figures of each site"}
    assert all("cannot be recorded" in skip.why for skip in found.skipped)
    assert found.sites[0].noise is None
    assert "figures of each site: not measured:" in found.to_text()
    assert {reading.instrument for reading in found.readings} >= {"penalty", "gradient_noise"}


def test_a_layer_without_a_second_derivative_is_named_and_the_rest_is_measured() -> None:
    x, y = table()
    model = nn.Sequential(dk.nn.Dropout(0.2), nn.Linear(4, 3), OnceOnly(), nn.Linear(3, 1)).double()
    found = dk.inspect(model, x, y, members=4)
    assert {skip.instrument for skip in found.skipped} >= {"penalty", "gradient_bias"}
    assert all("layer '2'" in skip.why for skip in found.skipped)
    (site,) = found.sites
    assert site.predicted is None
    assert site.penalty is not None
    assert site.gradient is not None


def test_a_rate_for_each_feature_has_no_figures_that_would_be_wrong() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    model = nn.Sequential(dk.nn.Dropout(torch.tensor([0.1, 0.2, 0.3, 0.4])), nn.Linear(4, 1))
    found = dk.inspect(model, x, x.sum(dim=1), members=4)
    assert found.sites[0].penalty is None
    assert ["figures of each site"] == [skip.instrument for skip in found.skipped]


def test_a_silent_site_is_listed_and_a_layer_called_twice_is_two_sites() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.silent = nn.Dropout(0.3), nn.Dropout(0.0)
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.silent(self.drop(self.one(self.drop(x)).relu())))

    torch.manual_seed(0)
    x = torch.randn(30, 4)
    found = dk.inspect(Twice(), x, x.sum(dim=1), members=4)
    assert [site.site for site in found.sites] == ["drop", "drop, call 2", "silent"]
    assert "silent: the rate is 0" in found.to_text()


def test_bad_input_is_refused_in_words() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    y = x.sum(dim=1)
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 1))
    for wrong, given, error, said in (
        (nn.Linear(4, 1), (x, y), NoMaskError, "nothing draws a mask"),
        (
            nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 1)),
            (x, y),
            NoMaskError,
            "every rate of this model is 0",
        ),
        (model, (x[:7], y[:7]), ShapeError, "at least 8"),
        (model, (x, y[:5]), ShapeError, "each row needs one"),
        (model, (x / 0, y), MeasurementError, "Look for NaN"),
        (model, (x,), ShapeError, "without targets"),
    ):
        with pytest.raises(error, match=said):
            dk.inspect(wrong, *given)
    with pytest.raises(OptionError, match="members=3"):
        dk.inspect(model, x, y, members=3)


def test_too_few_rows_for_the_asked_error_say_how_many_would_do() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 4).exp()
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 1))
    rough = dk.inspect(model, x, x.sum(dim=1), members=4).sites[0].noise
    assert rough is not None
    share = rough.error / rough.value
    with pytest.raises(MeasurementError, match=r"Give about 16[01] rows"):
        dk.inspect(model, x, x.sum(dim=1), members=4, tolerance=share / 2)
    assert dk.inspect(model, x, x.sum(dim=1), members=4, tolerance=2 * share).rows == 40


def test_the_model_is_left_as_it_was_and_equal_seeds_give_equal_records(classes) -> None:
    x, y = classes
    model = network(0.4, *head(norm=True)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    one, two = (dk.inspect(model, x, y, members=6, rows=50, seed=9) for _ in range(2))
    assert one.rows == 50
    assert one.to_json() == two.to_json()
    assert (
        one.sites[0].noise != dk.inspect(model, x, y, members=6, rows=50, seed=10).sites[0].noise
    )  # other rows
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert one.sites[0].mode == "train"
    json.loads(one.to_json())


# --- the page ---------------------------------------------------------------------------------------------


def test_the_page_holds_every_finding_escaped_and_asks_nobody(line) -> None:
    model, x, y, _, _ = line
    found = dk.inspect(model, x, y, members=8, columns=["<b>a", "b", "c", "d"])
    hostile = replace(
        found,
        findings=advise((replace(SITE, site="<script>x", shift=Estimate(9.0, 0.1)),), FIGURES),
        sites=(replace(found.sites[0], site="<script>x", dearest="<b>a"),),
    )
    page = to_html(hostile, source="<model>", command="dropkit inspect m t.csv")
    assert "<script>x" not in page
    assert "<b>a" not in page
    assert "&lt;script&gt;x" in page
    assert "in evaluation BatchNorm" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page == to_html(hostile, source="<model>", command="dropkit inspect m t.csv")


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (1280, "dark")])
def test_the_page_in_a_browser(line, browser, tmp_path: Path, width: int, scheme: str) -> None:
    found = line[4]
    site = replace(found.sites[0], gradient=Estimate(30.0, 2.0), undone=Estimate(0.02, 0.001))
    names = ("encoder.layer.0.attention.self:attention", "<script>x", "z")
    many = replace(found, sites=tuple(replace(site, site=name) for name in names))
    (tmp_path / "page.html").write_text(to_html(many, source="m"), encoding="utf-8")
    tab = Opened(browser, tmp_path / "page.html", width, scheme)
    try:
        (figure,) = tab.page.evaluate(DRAWN)
        assert figure["name"] == "sites"
        assert figure["shapes"] >= 3 * 4
        assert tab.page.evaluate(OVERLAPS) == []
        assert (tab.complaints, tab.asked) == ([], [])
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    finally:
        tab.context.close()


def test_many_sites_are_ranked_by_their_share(line) -> None:
    found = line[4]
    many = replace(
        found,
        sites=tuple(replace(found.sites[0], site=f"s{i}", share=Estimate(i / 20, 0.0)) for i in range(20)),
    )
    text = many.to_text()
    assert "s19 (" in text
    assert "s3 (" not in text
    assert "8 more sites stand in the JSON." in text


# --- tables -----------------------------------------------------------------------------------------------


def test_a_fitted_table_is_inspected_with_its_columns(tmp_path: Path) -> None:
    frame = measurements()
    fit_table(from_frame(frame, "t"), "y", tmp_path / "m", QUICK)
    change_model(tmp_path / "m", lambda data: data["network"].update(input_rate=0.2))
    gaps = from_frame(frame.assign(y=frame.y.where(frame.index > 60)), "t")
    found = inspect_table(tmp_path / "m", gaps, members=4, new=from_frame(measurements(seed=1), "n"))
    assert found.rows == 59
    assert found.figures.loss == "negative log-likelihood"
    assert found.figures.gap is not None
    site = found.sites[0]
    assert site.site == "input_dropout"
    assert site.reads_x
    assert site.dearest in TableModel.read(tmp_path / "m").encoder.feature_names
    with pytest.raises(TableError, match="lacks the target 'y'"):
        inspect_table(tmp_path / "m", from_frame(frame.drop(columns="y"), "t"))
    with pytest.raises(TableError, match="2 rows with a target"):
        inspect_table(tmp_path / "m", from_frame(frame.assign(y=frame.y.where(frame.index > 117)), "t"))


def test_a_fitted_classifier_is_inspected_by_its_probabilities(tmp_path: Path) -> None:
    fit_table(from_frame(kinds(), "k"), "kind", tmp_path / "k", QUICK)
    known = TableModel.read(tmp_path / "k")
    found = inspect_table(known, from_frame(kinds(), "k"), members=4, rows=40)
    assert found.rows == 40
    site = next(site for site in found.sites if site.rate)
    x = torch.from_numpy(known.encoder.transform(from_frame(kinds(), "k").sample(40)).matrix)
    with torch.no_grad():
        probabilities = known.network(x).softmax(dim=-1).double()
        noisy = []
        for member in range(4):
            with dk.masks(seed=0, member=member, samples=torch.arange(40)):
                noisy.append(known.network(x).softmax(dim=-1).double())
    pairs = [(noisy[k] - noisy[k + 1]).square().mean() / 2 for k in (0, 2)]
    expected = sum(pairs) / 2 / probabilities.var(dim=0).mean()
    assert sum(s.reach.value / s.share.value for s in found.sites if s.reach and s.share) / sum(
        1 for s in found.sites if s.reach
    ) == pytest.approx(float(expected), rel=1e-4)
    assert site.noise is not None

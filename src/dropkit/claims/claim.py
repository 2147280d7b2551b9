"""A claim as declared before it is tried: what the article says, what is predicted, and the rule of the verdict.

    claim = statement + condition + rules, fixed;     experiment(setting) -> findings;     verdict = rules(findings)

An experiment measures; it never decides. What counts as "holds" stands in the rules, which are data, written down
with the claim, so that no verdict can follow the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dropkit.errors import OptionError

Verdict = Literal["holds", "holds within", "does not hold here"]
LEVEL = 0.95  # of the intervals by which a difference counts as seen


@dataclass(frozen=True, slots=True)
class Setting:
    """How an experiment is run.

    Attributes:
        seeds: independent repetitions, at least 5.
        seed: the first of them.
        full: the long form; without it all claims together take minutes on two cores.
    """

    seeds: int = 5
    seed: int = 0
    full: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure with its error.

    Attributes:
        value: what was measured.
        standard_error: of the value; 0 for exact identities.
        predicted: what the formula says; None where the rule compares with a constant.
        degrees: of freedom of the error (seeds - 1); infinity where it comes from many draws.
        predicted_error: standard error of the prediction, 0 where it is exact.
    """

    value: float
    standard_error: float
    predicted: float | None = None
    degrees: float = math.inf
    predicted_error: float = 0.0

    @property
    def error(self) -> float:
        """Standard error of value - predicted."""
        return math.hypot(self.standard_error, self.predicted_error)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a figure must be for its part of the claim to hold.

    Attributes:
        quantity: key of the figure in the findings.
        says: what is compared, in words with units: "test error without dropout minus with, percent".
        kind: "equal": |value - predicted| is at most `tolerance` standard errors, or, beyond that, at most
            `relative` of the prediction ("holds within").
            "above", "below": the two-sided interval of level 0.95 lies above (below) `bound`.
            "shown": no part of the verdict; printed beside it (published figures, context).
        bound: for "above" and "below".
        tolerance: standard errors, for "equal".
        relative: share of the prediction, for "equal"; 0: errors alone decide.
    """

    quantity: str
    says: str
    kind: Literal["equal", "above", "below", "shown"]
    bound: float = 0.0
    tolerance: float = 3.0
    relative: float = 0.0

    def judge(self, found: Measured) -> Verdict | None:
        """The verdict on one figure; None for one that is only shown.

        A figure that is not finite never holds.
        """
        if self.kind == "shown":
            return None
        if not is_finite(found, predicted=self.kind == "equal"):
            return "does not hold here"
        if self.kind == "equal":
            return self._judge_equal(found)
        half = critical(found.degrees) * found.error
        return "holds" if self._distance(found) > half else "does not hold here"

    def reason(self, found: Measured) -> str:
        """In a few words how a figure misses its rule, or how nearly it keeps it; "" where there is nothing to add.

        "opposite": the interval lies on the other side of the bound. "no difference seen": it holds the bound.
        """
        verdict = self.judge(found)
        if verdict in (None, "holds"):
            return ""
        if not is_finite(found, predicted=self.kind == "equal"):
            return "not a finite number"
        if self.kind == "equal":
            return self._reason_equal(found, verdict)
        half = critical(found.degrees) * found.error
        if self._distance(found) < -half:
            return f"opposite (interval lies {'below' if self.kind == 'above' else 'above'} {self.bound:g})"
        seen = "no difference seen" if self.bound == 0 else "not told apart"
        return f"{seen} (interval holds {self.bound:g})"

    def in_words(self) -> str:
        """What is asked of the figure: "within 3 standard errors of the prediction", "interval above 0"."""
        if self.kind == "shown":
            return "shown beside it"
        if self.kind != "equal":
            return f"{100 * LEVEL:g} % interval {self.kind} {self.bound:g}"
        allowed = f", or {100 * self.relative:g} % of it" if self.relative else ""
        return f"within {self.tolerance:g} standard errors of the prediction{allowed}"

    def _distance(self, found: Measured) -> float:
        """How far the figure lies on the right side of the bound."""
        return found.value - self.bound if self.kind == "above" else self.bound - found.value

    def _judge_equal(self, found: Measured) -> Verdict:
        assert found.predicted is not None  # or it would not be finite
        off = abs(found.value - found.predicted)
        rounding = 1e-9 * max(abs(found.value), abs(found.predicted))
        if off <= self.tolerance * found.error + rounding:
            return "holds"
        return "holds within" if off <= self.relative * abs(found.predicted) else "does not hold here"

    def _reason_equal(self, found: Measured, verdict: Verdict | None) -> str:
        assert found.predicted is not None
        off = found.value - found.predicted
        share = f"{digits(100 * abs(off / found.predicted))} %" if found.predicted else digits(abs(off))
        if verdict == "holds within":
            return f"off by {share}, {100 * self.relative:g} % allowed"
        errors = (
            f"{digits(abs(off) / found.error)} standard errors" if found.error else "exact, without error"
        )
        return f"off by {share} ({errors})"


def is_finite(found: Measured, *, predicted: bool) -> bool:
    """Whether a figure and its error are numbers; with `predicted`, its prediction too."""
    asked = (found.value, found.error, found.predicted if predicted else 0.0)
    return all(value is not None and math.isfinite(value) for value in asked)


@dataclass(frozen=True, slots=True)
class Series:
    """One line, set of points or bars of a chart.

    Attributes:
        name: in the legend.
        x: positions; y: values; error: half widths of the intervals, or empty.
        style: "measured" (points joined by a line), "predicted" (a line without points), "bars", "points".
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    error: tuple[float, ...] = ()
    style: Literal["measured", "predicted", "bars", "points"] = "measured"


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure as plain data; the report draws it.

    Attributes:
        name: letters and dashes, one per claim.
        caption: what is seen, with data set, seeds and what the bars are.
        x_label, y_label: with units.
        series: what is drawn.
        x_log, y_log: whether an axis is logarithmic.
        x_names: names in place of positions 0, 1, 2 ... on the x axis.
        level: a dashed horizontal line, for a published figure or a target; None for none.
        level_name: what the line is.
    """

    name: str
    caption: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False
    x_names: tuple[str, ...] = ()
    level: float | None = None
    level_name: str = ""


@dataclass(frozen=True, slots=True)
class Findings:
    """What an experiment found.

    Attributes:
        figures: {quantity: figure}, one for each rule of the claim.
        charts: at least one.
        data: which data set, how many rows, and where it is from.
        setup: model, budget and seeds in one or two sentences; a shortfall against a published protocol is said here.
        remarks: sentences a reader needs to understand the verdict.
    """

    figures: Mapping[str, Measured]
    charts: tuple[Chart, ...]
    data: str
    setup: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of the article.

    Attributes:
        name: for the command line: lower case, digits and underscores.
        title: a few words.
        article: what the article says, in our words.
        prediction: the formula or the sign that is expected, and its source.
        condition: under which the article's sentence is true; "" where it needs none.
        rules: what decides, and what is shown beside it; fixed before the run.
        experiment: Setting -> Findings.
        extras: names of the optional extras it needs, for the error where one is missing.
        seconds: of one core that the short form takes, roughly; the longest start first.
    """

    name: str
    title: str
    article: str
    prediction: str
    condition: str
    rules: tuple[Rule, ...]
    experiment: Callable[[Setting], Findings]
    extras: tuple[str, ...] = ()
    seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Judged:
    """One rule with its figure and its verdict.

    Attributes:
        rule: what was asked.
        found: the figure.
        verdict: None where the figure is only shown.
        reason: how it misses, or how nearly it holds; "" where there is nothing to add.
    """

    rule: Rule
    found: Measured
    verdict: Verdict | None
    reason: str = ""


def digits(value: float) -> str:
    """A positive number with two digits, or all that stand before its point."""
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}".replace(",", "\u202f")


def judge(claim: Claim, findings: Findings) -> tuple[Verdict, tuple[Judged, ...]]:
    """The verdict on a claim: that of its weakest deciding rule.

    Raises:
        OptionError: the findings and the rules do not name the same figures, or a figure lacks the prediction that
            its rule compares with.
    """
    asked, found = {rule.quantity for rule in claim.rules}, set(findings.figures)
    if asked != found:
        raise OptionError(f"Claim {claim.name}: rules and findings differ in {sorted(asked ^ found)}.")
    for rule in claim.rules:
        if rule.kind == "equal" and findings.figures[rule.quantity].predicted is None:
            raise OptionError(f"{rule.quantity} has no prediction; a rule of kind 'equal' needs one.")
    judged = tuple(judge_figure(rule, findings.figures[rule.quantity]) for rule in claim.rules)
    if all(one.verdict is None for one in judged):
        raise OptionError(f"Claim {claim.name} has no rule that decides.")
    return weakest(judged), judged


def judge_figure(rule: Rule, found: Measured) -> Judged:
    """One figure under its rule."""
    return Judged(rule, found, rule.judge(found), rule.reason(found))


def weakest(judged: Sequence[Judged]) -> Verdict:
    """The weakest of some verdicts, at least one of which decides."""
    order: tuple[Verdict, ...] = ("does not hold here", "holds within", "holds")
    return min((one.verdict for one in judged if one.verdict is not None), key=order.index)


def critical(degrees: float) -> float:
    """Half width of the two-sided interval of level 0.95, in standard errors (Student's t)."""
    from scipy import stats

    return float(
        stats.norm.isf((1 - LEVEL) / 2) if math.isinf(degrees) else stats.t.isf((1 - LEVEL) / 2, degrees)
    )

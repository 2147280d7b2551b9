"""A claim as declared before it is tried: what the article says, what is predicted, and the rule of the verdict.

    claim = statement + condition + rules, fixed;     experiment(setting) -> findings;     verdict = rules(findings)

An experiment measures; it never decides. What counts as "holds" stands in the rules, which are data, written down
with the claim, so that no verdict can follow the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
        if not math.isfinite(found.value) or not math.isfinite(found.error):
            return "does not hold here"
        if self.kind == "equal":
            return self._judge_equal(found)
        half = critical(found.degrees) * found.error
        distance = found.value - self.bound if self.kind == "above" else self.bound - found.value
        return "holds" if distance > half else "does not hold here"

    def _judge_equal(self, found: Measured) -> Verdict:
        if found.predicted is None:
            raise OptionError(f"{self.quantity} has no prediction; a rule of kind 'equal' needs one.")
        off = abs(found.value - found.predicted)
        rounding = 1e-9 * max(abs(found.value), abs(found.predicted))
        if off <= self.tolerance * found.error + rounding:
            return "holds"
        return "holds within" if off <= self.relative * abs(found.predicted) else "does not hold here"


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
    """

    name: str
    title: str
    article: str
    prediction: str
    condition: str
    rules: tuple[Rule, ...]
    experiment: Callable[[Setting], Findings]
    extras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """One rule with its figure and its verdict (None: only shown)."""

    rule: Rule
    found: Measured
    verdict: Verdict | None


def judge(claim: Claim, findings: Findings) -> tuple[Verdict, tuple[Judged, ...]]:
    """The verdict on a claim: that of its weakest deciding rule.

    Raises:
        OptionError: the findings and the rules do not name the same figures.
    """
    asked, found = {rule.quantity for rule in claim.rules}, set(findings.figures)
    if asked != found:
        raise OptionError(f"Claim {claim.name}: rules and findings differ in {sorted(asked ^ found)}.")
    judged = tuple(
        Judged(rule, findings.figures[rule.quantity], rule.judge(findings.figures[rule.quantity]))
        for rule in claim.rules
    )
    verdicts = [one.verdict for one in judged if one.verdict is not None]
    order: tuple[Verdict, ...] = ("does not hold here", "holds within", "holds")
    if not verdicts:
        raise OptionError(f"Claim {claim.name} has no rule that decides.")
    return min(verdicts, key=order.index), judged


def critical(degrees: float) -> float:
    """Half width of the two-sided interval of level 0.95, in standard errors (Student's t)."""
    from scipy import stats

    return float(
        stats.norm.isf((1 - LEVEL) / 2) if math.isinf(degrees) else stats.t.isf((1 - LEVEL) / 2, degrees)
    )

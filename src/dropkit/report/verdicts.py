"""The headline and the cards: what was learned, how good, how sure, each judged against chance."""

from __future__ import annotations

import math

from dropkit.evaluation import ClassificationEvaluation, RegressionEvaluation
from dropkit.report.blocks import Card, Tone
from dropkit.report.record import FitReport
from dropkit.report.wording import (
    FEWEST_ROWS,
    count,
    listed,
    measured,
    number,
    percent,
    quoted,
    score_of,
    standing,
    verdict,
)

# The measure that decides, and the one that also asks how sure the model was.
MAIN = {"regression": ("RMSE", "NLL"), "classification": ("accuracy", "log loss")}


def headline(report: FitReport) -> str:
    """What was learned, how good, how sure."""
    held, target = report.held_out, quoted(report.data.target)
    rows = f"On {count(held.rows, 'row')} it had never seen"
    if isinstance(held, RegressionEvaluation):
        rmse, inside = score_of(held.scores, "RMSE"), score_of(held.scores, "coverage")
        return (
            f"{rows}, {target} is predicted with a typical error of {measured(rmse.value, rmse.standard_error)}, "
            f"and the {percent(held.level)} interval holds the truth in {percent(inside.value)} of them."
        )
    accuracy = score_of(held.scores, "accuracy")
    found = f"{target} is named right in {percent(accuracy.value, 1)}"
    return f"{rows}, {found} of cases; {confidence_sentence(held)}."


def confidence_sentence(held: ClassificationEvaluation) -> str:
    """How far confidence is from accuracy, over all rows."""
    bins = held.reliability.after
    sure = sum(b.confidence * b.count for b in bins) / held.rows
    right = sum(b.accuracy * b.count for b in bins) / held.rows
    error = score_of(held.scores, "accuracy").standard_error
    mean = f"its mean confidence is {percent(sure, 1)}"
    if held.rows < FEWEST_ROWS:
        return f"{mean}, which so few rows cannot judge"
    if abs(sure - right) <= 2 * error:
        return f"{mean}, the same within chance"
    return f"{mean}, so it is {'too sure' if sure > right else 'not sure enough'} of itself"


def subline(report: FitReport) -> str:
    """What the error means, and how the alternatives do."""
    held = report.held_out
    if isinstance(held, RegressionEvaluation):
        rmse = score_of(held.scores, "RMSE").value
        spread = held.target_std
        explained = 1 - (rmse / spread) ** 2 if spread > 0 else math.nan
        if not math.isfinite(explained):
            first = "All held-out rows have the same true value, so there is no variation to explain."
        elif explained > 0:
            first = (
                f"That explains {percent(explained)} of the variance (R² = {explained:.2f}); naming the mean "
            )
            first += f"of these rows errs by {number(spread)}."
        else:
            first = f"That is no better than naming the mean of these rows, which errs by {number(spread)}."
    else:
        largest = max(sum(row) for row in held.confusion) / held.rows
        first = f"The commonest class alone makes up {percent(largest, 1)} of these rows."
    if report.comparison is None or len(report.comparison.models) < 2:
        return first
    return f"{first} {verdict(report.comparison.models[1:], MAIN[report.data.task][0], held.rows)}"


def cards(report: FitReport) -> tuple[Card, ...]:
    """The verdicts at a glance."""
    held = report.held_out
    own = (
        regression_cards(held, report.data.validation_rows)
        if isinstance(held, RegressionEvaluation)
        else classification_cards(held)
    )
    return (*own, knows_card(report), *rank_card(report), rate_card(report))


def regression_cards(held: RegressionEvaluation, validation_rows: int) -> tuple[Card, Card]:
    """Error and coverage; chance enters coverage by the held-out rows and by those the interval was fitted on."""
    rmse, inside, width = (score_of(held.scores, name) for name in ("RMSE", "coverage", "width"))
    chance = math.sqrt(held.level * (1 - held.level) * (1 / held.rows + 1 / (validation_rows + 2)))
    return (
        Card(
            "Typical error (RMSE)",
            measured(rmse.value, rmse.standard_error),
            f"the target itself varies by {number(held.target_std)} (standard deviation)",
        ),
        Card(
            f"{percent(held.level)} interval holds",
            f"{percent(inside.value)}",
            f"of held-out rows; chance allows ± {100 * 2 * chance:.0f} points; mean width {number(width.value)}",
            tone_of(abs(inside.value - held.level) / chance) if held.rows >= FEWEST_ROWS else "plain",
        ),
    )


def classification_cards(held: ClassificationEvaluation) -> tuple[Card, Card]:
    """Accuracy and calibration."""
    accuracy, ece = score_of(held.scores, "accuracy"), score_of(held.scores, "ECE")
    largest = max(sum(row) for row in held.confusion) / held.rows
    return (
        Card(
            "Right on held-out rows",
            f"{percent(accuracy.value, 1)}",
            f"± {100 * accuracy.standard_error:.1f} points; the commonest class: {percent(largest, 1)}",
        ),
        Card(
            "Calibration error (ECE)",
            percent(ece.value, 1),
            "mean distance of confidence from accuracy; before calibration "
            f"{percent(held.reliability.error_before, 1)}",
        ),
    )


def tone_of(sigmas: float) -> Tone:
    """Green within two standard errors, amber within four, red beyond."""
    return "good" if sigmas <= 2 else "fair" if sigmas <= 4 else "bad"


def knows_card(report: FitReport) -> Card:
    """Does it know when it is wrong?"""
    spread = report.held_out.spread
    label = "Knows when it is wrong"
    if spread.rank_correlation is None or spread.rank_correlation_error is None:
        return Card(label, "cannot tell", "no variation in error or in certainty on these rows")
    if report.held_out.rows < FEWEST_ROWS:
        return Card(label, "cannot tell", f"{count(report.held_out.rows, 'held-out row')} are too few")
    r, error = spread.rank_correlation, spread.rank_correlation_error
    doubt = "predicted std" if isinstance(report.held_out, RegressionEvaluation) else "entropy"
    note = f"rank correlation of {doubt} and error {r:.2f} ± {error:.2f}".replace("-", "−")
    if spread.detection is not None:
        note = f"a wrong row is the less certain one in {percent(spread.detection)} of pairs; {note}"
    if r > 2 * error:
        return Card(label, "clearly" if r > 0.3 else "somewhat", note, "good" if r > 0.3 else "fair")
    return Card(label, "no" if r < -2 * error else "not shown", note, "bad" if r < -2 * error else "fair")


def rank_card(report: FitReport) -> tuple[Card, ...]:
    """The place among the alternatives on the main measure."""
    if report.comparison is None or len(report.comparison.models) < 2:
        return ()
    measure = MAIN[report.data.task][0]
    rows = report.held_out.rows
    if rows < FEWEST_ROWS:
        return (Card("Against alternatives", "cannot tell", f"{count(rows, 'held-out row')} are too few"),)
    places = [standing(score_of(model.scores, measure), rows) for model in report.comparison.models[1:]]
    worse, level, better = (sum(place == p for place in places) for p in (-1, 0, 1))
    words = [
        f"{n} {word}"
        for n, word in ((better, "clearly worse"), (level, "level"), (worse, "clearly better"))
        if n
    ]
    value = "ahead of all" if better == len(places) else "not beaten" if not worse else "beaten"
    tone: Tone = "good" if better == len(places) else "bad" if worse else "plain"
    note = f"of {len(places)} alternatives on {measure}: {listed(words)} (2 standard errors)"
    return (Card("Against alternatives", value, note, tone),)


def rate_card(report: FitReport) -> Card:
    """The rate that won."""
    model = report.model
    if report.search is None:
        return Card("Dropout rate", f"p = {model.rate:g}", "given, not searched for")
    note = f"chosen from {count(len(report.search.trials), 'candidate')} by validation likelihood"
    if model.rate == 0 and model.input_rate == 0:
        return Card("Dropout rate", "p = 0", f"{note}: no dropout was best", "fair")
    if model.rate == 0:
        return Card("Dropout rate", f"inputs p = {model.input_rate:g}", f"{note}; hidden units p = 0")
    return Card("Dropout rate", f"p = {model.rate:g}", f"{note}; on inputs p = {model.input_rate:g}")

"""What the report says about held-out rows: how good, how sure, compared with what."""

from __future__ import annotations

import math

from dropkit.evaluation import ClassificationEvaluation, RegressionEvaluation
from dropkit.evaluation.records import Score
from dropkit.report.blocks import Plot, Section, Table
from dropkit.report.record import FitReport
from dropkit.report.verdicts import MAIN, confidence_sentence
from dropkit.report.wording import (
    CLEAR,
    count,
    cut,
    file_name,
    listed,
    measured,
    number,
    percent,
    quoted,
    score_of,
    standing,
    verdict,
)


def setting(report: FitReport) -> str:
    """Rows, members and seed: what each caption ends with."""
    rows, model = report.held_out.rows, report.model
    return f"{count(rows, 'held-out row')}, {count(model.members, 'member')}, seed {model.seed}."


def comparison(report: FitReport) -> Section | None:
    """dropkit beside what a user would pick instead."""
    found = report.comparison
    if found is None:
        return None
    measures = [score.name for score in found.models[0].scores]
    shown = labels(report)
    main = MAIN[report.data.task]
    rows = tuple(
        (model.name, *(cell(score_of(model.scores, measure), found.rows) for measure in measures))
        for model in found.models
    )
    table = Table(
        caption=f"± one standard error over the {count(found.rows, 'held-out row')}; ▲ ▼ clearly better or worse than "
        "dropkit on the same rows (paired difference beyond two standard errors).",
        header=("model", *(shown[measure] for measure in measures)),
        rows=rows,
        numeric=(False, *([True] * len(measures))),
        marked=0,
    )
    here = (
        [verdict(found.models[1:], measure, found.rows) for measure in main] if len(found.models) > 1 else []
    )
    details = "; ".join(f"{model.name}: {model.detail}" for model in found.models[1:])
    head = f"{shown[main[0]]} and {shown[main[1]]}"
    reading = "The alternatives learned from the same training rows and are scored on the same held-out rows"
    if found.training_rows < found.all_training_rows:
        reading = (
            f"The alternatives learned from {count(found.training_rows, 'row')}, evenly spaced over all "
        )
        reading += f"{found.all_training_rows:,}, and are scored on the same held-out rows".replace(
            ",", "\u202f", 1
        )
    if report.data.task == "regression":
        reading += "; as they name one number only, they get Gaussian noise of constant width and conformal intervals "
        reading += "from their residuals on the validation rows"
    return Section(
        "comparison",
        "Against what you would pick instead",
        tuple(here),
        reading=f"{reading}. {details[:1].upper()}{details[1:]}." if details else f"{reading}.",
        plot=Plot(
            "models",
            f"{head} of {listed([m.name for m in found.models if not m.constant])}, with standard errors.",
            f"{head[:1].upper()}{head[1:]}, ± one standard error over rows; the constant prediction is in the table "
            f"only. {setting(report)}",
        ),
        tables=(table,),
    )


def labels(report: FitReport) -> dict[str, str]:
    """Column heads of the measures."""
    level = percent(report.held_out.level) if isinstance(report.held_out, RegressionEvaluation) else ""
    return {
        "RMSE": "RMSE",
        "MAE": "MAE",
        "NLL": "NLL [nats]",
        "coverage": f"in {level} interval",
        "width": "mean width",
        "accuracy": "accuracy",
        "log loss": "log loss [nats]",
        "Brier": "Brier",
        "ECE": "ECE",
    }


def cell(score: Score, rows: int) -> str:
    """One score in the table, with a mark where the other model is clearly better or worse."""
    if score.name in {"coverage", "accuracy"}:
        text = f"{100 * score.value:.1f} ± {100 * score.standard_error:.1f}\u202f%"
    else:
        text = measured(score.value, score.standard_error)
    # nearer to nominal, not higher, is better for coverage; a narrower interval is better only at equal coverage
    mark = 0 if score.name in {"coverage", "width", "ECE"} else -standing(score, rows)
    return text + {1: " ▲", -1: " ▼", 0: ""}[mark]


def predictions(report: FitReport) -> Section:
    """Predicted against true, or the confusion matrix."""
    held, target = report.held_out, report.data.target
    if isinstance(held, RegressionEvaluation):
        inside = score_of(held.scores, "coverage").value
        epistemic = sum(e**2 for e in held.points.epistemic)
        share = epistemic / (epistemic + sum(a**2 for a in held.points.aleatoric))
        divided = (
            f"{percent(share)} of the predicted variance is epistemic (the members disagree), {percent(1 - share)} is "
            "aleatoric (noise the members see in the data). How far they disagree depends on the rate as well as on "
            "the data."
            if epistemic > 0
            else "All of the predicted variance is aleatoric, noise the members see in the data: they agree exactly."
        )
        return Section(
            "predictions",
            "Predicted against true",
            (
                f"{percent(inside)} of the {count(held.rows, 'held-out row')} fall inside their "
                f"{percent(held.level)} interval.",
                divided,
            ),
            reading="Each dot is one held-out row, its bar the calibrated interval. Dots on the dashed line are "
            "right; a bar that crosses the line holds the truth.",
            plot=Plot(
                "predicted",
                f"Predicted against true {target} with intervals: {percent(inside)} of rows inside.",
                f"True and predicted {cut(target)}, in its own unit; bars: calibrated {percent(held.level)} interval"
                f"{thinned(len(held.points.row), held.rows, 800)}. {setting(report)}",
            ),
        )
    confused = sorted(
        (
            (held.confusion[i][j], i, j)
            for i in range(len(held.classes))
            for j in range(len(held.classes))
            if i != j
        ),
        key=lambda item: (-item[0], item[1:]),
    )
    if confused and confused[0][0]:
        n, i, j = confused[0]
        total = sum(held.confusion[i])
        worst = f"The commonest mistake: {quoted(held.classes[i])} taken for {quoted(held.classes[j])}, "
        worst += f"{n} of {count(total, 'row')} of that class."
    else:
        worst = "No held-out row is taken for another class."
    right = sum(held.confusion[k][k] for k in range(len(held.classes)))
    few = [c for c, row in zip(held.classes, held.confusion, strict=True) if sum(row) == 0]
    here = [f"{right} of {count(held.rows, 'held-out row')} are named right. {worst}"]
    if few:
        here.append(
            f"No held-out row belongs to {listed([quoted(c) for c in few[:5]])}{' and others' if len(few) > 5 else ''}."
        )
    shown = f"; the 20 commonest of {len(held.classes)} classes" if len(held.classes) > 20 else ""
    return Section(
        "predictions",
        "Which classes are taken for which",
        tuple(here),
        reading="Rows are true classes, columns predicted ones; numbers count held-out rows, the colour is the share "
        "within the true class. Right answers lie on the diagonal.",
        plot=Plot(
            "confusion",
            f"Confusion matrix of {len(held.classes)} classes: {right} of {held.rows} rows right. {worst}",
            f"True class against predicted class, counts of rows{shown}. {setting(report)}",
        ),
    )


def thinned(kept: int, rows: int, drawn: int) -> str:
    """Says so if a figure shows some of the rows only."""
    return f"; {min(kept, drawn)} of {count(rows, 'row')} drawn, evenly spaced" if rows > drawn else ""


def calibration(report: FitReport) -> Section:
    """Coverage or reliability, before and after."""
    held = report.held_out
    if isinstance(held, RegressionEvaluation):
        table = held.coverage
        off = [
            max(abs(a - b) for a, b in zip(table.level, side, strict=True))
            for side in (table.before, table.after)
        ]
        chance = max(math.sqrt(v * (1 - v) / held.rows) for v in table.level)
        at = min(range(len(table.level)), key=lambda k: abs(table.level[k] - held.level))
        here = (
            f"The committee’s own {percent(table.level[at])} interval holds {percent(table.before[at])} of the "
            f"held-out rows, the calibrated one {percent(table.after[at])}.",
            f"Over all levels the observed share is at most {100 * off[0]:.0f} points away from the nominal one before "
            f"and {100 * off[1]:.0f} after; one standard error of chance is up to {100 * chance:.0f} points with "
            f"{count(held.rows, 'row')}.",
            check_sentence(report),
        )
        return Section(
            "calibration",
            "Are the intervals as wide as they should be?",
            here,
            reading="On the diagonal, an interval holds the truth as often as it says; below it the intervals are too "
            "narrow (too sure), above it too wide. Inside the band, chance alone explains the difference.",
            plot=Plot(
                "coverage",
                f"Observed against nominal coverage, before and after calibration. {here[0]}",
                "Nominal level against the share of held-out rows inside; before: the mixture of the members’ "
                f"Gaussians; after: split conformal on the validation rows. {setting(report)}",
            ),
        )
    table_of = held.reliability
    error = score_of(held.scores, "ECE").standard_error
    change = table_of.error_after - table_of.error_before
    moved = f"from {percent(table_of.error_before, 1)} to {percent(table_of.error_after, 1)}"
    moved += f" (± {100 * error:.0f} points)" if math.isfinite(error) and error > 0 else ""
    way = "falls" if change < -error else "rises" if change > error else "hardly moves"
    flattened = "flattens" if table_of.temperature > 1 else "sharpens"
    temperature = (
        "The temperature stays 1: on the validation rows no other gained more than chance."
        if table_of.temperature == 1
        else f"A temperature of {number(table_of.temperature)} {flattened} the probabilities; the calibration error "
        f"on the held-out rows {way}, {moved}."
    )
    right = percent(score_of(held.scores, "accuracy").value, 1)
    here = (
        temperature,
        f"It is right in {right} of cases; {confidence_sentence(held)}.",
        check_sentence(report),
    )
    return Section(
        "calibration",
        "Can its probabilities be taken at their word?",
        here,
        reading="Of rows predicted with 80 % confidence, 80 % should be right: then points lie on the diagonal. "
        "Points below it mean too sure, above it not sure enough. The bars below count the rows.",
        plot=Plot(
            "reliability",
            f"Accuracy against confidence, before and after calibration. {temperature}",
            "Confidence in the predicted class against accuracy, in tenths, ± one standard error; below: rows in "
            f"each tenth. {setting(report)}",
        ),
    )


def check_sentence(report: FitReport) -> str:
    """Which rows may flatter the calibration, and which cannot."""
    chose = "the epoch" if report.search is None else "the rate and the epoch"
    return (
        f"The {count(report.data.validation_rows, 'validation row')} that calibrate also helped to choose {chose}, so "
        "they may flatter; the held-out rows had no part in any of it and are the check."
    )


def error_against_spread(report: FitReport) -> Section:
    """Does the committee know when it is wrong?"""
    held, bins = report.held_out, report.held_out.spread.bins
    regression = isinstance(held, RegressionEvaluation)
    write = number if regression else percent
    spread = "predicted standard deviation" if regression else "entropy"
    ends = [(b.count, write(b.observed), write(b.expected)) for b in (bins[0], bins[-1])]
    if len(bins) == 1:
        what = "a root mean squared error of" if regression else "a share of wrong rows of"
        first = f"{count(held.rows, 'row')} make one group only, with {what} {ends[0][1]} (foreseen: {ends[0][2]})."
    elif regression:
        first = (
            f"The root mean squared error is {ends[0][1]} on the {ends[0][0]} most certain rows (foreseen: "
            f"{ends[0][2]}) and {ends[1][1]} on the {ends[1][0]} least certain ones (foreseen: {ends[1][2]})."
        )
    else:
        first = (
            f"Of the {ends[0][0]} most certain rows {ends[0][1]} are wrong (foreseen: {ends[0][2]}), of the "
            f"{ends[1][0]} least certain ones {ends[1][1]} (foreseen: {ends[1][2]})."
        )
    axes = (
        f"root mean squared error and predicted standard deviation, both in the unit of {cut(report.data.target)}"
        if regression
        else "share of wrong rows and mean chance to be wrong, as predicted"
    )
    return Section(
        "spread",
        "Does the committee know when it is wrong?",
        (first, correlation_sentence(report)),
        reading=f"Held-out rows in order of their {spread}, the most certain on the left, in groups of equal size. "
        "Bars that rise to the right say that errors are found where they are foreseen; diamonds at the top of the "
        "bars say that they have the foreseen size, too.",
        plot=Plot(
            "error-spread",
            f"Error found and error foreseen in {count(len(bins), 'group')} of rows. {first}",
            f"Groups of rows by {spread} against {axes}; ± two standard errors. {setting(report)}",
        ),
    )


def correlation_sentence(report: FitReport) -> str:
    """The rank correlation in words."""
    spread = report.held_out.spread
    if spread.rank_correlation is None:
        return "Error or spread does not vary on these rows, so their correlation is not defined."
    error = spread.rank_correlation_error
    if error is None:
        return "There are too few rows for a correlation of spread with error."
    r = f"{spread.rank_correlation:.2f} ± {error:.2f}".replace("-", "−")
    sure = "is" if abs(spread.rank_correlation) > CLEAR * error else "is not clearly"
    way = "better" if spread.rank_correlation < 0 and sure == "is" else "worse"
    doubt = "predicted standard deviation" if isinstance(report.held_out, RegressionEvaluation) else "entropy"
    tail = (
        f" A wrong row has more entropy than a right one in {percent(spread.detection)} of pairs."
        if spread.detection is not None
        else ""
    )
    return (
        f"Spearman’s rank correlation of error with {doubt} is {r}: a more uncertain row {sure} a {way} predicted "
        f"one.{tail}"
    )


def least_certain(report: FitReport) -> Section | None:
    """The rows to look at first."""
    held = report.held_out
    if not held.uncertain:
        return None
    regression = isinstance(held, RegressionEvaluation)
    names = list(dict.fromkeys(name for row in held.uncertain for name, _ in row.cells))
    rows = tuple(
        (
            f"{row.row}",
            cut(row.prediction),
            cut(row.true),
            number(row.spread),
            *(dict(row.cells).get(name, "") for name in names),
        )
        for row in held.uncertain
    )
    spread = "predicted std" if regression else "entropy [nats]"
    tail = ""
    if isinstance(held, ClassificationEvaluation):
        tail = f" of at most {number(math.log(max(len(held.classes), 2)))} possible"
    return Section(
        "least-certain",
        "The rows it is least sure about",
        (
            f"These {len(rows)} of {count(held.rows, 'held-out row')} have the largest "
            f"{'predicted standard deviation' if regression else 'entropy'}, up to "
            f"{number(held.uncertain[0].spread)}{tail}. Look here "
            "first for wrong entries, rare cases and missing columns.",
        ),
        tables=(
            Table(
                caption=f"Row numbers count the rows of {file_name(report.data.source)} from 1. Prediction and truth "
                + (
                    f"in the unit of {cut(report.data.target)}."
                    if regression
                    else "are classes, with the probability of the predicted one."
                ),
                header=("row", "predicted", "true", spread, *names),
                rows=rows,
                numeric=(True, regression, regression, True, *([False] * len(names))),
            ),
        ),
    )

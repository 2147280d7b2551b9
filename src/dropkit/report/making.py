"""What the report says about how the model came to be: the rate, the training, the members, the data, the command."""

from __future__ import annotations

import math

from dropkit.report.blocks import Plot, Section, Table
from dropkit.report.record import ColumnSummary, FitReport, ModelSummary, Search, Trial
from dropkit.report.wording import count, cut, file_name, measured, number, percent, quoted

TRIALS_SHOWN, COLUMNS_SHOWN = 12, 200
# A Monte Carlo error below this share of the spread changes no reading of it.
KNOWN_WELL = 0.1
NO_SPREAD = (
    "The members agree exactly: without dropout they are one network, so there is no spread to measure."
)


def search(report: FitReport) -> Section | None:
    """The rate's trade-off."""
    if report.search is None or not report.search.trials:
        return None
    found, chosen = report.search, report.search.trials[report.search.chosen]
    line = best_at_each_rate(found)
    lost = sum(not math.isfinite(trial.validation_loss) for trial in found.trials)
    here = [found.verdict or search_verdict(found)]
    if len(line) > 1:
        low, high = line[0], line[-1]
        here.append(
            f"From p = {low.rate:g} to p = {high.rate:g} the gap goes from {number(low.gap)} to "
            f"{number(high.gap)} nats, and the epochs until converged from {low.epochs:g} to {high.epochs:g}."
        )
    if lost:
        here.append(f"{count(lost, 'candidate')} diverged: no loss could be computed.")
    order = sorted(range(len(found.trials)), key=lambda k: worst_last(found.trials[k]))[:TRIALS_SHOWN]
    shown = f"The {len(order)} best of {len(found.trials)} candidates"
    if len(order) == len(found.trials):
        shown = "All candidates, the best first"
    return Section(
        "rate",
        "What dropout costs and what it buys",
        tuple(here),
        reading="Each point of a line is the best candidate with that rate on hidden units, whatever its width, its "
        "weight decay and its rate on inputs. The lowest loss wins, but no dropout at all wins only where nothing with "
        "dropout comes within one standard error, row by row: a committee needs masks. Noise in training tends to "
        "make the gap smaller and the way longer. The winner of many looks better here than it is; the held-out rows "
        "are the check.",
        plot=Plot(
            "trade-off",
            f"Validation loss, gap and epochs against the rate for {count(len(found.trials), 'candidate')}. {here[0]}",
            "Rate against the committee’s validation loss (± one standard error over rows), gap at the best epoch "
            f"with masks off, and epochs until converged; {division(found)}seed {report.model.seed}.",
        ),
        tables=(
            Table(
                caption=f"{shown}, losses in nats per row; chosen: p = {chosen.rate:g}.",
                header=("rate", "input rate", "width", "weight decay", "validation loss", "gap", "epochs"),
                rows=tuple(trial_row(found.trials[k]) for k in order),
                numeric=(True,) * 7,
                marked=order.index(found.chosen) if found.chosen in order else -1,
                folded=True,
            ),
        ),
    )


def division(found: Search) -> str:
    """How the rows that were not held out were divided for the search, as the start of a clause."""
    if found.rows == 0:
        return ""
    rows = count(found.rows, "row")
    return f"{found.folds} folds of {rows}, " if found.folds > 1 else f"one division of {rows}, "


def best_at_each_rate(search: Search) -> list[Trial]:
    """For each rate the trial with the smallest validation loss, by ascending rate."""
    best: dict[float, Trial] = {}
    for trial in sorted(search.trials, key=worst_last):
        if not math.isfinite(trial.validation_loss):
            break
        best.setdefault(trial.rate, trial)
    return [best[rate] for rate in sorted(best)]


def worst_last(trial: Trial) -> float:
    """Validation loss as a sorting key; one that is not finite comes last."""
    return trial.validation_loss if math.isfinite(trial.validation_loss) else math.inf


def trial_row(trial: Trial) -> tuple[str, ...]:
    """One candidate as a row of texts."""
    loss = measured(trial.validation_loss, trial.standard_error)
    widths = f"{trial.rate:g}", f"{trial.input_rate:g}", f"{trial.width}", f"{trial.weight_decay:g}"
    return (*widths, loss, number(trial.gap), f"{trial.epochs:g}")


def search_verdict(found: Search) -> str:
    """Which rate won and whether it beats no dropout by more than chance."""
    chosen = found.trials[found.chosen]
    plain = [trial for trial in found.trials if trial.rate == 0 and trial.input_rate == 0]
    if chosen.rate == 0 and chosen.input_rate == 0:
        return f"Of {count(len(found.trials), 'candidate')}, no dropout was best: p = 0 has the lowest validation loss."
    won = f"p = {chosen.rate:g} on hidden units and {chosen.input_rate:g} on inputs won"
    if not plain:
        return f"Of {count(len(found.trials), 'candidate')}, {won}."
    best = min(plain, key=worst_last)
    gain = best.validation_loss - chosen.validation_loss
    clear = "more" if abs(gain) > chosen.standard_error else "less"
    return (
        f"Of {count(len(found.trials), 'candidate')}, {won}: {number(abs(gain), 2)} nats per row "
        f"{'below' if gain >= 0 else 'above'} the best network without dropout, {clear} than one standard error of "
        f"the loss ({number(chosen.standard_error, 2)})."
    )


def learning(report: FitReport) -> Section | None:
    """Learning curves with the gap."""
    curves = report.curves
    if curves is None or not curves.epoch:
        return None
    at = min(range(len(curves.epoch)), key=lambda k: abs(curves.epoch[k] - curves.best_epoch))
    gap = curves.validation[at] - curves.training[at]
    last = curves.validation[-1] - curves.validation[at]
    after = (
        f"; by epoch {curves.epoch[-1]}, when training stopped, it had risen by {number(last)}"
        if last > 0
        else ""
    )
    here = (
        f"Validation loss is lowest at epoch {curves.best_epoch}, whose weights are kept, with a gap of "
        f"{number(gap)} nats to the training loss{after}.",
    )
    return Section(
        "learning",
        "How it learned",
        here,
        reading="Both curves fall while the network learns what holds for new rows, too; where the validation curve "
        "turns up and the shaded gap opens, it learns the training rows by heart.",
        plot=Plot(
            "learning",
            f"Training and validation loss over {curves.epoch[-1]} epochs. {here[0]}",
            f"Epoch against negative log-likelihood in nats per row, masks off, on "
            f"{count(report.data.training_rows, 'training row')} and "
            f"{count(report.data.validation_rows, 'validation row')}; seed {report.model.seed}.",
        ),
    )


def members(report: FitReport) -> Section | None:
    """Were enough members asked?"""
    curve = report.members
    if curve is None:
        return None
    spread, error = curve.spread[-1], curve.monte_carlo_error[-1]
    numbers = curve.quantity == "standard deviation"
    unit = f"in the unit of {cut(report.data.target)}" if numbers else "in nats"
    if spread <= 0:
        return Section("members", "Were enough members asked?", (NO_SPREAD,))
    share = error / spread
    found = (
        f"the mean {curve.quantity} between members is {measured(spread, error)}{'' if numbers else ' nats'}"
    )
    known = f"With {curve.members[-1]} members {found}, known"
    if share < KNOWN_WELL:
        here = f"{known} to within {percent(share)} (one standard error): more members would change little."
    else:
        here = f"{known} only to within {percent(share)}; ask more members where that matters."
    return Section(
        "members",
        "Were enough members asked?",
        (here,),
        reading="Spread between members as committees of growing size see it. Small committees see too little of it; "
        "where the curve is flat, more members would change nothing but the Monte Carlo error.",
        plot=Plot(
            "members",
            f"Mean {curve.quantity} against members asked. {here}",
            f"Members (doubling) against mean {curve.quantity} between members {unit}, ± Monte Carlo error of one "
            f"committee of that size; {count(curve.rows, 'held-out row')}, seed {report.model.seed}.",
        ),
    )


def data(report: FitReport) -> Section:
    """Rows, columns and what was done to them."""
    found = report.data
    kept = [column for column in found.columns if column.used]
    here = [
        f"{count(found.rows, 'row')}: {count(found.training_rows, 'row')} to learn from, "
        f"{count(found.validation_rows, 'row')} to validate and calibrate with, "
        f"{count(found.test_rows, 'row')} held out for this report.",
        quotes(f"{found.task_reason[:1].upper()}{found.task_reason[1:].rstrip('.')}.", found.target),
    ]
    if report.search is not None and report.search.folds > 1:
        here[0] += (
            f" The rate was chosen in {report.search.folds} folds of the {count(report.search.rows, 'row')} that are "
            "not held out."
        )
    if found.columns:
        dropped = len(found.columns) - len(kept)
        here.append(
            f"{count(len(kept), 'column')} used"
            + (f", {dropped} dropped (the note says why)." if dropped else ".")
        )
    here += [
        sentence(warning, found.columns) for warning in found.warnings if not told(warning, found.columns)
    ]
    rows = tuple(
        (
            cut(column.name),
            column.kind if column.used else "dropped",
            f"{column.missing} ({percent(column.missing / found.rows)})"
            if column.missing and found.rows
            else "0",
            f"{column.distinct}",
            column.note,
        )
        for column in found.columns[:COLUMNS_SHOWN]
    )
    shown = (
        f"The first {COLUMNS_SHOWN} of {len(found.columns)} columns"
        if len(found.columns) > COLUMNS_SHOWN
        else "Columns"
    )
    table = Table(
        caption=f"{shown} of {file_name(found.source)} besides the target.",
        header=("column", "kind", "missing", "distinct", "note"),
        rows=rows,
        numeric=(False, False, True, True, False),
        folded=len(rows) > 12,
    )
    return Section("data", "The data", tuple(here), tables=(table,) if rows else ())


def told(warning: str, columns: tuple[ColumnSummary, ...]) -> bool:
    """Whether the note of a column that is shown says the same."""
    shown = columns[:COLUMNS_SHOWN]
    return any(c.note and warning.startswith(repr(c.name)) and c.note in warning for c in shown)


def sentence(warning: str, columns: tuple[ColumnSummary, ...]) -> str:
    """A warning with the page's quotes around the column it begins with, and a full stop."""
    for column in columns:
        if warning.startswith(repr(column.name)):
            warning = quotes(warning, column.name)
    return warning if warning.endswith(".") else f"{warning}."


def quotes(text: str, name: str) -> str:
    """Text with a name in the page's quotes where it stands in a program's."""
    return text.replace(repr(name), quoted(name), 1)


def reproduce(report: FitReport) -> Section:
    """The same model again."""
    model = report.model
    here = [network_sentence(model)]
    if report.timing is not None:
        seconds = report.timing
        search = f"Search: {number(seconds.search, 2)} s. " if seconds.search > 0 else ""
        here.append(
            f"{search}Training: {number(seconds.training, 2)} s; {number(seconds.total, 2)} s in all."
        )
    here.append(
        "The same command gives the same model, bit for bit, on the same machine with the same versions."
    )
    return Section(
        "again",
        "The same again",
        tuple(here),
        tables=(
            Table(
                caption="What the run depended on.",
                header=("", ""),
                rows=(("seed", f"{model.seed}"), *model.versions),
                numeric=(False, False),
            ),
        ),
        code=model.command,
    )


def network_sentence(model: ModelSummary) -> str:
    """The network in one sentence."""
    layers = " → ".join(f"{units}" for units in model.hidden) or "no"
    return (
        f"A multilayer perceptron with hidden layers {layers} ({count(model.parameters, 'parameter')}), dropout "
        f"p = {model.rate:g} on hidden units and {model.input_rate:g} on inputs, weight decay "
        f"{model.weight_decay:g}, with the weights of epoch {model.epochs}; "
        f"{count(model.members, 'thinned network')} in the committee."
    )

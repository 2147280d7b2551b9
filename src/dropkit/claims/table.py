"""The table of claims: claim, predicted, measured with its error, verdict. For a terminal; the page uses its cells."""

from __future__ import annotations

import textwrap

from dropkit.claims.claim import Judged, Verdict
from dropkit.claims.record import Outcome, Results

MARKS: dict[Verdict, str] = {"holds": "✓", "holds within": "≈", "does not hold here": "✗"}
FEW = 3  # claims; so many or fewer are printed with all of their figures


def to_text(results: Results, width: int = 100) -> str:
    """The table, the claims that miss their rules with the reason, and a line of counts.

    Args:
        results: what was found.
        width: columns of the terminal.
    """
    header = ("claim", "decided by", "predicted", "measured", "verdict")
    rows = [main_row(one) for one in results.outcomes]
    rows += [(one.name, "", "", "", one.status) for one in results.unfinished]
    lines = columns([header, *rows], width) if rows else []
    for one in results.outcomes:
        if len(results.outcomes) <= FEW:
            lines += ["", *textwrap.wrap(f"{one.name}: {one.title}", width)]
            lines += columns([figure_row(figure) for figure in one.figures], width)
        elif reason := one.deciding.reason:
            said = f"{one.name}: {one.deciding.rule.says}: {reason}."
            lines += textwrap.wrap(said, width, initial_indent="  ", subsequent_indent="    ")
    for left in results.unfinished:
        said = f"{left.name} {'failed' if left.status == 'failed' else 'was not run'}: {left.line}"
        lines += textwrap.wrap(said, width, initial_indent="  ", subsequent_indent="    ")
    return "\n".join([*(line.rstrip() for line in lines), "", counts(results)]) + "\n"


def counts(results: Results) -> str:
    """One line: 16 claims: 12 hold, 1 holds within its margin, 2 do not hold here, 1 failed. 5 seeds from 0."""
    from dropkit.report.wording import count

    every = len(results.outcomes) + len(results.unfinished)
    parts = [
        (results.count("holds"), "hold", "holds"),
        (results.count("holds within"), "hold within their margin", "holds within its margin"),
        (results.count("does not hold here"), "do not hold here", "does not hold here"),
        (sum(one.status == "failed" for one in results.unfinished), "failed", "failed"),
        (sum(one.status == "not run" for one in results.unfinished), "were not run", "was not run"),
    ]
    said = ", ".join(f"{number} {one if number == 1 else many}" for number, many, one in parts if number)
    return f"{count(every, 'claim')}{': ' + said if said else ''}. {setting_in_words(results)}."


def setting_in_words(results: Results) -> str:
    """Seeds and form."""
    chosen = results.setting
    return f"{chosen.seeds} seeds from {chosen.seed}, {'long' if chosen.full else 'short'} form"


def main_row(outcome: Outcome) -> tuple[str, ...]:
    """A claim by its deciding figure."""
    one = outcome.deciding
    verdict = f"{MARKS[outcome.verdict]} {outcome.verdict}"
    return (outcome.name, one.rule.says, predicted(one), measured(one), verdict)


def figure_row(one: Judged) -> tuple[str, ...]:
    """One figure of a claim, with the reason where it has one."""
    verdict = f"{MARKS[one.verdict]} {one.reason or one.verdict}" if one.verdict else "  shown beside it"
    return ("", one.rule.says, predicted(one), measured(one), verdict)


def predicted(one: Judged) -> str:
    """What a figure should be: a number with its error, or which side of the bound."""
    from dropkit.report.wording import measured as with_error

    if one.rule.kind in ("above", "below"):
        return f"{'>' if one.rule.kind == 'above' else '<'} {one.rule.bound:g}".replace("-", "−")
    if one.found.predicted is None:
        return ""
    return with_error(one.found.predicted, one.found.predicted_error)


def measured(one: Judged) -> str:
    """A figure with its standard error."""
    from dropkit.report.wording import measured as with_error

    return with_error(one.found.value, one.found.standard_error)


def columns(rows: list[tuple[str, ...]], width: int) -> list[str]:
    """Rows in columns: words to the left, the third and fourth to the right; the second gives way to the width."""
    from dropkit.report.wording import cut, printable

    shown = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(len(row[k]) for row in shown) for k in range(5)]
    gaps = 2 * 4
    free = width - gaps - widths[0] - widths[2] - widths[3] - widths[4]
    widths[1] = max(min(widths[1], free), 12)
    return [
        "  ".join(
            (
                row[0].ljust(widths[0]),
                cut(row[1], widths[1]).ljust(widths[1]),
                row[2].rjust(widths[2]),
                row[3].rjust(widths[3]),
                row[4],
            )
        )
        for row in shown
    ]

"""The report as a few lines for a terminal."""

from __future__ import annotations

import textwrap

from dropkit.report.blocks import Table
from dropkit.report.page import page_of
from dropkit.report.record import FitReport
from dropkit.report.wording import count, printable


def to_text(report: FitReport, width: int = 88) -> str:
    """Headline, verdicts and the comparison; what a person reads right after the fit.

    Args:
        report: the record.
        width: columns of the terminal.
    """
    page = page_of(report)
    data = report.data
    lines = [
        *textwrap.wrap(page.headline, width),
        *textwrap.wrap(page.subline, width),
        "",
        *textwrap.wrap(
            f"{count(data.rows, 'row')} of {data.source}: {data.training_rows} to learn from, "
            f"{data.validation_rows} to validate and calibrate with, {data.test_rows} held out.",
            width,
        ),
        "",
    ]
    label = max(len(card.label) for card in page.cards)
    value = max(len(card.value) for card in page.cards)
    for card in page.cards:
        start = f"  {card.label:<{label}}  {card.value:<{value}}  "
        lines += textwrap.wrap(card.note, width, initial_indent=start, subsequent_indent=" " * len(start))
    for section in page.sections:
        if section.name == "comparison":
            lines += ["", *table_lines(section.tables[0], width)]
    # a terminal obeys control characters, wherever they come from
    return "\n".join(printable(line).rstrip() for line in lines) + "\n"


def table_lines(table: Table, width: int) -> list[str]:
    """A table in fixed columns, as many as fit, numbers to the right, its caption below."""
    cells = [table.header, *table.rows]
    widths = [max(len(row[k]) for row in cells) + 2 for k in range(len(table.header))]
    while sum(widths) > width and len(widths) > 2:
        widths.pop()  # the measures come in the order of their weight
    lines = [
        "".join(
            text.rjust(w) if numeric else f"  {text}".ljust(w)
            for text, w, numeric in zip(row, widths, table.numeric, strict=False)
        )
        for row in cells
    ]
    return [*lines, *textwrap.wrap(table.caption, width, initial_indent="  ", subsequent_indent="  ")]

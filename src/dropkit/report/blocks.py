"""The blocks a page is made of: cards, tables, figures, sections. Plain text only; escaping is the printer's work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["good", "fair", "bad", "plain"]


@dataclass(frozen=True, slots=True)
class Card:
    """One verdict: a question's short name, the figure that answers it, and what the figure means."""

    label: str
    value: str
    note: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a header.

    Attributes:
        caption: what the table shows, with units.
        header: one text for each column.
        rows: texts; as many as the header has.
        numeric: which columns are numbers, set to the right.
        marked: index of a row that stands out, or -1.
        folded: shown on demand only.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    marked: int = -1
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure to be drawn.

    Attributes:
        name: which one; letters and dashes.
        label: what it shows, for those who do not see it.
        caption: axes, units, members and seed.
    """

    name: str
    label: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """One question of the reader.

    Attributes:
        name: for links; letters and dashes.
        title: the question or its answer.
        here: what the numbers say here.
        reading: how to read the figure.
        plot: None if there is none.
        tables: below or beside the text.
        code: lines to type, or empty.
    """

    name: str
    title: str
    here: tuple[str, ...]
    reading: str = ""
    plot: Plot | None = None
    tables: tuple[Table, ...] = ()
    code: str = ""

"""Numbers as people write them, and what they say in words."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from pathlib import PurePath

from dropkit.evaluation import Competitor
from dropkit.evaluation.records import Score

HIGHER_IS_BETTER = frozenset({"accuracy"})
# Two standard errors of the paired difference: about one false alarm in 20 for two models that are equally good.
CLEAR = 2.0
# Below this many rows a standard error is itself a guess, and no verdict is given.
FEWEST_ROWS = 20
# Kinds of characters that XML cannot hold or a terminal obeys, and those that turn the text after them around.
UNPRINTABLE = frozenset({"Cc", "Cn", "Cs"})
DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, a true minus and thin groups of three: 12 300, −0.0456, 1.2e−07."""
    if not math.isfinite(value):
        return "not defined" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 9:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    places = max(digits - 1 - magnitude, 0)
    return f"{value:,.{places}f}".replace(",", "\u202f").replace("-", "−")


def measured(value: float, error: float) -> str:
    """A value and its standard error, as many digits as the error warrants: 53.1 ± 1.2, 54 ± 3."""
    if not (math.isfinite(value) and math.isfinite(error)):
        return number(value)
    if error <= 0:
        return number(value)
    magnitude = math.floor(math.log10(error))
    lead = error / 10**magnitude
    places = max((0 if lead >= 3 else 1) - magnitude, 0)
    if not -4 <= magnitude < 9:
        return f"{number(value)} ± {number(error, 2)}"
    digits = f"{value:,.{places}f} ± {error:,.{places}f}"
    return digits.replace(",", "\u202f").replace("-", "−")


def percent(share: float, digits: int = 0) -> str:
    """A share as percent; what is not all of it is never rounded to all or nothing."""
    if not math.isfinite(share):
        return "not defined"
    text = f"{100 * share:.{digits}f}"
    if share < 1 and float(text) == 100:
        text = f"{100 * share:.{digits + 1}f}" if share <= 0.9995 else "> 99.9"
    if share > 0 and float(text.removeprefix("> ")) == 0:
        text = f"{100 * share:.{digits + 1}f}" if share >= 0.0005 else "< 0.1"
    return f"{text} %".replace(" %", "\u202f%")


def count(value: int, noun: str, plural: str = "") -> str:
    """'1 row', '1 200 rows'."""
    return f"{value:,}".replace(",", "\u202f") + " " + (noun if value == 1 else plural or noun + "s")


def listed(parts: Iterable[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    items = list(parts)
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""


def score_of(scores: Iterable[Score], name: str) -> Score:
    """The measure with this name."""
    return next(score for score in scores if score.name == name)


def standing(score: Score, rows: int) -> int:
    """1 where dropkit is clearly better than this line's model, -1 where clearly worse, 0 where rows cannot tell.

    Args:
        score: another model's, with the paired difference, dropkit minus the other.
        rows: held-out rows.
    """
    if score.difference is None or score.difference_error is None or rows < FEWEST_ROWS:
        return 0
    gain = score.difference if score.name in HIGHER_IS_BETTER else -score.difference
    if abs(gain) <= CLEAR * score.difference_error:
        return 0
    return 1 if gain > 0 else -1


def verdict(rivals: Iterable[Competitor], measure: str, rows: int) -> str:
    """One sentence: On RMSE, dropkit beats A (by 3.1 ± 0.4), is level with B and loses to C (by 1.0 ± 0.2)."""
    if rows < FEWEST_ROWS:
        return f"{count(rows, 'row')} are too few to tell models apart by {measure}."
    groups: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for rival in rivals:
        score = score_of(rival.scores, measure)
        place = standing(score, rows)
        points = 100 if measure in HIGHER_IS_BETTER else 1
        gap = measured(abs(score.difference or 0.0) * points, (score.difference_error or 0.0) * points)
        gap += " points" if points == 100 else ""
        groups[place].append(f"{rival.name} (by {gap})" if place else rival.name)
    words = [
        f"{verb} {listed(groups[place])}"
        for place, verb in ((1, "beats"), (0, "is level with"), (-1, "loses to"))
        if groups[place]
    ]
    return f"On {measure}, dropkit {listed(words)}."


def quoted(name: str) -> str:
    """A column's name inside a sentence."""
    return f"“{cut(name)}”"


def file_name(source: str) -> str:
    """Where the rows came from, without the folders: the command line on the page has them."""
    return PurePath(source).name or source


def cut(text: str, most: int = 60) -> str:
    """Text that still fits a sentence or a table."""
    return text if len(text) <= most else text[: most - 1] + "…"


def printable(text: str) -> str:
    """Text without what XML cannot hold or what turns the text after it around: controls, surrogates, overrides."""
    return "".join(c for c in str(text) if unicodedata.category(c) not in UNPRINTABLE and c not in DIRECTIONS)


def short(text: str, most: int = 18) -> str:
    """Printable text cut to a length that fits an axis."""
    return cut(printable(text), most)

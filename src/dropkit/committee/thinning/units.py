"""Which units of a dimension there are, said for all members at once: as a formula over the masks of the sites.

The structure of a thinned network is decided once, the units themselves member by member. So a set of units is kept
as a formula (the units that site 3 keeps, and of these the ones that site 5 keeps), simplified as far as it goes:
two sets whose formulas are equal are the same set for every member, and nothing need be moved between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Indices = np.ndarray[Any, np.dtype[np.int64]]
Kind = Literal["all", "none", "kept", "dropped", "and", "or", "kron", "left", "right", "part", "place", "cat"]

# Sets among so many units are filled up to a multiple of so many.
WIDE, ALIGNED = 256, 16


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Units:
    """A set of units among n, as a formula. Made by the functions below, never by hand: one formula is one object,
    so that formulas are compared and kept in tables in no time, however long they are.

    Attributes:
        kind: what joins the parts.
        n: how many units there are, in the set or not.
        parts: the sets it is made of, in the order of the kind.
        numbers: the site of "kept" and "dropped"; sizes (a, b) of "left" and "right"; start and step of "part" and
            "place".
        sites: on whose masks the set depends.
        serial: which formula this is, in the order of their making.
    """

    kind: Kind
    n: int
    parts: tuple[Units, ...]
    numbers: tuple[int, ...]
    sites: frozenset[int]
    serial: int


_made: WeakValueDictionary[tuple[Any, ...], Units] = WeakValueDictionary()
_serials = count()


def _units(kind: Kind, n: int, parts: tuple[Units, ...] = (), numbers: tuple[int, ...] = ()) -> Units:
    """The one object of a formula; the parts are alive as long as it is, so their ids name them."""
    key = (kind, n, tuple(map(id, parts)), numbers)
    made = _made.get(key)
    if made is None:
        own = frozenset(numbers) if kind in ("kept", "dropped") else frozenset[int]()
        made = Units(kind, n, parts, numbers, own.union(*(p.sites for p in parts)), next(_serials))
        _made[key] = made
    return made


def every(n: int) -> Units:
    """All n units."""
    return _units("all", n)


def nothing(n: int) -> Units:
    """None of n units."""
    return _units("none", n)


def kept(site: int, n: int) -> Units:
    """The units that a site keeps."""
    return _units("kept", n, numbers=(site,))


def dropped(site: int, n: int) -> Units:
    """The units that a site drops."""
    return _units("dropped", n, numbers=(site,))


def both(*sets: Units) -> Units:
    """The units that are in each of the sets."""
    return _join("and", sets)


def either(*sets: Units) -> Units:
    """The units that are in one of the sets at least."""
    return _join("or", sets)


def _join(kind: Literal["and", "or"], sets: Sequence[Units]) -> Units:
    n = sets[0].n
    assert all(s.n == n for s in sets), [s.n for s in sets]
    neutral, absorbing = (every(n), nothing(n)) if kind == "and" else (nothing(n), every(n))
    flat: dict[Units, None] = {}
    for s in sets:
        for part in s.parts if s.kind == kind else (s,):
            flat[part] = None
    if absorbing in flat:
        return absorbing
    flat.pop(neutral, None)
    other = "or" if kind == "and" else "and"
    # A and (A or B) = A; A or (A and B) = A.
    lasting = [s for s in flat if not (s.kind == other and any(part in flat for part in s.parts))]
    if not lasting:
        return neutral
    if len(lasting) == 1:
        return lasting[0]
    return _units(kind, n, tuple(sorted(lasting, key=lambda s: s.serial)))


def kron(a: Units, b: Units) -> Units:
    """Of the pairs (i, j), unit i * b.n + j: those with i in a and j in b."""
    if a.n == 1 and a.kind == "all":
        return b
    if b.n == 1 and b.kind == "all":
        return a
    if a.kind == b.kind == "all":
        return every(a.n * b.n)
    return _units("kron", a.n * b.n, (a, b))


def factor(whole: Units, sizes: tuple[int, int], side: Literal["left", "right"]) -> Units:
    """The i of all pairs (i, j) that are in the set ("left"), or the j; at least these, where a formula is shorter."""
    a, b = sizes
    if whole.kind in ("all", "none"):
        return _units(whole.kind, a if side == "left" else b)
    if whole.kind == "kron":
        first, second = whole.parts
        if (first.n, second.n) == sizes:
            return first if side == "left" else second
        if side == "left" and first.n > a and first.n % a == 0:
            return factor(first, (a, first.n // a), "left")
        if side == "right" and first.n < a and second.n % b == 0:
            return factor(second, (second.n // b, b), "right")
    if a == 1 and side == "right":
        return whole
    if b == 1 and side == "left":
        return whole
    return _units(side, a if side == "left" else b, (whole,), sizes)


def part(whole: Units, start: int, count: int, step: int = 1) -> Units:
    """The set on the units start, start + step, ..., of which there are `count`."""
    if whole.kind in ("all", "none"):
        return _units(whole.kind, count)
    if (start, step, count) == (0, 1, whole.n):
        return whole
    if whole.kind == "place" and (start, step) == whole.numbers and whole.parts[0].n == count:
        return whole.parts[0]
    if whole.kind == "cat" and step == 1:
        at = 0
        for piece in whole.parts:
            if at <= start and start + count <= at + piece.n:
                return part(piece, start - at, count)
            at += piece.n
    return _units("part", count, (whole,), (start, step))


def place(inner: Units, n: int, start: int, step: int = 1) -> Units:
    """The set put at the units start, start + step, ... among n; nothing elsewhere."""
    if (start, step, inner.n) == (0, 1, n):
        return inner
    return _units("place", n, (inner,), (start, step))


def concatenated(*sets: Units) -> Units:
    """One set after the other."""
    kinds = {s.kind for s in sets}
    n = sum(s.n for s in sets)
    if len(sets) == 1:
        return sets[0]
    if kinds == {"all"}:
        return every(n)
    return _units("cat", n, tuple(sets))


class Valuation:
    """The sets of one member: formulas evaluated on its masks, each once.

    Args:
        keep: (n,) masks of the sites, True where a unit stays.
        images: for convolutions, which take time to set up for each number of channels that they meet first: small
            sets, too, are filled up, so that few numbers come.
    """

    def __init__(self, keep: Sequence[Mask], images: bool = False) -> None:
        self.keep = keep
        self._narrow = 8 if images else WIDE
        self._known: dict[Units, Mask] = {}
        self._indices: dict[Units, Indices] = {}

    def __call__(self, units: Units) -> Mask:
        """(n,) True where a unit is in the set."""
        known = self._known.get(units)
        if known is None:
            known = self._known[units] = _evaluate(units, self, self.keep)
        return known

    def indices(self, units: Units) -> Indices:
        """The units of a set that are held, ascending: those of the set, and a few more.

        To hold more does no harm: such a unit is 0, or nobody needs it. An empty set holds unit 0, as torch has
        operators that take no empty dimension; a large one is filled up to a multiple of 16, since matrix products
        of odd sizes take half as long again. What is made of several dimensions or pieces holds what these hold.
        """
        known = self._indices.get(units)
        if known is None:
            known = self._indices[units] = self._held(units)
        return known

    def _held(self, units: Units) -> Indices:
        if units.kind == "kron":
            a, b = map(self.indices, units.parts)
            return (a[:, None] * units.parts[1].n + b[None, :]).reshape(-1)
        if units.kind == "cat":
            starts = np.cumsum([0, *(p.n for p in units.parts)])
            return np.concatenate(
                [start + self.indices(p) for start, p in zip(starts, units.parts, strict=False)]
            )
        inside = self(units)
        found = np.flatnonzero(inside)
        step = ALIGNED if units.n >= WIDE else max(2, units.n // 8) if units.n >= self._narrow else 1
        missing = -len(found) % step if len(found) else 1
        missing = min(missing, units.n - len(found))
        if not missing:
            return found
        return np.sort(np.concatenate((found, np.flatnonzero(~inside)[:missing])))


def _evaluate(units: Units, value: Callable[[Units], Mask], keep: Sequence[Mask]) -> Mask:
    parts = [value(p) for p in units.parts]
    match units.kind:
        case "all":
            return np.ones(units.n, np.bool_)
        case "none":
            return np.zeros(units.n, np.bool_)
        case "kept":
            return keep[units.numbers[0]]
        case "dropped":
            return ~keep[units.numbers[0]]
        case "and":
            return np.asarray(np.logical_and.reduce(parts))
        case "or":
            return np.asarray(np.logical_or.reduce(parts))
        case "kron":
            return (parts[0][:, None] & parts[1][None, :]).reshape(-1)
        case "left":
            return np.asarray(parts[0].reshape(units.numbers).any(axis=1))
        case "right":
            return np.asarray(parts[0].reshape(units.numbers).any(axis=0))
        case "part":
            start, step = units.numbers
            return parts[0][start : start + step * units.n : step]
        case "place":
            start, step = units.numbers
            placed = np.zeros(units.n, np.bool_)
            placed[start : start + step * len(parts[0]) : step] = parts[0]
            return placed
        case "cat":
            return np.concatenate(parts)


def expected(units: Units, rates: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(n,) chance of each unit to be in the set, as if all parts of a formula were independent.

    Args:
        units: the set.
        rates: chance to drop of each site.
    """
    parts = [expected(p, rates) for p in units.parts]
    match units.kind:
        case "all":
            return np.ones(units.n)
        case "none":
            return np.zeros(units.n)
        case "kept":
            return np.full(units.n, 1.0 - rates[units.numbers[0]])
        case "dropped":
            return np.full(units.n, rates[units.numbers[0]])
        case "and":
            return np.prod(parts, axis=0)
        case "or":
            return 1.0 - np.prod([1.0 - chance for chance in parts], axis=0)
        case "kron":
            return (parts[0][:, None] * parts[1][None, :]).reshape(-1)
        case "left":
            return 1.0 - np.prod(1.0 - parts[0].reshape(units.numbers), axis=1)
        case "right":
            return 1.0 - np.prod(1.0 - parts[0].reshape(units.numbers), axis=0)
        case "part":
            start, step = units.numbers
            return parts[0][start : start + step * units.n : step]
        case "place":
            start, step = units.numbers
            placed = np.zeros(units.n)
            placed[start : start + step * len(parts[0]) : step] = parts[0]
            return placed
        case "cat":
            return np.concatenate(parts)

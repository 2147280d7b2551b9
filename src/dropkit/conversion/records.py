"""What `scan`, `convert` and `insert` say: frozen records that print as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["module", "rate", "call", "draw"]


@dataclass(frozen=True, slots=True)
class Site:
    """A place where chance enters a model.

    Attributes:
        name: the module's qualified name; of a call or a draw, the module in whose forward it is made.
        kind: "module": a dropout layer; "rate": a rate that a layer holds as a number; "call": a call of a
            function such as torch.nn.functional.dropout; "draw": plain random numbers.
        what: the class, attribute or function.
        rate: chance to drop, where it is known.
        mode: "train" or "eval", of the module now.
        acts_in_train: whether a mask acts in training mode. None: only an example can tell.
        acts_in_eval: the same in evaluation mode.
        acts_in_committee: whether it differs between the members of a `dropkit.Committee` of this very model.
        where: file and line of a call; else empty.
    """

    name: str
    kind: Kind
    what: str
    rate: float | None
    mode: Literal["train", "eval"]
    acts_in_train: bool | None
    acts_in_eval: bool | None
    acts_in_committee: bool
    where: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A silent failure that this model can walk into.

    Attributes:
        trap: its name, such as "fast path".
        name: the module.
        message: what happens, and what to do.
    """

    trap: str
    name: str
    message: str


@dataclass(frozen=True, slots=True)
class Scan:
    """Every place where chance enters a model; `str` of it is a table.

    Attributes:
        sites: in the order of the model's modules.
        warnings: what goes wrong without a word.
        ran: whether an example was run; without one, calls inside of forward are not seen.
    """

    sites: tuple[Site, ...]
    warnings: tuple[Finding, ...]
    ran: bool

    def __str__(self) -> str:
        head = ("site", "kind", "what", "rate", "mode", "train", "eval", "committee", "where")
        rows = [
            (
                site.name or "(the model)",
                site.kind,
                site.what,
                "" if site.rate is None else f"{site.rate:g}",
                site.mode,
                *map(_said, (site.acts_in_train, site.acts_in_eval, site.acts_in_committee)),
                site.where,
            )
            for site in self.sites
        ]
        lines = _table(head, rows) if rows else ["No place was found where chance enters."]
        if not self.ran:
            lines.append("No example was run: calls of functions inside of forward were not looked for.")
        lines += [f"{f.trap}: {f.name or 'the model'}: {f.message}" for f in self.warnings]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Change:
    """One module that dropkit serves now.

    Attributes:
        name: qualified name in the model.
        was: the class it had.
        now: what serves it.
    """

    name: str
    was: str
    now: str


@dataclass(frozen=True, slots=True)
class Left:
    """One place with chance in it that stays as it was.

    Attributes:
        name: qualified name in the model.
        what: the class or the draw.
        why: the reason, and what it means for a committee.
    """

    name: str
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """A changed copy of a model, and what was done to it; `str` of it is the report.

    Attributes:
        model: the copy. `dropkit.restore` gives its original structure back.
        replaced: modules that dropkit serves now.
        left: noisy places that were left, and why.
        notes: consequences to know of.
    """

    model: nn.Module
    replaced: tuple[Change, ...]
    left: tuple[Left, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} changed, {len(self.left)} left."]
        lines += _table(
            ("changed", "was", "now"), [(c.name or "(the model)", c.was, c.now) for c in self.replaced]
        )
        lines += _table(
            ("left", "what", "why"), [(x.name or "(the model)", x.what, x.why) for x in self.left]
        )
        return "\n".join([*lines, *self.notes])


def _said(acts: bool | None) -> str:
    return "?" if acts is None else "yes" if acts else "no"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]

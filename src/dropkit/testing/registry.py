"""The list of checks: each is a small function named after its law, with the law as its first line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dropkit.testing.subject import Subject


@dataclass(frozen=True, slots=True)
class Check:
    """One law and how to try it.

    Attributes:
        name: the function's name.
        topic: the module it stands in: values, modes, gradients, tensors, draws, modules, transforms, addresses.
        law: one sentence.
        statistical: whether its verdict rests on chance; then it is wrong at most once in 1 / false_alarm runs.
        slow: takes seconds (compilers); left out unless asked for.
        run: returns None, or a remark; raises Broken or NotApplicable.
    """

    name: str
    topic: str
    law: str
    statistical: bool
    slow: bool
    run: Callable[[Subject], str | None]


entered: list[Check] = []  # filled while the topics are imported; checking.py puts it in order, once


def check(
    *, statistical: bool = False, slow: bool = False
) -> Callable[[Callable[[Subject], str | None]], Callable[[Subject], str | None]]:
    """Enter a function in the list."""

    def enter(run: Callable[[Subject], str | None]) -> Callable[[Subject], str | None]:
        topic = run.__module__.rpartition(".")[2]
        law = " ".join((run.__doc__ or "").split())
        entered.append(Check(run.__name__, topic, law, statistical, slow, run))
        return run

    return enter

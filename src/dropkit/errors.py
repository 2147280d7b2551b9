"""Errors that say what was given, what is allowed, and what to do.

Every class is a `DropkitError` and also the built-in error a caller would expect, so that
`except ValueError` keeps working. The command line turns any of them into one line and exit status 2.
"""

from __future__ import annotations


class DropkitError(Exception):
    """Parent of everything dropkit raises on purpose."""


class ProbabilityError(DropkitError, ValueError):
    """A chance outside [0, 1]."""


class ShapeError(DropkitError, ValueError):
    """An array or tensor with other axes than the function works on."""


class AddressError(DropkitError, ValueError):
    """A field of a mask's address that is out of range, or an address drawn twice."""


class OptionError(DropkitError, ValueError):
    """An option with a value that is not allowed."""


class NotProbabilitiesError(DropkitError, ValueError):
    """Rows that were said to be class probabilities and are not."""


class NoMaskError(DropkitError, ValueError):
    """A model in which no mask acts: every member would be the same network."""


class LackOfMemoryError(DropkitError, MemoryError):
    """Work that does not fit the machine's memory in the smallest pieces that there are."""


class MomentsError(DropkitError, ValueError):
    """A model whose mean and variance cannot be had without sampling."""


class EnumerationError(DropkitError, ValueError):
    """A model whose masks cannot all be visited."""


class MeasurementError(DropkitError, ValueError):
    """A quantity that cannot be had of this model and these rows, or not as exactly as was asked."""


class TableError(DropkitError, ValueError):
    """A table that cannot be read, learned from, or predicted."""


class ModelDirectoryError(DropkitError, ValueError):
    """A model directory that is damaged, incomplete, altered, or of a newer schema."""


class CheckpointError(DropkitError, ValueError):
    """A checkpoint that is damaged, or of another model, other options, other data or another release."""


class DivergedError(DropkitError, ArithmeticError):
    """A training whose loss stopped being a finite number before anything was learned."""


class OutputError(DropkitError, OSError):
    """A result that could not be written: the path exists, or the disk refused."""


class MissingPackageError(DropkitError, ImportError):
    """An optional package that is needed here and not installed."""


class ExportError(DropkitError, RuntimeError):
    """A committee that cannot be written as a plain graph."""


class EngineError(DropkitError, RuntimeError):
    """A worker of a cluster that failed."""


class BrokenContractError(DropkitError, AssertionError):
    """A dropout that does not keep a law it was checked for."""


class DropkitWarning(UserWarning):
    """Something that was done as asked, yet is probably not what was meant."""


def check_probability(p: float, name: str = "p") -> float:
    """Return p as a float, or say what is wrong with it.

    Raises:
        ProbabilityError: p is not a number in [0, 1].
    """
    if type(p) is float and 0.0 <= p <= 1.0:  # nearly every call
        return p
    try:
        if type(p).__name__ in ("bool", "bool_"):  # a switch in the place of a rate; numpy's too
            raise TypeError
        value = float(p)
    except (TypeError, ValueError):
        raise ProbabilityError(f"{name}={p!r} was given; a probability is a number in [0, 1].") from None
    if not 0.0 <= value <= 1.0:  # stated as what is allowed, so NaN fails too
        hint = (
            f"As a percentage, write {value / 100}."
            if 2 <= value <= 100
            else "Give the chance to drop, not to keep."
        )
        raise ProbabilityError(f"{name}={p!r} was given; a probability lies in [0, 1]. {hint}")
    return value

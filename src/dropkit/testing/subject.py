"""The dropout under test, whatever it is: one way to call a layer, a class of layers, or a function."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dropkit.errors import DropkitError
from dropkit.testing.chance import binomial_p_value
from dropkit.testing.law import Law

Context = Callable[..., AbstractContextManager[Any]]
Call = Callable[[Tensor], Tensor]

RATE_NAMES = ("p", "drop_prob", "rate", "dropout", "dropout_p")
TRAINING_NAMES = ("training", "train")
MANY = 1 << 20  # elements where a rate is counted: 0.1 and the 0.1016 of an 8-bit threshold lie 5 sigma apart
ENOUGH = (
    4096  # elements where a mask is looked at: both dropped and kept ones are there at any rate under test
)


class Broken(Exception):  # noqa: N818 -- a verdict, not a mistake of the caller; never leaves the checks
    """The law does not hold; the message is what was seen."""


class NotApplicable(Exception):  # noqa: N818 -- as above
    """The law says nothing about this dropout; the message is why."""


@dataclass(frozen=True)
class Subject:
    """A dropout under test and what it promises.

    Attributes:
        name: for the report.
        thing: a module, a class of modules, or a function of (x, p, training, inplace) or fewer of them.
        rate_name, training_name: what the thing calls them; None where it has none.
        has_inplace: whether it can write into its input.
        p: the rate of most checks.
        shape: of most inputs; dim 0 counts the rows.
        shared: dims along which the mask is constant.
        law: what becomes of kept and dropped elements.
        context: opens an address, as dropkit.masks does; None where masks have none.
        device: where inputs are made.
        false_alarm: of each statistical check.
    """

    name: str
    thing: Any
    rate_name: str | None
    training_name: str | None
    has_inplace: bool
    p: float
    shape: tuple[int, ...]
    shared: tuple[int, ...]
    law: Law
    context: Context | None
    device: torch.device
    false_alarm: float

    # --- calling it ------------------------------------------------------------------------------------

    @property
    def is_module(self) -> bool:
        """Whether layers are under test, not a function."""
        return isinstance(self.thing, (nn.Module, type))

    def module(self, p: float | None = None) -> nn.Module:
        """A layer of its own, in training mode, at rate p."""
        if not self.is_module:
            raise NotApplicable("it is a function")
        if isinstance(self.thing, type):
            layer = (
                self.thing(**{self.rate_name: self.p if p is None else p}) if self.rate_name else self.thing()
            )
        else:
            layer = self._twin()
            if p is not None and p != self.p:
                setattr(layer, self._rate_name(), p)
        return layer.train()

    def _twin(self) -> nn.Module:
        try:
            return copy.deepcopy(self.thing)
        except Exception:  # whatever a stranger's layer raises; a check of its own speaks of it
            return self.thing

    def _rate_name(self) -> str:
        if self.rate_name is None:
            raise NotApplicable("its rate cannot be set")
        return self.rate_name

    def build(self, p: float | None = None, *, training: bool = True, inplace: bool = False) -> Call:
        """What maps x to its dropped self; p=None is the rate under test."""
        if inplace and not self.has_inplace:
            raise NotApplicable("it has no inplace option")
        if self.is_module:
            layer = self.module(p)
            if inplace:
                layer.inplace = True  # type: ignore[assignment]
            return layer.train(training)
        options: dict[str, Any] = {}
        if self.rate_name is not None:
            options[self.rate_name] = self.p if p is None else p
        elif p is not None and p != self.p:
            raise NotApplicable("its rate cannot be set")
        if self.training_name is not None:
            options[self.training_name] = training
        elif not training:
            raise NotApplicable("it has no training flag")
        if self.has_inplace and inplace:
            options["inplace"] = True
        return lambda x: self.thing(x, **options)

    def constructed(self, p: float) -> Call:
        """As a user would make it at rate p: through the class, which is where a wrong rate should be refused."""
        kind = type(self.thing) if isinstance(self.thing, nn.Module) else self.thing
        if self.is_module and self.rate_name in parameter_names(kind):
            return kind(**{self.rate_name: p}).train()
        return self.build(p)

    def rates(self, *others: float) -> tuple[float, ...]:
        """The rate under test and, where it can be set, others."""
        return (self.p,) if self.rate_name is None else tuple(dict.fromkeys((self.p, *others)))

    # --- inputs ----------------------------------------------------------------------------------------

    def ones(self, shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """An input whose output shows the mask."""
        return torch.ones(self.shape if shape is None else shape, dtype=dtype, device=self.device)

    def values(self, shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers between 0.5 and 1.5, always the same ones; drawn on a generator of their own."""
        generator = torch.Generator().manual_seed(20140615)
        drawn = (
            torch.rand(self.shape if shape is None else shape, generator=generator, dtype=torch.float64) + 0.5
        )
        return drawn.to(self.device, dtype)

    @property
    def free(self) -> tuple[int, ...]:
        """Dims along which the mask varies."""
        return tuple(dim for dim in range(len(self.shape)) if dim not in self.shared)

    def wide(self, elements: int = ENOUGH) -> tuple[int, ...]:
        """A shape with about so many mask elements: rows of 256, or one row where only one dim is free."""
        return self.lattice(elements // 256, 256) if len(self.free) > 1 else self.lattice(1, elements)

    def lattice(self, rows: int, width: int) -> tuple[int, ...]:
        """A shape whose mask is (rows, width): the first and the last free dim; the others have size 1."""
        sizes = [1] * len(self.shape)
        if len(self.free) > 1:
            sizes[self.free[0]] = rows
        sizes[self.free[-1]] = width
        return tuple(sizes)

    # --- masks -----------------------------------------------------------------------------------------

    def mask(
        self, p: float | None = None, shape: tuple[int, ...] | None = None, call: Call | None = None
    ) -> Tensor:
        """Draw one mask: bool, True where kept."""
        call = call or self.build(p)
        return self.law.keep_of_ones(call(self.ones(shape)), self.p if p is None else p)

    def field(self, rows: int, width: int, p: float | None = None) -> Tensor:
        """(rows, width) bool mask; where one dim alone is free, each row is a call of its own."""
        if len(self.free) > 1:
            return self.mask(p, self.lattice(rows, width)).reshape(rows, width)
        call, shape = self.build(p), self.lattice(1, width)
        return torch.stack([self.mask(p, shape, call).reshape(width) for _ in range(min(rows, 1024))])

    def wide_mask(self) -> Tensor:
        """One mask of about `ENOUGH` elements."""
        return self.mask(shape=self.wide())

    @cached_property
    def seeded(self) -> bool:
        """Whether torch.manual_seed alone fixes the masks."""
        masks = []
        for _ in range(2):
            torch.manual_seed(11)
            masks.append(self.wide_mask())
        return torch.equal(*masks)

    @contextlib.contextmanager
    def fixed(self, seed: int = 7) -> Iterator[None]:
        """The same masks each time this is entered, by torch.manual_seed or else by an address."""
        seeded = self.seeded
        if not seeded and self.context is None:
            raise NotApplicable("nothing fixes its masks")
        torch.manual_seed(seed)
        with contextlib.nullcontext() if seeded or self.context is None else self.context(seed=seed):
            yield

    def address(self, **fields: Any) -> AbstractContextManager[Any]:
        """An address with these fields."""
        if self.context is None:
            raise NotApplicable("its masks have no address")
        return self.context(**fields)

    # --- verdicts --------------------------------------------------------------------------------------

    def differing(self, seen: Tensor, wanted: Tensor, rounding: float = 0.0) -> Tensor:
        """Where two tensors differ by more than rounding explains, bool.

        Masks are what is compared, so the tolerance is wide: a rate that is rounded by 2^-17 moves the scale by
        2^-17 / (1 - p) of itself, and what is compared may hold the scale's third power.
        """
        relative = max(rounding, 1e-5 + 4 * 2.0**-16 / (1 - self.p))
        absolute = relative * (1 + abs(self.law.offset(self.p)))
        return ~torch.isclose(seen, wanted.to(seen.dtype), rtol=relative, atol=absolute, equal_nan=True)

    def close(self, seen: Tensor, wanted: Tensor, rounding: float = 0.0) -> bool:
        """Whether two tensors differ nowhere."""
        return not bool(self.differing(seen, wanted, rounding).any())

    def judge(self, count: int, trials: int, chance: float, decisions: int, what: str) -> None:
        """Blame a count that chance explains less often than false_alarm, shared among the check's decisions."""
        p_value = binomial_p_value(count, trials, chance)
        if p_value < self.false_alarm / decisions:
            raise Broken(
                f"{what}: {count} of {trials} ({count / trials:.6g}), expected {chance:.6g}; chance {p_value:.1g}"
            )


def expect(condition: bool, otherwise: str) -> None:
    """Go on if the condition holds, else the law is broken."""
    if not condition:
        raise Broken(otherwise)


def parameter_names(thing: Any) -> tuple[str, ...]:
    """Names of the parameters of a function or class; () where Python cannot tell."""
    try:
        return tuple(inspect.signature(thing).parameters)
    except (TypeError, ValueError, DropkitError):
        return ()

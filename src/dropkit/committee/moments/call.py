"""One operator of a graph at work on means and variances, and what is done where it has no rule of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.func import jvp, vmap

from dropkit.committee.moments.values import Account, Spread, spelled
from dropkit.errors import MomentsError

GAUSSIAN = "input taken as Gaussian"
TANGENT = "taken as the straight line that touches it at the mean"
# Values that vary each by themselves go one by one through an operator without a rule.
MOST_SINGLE = 8192


@dataclass(frozen=True, slots=True)
class Call:
    """One node of the graph with its arguments' values.

    Attributes:
        node: the node.
        args, kwargs: its arguments; a `Spread` where chance has touched one.
        account: of the pass.
        site: name of the mask, for a node that draws one; else of the masks above it.
    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    account: Account
    site: str

    @property
    def name(self) -> str:
        """The operator: "relu" of aten::relu."""
        return operator_name(self.node.target)

    def run(self, *args: Any) -> Any:
        """The operator on other arguments."""
        assert callable(self.node.target)
        return self.node.target(*args, **self.kwargs)

    def leave(self, what: str) -> None:
        """Note an approximation."""
        self.account.leave(self.name, what)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


def operator_name(target: Any) -> str:
    """The name of an operator without namespace and overload."""
    schema = getattr(target, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else getattr(target, "__name__", str(target))


@dataclass(frozen=True, slots=True)
class Guard:
    """noise == 0, of which the node of the noise is remembered."""

    node: fx.Node


def before_sum(x: Spread, call: Call) -> Spread:
    """x as its elements may be added up."""
    x = spelled(x, call.account)
    if x.own is not None and x.mixed:
        call.leave("inputs taken as independent of each other")
    return x


def tangent(call: Call, exact: bool = False) -> Any:
    """Any operator, by its slope at the mean (the delta method).

    Raises:
        MomentsError: it has no forward derivative, or too many values vary each by themselves.
    """
    if not exact:
        call.leave(TANGENT)
    places = [i for i, a in enumerate(call.args) if isinstance(a, Spread)]
    if not places or any(isinstance(a, Guard) for a in call.args):
        raise MomentsError(no_rule(call, "its arguments are not plain tensors"))
    spreads = [before_sum(call.args[i], call) for i in places]

    def function(*values: Tensor) -> Any:
        args = list(call.args)
        for place, value in zip(places, values, strict=True):
            args[place] = value
        result = call.run(*args)
        return tuple(result) if isinstance(result, list) else result

    means = tuple(s.mean for s in spreads)

    def slope(*tangents: Tensor) -> Any:
        return jvp(function, means, tangents)[1]

    try:
        mean = function(*means)
        single = isinstance(mean, Tensor)
        outputs = (mean,) if single else mean
        factors: list[dict[int, Tensor]] = [{} for _ in outputs]
        for key in {key for s in spreads for key in s.factors}:
            count = next(len(s.factors[key]) for s in spreads if key in s.factors)
            tangents = [s.factors.get(key, s.mean.new_zeros(count, *s.mean.shape)) for s in spreads]
            found = vmap(slope)(*tangents)
            for i, part in enumerate((found,) if single else found):
                factors[i][key] = part
        owns: list[Tensor | None] = [None for _ in outputs]
        for at, s in enumerate(spreads):
            if s.own is None:
                continue
            count = s.mean.numel()
            if count > MOST_SINGLE:
                raise MomentsError(no_rule(call, f"{count} values vary before it"))
            basis = s.own.clamp_min(0).sqrt().flatten().diag().reshape(count, *s.mean.shape)
            zero = [t.new_zeros(count, *t.shape) for t in means]
            found = vmap(slope)(*zero[:at], basis, *zero[at + 1 :])
            for i, part in enumerate((found,) if single else found):
                more, before = part.square().sum(dim=0), owns[i]
                owns[i] = more if before is None else before + more
    except RuntimeError as error:
        raise MomentsError(no_rule(call, str(error).strip().splitlines()[0])) from error
    results = [Spread(m, f, own, True) for m, f, own in zip(outputs, factors, owns, strict=True)]
    return results[0] if single else results


def no_rule(call: Call, why: str) -> str:
    """What to say where an operator has no moments."""
    return (
        f"the operator {call.name!r} below the masks at {call.site} has no mean and variance in one pass: {why}. "
        "Sample instead: committee.predict(x)."
    )

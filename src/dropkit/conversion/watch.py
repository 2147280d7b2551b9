"""Run an example and write down every random call: which module made it, at which rate, and whether it acted."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dropkit.conversion.serve import HEADS, SERVERS
from dropkit.errors import OptionError
from dropkit.masks import masks
from dropkit.nn.layer import StochasticLayer

OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


@dataclass(frozen=True, slots=True)
class Event:
    """One random call of a pass.

    Attributes:
        name: the module in whose forward it was made.
        what: the function, or "aten::..." for plain random numbers.
        rate: chance to drop, where there is one.
        acts: whether it drew.
        where: file and line.
        memory: where its result lies, to recognise it in the output.
        shape: of what was dropped.
    """

    name: str
    what: str
    rate: float | None
    acts: bool
    where: str
    memory: int
    shape: tuple[int, ...] = ()


@dataclass(slots=True)
class Pass:
    """What one pass through the model showed."""

    events: list[Event] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)
    drawn: tuple[str, ...] = ()
    output: Any = None
    rows: int = 0  # of the example's first tensor
    foreign: tuple[str, ...] = ()  # generators beside torch's that moved
    held: list[Tensor] = field(default_factory=list)  # results, kept so that their memory is not used again
    results: dict[str, int] = field(default_factory=dict)  # dropkit's layers, and where their result lies
    names: list[str] = field(default_factory=list)  # modules whose forward is running
    inside: int = 0  # depth of watched calls, whose draws are theirs


def run_example(network: nn.Module, example: Any, *, training: bool, member: int | None) -> Pass:
    """One pass through a copy of the model, in training or evaluation mode throughout; every generator is put back.

    Raises:
        OptionError: the model cannot run on the example.
    """
    seen = Pass()
    network.train(training)
    with ExitStack() as stack:
        stack.enter_context(_generators_kept(seen))
        for name, module in network.named_modules():
            hooks = (
                module.register_forward_pre_hook(lambda _m, _i, name=name: _enter(seen, name)),
                module.register_forward_hook(lambda m, _i, out: _leave(seen, m, out), always_call=True),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        stack.enter_context(torch.enable_grad())
        context = stack.enter_context(masks(seed=0, member=member))
        stack.enter_context(_Draws(seen))
        stack.enter_context(_Calls(seen))
        try:
            given = _cloned(example)
            first = next(tensors_in(given), None)
            seen.rows = len(first) if first is not None and first.ndim else 0
            seen.output = _call(network, given)
        except Exception as error:
            said = str(error).strip() or type(error).__name__
            mode = "training" if training else "evaluation"
            raise OptionError(
                f"the model could not run on the example in {mode} mode; it said: {type(error).__name__}: {said} "
                "Give a tensor, a tuple of arguments, or a dict of named ones."
            ) from error
        seen.drawn = context.drawn
    return seen


def _enter(seen: Pass, name: str) -> None:
    seen.names.append(name)
    seen.reached.add(name)


def _leave(seen: Pass, module: nn.Module, output: Any) -> None:
    name = seen.names.pop()
    if isinstance(module, StochasticLayer) and isinstance(output, Tensor):
        seen.held.append(output)
        seen.results[name] = memory_of(output)


def _call(network: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return network(**example)
    return network(*example) if isinstance(example, tuple) else network(example)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors, however they are packed."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def _cloned(value: Any) -> Any:
    """The example anew: a model that writes into its input must not write into the caller's."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {key: _cloned(part) for key, part in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_cloned(part) for part in value)
    return value


@contextmanager
def _generators_kept(seen: Pass) -> Iterator[None]:
    plain, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            moved = {
                "random": random.getstate() != plain,
                "numpy.random": not _equal_states(np.random.get_state(), arrays),  # noqa: NPY002
            }
            seen.foreign = tuple(name for name, has in moved.items() if has)
            random.setstate(plain)
            np.random.set_state(arrays)  # noqa: NPY002


def _equal_states(one: Any, other: Any) -> bool:
    """numpy's old generator: its 624 words, and the place among them."""
    return bool((one[1] == other[1]).all()) and one[2:] == other[2:]


class _Calls(TorchFunctionMode):
    """Writes down the calls that a conversion would answer."""

    def __init__(self, seen: Pass) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in SERVERS:
            return func(*args, **kwargs)
        self.seen.inside += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.seen.inside -= 1
        first = result[0] if isinstance(result, tuple) else result
        rate, acts = _rate_and_mode(func, args, kwargs)
        self.seen.held.append(first)
        name = self.seen.names[-1] if self.seen.names else ""
        self.seen.events.append(
            Event(name, call_name(func), rate, acts, _place(), memory_of(first), tuple(first.shape))
        )
        return result


class _Draws(TorchDispatchMode):
    """Writes down plain random numbers: every operator of torch that is marked as random."""

    def __init__(self, seen: Pass) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        seen = self.seen
        if not seen.inside and torch.Tag.nondeterministic_seeded in func.tags and func.namespace == "aten":
            name = seen.names[-1] if seen.names else ""
            if isinstance(result, Tensor):
                seen.held.append(result)
            what = func._schema.name
            acts = what != "aten::rrelu_with_noise" or any(
                value is True for value in args
            )  # its flag: training
            seen.events.append(Event(name, what, None, acts, _place(), 0))
        return result


def call_name(func: Any) -> str:
    """A function as users write it."""
    if func in (F.scaled_dot_product_attention,):
        return "torch.nn.functional.scaled_dot_product_attention"
    module = "torch.nn.functional" if getattr(F, func.__name__, None) is func else "torch"
    return f"{module}.{func.__name__}"


def memory_of(value: Any) -> int:
    """Where a tensor's values lie; 0 for what has none."""
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) and value.numel() else 0


def _rate_and_mode(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, bool]:
    """The rate of a call, and whether it acts."""

    def given(place: int, name: str, default: Any) -> Any:
        return args[place] if len(args) > place else kwargs.get(name, default)

    if func is F.scaled_dot_product_attention:
        rate, on = given(4, "dropout_p", 0.0), True
    elif func is F.multi_head_attention_forward:
        bound = HEADS.bind(*args, **kwargs)
        bound.apply_defaults()
        rate, on = bound.arguments["dropout_p"], bound.arguments["training"]
    elif func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
        packed = isinstance(args[1], Tensor) and isinstance(args[3], list | tuple)
        count, rate, training = args[5:8] if packed else args[4:7]
        on = training and count > 1
    else:
        # torch's functions hand all of their arguments on to a mode, by name.
        rate, on = given(1, "p", 0.5), given(2, "training", kwargs.get("train", True))
    return float(rate), bool(on) and float(rate) > 0


def _place() -> str:
    """File and line of the innermost code that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"

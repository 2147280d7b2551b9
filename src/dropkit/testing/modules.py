"""Checks of layers as torch.nn.Module: nothing to save, copies that work, words that help."""

from __future__ import annotations

import copy
import functools
import re
import sys
import types
from collections.abc import Iterable
from typing import Any

import torch

from dropkit.testing.registry import check
from dropkit.testing.subject import Broken, NotApplicable, Subject, expect

PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.Tensor,
    torch.dtype,
    torch.device,
    torch.Size,
)


@check()
def state_dict_stays_empty(s: Subject) -> None:
    """It has no parameters, no buffers and no keys in a state_dict, before and after use."""
    layer = s.module()
    for _ in range(2):
        names = [
            *layer.state_dict(),
            *(n for n, _ in layer.named_parameters()),
            *(n for n, _ in layer.named_buffers()),
        ]
        expect(not names, f"it has {names}")
        layer(s.ones())


@check()
def deepcopy_works(s: Subject) -> None:
    """A deep copy, also of a used layer, has the same rate and mode and draws the same masks under the same seed."""
    layer = s.module()
    layer(s.ones().requires_grad_())
    twin = copy.deepcopy(layer)
    expect(repr(twin) == repr(layer) and twin.training == layer.training, f"{layer!r} became {twin!r}")
    masks = []
    for one in (layer, twin):
        with s.fixed():
            masks.append(s.mask(call=one, shape=s.wide()))
    expect(torch.equal(*masks), "the copy draws other masks")
    twin.eval()
    expect(layer.training, "the copy shares its mode with the original")


def unreachable(thing: Any, path: str, seen: set[int]) -> Iterable[str]:
    """Parts of an object that could not be sent to another process: without a name that can be imported."""
    if isinstance(thing, PLAIN) or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, (type, types.FunctionType, types.BuiltinFunctionType)):
        found: Any = sys.modules.get(getattr(thing, "__module__", None) or "builtins")
        for name in thing.__qualname__.split("."):
            found = getattr(found, name, None)
        if found is not thing:
            yield f"{path}: {thing.__qualname__} cannot be imported by its name"
    elif isinstance(thing, (list, tuple, set, frozenset)):
        for index, item in enumerate(thing):
            yield from unreachable(item, f"{path}[{index}]", seen)
    elif isinstance(thing, dict):
        for key, item in thing.items():
            yield from unreachable(item, f"{path}[{key!r}]", seen)
    else:
        try:
            parts = thing.__reduce_ex__(4)
        except TypeError as error:
            yield f"{path}: {error}"
            return
        if isinstance(parts, tuple):  # a lone string names a global of the thing's module
            for part in parts[:3]:
                yield from unreachable(part, path, seen)
            for items in parts[3:5]:
                yield from unreachable(list(items or ()), path, seen)


@check()
def nothing_in_it_resists_pickling(s: Subject) -> None:
    """All it is made of can be named or written down, so that spawned workers can have it; nothing is pickled."""
    layer = s.module()
    layer(s.ones())
    problems = list(unreachable(layer, type(layer).__name__, set()))
    if problems:
        raise Broken("; ".join(problems[:3]))


@check()
def repr_shows_the_rate(s: Subject) -> None:
    """repr says p."""
    if s.rate_name is None:
        raise NotApplicable("it has no rate of its own")
    text = repr(s.module())
    numbers = {float(number) for number in re.findall(r"\d+\.\d+(?:e-?\d+)?", text)}
    expect(any(abs(number - s.p) < 1e-9 for number in numbers), f"it is {text!r}")


@check()
def functional_call_works(s: Subject) -> None:
    """torch.func.functional_call on a model that holds it gives the plain result."""
    layer = s.module()
    model = torch.nn.Sequential(torch.nn.Identity(), layer)
    x, results = s.values(s.wide()), []
    for call in (model, functools.partial(torch.func.functional_call, model, dict(model.named_parameters()))):
        with s.fixed():
            results.append(call(x) if call is model else call((x,)))
    expect(torch.equal(*results), "it gives another one")


@check()
def moving_and_casting_the_model_works(s: Subject) -> None:
    """model.to(dtype), .half() and .to("meta") leave it usable."""
    for change in (lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.to("meta")):
        layer = change(s.module())
        y = layer(s.ones(s.wide()))
        expect(
            y.dtype == torch.float32 and y.device == s.ones().device,
            "its output changed with the model's dtype",
        )

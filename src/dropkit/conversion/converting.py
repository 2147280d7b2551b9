"""A model with dropkit's masks in it.

Two ways lead there. A layer that does nothing but drop is replaced by the dropkit layer for it. A module in whose
forward dropout happens between other things (attention, recurrent layers, torch.nn.functional.dropout in anybody's
code) keeps its class and its weights, and is *served*: dropkit answers its random calls while it runs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from dropkit.conversion.frames import TRANSFORMERS, is_message_passing
from dropkit.conversion.intercept import Served, can_be_served, serve
from dropkit.conversion.records import Change, Conversion, Left
from dropkit.conversion.rules import CALLING, held_rate, replacement
from dropkit.conversion.source import Reading, read_class
from dropkit.errors import NoMaskError, OptionError
from dropkit.nn.layer import StochasticLayer, name_sites

# What a module carries besides its class: hooks stay with the place when the module there is another.
_CARRIED = tuple(
    name
    for name in vars(nn.Module())
    if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
)


def convert(model: nn.Module, *, rows: Mapping[str, int] | None = None) -> Conversion:
    """A copy of a model whose dropout is dropkit's: addressed, and switched on when a committee member is asked.

    Weights, buffers, modes, hooks, tied modules and the keys of the state dict are those of the model. In training
    and in evaluation the copy does what the model did, with other random numbers. Inside `dropkit.masks(member=k)`
    its dropout acts in evaluation mode too, also where it is a rate held by an attention or recurrent layer, or a
    call of torch.nn.functional.dropout; BatchNorm stays in evaluation, and torch's inference path for transformers,
    which skips dropout, is not taken.

    A member is one function of a row where the rows are dimension 0 of what is dropped. torch's own transformer and
    recurrent layers are known to count them along dimension 1 without batch_first; other code that does so is to be
    named in `rows`. (`scan` with an example warns of it.)

    Args:
        model: any module; it is not changed.
        rows: the dimension that counts rows, by the qualified name of a module; it holds for all that is inside.

    Returns:
        The copy, what was changed in it, and what was left and why.

    Raises:
        OptionError: what was given is no module, or cannot be copied; or `rows` names what is not there.
        NoMaskError: nothing in the model draws anything.

    Example:
        >>> import torch, dropkit as dk
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)).eval()
        >>> print(dk.convert(model))
        1 changed, 0 left.
        changed  was               now
        1        torch.nn.Dropout  dropkit.nn.Dropout
    """
    return convert_in_place(copied(model), rows)


def convert_in_place(network: nn.Module, rows: Mapping[str, int] | None = None) -> Conversion:
    """`convert` of a copy that is one's own; arguments and errors are the same."""
    given = class_name(network)
    ours = any(isinstance(module, StochasticLayer) for module in network.modules())
    replaced: list[Change] = []
    left: list[Left] = []
    said = _row_dims(network, rows or {})
    elsewhere = {  # layers whose rows are not dimension 0, or not always: these are served, not replaced
        id(child)
        for module in network.modules()
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) or id(module) in said
        for child in module.modules()
    }
    new: dict[int, nn.Module] = {}
    for name, module in list(network.named_modules()):
        if isinstance(module, StochasticLayer | Served):
            continue
        layer = None if id(module) in elsewhere else replacement(module)
        if layer is not None:
            new[id(module)] = layer
            replaced.append(Change(name, class_name(module), class_name(layer)))
            _take_place(layer, module)
        elif not can_be_served(module):
            left.append(
                Left(
                    name,
                    class_name(module),
                    "scripted code runs outside of Python; its dropout stays torch's",
                )
            )
        elif isinstance(module, (*CALLING, *TRANSFORMERS)) or id(module) in said or not _is_known(module):
            was, reading = class_name(module), read_class(type(module))
            serve(module, said.get(id(module)))
            if _is_noisy(module, reading):
                replaced.append(Change(name, was, _served_how(module, reading)))
            left += _left_inside(name, was, reading)
    root = new.get(id(network), network)
    for module in list(network.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in new:
                module._modules[name] = new[id(child)]
    unread = [name for name, module in network.named_modules() if _is_unread(module)]
    if not replaced and not left and not unread and not ours:
        raise NoMaskError(
            f"a {given} in which nothing draws a mask was given. "
            "Put dropout in: dropkit.insert(model, after=torch.nn.ReLU, layer=lambda: dropkit.nn.Dropout(0.1))."
        )
    name_sites(root)
    notes = _notes(root, [] if replaced or left else unread)
    if ours and not replaced and not left:
        notes.append("The model's dropout is dropkit's already.")
    return Conversion(root, tuple(replaced), tuple(left), tuple(notes))


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, or what is wrong with the model."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"a {type(model).__name__} was given; a torch.nn.Module is needed.")
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise OptionError(f"this {class_name(model)} cannot be copied: {error}") from error


def class_name(module: nn.Module) -> str:
    """A class as users write it: torch.nn.Dropout, timm.layers.DropPath."""
    cls = type(module)
    package = cls.__module__
    for short in ("torch.nn", "dropkit.nn"):
        if package.startswith(short + "."):
            package = short
    return cls.__qualname__ if package in ("__main__", "builtins") else f"{package}.{cls.__qualname__}"


def _is_known(module: nn.Module) -> bool:
    """Whether a module is torch's or ours, so that nothing random hides in its forward but what we know of."""
    return type(module).__module__.partition(".")[0] in ("torch", "dropkit")


def _is_noisy(module: nn.Module, reading: Reading) -> bool:
    """Whether a served module has chance of its own, as far as can be told."""
    if isinstance(module, TRANSFORMERS):
        return False  # what is random in it stands in its parts
    if isinstance(module, CALLING):
        return held_rate(module) > 0
    return bool(reading.answered or reading.gated)


def _served_how(module: nn.Module, reading: Reading) -> str:
    if isinstance(module, nn.RNNBase):
        return "served: dropout between its layers"
    if isinstance(module, nn.MultiheadAttention):
        return "served: dropout on its weights"
    if isinstance(module, CALLING):
        return "served: its call"
    calls = ", ".join(reading.answered) or "the rate it hands on"
    if is_message_passing(module):
        return f"served: {calls}, on edges"
    return f"served: {calls}"


def _left_inside(name: str, was: str, reading: Reading) -> list[Left]:
    left = [Left(name, draw, "plain random numbers, which stay torch's") for draw in reading.draws]
    if reading.gated and reading.otherwise:
        left.append(
            Left(
                name,
                f"{was}, a rate handed on only in training",
                f"its mode decides other things too ({reading.otherwise[0]}), so that rate is silent for a member",
            )
        )
    return left


def _row_dims(network: nn.Module, rows: Mapping[str, int]) -> dict[int, int]:
    """The dimension that counts rows, by the identity of the module."""
    modules = dict(network.named_modules())
    for name, dim in rows.items():
        if name not in modules:
            raise OptionError(f"rows={dict(rows)!r} was given; the model has no module {name!r}.")
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0:
            raise OptionError(f"rows={dict(rows)!r} was given; a dimension is a whole number from 0 on.")
    return {id(modules[name]): dim for name, dim in rows.items()}


def _is_unread(module: nn.Module) -> bool:
    """Whether code that could not be read may draw in this module's forward."""
    if not isinstance(module, Served) or _is_known(module):
        return False
    reading = read_class(type(module))
    hidden = any(
        not name or not isinstance(getattr(module, name, None), nn.Module) for name in reading.unknown
    )
    return hidden or not reading.readable


def _notes(network: nn.Module, unread: list[str]) -> list[str]:
    notes = []
    if unread:
        some = ", ".join(repr(name) for name in unread[:4]) + (
            f" and {len(unread) - 4} more" if unread[4:] else ""
        )
        notes.append(
            f"Nothing that draws was read, but not all code of {some} can be; its calls are served, if it makes any. "
            "dropkit.scan(conversion.model, example) shows them."
        )
    if any(is_message_passing(module) for module in network.modules()):
        notes.append(
            "Dropout inside a graph layer falls on edges: a member knows an edge by its place in the list, and is one "
            "function of the nodes for one graph; other dropout is shared by all nodes."
        )
    return notes


def _take_place(layer: nn.Module, original: nn.Module) -> None:
    """Put a new layer where the original was, which it remembers (not as a child: no key of the state dict changes)."""
    carry(original, layer)
    vars(layer)["dropkit_original"] = (original,)


def carry(source: nn.Module, target: nn.Module) -> None:
    """Take a module's hooks and mode over to another that stands in its place."""
    for name in _CARRIED:
        if name in vars(source):
            vars(target)[name] = vars(source)[name]
    target.training = source.training


def parent_of(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a module, and under which name."""
    above, _, last = name.rpartition(".")
    return network.get_submodule(above), last

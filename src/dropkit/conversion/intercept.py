"""Modules whose random calls are answered by dropkit: same weights, same code, same class to `isinstance`.

A served module gets a subclass of its own class, which puts a frame around `forward`; while a frame is open, a torch
function mode hands the calls in `serve.SERVERS` to dropkit. Nothing is patched: other models, and the same model's
original, run as before.
"""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dropkit.conversion import frames
from dropkit.conversion.serve import SERVERS
from dropkit.conversion.source import read_class


class Interception(TorchFunctionMode):
    """Hands torch's random calls to dropkit; every other call passes through."""

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        server = SERVERS.get(func)
        frame = frames.current() if server is not None else None
        if server is None or frame is None:
            return func(*args, **(kwargs or {}))
        return server(frame, *args, **(kwargs or {}))


class Served:
    """Mark of a module whose calls dropkit answers; its class is a subclass of what it was, `dropkit_base`."""

    __slots__ = ()


class Followed:
    """Mark of a module whose output goes through an inserted layer; likewise."""

    __slots__ = ()


def _is_training(module: nn.Module) -> bool:
    """True in training, and inside the module's own forward when a member is asked for.

    Code that says `dropout_p=rate if self.training else 0.0` hands its rate on only then. The modules inside keep
    their mode: BatchNorm stays in evaluation.
    """
    try:
        mode = vars(module)["training"]
    except KeyError:
        raise AttributeError("training") from None
    if mode:
        return True
    frame = frames.current()
    return frame is not None and frame.module is module and frames.member_asked()


def _set_training(module: nn.Module, mode: bool) -> None:
    vars(module)["training"] = mode


_classes: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}


def marked_class(
    mark: type,
    base: type[nn.Module],
    namespace: dict[str, Any],
    maker: Callable[[type[nn.Module]], type[nn.Module]],
) -> type[nn.Module]:
    """The subclass of `base` with a mark and another forward, under its name; one for each class.

    `maker` is the function of a module that makes it: a process that gets a copy makes the class anew.
    """
    if (mark, base) not in _classes:
        same = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        same["dropkit_maker"] = staticmethod(maker)
        same["__reduce_ex__"] = _reduce
        # The mark comes last: Python takes the memory layout from the first parent.
        made = types.new_class(
            base.__name__, (base, mark), {}, lambda names: names.update(same, dropkit_base=base, **namespace)
        )
        _classes[mark, base] = made
    return _classes[mark, base]


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """How a copy is made: the class, which no module holds under its name, is made again from its base."""
    makers, root = [], type(self)
    while issubclass(root, Served | Followed):
        makers.append(root.dropkit_maker)  # type: ignore[union-attr]
        root = root.dropkit_base  # type: ignore[union-attr]
    function, arguments, *rest = cast(tuple[Any, ...], root.__reduce_ex__(self, protocol))
    if function is not copyreg.__newobj__:  # type: ignore[attr-defined]
        raise TypeError(f"a {root.__qualname__} has a way of its own to be copied; restore the model first.")
    return _remade, (root, tuple(reversed(makers)), *arguments[1:]), *rest


def _remade(
    root: type[nn.Module], makers: tuple[Callable[..., type[nn.Module]], ...], *arguments: Any
) -> nn.Module:
    for maker in makers:
        root = maker(root)
    return root.__new__(root, *arguments)


def served_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose calls dropkit answers."""
    theirs = base.forward

    @functools.wraps(theirs)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if frames.current() is not None:
            with frames.running(self, args or tuple(kwargs.values())):
                return theirs(self, *args, **kwargs)
        with Interception(), frames.running(self, args or tuple(kwargs.values())):
            return theirs(self, *args, **kwargs)

    namespace: dict[str, Any] = {"forward": forward}
    if read_class(base).gated_by_mode:
        namespace["training"] = property(_is_training, _set_training)
    return marked_class(Served, base, namespace, served_class)


def serve(module: nn.Module, rows: int | None = None) -> None:
    """Let dropkit answer this module's random calls, and those of what it calls without a frame of its own.

    Args:
        module: changed in place.
        rows: the dimension that counts rows, where it is not known from the module.
    """
    if rows is not None:
        vars(module)["dropkit_rows"] = rows
    if not isinstance(module, Served):
        module.__class__ = served_class(type(module))
        vars(module)["dropkit_site"] = ""


def own_class(module: nn.Module) -> bool:
    """Give a module its own class back; whether it had another."""
    changed = isinstance(module, Served | Followed)
    while isinstance(module, Served | Followed):
        module.__class__ = type(module).dropkit_base  # type: ignore[union-attr]
    for name in ("dropkit_site", "dropkit_rows"):
        vars(module).pop(name, None)
    return changed


def can_be_served(module: nn.Module) -> bool:
    """Whether the module's class can be changed; scripted modules run outside of Python."""
    return not isinstance(module, torch.jit.ScriptModule)

"""Dropout where a model has none: after modules of a class, or at named places."""

from __future__ import annotations

import fnmatch
import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dropkit.conversion.converting import class_name, copied
from dropkit.conversion.frames import TRANSFORMERS
from dropkit.conversion.intercept import Followed, can_be_served, marked_class, serve
from dropkit.conversion.records import Change, Conversion
from dropkit.errors import DropkitWarning, OptionError, ShapeError
from dropkit.nn.layer import name_sites

CHILD = "dropkit_dropout"  # the name of an inserted layer inside the module that it follows


def insert(
    model: nn.Module,
    after: type[nn.Module] | tuple[type[nn.Module], ...] | str,
    layer: Callable[[], nn.Module],
) -> Conversion:
    """A copy of a model with a layer after each module of a class, or after named modules.

    The layer becomes a child of the module that it follows, so no key of the state dict changes; parameters of its
    own add keys. In an nn.Sequential, which calls its children itself, it is appended.

    Args:
        model: any module; it is not changed.
        after: a class (or several), or a pattern for qualified names: "blocks.*.mlp", with the wildcards of fnmatch.
        layer: makes the layer; called once for each place.

    Returns:
        The copy, where layers were put, and what follows from it in `notes`.

    Raises:
        OptionError: the arguments are of another kind, or nothing in the model fits.

    Example:
        >>> import torch, dropkit as dk
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> changed = dk.insert(model, after=torch.nn.ReLU, layer=lambda: dk.nn.Dropout(0.1))
        >>> [change.name for change in changed.replaced]
        ['1']
    """
    network = copied(model)
    places = _places(network, after)
    replaced: list[Change] = []
    notes: list[str] = []
    seen = set(network.state_dict())
    for name, module in places:
        new = layer()
        if not isinstance(new, nn.Module):
            raise OptionError(f"layer() gave a {type(new).__name__}; it is to make a torch.nn.Module.")
        new.train(module.training)
        was = class_name(module)
        _follow(name, module, new)
        replaced.append(Change(name, was, f"followed by {class_name(new)}"))
    added = [key for key in network.state_dict() if key not in seen]
    notes.append(
        f"New keys of the state dict: {', '.join(added)}."
        if added
        else "The keys of the state dict stay as they were."
    )
    names = [name for name, _ in places]
    notes += [
        f"{name!r} stands right before the BatchNorm {following!r}: its running variance is that without dropout in "
        "evaluation and with it in training (variance shift). Put dropout after the last BatchNorm."
        for name, following in _before_batch_norm(network, names)
    ]
    last = _last_layer(network)
    if last in names:
        notes.append(
            f"{last!r} is the last layer of the model: dropout after it makes each output 0 or y / (1 - p), and the "
            "spread says nothing but |y| sqrt(p / (1 - p)). Put it before the last weights."
        )
        warnings.warn(notes[-1], DropkitWarning, stacklevel=2)
    for module in network.modules():
        if isinstance(module, (*TRANSFORMERS, nn.MultiheadAttention)):
            serve(module)  # its inference path would skip the new layers
    name_sites(network)
    return Conversion(network, tuple(replaced), (), tuple(notes))


def _places(network: nn.Module, after: Any) -> list[tuple[str, nn.Module]]:
    classes = after if isinstance(after, tuple) else (after,)
    if isinstance(after, str):
        found = [(n, m) for n, m in network.named_modules() if n and fnmatch.fnmatchcase(n, after)]
        what = f"a name like {after!r}"
    elif classes and all(isinstance(cls, type) and issubclass(cls, nn.Module) for cls in classes):
        found = [(n, m) for n, m in network.named_modules() if isinstance(m, classes)]
        what = " or ".join(cls.__name__ for cls in classes)
    else:
        raise OptionError(f"after={after!r} was given; a class of modules or a pattern for names is needed.")
    if not found:
        names = [n for n, _ in network.named_modules() if n]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise OptionError(f"the model has no module with {what}; its modules are {shown}.")
    for name, module in found:
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList) or not can_be_served(module):
            raise OptionError(f"{name!r} is a {class_name(module)}, after which nothing can be put.")
    return found


def _followed_class(base: type[nn.Module]) -> type[nn.Module]:
    theirs = base.forward

    @functools.wraps(theirs)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = theirs(self, *args, **kwargs)
        layer = self._modules[CHILD]
        assert layer is not None
        if isinstance(output, Tensor):
            return layer(output)
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            rest = (layer(output[0]), *output[1:])
            return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
        raise ShapeError(
            f"{type(self).__name__} gave a {type(output).__name__}; a layer can follow a tensor, or a tuple that "
            "begins with one."
        )

    return marked_class(Followed, base, {"forward": forward}, _followed_class)


def _follow(name: str, module: nn.Module, layer: nn.Module) -> None:
    child = CHILD
    if isinstance(module, nn.Sequential):
        child = str(len(module))
        while child in module._modules:
            child += "_"
    elif CHILD in module._modules:
        raise OptionError(
            f"{name!r} is followed by a layer already; restore the model first, or name other places."
        )
    else:
        module.__class__ = _followed_class(type(module))
    module.add_module(child, layer)
    vars(module)["dropkit_inserted"] = (*vars(module).get("dropkit_inserted", ()), child)


def _before_batch_norm(network: nn.Module, names: list[str]) -> list[tuple[str, str]]:
    """Places whose next neighbour, in the order in which modules were made, normalises by running statistics."""
    found = []
    for name in names:
        above, _, last = name.rpartition(".")
        neighbours = list(network.get_submodule(above)._modules.items())
        at = [n for n, _ in neighbours].index(last)
        if at + 1 < len(neighbours) and isinstance(neighbours[at + 1][1], _NormBase):
            found.append((name, f"{above}.{neighbours[at + 1][0]}".lstrip(".")))
    return found


def _last_layer(network: nn.Module) -> str:
    """The last module without children, in the order in which they were made."""
    leaves = [
        n for n, m in network.named_modules() if n and not set(m._modules) - {CHILD} and not n.endswith(CHILD)
    ]
    return leaves[-1] if leaves else ""

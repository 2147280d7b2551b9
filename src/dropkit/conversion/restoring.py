"""The way back from a converted model."""

from __future__ import annotations

from torch import nn

from dropkit.conversion.converting import carry, class_name, copied
from dropkit.conversion.intercept import own_class
from dropkit.conversion.records import Conversion
from dropkit.errors import OptionError


def restore(converted: nn.Module | Conversion) -> nn.Module:
    """The original structure of a converted model, around the weights and modes of now, as a copy.

    Args:
        converted: what `convert` or `insert` gave, or its model; it is not changed.

    Raises:
        OptionError: what was given is no module, or was not converted.
    """
    network = copied(converted.model if isinstance(converted, Conversion) else converted)
    old: dict[int, nn.Module] = {}
    found = False
    for module in list(network.modules()):
        found |= own_class(module)
        for name in vars(module).pop("dropkit_inserted", ()):
            del module._modules[name]
            found = True
        if "dropkit_original" in vars(module):
            (original,) = vars(module).pop("dropkit_original")
            carry(module, original)
            old[id(module)] = original
    if not old and not found:
        raise OptionError(
            f"a {class_name(network)} that dropkit did not convert was given; there is nothing to restore."
        )
    for module in list(network.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in old:
                module._modules[name] = old[id(child)]
    return old.get(id(network), network)

"""Rates by name: other numbers, or schedules, for layers of a model that is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn

from dropkit.errors import OptionError
from dropkit.nn.layer import Rate, StochasticLayer, check_rate
from dropkit.nn.schedules import Schedule

# How dropkit's layers call a number that is a rate; the first is that of nearly all.
ATTRIBUTES = (
    "p", "input_p", "dropout", "input_dropout", "recurrent_dropout", "output_dropout", "weight_dropout",
    "zoneout_hidden", "zoneout_cell",
)  # fmt: skip


def rates_of(model: nn.Module) -> dict[str, Rate]:
    """Every rate of a model's dropkit layers.

    Args:
        model: any module.

    Returns:
        {name: rate}: the layer's qualified name where the rate is its `p`, else name.attribute, such as
        "lstm.recurrent_dropout".
    """
    return {name: rate for name, _, _, rate in _places(model)}


def set_rates(model: nn.Module, rates: Mapping[str, Rate]) -> tuple[str, ...]:
    """Give layers of a model other rates, in place.

    Args:
        model: any module with dropkit layers; `dropkit.convert` makes one of a model of torch.
        rates: {pattern: rate}; a pattern such as "encoder.*" is that of a shell, on the names of `rates_of`. The first
            one that fits a name decides. A rate is a number, a `Schedule`, or a tensor as the layer takes it.

    Returns:
        The names that have a new rate.

    Raises:
        OptionError: a pattern that fits no name.
        ProbabilityError: a rate outside [0, 1].

    Example:
        >>> import torch, dropkit as dk
        >>> block = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), dk.nn.DropPath(0.1))
        >>> model = torch.nn.Sequential(block(), block(), block())
        >>> falling = dk.nn.schedules.early(0.5, steps=1000, shape="linear")
        >>> by_depth = dk.nn.schedules.ramp(falling, layers=3)
        >>> dk.nn.set_rates(model, {f"{i}.*": rate for i, rate in enumerate(by_depth)})
        ('0.1', '1.1', '2.1')
        >>> [rate(0) for rate in dk.nn.rates_of(model).values()]
        [0.0, 0.25, 0.5]
    """
    checked = {
        pattern: rate if isinstance(rate, Schedule) else check_rate(rate) for pattern, rate in rates.items()
    }
    places = list(_places(model))
    names = [name for name, *_ in places]
    for pattern in checked:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=3) or names[:8]
            raise OptionError(
                f"{pattern!r} was given, which fits no rate of this model. "
                f"{'Names are ' + ', '.join(near) if near else 'It has no dropkit layer: dropkit.convert makes them'}."
            )
    changed = []
    for name, layer, attribute, _ in places:
        fitting = [pattern for pattern in checked if fnmatchcase(name, pattern)]
        if not fitting:
            continue
        layer.__dict__.pop(attribute, None)
        layer._buffers.pop(attribute, None)
        layer._non_persistent_buffers_set.discard(attribute)
        rate = checked[fitting[0]]
        if isinstance(rate, Tensor):
            layer.register_buffer(attribute, rate, persistent=False)
        else:
            setattr(layer, attribute, rate)
        changed.append(name)
    return tuple(changed)


def _places(model: nn.Module) -> Iterator[tuple[str, StochasticLayer, str, Rate]]:
    for name, layer in model.named_modules():
        if not isinstance(layer, StochasticLayer):
            continue
        for attribute in ATTRIBUTES:
            value = vars(layer).get(attribute, layer._buffers.get(attribute))
            if isinstance(value, float | int | Schedule | Tensor) and not isinstance(value, bool):
                own = name if attribute == "p" else f"{name}.{attribute}" if name else attribute
                yield own, layer, attribute, value

"""Every place where chance enters a model: layers, rates held as numbers, calls inside of forward."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dropkit.conversion.converting import class_name, copied
from dropkit.conversion.intercept import Served
from dropkit.conversion.records import Scan, Site
from dropkit.conversion.rules import held_rate, known_rate
from dropkit.conversion.traps import find_traps
from dropkit.conversion.watch import Event, Pass, run_example
from dropkit.nn.layer import StochasticLayer

Mode = Literal["train", "eval"]

OTHER_NOISE = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
RATE_NAME = re.compile(r"drop", re.IGNORECASE)


def scan(model: nn.Module, example: Any = None) -> Scan:
    """List every place where chance enters a model, and the silent failures that wait there.

    Layers are found by looking; calls such as torch.nn.functional.dropout only by running an example, in evaluation,
    in training and as a committee member. That is done on a copy: modes, weights, buffers and the states of torch's,
    Python's and numpy's generators stay as they are. A copy takes the model's memory once more.

    Args:
        model: any module.
        example: what the model takes: a tensor, a tuple of arguments, or a dict of named ones.

    Returns:
        The sites and what to beware of; `print` shows a table.

    Raises:
        OptionError: what was given is no module, cannot be copied, or does not run on the example.

    Example:
        >>> import torch, dropkit as dk
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        >>> print(dk.scan(model, torch.zeros(2, 3)))
        site  kind    what              rate  mode   train  eval  committee  where
        1     module  torch.nn.Dropout  0.2   train  yes    no    no
    """
    network = copied(model)
    modes = {name: _mode(module) for name, module in network.named_modules()}
    sites = [site for name, module in network.named_modules() if (site := _found(name, module))]
    if example is None:
        return Scan(tuple(sites), tuple(find_traps(network, sites, None, None)), ran=False)
    in_eval = run_example(network, example, training=False, member=None)
    as_member = run_example(network, example, training=False, member=0)
    in_train = run_example(network, example, training=True, member=None)
    sites = _seen(network, modes, sites, in_train, in_eval, as_member)
    order = {name: place for place, name in enumerate(modes)}
    sites.sort(key=lambda site: order.get(site.name, -1))
    return Scan(tuple(sites), tuple(find_traps(network, sites, in_train, in_eval)), ran=True)


def _mode(module: nn.Module) -> Mode:
    return "train" if module.training else "eval"


def _found(name: str, module: nn.Module) -> Site | None:
    """What a module is known for without running it."""
    mode = _mode(module)
    if isinstance(module, StochasticLayer):
        rate = _rate_of(module)
        acts = rate is None or rate > 0
        return Site(name, "module", class_name(module), rate, mode, acts, False, acts)
    served = isinstance(module, Served)
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        rate = held_rate(module)
        if not rate:
            return None
        acts = not isinstance(module, nn.RNNBase) or module.num_layers > 1
        return Site(name, "rate", f"{class_name(module)}.dropout", rate, mode, acts, False, served and acts)
    if isinstance(module, _DropoutNd):
        acts = module.p > 0
        return Site(name, "module", class_name(module), float(module.p), mode, acts, False, served and acts)
    if isinstance(module, OTHER_NOISE):
        always = not isinstance(module, nn.RReLU)
        return Site(name, "module", class_name(module), None, mode, True, always, always)
    if (rate := known_rate(module)) is not None:
        return Site(name, "module", class_name(module), rate, mode, rate > 0, False, False)
    for attribute, value in vars(module).items():
        if RATE_NAME.search(attribute) and isinstance(value, float) and 0 < value <= 1:
            return Site(name, "rate", f"{class_name(module)}.{attribute}", value, mode, None, None, False)
    return None


def _rate_of(layer: StochasticLayer) -> float | None:
    p = getattr(layer, "p", None)
    if isinstance(p, Tensor):
        return float(p.detach().max())
    return float(p) if isinstance(p, int | float) else None


def _seen(
    network: nn.Module,
    modes: dict[str, Mode],
    found: list[Site],
    in_train: Pass,
    in_eval: Pass,
    as_member: Pass,
) -> list[Site]:
    """The sites as the passes showed them."""
    modules = dict(network.named_modules())
    sites: list[Site] = []
    explained: set[tuple[str, str]] = set()  # calls that a layer or a held rate is the reason for
    for site in found:
        if site.kind == "rate" and site.acts_in_train is None:
            continue  # a number with a telling name; where it is used, the call was seen
        train, evaluation = _at(site.name, in_train), _at(site.name, in_eval)
        explained.update((site.name, event.what) for event in (*train, *evaluation))
        if isinstance(modules[site.name], StochasticLayer | Served):
            acts = [
                any(name.partition(":")[0] == site.name for name in seen.drawn) and site.acts_in_train is True
                for seen in (in_train, in_eval, as_member)
            ]
        else:
            acts = [any(event.acts for event in events) for events in (train, evaluation, evaluation)]
        sites.append(replace(site, acts_in_train=acts[0], acts_in_eval=acts[1], acts_in_committee=acts[2]))
    known = {site.name for site in sites}
    return [
        *sites,
        *_calls(modes, in_train, in_eval, explained),
        *_served_calls(modes, known, in_train, in_eval, as_member),
        *_foreign_draws(modes, in_train, in_eval),
    ]


def _calls(
    modes: dict[str, Mode], in_train: Pass, in_eval: Pass, explained: set[tuple[str, str]]
) -> Iterator[Site]:
    """Calls that no layer is the reason for; one line of code is one site, however often it ran."""
    calls: dict[tuple[str, str, str], list[tuple[bool, Event]]] = {}
    for training, seen in ((True, in_train), (False, in_eval)):
        for event in seen.events:
            if (event.name, event.what) not in explained:
                calls.setdefault((event.name, event.what, event.where), []).append((training, event))
    for (name, what, where), events in calls.items():
        rates = [event.rate for _, event in events if event.rate is not None]
        train, evaluation = (
            any(e.acts for training, e in events if training is mode) for mode in (True, False)
        )
        if not rates:
            yield Site(name, "draw", what, None, modes[name], train, evaluation, evaluation, where)
        elif max(rates) > 0:
            yield Site(name, "call", what, max(rates), modes[name], train, evaluation, evaluation, where)


def _served_calls(
    modes: dict[str, Mode], known: set[str], in_train: Pass, in_eval: Pass, as_member: Pass
) -> Iterator[Site]:
    """Calls of a converted model, which dropkit answers."""
    for name in dict.fromkeys((*in_train.drawn, *as_member.drawn)):
        above, colon, what = name.partition(":")
        if colon and above not in known:
            train, evaluation, member = (name in seen.drawn for seen in (in_train, in_eval, as_member))
            yield Site(
                above, "call", f"{what}, served by dropkit", None, modes[above], train, evaluation, member
            )


def _foreign_draws(modes: dict[str, Mode], in_train: Pass, in_eval: Pass) -> Iterator[Site]:
    """Draws from generators beside torch's, of which only this is known: that they moved."""
    for name in dict.fromkeys((*in_train.foreign, *in_eval.foreign)):
        evaluation = name in in_eval.foreign
        yield Site(
            "", "draw", f"Python's {name}", None, modes[""], name in in_train.foreign, evaluation, evaluation
        )


def _at(name: str, seen: Pass) -> list[Event]:
    return [event for event in seen.events if event.name == name]

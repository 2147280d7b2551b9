"""torch's LSTM on inputs that vary, step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropkit.committee.moments.call import GAUSSIAN, Call, no_rule
from dropkit.committee.moments.gaussian import through
from dropkit.committee.moments.lines import linear
from dropkit.committee.moments.values import Spread, added, multiplied, spelled
from dropkit.errors import MomentsError


def lstm(call: Call) -> list[Spread]:
    """aten::lstm: gates by quadrature, products as those of Gaussian values.

    c = sigmoid(f) c + sigmoid(i) tanh(g),   h = sigmoid(o) tanh(c)

    Returns:
        Output, last h, last c, as the operator does.

    Raises:
        MomentsError: packed sequences, projections, or dropout between its layers that torch draws itself.
    """
    if len(call.args) != 9 or not isinstance(call.args[1], list | tuple):
        raise MomentsError(no_rule(call, "packed sequences are not known"))
    x, states, weights, biases, layers, dropout, train, two_ways, batch_first = call.args
    ways, each = 1 + bool(two_ways), 4 if biases else 2
    if len(weights) != layers * ways * each:
        raise MomentsError(no_rule(call, "projections are not known"))
    if train and dropout:
        raise MomentsError(no_rule(call, "torch draws the dropout between its layers"))
    call.leave(GAUSSIAN)
    weights = [spelled(w, call.account) if isinstance(w, Spread) else w for w in weights]
    if any(isinstance(w, Spread) and w.own is not None for w in weights):
        call.leave("noise on its weights taken as independent from step to step; " + GAUSSIAN)
    starts = [[_spread(state, layer) for state in states] for layer in range(layers * ways)]
    steps = list(_pieces(_spread(x), 1 if batch_first else 0))
    last: list[tuple[Spread, Spread]] = []
    for layer in range(layers):
        outputs = []
        for way in range(ways):
            at = layer * ways + way
            ordered = steps[::-1] if way else steps
            found, state = _run(ordered, starts[at], weights[at * each : (at + 1) * each], call)
            outputs.append(found[::-1] if way else found)
            last.append(state)
        steps = outputs[0] if ways == 1 else [_joined(pair, -1) for pair in zip(*outputs, strict=True)]
    output = _joined([_moved(s, 1 if batch_first else 0) for s in steps], 1 if batch_first else 0)
    ends = [_joined([_moved(state[i], 0) for state in last], 0) for i in range(2)]
    return [output, *ends]


def _run(
    steps: list[Spread], start: list[Spread], weights: list[Any], call: Call
) -> tuple[list[Spread], tuple[Spread, Spread]]:
    h, c = start
    of_x, of_h, *bias = weights
    found = []
    for x in steps:
        gates = added(
            linear(x, of_x, *bias[:1], call=call),
            linear(h, of_h, *bias[1:], call=call),
        )
        i, f, g, o = _quarters(gates)
        i, f, o = (spelled(through(torch.sigmoid, gate), call.account) for gate in (i, f, o))
        g = spelled(through(torch.tanh, g), call.account)
        c = spelled(added(multiplied(f, c), multiplied(i, g)), call.account)
        h = spelled(multiplied(o, spelled(through(torch.tanh, c), call.account)), call.account)
        found.append(h)
    return found, (h, c)


def _spread(x: Spread | Tensor, layer: int | None = None) -> Spread:
    x = x if isinstance(x, Spread) else Spread(x, {})
    if layer is None:
        return x
    own = None if x.own is None else x.own[layer]
    return Spread(x.mean[layer], {key: f[:, layer] for key, f in x.factors.items()}, own, x.mixed)


def _pieces(x: Spread, dim: int) -> list[Spread]:
    return [
        Spread(
            x.mean.select(dim, t),
            {key: f.select(dim + 1, t) for key, f in x.factors.items()},
            None if x.own is None else x.own.select(dim, t),
            x.mixed,
        )
        for t in range(x.mean.shape[dim])
    ]


def _quarters(x: Spread) -> list[Spread]:
    means = x.mean.chunk(4, -1)
    owns = [None] * 4 if x.own is None else x.own.chunk(4, -1)
    factors = {key: f.chunk(4, -1) for key, f in x.factors.items()}
    return [
        Spread(mean, {key: f[i] for key, f in factors.items()}, own, x.mixed)
        for i, (mean, own) in enumerate(zip(means, owns, strict=True))
    ]


def _moved(x: Spread, dim: int) -> Spread:
    own = None if x.own is None else x.own.unsqueeze(dim)
    factors = {key: f.unsqueeze(dim + 1) for key, f in x.factors.items()}
    return Spread(x.mean.unsqueeze(dim), factors, own, x.mixed)


def _joined(parts: list[Spread] | tuple[Spread, ...], dim: int) -> Spread:
    of_factor = dim if dim < 0 else dim + 1
    counts = {key: len(f) for part in parts for key, f in part.factors.items()}
    factors = {
        key: torch.cat([p.factors.get(key, p.mean.new_zeros(n, *p.mean.shape)) for p in parts], of_factor)
        for key, n in counts.items()
    }
    own = None
    if any(part.own is not None for part in parts):
        own = torch.cat([torch.zeros_like(p.mean) if p.own is None else p.own for p in parts], dim)
    return Spread(torch.cat([p.mean for p in parts], dim), factors, own, any(p.mixed for p in parts))

"""Thinning of products: linear maps, convolutions, matrix products, recurrent layers, attention.

Rows of a weight that nobody needs are cut out, and columns that would meet zeros.
"""

# What each method does stands once, in `Rule`.
# ruff: noqa: D102

from __future__ import annotations

import math
from typing import Any

from torch import fx

from dropkit.committee.thinning.reading import Reading, aten, hint
from dropkit.committee.thinning.rules import (
    Factors,
    Live,
    Needs,
    Rule,
    Sets,
    Writer,
    full,
    tensor_inputs,
    to_input,
    to_output,
    with_values,
)
from dropkit.committee.thinning.units import Units, both, dropped, every


class Linear(Rule):
    """y = x W^T + b: rows of W that nobody needs are cut, and columns that meet zeros."""

    named = True
    wide = False  # whether the units are followed by positions, as in a convolution

    def unit_dim(self, reading: Reading, node: fx.Node) -> int:
        """Which dim of the result, and of the input, the units are."""
        return len(reading.sizes(node)) - 1

    @staticmethod
    def parts(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """x, W and b."""
        x, weight, bias = (*node.args, *[node.kwargs.get("bias")] * (3 - len(node.args)))[:3]
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        return x, weight, bias if isinstance(bias, fx.Node) else None

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        x, weight, bias = self.parts(node)
        if bias is not None:
            return full(reading, node)
        at = self.unit_dim(reading, node)
        sets = list(full(reading, node)) if self.wide else list(live(x))
        sets[at] = live(weight)[0]
        return tuple(sets)

    def contracted(self, reading: Reading, node: fx.Node, live: Live) -> Units:
        """Input units that can make a difference."""
        x, weight, _ = self.parts(node)
        return both(live(x)[self.unit_dim(reading, node)], live(weight)[1])

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        x, weight, bias = self.parts(node)
        at = self.unit_dim(reading, node)
        inner = self.contracted(reading, node, live)
        sets = list(full(reading, x)) if self.wide else list(need)
        sets[at] = inner
        yield x, tuple(sets)
        yield weight, (need[at], inner, *full(reading, weight)[2:])
        if bias is not None:
            yield bias, (need[at],)

    def write(self, w: Writer, node: fx.Node) -> None:
        x, weight, bias = self.parts(node)
        at = self.unit_dim(w.reading, node)
        held = list(w.held(node))
        inner = self.contracted(w.reading, node, w.live)
        sets = list(full(w.reading, x)) if self.wide else list(held)
        if self.wide:
            held[2:] = full(w.reading, node)[2:]
        norm, site = w.norm_into(node), w.corrected(node)
        rows: Factors = () if norm is None else ((0, ("norm", norm)),)
        kernel = full(w.reading, weight)[2:]
        if site is not None:  # the dense product is there; take off what is dropped
            lost = dropped(site, inner.n)
            source = w.reading.sites[site].source
            sets[at] = lost
            values = [
                w.take(source, tuple(sets)),
                w.weight(weight, (held[at], lost, *kernel), (*rows, (1, ("lost", site)))),
            ]
            dense = w.prepared_product(node, source, weight, bias, norm, site, tuple(held))
            w.product(node, held[at], lost, self.each(w.reading, node), inner)
            taken_off = w.call(node.target, *values, None, *node.args[3:], **_rest(node))
            w.put_value(node, (aten.add.Tensor, (taken_off, dense)), tuple(held))
            return
        sets[at] = inner
        taken, factors = w.take_unscaled(x, tuple(sets))
        inside = tuple((1, f) for dim, f in factors if dim == at)
        if len(inside) < len(factors):
            taken, inside = w.take(x, tuple(sets)), ()
        thinned = w.weight(weight, (held[at], inner, *kernel), (*rows, *inside))
        shift = w.shift(bias, norm, held[at])
        w.product(node, held[at], inner, self.each(w.reading, node))
        value = w.call(node.target, taken, thinned, shift, *node.args[3:], **_rest(node))
        w.put_value(node, value, tuple(held))

    def each(self, reading: Reading, node: fx.Node) -> float:
        """Multiply-adds a row for a pair of units: positions of the result, times those of the kernel."""
        at, out = self.unit_dim(reading, node), reading.sizes(node)
        return float(
            math.prod([n for d, n in enumerate(out) if d not in (0, at)])
            * math.prod(reading.sizes(self.parts(node)[1])[2:])
        )


def _rest(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, other than the bias."""
    return {name: value for name, value in node.kwargs.items() if name != "bias"}


class Convolution(Linear):
    """The same with channels for units, and a small matrix for each position of the kernel."""

    wide = True

    def unit_dim(self, reading: Reading, node: fx.Node) -> int:
        return 1

    @staticmethod
    def applies(node: fx.Node) -> bool:
        """Not to grouped convolutions, nor to images without a batch, nor to padding by name of stride."""
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        x = node.args[0]
        assert isinstance(x, fx.Node)
        spatial = {aten.conv1d: 1, aten.conv2d: 2, aten.conv3d: 3}[node.target.overloadpacket]  # type: ignore[union-attr]
        return bool(groups == 1) and len(x.meta["val"].shape) == spatial + 2


class MatrixProduct(Rule):
    """y[.., i, j] = sum over k of a[.., i, k] b[.., k, j]."""

    named = True

    @staticmethod
    def applies(reading: Reading, node: fx.Node) -> bool:
        """To stacks of matrices; products with vectors are left."""
        a, b = node.args[:2]
        return len(reading.sizes(a)) >= 2 and len(reading.sizes(b)) >= 2  # type: ignore[arg-type]

    def _stack(self, reading: Reading, node: fx.Node, sets: Sets, x: fx.Node) -> Sets:
        return to_input(sets[:-2], reading.sizes(x)[:-2], reading.sizes(node)[:-2])

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        a, b = node.args[:2]
        out = reading.sizes(node)[:-2]
        stacks = [to_output(live(x)[:-2], reading.sizes(x)[:-2], out) for x in (a, b)]  # type: ignore[arg-type]
        return (*map(both, *stacks), live(a)[-2], live(b)[-1])  # type: ignore[arg-type]

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        a, b = node.args[:2]
        held = tuple(map(both, need, self.live(reading, node, live)))
        inner = both(live(a)[-1], live(b)[-2])  # type: ignore[arg-type]
        yield a, (*self._stack(reading, node, held, a), held[-2], inner)  # type: ignore[arg-type,misc]
        yield b, (*self._stack(reading, node, held, b), inner, held[-1])  # type: ignore[arg-type,misc]

    def write(self, w: Writer, node: fx.Node) -> None:
        a, b = node.args[:2]
        assert isinstance(a, fx.Node)
        assert isinstance(b, fx.Node)
        held = w.held(node)
        inner = both(w.live(a)[-1], w.live(b)[-2])
        left = w.take(a, (*self._stack(w.reading, node, held, a), held[-2], inner))
        right = w.take(b, (*self._stack(w.reading, node, held, b), inner, held[-1]))
        each = 1.0
        for n in w.reading.sizes(node)[1:-1]:
            each *= n
        w.product(node, held[-1], inner, each)
        w.put(node, (left, right), {}, held)


class Recurrent(Rule):
    """lstm, gru, rnn: columns of the first layer's weights that meet zeros are cut; hidden units come back to
    themselves, so they all stay.
    """

    named = True

    @staticmethod
    def applies(node: fx.Node) -> bool:
        """To the form with a batch."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        return len(x.meta["val"].shape) == 3 and isinstance(node.args[2], list | tuple)

    @staticmethod
    def first_weights(node: fx.Node) -> list[fx.Node]:
        """The weights that the input meets: of the first layer, in one direction or two."""
        weights = node.args[2]
        assert isinstance(weights, list | tuple)
        biases, layers, both_ways = bool(node.args[3]), int(node.args[4]), bool(node.args[7])  # type: ignore[arg-type]
        each = len(weights) // (layers * (1 + both_ways))
        del biases
        return [w for w in weights[: each * (1 + both_ways) : each] if isinstance(w, fx.Node)]

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        x, first = node.args[0], self.first_weights(node)
        inner = live(x)[-1]  # type: ignore[arg-type]
        for i in tensor_inputs(node):
            sets = full(reading, i)
            yield i, ((*sets[:-1], inner) if i is x or i in first else sets)

    def write(self, w: Writer, node: fx.Node) -> None:
        x, first = node.args[0], self.first_weights(node)
        assert isinstance(x, fx.Node)
        sets = full(w.reading, x)
        inner = w.live(x)[-1]
        taken, factors = w.take_unscaled(x, (*sets[:-1], inner))
        inside = tuple((1, f) for dim, f in factors if dim == len(sets) - 1)
        if len(inside) < len(factors):
            taken, inside = w.take(x, (*sets[:-1], inner)), ()
        values = {x: taken}
        for i in tensor_inputs(node):
            if i in first:
                values[i] = w.weight(i, (full(w.reading, i)[0], inner), inside)
                w.product(node, full(w.reading, i)[0], inner, float(sets[1].n))
            elif i is not x:
                values[i] = w.take(i, full(w.reading, i))
        w.put(node, *with_values(node, values), ())


class Attention(Rule):
    """softmax(scale q k^T + mask) v: heads pass; units of v pass; units of q and k that meet zeros are cut."""

    named = True

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        _, _, v = node.args[:3]
        sets = list(full(reading, node))
        for d in (*range(len(sets) - 2), len(sets) - 1):
            sets[d] = live(v)[d]  # type: ignore[arg-type]
        return tuple(sets)

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        q, k, v = node.args[:3]
        held = tuple(map(both, need, self.live(reading, node, live)))
        for x in (q, k, v):
            sets = full(reading, x)  # type: ignore[arg-type]
            yield x, (*held[:-2], sets[-2], held[-1] if x is v else sets[-1])  # type: ignore[misc]
        for other in tensor_inputs(node):
            if other not in (q, k, v):
                yield (
                    other,
                    to_input(
                        (*held[:-2], *full(reading, other)[-2:]),
                        reading.sizes(other),
                        self._scores(reading, node),
                    ),
                )

    @staticmethod
    def _scores(reading: Reading, node: fx.Node) -> tuple[int, ...]:
        q, k = node.args[:2]
        return (*reading.sizes(node)[:-2], reading.sizes(q)[-2], reading.sizes(k)[-2])  # type: ignore[arg-type]

    @staticmethod
    def applies(reading: Reading, node: fx.Node) -> bool:
        """Where query, key and value have the same heads and nothing is drawn inside."""
        q, k, v = node.args[:3]
        stacks = {reading.sizes(x)[:-2] for x in (q, k, v)}  # type: ignore[arg-type]
        noise = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return len(stacks) == 1 and bool(noise == 0.0) and len({q, k, v}) == 3

    def write(self, w: Writer, node: fx.Node) -> None:
        q, k, v = node.args[:3]
        assert isinstance(q, fx.Node)
        assert isinstance(k, fx.Node)
        assert isinstance(v, fx.Node)
        held = list(w.held(node))
        held[-2] = full(w.reading, node)[-2]
        values: dict[fx.Node, Any] = {}
        for x in (q, k, v):
            sets = full(w.reading, x)
            values[x] = w.take(x, (*held[:-2], sets[-2], held[-1] if x is v else sets[-1]))
        for other in tensor_inputs(node):
            if other not in values:
                want = (*held[:-2], *full(w.reading, other)[-2:])
                scores = self._scores(w.reading, node)
                values[other] = w.take(other, to_input(want, w.reading.sizes(other), scores))
        length, keys = w.reading.sizes(q)[-2], w.reading.sizes(k)[-2]
        if len(held) > 3:
            w.product(node, held[1], every(1), 2.0 * length * keys * hint(w.reading.sizes(q)[-1]))
        w.put(node, *with_values(node, values), tuple(held))

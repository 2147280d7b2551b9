"""Which rule thins which operator of torch."""

# What each method does stands once, in `Rule`.
# ruff: noqa: D102

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dropkit.committee.graph import DROPOUT_AT
from dropkit.committee.thinning import products, rules, shapes
from dropkit.committee.thinning.reading import NOISE_AT, Reading, aten
from dropkit.committee.thinning.rules import Live, Needs, Rule, Sets, Writer, full
from dropkit.committee.thinning.units import both, every, kept, nothing


class Dropped(Rule):
    """A site whose mask drops whole units: nothing is computed, only fewer units are there."""

    named = True

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        number = reading.site_at[node]
        site = reading.sites[number]
        sets = list(live(site.source))
        sets[site.dim] = both(sets[site.dim], kept(number, site.n))
        return tuple(sets)

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        site = reading.sites[reading.site_at[node]]
        yield site.source, tuple(map(both, need, self.live(reading, node, live)))

    def write(self, w: Writer, node: fx.Node) -> None:
        number = w.reading.site_at[node]
        site = w.reading.sites[number]
        held = w.held(node)
        value, factors = w.take_unscaled(site.source, held)
        w.put_value(node, value, held, (*factors, (site.dim, ("site", number))))


class Noisy(Rule):
    """Noise that takes its place in a mask from all units, so that every unit has to be there; zeros stay zeros."""

    named = True

    def live(self, reading: Reading, node: fx.Node, live: Live) -> Sets:
        return live(shapes.source(node))

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        yield shapes.source(node), need

    def write(self, w: Writer, node: fx.Node) -> None:
        x = shapes.source(node)
        value = w.take(x, full(w.reading, x))
        w.put(node, *rules.with_values(node, {x: value}), full(w.reading, node))


class Ones(Rule):
    """Ones of a shape: as many as are held; of the input only what it is made of and where it lies."""

    named = True

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        x = shapes.source(node)
        opened = reading.open_dims(x)
        yield x, tuple(every(n) if o else nothing(n) for n, o in zip(reading.sizes(x), opened, strict=True))

    def write(self, w: Writer, node: fx.Node) -> None:
        x, held = shapes.source(node), w.held(node)
        opened = w.reading.open_dims(node)
        value = w.plain(x)
        if node.target is aten.ones_like.default:
            given: list[Any] = [
                w.call(aten.sym_size.int, value, d) if is_open else n
                for d, (n, is_open) in enumerate(zip(w.reading.sizes(node), opened, strict=True))
            ]
        else:
            given = list(node.args[1])  # type: ignore[arg-type]
        sizes = [
            w.count(units) if units.kind != "all" else size for units, size in zip(held, given, strict=True)
        ]
        kwargs = {"dtype": node.meta["val"].dtype, "device": node.meta["val"].device}
        w.put_value(node, (aten.new_ones.default, (value, sizes), kwargs), held, ())


class Size(Rule):
    """A size of a tensor."""

    named = True

    def need(self, reading: Reading, node: fx.Node, need: Sets, live: Live) -> Needs:
        return Ones().need(reading, node, need, live)

    def write(self, w: Writer, node: fx.Node) -> None:
        x, dim = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(dim, int)
        if w.reading.open_dims(x)[dim]:
            w.put(node, (w.plain(x), dim), {}, ())
        else:
            w.put_value(node, w.reading.sizes(x)[dim], (), ())


def _names(text: str) -> list[str]:
    return text.split()


def _overloads(names: str) -> list[Any]:
    """aten.name.overload for all overloads that torch has of these names."""
    found = []
    for name in _names(names):
        packet, _, overload = name.partition(".")
        if hasattr(aten, packet):
            operator = getattr(aten, packet)
            if overload:
                found += [getattr(operator, overload)] if hasattr(operator, overload) else []
            else:
                found += [getattr(operator, o) for o in operator.overloads()]
    return found


def _table() -> dict[Any, Rule]:
    table: dict[Any, Rule] = {}

    def add(names: str, rule: Rule) -> None:
        table.update(dict.fromkeys(_overloads(names), rule))

    # f(0) = 0
    add("relu.default leaky_relu.default contiguous.default clone.default alias.default detach.default "
        "lift_fresh_copy.default prelu.default neg.default abs.default dropout.default feature_dropout.default "
        "alpha_dropout.default feature_alpha_dropout.default",
        rules.Pointwise(rules.kept_zero, scales=True))  # fmt: skip
    add("gelu.default elu.default celu.default silu.default mish.default selu.default tanh.default sin.default "
        "asin.default atan.default sinh.default expm1.default log1p.default erf.default sqrt.default square.default "
        "sign.default floor.default ceil.default round.default hardswish.default softsign.default tanhshrink.default "
        "softshrink.default hardshrink.default nan_to_num.default to.dtype _to_copy.default to.device to.dtype_layout "
        "type_as.default",
        rules.Pointwise(rules.kept_zero))  # fmt: skip
    add("sigmoid.default exp.default log.default softplus.default hardsigmoid.default log_sigmoid.default cos.default "
        "reciprocal.default rsqrt.default rsub.Scalar rsub.Tensor eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar "
        "ge.Scalar eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor logical_not.default logical_and.default "
        "logical_or.default bitwise_not.default bitwise_and.Tensor bitwise_or.Tensor isnan.default isinf.default",
        rules.Pointwise(rules.never_zero))  # fmt: skip
    add("mul.Tensor mul.Scalar", rules.Pointwise(rules.product_zero))
    add("div.Tensor div.Scalar", rules.Pointwise(rules.first_zero))
    add(
        "add.Tensor add.Scalar sub.Tensor sub.Scalar maximum.default minimum.default",
        rules.Pointwise(rules.sum_zero),
    )
    add(
        "clamp.default clamp_min.default clamp_max.default hardtanh.default",
        rules.Pointwise(rules.clamped_zero),
    )
    add("pow.Tensor_Scalar", rules.Pointwise(rules.power_zero))
    add("masked_fill.Scalar", rules.Pointwise(rules.filled_zero))
    add("where.self where.ScalarOther where.ScalarSelf where.Scalar", rules.Pointwise(rules.chosen_zero))
    # products
    add("linear.default", products.Linear())
    add("conv1d.default conv2d.default conv3d.default", products.Convolution())
    add("matmul.default bmm.default mm.default", products.MatrixProduct())
    add("scaled_dot_product_attention.default", products.Attention())
    add("lstm.input gru.input rnn_tanh.input rnn_relu.input", products.Recurrent())
    # norms, sums, pooling
    add("batch_norm.default", rules.BatchNorm())
    add("layer_norm.default", rules.Along(rules.normalised))
    add("softmax.int log_softmax.int cumsum.default", rules.Along(rules.last_argument))
    add("mean.dim sum.dim_IntList", rules.Along(rules.reduced, zero=True, scales=True))
    add("amax.default amin.default std.dim std.correction var.dim var.correction norm.ScalarOpt_dim all.dim any.dim "
        "linalg_vector_norm.default", rules.Along(rules.reduced))  # fmt: skip
    add("max_pool1d.default max_pool2d.default max_pool3d.default avg_pool1d.default avg_pool2d.default "
        "avg_pool3d.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default "
        "adaptive_max_pool2d.default upsample_nearest2d.vec upsample_bilinear2d.vec upsample_nearest2d.default",
        rules.Along(rules.positions, zero=True, scales=True))  # fmt: skip
    # shapes
    add("permute.default transpose.int t.default mT.default", shapes.Moved(shapes.permuted))
    add("unsqueeze.default", shapes.Moved(shapes.unsqueezed))
    add("squeeze.dim squeeze.dims squeeze.default", shapes.Moved(shapes.squeezed))
    add(
        "view.default reshape.default flatten.using_ints unflatten.int _unsafe_view.default",
        shapes.Reshaped(),
    )
    add("expand.default", shapes.Expanded())
    add("slice.Tensor", shapes.Slice(shapes.sliced))
    add("select.int", shapes.Slice(shapes.selected))
    add("cat.default", shapes.Joined())
    add("ones_like.default new_ones.default", Ones())
    add("sym_size.int", Size())
    return table


RULES = _table()
_PIECES: frozenset[Any] = frozenset(shapes.PIECES)
_PLAIN = Rule()
_A_PIECE = shapes.Slice(shapes.a_piece)
_DROPPED, _NOISY = Dropped(), Noisy()


def rule_of(reading: Reading, node: fx.Node) -> Rule:
    """The rule for a node; the one that gives every unit where none fits."""
    if node in reading.site_at:
        return _DROPPED
    if node.target in (DROPOUT_AT, NOISE_AT):
        return _NOISY
    if node.op != "call_function":
        return _PLAIN
    if node.target in _PIECES:
        return _PLAIN
    whole: Any = node.args[0] if node.args else None
    if isinstance(whole, fx.Node) and whole.target in _PIECES:
        return _A_PIECE if shapes.a_piece(reading, node) is not None else _PLAIN
    rule = RULES.get(node.target, _PLAIN)
    fits = True
    if isinstance(rule, products.Convolution):
        fits = rule.applies(node)
    elif isinstance(rule, products.Linear):
        fits = len(reading.sizes(rule.parts(node)[1])) == 2
    elif isinstance(rule, rules.BatchNorm):
        fits = rule.applies(node)
    elif isinstance(rule, products.MatrixProduct | products.Attention):
        fits = rule.applies(reading, node)
    elif isinstance(rule, products.Recurrent):
        fits = rule.applies(node)
    elif isinstance(rule, shapes.Slice):
        fits = rule.where(reading, node) is not None
    elif node.target in (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default):
        fits = node.args[2] is False
    elif isinstance(node.meta.get("val"), tuple | list):
        fits = isinstance(rule, products.Recurrent)
    return rule if fits and _rows_first(reading, node) else _PLAIN


def _rows_first(reading: Reading, node: fx.Node) -> bool:
    """Pooling without a batch has its channels first; such forms have no rule."""
    rule = RULES.get(node.target)
    if isinstance(rule, rules.Along) and rule.mixed is rules.positions:
        spatial = 3 if "3d" in str(node.target) else 1 if "1d" in str(node.target) else 2
        return len(reading.sizes(node)) == spatial + 2
    return True


def is_needed(value: Any) -> bool:
    """Whether an input is a number that the graph computes."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)

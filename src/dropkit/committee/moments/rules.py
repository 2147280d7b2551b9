"""Which rule serves which of torch's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dropkit.committee.moments import curves, lines, noise, pools, recurrent
from dropkit.committee.moments.call import Call, tangent
from dropkit.committee.moments.values import Spread

Rule = Callable[[Call], Any]


def _second_is_certain(call: Call) -> Any:
    return tangent(call) if isinstance(call.args[1], Spread) else lines.straight(call)


def _table() -> dict[str, Rule]:
    moves = (
        "view reshape flatten unflatten transpose t mT numpy_T permute movedim squeeze unsqueeze contiguous clone "
        "alias detach expand expand_as select slice narrow split split_with_sizes chunk unbind index_select flip roll "
        "_unsafe_view to _to_copy dropout getitem pixel_shuffle pixel_unshuffle channel_shuffle constant_pad_nd "
        "repeat view_as lift_fresh_copy index embedding gather"
    )
    bent = (
        "elu selu celu gelu silu mish softplus tanh sigmoid hardtanh relu6 hardswish hardsigmoid log_sigmoid softsign "
        "clamp clamp_min clamp_max abs exp expm1 log1p sin cos square pow erf tanhshrink softshrink hardshrink "
        "threshold atan"
    )
    table: dict[str, Rule] = dict.fromkeys(moves.split(), lines.moved)
    table |= dict.fromkeys(bent.split(), curves.curved)
    table |= {f"max_pool{d}d": pools.max_pooled for d in (1, 2, 3)}
    table |= dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), lines.weighed)
    table |= {f"{kind}avg_pool{d}d": lines.pooled for kind in ("", "adaptive_") for d in (1, 2, 3)}
    table |= dict.fromkeys(
        ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"), lines.shaped
    )
    table |= dict.fromkeys(("empty_like", "sym_size", "sym_numel", "_assert_tensor_metadata"), lines.shaped)
    table |= dict.fromkeys(("eq", "ne", "lt", "gt", "le", "ge"), lines.compared)
    return table | {
        "dropout_at": noise.dropout_rule,
        "noise_at": noise.noise_rule,
        "cat": lines.joined,
        "stack": lines.joined,
        "add": lines.plus,
        "sub": lines.plus,
        "rsub": _second_is_certain,
        "mul": lines.times,
        "div": _second_is_certain,
        "neg": lines.straight,
        "batch_norm": lines.normalised_batch,
        "mean": lines.averaged,
        "sum": lines.averaged,
        "matmul": lines.matrix_product,
        "bmm": lines.matrix_product,
        "mm": lines.matrix_product,
        "relu": curves.rectified,
        "leaky_relu": curves.rectified,
        "softmax": curves.softmax_rule,
        "layer_norm": curves.normalised,
        "scaled_dot_product_attention": curves.attention,
        "where": lines.chosen,
        "masked_fill": lines.filled,
        "lstm": recurrent.lstm,
    }


RULES = _table()

"""Which rule serves which of torch's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dropkit.committee import moment_curves, moment_lines, moment_noise, moment_pools, moment_recurrent
from dropkit.committee.moment_call import Call, tangent
from dropkit.committee.moment_values import Spread

Rule = Callable[[Call], Any]


def _second_is_certain(call: Call) -> Any:
    return tangent(call) if isinstance(call.args[1], Spread) else moment_lines.straight(call)


def _table() -> dict[str, Rule]:
    moves = (
        "view reshape flatten unflatten transpose t mT numpy_T permute movedim squeeze unsqueeze contiguous clone "
        "alias detach expand expand_as select slice narrow split split_with_sizes chunk unbind index_select flip roll "
        "_unsafe_view to _to_copy dropout getitem pixel_shuffle pixel_unshuffle channel_shuffle constant_pad_nd "
        "repeat view_as lift_fresh_copy index embedding gather"
    )
    curves = (
        "elu selu celu gelu silu mish softplus tanh sigmoid hardtanh relu6 hardswish hardsigmoid log_sigmoid softsign "
        "clamp clamp_min clamp_max abs exp expm1 log1p sin cos square pow erf tanhshrink softshrink hardshrink "
        "threshold atan"
    )
    table: dict[str, Rule] = dict.fromkeys(moves.split(), moment_lines.moved)
    table |= dict.fromkeys(curves.split(), moment_curves.curved)
    table |= {f"max_pool{d}d": moment_pools.max_pooled for d in (1, 2, 3)}
    table |= dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), moment_lines.weighed)
    table |= {f"{kind}avg_pool{d}d": moment_lines.pooled for kind in ("", "adaptive_") for d in (1, 2, 3)}
    table |= dict.fromkeys(
        ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"), moment_lines.shaped
    )
    table |= dict.fromkeys(
        ("empty_like", "sym_size", "sym_numel", "_assert_tensor_metadata"), moment_lines.shaped
    )
    table |= dict.fromkeys(("eq", "ne", "lt", "gt", "le", "ge"), moment_lines.compared)
    return table | {
        "dropout_at": moment_noise.dropout_rule,
        "noise_at": moment_noise.noise_rule,
        "cat": moment_lines.joined,
        "stack": moment_lines.joined,
        "add": moment_lines.plus,
        "sub": moment_lines.plus,
        "rsub": _second_is_certain,
        "mul": moment_lines.times,
        "div": _second_is_certain,
        "neg": moment_lines.straight,
        "batch_norm": moment_lines.normalised_batch,
        "mean": moment_lines.averaged,
        "sum": moment_lines.averaged,
        "matmul": moment_lines.matrix_product,
        "bmm": moment_lines.matrix_product,
        "mm": moment_lines.matrix_product,
        "relu": moment_curves.rectified,
        "leaky_relu": moment_curves.rectified,
        "softmax": moment_curves.softmax_rule,
        "layer_norm": moment_curves.normalised,
        "scaled_dot_product_attention": moment_curves.attention,
        "where": moment_lines.chosen,
        "masked_fill": moment_lines.filled,
        "lstm": moment_recurrent.lstm,
    }


RULES = _table()

"""What dropkit does in place of torch's own random calls, while a converted model runs.

Each function here has the arguments of the torch function that it stands for, after the frame in which it was called.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropkit.conversion.frames import Frame, member_asked
from dropkit.nn.alpha import alpha_dropout, feature_alpha_dropout
from dropkit.nn.attention import scaled_dot_product_attention
from dropkit.nn.features import dropout

Server = Callable[..., Any]


def _with_rows_first(x: Tensor, rows: int | None, drop: Callable[[Tensor], Tensor]) -> Tensor:
    """Drop in x as it lies, with its row dimension brought to the front."""
    if rows is None:
        return drop(x.unsqueeze(0)).squeeze(0)
    return drop(x) if rows == 0 or x.ndim <= rows else drop(x.movedim(rows, 0)).movedim(0, rows)


def _written(x: Tensor, result: Tensor, inplace: bool) -> Tensor:
    return x.copy_(result) if inplace else result


def _dropout(
    frame: Frame, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if not (training or member_asked()) or p == 0:
        return input
    result = _with_rows_first(
        input, frame.rows, lambda x: dropout(x, p, site=frame.named("dropout"), owner=frame.module)
    )
    return _written(input, result, inplace)


def _channels(batched: int | None) -> Server:
    """Whole maps; `batched` is the number of dims with a batch, where torch takes one less for a sample alone."""

    def drop(
        frame: Frame, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not (training or member_asked()) or p == 0:
            return input
        rows = None if batched is not None and input.ndim == batched - 1 else frame.rows
        result = _with_rows_first(
            input,
            rows,
            lambda x: dropout(x, p, shared=range(2, x.ndim), site=frame.named("dropout"), owner=frame.module),
        )
        return _written(input, result, inplace)

    return drop


def _alpha(whole_maps: bool) -> Server:
    law = feature_alpha_dropout if whole_maps else alpha_dropout

    def drop(
        frame: Frame, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        if not (training or member_asked()) or p == 0:
            return input
        result = _with_rows_first(
            input, frame.rows, lambda x: law(x, p, site=frame.named("dropout"), owner=frame.module)
        )
        return _written(input, result, inplace)

    return drop


def _attention(
    frame: Frame,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not dropout_p:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        site=frame.named("attention"), owner=frame.module,
    )  # fmt: skip


HEADS = inspect.signature(F.multi_head_attention_forward)


def _multi_head_attention(frame: Frame, *args: Any, **kwargs: Any) -> Any:
    given = HEADS.bind(*args, **kwargs)
    given.apply_defaults()
    heads = given.arguments["num_heads"]
    if not (given.arguments["training"] or member_asked()) or not given.arguments["dropout_p"]:
        return F.multi_head_attention_forward(*args, **kwargs)
    given.arguments["training"] = True

    def drop_weights(weights: Tensor, p: float) -> Tensor:
        by_row = weights.unflatten(0, (-1, heads))  # (B H, L, S) -> (B, H, L, S)
        return dropout(by_row, p, site=frame.named("attention"), owner=frame.module).flatten(0, 1)

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        return _attention(frame, *args, **kwargs)

    # torch's own function, which finds these two in place of its own: whatever else it does stays torch's.
    theirs = F.multi_head_attention_forward
    names = {
        **theirs.__globals__,
        "dropout": drop_weights,
        "scaled_dot_product_attention": attend,
        "has_torch_function": lambda _: False,  # another function mode below ours would lead back to torch's
    }
    function = types.FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__)
    function.__kwdefaults__ = theirs.__kwdefaults__
    return function(*given.args, **given.kwargs)


def _recurrent(run: Callable[..., Any]) -> Server:
    """A stack of recurrent layers, one after the other, so that dropout between them can be dropkit's."""

    def layers(frame: Frame, *args: Any) -> Any:
        packed = isinstance(args[1], Tensor) and isinstance(args[3], list | tuple)
        head, rest = args[: 2 if packed else 1], args[2 if packed else 1 :]
        hidden, weights, has_biases, count, rate, training, bidirectional = rest[:7]
        if not (training or member_asked()) or not rate or count == 1:
            return run(*args)
        several = isinstance(hidden, list | tuple)  # the state of an LSTM is a pair
        states = hidden if several else (hidden,)
        directions, size = 2 if bidirectional else 1, len(weights) // count
        x, final = head[0], []
        for layer in range(count):
            here = [s[layer * directions : (layer + 1) * directions] for s in states]
            x, *after = run(
                x, *head[1:], here if several else here[0], weights[layer * size : (layer + 1) * size],
                has_biases, 1, 0.0, training, bidirectional, *rest[7:],
            )  # fmt: skip
            final.append(after)
            if layer < count - 1:
                x = _drop_steps(frame, x, head[1], rate) if packed else _drop_rows(frame, x, rate, rest[7])
        return (x, *(torch.cat(parts) for parts in zip(*final, strict=True)))

    return layers


def _drop_rows(frame: Frame, x: Tensor, rate: float, batch_first: bool) -> Tensor:
    return _with_rows_first(
        x,
        0 if batch_first else 1,
        lambda x: dropout(x, rate, site=frame.named("layers"), owner=frame.module),
    )


def _drop_steps(frame: Frame, x: Tensor, batch_sizes: Tensor, rate: float) -> Tensor:
    """Packed steps, (sum of lengths, H): the masks of the padded sequences (B, T, H), where there is a step."""
    steps, rows = len(batch_sizes), int(batch_sizes[0])
    noise = dropout(
        x.new_ones(rows, steps, x.shape[-1]), rate, site=frame.named("layers"), owner=frame.module
    )
    time = torch.repeat_interleave(torch.arange(steps), batch_sizes)
    row = torch.arange(len(time)) - (batch_sizes.cumsum(0) - batch_sizes)[time]
    if frame.packed is not None and frame.packed.sorted_indices is not None:
        row = frame.packed.sorted_indices.to(row.device)[row]
    kept = noise[row.to(x.device), time.to(x.device)]
    return torch.where(kept == 0, torch.zeros_like(x), x * kept)


def _plain(server: Server, inplace: bool = False) -> Server:
    """For torch.dropout and its like, whose flag is called `train`."""
    return lambda frame, input, p, train: server(frame, input, p, train, inplace)


SERVERS: dict[Any, Server] = {
    F.dropout: _dropout,
    F.dropout1d: _channels(3),
    F.dropout2d: _channels(None),  # torch takes three dims for (N, C, L) here, not for one image
    F.dropout3d: _channels(5),
    F.alpha_dropout: _alpha(False),
    F.feature_alpha_dropout: _alpha(True),
    torch.dropout: _plain(_dropout),
    torch.feature_dropout: _plain(_channels(None)),
    torch.alpha_dropout: _plain(_alpha(False)),
    torch.feature_alpha_dropout: _plain(_alpha(True)),
    torch.dropout_: _plain(_dropout, inplace=True),
    torch.feature_dropout_: _plain(_channels(None), inplace=True),
    torch.alpha_dropout_: _plain(_alpha(False), inplace=True),
    torch.feature_alpha_dropout_: _plain(_alpha(True), inplace=True),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch.lstm: _recurrent(torch.lstm),
    torch.gru: _recurrent(torch.gru),
    torch.rnn_tanh: _recurrent(torch.rnn_tanh),
    torch.rnn_relu: _recurrent(torch.rnn_relu),
}

"""LSTM and GRU with a locked mask on the state, against torch's own without dropout."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dropkit.bench.work import Pair, Work, require
from dropkit.functional import dropout
from dropkit.masks.address import masks
from dropkit.nn.recurrent import GRU, LSTM

Kind = Literal["LSTM", "GRU"]
SITE = "bench"


def by_cells(layer: LSTM | GRU, x: Tensor, mask: Tensor) -> Tensor:
    """What a loop over torch's cells gives when the gates see h * mask.

    Args:
        x: (T, B, D).
        mask: (B, D); a GRU's cell carries on what its gates see, which is put right by the part z of the rest.
    """
    h = c = torch.zeros_like(x[0])
    ends = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    w_ih, w_hh, b_ih, b_hh = (layer.get_parameter(f"{end}_l0") for end in ends)
    outputs = []
    for row in x:
        seen = h * mask
        if isinstance(layer, LSTM):
            h, c = torch.lstm_cell(row, (seen, c), w_ih, w_hh, b_ih, b_hh)
        else:
            _, from_input, _ = linear(row, w_ih, b_ih).chunk(3, -1)
            _, from_state, _ = linear(seen, w_hh, b_hh).chunk(3, -1)
            carried = torch.sigmoid(from_input + from_state)
            h = torch.gru_cell(row, seen, w_ih, w_hh, b_ih, b_hh) + carried * (h - seen)
        outputs.append(h)
    return torch.stack(outputs)


def recurring(kind: Kind, shape: Sequence[int], p: float, member: int | None = None) -> Pair:
    """One layer with as many units as inputs, forward and backward.

    The check: without dropout it is torch's, result and gradients; with it, it is a loop over torch's cells with the
    masks of the same addresses.

    Args:
        kind: of layer.
        shape: (T, B, D).
        p: chance to drop an element of the state as the gates see it, one mask for all steps.
        member: None: a mask for each row; a number: one for all rows.
    """
    x, gradient = torch.randn(tuple(shape)).requires_grad_(), torch.randn(tuple(shape))
    form, peer = {"LSTM": (LSTM, nn.LSTM), "GRU": (GRU, nn.GRU)}[kind]
    plain = peer(shape[2], shape[2])
    layer, still = form(shape[2], shape[2], recurrent_dropout=p), form(shape[2], shape[2])
    for mine in (layer, still):
        mine.load_state_dict(plain.state_dict())
    layer.site = SITE

    def forward() -> Tensor:
        with nullcontext() if member is None else masks(member=member):
            result: Tensor = layer(x)[0]
        return result

    def work(network: nn.Module) -> Work:
        return Work(lambda: network(x)[0], (x, *network.parameters()), gradient)

    ours = Work(forward, (x, *layer.parameters()), gradient)

    def check() -> None:
        for mine, theirs in zip(work(still).run(), work(plain).run(), strict=True):
            require(
                torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3),
                "ours",
                "without dropout it is not torch's",
            )
        with masks(seed=1, member=member):
            result = layer(x)[0]
        with masks(seed=1, member=member):
            mask = dropout(x.new_ones(*shape[1:]), p, site=f"{SITE}.l0.state")
        wanted = by_cells(layer, x, mask)
        require(torch.allclose(result, wanted, rtol=1e-3, atol=1e-4), "ours", "it is not the loop over cells")
        require(not torch.allclose(result, plain(x)[0], atol=1e-4), "ours", "the mask does not act")

    return Pair(ours, work(plain), check, x.numel())

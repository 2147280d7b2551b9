"""LSTM and GRU with every kind of recurrent dropout; parameters and state dict are those of torch.nn.LSTM and GRU."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dropkit.nn.layer import Rate
from dropkit.nn.recurrent_layer import Recurrent, RecurrentLayer


class LSTM(RecurrentLayer):
    """Drop-in for torch.nn.LSTM with dropout at each of its places; its weights load there, and theirs here.

    i, f, g, o = W_ih (x * input) + b_ih + (W_hh * weight) (h * state) + b_hh
    c' = sigmoid(f) c + sigmoid(i) tanh(g) * update
    h' = W_hr (sigmoid(o) tanh(c')),    then zoneout: c <- c' or c, h <- h' or h, unit by unit
    y = h * output

    Each factor is 0 with chance p and 1 / (1 - p) otherwise, drawn for each row and, unless locked, each step. A row
    has the same masks padded, packed, sorted or alone. In evaluation there is no noise, and zoneout mixes old and new
    in their expected shares; a committee member, `dk.masks(member=k)`, is one network with masks for all rows.

    For truncated backpropagation, where a sequence comes in chunks, give each of them the same seed, step and row ids,
    and `start`, the chunk's place in its sequence: locked masks then stay, and fresh ones go on where they ended.

    Speed: dropout on inputs, between layers, on outputs and on weights runs on torch's own kernel, and so does a locked
    state mask that serves all rows. With a mask for each row, and no projection, a pass of our own takes as long as
    that kernel to within a third (`dropkit bench lstm-*`); it serves first derivatives of float32 and float64 on a CPU.
    torch.func, compilers, autocast, further derivatives, other dtypes and devices go step by step, with the same masks.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional, proj_size, device, dtype: as in
            torch.nn.LSTM.
        dropout: on the output of each layer but the last, as there; locked here, unless locked=False.
        input_dropout: on the input of the first layer.
        recurrent_dropout: inside the recurrence, on what `recurrent` says.
        output_dropout: on the output of the last layer. The returned states have none.
        weight_dropout: of elements of W_hh, one mask for the whole pass (DropConnect).
        zoneout: chance that a unit keeps its old value at a step; a pair is for cell and state. Never locked.
        locked: one mask for all steps of a sequence; False: a fresh one at each step.
        tied: one state mask for all gates; False: one for each gate.
        recurrent: "state": the state as the gates read it; "update": what is about to be added to the cell, so that
            memory itself is never dropped.

    Raises:
        ProbabilityError: a rate outside [0, 1].
        OptionError: a size or option that is not allowed, or an input of whole numbers.
        ShapeError: an input or initial state with other axes than those named above.
        AddressError: start without a `masks` context, which alone can give the next chunk its masks.

    Source: Gal and Ghahramani 2016, arXiv:1512.05287 (state, tied and untied); Semeniuta et al. 2016, arXiv:1603.05118
        (update); Merity et al. 2018, arXiv:1708.02182 (weight); Krueger et al. 2017, arXiv:1606.01305 (zoneout);
        Zaremba et al. 2014, arXiv:1409.2329 (between layers).

    Example:
        >>> import torch, dropkit as dk
        >>> lstm = dk.nn.LSTM(8, 16, recurrent_dropout=0.3, batch_first=True)
        >>> x = torch.randn(4, 10, 8)
        >>> with dk.masks(seed=0, step=1):
        ...     whole, _ = lstm(x)
        >>> with dk.masks(seed=0, step=1):
        ...     first, state = lstm(x[:, :6])
        >>> with dk.masks(seed=0, step=1):
        ...     second, _ = lstm(x[:, 6:], state, start=6)
        >>> torch.allclose(torch.cat([first, second], dim=1), whole, atol=1e-6)
        True
    """

    gates = 4
    states = ("hidden", "cell")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: Rate = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_dropout: Rate = 0.0,
        recurrent_dropout: Rate = 0.0,
        output_dropout: Rate = 0.0,
        weight_dropout: Rate = 0.0,
        zoneout: Rate | tuple[Rate, Rate] = 0.0,
        locked: bool = True,
        tied: bool = True,
        recurrent: Recurrent = "state",
    ) -> None:
        cell, hidden = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
        rates = dict(
            zip(
                self.RATES,
                (dropout, input_dropout, recurrent_dropout, output_dropout, weight_dropout),
                strict=True,
            )
        )
        super().__init__(
            (input_size, hidden_size, num_layers, proj_size), bias, batch_first, bidirectional, rates, locked, tied,
            recurrent, {"cell": cell, "hidden": hidden}, device, dtype,
        )  # fmt: skip

    def forward(
        self, x: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, start: int = 0
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run over sequences.

        Args:
            x: (T, B, I), (B, T, I) with batch_first, (T, I) for one sequence, or packed.
            hx: initial h (L D, B, P) and c (L D, B, H), zeros by default; D is 2 in both directions.
            start: place of the first step in its sequence, where x is a later chunk of one.

        Returns:
            (T, B, D P) or as x is, and the states after the last step, as hx.
        """
        out, state = self._run(x, hx, start)
        return out, cast(tuple[Tensor, Tensor], state)


class GRU(RecurrentLayer):
    """Drop-in for torch.nn.GRU with dropout at each of its places; its weights load there, and theirs here.

    a = W_ih (x * input) + b_ih,    b = (W_hh * weight) (h * state) + b_hh
    r = sigmoid(a_r + b_r),    z = sigmoid(a_z + b_z)
    h' = (1 - z) tanh(a_n + r b_n) * update + z h,    then zoneout: h <- h' or h, unit by unit
    y = h * output

    The state that is carried on, z h, is never dropped. All else is as in `LSTM`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional, device, dtype: as in torch.nn.GRU.
        dropout, input_dropout, recurrent_dropout, output_dropout, weight_dropout: as in `LSTM`.
        locked, tied, recurrent: as there.
        zoneout: chance that a unit keeps its old value at a step. Never locked.

    Raises:
        ProbabilityError, OptionError, ShapeError, AddressError: as in `LSTM`.

    Source: as for `LSTM`.
    """

    gates = 3
    states = ("hidden",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: Rate = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_dropout: Rate = 0.0,
        recurrent_dropout: Rate = 0.0,
        output_dropout: Rate = 0.0,
        weight_dropout: Rate = 0.0,
        zoneout: Rate = 0.0,
        locked: bool = True,
        tied: bool = True,
        recurrent: Recurrent = "state",
    ) -> None:
        rates = dict(
            zip(
                self.RATES,
                (dropout, input_dropout, recurrent_dropout, output_dropout, weight_dropout),
                strict=True,
            )
        )
        super().__init__(
            (input_size, hidden_size, num_layers, 0), bias, batch_first, bidirectional, rates, locked, tied, recurrent,
            {"hidden": zoneout}, device, dtype,
        )  # fmt: skip

    def forward(
        self, x: Tensor | PackedSequence, hx: Tensor | None = None, *, start: int = 0
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run over sequences.

        Args:
            x: (T, B, I), (B, T, I) with batch_first, (T, I) for one sequence, or packed.
            hx: initial h (L D, B, H), zeros by default; D is 2 in both directions.
            start: place of the first step in its sequence, where x is a later chunk of one.

        Returns:
            (T, B, D H) or as x is, and the state after the last step, as hx.
        """
        out, (state,) = self._run(x, None if hx is None else (hx,), start)
        return out, state

"""Transformer layers with addressed dropout, with the arguments and the state dict of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropkit.errors import OptionError, ShapeError
from dropkit.nn.features import Dropout
from dropkit.nn.layer import Rate
from dropkit.nn.multihead import MultiheadAttention

Activation = Callable[[Tensor], Tensor]
_ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "gelu": F.gelu}


def find_activation(activation: str | Activation) -> Activation:
    """The function of a name, or the function itself.

    Raises:
        OptionError: a name that is none of relu, gelu.
    """
    if not isinstance(activation, str):
        return activation
    if activation not in _ACTIVATIONS:
        raise OptionError(
            f"activation={activation!r} was given; allowed: 'relu', 'gelu', or any function of one tensor."
        )
    return _ACTIVATIONS[activation]


class _Layer(nn.Module):
    """What both layers share: feed-forward block, and dropout that finds the batch wherever it stands."""

    self_attn: MultiheadAttention
    linear1: nn.Linear
    linear2: nn.Linear
    dropout: Dropout
    activation: Activation
    norm_first: bool

    def _rows_first(self, x: Tensor) -> Tensor:
        """(B, L, E), of which dropout takes dim 0 as rows, from the layout of the caller."""
        if x.ndim not in (2, 3):
            raise ShapeError(
                f"an input of shape {tuple(x.shape)} was given; allowed: {self._layout}, or (L, E)."
            )
        if x.ndim == 2:
            return x[None]
        return x if self.self_attn.batch_first else x.transpose(0, 1)

    def _as_given(self, x: Tensor, given: Tensor) -> Tensor:
        """`_rows_first` undone, for a caller that gave this."""
        if given.ndim == 2:
            return x[0]
        return x if self.self_attn.batch_first else x.transpose(0, 1)

    @property
    def _layout(self) -> str:
        return "(B, L, E)" if self.self_attn.batch_first else "(L, B, E)"

    def _feed_forward(self, x: Tensor, drop: Dropout) -> Tensor:
        result: Tensor = drop(self.linear2(self.dropout(self.activation(self.linear1(x)))))
        return result


class TransformerEncoderLayer(_Layer):
    """Drop-in for torch.nn.TransformerEncoderLayer: the same arguments, outputs, state dict and first weights.

    Stands in torch.nn.TransformerEncoder; make that with `enable_nested_tensor=False`, as it warns otherwise that it
    leaves its fast path out. Masks act in training, and in evaluation when a committee member is asked for, with or
    without gradients: there is no fast path that skips them. Rows of the masks are examples, also where the batch is
    the second dim.

    Args:
        d_model: features.
        nhead: heads, divides d_model.
        dim_feedforward: features between the two linear layers.
        dropout: chance to drop, in [0, 1], or a schedule; for attention weights and all three dropout layers.
        activation: "relu", "gelu", or a function of one tensor.
        layer_norm_eps: of both normalisations.
        batch_first: (B, L, E) instead of (L, B, E).
        norm_first: normalise before each block instead of after it.
        bias: whether linear layers and normalisations have one.
        device, dtype: of the weights.

    Raises:
        ProbabilityError: dropout is outside [0, 1].
        OptionError: nhead does not divide d_model, or an unknown activation.

    Source: Vaswani et al. 2017, arXiv:1706.03762; norm_first: Xiong et al. 2020, arXiv:2002.04745.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: Rate = 0.1,
        activation: str | Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(d_model, nhead, dropout, batch_first=batch_first, **made)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **made)
        self.dropout = Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **made)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, **made)
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, **made)
        self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout)
        self.activation = find_activation(activation)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Self-attention and feed-forward block, each with its residual connection.

        Args:
            src: (L, B, E), (B, L, E) with batch_first, or (L, E).
            src_mask, src_key_padding_mask, is_causal: as in `MultiheadAttention`.

        Returns:
            The shape of src.

        Raises:
            ShapeError: shapes that do not go together.
            OptionError: a nested tensor.
        """

        def attend(x: Tensor) -> Tensor:
            given = self._as_given(x, src)
            out = self.self_attn(
                given, given, given, src_key_padding_mask, False, src_mask, is_causal=is_causal
            )[0]
            result: Tensor = self.dropout1(self._rows_first(out))
            return result

        if src.is_nested:
            return self._forward_nested(src)
        x = self._rows_first(src)
        if self.norm_first:
            x = x + attend(self.norm1(x))
            x = x + self._feed_forward(self.norm2(x), self.dropout2)
        else:
            x = self.norm1(x + attend(x))
            x = self.norm2(x + self._feed_forward(x, self.dropout2))
        return self._as_given(x, src)

    def _forward_nested(self, src: Tensor) -> Tensor:
        """What torch.nn.TransformerEncoder makes of a padded batch in evaluation: no masks, so places do not matter."""
        if self.dropout.active:
            raise OptionError(
                "a nested tensor was given, in which padded places are cut away and others move, and their masks with "
                "them. Make the encoder with nn.TransformerEncoder(..., enable_nested_tensor=False), or set "
                "encoder.use_nested_tensor = False."
            )
        padded = src.to_padded_tensor(0.0)
        lengths = torch.tensor([len(x) for x in src.unbind()], device=src.device)
        hidden = torch.arange(padded.shape[1], device=src.device) >= lengths[:, None]
        result: Tensor = torch._nested_tensor_from_mask(self(padded, None, hidden), ~hidden)
        return result


class TransformerDecoderLayer(_Layer):
    """Drop-in for torch.nn.TransformerDecoderLayer: the same arguments, outputs, state dict and first weights.

    All arguments are as in `TransformerEncoderLayer`.

    Raises:
        ProbabilityError: dropout is outside [0, 1].
        OptionError: nhead does not divide d_model, or an unknown activation.

    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: Rate = 0.1,
        activation: str | Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(d_model, nhead, dropout, batch_first=batch_first, **made)
        self.multihead_attn = MultiheadAttention(d_model, nhead, dropout, batch_first=batch_first, **made)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **made)
        self.dropout = Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **made)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, **made)
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, **made)
        self.norm3 = nn.LayerNorm(d_model, layer_norm_eps, **made)
        self.dropout1, self.dropout2, self.dropout3 = Dropout(dropout), Dropout(dropout), Dropout(dropout)
        self.activation = find_activation(activation)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Self-attention, attention to the memory, and feed-forward block, each with its residual connection.

        Args:
            tgt: (L, B, E), (B, L, E) with batch_first, or (L, E).
            memory: (S, B, E), (B, S, E) or (S, E).
            tgt_mask, tgt_key_padding_mask, tgt_is_causal: for tgt, as in `MultiheadAttention`.
            memory_mask, memory_key_padding_mask, memory_is_causal: for the memory.

        Returns:
            The shape of tgt.

        Raises:
            ShapeError: shapes that do not go together.
            OptionError: a nested tensor.
        """

        def attend(x: Tensor) -> Tensor:
            given = self._as_given(x, tgt)
            out = self.self_attn(
                given, given, given, tgt_key_padding_mask, False, tgt_mask, is_causal=tgt_is_causal
            )[0]
            result: Tensor = self.dropout1(self._rows_first(out))
            return result

        def attend_to_memory(x: Tensor) -> Tensor:
            out = self.multihead_attn(
                self._as_given(x, tgt), memory, memory, memory_key_padding_mask, False, memory_mask,
                is_causal=memory_is_causal,
            )[0]  # fmt: skip
            result: Tensor = self.dropout2(self._rows_first(out))
            return result

        x = self._rows_first(tgt)
        if self.norm_first:
            x = x + attend(self.norm1(x))
            x = x + attend_to_memory(self.norm2(x))
            x = x + self._feed_forward(self.norm3(x), self.dropout3)
        else:
            x = self.norm1(x + attend(x))
            x = self.norm2(x + attend_to_memory(x))
            x = self.norm3(x + self._feed_forward(x, self.dropout3))
        return self._as_given(x, tgt)

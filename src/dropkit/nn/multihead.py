"""Multi-head attention whose dropout is addressed, with the arguments and the state dict of torch's."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropkit.errors import OptionError, ShapeError
from dropkit.nn.attention import _composite, _Scores, scaled_dot_product_attention
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer, check_rate
from dropkit.nn.schedules import Schedule


def join_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, shape: tuple[int, int, int, int]
) -> Tensor | None:
    """One mask for `scaled_dot_product_attention` from the two that multi-head attention takes.

    Args:
        attn_mask: (L, S) or (B H, L, S): bool, True where a query must *not* see a key, or floating, added to the
            scores.
        key_padding_mask: (B, S), likewise.
        shape: (B, H, L, S).

    Returns:
        Broadcasts to (B, H, L, S): bool, True where a query sees a key, or floating; None for no mask.

    Raises:
        ShapeError: a mask of another shape.
        OptionError: a mask that is neither bool nor floating.
    """
    B, H, L, S = shape
    masks: list[Tensor] = []
    if attn_mask is not None:
        if attn_mask.shape not in ((L, S), (B * H, L, S)):
            raise ShapeError(
                f"attn_mask {tuple(attn_mask.shape)} was given; allowed here: (queries, keys) = {(L, S)}, or "
                f"(batch * heads, queries, keys) = {(B * H, L, S)}."
            )
        masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.view(B, H, L, S))
    if key_padding_mask is not None:
        if key_padding_mask.shape != (B, S):
            raise ShapeError(
                f"key_padding_mask {tuple(key_padding_mask.shape)} was given; needed here: (batch, keys) = {(B, S)}, "
                "and (keys,) for an input without a batch."
            )
        masks.append(key_padding_mask[:, None, None])
    for mask in masks:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise OptionError(
                f"a mask of {mask.dtype} was given; it is bool (True hides a key) or floating (added to the scores)."
            )
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~hidden
    dtype = next(mask.dtype for mask in masks if mask.is_floating_point())
    added = [
        torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
        if mask.dtype == torch.bool
        else mask
        for mask in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]


class MultiheadAttention(RateLayer):
    """Drop-in for torch.nn.MultiheadAttention: the same arguments, outputs, state dict and first weights.

    What differs, on purpose:

    - Masks act in training mode, and in evaluation when a committee member is asked for; no fast path leaves them out.
    - The weights that `need_weights` asks for are clean, before dropout; asking for them changes no output.
    - `is_causal=True` alone is enough; where `attn_mask` is given, that is what counts.
    - A query that sees no key gets attention 0, and weights 0; torch gives NaN with `need_weights`.
    - bool and floating masks may stand together.

    Row of the masks: an example, wherever the batch stands; an input without a batch is one row.

    Args:
        embed_dim: features of query and output.
        num_heads: divides embed_dim.
        dropout: chance to drop an attention weight, in [0, 1], or a schedule.
        bias: whether the projections add a bias.
        add_bias_kv: append a learned key and value.
        add_zero_attn: append a key and value of zeros.
        kdim, vdim: features of key and value; embed_dim by default.
        batch_first: (B, L, E) instead of (L, B, E).
        device, dtype: of the weights.

    Raises:
        ProbabilityError: dropout is outside [0, 1].
        OptionError: num_heads does not divide embed_dim.

    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    # torch's own encoder layer asks this before its fast path, which would skip every mask in here.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: Rate = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise OptionError(
                f"embed_dim={embed_dim} and num_heads={num_heads} were given; both are at least 1, and the heads share "
                "the features evenly: embed_dim is a multiple of num_heads."
            )
        super().__init__(dropout)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first, self.add_zero_attn = batch_first, add_zero_attn

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None

        packed = self.kdim == self.vdim == embed_dim
        self.in_proj_weight = parameter(packed, 3 * embed_dim, embed_dim)
        self.q_proj_weight = parameter(not packed, embed_dim, embed_dim)
        self.k_proj_weight = parameter(not packed, embed_dim, self.kdim)
        self.v_proj_weight = parameter(not packed, embed_dim, self.vdim)
        self.in_proj_bias = parameter(bias, 3 * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.bias_k = parameter(add_bias_kv, 1, 1, embed_dim)
        self.bias_v = parameter(add_bias_kv, 1, 1, embed_dim)
        self._reset_parameters()

    @property
    def dropout(self) -> Rate:
        """The rate under torch's name."""
        return self.p

    @dropout.setter
    def dropout(self, p: Rate) -> None:
        self.p = p if isinstance(p, Schedule) else check_rate(p)

    def _reset_parameters(self) -> None:
        """First weights as torch's, in its order, so that one seed gives one model."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the projected heads, projected back.

        Args:
            query: (L, B, E), (B, L, E) with batch_first, or (L, E).
            key: (S, B, kdim), (B, S, kdim) or (S, kdim).
            value: (S, B, vdim), (B, S, vdim) or (S, vdim).
            key_padding_mask: (B, S) or (S,): bool, True hides a key, or floating, added to the scores.
            need_weights: whether to return the weights; they are then made, (B, H, L, S).
            attn_mask: (L, S) or (B H, L, S), likewise bool or floating.
            average_attn_weights: their mean over heads.
            is_causal: query i sees keys 0 to i; not looked at where attn_mask is given.

        Returns:
            The output in the layout of the query, and weights without dropout, (B, L, S), (B, H, L, S) without the
            average, or without B; None where they are not asked for.

        Raises:
            ShapeError: shapes that do not go together.
        """
        batched = self._check(query, key, value)
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q[None], k[None], v[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        (B, L, _), S = q.shape, k.shape[1]
        mask = join_masks(attn_mask, key_padding_mask, (B, self.num_heads, L, S))
        causal = is_causal and attn_mask is None
        k, v, more = self._append(k, v)
        if causal and (mask is not None or more):
            past = torch.ones(L, S, dtype=torch.bool, device=q.device).tril()
            mask = (
                past
                if mask is None
                else torch.where(past, mask, False if mask.dtype == torch.bool else -torch.inf)
            )
            causal = False
        if mask is not None and more:
            mask = F.pad(mask, (0, more), value=mask.dtype == torch.bool)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        out, weights = self._attend(q, k, v, mask, causal, need_weights)
        out = out.transpose(1, 2).flatten(-2)
        if not batched:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        out = self.out_proj(out)
        if weights is None:
            return out, None
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return out, weights if batched else weights[0]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, L, D) of the heads, and their weights (B, H, L, S) before dropout where they are asked for."""
        if not need_weights:
            out = scaled_dot_product_attention(
                q, k, v, mask, self.rate, causal, training=self.active, site=self.site, owner=self
            )
            return out, None
        clean: list[Tensor] = []

        def drop(weights: Tensor) -> Tensor:
            clean.append(weights.to(q.dtype))
            return dropout(weights, self.rate, self.active, site=self.site, owner=self)

        out = _composite(q, k, v, _Scores(mask, causal, 1 / math.sqrt(self.head_dim)), drop)
        return out, clean[0]

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the inputs have a batch, or what is wrong with them."""
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        layout = "(B, L, {0})" if self.batch_first else "(L, B, {0})"
        wanted = ", ".join(layout.format(n).replace("L", a) for n, a in self._sizes())
        same_rank = query.ndim == key.ndim == value.ndim and query.ndim in (2, 3)
        if not same_rank or any(
            x.shape[-1] != n for x, (n, _) in zip((query, key, value), self._sizes(), strict=True)
        ):
            raise ShapeError(f"{shapes} were given; allowed: {wanted}, or all without B.")
        if key.shape[:-1] != value.shape[:-1]:
            raise ShapeError(f"{shapes} were given; key and value have the same batch and length.")
        batch = 0 if self.batch_first else 1
        if query.ndim == 3 and query.shape[batch] != key.shape[batch]:
            hint = "" if self.batch_first else " This layer takes (L, B, E); batch_first=True changes that."
            raise ShapeError(f"{shapes} were given; the batch, dim {batch}, must be of one size.{hint}")
        return query.ndim == 3

    def _sizes(self) -> tuple[tuple[int, str], ...]:
        """Features and name of the length of query, key and value."""
        return (self.embed_dim, "L"), (self.kdim, "S"), (self.vdim, "S")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value of all heads, in the layout of the input; one product where two inputs are one."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, dim=-1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if weight is not None and key is value:
            E = self.embed_dim
            keys_and_values = F.linear(key, weight[E:], None if bias is None else bias[E:])
            return F.linear(query, weight[:E], biases[0]), *keys_and_values.chunk(2, dim=-1)
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if weight is not None:
            weights = weight.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values (B, S, E) with those that the layer adds, and how many that are."""
        keys, values, B = [k], [v], k.shape[0]  # len(k) would close the number of rows
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.to(k.dtype).expand(B, 1, -1))
            values.append(self.bias_v.to(v.dtype).expand(B, 1, -1))
        if self.add_zero_attn:
            keys.append(k.new_zeros(B, 1, self.embed_dim))
            values.append(v.new_zeros(B, 1, self.embed_dim))
        if len(keys) == 1:
            return k, v, 0
        return torch.cat(keys, dim=1), torch.cat(values, dim=1), len(keys) - 1

    def extra_repr(self) -> str:
        """Sizes and rate."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.p}"

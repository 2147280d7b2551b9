"""Embedding dropout: whole word types are forgotten, wherever they occur in a sequence."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropkit.errors import OptionError, ShapeError, check_probability
from dropkit.masks import address, ops
from dropkit.nn.embedding_cpu import noise_of_elements
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate
from dropkit.nn.sequences import SequenceLayer, check_tokens, is_plain, one_mask_for_all_rows, times_noise


def _noise_of_types(
    tokens: Tensor, types: int, p: float | Tensor, like: Tensor, site: str | None, owner: object | None
) -> Tensor:
    """(B, *) noise of each token: element `token` of the mask of its row, of which only what occurs is made."""
    rows = len(tokens)
    plain = not isinstance(p, Tensor) and like.dtype in (torch.float32, torch.float64)
    # A table of masks is written eight elements at a time: it is the cheaper way while it is small.
    if not plain or not is_plain(like) or types <= 4 * max(tokens.numel() // max(rows, 1), 1):
        rows = 1 if one_mask_for_all_rows() else rows
        table = dropout(like.new_ones(rows, types), p, site=site, owner=owner)
        if rows == 1:
            return table[0][tokens]
        return table.gather(1, tokens.reshape(rows, -1)).reshape(tokens.shape)
    where = address.draw(owner, site)
    noise = like.new_empty(tokens.shape)
    ids = ops._row_ids(where.samples, rows, where.row_offset, where.batch_shared)[0]
    flat = np.ascontiguousarray(tokens.reshape(-1).numpy())
    t, fine, scale = ops._quantised(float(p))
    key, member = np.array((int(where.key) % address.SEEDS, int(where.member)), np.uint64)
    noise_of_elements(
        flat, ids, max(tokens.numel() // max(rows, 1), 1), key, member, where.step, t, fine, scale,
        noise.view(-1).numpy(),
    )  # fmt: skip
    return noise


def embedding_dropout(
    tokens: Tensor,
    weight: Tensor,
    p: float | Tensor = 0.1,
    training: bool = True,
    *,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    batch_first: bool = True,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Look words up in a table from which whole word types are dropped.

    y[b, t] = weight[tokens[b, t]] * keep[b, tokens[b, t]] / (1 - p),    keep[b, v] ~ Bernoulli(1 - p)

    A word that is dropped is dropped wherever it occurs in the sequence. Each row of the batch has a mask of its own;
    of its V elements only those that occur are made. For a committee member one mask serves all rows.

    Args:
        tokens: (B, *) whole numbers in [0, V), or (T, B) without batch_first. One axis is a batch of single words.
        weight: (V, D), the table.
        p: chance to drop a word type, in [0, 1].
        training: False is the plain look-up.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: as in torch.nn.functional.embedding.
        batch_first: which of the first two dims counts the rows.
        site, owner: as in `locked_dropout`.

    Returns:
        (*tokens.shape, D).

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: weight has not two axes.
        OptionError: tokens are not whole numbers, or one of them is no row of the table.

    Source: Gal and Ghahramani 2016, arXiv:1512.05287, section 4.2 (a mask for each sequence); Merity et al. 2018,
        arXiv:1708.02182, section 4.3 (scaled by 1 / (1 - p) as here, with one mask for the batch: a member's).
    """
    rate = p if isinstance(p, Tensor) else check_probability(p)
    check_tokens(tokens)
    if weight.ndim != 2:
        raise ShapeError(f"weight of shape {tuple(weight.shape)} was given; allowed: (V, D).")
    types = weight.shape[0]
    if is_plain(tokens) and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= types:
            raise OptionError(
                f"tokens from {low} to {high} were given; the table has words 0 to {types - 1}."
            )
    looked_up = F.embedding(tokens, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if not training or (not isinstance(rate, Tensor) and rate == 0):
        return looked_up
    rows_first = tokens if batch_first or tokens.ndim < 2 else tokens.transpose(0, 1)
    noise = _noise_of_types(rows_first.long(), types, rate, weight.detach(), site, owner)
    if rows_first is not tokens:
        noise = noise.transpose(0, 1)
    return times_noise(looked_up, noise.unsqueeze(-1))


class EmbeddingDropout(SequenceLayer):
    """Drop-in for torch.nn.Embedding whose word types are dropped; the layer around `embedding_dropout`.

    Its state dict has the one key `weight`, as that of torch.nn.Embedding.

    Args:
        num_embeddings: V, words in the table.
        embedding_dim: D.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device, dtype: as in torch.nn.Embedding.
        p: chance to drop a word type, in [0, 1].
        batch_first: True: tokens are (B, *); False: (T, B).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        p: Rate = 0.1,
        batch_first: bool = True,
    ) -> None:
        super().__init__(p, False, batch_first)
        table = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._take_over(table)

    def _take_over(self, table: nn.Embedding) -> None:
        self.weight = table.weight
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = table.padding_idx, table.max_norm, table.norm_type
        self.scale_grad_by_freq, self.sparse = table.scale_grad_by_freq, table.sparse

    @classmethod
    def from_embedding(cls, table: nn.Embedding, p: Rate = 0.1, batch_first: bool = True) -> EmbeddingDropout:
        """The same table with dropout: the parameter itself is taken over, not copied, and so are all options."""
        layer = cls(0, table.embedding_dim, p=p, batch_first=batch_first)
        layer._take_over(table)
        return layer.train(table.training)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, *) whole numbers -> (B, *, D)."""
        return embedding_dropout(
            tokens, self.weight, self.rate, self.active, padding_idx=self.padding_idx, max_norm=self.max_norm,
            norm_type=self.norm_type, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse,
            batch_first=self.batch_first, site=self.site, owner=self,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Sizes, options that differ from their defaults, rate and layout."""
        options = f"{self.num_embeddings}, {self.embedding_dim}"
        for name, default in (("padding_idx", None), ("max_norm", None), ("norm_type", 2.0)):
            if getattr(self, name) != default:
                options += f", {name}={getattr(self, name)}"
        for name in ("scale_grad_by_freq", "sparse"):
            options += f", {name}=True" if getattr(self, name) else ""
        return f"{options}, {super().extra_repr()}"

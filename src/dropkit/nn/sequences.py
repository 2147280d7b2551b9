"""Sequences: dropout that is locked over time, and dropout of words and of word vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dropkit.errors import OptionError, check_probability
from dropkit.masks import compiled, ops
from dropkit.nn.axes import check_axes
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer


def times_noise(x: Tensor, noise: Tensor) -> Tensor:
    """x * noise, where a dropped NaN or infinity is 0, and so is its gradient."""
    return torch.where(noise == 0, 0.0, x * noise)


def one_mask_for_all_rows() -> bool:
    """Whether the open context asks for one member of all rows; a compiled graph cannot know."""
    context = compiled.context_to_read()
    return context is not None and context.member is not None and context.samples is None


def is_plain(x: Tensor) -> bool:
    """Whether nothing of torch stands between a call and the memory: no compiler, transform or other device."""
    return not torch.compiler.is_compiling() and ops._is_plain(x, 0, 0, 0.0)


def packed_rows(packed: PackedSequence) -> Tensor:
    """(N,) int64: the row, as it was before sorting, of each element of a packed batch."""
    sizes = packed.batch_sizes
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    rows = (torch.arange(len(packed.data)) - starts).to(packed.data.device)
    return rows if packed.sorted_indices is None else packed.sorted_indices[rows]


def locked_dropout(
    x: Tensor | PackedSequence,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    batch_first: bool,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor | PackedSequence:
    """Dropout with one mask for all time steps of a sequence (also called variational).

    y[b, t, d] = x[b, t, d] * keep[b, d] / (1 - p),    keep[b, d] ~ Bernoulli(1 - p)

    Args:
        x: (B, T, *features) with batch_first, else (T, B, *features); or a packed batch, whose rows keep the ids they
            had before they were sorted by length.
        p: chance to drop, in [0, 1]; a number, or a 0-d tensor.
        training: False gives x back.
        inplace: write the result into x.
        batch_first: which of the first two dims counts the rows; a packed batch needs no answer.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        The shape of x; packed if x is.

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: x has fewer than three axes: one row would have to be said as x[None].
        OptionError: whole numbers.

    Source: Gal and Ghahramani 2016, arXiv:1512.05287; under this name Merity et al. 2018, arXiv:1708.02182.

    Example:
        >>> import torch, dropkit as dk
        >>> with dk.masks(seed=0):
        ...     dk.functional.locked_dropout(torch.ones(1, 3, 4), p=0.5, batch_first=True)
        tensor([[[2., 2., 0., 2.],
                 [2., 2., 0., 2.],
                 [2., 2., 0., 2.]]])
    """
    rate = p if isinstance(p, Tensor) else check_probability(p)
    if isinstance(x, PackedSequence):
        if not training:
            return x
        rows = 1 if one_mask_for_all_rows() else int(x.batch_sizes[0])
        noise = dropout(x.data.new_ones(rows, *x.data.shape[1:]), rate, site=site, owner=owner)
        data = times_noise(x.data, noise if rows == 1 else noise[packed_rows(x)])
        return x._replace(data=x.data.copy_(data) if inplace else data)
    check_axes(
        x,
        "B T D ..." if batch_first else "T B D ...",
        hint="Write one row as x.unsqueeze(0 or 1), a batch of 1.",
    )
    if not training:
        return x
    rows_first = x if batch_first else x.transpose(0, 1)
    dropped = dropout(rows_first, rate, inplace=inplace, shared=(1,), site=site, owner=owner)
    return dropped if batch_first else dropped.transpose(0, 1)


def token_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    batch_first: bool = True,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Drop whole vectors of a sequence: all features of a token together.

    y[b, t, d] = x[b, t, d] * keep[b, t] / (1 - p),    keep[b, t] ~ Bernoulli(1 - p)

    Args:
        x: (B, T, D), or (T, B, D) without batch_first.
        p, training, inplace, site, owner: as in `locked_dropout`.
        batch_first: which of the first two dims counts the rows.

    Returns:
        The shape of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: x has not three axes.
        OptionError: whole numbers; tokens themselves are replaced by `word_dropout`.
    """
    rate = p if isinstance(p, Tensor) else check_probability(p)
    check_axes(x, "B T D" if batch_first else "T B D", hint="Write one row as a batch of 1.")
    if not training:
        return x
    rows_first = x if batch_first else x.transpose(0, 1)
    dropped = dropout(rows_first, rate, inplace=inplace, shared=(2,), site=site, owner=owner)
    return dropped if batch_first else dropped.transpose(0, 1)


def check_tokens(tokens: Tensor) -> Tensor:
    """Tokens as they are, or what is wrong with them.

    Raises:
        OptionError: they are not whole numbers.
    """
    if tokens.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise OptionError(f"tokens of {tokens.dtype} were given; word ids are whole numbers: tokens.long().")
    return tokens


def word_dropout(
    tokens: Tensor,
    unknown: int,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    spared: Sequence[int] = (),
    batch_first: bool = True,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Replace words by the unknown word, each on its own.

    y[b, t] = tokens[b, t] where keep[b, t], else unknown;    keep[b, t] ~ Bernoulli(1 - p)

    Nothing is scaled: the input is a name, not a quantity.

    Args:
        tokens: (B, *) whole numbers, or (T, B) without batch_first.
        unknown: id that takes the place of a dropped word.
        p: chance to drop a word, in [0, 1].
        training: False gives the tokens back.
        spared: ids that always stay, such as padding and the marks of beginning and end.
        batch_first: which of the first two dims counts the rows.
        site, owner: as in `locked_dropout`.

    Returns:
        The shape and dtype of tokens.

    Raises:
        ProbabilityError: p is outside [0, 1].
        OptionError: tokens are not whole numbers.

    Source: Iyyer et al. 2015, ACL (there the word is left out of an average); Bowman et al. 2016, arXiv:1511.06349,
        section 3.1 (replaced by the unknown word, as here).

    Example:
        >>> import torch, dropkit as dk
        >>> with dk.masks(seed=0):
        ...     dk.functional.word_dropout(torch.tensor([[7, 8, 9, 2]]), unknown=0, p=0.5)
        tensor([[7, 8, 0, 2]])
    """
    rate = p if isinstance(p, Tensor) else check_probability(p)
    check_tokens(tokens)
    if not training:
        return tokens
    rows_first = tokens if batch_first else tokens.transpose(0, 1)
    ones = torch.ones(rows_first.shape, dtype=torch.float32, device=tokens.device)
    drop = dropout(ones, rate, site=site, owner=owner) == 0
    for word in spared:
        drop = drop & (rows_first != word)
    replaced = torch.where(drop, unknown, rows_first).to(tokens.dtype)
    return replaced if batch_first else replaced.transpose(0, 1)


class SequenceLayer(RateLayer):
    """Parent of the layers that must know which of two dims counts the rows; never built itself."""

    def __init__(self, p: Rate, inplace: bool, batch_first: bool) -> None:
        super().__init__(p, inplace)
        self.batch_first = batch_first

    def extra_repr(self) -> str:
        """Rate and layout."""
        return f"{super().extra_repr()}, batch_first={self.batch_first}"


class LockedDropout(SequenceLayer):
    """Layer around `locked_dropout`; the identity while nobody asks for noise.

    Args:
        p: chance to drop, in [0, 1].
        batch_first: True: x is (B, T, *features), as everywhere in dropkit; False: (T, B, *features), as torch.nn.LSTM
            has it by default. A packed batch needs no answer.
        inplace: write the result into the input.
    """

    def __init__(self, p: Rate = 0.5, batch_first: bool = True, inplace: bool = False) -> None:
        super().__init__(p, inplace, batch_first)

    def forward(self, x: Tensor | PackedSequence) -> Tensor | PackedSequence:  # type: ignore[override]
        """(B, T, *features) or (T, B, *features) or packed -> the same."""
        return locked_dropout(
            x, self.rate, self.active, self.inplace, batch_first=self.batch_first, site=self.site, owner=self
        )


class TokenDropout(SequenceLayer):
    """Layer around `token_dropout`; the identity while nobody asks for noise.

    Args:
        p: chance to drop a token's vector, in [0, 1].
        batch_first: True: x is (B, T, D); False: (T, B, D).
        inplace: write the result into the input.
    """

    def __init__(self, p: Rate = 0.5, batch_first: bool = True, inplace: bool = False) -> None:
        super().__init__(p, inplace, batch_first)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) or (T, B, D) -> the same shape."""
        return token_dropout(
            x, self.rate, self.active, self.inplace, batch_first=self.batch_first, site=self.site, owner=self
        )


class WordDropout(SequenceLayer):
    """Layer around `word_dropout`; the identity while nobody asks for noise.

    Args:
        unknown: id that takes the place of a dropped word.
        p: chance to drop a word, in [0, 1].
        spared: ids that always stay.
        batch_first: True: tokens are (B, *); False: (T, B).
    """

    def __init__(
        self, unknown: int, p: Rate = 0.5, spared: Sequence[int] = (), batch_first: bool = True
    ) -> None:
        super().__init__(p, False, batch_first)
        self.unknown, self.spared = unknown, tuple(spared)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) whole numbers -> the same."""
        return word_dropout(
            x, self.unknown, self.rate, self.active, spared=self.spared, batch_first=self.batch_first,
            site=self.site, owner=self,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Rate, layout and words."""
        return f"unknown={self.unknown}, {super().extra_repr()}, spared={self.spared}"

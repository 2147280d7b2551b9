"""Locked, token, word and embedding dropout, and zoneout: what falls together, for whom, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dropkit as dk
from dropkit.errors import OptionError, ProbabilityError, ShapeError
from dropkit.nn import embedding

F = dk.functional
SEEDS = st.integers(0, 2**64 - 1)
RATES = st.sampled_from([0.0, 1e-6, 2**-16, 0.1, 0.5, 0.97, 1.0])


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


# Locked


@given(seed=SEEDS, p=RATES, rows=st.integers(1, 4), times=st.integers(1, 5), width=st.integers(1, 9))
def test_one_mask_serves_all_steps_in_either_layout(
    seed: int, p: float, rows: int, times: int, width: int
) -> None:
    x = torch.randn(rows, times, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with dk.masks(seed=seed):
        noise = F.dropout(ones(rows, 1, width), p)
    with dk.masks(seed=seed):
        y = F.locked_dropout(x, p, batch_first=True)
    with dk.masks(seed=seed):
        time_first = F.locked_dropout(x.transpose(0, 1), p, batch_first=False)
    torch.testing.assert_close(y, x * noise, rtol=1e-12, atol=0)
    assert torch.equal(time_first.transpose(0, 1), y)
    lengths = torch.tensor([1 + i % times for i in range(rows)])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    with dk.masks(seed=seed):
        dropped = F.locked_dropout(packed, p, batch_first=True)
    unpacked, _ = pad_packed_sequence(dropped, batch_first=True)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(unpacked[row, :n], y[row, :n], rtol=1e-12, atol=0)


def test_a_packed_batch_is_the_same_in_evaluation_and_for_a_member() -> None:
    layer, x = dk.nn.LockedDropout(0.5, batch_first=False), torch.randn(5, 3, 4)
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False)
    assert layer.eval()(packed) is packed
    with dk.masks(seed=0, member=1):
        whole = layer(x)
    with dk.masks(seed=0, member=1):
        unpacked, lengths = pad_packed_sequence(layer(packed))
    for row, n in enumerate(lengths.tolist()):
        assert torch.equal(unpacked[:n, row], whole[:n, row])
    assert torch.equal(whole != 0, (whole != 0)[:1, :1].expand_as(whole))


@pytest.mark.parametrize("packed", [False, True])
def test_in_place_and_a_dropped_nan(packed: bool) -> None:
    x = torch.full((2, 3, 64), math.nan)
    given_x: Any = pack_padded_sequence(x, torch.tensor([3, 3]), batch_first=True) if packed else x
    with dk.masks(seed=0):
        y = F.locked_dropout(given_x, 0.5, inplace=True, batch_first=True)
    data, source = (y.data, given_x.data) if packed else (y, x)
    assert data.data_ptr() == source.data_ptr()
    assert set(torch.nan_to_num(data, nan=1.0).unique().tolist()) == {0.0, 1.0}


# Tokens and words


def test_token_dropout_drops_whole_vectors() -> None:
    x = torch.randn(4, 50, 3)
    for first in (True, False):
        with dk.masks(seed=1):
            y = dk.nn.TokenDropout(0.5, batch_first=first)(x if first else x.transpose(0, 1))
        y = y if first else y.transpose(0, 1)
        fallen = (y == 0).all(dim=2)
        torch.testing.assert_close(y, torch.where(fallen.unsqueeze(2), 0.0, 2 * x))
        assert 0 < int(fallen.sum()) < 200


@given(seed=SEEDS, p=RATES, shape=st.sampled_from([(5,), (3, 7), (2, 3, 4)]))
def test_a_word_is_itself_or_unknown_and_a_higher_rate_adds(
    seed: int, p: float, shape: tuple[int, ...]
) -> None:
    tokens = torch.randint(1, 9, shape, generator=torch.Generator().manual_seed(0))
    results = []
    for rate in (p, min(1.0, p + 0.2)):
        with dk.masks(seed=seed):
            results.append(F.word_dropout(tokens, 0, rate, spared=(3, 4)))
    low, high = results
    assert low.dtype == tokens.dtype
    assert bool(((low == tokens) | (low == 0)).all())
    assert bool((high[low == 0] == 0).all())
    stays = (tokens == 3) | (tokens == 4)
    assert torch.equal(high[stays], tokens[stays])
    with dk.masks(seed=seed):
        keep = F.dropout(torch.ones(shape), p) != 0
    assert torch.equal((low != 0) & ~stays, keep & ~stays)


def test_words_fall_at_their_rate() -> None:
    """Exact binomial tails, false alarm below 1e-9 (the seed is fixed, so never by chance)."""
    tokens = torch.ones(100, 300, dtype=torch.int64)
    with dk.masks(seed=0):
        fallen = int((dk.nn.WordDropout(0, 0.2)(tokens) == 0).sum())
    assert min(binom.cdf(fallen, 30_000, 0.2), binom.sf(fallen - 1, 30_000, 0.2)) > 5e-10


def test_words_time_first_follow_their_row() -> None:
    tokens = torch.randint(1, 9, (3, 7))
    with dk.masks(seed=0):
        rows = F.word_dropout(tokens, 0, 0.5)
    with dk.masks(seed=0):
        assert torch.equal(F.word_dropout(tokens.t(), 0, 0.5, batch_first=False).t(), rows)


# Embeddings


@given(
    seed=SEEDS,
    p=RATES,
    types=st.integers(1, 3000),
    shape=st.sampled_from([(4,), (3, 5), (2, 70), (2, 3, 4)]),
    context=st.sampled_from(
        [{}, {"member": 3}, {"row_offset": 7}, {"step": 2, "member": 1}, {"samples": True}]
    ),
    data=st.data(),
)
def test_only_the_word_types_that_occur_are_drawn_and_they_are_those_of_the_whole_table(
    seed: int, p: float, types: int, shape: tuple[int, ...], context: dict[str, Any], data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tokens = torch.randint(0, types, shape, generator=generator)
    if "samples" in context:
        context = {"samples": torch.arange(shape[0]) * 11 + 3}
    weight = torch.rand(types, 2, generator=generator) + 1
    with dk.masks(seed=seed, **context):
        table = F.dropout(torch.ones(shape[0], types), p)
    with dk.masks(seed=seed, **context):
        y = F.embedding_dropout(tokens, weight, p)
    noise = table.gather(1, tokens.flatten(1) if tokens.ndim > 1 else tokens[:, None]).reshape(shape)
    torch.testing.assert_close(y, weight[tokens] * noise.unsqueeze(-1), rtol=1e-6, atol=0)
    if tokens.ndim == 2:
        with dk.masks(seed=seed, **context):
            time_first = F.embedding_dropout(tokens.t(), weight, p, batch_first=False)
        assert torch.equal(time_first.transpose(0, 1), y)


def test_a_tiny_rate_drops_the_word_types_that_the_table_drops() -> None:
    """Rates below 2**-16 ask for second bits: about 13 of these types have first bits that leave it open."""
    types = 1 << 22
    tokens = torch.arange(0, types, 5)[None]  # few enough that the table is not built
    with dk.masks(seed=0):
        table = F.dropout(torch.ones(1, types), 2.0**-17)
    with dk.masks(seed=0):
        y = F.embedding_dropout(tokens, torch.ones(types, 1), 2.0**-17).squeeze(-1)
    assert torch.equal(y, table[:, ::5])
    assert 0 < int((y == 0).sum()) < 30


def test_the_table_is_not_built_where_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a mask of the whole table was drawn")

    tokens = torch.randint(0, 100_000, (3, 9))
    monkeypatch.setattr(embedding, "dropout", refuse)
    with dk.masks(seed=0):
        F.embedding_dropout(tokens, torch.ones(100_000, 2), 0.5)


def test_it_is_torchs_embedding_with_its_options() -> None:
    options: dict[str, Any] = {"padding_idx": 0, "max_norm": 1.0, "scale_grad_by_freq": True}
    torch.manual_seed(0)
    ours = dk.nn.EmbeddingDropout(30, 4, **options, p=0.5)
    torch.manual_seed(0)
    theirs = nn.Embedding(30, 4, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    assert torch.equal(ours.weight, theirs.weight)
    tokens = torch.tensor([[0, 1, 1, 29], [2, 0, 1, 7]])
    torch.testing.assert_close(ours.eval()(tokens), theirs(tokens))
    torch.testing.assert_close(ours.weight, theirs.weight)  # renormed alike
    ours.train()
    with dk.masks(seed=4):
        y = ours(tokens)
    y.sum().backward()
    plain = theirs(tokens)
    factor = torch.where((y == 0).all(-1), 0.0, 2.0)
    (plain * factor.unsqueeze(-1)).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert torch.equal(ours.weight.grad[0], torch.zeros(4))
    taken = dk.nn.EmbeddingDropout.from_embedding(theirs, p=0.5)
    assert taken.weight is theirs.weight
    assert repr(taken) == "EmbeddingDropout(30, 4, padding_idx=0, max_norm=1.0, scale_grad_by_freq=True, p=0.5, " \
        "inplace=False, batch_first=True)"  # fmt: skip


def test_a_sparse_gradient_stays_sparse() -> None:
    layer = dk.nn.EmbeddingDropout(1000, 3, sparse=True, p=0.5)
    layer(torch.tensor([[1, 2, 999]])).sum().backward()
    assert layer.weight.grad.is_sparse


def test_a_word_falls_everywhere_in_its_row_or_nowhere() -> None:
    tokens = torch.tensor([[5, 5, 6, 5], [5, 6, 6, 5]])
    weight = torch.ones(10_000, 1)
    patterns = set()
    for seed in range(40):
        with dk.masks(seed=seed):
            fallen = F.embedding_dropout(tokens, weight, 0.5).squeeze(-1) == 0
        assert torch.equal(fallen[0, [0, 0]], fallen[0, [1, 3]])
        assert torch.equal(fallen[1, [0, 1]], fallen[1, [3, 2]])
        patterns.add((bool(fallen[0, 0]), bool(fallen[1, 0])))
    assert len(patterns) == 4  # rows decide for themselves


@pytest.mark.parametrize("types", [6, 4000])
def test_embedding_under_vmap_and_compiled(types: int) -> None:
    tokens, weight = torch.randint(0, types, (3, 8)), torch.randn(types, 2)
    layer = dk.nn.EmbeddingDropout.from_embedding(nn.Embedding(types, 2, _weight=weight), p=0.5)

    def member(k: Tensor | int) -> Tensor:
        with dk.masks(seed=0, member=k):
            return layer.eval()(tokens)

    together = torch.func.vmap(member)(torch.arange(3))
    for k in range(3):
        torch.testing.assert_close(together[k], member(k))
    layer.train()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with dk.masks(seed=0):
        eager = layer(tokens)
    with dk.masks(seed=0):
        assert torch.equal(compiled(tokens), eager)


# Zoneout


@given(seed=SEEDS, p=RATES)
def test_zoneout_takes_each_unit_from_one_of_two(seed: int, p: float) -> None:
    new, old = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    with dk.masks(seed=seed):
        keep = F.dropout(ones(3, 6), p) != 0
    with dk.masks(seed=seed):
        y = F.zoneout(new, old, p)
    assert torch.equal(y, torch.where(keep, new, old))
    used = round(p * 65536) / 65536 if p == 0 or p >= 2**-16 else round(p * 2**32) / 2**32
    torch.testing.assert_close(
        F.zoneout(new, old, p, training=False), (1 - used) * new + used * old, rtol=1e-12, atol=1e-12
    )


def test_zoneout_never_looks_at_what_it_does_not_take() -> None:
    new, old = torch.tensor([[math.nan, 1.0]]), torch.tensor([[2.0, math.inf]])
    with dk.masks(seed=0):
        assert F.zoneout(new, old.nan_to_num(posinf=3.0), 1.0).tolist() == [[2.0, 3.0]]
        assert F.zoneout(new.nan_to_num(5.0), old, 0.0).tolist() == [[5.0, 1.0]]


# What is refused


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: F.locked_dropout(torch.ones(3, 4), batch_first=True), ShapeError, r"B, T, D"),
        (lambda: F.locked_dropout(torch.ones(3, 4), batch_first=False), ShapeError, r"T, B, D"),
        (lambda: F.locked_dropout(torch.ones(2, 3, 4).long(), batch_first=True), OptionError, "int64"),
        (lambda: F.locked_dropout(torch.ones(2, 3, 4), 50, batch_first=True), ProbabilityError, "0.5"),
        (lambda: F.token_dropout(torch.ones(3, 4)), ShapeError, r"B, T, D"),
        (lambda: F.word_dropout(torch.ones(3, 4), 0), OptionError, "long"),
        (lambda: F.word_dropout(torch.ones(3, 4).bool(), 0), OptionError, "bool"),
        (lambda: F.embedding_dropout(torch.ones(3, 4), torch.ones(5, 2)), OptionError, "long"),
        (lambda: F.embedding_dropout(torch.tensor([[5]]), torch.ones(5, 2)), OptionError, "0 to 4"),
        (lambda: F.embedding_dropout(torch.tensor([[-1]]), torch.ones(5, 2)), OptionError, "-1"),
        (lambda: F.embedding_dropout(torch.tensor([[1]]), torch.ones(5)), ShapeError, r"\(V, D\)"),
        (lambda: F.zoneout(torch.ones(2, 3), torch.ones(2, 4)), ShapeError, "two times"),
        (lambda: F.zoneout(torch.ones(2), torch.ones(2), math.nan), ProbabilityError, "nan"),
    ],
)
def test_mistakes_are_named(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()

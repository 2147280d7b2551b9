"""DropBlock: its kept share exactly, its limits, its scales, against slow references."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dropkit as dk
from dropkit.errors import OptionError, ProbabilityError, ShapeError
from dropkit.nn.block_rate import covers_of
from dropkit.nn.blocks import _factor, _hit

FALSE_ALARM = 1e-9
maps = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def covered_by(starts: torch.Tensor, blocks: tuple[int, ...]) -> torch.Tensor:
    """Slowly: every chosen place paints its block."""
    sizes = [places + block - 1 for places, block in zip(starts.shape[2:], blocks, strict=True)]
    hit = torch.zeros(*starts.shape[:2], *sizes, dtype=torch.bool)
    for row, channel, *place in starts.nonzero().tolist():
        hit[(row, channel, *(slice(i, i + b) for i, b in zip(place, blocks, strict=True)))] = True
    return hit


@settings(max_examples=60)
@given(sizes=maps, block=st.integers(1, 7), p=st.floats(0, 1))
def test_the_expected_kept_share_is_one_minus_p(sizes, block, p):
    gamma = dk.functional.drop_block_gamma(p, sizes, block)
    assert 0 <= gamma <= 1
    # Near 1, gamma**n is as steep as its last bit.
    assert dk.functional.drop_block_kept(gamma, sizes, block) == pytest.approx(1 - p, abs=1e-12)


@pytest.mark.parametrize(
    ("sizes", "block"), [((4,), (2,)), ((5,), (3,)), ((3, 3), (2, 2)), ((2, 2, 3), (2, 1, 2))]
)
def test_share_and_scale_by_every_mask(sizes, block):
    """All 2**places choices, each with its chance: the kept share is the formula's, and "position" keeps the mean."""
    places = [size - b + 1 for size, b in zip(sizes, block, strict=True)]
    gamma = 16384 / 65536  # a rate that needs no rounding
    mean = torch.zeros(sizes, dtype=torch.float64)
    share = 0.0
    for choice in itertools.product([0.0, 1.0], repeat=math.prod(places)):
        chance = math.prod(gamma if start else 1 - gamma for start in choice)
        keep = ~_hit(torch.tensor(choice).view(1, 1, *places), block)
        share += chance * float(keep.double().mean())
        mean += chance * (keep * _factor(keep, gamma, sizes, block, "position"))[0, 0]
    assert share == pytest.approx(dk.functional.drop_block_kept(gamma, sizes, block), abs=1e-12)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(data=st.data(), sizes=maps, seed=st.integers(0, 99))
def test_blocks_are_what_painting_them_one_by_one_gives(data, sizes, seed):
    blocks = tuple(data.draw(st.integers(1, size)) for size in sizes)
    places = [size - block + 1 for size, block in zip(sizes, blocks, strict=True)]
    starts = torch.rand(2, 3, *places, generator=torch.Generator().manual_seed(seed)) < 0.2
    assert torch.equal(_hit(starts.float(), blocks), covered_by(starts, blocks))
    counts = sum(
        covered_by(one.view(1, 1, *places) > 0, blocks)[0, 0].double() for one in torch.eye(math.prod(places))
    )
    assert torch.equal(covers_of(tuple(sizes), blocks, torch.ones((), dtype=torch.float64)), counts)


def test_the_papers_gamma_and_what_it_keeps():
    """Their eq. 1 in numbers, and the true share: overlap keeps more than is asked for."""
    paper = dk.functional.drop_block_gamma(0.1, (14, 14), 7, rule="paper")
    assert paper == pytest.approx(0.1 / 49 * 14**2 / 8**2)
    dropped = {}
    for p in (0.05, 0.1, 0.25, 0.5):
        gamma = dk.functional.drop_block_gamma(p, (14, 14), 7, rule="paper")
        dropped[p] = round(1 - dk.functional.drop_block_kept(gamma, (14, 14), 7), 4)
    assert dropped == {0.05: 0.0482, 0.1: 0.0929, 0.25: 0.2095, 0.5: 0.3582}
    assert dk.functional.drop_block_gamma(1.0, (3, 3), 3, rule="paper") == 1.0


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_limits_block_of_one_is_dropout_and_of_the_map_channel_dropout(p):
    x = torch.randn(6, 5, 4, 3)
    for block, shared in ((1, ()), (4, (2, 3)), (99, (2, 3))):
        with dk.masks(seed=1):
            y = dk.functional.drop_block(x, p, block, scale="position", site="a")
        with dk.masks(seed=1):
            torch.testing.assert_close(y, dk.functional.dropout(x, p, shared=shared, site="a"))


@pytest.mark.parametrize("shared_channels", [False, True])
def test_a_row_of_ones_has_mean_one_and_does_not_know_its_neighbours(shared_channels):
    x = torch.ones(64, 4, 9, 8, dtype=torch.float64)
    with dk.masks(seed=5):
        y = dk.functional.drop_block(x, 0.4, 3, shared_channels=shared_channels)
    torch.testing.assert_close(y.mean((1, 2, 3)), torch.ones(64, dtype=torch.float64))
    assert len(y.amax((1, 2, 3)).unique()) > 10  # each row has a scale of its own
    for row in (0, 17):
        with dk.masks(seed=5, row_offset=row):
            alone = dk.functional.drop_block(x[row : row + 1], 0.4, 3, shared_channels=shared_channels)
        assert torch.equal(alone[0], y[row])
    assert bool(((y == 0) == (y[:, :1] == 0)).all()) == shared_channels


@pytest.mark.parametrize("rule", ["exact", "paper"])
def test_the_kept_share_is_met(rule):
    """2000 rows of 4 channels, shares in [0, 1]: Hoeffding's bound at the stated false alarm."""
    p, sizes = 0.25, (7, 6)
    with dk.masks(seed=7):
        y = dk.functional.drop_block(torch.ones(2000, 4, *sizes), p, 3, gamma=rule, scale="none")
    gamma = dk.functional.drop_block_gamma(p, sizes, 3, rule)
    expected = dk.functional.drop_block_kept(gamma, sizes, 3)
    bound = math.sqrt(math.log(2 / FALSE_ALARM) / 2 / 8000) + 9 * 2.0**-17
    assert abs(float(y.mean()) - expected) < bound
    assert (abs(expected - (1 - p)) > bound / 2) == (rule == "paper")
    assert set(y.unique().tolist()) == {0.0, 1.0}


def test_position_scale_keeps_the_mean_at_every_element():
    rows, p = 6000, 0.3
    x = torch.ones(rows, 1, 6, dtype=torch.float64)
    with dk.masks(seed=8):
        y = dk.functional.drop_block(x, p, 3, space=1, scale="position")
    off = (y.mean((0, 1)) - 1).abs() / y.amax(
        (0, 1)
    )  # values in [0, largest]: Hoeffding for six places at once
    assert float(off.max()) < math.sqrt(math.log(2 * 6 / FALSE_ALARM) / 2 / rows)
    edge, middle = y[:, 0, 0].max(), y[:, 0, 2].max()
    assert edge < 1 / (1 - p) < middle  # a border element is covered by fewer blocks, and stays more often


def test_what_is_dropped_is_gone_and_layouts_agree():
    x = torch.full((4, 3, 8, 8), math.inf, requires_grad=True)
    with dk.masks(seed=1):
        y = dk.functional.drop_block(x, 0.5, 3, site="a")
    assert ((y == 0) | (y == math.inf)).all()
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, math.nan))
    assert (gradient[y == 0] == 0).all()
    with dk.masks(seed=1):
        last = dk.functional.drop_block(x.detach().movedim(1, -1), 0.5, 3, channels_last=True, site="a")
    assert torch.equal(last.movedim(-1, 1), y)
    for memory in (torch.channels_last, torch.contiguous_format):
        with dk.masks(seed=1):
            same = dk.functional.drop_block(x.detach().contiguous(memory_format=memory), 0.5, 3, site="a")
        assert torch.equal(same, y)
        assert same.is_contiguous(memory_format=memory)
    mine = torch.ones(4, 3, 8, 8)
    with dk.masks(seed=1):
        assert dk.nn.DropBlock2d(0.5, 3, inplace=True)(mine) is mine
    assert (mine == 0).any()


def test_rates_as_tensors_give_what_numbers_give():
    rates = torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=torch.float64)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)

    def run(p):
        with dk.masks(seed=2):
            return dk.functional.drop_block(x, p, 3, scale="position")

    together = torch.func.vmap(run)(rates)
    for p, y in zip(rates.tolist(), together, strict=True):
        torch.testing.assert_close(y, run(p), rtol=1e-9, atol=1e-12)


def test_a_schedule_drops_more_as_it_rises():
    layer = dk.nn.DropBlock2d(dk.nn.schedules.linear(0.0, 0.5, 100), 3)
    x, dropped = torch.ones(16, 4, 8, 8), []
    for step in (0, 50, 100):
        with dk.masks(seed=0, step=step):
            dropped.append(int((layer(x) == 0).sum()))
    assert dropped[0] == 0 < dropped[1] < dropped[2]


def test_blocks_refuse_what_they_cannot_do():
    with pytest.raises(ShapeError, match=r"\(B, C, H, W\)"):
        dk.nn.DropBlock2d()(torch.ones(3, 8, 8))
    with pytest.raises(OptionError, match="space=4"):
        dk.functional.drop_block(torch.ones(1, 1, 2, 2), space=4)
    with pytest.raises(OptionError, match="block_size=0"):
        dk.nn.DropBlock2d(0.1, 0)
    with pytest.raises(OptionError, match="each of 2 dims"):
        dk.nn.DropBlock2d(0.1, (3, 3, 3))
    with pytest.raises(OptionError, match="scale='batch'"):
        dk.nn.DropBlock2d(0.1, scale="batch")
    with pytest.raises(OptionError, match="gamma='none'"):
        dk.functional.drop_block(torch.ones(1, 1, 2, 2), gamma="none")
    with pytest.raises(OptionError, match="0-d tensor"):
        dk.functional.drop_block(torch.ones(1, 1, 2, 2), torch.tensor([0.1]))
    with pytest.raises(OptionError, match=r"shape \(2,\)"):
        dk.nn.DropBlock2d(torch.tensor([0.1, 0.2]))
    with pytest.raises(ProbabilityError, match="gamma=2"):
        dk.functional.drop_block_kept(2, (3,), 1)
    assert dk.functional.drop_block(torch.ones(0, 1, 2, 2)).shape == (0, 1, 2, 2)

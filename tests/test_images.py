"""What is forgotten of images: channels in every layout, one square, and patches of a sequence."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2
from torch import nn

import dropkit as dk
from dropkit.errors import OptionError, ProbabilityError, ShapeError
from dropkit.nn.patches import take_patches

FALSE_ALARM = 1e-9  # of each statistical test; seeds are fixed, so a test that passes once passes always
LAYERS = {1: dk.nn.ChannelDropout1d, 2: dk.nn.ChannelDropout2d, 3: dk.nn.ChannelDropout3d}
TORCHS = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
sides = st.integers(1, 4)


# Channels


@settings(max_examples=40)
@given(
    space=st.lists(sides, min_size=1, max_size=3),
    rows=sides,
    channels=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_channel_has_one_mask_element_and_the_layout_does_not_matter(space, rows, channels, seed):
    x = 1 + torch.rand(rows, channels, *space, generator=torch.Generator().manual_seed(seed))
    with dk.masks(seed=seed):
        y = dk.functional.channel_dropout(x, 0.5, space=len(space), site="a")
        last = dk.functional.channel_dropout(
            x.movedim(1, -1), 0.5, space=len(space), channels_last=True, site="a.last"
        )
    with dk.masks(seed=seed):
        elements = dk.functional.dropout(torch.ones(rows, channels), 0.5, site="a")
        others = dk.functional.dropout(torch.ones(rows, channels), 0.5, site="a.last")
    shape = (rows, channels, *[1] * len(space))
    torch.testing.assert_close(y, x * elements.view(shape), rtol=0, atol=0)
    torch.testing.assert_close(last.movedim(-1, 1), x * others.view(shape), rtol=0, atol=0)


@pytest.mark.parametrize("space", [1, 2, 3])
def test_one_row_without_its_batch_is_the_batch_of_one(space):
    x = torch.ones(40, *[3] * space)
    layer = LAYERS[space](0.5, unbatched=True)
    for inplace in (False, True):
        layer.inplace = inplace
        with dk.masks(seed=1):
            whole = layer(x[None].clone())
        with dk.masks(seed=1):
            alone = layer(x.clone())
        assert torch.equal(alone, whole[0])
        assert (alone == 0).any()
    mine = x.clone()
    with dk.masks(seed=1):
        assert layer(mine) is mine
    assert torch.equal(mine, whole[0])


@pytest.mark.parametrize(("space", "axes"), [(1, "B, C, L"), (2, "B, C, H, W"), (3, "B, C, D, H, W")])
def test_other_numbers_of_dims_are_refused_with_axes_by_name(space, axes):
    layer = LAYERS[space](0.5)
    for dims in {1, 2, 3, 4, 5, 6} - {space + 2}:
        with pytest.raises(ShapeError, match=rf"allowed: \({axes}\)"):
            layer(torch.ones([2] * dims))
    with pytest.raises(ShapeError, match="unbatched=True"):
        layer(torch.ones([2] * (space + 1)))
    last = LAYERS[space](
        0.5, channels_last=True
    ).eval()  # in evaluation too: a mistake shows before training does
    with pytest.raises(ShapeError, match=axes.replace("C, ", "") + ", C"):
        last(torch.ones(2))


def test_what_torch_guesses_is_said():
    with pytest.raises(ShapeError, match=r"\(B, C, H, W\)\. One row without its batch, \(C, H, W\)"):
        dk.nn.ChannelDropout2d()(torch.ones(3, 8, 8))
    with pytest.raises(OptionError, match="space"):
        dk.nn.ChannelDropout(unbatched=True)
    with pytest.raises(OptionError, match="space=4"):
        dk.functional.channel_dropout(torch.ones(2, 2), space=4)
    with pytest.raises(OptionError, match=r"torch\.int64"):
        dk.nn.ChannelDropout2d()(torch.ones(2, 3, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize("space", [1, 2, 3])
def test_it_takes_the_place_of_torchs_layer(space):
    ours, theirs = LAYERS[space](0.3, True), TORCHS[space](0.3, True)
    assert repr(ours).partition("(")[2] == repr(theirs).partition("(")[2]
    assert not ours.state_dict()
    for p in (0.0, 1.0):
        x = torch.randn(2, 3, *[4] * space)
        assert torch.equal(LAYERS[space](p)(x), TORCHS[space](p)(x))


@pytest.mark.filterwarnings("ignore:dropout2d:UserWarning")
@pytest.mark.parametrize("shape", [(30, 20), (30, 20, 3), (30, 20, 3, 2)])
def test_any_space_is_read_as_torchs_dropout2d_reads_it(shape):
    """Which dims share a mask: found by trial, for torch's layer and ours."""

    def constant(layer):
        zero = layer(torch.ones(shape)) == 0
        return [size > 1 and bool((zero == zero.narrow(dim, 0, 1)).all()) for dim, size in enumerate(shape)]

    assert constant(dk.nn.ChannelDropout(0.5)) == constant(nn.Dropout2d(0.5))


def test_rates_for_each_channel():
    p = torch.tensor([0.0, 1.0, 0.5])
    with dk.masks(seed=0):
        y = dk.nn.ChannelDropout2d(p.view(3, 1, 1))(torch.ones(400, 3, 2, 2))
    assert (y[:, 0] == 1).all()
    assert (y[:, 1] == 0).all()
    assert set(y[:, 2].unique().tolist()) == {0.0, 2.0}


# Cutout


@pytest.mark.parametrize("size", [2, 3])
def test_the_square_is_one_of_all_places_each_equally_often(size):
    height, width, rows = 5, 4, 40_000
    with dk.masks(seed=3):
        y = dk.functional.cutout(torch.ones(rows, 2, height, width), size)
    assert torch.equal(y[:, 0], y[:, 1])
    squares = {}
    for i, j in itertools.product(range(height), range(width)):
        image = torch.ones(height, width)
        image[max(i - 1, 0) : i - 1 + size, max(j - 1, 0) : j - 1 + size] = 0
        squares.setdefault(tuple(image.flatten().tolist()), []).append((i, j))
    seen = dict.fromkeys(squares, 0)
    for image, count in zip(*y[:, 0].flatten(1).unique(dim=0, return_counts=True), strict=True):
        seen[tuple(image.tolist())] += int(count)
    expected = {image: rows * len(places) / (height * width) for image, places in squares.items()}
    statistic = sum((seen[image] - mean) ** 2 / mean for image, mean in expected.items())
    assert chi2.sf(statistic, len(expected) - 1) > FALSE_ALARM
    with dk.masks(seed=3):
        last = dk.functional.cutout(torch.ones(rows, height, width, 2), size, channels_last=True)
    assert torch.equal(last.movedim(-1, 1), y)


@pytest.mark.parametrize(
    ("side", "size", "share"), [(32, 16, 0.1914), (32, 32, 0.5625), (8, 40, 1.0), (5, 1, 0.04)]
)
def test_the_covered_share_that_is_documented(side, size, share):
    """By every centre: the mean covered length, squared. For even sizes the square reaches one further to the front."""
    inside = [min(c - size // 2 + size, side) - max(c - size // 2, 0) for c in range(side)]
    assert (sum(inside) / side / side) ** 2 == pytest.approx(share, abs=1e-4)
    with dk.masks(seed=0):
        covered = dk.functional.cutout(torch.ones(4000, 1, side, side), size).eq(0).double().mean()
    # Hoeffding: shares of rows lie in [0, 1].
    assert abs(covered - share) < 1e-4 + math.sqrt(math.log(2 / FALSE_ALARM) / 2 / 4000)


def test_cutout_fills_at_its_rate_and_passes_no_gradient_under_the_square():
    x = torch.full((500, 1, 6, 6), math.nan, requires_grad=True)
    with dk.masks(seed=1):
        y = dk.functional.cutout(x, 40, 0.3, fill=-1.0)
    cut = (y == -1).flatten(1)
    assert (cut.all(1) | ~cut.any(1)).all()
    assert 2 * binom.sf(abs(int(cut[:, 0].sum()) - 150) + 150 - 1, 500, 0.3) > FALSE_ALARM
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, math.inf))
    assert (gradient[y == -1] == 0).all()
    maps = torch.ones(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    assert dk.functional.cutout(maps, 3).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(OptionError, match="size=0"):
        dk.nn.Cutout(0)
    with pytest.raises(ShapeError, match=r"\(B, C, H, W\)"):
        dk.nn.Cutout(2)(torch.ones(3, 4, 4))


# Patches


@settings(max_examples=60)
@given(
    rows=st.integers(0, 5),
    patches=st.integers(0, 20),
    prefix=st.integers(0, 2),
    p=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_all_rows_keep_equally_many_patches_in_their_order_and_the_prefix(rows, patches, prefix, p, seed):
    x = torch.arange(float(rows * (prefix + patches) * 2)).view(rows, prefix + patches, 2)
    with dk.masks(seed=seed):
        y = dk.functional.patch_dropout(x, p, prefix_tokens=prefix, site="a")
    with dk.masks(seed=seed):
        kept = dk.functional.kept_patches(x, p, prefix_tokens=prefix, site="a")
    count = max(1, patches - round(p * patches)) if patches else 0
    assert y.shape == (rows, prefix + count, 2)
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    assert (kept.diff(dim=1) > 0).all()
    for row in range(rows):
        assert torch.equal(y[row, prefix:], x[row, prefix + kept[row]])
    assert torch.equal(take_patches(x, kept, prefix), y)


def test_every_set_of_patches_is_equally_likely():
    sets = list(itertools.combinations(range(5), 2))
    rows = 20_000
    with dk.masks(seed=2):
        kept = dk.functional.kept_patches(torch.ones(rows, 5, 1), 0.6, prefix_tokens=0)
    found = [int((kept == torch.tensor(pair)).all(1).sum()) for pair in sets]
    assert sum(found) == rows
    statistic = sum((count - rows / 10) ** 2 / (rows / 10) for count in found)
    assert chi2.sf(statistic, 9) > FALSE_ALARM


def test_the_patch_layer_shortens_in_training_and_for_members_and_returns_indices_when_asked():
    x = torch.randn(3, 9, 4)
    layer = dk.nn.PatchDropout(0.5, return_indices=True)
    with dk.masks(seed=0):
        y, kept = layer(x)
    assert y.shape == (3, 5, 4)
    assert torch.equal(take_patches(x, kept), y)
    layer.eval()
    assert layer(x)[0] is x
    assert layer(x)[1] is None
    with dk.masks(seed=0, member=2):
        y, kept = layer(x)
    assert y.shape == (3, 5, 4)
    assert (kept == kept[0]).all()  # a member is one function: the same places in every row
    (gradient,) = torch.autograd.grad(dk.nn.PatchDropout(0.5)(x.requires_grad_()).sum(), x)
    assert set(gradient.unique().tolist()) == {0.0, 1.0}


def test_patches_refuse_what_they_cannot_do():
    with pytest.raises(OptionError, match="one number"):
        dk.nn.PatchDropout(torch.tensor([0.1, 0.2]))
    with pytest.raises(OptionError, match="prefix_tokens=-1"):
        dk.nn.PatchDropout(0.1, prefix_tokens=-1)
    with pytest.raises(ShapeError, match=r"\(B, N, D\)"):
        dk.nn.PatchDropout()(torch.ones(4))
    with pytest.raises(ShapeError, match="2 prefix tokens"):
        dk.nn.PatchDropout(prefix_tokens=2)(torch.ones(4, 1, 3))
    with pytest.raises(ProbabilityError):
        dk.functional.patch_dropout(torch.ones(2, 5, 1), 30, training=False)


def test_a_schedule_makes_sequences_shorter_as_it_rises():
    layer = dk.nn.PatchDropout(dk.nn.schedules.linear(0.0, 0.5, 10))
    lengths = []
    for step in (0, 5, 10):
        with dk.masks(seed=0, step=step):
            lengths.append(layer(torch.ones(2, 17, 3)).shape[1])
    assert lengths == [17, 13, 9]

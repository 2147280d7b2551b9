"""Masksembles: few fixed masks, equal in size, as different as asked for, the same after every reload."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

import dropkit as dk
from dropkit.errors import AddressError, OptionError, ProbabilityError, ShapeError
from dropkit.functional import masksembles, overlapping_masks
from dropkit.masks import address, noise
from dropkit.nn.masksembles import ones_of_scale


def slow_masks(features: int, masks: int, ones: int, seed: int) -> list[set[int]]:
    """The definition, with Python's sets."""
    key = torch.tensor(
        address.signed(address.site_key(seed, address.site_hash("masksembles"), address.EXACT))
    )
    words = noise.words(key, torch.tensor(0), torch.arange(masks), 0, features).tolist()
    keep = [set(sorted(range(features), key=lambda c: -words[k][c])[:ones]) for k in range(masks)]
    unkept = set(range(features)) - set().union(*keep)
    for c in sorted(unkept, key=lambda c: -max(word[c] for word in words)):
        spare = {d for d in range(features) if sum(d in kept for kept in keep) > 1}
        k = max((k for k in range(masks) if keep[k] & spare), key=lambda k: words[k][c])
        keep[k].remove(min(keep[k] & spare, key=lambda d: words[k][d]))
        keep[k].add(c)
    return keep


@given(st.data())
def test_masks_have_the_same_size_cover_all_features_and_are_those_of_the_definition(
    data: st.DataObject,
) -> None:
    features, masks = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 8))
    ones = data.draw(st.integers(-(-features // masks), features))
    seed = data.draw(st.integers(0, 2**64 - 1))
    keep = overlapping_masks(features, masks, ones, seed)
    assert keep.sum(dim=1).tolist() == [ones] * masks
    assert keep.any(dim=0).all()
    assert [set(mask.nonzero()[:, 0].tolist()) for mask in keep] == slow_masks(features, masks, ones, seed)


def test_masks_of_a_seed_are_the_same_for_ever() -> None:
    """Known answers: a change here breaks models that were trained with these masks."""
    rows = ["".join(map(str, mask)) for mask in overlapping_masks(12, 3, 6, seed=7).int().tolist()]
    assert rows == ["011010001110", "010011110010", "100110101001"]
    assert not torch.equal(overlapping_masks(12, 3, 6, seed=8), overlapping_masks(12, 3, 6, seed=7))


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 4.0])
def test_overlap_is_that_of_the_scale(scale: float) -> None:
    """Of 4 masks of 2048 features, the share of what two keep that both keep: 1 / (2 scale - 1)."""
    layer = dk.nn.Masksembles(2048, 4, scale)
    for a, b in itertools.combinations(layer.masks, 2):
        assert (a & b).sum() / (a | b).sum() == pytest.approx(1 / (2 * scale - 1), abs=0.04)


def test_the_ends_of_the_scale_are_one_network_and_an_ensemble() -> None:
    assert dk.nn.Masksembles(12, 4, 1.0).masks.all()
    assert dk.nn.Masksembles(12, 4, 1e9).masks.sum(dim=0).tolist() == [1] * 12
    assert ones_of_scale(10, 4, 2.0) == 5
    assert dk.nn.Masksembles(12, 1, 3.0).masks.all()


def test_every_feature_is_as_likely_to_be_kept() -> None:
    """8 features over 400 seeds; any of them kept too often or seldom by chance less often than 1e-9."""
    kept = sum(overlapping_masks(8, 3, 4, seed).sum(dim=0) for seed in range(400))
    for (
        count
    ) in kept.tolist():  # at most 3 dependent trials a seed: a bound for the mean of 400 values in [1/3, 1]
        assert abs(count / 1200 - 0.5) < (2 / 3) * (stats.norm.isf(1e-9 / 16) / (2 * 400**0.5))


# --- in a network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), [((7, 10), 1), ((7, 10, 2, 3), 1), ((7, 4, 10), -1)])
def test_each_row_has_one_of_the_masks_and_any_batch_size_will_do(shape: tuple[int, ...], dim: int) -> None:
    layer = dk.nn.Masksembles(10, 4, dim=dim)
    with dk.masks(seed=1):
        y = layer(torch.ones(shape))
    kept = (y != 0).movedim(dim, -1)
    flat = kept.reshape(7, -1, 10)
    assert torch.equal(flat, flat[:, :1].expand_as(flat))
    masks = [tuple(mask) for mask in layer.masks.tolist()]
    assert {tuple(row[0]) for row in flat.tolist()} <= set(masks)
    assert y[y != 0].unique().tolist() == [10 / 5]


def test_masks_are_drawn_evenly() -> None:
    """Chi-square of 20,000 rows over 5 masks; a false alarm less often than 1e-9."""
    layer = dk.nn.Masksembles(10, 5)
    with dk.masks(seed=3):
        y = layer(torch.ones(20_000, 10)) != 0
    counts = [(y == mask).all(dim=1).sum().item() for mask in layer.masks]
    assert sum(counts) == 20_000
    assert stats.chisquare(counts).pvalue > 1e-9


def test_member_k_is_mask_k_whatever_seed_step_and_name() -> None:
    layer, x = dk.nn.Masksembles(10, 4).eval(), torch.randn(3, 10)
    assert torch.equal(layer(x), x)
    for k in range(4):
        for at in ({}, {"seed": 5, "step": 9, "row_offset": 3}):
            with dk.masks(member=k, **at):
                torch.testing.assert_close(layer(x), x * layer.masks[k] * 2)
    layer.site = "elsewhere"
    with dk.masks(member=3):
        torch.testing.assert_close(layer(x), x * layer.masks[3] * 2)


def test_a_reloaded_model_has_its_masks_and_nothing_of_them_is_saved() -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)  # masks do not ask torch's generator
        return nn.Sequential(nn.Linear(3, 16), dk.nn.Masksembles(16, 4), nn.Linear(16, 1))

    trained, fresh, x = model(0), model(1), torch.randn(5, 3)
    assert set(trained.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    fresh.load_state_dict(trained.state_dict())
    for k in range(4):
        with dk.masks(member=k):
            y = trained.eval()(x)
        with dk.masks(member=k):
            assert torch.equal(fresh.eval()(x), y)


def test_a_committee_has_as_many_members_as_there_are_masks() -> None:
    layer, x = dk.nn.Masksembles(6, 3).eval(), torch.randn(2, 6)

    def ask(k: Tensor) -> Tensor:
        with dk.masks(member=k):
            return layer(x)

    together = torch.func.vmap(ask)(torch.arange(3))
    torch.testing.assert_close(together, x * layer.masks[:, None] * (6 / layer.ones))
    for members in (torch.tensor(3), torch.tensor(7)):
        with pytest.raises(AddressError, match="0 to 2"):
            ask(members)
    with pytest.raises(AddressError, match="0 to 2"):
        torch.func.vmap(ask)(torch.arange(4))


def test_a_dropped_nan_is_gone_and_gradients_are_masked() -> None:
    layer = dk.nn.Masksembles(6, 3).eval()
    x = torch.full((1, 6), torch.nan, requires_grad=True)
    with dk.masks(member=1):
        y = layer(x)
    assert torch.equal(y[0] == 0, ~layer.masks[1])
    (gradient,) = torch.autograd.grad(y[0, layer.masks[1]].sum(), x)
    torch.testing.assert_close(gradient[0], layer.masks[1] * (6 / layer.ones))


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: dk.nn.Masksembles(0), OptionError, "features=0"),
        (lambda: dk.nn.Masksembles(8, True), OptionError, "masks=True"),
        (lambda: dk.nn.Masksembles(8, 4, 0.5), OptionError, "scale=0.5"),
        (lambda: dk.nn.Masksembles(8, 4, 2.0, p=0.5), OptionError, "give one"),
        (lambda: dk.nn.Masksembles(8, 4, p=50), ProbabilityError, "percentage"),
        (lambda: dk.nn.Masksembles(8, 4, p=0.9), OptionError, "2 to 8"),
        (lambda: dk.nn.Masksembles(8, 4, seed=-1), OptionError, "seed=-1"),
        (lambda: dk.nn.Masksembles(8)(torch.ones(2, 7)), ShapeError, "8 features"),
        (lambda: dk.nn.Masksembles(8, dim=0)(torch.ones(8, 8)), ShapeError, "rows along dim 0"),
        (lambda: masksembles(torch.ones(2, 8), torch.ones(4, 8)), ShapeError, "bool"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        call()

"""Classic dropout and its way to the inverted kind and back; heads with several masks; targeted dropout."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import dropkit as dk
from dropkit.errors import OptionError, ProbabilityError, ShapeError
from dropkit.nn.classic import kept_share
from dropkit.nn.targeted import targets

FALSE_ALARM = 1e-9
MODES = [
    {"training": True},
    {"training": False},
    {"training": False, "member": 3},
    {"training": True, "member": 5},
]


def run(model: nn.Module, x: torch.Tensor, training: bool, **address) -> torch.Tensor:
    model.train(training)
    with dk.masks(seed=2, **address):
        return model(x)


# Classic


@settings(max_examples=40)
@given(p=st.floats(0, 1), seed=st.integers(0, 99))
def test_survivors_stay_as_they_are_and_evaluation_is_the_mean(p, seed):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    with dk.masks(seed=seed):
        y = dk.functional.classic_dropout(x, p, site="a")
    with dk.masks(seed=seed):
        mask = dk.functional.dropout(torch.ones(5, 7), p, site="a") > 0
    assert torch.equal(y, torch.where(mask, x, 0.0))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], mask.to(x.dtype))
    rate = kept_share(p)
    assert rate == pytest.approx(1 - p, abs=2.0**-17)
    assert torch.equal(dk.functional.classic_dropout(x, p, training=False), x * rate)
    steps = 2**16 if p == 0 or p >= 2**-16 else 2**32
    assert (rate * steps).is_integer()  # the rate that masks really have


def test_a_member_is_a_thinned_network_without_a_scale():
    layer, x = dk.nn.ClassicDropout(0.25).eval(), torch.ones(3, 40)
    assert (layer(x) == 0.75).all()
    with dk.masks(seed=0, member=1):
        y = layer(x)
    assert set(y.unique().tolist()) == {0.0, 1.0}
    assert (y == y[0]).all()
    x = torch.full((4, 50), math.nan)
    with dk.masks(seed=0):
        assert (layer.train()(x) == 0).any()  # a dropped NaN is gone


def test_classic_writes_in_place_and_refuses_whole_numbers():
    x = torch.ones(2, 50)
    assert dk.nn.ClassicDropout(0.5, inplace=True)(x) is x
    assert (x == 0).any()
    with pytest.raises(OptionError, match=r"torch\.int32"):
        dk.nn.ClassicDropout(0.5)(torch.ones(2, dtype=torch.int32))


def classic_network(p: float, q: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), dk.nn.ClassicDropout(p), nn.MaxPool2d(2), nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), dk.nn.ClassicDropout(q)),
        dk.nn.ClassicDropout(p), nn.Linear(6, 3),
    )  # fmt: skip
    dk.nn.name_sites(model)
    return model


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_inverted_network_is_the_same_function(mode):
    x = torch.randn(5, 2, 7, 7)
    model = classic_network(0.5, 0.75)
    before = copy.deepcopy(model.state_dict())
    inverted = dk.nn.to_inverted(model)
    assert torch.equal(run(inverted, x, **mode), run(model, x, **mode))  # powers of two: to the last bit
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [type(m).__name__ for m in inverted.modules() if "Dropout" in type(m).__name__] == ["Dropout"] * 3
    back = dk.nn.to_classic(inverted)
    assert all(torch.equal(before[name], tensor) for name, tensor in back.state_dict().items())
    assert torch.equal(run(back, x, **mode), run(model, x, **mode))
    model = classic_network(0.3, 0.1)
    torch.testing.assert_close(
        run(dk.nn.to_inverted(model), x, **mode), run(model, x, **mode), rtol=1e-4, atol=1e-6
    )


def test_the_factor_is_that_of_the_rate_which_masks_have():
    """In float64 the two networks agree to rounding only if 1 - p is the quantised one."""
    x = torch.randn(4, 2, 7, 7, dtype=torch.float64)
    model = classic_network(0.3, 0.1).double()
    for mode in MODES:
        torch.testing.assert_close(
            run(dk.nn.to_inverted(model), x, **mode), run(model, x, **mode), rtol=1e-12, atol=1e-12
        )


def test_what_cannot_be_turned_is_named_with_what_to_do():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = dk.nn.ClassicDropout(0.25)

    with pytest.raises(
        OptionError, match=r"what reads 'drop' is not known: put Dropout\(0\.25\) .* by 0\.75"
    ):
        dk.nn.to_inverted(Own())
    with pytest.raises(OptionError, match=r"'a\.drop' .*; what reads 'b\.drop' "):  # all of them at once
        dk.nn.to_inverted(nn.ModuleDict({"a": Own(), "b": Own()}))
    classic, linear = dk.nn.ClassicDropout(0.5), nn.Linear(3, 3)
    for unknown in (nn.Tanh(), nn.Softmax(-1), dk.nn.AlphaDropout(0.1)):
        with pytest.raises(OptionError, match="'0' is not known"):
            dk.nn.to_inverted(nn.Sequential(classic, unknown, linear))
    with pytest.raises(OptionError, match="'1' is not known"):
        dk.nn.to_inverted(nn.Sequential(linear, classic))
    with pytest.raises(OptionError, match="tied or computed"):
        dk.nn.to_inverted(nn.Sequential(linear, classic, linear))
    twin = nn.Linear(3, 3)
    twin.weight = linear.weight
    with pytest.raises(OptionError, match="tied or computed"):
        dk.nn.to_inverted(nn.Sequential(linear, classic, twin))
    with pytest.raises(OptionError, match="tied or computed"):
        dk.nn.to_inverted(
            nn.Sequential(classic, torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
        )
    with pytest.raises(OptionError, match="not one number"):
        dk.nn.to_inverted(nn.Sequential(dk.nn.ClassicDropout(dk.nn.schedules.linear(0, 0.5, 9)), linear))
    with pytest.raises(OptionError, match="p=1"):
        dk.nn.to_classic(nn.Sequential(dk.nn.Dropout(1.0), linear))


# Several masks before one head


def test_the_outputs_are_those_of_each_mask_and_the_loss_is_their_mean():
    torch.manual_seed(1)
    head = nn.Sequential(nn.Flatten(), nn.Linear(6, 4))
    layer, x = dk.nn.MultiSampleDropout(head, 0.4, samples=3), torch.randn(5, 2, 3)
    target = torch.tensor([0, 1, 2, 3, 0])
    calls = []
    head.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape))

    def asked(function, *args):
        with dk.masks(seed=1):
            return function(*args)

    outputs = asked(layer.outputs, x)
    assert calls == [(15, 2, 3)]  # one batch
    with dk.masks(seed=1):
        masks = dk.functional.dropout(torch.ones(5, 3, 2, 3), 0.4)
    expected = torch.stack([head(x * masks[:, k]) for k in range(3)])
    torch.testing.assert_close(outputs, expected)
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(asked(layer, x), expected.mean(0))
    loss = asked(layer.loss, x, target, F.cross_entropy)
    torch.testing.assert_close(loss, torch.stack([F.cross_entropy(y, target) for y in expected]).mean())
    assert loss > F.cross_entropy(expected.mean(0), target)  # Jensen
    assert torch.equal(layer.eval()(x), head(x))
    assert layer.outputs(x).shape == (1, 5, 4)


def test_a_member_has_the_first_of_the_masks():
    layer, x = dk.nn.MultiSampleDropout(nn.Linear(9, 2), 0.5, samples=4), torch.randn(3, 9)
    with dk.masks(seed=1, member=2):
        y = layer.eval()(x)
    with dk.masks(seed=1, member=2):
        mask = dk.functional.dropout(torch.ones(1, 4, 9), 0.5)[0, 0]
    torch.testing.assert_close(y, layer.head(x * mask))
    with dk.masks(seed=1, member=2):
        assert torch.equal(layer.train()(x), y)


def test_heads_refuse_what_they_cannot_do():
    with pytest.raises(OptionError, match="samples=0"):
        dk.nn.MultiSampleDropout(nn.Linear(2, 2), 0.5, samples=0)
    with pytest.raises(OptionError, match=r"\['0'\]"):
        dk.nn.MultiSampleDropout(nn.Sequential(dk.nn.Dropout(), nn.Linear(2, 2)))
    with pytest.raises(ShapeError, match="rows"):
        dk.nn.MultiSampleDropout(nn.Identity())(torch.tensor(1.0))


# Targeted


@settings(max_examples=40)
@given(
    out=st.integers(1, 6), width=st.integers(1, 8), share=st.floats(0, 1), seed=st.integers(0, 99),
    by=st.sampled_from(["weights", "units"]), whole=st.booleans(),
)  # fmt: skip
def test_the_targets_are_the_lowest_share(out, width, share, seed, by, whole):
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    weight = weight.round() if whole else weight  # ties
    chosen = targets(weight, share, by)
    sizes, marks = (
        (weight.abs(), chosen) if by == "weights" else (weight.norm(dim=1)[None], chosen.view(1, -1))
    )
    assert chosen.shape == ((out, width) if by == "weights" else (out, 1))
    for size, mark in zip(sizes, marks, strict=True):
        assert int(mark.sum()) == math.floor(share * len(size) + 1e-9)
        if mark.any() and not mark.all():
            assert size[mark].max() <= size[~mark].min()


def test_the_share_is_counted_in_whole_weights():
    weight = torch.arange(10.0)[None] + 1
    assert [int(targets(weight, k / 10).sum()) for k in range(11)] == list(range(11))


@pytest.mark.parametrize("by", ["weights", "units"])
def test_only_targets_fall_at_their_rate_and_nothing_is_scaled(by):
    torch.manual_seed(0)
    layer = dk.nn.TargetedDropout(nn.Linear(20, 16), 0.4, share=0.5, by=by)
    weight, steps = layer.module.weight, 400
    target = targets(weight, 0.5, by).expand_as(weight)
    eye, counts = torch.eye(20), torch.zeros(20, 16)
    for step in range(steps):
        with dk.masks(seed=0, step=step):
            y = layer(eye) - layer.module.bias  # what the layer makes of unit vectors is its weight
        stays = (y - weight.T).abs() < 1e-6
        assert (stays | (y.abs() < 1e-6)).all()
        assert stays[~target.T].all()
        counts += ~stays
    seen = counts[target.T] / steps
    bound = math.sqrt(math.log(2 * target.numel() / FALSE_ALARM) / 2 / steps)  # Hoeffding, each weight
    assert float((seen - 0.4).abs().max()) < bound
    if by == "units":
        assert (counts == counts[0]).all()
    layer.p = 1.0
    torch.testing.assert_close(layer(eye), layer.pruned()(eye))
    assert torch.equal(layer.eval()(eye), layer.module(eye))
    assert not torch.equal(layer.pruned().weight, weight)


def test_one_weight_mask_serves_all_rows_and_its_zeros_have_no_gradient():
    layer, x = dk.nn.TargetedDropout(nn.Conv1d(3, 4, 2), 0.5, share=0.8), torch.randn(6, 3, 5)
    with dk.masks(seed=0):
        whole = layer(x)
    with dk.masks(seed=0, samples=torch.tensor([9, 70])):
        torch.testing.assert_close(layer(x[2:4]), whole[2:4])
    weight = layer.module.weight
    with dk.masks(seed=0):
        dropped = dk.functional.targeted_dropout(weight, 0.5, 0.8) == 0
    (gradient,) = torch.autograd.grad(whole.sum(), weight)
    assert dropped.any()
    assert torch.equal(gradient == 0, dropped)
    assert list(layer.state_dict()) == ["module.weight", "module.bias"]


def test_targeted_refuses_what_it_cannot_do():
    with pytest.raises(OptionError, match="ReLU was given"):
        dk.nn.TargetedDropout(nn.ReLU())
    with pytest.raises(OptionError, match="ConvTranspose1d was given"):
        dk.nn.TargetedDropout(nn.ConvTranspose1d(2, 2, 2))
    with pytest.raises(OptionError, match="by='rows'"):
        dk.nn.TargetedDropout(nn.Linear(2, 2), by="rows")
    with pytest.raises(ProbabilityError, match=r"share=1\.5"):
        dk.nn.TargetedDropout(nn.Linear(2, 2), share=1.5)

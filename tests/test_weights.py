"""DropConnect: weights are dropped by the masks of `dropout`, for each row, and none is ever stored."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

import dropkit as dk
from dropkit.errors import OptionError, ProbabilityError, ShapeError
from dropkit.functional import drop_connect, drop_connect_moments, dropout
from dropkit.nn import weight_rows
from dropkit.nn.convolution import Convolution
from dropkit.nn.weights_cpu import TILE

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (5, 4, 9)),
    "1d circular": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (5, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), (5, 4, 9, 8)),
    "2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (5, 4, 5, 6)),
    "2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding="valid", bias=False), (5, 4, 5, 6)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, bias=False, padding_mode="replicate", padding=1), (5, 2, 4, 5, 3)),
}
EACH_CONVOLUTION = pytest.mark.parametrize("name", CONVOLUTIONS)


def masks_of(weight: Tensor, rows: int, p: float, **address: object) -> Tensor:
    """(B, *weight.shape): what weights are multiplied with, by the definition in `dropout`."""
    with dk.masks(**address):
        return dropout(weight.new_ones(rows, *weight.shape), p)


def by_definition(x: Tensor, weight: Tensor, bias: Tensor | None, p: float, **address: object) -> Tensor:
    """The linear map with all masked weights at once."""
    masked = weight * masks_of(weight.detach(), len(x), p, **address)
    y = torch.einsum("b...i,boi->b...o", x, masked)
    return y if bias is None else y + bias


def linear_inputs(rows: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(
        torch.randn(shape, dtype=dtype).requires_grad_()
        for shape in ((*rows, inputs), (outputs, inputs), (outputs,))
    )


# --- a mask for each row --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    inputs=st.sampled_from([1, 3, 8, 13, 64, TILE - 7, TILE, TILE + 6, 2 * TILE]),
    outputs=st.integers(1, 20), p=st.sampled_from([0.0, 1e-5, 0.3, 0.5, 0.999, 1.0]),
    address=st.fixed_dictionaries({"seed": st.integers(0, 2**64 - 1), "step": st.integers(0, 2**32 - 1),
                                   "row_offset": st.integers(0, 2**40 - 9)}),
)  # fmt: skip
def test_result_and_gradients_are_those_of_the_masked_weights(
    rows: list[int], inputs: int, outputs: int, p: float, address: dict[str, int]
) -> None:
    leaves = linear_inputs(tuple(rows), inputs, outputs, torch.float64)
    gradient = torch.randn(*rows, outputs, dtype=torch.float64)
    with dk.masks(**address):
        y = drop_connect(*leaves, p)
    wanted = by_definition(*leaves, p, **address)
    torch.testing.assert_close(y, wanted)
    seen = torch.autograd.grad(y, leaves, gradient)
    torch.testing.assert_close(seen, torch.autograd.grad(wanted, leaves, gradient))


def test_rates_below_a_lane_drop_by_the_second_block() -> None:
    rows = 2**24 // (512 * TILE)
    x, weight = torch.ones(rows, TILE), torch.ones(512, TILE)
    with dk.masks(seed=5):
        y = drop_connect(x, weight, None, 4e-6)
    fallen = TILE - y / y.max() * TILE
    keep = masks_of(weight, rows, 4e-6, seed=5) != 0
    assert 0 < (~keep).sum() < 200  # 67 are expected of 16.8 million
    torch.testing.assert_close(fallen, (~keep).sum(dim=2).float(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_summed_in_float32(dtype: torch.dtype) -> None:
    leaves = [t.detach().to(dtype) for t in linear_inputs((6,), 100, 20, torch.float64)]
    with dk.masks(seed=1):
        y = drop_connect(*leaves, 0.25)
    assert y.dtype == dtype
    wide = [t.double() for t in leaves]
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        y.double(), by_definition(*wide, 0.25, seed=1), rtol=tolerance, atol=20 * tolerance
    )


def test_a_single_row_and_an_empty_batch() -> None:
    x, weight, bias = linear_inputs((1,), 12, 5, torch.float64)
    with dk.masks(seed=1):
        alone = drop_connect(x[0], weight, bias)
    with dk.masks(seed=1):
        torch.testing.assert_close(drop_connect(x, weight, bias)[0], alone, rtol=0, atol=0)
    with dk.masks(seed=1):
        assert drop_connect(x[:0], weight, bias).shape == (0, 5)


def test_a_dropped_weight_meets_no_value() -> None:
    x = torch.ones(40, 6)
    x[:, 2] = torch.nan
    weight = torch.ones(3, 6)
    weight[1, 4] = torch.inf
    keep = masks_of(weight, 40, 0.5, seed=2) != 0
    with dk.masks(seed=2):
        y = drop_connect(x, weight, None, 0.5)
    assert torch.equal(y.isnan(), keep[:, :, 2])
    assert torch.equal(y[:, 1].isinf(), keep[:, 1, 4] & ~keep[:, 1, 2])


def test_nothing_of_the_size_of_all_masks_is_made_or_kept() -> None:
    rows, inputs, outputs = 64, 256, 256
    x, weight, bias = linear_inputs((rows,), inputs, outputs, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        drop_connect(x, weight, bias)
    assert {t.data_ptr() for t in kept} <= {x.data_ptr(), weight.data_ptr()}
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        y = drop_connect(x, weight, bias)
        torch.autograd.grad(y.sum(), (x, weight, bias))
    made = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    few = 4 * (rows * outputs + rows * inputs + outputs * inputs)  # bytes of the result and both gradients
    assert few <= made < 8 * few
    assert 8 * few < 4 * rows * inputs * outputs / 2


def test_threads_and_splitting_change_no_bit() -> None:
    leaves = linear_inputs((48,), 520, 70, torch.float32)
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with dk.masks(seed=1):
                y = drop_connect(*leaves, 0.5)
            seen.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0][:3], other[:3], strict=True))
    with dk.masks(seed=1, row_offset=20):
        assert torch.equal(drop_connect(leaves[0][20:], *leaves[1:], 0.5), seen[0][0][20:])


# --- moments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_moments_are_those_of_all_masks(p: float) -> None:
    x, weight, bias = (t.detach() for t in linear_inputs((3,), 3, 2, torch.float64))
    mean, square = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    for keep in itertools.product([0, 1], repeat=6):
        chance = math.prod(1 - p if k else p for k in keep)
        y = x @ (weight * torch.tensor(keep).view(2, 3) / (1 - p)).T + bias
        mean, square = mean + chance * y, square + chance * y.square()
    found = drop_connect_moments(x, weight, bias, p)
    torch.testing.assert_close(found, (mean, square - mean.square()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0], nn.functional.linear(x, weight, bias))


def test_gaussian_members_have_the_moments_of_masks() -> None:
    """Each mean and variance of 4096 members against its law; all 24 wrong together less often than 1e-9."""
    layer = dk.nn.DropConnect(nn.Linear(5, 4).double(), 0.3, inference="gaussian").eval()
    x, members = torch.randn(3, 5, dtype=torch.float64), 4096

    def ask(k: Tensor) -> Tensor:
        with dk.masks(seed=1, member=k):
            return layer(x)

    y = torch.func.vmap(ask)(torch.arange(members)).detach()
    mean, variance = (t.detach() for t in drop_connect_moments(x, layer.weight, layer.bias, 0.3))
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    z = (y.mean(dim=0) - mean) / (variance / members).sqrt()
    assert float(z.abs().max()) < stats.norm.isf(1e-9 / 48)
    chi = y.var(dim=0) * (members - 1) / variance
    assert float(chi.max()) < stats.chi2.isf(1e-9 / 48, members - 1)
    assert float(chi.min()) > stats.chi2.ppf(1e-9 / 48, members - 1)
    eps = (y - mean) / variance.sqrt()
    torch.testing.assert_close(eps, eps[:, :1].expand_as(eps))  # one draw of the member serves all rows


def test_a_gaussian_member_of_a_row_of_zeros_has_gradients() -> None:
    layer = dk.nn.DropConnect(nn.Linear(3, 2), 0.3, inference="gaussian").eval()
    x = torch.zeros(1, 3, requires_grad=True)
    with dk.masks(member=0):
        y = layer(x)
    torch.testing.assert_close(y[0], layer.bias)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


# --- one mask, members ----------------------------------------------------------------------------------


def test_one_mask_for_a_pass_is_the_mask_of_sample_0_whatever_the_rows() -> None:
    linear = nn.Linear(7, 4)
    layer, x = dk.nn.DropConnect(linear, 0.4, per_row=False), torch.randn(6, 7)
    mask = masks_of(linear.weight.detach(), 1, 0.4, seed=3)[0]
    wanted = nn.functional.linear(x, linear.weight * mask, linear.bias)
    for address in ({"row_offset": 9}, {"samples": torch.arange(6, 12)}, {}):
        with dk.masks(seed=3, **address):
            torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("per_row", [True, False])
def test_a_member_is_one_thinned_network(per_row: bool) -> None:
    linear, x = nn.Linear(7, 4), torch.randn(6, 7)
    layer = dk.nn.DropConnect(linear, 0.4, per_row=per_row).eval()
    with dk.masks(seed=3, member=2):
        mask = dropout(torch.ones(1, 4, 7), 0.4, shared=(0,))[0]
    with dk.masks(seed=3, member=2):
        y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, linear.weight * mask, linear.bias))


def test_member_with_samples_has_a_mask_for_each_row_again() -> None:
    leaves = linear_inputs((4,), 6, 3, torch.float64)
    address = {"seed": 1, "member": 2, "samples": torch.tensor([5, 2, 5, 9])}
    with dk.masks(**address):
        y = drop_connect(*leaves, 0.5)
    torch.testing.assert_close(y, by_definition(*leaves, 0.5, **address))


# --- convolutions ---------------------------------------------------------------------------------------


@EACH_CONVOLUTION
@pytest.mark.parametrize("chunk", [1, 1 << 21])
def test_convolutions_with_a_mask_for_each_row(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_rows, "CHUNK", chunk)
    make, shape = CONVOLUTIONS[name]
    plain = make().double()
    layer = dk.nn.DropConnect(plain, 0.4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = masks_of(plain.weight.detach(), len(x), 0.4, seed=1)
    with dk.masks(seed=1):
        y = layer(x)
    rows = [
        torch.func.functional_call(plain, {"weight": plain.weight * mask[b]}, (x[b : b + 1],))
        for b in range(len(x))
    ]
    wanted = torch.cat(rows)
    torch.testing.assert_close(y, wanted)
    leaves, gradient = (x, *plain.parameters()), torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, gradient), torch.autograd.grad(wanted, leaves, gradient)
    )
    with dk.masks(seed=1):
        torch.testing.assert_close(layer(x[0]), wanted[0])  # one row without a batch


@EACH_CONVOLUTION
def test_a_convolution_at_rest_or_with_one_mask_is_the_plain_one(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    plain, x = make(), torch.randn(shape)
    assert torch.equal(dk.nn.DropConnect(plain, 0.4).eval()(x), plain(x))
    mask = masks_of(plain.weight.detach(), 1, 0.4, seed=1)[0]
    wanted = torch.func.functional_call(plain, {"weight": plain.weight * mask}, (x,))
    with dk.masks(seed=1):
        torch.testing.assert_close(dk.nn.DropConnect(plain, 0.4, per_row=False)(x), wanted)


# --- inside torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("convolution", [None, Convolution(1, padding=1, groups=2)])
def test_derivatives_of_every_kind(convolution: Convolution | None) -> None:
    shapes = ((3, 4), (2, 4), (2,)) if convolution is None else ((3, 4, 3), (2, 2, 2), (2,))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def f(*values: Tensor) -> Tensor:
        with dk.masks(seed=1):
            return drop_connect(*values, 0.4, convolution=convolution)

    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


def test_function_transforms_see_the_same_masks() -> None:
    leaves = linear_inputs((4,), 6, 3, torch.float64)

    def total(*values: Tensor) -> Tensor:
        with dk.masks(seed=1):
            return drop_connect(*values, 0.5).square().sum()

    seen = torch.func.grad(total, argnums=(0, 1, 2))(*leaves)
    torch.testing.assert_close(seen, torch.autograd.grad(total(*leaves), leaves))
    rates = torch.tensor([0.2, 0.6], dtype=torch.float64)

    def at(p: Tensor) -> Tensor:
        with dk.masks(seed=1):
            return drop_connect(*leaves, p)

    wanted = torch.stack([by_definition(*leaves, p.item(), seed=1) for p in rates])
    torch.testing.assert_close(torch.func.vmap(at)(rates), wanted)


@pytest.mark.parametrize("per_row", [True, False])
def test_a_compiled_graph_draws_the_same_masks(per_row: bool) -> None:
    layer = nn.Sequential(dk.nn.DropConnect(nn.Linear(6, 3), 0.5, per_row=per_row))
    dk.nn.name_sites(layer)
    x, seen = torch.randn(4, 6), []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        with dk.masks(seed=1):
            seen.append(call(x))
    torch.testing.assert_close(*seen)


def test_autocast_gives_its_dtype() -> None:
    layer, x = dk.nn.DropConnect(nn.Linear(6, 3), 0.5), torch.randn(4, 6)
    for per_row in (True, False):
        layer.per_row = per_row
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


# --- the module -----------------------------------------------------------------------------------------


def test_parameters_and_state_dict_are_those_of_the_module() -> None:
    linear = nn.Linear(6, 3)
    layer = dk.nn.DropConnect(linear, 0.5)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert list(layer.state_dict()) == list(linear.state_dict())
    other = nn.Linear(6, 3)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(linear.weight, other.weight)
    other.load_state_dict(copy.deepcopy(layer).double().state_dict())
    assert dk.nn.DropConnect(nn.Linear(2, 2, bias=False)).bias is None
    assert not dk.nn.DropConnect(nn.Linear(2, 2).eval()).training
    assert "in_features=6" in repr(layer)
    assert "p=0.5" in repr(layer)


@pytest.mark.parametrize("per_row", [True, False])
def test_a_rate_for_each_output(per_row: bool) -> None:
    rates = torch.tensor([[0.0], [0.5], [1.0]])
    layer = dk.nn.DropConnect(nn.Linear(40, 3), rates, per_row=per_row)
    with dk.masks(seed=1):
        y = layer(x := torch.randn(5, 40))
    with dk.masks(seed=1):
        masks = dropout(torch.ones(5 if per_row else 1, 3, 40), rates, shared=() if per_row else (0,))
    torch.testing.assert_close(
        y, torch.einsum("bi,boi->bo", x, (layer.weight * masks).expand(5, 3, 40)) + layer.bias
    )
    torch.testing.assert_close(y[:, 0], nn.functional.linear(x, layer.weight, layer.bias)[:, 0])
    found = drop_connect_moments(x, layer.weight, None, rates.clamp_max(0.5))[1]
    torch.testing.assert_close(found[:, 1], (x.square() @ layer.weight[1].square()))
    assert torch.equal(found[:, 0], torch.zeros(5))


def test_a_schedule_gives_the_rate() -> None:
    layer = dk.nn.DropConnect(nn.Linear(6, 3), dk.nn.schedules.linear(0.0, 1.0, 10))
    x = torch.randn(4, 6)
    with dk.masks(step=0):
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with dk.masks(step=10):
        torch.testing.assert_close(layer(x), layer.bias.expand(4, 3))


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: drop_connect(torch.ones(2, 5), torch.ones(3, 4)), ShapeError, r"\(B, \*, 4\)"),
        (lambda: drop_connect(torch.ones(2, 4), torch.ones(4)), ShapeError, r"\(O, I\)"),
        (lambda: drop_connect(torch.ones(2, 4), torch.ones(3, 4), torch.ones(4)), ShapeError, r"\(3,\)"),
        (lambda: drop_connect(torch.ones(2, 4).long(), torch.ones(3, 4)), OptionError, "floating"),
        (lambda: drop_connect(torch.ones(2, 4), torch.ones(3, 4), p=30), ProbabilityError, "percentage"),
        (lambda: drop_connect(torch.ones(2, 5, 6), torch.ones(3, 4, 3), convolution=Convolution(1)),
         ShapeError, "width"),
        (lambda: drop_connect_moments(torch.ones(2, 4), torch.ones(3, 4), p=1.0), ProbabilityError, "p < 1"),
        (lambda: dk.nn.DropConnect(nn.ReLU()), OptionError, "ReLU"),
        (lambda: dk.nn.DropConnect(nn.ConvTranspose2d(2, 2, 3)), OptionError, "ConvTranspose2d"),
        (lambda: dk.nn.DropConnect(nn.Linear(2, 2), inference="mean"), OptionError, "gaussian"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        call()


def test_samples_are_one_for_each_row() -> None:
    x, weight, _ = linear_inputs((4,), 6, 3, torch.float64)
    with dk.masks(samples=torch.arange(3)), pytest.raises(ShapeError, match="3 sample ids"):
        drop_connect(x, weight)

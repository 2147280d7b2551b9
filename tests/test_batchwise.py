"""Batchwise dropout: what is cut out and what is set to 0 give the same results and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dropkit as dk
from dropkit.errors import OptionError, ProbabilityError, ShapeError
from dropkit.functional import dropout, thinned_map
from dropkit.nn.convolution import Convolution

NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(7, 30), nn.ReLU(), nn.Linear(30, 20), nn.Sigmoid(), nn.Linear(20, 3)),
               (5, 7)),
    "sequences": (lambda: nn.Sequential(nn.Identity(), nn.Linear(7, 30), nn.GELU(), nn.Linear(30, 3)), (5, 4, 7)),
    "images": (lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", padding_mode="circular"), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(8, 10, 2),
        nn.SiLU(), nn.Flatten(), nn.Linear(40, 12, bias=False), nn.ELU(), nn.Linear(12, 2), nn.Softplus()),
        (4, 3, 6, 6)),
    "signals": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
                                      nn.Linear(8, 2)), (4, 3, 9)),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", NETWORKS)


def made(name: str, p: float = 0.5, input_p: float = 0.0) -> tuple[dk.nn.BatchwiseDropout, Tensor]:
    make, shape = NETWORKS[name]
    torch.manual_seed(1)
    return dk.nn.BatchwiseDropout(make().double(), p, input_p=input_p), torch.randn(
        shape, dtype=torch.float64
    )


def masked_by_hooks(layer: dk.nn.BatchwiseDropout, x: Tensor, **address: object) -> Tensor:
    """The plain module, all of it, each map's input multiplied by the mask that `dropout` draws for it."""
    count = 0

    def before(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal count
        (h,) = inputs
        rate = layer.p if count else layer.input_p
        units = h.shape[-1] if isinstance(module, nn.Linear) else h.shape[1]
        each = 1
        if count and isinstance(module, nn.Linear) and units != widths[count - 1]:
            units, each = widths[count - 1], units // widths[count - 1]
        count += 1
        if rate == 0:
            return (h,)
        mask = dropout(torch.ones(1, units, dtype=h.dtype), rate, shared=(0,), owner=layer)[0]
        mask = mask.repeat_interleave(each)
        return (h * (mask if isinstance(module, nn.Linear) else mask.view(-1, *[1] * (h.ndim - 2))),)

    maps = [m for m in layer.module if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    widths = [m.weight.shape[0] for m in maps]
    handles = [m.register_forward_pre_hook(before) for m in maps]
    try:
        with dk.masks(**address):
            return layer.module(x)
    finally:
        for handle in handles:
            handle.remove()


@EACH
@pytest.mark.parametrize(
    ("p", "input_p"), [(0.5, 0.0), (0.3, 0.4), (0.0, 0.5), (0.0, 0.0), (0.95, 0.0), (1.0, 0.0)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_cut_and_masked_give_the_same_results_and_gradients(
    name: str, p: float, input_p: float, seed: int
) -> None:
    layer, x = made(name, p, input_p)
    x.requires_grad_()
    leaves = (x, *layer.parameters())
    with dk.masks(seed=seed):
        y = layer(x)
    wanted = masked_by_hooks(layer, x, seed=seed)
    torch.testing.assert_close(y, wanted)
    gradient = torch.randn_like(y)
    seen, right = (
        torch.autograd.grad(out, leaves, gradient, allow_unused=True, materialize_grads=True)
        for out in (y, wanted)
    )
    torch.testing.assert_close(seen, right)


def test_the_products_are_those_of_what_is_kept() -> None:
    layer, x = made("linear", 0.5)
    shapes: list[tuple[int, ...]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, kinds, args=(), kwargs=None):
            if function is nn.functional.linear:
                shapes.append(tuple(args[1].shape))
            return function(*args, **(kwargs or {}))

    with dk.masks(seed=0), Watch():
        layer(x)
    with dk.masks(seed=0):
        kept = [int((dropout(torch.ones(1, n), 0.5, shared=(0,), owner=layer) != 0).sum()) for n in (30, 20)]
    assert shapes == [(kept[0], 7), (kept[1], kept[0]), (3, kept[1])]
    assert 0 < kept[0] < 30
    assert 0 < kept[1] < 20


@EACH
def test_the_mask_belongs_to_the_pass_and_not_to_rows(name: str) -> None:
    layer, x = made(name)
    with dk.masks(seed=3):
        whole = layer(x)
    for address in ({"row_offset": 2}, {"samples": torch.tensor([9, 4])}):
        with dk.masks(seed=3, **address):
            torch.testing.assert_close(layer(x[2:4]), whole[2:4])


@EACH
def test_members_one_by_one_under_vmap_and_at_rest(name: str) -> None:
    layer, x = made(name, input_p=0.2)
    layer.eval()
    assert torch.equal(layer(x), layer.module(x))

    def ask(k: int | Tensor) -> Tensor:
        with dk.masks(seed=1, member=k):
            return layer(x)

    together = torch.func.vmap(ask)(torch.arange(3))
    for k in range(3):
        torch.testing.assert_close(together[k], ask(k))
        torch.testing.assert_close(together[k], masked_by_hooks(layer, x, seed=1, member=k))


def test_a_compiled_graph_computes_the_whole_with_the_same_masks() -> None:
    layer, x = made("linear")
    model, seen = nn.Sequential(layer), []
    dk.nn.name_sites(model)
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with dk.masks(seed=1):
            seen.append(call(x))
    torch.testing.assert_close(*seen)


def test_a_dropped_feature_that_is_nan_is_gone() -> None:
    layer, x = made("linear", 0.5)
    with torch.no_grad():
        layer.module[0].bias[4] = torch.nan
    for seed in range(8):
        with dk.masks(seed=seed):
            y = layer(x)
        with dk.masks(seed=seed):
            kept = dropout(torch.ones(1, 30), 0.5, shared=(0,), owner=layer)[0] != 0
        assert y.isnan().any() == kept[4]


def test_the_state_dict_is_the_modules() -> None:
    layer, _ = made("linear")
    assert {f"module.{key}" for key in layer.module.state_dict()} == set(layer.state_dict())
    assert "p=0.5, input_p=0.0" in repr(layer)


@pytest.mark.parametrize("convolution", [None, Convolution(2, padding=1)])
def test_a_thinned_map_is_the_part_of_the_whole_one(convolution: Convolution | None) -> None:
    space = () if convolution is None else (4, 5)
    x, weight, bias = torch.randn(3, 6, *space), torch.randn(5, 6, *([3] * len(space))), torch.randn(5)
    inputs, outputs = torch.tensor([0, 2, 5]), torch.tensor([1, 4])
    mask = torch.zeros(6).index_fill(0, inputs, 1).view(6, *[1] * len(space))
    apply = nn.functional.linear if convolution is None else convolution
    found = thinned_map(x[:, inputs], weight, bias, inputs, outputs, convolution=convolution)
    torch.testing.assert_close(found, apply(x * mask, weight, bias)[:, outputs])
    with pytest.raises(ShapeError, match="3"):
        thinned_map(x, weight, bias, inputs, convolution=convolution)


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: dk.nn.BatchwiseDropout(nn.Linear(2, 2)), OptionError, "Sequential"),
        (lambda: dk.nn.BatchwiseDropout(nn.Sequential(nn.ReLU())), OptionError, "nothing to cut"),
        (lambda: dk.nn.BatchwiseDropout(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), OptionError, "BatchNorm1d"),
        (lambda: dk.nn.BatchwiseDropout(nn.Sequential(nn.Linear(2, 2), nn.Softmax(1))), OptionError, "Softmax"),
        (lambda: dk.nn.BatchwiseDropout(nn.Sequential(nn.Linear(2, 2), nn.Flatten(2))), OptionError, "Flatten"),
        (lambda: dk.nn.BatchwiseDropout(nn.Sequential(nn.Conv1d(2, 2, 1, groups=2))), OptionError, "one group"),
        (lambda: dk.nn.BatchwiseDropout(nn.Sequential(nn.Linear(2, 4), nn.Linear(6, 2))), ShapeError, "4 features"),
        (lambda: made("linear", p=30), ProbabilityError, "percentage"),
        (lambda: made("linear", input_p=-1), ProbabilityError, "input_p"),
        (lambda: made("linear", p=torch.full((3,), 0.5)), ProbabilityError, "one rate"),
        (lambda: made("linear")[0](torch.ones(2, 6).double()), ShapeError, "7"),
        (lambda: thinned_map(torch.ones(1, 4, 2), torch.ones(2, 2, 1), convolution=Convolution(1, groups=2)),
         OptionError, "groups=2"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        call()

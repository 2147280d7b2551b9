"""LSTM and GRU: torch's own where there is no noise, the papers' equations where there is, one mask for one address."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import dropkit as dk
from dropkit.errors import AddressError, OptionError, ProbabilityError, ShapeError

KINDS = pytest.mark.parametrize("kind", ["LSTM", "GRU"])
LENGTHS = [3, 7, 1, 5]
INPUTS, HIDDEN = 3, 4

NOISES: dict[str, dict[str, Any]] = {
    "state": {"recurrent_dropout": 0.4},
    "state-untied": {"recurrent_dropout": 0.4, "tied": False},
    "state-fresh": {"recurrent_dropout": 0.4, "locked": False},
    "state-untied-fresh": {"recurrent_dropout": 0.4, "tied": False, "locked": False},
    "update": {"recurrent_dropout": 0.4, "recurrent": "update"},
    "update-fresh": {"recurrent_dropout": 0.4, "recurrent": "update", "locked": False},
    "weight": {"weight_dropout": 0.4},
    "zoneout": {"zoneout": 0.4},
    "outside": {"input_dropout": 0.3, "output_dropout": 0.2},
    "outside-fresh": {"input_dropout": 0.3, "output_dropout": 0.2, "locked": False},
    "all": {
        "input_dropout": 0.2, "output_dropout": 0.1, "recurrent_dropout": 0.3, "weight_dropout": 0.2, "zoneout": 0.2,
        "locked": False, "tied": False,
    },
}  # fmt: skip
ALL_NOISES = pytest.mark.parametrize("noise", list(NOISES.values()), ids=list(NOISES))


def make(kind: str, noise: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(1)
    layer = getattr(dk.nn, kind)(INPUTS, HIDDEN, **{"batch_first": True, **options, **(noise or {})})
    layer.site = "net"
    return layer


def sequences(rows: int = 4, times: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, times, INPUTS, generator=torch.Generator().manual_seed(2), dtype=dtype)


def states(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def at(layer: Any, x: Any, hx: Any = None, start: int = 0, **address: Any) -> Any:
    with dk.masks(**{"seed": 3, "step": 5, **address}):
        return layer(x, hx, start=start)


# Without noise: torch's


@KINDS
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"bias": False, "batch_first": True},
        {"proj_size": 2, "bidirectional": True, "num_layers": 2},
    ],
    ids=["plain", "deep", "no-bias", "projected"],
)
def test_without_noise_it_is_torchs_layer_with_torchs_state_dict(kind: str, options: dict[str, Any]) -> None:
    if kind == "GRU" and "proj_size" in options:
        with pytest.raises(TypeError):
            dk.nn.GRU(INPUTS, HIDDEN, **options)
        return
    torch.manual_seed(7)
    ours = getattr(dk.nn, kind)(INPUTS, HIDDEN, **options)
    torch.manual_seed(7)
    theirs = getattr(torch.nn, kind)(INPUTS, HIDDEN, **options)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)  # the same numbers from the same seed
    fresh = getattr(dk.nn, kind)(INPUTS, HIDDEN, **options)
    fresh.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    first = options.get("batch_first", False)
    x = sequences() if first else sequences().transpose(0, 1)
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), first, enforce_sorted=False)
    for given in (x, x[:, 0] if not first else x[0], packed):
        for layer in (fresh, fresh.eval()):
            out, end = layer(given)
            wanted, wanted_end = theirs(given)
            for value, target in zip(
                (out.data if isinstance(out, PackedSequence) else out, *states(end)),
                (wanted.data if isinstance(out, PackedSequence) else wanted, *states(wanted_end)),
                strict=True,
            ):
                torch.testing.assert_close(value, target, rtol=1e-6, atol=1e-6)
    lead = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    sizes = [options.get("proj_size") or HIDDEN, HIDDEN][: 2 if kind == "LSTM" else 1]
    hx = tuple(torch.randn(lead, 4, size) for size in sizes)
    given_state = hx if kind == "LSTM" else hx[0]
    for given in (x, packed):
        (out, end), (wanted, wanted_end) = fresh(given, given_state), theirs(given, given_state)
        torch.testing.assert_close(states(end), states(wanted_end), rtol=1e-6, atol=1e-6)


# With noise: the equations, row by row, from masks drawn at their published addresses


def mask(name: str, shape: tuple[int, ...], p: float) -> Tensor:
    """(B, *shape) noise at a place of the layer; the context is open."""
    return dk.functional.dropout(torch.ones(4, *shape, dtype=torch.float64), p, site=f"net.l0.{name}")


def reference(layer: Any, x: Tensor) -> Tensor:
    """(B, T, H): every row by itself, every step by the equations in the docstring, without batching anything."""
    lstm = isinstance(layer, dk.nn.LSTM)
    gates, T = (4 if lstm else 3), x.shape[1]
    steps = 1 if layer.locked else T
    with dk.masks(seed=3, step=5):
        inside = dk.functional.dropout(
            torch.ones(4, steps, INPUTS, dtype=x.dtype), layer.input_dropout, site="net.input"
        )
        zone_c = mask("cell", (T, HIDDEN), layer.zoneout_cell) if lstm else None
        zone_h = mask("hidden", (T, HIDDEN), layer.zoneout_hidden)
        p = layer.recurrent_dropout
        groups = 1 if layer.tied else gates
        on_state, on_update = layer.recurrent == "state", layer.recurrent == "update"
        state = mask("state", (steps, groups, HIDDEN), p if on_state else 0.0)
        update = mask("update", (steps, HIDDEN), p if on_update else 0.0)
        weight = dk.functional.dropout(
            layer.weight_hh_l0[None], layer.weight_dropout, shared=(0,), site="net.l0.weight"
        )[0]
        outside = dk.functional.dropout(
            torch.ones(4, steps, HIDDEN, dtype=x.dtype), layer.output_dropout, site="net.output"
        )
    w_ih, b_ih, b_hh = layer.weight_ih_l0, layer.bias_ih_l0, layer.bias_hh_l0
    rows = []
    for b in range(4):
        h, c, ys = torch.zeros(HIDDEN, dtype=x.dtype), torch.zeros(HIDDEN, dtype=x.dtype), []
        for t in range(T):
            s = 0 if layer.locked else t
            a = w_ih @ (x[b, t] * inside[b, s]) + b_ih
            parts = [
                weight[g * HIDDEN : (g + 1) * HIDDEN] @ (h * state[b, s, min(g, groups - 1)])
                + b_hh[g * HIDDEN : (g + 1) * HIDDEN]
                for g in range(gates)
            ]
            a_parts = [a[g * HIDDEN : (g + 1) * HIDDEN] for g in range(gates)]
            if lstm:
                i, f, g, o = (u + v for u, v in zip(a_parts, parts, strict=True))
                new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g) * update[b, s]
                new_h = torch.sigmoid(o) * torch.tanh(new_c)
                c = torch.where(zone_c[b, t] != 0, new_c, c)
            else:
                r, z = (torch.sigmoid(a_parts[k] + parts[k]) for k in (0, 1))
                n = torch.tanh(a_parts[2] + r * parts[2])
                new_h = (1 - z) * n * update[b, s] + z * h
            h = torch.where(zone_h[b, t] != 0, new_h, h)
            ys.append(h * outside[b, s])
        rows.append(torch.stack(ys))
    return torch.stack(rows)


@KINDS
@ALL_NOISES
def test_it_is_the_equations_with_masks_from_their_addresses(kind: str, noise: dict[str, Any]) -> None:
    layer, x = make(kind, noise).double(), sequences(dtype=torch.float64)
    y, _ = at(layer, x)
    torch.testing.assert_close(y, reference(layer, x), rtol=1e-10, atol=1e-12)
    plain = make(kind).double()
    assert not torch.allclose(y, at(plain, x)[0], atol=1e-3)


@KINDS
@ALL_NOISES
def test_packed_padded_shuffled_and_alone_agree(kind: str, noise: dict[str, Any]) -> None:
    layer = make(kind, {**noise, "dropout": 0.3}, num_layers=2)
    x = sequences()
    padded, _ = at(layer, x)
    for is_sorted in (False, True):
        order = torch.tensor(sorted(range(4), key=lambda i: -LENGTHS[i]) if is_sorted else range(4))
        lengths = torch.tensor(LENGTHS)[order]
        packed = pack_padded_sequence(x[order], lengths, batch_first=True, enforce_sorted=is_sorted)
        out, end = at(layer, packed, samples=order)
        unpacked, _ = pad_packed_sequence(out, batch_first=True)
        for place, row in enumerate(order.tolist()):
            n = LENGTHS[row]
            torch.testing.assert_close(unpacked[place, :n], padded[row, :n], rtol=1e-5, atol=1e-6)
            alone, alone_end = at(layer, x[row : row + 1, :n], row_offset=row)
            torch.testing.assert_close(alone[0], padded[row, :n], rtol=1e-5, atol=1e-6)
            bare, _ = at(layer, x[row, :n], row_offset=row)
            torch.testing.assert_close(bare, alone[0], rtol=1e-6, atol=1e-7)
            for whole, part in zip(states(end), states(alone_end), strict=True):
                torch.testing.assert_close(whole[:, place], part[:, 0], rtol=1e-5, atol=1e-6)


@KINDS
@ALL_NOISES
@pytest.mark.parametrize("member", [None, 2])
def test_both_directions_of_a_packed_batch_are_those_of_each_row(
    kind: str, noise: dict[str, Any], member: int | None
) -> None:
    layer, x = make(kind, noise, bidirectional=True), sequences()
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    unpacked, _ = pad_packed_sequence(at(layer, packed, member=member)[0], batch_first=True)
    for row, n in enumerate(LENGTHS):
        alone, _ = at(layer, x[row : row + 1, :n], row_offset=row, member=member)
        torch.testing.assert_close(unpacked[row, :n], alone[0], rtol=1e-5, atol=1e-6)


@KINDS
@ALL_NOISES
@pytest.mark.parametrize("cuts", [(1, 3), (5,)])
def test_masks_go_on_over_chunks(kind: str, noise: dict[str, Any], cuts: tuple[int, ...]) -> None:
    layer, x = make(kind, noise, num_layers=2), sequences()
    whole, end = at(layer, x)
    parts, state = [], None
    for begin, stop in itertools.pairwise((0, *cuts, 7)):
        part, state = at(layer, x[:, begin:stop], state, start=begin)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states(state), states(end), rtol=1e-5, atol=1e-6)
    if not layer.locked or layer.zoneout_hidden:
        again, _ = at(layer, x[:, cuts[-1] :], None, start=0)
        other, _ = at(layer, x[:, cuts[-1] :], None, start=cuts[-1])
        assert not torch.allclose(again, other)


def test_a_far_start_draws_what_a_long_sequence_would() -> None:
    layer = make("LSTM", NOISES["state-fresh"])
    x = sequences(2, 3)
    with torch.autograd.forward_ad.dual_level():  # makes all that lies before the start
        slow, _ = at(layer, x, start=5001)
    quick, _ = at(layer, x, start=5001)
    torch.testing.assert_close(quick, slow, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(quick, at(layer, x, start=5002)[0])


# Laws at the ends of the rates


@KINDS
def test_no_unit_sees_the_state_at_rate_one(kind: str) -> None:
    x = sequences()
    blind = make(kind)
    for name, weight in blind.named_parameters():
        if name.startswith("weight_hh"):
            torch.nn.init.zeros_(weight)
    for noise in (
        {"recurrent_dropout": 1.0},
        {"weight_dropout": 1.0},
        {"recurrent_dropout": 1.0, "tied": False},
    ):
        torch.testing.assert_close(at(make(kind, noise), x), blind(x), rtol=1e-5, atol=1e-6)


@KINDS
def test_at_zoneout_one_nothing_ever_changes(kind: str) -> None:
    layer, x = make(kind, {"zoneout": 1.0}), sequences()
    hx = tuple(torch.randn(1, 4, HIDDEN) for _ in range(2 if kind == "LSTM" else 1))
    for training in (True, False):
        out, end = at(layer.train(training), x, hx if kind == "LSTM" else hx[0])
        torch.testing.assert_close(out, hx[0][0].unsqueeze(1).expand_as(out))
        torch.testing.assert_close(states(end), hx)


def test_without_its_update_a_cell_only_forgets() -> None:
    layer = make("LSTM", {"recurrent_dropout": 1.0, "recurrent": "update"})
    out, (h, c) = at(layer, sequences())
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(c, torch.zeros_like(c))
    assert torch.equal(h, torch.zeros_like(h))


@KINDS
def test_inputs_that_are_all_dropped_are_zeros(kind: str) -> None:
    x = sequences()
    x[0, 0, 0] = math.nan  # a dropped NaN is 0
    for locked in (True, False):
        noise = {"input_dropout": 1.0, "locked": locked}
        torch.testing.assert_close(at(make(kind, noise), x)[0], make(kind)(torch.zeros_like(x))[0])


@KINDS
@pytest.mark.parametrize("p", [0.25, 0.5])
def test_evaluation_takes_the_exact_mean_of_zoneout(kind: str, p: float) -> None:
    """One step from a given state is linear in the masks: all 2**(units) of them are gone through."""
    layer = make(kind, {"zoneout": p}).double().eval()
    x = sequences(1, 1, torch.float64)
    hx = tuple(torch.randn(1, 1, HIDDEN, dtype=torch.float64) for _ in range(2 if kind == "LSTM" else 1))
    _, got = layer(x, hx if kind == "LSTM" else hx[0])
    _, new = make(kind).double()(x, hx if kind == "LSTM" else hx[0])
    for mean, fresh, old in zip(states(got), states(new), hx, strict=True):
        exact = torch.zeros_like(mean)
        for keep in itertools.product([True, False], repeat=HIDDEN):
            chance = math.prod(1 - p if k else p for k in keep)
            exact += chance * torch.where(torch.tensor(keep), fresh, old)
        torch.testing.assert_close(mean, exact, rtol=1e-12, atol=1e-12)


# Modes, members, places


@KINDS
def test_a_member_has_one_mask_for_all_rows_and_torchs_kernel_serves_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = make(kind, NOISES["state-untied"]).eval(), sequences()
    slow = torch.func.vmap(lambda k: at(layer, x, member=k)[0])(torch.tensor([4, 5]))
    import dropkit.nn.recurrent_layer as module

    def refuse(*_: object) -> None:
        raise AssertionError("torch's kernel was not used")

    for name in ("lstm_fused", "gru_fused", "run_steps"):
        monkeypatch.setattr(module, name, refuse)
    torch.testing.assert_close(at(layer, x, member=4)[0], slow[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(at(layer, x, member=5)[0], slow[1], rtol=1e-5, atol=1e-6)
    for noise in (NOISES["weight"], NOISES["outside"], {"dropout": 0.5, "num_layers": 2}):
        at(make(kind, noise), x)


def test_places_are_told_apart() -> None:
    """Layers, directions, gates and steps have masks of their own: no two of them agree."""
    layer = make("LSTM", {**NOISES["state-untied-fresh"], "dropout": 0.5}, num_layers=2, bidirectional=True)
    with dk.masks(seed=3) as context:
        layer(sequences())
        drawn = context.drawn
    assert drawn == (
        "net.l0.state",
        "net.l0_reverse.state",
        "net.l1.input",
        "net.l1.state",
        "net.l1_reverse.state",
    )
    masks = []
    for site in drawn:
        if site.endswith("state"):
            with dk.masks(seed=3):
                masks += dk.functional.dropout(torch.ones(1, 7 * 4, 64), 0.5, site=site)[0].tolist()
    assert len({tuple(m) for m in masks}) == len(masks)


def test_in_training_without_a_context_masks_change_and_follow_manual_seed() -> None:
    layer, x = make("LSTM", NOISES["all"]), sequences()
    torch.manual_seed(5)
    first, second = layer(x)[0], layer(x)[0]
    torch.manual_seed(5)
    assert torch.equal(layer(x)[0], first)
    assert not torch.allclose(first, second)


def test_a_layer_without_a_name_may_be_called_twice_in_a_pass() -> None:
    layer, x = make("LSTM", NOISES["state"]), sequences()
    layer.site = None
    with dk.masks(seed=0):
        first, second = layer(x)[0], layer(x)[0]
    with dk.masks(seed=0):
        assert torch.equal(layer(x)[0], first)
    assert not torch.allclose(first, second)


def test_rates_by_schedule_and_by_feature() -> None:
    x = sequences()
    schedule = dk.nn.schedules.linear(0.0, 0.8, steps=10)
    scheduled, fixed = make("LSTM", {"recurrent_dropout": schedule}), make("LSTM", {"recurrent_dropout": 0.4})
    assert torch.equal(at(scheduled, x)[0], at(fixed, x)[0])
    assert not torch.allclose(at(scheduled, x, step=1)[0], at(fixed, x, step=1)[0])
    with pytest.raises(AddressError, match="scheduled"):
        scheduled(x)
    by_feature = make("LSTM", {"input_dropout": torch.tensor([0.0, 1.0, 0.0])})
    middle = x.clone()
    middle[..., 1] = 0
    torch.testing.assert_close(at(by_feature, x)[0], make("LSTM")(middle)[0])
    assert "input_dropout" not in by_feature.state_dict()


# Torch's transforms


@pytest.mark.parametrize(
    ("kind", "name"), [("LSTM", "state"), ("GRU", "update"), ("LSTM", "all"), ("GRU", "all")]
)
def test_compiled_it_is_what_it_is_eager(kind: str, name: str) -> None:
    torch.compiler.reset()  # one function, compiled for many layers
    layer, x = make(kind, NOISES[name]), sequences(4, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(at(compiled, x)[0], at(layer, x)[0], rtol=1e-5, atol=1e-6)


@KINDS
def test_forward_mode_and_functional_call(kind: str) -> None:
    layer, x = make(kind, NOISES["all"]).double(), sequences(2, 3, torch.float64)
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda v: at(layer, v)[0], (x,), (direction,))
    step = 1e-6
    difference = (at(layer, x + step * direction)[0] - at(layer, x - step * direction)[0]) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)
    halved = {name: value.detach() / 2 for name, value in layer.named_parameters()}
    with dk.masks(seed=3, step=5):
        called, _ = torch.func.functional_call(layer, halved, (x,))
    layer.load_state_dict(halved)
    torch.testing.assert_close(called, at(layer, x)[0])


@KINDS
def test_checkpointed_gradients_are_the_same(kind: str) -> None:
    layer, x = make(kind, NOISES["all"]), sequences().requires_grad_()
    wanted = torch.autograd.grad(at(layer, x)[0].square().sum(), x)[0]
    with dk.masks(seed=3, step=5):
        out = checkpoint(lambda v: layer(v)[0], x, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], wanted)


@KINDS
def test_other_dtypes_and_autocast(kind: str) -> None:
    layer, x = make(kind, NOISES["state"]), sequences()
    exact, _ = at(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = at(layer, x)
    torch.testing.assert_close(mixed.float(), exact, rtol=0.1, atol=0.05)
    half, _ = at(copy.deepcopy(layer).bfloat16(), x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.05)


def test_no_warning_ever_and_nothing_to_flatten() -> None:
    layer = make("LSTM", NOISES["weight"], num_layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.flatten_parameters()
        at(layer, sequences())[0].sum().backward()
    assert layer.weight_hh_l0.is_leaf
    assert layer.weight_hh_l0.grad is not None
    one_layer = dk.nn.LSTM(
        INPUTS, HIDDEN, dropout=0.5
    )  # torch warns; between no layers there is nothing to drop
    assert torch.equal(at(one_layer, sequences())[0], one_layer(sequences())[0])


# What is refused


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (lambda: dk.nn.LSTM(3, 4, recurrent_dropout=30), ProbabilityError, "0.3"),
        (lambda: dk.nn.LSTM(3, 4, zoneout=(0.1, math.nan)), ProbabilityError, "nan"),
        (lambda: dk.nn.GRU(3, 4, zoneout=True), ProbabilityError, "True"),
        (lambda: dk.nn.GRU(3, 4, weight_dropout=-0.1), ProbabilityError, "-0.1"),
        (lambda: dk.nn.LSTM(3, 4, recurrent="cell"), OptionError, "state, update"),
        (lambda: dk.nn.LSTM(3, 0), OptionError, "hidden_size"),
        (lambda: dk.nn.LSTM(3, 4, proj_size=4), OptionError, "proj_size"),
        (lambda: make("LSTM")(torch.ones(2, 5, INPUTS, dtype=torch.int64)), OptionError, "int64"),
        (lambda: make("LSTM")(torch.ones(2, 5, 9)), ShapeError, r"\(B, T, I\)"),
        (lambda: make("GRU", batch_first=False)(torch.ones(5, 2, 9)), ShapeError, r"\(T, B, I\)"),
        (lambda: make("GRU")(torch.ones(2, 0, INPUTS)), ShapeError, "one step"),
        (lambda: make("GRU")(torch.ones(2, 5, INPUTS), torch.ones(2, HIDDEN)), ShapeError, r"\(1, 2, 4\)"),
        (lambda: make("LSTM")(torch.ones(2, 5, INPUTS), (torch.ones(1, 2, 4),)), ShapeError, "hidden"),
        (lambda: make("LSTM")(torch.ones(2, 5, INPUTS), start=-1), OptionError, "start"),
        (lambda: make("LSTM", NOISES["state"])(torch.ones(2, 5, INPUTS), start=3), AddressError, "context"),
        (lambda: at(make("LSTM", NOISES["state-fresh"]), torch.ones(2, 5, 3), start=1 << 40), AddressError, "start"),
    ],
)  # fmt: skip
def test_mistakes_are_named(given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        given()


def test_copies_and_printing() -> None:
    layer = make("LSTM", {**NOISES["all"], "zoneout": (0.1, 0.2)}, num_layers=2)
    assert torch.equal(at(copy.deepcopy(layer), sequences())[0], at(layer, sequences())[0])
    text = repr(layer)
    for part in (
        "3, 4",
        "num_layers=2",
        "zoneout_cell=0.1",
        "zoneout_hidden=0.2",
        "locked=False",
        "tied=False",
    ):
        assert part in text
    assert "recurrent=" not in text

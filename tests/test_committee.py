"""A committee: each member is one thinned network, however it is run; nothing else of the model moves."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dropkit as dk
from dropkit.committee import ClassificationPrediction, Committee, RegressionPrediction, plan, run
from dropkit.errors import DropkitWarning, LackOfMemoryError, NoMaskError, OptionError, ShapeError

T = TypeVar("T")
Module = Callable[[], nn.Module]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through_pickle(thing: T) -> T:
    """As a worker process gets it; our own bytes, so nothing untrusted is loaded."""
    return pickle.loads(pickle.dumps(thing))  # noqa: S301


def mlp(inputs: int = 5, outputs: int = 1, p: float = 0.3) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 16),
        nn.ReLU(),
        dk.nn.Dropout(p),
        nn.Linear(16, 8),
        nn.ReLU(),
        dk.nn.Dropout(p),
        nn.Linear(8, outputs),
    )


class Branching(nn.Module):
    """Looks at its activations in Python, which torch.func.vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(5, 8), dk.nn.Dropout(0.5), nn.Linear(8, 1)
        self.least = 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.body(x).relu())
        return self.head(h) if h.sum() > self.least else -self.head(h)


class Functional(nn.Module):
    """Calls the function; no dropkit layer is to be found in it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(dk.functional.dropout(self.body(x), 0.5, site="hidden"))


class Twice(nn.Module):
    """One layer at two places of the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(5, 5), dk.nn.Dropout(0.5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(self.drop(self.body(x)))))


def writing_in_place() -> nn.Module:
    return nn.Sequential(
        nn.ELU(inplace=True), nn.Linear(5, 8), dk.nn.Dropout(0.5, inplace=True), nn.Linear(8, 1)
    )


def with_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), dk.nn.Dropout(0.2), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 1)
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 3),
        nn.ReLU(),
        dk.nn.Dropout(0.3),
        nn.Conv1d(4, 2, 3),
        nn.Flatten(),
        nn.Linear(2, 1),
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    layer.dropout, layer.dropout1, layer.dropout2 = (dk.nn.Dropout(0.4) for _ in range(3))
    return nn.Sequential(
        nn.Linear(5, 12),
        nn.Unflatten(1, (3, 4)),
        nn.TransformerEncoder(layer, 1),
        nn.Flatten(),
        nn.Linear(12, 1),
    )


MODELS: dict[str, tuple[Module, str]] = {
    "mlp": (mlp, "thinned"),
    "inplace": (writing_in_place, "thinned"),
    "input": (lambda: nn.Sequential(dk.nn.Dropout(0.5, inplace=True), nn.Linear(5, 1)), "thinned"),
    "batch norm": (with_batch_norm, "batched"),
    "convolutional": (convolutional, "batched"),
    "transformer": (transformer, "batched"),
    "functional": (Functional, "batched"),
    "twice": (Twice, "thinned"),
    "branching": (Branching, "loop"),
}  # fmt: skip


@pytest.fixture(params=MODELS, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, str]:
    torch.manual_seed(1)
    build, how = MODELS[request.param]
    model = build()
    for module in model.modules():  # statistics as after training, so that using the batch's would show
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.copy_(normal(8))
            module.running_var.copy_(normal(8, seed=1).exp())
    return model, how


# --- a member is a thinned network ---------------------------------------------------------------------


def test_every_member_is_the_network_without_its_dropped_units() -> None:
    # All 2^4 networks with units cut out of a one-hidden-layer net, by hand; each member is one of them, each occurs.
    torch.manual_seed(3)
    p, x = 0.5, normal(6, 3).double()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), dk.nn.Dropout(p), nn.Linear(4, 2)).double()
    first, last = model[0], model[3]
    thinned = []
    for keep in itertools.product([False, True], repeat=4):
        units = torch.tensor(keep).nonzero()[:, 0]
        hidden = torch.tanh(x @ first.weight[units].T + first.bias[units])
        thinned.append(hidden @ last.weight[:, units].T / (1 - p) + last.bias)
    samples = Committee(model, members=512).samples(x)
    distance = (samples[:, None] - torch.stack(thinned).detach()).abs().amax(dim=(2, 3))  # (M, 16)
    assert float(distance.amin(dim=1).max()) < 1e-12
    # A network of chance 1/16 is missing among 512 with chance (15/16)^512 = 4e-15.
    assert set(distance.argmin(dim=1).tolist()) == set(range(16))


def test_mean_and_variance_are_those_of_the_law() -> None:
    # f = sum_j w_j h_j d_j / q, with d_j ~ Bernoulli(q): mean w.h, variance sum_j (w_j h_j)^2 p / q. With kappa4 of
    # one scaled Bernoulli, p (1 - 6 p q) / q^3, the variance of the sample variance is (kappa4 sum a^4 + 2 var^2) / M.
    p, members = 0.25, 20_000  # a multiple of 2**-16, so that the rate is exact
    q = 1 - p
    model = nn.Sequential(dk.nn.Dropout(p), nn.Linear(8, 1, bias=False)).double()
    x = normal(3, 8, seed=5).double()
    prediction = Committee(model, members=members, tile=4).predict(x)
    a = (x * model[1].weight).detach()
    mean, variance = a.sum(1), a.square().sum(1) * p / q
    fourth = p * (1 - 6 * p * q) / q**3 * a.pow(4).sum(1)
    # Six standard errors, three rows, two statistics: a false alarm in 10^8 runs.
    assert bool(((prediction.mean[:, 0] - mean).abs() < 6 * (variance / members).sqrt()).all())
    error = ((fourth + 2 * variance.square()) / members).sqrt()
    assert bool(((prediction.epistemic[:, 0] - variance).abs() < 6 * error).all())
    torch.testing.assert_close(prediction.standard_error, (prediction.epistemic / members).sqrt())


def test_a_member_alone_is_its_row_of_the_committee(case: tuple[nn.Module, str]) -> None:
    model, _ = case
    committee, x = Committee(model, members=9, seed=4), normal(7, 5)
    samples = committee.samples(x)
    assert len(samples.unique(dim=0)) > 2
    for k in (0, 5, 8):
        member = committee.member(k)
        member.train()  # has no effect: a member is a function
        torch.testing.assert_close(member(x).detach(), samples[k], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(member(x[2:3]).detach(), samples[k, 2:3], rtol=1e-5, atol=1e-6)
        assert torch.equal(through_pickle(member)(x), copy.deepcopy(member)(x))


def test_members_run_together_are_members_run_alone(
    case: tuple[nn.Module, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, how = case
    x = normal(11, 5)
    committee = Committee(model, members=6, seed=2, tile=4)
    together = committee.samples(x)
    assert committee.plan(x).how == how

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no vmap today")

    monkeypatch.setattr(torch.func, "vmap", broken)
    monkeypatch.setattr(plan, "find_perceptron", lambda network: None)
    slow = Committee(model, members=6, seed=2, tile=4)
    assert slow.plan(x).how == "loop"
    torch.testing.assert_close(together, slow.samples(x), rtol=1e-5, atol=1e-6)
    if how == "batched":
        assert "no vmap today" in slow.plan(x).reason


def test_a_member_does_not_depend_on_how_many_there_are_but_on_the_seed() -> None:
    model, x = mlp(), normal(4, 5)
    few, many = (
        Committee(model, members=3, seed=1).samples(x),
        Committee(model, members=70, seed=1).samples(x),
    )
    torch.testing.assert_close(few, many[:3], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(few, Committee(model, members=3, seed=2).samples(x))


def test_members_are_the_same_in_another_process() -> None:
    code = (
        "import torch, dropkit as dk\n"
        "x = torch.linspace(-1, 1, 12).double().reshape(3, 4)\n"
        "model = torch.nn.Sequential(dk.nn.Dropout(0.5), torch.nn.Linear(4, 1, bias=False)).double()\n"
        "torch.nn.init.ones_(model[1].weight)\n"
        "values = dk.Committee(model, members=5, seed=9).samples(x).flatten().tolist()\n"
    )
    here: dict[str, list[float]] = {}
    exec(code, here)
    there = subprocess.run(
        [sys.executable, "-c", f"{code}print(values)"], capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == str(here["values"])
    assert len(set(here["values"])) > 5


# --- rows ----------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5), tile=st.integers(3, 9))
def test_chunks_of_any_size_change_no_bit(sizes: list[int], tile: int) -> None:
    torch.manual_seed(0)
    x = normal(sum(sizes), 5)
    committee = Committee(mlp(outputs=2), members=5, likelihood="gaussian", tile=tile)
    pieces = list(committee.predict_chunks(iter(x.split(sizes))))
    if not len(x):
        assert pieces == []
        return
    whole = committee.predict(x)
    assert torch.equal(torch.cat([piece.samples for piece in pieces], dim=1), whole.samples)
    assert torch.equal(torch.cat([piece.noise for piece in pieces], dim=1), whole.noise)
    again = list(committee.predict_chunks([x.numpy()]))
    for name in ("mean", "epistemic", "total"):
        assert all(
            torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(pieces, again, strict=True)
        )
    cut = tile * (len(x) // tile // 2)
    if 0 < cut:
        assert torch.equal(
            torch.cat([committee.samples(x[:cut]), committee.samples(x[cut:])], dim=1), committee.samples(x)
        )


@given(rows=st.integers(0, 30), tile=st.integers(1, 9))
@settings(max_examples=10)
def test_the_model_sees_tiles_and_what_is_left(rows: int, tile: int) -> None:
    seen = set()

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(x.shape)
            return x

    model = nn.Sequential(Watching(), dk.nn.Dropout(0.5), nn.Linear(5, 1))
    assert Committee(model, members=2, tile=tile).samples(normal(rows, 5) + 9).shape == (2, rows, 1)
    sizes = {tile if rows >= tile else 0, rows % tile if rows else 1} - {0}
    assert seen == {(size, 5) for size in sizes}


def test_order_and_company_of_rows_do_not_matter(case: tuple[nn.Module, str]) -> None:
    model, how = case
    if how == "loop":
        model.least = -1.0  # the branch looks at the whole batch, so it must always take one side
    x, order = normal(13, 5), torch.randperm(13)
    samples = Committee(model, members=5, tile=4).samples(x)
    shuffled = Committee(model, members=5, tile=4).samples(x[order])
    torch.testing.assert_close(shuffled, samples[:, order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        Committee(model, members=5, tile=7).samples(x[6:7]), samples[:, 6:7], rtol=1e-5, atol=1e-6
    )


def test_no_rows_are_no_mistake() -> None:
    prediction = Committee(mlp(outputs=3), members=4, likelihood="categorical").predict(np.zeros((0, 5)))
    assert prediction.probabilities.shape == (0, 3)
    assert prediction.mutual_information.shape == (0,)


def test_arrays_and_other_dtypes_are_read(tmp_path: object) -> None:
    model = mlp()
    committee = Committee(model, members=3)
    x = normal(9, 5)
    on_disk = np.memmap(f"{tmp_path}/x", np.float32, "w+", shape=(9, 5))
    on_disk[:] = x.numpy()
    read_only = x.numpy().copy()
    read_only.setflags(write=False)
    for given_rows in (on_disk, read_only, x.double().numpy(), x.double()):
        assert torch.equal(committee.samples(given_rows), committee.samples(x))
    words = nn.Sequential(nn.Embedding(4, 6), nn.Flatten(), dk.nn.Dropout(0.5), nn.Linear(12, 1))
    assert Committee(words, members=3).samples(np.array([[0, 3], [1, 1]])).shape == (3, 2, 1)


# --- the model stays as it was -------------------------------------------------------------------------


def state_of(model: nn.Module) -> tuple[object, ...]:
    tensors = [(k, v.clone()) for k, v in model.state_dict().items()]
    return (
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [(k, v.tolist()) for k, v in tensors],
        [getattr(module, "site", None) for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
    )


def test_the_model_is_untouched_even_by_an_exception(case: tuple[nn.Module, str]) -> None:
    model, _ = case
    model.train()
    next(model.children()).eval()  # a mode of its own, as a frozen part has
    next(iter(model.parameters())).requires_grad_(False)
    before, x = state_of(model), normal(4, 5)
    kept = x.clone()
    committee = Committee(model, members=4, tile=4)  # a whole tile, so that no copy is made to fill it up
    committee.predict(x)
    committee.member(1)(x)
    with pytest.raises(RuntimeError):
        committee.predict(normal(4, 7))
    with pytest.raises(RuntimeError):
        Committee(model, members=4).predict(normal(4, 7))
    assert state_of(model) == before
    assert torch.equal(x, kept)
    assert torch.backends.mha.get_fastpath_enabled()  # torch's default
    assert torch.is_grad_enabled()


def test_weights_are_shared_and_rates_are_those_of_now() -> None:
    model, x = mlp(p=0.5), normal(3, 5)
    committee = Committee(model, members=4)
    before = committee.samples(x)
    model[2].p = 0.0
    assert torch.equal(committee.samples(x), before)
    with torch.no_grad():
        model[6].weight.mul_(2.0)
        model[6].bias.mul_(2.0)
    torch.testing.assert_close(committee.samples(x), 2 * before)


def test_a_committee_can_be_copied_and_pickled() -> None:
    committee, x = Committee(mlp(), members=4, seed=3), normal(3, 5)
    for other in (copy.deepcopy(committee), through_pickle(committee)):
        assert torch.equal(other.samples(x), committee.samples(x))
    assert "members=4" in repr(committee)


def test_gradients_are_had_when_asked_for(case: tuple[nn.Module, str]) -> None:
    model, _ = case
    model.double()
    committee, x = Committee(model, members=3), normal(4, 5).double().requires_grad_()
    assert not committee.predict(x).mean.requires_grad
    prediction = committee.predict(x, grad=True)
    (slope,) = torch.autograd.grad(prediction.mean.sum(), x)
    alone = torch.stack([torch.autograd.grad(committee.member(k)(x).sum(), x)[0] for k in range(3)]).mean(
        dim=0
    )
    torch.testing.assert_close(slope, alone, rtol=1e-9, atol=1e-9)


# --- what the output means -----------------------------------------------------------------------------


def test_each_likelihood_reads_the_output_in_its_way() -> None:
    x = normal(6, 5)
    model = mlp(outputs=2)
    raw = Committee(model, members=4).samples(x)
    point = Committee(model, members=4).predict(x)
    assert isinstance(point, RegressionPrediction)
    assert torch.equal(point.samples, raw)
    assert point.noise is None
    gaussian = Committee(model, members=4, likelihood="gaussian").predict(x)
    assert isinstance(gaussian, RegressionPrediction)
    assert torch.equal(gaussian.samples, raw[..., 0])
    torch.testing.assert_close(gaussian.noise, raw[..., 1].exp())
    categorical = Committee(model, members=4, likelihood="categorical").predict(x)
    assert isinstance(categorical, ClassificationPrediction)
    torch.testing.assert_close(categorical.samples, raw.softmax(-1))


@pytest.mark.parametrize(("likelihood", "outputs"), [("gaussian", 3), ("categorical", 1)])
def test_an_output_of_the_wrong_shape_is_refused(likelihood: str, outputs: int) -> None:
    with pytest.raises(ShapeError, match=likelihood):
        Committee(mlp(outputs=outputs), members=2, likelihood=likelihood).predict(normal(2, 5))


# --- Monte Carlo error ---------------------------------------------------------------------------------


def test_members_are_drawn_until_the_error_is_below_the_tolerance() -> None:
    model, x = mlp(), normal(5, 5)
    committee = Committee(model, members=8, seed=1)
    tolerance = float(committee.predict(x).standard_error.max()) / 3
    reached = committee.predict(x, tolerance=(tolerance, math.inf))
    assert float(reached.standard_error.max()) <= tolerance
    assert int(reached.members.max()) > 8
    assert bool(reached.converged.all())
    # A row's members are those of the committee, the first so many of them.
    for row, members in enumerate(reached.members.tolist()):
        alone = Committee(model, members=members, seed=1).predict(x)
        torch.testing.assert_close(reached.mean[row], alone.mean[row].double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            reached.epistemic[row], alone.epistemic[row].double(), rtol=1e-4, atol=1e-6
        )
    assert committee.predict(x, tolerance=1e9).members.tolist() == [8] * 5
    with pytest.warns(DropkitWarning, match="tolerance"):
        assert committee.predict(x, tolerance=1e-9, maximum=20).members.tolist() == [20] * 5


def test_the_tolerance_is_about_probabilities_for_classes() -> None:
    committee = Committee(mlp(outputs=3, p=0.5), members=4, likelihood="categorical")
    assert float(committee.predict(normal(5, 5), tolerance=0.01).standard_error.max()) <= 0.01


# --- guards --------------------------------------------------------------------------------------------


def test_a_model_in_which_no_mask_acts_is_refused() -> None:
    x = normal(3, 5)
    with pytest.raises(NoMaskError, match="it has no dropout"):
        Committee(nn.Linear(5, 1)).predict(x)
    unused = nn.Linear(5, 1)
    unused.drop = dk.nn.Dropout(0.5)
    with pytest.raises(NoMaskError, match="never reached by the pass: drop"):
        Committee(unused).predict(x)
    certain = Committee(unused, members=2, allow=("no spread",)).predict(x)
    assert torch.equal(certain.epistemic, torch.zeros(3, 1))


def test_rates_of_zero_are_refused_unless_accepted() -> None:
    model, x = mlp(p=0.0), normal(3, 5)
    with pytest.raises(NoMaskError, match="every rate is 0"):
        Committee(model).predict(x)
    accepted = Committee(model, allow=("no spread",))
    prediction = accepted.predict(x)
    assert torch.equal(prediction.epistemic, torch.zeros(3, 1))
    torch.testing.assert_close(prediction.mean, model.eval()(x).detach())
    assert accepted.plan(x).how == "once"


def test_dropout_of_torch_is_converted_without_a_word() -> None:
    torch.manual_seed(0)
    ours, x = mlp(), normal(3, 5)
    theirs = nn.Sequential(
        *(nn.Dropout(layer.p) if isinstance(layer, dk.nn.Dropout) else layer for layer in ours)
    )
    committee = Committee(theirs, members=5, seed=3)
    assert torch.equal(committee.samples(x), Committee(ours, members=5, seed=3).samples(x))
    assert committee.conversion is not None
    assert len(committee.conversion.replaced) == 2
    assert type(theirs[2]) is nn.Dropout


def test_noise_that_stays_silent_is_named_and_refused() -> None:
    model, x = nn.Sequential(mlp(), nn.Linear(1, 1)), normal(3, 5)
    model[1].unused = dk.nn.Dropout(0.5)
    with pytest.raises(NoMaskError, match=r"1.unused \(not reached\)"):
        Committee(model).predict(x)
    accepted = Committee(model, allow=("silent sites",))
    assert accepted.plan(x).silent == ("1.unused (not reached)",)
    assert "1.unused" in str(accepted.plan(x))
    assert float(accepted.predict(x).epistemic.min()) > 0


class Random(nn.Module):
    """Draws from torch's generator wherever it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_other_random_numbers_are_refused() -> None:
    model, x = nn.Sequential(Random(), mlp()), normal(3, 5)
    with pytest.raises(OptionError, match=r"draws other random numbers in evaluation, .*: randn_like in 0\."):
        Committee(model).predict(x)
    accepted = Committee(model, members=3, allow=("silent sites", "other randomness"))
    assert not torch.equal(accepted.samples(x), accepted.samples(x))


def test_dropout_on_the_output_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(5, 1), dk.nn.Dropout(0.5), nn.Flatten()), normal(3, 5)
    with pytest.raises(NoMaskError, match="output is that of dropout layer '1'"):
        Committee(model, members=2000).predict(x)
    prediction = Committee(model, members=2000, allow=("dropout on the output",)).predict(x)
    # What it says is so: the spread is |y| sqrt(p / (1 - p)) and nothing else; here five standard errors.
    y = model.eval()(x).detach().abs()
    assert bool(((prediction.epistemic.sqrt() / y - 1).abs() < 0.05).all())


def test_masks_that_do_not_reach_the_output_are_refused() -> None:
    model, x = mlp(), normal(3, 5)
    committee = Committee(model, members=4)
    assert float(committee.predict(x).epistemic.min()) > 0
    with torch.no_grad():
        model[6].weight.zero_()
    with pytest.raises(NoMaskError, match="all members agree to the last bit"):
        committee.predict(x)
    assert float(Committee(model, members=4, allow=("no spread",)).predict(x).epistemic.max()) == 0


def test_a_committee_that_works_says_nothing(case: tuple[nn.Module, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Committee(case[0], members=4).predict(normal(3, 5))


def test_mistakes_are_named() -> None:
    model, x = mlp(), normal(3, 5)
    for wrong in (
        {"members": 1},
        {"members": 2.0},
        {"seed": -1},
        {"seed": 2**64},
        {"tile": 0},
        {"likelihood": "poisson"},
    ):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            Committee(model, **wrong)
    with pytest.raises(OptionError, match=r"torch\.nn\.Module"):
        Committee(lambda v: v)
    committee = Committee(model, members=4)
    with pytest.raises(OptionError, match="0 to 3"):
        committee.member(4)
    with pytest.raises(OptionError, match="tolerance"):
        committee.predict(x, tolerance=math.nan)
    with pytest.raises(OptionError, match="maximum"):
        committee.predict(x, tolerance=0.1, maximum=3)
    with pytest.raises(ShapeError, match="list without tensors was given"):
        committee.predict([[0.0] * 5])
    with pytest.raises(ShapeError, match=r"\(1, 1, 5\) for 3 rows"):
        Committee(nn.LSTM(5, 5), allow=("no spread",)).predict(x[:, None])
    with pytest.raises(OptionError, match="'silent sites'"):
        Committee(model, allow="no spread")
    with pytest.raises(OptionError, match="memory"):
        Committee(model, memory=0)
    with pytest.raises(ShapeError, match=r"holds the tensor \(15,\) for 3 rows"):
        Committee(nn.Sequential(dk.nn.Dropout(0.5), nn.Flatten(0))).predict(x)


def test_the_memory_of_a_pass_is_bounded_by_a_fixed_rule() -> None:
    def plan_of(width: int) -> plan.Plan:
        layers = nn.Linear(5, width), dk.nn.Dropout(0.5), nn.GELU(), nn.Linear(width, 1)
        return Committee(nn.Sequential(*layers)).plan(normal(256, 5))

    small, wide, huge = plan_of(16), plan_of(1000), plan_of(20_000)
    assert (small.how, small.members_at_once, small.widest) == ("batched", 512, 16)
    assert small.bytes == 512 * 256 * 16 * 4
    assert wide.widest == 1000
    assert wide.bytes <= 8 * 2**20 < 2 * wide.bytes
    assert (huge.how, huge.members_at_once) == ("loop", 1)
    assert "loop" in str(huge)


# --- how it is run ---------------------------------------------------------------------------------------


@pytest.fixture
def always_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are recorded too, and the kernel for perceptrons is not used."""
    monkeypatch.setattr(plan, "RECORD_FROM", 0.0)
    monkeypatch.setattr(plan, "find_perceptron", lambda network: None)


def ways(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one way of running a recorded model look cheapest."""
    original = min

    def pick(seconds: object, key: object = None) -> object:
        return how if isinstance(seconds, dict) and how in seconds else original(seconds, key=key)

    monkeypatch.setattr(plan, "min", pick, raising=False)


@pytest.mark.parametrize("how", ["loop", "batched", "thinned"])
def test_a_recorded_model_has_the_members_of_the_model(
    case: tuple[nn.Module, str], how: str, always_recorded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = case
    x = normal(11, 5)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "RECORD_FROM", math.inf)
        by_hand = Committee(model, members=5, seed=4, tile=4).samples(x)
    ways(how, monkeypatch)
    committee = Committee(model, members=5, seed=4, tile=4)
    torch.testing.assert_close(committee.samples(x), by_hand, rtol=1e-5, atol=1e-5)
    decided = committee.plan(x)
    assert decided.recorded is (expected != "loop")  # `branching` looks at its activations
    if decided.recorded:
        assert decided.how in (how, "batched", "loop")
        assert decided.how == how or how not in decided.seconds
    else:
        assert "could not be recorded" in str(decided)


class Counting(nn.Module):
    """Counts how often, and on how many rows, it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


def test_what_no_mask_touches_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # 20 layers before the mask, 1 behind: a member costs a twentieth of a pass. Branches, too.
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(*(Counting() for _ in range(20)))
            self.side, self.drop, self.head = Counting(), dk.nn.Dropout(0.5), nn.Linear(64, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.trunk(x)
            return self.head(self.drop(h) + self.side(x))

    monkeypatch.setattr(plan, "RECORD_FROM", 0.0)
    committee = Committee(Net(), members=10)
    decided = committee.plan(normal(32, 64))
    rows = 32
    assert decided.dense == rows * (21 * 64 * 64 + 64)
    assert decided.prefix == rows * 21 * 64 * 64
    assert decided.suffix == rows * 64


def test_rows_are_kept_in_blocks_that_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "RECORD_FROM", 0.0)
    model, x = nn.Sequential(nn.Linear(5, 32), dk.nn.Dropout(0.5), nn.GELU(), nn.Linear(32, 1)), normal(40, 5)
    roomy = Committee(model, members=5, tile=4)
    kept = roomy.plan(x[:4]).kept
    assert kept > 0
    tight = Committee(model, members=5, tile=4, memory=2 * kept)
    sizes = [len(block) for block, _, _ in tight._blocks(x, 40, None, False)]
    assert sizes == [2] * 5
    assert torch.equal(tight.samples(x), roomy.samples(x))


def test_less_memory_means_smaller_pieces_and_then_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(), normal(12, 5)
    expected = Committee(model, members=8, tile=4).samples(x)
    asked: list[tuple[int, int]] = []

    def scarce(limit: int) -> None:
        def ask(way: run.Way, tiles: list[run.Tile], start: int, stop: int, at_once: int) -> list[run.Leaves]:
            asked.append((len(tiles), min(at_once, stop - start)))
            if len(tiles) * min(at_once, stop - start) > limit:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
                )
            return original(way, tiles, start, stop, at_once)

        monkeypatch.setattr(run, "ask", ask)

    original = run.ask
    scarce(2)
    torch.testing.assert_close(Committee(model, members=8, tile=4).samples(x), expected, rtol=1e-5, atol=1e-6)
    assert asked[0] == (3, 8)
    assert (1, 2) in asked
    scarce(0)
    with pytest.raises(LackOfMemoryError, match="one member on 4 rows does not fit"):
        Committee(model, members=8, tile=4).samples(x)


def test_rows_may_have_masks_of_their_own() -> None:
    model, x = mlp(), normal(1, 5).expand(64, 5)
    fresh = Committee(model, members=16, per_row=True, tile=16)
    samples = fresh.samples(x)
    assert len(samples[0].unique()) > 32  # equal rows, other masks
    assert len(Committee(model, members=16).samples(x)[0].unique()) == 1
    # A row is known by its id, whatever it comes with; by default its place.
    torch.testing.assert_close(fresh.samples(x[:3], ids=torch.tensor([7, 40, 2])), samples[:, [7, 40, 2]])
    chunks = fresh.predict_chunks(x.split(9))
    torch.testing.assert_close(torch.cat([part.samples for part in chunks], dim=1), samples)
    with dk.masks(seed=0, member=3, samples=torch.arange(64)):
        network = copy.deepcopy(model).eval()
        dk.nn.name_sites(network)
        torch.testing.assert_close(network(x).detach(), samples[3])


# --- members as modules, derivatives ----------------------------------------------------------------------


def test_a_member_is_a_smaller_module() -> None:
    torch.manual_seed(0)
    model = mlp(p=0.5).double()
    committee, x = Committee(model, members=4, seed=2), normal(6, 5).double()
    small = committee.member(3, x)
    torch.testing.assert_close(small(x), committee.samples(x)[3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(small(x[:2]), small(x)[:2], rtol=1e-12, atol=1e-12)
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) < 0.6 * count
    with pytest.warns(DropkitWarning, match="could not be recorded"):
        assert isinstance(Committee(Branching(), members=4).member(1, normal(3, 5)), nn.Module)


# --- structured inputs and outputs ------------------------------------------------------------------------


class Molecule(nn.Module):
    """Takes named inputs, gives an energy and what follows from it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, object]:
        energy = self.net(x) * scale
        return {"energy": energy[:, 0], "unit": "eV", "parts": (energy, energy.expand(-1, 3) + x[:, :3])}


def test_a_structure_comes_back_as_it_was() -> None:
    torch.manual_seed(0)
    model, x, scale = Molecule(), normal(7, 5), normal(7, 1)
    committee = Committee(model, members=6, tile=4)
    answer = committee.predict({"x": x, "scale": scale.numpy()})
    assert answer["unit"] == "eV"
    assert isinstance(answer["energy"], RegressionPrediction)
    assert answer["parts"][1].mean.shape == (7, 3)
    samples = committee.samples((x, scale))
    torch.testing.assert_close(answer["parts"][0].samples, samples["parts"][0])
    torch.testing.assert_close(samples["energy"][2], committee.member(2)(x, scale)["energy"].detach())
    chunks = committee.predict_chunks([{"x": x[:3], "scale": scale[:3]}, {"x": x[3:], "scale": scale[3:]}])
    assert torch.equal(
        torch.cat([part["energy"].samples for part in chunks], dim=1), answer["energy"].samples
    )
    summary = committee.predict((x, scale), tolerance=10.0)
    torch.testing.assert_close(summary["energy"].mean, answer["energy"].mean.double())
    with pytest.raises(ShapeError, match="other numbers of rows"):
        committee.predict((x, scale[:3]))


def test_rows_that_are_not_finite_are_named() -> None:
    x = normal(6, 5)
    x[4] = math.inf
    with pytest.warns(DropkitWarning, match="outputs of 1 of 6 rows are not finite: rows 4"):
        prediction = Committee(mlp(), members=4).predict(x)
    assert prediction.not_finite.tolist() == [0, 0, 0, 0, 4, 0]


def test_a_model_is_recorded_once_for_tiles_of_all_sizes(
    always_recorded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = []

    def counted(network: nn.Module, inputs: tuple[Tensor, ...], *rest: object, **options: object) -> object:
        recorded.append(len(inputs[0]))
        return original(network, inputs, *rest, **options)

    original = plan.record
    monkeypatch.setattr(plan, "record", counted)
    model, x = mlp(), normal(35, 5)
    committee = Committee(model, members=4, tile=16)
    samples = committee.samples(x)
    assert recorded == [16]
    torch.testing.assert_close(committee.samples(x[32:]), samples[:, 32:], rtol=1e-5, atol=1e-6)
    assert recorded == [16]
    committee.samples(x[:1])  # one row is a special case of many operators
    assert recorded == [16, 1]

"""The same run under any split: equal masks bit for bit, gradients equal up to the order in which they are summed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

import split_models as sm
from dropkit.errors import EngineError, OptionError
from dropkit.training import ProcessTeam, WithRowIds, join_team

TESTS = Path(__file__).parent
KINDS = sorted(sm.MODELS)
STEPS = [1, 2**32 - 1]


def whole_gradient(kind: str, ids: Tensor, step: int) -> Tensor:
    model = sm.make_model(kind)
    sm.backward(model, ids, step, len(ids))
    return sm.gradients(model)


def assert_equal_up_to_order(found: Tensor, wanted: Tensor) -> None:
    """1e-12 of the largest: float64 sums of some hundred terms, in another order."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(data=st.data())
def test_any_split_in_any_order_gives_the_masks_and_the_gradient_of_the_whole_batch(kind, data):
    rows = data.draw(st.lists(st.integers(0, sm.ROWS - 1), min_size=2, max_size=12, unique=True))
    cuts = data.draw(st.lists(st.integers(1, len(rows) - 1), max_size=3, unique=True).map(sorted))
    order = data.draw(st.permutations(rows))
    step = data.draw(st.sampled_from(STEPS))
    whole, parts, now = [], [], torch.tensor(rows)
    model = sm.make_model(kind)
    sm.watch(model, lambda: now, whole)
    sm.backward(model, now, step, len(rows))
    wanted = sm.gradients(model)

    model = sm.make_model(kind)
    sm.watch(model, lambda: now, parts)
    for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        now = torch.tensor(order[start:end])
        sm.backward(model, now, step, len(rows))
    assert_equal_up_to_order(sm.gradients(model), wanted)

    kept, again = sm.keeps_by_row(whole), sm.keeps_by_row(parts)
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[key], again[key]) for key in kept)


@pytest.mark.parametrize("kind", KINDS)
def test_another_row_id_step_or_place_in_the_batch_would_be_seen(kind):
    """The law above could hold for a model without masks, or with masks that no row has of its own."""
    ids = sm.batch_ids(0)
    wanted = whole_gradient(kind, ids, 0)
    by_place, swapped = sm.make_model(kind), sm.make_model(kind)
    x, y = sm.make_rows()
    with sm.dk.masks(seed=sm.SEED, step=0):  # ids by position: what a loop without row ids has
        ((by_place(x[ids]) - y[ids]).square().sum() / len(ids)).backward()
    with sm.dk.masks(seed=sm.SEED, step=0, samples=ids.flip(0)):
        ((swapped(x[ids]) - y[ids]).square().sum() / len(ids)).backward()
    for other in (whole_gradient(kind, ids, 1), sm.gradients(by_place), sm.gradients(swapped)):
        assert float((other - wanted).abs().max()) > 1e-3 * float(wanted.abs().max())


# --- processes --------------------------------------------------------------------------------------------------------


def torchrun(script: str, *arguments: object, workers: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder as two processes that torchrun starts."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(workers),
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
    }
    return subprocess.run(
        [*command, str(TESTS / script), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two processes had after the same steps, in every way of sharing the work."""
    out = tmp_path_factory.mktemp("workers")
    run = torchrun("split_worker.py", out)
    assert run.returncode == 0, run.stderr[-4000:]
    return [load_file(out / f"worker-{rank}.safetensors") for rank in range(2)]


def trained_alone(kind: str) -> tuple[list[Tensor], Tensor]:
    """Gradient of each step, and the weights after the last, of one process."""
    model, found = sm.make_model(kind), []
    optimizer = torch.optim.SGD(model.parameters(), lr=sm.RATE)
    for step in range(sm.STEPS):
        optimizer.zero_grad()
        sm.backward(model, sm.batch_ids(step), step, sm.BATCH)
        found.append(sm.gradients(model))
        optimizer.step()
    return found, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("way", ["team", "ddp", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_take_the_steps_of_one(workers, kind, way):
    wanted, weights = trained_alone(kind)
    for step in range(sm.STEPS):
        found = [worker[f"{way}.{kind}.gradient.{step}"] for worker in workers]
        assert torch.equal(found[0], found[1])
        assert_equal_up_to_order(found[0], wanted[step])
    found = [worker[f"{way}.{kind}.weights"] for worker in workers]
    assert torch.equal(found[0], found[1])
    assert_equal_up_to_order(found[0], weights)


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_keep_what_one_keeps_bit_for_bit(workers, kind):
    seen: list[sm.Seen] = []
    model, ids = sm.make_model(kind), sm.batch_ids(0)
    sm.watch(model, lambda: ids, seen)
    sm.backward(model, ids, 0, len(ids))
    wanted = sm.keeps_by_row(seen)
    found = {
        key: kept for worker in workers for key, kept in worker.items() if key.startswith(f"kept.{kind}.")
    }
    assert len(found) == len(wanted) > 0
    for (site, row), kept in wanted.items():
        assert torch.equal(found[f"kept.{kind}.{site}.{row}"], kept)


def test_a_sampler_that_deals_rows_to_workers_hands_out_their_ids(workers):
    """Two workers with torch's DistributedSampler together have the loss of a loop that is told the ids."""
    for epoch in range(2):
        ids = torch.cat([worker[f"sampler.ids.{epoch}"] for worker in workers])
        assert sorted(ids.tolist()) == list(range(sm.ROWS))
        model = sm.make_model("perceptron")
        sm.backward(model, ids, epoch, len(ids))
        assert_equal_up_to_order(workers[0][f"sampler.gradient.{epoch}"], sm.gradients(model))


def test_sums_over_two_workers_are_those_of_all_their_tensors(workers):
    for worker in workers:
        assert worker["sum.float32"].tolist() == [1.0, 3.0]
        assert worker["sum.int64"].tolist() == [[1], [21]]
        assert worker["sum.empty"].shape == (0, 3)
        assert worker["any"].tolist() == [1, 0]


@pytest.mark.parametrize("rank", range(3))
def test_parts_are_added_in_the_order_of_their_workers_whoever_adds(monkeypatch, rank):
    parts = [
        torch.tensor([2.0**24]),
        torch.tensor([1.0]),
        torch.tensor([-(2.0**24)]),
    ]  # in any other order: 1

    def all_gather(into, mine, group=None):
        assert torch.equal(mine, parts[rank])
        for place, part in zip(into, parts, strict=True):
            place.copy_(part)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    team = object.__new__(ProcessTeam)
    team.rank, team.size, team.group = rank, 3, None
    total = parts[rank].clone()
    team.sum_([total])
    assert total.tolist() == [0.0]


def test_without_other_processes_there_is_no_team(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(EngineError, match="not started by torchrun"), join_team():
        pass
    with pytest.raises(EngineError, match="no processes have met"):
        ProcessTeam()
    with pytest.raises(OptionError, match="timeout=0"), join_team(timeout=0):
        pass


# --- row ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True], ids=["item by item", "several at once"])
def test_items_come_with_their_numbers_whoever_samples_them(batched):
    x = torch.arange(20.0)
    dataset = WithRowIds(Subset(TensorDataset(x), range(20)) if batched else TensorDataset(x))
    sampler = DistributedSampler(dataset, num_replicas=3, rank=1, shuffle=True, seed=4)
    for ids, (values,) in DataLoader(dataset, batch_size=4, sampler=sampler):
        assert ids.dtype == torch.int64
        assert values.tolist() == ids.tolist()
    assert dataset[-1] == (19, (x[19],))
    divided = Subset(dataset, [7, 3])
    assert [ids.tolist() for ids, _ in DataLoader(divided, batch_size=2)] == [[7, 3]]


def test_a_stream_has_no_numbers():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(OptionError, match="a Stream was given"):
        WithRowIds(Stream())

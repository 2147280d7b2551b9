"""What each worker of `test_splits.py` does: the same few steps in three ways, and what came of them as a file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import split_models as sm
from dropkit.training import ProcessTeam, WithRowIds, join_team


def whole(tensor: Tensor) -> Tensor:
    """A tensor whose parts lie on several workers, put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_work(way: str, model: nn.Module, team: ProcessTeam) -> nn.Module:
    """The model as one hands it to torch for that way of sharing the work."""
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp":
        mesh = init_device_mesh("cpu", (team.size,))
        fully_shard(model, mesh=mesh)
    return model


def train(kind: str, way: str, team: ProcessTeam) -> dict[str, Tensor]:
    """Some steps, each worker on its slice; DDP and FSDP average over workers, which is undone in the loss."""
    model = share_work(way, sm.make_model(kind), team)
    optimizer = torch.optim.SGD(model.parameters(), lr=sm.RATE)
    found = {}
    for step in range(sm.STEPS):
        optimizer.zero_grad()
        ids = sm.slice_of(sm.batch_ids(step), team.rank, team.size)
        sm.backward(model, ids, step, sm.BATCH if way == "team" else sm.BATCH / team.size)
        if way == "team":
            team.sum_([p.grad for p in model.parameters()])
        found[f"{way}.{kind}.gradient.{step}"] = torch.cat(
            [whole(p.grad).reshape(-1) for p in model.parameters()]
        )
        optimizer.step()
    found[f"{way}.{kind}.weights"] = torch.cat([whole(p).detach().reshape(-1) for p in model.parameters()])
    return found


def keep(kind: str, team: ProcessTeam) -> dict[str, Tensor]:
    """What the masks of this worker's rows kept in the first step."""
    seen: list[sm.Seen] = []
    model, ids = sm.make_model(kind), sm.slice_of(sm.batch_ids(0), team.rank, team.size)
    sm.watch(model, lambda: ids, seen)
    sm.backward(model, ids, 0, sm.BATCH)
    return {f"kept.{kind}.{site}.{row}": kept for (site, row), kept in sm.keeps_by_row(seen).items()}


def sample(team: ProcessTeam) -> dict[str, Tensor]:
    """Two epochs in which torch's sampler deals the rows out; the gradient of a whole epoch, piece by piece."""
    x, y = sm.make_rows()
    rows = WithRowIds(TensorDataset(x, y))
    sampler = DistributedSampler(rows, shuffle=True, seed=3)
    found = {}
    for epoch in range(2):
        sampler.set_epoch(epoch)
        model, dealt = sm.make_model("perceptron"), []
        for ids, _ in DataLoader(rows, batch_size=7, sampler=sampler):
            dealt.append(ids)
            sm.backward(model, ids, epoch, sm.ROWS)
        team.sum_([p.grad for p in model.parameters()])
        found |= {f"sampler.ids.{epoch}": torch.cat(dealt), f"sampler.gradient.{epoch}": sm.gradients(model)}
    return found


def add(team: ProcessTeam) -> dict[str, Tensor]:
    """Sums of tensors of several kinds."""
    floats = torch.tensor([1.0, 1.0]) if team.rank == 0 else torch.tensor([0.0, 2.0])
    integers = torch.tensor([[1], [20]]) if team.rank == 0 else torch.tensor([[0], [1]])
    empty = torch.zeros(0, 3)
    team.sum_([floats, integers, empty])
    any_, none = team.any(team.rank == 1), team.any(False)
    return {
        "sum.float32": floats,
        "sum.int64": integers,
        "sum.empty": empty,
        "any": torch.tensor([int(any_), int(none)]),
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with join_team(timeout=60) as team:
        found = add(team) | sample(team)
        for kind in sm.MODELS:
            found |= keep(kind, team)
            for way in ("team", "ddp", "fsdp"):
                found |= train(kind, way, team)
        save_file(found, out / f"worker-{team.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

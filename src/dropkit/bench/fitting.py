"""Training the networks of `dropkit fit`: a step of one, and a whole search, against the same in plain torch.

Plain torch is a Sequential with torch's Dropout and AdamW in its fused form, which is its quickest. Both sides see the
same rows in the same order, average their weights, and look at the same rows as often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from dropkit.bench.work import Pair, Work, require
from dropkit.training import (
    Fold,
    NetworkSpec,
    Plan,
    bound_log_variance,
    committee_nll,
    gaussian_nll,
    train_stack,
)
from dropkit.training.division import make_folds
from dropkit.training.program import initial_weights, site_draw
from dropkit.training.rows import Table, epoch_rows
from dropkit.training.stack import train_step
from dropkit.training.state import StackState

DECAY = 0.01
RATES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
BATCH, EPOCHS, MEMBERS = 32, 8, 16


class PlainNetwork:
    """A network for a table as torch builds it, with its optimizer and the average of its weights."""

    def __init__(self, spec: NetworkSpec, weights: Sequence[Tensor], plan: Plan, decay: float) -> None:
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(spec.widths)):
            if i:
                layers += [nn.ReLU(), nn.Dropout(spec.rate)]
            layers.append(nn.Linear(before, after))
        self.network = nn.Sequential(*layers)
        self.parameters: list[Tensor] = list(self.network.parameters())
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight.T if parameter.ndim == 2 else weight[0])
        groups = [
            {"params": self.parameters[::2], "weight_decay": decay},
            {"params": self.parameters[1::2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, fused=True)
        self.averages = [p.detach().clone() for p in self.parameters]
        self.plan, self.steps = plan, 0

    def outputs(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, 2), mean and log variance."""
        out = self.network(x)
        return torch.stack((out[:, 0], bound_log_variance(out[:, 1])), dim=1)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; gives the loss."""
        loss = gaussian_nll(self.outputs(x), y).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        weight = max(1 / self.steps, 1 / self.plan.average)
        torch._foreach_lerp_(self.averages, self.parameters, weight)
        return loss.detach()

    @torch.no_grad()
    def look(self, rows: Sequence[tuple[Tensor, Tensor]], members: int = 0) -> list[Tensor]:
        """Mean losses of the averaged weights on some sets of rows; of a committee of so many members, if any."""
        kept = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.averages)
        self.network.train(members > 0)
        found = []
        for x, y in rows:
            losses = [gaussian_nll(self.outputs(x), y) for _ in range(max(members, 1))]
            found.append(committee_nll(torch.stack(losses)).mean())
        self.network.train()
        torch._foreach_copy_(self.parameters, kept)
        return found


def stepping(shape: Sequence[int], p: float) -> Pair:
    """A training step of one network with two hidden layers, from row numbers to averaged weights.

    The check: without dropout four steps of both lead to the same weights, to 1e-3; with it to others.

    Args:
        shape: (B rows of a step, D inputs, width).
        p: chance to drop a hidden unit.
    """
    batch, inputs, width = shape
    rows = 8 * batch
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, inputs)).astype(np.float32)
    y = x[:, 0] + 0.5 * generator.standard_normal(rows)
    fold = Fold(np.arange(rows), np.arange(0))
    plan = Plan(batch=batch, learning_rate=0.001)
    order = epoch_rows([fold], 8, batch, 0, 1)

    def sides(rate: float) -> tuple[Work, Work, StackState, PlainNetwork]:
        spec = NetworkSpec(inputs, (width, width), 2, rate, 0.0, "gaussian")
        table = Table(x, y, "gaussian", [fold])
        state = StackState.fresh([spec], [DECAY], [fold], [0], plan, 0)
        keys = [site_draw(site, seed=0).tensors()[0][None] for site in spec.sites]
        plain = PlainNetwork(spec, [w[0] for w in initial_weights(spec.widths, [0], 0)], plan, DECAY)
        features, target = torch.from_numpy(x), torch.from_numpy((y - table.location) / table.scale).float()

        def ours() -> Tensor:
            train_step(state, table, order[:, state.step % 8], keys, None)
            return state.parameters[-1].detach().clone()

        def peer() -> Tensor:
            numbers = torch.from_numpy(order[0, plain.steps % 8])
            plain.step(features[numbers], target[numbers])
            return plain.parameters[-1].detach().clone()

        return Work(ours), Work(peer), state, plain

    def check() -> None:
        ends = {}
        for rate in (0.0, p):
            mine, theirs, state, plain = sides(rate)
            for _ in range(4):
                mine.run()
                theirs.run()
            ends[rate] = [w[0].detach() for w in (*state.parameters, *state.averages)]
            if not rate:
                for ours, peer in zip(ends[0.0], (*plain.parameters, *plain.averages), strict=True):
                    peers = peer.detach().T if peer.ndim == 2 else peer.detach()[None]
                    require(
                        torch.allclose(ours, peers, rtol=1e-3, atol=1e-3),
                        "ours",
                        "the steps are others than torch's",
                    )
            sides_moved = (ends[rate][0], plain.parameters[0].detach().T)
            for side, weights in zip(("ours", "the peer"), sides_moved, strict=True):
                same = torch.allclose(weights, ends[0.0][0], atol=1e-4)
                require(
                    same == (rate == 0), side, f"dropout at rate {rate} {'does not act' if same else 'acts'}"
                )

    ours, peer, _, _ = sides(p)
    return Pair(ours, peer, check, math.prod(shape))


def searching(shape: Sequence[int]) -> Pair:
    """Rates and weight decays compete on folds: one batch of networks against one network after another.

    8 epochs of batches of 32, a look at losses every second epoch, a committee of 16 on the validation rows at the end.
    The check: networks without dropout have the same curves on both sides, to 1 %; with it others.

    Args:
        shape: (candidates, folds, rows, D inputs).
    """
    candidates, count, rows, inputs = shape
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, inputs)).astype(np.float32)
    y = x[:, 0] * x[:, 1] + 0.5 * generator.standard_normal(rows)
    plan = Plan(
        max_epochs=EPOCHS, batch=BATCH, evaluate_every=2, patience=EPOCHS, members=MEMBERS, keep="last"
    )
    numbers = np.arange(rows)
    folds = make_folds(numbers[rows // 5 :], numbers[: rows // 5], count, seed=0)
    tried = [(rate, decay) for decay in (0.01, 0.3) for rate in RATES][:candidates]
    pairs = [(rate, decay, f) for rate, decay in tried for f in range(len(folds))]
    specs = [NetworkSpec(inputs, (64, 64), 2, rate, 0.0, "gaussian") for rate, _, _ in pairs]
    table = Table(x, y, "gaussian", folds)
    batch = min(plan.batch, min(len(f.train) for f in folds))
    steps = min(len(f.train) for f in folds) // batch
    features = torch.from_numpy(x)

    def together() -> Tensor:
        """(K, 3): last losses on the training and the validation rows, and that of the committee."""
        found = train_stack(
            x, y, specs, [decay for _, decay, _ in pairs], folds, [f for _, _, f in pairs], plan=plan, seed=0
        ).trained
        return torch.tensor([[t.curve.train[-1], t.curve.validation[-1], t.committee_loss] for t in found])

    def one_after_another() -> Tensor:
        weights = {
            f: [w[0] for w in initial_weights(specs[0].widths, [fold.stream], 0)]
            for f, fold in enumerate(folds)
        }
        orders = [epoch_rows(folds, steps, batch, 0, epoch + 1) for epoch in range(EPOCHS)]
        found = []
        for spec, (_, decay, f) in zip(specs, pairs, strict=True):
            plain = PlainNetwork(spec, weights[f], plan, decay)
            location, scale = float(table.location[f]), float(table.scale[f])
            target = torch.from_numpy((y - location) / scale).float()
            seen = [
                (features[part], target[part])
                for part in map(torch.from_numpy, (folds[f].train, folds[f].validation))
            ]
            losses = plain.look(seen)
            for epoch in range(EPOCHS):
                for part in torch.from_numpy(orders[epoch][f]):
                    plain.step(features[part], target[part])
                if (epoch + 1) % plan.evaluate_every == 0:
                    losses = plain.look(seen)
            found.append(torch.stack([*losses, *plain.look(seen[1:], MEMBERS)]) + np.log(scale))
        return torch.stack(found)

    def check() -> None:
        ours, theirs = together(), one_after_another()
        plain = [k for k, spec in enumerate(specs) if not spec.rate]
        noisy = [k for k, spec in enumerate(specs) if spec.rate >= 0.02]
        require(
            torch.allclose(ours[plain], theirs[plain], rtol=0.01, atol=0.01),
            "ours",
            "the networks are others",
        )
        for side, found in (("ours", ours), ("the peer", theirs)):
            require(bool(found.isfinite().all()), side, "a loss is not finite")
            require(
                not torch.allclose(found[noisy, 1], found[noisy, 2], atol=1e-6),
                side,
                "the committee has no masks",
            )

    return Pair(Work(together), Work(one_after_another), check, math.prod(shape))

"""Committees guide design-build-test-learn: best design found against builds spent, on a measured landscape."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from dropkit.claims import data
from dropkit.claims.claim import Chart, Claim, Findings, Rule, Setting
from dropkit.claims.experiments import networks
from dropkit.claims.experiments.networks import line, over_seeds
from dropkit.fields.design import Campaign, greedy, one_hot, run_campaign, thompson, upper_bound
from dropkit.training import Fold

Rows = NDArray[np.int64]
Pick = Callable[[Rows, int], Rows]
ROUNDS, BATCH, MEMBERS, RATE = 4, 96, 32, 0.1
LEVEL_WITH = 0.02  # of the range of values: regrets this near count as level


def experiment(setting: Setting, *, epochs: int = 100, members: int = MEMBERS) -> Findings:
    """Campaigns on one pool: random, greedy on the plain network, committee by bound and by Thompson's rule, a GP."""
    x, values, name = _pool("SIX6_REF_R1")
    values = (values - values.min()) / (values.max() - values.min())
    seeds = range(setting.seed, setting.seed + (2 if setting.full else 1) * setting.seeds)
    found: dict[str, list[Campaign]] = {
        "random": [
            run_campaign(values, _random(seed, len(x)), rounds=ROUNDS, batch=BATCH, seed=seed)
            for seed in seeds
        ],
        "Gaussian process": [
            run_campaign(values, _process(x, values), rounds=ROUNDS, batch=BATCH, seed=seed) for seed in seeds
        ],
    }
    rules = ("greedy", "upper bound", "Thompson")
    found |= _campaigns(x, values, rules, seeds, epochs, members)
    regret = {label: _along(campaigns, "regret") for label, campaigns in found.items()}
    recall = {label: _along(campaigns, "recall") for label, campaigns in found.items()}
    last = {label: each[-1] for label, each in regret.items()}
    top = {label: each[-1] for label, each in recall.items()}
    builds = [one.built for one in found["random"][0].rounds]
    return Findings(
        figures={
            "random": over_seeds(last["random"] - last["Thompson"]),
            "greedy": over_seeds(last["greedy"] - last["Thompson"]),
            "recall": over_seeds(top["Thompson"] - top["greedy"]),
            "bound": over_seeds(last["greedy"] - last["upper bound"]),
            "process": over_seeds(last["Gaussian process"] - last["Thompson"]),
            "regret": over_seeds(last["Thompson"]),
        },
        charts=(
            Chart(
                "recall", "Share of the best 1 % of the pool that was built, against builds; bars are 95 % intervals "
                "over seeds.", "designs built and measured", "share of the best 1 % found",
                tuple(line(label, builds, each) for label, each in recall.items()),
            ),
            Chart(
                "regret", "Value of the best design of the pool minus the best one built; values run from 0 to 1.",
                "designs built and measured", "simple regret",
                tuple(line(label, builds, each) for label, each in regret.items()),
            ),
        ),
        data=f"{name}: {len(x):,} sequences, all measured",
        setup=f"A start of {BATCH} random sequences, {ROUNDS} rounds of {BATCH}; perceptrons of 128 and 128 units, "
        f" dropout {RATE}, {epochs} epochs, {members} members, {len(seeds)} seeds; the Gaussian process is "
        "BoTorch's SingleTaskGP with upper confidence bounds, retrained every round.",
        remarks=("The pool is complete, so regret is exact; the start is the same for every way of picking.",),
    )  # fmt: skip


def _campaigns(
    x: NDArray[np.float32],
    values: NDArray[np.float64],
    rules: tuple[str, ...],
    seeds: range,
    epochs: int,
    members: int,
) -> dict[str, list[Campaign]]:
    """All rules and seeds go from round to round together, their networks trained as one batch."""
    picks: dict[tuple[str, int], Rows] = {}
    built = {
        (rule, seed): run_campaign(values, _random(seed, len(x)), rounds=0, seed=seed).rows
        for rule in rules
        for seed in seeds
    }
    history: dict[tuple[str, int], list[Rows]] = {key: [] for key in built}
    for turn in range(ROUNDS):
        folds = [Fold(np.sort(rows), np.empty(0, np.int64), seed) for (_, seed), rows in built.items()]
        trained = networks.train(
            x, values, hidden=(128, 128), rates=(RATE,), seeds=range(len(folds)), folds=folds, epochs=epochs, batch=32,
            learning_rate=0.003, average=100, likelihood="gaussian",
        )  # fmt: skip
        plain = trained.outputs(x)[0, :, :, 0].numpy()
        several = np.stack(
            [trained.outputs(x, member=members * turn + k)[0, :, :, 0].numpy() for k in range(members)]
        )
        for i, (key, rows) in enumerate(built.items()):
            rule = key[0]
            samples = plain[i : i + 1] if rule == "greedy" else several[:, i]
            samples = np.array(samples, np.float64)
            samples[:, rows] = -np.inf
            named = {"greedy": greedy, "upper bound": upper_bound, "Thompson": thompson}[rule](samples, BATCH)
            picks[key] = named
            history[key].append(named)
        built = {key: np.concatenate((rows, picks[key])) for key, rows in built.items()}
    found: dict[str, list[Campaign]] = {}
    for (rule, seed), turns in history.items():
        campaign = run_campaign(values, _replay(turns), rounds=ROUNDS, batch=BATCH, seed=seed)
        found.setdefault(rule, []).append(campaign)
    return found


def _replay(turns: list[Rows]) -> Pick:
    """What was named before, round by round."""
    rounds = iter(turns)
    return lambda rows, count: next(rounds)


def _random(seed: int, size: int) -> Pick:
    """Designs not built yet, at random."""
    generator = np.random.default_rng([seed, 71])
    return lambda rows, count: generator.permutation(np.setdiff1d(np.arange(size), rows))[:count]


def _process(x: NDArray[np.float32], values: NDArray[np.float64]) -> Pick:
    """Upper confidence bounds of a Gaussian process, the same weight of the spread as the committee's."""

    def pick(rows: Rows, count: int) -> Rows:
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from gpytorch.mlls import ExactMarginalLogLikelihood

        points = torch.from_numpy(x).double()
        target = torch.from_numpy(values[rows])[:, None]
        target = (target - target.mean()) / target.std()
        model = SingleTaskGP(points[rows], target)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        with torch.no_grad():
            parts = [
                model.posterior(part) for part in points.split(2048)
            ]  # joint: memory goes with its square
            score = torch.cat([(one.mean + one.variance.sqrt())[:, 0] for one in parts]).numpy()
        score[rows] = -np.inf
        return greedy(score[None], count)

    return pick


def _along(campaigns: list[Campaign], figure: str) -> torch.Tensor:
    """(rounds, seeds) of one figure."""
    found = [[getattr(one, figure) for one in campaign.rounds] for campaign in campaigns]
    return torch.tensor(found, dtype=torch.float64).T


def _pool(name: str) -> tuple[NDArray[np.float32], NDArray[np.float64], str]:
    """Every 8-mer with its measured binding; a made landscape of 6-mers where the file is not there."""
    folder = data.shared_folder()
    path = folder / "seq_design" / f"tfbind8_{name}.csv.gz" if folder else None
    if path is not None and path.is_file():
        import pandas as pd

        frame = pd.read_csv(path)
        return one_hot(frame["seq"].tolist()), frame["E_score"].to_numpy(np.float64), f"TF-Bind-8, {name}"
    sequences = ["".join(letters) for letters in product("ACGT", repeat=6)]
    x = one_hot(sequences)
    generator = np.random.default_rng(0)
    pairs = generator.standard_normal((24, 24)) / 6
    values = (x @ generator.standard_normal(24) + ((x @ pairs) * x).sum(1)).astype(np.float64)
    return x, values, "a made landscape of all 6-mers with interacting positions, as no measured one is here"


CLAIM = Claim(
    name="design",
    title="Committees guide what to build next",
    article="In synthetic biology, networks with dropout propose the next designs of a design-build-test-learn cycle.",
    prediction="A committee's picks find better designs than random ones, and are at least level with picking by the "
    "mean alone (within 0.02 of the range of values).",
    condition="With a good model of the mean, spread brings little: published offline designs of one model and of an "
    "ensemble differ by 0.01.",
    rules=(
        Rule("random", "simple regret of random picking minus of Thompson's rule after 4 rounds", "above"),
        Rule("greedy", "simple regret of greedy picking minus of Thompson's rule", "above", bound=-LEVEL_WITH),
        Rule("recall", "share of the best 1 % found, Thompson minus greedy", "shown"),
        Rule("bound", "simple regret of greedy picking minus of upper bounds", "shown"),
        Rule("process", "simple regret of a Gaussian process minus of Thompson's rule", "shown"),
        Rule("regret", "simple regret of Thompson's rule", "shown"),
    ),
    experiment=experiment,
    seconds=120,
    extras=("design",),
)  # fmt: skip

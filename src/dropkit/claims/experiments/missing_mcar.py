"""Feature dropout is training on data missing completely at random: the same masks, objective and weights; its gain."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

import dropkit.nn as dnn
from dropkit.claims import data
from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Series, Setting, critical
from dropkit.claims.experiments.missing_tables import Way, standardised, test_errors
from dropkit.claims.experiments.networks import over_seeds
from dropkit.fields.missing import MissingInputs, mcar
from dropkit.fields.missing.mechanisms import SITE
from dropkit.masks import masks

RATE, SHARES = 0.3, (0.0, 0.2, 0.4, 0.6, 0.8)


def experiment(setting: Setting, *, epochs: int = 20, name: str = "concrete") -> Findings:
    """The identity at masks, objective and weights, and errors on test rows with holes."""
    table = data.table(name)
    x, y = standardised(table)
    splits = table.splits[: 20 if setting.full else setting.seeds]
    holes = {f"{share:g}": mcar(x, share).remove(x, seed=1000 + setting.seed) for share in SHARES}
    plain = test_errors(x, y, splits, Way(None), holes, epochs=epochs)
    ready = test_errors(x, y, splits, Way(mcar(x, RATE)), holes, epochs=epochs)
    told = test_errors(x, y, splits, Way(mcar(x, RATE), indicators=True), holes, epochs=epochs)
    gain = over_seeds(plain["0.4"] - ready["0.4"])
    half = critical(len(splits) - 1) / len(splits) ** 0.5
    series = tuple(
        Series(
            label, SHARES, tuple(float(found[f"{s:g}"].mean()) for s in SHARES),
            tuple(half * float(found[f"{s:g}"].std()) for s in SHARES),
        )
        for label, found in (("complete rows", plain), ("feature dropout", ready), ("and indicators", told))
    )  # fmt: skip
    return Findings(
        figures={
            "masks": Measured(different_cells(x, setting.seed), 0.0, 0.0),
            "objective": Measured(*objectives(x[:, :6], torch.from_numpy(y), RATE)),
            "weights": Measured(*weight_sizes(x, torch.from_numpy(y), RATE, setting.seed)),
            "gain": gain,
            "price": over_seeds(ready["0"] - plain["0"]),
            "indicators": over_seeds(ready["0.4"] - told["0.4"]),
        },
        charts=(
            Chart(
                "shares",
                "Error on test rows that miss cells completely at random; bars are 95 % intervals over splits.",
                "share of cells missing", "root mean squared error [sd of the target]", series,
            ),
        ),
        data=f"{table.name}: {len(x):,} rows, {x.shape[1]} columns, {len(splits)} of its splits",
        setup=f"Perceptrons of 64 and 64 units, {epochs} epochs over 10 copies of the rows, complete or "
        f"with {100 * RATE:g} % of the cells dropped afresh in each copy; no rescaling, holes filled by the mean.",
        remarks=(
            "The splits share rows, so their intervals are too narrow by an unknown factor.",
            "Equality is with holes filled by 0: by the mean where columns are centred, by a value that means "
            "something else where they are not.",
        ),
    )  # fmt: skip


def different_cells(x: Tensor, seed: int) -> float:
    """Cells on which feature dropout and the MCAR generator of the same address disagree."""
    layer = dnn.ClassicDropout(torch.full((x.shape[1],), RATE, dtype=x.dtype))
    layer.site = SITE
    with masks(seed=seed):
        dropped = layer(x)
    filled = MissingInputs(indicators=False)(mcar(x, RATE).remove(x, seed=seed))
    return float((dropped != filled).sum())


def objectives(x: Tensor, y: Tensor, rate: float) -> tuple[float, float, float]:
    """Mean loss over MCAR patterns, all of them; 0 for its error; and dropout's closed form.

    E loss = mean (y - q x.w)^2 + p q sum_j w_j^2 mean(x_j^2), for unscaled masks and one fixed w.
    """
    size, keep = x.shape[1], 1 - rate
    weights = torch.linspace(-1, 1, size, dtype=torch.float64)
    total = 0.0
    for pattern in product((False, True), repeat=size):
        gone = torch.tensor(pattern)
        spoiled = x.masked_fill(gone, float("nan"))
        filled = MissingInputs(indicators=False)(spoiled)
        chance = rate ** int(gone.sum()) * keep ** int((~gone).sum())
        total += chance * float((y - filled @ weights).square().mean())
    penalty = rate * keep * float((weights**2 * x.square().mean(0)).sum())
    return total, 0.0, float((y - keep * x @ weights).square().mean()) + penalty


def weight_sizes(x: Tensor, y: Tensor, rate: float, seed: int) -> tuple[float, float, float]:
    """Length of the least-squares weights on MCAR copies, its error over ten groups, and dropout's closed form.

    w = (q X'X + p diag(X'X))^-1 X'y, the minimiser of the objective above.
    """
    keep, gram = 1 - rate, x.T @ x
    closed = torch.linalg.solve(keep * gram + rate * gram.diag().diag(), x.T @ y)
    mechanism, groups = mcar(x, rate), []
    for group in range(10):
        square, moment = torch.zeros_like(gram), torch.zeros(x.shape[1], dtype=x.dtype)
        for copy in range(20):
            filled = mechanism.remove(x, seed=seed + 10_000 + 20 * group + copy).nan_to_num(0.0)
            square, moment = square + filled.T @ filled, moment + filled.T @ y
        groups.append(float(torch.linalg.solve(square, moment).norm()))
    found = torch.tensor(groups, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / len(found) ** 0.5, float(closed.norm())


CLAIM = Claim(
    name="missing_mcar",
    title="Feature dropout is data missing at random",
    article="Dropping inputs in training is learning from data whose cells are missing completely at random, so the "
    "model is ready for such data.",
    prediction="Masks, objective and weights equal those of MCAR data filled with 0, exactly; lower error where test "
    "rows miss cells completely at random.",
    condition="Holes are filled with 0, and kept cells are not scaled up (or test rows are scaled alike). Each pattern "
    "of holes has its own best predictor (Le Morvan et al. 2020), so one network is not the best there is.",
    rules=(
        Rule("masks", "cells on which dropout and the MCAR generator of one address differ", "equal"),
        Rule("objective", "loss of a linear model averaged over all 64 patterns of holes", "equal"),
        Rule("weights", "length of the weights fitted to 200 MCAR copies, against dropout's closed form", "equal"),
        Rule("gain", "test error without minus with feature dropout, 40 % missing, sd of the target", "above"),
        Rule("price", "test error with minus without, nothing missing, sd of the target", "shown"),
        Rule("indicators", "what telling the network where holes are brings beside it, 40 % missing", "shown"),
    ),
    experiment=experiment,
    seconds=12,
)  # fmt: skip

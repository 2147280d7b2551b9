"""Kinds of rows that are learned and one that was never shown: how good a committee's word is about both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.claims.data import images
from dropkit.claims.experiments.networks import Networks
from dropkit.committee.calibrate import Temperature
from dropkit.committee.information import entropy, mutual_information
from dropkit.committee.prediction import ClassificationPrediction
from dropkit.committee.ranking import auroc
from dropkit.committee.reliability import reliability

BINS = 15  # of the calibration error
MOST = 2000  # rows to test on, of each kind


@dataclass(frozen=True, slots=True)
class Kinds:
    """Rows of kinds that are learned, and rows of another kind.

    Attributes:
        x, y: (N, D) and (N,), to learn from.
        x_held, y_held: to calibrate on.
        x_test, y_test: of the same kinds.
        x_other: (n, D), of kinds that were never shown.
        said: what they are.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    x_held: NDArray[np.float32]
    y_held: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    x_other: NDArray[np.float32]
    said: str


@dataclass(frozen=True, slots=True)
class Quality:
    """How good a committee's word is.

    Attributes:
        information, entropy: chance that an unseen kind of row has more of it than a test row (AUROC).
        accuracy: share of test rows.
        before, after: calibration error on test rows, without and with the temperature of the calibration rows.
        spread: mean mutual information of test rows, nats.
    """

    information: float
    entropy: float
    accuracy: float
    before: float
    after: float
    spread: float


def kinds(rows: int) -> Kinds:
    """Fashion-MNIST against MNIST; where their files are not here, digits 0 to 4 against 5 to 9."""
    known, other = images("fashion_mnist"), images("mnist")
    x, y, x_test, y_test = known.x_train, known.y_train, known.x_test, known.y_test
    x_other = other.x_test[:MOST]
    said = f"{known.name} against {len(x_other):,} test images of {other.name}"
    if 8 in (known.side, other.side):
        x_other = x_test[y_test >= 5][:MOST]
        x, y, x_test, y_test = x[y < 5], y[y < 5], x_test[y_test < 5], y_test[y_test < 5]
        said = f"Classes 0 to 4 against {len(x_other)} rows of 5 to 9: {known.name}"
    x_test, y_test = x_test[:MOST], y_test[:MOST]
    order = np.random.default_rng([0, 3]).permutation(len(x))
    rows = min(rows, 3 * len(x) // 4)
    own, held = order[:rows], order[rows : rows + 1000]
    said += f"; {rows:,} rows to learn from, {len(held):,} to calibrate on, {len(x_test):,} of the same kinds to test"
    return Kinds(x[own], y[own], x[held], y[held], x_test, y_test, x_other, said)


def committees(networks: Networks, data: Kinds, members: int) -> list[list[Quality]]:
    """(R rates, S seeds): each network as a committee of its members."""
    asked = [
        torch.stack([torch.softmax(networks.outputs(part, member=m), dim=-1) for m in range(members)])
        for part in (data.x_test, data.x_held, data.x_other)
    ]  # each (M, R, S, N, C)
    return [
        [quality([part[:, r, s] for part in asked], data) for s in range(len(networks.seeds))]
        for r in range(len(networks.rates))
    ]


def ensembles_of(networks: Networks, data: Kinds, size: int) -> tuple[list[Quality], list[Quality]]:
    """Ensembles of so many networks that share no network, and the first network of each by itself."""
    asked = [
        torch.softmax(networks.outputs(part), dim=-1)[0] for part in (data.x_test, data.x_held, data.x_other)
    ]  # each (networks, N, C)
    ensembles, single = [], []
    for start in range(0, len(networks.seeds), size):
        ensembles.append(quality([part[start : start + size] for part in asked], data))
        # Twice the same network is a committee that agrees.
        single.append(quality([part[[start, start]] for part in asked], data))
    return ensembles, single


def quality(asked: Sequence[Tensor], data: Kinds) -> Quality:
    """Figures of one committee from its members' probabilities, (M, N, C) each: test, held and other rows."""
    test, held, other = asked
    prediction, truth = ClassificationPrediction(test), torch.from_numpy(data.y_test)
    temperature = Temperature.fit(ClassificationPrediction(held), torch.from_numpy(data.y_held))
    unseen = torch.arange(test.shape[1] + other.shape[1]) >= test.shape[1]
    both = torch.cat((test, other), dim=1).double()

    def detects(doubt: Tensor) -> float:
        area = auroc(doubt, unseen)
        return math.nan if area is None else area

    def error(asked: ClassificationPrediction) -> float:
        return reliability(asked.probabilities, truth, BINS).expected_calibration_error

    return Quality(
        detects(mutual_information(both)), detects(entropy(both.mean(dim=0))),
        float((prediction.label == truth).double().mean()), error(prediction), error(temperature.apply(prediction)),
        float(mutual_information(test.double()).mean()),
    )  # fmt: skip

"""Small reports without training anything: a seeded committee whose members scatter about the truth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from dropkit.committee.calibrate import ConformalInterval, Temperature
from dropkit.committee.prediction import ClassificationPrediction, RegressionPrediction
from dropkit.evaluation import (
    Split,
    compare,
    evaluate_classification,
    evaluate_regression,
    spread_by_members,
)
from dropkit.report import (
    ColumnSummary,
    DataSummary,
    FitReport,
    LearningCurves,
    ModelSummary,
    Search,
    Timing,
    Trial,
)

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
HOSTILE = "</svg><script>alert('x')</script>&\"$y_1$\x00\x1b\u202e"


def regression_committee(x, rng, members=16):
    """Members that see noisy weights; wider noise where the first column is large."""
    weights = np.arange(1, x.shape[1] + 1)
    samples = np.stack([x @ (weights + rng.normal(0, 0.3, len(weights))) for _ in range(members)])
    return RegressionPrediction(
        torch.tensor(samples), torch.tensor(np.tile(0.5 + x[:, 0] ** 2, (members, 1)))
    )


def class_committee(x, rng, classes, members=16):
    logits = np.stack(
        [x[:, :1] * np.arange(classes) + rng.normal(0, 0.7, (len(x), classes)) for _ in range(members)]
    )
    return ClassificationPrediction(torch.softmax(torch.tensor(logits), dim=-1))


def column_names(count: int, hostile: bool) -> list[str]:
    return [f"{HOSTILE} {k}" if hostile else f"column {k}" for k in range(count)]


def cells_of(names: list[str], x: np.ndarray, hostile: bool):
    def cells(position: int) -> Mapping[str, object]:
        value = HOSTILE if hostile else None
        return {name: value or round(float(x[position, k]), 2) for k, name in enumerate(names)}

    return cells


def regression_report(
    rows: int = 60, *, hostile: bool = False, compared: bool = True, seed: int = 0
) -> FitReport:
    rng = np.random.default_rng(seed)
    x = {part: rng.normal(size=(n, 3)) for part, n in (("train", 80), ("validation", 60), ("test", rows))}
    y = {part: v @ [1.0, 2.0, 3.0] + rng.normal(0, np.sqrt(0.5 + v[:, 0] ** 2)) for part, v in x.items()}
    calibration = ConformalInterval.fit(
        regression_committee(x["validation"], rng), torch.tensor(y["validation"]), LEVELS
    )
    prediction = regression_committee(x["test"], rng)
    names = column_names(3, hostile)
    return assembled(
        rows,
        "regression",
        names,
        hostile,
        held_out=evaluate_regression(
            y["test"], prediction, calibration, cells=cells_of(names, x["test"], hostile)
        ),
        members=spread_by_members(prediction),
        comparison=compare(prediction, calibration, *(Split(x[part], y[part]) for part in x))
        if compared
        else None,
    )


def classification_report(
    rows: int = 60, classes: int = 3, *, hostile: bool = False, compared: bool = True, seed: int = 0
) -> FitReport:
    rng = np.random.default_rng(seed)
    x = {part: rng.normal(size=(n, 3)) for part, n in (("train", 80), ("validation", 60), ("test", rows))}
    y = {
        part: (v[:, :1] * np.arange(classes) + rng.gumbel(size=(len(v), classes))).argmax(axis=1)
        for part, v in x.items()
    }
    temperature = Temperature.fit(
        class_committee(x["validation"], rng, classes), torch.tensor(y["validation"])
    )
    prediction = temperature.apply(class_committee(x["test"], rng, classes))
    names = column_names(3, hostile)
    return assembled(
        rows,
        "classification",
        names,
        hostile,
        held_out=evaluate_classification(
            y["test"],
            prediction,
            [f"{HOSTILE} {k}" if hostile else f"class {k}" for k in range(classes)],
            cells=cells_of(names, x["test"], hostile),
        ),
        members=spread_by_members(prediction),
        comparison=compare(prediction, None, *(Split(x[part], y[part]) for part in x)) if compared else None,
    )


def assembled(rows, task, names, hostile, **parts) -> FitReport:
    trials = tuple(
        Trial(
            rate=rate,
            input_rate=0.0,
            width=32,
            weight_decay=1e-4,
            train_loss=0.5 + 0.3 * rate,
            validation_loss=0.9 + (rate - 0.3) ** 2,
            standard_error=0.05,
            gap=0.4 - 0.3 * rate + (rate - 0.3) ** 2,
            epochs=int(20 + 60 * rate),
        )
        for rate in (0.0, 0.1, 0.3, 0.5)
    )
    epochs = range(1, 31)
    return FitReport(
        data=DataSummary(
            source=HOSTILE if hostile else "house.csv",
            rows=140 + rows,
            training_rows=80,
            validation_rows=60,
            test_rows=rows,
            target=HOSTILE if hostile else "price",
            task=task,
            task_reason="the command said so",
            columns=tuple(
                ColumnSummary(
                    name, "number", missing=k, distinct=50, used=k < 2, note="constant" if k == 2 else ""
                )
                for k, name in enumerate(names)
            ),
            warnings=(f"{names[2]} was dropped",),
        ),
        model=ModelSummary(
            hidden=(32, 32),
            rate=0.3,
            input_rate=0.0,
            weight_decay=1e-4,
            members=16,
            parameters=1218,
            seed=7,
            epochs=21,
            versions=(("dropkit", "0.1.0"), ("torch", "2.13.0")),
            command="dropkit fit house.csv --target price --out model/ --seed 7",
        ),
        search=Search(trials, chosen=2),
        curves=LearningCurves(
            epoch=tuple(epochs),
            training=tuple(1 / e for e in epochs),
            validation=tuple(1 / e + 0.01 * e for e in epochs),
            best_epoch=10,
        ),
        timing=Timing(1.0, 2.0, 4.0),
        **parts,
    )

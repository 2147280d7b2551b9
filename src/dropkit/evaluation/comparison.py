"""What a user would pick instead, on the same held-out rows: constant, linear model, gradient boosting."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dropkit.committee.calibrate import ConformalInterval
from dropkit.committee.prediction import Prediction, RegressionPrediction
from dropkit.errors import OptionError
from dropkit.evaluation.held_out import evenly_spaced, scores
from dropkit.evaluation.measures import (
    ClassificationForecast,
    Floats,
    Measure,
    RegressionForecast,
    classification_forecast,
    classification_measures,
    paired_difference,
    regression_forecast,
    regression_measures,
)
from dropkit.evaluation.records import Score

TRAINING_ROWS = 200_000
ROWS_FOR_THREADS = 10_000
MOST_BOOSTED_CLASSES = 50  # gradient boosting grows a tree for each class and round; beyond, it is left out

MEAN, COMMONEST = "the plain mean", "the commonest class"

Rival = tuple[str, str, dict[str, Measure]]


@dataclass(frozen=True, slots=True)
class Competitor:
    """One line of the comparison.

    Attributes:
        name: of the model.
        detail: how it was set up.
        scores: its measures on the held-out rows.
        constant: whether it says the same about every row.
    """

    name: str
    detail: str
    scores: tuple[Score, ...]
    constant: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """All models on the same held-out rows, dropkit first.

    Attributes:
        models: dropkit, then the others.
        rows: held-out rows.
        training_rows: rows the others learned from.
        all_training_rows: rows dropkit learned from.
    """

    models: tuple[Competitor, ...]
    rows: int
    training_rows: int
    all_training_rows: int


@dataclass(frozen=True, slots=True)
class Split:
    """Encoded rows and their target.

    Attributes:
        x: (N, D) finite numbers; a memory map is fine.
        y: (N,) values, or class indices.
        rows: which of the N rows belong to the split, so that a large x is read only where it is used; None: all.
    """

    x: Any
    y: Any
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.y) if self.rows is None else len(self.rows)

    def thinned(self, most: int) -> Split:
        """At most so many of its rows, evenly spaced, in memory."""
        kept = evenly_spaced(len(self), most)
        chosen = kept if self.rows is None else np.asarray(self.rows)[kept]
        return Split(np.asarray(self.x[chosen]), np.asarray(self.y)[chosen])


def compare(
    prediction: Prediction,
    calibration: ConformalInterval | None,
    train: Split,
    validation: Split,
    test: Split,
    *,
    level: float = 0.9,
    detail: str = "committee of thinned networks",
    training_rows: int = TRAINING_ROWS,
) -> Comparison:
    """Train the alternatives and score everyone on the held-out rows.

    The alternatives for a number get Gaussian noise of constant width (root mean square of the residuals on
    the validation rows) and a split conformal interval from the same residuals.

    Args:
        prediction: the committee's for the rows of `test`, a temperature applied; its kind decides the task.
        calibration: conformal intervals for a number; None for classes.
        train: what everyone learned from.
        validation: what dropkit stopped and calibrated on; here it sets the noise and the intervals.
        test: held out.
        level: nominal level of the intervals.
        detail: what dropkit's line says about itself.
        training_rows: the alternatives learn from this many rows at most, evenly spaced.

    Raises:
        OptionError: a number without calibration.
    """
    learned_from = len(train)
    small, validation, test = (
        train.thinned(training_rows),
        validation.thinned(len(validation)),
        test.thinned(len(test)),
    )
    if isinstance(prediction, RegressionPrediction):
        if calibration is None:
            raise OptionError(
                "calibration=None was given for a number; intervals are part of the comparison."
            )
        y = np.asarray(test.y, dtype=np.float64)
        own = regression_measures(y, regression_forecast(prediction, calibration, y, level))
        others = regression_rivals(small, validation, test, level)
    else:
        forecast = classification_forecast(prediction)
        own = classification_measures(np.asarray(test.y, dtype=np.int64), forecast)
        others = classification_rivals(small, test, classes=forecast.probabilities.shape[1])
    lines = [Competitor("dropkit", detail, scores(own))]
    lines += [
        Competitor(name, what, against(own, measures), constant=name in (MEAN, COMMONEST))
        for name, what, measures in others
    ]
    return Comparison(tuple(lines), rows=len(test), training_rows=len(small), all_training_rows=learned_from)


def against(ours: Mapping[str, Measure], theirs: Mapping[str, Measure]) -> tuple[Score, ...]:
    """Their scores, each with the paired difference to ours."""
    return tuple(
        Score(name, measure.value, measure.standard_error, *paired_difference(ours[name], measure))
        for name, measure in theirs.items()
    )


def regression_rivals(train: Split, validation: Split, test: Split, level: float) -> list[Rival]:
    """Name, set-up and measures of the alternatives for a number."""
    from sklearn.dummy import DummyRegressor
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    models = [
        (
            "gradient boosting",
            "scikit-learn’s HistGradientBoostingRegressor, default settings",
            HistGradientBoostingRegressor(random_state=0),
        ),
        (
            "linear regression",
            "ridge, its strength by leave-one-out",
            make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-3, 5, 17))),
        ),
        (MEAN, "of the training rows", DummyRegressor()),
    ]
    y_validation, y_test = np.asarray(validation.y, dtype=np.float64), np.asarray(test.y, dtype=np.float64)
    out = []
    for name, detail, model in models:
        fit_quietly(model, train)
        residuals = y_validation - model.predict(validation.x)
        forecast = constant_noise_forecast(model.predict(test.x), residuals, level)
        out.append((name, detail, regression_measures(y_test, forecast)))
    return out


def constant_noise_forecast(mean: Floats, residuals: Floats, level: float) -> RegressionForecast:
    """A point prediction with Gaussian noise of one width and a split conformal interval.

    std = sqrt(mean of residual^2),    half width = the ceil((n + 1) level)-th smallest |residual|

    Args:
        mean: (n,) point predictions.
        residuals: (n_validation,) true minus predicted.
        level: nominal level of the interval.

    Source: Lei et al. 2018, arXiv:1604.04173, algorithm 2. With fewer residuals than the level asks for, the
    half width would be infinite; the largest residual stands in.
    """
    sizes = np.sort(np.abs(residuals))
    std = max(float(np.sqrt(np.mean(residuals**2))), float(np.finfo(np.float32).tiny))
    half = sizes[min(int(np.ceil((len(sizes) + 1) * level)), len(sizes)) - 1]
    return RegressionForecast(mean=mean, std=np.full(len(mean), std), lower=mean - half, upper=mean + half)


def classification_rivals(train: Split, test: Split, classes: int) -> list[Rival]:
    """Name, set-up and measures of the alternatives for a class; none where training rows hold one class only."""
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(train.y)) < 2:
        return []
    models = [
        (
            "gradient boosting",
            "scikit-learn’s HistGradientBoostingClassifier, default settings",
            HistGradientBoostingClassifier(random_state=0),
        ),
        (
            "logistic regression",
            "L2 penalty of strength 1",
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
        ),
        (COMMONEST, "with the class shares of the training rows", DummyClassifier(strategy="prior")),
    ]
    if classes > MOST_BOOSTED_CLASSES:
        del models[0]
    y_test = np.asarray(test.y, dtype=np.int64)
    out = []
    for name, detail, model in models:
        fit_quietly(model, train)
        # a class without a training row has no column in the model's answer
        probabilities = np.zeros((len(y_test), classes))
        probabilities[:, np.asarray(model.classes_, dtype=np.int64)] = model.predict_proba(test.x)
        out.append((name, detail, classification_measures(y_test, ClassificationForecast(probabilities))))
    return out


def fit_quietly(model: Any, train: Split) -> None:
    """Fit; a rival's solver that stops at its last iteration is no reason to disturb the user.

    A small table is fitted in one thread: waking the others costs more than they bring.
    """
    from threadpoolctl import threadpool_limits

    threads = 1 if len(train.y) < ROWS_FOR_THREADS else None
    with warnings.catch_warnings(), threadpool_limits(limits=threads):
        warnings.simplefilter("ignore")
        model.fit(train.x, train.y)

"""scikit-learn faces of the committee: `DropoutRegressor` and `DropoutClassifier`.

Both take arrays of numbers (NaN where a value is missing) and data frames with categories, booleans and dates.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_array,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from dropkit import training
from dropkit.committee import ClassificationPrediction, Committee, RegressionPrediction
from dropkit.committee.calibrated import LEVEL, CalibratedCommittee
from dropkit.errors import TableError
from dropkit.tables.cells import Column
from dropkit.tables.columns import describe_columns
from dropkit.tables.encoder import Encoder
from dropkit.training.fit import Effort
from dropkit.training.network import Likelihood


class _DropoutEstimator(BaseEstimator):
    """What both estimators share: from a table to a calibrated committee."""

    def __init__(
        self,
        rate: float | Literal["auto"] = "auto",
        *,
        members: int = 64,
        hidden: tuple[int, ...] | None = None,
        weight_decay: float | None = None,
        max_epochs: int | None = None,
        validation_fraction: float = 0.2,
        effort: Effort = "normal",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.rate = rate
        self.members = members
        self.hidden = hidden
        self.weight_decay = weight_decay
        self.max_epochs = max_epochs
        self.validation_fraction = validation_fraction
        self.effort = effort
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _fit(self, frame: pd.DataFrame, y: NDArray[Any], likelihood: Likelihood, classes: int | None) -> None:
        if len(frame) < 2:
            raise TableError(
                f"n_samples={len(frame)} was given; one row to learn from and one to validate are the least."
            )
        check_consistent_length(frame, y)
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(1 << 31)
        self.encoder_ = Encoder.fit(frame, self._columns(frame))
        encoded = self.encoder_.transform(frame).matrix
        self.fit_ = training.fit(
            encoded, y, likelihood=likelihood, classes=classes, rate=self.rate, seed=int(seed), hidden=self.hidden,
            weight_decay=self.weight_decay, max_epochs=self.max_epochs, validation_share=self.validation_fraction,
            effort=self.effort,
        )  # fmt: skip
        committee = Committee(self.fit_.network, self.members, int(seed), likelihood, allow=("no spread",))
        held = self.fit_.validation_rows
        self.committee_ = CalibratedCommittee.fit(committee, encoded[held], y[held])
        self.n_iter_ = max(1, self.fit_.best_epoch)

    def _frame(self, x: ArrayLike, *, reset: bool) -> pd.DataFrame:
        """The rows under named columns: an array's are checked to be numbers, a frame's are described."""
        self._is_frame = False
        if isinstance(x, pd.DataFrame) and not all(map(pd.api.types.is_numeric_dtype, x.dtypes)):
            self._is_frame = True
            validate_data(self, x, reset=reset, skip_check_array=True)
            return x.reset_index(drop=True)
        checked = validate_data(
            self, x, reset=reset, dtype="numeric", ensure_all_finite="allow-nan", ensure_min_samples=1
        )
        names = getattr(self, "feature_names_in_", [f"x{i}" for i in range(checked.shape[1])])
        return pd.DataFrame(checked.astype(np.float64), columns=[str(name) for name in names])

    def _columns(self, frame: pd.DataFrame) -> tuple[Column, ...]:
        if self._is_frame:
            return describe_columns(frame)
        # Columns of an array were chosen by hand: all are numbers, and none is left out.
        return tuple(describe_columns(frame, kinds=dict.fromkeys(frame.columns, "number"), keep_all=True))

    def _encode(self, x: ArrayLike) -> NDArray[np.float32]:
        check_is_fitted(self)
        return self.encoder_.transform(self._frame(x, reset=False)).matrix


class DropoutRegressor(RegressorMixin, _DropoutEstimator):
    """A committee of thinned networks that predicts a number, and says how sure it is.

    Each member gives a mean and a noise variance: mean = average of means, total variance = variance between
    members (epistemic) + average of their noise (aleatoric). Intervals are conformal, fitted on held-out rows.

    Args:
        rate: chance to drop a hidden unit, or "auto": rates, widths and weight decay compete on held-out likelihood.
        members: networks in the committee.
        hidden: width of each hidden layer; None lets it compete.
        weight_decay: None lets it compete.
        max_epochs: passes over the rows at most; None chooses from their number.
        validation_fraction: rows held out to stop, to choose and to calibrate.
        effort: "quick", "normal" or "thorough": how many candidates and epochs.
        random_state: of the split, the weights and the masks; an integer makes two fits equal.

    Attributes:
        encoder_: how columns become numbers.
        fit_: the training record, with the search (`fit_.search`) and the curves.
        committee_: the calibrated committee.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> import dropkit as dk
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = dk.DropoutRegressor(rate=0.1, max_epochs=5, random_state=0).fit(X[:400], y[:400])
        >>> mean, std = model.predict(X[400:], return_std=True)
        >>> mean.shape, bool((std > 0).all())
        ((42,), True)

    Source: Gal and Ghahramani 2016, arXiv:1506.02142; Kendall and Gal 2017, arXiv:1703.04977 (the split of variance).
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn from rows X (N, D) and their values y (N,).

        Raises:
            DropkitError: a child of it that is also a ValueError; the message says what was given and what is allowed.
        """
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None.")
        frame = self._frame(X, reset=True)
        values = column_or_1d(check_array(y, ensure_2d=False, dtype=np.float64, input_name="y"), warn=True)
        self._fit(frame, values, "gaussian", None)
        return self

    def predict(self, X: ArrayLike, return_std: bool = False) -> Any:
        """Mean (N,), and with `return_std` the standard deviation of a new value (N,) too, in the unit of y."""
        prediction = self.predict_committee(X)
        mean = prediction.mean.double().numpy()
        return (mean, prediction.std.double().numpy()) if return_std else mean

    def predict_interval(self, X: ArrayLike, level: float = LEVEL) -> NDArray[np.float64]:
        """Lower and upper end (N, 2) of an interval that holds a share `level` of new values.

        Conformal for the levels 0.5, 0.6, ... 0.9, 0.95 that had enough validation rows, else the committee's own.
        """
        prediction = self.predict_committee(X)
        interval = self.committee_.interval(prediction, level)
        return np.stack([end.double().numpy() for end in interval], axis=1)

    def predict_committee(self, X: ArrayLike) -> RegressionPrediction:
        """All that the committee says: samples, epistemic and aleatoric variance, Monte Carlo error."""
        encoded = self._encode(X)
        prediction = self.committee_.predict(encoded)
        assert isinstance(prediction, RegressionPrediction)
        return prediction


class DropoutClassifier(ClassifierMixin, _DropoutEstimator):
    """A committee of thinned networks that predicts a class, and says how sure it is.

    Probabilities are the members' average, tempered on held-out rows. Arguments and attributes are those of
    `DropoutRegressor`; `classes_` lists the labels in the order of the probabilities.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> import dropkit as dk
        >>> X, y = load_iris(return_X_y=True)
        >>> model = dk.DropoutClassifier(rate=0.1, max_epochs=10, random_state=0).fit(X, y)
        >>> model.predict_proba(X[:2]).shape
        (2, 3)

    Source: Gal and Ghahramani 2016, arXiv:1506.02142; Guo et al. 2017, arXiv:1706.04599 (temperature).
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn from rows X (N, D) and their labels y (N,).

        Raises:
            DropkitError: a child of it that is also a ValueError; the message says what was given and what is allowed.
        """
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None.")
        frame = self._frame(X, reset=True)
        labels = column_or_1d(y, warn=True)
        check_classification_targets(labels)
        self.classes_, indices = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise TableError(
                f"y with 1 class was given ({self.classes_[0]!r}); a classifier needs at least two."
            )
        self._fit(frame, indices.astype(np.int64), "categorical", len(self.classes_))
        return self

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The likeliest label of each row (N,)."""
        prediction = self.predict_committee(X)
        return self.classes_[prediction.label.numpy()]

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probability of each class (N, C), columns as in `classes_`."""
        return self.predict_committee(X).probabilities.double().numpy()

    def predict_committee(self, X: ArrayLike) -> ClassificationPrediction:
        """All that the committee says: members' probabilities, entropy, mutual information."""
        encoded = self._encode(X)
        prediction = self.committee_.predict(encoded)
        assert isinstance(prediction, ClassificationPrediction)
        return prediction

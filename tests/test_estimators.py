"""The scikit-learn faces: scikit-learn's own checks, and what the committee adds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import check_estimator

import dropkit as dk
from dropkit.errors import DropkitError, OptionError, TableError

QUICK = {"rate": 0.2, "max_epochs": 15, "random_state": 0}


@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")  # the checks warn about themselves
@pytest.mark.parametrize("estimator", [dk.DropoutRegressor(), dk.DropoutClassifier()])
def test_scikit_learns_own_checks_pass_whole(estimator):
    results = check_estimator(estimator, on_skip=None, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] not in ("passed", "skipped")}
    skipped = {r["check_name"] for r in results if r["status"] == "skipped"}
    assert not failed
    assert skipped <= {"check_array_api_input"}  # it runs where scipy's array interface is switched on
    assert len(results) > 45


@pytest.fixture(scope="module")
def diabetes():
    X, y = load_diabetes(return_X_y=True)
    return X, y, dk.DropoutRegressor(**QUICK).fit(X[:350], y[:350])


def test_mean_and_spread_are_in_the_unit_of_the_target(diabetes):
    X, y, model = diabetes
    mean, std = model.predict(X[350:], return_std=True)
    assert np.sqrt(np.mean((mean - y[350:]) ** 2)) < y.std()
    assert y.std() / 5 < std.mean() < y.std() * 2
    prediction = model.predict_committee(X[350:])
    assert (prediction.epistemic > 0).all()
    torch.testing.assert_close(prediction.total, prediction.epistemic + prediction.aleatoric)


def test_intervals_grow_with_their_level(diabetes):
    X, _, model = diabetes
    narrow, wide = (np.diff(model.predict_interval(X[350:], level), axis=1) for level in (0.5, 0.9))
    assert (wide > narrow).all()


def test_two_fits_with_one_seed_are_equal_bit_for_bit_and_another_seed_is_not(diabetes):
    X, y, model = diabetes
    again = dk.DropoutRegressor(**QUICK).fit(X[:350], y[:350])
    other = dk.DropoutRegressor(**{**QUICK, "random_state": 1}).fit(X[:350], y[:350])
    assert np.array_equal(again.predict(X), model.predict(X))
    assert not np.array_equal(other.predict(X), model.predict(X))


def test_a_row_is_predicted_alike_in_any_company(diabetes):
    X, _, model = diabetes
    whole = model.predict(X)
    np.testing.assert_allclose(np.concatenate([model.predict(X[:7]), model.predict(X[7:])]), whole, rtol=1e-5)


def test_a_frame_with_categories_and_gaps_is_learned_from():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "size": np.where(rng.random(200) < 0.1, np.nan, rng.normal(size=200)),
            "colour": rng.choice(["red", "green", "blue"], 200),
            "new": rng.random(200) < 0.5,
        }
    )
    y = (frame["colour"] == "red") * 3.0 + frame["size"].fillna(0) + rng.normal(0, 0.1, 200)
    model = dk.DropoutRegressor(rate=0.05, max_epochs=40, random_state=0).fit(frame, y)
    assert model.score(frame, y) > 0.7
    assert model.predict(frame.assign(colour="violet")).shape == (200,)
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame.drop(columns="size"))


def test_labels_come_back_as_they_were_given():
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    model = dk.DropoutClassifier(**{**QUICK, "max_epochs": 40}).fit(X, names)
    assert set(model.predict(X)) <= set(names)
    assert model.score(X, names) > 0.9
    probabilities = model.predict_proba(X)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert (model.classes_[probabilities.argmax(axis=1)] == model.predict(X)).all()


def test_it_works_in_scikit_learns_tools():
    X, y = load_iris(return_X_y=True)
    scores = cross_val_score(dk.DropoutClassifier(**{**QUICK, "max_epochs": 40}), X, y, cv=3)
    assert scores.min() > 0.8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rate": 1.5}, DropkitError, r"rate=1\.5"),
        ({"members": 1}, OptionError, "members=1"),
        ({"effort": "heroic"}, OptionError, "heroic"),
        ({"validation_fraction": 0.0}, OptionError, "strictly between"),
    ],
)
def test_a_wrong_option_is_said(options, error, message):
    X, y = load_iris(return_X_y=True)
    with pytest.raises(error, match=message):
        dk.DropoutRegressor(**{**QUICK, **options}).fit(X, y)


def test_too_little_is_said():
    with pytest.raises(TableError, match="n_samples=1"):
        dk.DropoutRegressor().fit([[1.0]], [1.0])
    with pytest.raises(TableError, match="1 class"):
        dk.DropoutClassifier().fit([[1.0], [2.0]], ["a", "a"])

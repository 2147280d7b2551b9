"""The batches of networks that the experiments train, against single networks, torch modules and slow sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional as F

from dropkit import masks
from dropkit.claims.experiments.networks import (
    class_loss,
    cross_entropy,
    drawn_folds,
    error_percent,
    line,
    over_seeds,
    train,
)
from dropkit.errors import OptionError

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((60, 5)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(np.int64) + (X[:, 2] > 1)
RATES, SEEDS = (0.0, 0.5), (3, 4)


@pytest.fixture(scope="module")
def networks():
    return train(
        X,
        Y,
        hidden=(7, 6),
        rates=RATES,
        seeds=SEEDS,
        epochs=4,
        rows=40,
        batch=10,
        input_rate=0.2,
        learning_rate=0.02,
    )


def test_outputs_are_those_of_the_torch_modules(networks):
    together = networks.outputs(X)
    assert together.shape == (2, 2, 60, 3)
    for r in range(2):
        for s in range(2):
            with torch.no_grad():
                alone = networks.network(r, s)(torch.from_numpy(X))
            torch.testing.assert_close(together[r, s], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("member", [0, 5])
def test_a_member_is_the_committees(networks, member):
    together = networks.outputs(X, member=member)
    for r in range(2):
        with torch.no_grad(), masks(seed=0, member=member):
            alone = networks.network(r, 1)(torch.from_numpy(X))
        torch.testing.assert_close(together[r, 1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.equal(together[1], networks.outputs(X)[1])


def test_units_that_are_removed_unscaled_are_zeros_and_nothing_else(networks):
    h = torch.from_numpy(X)
    network = networks.network(0, 0)  # trained without dropout: inputs stay
    with torch.no_grad():
        for i, width in ((1, 7), (2, 6)):
            h = torch.relu(getattr(network, f"hidden{i}")(h))
            with masks(seed=0, member=2):
                layer = getattr(networks.network(1, 0), f"dropout{i}")  # rate 0.5 at the same site
                keep = layer(torch.ones(1, width)) != 0
            h = h * keep
        expected = network.output(h)
    found = networks.outputs(X, member=2, rate=0.5, scaled=False)[0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_last_hidden_units_are_what_the_output_layer_reads(networks):
    units = networks.last_hidden(X)
    for r in range(2):
        with torch.no_grad():
            alone = networks.network(r, 0)[:-1](torch.from_numpy(X))
        torch.testing.assert_close(units[r, 0], alone, rtol=1e-5, atol=1e-5)


def test_a_network_does_not_depend_on_who_trains_beside_it(networks):
    alone = train(
        X, Y, hidden=(7, 6), rates=(0.5,), seeds=(4,), epochs=4, rows=40, batch=10, input_rate=0.2,
        learning_rate=0.02,
    )  # fmt: skip
    torch.testing.assert_close(alone.outputs(X)[0, 0], networks.outputs(X)[1, 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.train_losses[0, 0], networks.train_losses[1, 1], rtol=1e-4, atol=1e-5)


def test_training_losses_are_of_the_seeds_own_rows_without_masks(networks):
    for s, fold in enumerate(drawn_folds(60, SEEDS, 40)):
        expected = cross_entropy(networks.outputs(X[fold.train]), Y[fold.train])[:, s]
        torch.testing.assert_close(networks.train_losses[:, s], expected, rtol=1e-5, atol=1e-6)


def test_averages_over_one_step_are_the_weights_and_over_many_are_not():
    def outputs(average):
        return train(
            X, Y, hidden=(4,), rates=(0.0,), seeds=(0,), epochs=3, batch=20, average=average
        ).outputs(X)

    assert torch.equal(outputs(1), outputs(0))
    assert not torch.allclose(outputs(6), outputs(0))


def test_folds_are_one_for_each_seed():
    with pytest.raises(OptionError, match="2 folds and 1 seeds"):
        train(X, Y, hidden=(4,), rates=(0.0,), seeds=(0,), epochs=1, folds=drawn_folds(60, (0, 1)))


@given(
    length=st.integers(4, 60),
    seed=st.integers(0, 99),
    rows=st.none() | st.integers(1, 80),
    data=st.data(),
)
def test_drawn_rows_are_distinct_and_never_those_that_validate(length, seed, rows, data):
    held = np.array(sorted(data.draw(st.sets(st.integers(0, length - 1), max_size=length // 2))), np.int64)
    first, other = drawn_folds(length, (seed, seed + 1), rows, held)
    free = length - len(held)
    assert len(set(first.train)) == len(first.train) == (free if rows is None else min(rows, free))
    assert not set(first.train) & set(held)
    assert (np.diff(first.train) > 0).all()
    assert first.stream == seed
    assert other.stream == seed + 1
    assert np.array_equal(drawn_folds(length, (seed,), rows, held)[0].train, first.train)


def test_seeds_draw_rows_of_their_own():
    first, second = drawn_folds(1000, (0, 1), 20)
    assert not np.array_equal(first.train, second.train)


@given(st.integers(0, 2**31))
@settings(max_examples=20)
def test_losses_and_errors_are_torchs(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 11, 4, generator=generator)
    y = torch.randint(4, (11,), generator=generator).numpy()
    for r in range(2):
        for s in range(3):
            expected = F.cross_entropy(logits[r, s].double(), torch.from_numpy(y))
            torch.testing.assert_close(cross_entropy(logits.double(), y)[r, s], expected)
            wrong = sum(int(row.argmax()) != label for row, label in zip(logits[r, s], y, strict=True))
            assert float(error_percent(logits, y)[r, s]) == pytest.approx(100 * wrong / 11)
    torch.testing.assert_close(class_loss(logits.log_softmax(-1), y), cross_entropy(logits, y))


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
def test_figures_and_lines_carry_students_interval(values):
    found = over_seeds(values, predicted=1.0)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=1.0)
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    assert found.standard_error == pytest.approx(stats.sem(values), abs=1e-9)
    assert (found.degrees, found.predicted) == (len(values) - 1, 1.0)
    drawn = line("name", (2.0,), torch.tensor([values], dtype=torch.float64))
    assert drawn.y[0] == pytest.approx(np.mean(values), abs=1e-9)
    assert drawn.error[0] == pytest.approx((high - low) / 2 * stats.sem(values), abs=1e-9)

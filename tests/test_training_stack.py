from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import dropkit as dk
from dropkit.errors import OptionError, ProbabilityError
from dropkit.training import Fold, NetworkSpec, Plan, build_network, committee_nll, gaussian_nll, train_stack
from dropkit.training.program import site_draw, training_noise
from dropkit.training.rows import epoch_rows

ROWS, INPUTS = 90, 4
PLAN = Plan(max_epochs=6, batch=16, patience=3, average=0, members=8)


def table(seed=0):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((ROWS, INPUTS)).astype(np.float32)
    y = 40 + 6 * np.sin(2 * x[:, 0]) + 3 * x[:, 1] + generator.standard_normal(ROWS)
    return x, y


def spec(rate=0.2, input_rate=0.1, hidden=(12, 12), likelihood="gaussian", outputs=2):
    return NetworkSpec(INPUTS, hidden, outputs, rate, input_rate, likelihood)


FOLD = Fold(np.arange(20, 90), np.arange(20))
OTHER = Fold(np.r_[0:50, 70:90], np.arange(50, 70), stream=1)


def same_weights(a, b, **tolerance):
    for (w, bias), (w2, bias2) in zip(a.weights, b.weights, strict=True):
        torch.testing.assert_close(w, w2, **tolerance)
        torch.testing.assert_close(bias, bias2, **tolerance)


@pytest.mark.parametrize("average", [0, 20])
def test_a_network_in_a_stack_is_the_network_trained_alone(average):
    x, y = table()
    plan = replace(PLAN, average=average)
    settings = [(0.0, 0.0, 0.0, 0), (0.3, 0.1, 0.5, 1), (0.3, 0.0, 0.01, 0), (0.05, 0.2, 0.01, 1)]
    specs = [spec(rate, input_rate) for rate, input_rate, _, _ in settings]
    together = train_stack(
        x, y, specs, [s[2] for s in settings], [FOLD, OTHER], [s[3] for s in settings], plan=plan, seed=7
    )
    for k, (_, _, decay, fold) in enumerate(settings):
        alone = train_stack(x, y, [specs[k]], [decay], [(FOLD, OTHER)[fold]], [0], plan=plan, seed=7)
        assert together.trained[k].curve.epochs == alone.trained[0].curve.epochs
        assert together.trained[k].curve.best_epoch == alone.trained[0].curve.best_epoch
        same_weights(together.trained[k], alone.trained[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            together.trained[k].row_loss, alone.trained[0].row_loss, rtol=1e-3, atol=1e-4
        )


def test_a_step_is_that_of_the_plain_module_with_its_own_dropout_layers():
    """One epoch of the stack against torch.optim.AdamW on the module, with masks from the layers themselves."""
    x, y = table()
    plan = replace(PLAN, max_epochs=1, average=0, members=0)
    one = spec(0.4, 0.25)
    fold = Fold(FOLD.train, np.zeros(0, np.int64))
    trained = train_stack(x, y, [one], [0.3], [fold], [0], plan=plan, seed=3).trained[0]
    fresh = train_stack(x, y, [one], [0.3], [fold], [0], plan=plan, seed=3, epochs=[0]).trained[0]
    network = fresh.network().train()
    weights = [p for name, p in network.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}],
        lr=plan.learning_rate,
    )
    for step, rows in enumerate(epoch_rows([fold], 70 // 16, 16, 3, 1)[0]):
        with dk.masks(seed=3, step=step, samples=torch.from_numpy(rows)):
            outputs = network(torch.from_numpy(x[rows]))
        optimizer.zero_grad()
        gaussian_nll(outputs, torch.from_numpy(y[rows]).float()).mean().backward()
        optimizer.step()
    expected = [layer for layer in network if isinstance(layer, nn.Linear)]
    for (weight, bias), layer in zip(trained.weights, expected, strict=True):
        torch.testing.assert_close(weight, layer.weight.detach(), rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(bias, layer.bias.detach(), rtol=1e-3, atol=2e-5)


def test_the_noise_of_a_stack_is_that_of_the_layers():
    rows = torch.tensor([[5, 900, 3], [7, 5, 1 << 33]])
    rates = torch.tensor([0.25, 0.6], dtype=torch.float64)
    key = site_draw("dropout1", seed=11).tensors()[0][None]
    noise = training_noise(rates, rows, 20, key=key, step=4)
    for k in range(2):
        with dk.masks(seed=11, step=4, samples=rows[k]):
            expected = dk.functional.dropout(torch.ones(3, 20), float(rates[k]), site="dropout1")
        assert torch.equal(noise[k], expected)
    shared = training_noise(rates, rows[:1], 20, key=key, step=4)
    assert torch.equal(shared[0], noise[0])
    assert not ((shared[0] == 0) & (shared[1] > 0)).any()  # a higher rate drops a superset


def test_the_committee_loss_is_that_of_the_public_committee():
    x, y = table()
    trained = train_stack(x, y, [spec(0.1, 0.2), spec(0.3)], [0.0, 0.0], [FOLD], [0, 0], plan=PLAN, seed=5)
    trained = trained.trained[1]
    network = trained.network()
    rows, target = torch.from_numpy(x[FOLD.validation]), torch.from_numpy(y[FOLD.validation]).float()
    members = []
    for member in range(PLAN.members):
        with dk.masks(seed=5, member=member), torch.no_grad():
            members.append(gaussian_nll(network(rows), target))
    torch.testing.assert_close(trained.row_loss, committee_nll(torch.stack(members)), rtol=1e-3, atol=1e-4)
    assert trained.committee_loss == pytest.approx(float(trained.row_loss.mean()))


def test_two_runs_are_equal_bit_for_bit_and_another_seed_is_not():
    x, y = table()
    runs = [
        train_stack(x, y, [spec(0.1), spec(0.3)], [0.0, 0.1], [FOLD, OTHER], [0, 1], plan=PLAN, seed=seed)
        for seed in (1, 1, 2)
    ]
    for a, b in zip(runs[0].trained, runs[1].trained, strict=True):
        same_weights(a, b, rtol=0, atol=0)
        assert a.curve == b.curve
    assert not torch.equal(runs[0].trained[0].weights[0][0], runs[2].trained[0].weights[0][0])


def test_a_memory_mapped_file_gives_what_the_array_gives(tmp_path):
    x, y = table()
    path = tmp_path / "x.bin"
    x.tofile(path)
    mapped = np.memmap(path, np.float32, "r", shape=x.shape)
    a = train_stack(x, y, [spec()], [0.0], [FOLD], [0], plan=PLAN, seed=1).trained[0]
    b = train_stack(mapped, y, [spec()], [0.0], [FOLD], [0], plan=PLAN, seed=1).trained[0]
    same_weights(a, b, rtol=0, atol=0)


def overfitting(progress=None, patience=4):
    """Few rows of noise and a large network: the validation loss turns soon, at another epoch for each rate."""
    generator = np.random.default_rng(3)
    x, y = generator.standard_normal((60, INPUTS)).astype(np.float32), generator.standard_normal(60)
    folds = [Fold(np.arange(30), np.arange(30, 60))]
    specs = [spec(rate, 0.0, (40, 40)) for rate in (0.0, 0.1, 0.3, 0.6)]
    plan = Plan(max_epochs=120, batch=10, patience=patience, average=0, members=0)
    return (
        x,
        y,
        folds[0],
        train_stack(x, y, specs, [0.0] * 4, folds, [0] * 4, plan=plan, seed=0, progress=progress),
    )


def test_the_weights_are_those_of_the_best_epoch():
    x, y, fold, result = overfitting()
    for trained in result.trained:
        curve = trained.curve
        assert curve.validation[curve.best] == min(curve.validation)
        assert curve.best_epoch < curve.epochs[-1]  # else this shows nothing
        network = trained.network()
        for rows, expected in ((fold.validation, curve.validation), (fold.train, curve.train)):
            with torch.no_grad():
                loss = gaussian_nll(
                    network(torch.from_numpy(x[rows])), torch.from_numpy(y[rows]).float()
                ).mean()
            assert float(loss) == pytest.approx(expected[curve.best], rel=1e-3, abs=1e-3)


def test_each_network_stops_by_its_own_patience_and_leaves_the_stack():
    live = []
    _, _, _, result = overfitting(progress=lambda event: live.append(event.live))
    for trained in result.trained:
        assert (
            trained.curve.epochs[-1] - trained.curve.best_epoch == 5
        )  # patience 4, and the look that tips it
    ends = [trained.curve.epochs[-1] for trained in result.trained]
    assert len(set(ends)) > 1
    assert len(live) == max(ends)
    assert live == sorted(live, reverse=True)
    # Work is saved: a stack that kept stopped networks would have cost max(ends) epochs for each.
    epoch = 6 * 3 * 10 * (INPUTS * 40 + 40 * 40 + 40 * 2)
    assert result.operations < epoch * 4 * max(ends)


def test_networks_may_end_at_epochs_of_their_own():
    x, y = table()
    fold = Fold(FOLD.train, np.zeros(0, np.int64))
    both = train_stack(x, y, [spec(), spec()], [0.0, 0.0], [fold], [0, 0], plan=PLAN, seed=1, epochs=[2, 5])
    for k, end in enumerate(
        (2, 5)
    ):  # the second goes on in a smaller stack, with the optimizer's moments it had
        alone = train_stack(x, y, [spec()], [0.0], [fold], [0], plan=PLAN, seed=1, epochs=[end])
        same_weights(both.trained[k], alone.trained[0], rtol=1e-4, atol=1e-6)
    assert [t.curve.epochs[-1] for t in both.trained] == [2, 5]
    assert not torch.equal(both.trained[0].weights[0][0], both.trained[1].weights[0][0])


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_leaves_the_best_until_then(at):
    x, y = table()

    def stop(event):
        if event.epoch == at:
            raise KeyboardInterrupt

    cut = train_stack(x, y, [spec()], [0.0], [FOLD], [0], plan=PLAN, seed=1, progress=stop)
    short = train_stack(x, y, [spec()], [0.0], [FOLD], [0], plan=replace(PLAN, max_epochs=at), seed=1)
    assert cut.interrupted
    assert not short.interrupted
    same_weights(cut.trained[0], short.trained[0], rtol=0, atol=0)
    assert torch.isfinite(cut.trained[0].row_loss).all()


def test_weight_decay_shrinks_weights_of_its_own_network_alone():
    x, y = table()
    fold = Fold(FOLD.train, np.zeros(0, np.int64))  # no early stopping: the last epoch's weights
    result = train_stack(x, y, [spec(), spec(), spec()], [0.0, 5.0, 0.0], [fold], [0] * 3, plan=PLAN, seed=1)
    sizes = [float(t.weights[0][0].norm()) for t in result.trained]
    assert sizes[1] < 0.8 * sizes[0]
    assert sizes[0] == sizes[2]


def test_a_class_network_learns_its_classes():
    generator = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = (np.eye(3, INPUTS)[y] * 4 + generator.standard_normal((90, INPUTS))).astype(np.float32)
    one = spec(0.1, 0.0, likelihood="categorical", outputs=3)
    trained = train_stack(x, y, [one], [0.0], [FOLD], [0], plan=replace(PLAN, max_epochs=30), seed=0)
    (trained,) = trained.trained
    network = trained.network()
    assert trained.committee_loss < 0.4
    with torch.no_grad():
        assert (network(torch.from_numpy(x)).argmax(1).numpy() == y).mean() > 0.9


def test_names_and_keys_do_not_depend_on_the_rates():
    networks = [build_network(spec(rate, input_rate)) for rate, input_rate in ((0, 0), (0.5, 0), (0.2, 0.1))]
    keys = {tuple(n.state_dict()) for n in networks}
    assert len(keys) == 1
    sites = {tuple(layer.site for layer in n if isinstance(layer, dk.nn.Dropout)) for n in networks}
    assert sites == {spec().sites}
    assert dk.nn.name_sites(networks[0]) == spec().sites


def test_a_target_far_from_zero_comes_back_in_its_own_unit():
    head = build_network(spec(0.0, 0.0), location=1e6, scale=5.0)[-1]
    mean, log_variance = head(torch.tensor([[2.0, 0.0]])).unbind(-1)
    assert float(mean) == 1e6 + 10
    assert float(log_variance) == pytest.approx(2 * np.log(5), abs=0.01)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"rate": 1.5}, ProbabilityError),
        ({"input_rate": float("nan")}, ProbabilityError),
        ({"likelihood": "poisson"}, OptionError),
        ({"outputs": 3}, OptionError),
        ({"hidden": (4, 0)}, OptionError),
    ],
)
def test_a_spec_that_cannot_be_is_refused(change, error):
    with pytest.raises(error):
        replace(spec(), **change)

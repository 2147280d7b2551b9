"""Training is timed only where both sides train the same networks."""

from __future__ import annotations

import pytest
import torch

from dropkit.bench import fitting
from dropkit.bench.rows import fitting_rows
from dropkit.errors import BrokenContractError

STEP, SEARCH = (16, 3, 16), (3, 2, 60, 3)


def test_both_sides_take_the_same_steps_and_search_the_same_networks():
    fitting.stepping(STEP, 0.1).check()
    fitting.searching(SEARCH).check()


class Wrong:
    """Plain networks with one thing changed."""

    class Rate(fitting.PlainNetwork):
        def __init__(self, spec, weights, plan, decay):
            super().__init__(spec, weights, plan, decay)
            for layer in self.network:
                if isinstance(layer, torch.nn.Dropout):
                    layer.p = 0.0

    class Decay(fitting.PlainNetwork):
        def __init__(self, spec, weights, plan, decay):
            super().__init__(spec, weights, plan, 200 * decay + 5)

    class Rows(fitting.PlainNetwork):
        def step(self, x, y):
            return super().step(x.flip(0), y)

    class Masks(fitting.PlainNetwork):
        def look(self, rows, members=0):
            return super().look(rows)

    class Weights(fitting.PlainNetwork):
        def look(self, rows, members=0):
            self.averages = [p.detach().clone() + 0.1 for p in self.parameters]
            return super().look(rows, members)


@pytest.mark.parametrize(
    ("wrong", "make", "match"),
    [
        (Wrong.Rate, lambda: fitting.stepping(STEP, 0.1), "the peer: dropout at rate 0.1 does not act"),
        (Wrong.Decay, lambda: fitting.stepping(STEP, 0.1), "the steps are others than torch's"),
        (Wrong.Rows, lambda: fitting.stepping(STEP, 0.1), "the steps are others than torch's"),
        (Wrong.Rows, lambda: fitting.searching(SEARCH), "the networks are others"),
        (Wrong.Masks, lambda: fitting.searching(SEARCH), "the peer: the committee has no masks"),
        (Wrong.Weights, lambda: fitting.searching(SEARCH), "the networks are others"),
    ],
)
def test_other_work_is_not_timed(monkeypatch, wrong, make, match):
    monkeypatch.setattr(fitting, "PlainNetwork", wrong)
    with pytest.raises(BrokenContractError, match=match):
        make().check()


def test_a_step_without_masks_is_not_timed(monkeypatch):
    from dropkit.training import stack

    noise = stack.training_noise
    monkeypatch.setattr(
        stack, "training_noise", lambda *args, **options: torch.ones_like(noise(*args, **options))
    )
    with pytest.raises(BrokenContractError, match=r"ours: dropout at rate 0\.1 does not act"):
        fitting.stepping(STEP, 0.1).check()


def test_every_width_that_was_promised_has_its_row():
    rows = {row.name: row for row in fitting_rows()}
    assert [rows[f"fit-step-{width}"].shape[2] for width in (32, 128, 512, 2048)] == [32, 128, 512, 2048]
    assert all(rows[f"fit-step-{width}"].target == 1 for width in (32, 128, 512, 2048))
    assert rows["fit-search"].shape[:2] == (20, 5)
    assert rows["fit-search"].target == 5

"""How far predictions move when one training row is another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.errors import OptionError
from dropkit.measure.fitting import fit, fresh
from dropkit.measure.linear import LinearModel, linear_model
from dropkit.measure.losses import LossFunction
from dropkit.measure.records import Measurement, said_of_prediction, with_error
from dropkit.measure.sampling import check_error, check_seed, check_whole, mean_and_error
from dropkit.measure.subject import subject_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability(Measurement):
    """Root mean square change of the predictions on the rows when the label and inputs of one row are another's.

    `predicted`, `measured` and `standard_error` are of training with dropout, means over the rows that were replaced.

    Attributes:
        without, without_error: the same, trained without dropout.
        without_predicted: closed form; None where there is none.
        largest, largest_without: largest change of any prediction.
        replaced: how many rows were replaced, one at a time.
    """

    without: float
    without_error: float
    without_predicted: float | None
    largest: float
    largest_without: float
    replaced: int

    def to_text(self) -> str:
        """With dropout against without."""
        return (
            f"Replacing one training row moves predictions by "
            f"{with_error(self.measured, self.standard_error)} with dropout "
            f"{said_of_prediction(self.predicted, self.formula)} and by "
            f"{with_error(self.without, self.without_error)} without "
            f"(root mean square; at most {self.largest:.4g} and {self.largest_without:.4g})."
        )


def stability(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossFunction | None = None,
    members: int = 4,
    seed: int = 0,
    epochs: int = 300,
    learning_rate: float = 0.01,
    tolerance: float | None = None,
) -> Stability:
    """Train copies on the rows, and again with one row replaced by a copy of another: how far predictions move.

    For a linear model with squared error both fits are known: fitted = S y, with S from
    (X'X + p/(1-p) diag(X'X))^-1.

    Args:
        model, x, y, loss: as in `penalty`. Weights are drawn anew (`reset_parameters`), the same for all copies.
        members: rows that are replaced, one at a time; each trains two copies.
        seed: of rows, weights and masks.
        epochs: steps on all rows at once; of the last half of them the weights are averaged.
        learning_rate: of Adam.
        tolerance: largest standard error that is accepted.

    Returns:
        A `Stability`.

    Raises:
        NoMaskError, MeasurementError, ShapeError, OptionError: as in `penalty`.

    Source: Bousquet and Elisseeff 2002, JMLR 2.
    """
    check_whole("members", members)
    check_whole("epochs", epochs, 2)
    check_seed(seed)
    if not learning_rate > 0:
        raise OptionError(f"learning_rate={learning_rate!r} was given; a positive number is needed.")
    subject = subject_of(model, x, y, loss)
    if members > len(subject.x):
        raise OptionError(f"members={members} was given; there are {len(subject.x)} rows to replace.")
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    out = torch.randperm(len(subject.x), generator=generator)[:members]
    into = (out + 1 + torch.randint(len(subject.x) - 1, (members,), generator=generator)) % len(subject.x)
    start = fresh(subject.network, seed)

    def predictions(rows: Tensor, noisy: bool) -> Tensor:
        network = fit(
            fresh(start, seed), subject.x[rows], subject.y[rows], subject.loss, epochs=epochs,
            learning_rate=learning_rate, seed=seed, noisy=noisy,
        )  # fmt: skip
        with torch.no_grad():
            found: Tensor = network(subject.x.clone()).double()
        return found

    rows = torch.arange(len(subject.x))
    moved: dict[bool, list[Tensor]] = {True: [], False: []}
    for noisy, changes in moved.items():
        before = predictions(rows, noisy)
        for i, j in zip(out.tolist(), into.tolist(), strict=True):
            other = rows.clone()
            other[i] = j
            changes.append(predictions(other, noisy) - before)
    sizes = {
        noisy: torch.stack([c.square().mean().sqrt() for c in changes]) for noisy, changes in moved.items()
    }
    measured, error = mean_and_error(sizes[True])
    without, without_error = mean_and_error(sizes[False])
    check_error(tolerance, error, members, "members")
    linear = linear_model(subject)
    known = linear is not None and linear.targets is not None
    expected = {
        noisy: _closed_form(linear, out, into, noisy) if linear is not None and known else None
        for noisy in (True, False)
    }
    plain = expected[False]
    return Stability(
        predicted=expected[True],
        measured=measured,
        standard_error=error,
        formula="closed form of the linear model"
        if known
        else "no formula: not a linear model with squared error",
        loss=subject.loss.name,
        without=float(without),
        without_error=float(without_error),
        without_predicted=None if plain is None else float(plain),
        largest=max(float(c.abs().max()) for c in moved[True]),
        largest_without=max(float(c.abs().max()) for c in moved[False]),
        replaced=members,
    )


def _closed_form(linear: LinearModel, out: Tensor, into: Tensor, noisy: bool) -> Tensor:
    """Mean over replaced rows of the root mean square change of the fit at the original rows."""
    noise_variance = linear.noise_variance if noisy else 0.0

    def fitted(rows: Tensor) -> Tensor:
        assert linear.targets is not None
        design, targets = linear.design[rows], linear.targets[rows]
        penalty = noise_variance * design.square().sum(dim=0)
        whole = linear.design
        if linear.has_bias:
            design, whole = (torch.cat((d, d.new_ones(len(d), 1)), dim=1) for d in (design, whole))
            penalty = torch.cat((penalty, penalty.new_zeros(1)))
        gram = design.T @ design + torch.diag(penalty)
        return whole @ torch.linalg.pinv(gram, hermitian=True) @ design.T @ targets

    rows = torch.arange(len(linear.design))
    before, changes = fitted(rows), []
    for i, j in zip(out.tolist(), into.tolist(), strict=True):
        other = rows.clone()
        other[i] = j
        changes.append((fitted(other) - before).square().mean().sqrt())
    return torch.stack(changes).mean()

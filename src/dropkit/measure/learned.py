"""What a model has learned: how much less it loses than the best answer that is the same for every row."""

from __future__ import annotations

import torch
from torch import Tensor

from dropkit.measure.generalization_gap import row_losses
from dropkit.measure.sampling import mean_and_error
from dropkit.measure.site_figures import Estimate
from dropkit.measure.subject import Subject

STEPS = 100  # of L-BFGS; a constant has few numbers, and squared error needs one step


def learned(subject: Subject) -> tuple[float, Estimate] | None:
    """Loss of the best constant answer, and how much of it the model takes away, with the error over rows.

    gain = min over c of L(c for every row) - L(model),    both without masks

    What dropout costs is held against it. A share of the loss would change with a constant that is added to the loss,
    and the negative log-likelihood of a density may well be negative.

    Args:
        subject: what is measured.

    Returns:
        Both in the loss's unit; None where no constant has a finite loss.
    """
    with torch.no_grad():
        outputs = subject.outputs()
    if not outputs.is_floating_point() or len(outputs) != len(subject.x):
        return None
    constant = _best_constant(subject, outputs)
    if constant is None:
        return None
    with torch.no_grad():
        rows = torch.stack([subject.loss(constant, subject.y[i : i + 1]) for i in range(len(outputs))])
    gain, error = mean_and_error(rows.double() - row_losses(subject, subject.x, subject.y))
    value = float(rows.double().mean())
    return (value, Estimate(float(gain), float(error))) if bool(torch.isfinite(gain)) else None


def _best_constant(subject: Subject, outputs: Tensor) -> Tensor | None:
    """(1, *out): the one answer for all rows with the smallest loss; that of a classifier is the classes' shares."""
    answer = outputs.mean(dim=0, keepdim=True).requires_grad_()
    search = torch.optim.LBFGS([answer], max_iter=STEPS, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        search.zero_grad()
        loss = subject.loss_of(answer.expand_as(outputs))
        loss.backward()
        return loss

    search.step(step)
    return answer.detach() if bool(torch.isfinite(answer).all()) else None

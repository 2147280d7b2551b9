"""How far back in time a signal reaches through a recurrent model, with masks and without."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.errors import MeasurementError
from dropkit.measure.losses import LossFunction
from dropkit.measure.noise import Site
from dropkit.measure.records import Measurement
from dropkit.measure.sampling import check_error, check_seed, check_whole, mean_and_error
from dropkit.measure.subject import Subject, check_finite, subject_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Attenuation(Measurement):
    """What is left of the loss's slope by the input of each time step, under masks, as a share of the plain slope,
    (T,).

    gain[t] = E <g_m[t], g[t]> / |g[t]|^2 with g the gradient by x[:, t]: 1 where the mean signal is kept.

    Attributes:
        square, square_error: E |g_m[t]|^2 / |g[t]|^2, (T,): how much the signal's power is blown up by scaling.
        square_predicted: (1/q)^(steps on the way) for fresh masks; None where there is no formula.
        unscaled: q^(steps on the way), the mean gain that masks without scale would give; None likewise.
        rate: of the mask that acts at every step.
        locked: whether one mask serves all steps.
    """

    square: Tensor
    square_error: Tensor
    square_predicted: Tensor | None
    unscaled: Tensor | None
    rate: float | None
    locked: bool

    def to_text(self) -> str:
        """What the first step's signal becomes."""
        text = (
            f"Of the signal of the first of {len(self.measured)} steps, masks leave {float(self.measured[0]):.3g} ± "
            f"{float(self.standard_error[0]):.2g} in the mean and {float(self.square[0]):.3g} ± "
            f"{float(self.square_error[0]):.2g} of its power ({self.formula})."
        )
        if self.unscaled is not None:
            text += f" Without inverted scaling the mean would be {float(self.unscaled[0]):.3g}."
        return text


def attenuation(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossFunction | None = None,
    members: int = 256,
    seed: int = 0,
    tolerance: float | None = None,
) -> Attenuation:
    """What masks leave of a signal on its way from each time step to the end of a sequence.

    fresh masks, inverted scaling: mean 1, power (1/q)^k;  without scale: mean q^k  (k masked steps on the way)
    one locked mask, inverted:     mean q^(1-k);           without scale: mean q

    These hold for a linear memory, which multiplies its state by one mask a step; gates change them. They are given
    where one site acts k times along the way.

    Args:
        model: (B, T, ...) -> (B, ...); else as in `penalty`.
        x, y, loss: as in `penalty`; x holds numbers (embed words first), time on axis 1. The slope is that of the sum
            of the outputs; loss and y are looked at for being finite alone.
        members: masks drawn for each row.
        seed: which masks.
        tolerance: largest standard error of a gain that is accepted.

    Returns:
        An `Attenuation`.

    Raises:
        MeasurementError: x has no time axis, or a step's signal does not reach the output even without masks.
        NoMaskError, ShapeError, OptionError: as in `penalty`.

    Source: Gal and Ghahramani 2016, arXiv:1512.05287 (locked masks); the powers follow from independence.
    """
    check_whole("members", members)
    check_seed(seed)
    subject = subject_of(model, x, y, loss)
    if not subject.x.is_floating_point() or subject.x.ndim < 3:
        raise MeasurementError(
            f"x of shape {tuple(x.shape)} and dtype {x.dtype} was given; numbers (rows, time, features) are needed."
        )
    plain = _slopes(subject, seed, None)
    length = plain.square().sum(dim=1)
    if not bool((length > 0).all()):
        step = int((length == 0).nonzero()[0])
        raise MeasurementError(f"the input of step {step} does not reach the output, even without masks.")
    draws = torch.stack([_slopes(subject, seed, k) for k in range(members)])
    check_finite(draws, "a slope under masks")
    gain, error = mean_and_error((draws * plain).sum(dim=2) / length)
    square, square_error = mean_and_error(draws.square().sum(dim=2) / length)
    check_error(tolerance, error, members, "members")
    steps = subject.x.shape[1]
    found = _memory(subject, steps)
    q = None if found is None else 1 - found[0].rate
    locked = found is not None and found[1]
    way = torch.arange(steps, 0, -1, dtype=torch.float64)
    predicted = square_predicted = unscaled = None
    if q:
        predicted = q ** (1 - way) if locked else torch.ones_like(way)
        square_predicted = q ** (1 - 2 * way) if locked else (1 / q) ** way
        unscaled = torch.full_like(way, q) if locked else q**way
    return Attenuation(
        predicted=predicted,
        measured=gain,
        standard_error=error,
        formula=(
            "no formula: no single site acts once in every step"
            if q is None
            else f"of a linear memory with {'one locked mask' if locked else 'fresh masks'}"
        ),
        loss=subject.loss.name,
        square=square,
        square_error=square_error,
        square_predicted=square_predicted,
        unscaled=unscaled,
        rate=None if found is None else found[0].rate,
        locked=locked,
    )


def _slopes(subject: Subject, seed: int, member: int | None) -> Tensor:
    """(T, B * features) float64, gradient of the sum of the outputs by the input of each step."""
    x = subject.x.clone().requires_grad_()
    samples = None if member is None else torch.arange(len(x))
    outputs = subject.outputs(seed, member, samples, x)
    (slope,) = torch.autograd.grad(outputs.sum(), x)
    return slope.double().movedim(1, 0).flatten(1)


def _memory(subject: Subject, steps: int) -> tuple[Site, bool] | None:
    """The site that acts in every step, and whether its mask is locked."""
    if subject.noise is None:
        return None
    sites = subject.noise.sites
    names = {site.name for site in sites}
    if len(names) != 1:
        return None
    if len(sites) == steps:  # one layer, called once in each step: a fresh mask each time
        return sites[0], False
    (site, *others) = sites
    if others or len(site.shape) < 3:
        return None
    if site.shape[1] == steps:
        return site, False
    return (site, True) if site.shape[1] == 1 else None

"""Variance of the predictions against the rate: p(1 - p) for masks without scale, p/(1 - p) for inverted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.errors import MeasurementError, OptionError, check_probability
from dropkit.measure.curvature import directional, noise_directions, with_derivatives
from dropkit.measure.losses import LossFunction
from dropkit.measure.penalty import is_linear
from dropkit.measure.records import Measurement
from dropkit.measure.sampling import check_error, check_seed, check_whole, variance_and_error
from dropkit.measure.subject import Subject, check_finite, subject_of

RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class VarianceLaw(Measurement):
    """Variance of the outputs over masks, mean over rows and outputs, at fixed weights; one value for each rate.

    `predicted`, `measured` and `standard_error` are those of inverted masks, (R,).

    Attributes:
        rates: p, (R,); all sites have the same.
        unscaled_predicted: p (1 - p) S, for masks that are 0 or 1; None where there is no formula.
        unscaled_measured, unscaled_error: the same, measured.
        spread: S, mean over rows and outputs of the sum of squared slopes of the output by each noise value.
        exact: whether the outputs are linear in the noise.
    """

    rates: tuple[float, ...]
    unscaled_predicted: Tensor | None
    unscaled_measured: Tensor
    unscaled_error: Tensor
    spread: float
    exact: bool

    @property
    def peak(self) -> tuple[float, float]:
        """The rate of `rates` with the largest variance: under inverted masks, and under masks without scale."""
        return self.rates[int(self.measured.argmax())], self.rates[int(self.unscaled_measured.argmax())]

    def to_text(self) -> str:
        """Which law these outputs follow."""
        inverted, unscaled = self.peak
        return (
            f"At fixed weights the outputs' variance under inverted masks is largest at p = "
            f"{inverted:g} of the rates tried, "
            f"and under masks without scale at p = {unscaled:g}; the laws are p/(1-p) and p(1-p), "
            f"times {self.spread:.4g} "
            f"({self.formula})."
        )


def variance_law(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossFunction | None = None,
    members: int = 256,
    seed: int = 0,
    rates: Sequence[float] = RATES,
    tolerance: float | None = None,
) -> VarianceLaw:
    """How the variance of the predictions goes with the rate, at the weights as they are.

    inverted masks:      Var f = p / (1 - p) S
    masks without scale: Var f = p (1 - p) S
    S = sum_j (d f / d e_j)^2

    Exact where the outputs are linear in the noise, else of first order. The second law is the one often quoted; with
    inverted masks it only comes back when the weights are trained anew at each rate.

    Args:
        model, x, y, loss: as in `penalty`; the outputs are taken as they are (logits, for classes).
        members: masks drawn for each row at each rate.
        seed: which masks.
        rates: p to try, each in (0, 1); every site gets the same.
        tolerance: largest standard error that is accepted, at the smallest rate.

    Returns:
        A `VarianceLaw`.

    Raises:
        NoMaskError, MeasurementError, ShapeError, OptionError: as in `penalty`.
        ProbabilityError: a rate is outside [0, 1].

    Example:
        >>> import torch, dropkit as dk
        >>> model = torch.nn.Sequential(dk.nn.Dropout(0.5), torch.nn.Linear(3, 1))
        >>> law = dk.measure.variance_law(model, torch.ones(4, 3), torch.ones(4), rates=(0.1, 0.5, 0.9))
        >>> law.peak
        (0.9, 0.5)
    """
    check_whole("members", members)
    check_seed(seed)
    tried = tuple(check_probability(p, "rates") for p in rates)
    if not tried or not all(0 < p < 1 for p in tried):
        raise OptionError(
            f"rates={tuple(rates)!r} was given; rates between 0 and 1, without the ends, are needed."
        )
    subject = subject_of(model, x, y, loss)
    noise = subject.noise
    if noise is None or noise.hidden or not all(site.law == "bernoulli" for site in noise.sites):
        why = subject.why or "not all of its noise is Bernoulli masks"
        raise MeasurementError(
            f"the rates of this model cannot be set from outside: {why}. Measure the part of it that has plain dropout."
        )
    like = subject.x if subject.x.is_floating_point() else torch.zeros(())
    found: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    with torch.no_grad():
        for p in tried:
            for scaled in (True, False):
                draws = []
                for k in range(members):
                    e = tuple(
                        ((site.draw(p, seed, k) * (1.0 if scaled else 1 - p)) - 1).to(like)
                        for site in noise.sites
                    )
                    draws.append(noise(subject.x, e).double())
                outputs = torch.stack(draws)
                check_finite(outputs, f"an output at p = {p:g}")
                variance, error = variance_and_error(outputs)
                found[scaled].append((variance / outputs[0].numel(), error / outputs[0].numel()))
    measured, error, bare, bare_error = (
        torch.stack([pair[part] for pair in found[scaled]]) for scaled in (True, False) for part in (0, 1)
    )
    check_error(tolerance, error[0], members, "members")
    law = torch.tensor(tried, dtype=torch.float64)
    spread = (
        None if subject.smooth is None else float(with_derivatives(subject, lambda: _spread(subject, seed)))
    )
    exact = spread is not None and is_linear(noise, subject.x, seed)
    return VarianceLaw(
        predicted=None if spread is None else law / (1 - law) * spread,
        measured=measured,
        standard_error=error,
        formula=_formula(subject, exact),
        loss=subject.loss.name,
        rates=tried,
        unscaled_predicted=None if spread is None else law * (1 - law) * spread,
        unscaled_measured=bare,
        unscaled_error=bare_error,
        spread=float("nan") if spread is None else spread,
        exact=exact,
    )


def _formula(subject: Subject, exact: bool) -> str:
    if subject.smooth is None:
        return f"no formula: {subject.why}"
    return "exact as the outputs are linear in the noise" if exact else "first order in the noise"


def _spread(subject: Subject, seed: int) -> Tensor:
    """S, mean over rows and outputs."""
    noise = subject.smooth
    assert noise is not None
    like = subject.x if subject.x.is_floating_point() else torch.zeros(())
    start = noise.none(like)
    each: list[Tensor] = [torch.zeros((), dtype=torch.float64)]
    together: list[Tensor] = []
    with torch.no_grad():
        for directions, single in noise_directions(noise, subject.x, seed, unit=True):
            slope = directional(lambda *e: noise(subject.x, e), start, directions)
            (each if single else together).append(slope.double().square().mean())
    return torch.stack(each).sum() + (torch.stack(together).mean() if together else 0)

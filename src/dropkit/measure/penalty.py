"""What dropout adds to the loss: the adaptive L2 penalty, and which features pay it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.measure.curvature import Curvature, noise_curvatures, output_part, with_derivatives
from dropkit.measure.losses import LossFunction
from dropkit.measure.noise import NoisyNetwork
from dropkit.measure.records import Measurement, said_of_prediction, with_error
from dropkit.measure.sampling import check_error, check_seed, check_whole, mean_and_error
from dropkit.measure.subject import Subject, check_finite, subject_of

LOUD = 3  # times the mean of a site's features


@dataclass(frozen=True, slots=True)
class SitePenalty:
    """What the mask of one site adds to the loss, the other sites being silent.

    Attributes:
        site: its name.
        rate: chance to drop.
        predicted: (), to second order; None where there is no derivative.
        measured, standard_error: (), over members.
        features: (*mask), `predicted` by noise value: which features pay.
        loud: places in `features`, flat, that pay more than 3 times the mean of their site, most first.
    """

    site: str
    rate: float
    predicted: Tensor | None
    measured: Tensor
    standard_error: Tensor
    features: Tensor | None
    loud: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalty(Measurement):
    """Mean loss under masks, minus the loss without.

    Attributes:
        plain: the loss without masks.
        output_part: (), the part of `predicted` that comes from the bend of the loss alone (J' H J): what would be left
            if the layers behind the masks were linear. None where there is no derivative.
        sites: site by site; empty where nothing can be said of a site alone (a mask decided by comparison).
        exact: whether `predicted` is the whole truth and not its second order.
    """

    plain: float
    output_part: Tensor | None
    sites: tuple[SitePenalty, ...]
    exact: bool

    def to_text(self) -> str:
        """One sentence, and one on where it comes from."""
        text = (
            f"Dropout adds {with_error(self.measured, self.standard_error)} to a {self.loss} of {self.plain:.4g} "
            f"{said_of_prediction(self.predicted, self.formula)}."
        )
        if self.sites:
            most = max(self.sites, key=lambda site: abs(float(site.measured)))
            text += f" Most of it, {float(most.measured):.3g}, comes from site {most.site!r}"
            text += f"; its loudest features are {list(most.loud[:5])}." if most.loud else "."
        return text


def penalty(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossFunction | None = None,
    members: int = 64,
    seed: int = 0,
    tolerance: float | None = None,
) -> Penalty:
    """What dropout adds to the loss of this model on these rows, measured and predicted, site by site.

    E_m L - L ~ 1/2 sum_j Var(e_j) d2 L / d e_j^2,    Var(e_j) = p / (1 - p)

    Exact where the outputs are linear in the noise and the loss is squared: (p / (1 - p)) sum_j w_j^2 mean(x_j^2) for a
    linear model with dropout on its inputs. For generalised linear models it is the form of Wager et al. What pays is a
    feature's mean *square*: an uncentred one is punished for its mean.

    Args:
        model: (rows, ...) -> (rows, ...), with dropkit's dropout or any that `dropkit.convert` knows; not changed. It
            is measured in evaluation mode, with a mask for each row.
        x: (B, ...) rows.
        y: (B, ...) targets.
        loss: (outputs, y) -> () or (B,); None: squared error for floating targets, cross-entropy for whole numbers
            (classes on the last axis of the outputs) and for switches.
        members: masks drawn for each row.
        seed: which masks.
        tolerance: largest standard error that is accepted.

    Returns:
        A `Penalty`.

    Raises:
        NoMaskError: no dropout acts, or all rates are 0.
        MeasurementError: the loss is not finite, a layer has no second derivative, or the tolerance was not reached.
        ShapeError: x and y are no tensors of as many rows.
        OptionError: an option is outside its range.

    Example:
        >>> import torch, dropkit as dk
        >>> model = torch.nn.Sequential(dk.nn.Dropout(0.2), torch.nn.Linear(2, 1, bias=False))
        >>> _ = torch.nn.init.ones_(model[1].weight)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
        >>> dk.measure.penalty(model, x, x.sum(1)).predicted  # 0.25 * (5 + 4)
        tensor(2.2500, dtype=torch.float64)

    Source: Wager, Wang and Liang 2013, arXiv:1307.1493; Wei, Kakade and Ma 2020, arXiv:2002.12915.
    """
    check_whole("members", members)
    subject = subject_of(model, x, y, loss)
    draws = subject.noisy_losses(check_seed(seed), members) - subject.plain
    measured, error = mean_and_error(draws)
    check_error(tolerance, error, members, "members")
    noise = subject.smooth
    if noise is None:
        return Penalty(
            predicted=None, measured=measured, standard_error=error, formula=f"no formula: {subject.why}",
            loss=subject.loss.name, plain=subject.plain, output_part=None, exact=False,
            sites=_sites(subject, members, seed, None),
        )  # fmt: skip
    curvatures = with_derivatives(subject, lambda: noise_curvatures(noise, subject.loss_of, subject.x, seed))
    part, _ = with_derivatives(subject, lambda: output_part(noise, subject.loss_of, subject.x, seed))
    sites = _sites(subject, members, seed, curvatures)
    exact = subject.loss.quadratic and is_linear(noise, subject.x, seed)
    half = [0.5 * site.variance for site in noise.sites]
    total = torch.stack([h * c.total for h, c in zip(half, curvatures, strict=True)]).sum()
    spread = torch.stack([h * c.error for h, c in zip(half, curvatures, strict=True)]).square().sum().sqrt()
    return Penalty(
        predicted=_base(subject) - subject.plain + total,
        predicted_error=spread,
        measured=measured,
        standard_error=error,
        formula=(
            "adaptive L2, exact as the outputs are linear in the noise and the loss is quadratic"
            if exact
            else "second order, 1/2 p/(1-p) times the sum of d2L/de2"
        ),
        loss=subject.loss.name,
        plain=subject.plain,
        output_part=part,
        sites=sites,
        exact=exact,
    )


def is_linear(noise: NoisyNetwork, x: Tensor, seed: int) -> bool:
    """Whether the outputs are linear in the noise of all sites together: f(2e) - f(0) = 2 (f(e) - f(0)) at
    two draws.
    """
    like = x if x.is_floating_point() else torch.zeros((), device=x.device)
    with torch.no_grad():
        start = noise(x, noise.none(like))
        for member in range(2):
            e = noise.drawn(like, seed, member)
            once = noise(x, e) - start
            twice = noise(x, tuple(2 * part for part in e)) - start
            scale = float(torch.maximum(start.abs().max(), twice.abs().max())) or 1.0
            if float((twice - 2 * once).abs().max()) > 64 * torch.finfo(start.dtype).eps * scale:
                return False
    return True


def _base(subject: Subject) -> float:
    """Loss at mean noise; not the plain loss where a layer's mean is not its evaluation (alpha dropout)."""
    assert subject.noise is not None
    like = subject.x if subject.x.is_floating_point() else torch.zeros(())
    with torch.no_grad():
        return float(subject.loss_of(subject.noise(subject.x, subject.noise.none(like))))


def _sites(
    subject: Subject, members: int, seed: int, curvatures: tuple[Curvature, ...] | None
) -> tuple[SitePenalty, ...]:
    noise = subject.noise
    if noise is None or noise.rough:  # where noise is compared with a number, its mean is no evaluation
        return ()
    like, base = subject.x if subject.x.is_floating_point() else torch.zeros(()), _base(subject)
    found = []
    for i, site in enumerate(noise.sites):
        with torch.no_grad():
            draws = [
                subject.loss_of(noise(subject.x, noise.drawn(like, seed, k, only=i))).double()
                for k in range(members)
            ]
        losses = torch.stack(draws)
        check_finite(losses, f"the loss under masks at site {site.name!r}")
        measured, error = mean_and_error(losses - base)
        if curvatures is None:
            found.append(SitePenalty(site.name, site.rate, None, measured, error, None, ()))
            continue
        half, bend = 0.5 * site.variance, curvatures[i]
        features = half * bend.features
        found.append(
            SitePenalty(site.name, site.rate, half * bend.total, measured, error, features, _loud(features))
        )
    return tuple(found)


def _loud(features: Tensor) -> tuple[int, ...]:
    flat = features.flatten()
    order = flat.argsort(descending=True)
    mean = float(flat.mean())
    return tuple(int(i) for i in order if mean > 0 and float(flat[i]) > LOUD * mean)

"""Dropout's mean gradient is not the gradient of the plain network: by how much, and which way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.measure.curvature import PROBES, noise_directions, with_derivatives
from dropkit.measure.gradient_noise import gradients
from dropkit.measure.losses import LossFunction
from dropkit.measure.penalty import is_linear
from dropkit.measure.records import Measurement
from dropkit.measure.sampling import check_error, check_seed, check_whole
from dropkit.measure.subject import Subject, check_finite, subject_of


@dataclass(frozen=True, slots=True)
class LayerBias:
    """Bias of the gradient of one weight tensor.

    Attributes:
        name: of the weight.
        plain: its gradient without masks.
        predicted: to second order; None where there is no formula.
        measured, standard_error: over members. All in the weight's shape.
    """

    name: str
    plain: Tensor
    predicted: Tensor | None
    measured: Tensor
    standard_error: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientBias(Measurement):
    """E_m grad L(masked) - grad L(plain), all weights one after another in `layers`' order, (P,).

    Attributes:
        layers: weight by weight, in their shapes.
        relative: length of the bias over length of the plain gradient, with what the error bars alone would give
            taken off; 0 where the bias is not seen.
    """

    layers: tuple[LayerBias, ...]
    relative: float

    def to_text(self) -> str:
        """How long the bias is, and whether the formula points its way."""
        text = f"Dropout moves the mean gradient by {100 * self.relative:.3g} % of the plain one's length"
        if self.predicted is None:
            return f"{text} ({self.formula})."
        cosine = torch.nn.functional.cosine_similarity(self.predicted, self.measured, dim=0)
        return (
            f"{text}; prediction and measurement agree in direction to a cosine of "
            f"{float(cosine):.3f} ({self.formula})."
        )


def gradient_bias(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossFunction | None = None,
    members: int = 256,
    seed: int = 0,
    tolerance: float | None = None,
) -> GradientBias:
    """Mean gradient under dropout minus the gradient of the plain network, on all rows.

    E grad L(e) - grad L(0) ~ 1/2 grad_w sum_j Var(e_j) d2 L / d e_j^2

    It is the gradient of the penalty: inverted scaling keeps activations unbiased where the layers are linear, and the
    gradient never. Exact where the outputs are linear in the noise and the loss is squared; there it is
    2 (p / (1 - p)) w_j mean(x_j^2) for a linear model.

    Args:
        model, x, y, loss: as in `penalty`.
        members: passes with masks, each row with its own.
        seed: which masks.
        tolerance: largest standard error of any element that is accepted.

    Returns:
        A `GradientBias`.

    Raises:
        NoMaskError, MeasurementError, ShapeError, OptionError: as in `penalty`.

    Example:
        >>> import torch, dropkit as dk
        >>> model = torch.nn.Sequential(dk.nn.Dropout(0.5), torch.nn.Linear(2, 1, bias=False))
        >>> _ = torch.nn.init.ones_(model[1].weight)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
        >>> dk.measure.gradient_bias(model, x, x.sum(1)).predicted  # 2 * 1 * (5, 4)
        tensor([10.,  8.], dtype=torch.float64)

    Source: Wei, Kakade and Ma 2020, arXiv:2002.12915.
    """
    check_whole("members", members)
    check_seed(seed)
    subject = subject_of(model, x, y, loss)
    names, weights = list(subject.weights), list(subject.weights.values())
    plain = gradients(subject.loss_of(subject.outputs()), weights)
    sums = [torch.zeros_like(part) for part in plain]
    squares = [torch.zeros_like(part) for part in plain]
    lengths = []
    for k in range(members):
        drawn = gradients(subject.noisy_loss(seed, k), weights)
        for i, part in enumerate(drawn):
            check_finite(part, f"the gradient of {names[i]!r} under masks")
            sums[i] += part - plain[i]
            squares[i] += (part - plain[i]).square()
        lengths.append(torch.stack([part.square().sum() for part in drawn]).sum())
    measured = [total / members for total in sums]
    errors = [
        ((square / members - mean.square()).clamp(min=0) / (members - 1)).sqrt()
        for square, mean in zip(squares, measured, strict=True)
    ]
    flat, error = (torch.cat([part.flatten() for part in parts]) for parts in (measured, errors))
    check_error(tolerance, error, members, "members")
    predicted = _predicted(subject, seed) if subject.smooth is not None else None
    length = sum(float(part.square().sum()) for part in plain) ** 0.5
    seen = max(float(flat.square().sum() - error.square().sum()), 0.0) ** 0.5
    return GradientBias(
        predicted=None if predicted is None else torch.cat([predicted[name].flatten() for name in names]),
        measured=flat,
        standard_error=error,
        formula=_formula(subject, seed),
        loss=subject.loss.name,
        layers=tuple(
            LayerBias(name, p, None if predicted is None else predicted[name], m, e)
            for name, p, m, e in zip(names, plain, measured, errors, strict=True)
        ),
        relative=seen / length if length > 0 else float("inf"),
    )


def _formula(subject: Subject, seed: int) -> str:
    if subject.smooth is None:
        return f"no formula: {subject.why}"
    if subject.loss.quadratic and is_linear(subject.smooth, subject.x, seed):
        return (
            "gradient of the adaptive L2 penalty, exact as the outputs are linear in the noise and "
            "the loss is quadratic"
        )
    return "second order, 1/2 grad of the sum of Var(e) d2L/de2"


def _predicted(subject: Subject, seed: int) -> Mapping[str, Tensor]:
    """Gradient of the loss at mean noise and of the second-order penalty, less the plain gradient, by weight."""
    noise = subject.smooth
    assert noise is not None
    names, weights = list(subject.weights), list(subject.weights.values())
    like = subject.x if subject.x.is_floating_point() else torch.zeros(())

    def bias() -> list[Tensor]:
        base = gradients(subject.loss_of(noise(subject.x, noise.none(like))), weights)
        plain = gradients(subject.loss_of(subject.outputs()), weights)
        total = [b - p for b, p in zip(base, plain, strict=True)]
        for directions, single in noise_directions(noise, subject.x, seed):
            t = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
            loss = subject.loss_of(noise(subject.x, [t * direction for direction in directions]))
            (slope,) = torch.autograd.grad(loss, t, create_graph=True)
            if not slope.requires_grad:
                continue
            bend = torch.autograd.grad(
                slope, t, create_graph=True, materialize_grads=True, allow_unused=True
            )[0]
            if not bend.requires_grad:
                continue
            share = 0.5 if single else 0.5 / PROBES
            for part, found in zip(total, gradients(share * bend, weights), strict=True):
                part += found
        return total

    return dict(zip(names, with_derivatives(subject, bias), strict=True))

"""How flat the loss is around the weights: eigenvalues, trace, and what perturbed weights cost."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dropkit.errors import MeasurementError, MissingPackageError, OptionError
from dropkit.masks import masks
from dropkit.measure.curvature import with_derivatives
from dropkit.measure.gradient_noise import gradients
from dropkit.measure.losses import LossFunction
from dropkit.measure.records import Measurement, said_of_prediction, with_error
from dropkit.measure.sampling import check_error, check_seed, check_whole, mean_and_error
from dropkit.measure.subject import Subject, subject_of

ASCENT_STEPS = 20
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flatness(Measurement):
    """The loss around the weights, without chance: no masks, or one fixed mask.

    `predicted`, `measured` and `standard_error` are of the rise of the loss when each filter (row of a weight) moves
    in a random direction by `size` times its length; `predicted` is half the curvature met on the way.

    Attributes:
        plain: the loss at the weights themselves.
        member: which fixed mask; None: without masks.
        size: of the perturbation, relative to each filter's length.
        top: largest eigenvalue of the Hessian by the weights (Lanczos).
        trace, trace_error: its trace and standard error (Hutchinson).
        adversarial: rise of the loss in the worst direction that was found, of the same size in each filter.
        invariant, invariant_error: sum over weights of w^2 d2L/dw^2. Unlike eigenvalues and trace it stays the same
            when a ReLU layer is scaled up and the next one down.
        gradient: length of the gradient; far from a minimum none of these figures describes one.
    """

    plain: float
    member: int | None
    size: float
    top: float
    trace: float
    trace_error: float
    adversarial: float
    invariant: float
    invariant_error: float
    gradient: float

    def to_text(self) -> str:
        """The figures, and the warning that belongs to them."""
        return (
            f"Random steps of {100 * self.size:g} % of each filter's length raise a {self.loss} of {self.plain:.4g} by "
            f"{with_error(self.measured, self.standard_error)} "
            f"{said_of_prediction(self.predicted, self.formula)}, the worst "
            f"that was found by {self.adversarial:.4g}. Hessian: largest eigenvalue {self.top:.4g}, trace "
            f"{with_error(self.trace, self.trace_error)}; both change when layers are rescaled, which "
            f"{with_error(self.invariant, self.invariant_error)}, the trace in units of the weights, does not."
        )


def flatness(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossFunction | None = None,
    members: int = 64,
    seed: int = 0,
    size: float = 0.05,
    member: int | None = None,
    tolerance: float | None = None,
) -> Flatness:
    """How flat the loss is around the weights. To compare training with and without dropout, compare at equal
    training loss.

    E L(w + d) - L(w) ~ 1/2 E d' H d = 1/2 sum over filters f of (size |w_f|)^2 / n_f tr(H_ff)

    Args:
        model, x, y, loss: as in `penalty`.
        members: random directions, for perturbations and traces.
        seed: of the directions, and of the fixed mask.
        size: of the perturbation, relative to each filter's length.
        member: measure thinned network `member` (one mask for all rows) in place of the plain network.
        tolerance: largest standard error of the random rise that is accepted.

    Returns:
        A `Flatness`.

    Raises:
        NoMaskError, MeasurementError, ShapeError, OptionError: as in `penalty`.
        MissingPackageError: curvlinops is not installed.

    Source: Li et al. 2018, arXiv:1712.09913 (filter normalisation); Petzka et al. 2021, arXiv:2001.00939 (a curvature
        that rescaling leaves alone); products with the Hessian by curvlinops.
    """
    operators = _curvlinops()
    check_whole("members", members)
    check_seed(seed)
    if not size > 0:
        raise OptionError(f"size={size!r} was given; a positive share of each filter's length is needed.")
    if member is not None:
        check_whole("member", member, 0)
    subject = subject_of(model, x, y, loss)
    weights = list(subject.weights.values())
    network = _Fixed(subject.network, seed, member)
    product = _hessian(operators, network, subject, weights)
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    here = torch.cat([w.detach().flatten() for w in weights])
    slope = torch.cat([g.flatten() for g in gradients(_loss(network, subject), weights)])
    base = float(_loss(network, subject).detach())

    traces, invariants, rises, bends = [], [], [], []
    for _ in range(members):
        v = torch.randint(0, 2, here.shape, generator=generator).to(here) * 2 - 1
        traces.append((v * with_derivatives(subject, lambda v=v: product(v))).sum().double())  # type: ignore[misc]
        invariants.append((v * here * product(v * here)).sum().double())
        step = size * _by_filter(torch.randn(here.shape, generator=generator).to(here), weights)
        bends.append(0.5 * (step * product(step)).sum().double())
        # Both ways: what is of first order in the step goes out, and the second order stays.
        both = [_moved_loss(network, subject, weights, sign * step) for sign in (1, -1)]
        rises.append(torch.tensor(sum(both) / 2 - base, dtype=torch.float64))
    measured, error = mean_and_error(torch.stack(rises))
    predicted, predicted_error = mean_and_error(torch.stack(bends))
    trace, trace_error = mean_and_error(torch.stack(traces))
    invariant, invariant_error = mean_and_error(torch.stack(invariants))
    check_error(tolerance, error, members, "members")
    return Flatness(
        predicted=predicted,
        predicted_error=predicted_error,
        measured=measured,
        standard_error=error,
        formula="second order in the step",
        loss=subject.loss.name,
        plain=base,
        member=member,
        size=size,
        top=_top(product, here, seed),
        trace=float(trace),
        trace_error=float(trace_error),
        adversarial=_worst(network, subject, weights, size) - base,
        invariant=float(invariant),
        invariant_error=float(invariant_error),
        gradient=float(slope.norm()),
    )


def _curvlinops() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch, at what curvlinops imports
            return importlib.import_module("curvlinops")
    except ImportError as error:
        raise MissingPackageError(
            "dropkit.measure.flatness needs curvlinops, which is not installed: pip install 'dropkit[measure]'"
        ) from error


class _Fixed(nn.Module):
    """The network without chance: in evaluation, or as one thinned network."""

    def __init__(self, network: nn.Module, seed: int, member: int | None) -> None:
        super().__init__()
        self.network, self.seed, self.member = network, seed, member

    def forward(self, x: Tensor) -> Tensor:
        if self.member is None:
            return self.network(x.clone())
        with masks(seed=self.seed, member=self.member):
            return self.network(x.clone())


def _loss(network: nn.Module, subject: Subject) -> Tensor:
    return subject.loss_of(network(subject.x))


class _Mean(nn.Module):
    """The loss as curvlinops reads it."""

    reduction = "mean"

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self.subject.loss(outputs, y)


def _hessian(operators: Any, network: nn.Module, subject: Subject, weights: list[nn.Parameter]) -> Product:
    """v -> H v. Where torch lacks the forward mode that curvlinops takes, by the reverse mode twice."""
    operator = operators.HessianLinearOperator(
        network,
        _Mean(subject),
        weights,
        [(subject.x, subject.y)],
        check_deterministic=False,
        num_data=len(subject.x),
    )

    def reverse(v: Tensor) -> Tensor:
        loss = _loss(network, subject)
        slopes = torch.autograd.grad(
            loss, weights, create_graph=True, materialize_grads=True, allow_unused=True
        )
        along = torch.cat([s.flatten() for s in slopes]) @ v
        twice = torch.autograd.grad(along, weights, materialize_grads=True, allow_unused=True)
        return torch.cat([t.flatten() for t in twice])

    def product(v: Tensor) -> Tensor:
        try:
            found: Tensor = operator @ v
        except RuntimeError:
            return reverse(v)
        return found.detach()

    return product


def _top(product: Product, like: Tensor, seed: int) -> float:
    """Largest eigenvalue, by Lanczos."""
    size = len(like)

    def apply(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        result: np.ndarray[Any, Any] = (
            product(torch.from_numpy(v.reshape(-1)).to(like)).double().cpu().numpy()
        )
        return result

    if size <= 3:  # Lanczos needs room
        whole = np.stack([apply(row) for row in np.eye(size)])
        return float(np.linalg.eigvalsh((whole + whole.T) / 2)[-1])
    sparse = importlib.import_module("scipy.sparse.linalg")
    operator = sparse.LinearOperator((size, size), matvec=apply, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(size)
    try:
        return float(
            sparse.eigsh(operator, k=1, which="LA", v0=start, tol=1e-3, return_eigenvectors=False)[0]
        )
    except sparse.ArpackNoConvergence as error:
        raise MeasurementError(
            "Lanczos did not find the largest eigenvalue of the Hessian. Give float64 weights: model.double()."
        ) from error


def _by_filter(direction: Tensor, weights: Sequence[nn.Parameter]) -> Tensor:
    """A direction scaled so that each filter (first axis of a weight, or a whole bias) is as long as the
    weight's own.
    """
    parts = []
    for part, w in zip(direction.split([w.numel() for w in weights]), weights, strict=True):
        rows = part.view(len(w), -1) if w.ndim > 1 else part.view(1, -1)
        own = w.detach().reshape(rows.shape)
        length = rows.norm(dim=1, keepdim=True)
        parts.append(
            (rows * own.norm(dim=1, keepdim=True) / length.clamp(min=torch.finfo(rows.dtype).tiny)).flatten()
        )
    return torch.cat(parts)


def _shifted(weights: list[nn.Parameter], step: Tensor) -> None:
    with torch.no_grad():
        for w, part in zip(weights, step.split([w.numel() for w in weights]), strict=True):
            w.add_(part.view(w.shape))


def _moved_loss(network: nn.Module, subject: Subject, weights: list[nn.Parameter], step: Tensor) -> float:
    """Loss at weights + step; the weights of our copy are put back to the bit."""
    before = [w.detach().clone() for w in weights]
    _shifted(weights, step)
    try:
        with torch.no_grad():
            return float(_loss(network, subject))
    finally:
        with torch.no_grad():
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)


def _worst(network: nn.Module, subject: Subject, weights: list[nn.Parameter], size: float) -> float:
    """Largest loss found by following the gradient on the set of steps of this size in each filter."""
    before = [w.detach().clone() for w in weights]
    here = torch.cat([w.flatten() for w in before])
    own = size * _by_filter(torch.ones_like(here), weights)  # for the lengths alone
    step = torch.zeros_like(here)
    best = float(_loss(network, subject).detach())
    generator = torch.Generator().manual_seed(0)
    try:
        for turn in range(ASCENT_STEPS):
            slope = torch.cat([g.flatten() for g in gradients(_loss(network, subject), weights)]).to(here)
            if turn == 0:  # at a minimum the slope is rounding; any direction begins as well
                slope = slope + 1e-3 * slope.norm() * torch.randn(here.shape, generator=generator).to(here)
            step = _with_lengths(step / size + _with_lengths(slope, own, weights) / size, own, weights)
            with torch.no_grad():
                for w, old in zip(weights, before, strict=True):
                    w.copy_(old)
            _shifted(weights, step)
            best = max(best, float(_loss(network, subject).detach()))
    finally:
        with torch.no_grad():
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)
    return best


def _with_lengths(direction: Tensor, like: Tensor, weights: Sequence[nn.Parameter]) -> Tensor:
    """A direction whose filters have the lengths of those of another."""
    parts = []
    sizes = [w.numel() for w in weights]
    for part, other, w in zip(direction.split(sizes), like.split(sizes), weights, strict=True):
        rows = part.view(len(w), -1) if w.ndim > 1 else part.view(1, -1)
        length = rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        parts.append((rows / length * other.view(rows.shape).norm(dim=1, keepdim=True)).flatten())
    return torch.cat(parts)

"""What dropout does to a BatchNorm behind it: in evaluation its input varies less than the statistics say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dropkit.errors import MeasurementError
from dropkit.measure.curvature import directional, noise_directions, with_derivatives
from dropkit.measure.losses import LossFunction
from dropkit.measure.noise import NoisyNetwork
from dropkit.measure.records import Measurement
from dropkit.measure.sampling import check_error, check_seed, check_whole, jackknife
from dropkit.measure.subject import Subject, check_finite, subject_of

UNTOUCHED = 1e-9  # a ratio this near 1 is rounding


@dataclass(frozen=True, slots=True)
class NormShift:
    """One BatchNorm. All tensors (C,), one value for each of its channels.

    Attributes:
        name: its qualified name.
        quiet: variance of its input without masks, as in evaluation.
        predicted: quiet / noisy variance; None where there is no formula.
        measured, standard_error: the same, measured over members.
        running: quiet / running_var: what the layer does now, if it was trained on such rows.
        moved: mean under masks less the mean without, in standard deviations without.
    """

    name: str
    quiet: Tensor
    predicted: Tensor | None
    measured: Tensor
    standard_error: Tensor
    running: Tensor
    moved: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VarianceShift(Measurement):
    """Variance in evaluation over variance in training of what each BatchNorm reads; all channels one after another.

    1: no shift. 0.5: the layer divides by a standard deviation that is 1.41 times that of what it is given.

    Attributes:
        norms: layer by layer.
    """

    norms: tuple[NormShift, ...]

    def to_text(self) -> str:
        """Which layer is worst, and what to do."""
        worst = min(self.norms, key=lambda norm: float(norm.measured.mean()))
        share = float(worst.measured.mean())
        text = (
            f"In evaluation the input of BatchNorm {worst.name!r} has {100 * share:.3g} % of the "
            f"variance that it has under "
            "masks, mean over channels"
        )
        if share > 0.95:
            return f"{text}: no shift to speak of ({self.formula})."
        return (
            f"{text}: its outputs are too small by a factor of {share**0.5:.3g} in evaluation. Put "
            f"the dropout behind the "
            f"last BatchNorm, or lower p ({self.formula})."
        )


def variance_shift(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossFunction | None = None,
    members: int = 64,
    seed: int = 0,
    tolerance: float | None = None,
) -> VarianceShift:
    """How much less the input of each BatchNorm varies in evaluation than under masks, channel by channel.

    shift = Var(u) / (Var(u) + mean over rows of sum_j Var(e_j) (d u / d e_j)^2)

    Exact where u is linear in the noise: for u = w . h behind dropout the added part is p/(1-p) sum_j w_j^2
    mean(h_j^2).

    Args:
        model, x, y, loss: as in `penalty`. Every layer runs in evaluation mode: the masks alone make the difference.
        members: masks drawn for each row.
        seed: which masks.
        tolerance: largest standard error of a channel's ratio that is accepted.

    Returns:
        A `VarianceShift`.

    Raises:
        NoMaskError, MeasurementError, ShapeError, OptionError: as in `penalty`; MeasurementError also where no
            BatchNorm stands behind a mask.

    Example:
        >>> import torch, dropkit as dk
        >>> model = torch.nn.Sequential(dk.nn.Dropout(0.5), torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        >>> shift = dk.measure.variance_shift(model, torch.randn(50, 3), torch.randn(50, 2))
        >>> bool((shift.measured < 0.9).all())
        True

    Source: Li, Chen, Hu and Yang 2019, arXiv:1801.05134.
    """
    check_whole("members", members)
    check_seed(seed)
    subject = subject_of(model, x, y, loss)
    names = {
        module: name for name, module in subject.network.named_modules() if isinstance(module, _BatchNorm)
    }
    if not names:
        raise MeasurementError(
            "a model without BatchNorm was given; only BatchNorm keeps statistics from training. There is no shift."
        )
    with torch.no_grad():
        quiet = _moments(subject, seed, None)
        noisy = [_moments(subject, seed, k) for k in range(members)]
    reached = {m: name for m, name in names.items() if name in quiet}
    predicted = (
        with_derivatives(subject, lambda: _predicted(subject, seed)) if subject.smooth is not None else {}
    )
    norms = []
    for module, name in reached.items():
        draws = torch.stack([one[name] for one in noisy])  # (K, 2, C)
        check_finite(draws, f"the input of {name!r} under masks")
        variance = quiet[name][1] - quiet[name][0].square()
        ratio, error = jackknife(draws, lambda m, v=variance: v / (m[1] - m[0].square()))  # type: ignore[misc]
        running = torch.ones_like(variance) if module.running_var is None else module.running_var.double()
        norms.append(
            NormShift(
                name=name,
                quiet=variance,
                predicted=variance / (variance + predicted[name]) if name in predicted else None,
                measured=ratio,
                standard_error=error,
                running=variance / running,
                moved=(draws.mean(dim=0)[0] - quiet[name][0]) / variance.sqrt(),
            )
        )
    if not norms or all(bool(((n.measured - 1).abs() < UNTOUCHED).all()) for n in norms):
        raise MeasurementError("no BatchNorm of this model stands behind a mask. There is no shift.")
    error = torch.cat([norm.standard_error for norm in norms])
    check_error(tolerance, error, members, "members")
    parts = [norm.predicted for norm in norms if norm.predicted is not None]
    return VarianceShift(
        predicted=torch.cat(parts) if len(parts) == len(norms) else None,
        measured=torch.cat([norm.measured for norm in norms]),
        standard_error=error,
        formula=(
            f"no formula: {subject.why}"
            if subject.smooth is None
            else "first order in the noise, exact where the layers between mask and BatchNorm are linear"
        ),
        loss=subject.loss.name,
        norms=tuple(norms),
    )


def _moments(subject: Subject, seed: int, member: int | None) -> dict[str, Tensor]:
    """Mean and mean square, (2, C), of what each BatchNorm reads, over rows and places."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name, module in subject.network.named_modules():
        if isinstance(module, _BatchNorm):

            def keep(_m: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                values = given[0].double().movedim(1, 0).flatten(1)
                found[name] = torch.stack((values.mean(dim=1), values.square().mean(dim=1)))

            hooks.append(module.register_forward_pre_hook(keep))
    try:
        subject.outputs(seed, member, None if member is None else torch.arange(len(subject.x)))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _predicted(subject: Subject, seed: int) -> dict[str, Tensor]:
    """Variance that the masks add to the input of each BatchNorm, (C,), to first order."""
    noise = subject.smooth
    assert noise is not None
    module, names = inputs_of_norms(noise)
    like = subject.x if subject.x.is_floating_point() else torch.zeros(())
    start = noise.none(like)
    sizes: list[torch.Size] = []

    def flat(*e: Tensor) -> Tensor:
        values = module(subject.x, *e)
        sizes[:] = [value.shape for value in values]
        return torch.cat([value.flatten() for value in values])

    added: dict[str, Tensor] = {}
    random = 0
    totals: dict[tuple[str, bool], Tensor] = {}
    with torch.no_grad():
        for directions, single in noise_directions(noise, subject.x, seed):
            slope = directional(flat, start, directions)
            random += not single
            parts = slope.split([size.numel() for size in sizes])
            for name, size, part in zip(names, sizes, parts, strict=True):
                square = part.view(size).double().square().movedim(1, 0).flatten(1).mean(dim=1)
                totals[name, single] = totals.get((name, single), torch.zeros_like(square)) + square
    for (name, single), total in totals.items():
        added[name] = added.get(name, torch.zeros_like(total)) + (total if single else total / random)
    return added


def inputs_of_norms(noise: NoisyNetwork) -> tuple[fx.GraphModule, list[str]]:
    """The network up to its BatchNorms: (x, noise) -> what each reads; and their names."""
    graph, inputs, names = fx.Graph(), [], []
    copies: dict[fx.Node, fx.Node] = {}
    for node in noise.module.graph.nodes:
        if node.op == "output":
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if "batch_norm" in str(node.target) and isinstance(node.args[3], fx.Node):
            inputs.append(copies[node.args[0]])
            names.append(str(node.args[3].target).removesuffix("running_mean").rstrip("."))
    graph.output(tuple(inputs))
    return fx.GraphModule(noise.module, graph), names

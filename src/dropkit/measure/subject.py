"""What is measured: a copy of a model, rows, a loss, and where chance enters."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.committee.graph import RecordingError
from dropkit.conversion import convert, scan
from dropkit.errors import MeasurementError, NoMaskError, OptionError, ShapeError
from dropkit.masks import masks
from dropkit.measure.losses import Loss, LossFunction, choose_loss
from dropkit.measure.noise import NoisyNetwork
from dropkit.nn.features import Dropout
from dropkit.nn.layer import name_sites


@dataclass(frozen=True, slots=True)
class Subject:
    """A model on data, ready to be measured.

    Attributes:
        network: a copy, converted, in evaluation mode, its sites named; the caller's model is never touched.
        x: (B, ...) rows, in the dtype and on the device of the weights.
        y: (B, ...) targets.
        loss: the mean loss.
        drawn: names of the sites that drew, in the order of the pass.
        noise: the network as a function of its noise; None where it cannot be recorded.
        why: why no formula applies to the whole model; empty where one does.
        plain: the loss without masks.
    """

    network: nn.Module
    x: Tensor
    y: Tensor
    loss: Loss
    drawn: tuple[str, ...]
    noise: NoisyNetwork | None
    why: str
    plain: float

    @property
    def smooth(self) -> NoisyNetwork | None:
        """The network as a function of its noise, where derivatives by all of it mean something."""
        return None if self.why else self.noise

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Trainable weights by name.

        Raises:
            MeasurementError: there are none.
        """
        found = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if not found:
            raise MeasurementError(
                "a model without a trainable weight was given; this instrument measures gradients by weights. "
                "Set requires_grad_() on those that are meant."
            )
        return found

    def loss_of(self, outputs: Tensor) -> Tensor:
        """Outputs (B, *out) -> (), the mean loss on these rows."""
        return self.loss(outputs, self.y)

    def outputs(
        self,
        seed: int = 0,
        member: int | None = None,
        samples: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """Outputs without masks (member None), under one mask for all rows, or with samples, under a mask a row."""
        rows = (
            self.x if x is None else x
        ).clone()  # a model that writes into its input must not write into ours
        if member is None:
            return self.network(rows)
        with masks(seed=seed, member=member, samples=samples):
            return self.network(rows)

    def noisy_loss(self, seed: int, member: int) -> Tensor:
        """The loss of one training pass: each row with a mask of its own."""
        rows = torch.arange(len(self.x))
        return self.loss(self.outputs(seed, member, rows), self.y)

    def noisy_losses(self, seed: int, members: int) -> Tensor:
        """(members,) float64, losses of training passes."""
        with torch.no_grad():
            losses = torch.stack([self.noisy_loss(seed, k).double() for k in range(members)])
        check_finite(losses, "the loss under masks")
        return losses


def subject_of(
    model: nn.Module | Subject,
    x: Tensor,
    y: Tensor,
    loss: LossFunction | None = None,
    *,
    formula: bool = True,
) -> Subject:
    """Copy and convert a model, find its noise, and look at its loss.

    Args:
        model: any module (rows, ...) -> (rows, ...) with dropout that `dropkit.convert` knows; not changed. Or the
            subject that was made of it, these rows and this loss: who asks many instruments records the model once.
        x: (B, ...) rows, at least 2.
        y: (B, ...) targets.
        loss: as in `choose_loss`.
        formula: whether to write the network as a function of its noise.

    Raises:
        OptionError: what was given is no module, or the loss cannot be called.
        ShapeError: x and y are no tensors of as many rows, or fewer than 2.
        NoMaskError: no dropout acts, or all rates are 0.
        MeasurementError: the loss is not finite.
    """
    if isinstance(model, Subject):
        return model
    if not isinstance(model, nn.Module):
        raise OptionError(f"a {type(model).__name__} was given; a torch.nn.Module is needed.")
    check_rows(x, y)
    chosen = choose_loss(loss, y)
    network = convert(model).model.eval()
    name_sites(network)
    for module in network.modules():
        if isinstance(module, Dropout):
            module.inplace = False
    weight = next((p for p in network.parameters() if p.is_floating_point()), None)
    if weight is not None:
        x = x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)
        y = y.to(weight.device, weight.dtype if y.is_floating_point() else y.dtype)
    x, y = x.detach(), y.detach()
    with torch.no_grad(), masks(seed=0, member=0) as context:
        network(x.clone())
    if not context.drawn:
        raise NoMaskError(
            "a model in which no mask acts was given, so there is nothing to measure. Put dropout in: "
            "dropkit.insert(model, after=torch.nn.ReLU, layer=lambda: dropkit.nn.Dropout(0.1))."
        )
    with torch.no_grad():
        outputs = network(x.clone())
        if not isinstance(outputs, Tensor):
            raise ShapeError(
                f"the model returned a {type(outputs).__name__}; one tensor is needed. Wrap it: a module whose forward "
                "takes the logits out."
            )
    noise, why = _noise_of(network, x) if formula else (None, "not asked for")
    _check_rates(network, x, noise)
    plain = chosen(outputs, y)
    check_finite(plain, "the loss without masks")
    return Subject(network, x, y, chosen, context.drawn, noise, why, float(plain))


def check_rows(x: Tensor, y: Tensor, least: int = 2) -> None:
    """Say what is wrong with rows and targets.

    Raises:
        ShapeError: they are no tensors of as many rows, or of too few.
    """
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise ShapeError(
                f"{name} of type {type(value).__name__} was given; a tensor (rows, ...) is needed."
            )
    if len(x) != len(y):
        raise ShapeError(f"{len(x)} rows x and {len(y)} targets y were given; each row needs one.")
    if len(x) < least:
        raise ShapeError(f"rows: {len(x)} given; at least {least} are needed.")


def check_finite(value: Tensor, what: str) -> None:
    """Stop at a value that is not finite.

    Raises:
        MeasurementError: one is not.
    """
    if not bool(torch.isfinite(value).all()):
        raise MeasurementError(
            f"{what} is {float(value.flatten()[~torch.isfinite(value.flatten())][0])}; nothing can be measured of it. "
            "Look for NaN or infinity in x, y and the weights, or lower the rates."
        )


def _noise_of(network: nn.Module, x: Tensor) -> tuple[NoisyNetwork | None, str]:
    """The network as a function of its noise, and why no formula applies to it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            noise = NoisyNetwork(network, x)
    except RecordingError as error:
        return None, f"the model cannot be recorded ({error})"
    if noise.hidden:
        return noise, f"{', '.join(map(repr, noise.hidden))} draws in a way that is no multiplication"
    if noise.rough:
        return noise, f"the output jumps with the noise of {', '.join(map(repr, noise.rough))}"
    if any(site.law == "exact" for site in noise.sites):
        return noise, "masks that drop an exact number have values that are not independent"
    if any(site.rate >= 1 for site in noise.sites):
        return noise, "a rate of 1 leaves nothing to expand around"
    return noise, ""


def _check_rates(network: nn.Module, x: Tensor, noise: NoisyNetwork | None) -> None:
    if noise is not None:
        acting = bool(noise.sites) or bool(noise.hidden)
    else:
        acting = any(site.rate != 0 for site in scan(network, x).sites)
    if not acting:
        raise NoMaskError(
            "every rate of this model is 0, so dropout does nothing to it. Give a rate above 0, such as p=0.1."
        )

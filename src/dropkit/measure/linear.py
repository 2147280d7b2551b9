"""The linear model with dropout on its inputs, for which most of what dropout does has a closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.measure.subject import Subject
from dropkit.nn.layer import StochasticLayer

_SILENT = (nn.Flatten, nn.Identity, nn.Sequential, nn.Dropout)


@dataclass(frozen=True, slots=True)
class LinearModel:
    """outputs = h w' + b with one Bernoulli mask on h, a value for each row and feature; float64 throughout.

    Attributes:
        name: of the linear layer.
        design: h, (B, D).
        weight: w, (C, D).
        bias: b, (C,); zeros where the layer has none.
        has_bias: whether it has one.
        targets: y, (B, C); None where the loss is not the mean squared error.
        rate: chance to drop.
    """

    name: str
    design: Tensor
    weight: Tensor
    bias: Tensor
    has_bias: bool
    targets: Tensor | None
    rate: float

    @property
    def noise_variance(self) -> float:
        """p / (1 - p)."""
        return self.rate / (1 - self.rate)


def linear_model(subject: Subject) -> LinearModel | None:
    """The linear model that a subject is; None where it is none. What is found is checked against the
    subject itself.
    """
    noise = subject.smooth
    if noise is None or len(noise.sites) != 1:
        return None
    (site,) = noise.sites
    layers = [(name, m) for name, m in subject.network.named_modules() if isinstance(m, nn.Linear)]
    others = [
        m for m in subject.network.modules() if not isinstance(m, (nn.Linear, StochasticLayer, *_SILENT))
    ]
    if len(layers) != 1 or any(list(m.parameters(recurse=False)) for m in others):
        return None
    name, layer = layers[0]
    if site.law != "bernoulli" or site.tied or site.width != layer.in_features:
        return None
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _m, given: inputs.append(given[0]))
    with torch.no_grad():
        subject.outputs()
    hook.remove()
    if len(inputs) != 1 or inputs[0].ndim != 2:
        return None
    design = inputs[0]
    with torch.no_grad():
        e = noise.drawn(design, 0, 0)
        expected = layer(design * (1 + e[0].view(design.shape)))
        found = noise(subject.x, e)
    if found.numel() != expected.numel() or not torch.allclose(
        found.view(expected.shape), expected, rtol=1e-4, atol=1e-6
    ):
        return None
    wide = torch.float64
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
    targets = subject.y.view(expected.shape) if subject.loss.name == "mean squared error" else None
    return LinearModel(
        name, design.to(wide), layer.weight.detach().to(wide), bias.to(wide), layer.bias is not None,
        None if targets is None else targets.to(wide), site.rate,
    )  # fmt: skip


def ridge(design: Tensor, y: Tensor, noise_variance: float) -> Tensor:
    """The weights that dropout on the inputs of a linear model leads to.

    w = (X'X + p/(1-p) diag(X'X))^-1 X'y

    Args:
        design: X, (B, D); centre X and y for a model with a bias that no mask touches.
        y: (B, C).
        noise_variance: p / (1 - p).

    Returns:
        (D, C).

    Source: Srivastava et al. 2014, JMLR 15, sec. 9.1, with inverted scaling.
    """
    gram = design.T @ design
    penalised = gram + noise_variance * torch.diag(gram.diagonal())
    return torch.linalg.lstsq(penalised, design.T @ y).solution


def linear_gradient_moments(model: LinearModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """First and second moments, over masks, of the gradient of one row's squared error.

    With A = sum over i != j of w_i x_i + b - y and V = p/q sum over i != j of w_i^2 x_i^2, for r^2 / 2:
    E g_j = x_j (A + w_j x_j / q),    E g_j^2 = x_j^2 / q ((A + w_j x_j / q)^2 + V)

    Args:
        model: with targets.

    Returns:
        By the name of the weight, each (B, *shape of the weight): E g and E g^2 of mean squared error over C outputs.
    """
    assert model.targets is not None
    q, outputs = 1 - model.rate, model.weight.shape[0]
    parts = model.design.unsqueeze(1) * model.weight  # (B, C, D)
    residual = (parts.sum(dim=2) + model.bias - model.targets).unsqueeze(2)  # (B, C, 1)
    spread = model.noise_variance * parts.square()
    others = residual - parts + parts / q
    rest = spread.sum(dim=2, keepdim=True) - spread
    x, factor = model.design.unsqueeze(1), 2 / outputs
    prefix = f"{model.name}." if model.name else ""
    first = {f"{prefix}weight": factor * x * others}
    second = {f"{prefix}weight": factor**2 * x.square() / q * (others.square() + rest)}
    if model.has_bias:
        first[f"{prefix}bias"] = factor * residual.squeeze(2)
        second[f"{prefix}bias"] = factor**2 * (residual.square() + spread.sum(dim=2, keepdim=True)).squeeze(2)
    return first, second

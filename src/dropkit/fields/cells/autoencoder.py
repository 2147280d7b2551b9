"""A denoising autoencoder of counts: inputs are masked, and the loss is a law of counts or squared error.

z = relu layers(Dropout(log1p(10^4 counts / depth)));    mean = depth * softmax(decoder(z))

With `likelihood="squared error"` the decoder's output is compared with the log1p values instead, as in autoencoders
that take zeros for holes to be filled.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dropkit.errors import OptionError, ShapeError
from dropkit.fields.cells.counts import negative_binomial_nll, poisson_nll, zero_inflated_nll
from dropkit.masks import masks
from dropkit.nn.features import Dropout
from dropkit.nn.layer import name_sites

Likelihood = Literal["negative binomial", "poisson", "zero-inflated", "squared error"]
DEPTH = 1e4  # counts to which a cell is scaled before the logarithm, as scanpy's users do


class CountAutoencoder(nn.Module):
    """Counts of a cell to the mean that they are a sample of.

    Args:
        genes: G.
        hidden: width of the two inner layers; bottleneck: of the middle one.
        p: chance to mask an input.
        likelihood: what the loss is.

    Raises:
        OptionError: an unknown likelihood.
        ProbabilityError: p outside [0, 1].
    """

    def __init__(
        self,
        genes: int,
        *,
        hidden: int = 128,
        bottleneck: int = 32,
        p: float = 0.2,
        likelihood: Likelihood = "negative binomial",
    ) -> None:
        super().__init__()
        if likelihood not in get_args(Likelihood):
            raise OptionError(
                f"likelihood={likelihood!r} was given; it is one of {', '.join(get_args(Likelihood))}."
            )
        self.likelihood = likelihood
        self.mask = Dropout(p)
        self.encoder = nn.Sequential(
            nn.Linear(genes, hidden), nn.ReLU(), nn.Linear(hidden, bottleneck), nn.ReLU()
        )
        self.decoder = nn.Sequential(nn.Linear(bottleneck, hidden), nn.ReLU(), nn.Linear(hidden, genes))
        self.log_dispersion = nn.Parameter(torch.zeros(genes))
        self.inflation = nn.Parameter(torch.full((genes,), -3.0))
        name_sites(self)

    def forward(self, counts: Tensor) -> Tensor:
        """(cells, genes) counts -> (cells, genes) expected counts of a cell of that depth.

        Raises:
            ShapeError: counts are not (cells, genes) of this model.
        """
        output, depth = self._decode(counts)
        if self.likelihood == "squared error":
            return (output.clamp(max=12).expm1() * depth / DEPTH).clamp(min=1e-8)
        return (depth * output.softmax(dim=-1)).clamp(min=1e-8)

    def loss(self, counts: Tensor) -> Tensor:
        """(cells,) loss, summed over genes: nats, or squared differences of log1p values.

        A cell without counts has no mean to compare with; its loss is 0.
        """
        if self.likelihood == "squared error":
            output, depth = self._decode(counts)
            return (output - _log_scaled(counts, depth)).square().sum(-1)
        return torch.where(
            counts.sum(-1) > 0, self.negative_log_likelihood(counts, self(counts)).sum(-1), 0.0
        )

    def negative_log_likelihood(self, counts: Tensor, mean: Tensor) -> Tensor:
        """Elementwise, nats, under this model's law; for squared error under Poisson's, as it has none of its own."""
        if self.likelihood in ("poisson", "squared error"):
            return poisson_nll(counts, mean)
        dispersion = self.log_dispersion.exp()
        if self.likelihood == "zero-inflated":
            return zero_inflated_nll(counts, mean, dispersion, self.inflation)
        return negative_binomial_nll(counts, mean, dispersion)

    def _decode(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        genes = self.log_dispersion.shape[0]
        if counts.ndim != 2 or counts.shape[1] != genes:
            raise ShapeError(
                f"Counts of shape {tuple(counts.shape)} were given; the model has (cells, {genes} genes)."
            )
        depth = counts.sum(-1, keepdim=True)
        return self.decoder(self.encoder(self.mask(_log_scaled(counts, depth)))), depth


def _log_scaled(counts: Tensor, depth: Tensor) -> Tensor:
    return torch.log1p(DEPTH * counts / depth.clamp(min=1))


def train_autoencoder(
    model: CountAutoencoder,
    counts: NDArray[np.float32],
    *,
    epochs: int = 40,
    batch: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> CountAutoencoder:
    """Train in place by Adam; the same seed gives the same masks for a cell in whatever batch it comes.

    Args:
        model: fresh or trained before.
        counts: (cells, genes) raw counts.
        epochs, batch, learning_rate: of Adam.
        seed: of the order of cells and of the masks.

    Returns:
        The model, in evaluation mode.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    generator = np.random.default_rng([seed, 59])
    rows = torch.from_numpy(counts)
    model.train()
    step = 0
    for _ in range(epochs):
        order = torch.from_numpy(generator.permutation(len(counts)))
        for ids in order.split(batch):
            optimizer.zero_grad()
            with masks(seed=seed, step=step, samples=ids):
                loss = model.loss(rows[ids]).mean()
            loss.backward()
            optimizer.step()
            step += 1
    return model.eval()

"""Training with a proof: DP-SGD by Opacus, its epsilon by two accountants."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dropkit.errors import MissingPackageError, OptionError

HINT = 'pip install "dropkit[privacy]"'


@dataclass(frozen=True, slots=True, eq=False)
class PrivateRun:
    """A privately trained model and what is proven of it.

    Attributes:
        model: in evaluation mode.
        epsilon: upper bound for `delta`, by Opacus' accountant.
        delta: the chance left out of it.
        steps: taken.
    """

    model: nn.Module
    epsilon: float
    delta: float
    steps: int


def train_privately(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    noise: float,
    clip: float = 1.0,
    epochs: int = 10,
    batch: int = 256,
    learning_rate: float = 0.5,
    delta: float = 1e-5,
    seed: int = 0,
) -> PrivateRun:
    """Train a classifier by DP-SGD: gradients of rows are clipped, Gaussian noise is added to their sum.

    Args:
        model: (B, D) -> (B, C) logits; layers that mix rows (BatchNorm) are refused by Opacus.
        x: (N, D) rows; y: (N,) classes.
        noise: standard deviation of the noise in units of `clip`, above 0.
        clip: largest norm of a row's gradient.
        epochs, batch, learning_rate: of SGD; batches are drawn row by row (Poisson), `batch` on average.
        delta: for which epsilon is stated.
        seed: of batches and noise, for experiments. Noise that is to protect people must not be reproducible.

    Raises:
        MissingPackageError: Opacus is not installed.
        OptionError: noise not above 0.

    Source: Abadi et al. 2016, arXiv:1607.00133.
    """
    if not noise > 0:
        raise OptionError(f"noise={noise} was given; without noise nothing is proven. Give a number above 0.")
    try:
        from opacus import PrivacyEngine
    except ImportError:
        raise MissingPackageError(f"Private training needs Opacus: {HINT}") from None
    generator = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the noise is not cryptographic, and hooks of torch
        engine = PrivacyEngine(accountant="rdp")
        private, optimizer, loader = engine.make_private(
            module=model.train(), optimizer=optimizer, data_loader=loader, noise_multiplier=noise,
            max_grad_norm=clip, noise_generator=generator,
        )  # fmt: skip
        loader.batch_sampler.generator = generator
        steps = 0
        for _ in range(epochs):
            for rows, classes in loader:
                optimizer.zero_grad()
                if len(rows):
                    nn.functional.cross_entropy(private(rows), classes).backward()
                    optimizer.step()
                steps += 1
        epsilon = float(engine.get_epsilon(delta))
    return PrivateRun(private._module.eval(), epsilon, delta, steps)


def proven_epsilon(
    rows: int,
    *,
    noise: float,
    batch: int,
    epochs: int,
    delta: float = 1e-5,
    accountant: Literal["opacus", "dp-accounting"] = "opacus",
) -> float:
    """Upper bound on epsilon of DP-SGD with Poisson batches, by Renyi differential privacy.

    Args:
        rows: N; noise: in units of the clipping norm; batch: mean size; epochs: over the rows.
        delta: for which it is stated.
        accountant: whose computation.

    Raises:
        MissingPackageError: the accountant's package is not installed.
        OptionError: an unknown accountant.
    """
    share, steps = batch / rows, epochs * math.ceil(rows / batch)
    log = logging.getLogger("absl")  # dp-accounting's, which tells of every order at the edge of its range
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as Opacus does of the same
            if accountant == "opacus":
                from opacus.accountants import RDPAccountant

                ours = RDPAccountant()
                ours.history = [(noise, share, steps)]
                return float(ours.get_epsilon(delta))
            if accountant == "dp-accounting":
                import dp_accounting

                event = dp_accounting.SelfComposedDpEvent(
                    dp_accounting.PoissonSampledDpEvent(share, dp_accounting.GaussianDpEvent(noise)), steps
                )
                return float(dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(delta))
    except ImportError:
        raise MissingPackageError(f"The accountant {accountant} is not installed: {HINT}") from None
    finally:
        log.setLevel(level)
    raise OptionError(f"accountant={accountant!r} was given; it is 'opacus' or 'dp-accounting'.")

"""Monte Carlo dropout as it is had elsewhere: by hand, and by the packages that are installed.

Each peer is given a network in evaluation mode and a number of members, and asked for mean and standard deviation
over members of each output. `make peers` installs the packages into an environment of their own.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

Ask = Callable[[Tensor], Tensor]  # (B, ...) -> (2, B, *out): mean and standard deviation over members
MOST_BYTES = 1 << 30  # of the widest activation of all members at once; a pass holds a few of them


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to have Monte Carlo dropout.

    Attributes:
        name: as the table says it.
        prepare: (network of its own, members) -> how it is asked.
        package: on the package index; "" for torch alone.
        module: what is imported of it.
        at_once: whether all members go through the network in one batch.
    """

    name: str
    prepare: Callable[[nn.Module, int], Ask]
    package: str = ""
    module: str = ""
    at_once: bool = False

    def missing(self) -> str:
        """Why it cannot run here; "" where it can."""
        return import_trouble(self.package, self.module) if self.package else ""


@lru_cache
def import_trouble(package: str, module: str) -> str:
    """Why a package cannot be imported, in a line; "" where it can."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed; `make peers` makes an environment with it"
    name_torchvision_operators()
    try:
        load(module)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return f"does not import: {type(error).__name__}: {lines[0]}"
    return ""


def load(module: str) -> Any:
    """A module of a peer, imported without its warnings and its log."""
    level = logging.root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    finally:
        logging.root.setLevel(level)


@lru_cache
def name_torchvision_operators() -> Any:
    """Let torchvision, which two peers import and none uses here, start beside a CPU build of torch.

    Of a build for GPUs it finds its compiled part wanting, and stops where it describes two operators of it. They are
    given a name, never a body. The library that holds the names is returned, since they vanish with it.
    """
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return None
    if torch.version.cuda is not None or version.endswith("+cpu"):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # somebody has named it already
            return library
    return library


def moments(samples: Tensor) -> Tensor:
    """(M, ...) -> (2, ...): mean and standard deviation, as torch has them."""
    deviation, mean = torch.std_mean(samples, dim=0)
    return torch.stack((mean, deviation))


def in_training(network: nn.Module) -> nn.Module:
    """All of a network in training mode but its BatchNorms: dropout inside of attention knows no other switch."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return network


def loop(network: nn.Module, members: int) -> Ask:
    """By hand: one pass after another."""
    in_training(network)

    @torch.no_grad()
    def ask(x: Tensor) -> Tensor:
        return moments(torch.stack([network(x) for _ in range(members)]))

    return ask


def batch(network: nn.Module, members: int) -> Ask:
    """By hand: the rows M times over in one batch."""
    in_training(network)

    @torch.no_grad()
    def ask(x: Tensor) -> Tensor:
        outputs = network(x.repeat(members, *[1] * (x.ndim - 1)))
        return moments(outputs.unflatten(0, (members, len(x))))

    return ask


def torch_uncertainty(network: nn.Module, members: int, at_once: bool) -> Ask:
    """Its wrapper of a network, which switches on the dropout modules alone."""
    wrapper = load("torch_uncertainty.methods").mc_dropout(network, members, on_batch=at_once).eval()

    @torch.no_grad()
    def ask(x: Tensor) -> Tensor:
        return moments(wrapper(x).unflatten(0, (members, len(x))))

    return ask


def baal(network: nn.Module, members: int) -> Ask:
    """Its dropout modules, and its cache of what convolutions and linear maps gave; a fresh cache for each question."""
    dropout, caching = load("baal.bayesian.dropout"), load("baal.bayesian.caching_utils")
    arguments = load("baal.modelwrapper").TrainingArgs(use_cuda=False, replicate_in_memory=False)
    wrapped = dropout.MCDropoutModule(network).eval()

    def ask(x: Tensor) -> Tensor:
        with caching.MCCachingModule(wrapped) as cached:
            asked = load("baal.modelwrapper").ModelWrapper(cached.eval(), arguments)
            samples: Tensor = asked.predict_on_batch(x, iterations=members)  # (B, *out, M)
        return moments(samples.movedim(-1, 0))

    return ask


def lightning_uq_box(network: nn.Module, members: int) -> Ask:
    """Its regression method; it gives mean and standard deviation of the first output alone."""
    method = load("lightning_uq_box.uq_methods").MCDropoutRegression(
        network, num_mc_samples=members, loss_fn=nn.MSELoss()
    )

    def ask(x: Tensor) -> Tensor:
        found = method.predict_step(x)
        return torch.stack((found["pred"][:, 0], found["pred_uct"]))

    return ask


PEERS: tuple[Peer, ...] = (
    Peer("loop", loop),
    Peer("batch", batch, at_once=True),
    Peer("torch-uncertainty, loop", lambda network, members: torch_uncertainty(network, members, False),
         "torch-uncertainty", "torch_uncertainty.methods"),
    Peer("torch-uncertainty, batch", lambda network, members: torch_uncertainty(network, members, True),
         "torch-uncertainty", "torch_uncertainty.methods", at_once=True),
    Peer("baal with its cache", baal, "baal", "baal.modelwrapper"),
    Peer("lightning-uq-box", lightning_uq_box, "lightning-uq-box", "lightning_uq_box.uq_methods"),
)  # fmt: skip


def widest(network: nn.Module, x: Tensor) -> int:
    """Bytes of the largest value that a module of the network puts out for these rows."""
    sizes = [x.numel()]
    network = copy.deepcopy(network)
    for module in network.modules():
        module.register_forward_hook(
            lambda _, __, out: sizes.append(out.numel() if isinstance(out, Tensor) else 0)
        )
    with torch.no_grad():
        network(x)
    return max(sizes) * x.element_size()

"""Which layer of dropkit takes the place of which layer of torch, timm, torchvision and transformers.

Layers of other packages are known by the name of their class and by their attributes, so nothing is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from dropkit.nn.alpha import AlphaDropout, FeatureAlphaDropout
from dropkit.nn.blocks import DropBlock2d, DropBlock3d
from dropkit.nn.features import Dropout
from dropkit.nn.images import ChannelDropout, ChannelDropout1d, ChannelDropout3d
from dropkit.nn.patches import PatchDropout
from dropkit.nn.paths import DropPath, StochasticDepth

Build = Callable[[Any], nn.Module | None]

TORCH: dict[type[nn.Module], Build] = {
    nn.Dropout: lambda old: Dropout(old.p, old.inplace),
    nn.Dropout1d: lambda old: ChannelDropout1d(old.p, old.inplace, unbatched=True),
    nn.Dropout2d: lambda old: ChannelDropout(old.p, old.inplace),  # torch reads three dims as (N, C, L)
    nn.Dropout3d: lambda old: ChannelDropout3d(old.p, old.inplace, unbatched=True),
    nn.AlphaDropout: lambda old: AlphaDropout(old.p, old.inplace),
    nn.FeatureAlphaDropout: lambda old: FeatureAlphaDropout(old.p, old.inplace),
}

# torch's own modules in whose forward chance enters by a call.
CALLING = (_DropoutNd, nn.MultiheadAttention, nn.RNNBase)


@dataclass(frozen=True, slots=True)
class Named:
    """A rule for a class of another package.

    Attributes:
        ending: of the class's name; transformers has a ConvNextDropPath, a SwinDropPath and so on.
        rate: the attribute that holds the rate.
        build: makes the dropkit layer, or None where this one does more than ours.
    """

    ending: str
    rate: str
    build: Build

    def fits(self, module: nn.Module) -> bool:
        """Whether this module is one of the class meant here."""
        if not type(module).__name__.endswith(self.ending) or type(module).__module__.startswith(
            ("torch.", "dropkit.")
        ):
            return False
        return isinstance(getattr(module, self.rate, "absent"), int | float | None)


def _timm_block(old: Any) -> nn.Module | None:
    if old.with_noise or old.drop_prob * old.gamma_scale > 1:
        return None
    return DropBlock2d(
        old.drop_prob * old.gamma_scale, old.block_size, shared_channels=getattr(old, "couple_channels", True),
        gamma="paper", scale="sample" if getattr(old, "scale_by_keep", True) else "none",
    )  # fmt: skip


def _patches(old: Any) -> nn.Module:
    indices = type(old).__name__.endswith("WithIndices") or getattr(old, "return_indices", False)
    return PatchDropout(old.prob, old.num_prefix_tokens, return_indices=indices)


NAMED = (
    # timm, transformers
    Named(
        "DropPath",
        "drop_prob",
        lambda old: DropPath(old.drop_prob or 0.0, getattr(old, "scale_by_keep", True)),
    ),
    Named("DropBlock2d", "drop_prob", _timm_block),
    Named("PatchDropout", "prob", _patches),
    Named("PatchDropoutWithIndices", "prob", _patches),
    # torchvision
    Named("StochasticDepth", "p", lambda old: StochasticDepth(old.p, old.mode)),
    Named("DropBlock2d", "p", lambda old: DropBlock2d(old.p, old.block_size, gamma="paper")),
    Named("DropBlock3d", "p", lambda old: DropBlock3d(old.p, old.block_size, gamma="paper")),
)


def replacement(module: nn.Module) -> nn.Module | None:
    """The dropkit layer for a module, without its mode and hooks; None where no rule fits."""
    build = TORCH.get(type(module))
    if build is not None:
        return build(module)
    for rule in NAMED:
        if rule.fits(module):
            layer = rule.build(module)
            if layer is not None and not hasattr(layer, rule.rate):
                vars(layer)[rule.rate] = getattr(module, rule.rate)  # code around it may read the rate
            return layer
    return None


def known_rate(module: nn.Module) -> float | None:
    """The rate of a dropping layer of another package; None for every other module."""
    rule = next((rule for rule in NAMED if rule.fits(module)), None)
    return None if rule is None else float(getattr(module, rule.rate) or 0.0)


def held_rate(module: nn.Module) -> float:
    """The rate of one of torch's own noisy modules, 0 for every other."""
    if isinstance(module, _DropoutNd):
        return float(module.p)
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return float(module.dropout)
    return 0.0

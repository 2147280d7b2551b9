"""A few fixed masks that overlap as much as is asked for: between one network and an ensemble."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from dropkit.errors import AddressError, OptionError, ShapeError, check_probability
from dropkit.masks import address, noise
from dropkit.masks.address import SEEDS, signed, site_hash, site_key
from dropkit.nn.gaussian import uniform_dropout
from dropkit.nn.layer import StochasticLayer

SITE = "masksembles"  # fixed masks belong to no place in a model, so that naming its sites moves none
FULL_RANGE = 0.25  # the rate at which uniform noise reaches from 0 to 2


def overlapping_masks(features: int, masks: int, ones: int, seed: int = 0) -> Tensor:
    """Fixed masks of exactly so many ones each, of which every feature is in one or more.

    Mask k keeps the `ones` features with the largest of its words. Features that no mask keeps are then given, the one
    with the largest word first, to the mask in which that word is; there the feature with the smallest word goes that
    other masks keep too. Counts stay as they are.

    Args:
        features: C.
        masks: n.
        ones: of each mask, between C / n and C.
        seed: other masks for another seed.

    Returns:
        (n, C) bool, the same on every machine: a pure function of the four numbers.

    Raises:
        OptionError: numbers out of range, or too few ones for every feature to be kept by some mask.
    """
    for name, value, least in (("features", features, 1), ("masks", masks, 1), ("ones", ones, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name}={value!r} was given; it is a whole number from {least} on.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise OptionError(f"seed={seed!r} was given; a seed is a whole number from 0 to 2**64 - 1.")
    if ones > features or ones * masks < features:
        raise OptionError(
            f"{ones} of {features} features for each of {masks} masks were asked for; every feature needs a mask that "
            f"keeps it, so each keeps {-(-features // masks)} to {features}. Take more masks, or drop less."
        )
    return _overlapping_masks(features, masks, ones, seed).clone()


@lru_cache(maxsize=256)
def _overlapping_masks(features: int, masks: int, ones: int, seed: int) -> Tensor:
    key = torch.tensor(signed(site_key(seed, site_hash(SITE), address.EXACT)))
    words = noise.words(key, torch.tensor(0), torch.arange(masks), 0, features)
    order = words.sort(dim=1, stable=True, descending=True).indices
    keep = torch.zeros(masks, features, dtype=torch.bool).scatter(1, order[:, :ones], True)
    unkept = (~keep.any(dim=0)).nonzero()[:, 0]
    best = words.amax(dim=0)
    for feature in unkept[best[unkept].argsort(stable=True, descending=True)].tolist():
        twice = keep.sum(dim=0) > 1
        # The mask with the largest word in this feature, among those that have one to give.
        giving = (keep & twice).any(dim=1)
        k = int(torch.where(giving, words[:, feature], -1).argmax())
        gone = int(torch.where(keep[k] & twice, words[k], 1 << 32).argmin())
        keep[k, gone], keep[k, feature] = False, True
    return keep


def ones_of_scale(features: int, masks: int, scale: float) -> int:
    """How many ones each mask has, so that masks which overlap by this scale keep all features between them.

    features = ones * scale * (1 - (1 - 1 / scale)^masks),    rounded to the nearest count that can be

    From a pool of ones * scale places each mask takes `ones` at random, and the places that none has taken are left
    out: what remains is, on average, the features. Two masks share 1 / (2 scale - 1) of what they keep between them.
    scale = 1: all masks keep all; large: they share nothing, an ensemble of networks of features / masks.

    Args:
        features, masks: as in `overlapping_masks`.
        scale: 1 or more.

    Raises:
        OptionError: the scale is not a number from 1 on.

    Source: Durasov et al. 2021, CVPR, arXiv:2012.08334, section 3.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 1 <= scale < math.inf:
        raise OptionError(f"scale={scale!r} was given; it is a number from 1 (masks are equal) on.")
    # log1p and expm1, so that a huge scale keeps its digits.
    taken = 1.0 if scale == 1 else -math.expm1(masks * math.log1p(-1 / scale))
    return min(max(round(features / (scale * taken)), -(-features // masks)), features)


def masksembles(
    x: Tensor,
    masks: Tensor,
    training: bool = True,
    *,
    dim: int = 1,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Keep of each row what one of a few fixed masks keeps.

    y[b, c] = x[b, c] * masks[k[b], c] * C / (ones of a mask)

    k[b] is drawn by the row's address, each mask with chance 1 / n; for committee member k it is k, for all rows. So
    any batch size will do. The mean over masks is x where each feature is kept by as many masks; in general that of
    feature c is x times C / ones times the share of the masks that keep it.

    Args:
        x: (B, ..., C, ...), any floating or complex dtype; dim 0 counts the rows.
        masks: (n, C) bool with as many ones in each, as `overlapping_masks` makes them.
        training: False gives x back.
        dim: which dim of x counts the features, not 0: 1 for (B, C) and (B, C, *space).
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        Shape and dtype of x. A dropped NaN or infinity is 0.

    Raises:
        ShapeError: x has not C features along dim, masks are not (n, C), or samples are not one for each row.
        AddressError: a member that is not one of the n masks, or the same address twice in one `masks` context.

    Source: Durasov et al. 2021, CVPR, arXiv:2012.08334. There a batch is divided among the masks by position, and must
        be a multiple of n; and nothing is scaled.
    """
    if masks.ndim != 2 or masks.dtype != torch.bool:
        raise ShapeError(
            f"masks of shape {tuple(masks.shape)}, {masks.dtype} were given; (n, C), bool is needed."
        )
    if not -x.ndim <= dim < x.ndim or dim % x.ndim == 0 or x.shape[dim] != masks.shape[1]:
        raise ShapeError(
            f"x of shape {tuple(x.shape)} with dim={dim} was given; it needs rows along dim 0 and {masks.shape[1]} "
            "features along that dim."
        )
    if not training:
        return x
    chosen = masks.to(x.device)[_mask_of_rows(x, len(masks), site, owner)]  # (B or 1, C)
    sizes = [len(chosen), *[1] * (x.ndim - 1)]
    sizes[dim] = masks.shape[1]
    scale = masks.shape[1] / masks[0].sum().clamp_min(1).item()
    return torch.where(chosen.view(sizes), x * scale, 0)


def _mask_of_rows(x: Tensor, masks: int, site: str | None, owner: object | None) -> Tensor:
    """(B,) or (1,) int64: which mask serves each row."""
    context = None if torch.compiler.is_compiling() else address.current()
    if context is not None and context.member is not None and context.samples is None:
        uniform_dropout(
            torch.ones(0), FULL_RANGE, site=site, owner=owner
        )  # the pass learns that this place drew
        return _as_mask(context.member, masks).view(1)
    ones = torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
    u = uniform_dropout(ones, FULL_RANGE, site=site, owner=owner) / 2  # in (0, 1), exact
    return (u * masks).long().clamp_max(masks - 1)  # the uppermost u of all may round up


def _as_mask(member: int | Tensor, masks: int) -> Tensor:
    index = torch.as_tensor(member)
    highest = index
    while torch._C._functorch.is_batchedtensor(
        highest
    ):  # under torch.func.vmap: all members that are asked for
        highest = torch._C._functorch.get_unwrapped(highest)
    if int(highest.max()) >= masks:
        raise AddressError(
            f"member {int(highest.max())} was asked for, of {masks} masks; members are 0 to {masks - 1}. "
            "Ask for as many members as there are masks, or make more masks."
        )
    return index


class Masksembles(StochasticLayer):
    """The layer around `masksembles`, with masks from `overlapping_masks`; the identity while nobody asks for noise.

    Masks are a function of the numbers below, and so of the code that builds the model: nothing of them is in the state
    dict, and a model that is loaded has the masks that it was trained with.

    Args:
        features: C, of dim `dim`.
        masks: n, how many there are; committee members are 0 to n - 1.
        scale: how little masks overlap, from 1 (all keep everything) on; see `ones_of_scale`.
        p: in place of a scale, the share of the features that each mask drops, in [0, 1 - 1 / n].
        dim: which dim counts the features: 1 for (B, C) and (B, C, *space), -1 for sequences (B, T, C).
        seed: other masks for another seed. Layers of one width and seed have the same masks.

    Raises:
        ProbabilityError: p is outside [0, 1].
        OptionError: numbers out of range, or a scale together with p.

    Source: Durasov et al. 2021, CVPR, arXiv:2012.08334, whose defaults are 4 masks and scale 2.

    Example:
        >>> import torch, dropkit as dk
        >>> layer = dk.nn.Masksembles(10, masks=4, scale=2.0).eval()
        >>> layer.masks.sum(dim=1).tolist()
        [5, 5, 5, 5]
        >>> with dk.masks(member=2):
        ...     y = layer(torch.ones(3, 10))
        >>> bool(((y != 0) == layer.masks[2]).all())
        True
    """

    def __init__(
        self,
        features: int,
        masks: int = 4,
        scale: float | None = None,
        *,
        p: float | None = None,
        dim: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if scale is not None and p is not None:
            raise OptionError(
                f"scale={scale!r} and p={p!r} were given; each fixes how much a mask keeps: give one."
            )
        for name, value in (("features", features), ("masks", masks)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name}={value!r} was given; it is a whole number from 1 on.")
        if p is not None:
            self.ones = round((1 - check_probability(p)) * features)
        else:
            self.ones = ones_of_scale(features, masks, 2.0 if scale is None else scale)
        self.features, self.count, self.dim, self.seed = features, masks, dim, seed
        overlapping_masks(features, masks, self.ones, seed)  # refused here if they cannot be

    @property
    def masks(self) -> Tensor:
        """(n, C) bool, True where a feature stays."""
        return overlapping_masks(self.features, self.count, self.ones, self.seed)

    @property
    def p(self) -> float:
        """The share of the features that each mask drops."""
        return 1 - self.ones / self.features

    def forward(self, x: Tensor) -> Tensor:
        """Features along `dim` -> the same shape."""
        masks = _overlapping_masks(self.features, self.count, self.ones, self.seed)
        return masksembles(x, masks, self.active, dim=self.dim, site=self.site, owner=self)

    def extra_repr(self) -> str:
        """The masks in numbers."""
        return (
            f"features={self.features}, masks={self.count}, ones={self.ones}, p={self.p:.4g}, dim={self.dim}, "
            f"seed={self.seed}"
        )

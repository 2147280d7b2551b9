"""How a committee will run a model: what is asked for noise, one member at a time or many, in which pieces.

The decision is made on the first rows that come, from the model and the shape of a row alone, so that neither the
number of rows nor the memory that happens to be free changes a single bit of the output.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dropkit.errors import DropkitWarning, NoMaskError, ShapeError
from dropkit.masks.address import masks
from dropkit.nn.features import Dropout
from dropkit.nn.layer import StochasticLayer, name_sites

How = Literal["vmap", "loop", "once"]

# What one chunk of members may hold of the widest layer. From 4 to 16 MiB ran alike where it was tried; less pays
# for more passes, more takes memory for nothing.
CHUNK_BYTES = 8 << 20
CHUNK_MEMBERS = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """What a committee decided about a model and a shape of rows.

    Attributes:
        how: "vmap": many members in one pass, and what no mask has touched is computed once; "loop": one member after
            the other; "once": no mask acts, so one pass serves all.
        reason: why.
        sites: the places that drew a mask, in the order of the pass.
        silent: noisy places that stay silent: dropkit layers that were not reached, torch's own dropout.
        tile: rows of one pass.
        members_at_once: members of one pass.
        widest: the most values per row that a layer puts out.
        bytes: tile * members_at_once * widest * size of a value; a pass holds a few times that.
    """

    how: How
    reason: str
    sites: tuple[str, ...]
    silent: tuple[str, ...]
    tile: int
    members_at_once: int
    widest: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.how}: {self.reason}; {len(self.sites)} sites; {self.members_at_once} members x {self.tile} rows "
            f"at once, widest layer {self.widest} values, {self.bytes / 2**20:.1f} MiB"
        )


def committee_copy(model: nn.Module) -> nn.Module:
    """The model's structure anew, in evaluation mode and with named sites, around the same weights and buffers.

    The caller's modules keep their modes, names and hooks whatever happens; a weight that is changed in place
    (an optimizer step, load_state_dict) is changed for the committee too.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    network = copy.deepcopy(model, shared).eval()
    name_sites(network)
    for module in network.modules():
        if isinstance(module, Dropout):
            module.inplace = False  # many members cannot be written into the one activation they start from
    return network


def run_member(
    network: nn.Module, x: Tensor, seed: int, member: int | Tensor
) -> tuple[Tensor, tuple[str, ...]]:
    """Thinned network `member` on x, (B, ...) -> (B, *out), and the names of the sites that drew a mask."""
    with masks(seed=seed, member=member) as context:
        # A model that writes into its input (ReLU(inplace=True) comes first) must not change what the next member sees.
        return network(x.clone()), context.drawn


@contextmanager
def every_layer_runs(network: nn.Module) -> Iterator[None]:
    """Keep torch's transformer layers from taking their inference path, which skips the dropout layers inside."""
    attention = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
    if not any(isinstance(module, attention) for module in network.modules()):
        yield
        return
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def make_plan(network: nn.Module, tile: Tensor, seed: int, allow_no_spread: bool) -> Plan:
    """Run members 0 and 1 of a copied network on one tile of rows, and decide.

    Raises:
        NoMaskError: no site drew a mask.
        ShapeError: the model does not return one tensor with the rows first.
    """
    outputs: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for name, module in network.named_modules():
            hook = module.register_forward_hook(
                lambda _m, _i, out, name=name: outputs.setdefault(name, []).append(out)
            )
            stack.callback(hook.remove)
        result, sites = run_member(network, tile, seed, 0)
    layers = {name: m for name, m in network.named_modules() if isinstance(m, StochasticLayer)}
    reached = outputs.keys() | _lent(sites, layers)
    silent = (
        *(f"{n} (not reached)" for n in layers if n not in reached and _rate(layers[n]) > 0),
        *_torch_noise(network),
    )
    if not sites and not allow_no_spread:
        raise NoMaskError(_no_mask_message(layers, silent))
    if not isinstance(result, Tensor) or result.ndim == 0 or result.shape[0] != len(tile):
        what = (
            f"a tensor of shape {tuple(result.shape)}"
            if isinstance(result, Tensor)
            else type(result).__name__
        )
        raise ShapeError(
            f"the model returned {what} for {len(tile)} rows; a committee needs one tensor (rows, *out)."
        )
    _warn(layers, sites, silent, outputs, result, allow_no_spread)

    tensors = [out for several in outputs.values() for out in several if isinstance(out, Tensor)]
    widest = max(-(-out.numel() // len(tile)) for out in (*tensors, result))
    row_bytes = len(tile) * widest * result.element_size()
    at_once = CHUNK_MEMBERS
    while at_once > 1 and at_once * row_bytes > CHUNK_BYTES:
        at_once //= 2
    how, reason = _decide(
        network, tile, seed, result, at_once, all(n in layers and not _rate(layers[n]) for n in sites)
    )
    if how != "vmap":
        at_once = 1
    return Plan(how, reason, sites, silent, len(tile), at_once, widest, at_once * row_bytes)


def _decide(
    network: nn.Module, tile: Tensor, seed: int, first: Tensor, at_once: int, nothing_drops: bool
) -> tuple[How, str]:
    if nothing_drops:
        return "once", "every rate is 0 or no mask acts, so all members are the same network"
    if at_once == 1:
        return "loop", "one member fills the memory meant for a pass"
    try:
        with warnings.catch_warnings():
            # torch.func warns where it would fall back on a slow loop of its own.
            warnings.simplefilter("error")
            together = torch.func.vmap(lambda m: run_member(network, tile, seed, m)[0])(torch.arange(2))
    except Exception as error:  # the loop ran: whatever is wrong lies between the model and vmap
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return "loop", f"torch.func.vmap cannot run this model ({lines[0]})"
    alone = torch.stack((first, run_member(network, tile, seed, 1)[0]))
    scale = float(alone.abs().max()) or 1.0
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-4 * scale, equal_nan=True):
        return "loop", "torch.func.vmap gives this model other numbers than one member after the other"
    return "vmap", "members run together; what no mask has touched is computed once"


def _rate(layer: nn.Module) -> float:
    """A layer's chance to drop; 1 where it does not say, as it must not be taken for silent."""
    p = getattr(layer, "p", 1.0)
    return float(p.detach().max()) if isinstance(p, Tensor) else float(p)


def _lent(sites: tuple[str, ...], layers: dict[str, StochasticLayer]) -> set[str]:
    """Layers whose rate the module above them hands to a function, as attention does in converted models."""
    drawing = {site.partition(":")[0] for site in sites if ":" in site}
    return {name for name in layers if name.rpartition(".")[0] in drawing}


def _torch_noise(network: nn.Module) -> list[str]:
    """Torch's own noisy modules with a rate above 0, which a committee leaves in evaluation mode."""
    found = []
    for name, module in network.named_modules():
        if "dropkit_site" in vars(module):
            continue  # `dropkit.convert` has its calls answered by dropkit
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rate = module.p
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            rate = module.dropout
        else:
            continue
        if rate > 0:
            found.append(f"{name or 'the model'} (torch.nn.{type(module).__name__})")
    return found


def _no_mask_message(layers: dict[str, StochasticLayer], silent: tuple[str, ...]) -> str:
    if layers:
        found = f"its dropkit layers were never reached by the pass: {', '.join(layers)}"
    elif silent:
        found = (
            f"it has only torch's own noise: {_some(silent)}. Convert it (dropkit.convert), or build it with "
            "dropkit.nn.Dropout in these places"
        )
    else:
        found = "it has no dropkit layer. Build it with dropkit.nn.Dropout where units are to drop, and train it so"
    return f"a model in which no mask acts was given, so all members would be the same network: {found}."


def _warn(
    layers: dict[str, StochasticLayer],
    sites: tuple[str, ...],
    silent: tuple[str, ...],
    outputs: dict[str, list[Tensor]],
    result: Tensor,
    allow_no_spread: bool,
) -> None:
    said = []
    if sites and all(n in layers and _rate(layers[n]) == 0.0 for n in sites) and not allow_no_spread:
        said.append(f"every rate is 0 ({_some(sites)}), so the members agree and the epistemic part is 0.")
    if silent and sites:
        said.append(
            f"these noisy places stay silent in the committee: {_some(silent)}. Use dropkit.nn.Dropout there."
        )
    # The tensors in `outputs` are still held, so equal memory means the same values, not memory used again.
    where = result.untyped_storage().data_ptr()
    for name, layer in layers.items():
        last = outputs.get(name, [None])[-1]
        if isinstance(last, Tensor) and _rate(layer) > 0 and last.untyped_storage().data_ptr() == where:
            said.append(
                f"the output is that of dropout layer {name!r}: each value is 0 or y / (1 - p), and the spread says "
                "nothing but |y| sqrt(p / (1 - p)). Move the layer before the last weights."
            )
    for line in said:
        warnings.warn(line, DropkitWarning, stacklevel=6)


def _some(names: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(repr(n) for n in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )

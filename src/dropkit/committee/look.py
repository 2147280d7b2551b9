"""The first look at a model: its copy for a committee, and whether its masks act where they should.

A committee that leaves a noisy place out is sure where it should not be, without a word. So everything that would make
its spread wrong is an error here, unless it was accepted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dropkit.committee.outputs import flatten, rows_first
from dropkit.committee.run import Leaves, Tile, count_rows, run_member
from dropkit.conversion.converting import convert_in_place
from dropkit.conversion.records import Conversion
from dropkit.errors import NoMaskError, OptionError
from dropkit.nn.features import Dropout
from dropkit.nn.layer import StochasticLayer, name_sites

Trouble = Literal["no spread", "silent sites", "dropout on the output", "other randomness"]
TROUBLES: tuple[Trouble, ...] = ("no spread", "silent sites", "dropout on the output", "other randomness")


def committee_copy(model: nn.Module) -> tuple[nn.Module, Conversion | None]:
    """The model's structure anew, in evaluation mode and with named sites, around the same weights and buffers.

    Dropout that is torch's, or called by name in a forward, is converted on the copy. The caller's modules keep their
    modes, names and hooks whatever happens; a weight that is changed in place (an optimizer step, load_state_dict) is
    changed for the committee too.

    Returns:
        The copy, and what was converted in it; None where the model's dropout is dropkit's already.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    conversion = None
    with suppress(NoMaskError, OptionError):  # no torch dropout in it
        conversion = convert_in_place(copy.deepcopy(model, dict(shared)))
    if conversion is not None and not conversion.replaced:
        conversion = None
    network = copy.deepcopy(model, dict(shared)) if conversion is None else conversion.model
    network.eval()
    name_sites(network)
    for module in network.modules():
        if isinstance(module, Dropout):
            module.inplace = False  # many members cannot be written into the one activation they start from
    return network, conversion


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


@dataclass(frozen=True, slots=True)
class Look:
    """What one pass of member 0 shows of a model.

    Attributes:
        leaves: the output's tensors.
        rebuild: as many values as leaves -> the output's structure with these in their places.
        sites: the places that drew a mask.
        silent: noisy places that did not.
        drops: whether any rate is above 0.
        widest: the most values per row that a module puts out.
        operations: multiply-adds of the pass.
    """

    leaves: Leaves
    rebuild: Callable[[Sequence[Any]], Any]
    sites: tuple[str, ...]
    silent: tuple[str, ...]
    drops: bool
    widest: int
    operations: float


def look(
    network: nn.Module, tile: Tile, seed: int, allow: Collection[Trouble], conversion: Conversion | None
) -> Look:
    """Run member 0 of a copied network on some rows, and see whether masks act where they should.

    Raises:
        NoMaskError: no site drew a mask, a noisy place stays silent, or the output is that of a dropout layer.
        OptionError: the pass draws other random numbers.
        ShapeError: the model does not return tensors with the rows first.
    """
    outputs: dict[str, list[Tensor]] = {}
    inside: list[str] = []
    others = _Others(inside)
    generator = torch.random.get_rng_state()
    with ExitStack() as stack, FlopCounterMode(display=False) as counter, others:
        for name, module in network.named_modules():
            enter = module.register_forward_pre_hook(lambda _m, _i, name=name: inside.append(name))
            stack.callback(enter.remove)

            def leave(_m: nn.Module, _i: Any, out: Any, name: str = name) -> None:
                inside.pop()
                outputs.setdefault(name, []).append(out)

            stack.callback(module.register_forward_hook(leave).remove)
        result, sites = run_member(network, tile.inputs, tile.kwargs, seed, 0, tile.ids)
    layers = {name: m for name, m in network.named_modules() if isinstance(m, StochasticLayer)}
    reached = outputs.keys() | _lent(sites, layers)
    silent = (
        *(f"{n} (not reached)" for n in layers if n not in reached and _rate(layers[n]) > 0),
        *_torch_noise(network),
        *(f"{left.name or 'the model'} ({left.what})" for left in (conversion.left if conversion else ())),
    )
    rows = count_rows(tile)
    leaves = output_leaves(result, rows)
    if not sites and "no spread" not in allow:
        raise NoMaskError(_no_mask_message(layers, silent))
    _refuse_other_randomness(others, generator, allow)
    if silent and "silent sites" not in allow and sites:
        raise NoMaskError(
            f"these noisy places stay silent in the committee: {some_names(silent)}, so its spread leaves them out. "
            "Use dropkit's layers there; or accept it: allow=('silent sites',)."
        )
    on_output = _dropout_on_output(layers, outputs, leaves)
    if on_output and "dropout on the output" not in allow:
        raise NoMaskError(
            f"the output is that of dropout layer {on_output!r}: each value is 0 or y / (1 - p), and the spread says "
            "nothing but |y| sqrt(p / (1 - p)). Move the layer before the last weights, or accept it: "
            "allow=('dropout on the output',)."
        )
    drops = not all(n in layers and not _rate(layers[n]) for n in sites)
    if sites and not drops and "no spread" not in allow:
        raise NoMaskError(
            f"every rate is 0 ({some_names(sites)}), so all members are the same network and their spread is 0. "
            "Or accept it: allow=('no spread',)."
        )
    tensors = [out for several in outputs.values() for out in tree_leaves(several) if isinstance(out, Tensor)]
    widest = max(-(-out.numel() // rows) for out in (*tensors, *leaves))
    return Look(leaves, flatten(result).rebuild, sites, silent, drops, widest, counter.get_total_flops() / 2)


def output_leaves(result: Any, rows: int) -> Leaves:
    """The tensors of a model's output, each (B, *out).

    Raises:
        ShapeError: there is none, or one has not the rows first.
    """
    flat = flatten(result)
    rows_first(flat, rows)
    return tuple(flat.leaves)


def _rate(layer: nn.Module) -> float:
    """A layer's chance to drop; 1 where it does not say, as it must not be taken for silent."""
    p = getattr(layer, "p", 1.0)
    p = getattr(p, "final", p)  # a schedule's last word
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
            continue  # converted: its calls are answered by dropkit
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rate = module.p
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            rate = module.dropout
        else:
            continue
        if rate > 0:
            found.append(f"{name or 'the model'} (torch.nn.{type(module).__name__})")
    return found


class _Others(TorchDispatchMode):
    """Notes the random operators of a pass that are none of dropkit's, and in which module each is called."""

    def __init__(self, inside: list[str]) -> None:
        super().__init__()
        self.inside = inside
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and func.namespace != "dropkit":
            where = self.inside[-1] if self.inside else ""
            self.found[f"{func.overloadpacket.__name__} in {where or 'the model'}"] = None
        return func(*args, **(kwargs or {}))


def _refuse_other_randomness(others: _Others, before: Tensor, allow: Collection[Trouble]) -> None:
    if torch.equal(before, torch.random.get_rng_state()) or "other randomness" in allow:
        return
    named = f": {', '.join(others.found)}" if others.found else ""
    raise OptionError(
        f"the model draws other random numbers in evaluation, from torch's generator{named}. No member is a function. "
        "Take them out, or accept it: allow=('other randomness',)."
    )


def _no_mask_message(layers: dict[str, StochasticLayer], silent: tuple[str, ...]) -> str:
    if layers:
        found = f"its dropkit layers were never reached by the pass: {', '.join(layers)}"
    elif silent:
        found = f"all noise in it stays silent: {some_names(silent)}. Build it with dropkit.nn.Dropout in these places"
    else:
        found = (
            "it has no dropout. Put some in: dropkit.insert(model, after=torch.nn.ReLU, layer=lambda: "
            "dropkit.nn.Dropout(0.1)), and train it so"
        )
    return f"a model in which no mask acts was given, so all members would be the same network: {found}."


def _dropout_on_output(
    layers: dict[str, StochasticLayer], outputs: dict[str, list[Tensor]], leaves: Leaves
) -> str | None:
    # The tensors in `outputs` are still held, so equal memory means the same values, not memory used again.
    where = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    for name, layer in layers.items():
        last = outputs.get(name, [None])[-1]
        if isinstance(last, Tensor) and _rate(layer) > 0 and last.untyped_storage().data_ptr() in where:
            return name or "the model"
    return None


def some_names(names: Sequence[str], most: int = 6) -> str:
    """The first few of many names."""
    return ", ".join(repr(n) for n in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )

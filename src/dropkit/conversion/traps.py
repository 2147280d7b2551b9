"""Silent failures of Monte Carlo dropout, found in a model before anybody walks into them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dropkit.conversion.frames import TRANSFORMERS, is_message_passing
from dropkit.conversion.intercept import Served
from dropkit.conversion.records import Finding, Site
from dropkit.conversion.watch import Pass, memory_of, tensors_in


def find_traps(
    network: nn.Module, sites: list[Site], in_train: Pass | None, in_eval: Pass | None
) -> Iterator[Finding]:
    """What goes wrong without a word in this model; the passes are None where no example was run."""
    yield from _fast_path(network)
    yield from _one_layer(network)
    yield from _last_layer(network, sites, in_train)
    yield from _always_on(sites)
    if in_train is not None:
        yield from _never(sites, in_train)
        yield from _rows(network, in_train)
    yield from _hidden(sites)
    yield from _batch_norm(network, sites)


def _fast_path(network: nn.Module) -> Iterator[Finding]:
    inside: set[int] = set()
    for name, module in network.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            inside.add(id(module.self_attn))
            rates = [module.self_attn.dropout, *(m.p for m in module.modules() if isinstance(m, nn.Dropout))]
            attention, quick = module.self_attn, bool(module.activation_relu_or_gelu)
        elif isinstance(module, nn.MultiheadAttention) and id(module) not in inside:
            rates, attention, quick = [module.dropout], module, True
        else:
            continue
        if isinstance(module, Served) or not max(rates) > 0 or not quick:
            continue
        if not attention.batch_first or attention.num_heads % 2 or attention.in_proj_bias is None:
            continue  # torch takes the long way by itself
        if attention._qkv_same_embed_dim:
            yield Finding(
                "fast path",
                name,
                "in eval() under no_grad torch runs this layer without its dropout, even where its parts are switched "
                "to train(): the spread is exactly 0. dropkit.convert keeps it from that path.",
            )


def _one_layer(network: nn.Module) -> Iterator[Finding]:
    for name, module in network.named_modules():
        if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers == 1:
            yield Finding(
                "one layer",
                name,
                f"dropout={module.dropout:g} acts between layers, and there is one: nothing is ever dropped. "
                "Put a dropout layer after it, or take dropkit.nn's recurrent layers.",
            )


def _last_layer(network: nn.Module, sites: list[Site], in_train: Pass | None) -> Iterator[Finding]:
    names = []
    if in_train is not None:
        outputs = {memory_of(tensor) for tensor in tensors_in(in_train.output)} - {0}
        rates = {site.name for site in sites if site.rate != 0}
        names = [e.name for e in in_train.events if e.acts and e.memory in outputs and e.name in rates]
        names += [n for n, memory in in_train.results.items() if memory in outputs and n in rates]
    elif isinstance(network, nn.Sequential) and len(network):
        last = str(len(network) - 1)
        names = [site.name for site in sites if site.name == last and site.kind == "module" and site.rate]
    for name in dict.fromkeys(names):
        yield Finding(
            "last layer",
            name,
            "the output is that of dropout: each value is 0 or y / (1 - p), and the spread says nothing but "
            "|y| sqrt(p / (1 - p)). Move it before the last weights.",
        )


def _always_on(sites: list[Site]) -> Iterator[Finding]:
    for site in sites:
        if site.acts_in_eval and site.kind in ("call", "draw"):
            rate = "" if site.rate is None else f" at rate {site.rate:g}"
            yield Finding(
                "always on",
                site.name,
                f"{site.what} acts in eval() too{rate} ({site.where or 'unknown place'}). "
                "Hand it `rate if self.training else 0.0`, or training=self.training.",
            )


def _never(sites: list[Site], in_train: Pass) -> Iterator[Finding]:
    lent = {(e.name, e.rate) for e in in_train.events}  # the module above hands the rate to a function
    drawing = {name.partition(":")[0] for name in in_train.drawn if ":" in name}
    for site in sites:
        if site.acts_in_train or not site.rate or site.kind == "rate":
            continue
        if site.kind == "call":
            yield Finding(
                "never on",
                site.name,
                f"{site.what} at rate {site.rate:g} acts neither in train() nor in eval(): its training flag is False, "
                "which for alpha dropout is torch's default.",
            )
            continue
        above = site.name.rpartition(".")[0]
        if site.name not in in_train.reached and (above, site.rate) not in lent and above not in drawing:
            yield Finding(
                "not reached", site.name, f"{site.what} at rate {site.rate:g} was not called by the example."
            )


def _hidden(sites: list[Site]) -> Iterator[Finding]:
    hidden = [
        s
        for s in sites
        if s.kind in ("rate", "call") and s.acts_in_train is not False and not s.acts_in_committee
    ]
    if hidden:
        first = hidden[0]
        others = f" (and {len(hidden) - 1} more)" if len(hidden) > 1 else ""
        yield Finding(
            "hidden rate",
            first.name,
            f"{first.what}{others} drops by a number and the mode of the module around it: switching dropout layers to "
            "train() does not reach them. dropkit.convert does.",
        )


def _batch_norm(network: nn.Module, sites: list[Site]) -> Iterator[Finding]:
    moved = [n for n, m in network.named_modules() if isinstance(m, _NormBase) and m.track_running_stats]
    if moved and any(site.acts_in_train is not False for site in sites):
        others = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        yield Finding(
            "batch norm",
            moved[0],
            f"model.train() to have dropout at prediction makes this layer{others} normalise by the batch and moves "
            "its running statistics. dropkit.Committee leaves it in eval().",
        )


def _rows(network: nn.Module, in_train: Pass) -> Iterator[Finding]:
    modules = dict(network.named_modules())
    known = {
        id(child)
        for module in modules.values()
        if isinstance(module, (*TRANSFORMERS, nn.RNNBase, nn.MultiheadAttention))
        or is_message_passing(module)
        for child in module.modules()
    }
    found: dict[str, tuple[int, ...]] = {}
    for event in in_train.events:
        shape, rows = event.shape, in_train.rows
        if (
            id(modules[event.name]) not in known
            and rows > 1
            and len(shape) > 1
            and shape[0] != rows == shape[1]
        ):
            found.setdefault(event.name, shape)
    for name, shape in found.items():
        yield Finding(
            "rows",
            name,
            f"what is dropped has shape {shape} for {in_train.rows} rows, which seem to be dimension 1: a member would "
            f"treat them by their place in the batch. Put rows first, or convert with rows={{{name!r}: 1}}.",
        )

"""A committee on disk and back: the weights, the recipe of its masks, and no code.

Members are not stored: seed and sites are enough to have every one back, bit for bit. The model's code is not stored
either, for that would take pickle; whoever loads gives a model of the same structure, and the weights are put in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dropkit.directory import COMMITTEE, ModelFiles, read_directory, write_directory
from dropkit.errors import DropkitError, ModelDirectoryError, OptionError
from dropkit.masks.address import SCHEME
from dropkit.nn.layer import StochasticLayer
from dropkit.nn.schedules import Schedule
from dropkit.records import rebuild

if TYPE_CHECKING:
    from dropkit.committee.committee import Committee

RECIPE, WEIGHTS = "committee.json", "weights.safetensors"


@dataclass(frozen=True, slots=True)
class SavedSite:
    """A place where masks are drawn.

    Attributes:
        name: its qualified name, part of the address of its masks.
        layer: name of its class.
        rates: (name, values) of each number that sets its noise: chances to drop and the like; one value, or all those
            of a tensor.
    """

    name: str
    layer: str
    rates: tuple[SavedRate, ...]


@dataclass(frozen=True, slots=True)
class SavedRate:
    """One number, or tensor of numbers, of a site.

    Attributes:
        name: the layer's attribute.
        values: one value, or those of a tensor in row-major order.
        shape: of the tensor; empty for a number.
    """

    name: str
    values: tuple[float, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A weight or buffer.

    Attributes:
        name: in the state dict.
        dtype: as torch calls it, without "torch.".
        shape: its sizes.
        same_as: the name under which its values are stored, where it is another name for them; else its own.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    same_as: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """All of a committee but its weights and its model's code.

    Attributes:
        dropkit: the release that wrote it.
        scheme: the way from address to bits; a release that has not this one cannot have the members back.
        model: qualified name of the model's class; for people to read, never imported.
        members, seed, likelihood, tile, memory, per_row, allow: as in `Committee`.
        sites: where masks are drawn.
        tensors: the model's state.
    """

    dropkit: str
    scheme: int
    model: str
    members: int
    seed: int
    likelihood: Literal["point", "gaussian", "categorical"]
    tile: int
    memory: int
    per_row: bool
    allow: tuple[str, ...]
    sites: tuple[SavedSite, ...]
    tensors: tuple[SavedTensor, ...]


def save(committee: Committee, path: str | Path, *, force: bool = False) -> Path:
    """Write a committee as a directory: the weights as safetensors, the rest as JSON, and their digests.

    Args:
        committee: any.
        path: the directory; its parent must be there. It appears when it is complete.
        force: replace a committee that is there.

    Returns:
        The directory.

    Raises:
        OutputError: the path exists, its parent does not, or the disk refuses.
    """
    from safetensors.torch import save as to_bytes

    network = committee.network
    state = {name: t for name, t in network.state_dict().items() if isinstance(t, Tensor)}
    stored = _same_values(state)
    recipe = Recipe(
        dropkit=version("dropkit"),
        scheme=SCHEME,
        model=f"{type(network).__module__}.{type(network).__qualname__}",
        members=committee.members,
        seed=committee.seed,
        likelihood=committee.likelihood,
        tile=committee.tile,
        memory=committee.memory,
        per_row=committee.per_row,
        allow=tuple(sorted(committee.allow)),
        sites=_sites(network),
        tensors=tuple(
            SavedTensor(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), stored[name])
            for name, t in state.items()
        ),
    )
    weights = {name: state[name].detach().cpu().contiguous() for name in dict.fromkeys(stored.values())}
    files: dict[str, bytes | Path | dict[str, Any] | list[Any]] = {
        RECIPE: asdict(recipe),
        WEIGHTS: to_bytes(weights),
    }
    return write_directory(path, files, force=force, kind=COMMITTEE)


def load(path: str | Path, model: nn.Module | Callable[[], nn.Module]) -> Committee:
    """A committee that `save` wrote, with every member as it was, bit for bit.

    Nothing in the directory is run, and every part of it is checked, so it may come from anybody.

    Args:
        path: the directory.
        model: a model of the same structure, or a function that makes one. Its weights do not matter, and a module that
            is given stays as it is: its copy gets the saved weights and rates.

    Raises:
        ModelDirectoryError: not a committee, damaged, altered or of a newer release, or the model does not fit it.
        OptionError: model is no module and makes none.

    Example:
        >>> import tempfile, torch, dropkit as dk
        >>> from dropkit.committee.saving import load, save
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(3, 8), dk.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        >>> committee, x = dk.Committee(build(), members=16, seed=7), torch.ones(5, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load(save(committee, f"{folder}/committee"), build)
        >>> torch.equal(again.predict(x).samples, committee.predict(x).samples)
        True
    """
    from dropkit.committee.committee import Committee

    recipe, weights = read_committee(path)
    network = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
    if not isinstance(network, nn.Module):
        raise OptionError(
            f"model gives a {type(network).__name__}; a committee is loaded into a torch.nn.Module of the structure it "
            f"was saved with ({recipe.model}), or a function that makes one."
        )
    try:
        committee = Committee(
            network,
            recipe.members,
            recipe.seed,
            recipe.likelihood,
            tile=recipe.tile,
            memory=recipe.memory,
            per_row=recipe.per_row,
            allow=recipe.allow,  # type: ignore[arg-type]  # checked there
        )
    except DropkitError as error:
        raise ModelDirectoryError(f"{path} does not describe a committee: {error}") from None
    _put_rates(path, committee.network, recipe.sites)
    _put_weights(path, committee.network, recipe.tensors, weights)
    return committee


def read_committee(path: str | Path) -> tuple[Recipe, dict[str, Tensor]]:
    """The recipe and the stored tensors of a directory, every part checked.

    Raises:
        ModelDirectoryError: not a committee, damaged, altered, or of a newer release.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    files = read_directory(path, COMMITTEE)
    recipe: Recipe = rebuild(Recipe, files.json(RECIPE), RECIPE)
    if recipe.scheme != SCHEME:
        raise ModelDirectoryError(
            f"{path} has masks of scheme {recipe.scheme}; this release draws scheme {SCHEME}, which would give other "
            "members. Upgrade: pip install --upgrade dropkit."
        )
    return recipe, _read_weights(files, from_bytes, SafetensorError)


def _read_weights(
    files: ModelFiles, from_bytes: Callable[[bytes], dict[str, Tensor]], trouble: type[Exception]
) -> dict[str, Tensor]:
    try:
        return from_bytes(files.bytes(WEIGHTS))
    except (trouble, ValueError, KeyError, TypeError) as error:
        raise ModelDirectoryError(
            f"{files.path / WEIGHTS} holds no tensors ({error}). {COMMITTEE.again}"
        ) from None


def _same_values(state: Mapping[str, Tensor]) -> dict[str, str]:
    """{name: the first name of the same values}: tied weights are stored once."""
    first: dict[tuple[Any, ...], str] = {}
    return {
        name: first.setdefault(
            (t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)
            if t.numel()
            else (name,),
            name,
        )
        for name, t in state.items()
    }


def noisy_modules(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that draw masks, by the name of their site."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, StochasticLayer) or "dropkit_site" in vars(module)
    }


def _sites(network: nn.Module) -> tuple[SavedSite, ...]:
    return tuple(
        SavedSite(name, type(module).__name__, tuple(_rates(module)))
        for name, module in noisy_modules(network).items()
    )


def _rates(module: nn.Module) -> list[SavedRate]:
    """The numbers that set a module's noise, and that its state dict does not hold."""
    found = []
    for name, value in sorted(vars(module).items()):
        if isinstance(value, Schedule):
            value = value.final
        if isinstance(value, float):
            found.append(SavedRate(name, (value,), ()))
    for name in sorted(module._non_persistent_buffers_set):
        buffer = module._buffers.get(name)
        if isinstance(buffer, Tensor) and buffer.is_floating_point():
            values = tuple(float(v) for v in buffer.detach().double().flatten().tolist())
            found.append(SavedRate(name, values, tuple(buffer.shape)))
    return found


def _put_rates(path: str | Path, network: nn.Module, sites: tuple[SavedSite, ...]) -> None:
    """Give each site the rates that were saved, after checking that the sites are those of the model."""
    modules = noisy_modules(network)
    saved, given = {s.name: s.layer for s in sites}, {n: type(m).__name__ for n, m in modules.items()}
    if saved != given:
        raise _does_not_fit(path, "sites", saved, given)
    for site in sites:
        module = modules[site.name]
        own = {rate.name: rate.shape for rate in _rates(module)}
        wanted = {rate.name: rate.shape for rate in site.rates}
        if own != wanted:
            raise _does_not_fit(path, f"rates at {site.name!r}", wanted, own)
        for rate in site.rates:
            if len(rate.values) != torch.Size(rate.shape).numel():
                raise ModelDirectoryError(
                    f"{path} has {len(rate.values)} values of {rate.name} at {site.name!r} for the shape {rate.shape}. "
                    f"{COMMITTEE.again}"
                )
            if not all(_allowed(rate.name, value) for value in rate.values):
                raise ModelDirectoryError(
                    f"{path} has {rate.name}={rate.values[0]!r} at {site.name!r}, where a chance in [0, 1] belongs. "
                    f"{COMMITTEE.again}"
                )
            if rate.shape or rate.name in module._buffers:
                buffer = module._buffers[rate.name]
                assert buffer is not None
                values = torch.tensor(rate.values, dtype=torch.float64).reshape(rate.shape)
                module._buffers[rate.name] = values.to(buffer)
            elif not isinstance(vars(module)[rate.name], Schedule) or _final(module, rate) != rate.values[0]:
                setattr(module, rate.name, rate.values[0])


def _allowed(name: str, value: float) -> bool:
    """Whether a number may stand there: rates, which layers call p or something with dropout, are chances."""
    chance = name == "p" or "dropout" in name or name in ("zoneout", "rate")
    return 0.0 <= value <= 1.0 if chance else value == value


def _final(module: nn.Module, rate: SavedRate) -> float:
    schedule = vars(module)[rate.name]
    return float(schedule.final)


def _put_weights(
    path: str | Path, network: nn.Module, tensors: tuple[SavedTensor, ...], weights: Mapping[str, Tensor]
) -> None:
    """Fill the model's state after checking that every name, shape and type agrees."""
    own = {name: t for name, t in network.state_dict().items() if isinstance(t, Tensor)}
    given = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in own.items()}
    saved = {t.name: (t.dtype, t.shape) for t in tensors}
    if saved != given:
        raise _does_not_fit(path, "weights", saved, given)
    if {t.same_as for t in tensors} != set(weights):
        raise ModelDirectoryError(f"{path} has other tensors than {RECIPE} lists. {COMMITTEE.again}")
    for tensor in tensors:
        there = weights[tensor.same_as]
        if (str(there.dtype).removeprefix("torch."), tuple(there.shape)) != (tensor.dtype, tensor.shape):
            raise ModelDirectoryError(
                f"{path} has {tensor.name} in another shape or type than {RECIPE} says."
            )
    with torch.no_grad():
        for tensor in tensors:
            own[tensor.name].copy_(weights[tensor.same_as])


def _does_not_fit(
    path: str | Path, what: str, saved: Mapping[str, Any], given: Mapping[str, Any]
) -> ModelDirectoryError:
    name = next(n for n in (*saved, *given) if saved.get(n) != given.get(n))
    return ModelDirectoryError(
        f"the model does not fit {path}: of its {what}, {name!r} is {given.get(name, 'missing')} in the model and "
        f"{saved.get(name, 'missing')} in the directory. Give a model of the structure that was saved."
    )

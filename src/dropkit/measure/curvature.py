"""Second derivatives of the loss by the noise: what dropout costs, unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from dropkit.errors import MeasurementError
from dropkit.measure.noise import NoisyNetwork, differentiable
from dropkit.measure.sampling import mean_and_error
from dropkit.measure.subject import Subject

# Up to so many noise values a row each gets a pass of its own; beyond, random signs estimate their sum.
EXACT_WIDTH, PROBES = 128, 32

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Curvature:
    """Second derivatives by the noise of one site, summed over rows.

    Attributes:
        features: (*mask without its rows), sum over rows b of d2 L / d e[b, j]^2.
        total: (), their sum.
        error: (), its standard error; 0 where each feature had a pass of its own.
    """

    features: Tensor
    total: Tensor
    error: Tensor


def noise_curvatures(
    noise: NoisyNetwork, loss: Callable[[Tensor], Tensor], x: Tensor, seed: int
) -> tuple[Curvature, ...]:
    """Diagonal of the Hessian of the loss by the noise of each site, at no noise.

    With signs s[b] = +-1 drawn for each row, s[b] (H s e_j)[b, j] is d2 L / d e[b, j]^2 where rows do not see each
    other, and its unbiased estimate where they do. Wide masks: v * (H v) over random signs v, all such sites at once.

    Args:
        noise: the network as a function of its noise.
        loss: outputs -> (), the mean loss.
        x: (B, ...) rows.
        seed: of the random signs.

    Returns:
        One for each site.
    """
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    found: dict[int, Curvature] = {}
    with torch.no_grad():
        for i, site in enumerate(noise.sites):
            if site.width <= EXACT_WIDTH:
                values = torch.zeros(site.shape if site.tied else site.shape[1:], dtype=torch.float64)
                for j, product in enumerate(_each_feature(noise, loss, x, i, generator)):
                    values.view(-1)[j] = product
                found[i] = Curvature(values, values.sum(), torch.zeros((), dtype=torch.float64))
        wide = [i for i in range(len(noise.sites)) if i not in found]
        if wide:
            found |= _all_at_once(noise, loss, x, wide, generator)
    return tuple(found[i] for i in range(len(noise.sites)))


def _each_feature(
    noise: NoisyNetwork, loss: Callable[[Tensor], Tensor], x: Tensor, site: int, generator: torch.Generator
) -> Iterator[Tensor]:
    for direction in _single_features(noise, x, site, generator):
        start = noise.none(_like(x))
        along = _along(noise, x, [site], start)
        (product,) = hessian_times(lambda *e: loss(along(*e)), (start[site],), (direction,))  # noqa: B023
        yield (direction * product).sum().double()


def _all_at_once(
    noise: NoisyNetwork,
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    wide: list[int],
    generator: torch.Generator,
) -> dict[int, Curvature]:
    start = noise.none(_like(x))
    along = _along(noise, x, wide, start)
    sums: dict[int, Tensor] = {}
    totals: dict[int, list[Tensor]] = {i: [] for i in wide}
    for _ in range(PROBES):
        directions = tuple(signs(noise.sites[i].shape, generator).to(start[i]) for i in wide)
        products = hessian_times(lambda *e: loss(along(*e)), tuple(start[i] for i in wide), directions)
        for i, direction, product in zip(wide, directions, products, strict=True):
            values = (direction * product).double()
            values = values if noise.sites[i].tied else values.sum(dim=0)
            sums[i] = sums.get(i, torch.zeros_like(values)) + values
            totals[i].append(values.sum())
    return {i: Curvature(sums[i] / PROBES, *mean_and_error(torch.stack(totals[i]))) for i in wide}


def output_part(
    noise: NoisyNetwork, loss: Callable[[Tensor], Tensor], x: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """The part of the penalty that comes from the bend of the loss alone; never negative for a convex loss.

    1/2 sum_j Var(e_j) (J' H J)_jj,    J = d outputs / d e,    H = d2 L / d outputs2

    The rest comes from the bend of the layers behind the masks.

    Args:
        noise, loss, x, seed: as in `noise_curvatures`.

    Returns:
        () and its standard error, float64.

    Source: Wei, Kakade and Ma 2020, arXiv:2002.12915, sec. 4.
    """
    start = noise.none(_like(x))
    outputs = _along(noise, x, list(range(len(noise.sites))), start)
    with torch.no_grad():
        base = outputs(*start)
        each: list[Tensor] = [torch.zeros((), dtype=torch.float64)]
        together: list[Tensor] = []
        for directions, single in noise_directions(noise, x, seed):
            tangent = directional(outputs, start, directions)
            (bent,) = hessian_times(loss, (base,), (tangent,))
            (each if single else together).append(0.5 * (tangent * bent).sum().double())
    total, error = mean_and_error(torch.stack(together)) if together else (torch.zeros(()), torch.zeros(()))
    return torch.stack(each).sum() + total, error


def noise_directions(
    noise: NoisyNetwork, x: Tensor, seed: int, *, unit: bool = False
) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
    """Directions v for the noise of all sites, such that the sum of v' H v is that of Var(e_j) d2 L / d e_j^2.

    Args:
        noise: the network as a function of its noise.
        x: (B, ...) rows.
        seed: of the random signs.
        unit: take 1 in place of Var(e_j).

    Yields:
        v, and whether it stands for a single noise value, to be summed; the others are random, and to be averaged.
    """
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    start = noise.none(_like(x))
    wide = []
    for i, site in enumerate(noise.sites):
        if site.width > EXACT_WIDTH:
            wide.append(i)
            continue
        for direction in _single_features(noise, x, i, generator):
            only = direction if unit else site.variance**0.5 * direction
            yield tuple(only if k == i else part for k, part in enumerate(start)), True
    for _ in range(PROBES if wide else 0):
        yield (
            tuple(
                (1.0 if unit else site.variance**0.5) * signs(site.shape, generator).to(part)
                if i in wide
                else part
                for i, (site, part) in enumerate(zip(noise.sites, start, strict=True))
            ),
            False,
        )


def _single_features(
    noise: NoisyNetwork, x: Tensor, site: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """For each noise value of a row: a direction with a sign for each row there, and 0 elsewhere."""
    place, zero = noise.sites[site], noise.none(_like(x))[site]
    for feature in range(place.width):
        direction = torch.zeros_like(zero)
        if place.tied:
            direction.view(-1)[feature] = 1
        else:
            direction.view(len(zero), -1)[:, feature] = signs((len(zero),), generator).to(zero)
        yield direction


def _along(
    noise: NoisyNetwork, x: Tensor, moving: list[int], start: tuple[Tensor, ...]
) -> Callable[..., Tensor]:
    """Outputs as a function of the noise of some sites, the others being silent."""

    def outputs(*e: Tensor) -> Tensor:
        full = list(start)
        for i, part in zip(moving, e, strict=True):
            full[i] = part
        return noise(x, full)

    return outputs


def _like(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else torch.zeros((), device=x.device)


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """+1 and -1 with equal chance (Rademacher), float32."""
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


def hessian_times(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], direction: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """H v of a scalar function; forward over reverse mode, or reverse over reverse where torch lacks the former."""
    places = tuple(range(len(at)))
    try:
        found: tuple[Tensor, ...] = torch.func.jvp(torch.func.grad(function, argnums=places), at, direction)[
            1
        ]
        return found
    except RuntimeError:
        points = tuple(point.detach().clone().requires_grad_() for point in at)
        with torch.enable_grad():
            slopes = torch.autograd.grad(function(*points), points, create_graph=True)
            along = torch.stack([(s * v).sum() for s, v in zip(slopes, direction, strict=True)]).sum()
            if not along.requires_grad:
                return tuple(torch.zeros_like(point) for point in points)
            return torch.autograd.grad(along, points, allow_unused=True, materialize_grads=True)


def directional(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], direction: tuple[Tensor, ...]
) -> Tensor:
    """J v of a function; forward mode, or the reverse of the reverse mode where torch lacks it."""
    try:
        tangent: Tensor = torch.func.jvp(function, at, direction)[1]
        return tangent
    except RuntimeError:
        with torch.enable_grad():
            result: Tensor = torch.autograd.functional.jvp(function, at, direction)[1]
        return result.detach()


def with_derivatives(subject: Subject, compute: Callable[[], Result]) -> Result:
    """Compute something from second derivatives, or say which layer has none.

    Raises:
        MeasurementError: a layer cannot be differentiated twice.
    """
    try:
        with differentiable():
            return compute()
    except RuntimeError as error:
        name = layer_without_second_derivative(subject)
        if name is None:
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MeasurementError(
            f"layer {name} has no second derivative in torch, which this instrument needs ({first}). "
            "Measure the part of the model behind it, or take another layer there."
        ) from error


class _Differentiate(fx.Interpreter):
    """Runs a graph, and at each operator tries whether its own gradient can be differentiated."""

    failed: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function" or self.failed is not None:
            return result
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        at = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
        if at and _once_only(n.target, args, kwargs, at):
            stack = list(n.meta.get("nn_module_stack", {}).values())
            name = stack[-1][0].removeprefix("L['self'].") if stack else ""
            self.failed = f"{name!r} ({n.target})"
        return result


def _once_only(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], at: list[int]) -> bool:
    points = {i: args[i].detach().clone().requires_grad_() for i in at}
    try:
        with torch.enable_grad():
            value = target(*[points.get(i, a) for i, a in enumerate(args)], **kwargs)
            value = value[0] if isinstance(value, tuple | list) else value
            if not isinstance(value, Tensor) or not value.requires_grad:
                return False
            slopes = torch.autograd.grad(
                value.square().sum(), list(points.values()), create_graph=True, allow_unused=True
            )
            lengths = [s.square().sum() for s in slopes if s is not None and s.requires_grad]
            if lengths:
                total = torch.stack(lengths).sum()
                torch.autograd.grad(total, list(points.values()), allow_unused=True)
    except RuntimeError:
        return True
    return False


def layer_without_second_derivative(subject: Subject) -> str | None:
    """The first layer whose gradient cannot be differentiated, and its operator; None where there is none."""
    if subject.noise is None:
        return None
    like = subject.x if subject.x.is_floating_point() else torch.zeros(())
    walk = _Differentiate(subject.noise.module)
    walk.run(subject.x, *subject.noise.none(like))
    return walk.failed

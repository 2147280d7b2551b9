"""LSTM and GRU with noise inside the recurrence on a CPU: matrix products by torch, all between them by Numba.

One product makes the gates' share of all inputs before the first step, and one the gradient of the weights after the
last; between them each step has one product, in place. Second derivatives are made by the definition in
`recurrent_cells.py` from what was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dropkit.masks.pages import prefer_large_pages
from dropkit.nn import recurrent_cpu as cpu
from dropkit.nn.recurrent_cells import Step, StepNoise, Weights, gru_step, lstm_step, run_steps

Array = cpu.Array

LARGE = 1 << 18  # elements of a buffer for which large pages are asked


def is_served(x: Tensor, weights: Weights, noise: StepNoise) -> bool:
    """Whether `lstm_fused` and `gru_fused` take this: float32 or float64 throughout, no projection, drawn shares.

    The caller has seen to it that no transform of torch is at work.
    """
    tensors = (*weights, *noise.all())
    return (
        weights.hr is None
        and x.dtype in (torch.float32, torch.float64)
        and len(x) > 0
        and all(part is None or (part.dtype == x.dtype and part.device == x.device) for part in tensors)
        and not any(part is not None and part.requires_grad for part in noise.all())
    )


def _steps(sizes: Sequence[int], reverse: bool) -> list[tuple[int, int, int]]:
    """(step, its first row in a packed buffer, its rows), in the order in which they are made."""
    starts = [0, *accumulate(sizes)][:-1]
    steps = list(zip(range(len(sizes)), starts, sizes, strict=True))
    return steps[::-1] if reverse else steps


def _noise_arrays(noise: StepNoise, like: Tensor) -> tuple[Array, Array, Array, Array]:
    """The four kinds of noise as arrays, of no elements where there is none."""
    state, update, cell, hidden = noise.all()
    if state is None:
        state = like.new_empty(1, 1, 1, 0)
    update, cell, hidden = (
        like.new_empty(1, 1, 0)
        if part is None
        else part.expand(1, 1, like.shape[-1])
        if part.ndim < 2
        else part
        for part in (update, cell, hidden)
    )
    return tuple(part.detach().contiguous().numpy() for part in (state, update, cell, hidden))  # type: ignore[return-value]


def _again(
    step: Step, ctx: Any, given: Sequence[Any], gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again: those of the definition."""
    x, *rest = given
    state, weights, noise = rest[: -8 - 1], rest[-9:-4], rest[-4:]
    sizes, reverse = ctx.plan
    needs = ctx.needs_input_grad[1:]
    out, end = run_steps(step, x, sizes, tuple(state), Weights(*weights), StepNoise(*noise), reverse)
    ys = [(y, g) for y, g in zip((out, *end), gradients, strict=True) if g is not None and y.requires_grad]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in ys],
            [part for part, needed in zip(given, needs, strict=True) if needed],
            [g for _, g in ys],
            create_graph=True,
            allow_unused=True,
        )
    )
    return None, *(next(found) if needed else None for needed in needs)


def _seen_product(seen: Tensor, hh: Tensor, gates: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs (seen state, part of W_hh that reads it): one, or one for each gate."""
    if len(seen) == 1:
        return [(seen[0], hh)]
    return list(zip(seen, hh.unflatten(0, (gates, -1)), strict=True))


def _fresh(like: Tensor, *shape: int) -> Tensor:
    """A new buffer, in large pages where it is large: touching it first then costs a tenth."""
    out = like.new_empty(shape)
    if out.numel() >= LARGE:
        prefer_large_pages(out.data_ptr(), out.numel() * out.element_size())
    return out


def _projected(x: Tensor, ih: Tensor, bias: Tensor | None) -> Tensor:
    """(N, G H): what the gates get from all inputs."""
    gates = _fresh(x, len(x), len(ih))
    return torch.mm(x, ih.t(), out=gates) if bias is None else torch.addmm(bias, x, ih.t(), out=gates)


def _contiguous(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the outputs and, in copies that may be written to, of the states."""
    outer, *states = (
        torch.zeros_like(part) if g is None else g for g, part in zip(gradients, like, strict=True)
    )
    return [outer.contiguous(), *(part.clone(memory_format=torch.contiguous_format) for part in states)]


def _gradient_of_hh(d_gates: Tensor, seen: Tensor) -> Tensor:
    """(G H, P): sum over all steps, in one product for each mask."""
    if len(seen) == 1:
        return d_gates.t().mm(seen[0])
    parts = d_gates.chunk(len(seen), dim=1)
    return torch.cat([part.t().mm(state) for part, state in zip(parts, seen, strict=True)])


def _gradients(
    needs: Sequence[bool], x: Tensor, weights: Weights, seen: Tensor, d_inputs: Tensor, d_states: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of x, W_ih, W_hh, b_ih, b_hh, those that are needed."""
    of_bias = d_inputs.sum(0) if needs[3] or (needs[4] and d_states is d_inputs) else None
    return (
        d_inputs.mm(weights.ih) if needs[0] else None,
        d_inputs.t().mm(x) if needs[1] else None,
        _gradient_of_hh(d_states, seen) if needs[2] else None,
        of_bias if needs[3] else None,
        None if not needs[4] else of_bias if d_states is d_inputs else d_states.sum(0),
    )


class _LSTM(torch.autograd.Function):
    """One layer in one direction: plan, x, h, c, the five weights, the four kinds of noise -> out, h, c."""

    @staticmethod
    def forward(ctx: Any, plan: tuple[Sequence[int], bool], *given: Any) -> tuple[Tensor, ...]:
        x, h, c, ih, hh, bias_ih, bias_hh, _, *noise = given
        state, update, cell, hidden = _noise_arrays(StepNoise(*noise), c)
        bias = None if bias_ih is None or bias_hh is None else bias_ih + bias_hh
        gates = _projected(x, ih, bias)
        h, c = (part.clone(memory_format=torch.contiguous_format) for part in (h, c))
        size, total = c.shape[1], len(x)
        out, old, tanh = (_fresh(c, total, size) for _ in range(3))
        seen = _fresh(c, state.shape[2], total, size)
        h_, c_, gates_, out_, old_, tanh_, seen_ = (p.numpy() for p in (h, c, gates, out, old, tanh, seen))
        pairs = [
            (s, w.t(), g)
            for (s, w), g in zip(_seen_product(seen, hh, 4), gates.chunk(len(seen), 1), strict=True)
        ]
        for t, at, n in _steps(*plan):
            cpu.see_state(h_, state, t, at, n, seen_)
            for s, w, g in pairs:
                g[at : at + n].addmm_(s[at : at + n], w)
            own = gates[at : at + n]
            own[:, : 2 * size].sigmoid_()
            own[:, 2 * size : 3 * size].tanh_()
            own[:, 3 * size :].sigmoid_()
            cpu.lstm_cell(gates_, update, cell, t, at, n, c_, old_, tanh_)
            tanh[at : at + n].tanh_()
            cpu.lstm_output(gates_, tanh_, hidden, t, at, n, h_, out_)
        ctx.plan = plan
        ctx.save_for_backward(*given, gates, old, tanh, seen)
        return out, h, c

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *given, gates, old, tanh, seen = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _again(lstm_step, ctx, given, gradients)
        x, h, c, ih, hh, bias_ih, bias_hh, _, *noise = given
        state, update, cell, hidden = _noise_arrays(StepNoise(*noise), c)
        gradient, dh, dc = _contiguous(gradients, (old, h, c))
        d_gates = _fresh(gates, *gates.shape)
        d_seen = c.new_empty(len(seen), *h.shape)
        arrays = [part.numpy() for part in (gradient, gates, old, tanh, dh, dc, d_gates, d_seen)]
        gradient_, gates_, old_, tanh_, dh_, dc_, d_gates_, d_seen_ = arrays
        pairs = [
            (d, w, g)
            for (d, w), g in zip(_seen_product(d_seen, hh, 4), d_gates.chunk(len(seen), 1), strict=True)
        ]
        for t, at, n in reversed(_steps(*ctx.plan)):
            cpu.lstm_backward(
                gradient_, gates_, old_, tanh_, update, cell, hidden, t, at, n, dh_, dc_, d_gates_
            )
            for d, w, g in pairs:
                torch.mm(g[at : at + n], w, out=d[:n])
            cpu.add_seen(dh_, d_seen_, state, t, n)
        needs = ctx.needs_input_grad[1:]
        weights = Weights(ih, hh, bias_ih, bias_hh, None)
        dx, *d_weights = _gradients((needs[0], *needs[3:7]), x, weights, seen, d_gates, d_gates)
        return None, dx, dh, dc, *d_weights, *[None] * 5


class _GRU(torch.autograd.Function):
    """One layer in one direction: plan, x, h, the five weights, the four kinds of noise -> out, h."""

    @staticmethod
    def forward(ctx: Any, plan: tuple[Sequence[int], bool], *given: Any) -> tuple[Tensor, ...]:
        x, h, ih, hh, bias_ih, bias_hh, _, *noise = given
        state, update, _, hidden = _noise_arrays(StepNoise(*noise), h)
        h = h.clone(memory_format=torch.contiguous_format)
        size, total = h.shape[1], len(x)
        gates = _projected(x, ih, bias_ih)
        from_state, out, old = (_fresh(h, total, size) for _ in range(3))
        if bias_hh is not None:
            gates[:, : 2 * size] += bias_hh[: 2 * size]
        bias_n = h.new_zeros(size) if bias_hh is None else bias_hh[2 * size :]
        seen = _fresh(h, state.shape[2], total, size)
        h_, gates_, out_, old_, seen_ = (part.numpy() for part in (h, gates, out, old, seen))
        r_and_z = gates[:, : 2 * size]
        if len(seen) == 1:
            pairs = [(seen[0], hh[: 2 * size].t(), r_and_z)]
        else:
            pairs = [
                (seen[g], hh[g * size : (g + 1) * size].t(), gates[:, g * size : (g + 1) * size])
                for g in (0, 1)
            ]
        seen_n, weight_n = seen[-1], hh[2 * size :].t()
        for t, at, n in _steps(*plan):
            rows = slice(at, at + n)
            cpu.see_state(h_, state, t, at, n, seen_)
            for s, w, g in pairs:
                g[rows].addmm_(s[rows], w)
            torch.addmm(bias_n, seen_n[rows], weight_n, out=from_state[rows])
            r_and_z[rows].sigmoid_()
            gates[rows, 2 * size :].addcmul_(gates[rows, :size], from_state[rows]).tanh_()
            cpu.gru_output(gates_, update, hidden, t, at, n, h_, old_, out_)
        ctx.plan = plan
        ctx.save_for_backward(*given, gates, old, from_state, seen)
        return out, h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *given, gates, old, from_state, seen = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _again(gru_step, ctx, given, gradients)
        x, h, ih, hh, bias_ih, bias_hh, _, *noise = given
        state, update, _, hidden = _noise_arrays(StepNoise(*noise), h)
        gradient, dh = _contiguous(gradients, (old, h))
        d_inputs, d_states = (_fresh(gates, *gates.shape) for _ in range(2))
        d_seen = h.new_empty(len(seen), *h.shape)
        arrays = [part.numpy() for part in (gradient, gates, old, from_state, dh, d_inputs, d_states, d_seen)]
        gradient_, gates_, old_, from_state_, dh_, d_inputs_, d_states_, d_seen_ = arrays
        pairs = [
            (d, w, g)
            for (d, w), g in zip(_seen_product(d_seen, hh, 3), d_states.chunk(len(seen), 1), strict=True)
        ]
        for t, at, n in reversed(_steps(*ctx.plan)):
            cpu.gru_backward(
                gradient_, gates_, old_, from_state_, update, hidden, t, at, n, dh_, d_inputs_, d_states_
            )
            for d, w, g in pairs:
                torch.mm(g[at : at + n], w, out=d[:n])
            cpu.add_seen(dh_, d_seen_, state, t, n)
        needs = ctx.needs_input_grad[1:]
        weights = Weights(ih, hh, bias_ih, bias_hh, None)
        dx, *d_weights = _gradients((needs[0], *needs[2:6]), x, weights, seen, d_inputs, d_states)
        return None, dx, dh, *d_weights, *[None] * 5


def lstm_fused(
    x: Tensor,
    sizes: Sequence[int],
    state: tuple[Tensor, ...],
    weights: Weights,
    noise: StepNoise,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`run_steps` of an LSTM, faster; arguments and results as there."""
    out, *end = _LSTM.apply((tuple(sizes), reverse), x, *state, *weights, *noise.all())
    return out, tuple(end)


def gru_fused(
    x: Tensor,
    sizes: Sequence[int],
    state: tuple[Tensor, ...],
    weights: Weights,
    noise: StepNoise,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`run_steps` of a GRU, faster; arguments and results as there."""
    out, *end = _GRU.apply((tuple(sizes), reverse), x, *state, *weights, *noise.all())
    return out, tuple(end)

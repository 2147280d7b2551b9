"""The recurrences themselves, step by step in plain torch operations: the definition of LSTM and GRU with noise.

What is faster (`recurrent_cpu.py`, and torch's own kernels where the noise can be written into the weights) must agree
with this file. It serves every transform of torch: derivatives of any order, torch.func, compilers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dropkit.nn.sequences import times_noise
from dropkit.nn.zoneout import mix


class Weights(NamedTuple):
    """Of one layer in one direction, as torch.nn.LSTM and torch.nn.GRU name them; G gates.

    Attributes:
        ih: (G H, I).
        hh: (G H, P), P the size of the projected state, H without a projection.
        bias_ih, bias_hh: (G H,) or None.
        hr: (P, H) or None.
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None


@dataclass(frozen=True, slots=True)
class StepNoise:
    """Noise inside the recurrence; None where there is none. Dims of size 1 serve all steps, rows or gates.

    Attributes:
        state: (T or 1, R or 1, G or 1, P) factor on the state as the gates read it.
        update: (T or 1, R or 1, H) factor on the candidate.
        cell: (T, R or 1, H) share of the cell that is new, 0 or 1; or one expected share for all.
        hidden: the same of the state, (T, R or 1, P).
    """

    state: Tensor | None = None
    update: Tensor | None = None
    cell: Tensor | None = None
    hidden: Tensor | None = None

    def at(self, t: int, rows: int) -> StepNoise:
        """The noise of step t for the first rows."""
        return StepNoise(*(at_step(noise, t, rows) for noise in self.all()))

    def all(self) -> tuple[Tensor | None, ...]:
        """The four, in order."""
        return self.state, self.update, self.cell, self.hidden

    @property
    def is_none(self) -> bool:
        """Whether nothing is noisy."""
        return all(noise is None for noise in self.all())


def at_step(noise: Tensor | None, t: int, rows: int) -> Tensor | None:
    """(T or 1, R or 1, ...) at one step, for the first rows; a number as it is."""
    if noise is None or noise.ndim < 2:
        return noise
    return noise[t if noise.shape[0] > 1 else 0, :rows]


def recur(h: Tensor, weights: Weights, noise: Tensor | None) -> Tensor:
    """(n, G H): what the gates get from the state, h W' + bias, the state seen through its noise.

    Args:
        h: (n, P).
        noise: (n or 1, G or 1, P) or None.
    """
    if noise is None:
        return F.linear(h, weights.hh, weights.bias_hh)
    seen = times_noise(h.unsqueeze(1), noise)  # (n, G or 1, P)
    if noise.shape[1] == 1:
        return F.linear(seen.squeeze(1), weights.hh, weights.bias_hh)
    by_gate = weights.hh.unflatten(0, (noise.shape[1], -1))
    gates = torch.einsum("ngp,ghp->ngh", seen, by_gate).flatten(1)
    return gates if weights.bias_hh is None else gates + weights.bias_hh


def candidate(value: Tensor, noise: Tensor | None) -> Tensor:
    """The update, through its noise."""
    return value if noise is None else times_noise(value, noise)


def lstm_step(
    projected: Tensor, state: tuple[Tensor, ...], weights: Weights, noise: StepNoise
) -> tuple[Tensor, ...]:
    """One step of an LSTM.

    i, f, g, o = W_ih x + b_ih + W_hh (h * state) + b_hh
    c' = sigmoid(f) c + sigmoid(i) tanh(g) * update
    h' = W_hr (sigmoid(o) tanh(c'))
    c, h <- cell c' + (1 - cell) c, hidden h' + (1 - hidden) h

    Args:
        projected: (n, 4 H), W_ih x + b_ih.
        state: h (n, P) and c (n, H).
    """
    h, c = state
    i, f, g, o = (projected + recur(h, weights, noise.state)).chunk(4, dim=-1)
    new_c = f.sigmoid() * c + i.sigmoid() * candidate(g.tanh(), noise.update)
    new_h = o.sigmoid() * new_c.tanh()
    if weights.hr is not None:
        new_h = F.linear(new_h, weights.hr)
    return mix(new_h, h, noise.hidden), mix(new_c, c, noise.cell)


def gru_step(
    projected: Tensor, state: tuple[Tensor, ...], weights: Weights, noise: StepNoise
) -> tuple[Tensor, ...]:
    """One step of a GRU.

    a = W_ih x + b_ih,    b = W_hh (h * state) + b_hh,    r = sigmoid(a_r + b_r),    z = sigmoid(a_z + b_z)
    h' = (1 - z) tanh(a_n + r b_n) * update + z h
    h <- hidden h' + (1 - hidden) h

    Args:
        projected: (n, 3 H), a.
        state: h (n, H).
    """
    (h,) = state
    a_r, a_z, a_n = projected.chunk(3, dim=-1)
    b_r, b_z, b_n = recur(h, weights, noise.state).chunk(3, dim=-1)
    z = (a_z + b_z).sigmoid()
    new = candidate((a_n + (a_r + b_r).sigmoid() * b_n).tanh(), noise.update)
    return (mix((1 - z) * new + z * h, h, noise.hidden),)


Step = Callable[[Tensor, tuple[Tensor, ...], Weights, StepNoise], tuple[Tensor, ...]]


def run_steps(
    step: Step, x: Tensor, sizes: Sequence[int], state: tuple[Tensor, ...], weights: Weights, noise: StepNoise,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """One layer in one direction.

    Args:
        step: `lstm_step` or `gru_step`.
        x: (N, I), the rows of step 0, then those of step 1, ...: a packed batch, longest row first.
        sizes: rows of each step, never rising.
        state: initial, (B, P) and for an LSTM (B, H); a row enters at its first step.
        reverse: from the last step of each row to the first.

    Returns:
        (N, P), the state after each step; and the state after a row's last one.
    """
    projected = F.linear(x, weights.ih, weights.bias_ih).split(list(sizes))
    outputs: list[Tensor] = []
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n = sizes[t]
        new = step(projected[t], tuple(part[:n] for part in state), weights, noise.at(t, n))
        outputs.append(new[0])
        if n < len(state[0]):
            new = tuple(torch.cat([part, whole[n:]]) for part, whole in zip(new, state, strict=True))
        state = new
    return torch.cat(outputs[::-1] if reverse else outputs), state

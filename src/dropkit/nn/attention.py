"""Attention with dropout on its weights, of which nothing of the size of the scores is kept.

Forward and backward make the scores block by block, in buffers that stay in the cache; backward has the softmax again
from one logarithm for each query, and the mask from its address. For queries (L, E) on keys (S, E) and values (S, V):

    matrix products    forward 2 L S (E + V) operations, backward 2 L S (3 E + 2 V)
    exponentials       L S each way
    Philox blocks      L S / 8 each way
    kept for backward  query, key, value and output, which exist anyway, and L numbers

The seven products are the floor: with E = V = 64 each takes 1.3 to 1.4 ns for an element of the scores, on a core
with AVX-512 at 96 GFLOP/s, 9.5 ns together. Softmax, its return in backward and two masks take 1.6 ns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dropkit.errors import OptionError, ShapeError, check_probability
from dropkit.masks import address, compiled, ops, runs_cpu
from dropkit.masks.address import Draw
from dropkit.masks.philox import LANES, REFINE
from dropkit.masks.threads import in_parallel
from dropkit.nn.softmax import exp_rows, softmax_rows

Array = np.ndarray[Any, Any]

BLOCK = 1 << 18  # scores of one head made at a time: 1 MiB in float32, twice in backward, for each thread
MIN_ROWS = 128  # fewer queries at a time and the matrix products get slow
GROUP = 1 << 16  # scores of several small heads made at a time
CAUSAL_KEYS = 256  # from so many keys on, a causal block leaves out those that none of its queries sees


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float | Tensor = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    training: bool = True,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Attention with inverted dropout on its weights; signature and meaning of torch's function of this name.

    w[b, h, i, :] = softmax over j of (scale * query[b, h, i] · key[b, h, j] + attn_mask[b, h, i, j])
    out[b, h, i]  = sum over j of w[b, h, i, j] * keep[b, h, i, j] / (1 - p) * value[b, h, j]

    keep[b, h, i, j] is that of `dropout` for an input of shape (B, H, L, S): element (h L + i) S + j of sample b.
    No tensor of that size is kept, and on a CPU none is made. A query that sees no key gets 0. Without dropout torch's
    own function runs. Compiled graphs, torch.func, forward-mode derivatives, derivatives of derivatives, a gradient for
    `attn_mask` and a rate that is a tensor are served by plain operations with the same masks.

    Args:
        query: (B, ..., H, L, E) floating; dim 0 counts the rows. (L, E) alone is one row.
        key: (B, ..., H, S, E); leading dims broadcast.
        value: (B, ..., H, S, V), likewise.
        attn_mask: broadcasts to (B, ..., H, L, S): bool, True where a query sees a key, or floating, added to the
            scores. Keys that a bool mask hides have weight 0, even if they hold NaN.
        dropout_p: chance to drop a weight, in [0, 1]; a number, or a 0-d tensor.
        is_causal: query i sees keys 0 to i.
        scale: of the scores; 1 / sqrt(E) by default.
        enable_gqa: each head of key and value serves as many neighbouring query heads as there are more of these.
        training: False switches dropout off.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        (B, ..., H, L, V), dtype of the query.

    Raises:
        ProbabilityError: dropout_p is outside [0, 1].
        ShapeError: shapes that do not go together, or samples that are not one for each row.
        OptionError: attn_mask together with is_causal, or dtypes that do not go together.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Vaswani et al. 2017, arXiv:1706.03762; block by block: Dao et al. 2022, arXiv:2205.14135.

    Example:
        >>> import torch, dropkit as dk
        >>> q, k, v = torch.zeros(2, 1, 4), torch.zeros(2, 4, 4), torch.eye(4).expand(2, 4, 4)
        >>> with dk.masks(seed=0):
        ...     dk.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        tensor([[[0.5000, 0.5000, 0.0000, 0.5000]],
        <BLANKLINE>
                [[0.5000, 0.0000, 0.0000, 0.5000]]])
    """
    rate = dropout_p if isinstance(dropout_p, Tensor) else check_probability(dropout_p, "dropout_p")
    leading = _check(query, key, value, attn_mask, is_causal, enable_gqa)
    compiling = torch.compiler.is_compiling()
    where = address.draw(owner, site) if training and not compiling else None
    if not training or (not isinstance(rate, Tensor) and rate == 0):
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value = _cast_as_autocast(query, key, value)
    if enable_gqa:
        shared = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
    rows = leading or (1,)
    query, key, value = (x.expand(*rows, *x.shape[-2:]) for x in (query, key, value))
    scores = _Scores(attn_mask, is_causal, 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale)
    if compiled.kernels_recorded() and not isinstance(rate, Tensor):
        p, repeats = torch.tensor(rate, dtype=torch.float64), owner is not None
        numbers = torch.ops.dropkit.draw(site, repeats)
        out = torch.ops.dropkit.attention_at(
            query, key, value, attn_mask, numbers, p, scores.causal, scores.scale
        )
    elif where is None:
        p, repeats = torch.as_tensor(rate, dtype=torch.float64), owner is not None
        out = _composite(query, key, value, scores, lambda w: compiled.dropout(w, p, (), site, repeats))
    else:
        out = _attend(query, key, value, scores, where, rate)
    return out if leading else out.squeeze(0)


def attend_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    where: Draw,
    p: Tensor,
    causal: bool,
    scale: float,
) -> Tensor:
    """`dropkit::attention_at` with the address as it was drawn; arguments as the operator has them."""
    plain = not torch._C._are_functorch_transforms_active()
    return _attend(query, key, value, _Scores(mask, causal, scale), where, float(p) if plain else p)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scores: _Scores, where: Draw, rate: float | Tensor
) -> Tensor:
    """By the kernels where they can serve, else by the definition."""
    if isinstance(rate, Tensor) or not _is_plain(query, key, value, scores.mask):
        return _composite(query, key, value, scores, _dropper(where, rate))
    out: Tensor = _Blockwise.apply(query, key, value, scores, where, rate)
    return out


@dataclass(frozen=True, slots=True)
class _Scores:
    """What becomes of the products of queries and keys before the softmax."""

    mask: Tensor | None
    causal: bool
    scale: float


def _check(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> tuple[int, ...]:
    """The leading dims of the scores, (B, ..., H), or what is wrong with the arguments."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if min(query.ndim, key.ndim, value.ndim) < 2 or key.shape[-2] != value.shape[-2]:
        raise ShapeError(f"{shapes} were given; allowed: (..., L, E), (..., S, E) and (..., S, V).")
    if query.shape[-1] != key.shape[-1]:
        raise ShapeError(
            f"{shapes} were given; query and key need the same last dim, here {query.shape[-1]} and {key.shape[-1]}."
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise OptionError(
            f"query, key and value of {query.dtype}, {key.dtype} and {value.dtype} were given; "
            "one floating dtype for all three is needed."
        )
    leads: list[tuple[int, ...]] = [x.shape[:-2] for x in (query, key, value)]
    if enable_gqa:
        heads = [lead[-1] if lead else 0 for lead in leads]
        if heads[1] != heads[2] or 0 in heads or heads[0] % heads[1]:
            raise ShapeError(
                f"{shapes} were given with enable_gqa; key and value need the same number of heads (third dim from "
                "the end), and the query a multiple of it."
            )
        leads = [(*lead[:-1], heads[0]) for lead in leads]
    try:
        leading = tuple(torch.broadcast_shapes(*leads))
    except RuntimeError:
        raise ShapeError(f"{shapes} were given; their leading dims must broadcast.") from None
    if attn_mask is None:
        return leading
    if is_causal:
        raise OptionError("attn_mask was given together with is_causal=True; put both into attn_mask.")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise OptionError(f"attn_mask of {attn_mask.dtype} was given; it is bool or floating.")
    full = (*leading, query.shape[-2], key.shape[-2])
    sizes = zip(reversed(attn_mask.shape), reversed(full), strict=False)
    if attn_mask.ndim > len(full) or any(have not in (1, need) for have, need in sizes):
        raise ShapeError(f"attn_mask {tuple(attn_mask.shape)} was given; it must broadcast to {full}.")
    return leading


def _cast_as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast, the dtype in which torch's own attention would work."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _working_dtype(x: Tensor) -> torch.dtype:
    """Scores and sums are made in float32 for the 16-bit types."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dropper(where: Draw, rate: float | Tensor) -> Callable[[Tensor], Tensor]:
    """Dropout of weights (B, ..., H, L, S) with the mask of this address."""
    p = torch.as_tensor(rate, dtype=torch.float64)
    shared = (0,) if where.batch_shared else ()

    def drop(weights: Tensor) -> Tensor:
        return ops.dropout(
            weights, where.key, where.member, p, where.samples, where.step, where.row_offset, shared
        )

    return drop


def _composite(
    query: Tensor, key: Tensor, value: Tensor, scores: _Scores, drop: Callable[[Tensor], Tensor]
) -> Tensor:
    """The definition in torch's own operations, which every transform knows; it holds all scores at once."""
    dtype = _working_dtype(query)
    # Tensors without values have no autocast to be switched off.
    plain: AbstractContextManager[Any] = (
        nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False)
    )
    with plain:
        weights = (query.to(dtype) * scores.scale) @ key.to(dtype).mT
        if scores.causal:
            future = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).triu(1)
            weights = weights.masked_fill(future, -torch.inf)
        if scores.mask is not None and scores.mask.dtype == torch.bool:
            weights = weights.masked_fill(~scores.mask, -torch.inf)
        elif scores.mask is not None:
            weights = weights + scores.mask.to(dtype)
        blind = (weights == -torch.inf).all(
            dim=-1, keepdim=True
        )  # queries without a key: 0, and no NaN in backward
        weights = torch.softmax(weights.masked_fill(blind, 0), dim=-1).masked_fill(blind, 0)
        return (drop(weights) @ value.to(dtype)).to(query.dtype)


def _is_plain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> bool:
    """Whether the blockwise kernels can serve this call."""
    tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    return (
        all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.numel() for x in tensors)
        and query.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        and not (attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled())
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


class _Blockwise(torch.autograd.Function):
    """Attention whose scores are made block by block, and made again in backward."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scores: _Scores, where: Draw, rate: float
    ) -> Tensor:
        work = _Work(query, key, value, scores, where, rate)
        out, logsumexp = work.forward()
        ctx.save_for_backward(query, key, value, out, logsumexp, scores.mask)
        ctx.scores, ctx.where, ctx.rate = (scores.causal, scores.scale), where, rate
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsumexp, mask = ctx.saved_tensors
        scores = _Scores(mask, *ctx.scores)
        if torch.is_grad_enabled():  # create_graph: by operations that have derivatives themselves
            inputs = [x for x in (query, key, value) if x.requires_grad]
            again = _composite(query, key, value, scores, _dropper(ctx.where, ctx.rate))
            found = iter(torch.autograd.grad(again, inputs, gradients[0], create_graph=True))
            result = tuple(next(found) if x.requires_grad else None for x in (query, key, value))
        else:
            result = _Work(query, key, value, scores, ctx.where, ctx.rate).backward(
                gradients[0], out, logsumexp
            )
        return *result, None, None, None


class _Work:
    """One call, with all heads of all rows on one axis: N matrices (L, E), (S, E) and (S, V)."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scores: _Scores, where: Draw, rate: float
    ) -> None:
        self.leading, self.dtype = query.shape[:-2], query.dtype
        self.q, self.k, self.v = self._stack(query), self._stack(key), self._stack(value)
        self.N, self.L, self.S = len(self.q), query.shape[-2], key.shape[-2]
        self.scores = scores
        t, fine, self.scale = ops._quantised(rate)
        key_bits = np.uint64(int(where.key) % (1 << 64))
        # As the kernels take it: key, member, step, t, fine.
        self.where: tuple[Any, ...] = (key_bits, np.uint64(int(where.member)), where.step, t, fine)
        rows = self.leading[0]
        self.heads = self.N // rows
        if self.heads * self.L * self.S > LANES * REFINE:
            raise ShapeError(
                f"{self.heads * self.L * self.S} weights for each row were given; at most 2**34 have a mask."
            )
        ids = ops._row_ids(where.samples, rows, where.row_offset, where.batch_shared).reshape(-1)
        self.ids = np.repeat(ids, self.N // len(ids))
        # Several whole heads at a time, or some queries of one head.
        self.group = max(1, min(self.N, GROUP // (self.L * self.S)))
        self.block_rows = self.L if self.group > 1 else min(self.L, max(MIN_ROWS, BLOCK // self.S))
        self.shortens = scores.causal and self.group == 1 and self.S >= CAUSAL_KEYS
        self.future = (
            torch.ones(self.block_rows, self.S, dtype=torch.bool).triu(1) if scores.causal else torch.empty(0)
        )

    def _stack(self, x: Tensor) -> Tensor:
        """(*leading, rows, columns) -> (N, rows, columns) for the matrix products."""
        return x.detach().to(_working_dtype(x)).reshape(-1, *x.shape[-2:]).contiguous()

    def _each_group(self, run: Callable[[slice], None]) -> None:
        """Call run on every group of heads; threads share them out, and a thread's matrix products have one."""
        threads = torch.get_num_threads()
        groups = -(-self.N // self.group)

        def share(start: int, stop: int) -> None:
            if groups > 1:
                torch.set_num_threads(1)
            with torch.no_grad():
                for i in range(start, stop):
                    run(slice(i * self.group, min((i + 1) * self.group, self.N)))

        try:
            in_parallel(share, groups, self.N * self.L * self.S)
        finally:
            if groups > 1:
                torch.set_num_threads(threads)

    def _blocks(self, size: int) -> Iterator[tuple[slice, int]]:
        """Queries of a block, and how many keys they see."""
        for start in range(0, self.L, self.block_rows):
            stop = min(start + self.block_rows, self.L)
            yield slice(start, stop), min(self.S, stop) if self.shortens else self.S

    def _make_scores(self, buffer: Tensor, group: slice, queries: slice, keys: int) -> Tensor:
        """(G, R, keys) masked scores, in the buffer."""
        shape = (group.stop - group.start, queries.stop - queries.start, keys)
        block = buffer[: math.prod(shape)].view(shape)
        q, k = self.q[group, queries], self.k[group, :keys]
        torch.baddbmm(block, q, k.mT, beta=0, alpha=self.scores.scale, out=block)
        if self.scores.causal:
            seen = min(queries.start, keys)
            block[..., seen:].masked_fill_(self.future[: shape[1], : keys - seen], -torch.inf)
        if self.scores.mask is not None:
            full = self.scores.mask.expand(*self.leading, self.L, self.S)
            for i, part in zip(range(group.start, group.stop), block, strict=True):
                seen_by = full[tuple(map(int, np.unravel_index(i, self.leading)))][queries, :keys]
                if seen_by.dtype == torch.bool:
                    part.masked_fill_(~seen_by, -torch.inf)
                else:
                    part.add_(seen_by)
        return block

    def _runs(self, group: slice, queries: slice, keys: int) -> tuple[int, Array, Array]:
        """Which elements of whose mask a block of weights holds: length, sample ids and first elements of its runs."""
        heads = np.arange(group.start, group.stop)
        firsts = (heads % self.heads * self.L + queries.start) * self.S
        rows = queries.stop - queries.start
        if keys == self.S:  # the rows of a head follow each other without a gap
            return rows * keys, self.ids[heads], firsts
        firsts = firsts[:, None] + np.arange(rows) * self.S
        return keys, np.repeat(self.ids[heads], rows), firsts.reshape(-1)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output (*leading, L, V), and log of the sum of exponentials of each query's scores, (N, L)."""
        out = self.q.new_empty(self.N, self.L, self.v.shape[-1])
        logsumexp = self.q.new_empty(self.N, self.L)

        def run(group: slice) -> None:
            buffer = self.q.new_empty((group.stop - group.start) * self.block_rows * self.S)
            for queries, keys in self._blocks(self.S):
                block = self._make_scores(buffer, group, queries, keys)
                total = softmax_rows(block.view(-1, keys), logsumexp[group, queries].view(-1))
                runs = self._runs(group, queries, keys)
                runs_cpu.drop_runs(block.view(-1).numpy(), *runs, *self.where)
                target = out[group, queries]
                torch.bmm(block, self.v[group, :keys], out=target)
                factor = torch.where(total == 0, 0, self.scale / total)
                target.mul_(factor.view(*target.shape[:2], 1))

        self._each_group(run)
        return out.view(*self.leading, *out.shape[1:]).to(self.dtype), logsumexp

    def backward(self, gradient: Tensor, out: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, (*leading, ...), from that of the output."""
        g = self._stack(gradient)
        delta = (g * self._stack(out)).sum(dim=-1)
        dq = torch.empty_like(self.q)
        # Transposed, (N, E, S): the products that add to them are a quarter faster so.
        dk, dv = self.k.new_zeros(self.k.mT.shape), self.v.new_zeros(self.v.mT.shape)

        def run(group: slice) -> None:
            size = (group.stop - group.start) * self.block_rows * self.S
            buffer, second = self.q.new_empty(size), self.q.new_empty(size)
            for queries, keys in self._blocks(self.S):
                weights = self._make_scores(buffer, group, queries, keys)
                exp_rows(weights.view(-1, keys), logsumexp[group, queries].view(-1))
                upstream = g[group, queries]
                slope = second[: weights.numel()].view(weights.shape)
                torch.bmm(upstream, self.v[group, :keys].mT, out=slope)
                runs_cpu.drop_softmax_runs(
                    weights.view(-1).numpy(), slope.view(-1).numpy(), delta[group, queries].view(-1).numpy(), keys,
                    self.scale, *self._runs(group, queries, keys), *self.where,
                )  # fmt: skip
                dv[group, :, :keys].baddbmm_(upstream.mT, weights, alpha=self.scale)
                dk[group, :, :keys].baddbmm_(self.q[group, queries].mT, slope, alpha=self.scores.scale)
                product = dq[group, queries]
                torch.baddbmm(
                    product, slope, self.k[group, :keys], beta=0, alpha=self.scores.scale, out=product
                )

        self._each_group(run)
        dq, dk, dv = (x.reshape(*self.leading, *x.shape[1:]).to(self.dtype) for x in (dq, dk.mT, dv.mT))
        return dq, dk, dv

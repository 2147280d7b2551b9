"""On a GPU: the bits of the CPU, nothing waited for, nothing kept. Collected where torch finds a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dropkit as dk
from dropkit.masks import ops
from test_gpu_triton import dtypes, inputs, rates

DEVICE = "cuda"
DOUBLE = torch.float64
F = dk.functional


@settings(max_examples=300)
@given(
    data=st.data(),
    x_and_shared=inputs(),
    p=rates,
    key=st.integers(-(2**63), 2**63 - 1),
    member=st.integers(0, 2**24 - 1),
    step=st.integers(0, 2**32 - 1),
)
def test_the_bits_are_those_of_the_cpu(data, x_and_shared, p, key, member, step):
    x, shared = x_and_shared
    rows = x.shape[0] if x.ndim else 1
    ids = torch.tensor([data.draw(st.integers(0, 2**40 - 1)) for _ in range(rows)], dtype=torch.int64)
    where = torch.tensor(key), torch.tensor(member), torch.tensor(p, dtype=DOUBLE)
    arguments = (*where, ids, step, 0, shared)
    result = torch.ops.dropkit.dropout(x.to(DEVICE), *arguments)
    assert result.device.type == DEVICE
    assert torch.equal(result.cpu(), ops.dropout_cpu(x, *arguments))


@settings(max_examples=50)
@given(dtype=dtypes, shape=st.tuples(st.integers(1, 3000), st.integers(1, 3000)), p=rates)
def test_large_tensors_have_the_bits_of_the_cpu(dtype, shape, p):
    x = torch.randn(shape).to(dtype)
    with dk.masks(seed=1, step=2):
        here = F.dropout(x, p)
    with dk.masks(seed=1, step=2):
        there = F.dropout(x.to(DEVICE), p)
    assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize(
    "law", [F.dropout, F.gaussian_dropout, F.uniform_dropout, F.exact_dropout, F.alpha_dropout]
)
@pytest.mark.parametrize("fields", [{}, {"member": 3}, {"samples": torch.tensor([5, 3, 2**39])}])
def test_laws_and_gradients_are_those_of_the_cpu(law, fields):
    results = []
    for device in ("cpu", DEVICE):
        x = torch.linspace(-2, 2, 303).reshape(3, 101).to(device).requires_grad_()
        with dk.masks(seed=1, **fields):
            y = law(x, 0.3)
        y.backward(torch.ones_like(y))
        results.append((y.detach().cpu(), x.grad.cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_committee_under_vmap_is_that_of_the_cpu():
    x = torch.randn(6, 40)

    def members(x):
        def one(m):
            with dk.masks(seed=1, member=m):
                return F.dropout(x, 0.3)

        return torch.func.vmap(one)(torch.arange(5))

    assert torch.equal(members(x.to(DEVICE)).cpu(), members(x))


def test_a_call_waits_for_nothing():
    x = torch.randn(64, 128, device=DEVICE, requires_grad=True)
    F.dropout(x, 0.5).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        F.dropout(x, 0.5).backward(x.detach())
        F.dropout(x, torch.tensor(0.5, device=DEVICE)).backward(x.detach())
        F.dropout(x, 0.5, shared=(1,)).backward(x.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_kept_for_backward():
    x = torch.randn(1 << 20, device=DEVICE, requires_grad=True)
    F.dropout(x, 0.5)
    before = torch.cuda.memory_allocated()
    y = F.dropout(x, 0.5)
    assert torch.cuda.memory_allocated() - before == y.untyped_storage().nbytes()


def test_a_compiled_model_has_the_eager_masks():
    model = nn.Sequential(nn.Linear(8, 16), dk.nn.Dropout(0.5), nn.Linear(16, 2)).to(DEVICE)
    dk.nn.name_sites(model)
    run, x = torch.compile(model, fullgraph=True), torch.randn(6, 8, device=DEVICE)
    for step in range(3):
        with dk.masks(step=step):
            eager = model(x)
        with dk.masks(step=step):
            torch.testing.assert_close(run(x), eager, rtol=1e-4, atol=1e-5)


def test_attention_drops_the_weights_that_the_cpu_drops():
    q, k, v = (torch.randn(2, 3, 17, 16) for _ in range(3))
    with dk.masks(seed=1):
        here = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    with dk.masks(seed=1):
        there = F.scaled_dot_product_attention(*(t.to(DEVICE) for t in (q, k, v)), dropout_p=0.3)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)


def test_more_than_two_to_the_31_elements():
    """Needs 9 GB of the GPU's memory; the last row is that of a tensor of its own."""
    rows, width = (1 << 21) + 1, 1024
    with dk.masks(seed=1):
        whole = F.dropout(torch.ones(rows, width, dtype=torch.bfloat16, device=DEVICE), 0.5)
    with dk.masks(seed=1, row_offset=rows - 3):
        end = F.dropout(torch.ones(3, width, dtype=torch.bfloat16), 0.5)
    assert torch.equal(whole[-3:].cpu(), end)

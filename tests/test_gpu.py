"""Masks on any device in torch's own operations, and which device gets which kernel; no GPU and no Triton needed."""

from __future__ import annotations

import builtins
import importlib
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dropkit as dk
from dropkit.bench import gpu as bench_gpu
from dropkit.errors import AddressError, BrokenContractError, ShapeError
from dropkit.masks import anywhere, gpu, noise_ops, ops
from test_masks import definition

DOUBLE = torch.float64
rates = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 2.0**-16, 2.0**-17, 3e-6]), st.floats(0, 1))
fields = {
    "key": st.integers(-(2**63), 2**63 - 1),
    "member": st.integers(0, 2**24 - 1),
    "step": st.integers(0, 2**32 - 1),
}


@pytest.fixture(autouse=True)
def chunks_of_a_few_rows(monkeypatch):
    monkeypatch.setattr(anywhere, "CHUNK", 40)


@settings(max_examples=150)
@given(
    shape=st.lists(st.integers(0, 6), max_size=5).map(tuple),
    data=st.data(),
    p=rates,
    dtype=st.sampled_from([torch.float32, DOUBLE, torch.bfloat16, torch.float16, torch.complex64]),
    given_ids=st.booleans(),
    **fields,
)
def test_any_device_gets_the_definition(shape, data, p, dtype, given_ids, key, member, step):
    shared = tuple(dim for dim in range(len(shape)) if data.draw(st.booleans(), label=f"shared {dim}"))
    rows, offset = shape[0] if shape else 1, 0 if given_ids else data.draw(st.integers(0, 2**40 - 6))
    ids = torch.tensor([data.draw(st.integers(0, 2**40 - 1)) for _ in range(rows)], dtype=torch.int64)
    ids = ids if given_ids else torch.arange(offset, offset + rows)
    order = data.draw(st.permutations(range(len(shape))), label="memory order")
    x = torch.arange(1, math.prod(shape) + 1).reshape(shape).to(dtype)
    x = x.permute(order).contiguous().permute([order.index(dim) for dim in range(len(shape))])
    where = torch.tensor(key), torch.tensor(member), torch.tensor(p, dtype=DOUBLE)
    result = anywhere.dropout_anywhere(x, *where, ids if given_ids else None, step, offset, shared)
    assert torch.equal(result, definition(x, *where[:2], ids, step, where[2], shared))
    assert result.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.3])
def test_16_bits_are_multiplied_in_float32_and_round_once(dtype, p):
    x, zero, rate = (
        torch.linspace(1, 2, 400).reshape(20, 20).to(dtype),
        torch.tensor(0),
        torch.tensor(p, dtype=DOUBLE),
    )
    result = anywhere.dropout_anywhere(x, zero, zero, rate, None, 0, 0, ())
    assert torch.equal(result, definition(x, zero, zero, torch.arange(20), 0, rate))


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    K=st.integers(1, 4),
    batched=st.sets(st.sampled_from(["x", "key", "member", "p", "ids"]), min_size=1),
    shared=st.sampled_from([(), (0,)]),
)
def test_networks_on_a_leading_axis_are_those_of_the_cpu(shape, K, batched, shared):
    size = {name: K if name in batched else 1 for name in ("x", "key", "member", "p", "ids")}
    ids = torch.randint(0, 2**40, (size["ids"], shape[0]))
    arguments = (
        torch.randn(size["x"], *shape),
        torch.randint(-(2**63), 2**63 - 1, (size["key"],)),
        torch.randint(0, 2**24, (size["member"],)),
        torch.rand(size["p"], dtype=DOUBLE),
        ids if "ids" in batched else ids[0],
        5,
        0,
        shared,
    )
    assert torch.equal(anywhere.dropout_anywhere(*arguments), ops.dropout_cpu(*arguments))


@settings(max_examples=60)
@given(
    law=st.sampled_from(sorted(noise_ops.PURPOSES)),
    shape=st.lists(st.integers(0, 6), max_size=4).map(tuple)
    | st.tuples(st.integers(1, 9), st.integers(1, 300)),
    data=st.data(),
    p=st.floats(0, 0.99),
    dtype=st.sampled_from([torch.float32, DOUBLE, torch.bfloat16, torch.complex64]),
    given_ids=st.booleans(),
    **fields,
)
def test_noise_on_any_device_is_that_of_the_cpu(law, shape, data, p, dtype, given_ids, key, member, step):
    shared = tuple(dim for dim in range(len(shape)) if data.draw(st.booleans(), label=f"shared {dim}"))
    rows = shape[0] if shape else 1
    ids = torch.tensor([data.draw(st.integers(0, 2**40 - 1)) for _ in range(rows)], dtype=torch.int64)
    x = torch.linspace(1, 2, math.prod(shape)).reshape(shape).to(dtype)
    where = torch.tensor(key), torch.tensor(member), torch.tensor(p, dtype=DOUBLE)
    arguments = (x, *where, ids if given_ids else None, step, 0 if given_ids else 7, shared, law)
    assert torch.equal(anywhere.noise_anywhere(*arguments), noise_ops.noise_on_cpu(*arguments))


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, but for copies and for single numbers of the processor."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function not in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            tensors = [t for t in tree_leaves((arguments, named or {})) if isinstance(t, torch.Tensor)]
            devices = {t.device.type for t in tensors if t.ndim or t.device.type != "cpu"}
            assert len(devices) <= 1, f"{function} takes tensors on {devices}"
        return function(*arguments, **(named or {}))


def test_one_device_would_see_a_mixture():
    with OneDevice(), pytest.raises(AssertionError, match="meta"):
        torch.empty(3, device="meta").masked_fill_(torch.ones(3, dtype=torch.bool), 0)


@pytest.mark.parametrize("address_on", ["cpu", "meta"])
@pytest.mark.parametrize("shape", [(), (4,), (4, 6), (2, 3, 4, 5)])
def test_nothing_is_read_back_from_a_device_or_mixed_with_another(address_on, shape):
    """The device is torch's `meta`: it has no values, so that whoever reads one raises."""
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    key, member, p = (torch.zeros((), dtype=d, device=address_on) for d in (torch.int64, torch.int64, DOUBLE))
    ids = torch.zeros(shape[0], dtype=torch.int64, device=address_on) if shape else None
    for samples in (None, ids):
        with OneDevice():
            out = anywhere.dropout_anywhere(x, key, member, p, samples, 0, 0, ())
        assert (out.device, out.dtype, out.shape) == (x.device, x.dtype, x.shape)
    rate = torch.tensor(0.3, dtype=DOUBLE)
    for law in noise_ops.PURPOSES:
        with OneDevice():
            out = anywhere.noise_anywhere(x, key, member, rate, ids, 0, 0, (), law)
        assert (out.device, out.dtype, out.shape) == (x.device, x.dtype, x.shape)


def test_errors_are_those_of_the_cpu():
    zero, p, x = torch.tensor(0), torch.tensor(0.5, dtype=DOUBLE), torch.ones(2, 2)
    for form in (anywhere.dropout_anywhere, ops.dropout_cpu):
        with pytest.raises(ShapeError, match="3 sample ids were given for 2 rows"):
            form(x, zero, zero, p, torch.arange(3), 0, 0, ())
        with pytest.raises(AddressError, match="2 rows from row_offset=1099511627775"):
            form(x, zero, zero, p, None, 0, 2**40 - 1, ())


@pytest.mark.parametrize("name", ["dropout", "noise", "dropout_at", "noise_at", "draw"])
@pytest.mark.parametrize("device", ["CUDA", "XPU", "MPS", "HPU", "PrivateUse1"])
def test_every_operator_serves_every_device(name, device):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"dropkit::{name}", device)


def test_gpus_have_a_kernel_of_their_own():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("dropkit::dropout", "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("dropkit::dropout", "XPU")


@pytest.fixture
def without_triton(monkeypatch):
    importing = builtins.__import__

    def refuse(name, *arguments, **named):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importing(name, *arguments, **named)

    for module in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "dropkit.masks.gpu_kernels", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    gpu.kernels.cache_clear()
    yield
    gpu.kernels.cache_clear()


@pytest.mark.usefixtures("without_triton")
def test_without_triton_a_gpu_gets_the_same_bits_from_plain_operations(monkeypatch):
    assert gpu.kernels() is None
    x, where = torch.randn(7, 9), (torch.tensor(3), torch.tensor(1), torch.tensor(0.4, dtype=DOUBLE))
    expected = ops.dropout_cpu(x, *where, None, 2, 0, ())
    meta = gpu.dropout_gpu(x.to("meta"), *where, None, 2, 0, ())
    assert meta.device.type == "meta"
    assert torch.equal(anywhere.dropout_anywhere(x, *where, None, 2, 0, ()), expected)


def test_a_fault_in_the_kernels_own_imports_is_not_taken_for_a_missing_triton(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")

    gpu.kernels.cache_clear()
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="elsewhere"):
        gpu.kernels()
    gpu.kernels.cache_clear()


def test_an_address_on_a_device_serves_an_input_on_the_cpu():
    x, where = torch.randn(7, 9), (torch.tensor(3), torch.tensor(1), torch.tensor(0.4, dtype=DOUBLE))
    assert torch.equal(
        gpu.dropout_gpu(x, *where, torch.arange(7), 2, 0, ()),
        ops.dropout_cpu(x, *where, torch.arange(7), 2, 0, ()),
    )


def test_triton_is_not_loaded_before_a_tensor_lies_on_a_gpu():
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import dropkit as dk; "
        "dk.functional.dropout(torch.ones(9)); print(before, 'triton' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = run.stdout.split()
    assert before == after


def test_layers_know_shapes_on_a_device_without_values():
    x = torch.empty(4, 6, device="meta", requires_grad=True)
    for form in (dk.functional.dropout, dk.functional.gaussian_dropout, dk.functional.exact_dropout):
        assert form(x, 0.3).device == x.device


def test_the_rows_of_a_gpu_time_checked_work(monkeypatch):
    """On the CPU here, so that the check of what would be timed runs without a GPU too."""
    monkeypatch.setattr(bench_gpu, "CALLS", 2)
    drop = lambda x: dk.functional.dropout(x, 0.1)  # noqa: E731
    for pair in (
        bench_gpu.against_copy(drop, (64, 64), 0.1, "cpu"),
        bench_gpu.against_torch(drop, lambda x: torch.nn.functional.dropout(x, 0.1), (64, 64), 0.1, "cpu"),
    ):
        pair.check()
    with pytest.raises(BrokenContractError):
        bench_gpu.against_copy(torch.clone, (64, 64), 0.1, "cpu").check()


@pytest.mark.parametrize(("gpu_there", "triton_there"), [(False, True), (True, False), (True, True)])
def test_rows_of_a_gpu_say_what_is_missing(monkeypatch, gpu_there, triton_there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_there)
    monkeypatch.setattr(bench_gpu, "find_spec", lambda name: triton_there or None)
    said = bench_gpu.kernels_missing()
    assert bool(said) == (not (gpu_there and triton_there))
    assert ("GPU" in said, "Triton" in said) == (not gpu_there, gpu_there and not triton_there)

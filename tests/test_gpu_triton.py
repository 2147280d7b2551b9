"""The Triton kernels against the definition, bit for bit, in Triton's interpreter; and what they compile to.

Collected where Triton is installed (conftest.py says so where it is not); no GPU is needed.
"""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from dropkit.errors import AddressError, ShapeError
from dropkit.masks import gpu, gpu_layout
from dropkit.masks.address import signed, site_hash, site_key
from gpu_interpreter import compiling_for, interpreted, interpreting, round_as_hardware
from test_masks import definition, golden_lines
from test_philox import KNOWN_ANSWERS

pytestmark = [  # of numpy, in products of floats
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

kernels = interpreted()
rates = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 2.0**-16, 2.0**-17, 1e-5, 3e-6]), st.floats(0.2, 0.8), st.floats(0, 1)
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def hardware_rounding(monkeypatch):
    monkeypatch.setattr("triton.runtime.interpreter._convert_float", round_as_hardware)


def small_tiles(monkeypatch, wide=False):
    """Tiles of a few elements, so that small tensors have many."""
    monkeypatch.setattr(gpu_layout, "BLOCKS", 8)
    monkeypatch.setattr(gpu_layout, "TILE", 128)
    monkeypatch.setattr(gpu_layout, "LINE", 16)
    if wide:
        monkeypatch.setattr(gpu_layout, "MOST_SMALL", -1)


def words_kernel(counter, key, out):
    c0, c1, c2, c3 = (tl.load(counter + i).to(tl.uint32) for i in range(4))
    words = kernels.philox_words(c0, c1, c2, c3, tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32))
    for i in range(4):
        tl.store(out + i, words[i].to(tl.int64))


@pytest.mark.parametrize("answer", KNOWN_ANSWERS)
def test_known_answers(answer):
    with interpreting():
        kernel = triton.jit(words_kernel)
    out = torch.zeros(4, dtype=torch.int64)
    kernel[(1,)](torch.tensor(answer[:4]), torch.tensor(answer[4:6]), out)
    assert out.tolist() == answer[6:]


def kept_kernel(lane, second, t, fine, out):
    at = tl.arange(0, 8)
    keep = kernels.kept(tl.load(lane + at), tl.load(second + at), tl.load(t), tl.load(fine), True)
    tl.store(out + at, keep.to(tl.int32))


@pytest.mark.parametrize(("t", "fine"), [(0, 5), (0, 0), (3, 0), (1 << 16, 0), (0, 1 << 16)])
def test_the_border_is_where_the_definition_has_it(t, fine):
    """Ties, of which drawn bits show one in 2**32."""
    with interpreting():
        kernel = triton.jit(kept_kernel)
    lane = torch.tensor([0, 0, 0, 1, 2, 3, 4, 65535], dtype=torch.int32)
    second = torch.tensor([4, 5, 6, 4, 0, 0, 65535, 0], dtype=torch.int32)
    out = torch.zeros(8, dtype=torch.int32)
    kernel[(1,)](lane, second, *(torch.tensor([n], dtype=torch.int32) for n in (t, fine)), out)
    assert torch.equal(out == 1, (lane >= t) & ~((lane == 0) & (second < fine)))


def test_golden_masks():
    for _, seed, site, call, step, sample, member, width, p, digest in golden_lines():
        key = torch.tensor(signed(site_key(int(seed), site_hash(site, int(call)))))
        kept = gpu.launch(
            kernels, torch.ones(1, int(width)), key, torch.tensor(int(member)), torch.tensor(float(p), dtype=DOUBLE),
            torch.tensor([int(sample)]), int(step), 0, [],
        )  # fmt: skip
        assert hashlib.sha256(np.packbits(kept.numpy() != 0).tobytes()).hexdigest()[:16] == digest


@st.composite
def inputs(draw):
    """A tensor in some memory order, perhaps cut out of a larger one; and dims that share."""
    shape = draw(
        st.lists(st.integers(0, 5), max_size=5).map(tuple)
        | st.tuples(st.integers(1, 9), st.integers(1, 9))
        | st.tuples(st.integers(1, 9), st.integers(1, 90))
    )
    shared = tuple(dim for dim in range(len(shape)) if draw(st.booleans()))
    order = draw(st.permutations(range(len(shape))))
    x = torch.linspace(-3, 5, max(math.prod(shape), 1), dtype=DOUBLE)[: math.prod(shape)].reshape(shape)
    x = x.to(draw(dtypes))
    x = x.permute(order).contiguous().permute([order.index(dim) for dim in range(len(shape))])
    if shape and draw(st.booleans()):
        x = torch.cat((x, x), dim=-1)[..., : shape[-1]]
    return x, shared


@pytest.mark.parametrize("shared", [(), (1,)])
@pytest.mark.parametrize("width", range(1, 10))
def test_every_lane_of_a_block_finds_its_element(width, shared):
    x = torch.arange(1.0, 1 + 30 * width).reshape(30, 1, width).expand(30, 3, width).contiguous()
    where = torch.tensor(7), torch.tensor(2)
    p = torch.tensor(0.5, dtype=DOUBLE)
    y = gpu.launch(kernels, x, *where, p, None, 3, 0, shared)
    assert torch.equal(y, definition(x, *where, torch.arange(30), 3, p, shared))


@settings(max_examples=120)
@given(
    data=st.data(),
    x_and_shared=inputs(),
    p=rates,
    key=st.integers(-(2**63), 2**63 - 1),
    member=st.integers(0, 2**24 - 1),
    step=st.integers(0, 2**32 - 1),
    tiles=st.sampled_from(["small", "small, wide", "full"]),
)
def test_the_kernels_are_the_definition(data, x_and_shared, p, key, member, step, tiles):
    x, shared = x_and_shared
    rows = x.shape[0] if x.ndim else 1
    given_ids = data.draw(st.booleans(), label="ids are given")
    offset = 0 if given_ids else data.draw(st.integers(0, 2**40 - 10), label="row offset")
    ids = torch.tensor([data.draw(st.integers(0, 2**40 - 1)) for _ in range(rows)], dtype=torch.int64)
    ids = ids if given_ids else torch.arange(offset, offset + rows)
    scalars = torch.tensor(key), torch.tensor(member)
    rate = torch.tensor(p, dtype=DOUBLE)
    with pytest.MonkeyPatch.context() as patch:
        if tiles != "full":
            small_tiles(patch, wide="wide" in tiles)
        result = gpu.launch(kernels, x, *scalars, rate, ids if given_ids else None, step, offset, shared)
    if result is None:  # too many dims alternate between shared and not
        assert x.ndim == 5
        return
    assert torch.equal(result, definition(x, *scalars, ids, step, rate, shared))
    assert result.stride() == torch.empty_like(x).stride()


def leading(tensors, k):
    """Network k of tensors with leading axes of size 1 or K."""
    return [t[min(k, len(t) - 1)] for t in tensors]


@settings(max_examples=60)
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple),
    dtype=dtypes,
    K=st.integers(1, 4),
    batched=st.sets(st.sampled_from(["x", "key", "member", "p", "ids"]), min_size=1),
)
def test_networks_on_a_leading_axis_are_a_loop_over_them(data, shape, dtype, K, batched):
    size = {name: K if name in batched else 1 for name in ("x", "key", "member", "p", "ids")}
    shared = tuple(dim for dim in range(len(shape)) if data.draw(st.booleans(), label=f"shared {dim}"))
    x = torch.randn(size["x"], *shape).to(dtype)
    if data.draw(st.booleans(), label="the leading axis is innermost in memory"):
        x = x.movedim(0, -1).contiguous().movedim(-1, 0)
    key = torch.randint(-(2**63), 2**63 - 1, (size["key"],))
    member = torch.randint(0, 2**24, (size["member"],))
    p = torch.tensor([data.draw(rates) for _ in range(size["p"])], dtype=DOUBLE)
    ids = torch.randint(0, 2**40, (size["ids"], shape[0]))
    given_ids = ids if "ids" in batched else ids[0]
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch)
        result = gpu.launch(kernels, x, key, member, p, given_ids, 5, 0, shared)
    assert result is not None
    assert len(result) == K
    for k in range(K):
        own_x, *where, own_p, own_ids = leading((x, key, member, p, ids), k)
        assert torch.equal(result[k], definition(own_x, *where, own_ids, 5, own_p, shared))


NETWORKS = torch.tensor([11]), torch.tensor([4])


@pytest.mark.parametrize("shared", [(), (1,)])
def test_networks_that_share_bits_have_rates_of_their_own(shared):
    x, p = torch.rand(1, 5, 16) + 1, torch.tensor([0.1, 0.9, 0.5], dtype=DOUBLE)
    result = gpu.launch(kernels, x, *NETWORKS, p, None, 0, 0, shared)
    for own, rate in zip(result, p, strict=True):
        assert torch.equal(own, definition(x[0], *(n[0] for n in NETWORKS), torch.arange(5), 0, rate, shared))


@pytest.mark.parametrize("shared", [(), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
@pytest.mark.parametrize("cut", [False, True])
def test_memory_of_any_order_is_read_and_written_where_it_lies(shared, order, cut):
    """Also where the result, of more networks than the input has, lies in another order than the input."""
    x = torch.arange(1.0, 1 + 5 * 4 * 3 * 8).reshape(5, 4, 3, 8)
    if cut:
        x = torch.cat((x, -x), dim=-1)
    x = x.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])[..., :8]
    p = torch.tensor([0.5], dtype=DOUBLE)
    expected = definition(x, *(n[0] for n in NETWORKS), torch.arange(5), 0, p[0], shared)
    assert torch.equal(gpu.launch(kernels, x, *(n[0] for n in (*NETWORKS, p)), None, 0, 0, shared), expected)
    result = gpu.launch(kernels, x[None], *NETWORKS, p.expand(2), None, 0, 0, shared)
    assert torch.equal(result, expected.expand(2, *x.shape))


@pytest.mark.parametrize("shared", [(), (0,), (1,), (0, 1)])
def test_what_is_dropped_is_zero_whatever_it_was(shared):
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]]).repeat(50, 1)
    zero, p = torch.tensor(0), torch.tensor(0.5, dtype=DOUBLE)
    y = gpu.launch(kernels, x, zero, zero, p, None, 0, 0, shared)
    keep = definition(torch.ones_like(x), zero, zero, torch.arange(50), 0, p, shared) > 0
    assert (y[~keep] == 0).all()
    assert torch.equal(y[keep].nan_to_num(), x[keep].mul(2).nan_to_num())


@pytest.mark.parametrize("scale_of", [0.5, 0.3, 1 - 128 / 129])
def test_every_bfloat16_rounds_to_even_once(scale_of):
    """All 65 536 values; the last rate makes ties."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).reshape(1, -1)
    zero, p = torch.tensor(0), torch.tensor(scale_of, dtype=DOUBLE)
    y = gpu.launch(kernels, x, zero, zero, p, None, 0, 0, ())
    expected = definition(x, zero, zero, torch.zeros(1, dtype=torch.int64), 0, p)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


def test_errors_are_those_of_other_devices():
    zero, p = torch.tensor(0), torch.tensor(0.5, dtype=DOUBLE)
    with pytest.raises(ShapeError, match="3 sample ids were given for 2 rows"):
        gpu.launch(kernels, torch.ones(2, 2), zero, zero, p, torch.arange(3), 0, 0, ())
    with pytest.raises(AddressError, match="row_offset=1099511627775"):
        gpu.launch(kernels, torch.ones(2, 2), zero, zero, p, None, 0, 2**40 - 1, ())


# --- compiled, for GPUs that are not there ---------------------------------------------------------------

LAYOUTS = {
    "elementwise": ((4096, 1024), (), 1),
    "elementwise, odd width": ((64, 1001), (), 1),
    "narrow": ((4096, 4), (), 1),
    "channel": ((32, 64, 56, 56), (2, 3), 1),
    "locked": ((32, 128, 512), (1,), 1),
    "path": ((32, 64, 56, 56), (1, 2, 3), 1),
    "member": ((4096, 1024), (0,), 1),
    "alternating": ((8, 6, 10, 16, 7), (1, 3), 1),
    "networks": ((512, 1024), (), 4),
    "networks, shared": ((512, 16, 64), (1,), 4),
}


def compile_call(
    module, shape, shared, networks, dtype=torch.bfloat16, p=0.1, key=7, step=0, offset=0, ids=None
):
    """The PTX that a call on a GPU would have run."""
    x = torch.empty((networks, *shape) if networks > 1 else shape, dtype=dtype)
    scalars = torch.tensor(key), torch.tensor(0), torch.tensor(p, dtype=DOUBLE)
    if networks > 1:
        scalars = tuple(t[None] for t in scalars)
    gpu.launch(module, x, *scalars, ids, step, offset, shared)
    return module.compiled[-1].asm["ptx"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_layouts_compile_for_hopper(name):
    with compiling_for(90) as module:
        ptx = compile_call(module, *LAYOUTS[name])
    assert "mul.hi.u32" in ptx
    assert "cvt.rn.bf16.f32" in ptx  # rounded once, to even
    assert ".ftz" not in ptx  # small numbers are not flushed to 0
    assert "fma.rn.f" not in ptx


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("capability", "name"), [(80, "elementwise"), (90, "member"), (90, "networks, shared")]
)
def test_all_dtypes_compile(capability, name, dtype):
    shape, shared, networks = LAYOUTS[name]
    with compiling_for(capability) as module:
        ptx = compile_call(
            module, shape, shared, networks, dtype=dtype, p=2.0**-18, ids=torch.arange(shape[0])
        )
    assert ".ftz" not in ptx
    assert "fma.rn.f" not in ptx


@pytest.mark.parametrize("name", ["elementwise", "channel", "locked", "path", "member"])
def test_a_thread_reads_and_writes_16_bytes_at_a_time(name):
    with compiling_for(90) as module:
        ptx = compile_call(module, *LAYOUTS[name])
    for access in ("ld.global", "st.global"):
        assert set(re.findall(rf"{access}\S*", ptx)) == {f"{access}.v4.b32"}


def test_each_block_is_drawn_once_and_stays_in_its_thread():
    with compiling_for(90) as module:
        ptx = compile_call(module, *LAYOUTS["elementwise"])
    blocks_of_a_thread = gpu_layout.BLOCKS // 128
    assert ptx.count("mul.hi.u32") <= 2 * 10 * blocks_of_a_thread  # two products a round, ten rounds
    assert "shared" not in re.sub(r"//.*|global_smem", "", ptx)
    assert "bar.sync" not in ptx


def test_a_new_address_compiles_nothing():
    with compiling_for(90) as module:
        for key, step, offset, p in [
            (7, 0, 0, 0.1),
            (1, 1, 1, 0.5),
            (-(2**63), 2**32 - 1, 16, 1.0),
            (16, 16, 48, 0.0),
        ]:
            compile_call(module, *LAYOUTS["elementwise"], key=key, step=step, offset=offset, p=p)
    assert len({id(kernel) for kernel in module.compiled}) == 1


class Noting:
    """Stands for the module of kernels; notes what a kernel is launched with."""

    def __init__(self):
        self.launches = []

    @property
    def elementwise(self):
        return self

    def __getitem__(self, grid):
        return lambda *arguments, **named: self.launches.append((arguments, named))


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("networks", [1, 3])
def test_nothing_is_read_back_from_the_device_and_the_kernel_gets_nothing_else(where, networks):
    """The device is torch's `meta`: it has no values, so that whoever reads one raises."""
    module, lead = Noting(), () if networks == 1 else (networks,)
    x, ids = torch.empty((*lead, 4, 10), device="meta"), torch.zeros(4, dtype=torch.int64, device=where)
    key, p = (torch.zeros(lead, dtype=dtype, device=where) for dtype in (torch.int64, DOUBLE))
    out = gpu.launch(module, x, key, key, p, ids, 0, 0, ())
    assert out.device.type == "meta"
    ((arguments, named),) = module.launches
    tensors = [t for t in (*arguments, *named.values()) if isinstance(t, torch.Tensor)]
    assert {t.device.type for t in tensors} == {"meta"}
    assert len(tensors) == (5 if networks > 1 or where == "meta" else 3)
    assert named["REFINED"] == (where == "meta")

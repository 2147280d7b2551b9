"""Inside torch: every function that draws, under every transform, dtype, layout and device torch has."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils.checkpoint import checkpoint

import dropkit as dk

F = dk.functional

# What torch itself warns of while it compiles and differentiates forward.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

# One x gives each function all of its arguments; (B, 3, 8) always works. Those of the first kind multiply x by noise
# element by element, and are linear in it but for alpha dropout.
ELEMENTWISE = {
    "dropout": lambda x, **o: F.dropout(x, 0.4, **o),
    "dropout, shared": lambda x, **o: F.dropout(x, 0.4, shared=(1,), **o),
    "gaussian": lambda x, **o: F.gaussian_dropout(x, 0.4, **o),
    "uniform": lambda x, **o: F.uniform_dropout(x, 0.4, **o),
    "exact": lambda x, **o: F.exact_dropout(x, 0.4, **o),
    "alpha": lambda x, **o: F.alpha_dropout(x, 0.4, **o),
    "feature alpha": lambda x, **o: F.feature_alpha_dropout(x, 0.4, **o),
}
ALL = ELEMENTWISE | {
    "attention": lambda x, **o: F.scaled_dot_product_attention(x, x.flip(1), x, dropout_p=0.4, **o),
    "residual": lambda x, **o: F.dropout_add(x, x.flip(1), 0.4, **o),
    "layer norm": lambda x, **o: F.dropout_add_layer_norm(x, x.flip(1), p=0.4, **o),
    "rms norm": lambda x, **o: F.dropout_add_rms_norm(x, x.flip(1), p=0.4, **o),
}
LAYERS = {
    "dropout": (dk.nn.Dropout, nn.Dropout),
    "gaussian": (dk.nn.GaussianDropout, nn.Dropout),
    "alpha": (dk.nn.AlphaDropout, nn.AlphaDropout),
    "feature alpha": (dk.nn.FeatureAlphaDropout, nn.FeatureAlphaDropout),
}
every = pytest.mark.parametrize("name", ALL)
every_elementwise = pytest.mark.parametrize("name", ELEMENTWISE)
every_layer = pytest.mark.parametrize("name", LAYERS)


def at(name, x, **fields):
    with dk.masks(seed=4, **{"step": 2, **fields}):
        return ALL[name](x)


def some(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


# The operators themselves.

ZERO, RATE = torch.tensor(0), torch.tensor(0.3, dtype=torch.float64)
ADDRESS = torch.tensor([7, 0, 1, 0, 0])
IDS = torch.tensor([5, 2**39, 0, 1])
MANY = torch.arange(3), torch.arange(3) + 4, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
X = torch.rand(4, 3, 5)
GRAPH_OF_EACH = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3])
EDGES = torch.tensor([[0, 2, 3, 5, 7, 1, 4], [1, 3, 4, 6, 8, 0, 2]])
QUERIES = tuple(
    torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)
)
UNSEEN = torch.ones(5, 5, dtype=torch.bool).tril()
# By operator: arguments to check it with. An operator that is added needs a line here.
OPERATORS = {
    "dropkit::dropout": [
        (X, ZERO, ZERO, RATE, None, 0, 0, []),
        (X.double(), ZERO, ZERO, RATE, IDS, 3, 0, [1]),
        (X.bfloat16(), ZERO, ZERO, RATE, None, 3, 9, [0]),
        (X.transpose(0, 2), ZERO, ZERO, RATE, None, 3, 9, []),
        (X[None], MANY[0], MANY[1], MANY[2], None, 3, 9, []),
        (X[None].expand(3, 4, 3, 5), MANY[0], ZERO[None], MANY[2], IDS[None], 3, 0, [2]),
    ],
    "dropkit::dropout_at": [
        (X.clone().requires_grad_(), ADDRESS, RATE, []),
        (X.clone().requires_grad_(), torch.cat((ADDRESS, IDS)), RATE, [1, 2]),
        (X.double().requires_grad_(), torch.tensor([7, 3, 1, 0, 1]), RATE, [1]),
    ],
    "dropkit::noise": [
        (X, ZERO, ZERO, RATE, None, 0, 0, [1], law) for law in ("gaussian", "uniform", "exact")
    ]
    + [(X.double(), ZERO, ZERO, RATE, IDS, 3, 0, [], law) for law in ("gaussian", "uniform", "exact")],
    "dropkit::noise_at": [
        (X.clone().requires_grad_(), ADDRESS, RATE, [], law) for law in ("gaussian", "uniform", "exact")
    ],
    "dropkit::attention_at": [
        (*QUERIES, None, ADDRESS, RATE, False, 0.5),
        (*QUERIES, UNSEEN, ADDRESS, RATE, False, 1.0),
    ],
    "dropkit::attention_at_backward": [
        (QUERIES[0].detach(), *(x.detach() for x in QUERIES), None, ADDRESS, RATE, True, 0.5)
    ],
    "dropkit::draw": [("a site", True), ("", False, 2)],
    "dropkit::keep_rows": [
        (ADDRESS, None, RATE, 9, 3, False),
        (torch.cat((ADDRESS, IDS)), GRAPH_OF_EACH, RATE, 9, 3, True),
    ],
    "dropkit::keep_pairs": [
        (ADDRESS, EDGES, None, None, RATE),
        (ADDRESS, EDGES, GRAPH_OF_EACH, GRAPH_OF_EACH[EDGES[0]], RATE),
    ],
    "dropkit::keep_off_walks": [(ADDRESS, ADDRESS + 1, EDGES, None, RATE, 9, 2, 3, False)],
    "dropkit::rate_at_step": [([0, 5], [0.1, 0.3], "Dropout")],
}


def registered() -> set[str]:
    return {
        name.partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dropkit::")
    }


def test_every_operator_is_in_the_table():
    assert registered() == set(OPERATORS)


@pytest.mark.parametrize(
    ("operator", "arguments"), [(name, a) for name, cases in OPERATORS.items() for a in cases]
)
def test_every_operator_keeps_torchs_contract(operator, arguments):
    """torch.library.opcheck: schema, derivatives, fake tensors, and the way through a compiler with dynamic shapes."""
    namespace, _, name = operator.partition("::")
    # A draw is marked as random: it may differ from run to run, and is not compared between eager and compiled.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    with dk.masks(seed=0, step=5) if name == "rate_at_step" else nullcontext():
        torch.library.opcheck(
            getattr(getattr(torch.ops, namespace), name).default, arguments,
            test_utils=utilities[:3] if name == "draw" else utilities,
        )  # fmt: skip


# torch.func.


@every
def test_vmap_over_members_is_a_loop(name):
    x = some(6, 3, 8)
    batched = vmap(lambda member: at(name, x, member=member))(torch.arange(4))
    loop = torch.stack([at(name, x, member=member) for member in range(4)])
    torch.testing.assert_close(batched, loop, rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_vmap_over_inputs_in_a_context_shares_the_mask(name, dim):
    """In a context the address decides: inputs that are batched do not make it another address."""
    x = some(4, 6, 3, 8)
    batched = vmap(lambda one: at(name, one), in_dims=dim)(x.movedim(0, dim))
    loop = torch.stack([at(name, one) for one in x])
    torch.testing.assert_close(batched, loop, rtol=1e-12, atol=1e-12)


@every
def test_vmap_outside_a_context_follows_torchs_randomness(name):
    x = some(1, 5, 3, 8).expand(3, 5, 3, 8)
    same = vmap(ALL[name], randomness="same")(x)
    different = vmap(ALL[name], randomness="different")(x)
    torch.testing.assert_close(same[0], same[1])
    assert not torch.allclose(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(ALL[name])(x)


def test_what_no_mask_touched_stays_unbatched():
    """So that a committee runs the part of a model before its first dropout once."""
    seen = []

    def run(member):
        with dk.masks(seed=0, member=member):
            for p in (0.0, 0.5):
                seen.append(torch._C._functorch.is_batchedtensor(F.dropout(torch.ones(2, 3), p)))
            seen.append(
                torch._C._functorch.is_batchedtensor(F.dropout(torch.ones(2, 3), 0.5, training=False))
            )
        return member

    vmap(run)(torch.arange(3))
    assert seen == [False, True, False]


@every
def test_forward_and_reverse_mode_agree(name):
    x, tangent = some(4, 3, 8), some(4, 3, 8).flip(0)
    f = lambda x: at(name, x)  # noqa: E731
    value, forward = jvp(f, (x,), (tangent,))
    plain, pull = vjp(f, x)
    torch.testing.assert_close(value, f(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain, f(x), rtol=1e-12, atol=1e-12)
    cotangent = some(4, 3, 8).flip(2)
    torch.testing.assert_close((forward * cotangent).sum(), (pull(cotangent)[0] * tangent).sum())
    if name in ELEMENTWISE and "alpha" not in name:
        assert torch.equal(forward, f(tangent))  # linear, and with the same mask
    step = 1e-6
    torch.testing.assert_close(
        forward, (f(x + step * tangent) - f(x - step * tangent)) / (2 * step), rtol=1e-5, atol=1e-7
    )


@every
def test_jacobians_and_hessians(name):
    x = some(2, 1, 4)
    f = lambda x: at(name, x)  # noqa: E731
    torch.testing.assert_close(jacfwd(f)(x), jacrev(f)(x), rtol=1e-10, atol=1e-10)
    g = lambda x: at(name, x).pow(3).sum()  # noqa: E731
    second = hessian(g)(x).reshape(8, 8)
    torch.testing.assert_close(second, second.T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(second, jacrev(grad(g))(x).reshape(8, 8), rtol=1e-8, atol=1e-8)


@every
def test_derivatives_of_derivatives_with_autograd(name):
    x = some(2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: at(name, x), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: at(name, x).square(), x)


def model_of(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), layer(0.3), nn.Linear(6, 2)).double()
    dk.nn.name_sites(model)
    return model


@every_layer
def test_functional_call_is_the_call(name):
    model, x = model_of(LAYERS[name][0]), some(5, 8)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    with dk.masks(seed=1):
        plain = model(x)
    with dk.masks(seed=1):
        assert torch.equal(functional_call(model, parameters, (x,)), plain)

    def loss(parameters):
        with dk.masks(seed=1):
            return functional_call(model, parameters, (x,)).square().sum()

    plain.square().sum().backward()
    for key, gradient in grad(loss)(parameters).items():
        torch.testing.assert_close(gradient, model.get_parameter(key).grad, rtol=1e-12, atol=1e-12)


@every_layer
def test_an_ensemble_of_models_in_one_vmap(name):
    """torch's model ensembling, each with masks of its own by its member number."""
    models, x = [model_of(LAYERS[name][0]) for _ in range(3)], some(5, 8)
    for i, model in enumerate(models):
        for p in model.parameters():
            p.data += i
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])

    def run(parameters, buffers, member):
        with dk.masks(seed=1, member=member):
            return functional_call(base, (parameters, buffers), (x,))

    together = vmap(run)(parameters, buffers, torch.arange(3))
    for i, model in enumerate(models):
        with dk.masks(seed=1, member=i):
            torch.testing.assert_close(together[i], model(x), rtol=1e-12, atol=1e-12)


# Checkpointing and compilers.


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_is_the_same(name, reentrant):
    draw = lambda x: ALL[name](x, site="here")  # noqa: E731
    results = []
    for run in (draw, lambda x: checkpoint(draw, x, use_reentrant=reentrant)):
        x = some(5, 3, 8).requires_grad_()
        with dk.masks(seed=4, step=2):
            y = run(x * 1.5)
            y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


@every
def test_compiled_is_eager_for_any_batch_and_step(name):
    """One graph without a break serves other steps, members and batch sizes, forward and backward."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(ALL[name], fullgraph=True, dynamic=True, backend=counter)
    compiled = []
    for rows, fields in ((5, {}), (7, {"step": 3}), (6, {"member": 2}), (4, {"row_offset": 2**39})):
        results = []
        for f in (run, ALL[name]):
            x = some(rows, 3, 8).requires_grad_()
            with dk.masks(seed=4, **fields):
                y = f(x)
            results.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[-1]


@every_layer
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_evaluation_holds_no_layer(name, strict):
    model, x = model_of(LAYERS[name][0]).eval(), some(5, 8)
    program = torch.export.export(model, (x,), strict=strict)
    assert not [node for node in program.graph.nodes if "dropkit" in str(node.target)]
    torch.testing.assert_close(program.module()(x), model(x))


# Dtypes, layouts, devices.


@every
def test_autocast_leaves_masks_alone(name):
    x = some(6, 3, 8, dtype=torch.float32)
    plain = at(name, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = at(name, x)
        narrow = at(name, x.bfloat16())
    if name in ELEMENTWISE:
        assert result.dtype == x.dtype
        assert torch.equal(result, plain)
        assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), plain, rtol=0.05, atol=0.05)
    torch.testing.assert_close(narrow.float(), plain, rtol=0.1, atol=0.1)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_floating_dtype_has_the_same_mask(name, dtype):
    x = some(6, 3, 8)
    wide, narrow = at(name, x.to(dtype).double()), at(name, x.to(dtype))
    assert narrow.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(narrow.double(), wide, rtol=tolerance, atol=tolerance)
    if name in ("dropout", "dropout, shared", "exact"):
        assert torch.equal(narrow == 0, wide == 0)


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if "alpha" not in name])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_multiplied_by_real_noise(name, dtype):
    x = torch.complex(some(6, 3, 8), some(6, 3, 8).flip(0)).to(dtype)
    y = at(name, x)
    torch.testing.assert_close(y, torch.complex(at(name, x.real), at(name, x.imag)), rtol=1e-5, atol=1e-6)


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "every other": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 2)[::2, :, ::2],
    "a window": lambda x: nn.functional.pad(x, (2, 1, 1, 0, 3, 3))[3:-3, 1:, 2:-1],
}


@every
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_does_not_follow_the_layout(name, layout):
    x = some(6, 3, 8)
    turned = LAYOUTS[layout](x)
    assert torch.equal(x, turned)
    assert not turned.is_contiguous()
    result = at(name, turned)
    torch.testing.assert_close(result, at(name, x), rtol=1e-12, atol=1e-12)
    if name in ELEMENTWISE and "alpha" not in name:
        assert result.stride() == torch.empty_like(turned).stride()


@every
def test_an_expanded_input_has_a_mask_for_each_row(name):
    one = some(1, 3, 8)
    result = at(name, one.expand(6, 3, 8))
    torch.testing.assert_close(result, at(name, one.repeat(6, 1, 1)), rtol=1e-12, atol=1e-12)
    assert not torch.equal(result[0], result[1])


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if "alpha" not in name])
@pytest.mark.parametrize(
    ("shape", "memory"), [((4, 3, 5, 6), torch.channels_last), ((2, 3, 4, 2, 3), torch.channels_last_3d)]
)
def test_channels_last_is_kept(name, shape, memory):
    x = some(*shape)
    y = at(name, x.to(memory_format=memory))
    assert y.is_contiguous(memory_format=memory)
    assert torch.equal(y, at(name, x))


@every_elementwise
def test_inplace_writes_and_gives_the_same(name):
    x = some(6, 3, 8)
    expected, given = at(name, x), x.clone()
    with dk.masks(seed=4, step=2):
        result = ELEMENTWISE[name](given, inplace=True)
    assert result is given
    assert torch.equal(given, expected)


@every_elementwise
def test_inplace_inside_a_graph_has_the_gradient(name):
    x = some(6, 3, 8).requires_grad_()
    expected = torch.autograd.grad(at(name, x * 2).square().sum(), x)[0]
    with dk.masks(seed=4, step=2):
        y = ELEMENTWISE[name](x * 2, inplace=True)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)
    with pytest.raises(RuntimeError, match="leaf"), dk.masks(seed=4):
        ELEMENTWISE[name](x, inplace=True)


@every
def test_meta_and_fake_tensors_have_shapes_and_no_values(name):
    real = at(name, some(6, 3, 8))
    result = at(name, torch.empty(6, 3, 8, dtype=torch.float64, device="meta"))
    assert (result.device.type, result.shape, result.dtype) == ("meta", real.shape, real.dtype)
    with FakeTensorMode():
        result = at(name, torch.empty(6, 3, 8, dtype=torch.float64))
    assert (result.device.type, result.shape, result.stride()) == ("cpu", real.shape, real.stride())


@every_elementwise
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3), (3, 0), (2, 0, 4)])
def test_0d_and_empty_tensors_pass(name, shape):
    if name in ("dropout, shared", "feature alpha") and len(shape) < 2:
        return
    x = torch.ones(shape, requires_grad=True)
    y = at(name, x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape


# Copies, states, processes.


@every_layer
def test_a_state_goes_from_torchs_model_to_ours_and_back(name):
    ours, theirs = (model_of(layer) for layer in LAYERS[name])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for source, target in ((ours, theirs), (theirs, ours)):
        target.load_state_dict({k: v + 1 for k, v in source.state_dict().items()}, strict=True)
        assert torch.equal(target[0].weight, source[0].weight + 1)


@every_layer
def test_copies_draw_what_the_original_draws(name):
    model, x = model_of(LAYERS[name][0]), some(5, 8)
    with dk.masks(seed=3):
        expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert twin is not model
        with dk.masks(seed=3):
            assert torch.equal(twin(x), expected)


def _digest() -> str:
    """Of what all functions give; numpy makes the input, and no loop of torch's own threads runs before the fork."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3, 8)))
    bits = [at(name, x).numpy().tobytes() for name in sorted(ELEMENTWISE)]
    return hashlib.sha256(b"".join(bits)).hexdigest()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_process_has_the_same_noise(method):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        assert pool.submit(_digest).result(timeout=240) == _digest()

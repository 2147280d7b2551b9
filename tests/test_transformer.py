"""Attention layers: torch's results without dropout; with it, masks that act wherever they are asked for."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dropkit as dk
from dropkit.errors import OptionError, ProbabilityError, ShapeError
from dropkit.masks.address import signed, site_hash, site_key
from dropkit.masks.philox import bernoulli_keep, survivor_scale

B, L, S, E, H = 3, 4, 6, 8, 2


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def twins(kind: str, *args, seed: int = 1, **options):
    """torch's layer and ours, each made after the same seed."""
    made = []
    for home in (nn, dk.nn):
        torch.manual_seed(seed)
        made.append(getattr(home, kind)(*args, **options))
    return made


def keep_of(shape, p, site, seed, step=0, member=0):
    """(B, H, L, S) bool by the readable definition."""
    key = torch.tensor(signed(site_key(seed, site_hash(site))))
    count = shape[1] * shape[2] * shape[3]
    keep = bernoulli_keep(
        key, torch.tensor(member), torch.arange(shape[0]), step, count, torch.tensor(p).double()
    )
    return keep.view(shape)


# --- what torch gives --------------------------------------------------------------------------------------------

HEADS = [
    {}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 5, "vdim": 7},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": E, "vdim": E},
]  # fmt: skip


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("layout", ["batch first", "batch second", "no batch"])
@pytest.mark.parametrize("masked", ["no mask", "bool of heads", "float"])
def test_multihead_attention_is_torchs_without_dropout(options, layout, masked):
    theirs, ours = twins("MultiheadAttention", E, H, batch_first=layout == "batch first", **options)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in theirs.state_dict().items())
    batched = layout != "no batch"
    lead = {"batch first": lambda n: (B, n), "batch second": lambda n: (n, B), "no batch": lambda n: (n,)}[
        layout
    ]
    q, k, v = (
        drawn(*lead(L), E),
        drawn(*lead(S), options.get("kdim", E)),
        drawn(*lead(S), options.get("vdim", E)),
    )
    source = torch.Generator().manual_seed(3)
    mask = {
        "no mask": None,
        "bool of heads": torch.rand((B if batched else 1) * H, L, S, generator=source) < 0.3,
        "float": torch.randn(L, S, generator=source),
    }[masked]
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = False  # so that every query sees a key
    padding = torch.zeros((B, S) if batched else (S,), dtype=torch.bool)
    padding[..., -2:] = True
    if masked == "float":
        padding = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    for padded, (weights, average) in itertools.product(
        [None, padding], [(True, True), (True, False), (False, True)]
    ):
        wanted = theirs(q, k, v, padded, weights, mask, average)
        found = ours(q, k, v, padded, weights, mask, average)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    upstream = drawn(*wanted[0].shape, seed=9)
    wanted, found = (
        torch.autograd.grad(y, layer.parameters(), upstream)
        for y, layer in ((wanted[0], theirs), (found[0], ours))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_self_attention_and_shared_keys_are_projected_as_torch_does():
    theirs, ours = twins("MultiheadAttention", E, H, batch_first=True)
    x, memory = drawn(B, L, E), drawn(B, S, E, seed=1)
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))
    torch.testing.assert_close(ours(x, memory, memory), theirs(x, memory, memory))


@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options", [{"activation": "gelu"}, {"bias": False}, {"activation": nn.ReLU()}], ids=str
)
def test_layers_are_torchs_in_evaluation_and_state_dicts_load_both_ways(
    kind, norm_first, batch_first, options
):
    theirs, ours = twins(kind, E, H, 12, 0.3, norm_first=norm_first, batch_first=batch_first, **options)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in theirs.state_dict().items())
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.eval(), ours.eval()
    x = drawn(B, L, E) if batch_first else drawn(L, B, E)
    memory = drawn(B, S, E, seed=1) if batch_first else drawn(S, B, E, seed=1)
    more = (memory,) if kind == "TransformerDecoderLayer" else ()
    first = (memory[0],) if more else ()
    square = nn.Transformer.generate_square_subsequent_mask(L)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(x, *more), theirs(x, *more), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours(x[0], *first), theirs(x[0], *first), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours(x, *more, square), theirs(x, *more, square), rtol=1e-4, atol=1e-5)
    plain, dropless = twins(kind, E, H, 12, 0.0, norm_first=norm_first, batch_first=batch_first, **options)
    torch.testing.assert_close(dropless(x, *more), plain(x, *more), rtol=1e-4, atol=1e-5)  # in training


# --- what torch does not give --------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("options", [{}, {"add_zero_attn": True}], ids=str)
def test_weights_are_clean_and_asking_for_them_changes_nothing(p, options):
    layer = dk.nn.MultiheadAttention(E, H, p, batch_first=True, **options)
    dk.nn.name_sites(layer)
    x = drawn(B, L, E)
    with dk.masks(seed=3):
        dropped, weights = layer(x, x, x, average_attn_weights=False)
    with dk.masks(seed=3):
        alone, nothing = layer(x, x, x, need_weights=False)
    layer.eval()
    clean, same = layer(x, x, x, average_attn_weights=False)
    assert nothing is None
    torch.testing.assert_close(alone, dropped)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, L))
    torch.testing.assert_close(weights, same)
    assert (dropped - clean).abs().max() > 1e-3


@pytest.mark.parametrize("member", [None, 2])
def test_the_mask_of_the_weights_is_that_of_its_address(member):
    layer = dk.nn.MultiheadAttention(E, H, 0.4, batch_first=True).double()
    layer.site = "here"
    x = drawn(B, L, E).double()
    with dk.masks(seed=3, step=5, member=member):
        found, weights = layer(x, x, x, average_attn_weights=False)
    shape = (1 if member else B, H, L, L)
    keep = keep_of(shape, 0.4, "here", 3, 5, member or 0)
    values = torch.nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)[2]
    values = values.unflatten(-1, (H, E // H)).transpose(1, 2)
    heads = (weights * keep * survivor_scale(torch.tensor(0.4).double())) @ values
    torch.testing.assert_close(found, layer.out_proj(heads.transpose(1, 2).flatten(-2)))


def stack(layer: nn.Module, **options: bool) -> nn.TransformerEncoder:
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False, **options)
    dk.nn.name_sites(encoder)
    return encoder


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_members_act_in_torchs_encoder_with_and_without_gradients(batch_first, norm_first, padded):
    layer = dk.nn.TransformerEncoderLayer(E, H, 12, 0.5, batch_first=batch_first, norm_first=norm_first)
    encoder = stack(layer).eval()
    x = drawn(B, L, E) if batch_first else drawn(L, B, E)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[0, -1] = padded
    results = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            plain = encoder(x, src_key_padding_mask=padding)
            for member in (0, 1):
                with dk.masks(seed=1, member=member):
                    results.append(encoder(x, src_key_padding_mask=padding))
                assert (results[-1] - plain).abs().max() > 0.1
    torch.testing.assert_close(results[:2], results[2:])
    assert (results[0] - results[1]).abs().max() > 0.1


def test_each_of_four_places_drops_for_a_member():
    layer = dk.nn.TransformerEncoderLayer(E, H, 12, 0.5, batch_first=True).eval()
    x = drawn(B, L, E)
    places = [layer.self_attn, layer.dropout, layer.dropout1, layer.dropout2]
    for place in places:
        for other in places:
            other.p = 0.5 if other is place else 0.0
        with dk.masks(seed=0, member=1):
            assert not torch.allclose(layer(x), layer.norm2(torch.zeros(1, E)))
            acted = layer(x)
        for other in places:
            other.p = 0.0
        with torch.no_grad():
            assert not torch.allclose(acted, layer(x)), place


def test_torchs_own_layer_keeps_off_its_fast_path_with_our_attention_in_it():
    layer = nn.TransformerEncoderLayer(E, H, 12, 0.0, batch_first=True).eval()
    layer.self_attn = dk.nn.MultiheadAttention(E, H, 0.5, batch_first=True).eval()
    x = drawn(B, L, E)
    with torch.inference_mode():
        plain = layer(x)
        with dk.masks(seed=0, member=0):
            assert (layer(x) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_the_rows_are_examples_wherever_the_batch_stands(batch_first, kind):
    layer = getattr(dk.nn, kind)(E, H, 12, 0.5, batch_first=batch_first)
    dk.nn.name_sites(layer)
    x, memory = drawn(6, L, E), drawn(6, S, E, seed=1)

    def run(rows: slice, **address) -> torch.Tensor:
        some = [x[rows], memory[rows]][: 2 if kind == "TransformerDecoderLayer" else 1]
        with dk.masks(seed=2, **address):
            if batch_first:
                return layer(*some)
            return layer(*(t.transpose(0, 1) for t in some)).transpose(0, 1)

    whole = run(slice(6))
    torch.testing.assert_close(torch.cat((run(slice(2)), run(slice(2, 6), row_offset=2))), whole)
    member = run(slice(6), member=3)
    torch.testing.assert_close(torch.cat([run(slice(i, i + 1), member=3) for i in range(6)]), member)
    with dk.masks(seed=2, member=3):
        alone = layer(x[4], *([memory[4]] if kind == "TransformerDecoderLayer" else []))
    torch.testing.assert_close(alone, member[4])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(whole[0], whole[1])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_packed_batch_is_served_in_evaluation_and_refused_where_masks_act():
    theirs, ours = twins("TransformerEncoderLayer", E, H, 12, 0.5, batch_first=True)
    encoder = nn.TransformerEncoder(theirs, 2).eval()
    converted = copy.deepcopy(encoder)
    converted.layers = nn.ModuleList(copy.deepcopy(ours) for _ in range(2)).eval()
    x, padding = drawn(B, L, E), torch.zeros(B, L, dtype=torch.bool)
    padding[:2, -1] = True
    with torch.no_grad():
        wanted = encoder(x, src_key_padding_mask=padding)
        assert (wanted[0, -1] == 0).all()  # the path with nested tensors
        torch.testing.assert_close(converted(x, src_key_padding_mask=padding), wanted, rtol=1e-4, atol=1e-5)
        with dk.masks(seed=0, member=0), pytest.raises(OptionError, match="use_nested_tensor = False"):
            converted(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}], ids=str)
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_is_causal_alone_is_the_causal_mask(options, weights, padded):
    layer = dk.nn.MultiheadAttention(E, H, 0.3, batch_first=True, **options)
    dk.nn.name_sites(layer)
    x = drawn(B, L, E)
    padding = torch.tensor([[False] * 3 + [True]] * B) if padded else None
    future = torch.ones(L, L, dtype=torch.bool).triu(1)
    floating = torch.zeros(L, L).masked_fill(future, -torch.inf)
    results = []
    for causal in ({"is_causal": True}, {"attn_mask": future}, {"attn_mask": floating, "is_causal": True}):
        with dk.masks(seed=1):
            results.append(layer(x, x, x, padding, weights, **causal)[0])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])  # bool padding beside a floating mask


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("floating", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_query_without_keys_gets_zero(weights, floating, training):
    layer = dk.nn.MultiheadAttention(E, H, 0.3, batch_first=True).train(training)
    with torch.no_grad():
        layer.out_proj.bias.fill_(3.0)
    hidden = torch.zeros(L, L, dtype=torch.bool)
    hidden[1] = True
    mask = torch.zeros(L, L).masked_fill(hidden, -torch.inf) if floating else hidden
    x = drawn(B, L, E).requires_grad_()
    out, seen = layer(x, x, x, None, weights, mask)
    torch.testing.assert_close(out[:, 1], torch.full((B, E), 3.0))
    assert out.isfinite().all()
    assert seen is None or (seen[:, 1] == 0).all()
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_autocast_and_16_bits():
    layer = dk.nn.MultiheadAttention(E, H, 0.3, batch_first=True)
    x = drawn(B, L, E)
    layer.site = "here"
    results = []
    for weights in (True, False):
        with torch.autocast("cpu", torch.bfloat16), dk.masks(seed=0):
            results.append(layer(x, x, x, need_weights=weights)[0])
    with dk.masks(seed=0):
        exact = layer(x, x, x)[0]
    assert results[0].dtype == torch.bfloat16
    for result in results:
        torch.testing.assert_close(result.float(), exact, rtol=0.1, atol=0.05)
    half = layer.bfloat16()
    with dk.masks(seed=0):
        torch.testing.assert_close(half(*[x.bfloat16()] * 3)[0].float(), exact.float(), rtol=0.1, atol=0.05)


def test_the_rate_has_torchs_name_and_is_checked():
    layer = dk.nn.MultiheadAttention(E, H, 0.3)
    layer.dropout = 0.5
    assert layer.dropout == layer.p == 0.5
    with pytest.raises(ProbabilityError):
        layer.dropout = 50
    assert "dropout=0.5" in repr(layer)


# --- heads, weights, keys ------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([0.1, 0.5, 1.0]),
)
def test_drop_key_hides_what_the_mask_drops_and_never_all(b, h, n, s, p):
    scores = drawn(b, h, n, s, seed=b + s)
    scores[..., 0].masked_fill_(scores[..., 0] > 0, -torch.inf)  # hidden by a mask already
    with dk.masks(seed=4):
        found = dk.functional.drop_key(scores, p, site="here")
    keep = keep_of((b, h, n, s), p, "here", 4)
    for i in itertools.product(range(b), range(h), range(n)):
        seen = [j for j in range(s) if scores[i][j] > -torch.inf]
        left = [j for j in seen if keep[i][j]] or seen
        assert [j for j in range(s) if found[i][j] > -torch.inf] == left
        assert torch.equal(found[i][left], scores[i][left])
    if s > 1:
        torch.testing.assert_close(found.softmax(-1).sum(-1), torch.ones(b, h, n))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("p", [0.25, 0.8])
def test_a_key_stays_with_the_chance_that_is_promised(n, p):
    torch.manual_seed(n)
    rows = 40_000
    hidden = dk.functional.drop_key(torch.zeros(rows, 1, 1, n), p)[..., 0] == -torch.inf
    chance = 1 - p + p**n
    # Hoeffding: beyond this by chance 1e-9, once for each of the six cases; the seed is fixed.
    assert abs(1 - hidden.double().mean() - chance) < (torch.log(torch.tensor(2e9)) / (2 * rows)).sqrt()


@pytest.mark.parametrize(("shared", "dims"), [((2,), (2,)), ((1, -2), (1, 2))])
def test_keys_and_weights_may_fall_together(shared, dims):
    hidden = dk.functional.drop_key(torch.zeros(B, H, L, 40), 0.5, shared=shared) == -torch.inf
    dropped = dk.nn.AttentionDropout(0.5, shared=shared)(torch.ones(B, H, L, 40)) == 0
    for mask in (hidden, dropped):
        assert torch.equal(mask, mask.narrow(dims[0], 0, 1).narrow(dims[-1], 0, 1).expand_as(mask))
        assert not torch.equal(mask[0], mask[1])


def test_heads_fall_whole():
    dropped = dk.nn.HeadDropout(0.5)(torch.ones(20, H, L, 3))
    assert torch.equal(dropped, dropped[:, :, :1, :1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (dropped[:, 0, 0, 0] != dropped[:, 1, 0, 0]).any()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (OptionError, "multiple of num_heads", lambda: dk.nn.MultiheadAttention(8, 3)),
        (ProbabilityError, "0.1", lambda: dk.nn.MultiheadAttention(8, 2, 10)),
        (ProbabilityError, "True", lambda: dk.nn.TransformerEncoderLayer(8, 2, dropout=True)),
        (OptionError, "'swish'", lambda: dk.nn.TransformerEncoderLayer(8, 2, activation="swish")),
        (ShapeError, r"\(L, B, 8\), \(S, B, 8\)", lambda: attend(drawn(L, B, 7))),
        (ShapeError, "batch_first=True", lambda: attend(drawn(2, 3, E), drawn(2, 4, E))),
        (ShapeError, "same batch and length", lambda: attend(drawn(2, 3, E), drawn(4, 3, E), drawn(5, 3, E))),
        (ShapeError, "without B", lambda: attend(drawn(3, E), drawn(2, 3, E))),
        (ShapeError, r"\(queries, keys\) = \(4, 4\)", lambda: attend(attn_mask=torch.zeros(4, 5))),
        (ShapeError, r"\(batch, keys\) = \(3, 4\)", lambda: attend(key_padding_mask=torch.zeros(4, 3))),
        (OptionError, "int64", lambda: attend(attn_mask=torch.zeros(4, 4, dtype=torch.int64))),
        (ShapeError, r"\(L, B, E\), or \(L, E\)", lambda: dk.nn.TransformerEncoderLayer(E, H)(drawn(1, 2, 3, E))),
        (ShapeError, r"\(B, H, L, S\)", lambda: dk.nn.DropKey()(drawn(3, 4, 5))),
        (ShapeError, r"\(B, H, L, D\)", lambda: dk.nn.HeadDropout()(drawn(3, 4))),
        (ShapeError, r"x\[None\]", lambda: dk.nn.AttentionDropout()(drawn(3, 4, 4))),
        (ShapeError, "4 dims", lambda: dk.nn.DropKey(shared=(4,))),
    ],
)  # fmt: skip
def test_mistakes_are_named(error, says, call):
    with pytest.raises(error, match=says):
        call()


def attend(query=None, key=None, value=None, **options):
    query = drawn(L, B, E) if query is None else query
    key = query if key is None else key
    return dk.nn.MultiheadAttention(E, H)(query, key, key if value is None else value, **options)

"""Dropout on graphs: the masks of the definition, whatever else is in the batch and in whatever order edges come."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor

import dropkit as dk
from dropkit.errors import AddressError, OptionError, ProbabilityError, ShapeError
from dropkit.masks import noise, scattered, scattered_ops, walks
from dropkit.masks.address import signed, site_hash, site_key
from dropkit.masks.philox import bernoulli_keep, survivor_scale

F = dk.functional
SEED, STEP = 7, 3
RATES = [2.0**-20, 0.1, 0.5, 0.97, 1.0]


def key_of(site: str) -> Tensor:
    return torch.tensor(signed(site_key(SEED, site_hash(site))))


def keep_of(ids: list[int], elements: list[int], p: float, site: str = "here", member: int = 0) -> Tensor:
    """(n,) bool: single elements of masks, by the readable definition."""
    places = torch.tensor(ids, dtype=torch.int64), STEP, torch.tensor(elements, dtype=torch.int64)
    return scattered.keep_at(key_of(site), torch.tensor(member), *places, torch.tensor(p).double())


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Several graphs, some without edges or nodes: edge_index (2, E) and batch (N,)."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    edges = []
    for graph, size in enumerate(sizes):
        start = sum(sizes[:graph])
        if size:
            node = st.integers(start, start + size - 1)
            edges += draw(st.lists(st.tuples(node, node), max_size=7))
    return torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).t(), batch


def count_within(graphs: list[int]) -> list[int]:
    return [graphs[:i].count(g) for i, g in enumerate(graphs)]


# --- the definition ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.sampled_from(RATES), st.integers(0, 2**40 - 1), st.integers(0, 2**24 - 1))
def test_single_elements_have_the_lanes_of_whole_masks(count, p, sample, member):
    address = torch.tensor(SEED), torch.tensor(member), torch.tensor([sample]), STEP
    whole = bernoulli_keep(*address, count, torch.tensor(p).double())[0]
    elements = torch.arange(count).flip(0)
    single = scattered.keep_at(
        torch.tensor(SEED), torch.tensor(member), torch.full((count,), sample), STEP, elements,
        torch.tensor(p).double(),
    )  # fmt: skip
    assert torch.equal(single.flip(0), whole)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(RATES), st.sampled_from([None, 5]), st.booleans(), st.booleans())
def test_masks_of_edges_are_those_of_the_definition(graph, p, member, undirected, with_ids):
    edge_index, batch = graph
    u, v = edge_index.tolist()
    graphs, places = batch[edge_index[0]].tolist(), count_within(batch.tolist())
    ids = torch.arange(100, 100 + 5) if with_ids and member is None else None
    sample = (lambda g: 0) if member is not None else (lambda g: g + (100 if with_ids else 9))
    offset = 0 if with_ids else 9
    with dk.masks(seed=SEED, step=STEP, member=member, row_offset=offset, samples=ids):
        keep = F.edge_mask(edge_index, p, undirected=undirected, batch=batch, site="here")
    if undirected:
        low = [min(places[a], places[b]) for a, b in zip(u, v, strict=True)]
        high = [max(places[a], places[b]) for a, b in zip(u, v, strict=True)]
        elements = [b * (b + 1) // 2 + a for a, b in zip(low, high, strict=True)]
    else:
        elements = count_within(graphs)
    assert torch.equal(keep, keep_of([sample(g) for g in graphs], elements, p, member=member or 0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 20), st.sampled_from(RATES))
def test_masks_of_items_are_those_of_the_definition_in_any_order(graphs, width, p):
    batch = torch.tensor(graphs)
    with dk.masks(seed=SEED, step=STEP, row_offset=2**39):
        y = F.drop_message(torch.ones(len(graphs), width), p, batch=batch, site="here")
    places = count_within(graphs)
    elements = [i * width + d for i in places for d in range(width)]
    keep = keep_of([g + 2**39 for g in graphs for _ in range(width)], elements, p).view(-1, width)
    assert torch.equal(y, keep * survivor_scale(torch.tensor(p).double()).float())


def test_long_runs_and_many_edges_are_shared_out_between_threads():
    torch.manual_seed(0)
    batch = torch.arange(3).repeat_interleave(torch.tensor([70_000, 1, 90_000]))
    edge_index = torch.stack((torch.arange(len(batch)), torch.arange(len(batch))))
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with dk.masks(seed=SEED, step=STEP):
            found[threads] = [
                F.edge_mask(edge_index, 0.3, batch=batch, undirected=u, site=f"here{u}")
                for u in (False, True)
            ]
    torch.set_num_threads(1)
    for one, two in zip(*found.values(), strict=True):
        assert torch.equal(one, two)
    some = list(range(0, len(batch), 997))
    places = scattered_ops.places_in_graphs(batch.numpy())[some]
    graphs = batch[some].tolist()
    assert torch.equal(found[1][0][some], keep_of(graphs, places.tolist(), 0.3, "hereFalse"))
    pairs = (places * (places + 1) // 2 + places).tolist()
    assert torch.equal(found[1][1][some], keep_of(graphs, pairs, 0.3, "hereTrue"))


@pytest.mark.parametrize("p", [2.0**-17, 0.5, 1.0])
def test_pairs_of_huge_graphs_have_bits_of_their_own(p):
    nodes = [0, 1, 185_362, 185_363, 200_000, 400_000, 2**20]
    u, v = (torch.tensor(x) for x in zip(*[(a, b) for a in nodes for b in nodes], strict=True))
    with dk.masks(seed=SEED, step=STEP):
        keep = F.edge_mask(torch.stack((u, v)), p, undirected=True, site="here")
    low, high = torch.minimum(u, v), torch.maximum(u, v)
    elements = (high * (high + 1) // 2 + low).tolist()
    assert max(elements) > 30 * scattered.NUMBERS
    assert torch.equal(keep, keep_of([0] * len(u), elements, p))
    assert torch.equal(keep.view(7, 7), keep.view(7, 7).t())
    assert (
        scattered.key_of_part(SEED, 1)
        != scattered.key_of_part(SEED, 2)
        != SEED
        == scattered.key_of_part(SEED, 0)
    )


# --- laws ------------------------------------------------------------------------------------------------------------

LAYERS = {
    "edge": lambda: dk.nn.DropEdge(0.5, remove=False),
    "pair": lambda: dk.nn.DropEdge(0.5, undirected=True, remove=False, rescale=True),
    "path": lambda: dk.nn.DropEdgePath(0.3, remove=False),
    "node": lambda: dk.nn.DropNode(0.5),
    "message": lambda: dk.nn.DropMessage(0.5),
    "feature": lambda: dk.nn.DropFeature(0.5),
    "column": lambda: dk.nn.DropFeature(0.5, columns=True),
}


def graphs_of(count: int) -> list[tuple[Tensor, Tensor]]:
    """Some graphs: features (N, 3) and edge_index (2, E)."""
    source = torch.Generator().manual_seed(0)
    result = []
    for i in range(count):
        nodes = 4 + 3 * i
        edge_index = torch.randint(0, nodes, (2, 5 * nodes), generator=source)
        result.append((torch.randn(nodes, 3, generator=source), edge_index))
    return result


def apply(layer: torch.nn.Module, graphs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The layer on a batch as PyTorch Geometric makes it; its result cut into graphs again."""
    xs, edges = zip(*graphs, strict=True)
    starts = np.cumsum([0, *map(len, xs)])
    batch = torch.repeat_interleave(torch.arange(len(xs)), torch.tensor([len(x) for x in xs]))
    edge_index = torch.cat([e + int(s) for e, s in zip(edges, starts, strict=False)], dim=1)
    if isinstance(layer, (dk.nn.DropEdge, dk.nn.DropEdgePath)):
        return list(layer(edge_index, None, batch)[1].split([e.shape[1] for e in edges]))
    if isinstance(layer, dk.nn.DropMessage):
        messages = torch.cat([x[e[0]] for x, e in graphs])
        return list(layer(messages, batch[edge_index[0]]).split([e.shape[1] for e in edges]))
    return list(layer(torch.cat(xs), batch).split([len(x) for x in xs]))


@pytest.mark.parametrize("name", LAYERS)
def test_batching_changes_nothing(name):
    layer, graphs = LAYERS[name](), graphs_of(5)
    dk.nn.name_sites(layer)
    with dk.masks(seed=SEED):
        together = apply(layer, graphs)
    with dk.masks(seed=SEED, row_offset=2):
        chunk = apply(layer, graphs[2:4])
    with dk.masks(seed=SEED, samples=torch.tensor([4, 1])):
        shuffled = apply(layer, [graphs[4], graphs[1]])
    for found, wanted in zip((*chunk, *shuffled), (*together[2:4], together[4], together[1]), strict=True):
        assert torch.equal(found, wanted)
    with dk.masks(seed=SEED):
        twice = apply(layer, [graphs[3], graphs[3]])
    assert not torch.equal(twice[0], twice[1])  # rows of their own


@pytest.mark.parametrize("name", LAYERS)
def test_a_member_is_one_function_of_a_graph(name):
    layer, graphs = LAYERS[name]().eval(), graphs_of(4)
    dk.nn.name_sites(layer)

    def ask(some: list[tuple[Tensor, Tensor]], member: int) -> list[Tensor]:
        with dk.masks(seed=SEED, member=member):
            return apply(layer, some)

    together = ask(graphs, 1)
    for graph, wanted in zip(graphs, together, strict=True):
        assert torch.equal(ask([graph], 1)[0], wanted)
    assert torch.equal(ask(graphs[::-1], 1)[0], together[-1])
    assert not torch.equal(ask(graphs, 2)[-1], together[-1])
    with dk.masks(seed=SEED, member=1):  # a graph alone needs no batch vector
        x, edge_index = graphs[2]
        if name in ("edge", "pair", "path"):
            alone = layer(edge_index)[1]
        else:
            alone = layer(x[edge_index[0]] if name == "message" else x)
    assert torch.equal(alone, together[2])


@settings(max_examples=40, deadline=None)
@given(batches(), st.data())
def test_an_undirected_edge_is_its_pair_whatever_the_order(graph, data):
    edge_index, batch = graph
    order = torch.tensor(data.draw(st.permutations(range(edge_index.shape[1]))), dtype=torch.int64)
    results = []
    for given_edges in (edge_index, edge_index.flip(0), edge_index[:, order]):
        with dk.masks(seed=SEED):
            results.append(F.edge_mask(given_edges, 0.5, undirected=True, batch=batch))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][order], results[2])


def test_self_loops_fall_as_often_as_other_edges():
    loops = torch.arange(20_000).repeat(2, 1)
    others = torch.stack((torch.arange(20_000), torch.arange(1, 20_001)))
    for edge_index in (loops, others):
        for undirected in (False, True):
            with dk.masks(seed=SEED):
                kept = F.edge_mask(edge_index, 0.3, undirected=undirected).sum()
            # Chance of a false alarm 1e-9 for each of the four; the seed is fixed.
            assert binomtest(int(kept), 20_000, 1 - round(0.3 * 65536) / 65536).pvalue > 1e-9


def test_every_edge_falls_at_its_rate_over_members():
    edge_index, members = torch.tensor([[0, 1, 1, 2, 3, 3], [1, 0, 2, 1, 3, 0]]), 2000
    for undirected in (False, True):
        kept = torch.zeros(6, dtype=torch.int64)
        for member in range(members):
            with dk.masks(seed=SEED, member=member):
                kept += F.edge_mask(edge_index, 0.25, undirected=undirected)
        # 12 positions at 1e-9 each; the seed is fixed.
        assert all(binomtest(k, members, 0.75).pvalue > 1e-9 for k in kept.tolist())
        assert (kept[0] == kept[1]) == undirected


def test_rescaled_sums_over_neighbours_keep_their_mean():
    p = 0.3
    edge_index, weight = torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.tensor([1.0, -2.0, 3.0]).double()
    with dk.masks(seed=SEED):
        _, scaled = F.drop_edge(edge_index, p, edge_attr=weight, rescale=True, remove=False)
    scale = survivor_scale(torch.tensor(p).double())
    kept_share = 1 - round(p * 65536) / 65536
    assert torch.equal(scaled[scaled != 0], (weight * scale)[scaled != 0])
    assert float(scale) * kept_share == pytest.approx(1, abs=1e-15)
    with dk.masks(seed=SEED):
        _, plain = F.drop_edge(edge_index, p, edge_attr=weight, remove=False)
    assert torch.equal(plain, torch.where(scaled != 0, weight, 0))


@settings(max_examples=40, deadline=None)
@given(batches(), st.booleans(), st.booleans(), st.sampled_from([1, 2]))
def test_what_stays_is_what_the_mask_says(graph, undirected, rescale, dims):
    edge_index, batch = graph
    attributes = torch.arange(1.0, 1 + edge_index.shape[1] * dims).view(-1, *[dims] * (dims - 1))
    attributes.requires_grad_()
    options = {"undirected": undirected, "batch": batch}
    with dk.masks(seed=SEED):
        keep = F.edge_mask(edge_index, 0.5, **options)
    with dk.masks(seed=SEED):
        fewer, some = F.drop_edge(edge_index, 0.5, edge_attr=attributes, rescale=rescale, **options)
    scale = 2.0 if rescale else 1.0
    assert torch.equal(fewer, edge_index[:, keep])
    assert torch.equal(some, attributes[keep] * scale)
    (gradient,) = torch.autograd.grad(some.sum(), attributes)
    assert torch.equal(gradient, (scale * keep).view(-1, *[1] * (dims - 1)).expand_as(gradient))
    with dk.masks(seed=SEED):
        bare, nothing = F.drop_edge(edge_index.int(), 0.5, **options)
    assert nothing is None
    assert bare.dtype == torch.int32
    assert torch.equal(bare, fewer.int())


def test_nodes_and_columns_fall_whole_and_dropped_values_are_nothing():
    x = torch.full((300, 4), torch.nan).requires_grad_()
    batch = torch.arange(3).repeat_interleave(100)
    for name, shared, layer in (
        ("node", 1, dk.nn.DropNode(0.5)),
        ("column", 0, dk.nn.DropFeature(0.5, columns=True)),
    ):
        with dk.masks(seed=SEED):
            y = layer(x, batch)
        dropped = (y == 0).view(3, 100, 4)
        assert torch.equal(dropped, dropped.select(1 + shared, 0).unsqueeze(1 + shared).expand_as(dropped)), (
            name
        )
        assert (dropped.any(), dropped.all()) == (True, False)
        (gradient,) = torch.autograd.grad(y.nansum(), x)
        assert torch.equal(gradient == 0, dropped.view(300, 4) | y.isnan())
        (gradient,) = torch.autograd.grad(layer(x, batch).sum(), x)
        assert set(gradient.unique().tolist()) == {0.0, 2.0}


def test_dropping_in_place_and_complex_values():
    x = torch.ones(6, 3)
    layer = dk.nn.DropNode(0.5, inplace=True)
    assert layer(x, torch.zeros(6, dtype=torch.int64)) is x
    assert set(x.unique().tolist()) <= {0.0, 2.0}
    z = F.drop_message(torch.full((50, 2), 1 + 2j), 0.5, batch=torch.zeros(50, dtype=torch.int64))
    assert set(z.flatten().tolist()) == {0, 2 + 4j}


@pytest.mark.parametrize("name", LAYERS)
def test_empty_graphs_and_no_graphs(name):
    layer = LAYERS[name]()
    nothing = torch.empty(0, 3), torch.empty(2, 0, dtype=torch.int64)
    isolated = torch.ones(2, 3), nothing[1]
    for graphs in ([nothing], [isolated], [nothing, isolated, *graphs_of(1), nothing]):
        sizes = [len(part) for part in apply(layer, graphs)]
        by_edge = name in ("edge", "pair", "path", "message")
        assert sizes == [e.shape[1] if by_edge else len(x) for x, e in graphs]


def test_in_evaluation_edges_are_given_back_and_draws_in_training_follow_torchs_generator():
    edge_index = graphs_of(3)[2][1]
    for layer in (dk.nn.DropEdge(0.5, rescale=True), dk.nn.DropEdgePath(0.5)):
        assert layer.eval()(edge_index)[0] is edge_index
        layer.train()
        torch.manual_seed(0)
        first, second = layer(edge_index)[0], layer(edge_index)[0]
        torch.manual_seed(0)
        assert torch.equal(layer(edge_index)[0], first)
        assert first.shape != second.shape or not torch.equal(first, second)


# --- paths -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from([0.2, 1.0]), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_walks_drop_the_edges_that_the_definition_passes(graph, p, count, length, undirected):
    edge_index, batch = graph
    with dk.masks(seed=SEED, step=STEP, row_offset=3):
        fewer, _ = F.drop_edge_path(
            edge_index, p, walks=count, length=length, undirected=undirected, batch=batch, site="here"
        )
    source, target = edge_index.tolist()
    graphs = batch[edge_index[0]].tolist()
    places = count_within(graphs)
    starts = ~keep_of([g + 3 for g in graphs], places, p, "here.starts")
    passed = set()
    for e in range(len(source)):
        words = noise.words(
            key_of("here.steps"),
            torch.tensor(0),
            torch.tensor([graphs[e] + 3]),
            STEP,
            (places[e] + 1) * count * length,
        )[0].tolist()
        for walk in range(count if starts[e] else 0):
            node = source[e]
            for s in range(length):
                leaving = [i for i in range(len(source)) if source[i] == node]
                if not leaving:
                    break
                word = words[(places[e] * count + walk) * length + s]
                edge = leaving[word * len(leaving) >> 32]
                passed.add(edge)
                node = target[edge]
    if undirected:
        pairs = {frozenset((source[e], target[e])) for e in passed}
        passed |= {e for e in range(len(source)) if frozenset((source[e], target[e])) in pairs}
    stays = [e for e in range(len(source)) if e not in passed]
    assert torch.equal(fewer, edge_index[:, stays])


@pytest.mark.parametrize(("p", "count", "length"), [(0.1, 1, 3), (0.05, 2, 4)])
def test_about_the_promised_share_stays_off_the_paths(p, count, length):
    source = torch.Generator().manual_seed(0)
    half = torch.randint(0, 2000, (2, 10_000), generator=source)
    edge_index = torch.cat((half, half.flip(0)), dim=1)
    with dk.masks(seed=SEED):
        fewer, _ = F.drop_edge_path(edge_index, p, walks=count, length=length)
    assert fewer.shape[1] / 20_000 == pytest.approx(math.exp(-p * count * length), abs=0.02)


# --- torch around it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_members_and_rates_under_vmap(name):
    layer, graphs = LAYERS[name]().eval(), graphs_of(3)
    dk.nn.name_sites(layer)

    def ask(member: Tensor | int) -> Tensor:
        with dk.masks(seed=SEED, member=member):
            return torch.cat(apply(layer, graphs))

    together = torch.func.vmap(ask)(torch.arange(3))
    for member in range(3):
        assert torch.equal(together[member], ask(member))
    edge_index = graphs[2][1]
    rates = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    with dk.masks(seed=SEED):
        kept = torch.func.vmap(lambda p: F.edge_mask(edge_index, p, site="here"))(rates).sum(dim=1)
    assert kept[0] == edge_index.shape[1] > kept[1] > kept[2] == 0


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_without_a_break(name):
    layer, graphs = LAYERS[name](), graphs_of(2)
    layer.site = "here"
    batch = torch.repeat_interleave(torch.arange(2), torch.tensor([len(x) for x, _ in graphs]))
    x = torch.cat([x for x, _ in graphs])
    edge_index = torch.cat((graphs[0][1], graphs[1][1] + len(graphs[0][0])), dim=1)
    inputs = {
        "edge": (edge_index, None, batch), "pair": (edge_index, None, batch), "path": (edge_index, None, batch),
        "message": (x[edge_index[0]], batch[edge_index[0]]),
    }.get(name, (x, batch))  # fmt: skip
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for step in (1, 2):
        with dk.masks(seed=SEED, step=step):
            wanted = layer(*inputs)
        with dk.masks(seed=SEED, step=step):
            found = compiled(*inputs)
        torch.testing.assert_close(found, wanted)


def test_the_operators_are_well_formed():
    address = torch.tensor([SEED, 0, STEP, 0, 0])
    edge_index, batch = torch.tensor([[0, 1, 2], [1, 0, 2]]), torch.tensor([0, 0, 1])
    p = torch.tensor(0.5, dtype=torch.float64)
    torch.library.opcheck(scattered_ops.keep_rows, (address, batch, p, 3, 4, True))
    torch.library.opcheck(scattered_ops.keep_rows, (address, None, p, 3, 4, False))
    torch.library.opcheck(scattered_ops.keep_pairs, (address, edge_index, batch, batch, p))
    torch.library.opcheck(walks.keep_off_walks, (address, address, edge_index, batch, p, 3, 1, 2, False))


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = torch.tensor([[0, 1], [1, 2]])


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ProbabilityError, "0.3", lambda: F.drop_edge(GOOD, 30)),
        (ProbabilityError, "True", lambda: dk.nn.DropNode(True)),
        (ProbabilityError, "one rate", lambda: F.drop_edge(GOOD, torch.tensor([0.1, 0.2]))),
        (OptionError, "float32", lambda: F.drop_edge(GOOD.float())),
        (OptionError, "dense tensor", lambda: F.drop_edge([[0, 1], [1, 0]])),
        (ShapeError, r"edge_index.t\(\)", lambda: F.drop_edge(torch.zeros(5, 2, dtype=torch.int64))),
        (ShapeError, r"\(2, E\)", lambda: F.drop_edge(torch.zeros(4, dtype=torch.int64))),
        (OptionError, "nodes -1 to 0", lambda: F.drop_edge(torch.tensor([[0], [-1]]))),
        (OptionError, r"0 to 2\*\*31 - 1", lambda: F.drop_edge(GOOD << 30)),
        (OptionError, "0 to 1, of 2 nodes", lambda: F.drop_edge(GOOD, num_nodes=2)),
        (OptionError, "0 to 1, of 2 nodes", lambda: F.drop_edge(GOOD, training=False, num_nodes=2)),
        (OptionError, "0 to 0, of 1", lambda: F.drop_edge(GOOD, batch=torch.tensor([0]))),
        (OptionError, "edge 1, from node 1 to node 2", lambda: F.drop_edge(GOOD, batch=torch.tensor([0, 0, 1]))),
        (OptionError, "must agree", lambda: F.drop_edge(GOOD, batch=torch.tensor([0, 0, 0]), num_nodes=4)),
        (OptionError, "int64 tensor", lambda: F.drop_edge(GOOD, batch=torch.zeros(3))),
        (OptionError, "numbered from 0", lambda: F.drop_edge(GOOD, batch=torch.tensor([-1, 0, 0]))),
        (ShapeError, "for 2 edges", lambda: F.drop_edge(GOOD, edge_attr=torch.ones(3))),
        (OptionError, "rescale", lambda: F.drop_edge(GOOD, edge_attr=torch.tensor([1, 2]), rescale=True)),
        (OptionError, "walks=0", lambda: F.drop_edge_path(GOOD, walks=0)),
        (OptionError, "length=1.5", lambda: F.drop_edge_path(GOOD, length=1.5)),
        (ShapeError, "for 4 nodes", lambda: F.drop_node(torch.ones(4, 2), batch=torch.tensor([0]))),
        (OptionError, "int64", lambda: F.drop_message(torch.ones(4, 2, dtype=torch.int64))),
        (ShapeError, "without dims", lambda: F.drop_feature(torch.tensor(1.0))),
    ],
)  # fmt: skip
def test_mistakes_are_named(error, says, call):
    with pytest.raises(error, match=says):
        call()


def test_ids_must_be_those_of_the_graphs():
    batch = torch.tensor([0, 1, 1])
    with dk.masks(seed=0, samples=torch.tensor([4])), pytest.raises(ShapeError, match="2 graphs"):
        F.drop_node(torch.ones(3, 2), batch=batch)
    with (
        dk.masks(seed=0, samples=torch.tensor([4, 5, 6])),
        pytest.raises(ShapeError, match=r"for 1 graph; .* batch="),
    ):
        F.drop_edge(GOOD)
    with dk.masks(seed=0, row_offset=2**40 - 1), pytest.raises(AddressError, match="2 graphs"):
        F.drop_node(torch.ones(3, 2), batch=batch)

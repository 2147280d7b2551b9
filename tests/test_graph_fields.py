"""Dropout around and inside PyTorch Geometric's models: one thinned graph, messages, members, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch_geometric.nn import GATConv, GCNConv, SAGEConv, models

import dropkit as dk
from dropkit.claims import Setting, judge
from dropkit.claims.experiments import graphs
from dropkit.errors import OptionError, ProbabilityError
from dropkit.fields.graphs import GraphDropout, drop_messages, false_edges

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
PAIRS = torch.tensor([list(range(11)), [i + 1 for i in range(11)]])
EDGES = torch.cat((PAIRS, PAIRS.flip(0)), dim=1)


class Seen(nn.Module):
    """Keeps what it was given."""

    def forward(self, x, edge_index, scale=1.0):
        self.x, self.edges = x, edge_index
        return scale * x


def test_the_model_sees_the_graph_that_the_layers_make():
    seen = Seen()
    model = GraphDropout(seen, edges=0.5, nodes=0.3, features=0.2).train()
    with dk.masks(seed=4, step=2):
        out = model(X, EDGES, scale=2.0)
    with dk.masks(seed=4, step=2):
        edges, _ = dk.functional.drop_edge(EDGES, 0.5, undirected=True, site="drop_edge")
        x = dk.functional.drop_node(X, 0.3, site="drop_node")
        x = dk.functional.drop_feature(x, 0.2, site="drop_feature")
    assert torch.equal(seen.edges, edges)
    assert torch.equal(seen.x, x)
    assert torch.equal(out, 2 * x)
    pairs = {tuple(pair) for pair in seen.edges.T.tolist()}
    assert pairs == {(b, a) for a, b in pairs}
    assert 0 < len(pairs) < EDGES.shape[1]
    model.eval()(X, EDGES)
    assert torch.equal(seen.edges, EDGES)
    assert torch.equal(seen.x, X)


@pytest.mark.parametrize("name", ["GCN", "GraphSAGE", "GAT", "GIN"])
def test_shipped_models_run_and_members_are_functions(name):
    torch.manual_seed(0)
    model = GraphDropout(getattr(models, name)(5, 8, num_layers=3, out_channels=2), edges=0.4).eval()
    with dk.masks(seed=0, member=1):
        first = model(X, EDGES)
    with dk.masks(seed=0, member=1):
        assert torch.equal(model(X, EDGES), first)
    with dk.masks(seed=0, member=2):
        assert not torch.equal(model(X, EDGES), first)


@pytest.mark.parametrize("layer", [GCNConv(5, 3), SAGEConv(5, 3), GATConv(5, 3)])
def test_messages_are_dropped_inside(layer):
    plain = layer.eval()(X, EDGES)
    (drop,) = drop_messages(layer, 0.5)
    assert layer.drop_message is drop
    torch.testing.assert_close(layer.eval()(X, EDGES), plain)
    layer.train()
    total = torch.zeros_like(plain)
    with torch.no_grad():
        for step in range(400):
            with dk.masks(seed=0, step=step):
                out = layer(X, EDGES)
            total += out
    assert not torch.allclose(out, plain)
    if not isinstance(layer, GATConv):  # linear in its messages, so the mean over masks is the plain layer
        spread = (plain.square().mean() * 12 / 400).sqrt()
        assert ((total / 400 - plain).abs() < 6 * spread).all()
    with pytest.raises(OptionError, match="already"):
        drop_messages(layer, 0.5)


def test_every_convolution_of_a_model_has_masks_of_its_own():
    model = models.GCN(5, 8, num_layers=3, out_channels=2)
    drops = drop_messages(model, 0.5)
    assert len(drops) == 3
    assert len({drop.site for drop in drops}) == 3


def test_false_edges_are_pairs_in_both_directions():
    more = false_edges(EDGES, 12, 30, seed=1)
    assert torch.equal(more[:, : EDGES.shape[1]], EDGES)
    added = more[:, EDGES.shape[1] :]
    assert added.shape == (2, 60)
    assert torch.equal(added[:, :30].flip(0), added[:, 30:])
    assert (added[0] != added[1]).all()
    assert added.max() < 12


def test_bad_input_is_said():
    with pytest.raises(ProbabilityError):
        GraphDropout(Seen(), edges=1.5)
    with pytest.raises(OptionError, match="cached=False"):
        GraphDropout(GCNConv(5, 3, cached=True))
    with pytest.raises(OptionError, match="no convolution"):
        drop_messages(nn.Linear(2, 2), 0.5)


def test_the_claim_runs_small(monkeypatch):
    monkeypatch.setenv("DROPKIT_DATA", "/nowhere")  # the karate club
    found = graphs.experiment(Setting(), epochs=2, depths=(2, 3))
    judge(graphs.CLAIM, found)
    assert "karate" in found.data

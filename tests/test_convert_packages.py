"""Models of timm, transformers and PyTorch Geometric, small and with random weights: a committee of each has spread."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropkit as dk

MISSING = [
    name for name in ("torchvision", "timm", "transformers", "torch_geometric") if find_spec(name) is None
]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} of the test extra are not installed", allow_module_level=True)

import timm  # noqa: E402
import transformers  # noqa: E402
from torch_geometric import nn as graphs  # noqa: E402

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
WORDS = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(2))
NODES = torch.randn(10, 6, generator=torch.Generator().manual_seed(3))
EDGES = torch.randint(0, 10, (2, 40), generator=torch.Generator().manual_seed(4))


class Logits(nn.Module):
    """The logits of a model of transformers; of a language model, those of the last word."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, words: Tensor) -> Tensor:
        logits = self.net(words).logits
        return logits if logits.ndim == 2 else logits[:, -1]


class OnGraph(nn.Module):
    """A graph network on one graph: rows are its nodes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("edges", EDGES)

    def forward(self, nodes: Tensor) -> Tensor:
        return self.net(nodes, self.edges)


class Propagation(nn.Module):
    """A linear layer before a propagation without weights."""

    def __init__(self, propagation: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.propagation = propagation

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        return self.propagation(self.linear(nodes), edges)


def vit(**rates: float) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=5,
        **rates,
    )


def convnext() -> nn.Module:
    return timm.create_model(
        "convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 16, 16), drop_path_rate=0.5, num_classes=5,
        ls_init_value=None,
    )  # fmt: skip


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(2, 1), num_heads=(2, 2),
        attn_drop_rate=0.3, drop_path_rate=0.0, num_classes=5,
    )  # fmt: skip


def bert(**options: Any) -> nn.Module:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = transformers.BertConfig(**sizes, initializer_range=0.5, max_position_embeddings=16, **options)
    return Logits(transformers.BertForSequenceClassification(config))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, attention_dropout=0.3, use_cache=False, initializer_range=0.5,
    )  # fmt: skip
    return Logits(transformers.LlamaForCausalLM(config))


# Model, input, the call that nobody's list of dropout layers has (None: there is no such call), and how many sites act.
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, str | None, int]] = {
    "timm ViT": (
        lambda: vit(attn_drop_rate=0.2, proj_drop_rate=0.1, drop_path_rate=0.2),
        IMAGES, "scaled_dot_product_attention", 10,
    ),
    "timm ViT, attention alone": (lambda: vit(attn_drop_rate=0.2), IMAGES, "scaled_dot_product_attention", 2),
    "timm ViT, patches": (lambda: vit(patch_drop_rate=0.5), IMAGES, None, 1),
    "timm ConvNeXt": (convnext, IMAGES, None, 4),
    "timm Swin, attention alone": (swin, IMAGES, None, 3),
    "timm ResNet": (
        lambda: timm.create_model("resnet10t", drop_rate=0.2, drop_path_rate=0.2, drop_block_rate=0.2, num_classes=5),
        IMAGES, "dropout", 6,
    ),
    "BERT": (bert, WORDS, "scaled_dot_product_attention", 8),
    "BERT, attention alone": (lambda: bert(hidden_dropout_prob=0.0), WORDS, "scaled_dot_product_attention", 2),
    "BERT, eager attention alone": (
        lambda: bert(hidden_dropout_prob=0.0, attn_implementation="eager"), WORDS, "dropout", 2,
    ),
    "Llama": (llama, WORDS, "scaled_dot_product_attention", 2),
    "GAT": (lambda: OnGraph(graphs.GAT(6, 8, 2, 3, heads=2, dropout=0.5)), NODES, "dropout", 3),
    "GCN": (lambda: OnGraph(graphs.GCN(6, 8, 2, 3, dropout=0.5)), NODES, None, 1),
    "APPNP": (lambda: OnGraph(Propagation(graphs.APPNP(3, 0.1, dropout=0.5))), NODES, "dropout", 1),
    "TransformerConv": (lambda: OnGraph(graphs.TransformerConv(6, 3, heads=2, dropout=0.5)), NODES, "dropout", 1),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Tensor]:
    torch.manual_seed(1)
    build, example, _, _ = MODELS[request.param]
    model = build()
    for module in model.modules():
        if type(module).__name__ == "LayerScale2d" or hasattr(module, "zero_init_last"):
            nn.init.ones_(next(module.parameters()))
    return request.param, model.eval(), example


def as_member(network: nn.Module, x: Tensor, member: int = 1) -> Tensor:
    with torch.no_grad(), dk.masks(seed=3, member=member):
        return network(x)


def test_scan_finds_what_lists_of_dropout_layers_miss(case: tuple[str, nn.Module, Tensor]) -> None:
    name, model, example = case
    found = dk.scan(model, example)
    _, _, hidden, acting = MODELS[name]
    assert sum(site.acts_in_train is True for site in found.sites) == acting
    assert not any(site.acts_in_eval for site in found.sites)
    calls = {site.what.rpartition(".")[2] for site in found.sites if site.kind == "call"}
    assert calls == ({hidden} if hidden else set())
    assert ("hidden rate" in {finding.trap for finding in found.warnings}) == (hidden is not None)


def test_the_copy_is_the_model_and_can_be_restored(case: tuple[str, nn.Module, Tensor]) -> None:
    _, model, example = case
    conversion = dk.convert(model)
    assert not conversion.left
    with torch.no_grad():
        torch.testing.assert_close(conversion.model(example), model(example), rtol=1e-4, atol=1e-5)
    assert list(conversion.model.state_dict()) == list(model.state_dict())
    restored = dk.restore(conversion)
    assert str(restored) == str(model)
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        assert torch.equal(restored(example), model(example))
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = model.train()(example)
        model.eval()
        torch.manual_seed(0)
        restored.load_state_dict(model.state_dict())  # BatchNorm has moved; it is not what is compared
        assert torch.equal(restored.train()(example), theirs)


def test_every_site_acts_in_the_committee_of_the_copy(case: tuple[str, nn.Module, Tensor]) -> None:
    name, model, example = case
    network = dk.convert(model).model
    before = {key: value.clone() for key, value in network.state_dict().items()}
    committee = dk.Committee(network, members=6, seed=3, tile=len(example))
    samples = committee.samples(example)
    assert (samples.var(0).amax(dim=-1) > 0).all()
    layers = {site.name for site in dk.scan(network).sites if site.rate == 0}
    assert len(set(committee.plan(example).sites) - layers) == MODELS[name][3]
    torch.testing.assert_close(samples[1], as_member(network, example), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_member_answers_alike_in_any_batch(case: tuple[str, nn.Module, Tensor]) -> None:
    _, model, example = case
    network = dk.convert(model).model
    whole = as_member(network, example)
    assert torch.equal(as_member(network, example), whole)
    if isinstance(model, OnGraph):
        return  # the nodes of a graph come together
    for rows in ([0], [3, 1], [2, 0, 1]):
        torch.testing.assert_close(as_member(network, example[rows]), whole[rows], rtol=1e-3, atol=1e-4)


def test_the_copy_can_be_trained(case: tuple[str, nn.Module, Tensor]) -> None:
    _, model, example = case
    network = dk.convert(model).model.train()
    with dk.masks(seed=3, step=1):
        network(example).square().sum().backward()
    assert all(weight.grad is not None for weight in network.parameters() if weight.requires_grad)


def test_a_member_knows_edges_by_their_place() -> None:
    """With one value for all edges a member of APPNP would drop the whole graph, or nothing of it."""
    torch.manual_seed(0)
    network = dk.convert(OnGraph(Propagation(graphs.APPNP(1, 0.1, dropout=0.5))).eval()).model
    with torch.no_grad():
        network.net.linear.weight.zero_()
        network.net.linear.bias.fill_(1.0)
    with torch.no_grad():
        whole = network(NODES)[:, 0] - 0.1  # what comes over edges
    share = (as_member(network, NODES)[:, 0] - 0.1) / whole
    assert share.min() < 0.9 < 1.1 < share.max()

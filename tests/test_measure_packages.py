"""Instruments on models as they are met: timm and transformers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import dropkit as dk
from dropkit.measure import Measurement
from test_convert_packages import Logits, timm, transformers
from test_measure_penalty import ERRORS, one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def others() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16,
    )  # fmt: skip
    bert = Logits(transformers.BertForSequenceClassification(config))
    resnet = timm.create_model("resnet10t", drop_rate=0.2, num_classes=3, stem_width=8, channels=(8, 8, 8, 8))
    return {
        "BERT": (bert, torch.randint(0, 50, (6, 5)), torch.randint(0, 2, (6,))),
        "ResNet": (resnet, torch.randn(6, 3, 32, 32), torch.randint(0, 3, (6,))),
    }


@pytest.mark.parametrize("name", ["BERT", "ResNet"])
@pytest.mark.parametrize("instrument", ["penalty", "gradient_noise", "gradient_bias"])
def test_models_of_other_packages_are_measured(
    others: dict[str, tuple[nn.Module, Tensor, Tensor]], name: str, instrument: str
) -> None:
    model, x, y = others[name]
    found = getattr(dk.measure, instrument)(model, x, y, members=4)
    assert found.predicted is not None, found.formula
    assert bool(torch.isfinite(found.predicted).all())
    assert bool(torch.isfinite(found.measured).all())
    assert found.loss == "cross-entropy"
    assert isinstance(found, Measurement)
    assert found.to_text()
    json.loads(found.to_json())


def test_dropout_before_a_softmax_layer_of_a_timm_model_is_predicted(
    others: dict[str, tuple[nn.Module, Tensor, Tensor]],
) -> None:
    model, x, y = others["ResNet"]
    found = dk.measure.penalty(model, x, y, members=200)
    assert found.predicted is not None
    assert found.output_part is not None
    # Nothing bends behind the mask.
    torch.testing.assert_close(found.output_part, found.predicted, rtol=1e-3, atol=1e-7)
    room = ERRORS * float(found.standard_error) + 0.1 * float(found.predicted)
    assert abs(float(found.measured - found.predicted)) < room

"""Norms of the experts' weights: fused, transposed, flat and in lists; by hand and against a copy of each expert."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from compressor import MoEModel
from compressor.model import weight_norms
from compressor.model.structure import ExpertAxis
from compressor.model.weight_norms import expert_weight_norms
from compressor.testing.tiny import tiny_model as other_tiny_model


def test_by_hand(make_layer):
    """Two experts of four weights: (1, −2, 2, 0) and (3, 0, 0, −4); then a row that is no expert's."""
    experts = nn.Module()
    experts.w = nn.Parameter(torch.tensor([[1.0, -2.0], [2.0, 0.0], [3.0, 0.0], [0.0, -4.0], [9.0, 9.0]]))
    gate = nn.Linear(2, 3)
    block = nn.ModuleDict({"experts": experts, "gate": gate})
    layer = dataclasses.replace(
        make_layer(2, 1),
        experts="experts",
        tensors={"experts.w": ExpertAxis(0, 2, 1), "gate.weight": ExpertAxis(0, 1, 1)},
    )
    found = expert_weight_norms(block, layer)
    assert found["weights.l1"].tolist() == [5.0, 7.0]
    assert found["weights.squared"].tolist() == pytest.approx([9.0, 25.0])
    assert found["weights.count"].tolist() == [4.0, 4.0]


def weights_of(model, layer, expert):
    """All numbers that belong to one expert, by what the classes are known to hold."""
    experts = model.get_submodule(layer.experts)
    if isinstance(experts, nn.ModuleList):
        return torch.cat([parameter.flatten() for parameter in experts[expert].parameters()]).detach()
    if hasattr(experts, "mlp"):  # dbrx: all experts flat in one dimension
        width = experts.mlp.w1.shape[0] // layer.num_experts
        rows = slice(expert * width, (expert + 1) * width)
        return torch.cat([parameter[rows].flatten() for parameter in experts.mlp.parameters()]).detach()
    return torch.cat([parameter[expert].flatten() for parameter in experts.parameters()]).detach()


MODELS = ["mixtral", "olmoe", "gpt_oss", "mixtral4", "deepseek4"]


@pytest.mark.parametrize("name", [*MODELS, "dbrx"])
def test_real_models(name):
    model = tiny_model(name) if name in MODELS else other_tiny_model(name)
    moe = MoEModel(model)
    for layer in moe.layers:
        found = expert_weight_norms(model, layer)
        for expert in range(layer.num_experts):
            weights = weights_of(model, layer, expert).double()
            assert len(weights) > 100
            assert float(found["weights.l1"][expert]) == pytest.approx(float(weights.abs().sum()), rel=1e-5)
            assert float(found["weights.squared"][expert]) == pytest.approx(float(weights.square().sum()), rel=1e-5)
            assert float(found["weights.count"][expert]) == len(weights)


def test_half_precision_is_added_up_in_float32():
    model = tiny_model("mixtral", "bfloat16")
    layer = MoEModel(model).layers[0]
    found = expert_weight_norms(model, layer)
    assert found["weights.l1"].dtype == torch.float64
    weights = weights_of(model, layer, 3).double()
    assert float(found["weights.l1"][3]) == pytest.approx(float(weights.abs().sum()), rel=1e-5)


def test_parts_of_large_experts_add_up(monkeypatch):
    model = tiny_model("mixtral")
    layer = MoEModel(model).layers[0]
    whole = expert_weight_norms(model, layer)
    monkeypatch.setattr(weight_norms, "_AT_ONCE", 7)
    for name, tensor in expert_weight_norms(model, layer).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=0)


def test_many_weights_lose_none(make_layer):
    """Four million alike: of one float32 sum the last would lose digits; what is left is the rounding of 1024."""
    experts = nn.Module()
    experts.w = nn.Parameter(torch.full((1, 2**22), 1 / 3))
    layer = dataclasses.replace(make_layer(1, 1), experts="experts", tensors={"experts.w": ExpertAxis(0, 1, 0)})
    found = expert_weight_norms(nn.ModuleDict({"experts": experts}), layer)
    value = float(torch.tensor(1 / 3))
    assert float(found["weights.l1"][0]) == pytest.approx(2**22 * value, rel=1024 * 2**-24)
    assert float(found["weights.squared"][0]) == pytest.approx(2**22 * value**2, rel=1024 * 2**-24)

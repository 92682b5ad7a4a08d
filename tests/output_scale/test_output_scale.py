"""Scales of experts: by hand, against least squares on whole outputs, and what they gain after pruning."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_folder, token_ids, write_token_file
from torch import Tensor

import compressor
from compressor import MoEModel
from compressor.model.expert_products import expert_matrices
from compressor.model.layer_weights import LayerWeights, live_tensors
from compressor.plugin import RankedChunk
from compressor.testing.tiny import tiny_model
from compressor_output_scale.least_squares import Terms, relative_loss, scales


def figures_of(*texts: tuple[list[list[int]], Any, Any, Any], num_experts: int) -> dict[str, Tensor]:
    """Of (ids [T, K], weights [T, K], outputs [T, K, H], targets [T, H]), the first calibration text, then held-out."""
    terms = Terms(SimpleNamespace(num_experts=num_experts))  # type: ignore[arg-type]
    for number, (ids, weights, outputs, targets) in enumerate(texts):
        tokens: Any = SimpleNamespace(
            weights_TK=torch.tensor(weights), target_TH=torch.tensor(targets), held_out=number > 0
        )
        terms.add(tokens, RankedChunk(0, len(ids), torch.tensor(ids), torch.tensor(outputs)))
    return terms.tensors()


def test_by_hand() -> None:
    """Two tokens of one expert each. The first: s · ½ · (2, 0) against (3, 1), so s = 3; the second: 4 s = 2."""
    one = ([[0], [1]], [[0.5], [1.0]], [[[2.0, 0.0]], [[0.0, 2.0]]], [[3.0, 1.0], [1.0, 1.0]])
    figures = figures_of(one, one, num_experts=3)
    assert figures["fit.A"].tolist() == [[1, 0, 0], [0, 4, 0], [0, 0, 0]]
    assert figures["fit.b"].tolist() == [3, 2, 0]
    assert figures["held_out.y"].tolist() == [12]
    assert scales(figures, 0.0).tolist() == pytest.approx([3, 0.5, 1])
    assert scales(figures, 1.0).tolist() == pytest.approx([2, 0.75, 1])  # half of the way
    # one for all: (1 + 4) s = 3 + 2
    assert scales(figures, 0.0, per_layer=True).tolist() == pytest.approx([1, 1, 1])
    # ‖(1, 0) − (3, 1)‖² + ‖(0, 2) − (1, 1)‖² = 5 + 2; with the scales 1 + 1
    assert relative_loss(figures, torch.ones(3).double()) == pytest.approx(7 / 12)
    assert relative_loss(figures, scales(figures, 0.0)) == pytest.approx(2 / 12)


def test_a_layer_that_puts_out_nothing_keeps_its_scales() -> None:
    """As layers do that were added to a model to be trained later."""
    one = ([[0], [1]], [[0.5], [1.0]], [[[0.0, 0.0]], [[0.0, 0.0]]], [[0.0, 0.0], [0.0, 0.0]])
    figures = figures_of(one, one, num_experts=3)
    assert scales(figures, 0.01).tolist() == [1, 1, 1]
    assert relative_loss(figures, torch.ones(3).double()) == 0


def test_against_least_squares_on_whole_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    num_experts, num_tokens, hidden = 5, 40, 8
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:2] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, 2, generator=generator)
    outputs = torch.randn(num_tokens, 2, hidden, generator=generator)
    targets = torch.randn(num_tokens, hidden, generator=generator)
    one = (ids.tolist(), weights.tolist(), outputs.tolist(), targets.tolist())
    figures = figures_of(one, one, num_experts=num_experts)
    design = torch.zeros(num_tokens, hidden, num_experts, dtype=torch.float64)
    for token in range(num_tokens):
        for rank in range(2):
            design[token, :, ids[token, rank]] += (weights[token, rank] * outputs[token, rank]).double()
    design, wanted = design.flatten(0, 1), targets.flatten().double()
    expected = torch.linalg.lstsq(design, wanted[:, None]).solution[:, 0]
    torch.testing.assert_close(scales(figures, 0.0), expected, rtol=1e-5, atol=1e-6)
    held = 0.3 * design.square().sum(0)
    stacked = torch.cat([design, held.sqrt().diag()])
    ridge = torch.linalg.lstsq(stacked, torch.cat([wanted, held.sqrt()])[:, None]).solution[:, 0]
    torch.testing.assert_close(scales(figures, 0.3), ridge, rtol=1e-5, atol=1e-6)
    share = float((design @ ridge - wanted).square().sum() / wanted.square().sum())
    assert relative_loss(figures, ridge) == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize(
    "model_type",
    ["gpt_oss", "switch_transformers", *(pytest.param(one, marks=pytest.mark.nightly) for one in ("mixtral", "dbrx"))],
)
def test_a_scale_multiplies_what_the_expert_answers(model_type: str) -> None:
    """Its biases too, and no other expert's."""
    model = tiny_model(model_type).eval()
    layer = MoEModel(model).layers[0]
    before = answers(model, layer)
    edited = LayerWeights(
        layer, range(layer.num_experts), lambda: live_tensors(model, layer), lambda: expert_matrices(model, layer)
    )
    edited.experts[1].scale(2.5)
    after = answers(model, layer)
    torch.testing.assert_close(after[1], 2.5 * before[1], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(after[other], before[other]) for other in range(layer.num_experts) if other != 1)


def test_a_norm_behind_the_experts_is_refused() -> None:
    model = tiny_model("muse_spark_text").eval()
    layer = MoEModel(model).layers[0]
    edited = LayerWeights(
        layer, range(layer.num_experts), lambda: live_tensors(model, layer), lambda: expert_matrices(model, layer)
    )
    with pytest.raises(ValueError, match="expert 0: what it answers is not linear in its last matrix"):
        edited.experts[0].scale(2.0)


@torch.no_grad()
def answers(model: Any, layer: Any) -> list[Tensor]:
    hidden = torch.randn(3, layer.router_probe.experts_width, generator=torch.Generator().manual_seed(1))
    experts = model.get_submodule(layer.experts)
    if layer.containers:
        ((path, children),) = layer.containers.items()
        return [model.get_submodule(f"{path}.{child}")(hidden) for child in children]
    return [
        experts(hidden, torch.full((3, 1), expert), torch.ones(3, 1)).view(3, -1) for expert in range(layer.num_experts)
    ]


@pytest.mark.slow
def test_what_is_lost_without_renormalising_comes_back(tmp_path: Path) -> None:
    """OLMoE's router does not renormalise: fewer experts raise every gate that is left."""
    tokens = write_token_file(tmp_path / "tokens.jsonl", token_ids(60, 24).tolist())
    recipe = {
        "model": str(tiny_folder("olmoe")),
        "calibration": {"batch_size": 8, "data": [{"tokens": str(tokens), "samples": 40}]},
        "passes": [{"expert_pruning": {"keep": 3}}, {"output_scale": {}}],
    }
    for per in ("expert", "layer"):
        recipe["passes"][1] = {"output_scale": {"per": per}}
        record = compressor.compress(recipe).record
        layers = record["passes"][1]["decision"]["layers"]
        assert all(layer["scales"] and max(layer["scales"]) < 1 for layer in layers.values())
        assert all(layer["scaled"] < 0.9 * layer["loss"] for layer in layers.values()), layers
        assert all(len(set(layer["scales"])) == (1 if per == "layer" else 3) for layer in layers.values())

"""Fewer experts per token on real routers: every set's loss against the block itself, masked and with the lower k."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from tiny_models import random_model, token_ids

from compressor import MoEModel
from compressor.data.sequences import make_batches
from compressor.model.routed_tokens import RealTokens
from compressor.plugin import Gathered
from compressor.testing import tiny
from compressor_expert_pruning import ExpertPruning, ExpertPruningOptions

(BATCH,) = make_batches([token_ids(17, seed=seed) for seed in range(3)], batch_size=3)


def figures(moe, options, inputs):
    method = ExpertPruning(options)
    method.check(moe.layers)
    statistics = {layer.path: method.statistic(layer) for layer in moe.layers}
    real = RealTokens(torch.ones(inputs["input_ids"].numel(), dtype=torch.bool))
    with torch.no_grad(), moe.watched({path: one.update for path, one in statistics.items()}, real):
        moe.model(**inputs)
    return method, Gathered({path: one.tensors() for path, one in statistics.items()})


@torch.no_grad()
def block_inputs(moe, layer, inputs):
    found = []
    hook = moe.model.get_submodule(layer.path).register_forward_pre_hook(
        lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True
    )
    moe.model(**inputs)
    hook.remove()
    return found[0]


@torch.no_grad()
def run(moe, layer, call):
    output = moe.model.get_submodule(layer.path)(*call[0], **call[1])
    return (output[0] if isinstance(output, tuple) else output).double()


def assert_exact(moe, inputs, keep, top_k):
    method, found = figures(moe, ExpertPruningOptions(keep=keep, top_k=top_k), inputs)
    decision = method.decide(moe.layers, found)
    assert decision.get("top_k") == top_k
    for layer in moe.layers:
        call = block_inputs(moe, layer, inputs)
        full, losses, sets = run(moe, layer, call), [], []
        for dropped in combinations(range(layer.num_experts), layer.num_experts - keep):
            sets.append([expert for expert in range(layer.num_experts) if expert not in dropped])
            with moe.masked({layer.path: sets[-1]}, top_k=top_k):
                losses.append(float((run(moe, layer, call) - full).norm()))
        expected = torch.tensor(losses, dtype=torch.float64)
        torch.testing.assert_close(found[layer.path]["subsets.squared_error"][0].sqrt(), expected, rtol=1e-5, atol=1e-5)
        kept = decision["layers"][layer.path]["kept"]
        assert losses[sets.index(kept)] == pytest.approx(min(losses), rel=1e-6)  # sets may tie within rounding


TEXT = {"input_ids": BATCH.input_ids, "use_cache": False}
ROUTERS = ["mixtral", "olmoe", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v2", "mixtral4", "deepseek4"]


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("keep", [pytest.param(8, marks=pytest.mark.nightly), 6])
def test_one_expert_per_token_instead_of_two(name, keep):
    assert_exact(MoEModel(random_model(name)), TEXT, keep, 1)


@pytest.mark.parametrize("name", ["olmoe", pytest.param("mixtral", marks=pytest.mark.nightly)])
def test_two_instead_of_four(name):
    assert_exact(MoEModel(random_model(name, num_experts_per_tok=4)), TEXT, 5, 2)


def test_among_experts_and_what_is_none():
    """longcat_flash chooses among its experts and identities, which are never dropped. (With one per token its own code
    fails.)
    """
    model = tiny.tiny_model("longcat_flash", top_k=3)
    moe = MoEModel(model)
    assert all(layer.num_extra_choices > 0 for layer in moe.layers)
    assert_exact(moe, {**tiny.tiny_inputs(model), "use_cache": False}, 6, 2)


@pytest.mark.parametrize("top_k", [None, 1])
def test_a_softmax_with_a_bias(top_k):
    """ernie4_5_moe adds a bias to a softmax: without some experts the softmax grows, and the order may change."""
    model = tiny.tiny_model("ernie4_5_moe")
    assert_exact(MoEModel(model), {**tiny.tiny_inputs(model), "use_cache": False}, 6, top_k)

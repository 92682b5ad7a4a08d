"""Objects that people look at in an interpreter: one line each, without tensors and records; tables in a notebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from report.test_report import RECORD
from tiny_models import tiny_folder
from transformers import AutoConfig, AutoModelForCausalLM

import compressor
from compressor import plugin
from compressor.data.lm_eval_tasks import LoadedTasks
from compressor.data.sequences import Sequences, TokenBatch
from compressor.machine.distributed import Processes
from compressor.model.skipping.usage import Counter
from compressor.observe.statistic import Gathered
from compressor.plugins import Plugins, load_plugins
from compressor.recipe.schema import load_recipe
from compressor.run import check
from compressor.run.record import CompressionResult


@pytest.fixture(scope="module")
def moe() -> compressor.MoEModel:
    config = AutoConfig.from_pretrained(tiny_folder("mixtral"))
    return compressor.MoEModel(AutoModelForCausalLM.from_config(config))


def test_results_and_what_they_hold(moe: compressor.MoEModel) -> None:
    result = CompressionResult(RECORD, None, moe.model, None)
    passes = "expert_pruning, expert_pruning, dynamic_skipping"
    assert repr(result) == f"CompressionResult(mistralai/Mixtral-8x7B-v0.1 → in memory: {passes})"
    table = result._repr_html_()
    for cell in ("<h2>Figures</h2>", ">before</th>", ">arc_easy acc %</th>", ">81.2 ± 1.2</td>", "(p=0.033)"):
        assert cell in table
    assert "<html" not in table
    bare = CompressionResult({"model": {"reference": "<i>"}}, None, None, None)
    assert bare._repr_html_() == "&lt;i&gt;"


def test_models(moe: compressor.MoEModel) -> None:
    layers = len(moe.layers)
    said = f"{layers} MoE layers of {moe.layers[0].num_experts} experts, top-{moe.layers[0].top_k}"
    assert repr(moe) == f"MoEModel(MixtralForCausalLM: {said})"
    assert repr(moe.structure) == f"Structure({said})"
    assert repr(moe.layers[0]) == f"MoELayer({moe.layers[0].path}: {moe.layers[0].num_experts} experts, top-2)"
    uneven = dataclasses.replace(moe.layers[0], num_experts=1, top_k=1)
    assert repr(dataclasses.replace(moe.structure, layers=(uneven, moe.layers[1]))).endswith("1–8 experts, top-1–2)")


def test_counters_processes_texts_and_tasks() -> None:
    counter = Counter()
    assert repr(counter) == "Counter(0 layers)"
    counter.add_sums({"a": [30, 20], "b": [20, 20]})
    assert repr(counter) == "Counter(2 layers, 1.25 experts a token)"
    assert repr(Processes()) == "Processes(rank 0 of 1)"
    sequences = Sequences("code", tuple(torch.zeros(2, 600, dtype=torch.int64)), "f")
    assert repr(sequences) == "Sequences(code: 2 sequences, 1,200 tokens)"
    ids = torch.zeros(8, 16, dtype=torch.int64)
    assert repr(TokenBatch(ids, ids > 0, "code")) == "TokenBatch(8 × 16 of code)"
    assert repr(LoadedTasks(("a", "b"), {"a": object()}, {})) == "LoadedTasks(a, b)"
    assert repr(Gathered({"layer": {"sums": torch.zeros(9, 9)}}, ["code", "prose"])) == "Gathered(1 layer; code, prose)"


def test_plugins_and_plans(make_layer: Callable[..., compressor.MoELayer]) -> None:
    plugins = load_plugins()
    [pruning] = [one for one in plugins.plugins if one.name == "expert-pruning"]
    assert repr(Plugins((pruning, *plugins.plugins[-1:]), {})) == "Plugins(expert-pruning, wanda)"
    assert repr(Plugins((), {})) == "Plugins()"
    assert repr(pruning).startswith(f"Plugin(expert-pruning {compressor.__version__}: expert_pruning, frequency, ")
    recipe = {"model": "demo", "calibration": {"data": [{"demo": "code"}]}, "passes": [{"expert_pruning": {"keep": 6}}]}
    loaded = load_recipe(recipe, methods=plugins.methods)
    assert repr(loaded) == "LoadedRecipe(demo: expert_pruning)"
    assert repr(check.check(loaded)) == "Preview(demo: 4 MoE layers of 8 experts, top-2)"
    rule = compressor.SkipRule("contribution", True, beta=0.5, expert_norms=(1.0,) * 256)
    assert repr(plugin.Plan([make_layer(6, 2), make_layer(1, 1)])) == "Plan(7 experts in 2 layers)"
    skipping = plugin.Plan([make_layer(1, 1, skip_rule=rule)])
    assert repr(skipping) == "Plan(1 expert in 1 layer, 1 layer that will skip)"
    assert len(repr(rule)) < 120


def test_tokens(make_tokens: Callable[..., plugin.RoutedTokens]) -> None:
    matrices, logits = torch.ones(4, 3, 3), torch.rand(50, 4)

    def choose(logits_TN: Any, top_k: int) -> Any:
        weights, index = logits_TN.topk(top_k)
        return index, weights

    tokens = make_tokens(torch.ones(50, 3), matrices, logits, 2, choose, None)
    assert repr(tokens) == "RoutedTokens(50 tokens of no source at layers.0.mlp)"
    assert repr(next(iter(tokens.ranked_outputs(2)))).startswith("RankedChunk(tokens 0–")

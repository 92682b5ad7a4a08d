"""REAM: its formulas by hand and against slow versions, neurons that are put in order, whole runs; refused."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_folder, token_ids, write_token_file
from torch import Tensor
from weight_runs import files, recipe, stopped_and_whole

import compressor
from compressor.checkpoint.resume_state import Journal
from compressor.errors import UnsupportedModelError
from compressor.model.expert_products import expert_matrices
from compressor.model.layer_weights import LayerWeights, live_tensors
from compressor.model.moe_model import MoEModel
from compressor.model.routing_rule import RoutingRule
from compressor.plugin import Decision, Gathered, OptionError
from compressor.run.apply import apply
from compressor.testing.tiny import answers, tiny_inputs, tiny_model
from compressor_expert_merging import ExpertMerging, ExpertMergingOptions
from compressor_expert_merging.ream import GatedOutputs, aligned, pseudo_groups, saliency, similarity

REAM = {"expert_merging": {"keep": 4, "grouping": "ream", "group_size": 3}}


def by_hand(*numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def method(**options: Any) -> ExpertMerging:
    return ExpertMerging(ExpertMergingOptions(grouping="ream", **options))


def weights_of(model: Any, number: int = 0) -> LayerWeights:
    layer = MoEModel(model).layers[number]
    used = expert_matrices(model, layer)
    return LayerWeights(layer, range(layer.num_experts), lambda: live_tensors(model, layer), lambda: used)


def test_saliency_by_hand():
    figures = {"weighted_norm": by_hand(6, 0, 1), "chosen": by_hand(3, 0, 4)}
    assert saliency(figures).tolist() == [2, 0.25, 0.25]
    assert saliency({"weighted_norm": by_hand(6, 0), "chosen": by_hand(3, 0)}).tolist() == [2, 0.5]


def test_similarity_by_hand():
    """Outputs point (1, 0), (0, 1), (−1, 0): (1 + cos)/2 is 1/2, 0, 1/2. Logits (1, 0), (0, 1), (2, 0) are √2 apart, 0
    and √2, which is the largest: near by 0, 1 and 0.
    """
    logits = by_hand((1, 0), (0, 1), (2, 0))
    figures = {"outputs": by_hand((3, 0), (0, 0.5), (-1, 0)), "logits": logits @ logits.T}
    expected = by_hand((1, 0.25, 0.5), (0.25, 1, 0.25), (0.5, 0.25, 1))
    torch.testing.assert_close(similarity(figures), expected, rtol=0, atol=1e-8)


def test_groups_by_hand():
    """Experts 3 and 1 are the most salient. 3 comes first and takes 4, the nearest, and then the rest is 1's."""
    near = torch.zeros(5, 5, dtype=torch.float64)
    near[3], near[1] = by_hand(0.7, 0.9, 0.2, 1, 0.8), by_hand(0.1, 1, 0.1, 0.9, 1)
    worth = by_hand(1, 4, 2, 5, 3)
    assert pseudo_groups(worth, near, 2, 2) == [[3, 4], [1, 0]]  # 2 would be left: `check` refuses such sizes
    assert pseudo_groups(worth, near, 2, 3) == [[3, 4, 0], [1, 2]]
    assert pseudo_groups(worth, near, 2, 16) == [[3, 4, 0, 2], [1]]
    assert pseudo_groups(by_hand(1, 1, 1), torch.ones(3, 3), 1, 2) == [[0, 1]]


def test_figures_against_every_expert_on_every_token(make_tokens):
    generator = torch.Generator().manual_seed(0)
    hidden, matrices, logits = (torch.randn(*shape, generator=generator) for shape in ((9, 3), (5, 3, 3), (9, 5)))

    def choose(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        weights, index = logits.softmax(-1).topk(k, dim=-1)
        return index, weights / weights.sum(-1, keepdim=True)

    tokens = make_tokens(hidden, matrices, logits, 2, choose, RoutingRule("softmax", 2, True), num_extra=1)
    statistic = GatedOutputs(tokens.layer)
    statistic.update(tokens)
    statistic.update(tokens)
    outputs, norms, gram = torch.zeros(4, 3), torch.zeros(4), torch.zeros(4, 4)
    for token in range(9):
        gates, answered = logits[token].softmax(-1), [hidden[token] @ matrices[expert] for expert in range(4)]
        for expert in range(4):
            outputs[expert] += 2 * gates[expert] * answered[expert]
            for other in range(4):
                gram[expert, other] += 2 * logits[token, expert] * logits[token, other]
        for expert, weight in zip(tokens.index_TK[token].tolist(), tokens.weights_TK[token], strict=True):
            if expert < 4:
                norms[expert] += 2 * weight * answered[expert].norm()
    found = statistic.tensors()
    for name, expected in (("outputs", outputs), ("weighted_norm", norms), ("logits", gram)):
        torch.testing.assert_close(found[name], expected.double(), rtol=1e-5, atol=1e-5)


def test_the_centroid_survives_and_counts_by_saliency(make_layer):
    layer = make_layer(4, 2)
    figures = {
        "outputs": by_hand((1, 0), (1, 0.1), (0, 1), (0.1, 1)),
        "logits": torch.eye(4, dtype=torch.float64),
        "weighted_norm": by_hand(1, 3, 8, 0),
        "chosen": by_hand(1, 1, 2, 0),
        "seen": torch.tensor(2.0),
    }
    decision = method(keep=2, group_size=2).decide([layer], Gathered({layer.path: figures}))
    assert decision["aligned"]
    assert decision["layers"][layer.path] == {"kept": [1, 2], "dropped": [0, 3], "clusters": [[0, 1], [2, 3]]}
    expected = by_hand(0.25, 0.75, 4 / 4.5, 0.5 / 4.5)
    torch.testing.assert_close(decision.tensors[layer.path]["share"], expected)


def test_neurons_are_matched_at_the_least_distance():
    generator = torch.Generator().manual_seed(0)
    own, to = (
        {"a": torch.randn(5, 2, 3, generator=generator), "b": torch.randn(5, 1, generator=generator)} for _ in "12"
    )

    def rows(of: dict[str, Tensor]) -> Tensor:
        joined = torch.cat([of["a"].flatten(1), of["b"]], 1).double()
        return joined / joined.norm(dim=1, keepdim=True)

    mine, theirs = rows(own), rows(to)
    best = min(permutations(range(5)), key=lambda order: float((mine[list(order)] - theirs).norm(dim=1).sum()))
    assert aligned(own, to).tolist() == list(best)


@pytest.mark.parametrize(
    "model_type",
    [
        "gpt_oss",
        "switch_transformers",
        *(pytest.param(one, marks=pytest.mark.nightly) for one in ("mixtral", "dbrx", "gemma4")),
    ],
)
@torch.no_grad()
def test_experts_with_their_neurons_in_another_order_answer_the_same_and_merge_into_themselves(model_type):
    """Halves, pairs with biases, three flat matrices, modules in a list, a scale for each expert."""
    model = tiny_model(model_type).eval()
    inputs, edited = tiny_inputs(model), weights_of(model)
    first, second = edited.experts[0], edited.experts[1]
    for name, one in first.items():
        second[name] = one
    before, tensors = answers(model, inputs), {name: one.clone() for name, one in first.items()}
    neurons = second.neurons
    order = torch.randperm(len(next(iter(neurons.values()))), generator=torch.Generator().manual_seed(0))
    for name, one in neurons.items():
        neurons[name] = one[order]
    assert not all(torch.equal(second[name], one) for name, one in tensors.items())
    torch.testing.assert_close(answers(model, inputs), before, rtol=1e-4, atol=1e-4)
    others = range(2, edited.num_experts)
    layer = {"kept": [0, *others], "dropped": [1], "clusters": [[0, 1], *([other] for other in others)]}
    share = torch.full((edited.num_experts,), 0.3, dtype=torch.float64)
    share[1] = 0.7
    decision = Decision({"layers": {edited.path: layer}, "aligned": True}, {edited.path: {"share": share}})
    method(keep=7).edit(edited, decision)
    assert all(torch.equal(first[name], one) for name, one in tensors.items())


def test_neurons_that_cannot_be_told_are_refused_by_name():
    """Where what stands before the last matrix mixes all rows of the first."""
    edited = weights_of(tiny_model("mixtral").eval())
    used = edited.experts[0]._used()
    edited.experts[0]._used = lambda: type(used)(used.input_dims, used.output, used.last, {})
    says = r"layers\.0\.mlp: expert 0: which rows of experts\.gate_up_proj are which neuron's cannot be seen"
    with pytest.raises(UnsupportedModelError, match=says):
        _ = edited.experts[0].neurons


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_token_file(tmp_path_factory.mktemp("text") / "tokens.jsonl", token_ids(30, 24).tolist())


def test_in_memory_from_disk_and_applied_are_the_same_bytes(tokens: Path, tmp_path: Path) -> None:
    memory = compressor.compress(recipe(tokens, REAM, weights="memory"), output=tmp_path / "memory")
    compressor.compress(recipe(tokens, REAM, weights="disk"), output=tmp_path / "disk")
    assert files(tmp_path / "memory") == files(tmp_path / "disk")
    apply(tmp_path / "disk" / "compressor" / "decision.json", str(tiny_folder("mixtral")), tmp_path / "applied")
    assert files(tmp_path / "applied")["model.safetensors"] == files(tmp_path / "memory")["model.safetensors"]
    merging = memory.record["passes"][0]
    assert merging["checks"]["edited_against_float32"] == 0
    assert all(
        sorted(map(len, one["clusters"]), reverse=True) == [3, 3, 1, 1]
        for one in merging["decision"]["layers"].values()
    )


@pytest.mark.nightly
def test_an_interrupted_run_ends_with_the_same_bytes(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe(tokens, REAM, evaluate={"perplexity": [{"tokens": str(tokens), "samples": 8}]})
    found, whole = stopped_and_whole(run, tmp_path, monkeypatch, (Journal, "note"), lambda name: True)
    assert found == whole


def test_what_is_refused(make_layer):
    with pytest.raises(OptionError, match="2 groups of 3 do not hold its 8 experts") as error:
        method(keep=2, group_size=3).check([make_layer(8, 2)])
    assert error.value.option == "group_size"
    with pytest.raises(ValueError, match="`weights` would have no effect with `grouping: ream`"):
        method(keep=2, weights="uniform")
    with pytest.raises(ValueError, match="`group_size` would have no effect without `grouping: ream`"):
        ExpertMergingOptions(keep=2, group_size=3)

"""Quirks of architectures, each told by what the code does: detectors, with the architectures that have them."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from compressor import MoEModel, UnsupportedModelError
from compressor.model.find_structure import find_structure
from compressor.model.routed_tokens import RealTokens
from compressor.testing.tiny import answers, model_class, tiny_config, tiny_inputs, tiny_model


@cache
def structure(model_type):
    return find_structure(model_class(model_type), tiny_config(model_type))


def layer(model_type):
    return structure(model_type).layers[-1]


@pytest.mark.parametrize(
    ("model_type", "call"),
    [
        ("mixtral", "choices"),
        ("dbrx", "choices"),
        ("llama4_text", "scaled inputs"),
        ("jetmoe", "pairs"),
        ("switch_transformers", "masks"),
    ],
)
def test_how_experts_are_called(model_type, call):
    assert layer(model_type).router_probe.call == call


def test_flat_expert_dimension():
    axes = {name.rpartition(".")[2]: axis for name, axis in layer("dbrx").tensors.items() if ".mlp." in name}
    assert set(axes) == {"w1", "v1", "w2"}
    assert {(axis.dim, axis.extra) for axis in axes.values()} == {(0, 0)}
    assert {axis.stride for axis in axes.values()} == {tiny_config("dbrx").ffn_config.ffn_hidden_size}


def test_second_expert_dimension():
    [bias] = layer("ernie4_5_moe").selection_biases
    assert bias.endswith("moe_statics.e_score_correction_bias")
    assert layer("ernie4_5_moe").tensors[bias].dim == 1


def test_rows_behind_the_experts():
    longcat, inkling, zaya = layer("longcat_flash"), layer("inkling_text"), layer("zaya")
    assert longcat.num_choices > longcat.num_experts == 8
    assert {axis.extra for axis in longcat.tensors.values()} == {0, longcat.num_extra_choices}
    # shared experts have a row, and are not chosen; the skip of zaya is answered as expert 0 with weight 0
    assert (inkling.num_extra_choices, zaya.num_extra_choices) == (0, 0)
    assert {inkling.tensors[name].extra for name in inkling.router_weights} == {
        tiny_config("inkling_text").n_shared_experts
    }


def test_router_that_reads_the_config():
    assert layer("zaya").router_probe.reads_config
    assert not layer("mixtral").router_probe.reads_config


@pytest.mark.parametrize("model_type", ["afmoe", "hy_v3", "lfm2_moe", "minimax_m2"])
def test_bias_on_the_block(model_type):
    [bias] = layer(model_type).selection_biases
    assert not bias.startswith(layer(model_type).router + ".")
    assert layer(model_type).padding_problem is None


def test_no_block_of_its_own():
    assert layer("gemma4_text").path == "model.layers.2"
    assert not layer("gemma4_text").router_probe.block_runs


def test_several_blocks_share_one_count():
    paths = [each.path for each in structure("jetmoe").layers]
    assert "model.layers.0.mlp" in paths
    assert "model.layers.0.self_attention.experts" in paths
    assert {path.rpartition(".")[2] for path in (each.path for each in structure("ernie4_5_vl_moe").layers)} == {
        "text_moe",
        "vision_moe",
    }


def test_expert_counts_of_other_parts_are_left_alone():
    found = structure("dots3_note")
    assert str(found.num_experts_leaf) == "text_config.n_routed_experts"
    assert [str(leaf) for leaf in found.other_leaves] in ([], ["vision_config.num_local_experts"])
    assert all("language_model" in each.path for each in found.layers)


def test_groups_that_are_carried_and_never_looked_at():
    assert tiny_config("unlimited_ocr").text_config.n_group == 2
    assert layer("unlimited_ocr").num_groups == 1
    assert (layer("deepseek_v3").num_groups, layer("deepseek_v3").num_chosen_groups) == (2, 1)


def test_fixed_number_of_experts():
    assert layer("phimoe").top_k_fixed
    assert layer("switch_transformers").top_k == 1
    assert layer("deepseek_v4").top_k_fixed  # its tables of ids have one column per expert of a token


def test_bias_that_only_decides_cannot_switch_experts_off():
    assert layer("deepseek_v3").padding_problem is None
    assert "would still take their share" in layer("longcat_flash").padding_problem
    assert "has no bias" in layer("mixtral").padding_problem


def tokens_of(model_type, look=lambda tokens: None):
    """What the last layer's visitor is given; `look` looks at it while the layer runs."""
    model = tiny_model(model_type)
    inputs = tiny_inputs(model)
    moe = MoEModel(model)
    seen = []

    def visit(tokens):
        look(tokens)
        seen.append(tokens)

    real = RealTokens(torch.ones(inputs["input_ids"].numel(), dtype=torch.bool))
    with moe.watched({moe.layers[-1].path: visit}, real):
        answers(model, inputs)
    return seen[0]


def test_factor_behind_the_experts():
    tokens = tokens_of("beam")
    outputs = torch.randn(5, tokens.hidden_TH.shape[-1])
    assert torch.allclose(tokens.lift(outputs), 2.5 * outputs)
    assert tokens_of("mixtral").lift is None


def test_projection_behind_the_experts():
    model = tiny_model("muse_spark_text")
    weight = model.get_submodule(MoEModel(model).layers[-1].path).post_expert_proj.weight
    outputs = torch.randn(5, weight.shape[1])
    lifted = []
    tokens_of("muse_spark_text", lambda tokens: lifted.append(tokens.lift(outputs)))
    assert torch.allclose(lifted[0], outputs @ weight.T, atol=1e-5)


def test_norm_behind_the_experts():
    tokens = tokens_of("axk1")
    assert not tokens.at_block
    assert tokens.lift is None


def test_pairs_are_seen_and_experts_cannot_be_asked():
    model = tiny_model("jetmoe")
    moe, inputs = MoEModel(model), tiny_inputs(model)
    seen = []
    real = RealTokens(torch.ones(inputs["input_ids"].numel(), dtype=torch.bool))
    with moe.watched({moe.layers[1].path: seen.append}, real):
        answers(model, inputs)
    (tokens,) = seen
    assert not tokens.can_evaluate
    assert tokens.renormalises()
    # each token's softmax over its own best two logits
    best = tokens.logits_TE.topk(2, dim=-1)
    assert torch.equal(tokens.index_TK.sort().values, best.indices.sort().values)
    assert torch.allclose(tokens.weights_TK.sort(descending=True).values, best.values.softmax(-1), atol=1e-6)
    with pytest.raises(UnsupportedModelError, match=r"its block sorts \(token, expert\) pairs"):
        next(tokens.ranked_outputs(2))

"""Tiny models of every type: they build, answer, and are what the docstrings say."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from compressor.checkpoint.load import align
from compressor.testing.tiny import (
    answers,
    auto_class,
    candidate_types,
    model_class,
    tiny_config,
    tiny_inputs,
    tiny_model,
)

# One of each: groups, experts in a part, base class, two stacks, ids in a table, top-1, layers with sizes of their own.
SHAPES = ["deepseek_v3", "dbrx", "glm4v_moe_text", "switch_transformers", "deepseek_v4", "zaya", "gemma4"]


@pytest.mark.nightly
def test_candidates_are_few_and_in_order():
    found = candidate_types()
    assert list(found) == sorted(set(found))
    assert not {"llama", "bert", "gpt2", "qwen3"} & set(found)


@pytest.mark.parametrize(
    ("model_type", "auto", "name"),
    [
        ("mixtral", AutoModelForCausalLM, "MixtralForCausalLM"),
        ("llama4", AutoModelForImageTextToText, "Llama4ForConditionalGeneration"),  # not the text model in it
        ("llama4_text", AutoModelForCausalLM, "Llama4ForCausalLM"),
        ("nllb-moe", AutoModelForSeq2SeqLM, "NllbMoeForConditionalGeneration"),
        ("muse_spark_text", transformers.AutoModel, "MuseSparkTextModel"),
    ],
)
def test_class_of_a_type(model_type, auto, name):
    assert auto_class(model_type) is auto
    assert model_class(model_type).__name__ == name


def test_unknown_type_is_an_error():
    version = transformers.__version__
    for function in (auto_class, model_class):
        with pytest.raises(ValueError, match=f"^transformers {version} has no model class for the type 'mixtrel'.$"):
            function("mixtrel")
    with pytest.raises(ValueError, match=f"^transformers {version} has no model type 'mixtrel'.$"):
        tiny_config("mixtrel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", SHAPES)
def test_saved_and_loaded_answers_the_same(model_type, dtype, tmp_path):
    model = tiny_model(model_type, dtype=dtype)
    inputs = tiny_inputs(model)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    loaded = auto_class(model_type).from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager").eval()
    align(loaded)
    assert type(loaded) is type(model)
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == before
    assert torch.equal(answers(model, inputs), answers(loaded, inputs))


def test_equal_seeds_give_equal_weights():
    random_state = torch.random.get_rng_state()
    one, same, other = (tiny_model("gpt_oss", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_rounded_weights_are_those_of_float32():
    exact, rounded = (tiny_model("deepseek_v3", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for name, tensor in exact.state_dict().items():
        other = rounded.state_dict()[name]
        assert torch.equal(tensor.to(other.dtype), other)
    assert rounded.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_every_expert_count_and_top_k():
    config = tiny_config("deepseek_v3", num_experts=6, top_k=3)
    assert (config.n_routed_experts, config.num_experts_per_tok) == (6, 3)
    assert (config.n_group, config.topk_group) == (2, 1)
    assert tiny_config("dbrx", num_experts=6).ffn_config.moe_num_experts == 6
    assert tiny_config("zaya", top_k=2).num_experts_per_tok == 1


def test_a_tower_keeps_its_own_expert_count():
    config = tiny_config("dots3_note", num_experts=6)
    assert config.text_config.n_routed_experts == 6
    assert config.vision_config.per_layer_config[1].num_local_experts == 4


def test_changes_go_where_experts_are_counted():
    config = tiny_config("qwen3_vl_moe", router_aux_loss_coef=0.5, hidden_size=32, image_token_id=126)
    assert config.text_config.router_aux_loss_coef == 0.5
    assert config.text_config.hidden_size == 32
    assert config.vision_config.hidden_size == 64
    assert config.image_token_id == 126
    assert tiny_config("dbrx", n_layers=2).n_layers == 2
    assert tiny_config("mixtral", num_experts_per_tok=3).num_experts_per_tok == 3


def test_both_text_parts_of_a_type_take_a_change():
    config = tiny_config("qwen3_omni_moe", moe_intermediate_size=16)
    assert config.thinker_config.text_config.moe_intermediate_size == 16
    assert config.talker_config.text_config.moe_intermediate_size == 16


def test_unknown_change_is_an_error():
    with pytest.raises(ValueError, match=r"^The config of 'mixtral' has no key 'num_expert'\.$"):
        tiny_config("mixtral", num_expert=4)


def test_token_ids_are_within_the_vocabulary_and_agree():
    config = tiny_config("qwen3_vl_moe")
    ids = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    assert len(set(ids)) == 4
    assert all(99 < number < config.text_config.vocab_size for number in ids)


def test_hash_layers_name_distinct_experts():
    model = tiny_model("deepseek_v4", num_experts=6, top_k=3)
    gates = [layer.mlp.gate for layer in model.model.layers]
    tables = [gate.tid2eid for gate in gates if hasattr(gate, "tid2eid")]
    assert 1 <= len(tables) < len(gates)
    for table in tables:
        assert table.shape == (128, 3)
        assert set(table.unique().tolist()) == set(range(6))
        assert all(len(set(row)) == 3 for row in table.tolist())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss", "muse_spark_text"])
def test_tokens_go_to_different_experts(model_type):
    model = tiny_model(model_type)
    seen = []
    for name, module in model.named_modules():
        if name.endswith((".mlp.gate", ".mlp.router")):
            module.register_forward_hook(lambda _, __, output: seen.append(set(output[2].flatten().tolist())))
    answers(model, tiny_inputs(model))
    assert len(seen) >= 2
    assert all(len(experts) >= 4 for experts in seen)


def test_inputs():
    model = tiny_model("switch_transformers")
    inputs = tiny_inputs(model, batch=3, length=5, seed=1)
    assert sorted(inputs) == ["decoder_input_ids", "input_ids"]
    assert inputs["input_ids"].shape == (3, 5)
    assert inputs["input_ids"].dtype == torch.int64
    assert 3 <= inputs["input_ids"].min() <= inputs["input_ids"].max() <= 99
    assert not torch.equal(inputs["input_ids"], tiny_inputs(model, batch=3, length=5)["input_ids"])

"""Tiny models of every type: they build, answer, and are what the docstrings say."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from compressor.checkpoint import align
from compressor.testing import (
    answers,
    auto_class,
    candidate_types,
    model_class,
    tiny_config,
    tiny_inputs,
    tiny_model,
)

# transformers 5.23: each was built with 8 experts and with 16, and differed as routed experts do.
CENSUS = """
afmoe aria aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_ocr2 deepseek_v2 deepseek_v3
deepseek_v32 deepseek_v4 diffusion_gemma dots1 dots3_note dots3_note_text ernie4_5_moe ernie4_5_vl_moe
exaone_moe flex_olmo flint gemma4 gemma4_text glm4_moe glm4_moe_lite glm4v_moe glm4v_moe_text glm5_next
glm5_next_text glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe
hy_v3 hy_v4 inkling2 inkling2_text inkling_mm_model inkling_text jamba jetmoe kimi_k25 kimi_linear kolibri1
laguna lfm2_moe llama4 llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl
minimax_m3_vl_text mistral4 mistral_large4 mistral_large4_text mixtral muse_spark muse_spark_text nemo_speechlm
nemotron_h nemotron_h_omni nllb-moe olmoe openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text
qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_thinker qwen3_vl_moe qwen3_vl_moe_text qwen4_exp
qwen4_exp_text solar_open step3p7 switch_transformers unlimited_ocr zaya
"""
WITH_EXPERTS = frozenset(CENSUS.split())
NO_FORWARD = "qwen3_omni_moe"
BROKEN_UPSTREAM = {("llama4", "5.24.0"): "image_outputs"}
"""(type, transformers) → a part of the error with which its forward fails on text alone."""
TYPES = [name for name in candidate_types() if name in WITH_EXPERTS]
RUNNING = [name for name in TYPES if name != NO_FORWARD]
# One of each: groups, experts in a part, base class, two stacks, ids in a table, top-1, layers with sizes of their own.
SHAPES = ["deepseek_v3", "dbrx", "glm4v_moe_text", "switch_transformers", "deepseek_v4", "zaya", "gemma4"]


def test_all_types_with_experts_are_candidates():
    if not transformers.__version__.startswith("5.23."):
        pytest.skip("the list is that of transformers 5.23")
    assert len(WITH_EXPERTS) == 89
    assert set(candidate_types()) >= WITH_EXPERTS


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


@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_builds_without_memory(model_type):
    with torch.device("meta"):
        model = model_class(model_type)(tiny_config(model_type))
    assert sum(parameter.numel() for parameter in model.parameters()) < 10_000_000
    kinds = [type(module).__name__ for name, module in model.named_modules() if "vision" not in name]
    assert sum(kind.endswith("Experts") for kind in kinds) >= 2


@pytest.mark.parametrize("model_type", RUNNING)
def test_every_type_answers(model_type):
    model = tiny_model(model_type)
    assert not model.training
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    inputs = tiny_inputs(model)
    if (model_type, transformers.__version__) in BROKEN_UPSTREAM:
        with pytest.raises(AttributeError, match=BROKEN_UPSTREAM[model_type, transformers.__version__]):
            answers(model, inputs)
        return
    found = answers(model, inputs)
    assert found.shape[:2] == (2, 12)
    assert found.isfinite().all()
    assert (found[:, 1:] - found[:, :-1]).abs().amax(dim=-1).min() > 0.02  # it differs from token to token
    assert torch.equal(found, answers(model, inputs))


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

"""What is found in each architecture, by structure alone; and that removing experts removes just that."""

from __future__ import annotations

import pytest
import torch
from by_hand import router_of
from tiny_models import ARCHITECTURES, FEW, keep_six, random_model, randomise, tiny_config, tiny_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from compressor import MoEModel
from compressor.model.find_structure import find_structure

# name → (MoE layers, their place, config key of the expert count, router)
EXPECTED = {
    "mixtral": ((0, 1, 2), "mlp", "num_local_experts", "MixtralTopKRouter: top-2"),
    "qwen2_moe": ((0, 1, 2), "mlp", "num_experts", "Qwen2MoeTopKRouter: top-2"),
    "qwen3_moe": ((0, 1, 2), "mlp", "num_local_experts", "Qwen3MoeTopKRouter: top-2"),
    "qwen3_moe_not_normalised": ((0, 1, 2), "mlp", "num_local_experts", "Qwen3MoeTopKRouter: top-2"),
    "olmoe": ((0, 1, 2), "mlp", "num_experts", "OlmoeTopKRouter: top-2"),
    "granitemoe": ((0, 1, 2), "block_sparse_moe", "num_local_experts", "GraniteMoeTopKRouter: top-2"),
    "phimoe": ((0, 1, 2), "mlp", "num_local_experts", "PhimoeTopKRouter: top-2"),
    "deepseek_v2": ((1, 2), "mlp", "n_routed_experts", "DeepseekV2TopkRouter: top-2"),
    "deepseek_v2_groups": ((1, 2), "mlp", "n_routed_experts", "DeepseekV2TopkRouter: top-2, 1 of 2 groups"),
    "deepseek_v3": ((1, 2), "mlp", "n_routed_experts", "DeepseekV3TopkRouter: top-2, 1 of 2 groups"),
    "gpt_oss": ((0, 1, 2), "mlp", "num_local_experts", "GptOssTopKRouter: top-2"),
    "glm4_moe": ((1, 2), "mlp", "n_routed_experts", "Glm4MoeTopkRouter: top-2"),
    "mixtral4": ((0, 1, 2), "block_sparse_moe", "num_local_experts", "Linear: top-2"),
    "deepseek4": ((1, 2), "mlp", "n_routed_experts", "MoEGate: top-2"),
}


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_structure(name):
    model = tiny_model(name)
    moe = MoEModel(model)
    numbers, place, key, router_kind = EXPECTED[name]
    assert [layer.path for layer in moe.layers] == [f"model.layers.{number}.{place}" for number in numbers]
    assert {(layer.num_experts, layer.top_k, layer.router_kind) for layer in moe.layers} == {(8, 2, router_kind)}
    assert {(layer.num_groups, layer.num_chosen_groups) for layer in moe.layers} == {
        (2, 1) if "groups" in router_kind else (1, 1)
    }
    assert {layer.is_list for layer in moe.layers} == {name in ("mixtral4", "deepseek4")}
    assert str(moe.structure.num_experts_leaf) == key
    expected = None if name == "phimoe" else "num_experts_per_tok"  # its sparsemixer always chooses two
    assert (str(moe.structure.top_k_leaf) if moe.structure.top_k_leaf else None) == expected
    assert moe.structure.num_parameters == num_parameters(model)


@pytest.mark.parametrize("name", FEW)
def test_keep_removes_what_belongs_to_the_experts_and_nothing_else(name):
    model = tiny_model(name)
    moe = MoEModel(model)
    before, gone = num_parameters(model), sum(2 * layer.parameters_per_expert for layer in moe.layers)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    indexed = {key for layer in moe.layers for key in layer.tensors}
    lists = tuple(path for layer in moe.layers for path in layer.containers)
    kept = keep_six(moe)
    layers = moe.layers

    moe.keep(kept)

    assert num_parameters(model) == before - gone == moe.structure.num_parameters
    assert {layer.num_experts for layer in moe.layers} == {6}
    assert moe.structure.num_experts_leaf.get(model.config) == 6
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    for key, tensor in model.state_dict().items():
        layer = next((layer for layer in layers if key.startswith(layer.path + ".")), None)
        if key in indexed:
            expected = tensors[key].index_select(layer.tensors[key].dim, torch.tensor(kept[layer.path]))
        elif key.startswith(lists):
            container = next(path for path in lists if key.startswith(path + "."))
            number, _, rest = key.removeprefix(container + ".").partition(".")
            expected = tensors[f"{container}.{kept[layer.path][int(number)]}.{rest}"]
        else:
            expected = tensors[key]
        assert tensor.dtype == expected.dtype, key
        assert torch.equal(tensor, expected), key
    # a second look at the smaller model finds what the first one left behind
    again = MoEModel(model)
    assert [layer.num_experts for layer in again.layers] == [6] * len(layers)
    assert list(again.layers) == list(moe.layers)


@pytest.mark.parametrize("name", FEW)
def test_keep_twice_equals_keep_once(name):
    once, twice = MoEModel(tiny_model(name)), MoEModel(tiny_model(name))
    twice.keep({layer.path: [0, 2, 3, 5, 6, 7] for layer in twice.layers})
    twice.keep({layer.path: [0, 2, 3, 5] for layer in twice.layers})
    once.keep({layer.path: [0, 3, 5, 7] for layer in once.layers})
    assert torch.equal(once.model(token_ids(2, 9)).logits, twice.model(token_ids(2, 9)).logits)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss"])
def test_auxiliary_loss_after_keep(name):
    """The count is also an attribute of the whole model, used for the loss that balances the experts."""
    moe = MoEModel(tiny_model(name))
    moe.keep(keep_six(moe))
    assert moe.model.num_experts == 6
    ids = token_ids(2, 9)
    output = moe.model(ids, labels=ids, output_router_logits=True)
    assert torch.isfinite(output.aux_loss)
    assert {logits.shape[-1] for logits in output.router_logits} == {6}


# Sizes that coincide, and small ones -----------------------------------------------------------------------

COINCIDENCES = {
    "hidden size is the number of experts": {"hidden_size": 8, "head_dim": 2, "num_attention_heads": 4},
    "intermediate size is the number of experts": {"intermediate_size": 8, "moe_intermediate_size": 8},
    "vocabulary is the number of experts": {"vocab_size": 8},
    "as many layers as experts": {"num_hidden_layers": 8},
    "as many heads as experts": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4},
    "a token chooses one expert": {"num_experts_per_tok": 1},
    "a token chooses all but one": {"num_experts_per_tok": 7},
    "two experts, one chosen": {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1},
    "tied embeddings": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("case", COINCIDENCES)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_coinciding_sizes(name, case):
    changes = dict(COINCIDENCES[case])
    native = "num_local_experts" if name != "qwen3_moe" else "num_experts"
    changes = {k: v for k, v in changes.items() if k not in {"num_local_experts", "num_experts"} - {native}}
    if name != "qwen3_moe":
        changes.pop("moe_intermediate_size", None)
    model = random_model(name, **changes)
    moe = MoEModel(model)
    layer = moe.layers[0]
    num_experts, top_k = changes.get(native, 8), changes.get("num_experts_per_tok", 2)
    assert {(layer.num_experts, layer.top_k) for layer in moe.layers} == {(num_experts, top_k)}
    assert len(moe.layers) == changes.get("num_hidden_layers", 3)
    assert moe.structure.num_parameters == num_parameters(model)
    if num_experts == 2:
        return
    num_kept = max(3, top_k)
    ids = token_ids(2, 11) % changes.get("vocab_size", 64)
    kept = {layer.path: sorted((i + 3 * n) % 8 for i in range(num_kept)) for n, layer in enumerate(moe.layers)}
    with torch.no_grad(), moe.masked(kept):
        masked = model(ids).logits
    before = num_parameters(model)
    moe.keep(kept)
    assert num_parameters(model) == before - sum((8 - num_kept) * layer.parameters_per_expert for _ in moe.layers)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, masked, rtol=2e-5, atol=2e-5)


def test_router_that_chooses_two_whatever_the_config_says():
    moe = MoEModel(random_model("phimoe", num_experts_per_tok=3))
    assert moe.structure.top_k_leaf is None
    assert {layer.top_k for layer in moe.layers} == {2}


@pytest.mark.parametrize(
    ("model_type", "settings", "router"),
    [
        ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": 2}, "model.layers.0.mlp.gate"),
        (
            "longcat_flash",
            {"n_routed_experts": 8, "moe_topk": 2, "num_layers": 2, "expert_ffn_hidden_size": 24, "zero_expert_num": 2},
            "model.layers.0.mlp.router",
        ),
    ],
)
def test_router_is_the_module_that_chooses_not_the_linear_map_inside_it(model_type, settings, router):
    """LongCat's router never calls its linear module, only its weight: a mask on that module would mask nothing."""
    config = AutoConfig.for_model(
        model_type,
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "head_dim": 8}
        | {"num_hidden_layers": 2, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "ffn_hidden_size": 48}
        | settings,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    moe = MoEModel(model)
    assert moe.layers[0].router == router
    assert moe.layers[0].router_probe.class_name.endswith(("Gate", "Router"))
    ids = token_ids(2, 11)
    with torch.no_grad():
        untouched = model(ids).logits
        with moe.masked(keep_six(moe)):
            masked = model(ids).logits
        moe.keep(keep_six(moe))
        assert (masked - untouched).abs().max() > 0.1
        torch.testing.assert_close(model(ids).logits, masked, rtol=2e-5, atol=1e-5)


def test_dense_layers_between():
    moe = MoEModel(random_model("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3]))
    assert [layer.path for layer in moe.layers] == ["model.layers.1.mlp"]


def test_structure_needs_no_weights_and_leaves_the_config_alone():
    config = tiny_config("deepseek_v3")
    before = config.to_dict()
    structure = find_structure(type(tiny_model("deepseek_v3")), config)
    assert config.to_dict() == before
    assert structure.layers == MoEModel(tiny_model("deepseek_v3")).layers


def test_router_row_counts_as_the_experts():
    """8 experts of 3 · 32 · 24 weights, a row of 32 in the router each; gpt-oss has biases everywhere."""
    assert MoEModel(tiny_model("mixtral")).layers[0].parameters_per_expert == 3 * 32 * 24 + 32
    assert MoEModel(tiny_model("gpt_oss")).layers[0].parameters_per_expert == 3 * 32 * 24 + 48 + 32 + 32 + 1
    assert router_of(tiny_model("gpt_oss").model.layers[0].mlp).bias.shape == (8,)

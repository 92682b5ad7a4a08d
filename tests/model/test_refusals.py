"""What cannot be pruned is refused before anything is changed, in words that say why and what would work."""

from __future__ import annotations

import pytest
import torch
from tiny_models import keep_six, random_model, tiny_config, tiny_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from compressor import MoEModel, UnsupportedModelError
from compressor.model.find_structure import find_structure
from compressor.model.moe_model import check_kept
from compressor.plugin import count_problem
from compressor.testing.tiny import tiny_model as tiny_testing_model


def small(model_type, **settings):
    """A model of a type that the tests do not run through otherwise."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def refusal(call, *arguments, kind=UnsupportedModelError):
    with pytest.raises(kind) as error:
        call(*arguments)
    return str(error.value)


def test_dense_model():
    assert refusal(MoEModel, small("llama")) == (
        "llama: no routed experts found. No integer of the config resizes both expert weights and router rows, so this "
        "is a dense model, or one whose structure needs an adapter from a plugin."
    )


def test_moe_with_one_expert_is_dense():
    assert refusal(MoEModel, random_model("mixtral", num_local_experts=1, num_experts_per_tok=1)).startswith(
        "mixtral: no routed experts found."
    )


@pytest.mark.parametrize("as_object", [False, True])
def test_quantised_model(as_object):
    from transformers import FineGrainedFP8Config

    model = tiny_model("mixtral")
    quantisation = FineGrainedFP8Config()
    model.config.quantization_config = quantisation if as_object else quantisation.to_dict()
    assert refusal(MoEModel, model) == (
        "mixtral: the model in memory is quantised (fp8), and packed tensors are not edited there; give its folder to "
        "a recipe, or prune the unquantised model, then quantise the result."
    )


def test_integers_that_are_no_expert_ids():
    model = tiny_testing_model("deepseek_v4")
    name = MoEModel(model).layers[0].id_tensors[0]
    table = model.get_buffer(name)
    before = table.clone()
    table[3] = torch.tensor([1, 1])
    message = (
        f"{name}: its integers were taken for expert ids, and are not: a row should name 2 different experts from 0 to "
        "7."
    )
    assert refusal(MoEModel, model) == message
    table.copy_(before)
    table[0, 0] = 8
    assert refusal(MoEModel, model) == message


def test_integers_whose_meaning_cannot_be_told():
    class Model(AutoModelForCausalLM._model_mapping[type(tiny_config("mixtral"))]):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp.register_buffer("seen", torch.zeros(5, dtype=torch.int64))

    assert refusal(find_structure, Model, tiny_config("mixtral")) == (
        "mixtral: whether model.layers.0.mlp.seen holds expert ids cannot be told; this needs an adapter from a plugin."
    )


def test_model_changed_after_loading():
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.gate.weight = torch.nn.Parameter(torch.zeros(7, 32))
    assert refusal(MoEModel, model) == (
        "MixtralForCausalLM: by its config model.layers.1.mlp.gate.weight should be (8, 32), found (7, 32). Was the "
        "model changed after it was loaded?"
    )
    del model.model.layers[1].mlp.gate.weight
    assert refusal(MoEModel, model).endswith(
        "should be (8, 32), found nothing. Was the model changed after it was loaded?"
    )


# Which experts -----------------------------------------------------------------------------------------------


def assert_unchanged(moe, before):
    assert all(torch.equal(moe.model.state_dict()[name], tensor) for name, tensor in before.items())
    assert {layer.num_experts for layer in moe.layers} == {8}
    assert moe.structure.num_experts_leaf.get(moe.config) == 8


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"model.layers.1.mlp": [0, 1, 2, 3, 4, 8]},
            ValueError,
            "model.layers.1.mlp: kept experts must be different ids from 0 to 7, got [0, 1, 2, 3, 4, 8]",
        ),
        (
            {"model.layers.1.mlp": [-1, 1, 2, 3, 4, 5]},
            ValueError,
            "model.layers.1.mlp: kept experts must be different ids from 0 to 7, got [-1, 1, 2, 3, 4, 5]",
        ),
        (
            {"model.layers.2.mlp": [1, 1, 2, 3, 4, 5]},
            ValueError,
            "model.layers.2.mlp: kept experts must be different ids from 0 to 7, got [1, 1, 2, 3, 4, 5]",
        ),
        (
            {"model.layers.2.mlp": [1]},
            ValueError,
            "model.layers.2.mlp: cannot keep 1 experts: each token chooses 2, and fewer than 2 is no choice. The "
            "nearest possible count is 2",
        ),
        (
            {"model.layers.2.mlp": []},
            ValueError,
            "model.layers.2.mlp: cannot keep 0 experts: each token chooses 2, and fewer than 2 is no choice. The "
            "nearest possible count is 2",
        ),
    ],
)
def test_keep_refuses_before_it_changes_anything(changes, kind, message):
    moe = MoEModel(tiny_model("mixtral"))
    before = {name: tensor.clone() for name, tensor in moe.model.state_dict().items()}
    kept = keep_six(moe) | changes
    assert refusal(moe.keep, kept, kind=kind) == message
    assert_unchanged(moe, before)


def test_unbalanced_groups():
    moe = MoEModel(tiny_model("deepseek_v3"))
    before = {name: tensor.clone() for name, tensor in moe.model.state_dict().items()}
    unbalanced = {layer.path: [0, 1, 2, 3, 4, 5] for layer in moe.layers}
    message = "model.layers.1.mlp: its 2 groups must keep equally many experts; got [2, 4]"
    assert refusal(moe.keep, unbalanced, kind=ValueError) == message
    assert refusal(lambda: moe.masked(unbalanced).__enter__(), kind=ValueError) == message
    assert_unchanged(moe, before)


def test_kept_ids_come_back_ascending():
    layer = MoEModel(tiny_model("mixtral")).layers[0]
    assert check_kept(layer, (7, 0, 3)) == [0, 3, 7]
    assert check_kept(layer, torch.tensor([7, 0, 3])) == [0, 3, 7]


# How many ----------------------------------------------------------------------------------------------------


def problems(name, counts, **changes):
    layer = MoEModel(random_model(name, **changes)).layers[0]
    return {count: count_problem(layer, count) for count in counts}


def test_counts_of_an_ordinary_router():
    found = problems("mixtral", range(10))
    assert [count for count, problem in found.items() if problem is None] == [2, 3, 4, 5, 6, 7, 8]
    assert found[1] == (
        "cannot keep 1 experts: each token chooses 2, and fewer than 2 is no choice. The nearest possible count is 2"
    )
    assert found[9] == "it has 8 experts and cannot keep 9"


def test_counts_where_a_token_chooses_many_or_one():
    found = problems("mixtral", (2, 4, 5), num_experts_per_tok=5)
    assert found[4] == (
        "cannot keep 4 experts: each token chooses 5, and fewer than 2 is no choice. The nearest possible count is 5"
    )
    assert found[5] is None
    assert problems("mixtral", (1, 2), num_experts_per_tok=1)[2] is None
    assert problems("mixtral", (1,), num_experts_per_tok=1)[1].startswith(
        "cannot keep 1 experts: each token chooses 1,"
    )
    assert problems("mixtral", (1, 2), num_local_experts=2)[2] is None


def test_counts_of_a_router_with_groups():
    found = problems("deepseek_v3", range(2, 9))
    assert [count for count, problem in found.items() if problem is None] == [4, 6, 8]
    assert found[5] == (
        "cannot keep 5 experts: its router chooses 1 of 2 groups, so the groups need equally many experts, at least 2 "
        "each, and at least 2 in the chosen ones. The nearest possible count is 4"
    )
    assert found[2].endswith("The nearest possible count is 4")
    assert found[7].endswith("The nearest possible count is 6")


def test_chosen_groups_must_hold_enough_experts():
    """16 experts in 4 groups, of which one is chosen, 3 per token: a group must keep 3, so 12 stay."""
    found = problems("deepseek_v3", range(4, 17), n_routed_experts=16, n_group=4, topk_group=1, num_experts_per_tok=3)
    assert [count for count, problem in found.items() if problem is None] == [12, 16]
    assert found[8].endswith("at least 3 in the chosen ones. The nearest possible count is 12")


@pytest.mark.parametrize(
    ("name", "groups", "possible"),
    [
        ("deepseek_v3", (2, 2), [4, 6, 8]),  # all groups chosen: nothing is limited, yet experts are cut into groups
        ("deepseek_v2_groups", (2, 2), [4, 6, 8]),
        ("deepseek_v2_groups", (4, 3), [8]),  # the two best experts always lie in the three best groups
        ("deepseek_v2_groups", (8, 3), [8]),
        ("deepseek_v2", (2, 1), [2, 3, 4, 5, 6, 7, 8]),  # greedy: counts of groups that nobody reads
    ],
)
def test_groups_count_where_the_router_reads_them(name, groups, possible):
    """Whether or not they limit any choice: such a router cuts its experts into equal groups."""
    model = random_model(name, n_group=groups[0], topk_group=groups[1])
    moe = MoEModel(model)
    layer = moe.layers[0]
    assert [count for count in range(2, 9) if count_problem(layer, count) is None] == possible
    for num_kept in possible:
        smaller = MoEModel(random_model(name, n_group=groups[0], topk_group=groups[1]))
        size, per_group = 8 // layer.num_groups, num_kept // layer.num_groups
        kept = [group * size + i for group in range(layer.num_groups) for i in range(per_group)]
        with torch.no_grad(), smaller.masked({layer.path: kept for layer in smaller.layers}):
            masked = smaller.model(token_ids(2, 8)).logits
        smaller.keep({layer.path: kept for layer in smaller.layers})
        with torch.no_grad():
            torch.testing.assert_close(smaller.model(token_ids(2, 8)).logits, masked, rtol=2e-5, atol=5e-6)


def test_no_expert_of_groups_of_one_can_go():
    found = problems("deepseek_v2_groups", (4, 8), n_group=8, topk_group=3)
    assert found[4] == "none of its 8 experts can go: each token chooses 2 in 8 groups of at least 2"
    assert found[8] is None

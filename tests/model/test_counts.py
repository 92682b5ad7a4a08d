"""Numbers of experts that differ by layer, ids stored as values, lower top-k: what is done, with numbers by hand."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import keep_six, random_model, tiny_model, token_ids

import compressor
from compressor import CheckpointError, MoEModel, UnsupportedModelError
from compressor.checkpoint.find import Checkpoint
from compressor.checkpoint.load import load_model
from compressor.model.config_entry import KEY
from compressor.model.masking import redirected
from compressor.model.uneven import uneven_counts
from compressor.testing.checks import check_model, save
from compressor.testing.tiny import tiny_model as tiny_testing_model


def uneven(counts=(8, 6, 4)):
    """A live mixtral whose layers have other numbers of experts: the first ones are kept."""
    moe = MoEModel(tiny_model("mixtral"))
    moe.keep({layer.path: range(count) for layer, count in zip(moe.layers, counts, strict=True)})
    return moe


def test_layers_that_are_not_named_keep_all():
    moe = MoEModel(tiny_model("mixtral"))
    moe.keep({moe.layers[1].path: [0, 2, 5]})
    assert [layer.num_experts for layer in moe.layers] == [8, 3, 8]
    with pytest.raises(KeyError, match=r"no MoE layer at 'model\.layers\.9\.mlp'"):
        moe.keep({"model.layers.9.mlp": [0, 1]})


def test_redirected_by_hand():
    # rows of the router: 0 and 1 point the same way, 2 is their opposite, 3 lies between 1 and 2
    router_EH = torch.tensor([[1.0, 0.0], [2.0, 0.1], [-1.0, 0.0], [0.0, 1.0]])
    ids = torch.tensor([[0, 2], [0, 1], [3, 0], [1, 3]])
    # 0 goes: most alike is 1; where the row has 1 already, 3 (cosine 0) comes before 2 (cosine −1)
    assert redirected(ids, torch.tensor([0]), router_EH).tolist() == [[1, 2], [3, 1], [3, 1], [1, 3]]
    assert redirected(ids, torch.tensor([0, 1]), router_EH).tolist() == [[3, 2], [3, 2], [3, 2], [2, 3]]
    assert redirected(ids, torch.tensor([], dtype=torch.int64), router_EH) is ids


def test_redirected_rows_stay_distinct_and_only_dropped_ids_change():
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(500, 16, generator=generator).argsort(-1)[:, :3]
    dropped = torch.tensor([1, 4, 5, 9, 15])
    new = redirected(ids, dropped, torch.randn(16, 8, generator=generator))
    assert not torch.isin(new, dropped).any()
    assert (new.sort(-1).values.diff(dim=-1) > 0).all()
    stays = ~torch.isin(ids, dropped)
    assert torch.equal(new[stays], ids[stays])


def test_ids_stored_as_values_are_redirected_and_relabelled():
    moe = MoEModel(tiny_testing_model("deepseek_v4"))
    layer = next(layer for layer in moe.layers if layer.id_tensors)
    name = layer.id_tensors[0]
    before = moe.model.get_buffer(name).clone()
    moe.keep({each.path: [0, 2, 3, 5, 6, 7] for each in moe.layers})
    after = moe.model.get_buffer(name)
    assert int(after.max()) == 5
    new_id = {0: 0, 2: 1, 3: 2, 5: 3, 6: 4, 7: 5}
    for old_row, new_row in zip(before.tolist(), after.tolist(), strict=True):
        for old, new in zip(old_row, new_row, strict=True):
            assert old not in new_id or new == new_id[old]


def test_the_config_says_which_layer_has_how_many(tmp_path):
    moe = uneven()
    counts = {"model.layers.0.mlp": 8, "model.layers.1.mlp": 6, "model.layers.2.mlp": 4}
    assert [layer.num_experts for layer in moe.layers] == [8, 6, 4]
    assert uneven_counts(moe.config) == counts
    save(moe, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_local_experts"] == 8
    assert config[KEY] == {"format": 1, "num_experts": counts}
    model, tokenizer = compressor.load(tmp_path)
    assert tokenizer is not None
    assert type(model) is type(moe.model)
    assert [tuple(layer.mlp.gate.weight.shape) for layer in model.model.layers] == [(8, 32), (6, 32), (4, 32)]


def test_counts_that_become_one_number_again_are_an_ordinary_checkpoint(tmp_path):
    moe = uneven()
    moe.keep({layer.path: range(4) for layer in moe.layers})
    save(moe, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_local_experts"] == 4
    assert KEY not in config
    again = type(moe.model).from_pretrained(tmp_path)
    assert torch.equal(again(token_ids(1, 8)).logits.argmax(-1), moe.model(token_ids(1, 8)).logits.argmax(-1))


def test_load_balancing_loss_is_refused_by_name(tmp_path):
    moe = uneven()
    with pytest.raises(
        UnsupportedModelError, match="output_router_logits=True: the load-balancing loss needs one number"
    ):
        moe.model(token_ids(1, 8), output_router_logits=True)
    save(moe, tmp_path)
    model, _ = compressor.load(tmp_path)
    with pytest.raises(UnsupportedModelError, match="output_router_logits"):
        model(token_ids(1, 8), output_router_logits=True)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"format": 2, "num_experts": {}}, r"`compressor` should be \{\"format\": 1"),
        ("8", "found '8'"),
        ({"format": 1, "num_experts": {"model.layers.0.mlp": 0}}, "should be"),
        ({"format": 1, "num_experts": {"model.layers.9.mlp": 6}}, "model.layers.9.mlp 6 experts; .* has no such layer"),
        (
            {"format": 1, "num_experts": {"model.layers.0.mlp": 9}},
            "model.layers.0.mlp 9 experts; MixtralForCausalLM has 8",
        ),
    ],
)
def test_damaged_counts_are_refused(tmp_path, entry, message):
    save(uneven(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {KEY: entry}))
    with pytest.raises(CheckpointError, match=message):
        load_model(Checkpoint(str(tmp_path), tmp_path))


def test_padding_by_hand():
    moe = MoEModel(tiny_model("gpt_oss"))
    moe.keep(
        {layer.path: ids for layer, ids in zip(moe.layers, ([0, 1, 2, 3], [1, 5], [2, 3, 6]), strict=True)}, padded=True
    )
    assert [layer.num_experts for layer in moe.layers] == [4, 4, 4]
    assert moe.config.num_local_experts == 4
    # layer 1 keeps 1 and 5, padded with 0 and 2, in ascending order: 0 1 2 5
    off = [(bias == -1e9).tolist() for bias in (layer.mlp.router.bias for layer in moe.model.model.layers)]
    assert off == [[False] * 4, [True, False, True, False], [True, False, False, False]]
    other = MoEModel(tiny_model("mixtral"))
    kept = {layer.path: range(4 + number) for number, layer in enumerate(other.layers)}
    with pytest.raises(UnsupportedModelError, match=r"cannot be padded: its router has no bias"):
        other.keep(kept, padded=True)


def test_lower_top_k():
    moe = MoEModel(tiny_model("mixtral"))
    everything = {layer.path: range(8) for layer in moe.layers}
    with pytest.raises(ValueError, match="top_k can be lowered from 2 to 1 at least, got 3"):
        moe.keep(everything, top_k=3)
    moe.keep(everything, top_k=1)
    assert moe.config.num_experts_per_tok == 1
    assert {layer.mlp.gate.top_k for layer in moe.model.model.layers} == {1}
    phimoe = MoEModel(tiny_model("phimoe"))
    with pytest.raises(UnsupportedModelError, match="its class always chooses 2 experts per token"):
        phimoe.keep({layer.path: range(8) for layer in phimoe.layers}, top_k=1)


def test_masked_top_k_is_put_back():
    moe = MoEModel(tiny_model("mixtral"))
    before = moe.model(token_ids(1, 8)).logits
    with moe.masked(keep_six(moe), top_k=1):
        assert moe.config.num_experts_per_tok == 1
    assert torch.equal(moe.model(token_ids(1, 8)).logits, before)


_COLLISIONS = {
    "hidden size = experts": ("mixtral", {"hidden_size": 8, "num_local_experts": 8}),
    "every expert chosen": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 4}),
    "experts' width = experts": ("olmoe", {"intermediate_size": 8, "num_experts": 8}),
    "vocabulary = experts": ("mixtral", {"vocab_size": 64, "num_local_experts": 64, "num_experts_per_tok": 3}),
    "layers = experts": ("qwen2_moe", {"num_experts": 3, "num_hidden_layers": 3}),
    "hidden = experts = width, groups": (
        "deepseek_v3",
        {"n_routed_experts": 16, "moe_intermediate_size": 16, "hidden_size": 16},
    ),
    "shared = routed": ("deepseek_v2", {"n_routed_experts": 6, "n_shared_experts": 6, "topk_method": "greedy"}),
    "biases, all equal": ("gpt_oss", {"num_local_experts": 32, "hidden_size": 32, "intermediate_size": 32}),
}

_EACH_PUSH = ("hidden = experts = width, groups",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in _EACH_PUSH else pytest.mark.nightly) for name in _COLLISIONS],
)
def test_sizes_that_collide(name):
    """A dimension that happens to equal the number of experts is not taken for it."""
    model_type, changes = _COLLISIONS[name]
    model = random_model(model_type, **changes)
    report = check_model(model, {"input_ids": token_ids(2, 12)})
    report.raise_for_failures()
    assert report["keep all"].passed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 12))])
def test_random_small_configs(seed):
    """Any sizes: everything that is not refused is right."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    name = pick("mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "qwen2_moe")
    count = pick(3, 4, 5, 8, 12, 16)
    changes = {
        MoEModel(tiny_model(name)).structure.num_experts_leaf.key: count,
        "num_experts_per_tok": min(count, pick(1, 2, 3, count)),
        "hidden_size": pick(16, 32, count * 4),
    }
    model = random_model(name, seed=seed, **changes)
    check_model(model, {"input_ids": token_ids(2, 12, seed=seed)}).raise_for_failures()

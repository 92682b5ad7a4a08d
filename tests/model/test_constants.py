"""Experts that answer constants: as an independent reader of the files has them, in memory, on disk; refusals."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM

from compressor.checkpoint.find import Checkpoint
from compressor.checkpoint.layerwise_weights import StreamedWeights
from compressor.checkpoint.load import load_model
from compressor.edit.checkpoint_edit import meta_model, plan_edit
from compressor.edit.layer_edits import StoredWeights, carry_out, edit_layers, finish
from compressor.errors import CheckpointError, UnsupportedModelError
from compressor.model.layer_weights import Ending
from compressor.model.skipping.rule import SkipRule
from compressor.plugin import Decision, LayerWeights, Method, MoEModel, OptionError, Options, Plan
from compressor.testing.checks import save
from compressor.testing.tiny import tiny_inputs, tiny_model

HIDDEN = 64


class NoOptions(Options):
    """None."""


class Scripted(Method[NoOptions]):
    """An edit that a test writes down."""

    name, version, api, options_type = "scripted", "1", 2, NoOptions

    def __init__(self, script: Callable[[LayerWeights], None]) -> None:
        super().__init__(NoOptions())
        self.script = script

    def check(self, layers: Any) -> Plan:
        return Plan(layers)

    def decide(self, layers: Any, statistics: Any) -> Any:
        raise NotImplementedError

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        self.script(layer)


Constants = dict[str, dict[int, Tensor]]


def constants_of(moe: MoEModel) -> Constants:
    """Two experts of the first layer and one of the last."""
    generator = torch.Generator().manual_seed(0)
    first, *_, last = moe.layers
    ids = {first.path: (1, 3), last.path: (0,)}
    return {path: {one: torch.randn(HIDDEN, generator=generator) for one in own} for path, own in ids.items()}


def replacing(constants: Constants) -> Scripted:
    return Scripted(lambda layer: layer.replace(constants.get(layer.path, {})))


def nothing_decided(moe: MoEModel) -> Decision:
    return Decision({"layers": {layer.path: {} for layer in moe.layers}})


def source_of(folder: Path, model_type: str, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(model_type, dtype=dtype).save_pretrained(folder / "source")
    return folder / "source"


def in_memory(source: Path, output: Path) -> MoEModel:
    moe = MoEModel(load_model(Checkpoint("mine", source)))
    carry_out(replacing(constants_of(moe)), moe, nothing_decided(moe))
    moe.config._name_or_path = str(source)
    save(moe, output)
    return moe


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def on_disk(source: Path, output: Path) -> None:
    found = Checkpoint("mine", source)
    before, after = meta_model(found), meta_model(found)
    weights = StreamedWeights(load_model(found, device="meta"), found)
    stored = StoredWeights(lambda: weights, None, is_quantised=False)
    method = replacing(constants_of(before))
    endings, _ = edit_layers(method, nothing_decided(before), before.layers, stored)
    finish(after, method, nothing_decided(before), endings)
    output.mkdir()
    plan_edit(found, before, after).write(output)


# The format, by an independent reader ----------------------------------------------------------------------

NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2", "num_local_experts"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj", "num_experts"),
}


def read_block(folder: Path, number: int, hidden_TH: Tensor) -> Tensor:
    """What a layer's experts add, from the files alone, as vLLM has it: all are chosen from, nothing is renormalised
    afterwards, and a replaced expert adds its weight times a constant.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}
    block, gate, up, down, count = NAMES[config["model_type"]]
    prefix = f"model.layers.{number}.{block}"
    replaced = config["approximate_experts"].get(str(number), [])
    router = tensors[f"{prefix}.gate.weight"]
    assert len(router) == config[count]
    weights_TK, index_TK = linear(hidden_TH, router).softmax(-1).topk(config["num_experts_per_tok"])
    if config.get("norm_topk_prob", True):
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    output_TH = torch.zeros_like(hidden_TH)
    for expert in range(config[count]):
        weight_T = (weights_TK * (index_TK == expert)).sum(-1, keepdim=True)
        own = f"{prefix}.experts.{expert}"
        assert {name for name in tensors if name.startswith(f"{own}.")} == (
            {f"{own}.approx_value"} if expert in replaced else {f"{own}.{part}.weight" for part in (gate, up, down)}
        )
        if expert in replaced:
            answer_TH = tensors[f"{own}.approx_value"]
        else:
            inner = silu(linear(hidden_TH, tensors[f"{own}.{gate}.weight"]))
            inner = inner * linear(hidden_TH, tensors[f"{own}.{up}.weight"])
            answer_TH = linear(inner, tensors[f"{own}.{down}.weight"])
        output_TH += weight_T * answer_TH
    return output_TH


@pytest.mark.parametrize("model_type", NAMES)
def test_an_independent_reader_of_the_files_finds_the_same(model_type: str, tmp_path: Path) -> None:
    in_memory(source_of(tmp_path, model_type), tmp_path / "out")
    model = load_model(Checkpoint("mine", tmp_path / "out"))
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda _, given, answer, number=number: seen.update({number: (given[0], answer)})
        )
    with torch.no_grad():
        model(**tiny_inputs(model))
    for number, (given, answer) in seen.items():
        expected_TH = read_block(tmp_path / "out", number, given.reshape(-1, HIDDEN))
        torch.testing.assert_close(answer.reshape(-1, HIDDEN), expected_TH, rtol=1e-5, atol=1e-5)
    assert len(seen) == 3


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_transformers_alone_refuses_it(model_type: str, tmp_path: Path) -> None:
    in_memory(source_of(tmp_path, model_type), tmp_path / "out")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# In memory, on disk, loaded, copied ------------------------------------------------------------------------


OTHERS = (
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "hunyuan_v1_moe", "jamba", "kimi_linear", "lfm2_moe", "minimax", "minimax_m2",
    "nemotron_h", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_next", "qwen3_omni_moe_thinker", "solar_open",
)  # fmt: skip
"""Whose files hold each expert by itself, too."""


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("mixtral", torch.float32), ("olmoe", torch.bfloat16),
        *(pytest.param(name, torch.float32, marks=pytest.mark.nightly) for name in OTHERS),
    ],
)  # fmt: skip
def test_on_disk_it_becomes_what_it_becomes_in_memory(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = source_of(tmp_path, model_type, dtype)
    moe = in_memory(source, tmp_path / "memory")
    on_disk(source, tmp_path / "disk")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes(), name
    loaded = load_model(Checkpoint("mine", tmp_path / "disk"), like=moe.model)
    inputs = tiny_inputs(moe.model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, moe.model(**inputs).logits)
    again = MoEModel(loaded)
    assert [layer.constants for layer in again.layers] == [layer.constants for layer in moe.layers]
    assert again.structure.num_parameters == sum(one.numel() for one in loaded.parameters())
    save(again, tmp_path / "again")
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "disk")


def test_layers_with_other_counts_can_have_constants_too(tmp_path: Path) -> None:
    moe = MoEModel(tiny_model("mixtral"))
    moe.keep({layer.path: range(8 - number) for number, layer in enumerate(moe.layers)})
    moe.replace(constants_of(moe))
    save(moe, tmp_path / "out")
    again, inputs = load_model(Checkpoint("mine", tmp_path / "out"), like=moe.model), tiny_inputs(moe.model)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, moe.model(**inputs).logits)
    assert [layer.num_experts for layer in MoEModel(again).layers] == [8, 7, 6]


def test_of_a_composite_the_text_config_says_so(tmp_path: Path) -> None:
    in_memory(source_of(tmp_path, "glm4v_moe"), tmp_path / "memory")
    on_disk(tmp_path / "source", tmp_path / "disk")
    assert weights_of(tmp_path / "memory") == weights_of(tmp_path / "disk")
    for folder in ("memory", "disk"):
        config = json.loads((tmp_path / folder / "config.json").read_text(encoding="utf-8"))
        assert config["text_config"]["approximate_experts"] == {"1": [1, 3], "2": [0]}
        assert "approximate_experts" not in config
        assert MoEModel(load_model(Checkpoint("mine", tmp_path / folder))).layers[0].constants == (1, 3)


def test_after_a_pruning_pass_ids_are_those_that_it_left(tmp_path: Path) -> None:
    source = source_of(tmp_path, "mixtral")

    def pruned_and_replaced(moe: MoEModel) -> MoEModel:
        moe.keep({layer.path: [0, 2, 3, 5, 6] for layer in moe.layers})
        moe.replace(constants_of(moe))
        return moe

    live = pruned_and_replaced(MoEModel(load_model(Checkpoint("mine", source))))
    live.config._name_or_path = str(source)
    save(live, tmp_path / "memory")
    found = Checkpoint("mine", source)
    (tmp_path / "disk").mkdir()
    plan_edit(found, meta_model(found), pruned_and_replaced(meta_model(found))).write(tmp_path / "disk")
    assert weights_of(tmp_path / "memory") == weights_of(tmp_path / "disk")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_preview_is_what_the_edit_makes(implementation: str) -> None:
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation(implementation)
    moe, inputs = MoEModel(model), tiny_inputs(model)
    constants = constants_of(moe)
    with torch.no_grad():
        before = model(**inputs).logits
        with moe.replaced(constants):
            expected = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, before)
        moe.replace(constants)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, before, atol=0.1)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_it_writes_text(tmp_path: Path) -> None:
    moe = in_memory(source_of(tmp_path, "mixtral"), tmp_path / "out")
    prompt = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    written = moe.model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        expected = moe.model(written[:, :-1]).logits[:, 5:].argmax(-1)
    assert torch.equal(written[:, 6:], expected)


def test_experts_that_answer_constants_are_not_run() -> None:
    moe = MoEModel(tiny_model("mixtral"))
    layer = moe.layers[0]
    moe.replace({layer.path: {expert: torch.ones(HIDDEN) for expert in range(1, 8)}})
    experts = moe.model.get_submodule(layer.experts)
    assert {name: len(one) for name, one in experts.named_parameters() if "." not in name} == {
        "gate_up_proj": 1, "down_proj": 1,
    }  # fmt: skip
    hidden, weights = torch.randn(4, HIDDEN), torch.tensor([[0.5, 0.25]] * 4)
    answer = experts(hidden, torch.tensor([[1, 2], [7, 3], [0, 4], [6, 5]]), weights)
    torch.testing.assert_close(answer[[0, 1, 3]], torch.full((3, HIDDEN), 0.75))
    assert not torch.allclose(answer[2], answer[0])


# Experts that are never chosen --------------------------------------------------------------------------------


def read_biased_block(folder: Path, number: int, hidden_TH: Tensor) -> Tensor:
    """The same for MiniMax-M2: the sigmoid's weights, and a bias that decides who is chosen and weighs nothing."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{number}.block_sparse_moe"
    scores_TE = linear(hidden_TH, tensors[f"{prefix}.gate.weight"]).sigmoid()
    bias_E = tensors[f"{prefix}.e_score_correction_bias"]
    index_TK = (scores_TE + bias_E).topk(config["num_experts_per_tok"]).indices
    weights_TK = scores_TE.gather(1, index_TK)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    output_TH = torch.zeros_like(hidden_TH)
    for expert in range(config["num_local_experts"]):
        weight_T = (weights_TK * (index_TK == expert)).sum(-1, keepdim=True)
        own = f"{prefix}.experts.{expert}"
        if expert in config["approximate_experts"].get(str(number), []):
            assert torch.equal(tensors[f"{own}.approx_value"], torch.zeros(HIDDEN))
            assert bias_E[expert] == -1e9
            assert weight_T.abs().max() == 0
            continue
        inner = silu(linear(hidden_TH, tensors[f"{own}.w1.weight"])) * linear(hidden_TH, tensors[f"{own}.w3.weight"])
        output_TH += weight_T * linear(inner, tensors[f"{own}.w2.weight"])
    return output_TH


@pytest.mark.parametrize(
    "model_type",
    ["minimax_m2", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("deepseek_v3", "glm4_moe"))],
)
def test_experts_that_are_never_chosen_are_as_if_masked(model_type: str, tmp_path: Path) -> None:
    """Other counts in other layers, exactly; read from the files alone for a router without groups."""
    source = source_of(tmp_path, model_type)
    found = Checkpoint("mine", source)
    moe, before, after = MoEModel(load_model(found)), meta_model(found), meta_model(found)
    first, *_, last = moe.layers
    gone: dict[str, list[int]] = {first.path: [1, 5], last.path: [0, 2, 4, 6]}
    kept = {path: [expert for expert in range(8) if expert not in ids] for path, ids in gone.items()}
    inputs, given = tiny_inputs(moe.model), {path: dict.fromkeys(ids) for path, ids in gone.items()}
    with torch.no_grad(), moe.masked(kept):
        expected = moe.model(**inputs).logits
    for one in (moe, after):
        one.replace(given)
    moe.config._name_or_path = str(source)
    save(moe, tmp_path / "memory")
    (tmp_path / "disk").mkdir()
    plan_edit(found, before, after).write(tmp_path / "disk")
    assert weights_of(tmp_path / "memory") == weights_of(tmp_path / "disk")
    model = load_model(Checkpoint("mine", tmp_path / "disk"), like=moe.model)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda _, x, y, number=number: seen.update({number: (x[0], y)}))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    for number, (x, y) in seen.items() if model_type == "minimax_m2" else ():
        expected_TH = read_biased_block(tmp_path / "disk", number, x.reshape(-1, HIDDEN))
        torch.testing.assert_close(y.reshape(-1, HIDDEN), expected_TH, rtol=1e-5, atol=1e-5)


# Passes behind it ------------------------------------------------------------------------------------------


def test_skipping_behind_it(tmp_path: Path) -> None:
    """Rules see the router's own choices, constants among them; what is skipped adds neither."""
    moe = in_memory(source_of(tmp_path, "mixtral"), tmp_path / "out")
    rules = {layer.path: SkipRule("ratio", True, beta=0.8) for layer in moe.layers}
    inputs = tiny_inputs(moe.model)
    with torch.no_grad():
        whole = moe.model(**inputs).logits
        with moe.zeroed(rules):
            expected = moe.model(**inputs).logits
        moe.skip(rules)
        found = moe.model(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, whole, atol=1e-2)
        save(moe, tmp_path / "skipping")
        again = load_model(Checkpoint("mine", tmp_path / "skipping"), like=moe.model)
        assert torch.equal(again(**inputs).logits, found)
    assert MoEModel(again).skips


def test_a_model_that_skips_gets_constants() -> None:
    model = tiny_model("mixtral")
    moe, inputs = MoEModel(model), tiny_inputs(model)
    moe.skip({layer.path: SkipRule("ratio", True, beta=0.8) for layer in moe.layers})
    with torch.no_grad():
        with moe.replaced(constants_of(moe)):
            expected = model(**inputs).logits
        before = model(**inputs).logits
        moe.replace(constants_of(moe))
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert moe.skips
    assert not torch.allclose(before, expected, atol=0.1)


def test_what_is_observed_of_an_expert_that_answers_a_constant_is_the_constant() -> None:
    from compressor.model.capture import RealTokens

    model = tiny_model("mixtral")
    moe, inputs = MoEModel(model), tiny_inputs(model)
    constants = constants_of(moe)
    moe.replace(constants)
    layer, found = moe.layers[0], []

    def visit(tokens: Any) -> None:
        [chunk] = tokens.ranked_outputs(8)
        for expert, value in constants[layer.path].items():
            own = chunk.outputs_cMH[chunk.order_cM == expert]
            torch.testing.assert_close(own, value.expand_as(own))
            found.append(len(own))

    with torch.no_grad(), moe.watched({layer.path: visit}, RealTokens(torch.ones(inputs["input_ids"].numel()).bool())):
        model(**inputs)
    assert found == [inputs["input_ids"].numel()] * 2


# What is refused -------------------------------------------------------------------------------------------


def _keep(layer: LayerWeights) -> None:
    layer.keep(range(5))
    layer.replace({7: torch.zeros(HIDDEN)})


@pytest.mark.parametrize(
    ("model_type", "script", "message"),
    [
        ("mixtral", lambda layer: layer.replace(dict.fromkeys(range(8), torch.zeros(HIDDEN))), "expert has to stay"),
        ("mixtral", lambda layer: layer.replace({8: torch.zeros(HIDDEN)}), "ids from 0 to 7"),
        ("mixtral", lambda layer: layer.replace({1: torch.zeros(3)}), r"should answer \[64\], found \[3\]"),
        ("mixtral", lambda layer: layer.replace({1: None}), "no bias that could switch"),
        ("deepseek_v3", lambda layer: layer.replace(dict.fromkeys(range(7))), "chooses 2, and 1 would be left"),
        ("mixtral", _keep, "ids would mean two things"),
        ("gpt_oss", lambda layer: layer.replace({1: torch.zeros(HIDDEN)}), "all experts in one tensor"),
        ("llama4_text", lambda layer: layer.replace({1: torch.zeros(HIDDEN)}), "not one module that is given tokens"),
        ("switch_transformers", lambda layer: layer.replace({1: torch.zeros(HIDDEN)}), "have the number"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_changes(model_type: str, script: Any, message: str) -> None:
    moe = MoEModel(tiny_model(model_type))
    before = {name: one.clone() for name, one in moe.model.state_dict().items()}
    with pytest.raises((OptionError, UnsupportedModelError), match=message):
        carry_out(Scripted(script), moe, nothing_decided(moe))
    after = moe.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], one) for name, one in before.items())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (lambda layer: layer.keep(range(5)), "prune before that"),
        (lambda layer: layer.experts[2]["experts.down_proj"].zero_(), "weights are not edited after that"),
        (lambda layer: layer.replace({5: torch.zeros(HIDDEN)}), "answer constants already"),
    ],
)
def test_later_edits_of_such_layers_are_refused(script: Any, message: str) -> None:
    moe = MoEModel(tiny_model("mixtral"))
    moe.replace({layer.path: {1: torch.zeros(HIDDEN)} for layer in moe.layers})
    with pytest.raises((OptionError, UnsupportedModelError), match=message):
        carry_out(Scripted(script), moe, nothing_decided(moe))


def test_a_constant_that_is_missing_is_an_error(tmp_path: Path) -> None:
    in_memory(source_of(tmp_path, "mixtral"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.0.block_sparse_moe.experts.3.approx_value")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing .*experts\.3\.approx_value"):
        load_model(Checkpoint("mine", tmp_path / "out"))


def test_experts_by_other_numbers_are_an_error(tmp_path: Path) -> None:
    """As transformers' own `save_pretrained` would number them: whoever reads ids would take one for another."""
    in_memory(source_of(tmp_path, "mixtral"), tmp_path / "out")
    load_model(Checkpoint("mine", tmp_path / "out")).save_pretrained(tmp_path / "again")
    with pytest.raises(CheckpointError, match=r"experts \[0, 2, 4, 5, 6, 7\] have weights, found \[0, 1, 2, 3, 4, 5\]"):
        load_model(Checkpoint("mine", tmp_path / "again"))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([3], "should be"), ({"0": 3}, "should be"), ({"9": [1]}, "no such MoE layer"), ({"0": [8]}, "ids from 0 to 7"),
        ({"0": [*range(8)]}, "one expert has to stay"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(said: Any, message: str, tmp_path: Path) -> None:
    source = source_of(tmp_path, "mixtral")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"approximate_experts": said}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_model(Checkpoint("mine", source))


def test_experts_in_one_tensor_on_disk_are_refused_there(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "source", save_original_format=False)
    with pytest.raises(UnsupportedModelError, match="need one for each"):
        on_disk(tmp_path / "source", tmp_path / "out")


def test_what_an_edit_asked_for_is_noted_without_its_numbers() -> None:
    noted = json.loads(json.dumps(Ending(constants={3: torch.ones(4), 5: None}).to_json()))
    back = Ending.from_json(noted).constants
    assert back is not None
    assert {expert: None if one is None else one.shape for expert, one in back.items()} == {3: (4,), 5: None}


@pytest.mark.parametrize("model_type", ["dbrx", "switch_transformers"])
def test_where_constants_cannot_be_nothing_refuses_none(model_type: str) -> None:
    """The check of a run from disk asks for none."""
    moe = MoEModel(tiny_model(model_type))
    before = moe.structure
    moe.replace({})
    assert moe.structure == before

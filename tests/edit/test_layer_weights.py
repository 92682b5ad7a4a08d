"""Edits that write numbers: on every kind of architecture, in memory and on disk, and what is refused by name."""

from __future__ import annotations

import copy
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from compressor.checkpoint.find import Checkpoint
from compressor.checkpoint.layerwise_weights import StreamedWeights
from compressor.checkpoint.load import load_model
from compressor.edit import backend, on_disk
from compressor.edit.backend import Backend, InMemory
from compressor.edit.checkpoint_edit import Edit, meta_model, plan_edit
from compressor.edit.layer_edits import (
    LiveWeights,
    NotOnDiskError,
    StoredWeights,
    carry_out,
    edit_layers,
    edited_meanwhile,
    finish,
)
from compressor.edit.on_disk import OnDisk
from compressor.edit.verify import random_batch
from compressor.errors import VerificationError
from compressor.machine.progress import Progress
from compressor.model.layer_weights import Ending
from compressor.model.skipping.rule import SkipRule
from compressor.observe import layerwise
from compressor.plugin import (
    Decision,
    LayerWeights,
    Method,
    MoEModel,
    OptionError,
    Options,
    Plan,
    Processes,
    RoutedTokens,
    Statistic,
    UnsupportedModelError,
)
from compressor.run.record import agreed
from compressor.testing.checks import kept_evenly, save
from compressor.testing.tiny import tiny_model

REPRESENTATIVES = (
    "mixtral", "qwen2_moe", "phimoe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "gpt_oss", "dbrx", "ernie4_5_moe",
    "gemma4", "jetmoe", "llama4_text", "longcat_flash", "minimax_m2", "switch_transformers", "zaya",
)  # fmt: skip
"""Those of tests/testing/test_every_architecture.py."""
ALWAYS = ("mixtral", "gpt_oss", "dbrx", "jetmoe", "switch_transformers")
"""One for each way in which experts' matrices stand in files."""


class NoOptions(Options):
    """None."""


class Blend(Method[NoOptions]):
    """The first expert that stays becomes a mixture with the one that goes, and half of its router row."""

    name = "blend"
    version = "1"
    options_type: ClassVar[type[Options]] = NoOptions

    def check(self, layers: Any) -> Plan:
        return Plan(layers, changes_values=True)

    def statistic(self, layer: Any) -> None:
        return None

    def decide(self, layers: Any, statistics: Any) -> Any:
        raise NotImplementedError

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        kept = decision["layers"][layer.path]["kept"]
        gone = next(expert for expert in range(layer.num_experts) if expert not in kept)
        first = layer.experts[kept[0]]
        for name, own in first.items():
            first[name] = 0.75 * own.double() + 0.25 * layer.experts[gone][name].double()
        for name, row in layer.router[kept[0]].items():
            layer.router[kept[0]][name] = row.double() * 0.5
        layer.keep(kept)


def decision_of(moe: MoEModel) -> Decision:
    kept = kept_evenly(moe)
    assert kept is not None
    return Decision({"layers": {path: {"kept": list(ids)} for path, ids in kept.items()}})


def edited_in_memory(folder: Path, method: Method[Any], output: Path) -> MoEModel:
    moe = MoEModel(load_model(Checkpoint("mine", folder)))
    with torch.no_grad():
        carry_out(method, moe, decision_of(moe))
    moe.config._name_or_path = str(folder)
    save(moe, output)
    return moe


def edited_on_disk(folder: Path, method: Method[Any], output: Path, values: Path) -> None:
    found = Checkpoint("mine", folder)
    before, after = meta_model(found), meta_model(found)
    weights = StreamedWeights(load_model(found, device="meta"), found)
    stored = StoredWeights(lambda: weights, values, is_quantised=False)
    endings, _ = edit_layers(method, decision_of(before), before.layers, stored)
    finish(after, method, decision_of(before), endings)
    output.mkdir()
    plan_edit(found, before, after, edited=stored.edited).write(output)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in sorted(folder.glob("*.safetensors")) for name, one in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [*ALWAYS, *(pytest.param(one, marks=pytest.mark.nightly) for one in REPRESENTATIVES if one not in ALWAYS)],
)
def test_an_edit_on_disk_leaves_what_it_leaves_in_memory(model_type: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model(model_type).save_pretrained(source)
    moe = edited_in_memory(source, Blend(NoOptions()), tmp_path / "memory")
    edited_on_disk(source, Blend(NoOptions()), tmp_path / "disk", tmp_path / "values")
    ours, theirs = tensors(tmp_path / "disk"), tensors(tmp_path / "memory")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    plain = MoEModel(load_model(Checkpoint("mine", source)))
    plain.keep(kept_evenly(plain))
    assert any(not torch.equal(one, plain.model.state_dict()[name]) for name, one in moe.model.state_dict().items())


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss"])
def test_in_half_precision_too(model_type: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model(model_type, dtype=torch.bfloat16).save_pretrained(source)
    edited_in_memory(source, Blend(NoOptions()), tmp_path / "memory")
    edited_on_disk(source, Blend(NoOptions()), tmp_path / "disk", tmp_path / "values")
    ours, theirs = tensors(tmp_path / "disk"), tensors(tmp_path / "memory")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


class Scripted(Blend):
    """An edit that a test writes down."""

    def __init__(self, script: Any) -> None:
        super().__init__(NoOptions())
        self.script = script

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        self.script(layer)


def carried_out(script: Any, *, dtype: torch.dtype = torch.float32, model_type: str = "mixtral") -> MoEModel:
    moe = MoEModel(tiny_model(model_type, dtype=dtype))
    carry_out(Scripted(script), moe, Decision({"layers": {layer.path: {} for layer in moe.layers}}))
    return moe


@pytest.mark.parametrize(
    ("model_type", "experts", "router"),
    [
        ("mixtral", {"experts.gate_up_proj", "experts.down_proj"}, {"gate.weight"}),
        ("switch_transformers", {"experts.*.wi.weight", "experts.*.wo.weight"}, {"router.classifier.weight"}),
        ("deepseek_v3", {"experts.gate_up_proj", "experts.down_proj"}, {"gate.weight", "gate.e_score_correction_bias"}),
    ],
)
def test_tensors_are_called_as_the_layer_calls_them(model_type: str, experts: set[str], router: set[str]) -> None:
    seen: list[tuple[set[str], set[str]]] = []

    def look(layer: LayerWeights) -> None:
        assert len(layer.experts) == len(layer.router) == layer.num_experts
        seen.append((set(layer.experts[0]), set(layer.router[0])))

    carried_out(look, model_type=model_type)
    assert all(one == (experts, router) for one in seen)


def test_views_are_the_model_s_own_memory() -> None:
    def double(layer: LayerWeights) -> None:
        layer.experts[3]["experts.down_proj"].mul_(2)
        layer.router[5]["gate.weight"] = torch.zeros_like(layer.router[5]["gate.weight"])

    before, after = tiny_model("mixtral").model.layers[0].mlp, carried_out(double).model.model.layers[0].mlp
    expected = before.experts.down_proj.detach().clone()
    expected[3] *= 2
    assert torch.equal(after.experts.down_proj, expected)
    assert after.gate.weight[5].abs().sum() == 0
    assert torch.equal(after.gate.weight[:5], before.gate.weight[:5])


def _nan(layer: LayerWeights) -> None:
    layer.experts[1]["experts.down_proj"][0, 0] = float("nan")


def _other_shape(layer: LayerWeights) -> None:
    own = layer.experts[1]["experts.down_proj"]
    layer.experts[1]["experts.down_proj"] = own[:1]


def _rounded_often(layer: LayerWeights) -> None:
    own = layer.experts[1]["experts.down_proj"]
    for _ in range(40):
        own.mul_(1.001)


def _other_top_k(layer: LayerWeights) -> None:
    layer.keep(range(6), top_k=1 if "0" in layer.path else 2)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (_nan, r"model\.layers\.0\.mlp: the edit wrote NaN or infinity into model\.layers\.0\.mlp\.experts\.down_proj"),
        (
            _other_shape,
            r"model\.layers\.0\.mlp: expert 1: experts\.down_proj is \[\d+, \d+\], and the edit wrote \[1, ",
        ),
        (_rounded_often, r"the edit loses precision: .*down_proj differs from the same edit in float32 by .* bfloat16"),
        (_other_top_k, r"keep\(\) was given other `top_k` or `padded` in other layers"),
        (lambda layer: None, r"the decision says of every layer that nothing changes"),
    ],
)
def test_what_an_edit_may_not_write(script: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        carried_out(script, dtype=torch.bfloat16)


def test_a_decision_of_other_layers() -> None:
    moe = MoEModel(tiny_model("mixtral"))
    with pytest.raises(
        OptionError, match=r"made for 1 MoE layers, the model has \d: .*: the model has no such MoE layer"
    ):
        carry_out(Scripted(_nan), moe, Decision({"layers": {"a.b": {}}}))


def test_a_layer_that_shares_its_weights_is_refused() -> None:
    moe = MoEModel(tiny_model("mixtral"))
    first, second = (layer.mlp for layer in list(moe.model.model.layers)[:2])
    second.experts.down_proj = first.experts.down_proj
    decision = Decision({"layers": {layer.path: {} for layer in moe.layers}})
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.mlp: its weights cannot be edited alone: model\.layers\.1"
    ):
        carry_out(Scripted(_nan), moe, decision)


def test_numbers_that_cannot_be_written_back_are_edited_in_memory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamedWeights, "as_stored", lambda *_: {})
    with pytest.raises(NotOnDiskError, match=r"is not stored as transformers would write it back.*`weights: memory`"):
        edited_on_disk(tiny_models.tiny_folder("mixtral"), Blend(NoOptions()), tmp_path / "out", tmp_path / "values")


def test_numbers_of_a_quantised_checkpoint_are_not_read() -> None:
    stored = StoredWeights(lambda: pytest.fail("weights were opened"), None, is_quantised=True)
    layer = MoEModel(tiny_model("mixtral")).layers[0]
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.mlp: the checkpoint is quantised, and its numbers cannot"
    ):
        stored.read(layer)


class Second(Processes):
    """The second of two processes, which has decided a little otherwise."""

    def exchange(self, value: Any) -> list[Any]:
        return [{"layers": {"a": {"kept": [0]}}}, value]

    def gather(self, figures: Any) -> list[Any]:
        return [{"a/share": torch.ones(2)}, figures]


def test_the_decision_of_several_processes_is_the_first_one_s_tensors_too() -> None:
    own = Decision({"layers": {"a": {"kept": [1]}}}, {"a": {"share": torch.zeros(2)}})
    found = agreed(own, Second())
    assert found == {"layers": {"a": {"kept": [0]}}}
    assert found.tensors["a"]["share"].tolist() == [1, 1]


def test_an_ending_survives_as_json() -> None:
    for ending in (
        Ending(),
        Ending((0, 2), 1, True, None, True),
        Ending(rule=SkipRule("ratio", True, beta=0.25)),
        Ending(rule=SkipRule("contribution", True, beta=0.25, expert_norms=(1.0, 2.0))),
    ):
        assert Ending.from_json(json.loads(json.dumps(ending.to_json()))) == ending


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_observed_as_if_layers_before_were_edited(model_type: str) -> None:
    """Against models of which those layers have been edited, each observed anew; and no number stays written."""
    moe, method = MoEModel(tiny_model(model_type).eval()), Blend(NoOptions())
    decision, before = decision_of(moe), copy.deepcopy(moe.model.state_dict())

    def edited(path: str, figures: Any) -> AbstractContextManager[None]:
        return edited_meanwhile(moe, method, decision, moe.layer(path))

    seen = inputs_of(moe, edited=edited)
    assert all(torch.equal(one, before[name]) for name, one in moe.model.state_dict().items())
    for number, layer in enumerate(moe.layers):
        other = MoEModel(copy.deepcopy(moe.model))
        first = other.layers[:number]
        if first:
            of_first = Decision({"layers": {one.path: decision["layers"][one.path] for one in first}})
            endings, _ = edit_layers(method, of_first, first, LiveWeights(other))
            finish(other, method, of_first, endings)
        torch.testing.assert_close(seen[layer.path], inputs_of(other)[layer.path], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(seen[layer.path], inputs_of(moe)[layer.path], rtol=1e-3)


class Inputs(Statistic):
    """What a layer is given."""

    def __init__(self) -> None:
        self.hidden: list[torch.Tensor] = []

    def update(self, tokens: RoutedTokens) -> None:
        self.hidden.append(tokens.hidden_TH.clone())

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"hidden": torch.cat(self.hidden)}


def inputs_of(moe: MoEModel, **options: Any) -> dict[str, torch.Tensor]:
    statistics = {layer.path: Inputs() for layer in moe.layers}
    figures = layerwise.observe(moe, [random_batch(moe.model)], statistics, Progress(), **options)
    return {path: of["hidden"] for path, of in figures.items()}


def test_what_runs_before_the_block_cannot_be_progressive() -> None:
    moe = MoEModel(tiny_model("mixtral").eval())

    def script(layer: LayerWeights) -> None:
        layer.linears["self_attn.q_proj.weight"] = layer.linears["self_attn.q_proj.weight"] * 2

    says = r"the edit writes model.layers.0.self_attn.q_proj.weight, which is outside the MoE block"
    edited = edited_meanwhile(moe, Scripted(script), decision_of(moe), moe.layers[0])
    with pytest.raises(OptionError, match=says), torch.no_grad(), edited:
        pass


# Without a preview, what is removed is compared with what is masked


@pytest.mark.parametrize("weights", ["memory", "disk"])
def test_another_expert_in_the_place_of_one_that_stays_is_found(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    found = Checkpoint("mine", tmp_path / "model")
    piece = piece_of(found, tmp_path, weights)
    decision = decision_of(piece.moe)
    probe = random_batch(load_model(found))
    checks = piece.edit(Blend(NoOptions()), decision, probe, "right")
    assert checks["edited_against_preview"] < checks["tolerance"]
    monkeypatch.setattr(backend, "finish", finished_with_another_matrix)
    monkeypatch.setattr(on_disk, "plan_edit", planned_with_another_matrix)
    piece = piece_of(found, tmp_path, weights)
    with pytest.raises(VerificationError, match="does not answer as decided"):
        piece.edit(Blend(NoOptions()), decision, probe, "wrong")


def piece_of(found: Checkpoint, folder: Path, weights: str) -> Backend:
    how: dict[str, Any] = {"progress": Progress(), "processes": Processes()}
    if weights == "memory":
        return InMemory(MoEModel(load_model(found)), found, **how)
    return OnDisk(found, folder / "work", device="cpu", journal=None, tokens_at_once=1000, **how)


def finished_with_another_matrix(moe: MoEModel, *others: Any) -> None:
    finish(moe, *others)
    down_proj = moe.model.get_submodule(moe.layers[0].experts).down_proj
    with torch.no_grad():
        down_proj[[0, 1]] = down_proj[[1, 0]]


def planned_with_another_matrix(found: Any, before: Any, after: Any, left_out: Any, edited: Any) -> Edit:
    first, second = (next(name for name in edited if name.endswith(end)) for end in ("w1.weight", "w3.weight"))
    return plan_edit(found, before, after, left_out, {**edited, first: edited[second], second: edited[first]})

"""Quantised checkpoints: observed as the numbers that their weights stand for, written as they are stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from edit.test_disk import (
    FORMATS,
    FP8,
    Tensors,
    assert_same,
    blocks_fp8,
    companions,
    mxfp4,
    shard_up,
    tensors_of,
    write_changed,
)
from safetensors.torch import load_file, save_file
from tiny_models import random_model, token_ids, write_token_file
from transformers import AutoModelForCausalLM

import compressor
from compressor import CheckpointError, RecipeError, UnsupportedModelError
from compressor.checkpoint.find import Checkpoint, load_config, read_config
from compressor.checkpoint.layerwise_weights import StreamedWeights
from compressor.checkpoint.load import load_model
from compressor.checkpoint.quantization import quantisation_of, quantiser, to_dequantise, without_quantisation
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe
from compressor.run import check
from compressor.run.pipeline import evaluate

Recipe = dict[str, Any]
NVFP4 = {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"strategy": "tensor_group"}}}}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and (name.endswith("_proj.weight") or ".experts." in name)


def linear_fp8(name: str, tensor: torch.Tensor) -> Tensors:
    """As the large FP8 checkpoints are: every linear layer in blocks with a scale each, but for head and router."""
    return blocks_fp8(name, tensor) if is_linear(name, tensor) else {name: tensor}


def packed(kind: str) -> tuple[Callable[[str, torch.Tensor], Tensors], Recipe]:
    """(what that package's own compressor makes of a weight, what config.json says of it)"""
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=8, symmetric=True)
    if kind == "float-quantized":
        weights = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compress = BaseCompressor.get_value_from_registry(kind).compress

    def change(name: str, tensor: torch.Tensor) -> Tensors:
        if not is_linear(name, tensor):
            return {name: tensor}
        groups = tensor.reshape(tensor.shape[0], -1, weights.group_size or tensor.shape[1])
        scale = groups.abs().amax(-1) / (7 if weights.num_bits == 4 else 448)
        new = compress({"weight": tensor, "weight_scale": scale}, scheme)
        return {name.removesuffix("weight") + leaf: value for leaf, value in new.items()}

    return change, {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }


def source_of(kind: str, folder: Path) -> Path:
    if kind == "mxfp4":
        model = random_model("gpt_oss", intermediate_size=32, num_hidden_layers=2)
        return write_changed(model, folder, mxfp4, quantization_config=MXFP4)
    if kind in ("pack-quantized", "float-quantized"):
        change, about = packed(kind)
        return write_changed(random_model("qwen3_moe", num_hidden_layers=2), folder, change, quantization_config=about)
    return write_changed(kind, folder, linear_fp8, quantization_config=FP8)


def dequantised(source: Path, folder: Path) -> Path:
    """The same model, stored as numbers: what transformers' own loader makes of it."""
    config = without_quantisation(load_config(Checkpoint(str(source), source)))
    raw = read_config(source)
    found = quantisation_of(raw)
    assert found is not None
    config = to_dequantise(config, found)
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
    plain = type(model)(without_quantisation(model.config))  # a model that was not loaded from a quantised checkpoint
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind → a checkpoint of it, to be read only."""
    return cache(lambda kind: source_of(kind, tmp_path_factory.mktemp("sources") / "source"))


KINDS = [
    *("mxfp4", "pack-quantized"),
    *(
        pytest.param(kind, marks=pytest.mark.nightly)
        for kind in ("mixtral", "qwen3_moe", "deepseek_v3", "float-quantized")
    ),
]


def recipe_for(source: Path, tmp_path: Path, **evaluate: Any) -> Recipe:
    tokens = write_token_file(tmp_path / "tokens.jsonl", token_ids(20, 24).tolist())
    return {
        "model": str(source),
        "calibration": {"batch_size": 4, "data": [{"tokens": str(tokens), "samples": 12}]},
        "passes": [{"expert_pruning": {"keep": 6}}],
        "evaluate": {"perplexity": [{"tokens": str(tokens), "samples": 8}], **evaluate},
        "output": str(tmp_path / "out"),
    }


def planned_for(recipe: Recipe) -> dict[str, Any]:
    plugins = load_plugins()
    loaded = load_recipe(recipe, methods=plugins.methods, criteria=plugins.criteria)
    return check.check(loaded, plugins.adapters).plan


@pytest.mark.parametrize("kind", KINDS)
def test_decided_and_measured_as_if_dequantised(kind: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = sources(kind)
    plain = dequantised(source, tmp_path / "plain")
    before = tensors_of(source)
    recipe = recipe_for(source, tmp_path)
    result = compressor.compress(recipe)
    expected = compressor.compress({**recipe, "model": str(plain)}, output=tmp_path / "expected")

    found, wanted = (load_file(tmp_path / one / "compressor/statistics.safetensors") for one in ("out", "expected"))
    assert_same(found, wanted)
    decisions = [result.record["passes"][0]["decision"], expected.record["passes"][0]["decision"]]
    assert decisions[0] == decisions[1]
    for side in ("before", "after"):
        ours, theirs = (one.record["evaluation"][side]["perplexity"] for one in (result, expected))
        assert ours == theirs

    after = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {tensor.dtype for tensor in before.values()}
    raw = read_config(tmp_path / "out")
    assert raw["quantization_config"] == read_config(source)["quantization_config"]
    again = dequantised(tmp_path / "out", tmp_path / "again")
    assert_same(tensors_of(again), tensors_of(tmp_path / "expected"))
    assert_same(tensors_of(source), before)


@pytest.mark.parametrize("kind", ["mxfp4", pytest.param("pack-quantized", marks=pytest.mark.nightly), *KINDS[2:]])
def test_the_plan_knows_the_bytes_of_the_files(kind: str, tmp_path: Path) -> None:
    recipe = recipe_for(shard_up(source_of(kind, tmp_path / "source")), tmp_path)
    planned = planned_for(recipe)
    result = compressor.compress(recipe)
    sides = [result.record["evaluation"][side] for side in ("before", "after")]
    assert [planned["bytes"]["before"], planned["bytes"]["after"]] == [side["bytes_on_disk"] for side in sides]
    for side, folder in zip(sides, ("source", "out"), strict=True):
        assert side["size"]["bytes"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path / folder).values())
    assert planned["needs"]["weights"] == "disk"
    assert planned["needs"]["bytes_read"] == planned["needs"]["readings"] * planned["bytes"]["before"]
    assert any("is quantised" in note and "edited as it is stored" in note for note in planned["notes"])


@pytest.mark.nightly
def test_two_passes_and_progressive(tmp_path: Path) -> None:
    source = source_of("mixtral", tmp_path / "source")
    recipe = recipe_for(source, tmp_path)
    recipe["passes"] = [{"expert_pruning": {"keep": 6, "progressive": True}}, {"expert_pruning": {"keep": 4}}]
    del recipe["evaluate"]
    plain = dequantised(source, tmp_path / "plain")
    result = compressor.compress(recipe)
    expected = compressor.compress({**recipe, "model": str(plain)}, output=tmp_path / "expected")
    decisions = [[done["decision"] for done in one.record["passes"]] for one in (result, expected)]
    assert decisions[0] == decisions[1]
    again = dequantised(tmp_path / "out", tmp_path / "again")
    assert_same(tensors_of(again), tensors_of(tmp_path / "expected"))


def test_layers_that_keep_different_numbers(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = sources("mixtral")
    recipe = recipe_for(source, tmp_path)
    recipe["passes"] = [{"expert_pruning": {"keep": {"0": 4, "1": 6, "2": 8}}}]
    plain = dequantised(source, tmp_path / "plain")
    result = compressor.compress(recipe)
    expected = compressor.compress({**recipe, "model": str(plain)}, output=tmp_path / "expected")
    assert result.record["passes"][0]["decision"] == expected.record["passes"][0]["decision"]
    after = [one.record["evaluation"]["after"]["perplexity"] for one in (result, expected)]
    assert after[0] == after[1]


def test_measured_alone(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = sources("mxfp4")
    recipe = recipe_for(source, tmp_path)
    found = evaluate(recipe, str(source))
    result = compressor.compress(recipe)
    assert found["evaluation"]["after"]["perplexity"] == result.record["evaluation"]["before"]["perplexity"]


def test_goes_on_after_a_stop(sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources("mixtral")
    recipe = recipe_for(source, tmp_path)
    del recipe["evaluate"]
    compressor.compress(recipe, output=tmp_path / "whole")
    load, calls = StreamedWeights.load, 0

    def stops(self: StreamedWeights, unit: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        load(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(StreamedWeights, "load", stops)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(recipe)
    compressor.compress(recipe, resume=True)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


# --- refused


def spoil(source: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


SCALE = "model.layers.1.block_sparse_moe.experts.3.w2.weight_scale_inv"


def test_damage_is_named(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources("mixtral"), tmp_path / "source"))
    spoil(source, lambda tensors: tensors[SCALE].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"model.layers.1.*holds .* NaN or infinite"):
        compressor.compress(recipe_for(source, tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(SCALE),
        lambda tensors: tensors.update({SCALE: torch.ones(3, 5)}),
        lambda tensors: tensors.pop(SCALE.replace("_scale_inv", "")),
    ],
    ids=["a scale is missing", "a scale of another shape", "a weight is missing"],
)
def test_what_does_not_fit_is_refused(
    change: Callable[[Tensors], object], sources: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(sources("mixtral"), tmp_path / "source"))
    spoil(source, change)
    with pytest.raises(CheckpointError, match=r"experts\.3\.w2|layers\.1"):
        compressor.compress(recipe_for(source, tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": "memory"}, r"weights: the checkpoint is quantised \(fp8\).*Leave `weights` out"),
        ({"passes": [{"dynamic_skipping": {}}]}, "nothing reads a quantised one that skips"),
        ({"dtype": "bfloat16"}, "dtype: the checkpoint is quantised"),
    ],
)
def test_what_needs_numbers_is_refused_before_work_starts(
    change: Recipe, says: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_for(sources("mixtral"), tmp_path) | change
    for act in (planned_for, compressor.compress):
        with pytest.raises(RecipeError, match=says):
            act(recipe)


@pytest.mark.parametrize(
    ("quantisation", "says"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, r"quantised \(gptq\).*--other-model"),
        ({"quant_method": "nobody_knows"}, r"quantised \(nobody_knows\).*--other-model"),
        ({"bits": 4}, "a format without a name"),
        (NVFP4, r"quantised \(compressed-tensors\).* experts in NVFP4 without their global scale.*--other-model"),
    ],
)
def test_other_formats_are_refused_by_name(quantisation: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        quantiser(quantisation, "somebody/model")


def test_experts_in_nvfp4_are_not_measured_by_wrong_numbers(tmp_path: Path) -> None:
    """transformers would load them thousands of times too large; what it reads right, a dense model, it may load."""
    change = companions(*FORMATS["nvfp4-pack-quantized"])
    source = write_changed("mixtral", tmp_path / "source", change, quantization_config=NVFP4)
    with pytest.raises(UnsupportedModelError, match="experts in NVFP4 without their global scale"):
        load_model(Checkpoint(str(source), source))


def test_where_the_config_says_so() -> None:
    assert quantisation_of({"quantization_config": FP8}) == FP8
    assert quantisation_of({"text_config": {"quantization_config": FP8}}) == FP8
    assert quantisation_of({"text_config": {}, "quantization_config": None}) is None


def test_plain_transformers_loads_the_result(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = sources("mxfp4")
    compressor.compress(recipe_for(source, tmp_path))
    model, _ = compressor.load(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = token_ids(2, 12, seed=3)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain.eval()(ids).logits, atol=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_text())["num_local_experts"] == 6

"""A recipe checked for a machine that is not this one: what the largest models need on a node of eight GPUs.

Published of each model: the config.json's fields that say what is built, and the numbers of parameters, in all and of
those that a token uses. Kimi-K2's own config says `kimi_k2`, whose code comes with it and is DeepSeek-V3's; here it
says `deepseek_v3`, which transformers builds by itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model, write_checkpoint, write_token_file

from compressor import RecipeError
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe
from compressor.run import check
from compressor.run.elsewhere import HERE, Machine

CONFIGS = Path(__file__).parents[1] / "cases" / "configs"
NODE = ["memory=250GB", "device_memory=141GB", "disk=8TB"]
SAMPLES, LENGTH = 8, 512

LARGEST = {
    # parameters as built (DeepSeek-V3 without its extra prediction layer), billions of them that a token uses as
    # published, bytes of the largest layer in bfloat16
    "Qwen/Qwen3-235B-A22B": (235_093_634_560, 22, 4_975_510_016),
    "deepseek-ai/DeepSeek-V3": (671_026_404_352, 37, 23_014_572_544),
    "moonshotai/Kimi-K2-Instruct": (1_026_408_209_408, 32, 34_118_730_496),
}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_token_file(tmp_path / "tokens.jsonl", [[1] * LENGTH] * SAMPLES)


def recipe_of(folder: Path, tokens: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(folder),
        "output": "/nowhere/that/is/here",
        "device": "auto",
        "calibration": {"data": [{"tokens": str(tokens)}]},
        "passes": [{"expert_pruning": {"keep": 64, "criterion": "reap"}}],
        **changes,
    }


def checked(recipe: dict[str, Any], machine: Machine, budgets: list[str] = NODE) -> Any:
    plugins = load_plugins()
    loaded = load_recipe(recipe, methods=plugins.methods, criteria=plugins.criteria, overrides=budgets)
    return check.check(loaded, plugins.adapters, machine=machine)


@pytest.mark.parametrize(
    "model",
    ["Qwen/Qwen3-235B-A22B", *(pytest.param(one, marks=pytest.mark.nightly) for one in [*LARGEST][1:])],
)
def test_what_the_largest_need_on_a_node_of_eight_gpus(model: str, tmp_path: Path, tokens: Path) -> None:
    parameters, billions, largest = LARGEST[model]
    shutil.copy(CONFIGS / f"{model.replace('/', '--')}.json", tmp_path / "config.json")
    preview = checked(recipe_of(tmp_path, tokens), Machine(8, tflops=400, disk_speed=3000))
    plan, needs = preview.plan, preview.plan["needs"]
    assert plan["parameters"]["before"] == parameters
    assert plan["bytes"]["before"] == pytest.approx(2 * parameters, rel=1e-6)
    assert needs["largest_layer"] == largest
    embedding = json.loads((tmp_path / "config.json").read_text())
    embedding = embedding["vocab_size"] * embedding["hidden_size"]
    assert round((needs["parameters_at_work"] + embedding) / 1e9) == pytest.approx(billions, abs=1)
    assert (preview.place.weights, preview.devices) == ("disk", ("cuda:0",))
    assert needs["tokens"] == SAMPLES * LENGTH
    assert needs["flop"] == 2 * needs["tokens"] * needs["parameters_at_work"]
    assert needs["seconds"]["computing"] == pytest.approx(needs["flop"] / 400e12)
    assert needs["seconds"]["disk"] == pytest.approx((needs["bytes_read"] + needs["disk"]) / 3e9)
    assert 2 * largest < needs["device_memory"] < (80e9 if largest < 30e9 else 90e9)
    assert any(note.startswith("device auto: cuda:0 of 8 GPU(s), weights are read from disk") for note in plan["notes"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tiny_model("mixtral"), tmp_path_factory.mktemp("elsewhere") / "model")


@pytest.fixture
def cheap(model: Path, tmp_path: Path) -> dict[str, Any]:
    text = write_token_file(tmp_path / "few.jsonl", [[1] * 16] * 4)
    return recipe_of(model, text, passes=[{"expert_pruning": {"keep": 6, "criterion": "reap"}}])


def test_as_many_gpus_as_hold_it(cheap: dict[str, Any]) -> None:
    alone = checked(cheap, Machine(8))
    needed = alone.plan["needs"]["device_memory"]
    assert alone.devices == ("cuda:0",)
    two = checked(cheap | {"weights": "memory"}, Machine(8), [*NODE, f"device_memory={needed - 1}"])
    assert two.devices == ("cuda:0", "cuda:1")
    assert "cuda:0, cuda:1 of 8 GPU(s), all weights there, each" in str(two.plan["notes"])


def test_tokens_of_all_that_goes_through_the_model(cheap: dict[str, Any]) -> None:
    def found(**changes: Any) -> int:
        return int(checked(cheap | changes, Machine(0)).plan["needs"]["tokens"])

    assert found() == 64
    assert found(evaluate={"perplexity": cheap["calibration"]["data"]}) == 64 + 2 * 64
    assert found(evaluate={"perplexity": cheap["calibration"]["data"], "random": 3}) == 64 + 5 * 64
    assert found(passes=[{"expert_pruning": {"keep": 6, "progressive": True}}]) == 2 * 64
    assert found(passes=[{"expert_pruning": {"keep": {"mean": 6}}}]) > 64
    # two passes, the second again alone; measured before, after, and behind each alone
    two = [{"expert_pruning": {"keep": keep, "criterion": "reap"}} for keep in (6, 5)]
    measured = {"perplexity": cheap["calibration"]["data"], "each_pass": True}
    assert found(passes=two, evaluate=measured) == 3 * 64 + 4 * 64


def test_an_embedding_that_is_the_head_too_is_at_work(cheap: dict[str, Any], model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    found = []
    for is_tied in (False, True):
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": is_tied}))
        plan = checked(cheap | {"model": str(tmp_path)}, Machine(0)).plan
        found.append((plan["parameters"]["before"], plan["needs"]["parameters_at_work"]))
    assert found[0][0] - found[1][0] == config["vocab_size"] * config["hidden_size"]
    assert found[0][1] == found[1][1]


def test_what_another_machine_has_must_be_said(cheap: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"another machine is meant: say what it has, with --disk, --device-memory$"):
        checked(cheap, Machine(8), ["memory=1TB"])
    with pytest.raises(RecipeError, match=r"say what it has, with --memory, --disk$"):
        checked(cheap, Machine(0), [])
    without = checked(cheap, Machine(0), ["memory=1TB", "disk=1TB"])
    assert "device auto: a machine without GPUs is meant, so the CPU computes" in without.plan["notes"]
    assert without.plan["needs"]["seconds"] == {}
    with pytest.raises(RecipeError, match=r"disk: about \S+ kB of disk are needed .*, 10\.0 kB are"):
        checked(cheap, Machine(8), ["memory=1TB", "device_memory=80GB", "disk=10kB"])


def test_a_gpu_there_need_not_be_here(cheap: dict[str, Any]) -> None:
    recipe = cheap | {"device": "cuda"}
    assert checked(recipe, Machine(8)).devices == ("cuda",)
    for device, number in (("cuda", 0), ("cuda:8", 8)):
        with pytest.raises(RecipeError, match=f"device: found '{device}', and by --gpus there are {number}$"):
            checked(cheap | {"device": device}, Machine(number))
    with pytest.raises(RecipeError, match="device: 'cuda' cannot be used"):
        checked(recipe, HERE)


def test_bytes_of_a_quantised_checkpoint_that_is_not_here(tmp_path: Path, tokens: Path) -> None:
    """Its index says them; the config alone knows the numbers that they stand for."""
    config = json.loads((CONFIGS / "deepseek-ai--DeepSeek-V3.json").read_text())
    small = {"num_hidden_layers": 4, "hidden_size": 256, "n_routed_experts": 64, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config | small | {"moe_intermediate_size": 128}))
    recipe = recipe_of(tmp_path, tokens, passes=[{"expert_pruning": {"keep": 32, "criterion": "reap"}}])
    plain = checked(recipe, Machine(8)).plan["bytes"]
    index = {"metadata": {"total_size": plain["before"] // 2}, "weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = checked(recipe, Machine(8)).plan
    assert found["bytes"] == {"before": plain["before"] // 2, "after": pytest.approx(plain["after"] / 2, rel=1e-6)}
    assert found["needs"]["bytes_read"] == found["needs"]["readings"] * found["bytes"]["before"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index | {"metadata": None}))
    assert checked(recipe, Machine(8)).plan["bytes"] == plain


def test_on_the_command_line(cli: Callable[..., Any], cheap: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(cheap))
    budgets = ("--memory", "1TB", "--device-memory", "80GB", "--disk", "1TB")
    answer = cli("check", path, "--gpus", 8, *budgets, "--tflops", 400, "--disk-speed", 3000)
    assert answer.status == 0, answer.err
    assert "computing" in answer.out
    assert " TFLOP, 2 for each of " in answer.out
    assert "reading and writing" in answer.out
    answer = cli("check", path, "--gpus", 8)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith(f"error: {path}:1:1: with --gpus another machine is meant: say what it has, with --me")
    for option, value in (("--gpus", "-1"), ("--tflops", "0"), ("--disk-speed", "fast")):
        answer = cli("check", path, option, value)
        assert answer.status == 2
        assert option in answer.err
        assert "Traceback" not in answer.err

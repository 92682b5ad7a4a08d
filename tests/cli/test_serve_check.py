"""`compressor serve-check`, `serve:` in a recipe, and what check, inspect and the record say of engines: on tiny
folders and on the published configs of the models that recipes name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_folder, word_tokenizer

import compressor
from compressor.errors import CheckpointError, RecipeError

Cli = Callable[..., Any]
Refused = Callable[..., str]
WriteRecipe = Callable[..., Path]
CopyOf = Callable[[Path], Path]
CONFIGS = Path(__file__).parents[1] / "cases" / "configs"
ENGINES = ["transformers", "vllm", "sglang", "llama.cpp", "mlx"]


def said(found: Any) -> dict[str, str]:
    """Engine → its answer, of a plan, an inspection, a record or `serve_check`."""
    return {one["engine"]: one["answer"] for one in found["serving"]}


def with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_a_folder_is_checked(cli: Cli, mixtral: Path) -> None:
    answer = cli("serve-check", mixtral)
    assert (answer.status, answer.err) == (0, "")
    assert "Where it can be served" in answer.out
    rows = [line.split()[:2] for line in answer.out.splitlines() if line.split()[:1] and line.split()[0] in ENGINES]
    assert rows == [[engine, "yes"] for engine in ENGINES]
    found = json.loads(cli("serve-check", mixtral, "--json").out)
    assert found == compressor.serve_check(mixtral)
    assert said(found) == said(compressor.inspect(str(mixtral))) == dict.fromkeys(ENGINES, "yes")
    assert {rule["date"][:4] for one in found["serving"] for rule in one["rules"]} == {"2026"}


def test_the_table_fits_into_eighty_columns(cli: Cli, mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli("serve-check", mixtral, "--tensor-parallel", "4").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("vllm          no") for line in lines)


def test_the_status_tells_of_the_engine_asked_for(cli: Cli, mixtral: Path) -> None:
    """Two attention heads: two devices can share them, four cannot."""
    two = cli("serve-check", mixtral, "--engine", "vllm", "--tensor-parallel", "2")
    four = cli("serve-check", mixtral, "--engine", "vllm", "--tensor-parallel", "4")
    assert (two.status, four.status) == (0, 2)
    assert "2 attention heads cannot be shared out over tensor_parallel 4" in four.out
    assert "sglang" not in four.out
    assert cli("serve-check", mixtral, "--tensor-parallel", "4").status == 0


def test_what_cannot_be_asked_is_refused(refused: Refused, mixtral: Path, dense: Path, tmp_path: Path) -> None:
    engines = "expected 'transformers', 'vllm', 'sglang', 'llama.cpp' or 'mlx'"
    refused("serve-check", mixtral, "--engine", "ollama", says=f"engine: found 'ollama', {engines}")
    for degree in ("tensor", "expert"):
        refused("serve-check", mixtral, f"--{degree}-parallel", "-1", says=f"{degree}_parallel: found -1, expected a")
    refused("serve-check", mixtral, "--engine", "mlx", "--tensor-parallel", "2", says="no rule of mlx asks for it")
    refused("serve-check", dense, says="no routed experts found")
    (tmp_path / "empty").mkdir()
    refused("serve-check", tmp_path / "empty", says="no config.json, so this is no checkpoint")
    refused("serve-check", tmp_path / "nowhere", says="there is no such folder")
    with pytest.raises(RecipeError, match="engine: found 'ollama'"):
        compressor.serve_check(mixtral, "ollama")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        compressor.serve_check(tmp_path / "empty")


def test_folders_whose_layers_differ_or_hold_constants(mixtral: Path, copy_of: CopyOf) -> None:
    """No weight is read, so what config.json says is enough."""
    folder = copy_of(mixtral)
    counts = {"model.layers.0.mlp": 8, "model.layers.1.mlp": 5}
    (folder / "model.safetensors").unlink()
    with_config(folder, compressor={"format": 1, "num_experts": counts})
    found = compressor.serve_check(folder)
    assert said(found) == dict.fromkeys(ENGINES, "no")
    assert found["serving"][0]["nearest"] == [6]
    with_config(folder, compressor=None, approximate_experts={"1": [0, 3]})
    assert said(compressor.serve_check(folder)) == dict.fromkeys(ENGINES, "no") | {"vllm": "yes"}
    assert said(compressor.serve_check(folder, "vllm", expert_parallel=2)) == {"vllm": "no"}


def test_quantised_folders(mixtral: Path, copy_of: CopyOf) -> None:
    folder = copy_of(mixtral)
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    with_config(folder, quantization_config=packed)
    assert said(compressor.serve_check(folder)) == dict.fromkeys(ENGINES, "yes") | {"mlx": "unknown"}
    with_config(folder, quantization_config=packed | {"format": "nvfp4-pack-quantized"})
    assert said(compressor.serve_check(folder)) == dict.fromkeys(ENGINES, "yes") | {"transformers": "no"}


def test_groups_and_a_selection_bias(tmp_path: Path) -> None:
    """Six of eight experts in two groups: SGLang's fused gate is for powers of two. A bias alone does the same;
    transformers writes no `rope_theta`, by which mlx-lm builds this one.
    """
    for name, why, mlx in (("deepseek_v3", "in 2 groups", "yes"), ("glm4_moe", "with a selection bias", "no")):
        shutil.copytree(tiny_folder(name), tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        folder = with_config(tmp_path / name, n_routed_experts=6)
        found = compressor.serve_check(folder)
        assert said(found) == dict.fromkeys(ENGINES, "yes") | {"mlx": mlx}
        assert f"6 experts {why} take the slow path" in found["serving"][2]["rules"][1]["says"]
        assert found["serving"][2]["nearest"] == [4]


def test_a_recipe_is_refused_before_anything_is_read(refused: Refused, recipe: WriteRecipe) -> None:
    """Even text that is not there is not looked at."""
    path = recipe(serve={"engine": "sglang", "expert_parallel": 4})
    message = refused(
        "check", "--quiet", path, says="serve: sglang will not run the result: 6 experts cannot be shared"
    )
    assert message.strip().endswith("over expert_parallel 4; what passes: 4 and 8")
    assert refused("run", "--quiet", path, says="") == message
    uneven = recipe(passes=[{"expert_pruning": {"keep": {0: 6, 1: 4}}}], serve={"engine": "mlx"})
    refused("check", "--quiet", uneven, says="mlx will not run the result: one number of experts for all layers; what")
    mean = recipe(passes=[{"expert_pruning": {"keep": {"mean": 6}}}], serve={"engine": "llama.cpp"})
    refused("check", "--quiet", mean, says="a GGUF file says one number of experts for all layers")


def test_serve_is_strict(refused: Refused, recipe: WriteRecipe) -> None:
    for serve, says in (
        ({"engine": "tgi"}, "serve.engine: found 'tgi', expected 'transformers', 'vllm'"),
        ({"engine": "vllm", "tensor_parallel": 0}, "serve.tensor_parallel: found 0, expected a number of at least 1"),
        ({"engine": "vllm", "tensor_parallel": "8"}, "serve.tensor_parallel: found '8'"),
        ({"engine": "vllm", "devices": 8}, "serve.devices: unknown key. Known keys: engine, tensor_parallel, expert"),
        ({"engine": "mlx", "expert_parallel": 2}, "expert_parallel would have no effect: no rule of mlx asks for it"),
        ({}, "serve.engine"),
    ):
        refused("check", "--quiet", recipe(serve=serve), says=says)


def plan_of(cli: Cli, path: Path) -> dict[str, Any]:
    found = cli("check", path, "--json")
    assert found.status == 0, found.err
    return json.loads(found.out)  # type: ignore[no-any-return]


def test_what_is_not_known_is_said(cli: Cli, recipe: WriteRecipe) -> None:
    """A bare mean lets the run decide whether experts answer constants, which vLLM alone reads."""
    plan = plan_of(cli, recipe(passes=[{"expert_pruning": {"keep": {"mean": 6}}}], serve={"engine": "vllm"}))
    assert said(plan) == dict.fromkeys(ENGINES, "no") | {"vllm": "unknown"}
    notes = [note for note in plan["notes"] if note.startswith(("serve: ", "what an even split"))]
    assert [note[:60] for note in notes] == [
        "what an even split would lose, which every engine reads, is ",
        "serve: whether vllm will run the result is not known: not kn",
    ]
    even = {"mean": 6, "share": "even"}
    plan = plan_of(cli, recipe(passes=[{"expert_pruning": {"keep": {"mean": 6}, "share": "even"}}]))
    assert said(plan) == dict.fromkeys(ENGINES, "yes"), even


def test_a_run_records_what_it_has_written(cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    """As a check of the folder says, and as card, page and terminal show."""
    uneven = [{"expert_pruning": {"keep": {0: 6, 1: 4}, "criterion": "frequency"}}]
    path = recipe(passes=uneven, serve={"engine": "transformers"})
    assert cli("run", path).status == 2
    answer = cli("run", recipe(passes=uneven, output=tmp_path / "uneven"))
    assert answer.status == 0, answer.err
    record = json.loads((tmp_path / "uneven/compressor/record.json").read_text())
    assert record["serving"] == compressor.serve_check(tmp_path / "uneven")["serving"]
    assert said(record) == dict.fromkeys(ENGINES, "no")
    assert record["serving"][0]["nearest"] == [5]
    for shown in (
        answer.out,
        *((tmp_path / "uneven" / one).read_text() for one in ("README.md", "compressor/report.html")),
    ):
        assert "Where it can be served" in shown
    decision = tmp_path / "uneven/compressor/decision.json"
    assert cli("apply", decision, record["recipe"]["model"], "--output", tmp_path / "applied").status == 0
    applied = json.loads((tmp_path / "applied/compressor/record.json").read_text())
    assert said(applied) == dict.fromkeys(ENGINES, "no")


def test_constants_are_recorded(cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    constants = [{"expert_pruning": {"keep": 6, "replace": "constants"}}]
    answer = cli("run", "--quiet", recipe(passes=constants, serve={"engine": "vllm"}))
    assert answer.status == 0, answer.err
    record = json.loads((tmp_path / "out/compressor/record.json").read_text())
    assert record["serving"] == compressor.serve_check(tmp_path / "out")["serving"]
    assert said(record) == dict.fromkeys(ENGINES, "no") | {"vllm": "yes"}


REAL = {
    "mistralai/Mixtral-8x7B-v0.1": ("yes", "yes"),
    "Qwen/Qwen3-30B-A3B": ("yes", "yes"),
    "deepseek-ai/DeepSeek-V2-Lite": ("yes", "yes"),
    "zai-org/GLM-4.5-Air": ("yes", "yes"),
    "openai/gpt-oss-20b": ("yes", "yes"),
    "allenai/OLMoE-1B-7B-0924": ("yes", "yes"),
}
"""vLLM's and llama.cpp's answers."""


@pytest.mark.parametrize(
    "model", [pytest.param(one, marks=() if "gpt-oss" in one else pytest.mark.nightly) for one in REAL]
)
def test_models_as_published(model: str, tmp_path: Path) -> None:
    """Eight devices share the heads of each; five do not."""
    shutil.copy(CONFIGS / f"{model.replace('/', '--')}.json", tmp_path / "config.json")
    word_tokenizer(["</s>", "w1"], unknown="w1").save_pretrained(tmp_path)
    found = said(compressor.serve_check(tmp_path, tensor_parallel=8))
    assert (found["vllm"], found["llama.cpp"]) == REAL[model]
    assert said(compressor.serve_check(tmp_path, "vllm", tensor_parallel=5)) == {"vllm": "no"}

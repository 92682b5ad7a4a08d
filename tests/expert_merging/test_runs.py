"""Whole runs that merge experts: in memory, from disk, interrupted, between other passes, applied; refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder, token_ids, write_token_file
from weight_runs import files, recipe, stopped_and_whole

import compressor
from compressor import RecipeError
from compressor.checkpoint.resume_state import Journal
from compressor.run.apply import apply

PASSES = ({"expert_pruning": {"keep": 7}}, {"expert_merging": {"keep": 5}}, {"dynamic_skipping": {}})


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_token_file(tmp_path / "tokens.jsonl", token_ids(30, 24).tolist())


def test_in_memory_from_disk_and_applied_are_the_same_bytes(tokens: Path, tmp_path: Path) -> None:
    memory = compressor.compress(recipe(tokens, *PASSES, weights="memory"), output=tmp_path / "memory")
    compressor.compress(recipe(tokens, *PASSES, weights="disk"), output=tmp_path / "disk")
    assert files(tmp_path / "memory") == files(tmp_path / "disk")
    apply(tmp_path / "disk" / "compressor" / "decision.json", str(tiny_folder("mixtral")), tmp_path / "applied")
    assert files(tmp_path / "applied")["model.safetensors"] == files(tmp_path / "memory")["model.safetensors"]
    merging = memory.record["passes"][1]
    assert merging["checks"]["edited_against_float32"] == 0
    for path, layer in merging["decision"]["layers"].items():
        assert merging["tensors"][path] == {"share": [7]}
        assert sorted(one for members in layer["clusters"] for one in members) == list(range(7))


def test_the_numbers_are_the_clusters_averages(tokens: Path, tmp_path: Path) -> None:
    result = compressor.compress(recipe(tokens, PASSES[1]), output=tmp_path / "out")
    decision = result.record["passes"][0]["decision"]["layers"]
    share = load_file(tmp_path / "out" / "compressor" / "decision.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder("mixtral"), tmp_path / "out"))
    for path, layer in decision.items():
        disk = path.replace(".mlp", ".block_sparse_moe")
        assert torch.equal(after[f"{disk}.gate.weight"], before[f"{disk}.gate.weight"][layer["kept"]])
        for new, members in enumerate(layer["clusters"]):
            for name in ("w1", "w2", "w3"):
                parts = [before[f"{disk}.experts.{one}.{name}.weight"].double() for one in members]
                weights = share[f"0/{path}/share"][members]
                expected = sum(part * weight for part, weight in zip(parts, weights, strict=True)).float()
                torch.testing.assert_close(after[f"{disk}.experts.{new}.{name}.weight"], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("weights", "stopped_at"),
    [
        ("memory", "perplexity after"),
        pytest.param("disk", "edited 1.expert_merging", marks=pytest.mark.nightly),
        pytest.param("disk", "edited 0.expert_pruning", marks=pytest.mark.nightly),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bytes(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, stopped_at: str
) -> None:
    settings = {"weights": weights, "evaluate": {"perplexity": [{"tokens": str(tokens), "samples": 8}]}}

    def is_last(name: str) -> bool:
        return name == stopped_at or weights == "memory"

    run = recipe(tokens, *PASSES, **settings)
    found, whole = stopped_and_whole(run, tmp_path, monkeypatch, (Journal, "note"), is_last)
    assert found == whole


def test_decided_again_and_applied(tokens: Path, tmp_path: Path) -> None:
    compressor.compress(recipe(tokens, PASSES[1]), output=tmp_path / "out")
    statistics = tmp_path / "out" / "compressor" / "statistics.safetensors"
    decided = compressor.decide(statistics, "expert_merging", output=tmp_path / "six.json", keep=6, weights="uniform")
    assert (tmp_path / "six.safetensors").exists()
    for name, decision in (("file", tmp_path / "six.json"), ("mapping", decided)):
        apply(decision, str(tiny_folder("mixtral")), tmp_path / name)
    whole = compressor.compress(
        recipe(tokens, {"expert_merging": {"keep": 6, "weights": "uniform"}}), output=tmp_path / "six"
    )
    assert whole.record["passes"][0]["decision"] == decided["passes"][0]["decision"]
    for name in ("file", "mapping"):
        found = (tmp_path / name / "model.safetensors").read_bytes()
        assert found == (tmp_path / "six" / "model.safetensors").read_bytes()


def test_figures_of_several_texts_are_not_added_up(tmp_path: Path) -> None:
    found = []
    for seed in (1, 2):
        text = write_token_file(tmp_path / f"{seed}.jsonl", token_ids(8, 16, seed=seed).tolist())
        given = recipe(text, {"expert_merging": {"keep": 6}})
        given["calibration"]["data"] = [{"tokens": str(text)}]
        compressor.compress(given, output=tmp_path / f"out-{seed}")
        found.append(tmp_path / f"out-{seed}" / "compressor" / "statistics.safetensors")
    with pytest.raises(RecipeError, match=r"'chosen' of several files cannot be added up; decide by one of them\."):
        compressor.decide(found, "expert_merging", keep=6)


def _missing(path: Path) -> None:
    path.unlink()


def _of_another_layer(path: Path) -> None:
    save_file({name.replace("layers.0", "layers.9"): one for name, one in load_file(path).items()}, path)


def _of_another_shape(path: Path) -> None:
    save_file({name: one[:-1].clone() for name, one in load_file(path).items()}, path)


def _not_finite(path: Path) -> None:
    save_file({name: one.float().fill_(torch.nan) for name, one in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_not_finite, r"passes\.0: the tensor share of model\.layers\.0\.mlp holds NaN or infinity"),
        (_missing, r"passes\.0 has tensors, and .*decision\.safetensors is not there"),
        (_of_another_layer, r"passes\.0: the tensor share of model\.layers\.0\.mlp should have the shape \[8\], found"),
        (_of_another_shape, r"passes\.0: the tensor share of .* should have the shape \[8\], found \[7\]"),
    ],
)
def test_tensors_that_do_not_belong_to_the_decision(tokens: Path, tmp_path: Path, damage: Any, says: str) -> None:
    compressor.compress(recipe(tokens, PASSES[1]), output=tmp_path / "out")
    decision = tmp_path / "out" / "compressor" / "decision.json"
    damage(decision.with_suffix(".safetensors"))
    with pytest.raises(RecipeError, match=says):
        apply(decision, str(tiny_folder("mixtral")), tmp_path / "applied")
    assert not (tmp_path / "applied").exists()


def test_a_quantised_checkpoint_is_refused_by_check(tokens: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_folder("mixtral"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (model / "config.json").write_text(json.dumps(config))
    says = r"passes\[0\]\.expert_merging: expert_merging changes numbers of experts, and the checkpoint is quantised"
    with pytest.raises(RecipeError, match=says):
        compressor.compress(recipe(tokens, PASSES[1], model=model), output=tmp_path / "out")

"""Experts that another tool has chosen: checked, removed and applied without text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import small_mixtral, tiny_folder, token_ids, write_token_file

import compressor
from compressor import CheckpointError, MoEModel, RecipeError
from compressor.testing import check_method

KEPT = {"model.layers.0.mlp": [0, 1, 3, 4, 6, 7], "model.layers.1.mlp": [1, 2, 3, 4]}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    small_mixtral().save_pretrained(tmp_path / "model")
    (tmp_path / "ids.json").write_text(
        json.dumps({"model": "hub/model", "kept": {"0": KEPT["model.layers.0.mlp"], "1": [4, 3, 2, 1]}})
    )
    passes = [{"kept_experts": {"file": str(tmp_path / "ids.json")}}]
    return {"model": str(tmp_path / "model"), "passes": passes, "output": str(tmp_path / "out")}


def test_a_run_without_text(recipe: dict[str, Any], tmp_path: Path) -> None:
    plan = compressor.check(recipe).plan
    assert [layer["kept"] for layer in plan["layers"]] == [6, 4], plan["layers"]
    assert "ids.json: ids that stay, layers by number" in json.dumps(plan)
    record = compressor.compress(recipe).record
    assert {path: one["kept"] for path, one in record["passes"][0]["decision"]["layers"].items()} == KEPT
    expected = small_mixtral().eval()
    MoEModel(expected).keep(KEPT)
    ids = token_ids(2, 12)
    smaller, _ = compressor.load(str(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(smaller(ids).logits, expected(ids).logits)
    (tmp_path / "ids.json").unlink()  # the decision says it all
    again = compressor.apply(tmp_path / "out" / "compressor" / "decision.json", recipe["model"], tmp_path / "again")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == other
    assert again.record["passes"][0]["decision"] == record["passes"][0]["decision"]


def test_another_file_is_another_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    record = compressor.compress(recipe).record
    file = tmp_path / "ids.json"
    assert record["passes"][0]["options"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert compressor.compress(recipe, resume=True).record == record  # done already
    file.write_text(file.read_text().replace("[0, 1,", "[0, 2,"))
    with pytest.raises(CheckpointError, match="out exists already"):
        compressor.compress(recipe, resume=True)
    with pytest.raises(RecipeError, match=r"ids.json: its SHA-256 is \w+, and not \w+, as `sha256` has it"):
        compressor.compress({**recipe, "passes": record["recipe"]["passes"]}, output=tmp_path / "again")


def test_random_experts_to_compare_with(recipe: dict[str, Any], tmp_path: Path) -> None:
    tokens = write_token_file(tmp_path / "tokens.jsonl", token_ids(4, 12).tolist())
    recipe["evaluate"] = {"perplexity": [{"tokens": str(tokens)}], "random": 1}
    recipe["calibration"] = {"data": [{"tokens": str(tokens)}]}
    record = compressor.compress(recipe).record
    assert len(record["passes"][0]["random"]["kl"]["tokens"]["random"]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "hub/other"}, r"passes\[0\]\.kept_experts\.file: .*ids.json: it says that it is of hub/other"),
        ({"kept": {"0": [0, 1]}}, "it names the layers 0, and the MoE layers are 0, 1"),
    ],
)
def test_a_file_of_another_model(recipe: dict[str, Any], tmp_path: Path, changes: Any, message: str) -> None:
    file = tmp_path / "ids.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(RecipeError, match=message):
        compressor.check(recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_what_every_method_must_pass(tmp_path: Path) -> None:
    """On routers with groups as well as without; ids that are also there behind a pass that leaves six."""
    for name, counts in (("mixtral", [4, 1, 3, 2, 0, 0, 0, 0]), ("deepseek_v3", [4, 1, 0, 0, 3, 2, 0, 0])):
        layers = len(MoEModel(compressor.load(str(tiny_folder(name)))[0]).layers)
        (tmp_path / "counts.json").write_text(json.dumps({"logical_count": [counts] * layers}))
        if name == "mixtral":
            (tmp_path / "ids.json").write_text(json.dumps([[0, 2, 3, 4]] * layers))
            check_method("kept_experts", {"file": str(tmp_path / "ids.json")})
        record = compressor.compress(
            {
                "model": str(tiny_folder(name)),
                "passes": [{"kept_experts": {"counts": str(tmp_path / "counts.json"), "keep": 4}}],
            }
        ).record
        wanted = [0, 1, 2, 3] if name == "mixtral" else [0, 1, 4, 5]
        assert {tuple(one["kept"]) for one in record["passes"][0]["decision"]["layers"].values()} == {tuple(wanted)}

"""`compressor.compress` as people call it: live models without a name, and names where a model is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import small_mixtral
from transformers import AutoModelForCausalLM

import compressor
from compressor.report.card import model_card


def recipe(tokens: Path, **changes: Any) -> dict[str, Any]:
    data = [{"tokens": str(tokens), "samples": 2}]
    return {"calibration": {"data": data}, "passes": [{"expert_pruning": {"keep": 6}}], **changes}


def test_a_name_is_no_live_model(mixtral: Path, tokens: Path) -> None:
    says = r"^model: found the name '.*mixtral', expected a live model; a hub id or folder is a model_reference"
    for name in (mixtral, str(mixtral)):
        with pytest.raises(compressor.RecipeError, match=says):
            compressor.compress(recipe(tokens), name)
    with pytest.raises(
        compressor.RecipeError, match="model: found an object of type dict, expected a live transformers"
    ):
        compressor.compress(recipe(tokens), {})
    model = small_mixtral(max_position_embeddings=32)
    with pytest.raises(compressor.RecipeError, match="tokenizer: found an object of type str, expected a live tr"):
        compressor.compress(recipe(tokens), model, "gpt2")


def test_a_live_model_needs_no_name_and_the_record_calls_it_by_its_own(mixtral: Path, tokens: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    record = compressor.compress(recipe(tokens), model).record
    assert record["model"]["reference"] == record["recipe"]["model"] == str(mixtral)
    assert (record["model"]["live"], record["model"]["fingerprint"]) == (True, None)
    assert f"`{mixtral.name}`, as it was in memory, compressed with" in model_card(record)


def test_a_live_model_made_from_scratch_is_called_by_its_class(tokens: Path, tmp_path: Path) -> None:
    result = compressor.compress(recipe(tokens, output="out"), small_mixtral(max_position_embeddings=32))
    assert result.record["model"]["reference"] == "live MixtralForCausalLM"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    with pytest.raises(compressor.CheckpointError, match="live MixtralForCausalLM: there is no such folder, nor is it"):
        compressor.compress("out/compressor/recipe.yaml", output=Path("again"))


def test_without_a_live_model_a_name_is_needed(tokens: Path) -> None:
    with pytest.raises(
        compressor.RecipeError, match="recipe model: missing, expected the model to compress: a hub id, "
    ):
        compressor.compress(recipe(tokens))


def test_what_the_commands_say_python_says(mixtral: Path, tokens: Path, tmp_path: Path) -> None:
    """`check`, `inspect` and `evaluate`, of a checkpoint; nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    plan = compressor.check(recipe(tokens), model_reference=str(mixtral), output=tmp_path / "out").plan
    assert [layer["kept"] for layer in plan["layers"]] == [6] * len(plan["layers"])
    assert compressor.inspect(str(mixtral))["layers"][0]["num_experts"] == 8
    with pytest.raises(compressor.RecipeError, match=r"passes\[0\]\.expert_pruning\.keep: .*cannot keep 9"):
        compressor.check(recipe(tokens, passes=[{"expert_pruning": {"keep": 9}}]), model_reference=str(mixtral))
    measured = recipe(tokens, evaluate={"perplexity": [{"tokens": str(tokens), "samples": 2, "name": "text"}]})
    found = compressor.evaluate(measured, str(mixtral))["evaluation"]["after"]["perplexity"]["text"]
    assert found["perplexity"] > 1
    assert sorted(tmp_path.rglob("*")) == before


def test_check_of_a_live_model_leaves_it_as_it_is(tokens: Path) -> None:
    model = small_mixtral(max_position_embeddings=32)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    preview = compressor.check(recipe(tokens), model)
    assert preview.plan["needs"]["weights"] == "memory"
    assert all(torch.equal(model.state_dict()[name], one) for name, one in before.items())

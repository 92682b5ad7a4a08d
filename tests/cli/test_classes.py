"""Models that are no causal language models: runs end to end, and what cannot be measured on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import compressor
from compressor.run import check, loading
from compressor.testing import tiny

Cli = Callable[..., Any]
WriteRecipe = Callable[..., Path]
Refused = Callable[..., str]

# model type → the Auto class of its card, its pipeline on the hub
COMPOSITES = {
    "qwen3_vl_moe": ("AutoModelForImageTextToText", "image-text-to-text"),
    "gemma4": ("AutoModelForCausalLM", "text-generation"),
}
OTHERS = {
    "switch_transformers": ("AutoModelForSeq2SeqLM", None),
    "openai_privacy_filter": ("AutoModelForTokenClassification", "token-classification"),
    "muse_spark_text": ("AutoModel", "feature-extraction"),
}
PROBLEMS = {
    "switch_transformers": "SwitchTransformersForConditionalGeneration is an encoder-decoder",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification has no language-model head",
    "muse_spark_text": "MuseSparkTextModel has no language-model head",
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion refines a whole block of tokens at a time",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a type. Shared: never write into it."""
    parent = tmp_path_factory.mktemp("models")

    def folder(model_type: str) -> Path:
        if not (parent / model_type).exists():
            tiny.tiny_model(model_type).save_pretrained(parent / model_type)
        return parent / model_type

    return folder


@pytest.mark.slow  # of some types a run takes more than a few seconds
@pytest.mark.parametrize("model_type", [*COMPOSITES, *OTHERS])
def test_run(model_type: str, saved: Any, cli: Cli, recipe: WriteRecipe, tokens: Path, tmp_path: Path) -> None:
    auto_class, pipeline = (COMPOSITES | OTHERS)[model_type]
    evaluate = {"perplexity": [{"tokens": str(tokens)}]} if model_type in COMPOSITES else {"speed": True}
    answer = cli("run", "--quiet", recipe(model=saved(model_type), evaluate=evaluate))
    assert answer.status == 0, answer.err
    record = json.loads((tmp_path / "out" / "compressor" / "record.json").read_text())
    assert record["model"]["auto_class"] == auto_class
    before, after = record["evaluation"]["before"], record["evaluation"]["after"]
    assert after["size"]["parameters"] < before["size"]["parameters"]
    if model_type in COMPOSITES:
        assert before["perplexity"]["ids"]["perplexity"] != after["perplexity"]["ids"]["perplexity"]
    else:
        assert record["evaluation"]["speed"]["prefill"]["after"] > 0
        assert record["evaluation"]["speed"]["decode"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`{auto_class}.from_pretrained`" in card
    assert yaml.safe_load(card.split("---\n")[1]).get("pipeline_tag") == pipeline
    plain, info = getattr(transformers, auto_class).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, _ = compressor.load(tmp_path / "out")
    assert type(ours) is type(plain) is type(tiny.tiny_model(model_type))
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("model_type", PROBLEMS)
@pytest.mark.parametrize("key", ["perplexity", "tasks"])
def test_next_token_is_not_measured(
    model_type: str, key: str, saved: Any, refused: Refused, recipe: WriteRecipe, tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for module in (check, loading):
        monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    asked = {"perplexity": [{"tokens": str(tokens)}], "tasks": ["demo_parity"]}
    path = recipe(model=saved(model_type), evaluate={key: asked[key]})
    says = (
        f"{PROBLEMS[model_type]}, so it does not predict the next token of a text and cannot be measured like this; "
        f"leave `{key}` out (an empty `evaluate: {{}}` still measures sizes)"
    )
    for command in (("check",), ("run", "--quiet"), ("evaluate", "--quiet", "--recipe")):
        arguments = (
            (*command, path) if command[0] != "evaluate" else ("evaluate", saved(model_type), *command[1:], path)
        )
        error = refused(*arguments, says=says)
        assert f"evaluate.{key}: " in error
    refused("run", "--quiet", path, says=says)


def test_live_model_of_such_a_class(saved: Any, tokens: Path) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(saved("switch_transformers"))
    recipe = {
        "model": "mine",
        "calibration": {"batch_size": 2, "data": [{"tokens": str(tokens)}]},
        "passes": [{"expert_pruning": {"keep": 6}}],
        "evaluate": {"perplexity": [{"tokens": str(tokens)}]},
    }
    with pytest.raises(compressor.RecipeError, match="is an encoder-decoder, so it does not predict the next token"):
        compressor.compress(recipe, model=model)
    assert compressor.compress(recipe | {"evaluate": {}}, model=model).record["model"]["auto_class"] == (
        "AutoModelForSeq2SeqLM"
    )


def test_top_class_without_a_forward(refused: Refused, recipe: WriteRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(tiny.tiny_config("qwen3_omni_moe").to_json_string())
    says = "Qwen3OmniMoeForConditionalGeneration has no forward, so it cannot be run. What can be compressed is its"
    refused("check", recipe(model=folder), says=says)
    refused("inspect", folder, says=says)

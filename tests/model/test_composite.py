"""config.json of a composite: what is changed is changed wherever it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB_SIZE, token_ids, write_token_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig

import compressor
from compressor.checkpoint.find import read_config
from compressor.checkpoint.save import write_beside_weights
from compressor.testing import tiny

LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}


def written(raw: dict[str, Any], config: Any, folder: Path, dtype: str | None = None) -> dict[str, Any]:
    """What becomes of a config.json."""
    (folder / "out").mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    write_beside_weights(folder, folder / "out", config, dtype, {})
    return read_config(folder / "out")


def thinker(**text: Any) -> dict[str, Any]:
    return {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": text, "audio_config": {"d_model": 64}}}


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_wherever_it_stands_by_both_names(name: str, tmp_path: Path) -> None:
    raw = thinker(**{name: "bfloat16"}) | {"quantization_config": {"quant_method": "x", "torch_dtype": "float16"}}
    config = AutoConfig.for_model(**thinker(dtype="bfloat16"))
    found = written(raw, config, tmp_path, "float32")
    both = {"dtype": "float32", "torch_dtype": "float32"}
    assert both.items() <= found.items()
    assert both.items() <= found["thinker_config"]["text_config"].items()
    assert "dtype" not in found["thinker_config"]
    assert "dtype" not in found["thinker_config"]["audio_config"]
    assert found["quantization_config"] == raw["quantization_config"]


def test_weights_that_stay_as_they_are_keep_the_dtype_of_each_part(tmp_path: Path) -> None:
    raw = thinker(torch_dtype="bfloat16") | {"dtype": "float16"}
    found = written(raw, AutoConfig.for_model(**thinker()), tmp_path)
    assert (found["dtype"], found["torch_dtype"]) == ("float16", "float16")
    text = found["thinker_config"]["text_config"]
    assert (text["dtype"], text["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_rotary_settings_in_both_spellings_in_the_part_that_has_them(tmp_path: Path) -> None:
    found = written(thinker(rope_parameters=LINEAR), AutoConfig.for_model(**thinker(rope_parameters=LINEAR)), tmp_path)
    text = found["thinker_config"]["text_config"]
    assert text["rope_parameters"] == LINEAR
    assert text["rope_theta"] == 5e5
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert "rope_theta" not in found
    assert "rope_theta" not in found["thinker_config"]["audio_config"]
    again = AutoConfig.for_model(**found).thinker_config.text_config
    assert (
        again.rope_parameters
        == AutoConfig.for_model(**thinker(rope_parameters=LINEAR)).thinker_config.text_config.rope_parameters
    )


def test_parts_without_such_settings_get_none(tmp_path: Path) -> None:
    raw = {"model_type": "qwen3_5_moe", "text_config": {"rope_theta": 5e5}, "vision_config": {"depth": 2}}
    config = AutoConfig.for_model(**raw)
    config.vision_config.rope_parameters = {"rope_type": "axial", "rope_theta": 1e4}
    found = written(raw, config, tmp_path)
    assert found["vision_config"] == {"depth": 2}
    assert found["text_config"]["rope_parameters"]["rope_theta"] == 5e5


def test_the_older_spelling_gets_the_newer_one_and_a_null_counts_as_nothing(tmp_path: Path) -> None:
    old = {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None}
    text = written(thinker(**old), AutoConfig.for_model(**thinker(rope_theta=5e5)), tmp_path)["thinker_config"][
        "text_config"
    ]
    assert text["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}
    assert text["rope_scaling"] is None


def test_rotary_settings_beyond_the_plain_ones_are_in_the_older_spelling_too(tmp_path: Path) -> None:
    plain = {"rope_type": "default", "rope_theta": 5e6}
    for index, (model_type, more, older) in enumerate(
        [
            ("qwen3_vl_moe_text", {"mrope_section": [2, 1, 1]}, {"rope_scaling": {"mrope_section": [2, 1, 1]}}),
            ("glm4_moe", {"partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.25}),
        ]
    ):
        config = AutoConfig.for_model(model_type, rope_parameters=plain | more)
        folder = tmp_path / str(index)
        folder.mkdir()
        found = written({"model_type": model_type, "rope_parameters": plain | more}, config, folder)
        assert found["rope_theta"] == 5e6
        if "rope_scaling" in found:
            assert found["rope_scaling"].pop("rope_type") == "default"
        assert {key: found[key] for key in ("rope_scaling", "partial_rotary_factor") if key in found} == older
        again = AutoConfig.for_model(**json.loads((folder / "config.json").read_text()))
        assert again.rope_parameters == config.rope_parameters


def test_rotary_settings_of_kinds_of_layers(tmp_path: Path) -> None:
    rope = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = Gemma3TextConfig(rope_parameters=rope)
    raw = {"model_type": "gemma3_text", "rope_parameters": rope}
    found = written(raw, config, tmp_path)
    assert found["rope_parameters"] == rope
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (5e5, 1e4)
    assert "rope_scaling" not in found
    assert AutoConfig.for_model(**found).rope_parameters == config.rope_parameters


def test_a_composite_in_another_dtype_is_loaded_in_it(tmp_path: Path) -> None:
    """The Auto class of language models builds the text model alone, from its part of the config."""
    source = tmp_path / "source"
    tiny.tiny_model("qwen3_5_moe").to(torch.bfloat16).save_pretrained(source)
    tokens = write_token_file(tmp_path / "tokens.jsonl", (token_ids(4, 12) % VOCAB_SIZE).tolist())
    recipe = {
        "model": str(source),
        "dtype": "float32",
        "calibration": {"batch_size": 4, "data": [{"tokens": str(tokens), "samples": 4}]},
        "passes": [{"expert_pruning": {"keep": 0.5}}],
        "output": str(tmp_path / "out"),
    }
    compressor.compress(recipe)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    assert read_config(tmp_path / "out")["text_config"]["rope_theta"]

"""What a forward does with text, found on the meta device; and what `check` refuses by it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import token_ids, write_checkpoint, write_token_file

import compressor
from compressor import RecipeError
from compressor.model.adapter import structure_of
from compressor.observe.rehearsal import Rehearsal, rehearse
from compressor.testing.tiny import model_class, tiny_config, tiny_model


@pytest.mark.parametrize(
    ("model_type", "unreached", "carries"),
    [
        ("mixtral", [], None),
        ("deepseek_v3", [], None),
        ("gemma4", [], "model.language_model.layers.1"),  # later layers read keys and values of earlier ones
        ("ernie4_5_vl_moe", [f"model.language_model.layers.{number}.mlp.vision_moe" for number in (1, 2)], None),
        ("switch_transformers", [], None),  # it asks for numbers, so nothing is known
    ],
)
def test_what_a_forward_does_with_text(model_type: str, unreached: list[str], carries: str | None) -> None:
    config, cls = tiny_config(model_type), model_class(model_type)
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    assert rehearse(model, structure_of(cls, config)) == Rehearsal(frozenset(unreached), carries)
    assert all("forward" not in module.__dict__ and not module._forward_hooks for module in model.modules())


def test_layers_that_are_alike_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three the first is dense, the others are alike; so `check` costs no more where a model has sixty."""
    config, cls = tiny_config("deepseek_v3"), model_class("deepseek_v3")
    with torch.device("meta"):
        model = cls(config)
    structure, ran, attention = structure_of(cls, config), [], type(model.model.layers[0].self_attn)
    own = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *a, **k: (ran.append(self.layer_idx), own(self, *a, **k))[1])
    assert rehearse(model, structure) == Rehearsal()
    assert ran == [0, 1]
    assert [layer.path for layer in structure.layers] == ["model.layers.1.mlp", "model.layers.2.mlp"]


def test_layers_that_are_given_other_things_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cls = tiny_config("mixtral"), model_class("mixtral")
    with torch.device("meta"):
        model = cls(config)
    structure, ran, layer = structure_of(cls, config), [], type(model.model.layers[0])
    own = layer.forward

    def longer(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        ran.append(self.self_attn.layer_idx)
        own(self, hidden, *args, **kwargs)
        return torch.cat([hidden, hidden[:, :, :1]], -1) if ran == [0] else hidden

    monkeypatch.setattr(layer, "forward", longer)
    rehearse(model, structure)
    assert ran[:2] == [0, 1]


def recipe(model_type: str, tmp_path: Path, options: dict[str, Any], **others: Any) -> dict[str, Any]:
    tokens = write_token_file(tmp_path / "tokens.jsonl", token_ids(12, 24).tolist())
    return {
        "model": str(write_checkpoint(tiny_model(model_type), tmp_path / "model")),
        "calibration": {"data": [{"tokens": str(tokens)}]},
        "passes": [{"expert_pruning": options}],
        "output": str(tmp_path / "out"),
        **others,
    }


def test_a_layer_for_images_is_left_alone(tmp_path: Path) -> None:
    given = recipe("ernie4_5_vl_moe", tmp_path, {"keep": 3})
    path = "model.language_model.layers.1.mlp"
    with pytest.raises(RecipeError, match=rf"passes\[0\].*{path}.vision_moe: no text comes to this layer"):
        compressor.check(given)
    assert compressor.check({**given, "passes": [{"expert_pruning": {"keep": {f"{path}.text_moe": 3}}}]})


def test_layers_that_share_weights_are_not_decided_by_text(tmp_path: Path) -> None:
    given = recipe("diffusion_gemma", tmp_path, {"keep": {"mean": 3}})
    with pytest.raises(RecipeError, match=r"passes\[0\].*share their weights \(model\.decoder.*criterion: aimer"):
        compressor.check(given)
    assert compressor.check({**given, "passes": [{"expert_pruning": {"keep": 3, "criterion": "aimer"}}]})


def test_what_is_carried_from_layer_to_layer_is_measured_in_memory(tmp_path: Path) -> None:
    given = recipe("gemma4", tmp_path, {"keep": {"mean": 3}})
    assert compressor.check(given).place.weights == "memory"
    with pytest.raises(RecipeError, match=r"layers\.1 is given more than the outputs of the layers before it"):
        compressor.check({**given, "weights": "disk"})
    even = {"expert_pruning": {"keep": {"mean": 3}, "share": "even"}}
    assert compressor.check({**given, "passes": [even], "weights": "disk"}).place.weights == "disk"

"""Passes that need no text read none and run nothing: everywhere that a pass can run, and beside passes that do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from machine.test_processes import together
from safetensors.torch import load_file
from tiny_models import tiny_folder, tiny_model, token_ids, write_token_file

import compressor
from compressor import MoEModel, RecipeError
from compressor.checkpoint.resume_state import ObservationJournal
from compressor.data import packing
from compressor.machine.progress import Progress
from compressor.observe import layerwise
from compressor.observe.statistics_file import load_statistics
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe
from compressor.report.html import page
from compressor.run import check, texts
from compressor.selection.activation_sums import ExpertSums

Recipe = dict[str, Any]
STATISTICS = "compressor/statistics.safetensors"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    model = shutil.copytree(tiny_folder("mixtral"), tmp_path / "model")
    passes = [{"expert_pruning": {"keep": 6, "criterion": "aimer"}}]
    return {"model": str(model), "passes": passes, "output": str(tmp_path / "out")}


@pytest.fixture
def text(tmp_path: Path) -> Recipe:
    tokens = write_token_file(tmp_path / "tokens.jsonl", token_ids(12, 24).tolist())
    return {"tokens": str(tokens), "samples": 12}


@pytest.fixture
def refused_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is text read nor a batch observed."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("text was read, or run through the model")

    monkeypatch.setattr(texts, "load_sequences", refuse)
    monkeypatch.setattr(texts, "load_with_held_out", refuse)
    monkeypatch.setattr(layerwise, "observe", refuse)
    monkeypatch.setattr(packing, "load_sequences", refuse)


def aimer_by_hand(folder: Path, layer: int, num_kept: int) -> list[int]:
    """The experts that stay, from the file's own tensors."""
    tensors = load_file(folder / "model.safetensors")
    scores = []
    for expert in range(8):
        names = [name for name in tensors if f"layers.{layer}." in name and f".experts.{expert}." in name]
        flat = torch.cat([tensors[name].double().flatten() for name in names])
        scores.append(float(flat.square().mean().sqrt() / flat.abs().mean()))
    return sorted(sorted(range(8), key=lambda expert: -scores[expert])[:num_kept])


def kept(record: Any, number: int = 0) -> list[list[int]]:
    return [layer["kept"] for layer in record["passes"][number]["decision"]["layers"].values()]


@pytest.mark.usefixtures("refused_to_read")
@pytest.mark.parametrize("weights", ["disk", pytest.param("memory", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("with_text", [False, True])
def test_by_weights_alone(recipe: Recipe, text: Recipe, weights: str, with_text: bool) -> None:
    """Also where the recipe has text, which another pass might need."""
    if with_text:
        recipe["calibration"] = {"data": [text]}
    result = compressor.compress(recipe, overrides=[f"weights={weights}"])
    assert kept(result.record) == [aimer_by_hand(Path(recipe["model"]), layer, 6) for layer in range(3)]
    assert result.record["calibration"] == []
    assert result.record["passes"][0]["domains"] == []
    assert result.record["passes"][0]["checks"]["edited_against_preview"] < 1e-4
    assert "expert_pruning" in page(result.record)
    model, _ = compressor.load(recipe["output"])
    assert model.config.num_local_experts == 6


@pytest.mark.usefixtures("refused_to_read")
def test_figures_are_the_same_from_memory_and_disk(recipe: Recipe, tmp_path: Path) -> None:
    for weights in ("memory", "disk"):
        compressor.compress(recipe, output=tmp_path / weights, overrides=[f"weights={weights}"])
    found, expected = ((tmp_path / weights / STATISTICS).read_bytes() for weights in ("memory", "disk"))
    assert found == expected


@pytest.mark.usefixtures("refused_to_read")
def test_chance_needs_no_text(recipe: Recipe) -> None:
    recipe["passes"] = [{"expert_pruning": {"keep": 4, "criterion": "random", "seed": 5}}]
    first = compressor.compress(recipe).record
    other = compressor.compress(recipe, overrides=["passes.0.expert_pruning.seed=6", "output="]).record
    assert kept(first) != kept(other)


def test_other_passes_read_text(recipe: Recipe, text: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    observe = layerwise.observe
    monkeypatch.setattr(
        layerwise, "observe", lambda *args, **named: seen.append(named["title"]) or observe(*args, **named)
    )
    recipe |= {"calibration": {"data": [text]}, "passes": [*recipe["passes"], {"dynamic_skipping": {}}]}
    record = compressor.compress(recipe).record
    assert seen == ["dynamic_skipping: observing"]
    assert [len(one["domains"]) for one in record["passes"]] == [0, 1]
    assert len(record["calibration"]) == 1
    seen.clear()
    recipe["passes"][0]["expert_pruning"]["gather"] = ["outputs"]  # which are of text
    compressor.compress(recipe, overrides=["output="])
    assert seen == ["expert_pruning: observing", "dynamic_skipping: observing"]


def test_a_pass_that_needs_text_still_says_so(recipe: Recipe) -> None:
    recipe["passes"].append({"dynamic_skipping": {}})
    with pytest.raises(RecipeError, match=r"calibration\.data: no text to observe the model on"):
        compressor.compress(recipe)


# Measured --------------------------------------------------------------------------------------------------


def test_measured_beside_random_decisions(recipe: Recipe, text: Recipe) -> None:
    """By perplexity alone; by loss too where there is calibration text."""
    recipe["evaluate"] = {"perplexity": [text], "random": 2}
    record = compressor.compress(recipe).record
    random = record["passes"][0]["random"]
    assert random.keys() == {"seeds", "perplexity", "kl"}
    assert [len(values["random"]) for values in random["perplexity"].values()] == [2]
    assert "loss on calibration text" not in page(record)
    assert "against random experts" in (Path(recipe["output"]) / "README.md").read_text()
    recipe["calibration"] = {"data": [text]}
    random = compressor.compress(recipe, overrides=["output="]).record["passes"][0]["random"]
    assert len(random["relative_loss"]["random"]) == 2


def test_random_decisions_without_any_text_are_refused(recipe: Recipe) -> None:
    recipe["evaluate"] = {"random": 2}
    with pytest.raises(
        RecipeError, match=r"evaluate.random: expert_pruning reads no text, so there is nothing to comp"
    ):
        compressor.compress(recipe)


# Before it runs --------------------------------------------------------------------------------------------


def test_check_plans_no_text(recipe: Recipe) -> None:
    plugins = load_plugins()
    loaded = load_recipe(recipe, methods=plugins.methods, criteria=plugins.criteria)
    found = check.check(loaded).plan
    assert found["needs"]["text"] == 0
    assert any(note.startswith("no calibration text is read for it, so super experts") for note in found["notes"])
    again = load_recipe(json.loads(json.dumps(loaded.to_mapping())), methods=plugins.methods, criteria=plugins.criteria)
    assert again.fingerprint == loaded.fingerprint


@pytest.mark.parametrize(("option", "value"), [("progressive", True), ("blend", "worst"), ("blend", {"code": 1})])
def test_options_about_text_have_no_effect(recipe: Recipe, option: str, value: Any) -> None:
    recipe["passes"][0]["expert_pruning"][option] = value
    with pytest.raises(
        RecipeError, match=rf"{option}: it would have no effect, since `criterion: aimer` looks at no te"
    ):
        compressor.compress(recipe)


# Afterwards ------------------------------------------------------------------------------------------------


def test_decided_again(recipe: Recipe) -> None:
    compressor.compress(recipe)
    file = Path(recipe["output"]) / STATISTICS
    assert set(load_statistics(file)[0]) == {"0.expert_pruning"}
    fewer = compressor.decide(file, keep=4, criterion="aimer")
    assert kept(fewer) == [aimer_by_hand(Path(recipe["model"]), layer, 4) for layer in range(3)]
    with pytest.raises(RecipeError, match="the criterion reap goes by text, and none was read for these figures"):
        compressor.decide(file, keep=4, criterion="reap")
    with pytest.raises(RecipeError, match="no losses of sets of experts were gathered, only sums"):
        compressor.decide(file, keep=4)


def test_goes_on(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pass goes by a checkpoint that is let go of when its own is whole."""
    recipe["passes"] = [*recipe["passes"], {"expert_pruning": {"keep": 4, "criterion": "aimer"}}]
    recipe["weights"] = "disk"
    compressor.compress(recipe, output=tmp_path / "whole")

    class Stopped(BaseException):
        pass

    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("compressor.run.record.model_card", stop)
        with pytest.raises(Stopped):
            compressor.compress(recipe)
    monkeypatch.setattr(ObservationJournal, "put", stop)  # all of it is known
    record = compressor.compress(recipe, resume=True).record
    assert kept(record, 1) == kept(json.loads((tmp_path / "whole/compressor/record.json").read_text()), 1)
    for name in ("model.safetensors", STATISTICS):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_several_processes_find_the_same() -> None:
    moe = MoEModel(tiny_model("mixtral"))

    def weigh(processes: Any) -> Any:
        return layerwise.weigh(moe, {one.path: ExpertSums(one) for one in moe.layers}, Progress(), processes=processes)

    found = together(2, weigh)
    alone = layerwise.weigh(moe, {one.path: ExpertSums(one) for one in moe.layers}, Progress())
    for one in found:
        assert one.keys() == alone.keys()
        assert all(torch.equal(one[path][name], alone[path][name]) for path in alone for name in alone[path])

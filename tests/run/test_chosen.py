"""Choices compared by what the model's answers lose: the best is taken, all stand in the record, from disk too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_model, token_ids, write_checkpoint, write_token_file

import compressor
from compressor import RecipeError
from compressor.data.sequences import TokenBatch
from compressor.machine.progress import Progress
from compressor.observe import forward
from compressor.observe.divergence import kl_divergences
from compressor.observe.statistic import Gathered
from compressor.recipe.schema import load_recipe
from compressor.selection.layer_plan import measured_ways, rivals
from compressor_expert_pruning import ExpertPruning, ExpertPruningOptions
from compressor_expert_pruning.criteria import CRITERIA

BY_NAME = {criterion.name: criterion for criterion in CRITERIA}


def options(**given: Any) -> ExpertPruningOptions:
    return ExpertPruningOptions(**given)


def test_what_is_compared() -> None:
    assert list(rivals(options(keep={"mean": 6}), BY_NAME, ["one", "two"], several=True)) == [
        "each layer's best",
        "search, measured counts",
        "weighted_ean, measured counts",
        "reap, measured counts",
        "search, even counts",
        "weighted_ean, even counts",
    ]
    assert list(rivals(options(keep={"mean": 6}), BY_NAME, ["one", "two"], several=False)) == [
        "search, measured counts",
        "weighted_ean, measured counts",
        "reap, measured counts",
        "search, worst domain, measured counts",
        "search, even counts",
        "weighted_ean, even counts",
    ]
    assert list(rivals(options(keep=6, choose="measured", criterion="ean"), BY_NAME, ["one"], several=False)) == [
        "ean",
        "weighted_ean",
        "reap",
    ]
    for given in ({"keep": 6}, {"keep": {"mean": 6}, "share": "measured"}, {"keep": {"mean": 6}, "choose": "given"}):
        assert len(rivals(options(**given), BY_NAME, ["one", "two"], several=False)) == 1
        assert ExpertPruning(options(**given), BY_NAME).alternatives([], Gathered({})) == {}
    of_constants = options(keep={"mean": 6}, replace="measured").kinds[1]
    assert list(rivals(of_constants, BY_NAME, ["one"], several=True))[:2] == [
        "each layer's best, constants",
        "search, measured counts, constants",
    ]


def test_how_many_ways_are_measured() -> None:
    """As many as cost no more than a run over 128 × 2048 tokens: 7 sets of 4 layers on 3840 tokens are 67,200."""

    def ways(num_layers: int, num_counts: int, **given: Any) -> list[str | None]:
        wanted = options(keep={"fraction": 0.5}, **given)
        return [one.criterion for one in measured_ways(wanted, BY_NAME, num_layers, num_counts)]

    assert ways(4, 7) == [None, "weighted_ean", "reap"]
    assert ways(8, 7) == [None, "weighted_ean"]
    assert ways(32, 4) == [None]
    assert ways(4, 7, choose="given") == ways(4, 7, share="measured") == [None]
    assert ways(4, 7, criterion="ean") == ["ean"]


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    model = write_checkpoint(random_model("mixtral"), tmp_path / "model")
    texts = [write_token_file(tmp_path / f"{n}.jsonl", token_ids(6, 24, seed=n).tolist()) for n in (1, 2)]
    return {
        "model": str(model),
        "calibration": {"batch_size": 3, "data": [{"tokens": str(one), "name": one.stem} for one in texts]},
        "passes": [{"expert_pruning": {"keep": {"mean": 5}}}],
    }


def test_the_best_is_taken_from_memory_and_from_disk(recipe: dict[str, Any], tmp_path: Path) -> None:
    result = compressor.compress(recipe, output=tmp_path / "memory")
    decision = result.record["passes"][0]["decision"]
    chosen = decision["chosen"]
    costs = {name: one["cost"] for name, one in chosen["alternatives"].items()}
    assert len(costs) == 6
    assert costs[chosen["name"]] == min(costs.values())
    assert chosen["tokens"] == 2 * 6 * 24  # all there is
    compressor.compress(recipe, output=tmp_path / "disk", overrides=["weights=disk"])
    name = "compressor/decision.json"
    assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    # what was taken loses as much as whole forwards under its mask say
    loaded = compressor.MoEModel(compressor.load(recipe["model"])[0].eval())
    kept = {path: layer["kept"] for path, layer in decision["layers"].items()}
    for seed, domain in ((1, "1"), (2, "2")):
        ids = token_ids(6, 24, seed=seed)
        batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))
        plain = forward.logits(loaded.model, batch)
        with loaded.masked(kept):
            kl = kl_divergences(plain, forward.logits(loaded.model, batch))
        assert chosen["alternatives"][chosen["name"]]["kl"][domain] == pytest.approx(float(kl.mean()), rel=1e-3)


def test_blend_weighs_what_is_lost() -> None:
    lost = {"one": 0.2, "two": 0.6}
    for blend, cost in (("mean", 0.4), ("pooled", 0.4), ("worst", 0.6), ({"one": 3, "two": 1}, 0.3)):
        assert ExpertPruning(options(keep=6, blend=blend)).cost(lost) == pytest.approx(cost)


def test_progressive_is_not_compared() -> None:
    with pytest.raises(ValueError, match="say `choose: given`"):
        options(keep=6, progressive=True, choose="measured")


def test_options_are_written_as_they_are_read(tmp_path: Path) -> None:
    text, keep = {"data": [{"demo": "mix"}]}, {"fraction": 0.5, "min": 3}
    recipe = {"model": "demo", "calibration": text, "passes": [{"expert_pruning": {"keep": keep}}]}
    loaded = load_recipe(recipe, methods={"expert_pruning": ExpertPruning})
    (tmp_path / "again.yaml").write_text(loaded.to_yaml())
    again = load_recipe(tmp_path / "again.yaml", methods={"expert_pruning": ExpertPruning})
    assert again.passes[0].method.options == loaded.passes[0].method.options
    assert loaded.to_mapping()["passes"][0]["expert_pruning"]["keep"] == {"fraction": 0.5, "min": 3}


def test_little_text_is_said(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    compressor.compress(recipe, progress=Progress("lines"))
    assert "expert_pruning: what the answers lose is measured on 288 tokens, so it is" in capsys.readouterr().err
    recipe["passes"] = [{"expert_pruning": {"keep": 6}}]
    compressor.compress(recipe, progress=Progress("lines"))
    assert "what the answers lose" not in capsys.readouterr().err


def test_without_the_model_nothing_is_compared(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["passes"] = [{"expert_pruning": {"keep": {"mean": 5}, "measured_counts": 2, "choose": "given"}}]
    files = []
    for number, one in enumerate(recipe["calibration"]["data"]):
        text = {**recipe["calibration"], "data": [one]}
        compressor.compress({**recipe, "calibration": text}, output=tmp_path / f"{number}")
        files.append(tmp_path / f"{number}" / "compressor" / "statistics.safetensors")
    with pytest.raises(RecipeError, match="chosen by what the model's answers lose: run a recipe for it"):
        compressor.decide(files[0], keep=5, choose="measured")
    with pytest.raises(
        RecipeError, match=r"Of several files measured\.candidates, .*measured\.kl.* cannot be added up"
    ):
        compressor.decide(files, keep={"mean": 5})
    decided = compressor.decide(files[0], keep={"mean": 5})["passes"][0]["decision"]
    assert sum(len(layer["kept"]) for layer in decided["layers"].values()) == 5 * len(decided["layers"])

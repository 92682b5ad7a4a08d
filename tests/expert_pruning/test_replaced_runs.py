"""Whole runs of `replace: constants`: in memory, from disk, resumed, applied, decided again, with passes behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_model, tiny_folder, token_ids, write_checkpoint, write_token_file
from weight_runs import files, recipe, stopped_and_whole

import compressor
from compressor import RecipeError, UnsupportedModelError
from compressor.checkpoint.resume_state import Journal, ObservationJournal
from compressor.run.apply import apply
from compressor.run.decide_again import decide
from compressor.testing.tiny import tiny_model

KINDS = ("none", "constants", "measured")
PASS: dict[str, Any] = {"expert_pruning": {"keep": 5, "replace": "constants"}}


MEASURED: dict[str, Any] = {
    "keep": {"mean": 4}, "share": "measured", "measured_tokens": 256, "measured_counts": 2, "replace": "measured"
}  # fmt: skip


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_token_file(tmp_path / "tokens.jsonl", token_ids(40, 24).tolist())


def replaced_in(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((folder / "config.json").read_text(encoding="utf-8"))[
        "approximate_experts"
    ]
    return found


@pytest.mark.parametrize(
    ("name", "behind"),
    [pytest.param("mixtral", [], marks=pytest.mark.nightly), ("qwen3_moe", [{"dynamic_skipping": {}}])],
)
def test_in_memory_from_disk_and_applied_are_the_same_bytes(
    name: str, behind: list[Any], tokens: Path, tmp_path: Path
) -> None:
    model = tiny_folder(name)
    passes = [PASS, *behind]
    memory = compressor.compress(recipe(tokens, *passes, weights="memory", model=model), output=tmp_path / "memory")
    compressor.compress(recipe(tokens, *passes, weights="disk", model=model), output=tmp_path / "disk")
    assert files(tmp_path / "memory") == files(tmp_path / "disk")
    apply(tmp_path / "disk" / "compressor" / "decision.json", str(model), tmp_path / "applied")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "applied" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()
    dropped = [layer["dropped"] for layer in memory.record["passes"][0]["decision"]["layers"].values()]
    assert list(replaced_in(tmp_path / "disk").values()) == dropped
    assert memory.record["constants"] == replaced_in(tmp_path / "disk")
    loaded, _ = compressor.load(tmp_path / "disk")
    written = loaded.generate(token_ids(1, 6), max_new_tokens=4, do_sample=False)
    assert written.shape[1] > 6
    card = (tmp_path / "disk" / "README.md").read_text(encoding="utf-8")
    assert "from_pretrained` of transformers 5 refuses it" in card
    assert "version 4 only warns, and makes them up at random" in card


def test_a_loaded_model_saves_its_experts_under_their_own_numbers(tokens: Path, tmp_path: Path) -> None:
    run = compressor.compress(recipe(tokens, PASS), output=tmp_path / "out")
    run.model.save_pretrained(tmp_path / "of the run")
    model, _ = compressor.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (
        tmp_path / "of the run" / "model.safetensors"
    ).read_bytes()
    assert replaced_in(tmp_path / "saved") == replaced_in(tmp_path / "out")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "saved"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    again, _ = compressor.load(tmp_path / "saved")
    ids = token_ids(1, 6)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(compressor.CheckpointError, match="found a `state_dict` to save, and some experts answer const"):
        model.save_pretrained(tmp_path / "other", state_dict=model.state_dict())
    assert not (tmp_path / "other").exists()


def test_the_constants_are_those_of_the_experts_that_go(tokens: Path, tmp_path: Path) -> None:
    compressor.compress(recipe(tokens, PASS), output=tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    decided = load_file(tmp_path / "out" / "compressor" / "decision.safetensors")
    figures = load_file(tmp_path / "out" / "compressor" / "statistics.safetensors")
    assert len(decided) == 3
    for number, ids in replaced_in(tmp_path / "out").items():
        [values_EH] = [one for name, one in decided.items() if f"layers.{number}." in name]
        assert any(torch.equal(values_EH, one) for name, one in figures.items() if name.endswith("constants.value"))
        for expert in ids:
            constant = stored[f"model.layers.{number}.block_sparse_moe.experts.{expert}.approx_value"]
            assert torch.equal(constant, values_EH[expert])


@pytest.mark.parametrize(
    ("kept_by", "name", "options"),
    [
        pytest.param((ObservationJournal, "put"), "layers.1", {}, marks=pytest.mark.nightly),
        pytest.param((ObservationJournal, "put"), "layers.1", MEASURED, marks=pytest.mark.nightly),
        ((Journal, "note"), "edited 0.expert_pruning", {}),
        pytest.param((Journal, "note"), "edited 1.dynamic_skipping", {}, marks=pytest.mark.nightly),
    ],
)
def test_interrupted_and_gone_on_with_it_is_the_same(
    kept_by: tuple[type, str],
    name: str,
    options: dict[str, Any],
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pruning = {"expert_pruning": PASS["expert_pruning"] | options}
    run = recipe(tokens, pruning, {"dynamic_skipping": {}}, weights="disk")
    resumed, whole = stopped_and_whole(run, tmp_path, monkeypatch, kept_by, lambda noted: name in noted)
    assert resumed == whole


def test_other_counts_and_criteria_are_decided_without_the_model(tokens: Path, tmp_path: Path) -> None:
    compressor.compress(recipe(tokens, PASS), output=tmp_path / "out")
    figures = tmp_path / "out" / "compressor" / "statistics.safetensors"
    again = decide(figures, output=tmp_path / "again", keep=3, replace="constants")
    apply(tmp_path / "again" / "decision.json", str(tiny_folder("mixtral")), tmp_path / "applied")
    assert [len(ids) for ids in replaced_in(tmp_path / "applied").values()] == [5, 5, 5]
    three = recipe(tokens, {"expert_pruning": {"keep": 3, "replace": "constants"}})
    compressor.compress(three, output=tmp_path / "three")
    assert files(tmp_path / "three")["model.safetensors"] == (tmp_path / "applied" / "model.safetensors").read_bytes()
    by_reap = decide(figures, keep=3, replace="constants", criterion="reap")
    both = (one["passes"][0]["decision"]["layers"].values() for one in (again, by_reap))
    for searched, scored in zip(*both, strict=True):
        assert searched["relative_loss"] <= scored["relative_loss"] < 1
    with pytest.raises(RecipeError, match="no losses of sets of experts were gathered"):
        decide(figures, keep=3)


def test_counts_are_shared_out_by_measuring_under_constants(tokens: Path, tmp_path: Path) -> None:
    options = {"keep": {"mean": 4}, "replace": "constants", "measured_tokens": 256, "measured_counts": 3}
    evaluate = {"random": 1, "perplexity": [{"tokens": str(tokens)}]}
    run = recipe(tokens, {"expert_pruning": options}, evaluate=evaluate)
    [done] = compressor.compress(run, output=tmp_path / "out").record["passes"]
    assert sum(len(layer["kept"]) for layer in done["decision"]["layers"].values()) == 12
    assert done["decision"]["budget"]["summed_kl"] > 0
    assert len(done["random"]["perplexity"]["tokens"]["random"]) == 1
    with pytest.raises(RecipeError, match="what its counts cost was not measured where experts are removed"):
        decide(tmp_path / "out" / "compressor" / "statistics.safetensors", keep={"mean": 4}, criterion="reap")


def test_constants_or_none_whichever_loses_less(tokens: Path, tmp_path: Path) -> None:
    """Both are gathered and measured in one walk; all figures stand there, and decisions can be made again by them."""
    run = recipe(tokens, {"expert_pruning": MEASURED})
    [done] = compressor.compress(run, output=tmp_path / "out").record["passes"]
    chosen, decision = done["decision"]["chosen"], done["decision"]
    costs = {name: one["cost"] for name, one in chosen["alternatives"].items()}
    assert set(costs) == {"search, measured counts", "search, measured counts, constants"}
    assert costs[chosen["name"]] == min(costs.values())
    assert (decision.get("replace") == "constants") == chosen["name"].endswith("constants")
    figures = tmp_path / "out" / "compressor" / "statistics.safetensors"
    again = {kind: decide(figures, **MEASURED | {"replace": kind})["passes"][0]["decision"] for kind in KINDS}
    assert [one["budget"]["num_kept"] for one in again.values()] == [12, 12, 12]
    assert [one.get("replace") for one in again.values()][:2] == [None, "constants"]
    assert again["none"]["budget"]["summed_kl"] != again["constants"]["budget"]["summed_kl"]
    least = min((again["none"], again["constants"]), key=lambda one: float(one["budget"]["summed_kl"]))
    even = again["none"]["budget"]["even"]  # where experts are removed: constants are read by one engine
    assert again["measured"] == least | {"budget": least["budget"] | {"even": even}}
    assert "even" not in again["constants"]["budget"]
    alone = compressor.compress(recipe(tokens, {"expert_pruning": MEASURED | {"replace": "constants"}}))
    assert again["constants"]["budget"] == alone.record["passes"][0]["decision"]["budget"]


def test_what_is_no_experts_own_keeps_its_name(tokens: Path, tmp_path: Path) -> None:
    """laguna's files have the router's bias among the experts: `experts.e_score_correction_bias`."""
    model = tiny_model("laguna")
    model.save_pretrained(tmp_path / "model")
    compressor.compress(recipe(tokens, PASS, model=tmp_path / "model", weights="memory"), output=tmp_path / "memory")
    compressor.compress(recipe(tokens, PASS, model=tmp_path / "model", weights="disk"), output=tmp_path / "disk")
    assert files(tmp_path / "memory") == files(tmp_path / "disk")
    bias = "model.layers.1.mlp.experts.e_score_correction_bias"
    assert torch.equal(load_file(tmp_path / "disk" / "model.safetensors")[bias], model.state_dict()[
        "model.layers.1.mlp.gate.e_score_correction_bias"
    ])  # fmt: skip


def test_which_of_them_is_taken_is_the_same_from_disk(tokens: Path, tmp_path: Path) -> None:
    run = recipe(tokens, {"expert_pruning": {"keep": 5, "replace": "measured"}})
    compressor.compress({**run, "weights": "memory"}, output=tmp_path / "memory")
    compressor.compress({**run, "weights": "disk"}, output=tmp_path / "disk")
    assert files(tmp_path / "memory") == files(tmp_path / "disk")
    decided = json.loads((tmp_path / "disk" / "compressor" / "decision.json").read_text(encoding="utf-8"))
    assert list(decided["passes"][0]["decision"]["chosen"]["alternatives"]) == ["search", "search, constants"]
    with pytest.raises(RecipeError, match="run a recipe for it"):
        decide(tmp_path / "disk" / "compressor" / "statistics.safetensors", keep=5, replace="measured")


@pytest.mark.nightly
def test_experts_that_are_never_chosen(tokens: Path, tmp_path: Path) -> None:
    """The search's own sets, other counts in other layers, without a layer that has another number of rows."""
    options = {"keep": {1: 4, 2: 6}}
    model = tiny_folder("deepseek_v3")
    never = recipe(tokens, {"expert_pruning": {**options, "replace": "never_chosen"}}, model=model)
    memory = compressor.compress({**never, "weights": "memory"}, output=tmp_path / "memory")
    compressor.compress({**never, "weights": "disk"}, output=tmp_path / "disk")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "memory" / file).read_bytes() == (tmp_path / "disk" / file).read_bytes()
    removed = compressor.compress(recipe(tokens, {"expert_pruning": options}, model=model), output=tmp_path / "removed")
    ours, theirs = (one.record["passes"][0]["decision"]["layers"] for one in (memory, removed))
    assert ours == theirs
    assert [len(ids) for ids in replaced_in(tmp_path / "disk").values()] == [4, 2]
    batch = token_ids(2, 12)
    with torch.no_grad():
        first, second = (compressor.load(tmp_path / name)[0](batch).logits for name in ("disk", "removed"))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


# What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([PASS, {"expert_pruning": {"keep": 4}}], "prune before that"),
        ([PASS, {"expert_merging": {"keep": 4}}], "prune before that"),
        ([PASS, {"wanda": {}}], "put it before the pass that replaces experts"),
        ([PASS, PASS], "answer constants already"),
        ([{"expert_pruning": {**PASS["expert_pruning"], "top_k": 1}}], "`top_k` means nothing beside"),
        ([{"expert_pruning": {**PASS["expert_pruning"], "progressive": True}}], "`progressive` means nothing beside"),
        ([{"expert_pruning": {**PASS["expert_pruning"], "search": "greedy"}}], "`search` means nothing beside"),
        ([{"expert_pruning": {"keep": 5, "replace": "measured", "padded": True}}], "`padded` means nothing beside"),
        ([{"expert_pruning": {"keep": 5, "replace": "never_chosen"}}], "no bias that could switch"),
        ([{"expert_pruning": {"keep": 5, "replace": "never_chosen", "padded": True}}], "mean nothing beside"),
        ([{"expert_pruning": {"drop": 8, "replace": "constants"}}], "would leave none"),
    ],
)
def test_orders_and_options_that_make_no_sense_are_refused(passes: list[Any], message: str, tokens: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        compressor.check(recipe(tokens, *passes))


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gpt_oss", "all experts in one tensor"), ("llama4_text", "not one module that is given tokens"),
    ],
)  # fmt: skip
def test_models_that_no_reader_could_read_are_refused(
    model_type: str, message: str, tokens: Path, tmp_path: Path
) -> None:
    model = write_checkpoint(tiny_model(model_type), tmp_path / "model")
    with pytest.raises((RecipeError, UnsupportedModelError), match=message):
        compressor.check(recipe(tokens, PASS, model=model))


def test_a_quantised_checkpoint_is_refused(tokens: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(random_model("mixtral"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RecipeError, match="no reader puts constants beside quantised experts"):
        compressor.check(recipe(tokens, PASS, model=folder))


def test_check_says_what_comes_of_it(tokens: Path) -> None:
    plan = compressor.check(recipe(tokens, PASS)).plan
    assert [(layer["num_experts"], layer["kept"], layer["dropped"]) for layer in plan["layers"]] == [(8, 5, 3)] * 3
    assert any("9 experts of 3 layers will answer constants" in note for note in plan["notes"])
    model, _ = compressor.load(tiny_folder("mixtral"))
    own = 3 * sum(one[0].numel() for one in model.model.layers[0].mlp.experts.parameters())
    assert plan["parameters"]["before"] - plan["parameters"]["after"] == 3 * (own - 3 * 32)

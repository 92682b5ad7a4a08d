"""Recipes that work, end to end through the command line and through `compressor.compress`."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reference_pages import unexplained
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compressor
from compressor.cli import _exit_status
from compressor.edit import verify
from compressor.machine.progress import Progress
from compressor.observe.statistics_file import load_statistics
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe

Cli = Callable[..., Any]
WriteRecipe = Callable[..., Path]
CopyOf = Callable[[Path], Path]
Json = dict[str, Any]

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]
OF_THIS_RUN = ("seconds", "date", "hardware", "output")


def settings(model: Path, tokens: Path, **changes: Any) -> Json:
    return {
        "model": str(model),
        "calibration": {"batch_size": 2, "data": [{"tokens": str(tokens)}]},
        "passes": [{"expert_pruning": {"keep": 6}}],
        "evaluate": {"perplexity": [{"tokens": str(tokens)}]},
        **changes,
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, mixtral: Path, tokens: Path) -> Path:
    """The output of one whole run by the command line, with perplexity. Never write into it."""
    folder = tmp_path_factory.mktemp("done")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings(mixtral, tokens)))
    assert _exit_status(["run", "--quiet", str(recipe), "--output", str(folder / "out")]) == 0
    return folder / "out"


def record_of(folder: Path) -> Json:
    record = json.loads((folder / "compressor" / "record.json").read_text())
    assert isinstance(record, dict)
    return record


def same_every_time(record: Json) -> Json:
    """A record without what may differ from run to run: times, the machine, memory, and the output's name."""
    record = copy.deepcopy(record)
    for key in OF_THIS_RUN:
        del record[key]
    record["recipe"].pop("output", None)
    for done_pass in record["passes"]:
        del done_pass["seconds"]
    for when in ("before", "after"):
        del record["evaluation"][when]["peak_memory"]
    return record


def kept(record: Json) -> dict[str, list[int]]:
    return {path: layer["kept"] for path, layer in record["passes"][-1]["decision"]["layers"].items()}


def logits(model: Any, tokens: Path) -> list[torch.Tensor]:
    rows = [json.loads(line)["input_ids"] for line in tokens.read_text().splitlines()]
    with torch.no_grad():
        return [model(torch.tensor([row])).logits for row in rows]


def alike(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- what a run writes


def test_files(done: Path) -> None:
    assert sorted(str(path.relative_to(done)) for path in done.rglob("*") if path.is_file()) == [
        "README.md",
        "compressor/decision.json",
        "compressor/recipe.yaml",
        "compressor/record.json",
        "compressor/report.html",
        "compressor/statistics.safetensors",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in done.parent.iterdir() if path.name.startswith(".")] == []


def test_config_is_the_models_own_but_for_the_count(done: Path, mixtral: Path) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (mixtral, done))
    assert after["num_local_experts"] == after["num_experts"] == 6
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed <= {"num_local_experts", "num_experts", "rope_theta", "rope_parameters", "torch_dtype", "dtype"}
    assert (done / "tokenizer.json").read_bytes() == (mixtral / "tokenizer.json").read_bytes()


def test_record(done: Path, mixtral: Path) -> None:
    record = record_of(done)
    assert record["format"] == 2
    assert record["seed"] == 0
    assert record["model"]["reference"] == str(mixtral)
    assert record["model"]["architecture"] == "MixtralForCausalLM"
    assert record["model"]["fingerprint"].startswith("sha256:")
    assert record["layers"] == [{"path": path, "num_experts": 8, "top_k": 2} for path in LAYERS]
    [about] = record["calibration"]
    assert about == {"name": "ids", "sequences": 6, "tokens": 74, "fingerprint": about["fingerprint"]}
    assert unexplained(record) == []
    assert unexplained({**record, "passes": [{"what": 1}], "else": 2}) == [": else", "passes[]: what"]
    [done_pass] = record["passes"]
    assert done_pass["method"] == "expert_pruning"
    assert done_pass["options"]["keep"] == 6
    assert done_pass["checks"]["keep_all_difference"] == 0.0
    assert done_pass["checks"]["edited_against_preview"] <= done_pass["checks"]["tolerance"]
    assert list(done_pass["decision"]["layers"]) == LAYERS
    for layer in done_pass["decision"]["layers"].values():
        assert len(layer["kept"]) == 6
        assert sorted(layer["kept"] + layer["dropped"]) == list(range(8))
        assert layer["kept"] == sorted(layer["kept"])
        assert 0 < layer["loss"] <= layer["median_loss"]
        assert layer["sets"] == 28
    before, after = record["evaluation"]["before"], record["evaluation"]["after"]
    assert before["perplexity"]["ids"]["tokens"] == after["perplexity"]["ids"]["tokens"] == 74 - 6
    assert before["perplexity"]["ids"]["perplexity"] != after["perplexity"]["ids"]["perplexity"]
    parameters_per_expert = 3 * 16 * 16 + 16
    assert before["size"]["parameters"] - after["size"]["parameters"] == 2 * 2 * parameters_per_expert
    assert before["bytes_on_disk"] == (mixtral / "model.safetensors").stat().st_size
    assert after["bytes_on_disk"] == (done / "model.safetensors").stat().st_size
    assert {"python", "torch", "transformers", "moe-compressor"} <= record["versions"].keys()
    assert record["output"] == str(done)


def test_statistics(done: Path) -> None:
    passes, about = load_statistics(done / "compressor" / "statistics.safetensors")
    assert about["recipe_fingerprint"] == record_of(done)["recipe_fingerprint"]
    assert list(passes) == ["0.expert_pruning"]
    assert sorted(passes["0.expert_pruning"]) == LAYERS
    for path, figures in passes["0.expert_pruning"].items():
        assert figures["subsets.squared_error"].shape == (3, 28)
        assert figures["subsets.squared_error"].dtype == torch.float64
        assert figures["batch.num_tokens"].tolist() == [25, 28, 21]
        smallest = float(figures["subsets.squared_error"].sqrt().sum(0).min())
        assert smallest == record_of(done)["passes"][0]["decision"]["layers"][path]["loss"]


def test_decision_is_the_records(done: Path) -> None:
    decision = json.loads((done / "compressor" / "decision.json").read_text())
    [done_pass] = record_of(done)["passes"]
    keys = ("method", "version", "options", "domains", "decision", "description")
    model = record_of(done)["model"]
    assert decision == {"format": 2, "model": model, "passes": [{key: done_pass[key] for key in keys}]}


def test_recipe_loads_as_the_same_recipe(done: Path) -> None:
    methods = load_plugins().methods
    given = load_recipe(done.parent / "recipe.yaml", methods=methods, output=done)
    written = load_recipe(done / "compressor" / "recipe.yaml", methods=methods)
    assert written.fingerprint == given.fingerprint == record_of(done)["recipe_fingerprint"]
    assert written.to_mapping() == given.to_mapping() == record_of(done)["recipe"]


def test_model_card(done: Path) -> None:
    card = (done / "README.md").read_text()
    assert card.startswith("---\n")
    assert "expert_pruning" in card


def test_file_modes_respect_the_umask(cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        assert cli("run", "--quiet", recipe()).status == 0
    finally:
        os.umask(old)
    modes = {
        path.is_dir(): stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    }
    assert modes == {True: 0o750, False: 0o640}


# --- what a run depends on


def test_same_seed_same_record(done: Path, cli: Cli, recipe: WriteRecipe, tmp_path: Path, tokens: Path) -> None:
    path = recipe(evaluate={"perplexity": [{"tokens": str(tokens)}]})
    assert cli("run", "--quiet", path).status == 0
    assert same_every_time(record_of(tmp_path / "out")) == same_every_time(record_of(done))
    for file in ("model.safetensors", "compressor/decision.json"):
        assert (tmp_path / "out" / file).read_bytes() == (done / file).read_bytes(), file
    one, other = (load_file(folder / "compressor/statistics.safetensors") for folder in (tmp_path / "out", done))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("options", [{"drop": 2}, {"keep": 0.75}])
def test_three_ways_to_say_a_count(options: Json, done: Path, cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    assert cli("run", "--quiet", recipe(passes=[{"expert_pruning": options}])).status == 0
    assert kept(record_of(tmp_path / "out")) == kept(record_of(done))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (done / "model.safetensors").read_bytes()


def test_padding_counts_nowhere(cli: Cli, recipe: WriteRecipe, tmp_path: Path, mixtral: Path, tokens: Path) -> None:
    """Sequences of unequal lengths padded into one batch, and each by itself: the same sums."""
    figures = {}
    for batch_size in (6, 1):
        path = recipe(
            calibration={"batch_size": batch_size, "data": [{"tokens": str(tokens)}]}, output=f"b{batch_size}"
        )
        assert cli("run", "--quiet", path).status == 0
        passes, _ = load_statistics(Path(f"b{batch_size}/compressor/statistics.safetensors"))
        figures[batch_size] = passes["0.expert_pruning"]
    for path in LAYERS:
        together, apart = figures[6][path], figures[1][path]
        assert together["batch.num_tokens"].tolist() == [74]
        assert apart["batch.num_tokens"].tolist() == [16, 9, 16, 12, 5, 16]
        for name in ("subsets.squared_error", "batch.squared_output"):
            torch.testing.assert_close(together[name].sum(0), apart[name].sum(0), rtol=1e-4, atol=1e-6)


def test_overwrite_replaces(cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    assert cli("run", "--quiet", recipe()).status == 0
    (tmp_path / "out" / "old.txt").write_text("of the first run")
    path = recipe(passes=[{"expert_pruning": {"keep": 4}}])
    assert cli("run", "--quiet", path).status == 2
    assert (tmp_path / "out" / "old.txt").exists()
    assert cli("run", "--quiet", path, "--overwrite").status == 0
    assert not (tmp_path / "out" / "old.txt").exists()
    assert {len(ids) for ids in kept(record_of(tmp_path / "out")).values()} == {4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_what_the_command_line_sets(
    cli: Cli, recipe: WriteRecipe, copy_of: CopyOf, mixtral: Path, tmp_path: Path
) -> None:
    model = copy_of(mixtral)
    path = recipe(model="/nowhere", output=None)
    options = ["--model", model, "--output", "elsewhere", "--set", "passes.0.expert_pruning.keep=4", "--set", "seed=7"]
    answer = cli("run", path, *options)
    assert answer.status == 0
    record = record_of(tmp_path / "elsewhere")
    assert {len(ids) for ids in kept(record).values()} == {4}
    assert (record["model"]["reference"], record["seed"], record["output"]) == (str(model), 7, "elsewhere")
    written = yaml.safe_load((tmp_path / "elsewhere" / "compressor" / "recipe.yaml").read_text())
    assert (written["model"], written["seed"], written["output"]) == (str(model), 7, "elsewhere")


def test_lines_without_a_terminal(cli: Cli, recipe: WriteRecipe, mixtral: Path, tmp_path: Path) -> None:
    answer = cli("run", recipe())
    assert answer.status == 0
    lines = answer.err.splitlines()
    assert lines[0] == f"{mixtral}: expert_pruning; into {tmp_path / 'out'}. Looking at the model's config"
    assert lines[1].startswith("12 of 16 experts in 2 MoE layers stay, ")
    assert "; weights all in memory, about " in lines[1]
    assert lines[2] == "28 sets of 6 experts per layer, all of them looked at"
    assert lines[3:6] == ["reading text: ids", f"loading {mixtral}", "expert_pruning: observing ..."]
    assert lines[6].startswith("expert_pruning: observing: done in ")
    assert lines[7:] == ["saving, and loading again to compare"]
    assert "\r" not in answer.err
    assert answer.out.rstrip().splitlines()[-1].startswith(f"Written to {tmp_path / 'out'}. Load it with ")
    assert "\x1b" not in answer.out


def test_bar_in_a_terminal(cli: Cli, recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "detect", classmethod(lambda cls, *, quiet=False: cls("bar")))
    answer = cli("run", recipe())
    assert answer.status == 0
    assert "expert_pruning: observing" in answer.err
    assert "6 of 6" in answer.err  # three batches, two layers


# --- passes after one another


def test_two_passes(cli: Cli, recipe: WriteRecipe, tmp_path: Path, mixtral: Path, tokens: Path) -> None:
    path = recipe(passes=[{"expert_pruning": {"keep": 6}}, {"expert_pruning": {"keep": 4}}])
    assert cli("run", "--quiet", path).status == 0
    first, second = record_of(tmp_path / "out")["passes"]
    original = AutoModelForCausalLM.from_pretrained(mixtral)
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for number, layer in enumerate(LAYERS):
        six, four = (done_pass["decision"]["layers"][layer] for done_pass in (first, second))
        assert (len(six["kept"]), len(four["kept"])) == (6, 4)
        assert second["original_ids"][layer] == six["kept"]
        assert sorted(four["kept"] + four["dropped"]) == list(range(6))
        left = [six["kept"][expert] for expert in four["kept"]]
        whole, part = original.model.layers[number].mlp, smaller.model.layers[number].mlp
        assert torch.equal(whole.experts.down_proj[left], part.experts.down_proj)
        assert torch.equal(whole.gate.weight[left], part.gate.weight)
    passes, _ = load_statistics(tmp_path / "out" / "compressor" / "statistics.safetensors")
    assert list(passes) == ["0.expert_pruning", "1.expert_pruning"]

    for file in ("decision.json", "record.json"):
        source = tmp_path / "out" / "compressor" / file
        assert cli("apply", "--quiet", source, mixtral, "--output", f"from-{file}").status == 0
        again = tmp_path / f"from-{file}" / "model.safetensors"
        assert again.read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


# --- the other commands


@pytest.mark.parametrize("file", ["decision.json", "record.json"])
def test_apply(file: str, cli: Cli, done: Path, mixtral: Path, tmp_path: Path) -> None:
    answer = cli("apply", done / "compressor" / file, mixtral, "--output", "again")
    assert (answer.status, answer.out) == (0, "Written to again.\n")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "compressor/decision.json"):
        assert (tmp_path / "again" / name).read_bytes() == (done / name).read_bytes(), name
    model, tokenizer = compressor.load(tmp_path / "again")
    assert model.config.num_local_experts == 6
    assert tokenizer is not None


def test_apply_overwrites_only_when_told(cli: Cli, done: Path, mixtral: Path) -> None:
    decision = done / "compressor" / "decision.json"
    assert cli("apply", "--quiet", decision, mixtral, "--output", "again").status == 0
    assert cli("apply", "--quiet", decision, mixtral, "--output", "again").status == 2
    answer = cli("apply", "--quiet", decision, mixtral, "--output", "again", "--overwrite")
    assert (answer.status, answer.out, answer.err) == (0, "", "")


def in_a_process(*arguments: str | Path, then: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, and then a line of Python."""
    run = "import sys; from compressor.cli import _exit_status; status = _exit_status(sys.argv[1:])"
    code = f"{run}; {then}; sys.exit(status)"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_check_reads_no_weights_and_an_error_is_the_status_of_the_process(
    recipe: WriteRecipe, copy_of: CopyOf, mixtral: Path
) -> None:
    """One process for both: what `check` imports, and how a command ends that is wrong."""
    model = copy_of(mixtral)
    (model / "model.safetensors").unlink()
    path = recipe(model=model)
    then = (
        "print(status, 'lm_eval' in sys.modules, 'datasets' in sys.modules); "
        f"from compressor.cli import main; main(['run', '--quiet', {str(path)!r}])"
    )
    answer = in_a_process("check", path, then=then)
    assert answer.returncode == 2
    assert answer.stdout.endswith("0 False False\n")
    assert answer.stderr.startswith("error: ")
    assert len(answer.stderr.splitlines()) == 1


def test_check_says_what_will_happen(cli: Cli, recipe: WriteRecipe, mixtral: Path, tmp_path: Path) -> None:
    answer = cli("check", recipe())
    assert (answer.status, answer.err) == (0, "")
    assert str(mixtral) in answer.out
    assert "MixtralForCausalLM" in answer.out
    assert "28 sets of 6 experts per layer, all of them looked at" in answer.out
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_inspect(cli: Cli, copy_of: CopyOf, mixtral: Path) -> None:
    model = copy_of(mixtral)
    (model / "model.safetensors").unlink()
    answer = cli("inspect", model)
    assert (answer.status, answer.err) == (0, "")
    assert "MixtralTopKRouter: top-2" in answer.out
    assert "the expert count is `num_local_experts` in config.json" in answer.out


def test_methods(cli: Cli) -> None:
    answer = cli("methods")
    assert (answer.status, answer.err) == (0, "")
    assert "expert-pruning  (from moe-compressor " in answer.out
    assert "expert_pruning (version 3): " in answer.out
    for option in ("keep", "drop", "max_subsets"):
        assert option in answer.out
    answer = cli("methods", "--without", "expert-pruning")
    assert "expert_pruning" not in answer.out


def test_one_method(cli: Cli, refused: Callable[..., str]) -> None:
    answer = cli("methods", "wanda")
    assert answer.out.startswith("wanda  (from moe-compressor ")
    assert "pattern: 2:4 | 4:8 | unstructured; default 2:4" in answer.out
    assert "expert_pruning" not in answer.out
    assert "reap" in cli("methods", "expert_pruning").out  # criteria are what it may be asked for
    refused("methods", "wand", says="there is no method 'wand'; did you mean 'wanda'?")


def test_everything_as_json(cli: Cli, recipe: WriteRecipe, done: Path) -> None:
    """What is printed as tables is there as JSON, alone on standard output."""
    statistics, decision = (done / "compressor" / name for name in ("statistics.safetensors", "decision.json"))
    model = record_of(done)["model"]["reference"]
    found = {
        "check": ("check", recipe(), "--quiet"),
        "inspect": ("inspect", model),
        "methods": ("methods", "wanda"),
        "decide": ("decide", statistics, "--keep", "6", "--output", "again.json"),
        "apply": ("apply", decision, model, "--output", "applied", "--quiet"),
        "evaluate": ("evaluate", done, "--recipe", done.parent / "recipe.yaml", "--quiet"),
    }
    answers = {name: json.loads(cli(*arguments, "--json").out) for name, arguments in found.items()}
    assert answers["check"]["layers"][0]["kept"] == 6
    assert answers["inspect"]["layers"][0]["num_experts"] == 8
    [wanda] = answers["methods"][0]["methods"]
    assert wanda["options"]["properties"]["pattern"]["enum"] == ["2:4", "4:8", "unstructured"]
    assert answers["decide"] == json.loads(Path("again.json").read_text())
    assert answers["apply"] == record_of(Path("applied"))
    ours, theirs = (one["evaluation"]["after"]["perplexity"] for one in (answers["evaluate"], record_of(done)))
    assert ours == theirs


def test_evaluate(cli: Cli, done: Path) -> None:
    answer = cli("evaluate", done, "--recipe", done.parent / "recipe.yaml", "--quiet")
    assert (answer.status, answer.err) == (0, "")
    figure = record_of(done)["evaluation"]["after"]["perplexity"]["ids"]["perplexity"]
    assert "perplexity" in answer.out
    assert f"{figure:.4g}"[:4] in answer.out


def test_evaluate_needs_no_calibration_text(cli: Cli, done: Path, mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    tokens = yaml.safe_load((done.parent / "recipe.yaml").read_text())["evaluate"]["perplexity"][0]["tokens"]
    path.write_text(
        yaml.safe_dump(settings(mixtral, Path("not-there.jsonl"), evaluate={"perplexity": [{"tokens": tokens}]}))
    )
    assert cli("evaluate", mixtral, "--recipe", path, "--quiet").status == 0


# --- from Python


def test_live_model_is_never_changed(mixtral: Path, tokens: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    result = compressor.compress(settings(mixtral, tokens), model=model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert model.training
    assert (result.folder, result.record["output"]) == (None, None)
    assert result.model.config.num_local_experts == 6
    assert list(tmp_path.iterdir()) == []


def test_in_memory_and_on_disk_give_the_same_model(done: Path, mixtral: Path, tokens: Path) -> None:
    result = compressor.compress(settings(mixtral, tokens))
    expected = logits(result.model, tokens)
    loaded, tokenizer = compressor.load(done)
    assert alike(logits(loaded, tokens), expected)
    assert alike(logits(AutoModelForCausalLM.from_pretrained(done), tokens), expected)
    assert tokenizer("w1 w5")["input_ids"] == [1, 5]
    assert kept(result.record) == kept(record_of(done))


def test_live_model_with_an_output(mixtral: Path, tokens: Path, tmp_path: Path, done: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    result = compressor.compress(settings(mixtral, tokens, output="out"), model=model)
    assert result.folder == Path("out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (done / "model.safetensors").read_bytes()


def test_live_model_made_from_scratch(make_model: Any, mixtral: Path, tokens: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(mixtral).config)
    model.config._name_or_path = ""
    result = compressor.compress(settings("mine", tokens, output="out"), model=model)  # type: ignore[arg-type]
    assert alike(logits(compressor.load("out")[0], tokens), logits(result.model, tokens))


def test_live_model_is_not_overwritten_on_disk(done: Path, tokens: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "mine")
    model = AutoModelForCausalLM.from_pretrained("mine")
    recipe = settings(Path("other"), tokens, output="mine", passes=[{"expert_pruning": {"keep": 4}}])
    with pytest.raises(compressor.RecipeError, match="output mine is the model's own folder, holds it, or"):
        compressor.compress(recipe, model=model, overwrite=True)


def test_recipe_by_path_mapping_and_object(done: Path, mixtral: Path, tokens: Path) -> None:
    mapping = settings(mixtral, tokens)
    recipe = load_recipe(mapping).recipe
    results = [compressor.compress(given).record for given in (mapping, recipe, done.parent / "recipe.yaml")]
    assert same_every_time(results[0]) == same_every_time(results[1]) == same_every_time(results[2])
    assert kept(results[0]) == kept(record_of(done))


def test_load_needs_the_checkpoint_alone(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "mine")
    (tmp_path / "mine" / "compressor" / "record.json").write_text("{")
    loaded, _ = compressor.load(tmp_path / "mine")
    expected, _ = compressor.load(done)
    assert all(map(torch.equal, loaded.parameters(), expected.parameters()))


def test_load_gives_none_without_a_tokenizer(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "mine", ignore=shutil.ignore_patterns("tokenizer*"))
    assert compressor.load(tmp_path / "mine")[1] is None


def test_wrong_edit_is_found_before_anything_is_written(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine compares removed with masked: a method whose edit does another thing is stopped."""
    method = load_plugins().methods["expert_pruning"]

    def edit_others(self: Any, layer: Any, decision: Json) -> None:
        layer.keep(range(6))

    monkeypatch.setattr(method, "edit", edit_others)
    path = recipe()
    answer = cli("run", "--quiet", path)
    assert answer.status == 2
    assert answer.err.startswith("error: the edited model does not answer as decided")
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_checkpoint_is_found_before_it_has_its_name(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = verify.save_checkpoint

    def save_another(model: Any, *arguments: Any) -> None:
        spoilt = copy.deepcopy(model)
        with torch.no_grad():
            spoilt.model.norm.weight += 1
        save(spoilt, *arguments)

    monkeypatch.setattr(verify, "save_checkpoint", save_another)
    path = recipe()
    answer = cli("run", "--quiet", path)
    assert answer.status == 2
    assert "1 tensor(s) differ from what was saved: model.norm.weight" in answer.err
    assert list(tmp_path.iterdir()) == [path]


# --- text


@pytest.mark.parametrize("kind", ["text", "jsonl", "dataset"])
def test_text_sources(kind: str, cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    documents = [" ".join(f"w{(17 * line + 5 * word) % 63 + 1}" for word in range(30)) for line in range(8)]
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    (tmp_path / "words.txt").write_text("\n".join(documents))
    (tmp_path / "words.jsonl").write_text(lines)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(lines)
    place = {"text": "words.txt", "jsonl": "words.jsonl", "dataset": "./folder"}[kind]
    answer = cli("run", "--quiet", recipe(data=[{kind: place, "samples": 6, "length": 32}]))
    assert (answer.status, answer.err) == (0, "")
    [about] = record_of(tmp_path / "out")["calibration"]
    assert (about["sequences"], about["tokens"]) == (6, 6 * 32)


def test_several_sources_keep_their_names(cli: Cli, recipe: WriteRecipe, tokens: Path, tmp_path: Path) -> None:
    data = [{"tokens": str(tokens), "samples": 2, "name": "two"}, {"tokens": str(tokens), "length": 4}]
    assert cli("run", "--quiet", recipe(data=data)).status == 0
    assert [(s["name"], s["tokens"]) for s in record_of(tmp_path / "out")["calibration"]] == [("two", 25), ("ids", 24)]


# --- the command itself


@pytest.mark.slow
def test_help_imports_nothing_heavy() -> None:
    heavy = (
        "print([name for name in ('torch', 'transformers', 'lm_eval', 'datasets', 'pydantic') if name in sys.modules])"
    )
    answer = in_a_process("--help", then=heavy)
    assert answer.returncode == 0
    assert answer.stdout.endswith("[]\n")


def test_version(cli: Cli) -> None:
    answer = cli("--version")
    assert (answer.status, answer.out) == (0, f"{compressor.__version__}\n")


@pytest.mark.slow
def test_ctrl_c_in_the_middle(tmp_path: Path) -> None:
    """A real signal to a real run, while it observes."""
    recipe = tmp_path / "recipe.yaml"
    data = [{"demo": "arithmetic", "samples": 2000, "length": 64}]
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": "demo",
                "calibration": {"data": data},
                "passes": [{"expert_pruning": {"keep": 6}}],
                "output": "out",
            }
        )
    )
    with subprocess.Popen(
        [sys.executable, "-m", "compressor.cli", "run", recipe],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - one thread; ignored in the background
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "observing" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest == "interrupted; nothing is left half done under the output's name\n"
    assert list(tmp_path.iterdir()) == [recipe]

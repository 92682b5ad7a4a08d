"""A program as a pass of a run: what it leaves is verified, and nothing is run that the user has not allowed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.test_quantised import packed
from safetensors.torch import load_file, save_file
from tiny_models import small_mixtral, token_ids, write_checkpoint, write_token_file

import compressor
from compressor import PluginError, ProgramError, RecipeError

Recipe = dict[str, Any]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of eight experts. Never write into it."""
    return write_checkpoint(small_mixtral(num_hidden_layers=1), tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe whose last pass is a script, which finds the two folders as $1 and $2."""
    tokens = str(write_token_file(tmp_path / "tokens.jsonl", token_ids(4, 24).tolist()))

    def write(script: str, *before: Recipe, **options: Any) -> Recipe:
        command = {"command": ["sh", "-c", script, "sh", "{input}", "{output}"], **options}
        return {
            "model": str(model),
            "weights": "disk",
            "calibration": {"data": [{"tokens": tokens}]},
            "passes": [*before, {"command": command}],
            "output": str(tmp_path / "out"),
        }

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left(tmp_path: Path) -> list[str]:
    """What is there beside what every test begins with."""
    return sorted({path.name for path in tmp_path.iterdir()} - {"model", "prepared", "tokens.jsonl"})


def test_nothing_is_run_that_is_not_allowed(
    recipe: Callable[..., Recipe], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """Every way refuses, and says what would be run."""
    asked = recipe(f"touch {tmp_path}/evil")
    says = f"would run `sh -c 'touch {tmp_path}/evil' sh '{{input}}' '{{output}}'`, which may do all that this account"
    for way in (compressor.check, compressor.compress):
        with pytest.raises(RecipeError) as error:
            way(asked)
        assert str(error.value).startswith(f"recipe passes[0].command: {says}")
    (tmp_path / "recipe.yaml").write_text(json.dumps(asked))
    for name in ("check", "run"):
        answer = cli(name, tmp_path / "recipe.yaml")
        assert answer.status == 2
        assert says in answer.err
    assert left(tmp_path) == ["recipe.yaml"]
    answer = cli("check", tmp_path / "recipe.yaml", "--allow-commands")
    assert answer.status == 0
    assert f"sh -c 'touch {tmp_path}/evil' sh '{{input}}' '{{output}}' is run, with all that this account" in answer.out
    assert left(tmp_path) == ["recipe.yaml"]


def test_a_program_behind_another_pass(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """What it leaves is measured and put out; a copy answers the same. A failure is mended, and the run resumed."""
    asked = recipe(f'test -f {tmp_path}/mended && cp -r "$1/." "$2"', {"expert_pruning": {"keep": 6}})
    asked |= {"evaluate": {"perplexity": asked["calibration"]["data"]}}
    with pytest.raises(ProgramError) as error:
        compressor.compress(asked, allow_commands=True)
    assert str(error.value) == "recipe passes[1].command: sh ended with status 1. It said nothing."
    assert left(tmp_path) == [".out.partial"]
    (tmp_path / "mended").touch()
    record = compressor.compress(asked, allow_commands=True, resume=True).record
    assert record["passes"][1]["checks"] == {"external_difference": 0.0, "external_kl": 0.0}
    assert record["evaluation"]["fidelity"]["tokens"]["kl"] > 0
    assert compressor.load(tmp_path / "out")[0].config.num_local_experts == 6
    assert left(tmp_path) == ["mended", "out"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "made by `sh -c 'test -f mended" in card


def test_every_prefix_of_a_chain_is_a_checkpoint(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """And the rest of the chain makes of it, to the bit, what the whole one makes of the original."""
    prune, zeros = {"expert_pruning": {"keep": 6}}, {"wanda": {}}
    whole = recipe('cp -r "$1/." "$2"', prune, zeros, keeps_zeros=True)
    compressor.compress(whole, allow_commands=True, output=tmp_path / "whole")
    compressor.compress(whole | {"passes": [prune]}, output=tmp_path / "pruned")
    compressor.compress(whole | {"passes": [zeros], "model": str(tmp_path / "pruned")}, output=tmp_path / "zeros")
    found = [load_file(tmp_path / name / WEIGHTS) for name in ("whole", "zeros")]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    assert sum(int((one == 0).sum()) for one in found[0].values()) >= 6 * 3 * 16 * 16 // 2


def test_a_program_that_may_fill_zeros_is_not_behind_them(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"passes\[1\]\.command: there are 2:4 zeros in 1 layer by then, and command"):
        compressor.check(recipe("true", {"wanda": {}}), allow_commands=True)


def other_names(name: str) -> str:
    """As llm-compressor and auto-round call Mixtral's experts, which transformers then initialises at random."""
    for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def test_experts_that_would_be_random_are_refused(recipe: Callable[..., Recipe], model: Path, tmp_path: Path) -> None:
    """Packed in four bits under other names."""
    prepared = Path(shutil.copytree(model, tmp_path / "prepared"))
    change, about = packed("pack-quantized")
    tensors = {
        key: value for name, one in load_file(model / WEIGHTS).items() for key, value in change(name, one).items()
    }
    config = json.loads((model / "config.json").read_text())
    (prepared / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    save_file({other_names(name): one for name, one in tensors.items()}, prepared / WEIGHTS, {"format": "pt"})
    before = contents(model)
    with pytest.raises(PluginError) as error:
        compressor.compress(recipe(f'cp -r {prepared}/. "$2"'), allow_commands=True)
    assert "recipe passes[0].command: what its external step has left is refused: " in str(error.value)
    assert "tensor(s) are missing from the checkpoint: model.layers.0.mlp.experts." in str(error.value)
    assert contents(model) == before
    assert left(tmp_path) == []


REFUSED = {
    "half": ('cp -r "$1/." "$2"; truncate -s 1000 "$2/model.safetensors"', "damaged, cut short"),
    "nothing": ("true", "there is no file in it."),
    "input, and fails": ('echo more >> "$1/LICENSE"; exit 1', "its external step has changed "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_leaves_is_refused(case: str, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    script, says = REFUSED[case]
    with pytest.raises(PluginError) as error:
        compressor.compress(recipe(script), allow_commands=True)
    assert str(error.value).startswith("recipe passes[0].command: ")
    assert says in str(error.value)
    assert left(tmp_path) == []


def test_answers_too_far_away_are_refused(recipe: Callable[..., Recipe], model: Path, tmp_path: Path) -> None:
    prepared = Path(shutil.copytree(model, tmp_path / "prepared"))
    tensors = load_file(model / WEIGHTS)
    save_file(tensors | {"lm_head.weight": 2 * tensors["lm_head.weight"]}, prepared / WEIGHTS, {"format": "pt"})
    asked = recipe(f'cp -r {prepared}/. "$2"', max_kl=1e-3)
    says = r"its answers are 0\.\d+ nats a token from those of the checkpoint that went in; expected at most 0\.001 "
    with pytest.raises(PluginError, match=says):
        compressor.compress(asked, allow_commands=True)
    assert left(tmp_path) == []


def test_files_of_another_format(recipe: Callable[..., Recipe], tmp_path: Path, cli: Callable[..., Any]) -> None:
    """Nothing is said of them but that nothing is known; a run of the same recipe finds them there."""
    asked = recipe('echo GGUF > "$2/model.gguf"', {"expert_pruning": {"keep": 6}}, verify="files")
    with pytest.raises(RecipeError, match=r"evaluate: command leaves what is not loaded here, so there is nothing"):
        compressor.check({**asked, "evaluate": {}}, allow_commands=True)
    with pytest.raises(RecipeError, match=r"so no pass goes on with it: put it last"):
        compressor.check({**asked, "passes": asked["passes"][::-1]}, allow_commands=True)
    (tmp_path / "recipe.yaml").write_text(json.dumps(asked))
    answer = cli("run", tmp_path / "recipe.yaml", "--allow-commands")
    assert answer.status == 0, answer.err
    assert answer.out.endswith(f"Written to {tmp_path}/out. Nothing of what command left was loaded or measured.\n")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "compressor", "model.gguf"}
    record = json.loads((tmp_path / "out" / "compressor" / "record.json").read_text())
    assert record["files_only"] == "command"
    assert record["passes"][1]["checks"] == {}
    assert "nothing of them was measured" in (tmp_path / "out" / "README.md").read_text()
    assert "compressor.load" not in (tmp_path / "out" / "README.md").read_text()
    result = compressor.compress(asked, allow_commands=True, resume=True)
    assert (result.record, result.model) == (record, None)

"""`compressor init` writes a recipe that `check` accepts and an editor knows, or says why there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tiny_models import tiny_model

from compressor.recipe.shipped import shipped

Cli = Callable[..., Any]
Refused = Callable[..., str]
MakeModel = Callable[..., Path]


def written(cli: Cli, model: Path | str, *options: str) -> dict[str, Any]:
    """The recipe that was written, which `check` accepts, with its text."""
    answer = cli("init", model, *options)
    assert (answer.status, answer.err) == (0, ""), answer.err
    assert answer.out.startswith("Written to recipe.yaml. `compressor check recipe.yaml` says what it will do, ")
    checked = cli("check", "--quiet", "recipe.yaml")
    assert (checked.status, checked.err) == (0, ""), checked.err
    text = Path("recipe.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 120 + len(str(model))
    return {**yaml.safe_load(text), "text": text}


def test_a_model_of_which_all_is_there(cli: Cli, mixtral: Path) -> None:
    found = written(cli, mixtral)
    assert found["passes"] == [{"expert_pruning": {"keep": 6, "choose": "measured"}}]
    assert (found["model"], found["output"]) == (str(mixtral), "mixtral-r6")
    assert found["text"].startswith(
        f"# {mixtral} with 6 of its 8 experts in every layer.\n# yaml-language-server: $sch"
    )
    assert "# The model has 2 MoE layer(s) of 8 experts, of which a token chooses 2. By " in found["text"]
    assert "possible are 2–7" in found["text"]
    assert "# 12 of 16 experts in 2 MoE layers stay, " in found["text"]


def test_a_model_without_a_tokenizer(cli: Cli, make_model: MakeModel, tmp_path: Path) -> None:
    found = written(cli, make_model(tmp_path / "bare", tokenizer=False))
    assert found["passes"] == [{"expert_pruning": {"keep": 6, "criterion": "aimer"}}]
    assert not {"calibration", "evaluate"} & found.keys()


def test_counts_are_those_that_groups_allow(cli: Cli, tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "grouped")
    found = written(cli, tmp_path / "grouped")
    [options] = found["passes"][0].values()
    assert options["keep"] % 2 == 0


def test_as_json(cli: Cli, mixtral: Path, tmp_path: Path) -> None:
    answer = cli("init", mixtral, "--output", "other.yaml", "--json")
    assert json.loads(answer.out) == {"output": "other.yaml", "text": (tmp_path / "other.yaml").read_text()}


def test_what_is_there_stays(refused: Refused, mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    refused("init", mixtral, says="error: recipe.yaml: it exists already, and is not overwritten; name another file ")
    refused("init", mixtral, "--output", "no/r.yaml", says="no/r.yaml: it cannot be written there: No such file or di")


def test_a_dense_model(refused: Refused, dense: Path) -> None:
    says = refused("init", dense, says="llama: no routed experts found. ")
    assert "so this is a dense model, or one whose structure needs an adapter from a plugin." in says


def test_a_model_that_can_spare_no_expert(refused: Refused, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(tmp_path / "small", num_local_experts=2)
    refused("init", model, says=f"error: {model}: none of its 2 experts can go: each token chooses 2.")


def test_no_model(refused: Refused) -> None:
    refused("init", "none", says="error: none: there is no such folder, nor is it a hub id")


def test_the_commands_of_the_page(cli: Cli, mixtral: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in block.strip().splitlines():
        command, *words = line.partition("#")[0].replace("MODEL", str(mixtral)).split()
        assert (command, cli(*words).status) == ("compressor", 0), line
    names = set(re.findall(r"`([a-z][\w.]*-[\w.-]+|quickstart)`", page)) - {"--install-completion"}
    assert names == {*shipped()}, names ^ {*shipped()}

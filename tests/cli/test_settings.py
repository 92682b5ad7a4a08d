"""What the command line sets: one reader for --set and for the options that stand for keys, on every command; plugins
that are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compressor import RecipeError
from compressor.cli import app
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe, parse_options

from .conftest import Cli, Refused, WriteRecipe

OPTIONS = load_plugins().methods["expert_pruning"].options_type
EXPECTED_NAME = "--set {}: expected NAME=VALUE, such as keep=4"

READ: list[tuple[list[str], dict[str, Any]]] = [
    (["keep=4"], {"keep": 4}),
    (["--keep=0.5"], {"keep": 0.5}),
    (["keep=0x10"], {"keep": 16}),
    (["--keep={0: 6, 1: 4}"], {"keep": {"0": 6, "1": 4}}),
    (["keep.0=6", "keep.1=4"], {"keep": {"0": 6, "1": 4}}),
    (["keep=6", "protect.3=[1, 2]"], {"keep": 6, "protect": {"3": [1, 2]}}),
    (["keep=6", "protect={3: [1, 2]}", "protect.3[1]=7"], {"keep": 6, "protect": {"3": [1, 7]}}),
    (["keep=6", "--criterion=", "drop="], {"keep": 6}),
    (["keep=6", "keep=4"], {"keep": 4}),
]


@pytest.mark.parametrize(("overrides", "expected"), READ)
def test_options_are_read_as_those_of_a_recipe(overrides: list[str], expected: dict[str, Any]) -> None:
    assert parse_options(OPTIONS, "expert_pruning", {}, overrides) == OPTIONS.model_validate(expected)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("keep", EXPECTED_NAME),
        ("=4", EXPECTED_NAME),
        ("protect..3=4", EXPECTED_NAME),
        ("keep=no", "--set {} expert_pruning.keep: found no, which YAML reads as false, expected a number"),
        ("keep=010", '--set {} expert_pruning.keep: found 010, which YAML reads as 8; write 8, or "010" in quotes if'),
        ("keep=12:30", "--set {} expert_pruning.keep: found 12:30, which YAML reads as 750; write 750, or "),
        ("keep=[", "--set {}: not valid YAML: while parsing a flow node"),
        ("keep=!x 4", "--set {} expert_pruning.keep: found the tag !x, expected a value without a tag"),
        ("kep=4", "--set {} expert_pruning.kep: unknown key; did you mean 'keep'? Known keys: keep, drop, "),
        ("search.x=4", "--set {} expert_pruning.search: found a mapping, expected 'auto', 'exact' or 'greedy'"),
    ],
)
def test_options_that_cannot_be_read(override: str, says: str, refused: Refused) -> None:
    given = ["--set", "keep=4"] if "keep" not in override else []
    refused("decide", "none", "--output", "d.json", *given, "--set", override, says=says.format(override))


def test_every_option_of_a_method_is_named_as_it_was_given(refused: Refused) -> None:
    refused(
        "decide", "none", "--output", "d.json", "--keep", "no", says="--keep=no expert_pruning.keep: found no, which"
    )
    refused(
        "decide", "none", "--output", "d.json", "--keep", "4", "--criterion", "4", says="--criterion=4 expert_pruning.c"
    )


def test_options_that_stand_for_keys_are_named_as_they_were_given(refused: Refused, recipe: WriteRecipe) -> None:
    for option, key in (("--memory", "memory"), ("--device-memory", "device_memory"), ("--disk", "disk")):
        refused(
            "check", recipe(), option, "16XB", says=f"{option}=16XB {key}: a size, such as 16GB, 512MiB or 16e9, not"
        )
    refused(
        "run", recipe(), "--weights", "disc", says="--weights=disc weights: found 'disc', expected 'auto', 'memory' or"
    )


def test_an_option_that_a_recipe_does_not_have_may_be_set_with_all_that_is_in_it(recipe: WriteRecipe) -> None:
    methods = load_plugins().methods
    changed = load_recipe(recipe(), overrides=["passes.0.expert_pruning.protect.1=[3]"], methods=methods)
    assert changed.to_mapping()["passes"][0]["expert_pruning"]["protect"] == {"1": [3]}
    with pytest.raises(
        RecipeError, match=r"--set passes.0.expert_pruning.protct.1=4 passes.0..expert_pruning.protct: unk"
    ):
        load_recipe(recipe(), overrides=["passes.0.expert_pruning.protct.1=4"], methods=methods)


COMMANDS = ["run R", "check R", "inspect M", "methods", "evaluate M --recipe R", "decide S --output d --keep 4"]
COMMANDS += [
    "apply D M --output o",
    "compare M --recipe R --against M",
    "sweep R --keep 4",
    "init M --output new.yaml",
    "schema",
    "serve-check M",
]
WITHOUT_PLUGINS = {"recipes", "push", "export", "publish_statistics"}


def test_the_commands_named_here_are_all() -> None:
    """`plugin` is a command of commands."""
    assert WITHOUT_PLUGINS | {command.split()[0] for command in COMMANDS} == {
        one.name or one.callback.__name__ for one in app.registered_commands if one.callback
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_plugin_can_be_left_out_of_every_command(
    command: str, refused: Refused, recipe: WriteRecipe, mixtral: Path
) -> None:
    names = {"R": recipe(), "M": mixtral, "D": recipe(name="decision.json"), "S": "none"}
    names["D"].write_text(
        '{"format": 2, "passes": [{"method": "a", "version": "1", "options": {}, "decision": {"layers": {}}}]}'
    )
    arguments = [names.get(word, word) for word in command.split()]
    refused(*arguments, "--without", "nothing", says="--without nothing: no such plugin is installed; installed are: ")


def test_what_a_plugin_left_out_would_have_offered_is_not_known(
    refused: Refused, cli: Cli, recipe: WriteRecipe
) -> None:
    assert "expert_pruning" not in cli("methods", "--without", "expert-pruning").out
    left = [name for name in load_plugins().methods if name != "expert_pruning"]
    refused("check", recipe(), "--without", "expert-pruning", says=f"Known methods: {', '.join(left)}")

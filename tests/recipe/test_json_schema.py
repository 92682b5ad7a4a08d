"""The JSON Schema of recipes agrees with what is read: right recipes fit it, and slips do not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.plugins import load_plugins
from compressor.recipe.json_schema import recipe_schema
from compressor.recipe.shipped import described

Cli = Callable[..., Any]
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
SAYS_NOTHING = {"$schema", "$defs", "default", "description", "format"}
FITS: dict[str, Callable[[Any, Any], Any]] = {
    "type": lambda says, value: isinstance(value, TYPES[says]) and (says == "boolean") == isinstance(value, bool),
    "const": lambda says, value: value == says,
    "enum": lambda says, value: value in says,
    "required": lambda says, value: not isinstance(value, dict) or value.keys() >= {*says},
    "minItems": lambda says, value: not isinstance(value, list) or len(value) >= says,
    "minLength": lambda says, value: not isinstance(value, str) or len(value) >= says,
    "pattern": lambda says, value: not isinstance(value, str) or re.search(says, value),
    "minimum": lambda says, value: not is_number(value) or value >= says,
    "maximum": lambda says, value: not is_number(value) or value <= says,
    "exclusiveMinimum": lambda says, value: not is_number(value) or value > says,
    "exclusiveMaximum": lambda says, value: not is_number(value) or value < says,
}
GOOD: dict[str, Any] = {"model": "demo", "passes": [{"expert_pruning": {"keep": 6}}]}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    plugins = load_plugins()
    found = recipe_schema(plugins.methods, plugins.criteria)
    assert json.loads(json.dumps(found)) == found
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def misfits(schema: Any, value: Any, root: Any, path: str = "") -> Iterator[str]:
    """Where a value does not fit; a keyword that is not known here is a failure. After JSON Schema 2020-12."""
    if schema is False:
        yield f"{path}: not known"
        return
    for word, says in schema.items():
        if word == "$ref":
            yield from misfits(root["$defs"][says.removeprefix("#/$defs/")], value, root, path)
        elif word == "anyOf":
            if not any(not [*misfits(one, value, root, path)] for one in says):
                yield f"{path}: {value!r} fits none"
        elif word == "properties":
            for key in says.keys() & value.keys() if isinstance(value, dict) else ():
                yield from misfits(says[key], value[key], root, f"{path}.{key}")
        elif word == "additionalProperties":
            for key in value.keys() - schema.get("properties", {}).keys() if isinstance(value, dict) else ():
                yield from misfits(says, value[key], root, f"{path}.{key}")
        elif word == "items":
            for number, one in enumerate(value if isinstance(value, list) else ()):
                yield from misfits(says, one, root, f"{path}[{number}]")
        elif word not in SAYS_NOTHING and not FITS[word](says, value):
            yield f"{path}: {value!r} against {word} {says!r}"


@pytest.mark.parametrize("one", described(), ids=lambda one: one["name"])
def test_every_recipe_of_ours_fits(one: dict[str, Any], schema: dict[str, Any]) -> None:
    assert [*misfits(schema, yaml.safe_load(one["text"]), schema)] == []


@pytest.mark.parametrize(
    "keep", [6, 0.75, {"mean": 6}, {"fraction": 0.5, "min": 4}, {"0": 8, "3": 4}, {"model.layers.3.mlp": 4}]
)
def test_every_form_of_a_count_fits(keep: Any, schema: dict[str, Any]) -> None:
    assert [*misfits(schema, {**GOOD, "passes": [{"expert_pruning": {"keep": keep}}]}, schema)] == []


@pytest.mark.parametrize("changes", [
    {"memory": "16GB", "device_memory": 16e9, "disk": 10**12},
    {"calibration": {"data": [{"text": "a.txt"}, {"task": "gsm8k", "samples": 4}, {"tokens": "ids.jsonl"}]}},
    {"evaluate": None, "output": "runs/out"},
    {"passes": [{"expert_pruning": {"keep": 6, "criterion": "reap"}}, {"output_scale": None}]},
    {"passes": [{"dynamic_skipping": {"threshold": {"0": 0.3, "5": "median"}}}]},
])  # fmt: skip
def test_right(changes: dict[str, Any], schema: dict[str, Any]) -> None:
    assert [*misfits(schema, GOOD | changes, schema)] == []


@pytest.mark.parametrize("changes", [
    {"modle": "demo"},
    {"passes": []},
    {"passes": [{"expert_prunning": {"keep": 6}}]},
    {"passes": [{"expert_pruning": {"keep": 6}, "output_scale": {}}]},
    {"passes": [{"expert_pruning": {"kep": 6}}]},
    {"passes": [{"expert_pruning": {"keep": "six"}}]},
    {"passes": [{"expert_pruning": {"keep": 6, "criterion": "reaper"}}]},
    {"passes": [{"expert_pruning": {"keep": 6, "search": "fast"}}]},
    {"calibration": {"data": [{"samples": 4}]}},
    {"calibration": {"data": {"demo": "mix"}}},
    {"calibration": {"batch_size": 0}},
    {"seed": -1},
    {"memory": [16]},
    {"evaluate": {"tasks": "gsm8k"}},
])  # fmt: skip
def test_wrong(changes: dict[str, Any], schema: dict[str, Any]) -> None:
    assert len([*misfits(schema, GOOD | changes, schema)]) == 1


def test_every_key_is_described(schema: dict[str, Any]) -> None:
    for name, one in {"recipe": schema, **schema["$defs"]}.items():
        for key, about in one["properties"].items():
            assert about.get("description"), f"{name}.{key}"


def test_the_command(cli: Cli, tmp_path: Path, schema: dict[str, Any]) -> None:
    assert json.loads(cli("schema").out) == schema
    file = tmp_path / "recipe.schema.json"
    assert cli("schema", "--output", file).out == f"Written to {file}.\n"
    assert json.loads(file.read_text()) == schema
    fewer = json.loads(cli("schema", "--without", "wanda").out)
    assert "WandaOptions" in schema["$defs"].keys() - fewer["$defs"].keys()
    answer = cli("schema", "--output", tmp_path / "none" / "recipe.schema.json")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.endswith("recipe.schema.json: it cannot be written there: No such file or directory.\n")

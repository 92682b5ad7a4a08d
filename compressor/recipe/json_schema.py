"""The JSON Schema of recipes, with the options of the methods that are installed: by it an editor completes and checks.

It says what each key is, not what keys mean together: `compressor check` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from compressor.recipe.schema import Recipe
from compressor.selection.options import SelectionOptions

if TYPE_CHECKING:
    from compressor.method import Method


def recipe_schema(methods: Mapping[str, type[Method[Any]]], criteria: Iterable[str]) -> dict[str, Any]:
    """Of a whole recipe, by draft 2020-12; where experts are selected, `criterion` is one of the `criteria`."""
    models: list[type[BaseModel]] = [Recipe, *(method.options_type for method in methods.values())]
    refs, schema = models_json_schema([(model, "validation") for model in models], ref_template="#/$defs/{model}")
    recipe = (definitions := _readable(schema["$defs"])).pop("Recipe")
    del recipe["description"], definitions["PassSpec"]
    passes = []
    for name, method in methods.items():
        reference, about = refs[method.options_type, "validation"], (method.__doc__ or "").strip().partition("\n")[0]
        passes.append({
            "type": "object",
            "properties": {name: {"anyOf": [reference, {"type": "null"}], "description": about}},
            "required": [name],
            "additionalProperties": False,
        })  # fmt: skip
        if issubclass(method.options_type, SelectionOptions):
            options = definitions[reference["$ref"].rpartition("/")[2]]["properties"]
            options["criterion"]["anyOf"] = [{"enum": sorted(criteria)}, {"type": "null"}]
    recipe["properties"]["passes"]["items"] = {"anyOf": passes}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe, "$defs": definitions}


def _readable(schema: Any) -> Any:
    """The same without the titles that pydantic makes of names; of several forms each that fits is right."""

    def plain(one: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in one.items() if key != "title" or not isinstance(value, str)}
        return {{"oneOf": "anyOf"}.get(key, key): value for key, value in kept.items()}

    return json.loads(json.dumps(schema), object_hook=plain)

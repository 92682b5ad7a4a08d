"""pydantic's errors as plain sentences, each with its place in the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from compressor.data.sources import SOURCE_KINDS
from compressor.recipe.document import Document, KeyPath, in_yaml, said_together
from compressor.wording import did_you_mean

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

ModelT = TypeVar("ModelT", bound=BaseModel)


def validate(model: type[ModelT], document: Document, path: KeyPath) -> ModelT | None:
    """The model of the data at `path`, strictly; None if that cannot be, and every error among the mistakes."""
    try:
        return model.model_validate_json(json.dumps(document.at(path) or {}, default=str), strict=True)
    except ValidationError as error:
        together: dict[KeyPath, list[ErrorDetails]] = {}
        for details in error.errors():
            counts_right_ones = details["type"] == "too_short" and len(details["input"]) >= details["ctx"]["min_length"]
            if not counts_right_ones:  # pydantic leaves wrong entries out when it counts a list
                together.setdefault(_within(document, path, details), []).append(details)
    for inner, alike in together.items():
        at_key = alike[0]["type"] == "extra_forbidden"
        document.add_mistake(inner, _explain(model, alike, document.plain(inner)), at_key=at_key)
    return None


def _within(document: Document, path: KeyPath, error: ErrorDetails) -> KeyPath:
    """The path in the data: pydantic's `loc` without the names that it adds for the members of a union."""
    for key in error["loc"]:
        if (*path, key) in document:
            path = (*path, key)
    return (*path, error["loc"][-1]) if error["type"] == "missing" else path


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "greater_than_equal": "a number of at least {ge:.15g}",
    "greater_than": "a number greater than {gt:.15g}",
    "less_than_equal": "a number of at most {le:.15g}",
    "less_than": "a number less than {lt:.15g}",
    "too_short": "a list of at least {min_length}",
    "string_too_short": "a text of at least {min_length} characters",
    "tuple_type": "a list (begin each entry with `- `)",
    "list_type": "a list (begin each entry with `- `)",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
"""What is expected where an error of pydantic's own words would not be a recipe's."""


def _explain(model: type[BaseModel], errors: Sequence[ErrorDetails], plain: str | None) -> str:
    """One sentence for all errors about one value: several if the value may be of several types."""
    first = errors[0]
    kind, value = first["type"], first["input"]
    if kind in ("missing", "extra_forbidden"):
        fields, key = _fields_around(model, first["loc"][:-1]), str(first["loc"][-1])
        if kind == "missing":
            return f"missing, expected {fields[key].description}"
        known = f"Known keys: {', '.join(fields)}" if fields else "Nothing can be set here"
        return f"unknown key{did_you_mean(key, fields)} {known}"
    if own := [str(error["ctx"]["error"]) for error in errors if error["type"] in ("value_error", "assertion_error")]:
        return "; ".join(dict.fromkeys(own))
    found = in_yaml(value)
    if plain and plain.lower() != found:
        found = f"{plain}, which YAML reads as {found}" if isinstance(value, bool) else plain
    if kind == "source_kind":
        kinds = [one for one in SOURCE_KINDS if isinstance(value, dict) and one in value]
        return f"found {f'the keys {said_together(kinds)}' if kinds else found}; {first['msg']}"
    expected = dict.fromkeys(_expectation(error) for error in errors)
    if "a number" in expected:
        expected.pop("a whole number", None)
    if plain and value is not None and [*expected] == ["a text"]:
        reads = in_yaml(value) if isinstance(value, bool) else "a number"
        return f'found {plain}, which YAML reads as {reads}; put it in quotes: "{plain}"'
    return f"found {found}, expected {' or '.join(expected)}"


def _expectation(error: ErrorDetails) -> str:
    own = _EXPECTED.get(error["type"])
    return own.format(**error["ctx"]) if own and "{" in own else own or error["msg"].removeprefix("Input should be ")


def _fields_around(model: type[BaseModel], loc: Sequence[str | int]) -> dict[str, FieldInfo]:
    """The fields of the model that pydantic's `loc` leads to."""
    models = [model]
    for key in loc:
        inner = [m.model_fields[key].annotation for m in models if key in m.model_fields]
        named = [m for m in models if m.__name__ == key]
        models = [found for annotation in inner for found in _models_in(annotation)] or named or models
    return {name: info for m in models for name, info in m.model_fields.items()}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every model that an annotation mentions, such as those of a union or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)

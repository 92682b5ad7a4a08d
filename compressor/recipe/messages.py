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


# pydantic's errors → plain sentences -----------------------------------------------------------------------


def validate(model: type[ModelT], document: Document, path: KeyPath) -> ModelT | None:
    """The model made of the data at `path`; or None, and every error added to the document's mistakes."""
    data = document.at(path)
    data = {} if data is None else data
    value, errors = _parse(model, data)
    together: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        together.setdefault(_within(data, error), []).append(error)
    for inner, alike in together.items():
        message = _explain(model, alike, document.plain(path + inner))
        document.add_mistake(path + inner, message, at_key=alike[0]["type"] == "extra_forbidden")
    return value


def _parse(model: type[ModelT], data: Any) -> tuple[ModelT | None, list[ErrorDetails]]:
    """Validate, and add the errors for true and false where pydantic would take them for 1 and 0."""
    value: ModelT | None = None
    errors: list[ErrorDetails] = []
    try:
        value = model.model_validate(data)
    except ValidationError as error:
        errors = [details for details in error.errors() if not _only_counted_wrong(details)]
    try:
        model.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        errors += [details for details in error.errors() if isinstance(details["input"], bool)]
    return (None if errors else value), errors


def _only_counted_wrong(error: ErrorDetails) -> bool:
    """Whether a list is called too short because pydantic leaves the wrong entries out when it counts."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _within(data: Any, error: ErrorDetails) -> KeyPath:
    """The path in the data: pydantic's `loc` without the names that it adds for the members of a union."""
    path: KeyPath = ()
    for n, key in enumerate(error["loc"], start=1):
        is_missing = error["type"] == "missing" and n == len(error["loc"])
        if isinstance(data, dict) and key in data:
            data = data[str(key)]
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        elif not is_missing:
            continue
        path = (*path, key)
    return path


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "path_type": "a path",
    "none_required": "nothing",
    "greater_than_equal": "a number of at least {ge}",
    "greater_than": "a number greater than {gt}",
    "less_than_equal": "a number of at most {le}",
    "less_than": "a number less than {lt}",
    "too_short": "a list with at least {min_length}",
    "too_long": "a list with at most {max_length}",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
    "string_pattern_mismatch": "a text that matches {pattern}",
    "tuple_type": "a list (begin each entry with `- `)",
    "list_type": "a list (begin each entry with `- `)",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "union_tag_not_found": "a mapping with the key {discriminator}",
    "union_tag_invalid": "{discriminator} to be one of {expected_tags}",
}


def _explain(model: type[BaseModel], errors: Sequence[ErrorDetails], plain: str | None) -> str:
    """One sentence for all errors about one value: several if the value may be of several types."""
    first = errors[0]
    if first["type"] == "missing":
        fields, key = _fields_around(model, first["loc"])
        description = fields[key].description if key in fields else None
        return f"missing, expected {description}" if description else "missing"
    if first["type"] == "extra_forbidden":
        fields, key = _fields_around(model, first["loc"])
        known = f"Known keys: {', '.join(fields)}" if fields else "Nothing can be set here"
        return f"unknown key{did_you_mean(key, fields)} {known}"
    value = first["input"]
    own = [error for error in errors if error["type"] in ("value_error", "assertion_error")]
    if own and not (isinstance(value, bool) and len(own) < len(errors)):  # no validator's word on true as 1
        return "; ".join(dict.fromkeys(str(error["ctx"]["error"]) for error in own))
    errors = [error for error in errors if error not in own]
    if first["type"] == "source_kind":
        kinds = [kind for kind in SOURCE_KINDS if isinstance(value, dict) and kind in value]
        found = f"the keys {said_together(kinds)}" if kinds else _found(value, plain)
        return f"found {found}; {first['msg']}"
    expected = dict.fromkeys(_expectation(error) for error in errors)
    if "a number" in expected:
        expected.pop("a whole number", None)
    if plain and value is not None and expected.keys() <= {"a text", "a path"}:
        reads = in_yaml(value) if isinstance(value, bool) else "a number"
        return f'found {plain}, which YAML reads as {reads}; put it in quotes: "{plain}"'
    return f"found {_found(value, plain)}, expected {' or '.join(expected)}"


def _expectation(error: ErrorDetails) -> str:
    template = _EXPECTED.get(error["type"])
    if template is None:
        message = error["msg"].removeprefix("Input should be ")
        return message[:1].lower() + message[1:]
    context = {
        name: int(limit) if isinstance(limit, float) and limit.is_integer() else limit
        for name, limit in error.get("ctx", {}).items()
    }
    for limit in ("min_length", "max_length"):
        if limit in context and error["type"] in ("too_short", "too_long"):
            context[limit] = "1 entry" if context[limit] == 1 else f"{context[limit]} entries"
    return template.format(**context)


def _fields_around(model: type[BaseModel], loc: Sequence[str | int]) -> tuple[dict[str, FieldInfo], str]:
    """The fields of the model in which pydantic's `loc` ends, and the last key of `loc`."""
    models = [model]
    for key in loc[:-1]:
        inner = [m.model_fields[key].annotation for m in models if key in m.model_fields]
        named = [m for m in models if m.__name__ == key]
        if inner:
            models = [found for annotation in inner for found in _models_in(annotation)]
        elif named:
            models = named
    return {name: info for m in models for name, info in m.model_fields.items()}, str(loc[-1])


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every model that an annotation mentions, such as those of a union or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


# Wording ---------------------------------------------------------------------------------------------------


def _found(value: Any, plain: str | None) -> str:
    """As `in_yaml`, and as it is written where that looks like something else."""
    text = in_yaml(value)
    if not plain or plain.lower() == text:
        return text
    return f"{plain}, which YAML reads as {text}" if isinstance(value, bool) else plain

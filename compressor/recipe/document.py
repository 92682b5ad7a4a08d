"""A recipe's plain data, from YAML, Python or the command line, that remembers where each value stood.

Everything is a YAML node until it is read: what Python gives is written as JSON, which is YAML, and what the command
line sets replaces nodes. What YAML 1.1 reads as something else than it looks like (`no`, `010`, `12:30`, dates) is
refused rather than guessed. Not supported: YAML merge keys (`<<`), tags, several documents in one file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from compressor.errors import RecipeError, shortened
from compressor.wording import did_you_mean

KeyPath = tuple[str | int, ...]
"""The way from the top of a recipe to a value: `("passes", 0, "expert_pruning", "keep")`."""
TOO_LARGE = 2**63
"""No count, seed or size is as large as this."""
MAX_BYTES = 256 * 1024
MAX_VALUES = 10_000

_TAG = "tag:yaml.org,2002:"
_RECIPE_MAPPING = "a mapping with at least model, calibration and passes"
_EXAMPLE = "PATH=VALUE, such as passes.0.expert_pruning.keep=4"
_REFUSED = object()
"""Stands in the data for a value that was found wrong already, so that it is not reported twice."""


class MistakeError(Exception):
    """What is wrong, and where. `order` sorts as the file does; what the command line sets comes after it."""

    def __init__(self, order: tuple[int, ...], where: str, message: str) -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.order = order


class Document:
    """A recipe from a YAML file or Python; names and messages are meant from `inside`, for a part of one. `read` makes
    its plain data, with all places. Raises RecipeError where no mapping can be had.
    """

    data: dict[str, Any]

    def __init__(self, source: Path | Mapping[str, Any] | BaseModel, *, inside: KeyPath = ()) -> None:
        self._is_file = isinstance(source, Path)
        self._inside = inside
        self._origins = [str(source) if self._is_file else "" if inside else "recipe"]
        self._nodes: dict[KeyPath, yaml.Node] = {}
        self._keys: dict[KeyPath, yaml.Node] = {}
        self._plain: dict[KeyPath, str] = {}
        self._refused: set[KeyPath] = set()
        self._mistakes: list[MistakeError] = []
        try:
            text = self._text_of(source) if isinstance(source, Path) else _as_json(source)
            node = self._compose(text, self._origins[0])
            if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
                raise RecipeError(f"{source}: the file is empty, expected {_RECIPE_MAPPING}")
            if not isinstance(node, yaml.MappingNode):
                raise self._mistake(node.start_mark, (), f"found {_in_short(node)}, expected {_RECIPE_MAPPING}")
        except MistakeError as mistake:
            raise RecipeError(str(mistake)) from mistake
        self._root: yaml.Node = node

    # The plain data

    def read(self) -> None:
        """Make plain data of the nodes; what is wrong becomes a mistake."""
        try:
            self.data = self._build(self._root, ())
        except MistakeError as mistake:
            raise RecipeError(str(mistake)) from mistake
        if () in self._refused:
            self.raise_mistakes()

    def at(self, path: KeyPath) -> Any:
        value: Any = self.data
        for key in path:
            value = value[key]
        return value

    def plain(self, path: KeyPath) -> str | None:
        """A scalar that is no text as it is written, None for one from Python."""
        return self._plain.get(path)

    def __contains__(self, path: KeyPath) -> bool:
        return path in self._nodes

    def _build(self, node: yaml.Node, path: KeyPath, around: tuple[yaml.Node, ...] = ()) -> Any:
        self._nodes[path] = node
        if len(self._nodes) > MAX_VALUES:
            message = f"expands to more than {MAX_VALUES:,} values; does an alias (*name) repeat other aliases?"
            raise self._mistake(node.start_mark, (), message)
        if any(node is other for other in around):
            return self._refuse(path, "an alias stands inside the value that it repeats")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if node.tag not in (f"{_TAG}seq", f"{_TAG}map"):
            return self._refuse(path, _unknown_tag(node))
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*path, i), (*around, node)) for i, item in enumerate(node.value)]
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, mark = key_node.value, key_node.start_mark
            if wrong := _wrong_key(key_node):
                self._mistakes.append(self._mistake(mark, path, wrong))
            elif key in built:
                _, first = self._place(self._keys[(*path, key)].start_mark)
                self._mistakes.append(self._mistake(mark, (*path, key), f"given twice, first at {first}; keep one"))
            else:
                self._keys[(*path, key)] = key_node
                built[key] = self._build(value_node, (*path, key), (*around, node))
        return built

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        tag, text = node.tag.removeprefix(_TAG), node.value
        is_exponent = node.style is None and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text)
        if tag in ("str", "value") and not is_exponent:
            whole = _whole(text)
            return self._refuse(path, "found half of a UTF-16 pair") if whole is None else whole
        if tag == "timestamp":
            return self._refuse(path, f'found {text}, which YAML reads as a date; put it in quotes: "{text}"')
        if tag not in ("null", "bool", "int", "float", "str"):
            return self._refuse(path, _unknown_tag(node))
        try:
            value = float(text) if tag == "str" else yaml.constructor.SafeConstructor().construct_object(node)
        except (ValueError, LookupError):
            return self._refuse(path, f"found {in_yaml(text)}, which is not a value of type {tag}")
        if tag == "int" and abs(value) >= TOO_LARGE:
            return self._refuse(path, f"found {shortened(text, 60)}, expected a number between -2^63 and 2^63")
        if tag != "bool" and (re.match(r"[-+]?0[0-7_]", text) or ":" in text):
            advice = f'write {value}, or "{text}" in quotes if a text is meant'
            return self._refuse(path, f"found {text}, which YAML reads as {value}; {advice}")
        if node.style is None and (self._is_file or node.start_mark.name != self._origins[0]):
            self._plain[path] = text
        return value

    # Mistakes

    def mistake(self, path: KeyPath, message: str, *, at_key: bool = False) -> MistakeError:
        """A mistake at the place of the value (or key) at `path`, or else of the nearest value around it."""
        node = self._keys.get(path) if at_key else None
        node = node or next(self._nodes[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self._nodes)
        return self._mistake(node.start_mark, path, message)

    def add_mistake(self, path: KeyPath, message: str, *, at_key: bool = False) -> None:
        """Note a mistake, unless the value at `path` or one around it was refused already."""
        if not any(path[:n] in self._refused for n in range(len(path) + 1)):
            self._mistakes.append(self.mistake(path, message, at_key=at_key))

    def raise_mistakes(self) -> None:
        """Raise one RecipeError with all mistakes in the order of the file, if there are any."""
        if self._mistakes:
            self._mistakes.sort(key=lambda one: one.order)
            raise RecipeError("\n".join(dict.fromkeys(map(str, self._mistakes))))

    def _refuse(self, path: KeyPath, message: str) -> object:
        self.add_mistake(path, message)
        self._refused.add(path)
        return _REFUSED

    def _place(self, mark: yaml.Mark) -> tuple[tuple[int, ...], str]:
        """What a place is ordered by, and how it is said."""
        number = self._origins.index(mark.name)
        at = f":{mark.line + 1}:{mark.column + 1}" if self._is_file and number == 0 else ""
        return (number, mark.line, mark.column), f"{mark.name}{at}" if at else shortened(mark.name, 120)

    def _mistake(self, mark: yaml.Mark, path: KeyPath, message: str) -> MistakeError:
        order, place = self._place(mark)
        return MistakeError(order, f"{place} {self._name(path)}".strip(), message)

    def _name(self, path: KeyPath) -> str:
        """`("passes", 0, "expert_pruning", "keep")` → `passes[0].expert_pruning.keep`."""
        shown = path[len(self._inside[:-1]) :]
        return "".join(f"[{k}]" if isinstance(k, int) else f".{shortened(k, 120)}" for k in shown).removeprefix(".")

    # From the command line

    def override(self, text: str) -> None:
        """Apply `PATH=VALUE`, or `--key=VALUE`, an option that stands for a key; what is wrong is a mistake."""
        dotted, equals, written = text.partition("=")
        is_option = dotted.startswith("--")
        mark = self._new_origin(text if is_option else f"--set {text}")
        dotted = dotted.removeprefix("--").replace("-", "_") if is_option else dotted.strip()
        keys = re.sub(r"\[(\d+)\]", r".\1", dotted).split(".")
        try:
            if not equals or not all(keys):
                example = "NAME=VALUE, such as keep=4" if self._inside else _EXAMPLE
                raise self._mistake(mark, (), f"expected {example}")
            value = self._compose(written, mark.name) or yaml.ScalarNode(f"{_TAG}null", "", mark)
            self._root = self._with(self._root, [*map(str, self._inside), *keys], value, mark)
        except MistakeError as mistake:
            self._mistakes.append(mistake)

    def replace(self, key: str, value: str, option: str, *, only_if_missing: bool = False) -> None:
        """Put a text at the top of the recipe; `option` is what errors say of its place."""
        given = [one.tag != f"{_TAG}null" for name, one in self._root.value if name.value == key]
        if not (only_if_missing and any(given)):
            mark = self._new_origin(option)
            self._root = self._with(self._root, [key], yaml.ScalarNode(f"{_TAG}str", value, mark, style='"'), mark)

    def _new_origin(self, name: str) -> yaml.Mark:
        self._origins.append(name)
        return yaml.Mark(name, 0, 0, 0, None, 0)

    def _with(
        self, node: yaml.Node, keys: Sequence[str], value: yaml.Node, mark: yaml.Mark, path: KeyPath = ()
    ) -> yaml.Node:
        """A copy with another value at `keys`, of which only the last may be new, but any in a method's options."""
        key, *rest = keys
        name = self._name(path) or "the recipe"
        if isinstance(node, yaml.SequenceNode):
            if not key.isdecimal():
                raise self._mistake(mark, (), f"{name} is a list, expected a number from 0 after it, found {key!r}")
            if len(key) > 9 or int(key) >= len(node.value):
                entries = "1 entry" if len(node.value) == 1 else f"{len(node.value)} entries"
                raise self._mistake(mark, (), f"{name} has {entries}, counted from 0")
            items = list(node.value)
            items[int(key)] = self._with(items[int(key)], rest, value, mark, (*path, int(key))) if rest else value
            return yaml.SequenceNode(node.tag, items, node.start_mark)
        if isinstance(node, yaml.ScalarNode) and node.tag != f"{_TAG}null":
            raise self._mistake(mark, (), f"{name} is {in_yaml(node.value)}, which has nothing inside to set")
        pairs = {str(one.value): (one, inner) for one, inner in node.value or ()}
        is_in_options = path[:1] == ("passes",) and len(path) >= 3
        if rest and key not in pairs and not is_in_options:
            hint = did_you_mean(key, pairs)
            raise self._mistake(mark, (), f"{name} has no key {in_yaml(key)}{hint} Only the last key may be new")
        key_node, inner = yaml.ScalarNode(f"{_TAG}str", key, mark), value
        if rest:
            key_node, inner = pairs.get(key, (key_node, yaml.ScalarNode(f"{_TAG}null", "", mark)))
            inner = self._with(inner, rest, value, mark, (*path, key))
        return yaml.MappingNode(f"{_TAG}map", list({**pairs, key: (key_node, inner)}.values()), node.start_mark)

    # Text → nodes

    def _text_of(self, file: Path) -> str:
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_BYTES + 1).removeprefix(codecs.BOM_UTF8)
        except OSError as error:
            raise RecipeError(f"{file}: cannot be read, expected a recipe (YAML): {error.strerror}") from error
        except ValueError as error:
            name = in_yaml(str(file))
            raise RecipeError(f"{name}: no file can have this name, expected that of a recipe (YAML)") from error
        if len(data) > MAX_BYTES:
            raise RecipeError(f"{file}: larger than {MAX_BYTES // 1024} KiB, expected a recipe (YAML)")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            message = f"found the byte 0x{data[error.start]:02x}, which is not UTF-8; save the file as UTF-8"
            raise self._mistake(_end_of(data[: error.start].decode(), str(file)), (), message) from error

    def _compose(self, text: str, name: str) -> yaml.Node | None:
        """The text's one YAML document, or None if there is none. Nothing is constructed from it yet."""
        try:
            loader = yaml.SafeLoader(text)
            loader.name = name
            node = loader.get_node() if loader.check_node() else None
            if loader.check_node():
                mark = loader.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise self._mistake(mark, (), "a second document begins, expected only one")
            return node
        except yaml.reader.ReaderError as error:
            message = f"not valid YAML: found the control character U+{ord(text[error.position]):04X}"
            raise self._mistake(_end_of(text[: error.position], name), (), message) from error
        except yaml.MarkedYAMLError as error:
            problem = ", ".join(part for part in (error.context, error.problem) if part)
            advice = next((say for part, say in _YAML_ADVICE.items() if part in problem), "")
            mark = error.problem_mark or error.context_mark or _end_of("", name)
            raise self._mistake(mark, (), f"not valid YAML: {problem}{advice}") from error
        except RecursionError as error:
            raise self._mistake(_end_of("", name), (), "nested too deeply") from error


_YAML_ADVICE = {
    r"'\t'": "; indent with spaces, not with tabs",
    "mapping values are not allowed here": "; a text with a colon and a space in it needs quotes",
    "alias": "; a text that begins with * needs quotes",
}


def _as_json(source: Mapping[str, Any] | BaseModel) -> str:

    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value.model_dump(exclude_unset=True)
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"found a value of type {type(value).__name__}, expected numbers, texts, lists and mappings")

    try:
        return json.dumps(source, default=plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"recipe: {error}") from error
    except RecursionError as error:
        raise RecipeError("recipe: nested too deeply") from error


def _end_of(text: str, name: str) -> yaml.Mark:
    return yaml.Mark(name, 0, text.count("\n"), len(text) - text.rfind("\n") - 1, None, 0)


def _whole(text: str) -> str | None:
    """The text with UTF-16 pairs put together that are escaped one by one; None if half of one is missing."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return None


def _unknown_tag(node: yaml.Node) -> str:
    return f"found the tag {node.tag.replace(_TAG, '!!')}, expected a value without a tag"


def _wrong_key(node: yaml.Node) -> str | None:
    """What is wrong with a key, or None. A whole number, such as a layer's, is kept as a text."""
    if not isinstance(node, yaml.ScalarNode):
        return f"found {_in_short(node)} as a key, expected a text"
    tag = node.tag.removeprefix(_TAG)
    if tag == "merge":
        return "merge keys (<<) are not supported; write the keys out"
    if tag not in ("str", "value") and not (tag == "int" and re.fullmatch(r"0|[1-9]\d*", node.value)):
        return f'found the key {node.value}, which YAML reads as {tag}; put it in quotes: "{node.value}"'
    return "found half of a UTF-16 pair in a key" if _whole(node.value) is None else None


def _in_short(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return in_yaml(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def in_yaml(value: Any) -> str:
    """A value in the words of a recipe's author."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        kind = "mapping" if isinstance(value, dict) else "list"
        return f"a {kind}" if value else f"an empty {kind}"
    return shortened(repr(value), 60)


def said_together(names: Iterable[str]) -> str:
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last

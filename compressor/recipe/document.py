"""A recipe's plain data, from YAML, Python or the command line, that remembers where each value stood.

The text is composed into YAML nodes, whose positions are kept beside the data. What YAML 1.1 reads as something else
than it looks like (`no`, `010`, `12:30`, dates) is refused rather than guessed.

Not supported: YAML merge keys (`<<`), tags, several documents in one file.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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


# Plain data that remembers where it stood ------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class _Place:
    """Where something was found. Ordered as in the file; what the command line sets comes after it."""

    order: tuple[int, int, int]
    text: str


_Locate = Callable[[int, int], _Place]
"""Line and column, from 0 → place."""


@dataclass(frozen=True, order=True)
class Mistake:
    """Ordered by its place alone."""

    place: _Place
    path: KeyPath = field(compare=False)
    message: str = field(compare=False)

    def __str__(self) -> str:
        path = _dotted(self.path)
        return f"{self.place.text}{' ' if path else ''}{path}: {self.message}"


class _UnreadableError(Exception):
    """No data can be had from a text; holds the mistake to report."""

    def __init__(self, place: _Place, message: str) -> None:
        self.mistake = Mistake(place, (), message)
        super().__init__(str(self.mistake))


class _Refused:
    """Stands in the data for a value that was found wrong already, so that it is not reported twice."""


class Document:
    """A recipe's plain data, the place of every key and value in it, and the mistakes found so far."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self._values: dict[KeyPath, _Place] = {}
        self._keys: dict[KeyPath, _Place] = {}
        self._plain: dict[KeyPath, str] = {}
        self._refused: set[KeyPath] = set()
        self._mistakes: list[Mistake] = []
        self._num_values = 0
        self._num_settings = 0

    def at(self, path: KeyPath) -> Any:
        """The plain value at `path`."""
        value: Any = self.data
        for key in path:
            value = value[key]
        return value

    def plain(self, path: KeyPath) -> str | None:
        """A scalar as the file has it, if it stands there without quotes."""
        return self._plain.get(path)

    # Mistakes

    @property
    def mistakes(self) -> Sequence[Mistake]:
        """Those found so far."""
        return tuple(self._mistakes)

    def mistake(self, path: KeyPath, message: str, *, at_key: bool = False) -> Mistake:
        """A mistake at the place of the value (or key) at `path`, or else of the nearest value around it."""
        if at_key and path in self._keys:
            return Mistake(self._keys[path], path, message)
        nearest = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in self._values)
        return Mistake(self._values[nearest], path, message)

    def add_mistake(self, path: KeyPath, message: str, *, at_key: bool = False) -> None:
        """Note a mistake, unless the value at `path` or one around it was refused already."""
        if not any(path[:n] in self._refused for n in range(len(path) + 1)):
            self._mistakes.append(self.mistake(path, message, at_key=at_key))

    def raise_mistakes(self) -> None:
        """Raise one RecipeError with all mistakes in the order of the file, if there are any."""
        mistakes, self._mistakes = sorted(self._mistakes), []
        if mistakes:
            raise RecipeError("\n".join(dict.fromkeys(map(str, mistakes))))

    def _refuse(self, path: KeyPath, message: str) -> _Refused:
        self.add_mistake(path, message)
        self._refused.add(path)
        return _Refused()

    # From a file

    def read_file(self, file: Path) -> None:
        """Read a YAML file. Raises RecipeError if no mapping can be had from it."""

        def locate(line: int, column: int) -> _Place:
            return _Place((0, line, column), f"{file}:{line + 1}:{column + 1}")

        try:
            node = _compose(_read_text(file, locate), locate)
            if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
                raise RecipeError(f"{file}: the file is empty, expected {_RECIPE_MAPPING}")
            if not isinstance(node, yaml.MappingNode):
                found = "a list" if isinstance(node, yaml.SequenceNode) else in_yaml(node.value)
                place = locate(node.start_mark.line, node.start_mark.column)
                raise _UnreadableError(place, f"found {found}, expected {_RECIPE_MAPPING}")
            self.data = self._build(node, (), locate)
        except _UnreadableError as error:
            raise RecipeError(str(error)) from error
        if () in self._refused:
            self.raise_mistakes()

    def _build(self, node: yaml.Node, path: KeyPath, locate: _Locate, around: tuple[yaml.Node, ...] = ()) -> Any:
        """Plain data from a node. Keeps the places; what is wrong becomes a mistake and a `_Refused`."""
        place = self._values[path] = locate(node.start_mark.line, node.start_mark.column)
        self._count(place)
        if any(node is other for other in around):
            return self._refuse(path, "an alias stands inside the value that it repeats")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if node.tag not in (_TAG + "seq", _TAG + "map"):
            return self._refuse(path, _unknown_tag(node))
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*path, i), locate, (*around, node)) for i, item in enumerate(node.value)]
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = locate(key_node.start_mark.line, key_node.start_mark.column)
            key = key_node.value
            wrong = None if _may_be_number(path) and _is_number(key_node) else _wrong_key(key_node)
            if wrong:
                self._mistakes.append(Mistake(place, path, wrong))
            elif key in built:
                first = self._keys[(*path, key)].text
                self._mistakes.append(Mistake(place, (*path, key), f"given twice, first at {first}; keep one"))
            else:
                self._keys[(*path, key)] = place
                built[key] = self._build(value_node, (*path, key), locate, (*around, node))
        return built

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        tag = node.tag.removeprefix(_TAG)
        text = node.value
        if tag in ("str", "value"):
            return text
        if tag not in ("null", "bool", "int", "float", "timestamp"):
            return self._refuse(path, _unknown_tag(node))
        if tag == "timestamp":
            return self._refuse(path, f'found {text}, which YAML reads as a date; put it in quotes: "{text}"')
        try:
            value = yaml.constructor.SafeConstructor().construct_object(node)
        except (ValueError, LookupError):
            return self._refuse(path, f"found {in_yaml(text)}, which is not a value of type {tag}")
        if tag == "int" and abs(value) >= TOO_LARGE:
            return self._refuse(path, f"found {shortened(text, 60)}, {_LARGE}")
        if tag != "bool" and (re.match(r"[-+]?0[0-7_]", text) or ":" in text):
            advice = f'write {value}, or "{text}" in quotes if a text is meant'
            return self._refuse(path, f"found {text}, which YAML reads as {value}; {advice}")
        if node.style is None:
            self._plain[path] = text
        return value

    def _count(self, place: _Place) -> None:
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            message = f"expands to more than {MAX_VALUES:,} values; does an alias (*name) repeat other aliases?"
            raise _UnreadableError(place, message)

    # From Python

    def read_python(self, source: Mapping[str, Any] | BaseModel) -> None:
        """Take a mapping or a Recipe. Raises RecipeError where it holds itself."""
        try:
            self.data = self._copy(source, ())
        except _UnreadableError as error:
            raise RecipeError(str(error)) from error
        except RecursionError as error:
            raise RecipeError("recipe: nested too deeply; does a value contain itself?") from error

    def _copy(self, value: Any, path: KeyPath) -> Any:
        place = self._values[path] = self._keys[path] = _Place((0, self._num_values, 0), "recipe")
        self._count(place)
        if isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        if isinstance(value, Mapping):
            if _may_be_number(path):
                value = {str(key) if type(key) is int else key: item for key, item in value.items()}
            for key in value:
                if not isinstance(key, str):
                    self._mistakes.append(Mistake(place, path, f"found the key {key!r}, expected a text"))
            return {k: self._copy(item, (*path, k)) for k, item in value.items() if isinstance(k, str)}
        if isinstance(value, list | tuple):
            return [self._copy(item, (*path, i)) for i, item in enumerate(value)]
        if isinstance(value, int) and abs(value) >= TOO_LARGE:
            return self._refuse(path, f"found a number of {value.bit_length()} bits, {_LARGE}")
        return str(value) if isinstance(value, Path) else value

    # From the command line

    def override(self, text: str, *, inside: KeyPath = ()) -> None:
        """Apply `PATH=VALUE`, PATH from `inside` on; or `--key=VALUE`, the option of a command that stands for a key.
        What is wrong with it becomes a mistake.
        """
        dotted, equals, written = text.partition("=")
        is_option = dotted.startswith("--")
        place = self._next_setting(text if is_option else f"--set {text}")
        dotted = dotted.removeprefix("--").replace("-", "_") if is_option else dotted.strip()
        keys = re.sub(r"\[(\d+)\]", r".\1", dotted).split(".")
        try:
            if not equals or not all(keys):
                example = "keep=4" if inside else "passes.0.expert_pruning.keep=4"
                raise _UnreadableError(place, f"expected {'NAME' if inside else 'PATH'}=VALUE, such as {example}")
            path = self._find(keys, place, inside)
            node = _compose(written, lambda line, column: place)
            self._forget(path)
            value = self._build(node, path, lambda line, column: place) if node else None
            self._put(path, value, place)
        except _UnreadableError as error:
            self._mistakes.append(error.mistake)

    def replace(self, key: str, value: str, option: str) -> None:
        """Put a value at the top of the recipe; `option` is what errors say of its place."""
        self._forget((key,))
        self._put((key,), value, self._next_setting(option))

    def _next_setting(self, text: str) -> _Place:
        self._num_settings += 1
        return _Place((1, self._num_settings, 0), shortened(text, 120))

    def _find(self, keys: Sequence[str], place: _Place, inside: KeyPath) -> KeyPath:
        """The path that an override names; only its last key may be new, but any key of a method's options: those are
        known to the method.
        """
        path = inside
        value: Any = self.at(inside)
        for num_left, key in zip(reversed(range(len(keys))), keys, strict=True):
            name = _dotted(path[len(inside[:2]) :]) or "the recipe"
            if isinstance(value, list):
                if not key.isdecimal():
                    found = in_yaml(key)
                    raise _UnreadableError(place, f"{name} is a list, expected a number from 0 after it, found {found}")
                if len(key) > 9 or int(key) >= len(value):
                    entries = "1 entry" if len(value) == 1 else f"{len(value)} entries"
                    raise _UnreadableError(place, f"{name} has {entries}, counted from 0")
                path, value = (*path, int(key)), value[int(key)]
            elif isinstance(value, dict | None):
                known = value or {}
                if num_left and key not in known and not _is_in_options(path):
                    message = f"{name} has no key {in_yaml(key)}{did_you_mean(key, known)}"
                    raise _UnreadableError(place, f"{message} Only the last key may be new")
                path, value = (*path, key), known.get(key)
            else:
                raise _UnreadableError(place, f"{name} is {in_yaml(value)}, which has nothing inside to set")
        return path

    def _forget(self, path: KeyPath) -> None:
        """Forget the places of the value at `path` and of all that is in it."""
        for known in (self._values, self._keys, self._plain):
            for key in [key for key in known if key[: len(path)] == path]:
                del known[key]
        self._refused = {key for key in self._refused if key[: len(path)] != path}

    def _put(self, path: KeyPath, value: Any, place: _Place) -> None:
        self._values[path] = self._keys[path] = place
        parent: Any = self.data
        for number, key in enumerate(path[:-1], start=1):
            if isinstance(parent, dict) and parent.get(key) is None:
                parent[key] = {}
                for known in (self._values, self._keys):
                    known.setdefault(path[:number], place)
            parent = parent[key]
        parent[path[-1]] = value


# YAML text → nodes -----------------------------------------------------------------------------------------


_TAG = "tag:yaml.org,2002:"
_LARGE = "expected one between -2^63 and 2^63"
_RECIPE_MAPPING = "a mapping with at least model, calibration and passes"


def _read_text(file: Path, locate: _Locate) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1).removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError as error:
        raise RecipeError(f"{file}: there is no such file, expected a recipe (YAML)") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{file}: is a folder, expected a recipe file (YAML)") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{file}: larger than {MAX_BYTES // 1024} KiB, expected a recipe (YAML)")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        message = f"found the byte 0x{data[error.start]:02x}, which is not UTF-8; save the file as UTF-8"
        raise _UnreadableError(_end_of(before, locate), message) from error


def _compose(text: str, locate: _Locate) -> yaml.Node | None:
    """The text's one YAML document, or None if there is none. Nothing is constructed from it yet."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_node() if loader.check_node() else None
        if loader.check_node():
            mark = loader.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _UnreadableError(locate(mark.line, mark.column), "a second document begins, expected only one")
        return node
    except yaml.reader.ReaderError as error:
        place = _end_of(text[: error.position], locate)
        message = f"not valid YAML: found the control character U+{ord(text[error.position]):04X}"
        raise _UnreadableError(place, message) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = locate(mark.line, mark.column) if mark else locate(0, 0)
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        advice = next((say for part, say in _YAML_ADVICE.items() if part in problem), "")
        raise _UnreadableError(place, f"not valid YAML: {problem}{advice}") from error
    except RecursionError as error:
        raise _UnreadableError(locate(0, 0), "nested too deeply") from error


_YAML_ADVICE = {
    r"'\t'": "; indent with spaces, not with tabs",
    "mapping values are not allowed here": "; a text with a colon and a space in it needs quotes",
    "alias": "; a text that begins with * needs quotes",
}


def _end_of(text: str, locate: _Locate) -> _Place:
    """The place just after `text`."""
    return locate(text.count("\n"), len(text) - text.rfind("\n") - 1)


def _unknown_tag(node: yaml.Node) -> str:
    tag = node.tag
    return f"found the tag {tag.replace(_TAG, '!!')}, expected a value without a tag"


def _is_in_options(path: KeyPath) -> bool:
    """Whether the mapping at `path` is a method's options, or is in them."""
    return path[:1] == ("passes",) and len(path) >= 3


def _may_be_number(path: KeyPath) -> bool:
    """Whether keys of the mapping at `path` may be whole numbers, which are kept as texts: those inside an option of a
    method may, such as numbers of layers.
    """
    return _is_in_options(path) and len(path) > 3


def _is_number(node: yaml.Node) -> bool:
    return node.tag == _TAG + "int" and re.fullmatch(r"0|[1-9]\d*", node.value) is not None


def _wrong_key(node: yaml.Node) -> str | None:
    """What is wrong with a key, or None."""
    if not isinstance(node, yaml.ScalarNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "mapping"
        return f"found a {kind} as a key, expected a text"
    tag = node.tag.removeprefix(_TAG)
    if tag == "merge":
        return "merge keys (<<) are not supported; write the keys out"
    if tag not in ("str", "value"):
        reads = {"bool": "a truth value", "null": "nothing", "int": "a number", "float": "a number"}
        reads_as = reads.get(tag, "a date" if tag == "timestamp" else f"a value of type {tag}")
        return f'found the key {node.value}, which YAML reads as {reads_as}; put it in quotes: "{node.value}"'
    return None


# Wording ---------------------------------------------------------------------------------------------------


def _dotted(path: KeyPath) -> str:
    """`("passes", 0, "expert_pruning", "keep")` → `passes[0].expert_pruning.keep`."""
    keys = (f"[{key}]" if isinstance(key, int) else f".{shortened(key, 120)}" for key in path)
    return "".join(keys).removeprefix(".")


def in_yaml(value: Any) -> str:
    """A value in the words of a recipe's author."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return shortened(repr(value), 60)


def said_together(names: Iterable[str]) -> str:
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last

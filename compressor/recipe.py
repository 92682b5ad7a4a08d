"""A recipe: YAML → `Recipe`, and recipe + installed methods → checked passes.

    load_recipe(path or mapping, overrides=("passes.0.expert_pruning.keep=4",), methods=...)  →  LoadedRecipe

Every mistake is reported in one RecipeError, one a line, with its place:

    recipe.yaml:7:12 passes[0].expert_pruning.keep: what was found, what would be right

For that the text is composed into YAML nodes, whose positions are kept beside the plain data that pydantic
validates. What YAML 1.1 reads as something else than it looks like (`no`, `010`, `12:30`, dates) is refused
rather than guessed.

Nothing here imports torch. Relative paths in a recipe are meant from the folder in which the command runs.
Not supported: YAML merge keys (`<<`), tags, several documents in one file.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from compressor.errors import CalibrationError, CompressorError, RecipeError
from compressor.sources import SOURCE_KINDS, BaseSource, FileName, FilePath, Source
from compressor.wording import did_you_mean, digest, shortened

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

    from compressor.method import Method

KeyPath = tuple[str | int, ...]
"""The way from the top of a recipe to a value: `("passes", 0, "expert_pruning", "keep")`."""

_ModelT = TypeVar("_ModelT", bound=BaseModel)

_TOO_LARGE = 2**63
"""No count, seed or size is as large as this."""
MAX_BYTES = 256 * 1024
MAX_VALUES = 10_000


# What a recipe is ------------------------------------------------------------------------------------------


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _with_different_titles(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    try:
        titles = [source.title for source in sources]
    except CalibrationError as error:  # a task's file that does not tell its name
        raise ValueError(str(error)) from error
    for title in titles:
        if titles.count(title) > 1:
            raise ValueError(f"two sources are called {title!r}; tell them apart with `name:`")
    return sources


class Calibration(_Settings):
    """The text that the statistics are gathered on."""

    batch_size: int = Field(default=8, ge=1, description="sequences in one batch")
    data: tuple[Source, ...] = Field(
        default=(),
        description="a list of the sources of text or token ids; each is a domain whose figures are kept apart",
    )

    @field_validator("data")
    @classmethod
    def _told_apart(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        return _with_different_titles(sources)


class Evaluation(_Settings):
    """What is measured before and after."""

    tasks: tuple[str, ...] = Field(default=(), description="lm-eval tasks, or the local ones of `task_path`")
    task_path: FilePath | None = Field(
        default=None, description="a folder of lm-eval task files (YAML), like lm-eval's include_path"
    )
    limit: int | None = Field(default=None, ge=1, description="documents per task; default all")
    num_fewshot: int | None = Field(
        default=None, ge=0, description="examples before each question; default as the task says"
    )
    batch_size: int = Field(default=8, ge=1, description="sequences in one batch")
    perplexity: tuple[Source, ...] = Field(default=(), description="sources of text to measure perplexity on")
    speed: bool = Field(default=False, description="measure tokens per second and memory")
    each_pass: bool = Field(
        default=False, description="measure every pass alone, too: what each of them does, and what they do together"
    )
    random: int = Field(
        default=0,
        ge=0,
        description="for each pruning pass, so many random decisions of the same size to compare it with: by loss on "
        "the calibration text, and by `perplexity`",
    )

    @field_validator("perplexity")
    @classmethod
    def _told_apart(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        return _with_different_titles(sources)

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Evaluation:
        idle = [name for name in ("task_path", "limit", "num_fewshot") if getattr(self, name) is not None]
        if idle and not self.tasks:
            raise ValueError(f"{_and(idle)} would have no effect without `tasks`; give tasks or leave it out")
        return self


class PassSpec(_Settings):
    """One pass as the recipe asks for it: a method and its options, not yet checked by the method."""

    method: str = Field(description="name of an installed method")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's options")

    @model_serializer
    def _as_in_yaml(self) -> dict[str, Any]:
        return {self.method: self.options}


def _one_method(value: Any) -> Any:
    """`{method: options}`, as a recipe writes a pass → what PassSpec takes."""
    if isinstance(value, PassSpec):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"found {_in_yaml(value)}, expected a method with its options, such as `name: {{}}`")
    if len(value) != 1:
        found = f"{len(value)} methods in one pass ({_and(value)})" if value else "an empty mapping"
        raise ValueError(f"found {found}, expected one method with its options; begin each pass with `- `")
    [(method, options)] = value.items()
    if not isinstance(options, dict | None):
        raise ValueError(f"found {_in_yaml(options)} as the options of {method}, expected a mapping, such as {{}}")
    return {"method": method, "options": options or {}}


def _known_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"found {device!r}, expected auto, cpu, cuda, or one GPU by its number such as cuda:0")
    return device


def _bytes(value: object) -> object:
    """`16GB`, `512 MiB`, `16e9` or a number → bytes; capital or small letters."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b", text)
    if found:
        size = float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " ")
    elif re.fullmatch(r"\d+(\.\d+)?e\+?\d+", text):  # a number that YAML takes for text
        size = float(text)
    else:
        raise ValueError(f"a size, such as 16GB, 512MiB or 16e9, not {_in_yaml(value)}")
    if size >= _TOO_LARGE:
        raise ValueError(f"found {_in_yaml(value)}, which is more than any machine has")
    return round(size)


Bytes = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]
"""A number of bytes; in a recipe also `16GB` (powers of 1000) or `16GiB` (of 1024)."""


class Recipe(_Settings):
    """What to compress, on which text, with which passes, and what to measure."""

    model: FileName = Field(min_length=1, description="the model to compress: a hub id, a local folder, or demo")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="number format to load the weights in; auto is the checkpoint's own"
    )
    device: Annotated[str, AfterValidator(_known_device)] = Field(
        default="cpu",
        description="where to compute: cpu, cuda or cuda:N; auto: on as few of this machine's GPUs as hold the model",
    )
    weights: Literal["auto", "memory", "disk"] = Field(
        default="auto",
        description="memory: all at once; disk: one decoder layer at a time; auto: in memory where they fit",
    )
    hidden_states: Literal["auto", "memory", "file"] = Field(
        default="auto", description="where the text waits between layers: in memory, in files, or as `memory` allows"
    )
    memory: Bytes | None = Field(
        default=None, description="memory that the run may use, such as 64GB; default what is available"
    )
    device_memory: Bytes | None = Field(default=None, description="the same on the accelerator")
    disk: Bytes | None = Field(default=None, description="disk that the run may use, its output included")
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    seed: int = Field(default=0, ge=0, lt=2**32, description="orders the calibration text, and all else random")
    calibration: Calibration = Field(
        default_factory=Calibration, description="the text that the statistics are gathered on"
    )
    passes: tuple[Annotated[PassSpec, BeforeValidator(_one_method)], ...] = Field(
        min_length=1, description="a list of methods with their options, applied in order"
    )
    evaluate: Evaluation | None = Field(default=None, description="what is measured before and after")
    output: FilePath | None = Field(default=None, description="folder for the smaller model")

    @field_validator("device_memory")
    @classmethod
    def _on_a_device(cls, size: int | None, info: ValidationInfo) -> int | None:
        if size is not None and info.data.get("device") == "cpu":
            raise ValueError("would have no effect with `device: cpu`; give `memory`, or a device")
        return size


@dataclass(frozen=True)
class ResolvedPass:
    """A pass whose options its method has accepted."""

    index: int
    spec: PassSpec
    method: Method[Any]

    @property
    def path(self) -> KeyPath:
        """Where the pass stands in its recipe: `("passes", 0, "expert_pruning")`."""
        return ("passes", self.index, self.spec.method)


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, its checked passes, and where in the file everything stands."""

    recipe: Recipe
    passes: tuple[ResolvedPass, ...]
    """One for each of `recipe.passes`; empty if the recipe was loaded without `methods`."""
    document: Document = field(compare=False)

    def __repr__(self) -> str:
        passes = ", ".join(spec.method for spec in self.recipe.passes)
        return f"LoadedRecipe({shortened(self.recipe.model, 60)}: {shortened(passes, 120)})"

    def error(self, path: Sequence[str | int], message: str) -> RecipeError:
        """An error about the value at `path`, to raise: `r.yaml:7:12 passes[0].expert_pruning.keep: message`.

        A value that the recipe leaves to its default is shown at the nearest mapping around it.
        """
        return RecipeError(str(self.document.mistake(tuple(path), message)))

    def sources_of(self, resolved: ResolvedPass) -> list[BaseSource]:
        """The text that is read for a pass: the method's own, then the recipe's. None where the method needs none,
        unless random decisions are to be compared with its own by their loss.
        """
        compares = self.recipe.evaluate is not None and self.recipe.evaluate.random > 0
        if not resolved.method.needs_text and not compares:
            return []
        return [*resolved.method.sources(), *self.recipe.calibration.data]

    @contextmanager
    def at(self, *path: str | int) -> Iterator[None]:
        """An error within the context gets the place of the value at `path`."""
        refusals = Refusals(self)
        with refusals.at(*path):
            yield
        refusals.raise_all()

    def to_yaml(self) -> str:
        """The recipe as it is carried out, with overrides and defaults; it loads as the same recipe."""
        return yaml.safe_dump(
            self.to_mapping(), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
        )

    @property
    def fingerprint(self) -> str:
        """A digest of the effective recipe, except where the result is put and what it may take: `sha256:` and 16 hex
        digits.

        Options that the recipe leaves to their defaults count too, if the recipe was loaded with `methods`.
        """
        effective = self.to_mapping()
        for key in CHANGES_NO_FIGURE:
            effective.pop(key, None)
        return digest(json.dumps(effective, sort_keys=True))

    def to_mapping(self) -> dict[str, Any]:
        """The recipe as it is carried out, as JSON types, with overrides and defaults."""
        effective: dict[str, Any] = self.recipe.model_dump(mode="json", exclude_none=True, exclude={"passes"})
        passes = [{p.spec.method: p.method.options.model_dump(mode="json")} for p in self.passes]
        effective["passes"] = passes or [spec.model_dump(mode="json") for spec in self.recipe.passes]
        return {name: effective[name] for name in Recipe.model_fields if name in effective}


class Refusals:
    """What is wrong beyond a recipe's own text, each at the place in it that the error is about, raised together.

    refusals = Refusals(loaded)
    with refusals.at("calibration", "data", 0):
        ...  # an error that the user can mend is kept
    refusals.raise_all()
    """

    def __init__(self, loaded: LoadedRecipe) -> None:
        self._document = loaded.document
        self._found: list[tuple[_Mistake, CompressorError]] = []

    @contextmanager
    def at(self, *path: str | int) -> Iterator[None]:
        """An error within the context is about the value at `path`; it ends there."""
        try:
            yield
        except CompressorError as error:
            self._found.append((self._document.mistake(path, str(error)), error))

    def raise_all(self) -> None:
        """Raise what was found, in the order of the file, as errors of their own kind; of several kinds RecipeError."""
        if not self._found:
            return
        found = sorted(self._found, key=lambda one: one[0].place)
        kinds = {type(error) for _, error in found}
        kind = kinds.pop() if len(kinds) == 1 else RecipeError
        raise kind("\n".join(dict.fromkeys(str(mistake) for mistake, _ in found))) from found[0][1]


CHANGES_NO_FIGURE = ("output", "weights", "hidden_states", "memory", "device_memory", "disk")
"""Keys of a recipe that say where to and with what it is carried out."""


# Loading ---------------------------------------------------------------------------------------------------


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    output: Path | None = None,
    live: str | None = None,
    methods: Mapping[str, type[Method[Any]]] | None = None,
    criteria: Mapping[str, Any] | None = None,
) -> LoadedRecipe:
    """Read and check a recipe: a YAML file by its path, a mapping with the same keys, or a Recipe.

    `overrides` are texts such as `passes.0.expert_pruning.keep=4`, applied in order; `model` and `output`
    replace those of the recipe; `live` is what a model is called that is at hand, where the recipe names none. With
    `methods` (by name) the passes are checked as well; `criteria` are handed to them.
    Raises one RecipeError that lists every mistake of all of them, in the order of the file.
    """
    document = Document()
    if isinstance(source, str | Path):
        document.read_file(Path(source))
    else:
        document.read_python(source)
    for override in overrides:
        document.override(override)
    for key, value in (("model", model), ("output", output)):
        if value is not None:
            document.replace(key, str(value), f"--{key} {value}")
    if live is not None and document.data.get("model") is None:
        document.replace("model", live, "the model given")

    recipe = _validate(Recipe, document, ())
    passes = _resolve(document, methods, criteria) if methods is not None else ()
    if recipe is not None and not recipe.calibration.data and methods is not None:
        _check_own_text(document, recipe, passes)
    document.raise_mistakes()
    assert recipe is not None
    return LoadedRecipe(recipe, passes, document)


def _check_own_text(document: Document, recipe: Recipe, passes: Sequence[ResolvedPass]) -> None:
    """Without calibration data every pass must bring its own text, or need none."""
    has_text = all(one.method.sources() or not one.method.needs_text for one in passes)
    if len(passes) == len(recipe.passes) and has_text:
        return
    document.add_mistake(
        ("calibration", "data"),
        "no text to observe the model on; list at least one source, such as `data: [{demo: mix}]`",
    )


def parse_options(
    options_type: type[_ModelT], method: str, given: Mapping[str, Any], overrides: Sequence[str] = ()
) -> _ModelT:
    """A method's options that stand in no recipe, and texts such as `keep=4` that change them. Raises RecipeError with
    all mistakes, worded as those of a recipe.
    """
    document, path = Document(), ("passes", 0, method)
    document.read_python({"passes": [{method: given}]})
    for override in overrides:
        document.override(override, inside=path)
    options = None if document.mistakes else _validate(options_type, document, path)
    mistakes = [dataclasses.replace(one, path=one.path[2:]) for one in sorted(document.mistakes, key=_place_of)]
    if options is None or mistakes:
        raise RecipeError("\n".join(str(one).removeprefix("recipe ") for one in mistakes))
    return options


def _resolve(
    document: Document, methods: Mapping[str, type[Method[Any]]], criteria: Mapping[str, Any] | None
) -> tuple[ResolvedPass, ...]:
    """The passes that are right, from the plain data: the rest of the recipe may be wrong."""
    listed = document.data.get("passes")
    resolved = []
    for index, entry in enumerate(listed if isinstance(listed, list) else ()):
        if not isinstance(entry, dict) or len(entry) != 1:
            continue
        [(name, given)] = entry.items()
        path: KeyPath = ("passes", index, name)
        if name not in methods:
            known = f"Known methods: {', '.join(sorted(methods))}" if methods else "No method is installed"
            document.add_mistake(path, f"unknown method{did_you_mean(name, methods)} {known}", at_key=True)
        elif isinstance(given, dict | None):
            options = _validate(methods[name].options_type, document, path)
            if options is not None:
                spec = PassSpec(method=name, options=given or {})
                resolved.append(ResolvedPass(index, spec, methods[name](options, criteria)))
    return tuple(resolved)


# Plain data that remembers where it stood ------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class _Place:
    """Where something was found. Ordered as in the file; what the command line sets comes after it."""

    order: tuple[int, int, int]
    text: str


_Locate = Callable[[int, int], _Place]
"""Line and column, from 0 → place."""


@dataclass(frozen=True)
class _Mistake:
    place: _Place
    path: KeyPath
    message: str

    def __str__(self) -> str:
        path = _dotted(self.path)
        return f"{self.place.text}{' ' if path else ''}{path}: {self.message}"


def _place_of(mistake: _Mistake) -> _Place:
    return mistake.place


class _UnreadableError(Exception):
    """No data can be had from a text; holds the mistake to report."""

    def __init__(self, place: _Place, message: str) -> None:
        self.mistake = _Mistake(place, (), message)
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
        self._mistakes: list[_Mistake] = []
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
    def mistakes(self) -> Sequence[_Mistake]:
        """Those found so far."""
        return tuple(self._mistakes)

    def mistake(self, path: KeyPath, message: str, *, at_key: bool = False) -> _Mistake:
        """A mistake at the place of the value (or key) at `path`, or else of the nearest value around it."""
        if at_key and path in self._keys:
            return _Mistake(self._keys[path], path, message)
        nearest = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in self._values)
        return _Mistake(self._values[nearest], path, message)

    def add_mistake(self, path: KeyPath, message: str, *, at_key: bool = False) -> None:
        """Note a mistake, unless the value at `path` or one around it was refused already."""
        if not any(path[:n] in self._refused for n in range(len(path) + 1)):
            self._mistakes.append(self.mistake(path, message, at_key=at_key))

    def raise_mistakes(self) -> None:
        """Raise one RecipeError with all mistakes in the order of the file, if there are any."""
        mistakes, self._mistakes = sorted(self._mistakes, key=_place_of), []
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
                found = "a list" if isinstance(node, yaml.SequenceNode) else _in_yaml(node.value)
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
                self._mistakes.append(_Mistake(place, path, wrong))
            elif key in built:
                first = self._keys[(*path, key)].text
                self._mistakes.append(_Mistake(place, (*path, key), f"given twice, first at {first}; keep one"))
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
            return self._refuse(path, f"found {_in_yaml(text)}, which is not a value of type {tag}")
        if tag == "int" and abs(value) >= _TOO_LARGE:
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

    def read_python(self, source: Mapping[str, Any] | Recipe) -> None:
        """Take a mapping or a Recipe. Raises RecipeError if it is neither."""
        if not isinstance(source, Mapping | Recipe):
            raise RecipeError(f"recipe: found {_in_yaml(source)}, expected a path, a mapping or a Recipe")
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
                    self._mistakes.append(_Mistake(place, path, f"found the key {key!r}, expected a text"))
            return {k: self._copy(item, (*path, k)) for k, item in value.items() if isinstance(k, str)}
        if isinstance(value, list | tuple):
            return [self._copy(item, (*path, i)) for i, item in enumerate(value)]
        if isinstance(value, int) and abs(value) >= _TOO_LARGE:
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
                    found = _in_yaml(key)
                    raise _UnreadableError(place, f"{name} is a list, expected a number from 0 after it, found {found}")
                if len(key) > 9 or int(key) >= len(value):
                    entries = "1 entry" if len(value) == 1 else f"{len(value)} entries"
                    raise _UnreadableError(place, f"{name} has {entries}, counted from 0")
                path, value = (*path, int(key)), value[int(key)]
            elif isinstance(value, dict | None):
                known = value or {}
                if num_left and key not in known and not _is_in_options(path):
                    message = f"{name} has no key {_in_yaml(key)}{did_you_mean(key, known)}"
                    raise _UnreadableError(place, f"{message} Only the last key may be new")
                path, value = (*path, key), known.get(key)
            else:
                raise _UnreadableError(place, f"{name} is {_in_yaml(value)}, which has nothing inside to set")
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


# pydantic's errors → plain sentences -----------------------------------------------------------------------


def _validate(model: type[_ModelT], document: Document, path: KeyPath) -> _ModelT | None:
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


def _parse(model: type[_ModelT], data: Any) -> tuple[_ModelT | None, list[ErrorDetails]]:
    """Validate, and add the errors for true and false where pydantic would take them for 1 and 0."""
    value: _ModelT | None = None
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
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "path_type": "a path",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "none_required": "nothing",
    "greater_than_equal": "a number of at least {ge}",
    "greater_than": "a number greater than {gt}",
    "less_than_equal": "a number of at most {le}",
    "less_than": "a number less than {lt}",
    "multiple_of": "a multiple of {multiple_of}",
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
        found = f"the keys {_and(kinds)}" if kinds else _found(value, plain)
        return f"found {found}; {first['msg']}"
    expected = dict.fromkeys(_expectation(error) for error in errors)
    if "a number" in expected:
        expected.pop("a whole number", None)
    if plain and value is not None and expected.keys() <= {"a text", "a path"}:
        reads = _in_yaml(value) if isinstance(value, bool) else "a number"
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


def _dotted(path: KeyPath) -> str:
    """`("passes", 0, "expert_pruning", "keep")` → `passes[0].expert_pruning.keep`."""
    keys = (f"[{key}]" if isinstance(key, int) else f".{shortened(key, 120)}" for key in path)
    return "".join(keys).removeprefix(".")


def _in_yaml(value: Any) -> str:
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


def _found(value: Any, plain: str | None) -> str:
    """As `_in_yaml`, and as it is written where that looks like something else."""
    text = _in_yaml(value)
    if not plain or plain.lower() == text:
        return text
    return f"{plain}, which YAML reads as {text}" if isinstance(value, bool) else plain


def _and(names: Iterable[str]) -> str:
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last

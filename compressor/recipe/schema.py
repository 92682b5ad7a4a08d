"""A recipe: YAML → `Recipe`, and recipe + installed methods → checked passes.

    load_recipe(path or mapping, overrides=("passes.0.expert_pruning.keep=4",), methods=...)  →  LoadedRecipe

Every mistake is reported in one RecipeError, one a line, with its place:

    recipe.yaml:7:12 passes[0].expert_pruning.keep: what was found, what would be right

Nothing here imports torch. Relative paths in a recipe are meant from the folder in which the command runs.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from compressor.data.server import Server
from compressor.data.sources import BaseSource, FileName, FilePath, Source
from compressor.errors import CalibrationError, CompressorError, RecipeError, shortened
from compressor.method import OptionError
from compressor.recipe.document import TOO_LARGE, Document, KeyPath, MistakeError, in_yaml, said_together
from compressor.recipe.messages import ModelT, validate
from compressor.recipe.shipped import find_recipe
from compressor.serving.rules import Serve
from compressor.wording import did_you_mean, digest, is_hub_id

if TYPE_CHECKING:
    from compressor.method import Method

# What a recipe is ------------------------------------------------------------------------------------------


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _with_different_titles(sources: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        titles = [source.title for source in sources]
    except CalibrationError as error:  # a task's file that does not tell its name
        raise ValueError(str(error)) from error
    for title in titles:
        if titles.count(title) > 1:
            raise ValueError(f"two sources are called {title!r}; tell them apart with `name:`")
    return sources


Sources = Annotated[tuple[Source, ...], AfterValidator(_with_different_titles)]


class Calibration(_Settings):
    """The text that the statistics are gathered on."""

    batch_size: int = Field(default=8, ge=1, description="sequences in one batch")
    data: Sources = Field(
        default=(),
        description="a list of the sources of text or token ids; each is a domain whose figures are kept apart",
    )


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
    server: Server | None = Field(
        default=None, description="ask tasks of a server (vLLM, SGLang, llama.cpp), not of the model in this process"
    )
    confirm_run_unsafe_code: bool = Field(
        default=False,
        description="run the code that a model writes for tasks such as humaneval, with all that this account may do; "
        "only with HF_ALLOW_CODE_EVAL=1 in the environment",
    )
    perplexity: Sources = Field(
        default=(), description="sources of text to measure perplexity on, and beside an original fidelity to it"
    )
    fidelity: Sources = Field(default=(), description="more of them: both are found by one forward, of either")
    generation: int = Field(
        default=0,
        ge=0,
        description="have the model continue so many pieces of this text: whether it loops, and ends by itself",
    )
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

    @property
    def texts(self) -> dict[tuple[str, int], BaseSource]:
        """Every source that is measured, once, by its key and its place there."""
        places: dict[tuple[str, int], BaseSource] = {}
        for key in ("perplexity", "fidelity"):
            for number, source in enumerate(getattr(self, key)):
                if source not in places.values():
                    places[key, number] = source
        return places

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Evaluation:
        _with_different_titles(tuple(self.texts.values()))
        settings = ("task_path", "limit", "num_fewshot", "server")
        idle = [name for name in settings if getattr(self, name) is not None]
        idle += ["confirm_run_unsafe_code"] * self.confirm_run_unsafe_code
        if idle and not self.tasks:
            raise ValueError(f"{said_together(idle)} would have no effect without `tasks`; give tasks or leave it out")
        if self.generation and not self.texts:
            raise ValueError("generation has nothing to continue; give text, under `perplexity`, or leave it out")
        if self.each_pass and self.server:
            raise ValueError(
                "each_pass measures models that no server can load, of one pass each; leave one of both out"
            )
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
        raise ValueError(f"found {in_yaml(value)}, expected a method with its options, such as `name: {{}}`")
    if len(value) != 1:
        found = f"{len(value)} methods in one pass ({said_together(value)})" if value else "an empty mapping"
        raise ValueError(f"found {found}, expected one method with its options; begin each pass with `- `")
    [(method, options)] = value.items()
    if not isinstance(options, dict | None):
        raise ValueError(f"found {in_yaml(options)} as the options of {method}, expected a mapping, such as {{}}")
    return PassSpec(method=method, options=options or {})


def _known_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"found {device!r}, expected auto, cpu, cuda, or one GPU by its number such as cuda:0")
    return device


def _bytes(value: object) -> object:
    """`16GB`, `512 MiB`, `16e9` or a number → bytes; capital or small letters."""
    if isinstance(value, str | float):
        found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*(?:([kmgt]?)(i?)b)?", str(value).strip().lower())
        if not found:
            raise ValueError(f"a size, such as 16GB, 512MiB or 16e9, not {in_yaml(value)}")
        size = float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " ")
        if size >= TOO_LARGE:
            raise ValueError(f"found {in_yaml(value)}, which is more than any machine has")
        return round(size)
    return value


Bytes = Annotated[Annotated[int, Field(gt=0)], BeforeValidator(_bytes, json_schema_input_type=float | str)]
"""A number of bytes; in a recipe also `16GB` (powers of 1000) or `16GiB` (of 1024)."""


def _known_on_hub(name: str) -> str:
    if not is_hub_id(name):
        raise ValueError(f"found {in_yaml(name)}, expected a repository on the hub, owner/name")
    return name


class Push(_Settings):
    """Where on the Hugging Face hub the output goes, if --push allows it."""

    repo: Annotated[str, AfterValidator(_known_on_hub)] = Field(description="repository on the hub: owner/name")
    private: bool = Field(default=False, description="make it for its owner only; one that is there must be so")


def _repo_alone(value: Any) -> Any:
    return {"repo": value} if isinstance(value, str) else value


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
    mtp: Literal["drop", "keep", "prune"] = Field(
        default="drop", description="extra prediction layers: left out, whole, or with as many experts as the model has"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="orders the calibration text, and all else random")
    calibration: Calibration = Field(
        default_factory=Calibration, description="the text that the statistics are gathered on"
    )
    passes: tuple[Annotated[PassSpec, BeforeValidator(_one_method)], ...] = Field(
        min_length=1, description="a list of methods with their options, applied in order"
    )
    evaluate: Evaluation | None = Field(default=None, description="what is measured before and after")
    serve: Serve | None = Field(
        default=None, description="the engine that must run the result: what it cannot run is refused at once"
    )
    output: FilePath | None = Field(default=None, description="folder for the smaller model")
    push: Annotated[Push, BeforeValidator(_repo_alone, json_schema_input_type=str | Push)] | None = Field(
        default=None, description="repository on the Hugging Face hub that `--push` uploads the output to"
    )
    trackers: tuple[Literal["mlflow", "trackio", "wandb"], ...] | None = Field(
        default=None, min_length=1, description="experiment trackers that are told of the run when it is done"
    )

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
    def name(self) -> str:
        """What tells its figures and files from those of other passes: `0.expert_pruning`."""
        return f"{self.index}.{self.spec.method}"

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
        """An error to raise: `r.yaml:7:12 passes[0].expert_pruning.keep: message`; of a default, the place around."""
        return RecipeError(str(self.document.mistake(tuple(path), message)))

    def sources_of(self, resolved: ResolvedPass) -> list[BaseSource]:
        """The text read for a pass, the method's own first; none without need, unless controls compare losses."""
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

    @contextmanager
    def at_pass(self, resolved: ResolvedPass) -> Iterator[None]:
        """An OptionError within the context gets its place in the recipe."""
        try:
            yield
        except OptionError as error:
            raise self.error((*resolved.path, *filter(None, [error.option])), str(error)) from error

    def to_yaml(self) -> str:
        """The recipe as it is carried out, with overrides and defaults; it loads as the same recipe."""
        return yaml.safe_dump(
            self.to_mapping(), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
        )

    @property
    def fingerprint(self) -> str:
        """`sha256:` and 16 hex digits of the effective recipe, but for where the result is put and what it may take;
        with defaults of options, if loaded with `methods`.
        """
        return digest(json.dumps(self.without_means(), sort_keys=True))

    def without_means(self) -> dict[str, Any]:
        """`to_mapping`, but for where to and with what it is carried out. Of a server only that there is one is left: a
        run goes on with another.
        """
        effective = {key: value for key, value in self.to_mapping().items() if key not in CHANGES_NO_FIGURE}
        if "server" in effective.get("evaluate", {}):
            effective["evaluate"]["server"] = {}
        return effective

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
        self._found: list[tuple[MistakeError, CompressorError]] = []

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
        found = sorted(self._found, key=lambda one: one[0].order)
        kinds = {type(error) for _, error in found}
        kind = kinds.pop() if len(kinds) == 1 else RecipeError
        raise kind("\n".join(dict.fromkeys(str(mistake) for mistake, _ in found))) from found[0][1]


CHANGES_NO_FIGURE = (
    "output", "push", "serve", "trackers", "weights", "hidden_states", "memory", "device_memory", "disk"
)  # fmt: skip
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
    allow_commands: bool = False,
    allow_server: bool | None = None,
) -> LoadedRecipe:
    """Read and check a recipe: the path of a YAML file, the name of one of ours, a mapping with the same keys, or a
    Recipe. `overrides` (`passes.0.expert_pruning.keep=4`) are applied in order; `model` and `output` replace the
    recipe's, `live` names a model at hand where it has none. With `methods` (by name, and `criteria`) the passes are
    checked as well, and those that run programs refused unless `allow_commands`, as is a server's command
    (`allow_server`, if that is another matter). Raises one RecipeError that lists every mistake, in the order of the
    file.
    """
    if not isinstance(source, str | Path | Mapping | Recipe):
        raise RecipeError(f"recipe: found {in_yaml(source)}, expected a path, a mapping or a Recipe")
    document = Document(find_recipe(Path(source)) if isinstance(source, str | Path) else source)
    for override in overrides:
        document.override(override)
    for key, value in (("model", model), ("output", output)):
        if value is not None:
            document.replace(key, str(value), f"--{key} {value}")
    if live is not None:
        document.replace("model", live, "the model given", only_if_missing=True)
    document.read()

    recipe = validate(Recipe, document, ())
    passes = _resolve(document, methods, criteria) if methods is not None else ()
    if recipe is not None and not recipe.calibration.data and methods is not None:
        _check_own_text(document, recipe, passes)
    programs: list[tuple[KeyPath, Sequence[str], bool]] = [
        (one.path, one.method.program, allow_commands) for one in passes
    ]
    if recipe and recipe.evaluate and recipe.evaluate.server:
        may_serve = allow_commands if allow_server is None else allow_server
        programs.append((("evaluate", "server", "command"), recipe.evaluate.server.command, may_serve))
    for path, program, is_allowed in programs:
        if program and not is_allowed:
            document.add_mistake(
                path,
                f"would run `{shlex.join(program)}`, which may do all that this account may: "
                f"--allow-commands (in Python `allow_commands=True`) allows it",
                at_key=True,
            )
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
    options_type: type[ModelT], method: str, given: Mapping[str, Any], overrides: Sequence[str] = ()
) -> ModelT:
    """A method's options that stand in no recipe, and `overrides` such as `keep=4`. Raises RecipeError."""
    path = ("passes", 0, method)
    document = Document({"passes": [{method: given}]}, inside=path)
    for override in overrides:
        document.override(override)
    document.read()
    document.raise_mistakes()
    options = validate(options_type, document, path)
    document.raise_mistakes()
    assert options is not None
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
            options = validate(methods[name].options_type, document, path)
            if options is not None:
                spec = PassSpec(method=name, options=given or {})
                resolved.append(ResolvedPass(index, spec, methods[name](options, criteria)))
    return tuple(resolved)

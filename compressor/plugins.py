"""Plugins: who offers which compression methods, criteria and adapters.

A plugin is a module with functions marked `@hookimpl` (`compressor.plugin`), announced under the entry-point group
`compressor` of its distribution; or, for a quick try, a file that the user names. The core knows no plugin by name: its
own come through the same door.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import FunctionType, ModuleType, new_class
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from compressor.errors import PluginError, shortened
from compressor.wording import did_you_mean, digest

if TYPE_CHECKING:
    from compressor.method import Method
    from compressor.model.adapter import Adapter
    from compressor.selection.criteria import Criterion

PLUGIN_API = 2
"""The version of the contract of `compressor.plugin`: every method says by its `api` for which one it was written."""
GROUP = "compressor"
_ALIKE = 0.75
"""How much a name must be like one of the contract's to be taken for a slip."""
_NOT_TO_OVERRIDE = {
    "tasks": "a task that `sources` names is measured too",
    "restore": "what `moe.skip` was told is in the checkpoint's config, and put back by the core",
    "needs_weights": "the core sees whether `edit` asks for weights",
    "options": "the core sets it",
    "criteria": "the core sets it; a plugin offers its own by the hook `compressor_criteria`",
}
"""Names that were in the contract's first version, or that instances get from the core → what there is instead."""

_LOG = logging.getLogger("compressor.trace")

HookT = TypeVar("HookT", bound=Callable[[], Sequence[Any]])


def hookimpl(function: HookT) -> HookT:
    """Mark a plugin's function as one that is called for what the plugin offers; see `HOOKS` for its name."""
    function.is_compressor_hook = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Plugin:
    """An installed plugin: the entry point's name, the distribution it came with, and what it offers."""

    name: str
    distribution: str
    version: str
    methods: tuple[type[Method[Any]], ...]
    adapters: tuple[Adapter, ...] = ()
    criteria: tuple[Criterion, ...] = ()

    def __repr__(self) -> str:
        offered: list[Any] = [*self.methods, *self.adapters, *self.criteria]
        return f"Plugin({self.name} {self.version}: {shortened(', '.join(one.name for one in offered), 120)})"


@dataclass(frozen=True)
class Plugins:
    """All plugins in use, their methods by recipe key, and their criteria by name."""

    plugins: tuple[Plugin, ...]
    methods: Mapping[str, type[Method[Any]]]
    criteria: Mapping[str, Criterion] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Plugins({shortened(', '.join(plugin.name for plugin in self.plugins), 160)})"

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        return tuple(adapter for plugin in self.plugins for adapter in plugin.adapters)

    def only(self, method: str | None) -> tuple[Plugin, ...]:
        """The plugins; of one method alone, if it is named. Raises PluginError where there is no such method."""
        if method is None:
            return self.plugins
        if method not in self.methods:
            raise PluginError(f"there is no method {method!r}{did_you_mean(method, self.methods)}")
        [owner] = [plugin for plugin in self.plugins if self.methods[method] in plugin.methods]
        return (replace(owner, methods=(self.methods[method],)),)

    def versions(self) -> dict[str, str]:
        """Those of everything that a run depends on, by distribution: the plugins' own too."""
        from compressor.machine.environment import versions  # torch

        return versions({plugin.distribution: plugin.version for plugin in self.plugins})


def load_plugins(
    without: Iterable[str] = (), found: Iterable[EntryPoint] | None = None, files: Iterable[str | Path] = ()
) -> Plugins:
    """Import every installed plugin but those `without`, and Python `files`, each a plugin of its name; `found`
    replaces the entry points, for tests. Raises PluginError, naming plugin and where it is from, for what cannot be
    imported or is invalid, equal names, an unknown `without`.
    """
    installed = _by_name(entry_points(group=GROUP) if found is None else found)
    blocked = set(without)
    unknown = blocked - {entry.name for entry in installed}
    if unknown:
        known = ", ".join(entry.name for entry in installed) or "none"
        raise PluginError(f"--without {min(unknown)}: no such plugin is installed; installed are: {known}.")
    wanted = _by_name([*(entry for entry in installed if entry.name not in blocked), *map(_File, files)])
    plugins = tuple(map(_load, wanted))
    return Plugins(plugins, _by_unique_name(plugins, "method"), _by_unique_name(plugins, "criterion"))


class _File:
    """A file as an entry point; its digest is its version. Raises PluginError where it cannot be read."""

    def __init__(self, file: str | Path) -> None:
        self._path = Path(file)
        self.name, self.value = self._path.stem, self._path.name
        try:
            self._code = self._path.read_bytes()
        except OSError as error:
            raise PluginError(f"--plugin {file}: it cannot be read: {error.strerror}.") from error
        self.version = digest([self._code])

    def load(self) -> ModuleType:
        """The code that was read, run anew each time."""
        module = ModuleType(f"plugin_file_{self.name}")
        module.__file__ = str(self._path)
        sys.modules[module.__name__] = module  # where annotations of its classes are looked up
        exec(compile(self._code, self._path, "exec"), vars(module))
        return module


def _by_name(found: Iterable[EntryPoint | _File]) -> list[EntryPoint | _File]:
    """Each entry point once, sorted by name."""
    owners: dict[str, EntryPoint | _File] = {}
    for entry in found:
        other = owners.setdefault(entry.name, entry)
        if other is not entry and (other.value, _distribution(other)) != (entry.value, _distribution(entry)):
            raise PluginError(
                f"two plugins are called {entry.name!r}: {other.value} (from {_distribution(other)[0]}) and "
                f"{entry.value} (from {_distribution(entry)[0]}). Uninstall or rename one of them."
            )
    return [owners[name] for name in sorted(owners)]


def _distribution(entry: EntryPoint | _File) -> tuple[str, str]:
    if isinstance(entry, _File):
        return entry.value, entry.version
    if entry.dist is None:
        return "an unknown distribution", "?"
    metadata = entry.dist.metadata  # a file that is read anew each time
    return metadata["Name"], metadata["Version"]


def _load(entry: EntryPoint | _File) -> Plugin:
    distribution, version = _distribution(entry)
    who = f"plugin {entry.name!r} (from {distribution} {version})"
    answers = _answers(entry, who)
    for name, answer in answers.items():
        if not isinstance(answer, list | tuple):
            kind = name.removeprefix("compressor_")
            raise PluginError(f"{who}: {name}() answers {answer!r}, expected a list of {kind}.")
        for offered in answer:
            HOOKS[name](offered, who)
    methods, adapters, criteria = (tuple(answers.get(name, ())) for name in HOOKS)
    if os.environ.get("COMPRESSOR_TRACE") == "1":
        methods = tuple(map(_logged_method, methods))
        criteria = tuple(replace(one, score=_logged(f"{one.name}.score", one.score)) for one in criteria)
    return Plugin(entry.name, distribution, version, methods, adapters, criteria)


def _logged(name: str, function: Callable[..., Any], where: Any = None) -> Callable[..., Any]:
    """The function, each of whose calls is logged with the layer or linear map that it is given (or `where`) and how
    long it took; so are those of the statistic that it makes.
    """

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        answer = function(*given, **named)
        seconds = time.perf_counter() - started
        layers = [getattr(one, "layer", one) for one in (*given, where)]
        path = next((f" {layer.path}" for layer in layers if isinstance(getattr(layer, "path", None), str)), "")
        site = next((f" {one.name}" for one in (*given, where) if hasattr(one, "place")), "")
        _LOG.warning("%s%s%s: %.1f ms", name, path, site, 1000 * seconds)
        if name.endswith("statistic") and hasattr(answer, "__dict__"):
            steps = [step for step in ("update", "add", "again", "tensors") if hasattr(answer, step)]
            vars(answer).update({step: _logged(f"{name}.{step}", getattr(answer, step), given[-1]) for step in steps})
        return answer

    return call


def _logged_method(method: type[Method[Any]]) -> type[Method[Any]]:
    from compressor.method import Method

    theirs = {name: one for name, one in vars(Method).items() if isinstance(one, FunctionType) and name[0] != "_"}
    own = {name: getattr(method, name) for name in theirs if getattr(method, name) is not theirs[name]}
    logged = {name: _logged(f"{method.name}.{name}", function) for name, function in own.items()}
    names = {"__module__": method.__module__, "__doc__": method.__doc__, **logged}
    return new_class(method.__name__, (method,), exec_body=lambda namespace: namespace.update(names))


def _answers(entry: EntryPoint | _File, who: str) -> dict[str, Any]:
    """Hook → what a plugin answers to it."""
    try:
        marked = {
            name: function
            for name, function in vars(entry.load()).items()
            if isinstance(function, FunctionType) and hasattr(function, "is_compressor_hook")
        }
        for name in marked.keys() - HOOKS:
            raise PluginError(f"{who}: there is no hook {name!r}{did_you_mean(name, HOOKS)}")
        answers = {name: function() for name, function in marked.items()}
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way; the run stops, naming it
        option = "--plugin" if isinstance(entry, _File) else f"--without {entry.name}"
        moved = isinstance(error, ImportError) and error.name == "compressor"
        raise PluginError(
            f"{who} cannot be loaded: {type(error).__name__}: {error}."
            f"{' What plugins use is in compressor.plugin.' if moved else ''} "
            f"{'Mend it, or leave out' if isinstance(entry, _File) else 'Mend or uninstall it, or run with'} {option}."
        ) from error
    if not answers:
        raise PluginError(f"{who}: {entry.value} has no function marked @hookimpl, called {' or '.join(HOOKS)}.")
    return answers


def _verify_adapter(adapter: Any, who: str) -> None:
    from compressor.model.adapter import Adapter

    if not isinstance(adapter, Adapter) or not isinstance(getattr(adapter, "name", None), str):
        raise PluginError(f"{who}: {adapter!r} is not an instance of compressor.plugin.Adapter with a `name`.")
    _refuse_other_signatures(type(adapter), who)


def _verify_criterion(criterion: Any, who: str) -> None:
    from compressor.selection.criteria import Criterion

    if not isinstance(criterion, Criterion):
        raise PluginError(f"{who}: {criterion!r} is not an instance of compressor.plugin.Criterion.")
    if not criterion.name.isidentifier():
        raise PluginError(f"{who}: {criterion.name!r} is no name for a criterion; use letters, digits and _.")
    if problem := _call_problem(criterion.score, ["figures"]):
        raise PluginError(f"{who}: the criterion {criterion.name} cannot be asked as score(figures): {problem}.")
    if criterion.statistic is not None and not criterion.needs_text:
        raise PluginError(f"{who}: the criterion {criterion.name} has a statistic, which needs text; set `needs_text`.")


def _verify_method(method: Any, who: str) -> None:
    from compressor.method import BESIDE_NO_EXTERNAL, Method, Options, is_external

    if not (isinstance(method, type) and issubclass(method, Method)):
        raise PluginError(f"{who}: {method!r} is not a subclass of compressor.plugin.Method.")
    for attribute, kind in (("name", str), ("version", str)):
        if not isinstance(getattr(method, attribute, None), kind):
            raise PluginError(f"{who}: {method.__name__} has no `{attribute}`.")
    if (api := getattr(method, "api", None)) != PLUGIN_API:
        says = "does not say which `api` it was written for" if api is None else f"was written for `api = {api!r}`"
        raise PluginError(
            f"{who}: {method.__name__} {says}, and this version of moe-compressor has {PLUGIN_API}. Bring it up to "
            f"what docs/plugins.md says and set `api = {PLUGIN_API}`, or install the versions that belong together."
        )
    if not (isinstance(getattr(method, "options_type", None), type) and issubclass(method.options_type, Options)):
        raise PluginError(f"{who}: {method.__name__}.options_type is not a subclass of compressor.plugin.Options.")
    abstract = {*getattr(method, "__abstractmethods__", ())}
    if method.edit is Method.edit and not is_external(method):
        abstract.add("edit")
    if abstract:
        raise PluginError(f"{who}: {method.__name__} does not implement {', '.join(sorted(abstract))}.")
    never = [name for name in BESIDE_NO_EXTERNAL if getattr(method, name) is not getattr(Method, name)]
    if is_external(method) and never:
        raise PluginError(
            f"{who}: {method.__name__} defines `external`, and then {', '.join(never)} would never be asked: leave one "
            f"of them out."
        )
    _refuse_other_names(method, who)
    _refuse_other_signatures(method, who)


def _call_problem(function: Any, arguments: Sequence[str]) -> str | None:
    """Why a function cannot be called with so many arguments, as the core calls it: by position."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        return str(error)
    return None


def _own(kind: type) -> Iterator[tuple[type, str, Any]]:
    """What a plugin's classes define: class, name and value of everything without a _."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] != "compressor":
            yield from ((base, name, value) for name, value in vars(base).items() if not name.startswith("_"))


def _refuse_other_signatures(kind: type, who: str) -> None:
    """Raise PluginError where a class overrides a name of the contract by what the core cannot ask as it does."""
    contract = next(base for base in kind.__mro__ if base.__module__.partition(".")[0] == "compressor")
    for base, name, own in _own(kind):
        theirs = inspect.getattr_static(contract, name, None)
        if isinstance(theirs, property) and isinstance(own, FunctionType):
            raise PluginError(
                f"{who}: {base.__name__}.{name} is a function, where the contract has a property: put @property above "
                f"it, or write `{name} = …`."
            )
        if not isinstance(theirs, FunctionType) or isinstance(own, staticmethod | classmethod):
            continue
        asked = [*inspect.signature(theirs).parameters]
        if problem := _call_problem(own, asked):
            raise PluginError(
                f"{who}: {base.__name__}.{name} cannot be asked as {name}({', '.join(asked[1:])}), which the contract "
                f"has: {problem}."
            )


def _refuse_other_names(method: type[Method[Any]], who: str) -> None:
    """Raise PluginError where a method's class has a name that nothing would ever call, or that is not for overriding:
    an override that is misspelt would have no effect, without a word.
    """
    ours = [base for base in method.__mro__ if base.__module__.partition(".")[0] == "compressor"]
    contract = {name for base in ours for name in (*vars(base), *inspect.get_annotations(base))} - {*_NOT_TO_OVERRIDE}
    for base, name, _ in _own(method):
        if name in contract:
            continue
        if name in _NOT_TO_OVERRIDE:
            raise PluginError(f"{who}: {base.__name__}.{name} is not for a method to define: {_NOT_TO_OVERRIDE[name]}.")
        if alike := difflib.get_close_matches(name, contract, n=1, cutoff=_ALIKE):
            raise PluginError(
                f"{who}: {base.__name__}.{name} overrides nothing; did you mean {alike[0]!r}? A name of the "
                f"method's own that is so like one of the contract's should begin with _."
            )


HOOKS: Mapping[str, Callable[[Any, str], None]] = {
    "compressor_methods": _verify_method,
    "compressor_adapters": _verify_adapter,
    "compressor_criteria": _verify_criterion,
}
"""What a plugin can offer, each a list, and what verifies one entry of it."""


def _by_unique_name(plugins: Iterable[Plugin], kind: Literal["method", "criterion"]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for plugin in plugins:
        offered: Sequence[Any] = plugin.methods if kind == "method" else plugin.criteria
        for one in offered:
            if one.name in found:
                raise PluginError(
                    f"two plugins offer a {kind} called {one.name!r}: {owners[one.name]} and {plugin.name}. "
                    f"Run with --without one of them, or rename it in a file of yours."
                )
            found[one.name] = one
            owners[one.name] = plugin.name
    return found

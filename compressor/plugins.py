"""Plugins: who offers which compression methods, criteria and adapters.

A plugin is a module with a function marked `@compressor.hookimpl`, announced under the entry-point group `compressor`
of its distribution. The core knows no plugin by name: its own come through the same door.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from compressor.errors import PluginError, shortened

if TYPE_CHECKING:
    from compressor.method import Method
    from compressor.model.adapter import Adapter
    from compressor.selection.criteria import Criterion

GROUP = "compressor"

hookspec = pluggy.HookspecMarker("compressor")
hookimpl = pluggy.HookimplMarker("compressor")


class Hooks:
    """What a plugin can offer."""

    @hookspec
    def compressor_methods(self) -> list[type[Method[Any]]]:  # type: ignore[empty-body]
        """Compression methods: subclasses of `compressor.Method`, each with its own `name`."""

    @hookspec
    def compressor_adapters(self) -> list[Adapter]:  # type: ignore[empty-body]
        """Adapters for models whose structure cannot be found by itself: instances of `compressor.Adapter`."""

    @hookspec
    def compressor_criteria(self) -> list[Criterion]:  # type: ignore[empty-body]
        """Criteria that experts can be chosen by: instances of `compressor.Criterion`, each with its own `name`."""


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
        """The adapters of all plugins."""
        return tuple(adapter for plugin in self.plugins for adapter in plugin.adapters)

    def versions(self) -> dict[str, str]:
        """Those of everything that a run depends on, by distribution: the plugins' own too."""
        from compressor.machine.environment import versions  # torch

        return versions({plugin.distribution: plugin.version for plugin in self.plugins})


def load_plugins(without: Iterable[str] = (), found: Iterable[EntryPoint] | None = None) -> Plugins:
    """Import every installed plugin but those named in `without`.

    `found` replaces the installed entry points, for tests. Raises PluginError, naming plugin and distribution, for a
    plugin that cannot be imported or offers no valid method, for equal names, and for an unknown name in `without`.
    """
    installed = _by_name(entry_points(group=GROUP) if found is None else found)
    blocked = set(without)
    unknown = blocked - {entry.name for entry in installed}
    if unknown:
        known = ", ".join(entry.name for entry in installed) or "none"
        raise PluginError(f"--without {min(unknown)}: no such plugin is installed; installed are: {known}.")
    manager = pluggy.PluginManager("compressor")
    manager.add_hookspecs(Hooks)
    plugins = tuple(_load(entry, manager) for entry in installed if entry.name not in blocked)
    return Plugins(plugins, _by_unique_name(plugins, "method"), _by_unique_name(plugins, "criterion"))


def _by_name(found: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Each entry point once, sorted by name.

    Pluggy takes the first of two plugins with one name and says nothing of the second; we refuse.
    """
    owners: dict[str, EntryPoint] = {}
    for entry in found:
        other = owners.setdefault(entry.name, entry)
        if (other.value, _distribution(other)) != (entry.value, _distribution(entry)):
            raise PluginError(
                f"two plugins are called {entry.name!r}: {other.value} (from {_distribution(other)[0]}) and "
                f"{entry.value} (from {_distribution(entry)[0]}). Uninstall one of them."
            )
    return [owners[name] for name in sorted(owners)]


def _distribution(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist else ("an unknown distribution", "?")


def _load(entry: EntryPoint, manager: pluggy.PluginManager) -> Plugin:
    distribution, version = _distribution(entry)
    who = f"plugin {entry.name!r} (from {distribution} {version})"
    try:
        module = entry.load()
        if manager.is_registered(module):
            raise PluginError(f"{who}: its module {entry.value} is registered under another name too.")
        manager.register(module, name=entry.name)
        manager.check_pending()
        answers = _answers(manager.hook.compressor_methods, module)
        adapter_answers = _answers(manager.hook.compressor_adapters, module)
        criteria_answers = _answers(manager.hook.compressor_criteria, module)
    except PluginError:
        raise
    except Exception as error:  # a plugin may fail in any way; the run stops, naming it
        raise PluginError(
            f"{who} cannot be loaded: {type(error).__name__}: {error}. Mend or uninstall it, or run with "
            f"--without {entry.name}."
        ) from error
    if not answers and not adapter_answers and not criteria_answers:
        raise PluginError(
            f"{who}: {entry.value} has no function `compressor_methods`, `compressor_adapters` or "
            f"`compressor_criteria` marked @compressor.hookimpl."
        )
    for answer in answers:
        if not isinstance(answer, list | tuple):
            raise PluginError(f"{who}: compressor_methods() answers {answer!r}, expected a list of methods.")
    methods = tuple(method for answer in answers for method in answer)
    for method in methods:
        _verify(method, who)
    adapters = tuple(adapter for answer in adapter_answers for adapter in _adapters(answer, who))
    criteria = tuple(criterion for answer in criteria_answers for criterion in _criteria(answer, who))
    return Plugin(entry.name, distribution, version, methods, adapters, criteria)


def _answers(hook: Any, module: Any) -> list[Any]:
    """What one plugin answers to one hook."""
    return [implementation.function() for implementation in hook.get_hookimpls() if implementation.plugin is module]


def _adapters(answer: Any, who: str) -> list[Adapter]:
    from compressor.model.adapter import Adapter

    if not isinstance(answer, list | tuple):
        raise PluginError(f"{who}: compressor_adapters() answers {answer!r}, expected a list of adapters.")
    for adapter in answer:
        if not isinstance(adapter, Adapter) or not isinstance(getattr(adapter, "name", None), str):
            raise PluginError(f"{who}: {adapter!r} is not an instance of compressor.Adapter with a `name`.")
    return list(answer)


def _criteria(answer: Any, who: str) -> list[Criterion]:
    from compressor.selection.criteria import Criterion

    if not isinstance(answer, list | tuple):
        raise PluginError(f"{who}: compressor_criteria() answers {answer!r}, expected a list of criteria.")
    for criterion in answer:
        if not isinstance(criterion, Criterion):
            raise PluginError(f"{who}: {criterion!r} is not an instance of compressor.Criterion.")
        if not criterion.name.isidentifier():
            raise PluginError(f"{who}: {criterion.name!r} is no name for a criterion; use letters, digits and _.")
    return list(answer)


def _verify(method: Any, who: str) -> None:
    from compressor.method import Method, Options

    if not (isinstance(method, type) and issubclass(method, Method)):
        raise PluginError(f"{who}: {method!r} is not a subclass of compressor.Method.")
    for attribute, kind in (("name", str), ("version", str)):
        if not isinstance(getattr(method, attribute, None), kind):
            raise PluginError(f"{who}: {method.__name__} has no `{attribute}`.")
    if not (isinstance(getattr(method, "options_type", None), type) and issubclass(method.options_type, Options)):
        raise PluginError(f"{who}: {method.__name__}.options_type is not a subclass of compressor.Options.")
    abstract = sorted(getattr(method, "__abstractmethods__", ()))
    if abstract:
        raise PluginError(f"{who}: {method.__name__} does not implement {', '.join(abstract)}.")


def _by_unique_name(plugins: Iterable[Plugin], kind: Literal["method", "criterion"]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for plugin in plugins:
        offered: Sequence[Any] = plugin.methods if kind == "method" else plugin.criteria
        for one in offered:
            if one.name in found:
                raise PluginError(
                    f"two plugins offer a {kind} called {one.name!r}: {owners[one.name]} and {plugin.name}. "
                    f"Run with --without one of them."
                )
            found[one.name] = one
            owners[one.name] = plugin.name
    return found

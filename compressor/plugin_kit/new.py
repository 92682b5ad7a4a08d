"""Write a small project that is a plugin: the same code as docs/plugins.md has, with a recipe, tests and CI."""

from __future__ import annotations

import keyword
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compressor._version import __version__
from compressor.errors import PluginError
from compressor.plugins import PLUGIN_API, Plugins

Kind = Literal["method", "criterion", "adapter"]
TEMPLATES = Path(__file__).with_name("project")
_ABOUT = {
    "method": "Zeros in the experts that are chosen least",
    "criterion": "Keep the experts that put out the largest numbers, and often",
    "adapter": "Explains models whose config counts experts under a name of its own",
}


def new_project(name: str, kind: Kind, folder: Path, plugins: Plugins) -> list[Path]:
    """Write the project into a new folder; returns its files. Raises PluginError for a name that cannot be one, or is
    taken among the `plugins` or modules that are there, and for a folder that exists or cannot be made.
    """
    _refuse_name(name, plugins)
    files = rendered(name, kind)
    try:
        folder.mkdir(parents=True)
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise PluginError(f"{folder} exists already; name another one with --folder.") from error
    except OSError as error:
        raise PluginError(f"{folder}: the project cannot be written there: {error.strerror}.") from error
    return [folder / path for path in files]


def rendered(name: str, kind: Kind) -> dict[str, str]:
    """Path in the project → text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    values = {
        "name": name,
        "project": name.replace("_", "-"),
        "class": "".join(part.capitalize() for part in name.split("_")),
        "kind": kind,
        "about": _ABOUT[kind],
        "api": PLUGIN_API,
        "version": __version__,
    }
    files = {}
    for path in sorted(environment.list_templates()):
        place, _, of = path.removesuffix(".jinja").replace("NAME", name).partition(".py.")
        if of in ("", kind):
            files[f"{place}.py" if of else place] = environment.get_template(path).render(values)
    return files


def _refuse_name(name: str, plugins: Plugins) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise PluginError(
            f"{name!r} is no name for a plugin; use lower-case letters, digits and _, such as rare_zeros."
        )
    module = find_spec(name)
    is_module = module is not None and module.origin is not None  # a folder alone is none
    if is_module or name in {plugin.name.replace("-", "_") for plugin in plugins.plugins}:
        raise PluginError(f"there is a module or plugin called {name!r} already; take another name.")
    if name in plugins.methods or name in plugins.criteria:
        raise PluginError(f"there is a method or criterion called {name!r} already; take another name.")

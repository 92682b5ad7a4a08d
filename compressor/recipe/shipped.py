"""The recipes that come with the library: found by name, listed by the purpose that is their first line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from compressor.errors import RecipeError
from compressor.wording import did_you_mean


def shipped() -> Mapping[str, Path]:
    """Name → file, by name: beside the code in an installed package, at the top in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    folder = inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def find_recipe(reference: Path) -> Path:
    """The file of that path, if there is one, or else the recipe of that name. Raises RecipeError for a name that no
    recipe has; what can only be a path is given back as it is.
    """
    name = str(reference)
    is_path = not re.fullmatch(r"[\w.-]+", name) or reference.suffix.lower() in (".yaml", ".yml", ".json")
    is_other = reference.exists() and name not in shipped()  # a folder, say, which cannot be read as a recipe
    return reference if is_path or is_other or reference.is_file() else _named(name)


def _named(name: str) -> Path:
    if name in (known := shipped()):
        return known[name]
    raise RecipeError(
        f"{name}: there is no recipe of this name{did_you_mean(name, known)} `compressor recipes` lists them; a file "
        f"of your own ends in .yaml"
    )


def described(name: str | None = None) -> list[dict[str, Any]]:
    """Each recipe's `name`, `model`, methods (`passes`), `purpose`, `path` and `text`; or of the one that is named."""
    found = []
    for one, path in ({name: _named(name)} if name else shipped()).items():
        text = path.read_text(encoding="utf-8")
        recipe, purpose = yaml.safe_load(text), text.partition("\n")[0].removeprefix("# ")
        passes = [method for entry in recipe["passes"] for method in entry]
        about = {"name": one, "model": recipe["model"], "passes": passes, "purpose": purpose}
        found.append({**about, "path": str(path), "text": text})
    return sorted(found, key=lambda one: one["model"] != "demo")  # first what needs no network

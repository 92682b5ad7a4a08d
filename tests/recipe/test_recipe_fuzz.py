"""Recipes changed at random: each is carried out as far as `compressor check` goes, or answered by one error that is
short enough to be read.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from compressor.data.lm_eval_tasks import LoadedTasks, TaskSources
from compressor.errors import CompressorError
from compressor.model import adapter
from compressor.plugins import Plugins, load_plugins
from compressor.recipe.schema import load_recipe
from compressor.run import check, readiness

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
LONGEST_LINE = 2000
LONG = 10_000

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 6, 7.5, -1, 0.5, 1e-3, 1e300, -0.0),
    *(2**31, 2**40, 2**63 - 1, 2**63, -(2**64), 10**400, -(10**400), float("inf"), float("-inf"), float("nan")),
    *("", " ", "demo", "code", "a" * LONG, "a/b" * LONG, "é" * 200, "x" * 255, "x" * 251, "/", "..", "~", "~nobody/x"),
    *("\0", "a\0b", "a\nb", "\ud7ff", "👾" * 80, "%s{}{0}", "[bold]", "no", "1e-3", "12:30", "010", "0x10", "cuda:1"),
    *("9" * 400, "9" * 5000, "9" * 400 + "GB", "1e400", "16GB", "0.1B", "{mean: 6}"),
    *([], {}, [[]], {"": ""}, [None], [1, "a", None], {"a": {"b": {"c": []}}}, {"mean": 10**400}, {"mean": 5.5}),
    *({"0": 10**400}, {"0": 4, "1": 6}, {"0": [0, 1]}, {"a" * LONG: 1}, list(range(3000)), [{"demo": "code"}]),
    *({"demo": "mix", "samples": 10**400}, {"demo": "mix", "samples": 2**62}, {"text": "a" * LONG}, {"jsonl": "\0"}),
    *({"tokens": "x" * 300}, {"dataset": "\0"}, {"task": "a" * LONG + ".yaml"}, {"task": "\0.yaml"}, {"task": "é.yml"}),
]
RAW = [
    "10e999",
    "1_000",
    "0b11",
    "!!int 7",
    "!!binary aGk=",
    "!!python/name:os.system",
    "*a",
    "&a [*a]",
    "? x",
    "2001-01-01",
]
RAW += [
    "'",
    '"',
    "{",
    "[",
    "|",
    ">",
    "%",
    "@",
    "`",
    "\t",
    "\x07",
    "\ufeff",
    "...",
    "---",
    "#",
    "<<: {}",
    ": :",
    "- -",
    "1:1:1",
]
RAW += ["9" * 5000, "0o17", ".inf", "-.INF", ".NaN", '"\\0"', '"\\ud800"', "~", "1e", "0x" + "f" * 400, "[" * 3000]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def known_keys(plugins: Plugins) -> list[str]:
    """Every key that a recipe may have somewhere."""
    from compressor.data.sources import _KINDS
    from compressor.recipe.schema import Calibration, Evaluation, Recipe

    models = [
        Recipe,
        Calibration,
        Evaluation,
        *_KINDS.values(),
        *(one.options_type for one in plugins.methods.values()),
    ]
    return list(dict.fromkeys([*(name for model in models for name in model.model_fields), *plugins.methods]))


def changed(recipe: Any, keys: list[str], draw: random.Random) -> Any:
    """A copy of a recipe with one value replaced, added, moved, renamed or taken out."""
    recipe = copy.deepcopy(recipe)
    *around, last = draw.choice([path for path in places(recipe) if path])
    parent = recipe
    for key in around:
        parent = parent[key]
    kind = draw.randrange(6)
    if kind == 0:
        del parent[last]
    elif kind == 1 and isinstance(parent, dict):
        parent[draw.choice(["a" * LONG, "", "\0", "modle", "mean", *keys])] = parent.pop(last)
    elif kind in (2, 3) and isinstance(parent, dict):
        parent[draw.choice(keys)] = copy.deepcopy(draw.choice(VALUES))
    else:
        parent[last] = copy.deepcopy(draw.choice(VALUES))
    return recipe


def changed_text(text: str, draw: random.Random) -> bytes:
    """The text with a piece of it taken out, doubled or replaced."""
    start = draw.randrange(len(text))
    end = min(len(text), start + draw.choice([1, 1, 4, 30]))
    middle = draw.choice(["", text[start:end] * 2, draw.choice(RAW), chr(draw.randrange(0xD7FF))])
    whole = (text[:start] + middle + text[end:]).encode()
    return whole if draw.random() < 0.9 else whole[:start] + bytes([draw.randrange(256)]) + whole[end:]


class TasksReadOnce(TaskSources):
    """Each task of each folder is read once; lm-eval's index, is not: it has none of their names."""

    _read: ClassVar[dict[tuple[str, Path | None], LoadedTasks]] = {}

    def load(self, name: str) -> LoadedTasks:
        place = (name, self._task_path)
        if place not in self._read:
            self._read[place] = super().load(name)
        return copy.copy(self._read[place])

    def _manager(self, include_defaults: bool) -> Any:
        return super()._manager(False)


def check_one(source: Any, overrides: list[str], plugins: Plugins) -> str:
    """The error's message, empty where there is none; any other exception is a failure."""
    try:
        loaded = load_recipe(source, overrides=overrides, methods=plugins.methods, criteria=plugins.criteria)
        check.check(loaded, plugins.adapters)
    except CompressorError as error:
        return str(error)
    return ""


def fuzz(number: int, seed: int, folder: Path) -> Iterator[tuple[Any, list[str], str]]:
    """(recipe, what is set, message) of so many recipes."""
    plugins, draw = load_plugins(), random.Random(seed)
    keys = known_keys(plugins)
    texts = [path.read_text() for path in RECIPES]
    texts += 4 * [
        text for text in texts if "model: demo" in text
    ]  # no other model is here, so no other recipe is right
    recipes = {text: yaml.safe_load(text) for text in texts}
    written = [*RAW, *(yaml.safe_dump(one, default_flow_style=True, width=10**6)[:-1] for one in VALUES)]
    for _ in range(number):
        text, overrides = draw.choice(texts), []
        kind = draw.randrange(4)
        recipe = recipes[text]
        source: Any
        if kind == 0:
            source = folder / "r.yaml"
            source.write_bytes(changed_text(text, draw))
        elif kind == 1:
            path = draw.choice([path for path in places(recipe) if path])
            value = draw.choice(written)
            overrides = [f"{'.'.join(map(str, path))}{draw.choice(['', '', f'.{draw.choice(keys)}', '.'])}={value}"]
            source = recipe
        else:
            source = changed(recipe, keys, draw)
            if draw.random() < 0.3:
                source = changed(source, keys, draw)
        yield source, overrides, check_one(source, overrides, plugins)


@pytest.mark.slow  # it reads lm-eval's index of tasks
@pytest.mark.parametrize(
    ("seed", "number"), [(0, 60), *(pytest.param(seed, 150, marks=pytest.mark.nightly) for seed in (0, 1, 2))]
)
def test_recipes_changed_at_random(seed: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []

    def found_once(*arguments: Any) -> Any:
        """The demo model is the only one that is here, and its experts are where they were."""
        found[:] = found or [structure_of(*arguments)]
        return found[0]

    structure_of = adapter.structure_of
    monkeypatch.setattr(check, "structure_of", found_once)
    monkeypatch.setattr(readiness, "TaskSources", TasksReadOnce)
    monkeypatch.chdir(tmp_path)
    answers = list(fuzz(number, seed, tmp_path))
    for source, overrides, message in answers:
        assert all(len(line) <= LONGEST_LINE for line in message.split("\n")), (source, overrides)
        assert "Error" not in message.partition(": ")[0], (source, overrides, message)
    assert number / 30 <= sum(not message for *_, message in answers) <= number / 2, (
        "hardly any recipe is right, or wrong"
    )

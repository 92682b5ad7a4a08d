"""The recipes that come with the library: each can be run by its name, on the model that it names.

`cases/configs` has the published config.json of each model: the fields that say what is built, from transformers'
config classes and the models' cards. That they build the real thing is seen from the number of parameters.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import word_tokenizer

from compressor.cli import app
from compressor.data.lm_eval_tasks import LoadedTasks
from compressor.data.sources import DatasetSource, Text
from compressor.errors import RecipeError
from compressor.plugins import Plugins, load_plugins
from compressor.recipe.schema import load_recipe
from compressor.recipe.shipped import described, find_recipe, shipped
from compressor.run import check, readiness

Cli = Callable[..., Any]
ROOT = Path(__file__).parents[2]
CONFIGS = Path(__file__).parents[1] / "cases" / "configs"
PARAMETERS = {
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
    "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "openai/gpt-oss-20b": 20_914_757_184,
    "zai-org/GLM-4.5-Air": 106_852_245_504,  # without its extra prediction layer, which transformers does not build
}
"""Of the model that is built; those of the first four as their checkpoints' indexes have them."""
REMAIN = {
    "deepseek-v2-lite": ("64 → 48", 26),
    "glm-4.5-air": ("128 → 96", 45),
    "gpt-oss-20b": ("32 → 24", 24),
    "mixtral-8x7b": ("8 → 6", 32),
    "mixtral-8x7b-gsm8k": ("8 → 6", 32),
    "mixtral-8x7b-prune-and-skip": ("8 → 6", 32),
    "mixtral-8x7b-skipping": ("8 → 8", 32),
    "olmoe-1b-7b": ("64 → 48", 16),
    "qwen3-30b-a3b": ("128 → 96", 48),
    "qwen3-30b-a3b-chats": ("128 → 96", 48),
    "qwen3-30b-a3b-constants": ("128 → 96", 48),
    "qwen3-30b-a3b-int4": ("128 → 112", 48),
    "qwen3-30b-a3b-uniform": ("128 → 96", 48),
}
"""Experts of each layer, before and after, on average; and layers."""
QUICK = ("gpt-oss-20b", "olmoe-1b-7b")
REAL = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.nightly)
    for name, path in shipped().items()
    if yaml.safe_load(path.read_text())["model"] != "demo"
]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[str], Path]:
    """A folder with a real model's config, and a tokenizer of a few words."""

    def folder(model: str) -> Path:
        folder = tmp_path / model.rpartition("/")[2]
        folder.mkdir(exist_ok=True)
        shutil.copy(CONFIGS / f"{model.replace('/', '--')}.json", folder / "config.json")
        word_tokenizer(["</s>", *(f"w{number}" for number in range(1, 64))], unknown="w1").save_pretrained(folder)
        return folder

    return folder


@pytest.fixture
def _without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from the hub: rows of text, and lm-eval's documents."""
    rows = lambda self, *, seed, split: [Text(["w1 w2 w3 w4 " * 600], self.title)]  # noqa: E731
    monkeypatch.setattr(DatasetSource, "documents", rows)
    load = readiness.TaskSources.load
    is_here = lambda name: name.startswith("demo_")  # noqa: E731
    monkeypatch.setattr(
        readiness.TaskSources, "load", lambda self, name: load(self, name) if is_here(name) else LoadedTasks()
    )


def variants(name: str) -> Iterator[tuple[list[str], str | None]]:
    """What the commands in a recipe's comments set, and the output that they name."""
    for line in re.findall(rf"^#     compressor run {name}(.*)$", shipped()[name].read_text(), re.MULTILINE):
        words = shlex.split(line)
        assert set(words[::2]) <= {"--set", "--output", "--memory"}, line
        given = list(zip(words[::2], words[1::2], strict=True))
        outputs = [value for option, value in given if option == "--output"]
        yield [value for option, value in given if option == "--set"], outputs[0] if outputs else None


def test_every_recipe_says_what_it_is_for_and_how_it_is_run() -> None:
    assert set(REMAIN) == {one["name"] for one in described() if one["model"] != "demo"}
    assert set(PARAMETERS) == {one["model"] for one in described() if one["model"] != "demo"}
    for one in described():
        assert 40 <= len(one["purpose"]) <= 118, one["name"]
        assert re.search(rf"^#     compressor run {one['name']}$", one["text"], re.MULTILINE), one["name"]
        assert next(variants(one["name"])) == ([], None)
        outputs = [output for _, output in variants(one["name"]) if output]
        assert len({*outputs, yaml.safe_load(one["text"])["output"]}) == len(outputs) + 1, one["name"]


@pytest.mark.usefixtures("_without_network")
@pytest.mark.parametrize("name", REAL)
def test_it_can_work_on_the_real_model(name: str, plugins: Plugins, folder_of: Callable[[str], Path]) -> None:
    settings = yaml.safe_load(shipped()[name].read_text())
    given: dict[str, Any] = {"methods": plugins.methods, "criteria": plugins.criteria}
    loaded = load_recipe(name, model=str(folder_of(settings["model"])), overrides=["memory=1TB", "device=cpu"], **given)
    plan = check.check(loaded, plugins.adapters).plan
    assert plan["parameters"]["before"] == PARAMETERS[settings["model"]]
    before, kept = (sum(layer[key] for layer in plan["layers"]) for key in ("num_experts", "kept"))
    number = len(plan["layers"])
    assert (f"{before // number} → {kept // number}", number) == REMAIN[name]
    assert before % number == kept % number == 0


@pytest.mark.nightly
@pytest.mark.usefixtures("_without_network")
@pytest.mark.parametrize("name", [*shipped()])
def test_so_can_what_its_comments_name(name: str, plugins: Plugins, folder_of: Callable[[str], Path]) -> None:
    model = yaml.safe_load(shipped()[name].read_text())["model"]
    reference = model if model == "demo" else str(folder_of(model))
    given: dict[str, Any] = {"methods": plugins.methods, "criteria": plugins.criteria, "model": reference}
    for overrides, _ in variants(name):
        if "my-chats" not in str(overrides):
            loaded = load_recipe(name, overrides=[*overrides, "memory=1TB", "device=cpu"], **given)
            check.check(loaded, plugins.adapters)


# By name ---------------------------------------------------------------------------------------------------


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").recipe.model == "demo"
    Path("quickstart").mkdir()  # a folder is no recipe
    assert find_recipe(Path("quickstart")) == ROOT / "recipes" / "quickstart.yaml"
    Path("quickstart").rmdir()
    Path("quickstart").write_text("model: other\npasses: [{prune: {}}]\n")
    assert load_recipe("quickstart").recipe.model == "other"


@pytest.mark.parametrize(("name", "meant"), [("quickstrat", "; did you mean 'quickstart'?"), ("nothing-like-it", ".")])
def test_an_unknown_name(name: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.chdir(tmp_path)
    says = f"{name}: there is no recipe of this name{meant} `compressor recipes` lists them; a file of your own ends in"
    with pytest.raises(RecipeError, match=re.escape(says)):
        load_recipe(name)
    for command in ("run", "check", "recipes"):
        answer = cli(command, name)
        assert (answer.status, answer.out) == (2, "")
        assert answer.err.startswith(f"error: {says}")


def test_listed_and_printed(cli: Cli) -> None:
    listed = cli("recipes").out
    assert listed.startswith("prune-and-quantize  demo: expert_pruning, quantization\n    A chain: ")
    assert all(f"\n{name}  " in f"\n{listed}" for name in shipped())
    assert cli("recipes", "olmoe-1b-7b").out == (ROOT / "recipes" / "olmoe-1b-7b.yaml").read_text()
    [one] = json.loads(cli("recipes", "olmoe-1b-7b", "--json").out)
    assert one["model"] == "allenai/OLMoE-1B-7B-0924"
    assert one["passes"] == ["expert_pruning", "output_scale"]


def test_checked_by_name(cli: Cli, tmp_path: Path) -> None:
    answer = cli("check", "quickstart-uniform", "--output", tmp_path / "out", "--quiet", "--json")
    assert answer.status == 0, answer.err
    assert {layer["kept"] for layer in json.loads(answer.out)["layers"]} == {6}


# In a terminal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "number", "says"),
    [
        ("compressor check olmoe", 2, "olmoe-1b-7b"),
        ("compressor recipes gpt", 2, "gpt-oss-20b"),
        ("compressor recip", 1, "recipes"),
    ],
)
def test_shells_complete_commands_and_recipes(
    words: str, number: int, says: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "COMP_WORDS": words,
        "COMP_CWORD": str(number),
        "_COMPRESSOR_COMPLETE": "complete_bash",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        app([], prog_name="compressor", standalone_mode=False)
    assert capsys.readouterr().out.split() == [says]


def test_help_says_what_a_value_is_and_not_its_type(cli: Cli) -> None:
    assert "--install-completion" in cli("--help").out
    names = [info.name or info.callback.__name__.replace("_", "-") for info in app.registered_commands if info.callback]
    assert {"run", "init", "schema"} <= {*names}
    for command in (*names, "plugin new"):
        found = cli(*command.split(), "--help").out
        assert not re.search(r"<\w+(\[\w+\])?>", found), command
        assert "--help" in found


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("command", [["recipes"], ["methods"], ["inspect", "demo"], ["run", "--help"]])
def test_as_wide_as_the_terminal(command: list[str], width: int, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    answer = cli(*command)
    assert answer.status == 0
    assert not re.search("\x1b\\[[0-9;]*[34][0-9]m", answer.out)  # no colour, though a terminal was claimed
    assert max(map(len, re.sub("\x1b\\[[0-9;]*m", "", answer.out).splitlines())) <= width

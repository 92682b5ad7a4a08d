"""The door that plugins come through: what is refused, in which words, and a third-party plugin that works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import tiny_folder

import compressor
from compressor.errors import PluginError
from compressor.plugin import InputStatistic
from compressor.plugins import load_plugins

Cli = Callable[..., Any]
Install = Callable[..., list[EntryPoint]]
InstallFrom = Callable[[Path], None]

METHOD = """
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from pydantic import Field
from compressor.plugin import (
    Decision,
    LayerWeights,
    Method,
    MoELayer,
    Options,
    Plan,
    fewer_experts,
    hookimpl,
)


class FirstOptions(Options):
    count: int = Field(ge=1, description="experts to keep in every layer")


class KeepFirst(Method[FirstOptions]):
    '''Keep the first experts of every layer.'''

    name = "keep_first"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = FirstOptions

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        return Plan([fewer_experts(layer, self.options.count, "count") for layer in layers])

    def statistic(self, layer: MoELayer) -> None:
        return None

    def decide(self, layers: Sequence[MoELayer], statistics: Mapping[str, Any]) -> Decision:
        return {"layers": {layer.path: {"kept": list(range(self.options.count))} for layer in layers}}

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        layer.keep(decision["layers"][layer.path]["kept"])


@hookimpl
def compressor_methods() -> list[type[KeepFirst]]:
    return [KeepFirst]
"""

OFFER = """
from compressor.plugin import Method, Options, hookimpl
{body}
@hookimpl
def compressor_methods():
    return {offered}
"""


def write_distribution(folder: Path, distribution: str, plugins: dict[str, str], source: str) -> str:
    """Lay out an installed distribution as pip does; its one module holds `source`. Returns the module's name."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    information = folder / f"{module}-1.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    lines = [f"{name} = {value or module}" for name, value in plugins.items()]
    (information / "entry_points.txt").write_text("\n".join(["[compressor]", *lines, ""]))
    return module


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install distributions (name → source of the module) and return all their entry points."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def add(sources: dict[str, str], plugin: str | None = None) -> list[EntryPoint]:
        for distribution, source in sources.items():
            module = write_distribution(folder, distribution, {plugin or distribution: ""}, source)
            monkeypatch.delitem(sys.modules, module, raising=False)
        return [entry for found in distributions(path=[str(folder)]) for entry in found.entry_points]

    return add


def offer(offered: str, body: str = "") -> str:
    return OFFER.format(offered=offered, body=textwrap.dedent(body))


# --- what is installed


def test_our_own() -> None:
    plugins = load_plugins()
    folders = sorted((Path(__file__).parents[1] / "plugins").glob("compressor_*"))
    own = [folder.name.removeprefix("compressor_") for folder in folders]
    names = [(plugin.name, plugin.distribution) for plugin in plugins.plugins]
    assert names == [(name.replace("_", "-"), "moe-compressor") for name in own]
    assert list(plugins.methods) == own
    assert {"reap", "ean", "frequency", "aimer", "random"} <= set(plugins.criteria)
    assert plugins.methods["expert_pruning"].__module__ == "compressor_expert_pruning.method"


def test_without(install: Install) -> None:
    left = [name for name in load_plugins().methods if name != "expert_pruning"]
    assert list(load_plugins(["expert-pruning"]).methods) == left
    found = install({"one": METHOD, "two": offer("[]")})
    assert [plugin.name for plugin in load_plugins(["one"], found).plugins] == ["two"]


def test_unknown_without(install: Install) -> None:
    with pytest.raises(PluginError) as error:
        load_plugins(["onne"], install({"one": METHOD, "two": offer("[]")}))
    assert str(error.value) == "--without onne: no such plugin is installed; installed are: one, two."
    with pytest.raises(PluginError, match="installed are: none"):
        load_plugins(["one"], [])


def test_third_party_method(install: Install) -> None:
    plugins = load_plugins(found=install({"keep-first": METHOD}))
    [plugin] = plugins.plugins
    assert (plugin.name, plugin.distribution, plugin.version) == ("keep-first", "keep-first", "1.2")
    assert plugins.methods["keep_first"].__name__ == "KeepFirst"


def test_same_entry_point_found_twice_is_one(install: Install) -> None:
    found = install({"keep-first": METHOD})
    assert len(load_plugins(found=[*found, *found]).plugins) == 1


# --- what is refused


def test_equal_entry_point_names(install: Install) -> None:
    with pytest.raises(PluginError) as error:
        load_plugins(found=sorted(install({"one": METHOD, "two": METHOD}, plugin="pruner"), key=lambda e: e.value))
    assert str(error.value) == (
        "two plugins are called 'pruner': one (from one) and two (from two). Uninstall or rename one of them."
    )


def test_equal_method_names(install: Install) -> None:
    found = install({"one": METHOD, "two": METHOD})
    with pytest.raises(PluginError) as error:
        load_plugins(found=found)
    assert str(error.value) == (
        "two plugins offer a method called 'keep_first': one and two. Run with --without one of them, or rename it in "
        "a file of yours."
    )
    assert list(load_plugins(["two"], found).methods) == ["keep_first"]


def test_one_module_under_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    write_distribution(tmp_path, "twice", {"first": "twice", "second": "twice"}, METHOD)
    found = [entry for dist in distributions(path=[str(tmp_path)]) for entry in dist.entry_points]
    with pytest.raises(PluginError, match="two plugins offer a method called 'keep_first': first and second"):
        load_plugins(found=found)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError: "),
        ("from compressor.plugin import nothing_like_it", "ImportError: cannot import name 'nothing_like_it'"),
        (offer("[1 / 0]"), "ZeroDivisionError: division by zero"),
    ],
)
def test_plugin_that_fails(source: str, says: str, install: Install) -> None:
    found = install({"broken": source, "keep-first": METHOD})
    with pytest.raises(PluginError) as error:
        load_plugins(found=found)
    message = str(error.value)
    assert message.startswith(f"plugin 'broken' (from broken 1.2) cannot be loaded: {says}")
    assert message.endswith("Mend or uninstall it, or run with --without broken.")
    assert list(load_plugins(["broken"], found).methods) == ["keep_first"]


NO_STEPS = """
class Half(Method):
    name = "half"
    version = "1"
    api = 2
    options_type = Options
    def check(self, layers): ...
    def edit(self, moe, decision): ...
"""
WHOLE = NO_STEPS + "    def statistic(self, layer): ...\n    def decide(self, layers, statistics): ...\n"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "x = 1",
            "rubbish has no function marked @hookimpl, called compressor_methods or compressor_adapters or "
            "compressor_criteria.",
        ),
        (
            offer("[]").replace("compressor_methods", "compressor_method"),
            "there is no hook 'compressor_method'; did you mean 'compressor_methods'?",
        ),
        (offer("None"), "compressor_methods() answers None, expected a list of methods."),
        (offer("'text'"), "compressor_methods() answers 'text', expected a list of methods."),
        (offer("[3]"), "3 is not a subclass of compressor.plugin.Method."),
        (offer("[Options]"), "<class 'compressor.method.Options'> is not a subclass of compressor.plugin.Method."),
        (offer("[Half]", NO_STEPS), "Half does not implement decide."),
        (offer("[Half]", WHOLE.replace("def edit", "def _edit")), "Half does not implement edit."),
        (
            offer("[Half]", WHOLE + "    def external(self, source, target, decision): ...\n"),
            "Half defines `external`, and then edit would never be asked: leave one of them out.",
        ),
        (offer("[Half]", WHOLE.replace('name = "half"', "")), "Half has no `name`."),
        (offer("[Half]", WHOLE.replace('"half"', "3")), "Half has no `name`."),
        (offer("[Half]", WHOLE.replace('version = "1"', "")), "Half has no `version`."),
        (
            offer("[Half]", WHOLE.replace("options_type = Options", "")),
            "Half.options_type is not a subclass of compressor.plugin.Options.",
        ),
        (
            offer("[Half]", WHOLE.replace("options_type = Options", "options_type = dict")),
            "Half.options_type is not a subclass of compressor.plugin.Options.",
        ),
    ],
)
def test_plugin_that_offers_rubbish(source: str, says: str, install: Install) -> None:
    with pytest.raises(PluginError) as error:
        load_plugins(found=install({"rubbish": source}))
    assert str(error.value) == f"plugin 'rubbish' (from rubbish 1.2): {says}"


def test_imports_of_the_first_version_are_sent_to_where_the_names_are(install: Install) -> None:
    with pytest.raises(
        PluginError, match=r"cannot import name 'Decision' .* What plugins use is in compressor\.plugin\. "
    ):
        load_plugins(found=install({"old": METHOD.replace("compressor.plugin", "compressor")}))


@pytest.mark.parametrize(
    ("api", "says"), [("", "does not say which `api` it was written for"), ("api = 1", "was written for `api = 1`")]
)
def test_methods_of_another_version(api: str, says: str, install: Install) -> None:
    with pytest.raises(PluginError) as error:
        load_plugins(found=install({"old": METHOD.replace("api = 2", api)}))
    assert str(error.value) == (
        f"plugin 'old' (from old 1.2): KeepFirst {says}, and this version of moe-compressor has 2. Bring it up to what "
        f"docs/plugins.md says and set `api = 2`, or install the versions that belong together."
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("perview", "KeepFirst.perview overrides nothing; did you mean 'preview'? A name of the method's own that is"),
        ("need_text", "KeepFirst.need_text overrides nothing; did you mean 'needs_text'?"),
        ("tasks", "KeepFirst.tasks is not for a method to define: a task that `sources` names is measured too."),
        ("restore", "KeepFirst.restore is not for a method to define: what `moe.skip` was told is in the checkpoint"),
        (
            "needs_weights",
            "KeepFirst.needs_weights is not for a method to define: the core sees whether `edit` asks for",
        ),
        ("criteria", "KeepFirst.criteria is not for a method to define: the core sets it; a plugin offers its own by"),
    ],
)
def test_names_that_nothing_would_call(name: str, says: str, install: Install) -> None:
    override = f"    def {name}(self):\n        return None\n\n    def edit("
    with pytest.raises(PluginError) as error:
        load_plugins(found=install({"slip": METHOD.replace("    def edit(", override)}))
    assert str(error.value).startswith(f"plugin 'slip' (from slip 1.2): {says}")


def test_a_slip_in_a_base_class_is_found_and_names_of_its_own_are_not_refused(install: Install) -> None:
    body = (
        WHOLE + "    def _preview(self): ...\n    def best_layers(self): ...\nclass Whole(Half):\n    name = 'whole'\n"
    )
    assert list(load_plugins(found=install({"half": offer("[Whole]", body)})).methods) == ["whole"]
    with pytest.raises(PluginError, match=r"Half\.previews overrides nothing; did you mean 'preview'\?"):
        load_plugins(["half"], install({"slip": offer("[Whole]", body.replace("_preview(", "previews("))}))


def test_the_same_plugin_whole_is_taken(install: Install) -> None:
    assert list(load_plugins(found=install({"half": offer("[Half]", WHOLE)})).methods) == ["half"]


# --- overrides that cannot be asked

ADAPTER = """
from compressor.plugin import Adapter, Criterion, hookimpl
class Mine(Adapter):
    name = "mine"
    def explains(self, config): return False
    def structure(self, {}): ...
@hookimpl
def compressor_adapters(): return [Mine()]
@hookimpl
def compressor_criteria(): return [Criterion("mine", lambda {}: figures, "this test")]
"""


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            offer("[Half]", WHOLE.replace("edit(self, moe, decision)", "edit(self, moe)")),
            "Half.edit cannot be asked as edit(layer, decision), which the contract has: too many positional arguments",
        ),
        (
            offer("[Half]", WHOLE.replace("decide(self, layers,", "decide(self, layers, more,")),
            "Half.decide cannot be asked as decide(layers, statistics), which the contract has: missing a required "
            "argument: 'statistics'.",
        ),
        (
            offer("[Half]", WHOLE + "    def preview(self, moe, decision, *, exact): ...\n"),
            "Half.preview cannot be asked as preview(moe, decision), which the contract has: missing a required",
        ),
        (
            offer("[Half]", WHOLE + "    def needs_text(self): return False\n"),
            "Half.needs_text is a function, where the contract has a property: put @property above it, or write "
            "`needs_text = …`.",
        ),
        (offer("[Half]", WHOLE + "    describe = 3\n"), "Half.describe cannot be asked as describe(decision), which "),
        (
            ADAPTER.format("factory", "figures"),
            "Mine.structure cannot be asked as structure(factory, config), which the contract has: too many",
        ),
        (
            ADAPTER.format("factory, config", "figures, options"),
            "the criterion mine cannot be asked as score(figures): missing a required argument: 'options'.",
        ),
    ],
)
def test_overrides_that_cannot_be_asked(source: str, says: str, install: Install) -> None:
    with pytest.raises(PluginError) as error:
        load_plugins(found=install({"slip": source}))
    assert str(error.value).startswith(f"plugin 'slip' (from slip 1.2): {says}")


def test_overrides_that_can(install: Install) -> None:
    """Other names, more that is optional, static and class methods, `*args`."""
    body = (
        WHOLE.replace("edit(self, moe, decision)", "edit(self, *given)")
        + "    def describe(self, it, more=None): ...\n    @staticmethod\n    def cost(kl): ...\n"
        + "    @classmethod\n    def config_changes(cls, decision): ...\n    needs_text = False\n"
    )
    assert list(load_plugins(found=install({"half": offer("[Half]", body)})).methods) == ["half"]


# --- a third party's plugin


@pytest.mark.slow
def test_recipe_with_a_third_partys_method(tmp_path: Path) -> None:
    """In a process of its own: found on its path, as any installed distribution."""
    write_distribution(tmp_path, "keep-first", {"keep-first": ""}, METHOD)
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": list(range(16))}))
    recipe: dict[str, Any] = {
        "model": str(tiny_folder("mixtral")),
        "calibration": {"data": [{"tokens": str(tmp_path / "ids.jsonl")}]},
        "passes": [{"keep_first": {"count": 6}}, {"expert_pruning": {"keep": 4}}],
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    answer = subprocess.run(
        [sys.executable, "-m", "compressor.cli", "run", "--quiet", path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (answer.returncode, answer.stderr) == (0, "")
    record = json.loads((tmp_path / "out" / "compressor" / "record.json").read_text())
    assert record["versions"]["keep-first"] == "1.2"
    first, second = record["passes"]
    for layer in first["decision"]["layers"].values():
        assert layer["kept"] == [0, 1, 2, 3, 4, 5]
    for layer in second["decision"]["layers"].values():
        assert set(layer["kept"]) < {0, 1, 2, 3, 4, 5}
    # whoever loads the folder needs no plugin
    assert [layer.num_experts for layer in compressor.MoEModel(compressor.load(tmp_path / "out")[0]).layers] == [4] * 3


CHANGES = """    def config_changes(self, decision):
        return {changes}

    def edit("""


def write_recipe(folder: Path, output: str, **changes: Any) -> Path:
    """One for `keep_first` and a tiny Mixtral, whose output goes beside it."""
    (folder / "ids.jsonl").write_text(json.dumps({"input_ids": list(range(32))}))
    recipe: dict[str, Any] = {
        "model": str(tiny_folder("mixtral")),
        "calibration": {"data": [{"tokens": str(folder / "ids.jsonl")}]},
        "passes": [{"keep_first": {"count": 6}}, {"expert_pruning": {"keep": 4}}],
        "output": str(folder / output),
        **changes,
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_method_that_changes_the_config(tmp_path: Path, cli: Cli, install_from: InstallFrom) -> None:
    """In memory, from disk and by `apply`, also where another pass comes after it."""
    source = METHOD.replace("    def edit(", CHANGES.format(changes="{'kept_first': {'count': self.options.count}}"))
    write_distribution(tmp_path, "keep-first", {"keep-first": ""}, source)
    install_from(tmp_path)
    for weights in ("memory", "disk"):
        answer = cli("run", "--quiet", write_recipe(tmp_path, weights, weights=weights))
        assert (answer.status, answer.err) == (0, "")
    compressor.apply(
        tmp_path / "disk" / "compressor" / "decision.json", str(tiny_folder("mixtral")), tmp_path / "apply"
    )
    texts = [(tmp_path / name / "config.json").read_text() for name in ("memory", "disk", "apply")]
    config = json.loads(texts[0])
    assert (config["kept_first"], config["num_local_experts"]) == ({"count": 6}, 4)
    assert texts[0] == texts[1] == texts[2]
    assert compressor.load(tmp_path / "disk")[0].config.kept_first == {"count": 6}


@pytest.mark.parametrize("weights", ["memory", "disk"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            "{'num_local_experts': 3}",
            "has 'num_local_experts', which the core sets in config.json itself; leave it out",
        ),
        ("{'num_experts': 3}", "has 'num_experts', which the core sets"),
        ("{'num_experts_per_tok': 1}", "has 'num_experts_per_tok', which the core sets"),
        ("{'compressor': {}}", "has 'compressor', which the core sets"),
        ("{'a': {1}}", "has 'a', whose value is no JSON: Object of type set is not JSON serializable"),
    ],
)
def test_changes_of_the_config_that_are_refused(
    changes: str, says: str, weights: str, tmp_path: Path, cli: Cli, install_from: InstallFrom
) -> None:
    source = METHOD.replace("    def edit(", CHANGES.format(changes=changes))
    write_distribution(tmp_path, "keep-first", {"keep-first": ""}, source)
    install_from(tmp_path)
    answer = cli("run", "--quiet", write_recipe(tmp_path, "out", weights=weights))
    assert answer.status == 2
    assert f"keep_first: what was decided cannot be carried out: `config_changes` {says}" in answer.err
    assert not (tmp_path / "out").exists()


def page_source(name: str) -> str:
    """The code of docs/plugins.md that begins with this file's name."""
    page = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
    [source] = re.findall(rf"```python\n(# {name}\n.*?)```", page, re.DOTALL)
    return str(source)


def test_the_pages_statistic_of_inputs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
    [source] = re.findall(r"```python\n(class Squares\(InputStatistic\):.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "InputStatistic": InputStatistic}
    exec(source, names)
    squares = names["Squares"](2)
    squares.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), 1)
    squares.update(torch.tensor([[2.0, 1.0]]), 1)
    assert squares.tensors()["squares"].tolist() == [[0, 0], [14, 5]]


def test_a_criterion_with_a_statistic_of_its_own(tmp_path: Path, cli: Cli, install_from: InstallFrom) -> None:
    """As docs/plugins.md has it: the same in memory, from disk, and by `decide`; by what the routers answer."""
    write_distribution(tmp_path, "confident", {"confident": ""}, page_source("my_confident.py"))
    install_from(tmp_path)
    ids = [list(range(32)), list(range(30, 62))]
    for name, row in zip(("a", "b"), ids, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"input_ids": row}))
    recipe: dict[str, Any] = {
        "model": str(tiny_folder("mixtral")),
        "calibration": {"data": [{"tokens": str(tmp_path / f"{name}.jsonl"), "name": name} for name in ("a", "b")]},
        "passes": [{"expert_pruning": {"keep": 5, "criterion": "confident", "blend": "pooled"}}],
    }
    found = []
    for weights in ("memory", "disk"):
        path = tmp_path / f"{weights}.yaml"
        path.write_text(yaml.safe_dump({**recipe, "weights": weights, "output": str(tmp_path / weights)}))
        answer = cli("run", "--quiet", path)
        assert (answer.status, answer.err) == (0, "")
        record = json.loads((tmp_path / weights / "compressor" / "record.json").read_text())
        found.append(record["passes"][0]["decision"]["layers"])
    options = {"keep": 5, "blend": "pooled"}
    statistics = tmp_path / "disk" / "compressor" / "statistics.safetensors"
    found.append(compressor.decide(statistics, criterion="confident", **options)["passes"][0]["decision"]["layers"])
    assert found[0] == found[1] == found[2]
    # by hand, of the first layer, whose router sees the same whatever else is done
    model = compressor.load(tiny_folder("mixtral"))[0]
    with torch.no_grad():
        logits = model(torch.tensor(ids), output_router_logits=True).router_logits[0]
    assert found[0]["model.layers.0.mlp"]["kept"] == sorted(logits.abs().sum(0).topk(5).indices.tolist())


def test_figures_of_its_own_that_were_not_gathered(tmp_path: Path, cli: Cli, install_from: InstallFrom) -> None:
    write_distribution(tmp_path, "confident", {"confident": ""}, page_source("my_confident.py"))
    install_from(tmp_path)
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": list(range(32))}))
    recipe = {
        "model": str(tiny_folder("mixtral")),
        "calibration": {"data": [{"tokens": str(tmp_path / "ids.jsonl")}]},
        "passes": [{"expert_pruning": {"keep": 5, "criterion": "frequency"}}],
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli("run", "--quiet", tmp_path / "recipe.yaml").status == 0
    says = r"the criterion confident needs its own figures, `sums\.confident\.…`; observe again with it"
    with pytest.raises(compressor.RecipeError, match=says):
        compressor.decide(tmp_path / "out" / "compressor" / "statistics.safetensors", keep=5, criterion="confident")


def test_a_criterion_whose_statistic_would_see_nothing(install: Install) -> None:
    offered = '[Criterion("confident", lambda figures: 1 / 0, "this page", statistic=LogitSizes'
    source = page_source("my_confident.py")
    source = re.sub(r"\[Criterion\(.*?statistic=LogitSizes", lambda _: f"{offered}, needs_text=False", source)
    with pytest.raises(PluginError, match=r"confident has a statistic, which needs text; set `needs_text`"):
        load_plugins(found=install({"confident": source}))


def test_broken_plugin_stops_the_command_and_without_heals_it(
    tmp_path: Path, cli: Cli, install_from: InstallFrom
) -> None:
    write_distribution(tmp_path, "broken", {"broken": ""}, "import not_there_at_all")
    install_from(tmp_path)
    answer = cli("methods")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == (
        "error: plugin 'broken' (from broken 1.2) cannot be loaded: ModuleNotFoundError: No module named "
        "'not_there_at_all'. Mend or uninstall it, or run with --without broken.\n"
    )
    answer = cli("methods", "--without", "broken")
    assert (answer.status, answer.err) == (0, "")
    assert "expert_pruning" in answer.out

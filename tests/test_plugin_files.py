"""`--plugin FILE.py`, and `COMPRESSOR_TRACE`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from test_plugins import METHOD, Cli
from tiny_models import tiny_folder, token_ids, write_token_file

import compressor
from compressor.errors import CheckpointError, PluginError

HALVE = """
from __future__ import annotations

import torch
from pydantic import Field

from compressor.plugin import Criterion, Method, Options, Plan, Statistic, hookimpl


class HalveOptions(Options):
    experts: int = Field(default=1, description="experts to halve in every layer")


class Choices(Statistic):
    own_rules = {"counts": "total"}

    def __init__(self, layer):
        self.counts = torch.zeros(layer.num_experts, dtype=torch.float64)

    def update(self, tokens):
        self.counts += tokens.index_TK.flatten().bincount(minlength=len(self.counts)).cpu()

    def tensors(self):
        return {"counts": self.counts}


class Halve(Method[HalveOptions]):
    name = "halve"
    version = "1"
    api = 2
    options_type = HalveOptions

    def check(self, layers):
        return Plan(layers, changes_values=True)

    def statistic(self, layer):
        return Choices(layer)

    def decide(self, layers, statistics):
        found = {}
        for layer in layers:
            order = statistics[layer.path]["counts"].argsort(stable=True)
            found[layer.path] = {"halved": order[: self.options.experts].tolist()}
        return {"layers": found}

    def edit(self, layer, decision):
        for expert in decision["layers"][layer.path]["halved"]:
            layer.experts[expert].scale(0.5)


@hookimpl
def compressor_methods():
    return [Halve]


@hookimpl
def compressor_criteria():
    return [Criterion("seldom", lambda figures: -figures.tokens, "this test")]
"""


@pytest.fixture
def halve(tmp_path: Path) -> Path:
    path = tmp_path / "halve.py"
    path.write_text(HALVE)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_token_file(tmp_path / "ids.jsonl", [token_ids(24, seed=seed).tolist() for seed in range(2)])
    recipe = {
        "model": str(tiny_folder("mixtral")),
        "calibration": {"data": [{"tokens": str(tmp_path / "ids.jsonl")}]},
        "passes": [{"halve": {}}],
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_every_command_takes_a_file(halve: Path, recipe: Path, tmp_path: Path, cli: Cli) -> None:
    """By hand: of each layer's rarest expert the last matrix is half of what it was. `apply`: the same bytes."""
    assert "halve (version 1)" in cli("methods", "halve", "--plugin", halve).out
    unknown = cli("check", recipe)
    assert (unknown.status, "halve" in unknown.err) == (2, True)
    for command in (("check", recipe), ("run", recipe, "--quiet"), ("inspect", tiny_folder("mixtral"))):
        done = cli(*command, "--plugin", halve)
        assert (done.status, done.err) == (0, ""), command
    record = json.loads((tmp_path / "out" / "compressor" / "record.json").read_text())
    assert record["versions"]["halve.py"].startswith("sha256:")
    before, after = (load_file(one / "model.safetensors") for one in (tiny_folder("mixtral"), tmp_path / "out"))
    for number, layer in enumerate(record["passes"][0]["decision"]["layers"].values()):
        name = f"model.layers.{number}.block_sparse_moe.experts.{{}}.w2.weight"
        for expert in range(8):
            factor = 0.5 if expert in layer["halved"] else 1.0
            assert after[name.format(expert)].equal(before[name.format(expert)] * factor)
    kept, again = tmp_path / "out" / "compressor", tmp_path / "again"
    decided = cli("decide", kept / "statistics.safetensors", "--method", "halve", "--plugin", halve, "--output", again)
    assert (decided.status, decided.err) == (0, "")
    applied = cli(
        "apply", again / "decision.json", tiny_folder("mixtral"), "--plugin", halve, "--output", again / "it", "-q"
    )
    assert (applied.status, applied.err) == (0, "")
    files = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", again / "it")]
    assert files[0] == files[1]


def test_python_takes_a_file_and_reads_it_anew(halve: Path, recipe: Path) -> None:
    how: dict[str, Any] = {"plugin_files": [halve], "output": None}
    settings = yaml.safe_load(recipe.read_text())
    del settings["output"]
    layers = [one["halved"] for one in _layers(compressor.compress(settings, **how))]
    halve.write_text(HALVE.replace("argsort(stable=True)", "argsort(stable=True, descending=True)"))
    assert all(one != other for one, other in zip(_layers(compressor.compress(settings, **how)), layers, strict=True))


@pytest.mark.parametrize(
    ("code", "instead", "says"),
    [
        ("return Plan(layers, changes_values=True)", "pass", "check(layers) answers None, expected a Plan of these"),
        (
            "return Choices(layer)",
            "return Choices",
            "statistic(layer) answers <class 'plugin_file_halve.Choices'>, exp",
        ),
        (
            'return {"counts": self.counts}',
            "return self.counts",
            "model.layers.0.mlp: Choices.tensors() answers tensor(",
        ),
        ('{"layers": found}', "None", "decide(layers, statistics) answers None, expected a mapping {"),
        ('{"layers": found}', "found", "decide(layers, statistics) answers a mapping of 'model.layers.0.mlp', 'model."),
        (
            ".tolist()}",
            "}",
            "decide(layers, statistics) answers what is no JSON: Object of type Tensor is not JSON seria",
        ),
    ],
)
def test_answers_of_another_kind(code: str, instead: str, says: str, halve: Path, recipe: Path) -> None:
    halve.write_text(HALVE.replace(code, instead))
    with pytest.raises(PluginError, match=f"^{re.escape(says)}|^halve: {re.escape(says)}"):
        compressor.compress(recipe, plugin_files=[halve])


def _layers(result: Any) -> list[Any]:
    return list(result.record["passes"][0]["decision"]["layers"].values())


def test_a_run_does_not_go_on_with_another_file(halve: Path, recipe: Path, cli: Cli) -> None:
    halve.write_text(HALVE.replace("        found = {}\n", "        raise KeyboardInterrupt\n"))
    assert cli("run", recipe, "--plugin", halve, "--quiet").status == 130
    halve.write_text(HALVE)
    with pytest.raises(
        CheckpointError, match=r"^the run cannot go on: versions\.halve\.py was 'sha256:\w+', is 'sha256:"
    ):
        compressor.compress(recipe, plugin_files=[halve], resume=True)
    halve.write_text(HALVE.replace("        found = {}\n", "        raise KeyboardInterrupt\n"))
    assert cli("run", recipe, "--plugin", halve, "--quiet", "--resume").status == 130  # it went on, to the same place


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("none.py", None, "--plugin {}: it cannot be read: No such file or directory."),
        (".", None, "--plugin {}: it cannot be read: Is a directory."),
        (
            "broken.py",
            "import not_there_at_all",
            "plugin 'broken' (from {} sha256:…) cannot be loaded: ModuleNotFoundError: No module named "
            "'not_there_at_all'. Mend it, or leave out --plugin.",
        ),
        (
            "script.py",
            "import sys; sys.exit(3)",
            "plugin 'script' (from {} sha256:…) cannot be loaded: SystemExit: 3. Mend it",
        ),
        ("slip.py", "def (", "plugin 'slip' (from {} sha256:…) cannot be loaded: SyntaxError: "),
        ("zero.py", "\0", "plugin 'zero' (from {} sha256:…) cannot be loaded: "),
        (
            "empty.py",
            "",
            "plugin 'empty' (from {} sha256:…): empty.py has no function marked @hookimpl, called compressor_meth",
        ),
        (
            "old.py",
            METHOD.replace("api = 2", "api = 1"),
            "plugin 'old' (from {} sha256:…): KeepFirst was written for `api = 1`",
        ),
        (
            "wanda.py",
            METHOD,
            "two plugins are called 'wanda': compressor_wanda (from moe-compressor) and wanda.py (from wanda.py). "
            "Uninstall or rename one of them.",
        ),
        (
            "mine.py",
            METHOD.replace('"keep_first"', '"wanda"'),
            "two plugins offer a method called 'wanda': mine and wanda. Run with --without one of them, or rename it "
            "in a file of yours.",
        ),
    ],
)
def test_files_that_are_refused(name: str, text: str | None, says: str, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    done = cli("methods", "--plugin", path)
    assert (done.status, done.out) == (2, "")
    said = re.sub(r"sha256:\w+", "sha256:…", done.err)
    assert said.startswith(f"error: {says.format(path.name if '(from {}' in says else path)}")


def test_a_file_instead_of_what_is_installed(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "wanda.py"
    path.write_text(METHOD)
    done = cli("methods", "--without", "wanda", "--plugin", path, "--json")
    assert done.status == 0
    [mine] = [plugin for plugin in json.loads(done.out) if plugin["plugin"] == "wanda"]
    assert (mine["distribution"], [one["name"] for one in mine["methods"]]) == ("wanda.py", ["keep_first"])
    assert cli("methods", "--without", "wanda", "--plugin", path, "--plugin", path, "--json").out == done.out


# --- what is called


def test_trace(halve: Path, recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("COMPRESSOR_TRACE", "1")
    assert cli("run", recipe, "--plugin", halve, "--quiet").status == 0
    calls = [record.getMessage().rpartition(": ")[0] for record in caplog.records if record.name == "compressor.trace"]
    assert all(record.getMessage().endswith(" ms") for record in caplog.records if record.name == "compressor.trace")
    steps = ["halve.check", *(f"halve.{step} model.layers.1.mlp" for step in ("statistic", "statistic.update", "edit"))]
    places = [calls.index(step) for step in [*steps[:3], "halve.decide", steps[3]]]
    assert places == sorted(places)
    assert not [call for call in calls if call.startswith("halve.preview")]  # it has none
    caplog.clear()
    monkeypatch.delenv("COMPRESSOR_TRACE")
    assert cli("methods", "--plugin", halve).status == 0
    assert caplog.records == []

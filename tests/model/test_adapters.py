"""A plugin that explains a family which structure cannot: remote code whose expert count goes by a name of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_plugins import write_distribution
from tiny_models import REMOTE_CODE, random_model, write_checkpoint, write_token_file

Cli = Callable[..., Any]
InstallFrom = Callable[[Path], None]

ADAPTER = """
from compressor.plugin import Adapter, ConfigLeaf, find_structure, hookimpl


class SpecialistsAdapter(Adapter):
    name = "specialists"

    def explains(self, config):
        return config.model_type == "specialists"

    def structure(self, factory, config):
        return find_structure(factory, config, count=ConfigLeaf((), "num_specialists"))


@hookimpl
def compressor_adapters():
    return [SpecialistsAdapter()]
"""


@pytest.fixture(scope="module")
def specialists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with code of its own, in which no integer of the config speaks of experts."""
    folder = tmp_path_factory.mktemp("models") / "specialists"
    write_checkpoint(random_model("mixtral4"), folder, code=REMOTE_CODE / "mixtral4")
    for path in [*folder.glob("*.py"), folder / "config.json"]:
        text = path.read_text(encoding="utf-8").replace("num_local_experts", "num_specialists")
        path.write_text(text.replace('"mixtral4"', '"specialists"'), encoding="utf-8")
    return folder


def recipe_file(folder: Path, model: Path, keep: Any) -> Path:
    ids = write_token_file(
        folder / "ids.jsonl", [[(7 * row + column) % 60 + 2 for column in range(24)] for row in range(4)]
    )
    recipe = {
        "model": str(model),
        "trust_remote_code": True,
        "calibration": {"batch_size": 2, "data": [{"tokens": str(ids)}]},
        "passes": [{"expert_pruning": {"keep": keep}}],
        "output": str(folder / "smaller"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_structure_alone_refuses(specialists: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("run", recipe_file(tmp_path, specialists, 6))
    assert done.status == 2, done.err
    assert "specialists: no routed experts found" in done.err
    assert not (tmp_path / "smaller").exists()


@pytest.mark.parametrize("keep", [6, {0: 4, 1: 6}])
def test_with_its_adapter(specialists: Path, tmp_path: Path, keep: Any, cli: Cli, install_from: InstallFrom) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    write_distribution(plugins, "specialists-adapter", {"specialists": ""}, ADAPTER)
    install_from(plugins)
    done = cli("run", recipe_file(tmp_path, specialists, keep), "--quiet")
    assert done.status == 0, done.err
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    if keep == 6:
        assert config["num_specialists"] == 6
        assert "compressor" not in config
    else:
        assert config["num_specialists"] == 8
        assert list(config["compressor"]["num_experts"].values()) == [4, 6, 8]
        assert "`compressor.load` reads it, `AutoModelForCausalLM.from_pretrained`" in " ".join(
            (tmp_path / "smaller" / "README.md").read_text().split()
        )
    inspected = cli("inspect", specialists, "--trust-remote-code")
    assert inspected.status == 0, inspected.err
    assert "num_specialists" in inspected.out


def test_an_adapter_that_is_none(tmp_path: Path, cli: Cli, install_from: InstallFrom) -> None:
    source = (
        "from compressor.plugin import hookimpl\n\n\n@hookimpl\ndef compressor_adapters():\n    return [object()]\n"
    )
    write_distribution(tmp_path, "wrong", {"wrong": ""}, source)
    install_from(tmp_path)
    done = cli("methods")
    assert done.status == 2
    assert "is not an instance of compressor.plugin.Adapter with a `name`" in done.err

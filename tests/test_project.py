"""The project itself: what is public, who imports whom, what is documented, and what the wheel holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import compressor
import compressor.plugin
from compressor.cli import app
from compressor.data.demo import MODEL_FILES
from compressor.plugins import load_plugins

ROOT = Path(__file__).parents[1]
CORE = ROOT / "compressor"
PLUGINS = sorted(path for path in (ROOT / "plugins").iterdir() if (path / "__init__.py").exists())

ORDER = (
    "__main__",
    "cli",
    "plugin_kit",
    "testing",
    "run",
    "plugin",
    "plugins",
    "recipe",
    "selection",
    "edit",
    "evaluation",
    "serving",
    "method",
    "observe",
    "checkpoint",
    "model",
    "data",
    "machine",
    "report",
    "_version",
    "errors",
    "wording",
)
"""The core's packages and single files, top to bottom, as in docs/architecture.md: each imports only those below it."""

FOR_USERS = [
    "CalibrationError",
    "CheckpointError",
    "CompressionResult",
    "CompressorError",
    "DiskError",
    "EvaluationError",
    "MoELayer",
    "MoEModel",
    "PluginError",
    "ProcessError",
    "Processes",
    "ProgramError",
    "RecipeError",
    "SkipRule",
    "UnsupportedModelError",
    "VerificationError",
    "__version__",
    "apply",
    "check",
    "compare",
    "compress",
    "decide",
    "evaluate",
    "inspect",
    "load",
    "push",
    "restore",
    "serve_check",
    "sweep",
]
FOR_PLUGINS = [
    "PLUGIN_API",
    "Adapter",
    "CalibrationError",
    "CheckpointError",
    "Column",
    "CompressorError",
    "ConfigLeaf",
    "Criterion",
    "Decision",
    "Description",
    "ExpertFigures",
    "ExpertSelection",
    "FileName",
    "FilePath",
    "Gathered",
    "Healing",
    "InputStatistic",
    "JoinedStatistic",
    "LayerWeights",
    "LinearSite",
    "Measuring",
    "Method",
    "MoELayer",
    "MoEModel",
    "OptionError",
    "Options",
    "Plan",
    "PluginError",
    "Processes",
    "ProgramError",
    "RankedChunk",
    "RankedStatistic",
    "RecipeError",
    "RoutedTokens",
    "RoutingRule",
    "Rule",
    "SelectionOptions",
    "SkipRule",
    "Statistic",
    "Structure",
    "TaskSource",
    "Training",
    "UnsupportedModelError",
    "Work",
    "allocate",
    "check_layer_names",
    "count_problem",
    "fewer_experts",
    "fewest_losses",
    "find_structure",
    "hookimpl",
    "kept_at_random",
    "measured_of",
]


def imports(file: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import in a file, also inside functions; but not those for type checkers only."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def core_modules() -> dict[str, list[Path]]:
    """Top-level module of the core → its files."""
    found: dict[str, list[Path]] = {}
    for file in sorted(CORE.rglob("*.py")):
        found.setdefault(file.relative_to(CORE).with_suffix("").parts[0], []).append(file)
    return found


# --- what is public


@pytest.mark.parametrize(("module", "names"), [(compressor, FOR_USERS), (compressor.plugin, FOR_PLUGINS)])
def test_all_is_exact(module: Any, names: list[str]) -> None:
    assert module.__all__ == names
    assert all(getattr(module, name) is not None for name in names)
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'prune'"):
        _ = module.prune


def test_what_both_offer_is_the_same() -> None:
    both = set(FOR_USERS) & set(FOR_PLUGINS)
    assert {"MoEModel", "MoELayer", "SkipRule", "CheckpointError"} <= both
    assert all(getattr(compressor, name) is getattr(compressor.plugin, name) for name in both)


def test_no_room_hides_a_public_name() -> None:
    """A package that is imported becomes an attribute of `compressor`, whatever else goes by its name."""
    assert {path.stem for path in CORE.iterdir()} & set(FOR_USERS) == set()


@pytest.mark.parametrize("module", [compressor, compressor.plugin])
def test_type_checkers_see_the_same_names(module: Any) -> None:
    """Imports under TYPE_CHECKING mirror the names that are imported on first use."""
    tree = ast.parse(Path(module.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: str(node.module).removeprefix("compressor.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == module._HOME


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, compressor.plugin; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


# --- who imports whom


@pytest.mark.parametrize("name", sorted(core_modules().keys() - {"__init__"}))
def test_imports_go_downwards(name: str) -> None:
    assert name in ORDER, f"{name}: give it a place in ORDER"
    below = set(ORDER[ORDER.index(name) + 1 :])
    for file in core_modules()[name]:
        for module, imported in imports(file):
            if module.split(".")[0] != "compressor":
                continue
            target = module.split(".")[1] if "." in module else str(imported)
            assert target == name or target in below, (
                f"{file.relative_to(ROOT)} imports {target}, which stands above it"
            )


LONGEST_CHAIN = 12
"""Files, each of which imports the next: from `__main__` down to `errors`."""


def files_imported() -> dict[str, set[str]]:
    """Every file of the core, as a module → the files it imports, also inside functions and for type checkers only."""
    paths = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in CORE.rglob("*.py")}
    modules = {path.removesuffix(".__init__"): file for file, path in paths.items()}
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "compressor":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found[name].add(whole if whole in modules else str(node.module))
    return found


def longest_chain(imported: dict[str, set[str]]) -> list[str]:
    """The longest list of files, each of which imports the next. Raises CycleError where some import each other."""
    below: dict[str, list[str]] = {}
    for name in TopologicalSorter(imported).static_order():
        below[name] = [name, *max((below[other] for other in imported[name]), key=len, default=[])]
    return max(below.values(), key=len)


def test_imports_have_no_circle_and_no_long_chain() -> None:
    found = longest_chain(files_imported())
    assert len(found) <= LONGEST_CHAIN, " → ".join(found)


def test_a_circle_is_found() -> None:
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]
    with pytest.raises(CycleError):
        longest_chain({"a": {"b"}, "b": {"a"}})


def test_the_package_itself_imports_only_what_is_light() -> None:
    assert {module for module, _ in imports(CORE / "__init__.py") if module.startswith("compressor")} == {
        "compressor._version",
        "compressor.errors",
    }


OF_THE_LOADER = (
    "core_model_loading",
    "conversion_mapping",
    "modeling_utils",
    "_move_missing_keys_from_meta_to_device",
    "_initialize_missing_keys",
    "_adjust_missing_and_unexpected_keys",
)
"""Modules and methods of transformers that only its own loader is meant to use."""


def test_one_file_calls_what_transformers_loads_with() -> None:
    files = [file for folder in (CORE, *PLUGINS) for file in folder.rglob("*.py")]
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    for word in OF_THE_LOADER:
        assert [name for name, text in texts.items() if word in text] == ["compressor/checkpoint/conversion.py"], word


def test_core_imports_no_plugin() -> None:
    for file in CORE.rglob("*.py"):
        for module, _ in imports(file):
            assert not module.startswith("compressor_"), f"{file.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_plugins_import_only_what_is_public(plugin: Path) -> None:
    for file in plugin.rglob("*.py"):
        for module, name in imports(file):
            top = module.split(".")[0]
            if top == "compressor":
                assert module == "compressor.plugin", f"{file.name} imports {module}"
                assert name in FOR_PLUGINS, f"{file.name} imports {name}, which is not public"
            elif top.startswith("compressor_"):
                assert top == plugin.name, f"{file.name} imports another plugin, {module}"


def test_one_word_all_the_way() -> None:
    """Folder `compressor_expert_pruning`, entry point `expert-pruning`, key `expert_pruning`, class `ExpertPruning`."""
    ours = {entry.name: entry.value for entry in entry_points(group="compressor")}
    assert set(ours.values()) == {path.name for path in PLUGINS}
    for plugin in load_plugins().plugins:
        word = ours[plugin.name].removeprefix("compressor_")
        assert plugin.name == word.replace("_", "-")
        [method] = plugin.methods
        assert method.name == word
        assert method.__name__ == word.title().replace("_", "")


def test_every_option_of_every_method_is_described() -> None:
    for method in load_plugins().methods.values():
        assert method.__doc__
        for name, field in method.options_type.model_fields.items():
            assert field.description, f"{method.name}.{name}"


# --- what is documented

DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("plugins/*/README.md")]
DOCUMENTS += [*(ROOT / "benchmarks").glob("*.md"), *(ROOT / "recipes").glob("*.yaml")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_names_in_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in set(re.findall(r"(?<![\w./-])compressor\.([A-Za-z_][\w.]*\w)", text)):
        found: Any = compressor
        for part in name.split("."):
            if isinstance(found, ModuleType) and not hasattr(found, part):
                import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_commands_are_documented(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        assert parameter.help, f"{name}: {parameter.name}"


def test_the_documents_name_every_command() -> None:
    written = " ".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert [name for name in COMMANDS if f"compressor {name}" not in written] == []


# --- what the wheel holds


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [path] = folder.iterdir()
    return path


def test_wheel_holds_the_code_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    information = f"moe_compressor-{compressor.__version__}.dist-info/"
    expected = {
        path.relative_to(folder.parent).as_posix()
        for folder in (CORE, *PLUGINS)
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"compressor/recipes/{path.name}" for path in (ROOT / "recipes").glob("*")}
    assert {name for name in names if not name.startswith(information)} == expected
    assert "compressor/py.typed" in names
    assert {f"compressor/data/demo/model/{name}" for name in MODEL_FILES} <= names
    assert f"{information}licenses/LICENSE" in names


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.name == f"moe_compressor-{compressor.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size <= 12 * 10**6


def test_wheel_announces_the_command_and_the_plugins(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        text = file.read(f"moe_compressor-{compressor.__version__}.dist-info/entry_points.txt").decode()
    parser = ConfigParser()
    parser.read_string(text)
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"compressor": "compressor.cli:main"},
        "compressor": {path.name.removeprefix("compressor_").replace("_", "-"): path.name for path in PLUGINS},
    }
